"""The gateway before llama-cpp-python's server, which answers one request at a time.

The program runs in an environment of its own (benchmarks/client_env.py llama_cpp, llama_server).
"""

from contextlib import contextmanager

import httpx
import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")
pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")

import aiohttp

from benchmarks.client_env import environment_folder, environment_python
from chatglm.export.command import main as export
from serving.gateway import health
from tests.chatglm.export.test_gguf import make_folder
from tests.serving.gateway.engines import (
    PATH,
    WordPredictor,
    free_port,
    gateway_before,
    serving_process,
)
from tests.serving.gateway.load import ask, kill_under_load, order_of_answers, same_names

pytestmark = pytest.mark.slow
TOKENS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GGUF file of our export."""
    place = tmp_path_factory.mktemp("gguf")
    folder, file = make_folder(place, "glm4"), place / "model.gguf"
    assert export([str(folder), "--to", "gguf", "--output", str(file), "--type", "f32"]) == 0
    return file


@contextmanager
def llama_server(model, log):
    """(process, address) of python -m llama_cpp.server."""
    if not (environment_folder("llama_cpp") / "complete").exists():
        pytest.skip("no llama.cpp: python benchmarks/client_env.py llama_cpp compiles it")
    try:
        python = environment_python("llama_server")
    except (ValueError, OSError) as error:
        pytest.skip(f"its server's packages cannot be had: {error}")
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    port = free_port()
    words = [environment_python("llama_cpp"), "-m", "llama_cpp.server", "--model", model]
    words += ["--n_ctx", 512, "--n_threads", 1, "--interrupt_requests", "False", "--port", port]
    settings = {"PYTHONPATH": str(packages), "HOST": "127.0.0.1"}
    with serving_process(words, port, "/v1/models", log, **settings) as process:
        yield process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with llama_server(model, tmp_path_factory.mktemp("llama") / "log") as (_, address):
        yield address


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_answers_are_those_of_the_server(server, path, is_stream):
    body = {"temperature": 0, "max_tokens": 40, "stream": is_stream}
    if path == PATH:
        body["messages"] = [{"role": "user", "content": "你好 100"}]
    else:
        body["prompt"] = "你好 100"
    with gateway_before(server, kind="openai", predictor=WordPredictor()) as gateway:
        passed = gateway.client.post(path, json=body)
        status = gateway.status()
    direct = httpx.post(f"{server}{path}", json=body)
    assert passed.status_code == direct.status_code == 200
    assert same_names(passed.content) == same_names(direct.content) and len(direct.content) > 200
    assert passed.headers["content-type"] == direct.headers["content-type"]
    assert passed.headers["x-glm-predicted-tokens"] == "36"  # of 100, cut at max_tokens
    assert status["answers_without_length"] == is_stream  # its streams have no usage
    assert not is_stream or passed.content.rstrip().endswith(b"data: [DONE]")


@pytest.mark.parametrize("policy", ["sjf", "fcfs"])
def test_the_gateway_s_queue_decides_the_order(server, policy):
    words, lengths = ["--concurrency", 1, "--policy", policy], [150, 900, 5, 200, 30]
    before = gateway_before(server, kind="openai", predictor=WordPredictor(), words=words)
    with before as gateway:
        order = order_of_answers(gateway, lengths, 2 * TOKENS)  # none ends before all have come
    assert order == (lengths if policy == "fcfs" else [150, 5, 30, 200, 900])


def test_a_long_answer_is_no_failure(server, monkeypatch, caplog):
    """The server answers /v1/models after the stream only: it counts as up all the while."""
    monkeypatch.setattr(health, "CHECK", aiohttp.ClientTimeout(total=0.3))
    with gateway_before(server, kind="openai", words=["--health_s", "0.05"]) as gateway:
        outcome = ask(gateway.process.address, 1, True, TOKENS)
    assert outcome.is_whole and outcome.text == ask(server, 1, True, TOKENS).text
    assert not [record for record in caplog.records if "does not answer" in record.message]


def test_a_server_killed_under_load_loses_nothing_that_had_not_begun(server, model, tmp_path):
    with llama_server(model, tmp_path / "log") as (second, other):
        words = ["--concurrency", 2, "--policy", "sjf"]
        before = gateway_before(
            server, other, kind="openai", predictor=WordPredictor(), words=words
        )
        with before as gateway:
            bases = [server, other]
            kill_under_load(bases, gateway.process.address, second.kill, TOKENS, count=16)
