"""The command before servers of ours: two processes, one of which is killed under load."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from chatglm.commands import child_environment
from tests.finetune.runs import ROOT
from tests.serving.gateway.engines import PATH, wait_until
from tests.serving.gateway.load import ask, body_of, kill_under_load
from tests.serving.server.conftest import folders, start

__all__ = ["folders"]  # a fixture
KIND = ["--kind", "glm-foundry", "--policy", "sjf", "--health_s", "0.3", "--predict_ms", "2000"]


@contextmanager
def two_servers(folders, tmp_path):
    """[(process, address)] of two servers."""
    found = []
    try:
        for number in range(2):
            process, address = start(folders, tmp_path / f"{number}.jsonl")
            found.append((process, address.removesuffix("/v1")))
        yield found
    finally:
        for process, _ in found:
            process.kill()
            process.communicate()


@contextmanager
def gateway_command(folders, bases, *words):
    """(process, address) of python -m serving.gateway."""
    given = ["--upstream", ",".join(bases), "--predictor", str(folders[1]), "--port", "0", *KIND]
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.gateway", *given, *words],
        cwd=ROOT,
        env=child_environment(threads=1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("gateway at http://127.0.0.1:"), process.communicate()
        yield process, line.split(" at ")[1].strip().removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_server_killed_under_load_loses_nothing_that_had_not_begun(folders, tmp_path):
    with two_servers(folders, tmp_path) as servers:
        bases = [address for _, address in servers]
        with gateway_command(folders, bases) as (_, address):
            kill_under_load(bases, address, servers[1][0].kill, tokens=40)


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    process, address = start(folders, tmp_path_factory.mktemp("one") / "log.jsonl")
    yield address.removesuffix("/v1")
    process.kill()
    process.communicate()


def test_the_command_predicts_logs_and_drains(folders, server, tmp_path):
    words = ["--access_log", "--drain_s", "30", "--recalibrate"]
    words += ["--recalibrated_dir", str(tmp_path / "updated")]
    with gateway_command(folders, [server], *words) as (process, address):
        metrics = httpx.get(f"{address}/metrics").text
        assert "glm_predictor_version 1.0" in metrics
        assert 'glm_recalibrations_total{outcome="taken"} 0.0' in metrics
        reply = httpx.post(f"{address}{PATH}", json=body_of(1, False, 20), timeout=60)
        direct = httpx.post(f"{server}{PATH}", json=body_of(1, False, 20), timeout=60)
        assert reply.json()["choices"] == direct.json()["choices"]
        assert int(reply.headers["x-glm-predicted-tokens"]) > 0
        assert httpx.get(f"{address}/v1/models").json() == httpx.get(f"{server}/v1/models").json()
        status = httpx.get(f"{address}/gateway/status").json()
        [upstream] = status["upstreams"]
        assert upstream["kv_tokens"] == 4096 and upstream["obeys_priorities"] is True
        assert status["predictions"] == {"made": 1}
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(ask, address, 2, True, 200, begun)
            assert begun.wait(60)
            process.send_signal(signal.SIGTERM)
            outcome = future.result()
        assert outcome.is_whole
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["path"] == PATH] == [200, 200]


@pytest.mark.slow
def test_the_second_signal_ends_the_drain(folders, server):
    with gateway_command(folders, [server], "--drain_s", "600") as (process, address):
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(ask, address, 2, True, 900, begun)
            assert begun.wait(60)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            outcome = future.result()
        wait_until(lambda: process.poll() is not None)
        assert process.returncode == 0 and time.monotonic() - began < 15
    assert not outcome.is_whole or outcome.text
