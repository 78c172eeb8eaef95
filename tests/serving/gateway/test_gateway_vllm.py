"""The gateway before vLLM itself, on a CPU, in an environment of its own.

One vLLM serves all tests of this file; the last one kills it.
"""

import json
from functools import partial

import httpx
import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from benchmarks.client_env import environment_folder
from tests.causal_folders import make_causal_folder
from tests.predictor import synthetic
from tests.serving.gateway.engines import (
    PATH,
    WordPredictor,
    free_port,
    gateway_before,
    kill_group,
    serving_process,
)
from tests.serving.gateway.load import kill_under_load, order_of_answers, same_names
from tests.serving.server.conftest import start

pytestmark = pytest.mark.slow
FLAGS = "--served-model-name m --dtype float32 --enforce-eager --max-model-len 512"
FLAGS += " --max-num-seqs 1 --scheduling-policy priority --enable-force-include-usage"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores that were given
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
START_S = 400  # on a core that others use


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny GlmForCausalLM."""
    folder = tmp_path_factory.mktemp("glm") / "model"
    return make_causal_folder(folder, "glm", hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def vllm(model, tmp_path_factory):
    """(process, address) of vllm serve."""
    folder, port = environment_folder("vllm"), free_port()
    if not (folder / "complete").exists():
        pytest.skip("no environment with vLLM: python benchmarks/client_env.py vllm makes it")
    place = tmp_path_factory.mktemp("vllm")
    words = [folder / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", "--port", port]
    words += FLAGS.split()
    settings = SETTINGS | {"HOME": str(place)}
    with serving_process(words, port, "/health", place / "log", START_S, **settings) as process:
        yield process, f"http://127.0.0.1:{port}"


def test_it_says_that_it_obeys_priorities_and_its_memory(vllm, caplog):
    caplog.set_level("INFO", "serving.gateway")
    with gateway_before(vllm[1], kind="vllm") as gateway:
        [upstream] = gateway.status()["upstreams"]
    assert upstream["up"] and upstream["obeys_priorities"] is True
    assert upstream["kv_tokens"] == 1_048_576  # 8,192 blocks of 128, as its own log says
    said = [record.message for record in caplog.records if "KV tokens" in record.message]
    assert "obeys priorities; 1,048,576 KV tokens" in said[0]


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_answers_are_those_of_vllm(vllm, path, is_stream):
    body = {"model": "m", "temperature": 0, "max_tokens": 20, "stream": is_stream}
    body["ignore_eos"] = True
    if path == PATH:
        body["messages"] = [{"role": "user", "content": "sag 100"}]
    else:
        body["prompt"] = "sag 100"
    with gateway_before(vllm[1], kind="vllm", predictor=WordPredictor()) as gateway:
        passed = gateway.client.post(path, json=body)
        status, tokens = gateway.status(), gateway.metric("answer_tokens_sum")
    direct = httpx.post(f"{vllm[1]}{path}", json=body)
    assert passed.status_code == direct.status_code == 200
    assert same_names(passed.content) == same_names(direct.content)
    assert passed.headers["x-glm-prediction"] == "made"
    assert status["answers_without_length"] == 0 and tokens == 20  # streams tell it, too


@pytest.mark.parametrize(
    "policy, wanted",
    [("fcfs", [150, 900, 5, 200, 30]), ("sjf", [150, 5, 30, 200, 900])],
)
def test_vllm_serves_in_the_policy_s_order(vllm, policy, wanted):
    words = ["--policy", policy]
    before = gateway_before(vllm[1], kind="vllm", predictor=WordPredictor(), words=words)
    with before as gateway:
        assert order_of_answers(gateway, [150, 900, 5, 200, 30], 200, pause_s=0.05) == wanted


def test_a_priority_beyond_its_range_is_refused(vllm):
    """So a 200 above means that it has read the field."""
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "priority": "high"}
    reply = httpx.post(f"{vllm[1]}{PATH}", json=body)
    assert reply.status_code == 400 and "priority" in reply.text


def test_vllm_killed_beside_two_servers_of_ours(vllm, model, tmp_path):
    """All three serve one model; what vLLM had not begun is answered by the others."""
    process, address = vllm
    predictor = synthetic.train(tmp_path, synthetic.make_rows(300, seed=1))
    served, bases = [], []
    try:
        for number in range(2):
            ours, base = start((model, predictor), tmp_path / f"{number}.jsonl")
            served.append(ours)
            bases.append(base.removesuffix("/v1"))
        words = ["--concurrency", 3, "--policy", "sjf", "--health_s", 0.3]
        before = gateway_before(
            *bases, address, kind="openai", predictor=WordPredictor(), words=words
        )
        with before as gateway:
            kill = partial(kill_group, process)
            kill_under_load([*bases, address], gateway.process.address, kill, tokens=40)
            counts = json.dumps(gateway.status()["predictions"])
    finally:
        for ours in served:
            ours.kill()
            ours.communicate()
    assert counts == '{"made": 25}'
