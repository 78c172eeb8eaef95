"""A cluster's parts without Ray: the ledger's ranking, scaling, bundles, flags, the front."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from finetune.placing import ReplicaSpec, StageSpec
from serving.cluster import front as fronts
from serving.cluster.asgi import response_of
from serving.cluster.autoscaling import PREDICTED_TOKENS, PredictedTokensPolicy
from serving.cluster.bundles import ReplicaPlace, common_place, place_of_replica
from serving.cluster.command import main
from serving.cluster.flags import NOT_SHARED, check_cluster_flags, parse_cluster_flags, words_of
from serving.cluster.front import AttemptFailed, Front, FrontOptions
from serving.cluster.ledger import Ledger
from serving.cluster.messages import Accepted, ForwardedRequest, ResponseHead
from serving.cost_model.devices import Cluster, Device, Link
from serving.cost_model.model import ModelSizes, read_profile
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import MODULES, Need, modules_of
from serving.gateway.in_flight import in_flight_answer
from serving.replicas.planning import make_plan
from serving.replicas.served_sizes import ServedSizes
from serving.server.flags import ServerFlags
from tests.serving.gateway.engines import PATH, WordPredictor, answer_of, stream_of

# ---- the ledger, by which the router ranks


def work(tokens: float, prompt_tokens: int = 10):
    """A passage of `tokens` expected, and of 1.8 times as many at q90."""
    [prediction] = WordPredictor().predict(f"say {tokens}")
    return in_flight_answer(
        None, prediction, prompt_tokens=prompt_tokens, arrival_s=0.0, slo_s=30.0
    )


def given(ledger: Ledger, tokens: float, names=("a", "b")) -> tuple[int, list[str]]:
    number = ledger.open(work(tokens))
    return number, ledger.ranked(number, names)


def outstanding(ledger: Ledger) -> dict[str, int]:
    return {row["replica"]: row["outstanding_tokens"] for row in ledger.status()}


def test_the_least_predicted_work_comes_first():
    """Three requests at once: each counts before the replica has accepted it."""
    ledger = Ledger()
    assert given(ledger, 400)[1] == ["a", "b"]
    assert given(ledger, 100)[1] == ["b", "a"]
    assert given(ledger, 100)[1] == ["b", "a"]
    assert given(ledger, 100)[1] == ["b", "a"]
    assert outstanding(ledger) == {"a": 401, "b": 303}


def test_progress_and_ends_free_a_replica():
    ledger = Ledger()
    first, _ = given(ledger, 400)
    given(ledger, 300)
    ledger.progress(first, 350)
    assert given(ledger, 10)[1] == ["a", "b"]
    ledger.close(first)
    ledger.close(first)  # a second end changes nothing
    assert outstanding(ledger)["a"] == 11


@pytest.mark.parametrize("kv_tokens, first", [(None, "a"), (450, "b")])
def test_a_full_kv_memory_comes_last(kv_tokens, first):
    """a has made most of its answer, whose keys and values stay: it has no room for another."""
    ledger = Ledger(kv_tokens)
    number, _ = given(ledger, 200)
    given(ledger, 100)
    ledger.progress(number, 190)
    assert [row["kv_taken"] for row in ledger.status()] == [370, 190]
    assert outstanding(ledger) == {"a": 11, "b": 101}
    assert given(ledger, 60)[1][0] == first


def test_a_replica_that_failed_comes_last_and_a_gone_one_not_at_all():
    ledger = Ledger()
    number, ranked = given(ledger, 100)
    assert ranked[0] == "a" and ledger.fail(number)
    assert ledger.ranked(number, ("a", "b")) == ["b", "a"]
    assert ledger.ranked(number, ("a", "c")) == ["c", "a"]
    assert [row["replica"] for row in ledger.status()] == ["a", "c"]
    assert ledger.status()[0]["failures"] == 1
    assert not ledger.fail(number)  # a and c have both failed it


def test_what_ray_chose_is_what_counts():
    """Ray takes a later rank where the first is full."""
    ledger = Ledger()
    number, _ = given(ledger, 100)
    ledger.enter(number, "b")
    assert outstanding(ledger) == {"a": 0, "b": 101}
    ledger.enter(number, "b")
    assert outstanding(ledger) == {"a": 0, "b": 101}
    ledger.close(number)
    ledger.enter(number, "a")  # its client has left
    assert outstanding(ledger) == {"a": 0, "b": 0}
    assert ledger.ranked(number, ("a", "b")) == ["a", "b"]


# ---- the autoscaler's policy


def wanted(metrics, target=2) -> float:
    policy = PredictedTokensPolicy(tokens_per_replica=1000)
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target)
    return policy(context)[0]


def test_replicas_follow_the_predicted_tokens():
    assert wanted({PREDICTED_TOKENS: {"a": 2500.0, "b": 1500.0}}) == 4
    assert wanted({PREDICTED_TOKENS: {"a": 0.0, "b": 300.0}}) == pytest.approx(0.3)


def test_without_figures_nothing_changes():
    assert wanted(None) == wanted({}) == wanted({"other": {"a": 1.0}}) == 2
    assert wanted({PREDICTED_TOKENS: {}}, target=5) == 5


# ---- placements as bundles


def chain(*stages: tuple[str, int, int, int | None]) -> ReplicaSpec:
    return ReplicaSpec(tuple(StageSpec(*stage) for stage in stages))


def test_one_device_is_a_bundle():
    place = place_of_replica(chain(("cuda:3", 0, 28, None)), "layers.{}", 28)
    assert place.bundles == [{"CPU": 1.0, "GPU": 1.0}] and place.devices is None
    place = place_of_replica(chain(("cpu", 0, 28, 6)), "layers.{}", 28)
    assert place.bundles == [{"CPU": 6.0}]


def test_a_chain_is_one_bundle_with_its_devices_from_0():
    replica = chain(("cuda:5", 0, 2, None), ("cuda:2", 2, 3, None))
    place = place_of_replica(replica, "h.{}", 3)
    assert place.bundles == [{"CPU": 2.0, "GPU": 2.0}]
    assert place.devices == "cuda:0,cuda:1"
    assert place.device_map == {"h.0": 0, "h.1": 0, "h.2": 1}
    with pytest.raises(ValueError, match="3 of 4 layers"):
        place_of_replica(replica, "h.{}", 4)
    with pytest.raises(ValueError, match="some that differ"):
        common_place([place, ReplicaPlace()])
    assert common_place([place, place]) is place


def test_the_deployer_s_chain_is_the_bundle():
    """ChatGLM2-6B on two CPU processes, which the even deployer gives half the layers each."""
    model = ModelSizes.from_config("chatglm2-6b")
    device = Device("x", 2**35, 1e10, 1e11, kind="cpu", threads=3)
    link = Link(1e9, 1e-4)
    cluster = Cluster((device, device), ((None, link), (link, None)))
    profile = read_profile("datasheet")
    placement = DEPLOYERS["even"].place(model, cluster, Need(64), profile)
    [replica] = make_plan(placement, profile, ServedSizes(model)).replicas
    place = place_of_replica(replica, MODULES[modules_of(model)][1], model.layers)
    assert place.bundles == [{"CPU": 6.0}] and place.devices == "cpu@3,cpu@3"
    first, last = "transformer.encoder.layers.0", "transformer.encoder.layers.27"
    assert place.device_map[first] == 0 and place.device_map[last] == 1


# ---- flags


def flags_of(*words: str):
    return parse_cluster_flags(["up", "--model", "m", *words])[1]


def test_the_server_s_flags_are_each_replica_s():
    flags = flags_of("--replicas", "3", "--engine", "vllm", "--port", "8100")
    assert isinstance(flags.server, ServerFlags) and flags.server.engine == "vllm"
    assert flags.replicas == 3 and flags.server.port == 8100
    assert flags.target_tokens == flags.server.kv_tokens
    check_cluster_flags(flags)


def test_arguments_of_a_file_are_the_same_flags():
    arguments = {"model": "m", "replicas": 3, "log_prompts": True, "keep_quantized": False}
    arguments |= {"adapter": ["a=x", "b=y"], "vllm_args": "--enforce-eager", "predictor": None}
    flags = parse_cluster_flags(["up", *words_of(arguments)])[1]
    assert flags.server.adapter == ["a=x", "b=y"] and flags.server.log_prompts
    assert flags.server.vllm_args == "--enforce-eager" and flags.replicas == 3


WRONG = [
    (["--max_replicas", "1", "--replicas", "2"], "--max_replicas 1 is below --replicas"),
    (["--tokens_per_replica", "9"], "--tokens_per_replica needs --max_replicas N"),
    (["--upscale_delay_s", "1"], "--upscale_delay_s needs --max_replicas N"),
    (["--num_gpus", "2", "--replica_gpus", "1"], "--replica_gpus and a placement contradict"),
    (["--slo_s", "0"], "--slo_s must be above 0"),
]
GIVEN = {"recalibrate_every": "9", "max_connections": "9", "client_s": "9", "recalibrated_dir": "x"}
for name in NOT_SHARED:
    value = {"predictor_dir": ["x"], "adapter_dir": ["x"], "tools": ["x"], "feedback": ["x"]}
    words = [f"--{name}", *value.get(name, [GIVEN[name]] if name in GIVEN else [])]
    WRONG.append((words, f"--{name} is not of a cluster"))


@pytest.mark.parametrize("words, said", WRONG, ids=lambda value: str(value)[:40])
def test_flags_that_do_not_fit_are_one_line(words, said, capsys):
    assert main(["up", "--model", "m", *words]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_unknown_flags_are_refused(capsys):
    for words in (["up", "--model", "m", "--nothing"], ["down", "--model", "m"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "unrecognized arguments: --model m" in capsys.readouterr().err


# ---- one request through an application


async def application(scope, receive, send):
    """Three parts, unless it is told to fail first, or in the middle."""
    message = await receive()
    body = message["body"]
    if body == b"first":
        raise OSError("no answer")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    for number in range(3):
        await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
        if body == b"middle":
            raise OSError("broken")
        if body == b"wait":
            assert (await receive())["type"] == "http.disconnect"
            scope["state"]["left"] = True
            return
    await send({"type": "http.response.body"})


def forwarded(body: bytes = b"", path: str = PATH) -> ForwardedRequest:
    return ForwardedRequest(1, "POST", path, b"", ((b"content-type", b"application/json"),), body)


async def parts_of(body: bytes, most: int = 99) -> list:
    found = []
    stream = response_of(application, forwarded(body))
    async for part in stream:
        found.append(part)
        if len(found) == most:
            break
    await stream.aclose()
    return found


def test_a_response_comes_in_parts():
    head = ResponseHead(200, ((b"a", b"b"),))
    assert asyncio.run(parts_of(b"")) == [head, b"0", b"1", b"2"]


def test_an_application_s_failure_is_raised():
    with pytest.raises(OSError, match="no answer"):
        asyncio.run(parts_of(b"first"))
    with pytest.raises(OSError, match="broken"):
        asyncio.run(parts_of(b"middle"))


def test_a_reader_that_stops_is_a_client_that_left():
    seen = {}

    async def watched(scope, receive, send):
        seen["state"] = scope["state"]
        await application(scope, receive, send)

    async def read() -> None:
        stream = response_of(watched, forwarded(b"wait"))
        assert (await anext(stream)).status == 200
        await stream.aclose()

    asyncio.run(read())
    assert seen["state"] == {"left": True}


# ---- the front, before replicas that do as they are told


class FakeReplicas:
    """Each attempt does what `plan` says next: a status, or how it fails."""

    def __init__(self, *plan: str, ledger: Ledger | None = None) -> None:
        self.plan, self.ledger = list(plan), ledger
        self.got: list[ForwardedRequest] = []
        self.left = 0

    async def parts(self, request):
        self.got.append(request)
        names = ("a", "b", "c")
        self.ledger.ranked(request.number, names)
        step = self.plan.pop(0)
        try:
            if step == "none":
                await asyncio.sleep(60)
            if step == "dead":
                raise AttemptFailed("it has died")
            yield Accepted("a")
            if step == "dead later":
                raise AttemptFailed("it has died")
            if step == "busy":
                yield ResponseHead(503, ())
                yield b'{"error": 1}'
            elif step == "whole":
                yield ResponseHead(200, ((b"content-type", b"application/json"),))
                yield json.dumps(answer_of()).encode()
            else:
                yield ResponseHead(200, ((b"content-type", b"text/event-stream"),))
                for number, chunk in enumerate(stream_of(4, tokens=4)):
                    if step == "broken" and number == 2:
                        raise AttemptFailed("it has died")
                    yield chunk
        except GeneratorExit:
            self.left += 1
            raise


@pytest.fixture
def make_front(monkeypatch):
    """make_front(*plan, **options): a front with a ledger of its own."""

    def make(*plan: str, wait_s: float = 5.0, **options):
        ledger = Ledger()
        monkeypatch.setattr(fronts, "process_ledger", lambda: ledger)
        given = {"api_key": None, "api_keys": None, "allowed_hosts": "", "host": "127.0.0.1"}
        chosen = FrontOptions(None, 5000, 4096, 30.0, wait_s, **given | options)
        front = Front(chosen, FakeReplicas(*plan, ledger=ledger))
        front.guarded.predictor = WordPredictor()
        return front

    return make


async def answered(front, path=PATH, method="POST", headers=(), **fields):
    """(status, body, headers, what broke it) of one request."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "say 300"}]} | fields
    body = json.dumps(asked).encode()
    sent = [{"type": "http.request", "body": body, "more_body": False}]
    raw = [(b"host", b"127.0.0.1"), (b"x-request-id", b"r1"), *headers]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw}

    async def receive():
        return sent.pop() if sent else await asyncio.sleep(60)

    response = await front(Request(scope, receive))
    if not isinstance(response, StreamingResponse):
        return response.status_code, response.body, response.headers, None
    parts, broken = [], None
    try:
        async for part in response.body_iterator:
            parts.append(part)
    except AttemptFailed as failure:
        broken = str(failure)
    return response.status_code, b"".join(parts), response.headers, broken


def test_answers_pass_with_their_prediction(make_front):
    front = make_front("whole", "stream")
    status, body, headers, _ = asyncio.run(answered(front))
    assert status == 200 and json.loads(body) == answer_of()
    assert headers["x-glm-predicted-tokens"] == "300" and "x-request-id" not in headers
    status, body, headers, broken = asyncio.run(answered(front, stream=True))
    assert body == b"".join(stream_of(4, tokens=4)) and broken is None
    assert headers["content-type"] == "text/event-stream" and headers["x-glm-prediction"] == "made"
    assert [request.tokens for request in front.replicas.got] == [300, 300]
    assert (b"x-request-id", b"r1") in front.replicas.got[0].headers
    status = front.status()
    assert status["open"] == status["retries"] == 0 and status["predictions"] == {"made": 2}
    assert sum(row["requests"] for row in status["replicas"]) == 0


@pytest.mark.parametrize("step", ["dead", "dead later", "busy"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_had_not_begun_is_answered_by_another(make_front, step, stream):
    front = make_front(step, "stream" if stream else "whole")
    status, body, _, broken = asyncio.run(answered(front, stream=stream))
    assert status == 200 and broken is None and front.status()["retries"] == 1
    wanted = b"".join(stream_of(4, tokens=4)) if stream else json.dumps(answer_of()).encode()
    assert body == wanted
    failed = {row["replica"]: row["failures"] for row in front.status()["replicas"]}
    assert failed == {"a": 1, "b": 0, "c": 0}


def test_what_had_begun_breaks_off_once(make_front):
    front = make_front("broken")
    status, body, _, broken = asyncio.run(answered(front, stream=True))
    assert broken == "it has died" and body == b"".join(stream_of(4)[:2])
    told = front.status()
    assert len(front.replicas.got) == 1 and told["broken"] == 1 and told["open"] == 0


def test_four_attempts_then_an_error(make_front):
    status, body, _, _ = asyncio.run(answered(make_front(*["dead"] * 9)))
    assert status == 502 and b"4 attempts failed (last: it has died)" in body
    status, body, _, _ = asyncio.run(answered(make_front(*["busy"] * 9)))
    assert status == 503 and body == b'{"error": 1}'  # the replica's own words


def test_no_replica_is_a_503_in_time(make_front):
    status, body, headers, _ = asyncio.run(answered(make_front("none", wait_s=0.05)))
    assert status == 503 and b"no replica takes requests" in body and headers["retry-after"] == "2"


def test_keys_hosts_and_paths(make_front):
    front = make_front("whole", "whole", api_key="k")
    key = (b"authorization", b"Bearer k")
    assert asyncio.run(answered(front))[0] == 401
    assert asyncio.run(answered(front, headers=[(b"host", b"evil.example"), key]))[0] == 403
    assert asyncio.run(answered(front, headers=[key]))[0] == 200
    assert key not in front.replicas.got[0].headers
    assert asyncio.run(answered(front, "/health", "GET"))[0] == 200
    assert asyncio.run(answered(front, "/cluster/status", "GET"))[0] == 401
    assert asyncio.run(answered(front, "/v1/models", "GET", [key]))[0] == 200
    assert asyncio.run(answered(front, "/v1/models", "POST", [key]))[0] == 405
    for path in ("/v1/load_lora_adapter", "/metrics", "/"):
        assert asyncio.run(answered(front, path, "POST", [key]))[0] == 404


def test_a_whole_application_behind_the_front(make_front):
    """Starlette's, through the parts that a replica sends."""

    async def show(request):
        return JSONResponse({"got": json.loads(await request.body())["model"]})

    served = Starlette(routes=[Route(PATH, show, methods=["POST"])])

    class Served:
        async def parts(self, request):
            yield Accepted("a")
            async for part in response_of(served, request):
                yield part

    front = make_front()
    front.replicas = Served()
    status, body, _, _ = asyncio.run(answered(front))
    assert status == 200 and json.loads(body) == {"got": "m"}
