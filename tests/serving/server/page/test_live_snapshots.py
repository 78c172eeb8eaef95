"""What the live view says of a server at work is true."""

import itertools
import json
import re
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from serving.engines import Answer, Sampling, WallClock
from serving.engines.runner import ReplicaState, StageState
from serving.request import Completion, Event, Limits, Record, Request
from serving.server.monitor import EndedAnswer, Monitor
from serving.server.page.snapshots import (
    ENDED_SHOWN,
    AnswerTotals,
    SnapshotMaker,
    finite,
    percentile,
)
from tests.serving.conftest import prediction_of
from tests.serving.server.page.live_reader import LiveReader
from tests.serving.server.test_replicas_served import Stream, cluster, metric, wait_for  # noqa: F401
from tests.serving.server.test_server_faults import ask, running, slow_steps, slowed
from tests.warm import warm_python


@pytest.fixture(scope="module")
def server(folders):
    """Two rows at a time, lengths predicted, 20 snapshots a second."""
    model, predictor = folders
    words = ["--policy", "deadline", "--predictor", predictor]
    with running(model, *words, endless=False) as found:
        found.server.live.period_s = 0.05
        yield found


@pytest.fixture(scope="module")
def replicas(folders, cluster):  # noqa: F811
    """The same in two processes."""
    model, predictor = folders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        words = ["--deployer", "helr", "--cluster", cluster, "--device", "0"]
        words += ["--policy", "deadline", "--predictor", predictor]
        with running(model, *words, endless=False) as found:
            found.server.live.period_s = 0.05
            yield found


def start_asking(server, count, **fields):
    """Threads that each ask for an answer."""
    threads = []
    for number in range(count):
        words = (server, f"list {number} rivers")
        threads.append(threading.Thread(target=ask, args=words, kwargs=fields))
        threads[-1].start()
    return threads


def check_snapshot(snapshot):
    """What holds at any moment."""
    for row in snapshot["rows"]:
        assert row["prompt"] + row["made"] <= row["reserved"], row
        assert 0 <= row["q10"] <= row["median"] <= row["q90"]
        assert row["age_s"] + row["due_s"] == pytest.approx(30, abs=0.01)
    for entry in snapshot["queue"]:
        assert entry["waited_s"] >= 0 and entry["median"] <= entry["q90"]
        assert entry["waited_s"] + entry["due_s"] == pytest.approx(30, abs=0.01)
    waits = [entry["waited_s"] for entry in snapshot["queue"]]
    assert waits == sorted(waits, reverse=True)
    assert len(snapshot["rows"]) == snapshot["running"] and len(waits) == snapshot["waiting"]
    assert not {row["id"] for row in snapshot["rows"]} & {e["id"] for e in snapshot["queue"]}
    totals, kv = snapshot["totals"], snapshot["kv"]
    assert totals["in_time"] + totals["late"] + totals["cancelled"] == totals["ended"]
    assert kv["used"] == sum(row["prompt"] + row["made"] for row in snapshot["rows"])
    assert kv["reserved"] == sum(row["reserved"] for row in snapshot["rows"]) <= kv["limit"]
    assert sum(replica["running"] for replica in snapshot["replicas"]) == snapshot["running"]
    assert sum(replica["kv_used"] for replica in snapshot["replicas"]) == kv["used"]


def check_course(snapshots):
    """What holds from one moment to the next: each answer ends once, nothing is counted back."""
    ended, before = [], None
    for snapshot in snapshots:
        check_snapshot(snapshot)
        ended += [entry["id"] for entry in snapshot["ended"]]
        if before is not None:
            assert snapshot["t"] > before["t"]
            for name, value in snapshot["totals"].items():
                assert value >= before["totals"][name], name
        before = snapshot
    assert len(set(ended)) == len(ended)
    return ended


def test_a_snapshot_has_all_of_the_contract(server):
    with LiveReader(server.root) as viewer:
        found = viewer.wait_for(lambda snapshot: True)
    assert set(found) == {
        *("t", "policy", "waiting", "running", "queue", "rows", "ended", "totals", "kv"),
        *("recent", "attainment", "coverage", "drift", "replicas"),
    }
    assert found["policy"] == "deadline" and found["kv"]["limit"] == 2048
    [replica] = found["replicas"]
    model_bytes = sum(p.nbytes for p in server.service.backend.engine.model.parameters())
    stage = {"device": "cpu", "layers": [0, 1], "bytes": model_bytes, "predicted_bytes": None}
    assert replica["stages"] == [stage]
    assert replica["state"] == "ready" and replica["devices"] == "cpu"
    assert replica["restarts"] == 0 and replica["kv_limit"] == 2048


def test_under_load(server):
    with LiveReader(server.root) as viewer:
        first = viewer.wait_for(lambda snapshot: True)["totals"]
        with slowed(server.service):
            threads = start_asking(server, 6, max_tokens=150)
            full = viewer.wait_for(lambda s: s["running"] == 2 and s["waiting"] == 4)
        for thread in threads:
            thread.join(60)
        last = viewer.wait_for(lambda s: s["totals"]["ended"] == first["ended"] + 6)
    ended = check_course(viewer.snapshots)
    assert len(ended) == 6
    assert set(full["rows"][0]) == {
        *("id", "replica", "prompt", "made", "median", "q10", "q90", "age_s", "due_s"),
        *("reserved", "preemptions", "overruns", "adapter", "reread"),
    }
    assert full["rows"][0]["replica"] == 0 and full["replicas"][0]["waiting"] == 4
    made = {}
    for snapshot in viewer.snapshots:
        for row in snapshot["rows"]:
            made.setdefault(row["id"], []).append(row["made"])
    assert all(counts == sorted(counts) for counts in made.values())
    assert last["totals"]["tokens"] == first["tokens"] + 6 * 150
    assert last["replicas"][0]["requests"] >= 6
    assert last["recent"]["answers"] >= 6
    assert 0 < last["recent"]["ttft_p50"] <= last["recent"]["latency_p50"]
    assert last["attainment"] > 0 and last["running"] == last["waiting"] == 0
    [entry] = [e for s in viewer.snapshots for e in s["ended"] if e["id"] == ended[0]]
    assert entry["made"] == 150 and entry["reason"] == "length" and entry["replica"] == 0
    assert entry["in_time"] and entry["slo_s"] == 30 and 0 < entry["latency_s"] < 30


def test_counts_are_those_of_the_metrics(server):
    with slowed(server.service), LiveReader(server.root) as viewer:
        threads = start_asking(server, 5, max_tokens=1000)
        viewer.wait_for(lambda s: s["running"] == 2 and s["waiting"] == 3)
        assert metric(server, "glm_running_requests") == 2
        assert metric(server, "glm_waiting_requests") == 3
        before = viewer.snapshots[-1]["kv"]["used"]
        used = metric(server, "glm_kv_used_tokens")
        assert before <= used
        wait_for(lambda: viewer.snapshots[-1]["kv"]["used"] > used)
        assert metric(server, "glm_kv_limit_tokens") == viewer.snapshots[-1]["kv"]["limit"]
        server.service.cancel_all()
        for thread in threads:
            thread.join(30)
        last = viewer.wait_for(lambda s: s["totals"]["cancelled"] == 5)
    text = httpx.get(f"{server.root}/metrics").text
    [cancelled] = re.findall(r'glm_requests_total\{reason="cancelled"\} (\S+)', text)
    assert float(cancelled) == last["totals"]["cancelled"] == 5
    [answered] = re.findall(r'glm_slo_total\{in_time="true"\} (\S+)', text)
    assert float(answered) == last["totals"]["in_time"]
    assert {e["reason"] for s in viewer.snapshots for e in s["ended"]} == {"cancelled"}


def test_a_full_queue_turns_away(tiny_folders):
    words = ["--max_queue", "0", "--max_batch", "1"]
    with running(tiny_folders["glm2"], *words, prepare=slow_steps(0.03)) as found:
        found.server.live.period_s = 0.05
        with LiveReader(found.root) as viewer:
            threads = start_asking(found, 1, max_tokens=900)
            viewer.wait_for(lambda s: s["running"] == 1)
            assert ask(found).status_code == 429
            assert viewer.wait_for(lambda s: s["totals"]["refused"] == 1)
            late = ask(found, slo_s=0.001, max_tokens=900)
            assert late.status_code == 429
            found.service.cancel_all()
            threads[0].join(30)
            viewer.wait_for(lambda s: s["totals"]["cancelled"] == 1 and s["running"] == 0)
            assert ask(found, slo_s=0.001).status_code == 200
            last = viewer.wait_for(lambda s: s["totals"]["late"] == 1)
        [entry] = last["ended"]
        assert entry["in_time"] is False and entry["median"] is None and entry["slo_s"] == 0.001
        assert last["attainment"] == 0 and last["coverage"] is None


def test_the_static_engine(tiny_folders):
    with running(tiny_folders["glm2"], "--engine", "static", "--policy", "fifo") as found:
        found.server.live.period_s = 0.05
        with LiveReader(found.root) as viewer:
            thread = start_asking(found, 1)[0]
            thread.join(30)
            last = viewer.wait_for(lambda s: s["totals"]["ended"] == 1)
    [stage] = last["replicas"][0]["stages"]
    assert stage["device"] == "cpu" and stage["layers"] == [0, 2] and stage["bytes"] is None


@pytest.mark.slow
def test_a_lost_replica_is_seen(replicas):
    with LiveReader(replicas.root) as viewer:
        first = viewer.wait_for(lambda s: True)
        assert [r["state"] for r in first["replicas"]] == ["ready", "ready"]
        assert [r["devices"] for r in first["replicas"]] == ["cpu@1", "cpu@1"]
        for replica in first["replicas"]:
            [stage] = replica["stages"]
            assert stage["layers"] == [0, 1]
            assert stage["bytes"] == pytest.approx(stage["predicted_bytes"], rel=0.2)
        streams = [Stream(replicas) for _ in range(6)]
        viewer.wait_for(lambda s: [r["running"] for r in s["replicas"]] == [2, 2])
        replicas.service.backend.replicas[0].process.kill()
        viewer.wait_for(lambda s: s["replicas"][0]["state"] != "ready")
        viewer.wait_for(lambda s: s["replicas"][0]["state"] == "starting")
        again = viewer.wait_for(
            lambda s: s["replicas"][0]["state"] == "ready" and s["replicas"][0]["restarts"]
        )
        for stream in streams:
            stream.join(90)
        last = viewer.wait_for(lambda s: s["totals"]["ended"] == 6)
    assert again["replicas"][0]["restarts"] == 1 and again["replicas"][1]["restarts"] == 0
    check_course(viewer.snapshots)
    moved = last["totals"]["requeued"]
    assert moved == metric(replicas, "glm_requeued_requests") >= 1
    assert last["totals"]["preempted"] >= 1 and last["totals"]["tokens"] >= 6 * 500
    seen = {}
    for snapshot in viewer.snapshots:
        for row in snapshot["rows"]:
            seen.setdefault(row["id"], set()).add(row["replica"])
    assert {0, 1} in seen.values()  # a row that moved
    assert sum(r["requests"] for r in last["replicas"]) == 6
    ended = [entry for snapshot in viewer.snapshots for entry in snapshot["ended"]]
    assert {entry["replica"] for entry in ended} <= {0, 1} and len(ended) == 6


def test_what_no_replica_has_waits(replicas):
    with LiveReader(replicas.root) as viewer:
        for replica in replicas.service.backend.replicas:
            replica.process.kill()
        viewer.wait_for(lambda s: {r["state"] for r in s["replicas"]} <= {"ended", "starting"})
        thread = start_asking(replicas, 1, max_tokens=5)[0]
        held = viewer.wait_for(lambda s: s["waiting"] == 1)
        assert sum(r["waiting"] for r in held["replicas"]) == 0
        thread.join(60)
        viewer.wait_for(lambda s: s["waiting"] == s["running"] == 0)


# ---- without a server


def test_no_number_is_nan():
    for value in (float("nan"), float("inf"), -float("inf"), None):
        assert finite(value) is None
    assert finite(1.23456) == 1.235 and finite(-2.0, 0) == -2


@pytest.mark.parametrize(
    "values, share, expected",
    [
        ([], 0.5, None),
        ([3.0], 0.95, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([0.0, 1.0, 2.0, 3.0, 4.0], 0.95, 3.8),
        ([0.0, 10.0], 1.0, 10.0),
    ],
)
def test_percentiles(values, share, expected):
    assert percentile(values, share) == pytest.approx(expected)


def completion(number, finish_s, first_token_s=0.5, arrival_s=0.0):
    request = Request(number, 10, arrival_s, 30.0)
    return Completion(request, 0.1, first_token_s, finish_s, 20, 40, 0, 0, False)


def test_totals_keep_what_is_recent():
    totals = AnswerTotals()
    for number in range(100):
        reason = "cancelled" if number % 10 == 0 else "stop"
        late = number % 10 == 1
        totals.add(EndedAnswer(completion(number, float(number)), 20, reason, not late, None))
    assert (totals.ended, totals.cancelled, totals.late, totals.in_time) == (100, 10, 10, 80)
    assert totals.tokens == 2000
    fresh = totals.take_fresh()
    assert [answer.done.request.id for answer in fresh] == list(range(100 - ENDED_SHOWN, 100))
    assert totals.take_fresh() == []
    found = totals.recent_figures(now_s=99.0)  # of those from 39 on, 7 of 61 were cancelled
    assert found["answers"] == 55 and found["ttft_p50"] == 0.5
    assert found["latency_p95"] == pytest.approx(96.3, abs=1)
    assert totals.recent_figures(now_s=1000.0)["latency_p50"] is None


def test_an_answer_without_a_token_has_no_first_one():
    totals = AnswerTotals()
    totals.add(EndedAnswer(completion(1, 2.0, first_token_s=-1.0), 0, "failed", False, None))
    found = totals.recent_figures(now_s=3.0)
    assert found["answers"] == 1 and found["ttft_p95"] is None and found["latency_p95"] == 2.0


def test_a_monitor_without_the_metrics_package_counts(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monitor = Monitor("m", Limits())
    assert monitor.figures is None
    ended = []
    monitor.on_end = ended.append
    record = Record(Request(7, 10, 0.0, 30.0))
    for kind in ("arrived", "admitted", "overran", "preempted", "admitted"):
        monitor(Event(0.0, kind, 7, record))
    monitor(Event(1.0, "finished", 7, completion(7, 1.0)))
    monitor.count_refusal("queue_full")
    monitor.count_refusal("bad_request")
    assert monitor.events["overran"] == monitor.events["preempted"] == 1
    assert monitor.turned_away == 1
    assert [(answer.reason, answer.tokens, answer.in_time) for answer in ended] == [
        ("stop", 19, True)
    ]


class OneReplica:
    """What a snapshot asks of a backend."""

    requeued = 0

    def replica_states(self):
        return [ReplicaState(0, "ready", "cpu", 100, 0, 0, (StageState("cpu", 0, 2),))]


def test_snapshots_while_another_thread_changes_everything():
    monitor = Monitor("m", Limits(max_batch=8))
    service = SimpleNamespace(
        monitor=monitor, clock=WallClock(), policy="fcfs", backend=OneReplica()
    )
    maker = SnapshotMaker(service)
    ends = threading.Event()

    def serve():
        """Answers of two tokens each: arrived, admitted, finished, up to 8 at once."""
        under_way = []
        for number in itertools.count():
            request = Request(number, 3, service.clock.now_s(), 30.0, prediction_of(9))
            answer = Answer(number, [1, 2, 3], Sampling(), None)
            answer.replica = 0
            record = Record(request)
            monitor.track(request, "", answer)
            monitor(Event(0.0, "arrived", number, record))
            record.reserved_tokens = 10
            monitor(Event(0.0, "admitted", number, record))
            answer.add(7)
            under_way.append((record, answer))
            if len(under_way) == 8:
                record, answer = under_way.pop(0)
                answer.add(5, "stop")
                done = replace(completion(record.request.id, 1.0), request=record.request)
                monitor(Event(1.0, "finished", record.request.id, replace(done, output_tokens=2)))
            if ends.is_set():
                return

    thread = threading.Thread(target=serve)
    thread.start()
    snapshots = []
    until = time.monotonic() + 2
    while time.monotonic() < until or len(snapshots) < 50:
        snapshots.append(json.loads(json.dumps(maker.make(), allow_nan=False)))
    ends.set()
    thread.join()
    snapshots.append(maker.make())
    before = 0
    for snapshot in snapshots:
        assert snapshot["running"] <= 8
        rows = {row["id"] for row in snapshot["rows"]}
        assert not rows & {entry["id"] for entry in snapshot["queue"]}
        assert snapshot["totals"]["tokens"] >= before
        before = snapshot["totals"]["tokens"]
        [replica] = snapshot["replicas"]
        assert replica["running"] == snapshot["running"]
    waits = sorted(snapshot["waiting"] for snapshot in snapshots)
    assert waits[len(waits) // 2] <= 1
    last = snapshots[-1]
    assert last["totals"]["ended"] > 100 and last["waiting"] == 0 and last["running"] == 7
    assert before == last["totals"]["ended"] + last["running"]  # one each, without end tokens
