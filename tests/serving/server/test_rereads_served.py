"""A server whose running answers' lengths are predicted anew: metrics, live view, refusals."""

import json
import math
import threading

import httpx
import numpy as np
import pytest

import serving.replicas.served_model
from finetune.evaluation.generation import model_fingerprint
from predictor.prediction import from_bins
from serving.engines.answers import Answer, Sampling
from serving.policies.continuous import POLICIES
from serving.replicas.backends import open_placed
from serving.replicas.messages import SchedulerUpdate, slim_event
from serving.replicas.pool import ReplicaPool
from serving.replicas.served_model import ServedModel
from serving.request import Completion, Event, Limits, Record, Request
from serving.server.flags import parse_flags
from serving.server.monitor import Monitor
from serving.server.starting import load_service
from tests.serving.conftest import prediction_of
from tests.serving.engines.test_state_tap import LinearRereader
from tests.serving.replicas.test_pool import flight, job
from tests.serving.run_requests.test_run_requests import uellm_rows, write_list
from tests.serving.server.page.live_reader import LiveReader
from tests.serving.server.test_replicas_served import cluster, metric  # noqa: F401
from tests.serving.server.test_server_faults import ask, running


@pytest.fixture
def rereader(monkeypatch):
    """What --rereader loads, whatever folder it names: a small rereader of the model's states."""
    made = LinearRereader([1, 2], 64)
    monkeypatch.setattr(
        serving.replicas.served_model, "load_rereader", lambda folder, served_model=None: made
    )
    return made


def test_a_server_reads_its_answers_again(folders, rereader):
    """The lanes have the newest prediction, /metrics how many there were; the log the first one."""
    model, predictor = folders
    words = ["--policy", "deadline", "--predictor", predictor, "--rereader", "x"]
    with running(model, *words, endless=False) as server:
        server.server.live.period_s = 0.02
        with LiveReader(server.root) as reader:
            long = threading.Thread(target=ask, args=(server,), kwargs={"max_tokens": 600})
            long.start()
            for _ in range(6):
                ask(server, max_tokens=5)
            long.join()
            snapshot = reader.wait_for(lambda s: any(row["reread"] for row in s["rows"]))
        [row] = [row for row in snapshot["rows"] if row["reread"]]
        assert row["q10"] <= row["median"] <= row["q90"]
        assert row["q90"] - row["q10"] < 25  # the tiny rereader is sure: at most exp(3) tokens
        engine = server.service.backend.engine
        assert metric(server, "glm_rereads_total") == engine.rereads.count >= len(rereader.batches)
        assert "glm_reread_q90_coverage_ratio" in httpx.get(f"{server.root}/metrics").text
        assert all(prior is not None for _, _, priors in rereader.batches for prior in priors)


def test_every_policy_takes_newer_predictions(folders, rereader, tmp_path):
    """serving.run_requests --rereader: whole runs under each policy that predicts."""
    from serving.run_requests.command import main

    model, predictor = folders
    names = [name for name, policy in POLICIES.items() if policy.predicts and "oracle" not in name]
    words = [write_list(tmp_path, uellm_rows()), "--model", model, "--device", "cpu"]
    words += ["--predictor", predictor, "--rereader", "x", "--policies", ",".join(names)]
    words += [
        "--max_batch",
        3,
        "--max_new_tokens",
        20,
        "--at_once",
        "--json",
        tmp_path / "figures.json",
    ]
    assert main([str(word) for word in words]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["policies"]) == set(names)
    for run in figures["policies"].values():
        assert not run["figures"]["refused"] and run["figures"]["requests"] == len(uellm_rows())
    assert len(rereader.batches) >= len(names) // 2  # a run may end before a step does


def test_a_replicas_newer_prediction_reaches_its_front():
    """By message; the routing counts by it, and another replica begins with the first again."""
    pool = ReplicaPool([job("m")])
    events = []
    pool.start(events.append, lambda: None)
    one = flight(tokens=100.0)
    pool.replicas[0].flights[one.request.id] = one
    before, room = one.outstanding_tokens(), one.kv_tokens(pool.limits)
    theirs = Record(one.request, prediction=prediction_of(10.0))
    update = slim_event(Event(1.0, "reread", one.request.id, theirs))
    assert isinstance(update, SchedulerUpdate)
    pool._take_event(pool.replicas[0], update)
    [event] = events
    assert event.kind == "reread" and event.what is one.record
    assert event.what.prediction is theirs.prediction
    assert one.outstanding_tokens() < before / 2 and one.kv_tokens(pool.limits) < room
    one.leave_replica()
    assert one.outstanding_tokens() == before and one.kv_tokens(pool.limits) == room
    assert "prediction" not in slim_event(Event(1.0, "grew", 0, theirs)).changed


def test_a_static_engine_is_refused(folders):
    model, _ = folders
    words = ["--model", model, "--device", "cpu", "--policy", "fifo", "--engine", "static"]
    flags = parse_flags([str(word) for word in [*words, "--rereader", "x"]])
    with pytest.raises(ValueError, match="--rereader reads the states of --engine continuous"):
        load_service(flags)


def test_a_pipeline_is_refused_before_it_is_loaded(folders, cluster):  # noqa: F811
    model, _ = folders
    words = ["--model", str(model), "--cluster", str(cluster), "--device_map", "auto"]
    flags = parse_flags([*words, "--rereader", "x"])
    with pytest.raises(ValueError, match="--rereader reads .* replicas of 2 stages"):
        open_placed(ServedModel.of(flags, rereader="x"), flags, Limits(2, 400, 100))


def test_a_rereader_of_other_weights_is_said_so(folders, rereader, monkeypatch, caplog):
    """A model that was tuned again keeps its tokenizer and sizes; its states are others."""
    flags = parse_flags(["--model", str(folders[0]), "--device", "cpu", "--rereader", "x"])
    served, limits = ServedModel.of(flags, rereader="x"), Limits(2, 400, 100)
    learnt = model_fingerprint(served.load_engine(limits, "cpu").model)
    assert "other weights" not in caplog.text
    for weights, is_said in ((learnt, False), ("0" * 16, True)):
        monkeypatch.setattr(rereader, "weights", weights)
        served.load_engine(limits, "cpu")
        assert ("other weights than this model's" in caplog.text) is is_said


def test_new_predictions_are_judged_by_answers_that_ended_by_themselves():
    monitor = Monitor("m", Limits(2, 400, 100))
    assert math.isnan(monitor.reread_coverage())
    for number, (tokens, reason) in enumerate([(9, "stop"), (9, "length"), (21, "stop")]):
        request = Request(number, 3, 0.0, 9.0)
        record, answer = Record(request), Answer(number, [1], Sampling(), None)
        monitor.track(request, "x", answer)
        for q90 in (10.0, 20.0):
            record.prediction = from_bins(np.array([1.0]), np.array([0.0, q90 / 0.9]))
            monitor(Event(1.0, "reread", number, record))
        answer.reason, is_whole = reason, reason == "stop"
        made = tokens + is_whole  # with the end token
        done = Completion(request, 0.0, 1.0, 2.0, made, 50, 0, 0, cut=not is_whole)
        monitor(Event(2.0, "finished", number, done))
    assert monitor.reread_coverage() == 0.5
