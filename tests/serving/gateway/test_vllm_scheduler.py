"""LengthScheduler in vLLM's own loop, without a model, and serving one behind the gateway."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from serving.engines.vllm_process import VllmServer
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.peers.vllm_folders import made_python, make_release
from tests.serving.gateway.engines import WordPredictor, gateway_before


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{case: [admitted, preempted] of each step}, of CASES in vllm_lengths.py."""
    python = made_python()
    place = tmp_path_factory.mktemp("scheduler")
    script = REPO_ROOT / "tests" / "serving" / "gateway" / "vllm_lengths.py"
    env = child_env(VLLM_LOGGING_LEVEL="ERROR", PYTHONPATH=str(REPO_ROOT))
    words = [python, script, place / "found.json"]
    done = subprocess.run(words, env=env, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "found.json").read_text())


def admissions(steps):
    return [number for admitted, _ in steps for number in admitted]


@pytest.mark.slow
def test_the_order_of_admission(steps):
    assert admissions(steps["order fcfs"]) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert admissions(steps["order"]) == [0, 1, 2, 3, 6, 7, 5, 4]
    assert admissions(steps["priority"]) == [0, 1, 2, 3, 5, 4]
    assert admissions(steps["waits"])[4] == 4
    assert admissions(steps["wrong"]) == [0]


@pytest.mark.slow
def test_no_memory_is_kept_for_what_answers_become(steps):
    """Four at once, preempted where memory runs out, end before two after two others do."""
    assert sorted(steps["memory"][0][0]) == [0, 1, 2, 3]
    assert len(steps["memory"]) == len(steps["memory fcfs"]) < 2 * 160


WORDS = ["--scheduler-cls", "serving.gateway.vllm_scheduler.LengthScheduler", "--enforce-eager"]
WORDS += ["--enable-force-include-usage", "--max-num-seqs", "2", "--max-model-len", "256"]
ASKED = 6


@pytest.mark.slow
def test_a_gateway_before_a_real_vllm(tmp_path):
    """Raw ChatGLM3 in vLLM: chats are answered, lengths arrive, the gateway knows the scheduler."""
    folder = make_release(tmp_path, "glm3-32k")
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    server = VllmServer(str(folder), python=str(made_python()), words=WORDS, variables=variables)
    try:
        server.wait_ready()
        # Its first answer lists packages and compilers: longer than the gateway waits, when busy.
        httpx.get(f"{server.address}/server_info", timeout=300)
        with gateway_before(
            server.address, kind="vllm-length", predictor=WordPredictor(), words=["--wait_s", 20]
        ) as gateway:
            with ThreadPoolExecutor(ASKED) as pool:
                address = gateway.process.address
                replies = list(pool.map(partial(ask_chat, address), range(ASKED)))
            status = gateway.client.get("/gateway/status").json()
        said = server.log.read_text()
    finally:
        server.stop()
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-glm-prediction"] == "made"
        assert 1 <= reply.json()["usage"]["completion_tokens"] <= 8
    [upstream] = status["upstreams"]
    assert upstream["obeys_priorities"] is True
    assert "custom scheduler class" in said


def ask_chat(address, number):
    messages = [{"role": "user", "content": f"hello world {1 + number}"}]
    body = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": 8}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)
