"""Arrivals, lengths, objectives and predictions are what they are said to be; metrics by hand."""

import gzip
import json

import numpy as np
import pytest

from serving.request import Completion
from serving.simulate.statistics import Collector, interval, share_of_gain
from serving.simulate.workload import (
    WORKLOADS,
    PredictorModel,
    SloRule,
    gamma_arrivals,
    make_workload,
    poisson_arrivals,
    read_trace,
    repeat_trace,
)
from tests.conftest import shared_file
from tests.serving.conftest import COST, ask


@pytest.mark.parametrize("arrivals, variation", [(poisson_arrivals, 1.0), (gamma_arrivals, 3.0)])
def test_arrivals_have_their_rate_and_burstiness(arrivals, variation):
    gaps = np.diff(arrivals(200_000, 4.0, np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(
        0.25, rel=0.03
    ) and gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
    assert gaps.min() >= 0


@pytest.mark.parametrize(
    "name, count, prompt, output",
    [
        ("azure_conv", 19366, 1155, 211),
        ("azure_code", 8819, 2048, 28),
        ("mooncake", 12031, 12035, 343),
        ("mooncake_synthetic", 3993, 15325, 149),
    ],
)
def test_traces(name, count, prompt, output):
    times, prompts, outputs, _ = read_trace(name, shared_file("data/traces"))
    assert len(times) == count and times[0] == 0 and np.all(np.diff(times) >= 0)
    assert prompts.mean() == pytest.approx(prompt, abs=1) and outputs.mean() == pytest.approx(
        output, abs=1
    )


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="--traces"):
        read_trace("azure_conv", tmp_path)


def test_small_traces_of_both_formats_plain_and_packed(tmp_path):
    (tmp_path / "AzureLLMInferenceTrace_code.csv").write_text(  # as it is published
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,0\n2023-11-16 18:15:46.4951600,374,44\n"
    )
    times, prompts, outputs, _ = read_trace("azure_code", tmp_path)
    assert (
        times.tolist() == pytest.approx([0, 4.500009], abs=1e-6)
        and prompts.tolist() == [374, 396]
        and outputs.tolist() == [44, 1]
    )
    with gzip.open(tmp_path / "mooncake_conversation_trace.jsonl.gz", "wt") as file:
        file.write(
            json.dumps({"timestamp": 1500, "input_length": 7, "output_length": 3, "hash_ids": [5]})
            + "\n"
        )
    *columns, blocks = read_trace("mooncake", tmp_path)
    assert [column.tolist() for column in columns] == [[0], [7], [3]] and blocks == ((5,),)


def test_repeating_goes_around_and_keeps_the_order():
    times, prompts, outputs = repeat_trace(
        10,
        np.array([0.0, 1, 3]),
        np.array([1, 2, 3]),
        np.array([4, 5, 6]),
        np.random.default_rng(0),
    )
    assert np.all(np.diff(times) > 0) and set(zip(prompts, outputs)) == {(1, 4), (2, 5), (3, 6)}


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_its_rate_and_its_requests(name):
    workload = make_workload(
        name, 500, 5.0, COST, seed=1, traces=shared_file("data/traces"), max_tokens=100_000
    )
    requests = list(workload.requests())
    assert [r.id for r in requests] == list(range(500)) and len(workload) == 500
    arrivals = [r.arrival_s for r in requests]
    assert arrivals == sorted(arrivals)
    assert 500 / (arrivals[-1] - arrivals[0]) == pytest.approx(
        5.0, rel=0.6 if name == "gamma" else 0.15
    )
    assert all(
        r.slo_s >= 1.0 and r.prediction is not None and r.output_tokens >= 1 and r.predict_s == 1e-3
        for r in requests
    )
    assert all(r.prediction is None and r.predict_s == 0 for r in workload.requests(predicts=False))
    assert arrivals == [
        r.arrival_s
        for r in make_workload(
            name, 500, 5.0, COST, seed=1, traces=shared_file("data/traces"), max_tokens=100_000
        ).requests()
    ]


def test_a_million_requests_are_columns():
    workload = make_workload("poisson", 1_000_000, 10.0, COST)
    assert len(workload.predictions) < 2000
    assert (
        sum(
            c.nbytes
            for c in (
                workload.arrival_s,
                workload.slo_s,
                workload.prompt_tokens,
                workload.output_tokens,
                workload.prediction,
            )
        )
        < 50e6
    )


@pytest.mark.parametrize(
    "name, count, rate", [("weekly", 5, 1.0), ("poisson", 0, 1.0), ("poisson", 5, 0.0)]
)
def test_refusals(name, count, rate):
    with pytest.raises(ValueError, match="wanted"):
        make_workload(name, count, rate, COST)


def test_objectives_follow_their_rule():
    prompts, outputs = np.array([10, 1000, 10]), np.array([5, 5, 500])
    rng = np.random.default_rng(0)
    own = SloRule(3.0, 0.05, "own", (1.0,))(prompts, outputs, COST, rng)
    alone = [COST.prefill_s(p) + COST.decode_s(1, p + 1, o - 1) for p, o in zip(prompts, outputs)]
    np.testing.assert_allclose(own, np.maximum(0.05, 3 * np.array(alone)), rtol=1e-3)
    typical = SloRule(3.0, 0.05, "typical", (1.0,))(prompts, outputs, COST, rng)
    assert typical[0] == typical[2] != typical[1], "the objective must not tell the answer's length"
    assert SloRule(1.0, 7.5)(prompts, outputs, COST, rng).min() == 7.5
    with pytest.raises(ValueError, match="typical or own"):
        SloRule(length="mine")


@pytest.mark.parametrize("sigma", [0.3, 0.8])
def test_predictions_are_calibrated(sigma):
    """The truth's quantile in its prediction is uniform: a share q lies within the q-quantile."""
    rng = np.random.default_rng(0)
    outputs = np.clip(np.round(100 * np.exp(rng.standard_normal(20_000))), 1, 1500).astype(int)
    index, predictions = PredictorModel.normal(sigma, 4096).predict(outputs, rng)
    for q in (0.1, 0.5, 0.9):
        within = np.array([p.quantile(q) for p in predictions])[index]
        assert (outputs <= within).mean() == pytest.approx(q, abs=0.04)
    expected = np.array([p.rank_score for p in predictions])[index]
    assert np.std(np.log(outputs) - expected) == pytest.approx(sigma, rel=0.12)


def test_metrics_by_hand():
    collector = Collector()
    collector.add(
        Completion(ask(0, 10, 5, arrival=0.0, slo=2.0), 0.5, 1.0, 2.0, 5, 40, 0, 0, False)
    )
    collector.add(
        Completion(ask(1, 10, 1, arrival=1.0, slo=1.0), 3.0, 4.0, 4.0, 1, 40, 1, 0, False)
    )
    collector.add(Completion(ask(2, 10, 9, arrival=1.0, slo=9.0), 2.0, 3.0, 5.0, 4, 40, 0, 0, True))
    collector.counts["refused"] = 1
    found = collector.summary()
    assert found["requests"] == 4 and found["attainment"] == 0.25, (
        "late, cut and refused ones are not in time"
    )
    assert found["goodput_rps"] == pytest.approx(1 / 5) and found[
        "throughput_tps"
    ] == pytest.approx(10 / 5)
    assert found["latency_mean_s"] == pytest.approx((2 + 3 + 4) / 3) and found[
        "ttft_mean_s"
    ] == pytest.approx((1 + 3 + 2) / 3)
    assert (
        found["tpot_mean_s"] == pytest.approx((1 / 4 + 2 / 3) / 2)
        and found["largest_wait_s"] == 2.0
    )
    assert Collector().summary()["attainment"] == 0.0


def test_gain_and_interval():
    assert share_of_gain(3.0, 5.0, 1.0) == 0.5 and np.isnan(share_of_gain(1, 2, 2))
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    assert (
        np.isnan(interval([1.0])[1])
        and interval([1.0, 2.0])[0] == 1.5
        and np.isnan(interval([1.0, 2.0])[1])
    )


def test_p3_intervals_hold_for_any_number_of_seeds():
    """The factor of the standard error is that of Student's printed table, beyond 10 seeds too."""
    x = np.array([0.0, 1.0] * 40)
    for count, factor in (
        (3, 4.303),
        (10, 2.262),
        (11, 2.228),
        (12, 2.201),
        (15, 2.145),
        (31, 2.042),
        (61, 2.0),
    ):
        half = interval(list(x[:count]))[1]
        assert half / (x[:count].std(ddof=1) / np.sqrt(count)) == pytest.approx(factor, abs=1e-3)
