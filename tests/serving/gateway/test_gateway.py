"""The gateway before engines that record what they get: bytes, routes, queue, failures."""

import asyncio
import json
import logging
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from aiohttp import web

from predictor.prediction import from_bins
from serving.gateway import proxy
from serving.gateway.command import main
from serving.gateway.predicting import GuardedPredictor, cut_prediction
from serving.gateway.proxy import MOST_TRIES
from serving.server import recalibration
from serving.server.keys import key_digest
from tests.predictor import synthetic
from tests.serving.gateway.engines import (
    PATH,
    RecordingEngine,
    WordPredictor,
    answer_of,
    gateway_before,
    stream_of,
    wait_until,
)

PAYLOAD = '{"model":"m",  "messages":[{"role":"user","content":"sag 50"}], "x":"ä"}'.encode()


@pytest.fixture
def engine():
    found = RecordingEngine()
    yield found
    found.close()


@pytest.fixture
def pair():
    found = [RecordingEngine(), RecordingEngine()]
    yield found
    for engine in found:
        engine.close()


# ---- bytes


def test_a_body_is_forwarded_with_the_added_field_alone(engine):
    with gateway_before(engine, kind="vllm", predictor=WordPredictor()) as gateway:
        headers = {"Content-Type": "application/json", "X-Mine": "1", "Connection": "x-hop"}
        headers |= {"X-Hop": "2", "Authorization": "Bearer k", "X-Glm-Predicted-Tokens": "1"}
        reply = gateway.client.post(f"{PATH}?a=%20b", content=PAYLOAD, headers=headers)
    [got] = engine.got
    added = json.loads(got.body)["priority"]
    assert got.body == b'{"priority":%d,' % added + PAYLOAD[1:]
    assert got.path == f"{PATH}?a=%20b"
    assert got.headers["X-Mine"] == "1" and got.headers["Authorization"] == "Bearer k"
    assert "X-Hop" not in got.headers
    assert got.headers["x-glm-predicted-tokens"] == "50"
    assert got.headers["x-glm-predicted-q90-tokens"] == "90"
    assert reply.json() == answer_of()
    assert reply.headers["x-glm-prediction"] == "made"
    assert reply.headers["x-request-id"] == got.headers["X-Request-ID"]


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_a_stream_passes_byte_for_byte_as_it_is_made(engine, kind):
    chunks = stream_of(5, tokens=5)
    engine.streams(chunks, pause_s=0.05)
    with gateway_before(engine, kind=kind) as gateway:
        body = {"stream": True, "messages": []}
        came = []
        with gateway.client.stream("POST", PATH, json=body) as reply:
            for chunk in reply.iter_raw():
                came.append((time.monotonic(), chunk))
    assert b"".join(chunk for _, chunk in came) == b"".join(chunks)
    assert reply.headers["content-type"] == "text/event-stream"
    assert came[-1][0] - came[0][0] > 0.2  # none was held back


def test_other_paths_pass_unchanged(engine):
    engine.pages["/v1/models?x=1"] = {"data": [{"id": "m"}]}
    with gateway_before(engine, kind="vllm", predictor=WordPredictor()) as gateway:
        assert gateway.client.get("/v1/models?x=1").json() == {"data": [{"id": "m"}]}
        assert gateway.client.get("/nowhere").status_code == 404
        gateway.client.post("/v1/embeddings", content=b'{"input":"x"}')
    assert [got.body for got in engine.got] == [b'{"input":"x"}']


def test_an_engine_s_refusal_passes_as_it_is(engine):
    engine.refuses(400, '{"error":  {"message": "no"}}')
    with gateway_before(engine, kind="vllm") as gateway:
        reply = gateway.ask()
    assert reply.status_code == 400 and reply.text == '{"error":  {"message": "no"}}'
    assert reply.headers["x-own"] == "yes" and len(engine.got) == 1


@pytest.mark.parametrize("body", [b"{not json", b"[]", b"\xff\x00", b""])
def test_what_is_no_request_is_the_engine_s_to_refuse(engine, body):
    with gateway_before(engine, kind="vllm", predictor=WordPredictor()) as gateway:
        gateway.client.post(PATH, content=body)
    assert engine.got[0].body == body


# ---- the predictor


class Raising:
    def predict(self, text):
        raise RuntimeError("no\nprediction")


class Slow:
    def predict(self, text):
        time.sleep(0.3)
        return WordPredictor().predict(text)


class Wrong:
    def predict(self, text):
        return [from_bins(np.array([math.nan]), np.array([0.0, 1.0]))]


class Empty:
    def predict(self, text):
        return []


@pytest.mark.parametrize(
    "predictor, outcome",
    [(None, "missing"), (Raising(), "failed"), (Slow(), "slow"), (Wrong(), "wrong")]
    + [(Empty(), "failed")],
)
@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_without_a_prediction_requests_are_forwarded_unchanged(
    engine, caplog, kind, predictor, outcome
):
    words = ["--predict_ms", 100]
    with gateway_before(engine, kind=kind, predictor=predictor, words=words) as gateway:
        headers = {"Content-Type": "application/json"}
        reply = gateway.client.post(PATH, content=PAYLOAD, headers=headers)
        status = gateway.status()
        assert gateway.metric(f'predictions_total{{outcome="{outcome}"}}') == 1
    assert engine.got[0].body == PAYLOAD
    assert not [name for name in engine.got[0].headers if name.lower().startswith("x-glm")]
    assert reply.headers["x-glm-prediction"] == outcome
    assert status["predictions"] == {outcome: 1}
    said = [r.message for r in caplog.records if "without a prediction" in r.message]
    assert len(said) == (predictor is not None)


def test_a_folder_that_cannot_be_read_is_said_at_start(engine, tmp_path, caplog):
    with gateway_before(engine, kind="vllm", words=["--predictor", tmp_path]) as gateway:
        assert gateway.ask().status_code == 200
    assert any("forwarded unchanged" in r.message for r in caplog.records)
    assert "priority" not in engine.got[0].json


def test_a_stuck_predictor_is_not_given_more():
    """Of 40 requests at once, those beyond the queue are not even begun."""

    async def ask_all() -> list[str]:
        guarded = GuardedPredictor(Slow(), 0.05)
        found = await asyncio.gather(*(guarded.predict("1") for _ in range(40)))
        began = time.monotonic()
        await guarded.predict("1")
        assert time.monotonic() - began < 2  # not after the forty, which take 12 s
        guarded.close()
        return [each.outcome for each in found]

    assert set(asyncio.run(ask_all())) == {"slow"}


class Changing(WordPredictor):
    """Quick at first, then slow. threads: that have called it."""

    def __init__(self):
        self.seconds, self.threads = 0.0, []

    def predict(self, text):
        self.threads.append(threading.current_thread())
        time.sleep(self.seconds)
        return super().predict(text)


def test_a_predictor_that_becomes_slow_goes_to_its_thread(monkeypatch):
    """It delays the gateway once, and is waited for no longer than the limit from then on."""

    async def ask_all(predictor) -> list[str]:
        guarded = GuardedPredictor(predictor, 0.2)
        found = [await guarded.predict("1") for _ in range(3)]
        predictor.seconds = 1.0
        found += [await guarded.predict("1") for _ in range(2)]
        found.append(await guarded.predict("1" * 10_000))
        guarded.close()
        return [each.outcome for each in found]

    monkeypatch.setattr("serving.gateway.predicting.QUICK_S", 0.05)  # on a busy machine
    predictor = Changing()
    assert asyncio.run(ask_all(predictor)) == ["made"] * 4 + ["slow"] * 2
    here = threading.main_thread()
    assert [thread is here for thread in predictor.threads[:5]] == [False, *[True] * 3, False]


def test_a_limit_of_the_answer_cuts_its_prediction():
    [prediction] = WordPredictor().predict("100")
    cut = cut_prediction(prediction, 30)
    assert cut.probabilities.sum() == pytest.approx(1) and cut.edges[-1] == 30
    assert cut.probability_within(29) == pytest.approx(prediction.probability_within(29))
    assert cut.expected_tokens == pytest.approx(0.145 * 14.5 + 0.855 * 29.5)
    assert cut_prediction(prediction, 1).expected_tokens <= 1
    assert cut_prediction(prediction, 500) is prediction


# ---- priorities, at start


@pytest.mark.parametrize("turned, sign", [(False, -1), (True, 1)])
def test_sglang_is_asked_for_its_sign(engine, turned, sign):
    engine.pages["/server_info"] = {
        "enable_priority_scheduling": True,
        "schedule_low_priority_values_first": turned,
    }
    with gateway_before(
        engine, kind="sglang", predictor=WordPredictor(), words=["--policy", "sjf"]
    ) as gateway:
        gateway.ask("say 4000")
        assert gateway.status()["upstreams"][0]["obeys_priorities"] is True
    assert engine.got[0].json["priority"] * sign > 30


def test_an_engine_whose_flag_is_off_is_told_so(engine, caplog):
    caplog.set_level(logging.INFO, "serving.gateway")
    engine.pages["/server_info?config_format=json"] = {"scheduler_config": {"policy": "fcfs"}}
    with gateway_before(engine, kind="vllm", predictor=WordPredictor()) as gateway:
        gateway.ask()
    assert "priority" not in engine.got[0].json
    [said] = [r.message for r in caplog.records if "ignores priorities" in r.message]
    assert "--scheduling-policy priority" in said and "--concurrency" in said


# ---- several upstreams


def test_requests_go_where_the_least_is_predicted(pair):
    for engine in pair:
        engine.holds = True
    before = gateway_before(*pair, kind="vllm", predictor=WordPredictor())
    with before as gateway, ThreadPoolExecutor(8) as pool:
        long = pool.submit(gateway.ask, "say 1000")
        wait_until(lambda: sum(engine.now for engine in pair) == 1)
        short = [pool.submit(gateway.ask, "say 50") for _ in range(4)]
        wait_until(lambda: sum(engine.now for engine in pair) == 5)
        for engine in pair:
            engine.holds = False
        assert {future.result().status_code for future in [long, *short]} == {200}
    assert sorted(len(engine.got) for engine in pair) == [1, 4]


def test_requests_go_where_memory_is_left(pair):
    """By tokens the second engine is the emptier one; its memory holds only a short answer."""
    pair[0].pages["/metrics"] = "glm_kv_limit_tokens 100000\n"
    pair[1].pages["/metrics"] = "glm_kv_limit_tokens 500\n"
    with gateway_before(*pair, kind="glm-foundry", predictor=WordPredictor()) as gateway:
        for _ in range(4):
            gateway.ask("say 1000")
    assert [len(engine.got) for engine in pair] == [4, 0]


def test_prompts_of_one_beginning_stay_together(pair):
    words = ["--prefix_affinity", 100_000]
    with gateway_before(*pair, kind="vllm", predictor=WordPredictor(), words=words) as gateway:
        for text in ("a 10", "b 10"):
            for _ in range(4):
                gateway.ask(text)
    for engine in pair:
        assert len({got.body.split(b'"content"')[1] for got in engine.got}) == 1


@pytest.mark.parametrize("fault", ["down", "breaks", "busy"])
def test_what_has_not_begun_goes_elsewhere(pair, fault):
    if fault == "breaks":
        pair[0].breaks()
    if fault == "busy":
        pair[0].refuses(503)
    with gateway_before(*pair, kind="vllm") as gateway:
        if fault == "down":
            pair[0].close()
        replies = [gateway.ask() for _ in range(6)]
        assert gateway.metric("retries_total") == (1 if fault == "down" else len(pair[0].got))
        assert gateway.status()["upstreams"][0]["up"] is (fault != "down")
    assert {reply.status_code for reply in replies} == {200}
    assert len(pair[1].got) == 6


def test_an_answer_that_breaks_off_is_not_made_again(pair):
    for engine in pair:
        engine.streams(stream_of(3)[:2], pause_s=0.05, cut=True)
    with gateway_before(*pair, kind="vllm") as gateway:
        with (
            pytest.raises(httpx.RemoteProtocolError),
            gateway.client.stream("POST", PATH, json={"stream": True}) as reply,
        ):
            assert reply.status_code == 200
            list(reply.iter_raw())
        assert gateway.metric("broken_streams_total") == 1
    assert sum(len(engine.got) for engine in pair) == 1


def test_a_client_that_leaves_a_stream_is_not_served_again(pair):
    for engine in pair:
        engine.streams(stream_of(200), pause_s=0.02)
    with gateway_before(*pair, kind="vllm") as gateway:
        for _ in range(3):
            with gateway.client.stream("POST", PATH, json={"stream": True}) as reply:
                next(reply.iter_raw())
        wait_until(lambda: gateway.gateway.open == 0)
        assert gateway.metric("retries_total") == 0
        wait_until(lambda: sum(engine.now for engine in pair) == 0)
    assert sum(len(engine.got) for engine in pair) == 3


def test_a_request_that_fails_everywhere_ends(pair):
    for engine in pair:
        engine.breaks()
    with gateway_before(*pair, kind="vllm") as gateway:
        reply = gateway.ask()
    assert reply.status_code == 502 and reply.json()["error"]["code"] == "upstream_failed"
    assert sum(len(engine.got) for engine in pair) == MOST_TRIES


def test_requests_wait_for_an_upstream_to_come_back(engine):
    port = engine.port
    engine.close()
    with gateway_before(engine, kind="vllm", words=["--wait_s", 20]) as gateway:
        assert gateway.client.get("/health/ready").status_code == 503
        with ThreadPoolExecutor(2) as pool:
            future = pool.submit(gateway.ask)
            wait_until(lambda: gateway.gateway.dispatcher.waiting == 1)
            again = RecordingEngine(port)
            assert future.result().status_code == 200
        assert gateway.client.get("/health/ready").status_code == 200
        again.close()


def test_without_any_upstream_there_is_a_503(engine):
    engine.close()
    with gateway_before(engine, kind="vllm", words=["--wait_s", 0.5]) as gateway:
        reply = gateway.ask()
    assert reply.status_code == 503 and reply.headers["retry-after"]


# ---- the gateway's own queue


@pytest.mark.parametrize("kind, is_asked", [("openai", False), ("vllm", True)])
def test_an_engine_that_answers_one_at_a_time_is_not_asked_meanwhile(engine, kind, is_asked):
    """llama-cpp-python's server would end a stream for it."""
    engine.holds = True
    words = ["--health_s", 0.05]
    with gateway_before(engine, kind=kind, words=words) as gateway, ThreadPoolExecutor(1) as pool:
        future = pool.submit(gateway.ask)
        wait_until(lambda: engine.now == 1)
        time.sleep(0.1)  # for a look that was under way
        looks = engine.looks
        time.sleep(0.3)
        assert (engine.looks > looks) is is_asked
        engine.holds = False
        assert future.result().status_code == 200
        wait_until(lambda: engine.looks > looks)


def asked_words(engine):
    return [got.json["messages"][0]["content"] for got in engine.got]


@pytest.mark.parametrize(
    "policy, wanted",
    [("sjf", ["1", "5", "30", "200", "900"]), ("fcfs", ["1", "900", "5", "200", "30"])],
)
def test_the_queue_is_held_under_the_policy(engine, policy, wanted):
    engine.holds = True
    words = ["--policy", policy, "--concurrency", 1]
    before = gateway_before(engine, kind="ollama", predictor=WordPredictor(), words=words)
    with before as gateway, ThreadPoolExecutor(8) as pool:
        futures = []
        for number, text in enumerate(["1", "900", "5", "200", "30"]):
            futures.append(pool.submit(gateway.ask, text))
            wait_until(lambda n=number: engine.now + gateway.gateway.dispatcher.waiting > n)
        engine.holds = False
        assert {future.result().status_code for future in futures} == {200}
    assert asked_words(engine) == wanted and engine.most == 1


def test_a_full_queue_is_a_429(engine):
    engine.holds = True
    words = ["--concurrency", 1, "--max_queue", 2]
    with gateway_before(engine, words=words) as gateway, ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(gateway.ask) for _ in range(6)]
        wait_until(lambda: sum(future.done() for future in futures) == 3)
        assert gateway.client.get("/v1/models").status_code == 200  # takes no place
        assert gateway.metric('refusals_total{reason="queue_full"}') == 3
        engine.holds = False
        replies = [future.result() for future in futures]
    statuses = [reply.status_code for reply in replies]
    assert sorted(statuses) == [200] * 3 + [429] * 3 and len(engine.got) == 3
    refused = replies[statuses.index(429)]
    assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("target", ["@{there}/v1/x", "http://{there}/v1/x"])
def test_a_request_goes_to_no_other_host(pair, target):
    there = f"127.0.0.1:{pair[1].port}"
    with gateway_before(pair[0], kind="vllm") as gateway:
        port = gateway.gateway_port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            line = f"POST {target.format(there=there)} HTTP/1.1"
            client.sendall(f"{line}\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
            assert client.recv(4096).startswith(b"HTTP/1.1 400") or not pair[1].got
    assert not pair[1].got


def test_a_client_that_leaves_frees_its_place(engine):
    engine.seconds = 30
    with gateway_before(engine, words=["--concurrency", 1]) as gateway:

        def ask_and_leave():
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{gateway.process.address}{PATH}", json={}, timeout=0.5)

        threads = [threading.Thread(target=ask_and_leave) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: gateway.gateway.open == 0)
        wait_until(lambda: engine.cancelled == len(engine.got))
        engine.seconds = 0
        assert gateway.ask().status_code == 200
        [upstream] = gateway.gateway.dispatcher.upstreams
        assert upstream.running == 0 == upstream.outstanding_tokens


def test_a_client_that_does_not_read_frees_its_place(engine, monkeypatch):
    monkeypatch.setattr(proxy, "READ_S", 0.5)
    engine.streams([b"data: " + b"x" * 65536 + b"\n\n"] * 2000)
    with gateway_before(engine, words=["--concurrency", 1]) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.gateway_port)) as client:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
            client.sendall(head.encode() + b"{}")
            wait_until(lambda: engine.got)
            wait_until(lambda: gateway.gateway.open == 0)
        [upstream] = gateway.gateway.dispatcher.upstreams
        assert upstream.running == 0
        assert gateway.gateway.view.make()["totals"]["cancelled"] == 1


def test_a_client_that_leaves_while_it_is_written_to_is_not_late(engine, monkeypatch):
    async def gone(request, writing):
        writing.close()
        raise proxy.ClientGone

    monkeypatch.setattr(proxy, "deliver", gone)
    engine.streams(stream_of(3))
    with gateway_before(engine, kind="vllm") as gateway:
        assert gateway.ask(stream=True).status_code == 499
        totals = gateway.gateway.view.make()["totals"]
    assert (totals["cancelled"], totals["late"]) == (1, 0)


def test_bodies_that_wait_are_bounded(engine, monkeypatch):
    monkeypatch.setattr(proxy, "MOST_HELD_BYTES", 1500)
    engine.holds = True
    with gateway_before(engine) as gateway, ThreadPoolExecutor(1) as pool:
        first = pool.submit(gateway.ask, "x" * 1000)
        wait_until(lambda: engine.now == 1)
        refused = gateway.ask("x" * 1000)
        assert refused.status_code == 429 and "more than 1,500" in refused.text
        assert refused.headers["Retry-After"]
        engine.holds = False
        assert first.result().status_code == gateway.ask("x" * 1000).status_code == 200
        assert gateway.gateway.held_bytes == 0


@pytest.mark.parametrize("number", ["9" * 400, "1e999", "true"])
@pytest.mark.parametrize("name", ["n", "slo_s", "max_tokens", "priority"])
def test_numbers_of_any_size_are_the_engine_s_to_refuse(engine, name, number):
    body = f'{{"messages":[{{"role":"user","content":"sag 50"}}],"{name}":{number}}}'
    with gateway_before(engine, kind="dynamo", predictor=WordPredictor()) as gateway:
        assert gateway.client.post(PATH, content=body).status_code == 200
        [upstream] = gateway.gateway.dispatcher.upstreams
        assert upstream.outstanding_tokens == 0


# ---- keys, drain, learning


def test_only_what_it_answers_itself_is_open(engine, monkeypatch):
    monkeypatch.setenv("GLM_API_KEY", "k")
    with gateway_before(engine, kind="vllm") as gateway:
        assert gateway.client.get("/health").status_code == 200
        for method in ("POST", "DELETE"):
            assert gateway.client.request(method, "/health").status_code == 401
    assert not engine.got


def test_keys_of_the_gateway_stay_with_it(engine, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text(f"team-a {key_digest(b'secret')}\n")
    monkeypatch.setenv("GLM_UPSTREAM_KEY", "inner")
    with gateway_before(engine, kind="llm-d", words=["--api_keys", keys]) as gateway:
        assert gateway.ask().status_code == 401
        assert gateway.client.get("/gateway/status").status_code == 401
        assert gateway.client.get("/health").status_code == 200
        gateway.client.headers["Authorization"] = "Bearer secret"
        assert gateway.ask().status_code == 200
        reply = gateway.client.get("/health", headers={"Host": "elsewhere.example"})
        assert reply.status_code == 403
        del gateway.client.headers["Authorization"]
        for path in ("/", "/page/x", "/page/%2e%2e/v1/chat/completions"):  # open at the server
            assert gateway.client.post(path, json={}).status_code == 401
    assert len(engine.got) == 1 and engine.got[0].headers["Authorization"] == "Bearer inner"


def test_a_drain_ends_what_has_begun(engine):
    engine.streams(stream_of(6), pause_s=0.1)
    with gateway_before(engine, kind="vllm") as gateway:
        with gateway.client.stream("POST", PATH, json={"stream": True}) as reply:
            pieces = reply.iter_raw()
            first = next(pieces)
            gateway.process.stop()
            assert first + b"".join(pieces) == b"".join(stream_of(6))
        gateway.thread.join(10)
        assert not gateway.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            gateway.ask()


def test_it_learns_from_the_lengths_that_come_back(engine, tmp_path):
    seen, words = [], ["--log", tmp_path / "lengths.jsonl"]
    with gateway_before(engine, kind="vllm", predictor=WordPredictor(), words=words) as gateway:
        gateway.gateway.observe = lambda *row: seen.append(row)
        gateway.ask("say 10")
        engine.streams(stream_of(3, tokens=30))
        gateway.ask("say 10", stream=True)
        engine.streams(stream_of(3))
        gateway.ask("say 10", stream=True)
        status = gateway.status()
        assert gateway.metric("answer_tokens_count") == 2
    assert seen == [("say 10", 7, True), ("say 10", 30, True)]
    rows = (tmp_path / "lengths.jsonl").read_text().splitlines()
    row = {"prompt": "say 10", "output_tokens": 7, "finished": True, "served_model": "m"}
    assert [json.loads(line) for line in rows] == [row, row | {"output_tokens": 30}]
    assert status["answers_without_length"] == 1
    drift = (math.log(8 / 11) + math.log(31 / 11)) / 2
    assert status["drift"] == pytest.approx(drift, abs=1e-3)
    assert status["q90_coverage"] == 0.5


@pytest.mark.slow
def test_recalibration_mends_a_predictor_that_is_off_by_half(engine, tmp_path, monkeypatch):
    """Answers are twice as long as it has learned: the drift goes, and 9 of 10 are within the q90.

    Served again, the gateway goes on with the update.
    """
    monkeypatch.setattr(recalibration, "NICE", 0)  # else a busy machine leaves it nothing
    folder = synthetic.train(tmp_path, synthetic.make_rows(400, seed=1))
    tokens = {}

    async def respond(request, body):
        prompt = json.loads(body)["messages"][0]["content"]
        return web.json_response(answer_of(tokens=tokens[prompt]))

    def ask_all(gateway, count, seed):
        for row in synthetic.make_rows(count, seed=seed, factor=2.0):
            tokens[row["prompt"]] = row["output_tokens"]
            assert gateway.ask(row["prompt"]).status_code == 200
        return gateway.status()

    engine.respond = respond
    words = ["--predictor", folder, "--recalibrate", "--recalibrate_every", 500]
    words += ["--recalibrated_dir", tmp_path / "updated"]
    with gateway_before(engine, kind="vllm", words=words) as gateway:
        before = ask_all(gateway, 500, seed=2)
        predictors = gateway.process.parts.predictors
        wait_until(lambda: predictors.current.version == 2, 120)
        assert gateway.status()["drift"] is None  # of the new one nothing is known yet
        after = ask_all(gateway, 200, seed=3)
        metrics = gateway.client.get("/metrics").text
        assert 'glm_recalibrations_total{outcome="taken"} 1.0' in metrics
        assert "glm_predictor_version 2.0" in metrics
    assert before["drift"] == pytest.approx(math.log(2), abs=0.12) and before["q90_coverage"] < 0.6
    assert abs(after["drift"]) < 0.15 and after["q90_coverage"] == pytest.approx(0.9, abs=0.08)
    with gateway_before(engine, kind="vllm", words=words) as gateway:
        again = ask_all(gateway, 100, seed=4)
    assert abs(again["drift"]) < 0.3


def test_ollama_s_own_api(engine):
    """Lines of JSON, whose last has the length."""
    lines = [b'{"response":"a","done":false}\n', b'{"done":true,"done_reason":"stop",']
    lines.append(b'"prompt_eval_count":9,"eval_count":12}\n')
    seen = []

    async def respond(request, body):
        reply = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await reply.prepare(request)
        for line in lines:
            await reply.write(line)
        return reply

    engine.respond = respond
    with gateway_before(engine, kind="ollama", predictor=WordPredictor()) as gateway:
        gateway.gateway.observe = lambda *row: seen.append(row)
        reply = gateway.client.post("/api/generate", json={"model": "m", "prompt": "say 10"})
    assert reply.content == b"".join(lines) and seen == [("say 10", 12, True)]
    assert engine.got[0].json == {"model": "m", "prompt": "say 10"}
    assert engine.got[0].headers["x-glm-predicted-tokens"] == "10"


def test_flags_that_do_not_fit_are_one_line(capsys):
    words = ["--upstream", "http://127.0.0.1:1", "--kind", "vllm"]
    for more, wanted in [
        (["--upstream", "127.0.0.1:1"], "wanted http://HOST:PORT, got 127.0.0.1:1"),
        (["--upstream", "http://a:1,http://a:1/v1"], "given twice"),
        (["--ttft_ms", "3", "--port", "0"], "--ttft_ms is of --kind llm-d"),
        (["--recalibrate", "--port", "0"], "--recalibrate needs --predictor DIR"),
    ]:
        assert main([*words, *more]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert wanted in error and error.startswith("serving.gateway: error: ")
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--recalibrate_every", "90"])
    assert stopped.value.code == 2
    assert "--recalibrate_every needs --recalibrate" in capsys.readouterr().err
