"""The gateway's page: a live view of what it does, in the form that serving.server's page shows."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from serving.server.keys import key_digest
from serving.server.page.described import SETTINGS
from tests.serving.gateway.engines import (
    PATH,
    RecordingEngine,
    WordPredictor,
    gateway_before,
    stream_of,
    wait_until,
)
from tests.serving.server.conftest import folders, start
from tests.serving.server.page.live_reader import LiveReader

__all__ = ["folders"]  # a fixture
ALONE = ["--no_page"]  # whose stream would take the answers that have ended


@pytest.fixture
def engine():
    found = RecordingEngine(pages={"/v1/models": {"data": [{"id": "m"}]}})
    yield found
    found.close()


def names(value) -> object:
    """The fields of a snapshot: of its objects, and of the first of its lists."""
    if isinstance(value, dict):
        return {name: names(inner) for name, inner in value.items()}
    return [names(inner) for inner in value[:1]] if isinstance(value, list) else None


def test_what_waits_runs_and_has_ended(engine):
    engine.holds = True
    words = ["--concurrency", 1, "--policy", "sjf", "--slo_s", 20, "--kv_tokens", 5000, *ALONE]
    before = gateway_before(engine, predictor=WordPredictor(), words=words)
    with before as gateway, ThreadPoolExecutor(4) as pool:
        view = gateway.gateway.view
        futures = []
        for number, tokens in enumerate((100, 700, 40)):
            futures.append(pool.submit(gateway.ask, f"say {tokens}"))
            wait_until(lambda n=number: engine.now + gateway.gateway.dispatcher.waiting > n)
        busy = view.make()
        engine.holds = False
        for future in futures:
            assert future.result().status_code == 200
        idle, later = view.make(), view.make()
    [row] = busy["rows"]
    assert (busy["running"], busy["waiting"], busy["policy"]) == (1, 2, "sjf")
    assert (row["median"], row["q90"], row["made"], row["replica"]) == (100, 180, 0, 0)
    assert [entry["median"] for entry in busy["queue"]] == [700, 40]  # the longest wait first
    assert row["age_s"] + row["due_s"] == pytest.approx(20, abs=0.01)
    assert busy["kv"]["reserved"] == row["reserved"] == row["prompt"] + 180
    assert busy["kv"]["limit"] == 5000 and busy["kv"]["used"] == row["prompt"]
    [replica] = busy["replicas"]
    assert (replica["state"], replica["devices"], replica["running"]) == ("ready", engine.base, 1)
    assert idle["running"] == idle["waiting"] == 0 == idle["kv"]["reserved"]
    assert [(row["median"], row["made"]) for row in idle["ended"]] == [(100, 7), (40, 7), (700, 7)]
    assert {row["reason"] for row in idle["ended"]} == {"stop"} and later["ended"] == []
    totals = idle["totals"]
    assert (totals["ended"], totals["in_time"], totals["late"], totals["tokens"]) == (3, 3, 0, 21)
    assert idle["attainment"] == 1 and idle["recent"]["answers"] == 3
    assert idle["replicas"][0]["requests"] == 3


def test_a_stream_grows_and_is_cancelled_by_its_client(engine):
    engine.streams(stream_of(400), pause_s=0.02)
    with gateway_before(engine, kind="vllm", words=ALONE) as gateway:
        view = gateway.gateway.view
        with gateway.client.stream("POST", PATH, json={"stream": True}) as reply:
            pieces = reply.iter_raw()
            next(pieces)
            wait_until(lambda: view.make()["rows"][0]["made"] > 3)
            assert view.make()["rows"][0]["median"] is None  # not predicted
        wait_until(lambda: not view.under_way)
        snapshot = view.make()
    assert [row["reason"] for row in snapshot["ended"]] == ["cancelled"]
    assert snapshot["totals"]["cancelled"] == 1 and snapshot["attainment"] is None


def test_what_is_refused_is_no_answer(engine):
    engine.refuses(400)
    with gateway_before(engine, kind="vllm", words=ALONE) as gateway:
        assert gateway.ask().status_code == 400
        engine.close()
        gateway.gateway.wait_s = 0.1
        assert gateway.ask().status_code == 503
        snapshot = gateway.gateway.view.make()
    assert [row["reason"] for row in snapshot["ended"]] == ["failed"]
    assert snapshot["totals"]["refused"] == 1 and snapshot["replicas"][0]["state"] == "ended"


@pytest.mark.slow
def test_a_snapshot_has_the_fields_of_the_server_s(folders, tmp_path):
    """Both watch the same answers: so many that some wait for longer than a snapshot's period."""
    count = 24
    process, address = start(folders, tmp_path / "log.jsonl")
    root = address.removesuffix("/v1")
    try:
        before = gateway_before(root, kind="glm-foundry", predictor=WordPredictor())
        with before as gateway, ThreadPoolExecutor(count) as pool:
            gateway.process.page.live.period_s = 0.05
            with LiveReader(root) as server, LiveReader(gateway.process.address) as own:
                own.wait_for(lambda snapshot: True)  # from here on at the shorter period
                fields = {"max_tokens": 600, "temperature": 0}
                futures = [pool.submit(gateway.ask, f"list {n}", **fields) for n in range(count)]
                ours = own.wait_for(lambda snapshot: snapshot["running"] == count)
                theirs = server.wait_for(lambda snapshot: snapshot["rows"] and snapshot["queue"])
                for future in futures:
                    future.result()
                ended = own.wait_for(lambda snapshot: snapshot["ended"])
                served = server.wait_for(lambda snapshot: snapshot["ended"])
    finally:
        process.kill()
        process.communicate()
    ours |= {"ended": ended["ended"], "queue": [queue_entry_of(ours)]}
    theirs |= {"ended": served["ended"]}
    for replica in theirs["replicas"]:
        replica["stages"] = []
    assert names(ours) == names(theirs)


def queue_entry_of(snapshot) -> dict:
    """A request that waits would have these fields; the gateway holds none here."""
    shared = ("id", "due_s", "prompt", "median", "q90", "adapter")
    return {name: snapshot["rows"][0][name] for name in shared} | {"waited_s": 0, "priority": 0}


def test_the_page_is_open_and_its_figures_are_not(engine, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"team-a {key_digest(b'secret')}\n")
    with gateway_before(engine, kind="vllm", words=["--api_keys", keys]) as gateway:
        page = gateway.client.get("/")
        assert page.status_code == 200 and "<title>GLM Foundry" in page.text
        assert "script-src 'self'" in page.headers["content-security-policy"]
        script = gateway.client.get("/page/app.js")
        assert script.headers["content-type"].startswith("text/javascript")
        etag = {"If-None-Match": script.headers["etag"]}
        assert gateway.client.get("/page/app.js", headers=etag).status_code == 304
        assert gateway.client.get("/page/api/access").json() == {"needs_key": True}
        for path in ("/page/api/settings", "/page/api/live", "/page/none.js"):
            assert gateway.client.get(path).status_code == 401
        gateway.client.headers["Authorization"] = "Bearer secret"
        settings = gateway.client.get("/page/api/settings").json()
        assert set(settings) == set(SETTINGS)
        assert (settings["model"], settings["policy"]) == ("m", "deadline")
        assert gateway.client.get("/page/api/live?seconds=x").status_code == 400
        assert gateway.client.get("/page/none.js").status_code == 404  # the engine's answer
    assert not engine.got


def test_the_stream_ends_with_the_gateway(engine):
    with gateway_before(engine, kind="vllm") as gateway:
        gateway.process.page.live.period_s = 0.05
        with LiveReader(gateway.process.address) as viewer:
            viewer.wait_for(lambda snapshot: True)
            gateway.process.stop()
            wait_until(lambda: viewer.ended)
        assert viewer.history is not None and viewer.type.startswith("text/event-stream")


def test_without_the_page_its_paths_go_to_the_engine(engine):
    engine.pages["/"] = "the engine's own"
    with gateway_before(engine, kind="vllm", words=["--no_page"]) as gateway:
        assert gateway.client.get("/").text == "the engine's own"
