"""Imports point down, and what must stay free of torch or of pickle does."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from scripts import style_report

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "chatglm": 0,
    "finetune": 1,
    "predictor": 2,
    "serving": 3,
}  # everything else of ours stands above them
HEAVY = {"torch", "transformers", "deepspeed", "peft", "numpy", "datasets", "safetensors"}
TORCH_FREE = [
    "chatglm/__init__.py",
    "chatglm/adapter_folders.py",
    "chatglm/conversations.py",
    "chatglm/families.py",
    "chatglm/files.py",
    "chatglm/folders.py",
    "chatglm/histories.py",
    "chatglm/runs.py",
    "chatglm/saving.py",
    "chatglm/export/__init__.py",
    "chatglm/export/__main__.py",
    "chatglm/export/command.py",
    "chatglm/export/templates.py",
    "finetune/__init__.py",
    "chatglm/commands.py",
    "finetune/benchmark/data.py",
    "finetune/benchmark/encoding.py",
    "finetune/benchmark/questions.py",
    "finetune/benchmark/results.py",
    "finetune/benchmark/tasks.py",
    "finetune/config.py",
    "finetune/demo_layout.py",
    "finetune/ds_file.py",
    "finetune/evaluation/metrics.py",
    "finetune/files.py",
    "finetune/flag_effects.py",
    "finetune/flag_groups.py",
    "finetune/evaluation/replicas.py",
    "finetune/flags.py",
    "finetune/launched.py",
    "finetune/memory/*.py",
    "finetune/methods.py",
    "finetune/placing.py",
    "finetune/record.py",
    "finetune/reinforcement/config.py",
    "finetune/reinforcement/phases.py",
    "finetune/reinforcement/rewards.py",
    "finetune/reinforcement/rollout.py",
    "finetune/report.py",
    "finetune/start_adapter.py",
    "finetune/rows/fields.py",
    "finetune/rows/formats.py",
    "train.py",
]
PURE = ["", "cost_model", "deployment", "policies", "simulate"]  # rooms of serving/
# What the pure rooms take of the floors below.
TAKEN = {
    "chatglm.files",
    "chatglm.commands",
    "chatglm.evidence",
    "finetune.config",
    "finetune.files",
    "finetune.memory.shapes",
    "finetune.placing",
    "predictor.decoder",
    "predictor.prediction",
}
PACKAGES = ("chatglm", "finetune", "predictor", "serving", "scripts", "benchmarks")
SOURCES = [*ROOT.glob("*.py")]
for package in PACKAGES:
    SOURCES += (ROOT / package).rglob("*.py")
SOURCES.sort()


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST):
    """Every (top package, node) that a tree imports, in functions too.

    Relative imports resolve to it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], node


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_point_down(path):
    own = LAYERS.get(path.relative_to(ROOT).parts[0], 4)
    forbidden = {name for name, layer in LAYERS.items() if layer > own}
    if own < 4:
        forbidden |= {"train", "merge_lora", "predict", "scripts", "benchmarks", "tests"}
    found = {name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert not found & forbidden


@pytest.mark.parametrize("name", [named(p) for n in TORCH_FREE for p in sorted(ROOT.glob(n))])
def test_module_level_is_free_of_torch(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    assert not {package for package, node in imports(tree) if id(node) not in inside} & HEAVY


@pytest.mark.parametrize("room", PURE)
def test_serving_is_pure(room):
    """numpy, scipy and the standard library, in functions too; of lower floors only TAKEN.

    Pictures may import matplotlib.
    """
    for path in (ROOT / "serving" / room).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {package for package, _ in imports(tree)} - set(sys.stdlib_module_names)
        assert found <= {
            "numpy",
            "scipy",
            "matplotlib",
            "serving",
            "predictor",
            "finetune",
            "chatglm",
        }, path
        taken = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        below = {
            module for module in taken if module.startswith(("predictor", "finetune", "chatglm"))
        }
        assert below <= TAKEN, path


ROOMS = {  # a room of serving/ -> what of serving/ it may import
    "policies": {"request", "policies"},
    "cost_model": {"cost_model"},
    "deployment": {"request", "cost_model", "deployment"},
    "engines": {"request", "cost_model", "engines", "scheduler"},
    "simulate": {"request", "scheduler", "policies", "cost_model", "deployment", "simulate"},
    "replicas": {
        "request",
        "scheduler",
        "policies",
        "cost_model",
        "deployment",
        "engines",
        "replicas",
    },
    "server": {
        "request",
        "scheduler",
        "policies",
        "cost_model",
        "engines",
        "replicas",
        "server",
        "tools",
    },
    "gateway": {"request", "scheduler", "policies", "server", "gateway"},
    "cluster": {"deployment", "replicas", "server", "gateway", "cluster"},
    "server/page": {"request", "engines", "server", "tools"},
    "run_requests": {
        "request",
        "scheduler",
        "policies",
        "cost_model",
        "engines",
        "replicas",
        "simulate",
        "run_requests",
    },
    "demo": {
        "request",
        "scheduler",
        "policies",
        "cost_model",
        "deployment",
        "engines",
        "simulate",
        "run_requests",
        "demo",
    },
    "sweep": {
        "request",
        "policies",
        "cost_model",
        "deployment",
        "engines",
        "replicas",
        "simulate",
        "run_requests",
        "sweep",
    },
    "monitor": {"monitor"},
    "tools": {"tools"},
    "feedback": {"chat", "feedback"},
    "endpoints": {"request", "policies", "engines", "replicas", "server", "endpoints"},
    "chat": {"request", "policies", "cost_model", "engines", "endpoints", "chat", "tools"},
    "batch": {"policies", "endpoints", "batch"},
    "rollouts": {"request", "scheduler", "policies", "engines", "simulate", "rollouts"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_serving_point_down(room):
    for path in (ROOT / "serving" / room).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        taken = {module.split(".")[1] for module in modules if module.startswith("serving.")}
        assert taken <= ROOMS[room], path


def test_nothing_imports_in_a_circle():
    assert style_report.import_circles() == []


@pytest.mark.parametrize(
    "name", ["predictor.runtime", "predictor.prediction", "serving.deployment.deployers"]
)
def test_serving_loads_no_training_code(name):
    heavy = ("torch", "transformers", "deepspeed", "peft", "scipy")
    code = f"import sys, {name}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# The one file that runs code from outside: in a process that is locked in first.
SANDBOXED = "serving/tools/sandbox/worker.py"


@pytest.mark.parametrize("path", [p for p in SOURCES if named(p) != SANDBOXED], ids=named)
def test_nothing_from_outside_is_run(path):
    """No eval, exec or pickle.load(s); torch.load says weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "compile", "__import__"), node.lineno
        assert name.split(".")[0] not in ("marshal", "shelve", "joblib", "dill", "cloudpickle"), (
            node.lineno
        )
        assert name not in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "yaml.load",
            "os.system",
            "np.load",
        ), node.lineno
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert given.get("trust_remote_code") in (None, "False") and given.get("shell") in (
            None,
            "False",
        ), node.lineno
        if name == "torch.load":
            assert given.get("weights_only") == "True", node.lineno


# A file of text -> how many arguments say its encoding, which is the machine's otherwise.
TEXT_CALLS = {"read_text": 1, "write_text": 2}
SHIPPED = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in LAYERS or p.parent == ROOT]


def test_text_files_are_utf_8_on_every_machine():
    """train_config.json with Chinese in it was of another encoding where the locale had one."""
    found = []
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            wanted = TEXT_CALLS.get(node.func.attr)
            keywords = [keyword.arg for keyword in node.keywords]
            if wanted and "encoding" not in keywords and len(node.args) < wanted:
                found.append(f"{named(path)}:{node.lineno}")
    assert found == []


def test_files_stay_short():
    """A file is read at one go: none over 700 lines, most under 450."""
    files = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in LAYERS]
    lengths = {named(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert max(lengths.values()) <= 700, max(lengths, key=lengths.get)
    assert sum(length <= 450 for length in lengths.values()) >= 0.85 * len(lengths)


SHELL_IMPORT = re.compile(
    r"^from ((?:chatglm|finetune|predictor|serving)[\w.]*) import (.+)$", re.MULTILINE
)


def test_what_shell_scripts_import_is_there():
    """The Python in scripts/*.sh runs in slow tests alone; a name that moved is seen here."""
    found = 0
    for script in (ROOT / "scripts").rglob("*.sh"):
        for module, names in SHELL_IMPORT.findall(script.read_text(encoding="utf-8")):
            for name in names.split(","):
                assert hasattr(import_module(module), name.strip()), f"{script}: {module}: {name}"
                found += 1
    assert found


OTHERS = {"finetune_hf.py"}  # other projects' programs


def mapped_modules() -> dict[Path, set[str]]:
    """The folders of docs/architecture.md with the modules that each one's lines name."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found: dict[Path, set[str]] = {}
    open_folders: list[tuple[int, Path]] = []  # with their indents
    for line in text.split("## ")[0].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent < 4 or not line.strip():
            continue
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        if match := re.match(r"([\w/]+)/ ", line.strip()):
            parent = open_folders[-1][1] if open_folders else ROOT
            open_folders.append((indent, parent / match[1]))
        if open_folders:
            names = re.findall(r"(?<![\w/*])\w+\.py\b", line)
            found.setdefault(open_folders[-1][1], set()).update(names)
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_the_map_names_every_module(package):
    """docs/architecture.md, under the module's own folder."""
    mapped = mapped_modules()
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.name in ("__init__.py", "__main__.py", "command.py"):
            continue
        assert path.name in mapped.get(path.parent, set()), f"{path} is not on the map"


def test_the_map_names_no_module_that_is_gone():
    known = {path.name for package in LAYERS for path in (ROOT / package).rglob("*.py")}
    known |= {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]}
    known |= {path.name for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]}
    for folder, names in mapped_modules().items():
        assert folder.is_dir(), folder
        assert names - OTHERS <= known, f"{folder}: {sorted(names - OTHERS - known)}"
