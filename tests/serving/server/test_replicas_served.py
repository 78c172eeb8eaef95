"""A server whose answers come from replica processes."""

import json
import re
import sys
import threading
import time

import httpx
import pytest

from serving.server.flags import parse_flags
from serving.server.starting import load_service
from tests.serving.server.test_server_faults import running
from tests.warm import warm_python

CPU = {"name": "cpu@1", "memory_bytes": 2**32, "reserved_bytes": 0, "kind": "cpu", "threads": 1}
CPU |= {"bandwidth_bytes_s": 1e10, "flops_s": 3e10}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A file of two devices, which need not be measured."""
    file = tmp_path_factory.mktemp("cluster") / "two.json"
    file.write_text(json.dumps({"devices": [CPU, CPU]}))
    return file


@pytest.fixture(scope="module")
def server(folders, cluster):
    model, predictor = folders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        words = ["--deployer", "helr", "--cluster", cluster, "--device", "0"]
        words += ["--predictor", predictor]
        with running(model, *words, endless=False) as found:
            yield found


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def post(server, path="chat/completions", **body):
    asked = {"messages": [{"role": "user", "content": "x"}], "temperature": 0} | body
    if path == "completions":
        del asked["messages"]
    reply = httpx.post(f"{server.root}/v1/{path}", json=asked, timeout=60)
    return reply


class Stream(threading.Thread):
    """Reads a stream of 500 tokens.

    Attributes:
        begun: set when some of it has come. text: all of it, at the end.
    """

    def __init__(self, server):
        super().__init__()
        self.server, self.begun, self.text = server, threading.Event(), ""
        self.start()

    def run(self):
        body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
        body |= {"stream": True, "max_tokens": 500}
        url = f"{self.server.root}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:])["choices"]:
                    self.text += choice["delta"].get("content") or ""
                if len(self.text) > 5:
                    self.begun.set()


def metric(server, name):
    text = httpx.get(f"{server.root}/metrics").text
    [value] = re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_answers_carry_what_they_always_do(server):
    reply = post(server, max_tokens=30, logprobs=True, top_logprobs=2).json()
    assert reply["usage"]["completion_tokens"] == 30
    assert len(reply["choices"][0]["logprobs"]["content"]) == 30
    assert reply["glm_foundry"]["predicted_tokens"] and reply["glm_foundry"]["queue_s"] >= 0
    echoed = post(server, "completions", prompt=[5, 6, 7], max_tokens=2, echo=True, logprobs=1)
    logprobs = echoed.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None and len(logprobs) == 5
    refused = post(server, "completions", prompt=[5, 6, 99999], max_tokens=2)
    assert refused.status_code == 400 and "below 425" in refused.json()["error"]["message"]
    assert metric(server, "glm_replicas_ready") == 2
    assert metric(server, "glm_kv_limit_tokens") == 2 * 2048


def test_a_schema_holds(server):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 7}}}
    replies = [post(server, max_tokens=20, response_format=form) for _ in range(4)]
    assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == ["7"] * 4


def test_streams_go_on_when_their_replica_is_killed(server):
    whole = [post(server, max_tokens=500, seed=i).json() for i in range(2)]
    texts = {reply["choices"][0]["message"]["content"] for reply in whole}
    assert len(texts) == 1  # greedy
    streams = [Stream(server) for _ in range(4)]  # two rows in each of two replicas
    for stream in streams:
        assert stream.begun.wait(60)
    streams += [Stream(server) for _ in range(2)]  # these wait
    server.service.backend.replicas[0].process.kill()
    for stream in streams:
        stream.join(90)
    assert {stream.text for stream in streams} == texts
    wait_for(lambda: metric(server, "glm_replicas_ready") == 2)
    assert metric(server, "glm_replica_restarts") == 1
    assert metric(server, "glm_requeued_requests") >= 1


def test_health_says_that_no_replica_is_ready(server):
    for replica in server.service.backend.replicas:
        replica.process.kill()
    wait_for(lambda: httpx.get(f"{server.root}/health").status_code == 503)
    assert "no replica is ready" in httpx.get(f"{server.root}/health").json()["status"]
    reply = post(server, max_tokens=5)  # it waits
    assert reply.status_code == 200
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}


def test_what_does_not_fit_is_one_line(folders, tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"devices": [CPU | {"memory_bytes": 10_000}]}))
    words = ["--model", str(folders[0]), "--policy", "fcfs", "--cluster", str(file)]
    with pytest.raises(ValueError, match="no chain of devices holds the model: needs"):
        load_service(parse_flags([*words, "--deployer", "helr"]))
    with pytest.raises(ValueError, match="--device cpu is of one device"):
        load_service(parse_flags([*words, "--deployer", "helr", "--device", "cpu"]))
    with pytest.raises(ValueError, match="--cluster needs --deployer"):
        load_service(parse_flags(words))
    with pytest.raises(ValueError, match="--device_map and --deployer contradict"):
        load_service(parse_flags([*words, "--deployer", "helr", "--device_map", "auto"]))
