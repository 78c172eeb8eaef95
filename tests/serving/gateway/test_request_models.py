"""What the gateway sends, before the released programs' own readers of requests.

SGLang's and Ollama's request models, and NVIDIA Dynamo's frontend with its router, in an
environment of their own (benchmarks/client_env.py gateway: 0.5 GB, no GPU's libraries).
"""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from benchmarks.client_env import environment_python
from serving.gateway.observed import AnswerTail
from tests.causal_folders import make_causal_folder
from tests.serving.gateway.engines import (
    PATH,
    RecordingEngine,
    WordPredictor,
    free_port,
    gateway_before,
    serving_process,
    wait_until,
)

HERE = Path(__file__).parent
LENGTHS = (5, 100, 256, 700, 4000)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def python():
    try:
        return environment_python("gateway")
    except (ValueError, OSError) as error:
        pytest.skip(f"the packages cannot be had: {error}")


def openai_bodies(tokens: int) -> list[tuple[str, dict]]:
    """(path, body) of requests whose answer WordPredictor says to have so many tokens."""
    text = f"say {tokens}"
    chat = {"model": "m", "messages": [{"role": "user", "content": text}]}
    parts = [{"type": "text", "text": text}]
    long = {"role": "system", "content": "ä"}, {"role": "user", "content": parts}
    return [
        (PATH, chat),
        (PATH, chat | {"stream": True, "stream_options": {"include_usage": True}}),
        (PATH, {"model": "m", "messages": long, "max_completion_tokens": 9000, "tools": [TOOL]}),
        ("/v1/completions", {"model": "m", "prompt": text, "max_tokens": 9000, "stream": True}),
        ("/v1/responses", {"model": "m", "input": text}),
    ]


def ollama_bodies(tokens: int) -> list[tuple[str, dict]]:
    text = f"say {tokens}"
    options = {"num_predict": 50, "temperature": 0}
    return [
        ("/api/chat", {"model": "m", "messages": [{"role": "user", "content": text}]}),
        ("/api/generate", {"model": "m", "prompt": text, "stream": True, "options": options}),
    ]


def sent_by(kind: str, bodies: list[tuple[str, dict]], policy: str, pages=None) -> list:
    """[[path, body, headers]] that the gateway sends for these."""
    engine = RecordingEngine(pages=pages)
    try:
        words = ["--policy", policy]
        with gateway_before(engine, kind=kind, predictor=WordPredictor(), words=words) as gateway:
            for path, body in bodies:
                assert gateway.client.post(path, json=body).status_code == 200
    finally:
        engine.close()
    assert len(engine.got) == len(bodies)
    return [[got.path, got.body.decode(), got.headers] for got in engine.got]


def ask_models(python, sglang=(), ollama=(), orders=()) -> dict:
    case = {"sglang": [row[:2] for row in sglang], "ollama": [row[:2] for row in ollama]}
    case["orders"] = orders
    done = subprocess.run(
        [python, HERE / "request_models.py"],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sjf", "deadline"])
@pytest.mark.parametrize("lower_first", [False, True])
def test_sglang_takes_the_priority(python, policy, lower_first):
    """Every path's model keeps it, and its waiting queue sorts by it, the shorter answer first."""
    info = {"enable_priority_scheduling": True, "schedule_low_priority_values_first": lower_first}
    bodies = [row for tokens in LENGTHS for row in openai_bodies(tokens)]
    sent = sent_by("sglang", bodies, policy, {"/server_info": info})
    levels = [json.loads(body)["priority"] for _, body, _ in sent]
    chats = levels[:: len(openai_bodies(1))]
    found = ask_models(python, sglang=sent, orders=[chats[::-1]])
    assert [row["priority"] for row in found["sglang"]] == levels
    for (_, body), model in zip(bodies, found["sglang"]):
        assert model["model"] == "m" and model.get("stream", False) == body.get("stream", False)
    assert found["orders"]["1" if lower_first else "-1"] == [chats]
    assert chats != sorted(chats, reverse=lower_first)
    for name in (*info, "priority_scheduling_preemption_threshold"):
        assert name in found["flags"]


@pytest.mark.slow
def test_ollama_takes_the_request_and_tells_lengths(python):
    bodies = [row for tokens in LENGTHS for row in ollama_bodies(tokens)]
    sent = sent_by("ollama", bodies, "sjf")
    found = ask_models(python, ollama=sent)
    assert found["ollama"] == [body for _, body in bodies]  # no field is lost, none is added
    for _, _, headers in sent[1::2]:
        assert int(headers["x-glm-predicted-tokens"]) <= 50  # options.num_predict was read


@pytest.mark.slow
def test_lengths_are_read_from_their_answers(python):
    for name, text in ask_models(python)["answers"].items():
        tail = AnswerTail("stream" in name or "ollama" in name)
        tail.add(text.encode())
        assert (tail.prompt_tokens(), tail.output_tokens()) == (9, 12), name
        assert tail.is_whole() is (name != "sglang completion")


@contextmanager
def dynamo_frontend(python, place: Path):
    """(address, file of what its engine gets)."""
    model = make_causal_folder(place / "model", "glm")
    port, file = free_port(), place / "engine.jsonl"
    words = [python, HERE / "dynamo_frontend.py", model, port, file]
    settings = {"HOME": str(place), "DYN_COMPUTE_THREADS": "0", "DYN_TCP_RPC_HOST": "127.0.0.1"}
    settings["DYN_SELF_HOST_METADATA"] = "0"
    address = f"http://127.0.0.1:{port}"
    with serving_process(words, port, "/v1/models", place / "log", **settings):
        wait_until(lambda: httpx.get(f"{address}/v1/models").json()["data"])
        yield address, file


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sjf", "deadline"])
def test_dynamo_s_router_serves_in_the_policy_s_order(python, tmp_path, policy):
    """Its frontend takes the hints, and its queue gives the shorter answer to the engine first."""
    with dynamo_frontend(python, tmp_path) as (address, file):
        words = ["--policy", policy, "--slo_s", "60"]
        before = gateway_before(address, kind="dynamo", predictor=WordPredictor(), words=words)
        with before as gateway, ThreadPoolExecutor(8) as pool:
            futures = []
            for tokens in (1, *LENGTHS[::-1]):  # the first is with the engine while the others wait
                slo = {} if policy == "sjf" else {"slo_s": tokens / 20 + 1}
                futures.append(pool.submit(gateway.ask, f"say {tokens}", **slo))
                if tokens == 1:
                    wait_until(file.exists)
                time.sleep(0.02)
            assert {future.result().status_code for future in futures} == {200}
            for path, body in openai_bodies(300):
                reply = gateway.client.post(path, json=body)
                assert reply.status_code == 200, reply.text
    routing = [json.loads(line)["routing"] for line in file.read_text().splitlines()]
    assert [row["expected_output_tokens"] for row in routing] == [1, *LENGTHS, *[300] * 5]
    levels = [row["priority_jump"] for row in routing[1 : 1 + len(LENGTHS)]]
    assert levels == sorted(levels, reverse=True) and len(set(levels)) == len(LENGTHS)
    assert min(levels) > 0
    for row in routing:
        assert row["priority"] == row["priority_jump"]


@pytest.mark.slow
def test_dynamo_refuses_what_is_no_hint(python, tmp_path):
    """So its 200 above means that it has read them."""
    with dynamo_frontend(python, tmp_path) as (address, _):
        for hints in ({"priority": 2**31}, {"osl": -1}, {"priority": "high"}):
            body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
            body["nvext"] = {"agent_hints": hints}
            reply = httpx.post(f"{address}{PATH}", json=body)
            assert reply.status_code == 400 and "deserialize" in reply.text
