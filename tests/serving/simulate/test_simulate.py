"""The simulated engine against one that takes every iteration; conservation; the command."""

import gzip
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.policies.continuous import POLICIES, SIMULATED, Deadline, Sjf
from serving.request import Limits
from serving.simulate.command import main, simulation_parser
from serving.simulate.compare import (
    SEARCH_SEEDS,
    SPACES,
    ComparisonSetting,
    attainment_scorer,
    compare_policies,
    search_knobs,
    simulate,
)
from serving.simulate.engine import LinearCost, SimulatedEngine, smallest_step_count
from serving.simulate.workload import PredictorModel, make_workload
from tests.serving.conftest import COST, TokenByToken, ask, prediction_of, serve

TIGHT = Limits(max_batch=5, kv_tokens=600, max_tokens=300, prefill_tokens=64)


def mixed(count, seed, gap=0.02):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(gap, count))
    return [
        ask(
            i,
            int(rng.integers(1, 150)),
            int(rng.geometric(1 / 30)),
            float(times[i]),
            float(rng.uniform(0.2, 4)),
            float(rng.integers(2, 60)),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("seed", range(3))
def test_events_equal_those_of_every_iteration(name, seed):
    fast, _, _ = serve(SIMULATED[name], mixed(60, seed), TIGHT)
    slow, _, _ = serve(SIMULATED[name], mixed(60, seed), TIGHT, TokenByToken(COST, TIGHT))
    assert [(e.kind, e.id) for e in fast] == [(e.kind, e.id) for e in slow]
    np.testing.assert_allclose([e.time_s for e in fast], [e.time_s for e in slow], rtol=1e-9)


# Of each policy's events and the engine's sums, before the loop was made faster (2026-11-29).
DIGESTS = {
    "fifo": "16e2e11d8b29",
    "s3": "0e584803bb9c",
    "odbs": "8c70c3649ae1",
    "slo_dbs": "1221b1d82410",
    "slo_odbs": "ad9e31033c15",
    "uellm_released": "dac3ff5774bb",
    "uellm_baseline": "16e2e11d8b29",
    "annealing": "c896c6f0d5a2",
    "oracle": "4b5cea278034",
    "fcfs": "f01ec74249be",
    "sjf": "a5ba04b474d7",
    "srpt": "7e9e5af7d218",
    "deadline": "67b962dc7a11",
    "deadline_oracle": "04d6b908dda9",
    "boost": "53ae41ef88f4",
    "boost_work": "52ce0782d52c",
    "boost_oracle": "1fc0543cbb3a",
    "tie": "e7396275540c",
    "gittins": "050399e4c5a4",
    "gittins_mean": "ab8d0aaf996b",
    "gittins_tail": "26227262b7c5",
    "gittins_oracle": "4c24dc34d2f3",
    "vllm": "da11426ec21f",
}


def digest(name: str) -> str:
    """Of two runs of 250 requests, to a microsecond."""
    made = hashlib.sha256()
    for seed, limits in ((11, TIGHT), (12, Limits(16, 3000, 600, prefill_tokens=96))):
        events, _, engine = serve(SIMULATED[name], mixed(250, seed, 0.03), limits)
        for event in events:
            made.update(repr((round(event.time_s, 6), event.kind, event.id)).encode())
        sums = (engine.busy_s, engine.row_s, engine.used_token_s, engine.reserved_token_s)
        made.update(repr([round(value, 5) for value in sums]).encode())
    return made.hexdigest()[:12]


@pytest.mark.parametrize("name", DIGESTS)
def test_events_are_those_of_the_slower_loop(name):
    assert digest(name) == DIGESTS[name]


@pytest.mark.parametrize("name", SIMULATED)
def test_tokens_in_are_tokens_out(name):
    requests = mixed(80, 5)
    events, collector, engine = serve(SIMULATED[name], requests, TIGHT)
    done = {e.id: e.what for e in events if e.kind == "finished"}
    assert sorted(done) == list(range(80))
    for request in requests:
        whole = min(request.output_tokens, TIGHT.max_tokens - request.prompt_tokens)
        assert done[request.id].output_tokens == whole
        assert done[request.id].cut == (whole < request.output_tokens)
    summary = collector.summary(engine)
    useful = sum(r.prompt_tokens + done[r.id].output_tokens - 1 for r in requests)
    assert engine.prefill_tokens + engine.step_rows >= useful - 1e-6
    assert (
        0 <= summary["padding_waste"] < 1
        and 0 <= summary["kv_waste"] < 1
        and 0 < summary["utilisation"] <= 1 + 1e-9
    )
    assert not engine.rows and engine._decoding == engine._context == engine._reserved == 0


def test_one_request_alone_takes_what_the_cost_model_says():
    limits = Limits(4, 1000, 500, prefill_tokens=16)
    for name in ("fifo", "fcfs", "deadline", "sjf"):
        _, collector, _ = serve(SIMULATED[name], [ask(0, 50, 20)], limits)
        prefill = (
            COST.prefill_s(50)
            if name == "fifo"
            else sum(COST.chunk_s(n, start) for start, n in ((0, 16), (16, 16), (32, 16), (48, 2)))
        )
        assert collector.columns["finish_s"][0] == pytest.approx(
            prefill + COST.decode_s(1, 51, 19), rel=1e-9
        )
        assert collector.columns["first_token_s"][0] == pytest.approx(prefill, rel=1e-9)


@given(st.floats(1e-4, 1), st.floats(0, 0.01), st.integers(2, 5000), st.floats(0.001, 0.999))
def test_fewest_steps_is_the_first_to_reach_the_budget(base, growth, most, share):
    def seconds(k):
        return k * base + growth * k * (k - 1) / 2

    budget = share * seconds(most)
    k, took = smallest_step_count(seconds, most, seconds(most), budget)
    assert took == seconds(k) >= budget and (k == 1 or seconds(k - 1) < budget)


def test_static_batches_as_the_continuous_engine_runs_them():
    """No padding; prompts come in chunks; ended rows cost nothing, only their batch keeps them."""
    limits = Limits(4, 2000, 500, prefill_tokens=64)
    requests = [ask(0, 60, 3), ask(1, 20, 8), ask(2, 10, 5)]
    _, collector, engine = serve(
        POLICIES["fifo"], requests, limits, SimulatedEngine(COST, limits, padded=False)
    )
    wanted = (
        2 * COST.prefill_s(45, 2)
        + COST.decode_s(3, 93, 2)
        + COST.decode_s(2, 30 + 6, 2)
        + COST.decode_s(1, 25, 3)
    )
    assert list(collector.columns["finish_s"]) == pytest.approx([wanted] * 3, rel=1e-9)
    assert engine.prefill_tokens == 90 and engine.step_rows == 2 + 7 + 4
    assert not engine.rows and engine._decoding == engine._context == engine._reserved == 0


def test_horizon_and_wake_are_kept():
    from serving.request import Plan, Record

    engine = SimulatedEngine(COST, Limits())
    record = Record(ask(0, 10, 100))
    result = engine.step(Plan((record,), (), {0: 200}, horizon_steps=5))
    assert result.emitted_tokens == 5 and engine.generated(record) == 5 and not result.finished
    before = engine.steps
    result = engine.step(Plan(), budget_s=0.0101)
    assert engine.steps == before + 2 and result.elapsed_s >= 0.0101


def test_a_simulation_is_deterministic_and_ordered():
    workload = make_workload("gamma", 300, 12.0, COST, seed=3)
    one, kept = simulate(POLICIES["deadline"], workload, COST, Limits())
    two, _ = simulate(POLICIES["deadline"], workload, COST, Limits())
    assert one == two
    assert np.all(np.diff(kept.columns["finish_s"]) >= 0)


def test_predictions_are_charged_to_those_that_ask():
    workload = make_workload("poisson", 50, 0.5, COST, seed=1, predict_s=0.25)
    with_it, _ = simulate(POLICIES["deadline"], workload, COST, Limits())
    without, _ = simulate(POLICIES["fcfs"], workload, COST, Limits())
    assert with_it["ttft_p50_s"] - without["ttft_p50_s"] == pytest.approx(0.25, abs=0.02)


def test_predictions_are_made_anew_for_those_that_ask():
    """On each of two replicas, whose requests are numbered from 0."""
    limits = Limits(8, 8000, 4096)
    setting = ComparisonSetting("poisson", 60, COST, limits, replicas=2, reread_tau=0.6)
    workload = setting.make(20.0, 0)
    totals = {}
    for name in ("deadline", "fcfs"):
        for rereads in (None, setting.rereads):
            metrics, _ = simulate(POLICIES[name], workload, COST, limits, 2, rereads)
            totals[name, rereads is not None] = metrics["utilisation"], metrics["latency_mean_s"]
    assert totals["deadline", True] != totals["deadline", False]
    assert totals["fcfs", True] == totals["fcfs", False]
    assert replace(setting, reread_tau=None).rereads is None


def test_the_command_writes_its_table(tmp_path, capsys):
    out = tmp_path / "deep" / "table.json"
    main(
        [
            "--policies",
            "fifo,deadline,oracle",
            "--rate",
            "4,30",
            "--requests",
            "60",
            "--seeds",
            "2",
            "--json",
            str(out),
        ]
    )
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [(r["rate"], r["policy"]) for r in found["rows"]] == [
        (r, p) for r in (4.0, 30.0) for p in ("fifo", "deadline", "oracle")
    ]
    assert (
        found["rows"][3]["metrics"]["share_of_gain"][0] == 0
        and found["rows"][5]["metrics"]["share_of_gain"][0] == 1
    )
    assert found["policies"]["deadline"]["admit_quantile"] == Deadline().admit_quantile
    assert printed.count("\n") == 8 and "share of gain" in printed


def refusal(capsys, *flags: str) -> str:
    """The one line that a run which must not succeed leaves on stderr; nothing is printed."""
    try:
        code = main([*map(str, flags), "--requests", "20", "--seeds", "1"])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert (
        code in (1, 2)
        and out == ""
        and err.count("\n") == 1
        and err.startswith("serving.simulate: error: ")
    ), (code, out, err)
    return err


NUMBERS = [
    "rate",
    "requests",
    "seeds",
    "slo_scale",
    "slo_floor_s",
    "predictor_sigma",
    "predict_s",
    "reread_tau",
    "longest_answer",
    "max_batch",
    "kv_tokens",
    "max_tokens",
    "prefill_tokens",
    "gpus",
    "need_tokens",
    "element_bytes",
]


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x", "", "1e400", "9" * 5000])
@pytest.mark.parametrize("name", NUMBERS)
def test_p2_numbers_that_are_none(name, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"--{name}", value])
    out, err = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and out == ""
        and err.count("\n") == 1
        and f"--{name}: wanted a" in err
        and len(err) < 250
    )


def test_p2_every_number_of_the_command_is_tried():
    wanted = {
        action.dest for action in simulation_parser()._actions if action.type not in (None, Path)
    }
    assert wanted == set(NUMBERS)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--policies", "fastest"], "fastest unknown"),
        (["--policies", ","], "--policies: name at least one of"),
        (["--rate", "4,0"], "--rate"),
        (["--reread_tau", "1"], "--reread_tau: wanted a number above 0 to 0.99"),
        (["--seeds", "0"], "--seeds"),
        (["--longest_answer", "1"], "--longest_answer: wanted a whole number from 2"),
        (["--gpus", "2000000"], "--gpus"),
        (
            ["--max_tokens", "2"],
            "--max_tokens 2: no request fits, the shortest prompt of poisson has",
        ),
        (
            ["--workload", "azure_conv", "--traces", "/nowhere"],
            "/nowhere/AzureLLMInferenceTrace_conv.csv[.gz]; --traces names the folder",
        ),
        (
            ["--experiment", "uellm", "--uellm_data", "/nowhere"],
            "/nowhere/length_runs.csv; --uellm_data names the folder",
        ),
        (["--experiment", "trace", "--traces", "/nowhere"], "--traces names the folder"),
        (["--predictor", "/nowhere"], "/nowhere is no length predictor"),
        (["--profile", "none"], "no profile 'none'"),
        (["--device", "none"], "no device 'none'"),
        (["--device", "A40", "--model", "/nowhere"], "/nowhere"),
        (["--gpus", "2"], "--gpus goes with --profile or --device"),
        (["--kv_tokens", "9", "--max_tokens", "9"], "no request fits"),
    ],
)
def test_p2_one_line_each(flags, said, capsys):
    assert said in refusal(capsys, *flags)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens\n", mtime=0),
        gzip.compress(b"a,b,c\n1,2,3\n", mtime=0),
        gzip.compress(b"a\n\xff\n", mtime=0),
        gzip.compress(b"a,b,c\n2023-11-16 18:15:46.6805900,374\n", mtime=0),
        gzip.compress(b"a,b,c\n2023-11-16 18:15:46.6805900,1,2\n", mtime=0)[:-12],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    ],
)
def test_p2_traces_that_are_none(content, tmp_path, capsys):
    (tmp_path / "AzureLLMInferenceTrace_conv.csv.gz").write_bytes(content)
    assert "AzureLLMInferenceTrace_conv.csv.gz" in refusal(
        capsys, "--workload", "azure_conv", "--traces", tmp_path
    )


@pytest.mark.parametrize(
    "change",
    [
        {"residuals": ["a"]},
        {"residuals": [1.0, 0.0]},
        {"residuals": [float("nan")]},
        {"residuals": [[0.0]]},
        {"residuals": 3},
        {"residuals": {"a": 1}},
    ],
)
def test_p2_cards_whose_residuals_are_none(change, tmp_path, capsys):
    card = {
        "format": "glm-foundry length predictor",
        "format_version": 1,
        "served_model": {"length_limit": 512},
    }
    (tmp_path / "predictor.json").write_text(json.dumps(card | change))
    assert "residuals are no ascending list of numbers" in refusal(capsys, "--predictor", tmp_path)


def test_the_table_is_aligned_and_has_units(capsys):
    assert (
        main(
            [
                "--policies",
                "fifo,slo_odbs,deadline",
                "--rate",
                "4,100",
                "--requests",
                "40",
                "--seeds",
                "3",
            ]
        )
        == 0
    )
    heads, units, *lines = capsys.readouterr().out.splitlines()
    assert heads.split()[:4] == ["rate", "policy", "in", "time"] and units.split()[:5] == [
        "1/s",
        "%",
        "1/s",
        "s",
        "s",
    ]
    ends = [m.end() for m in re.finditer(r"\S+(?: \S+)*", heads)][
        2:
    ]  # of the columns after the policy
    assert len(lines) == 6 and len(ends) == 12
    for line in lines:
        assert not re.search(r"\de[+-]\d", line)
        assert all(end >= len(line) or (line[end - 1] != " " and line[end] == " ") for end in ends)


def test_search_only_goes_up_and_uses_other_seeds():
    setting = ComparisonSetting("poisson", 80, COST, Limits(16, 20_000, 4096))
    seen = list(
        search_knobs(
            POLICIES["slo_odbs"],
            {"threshold": (100, 1e9), "sort_by": ("composite",)},
            attainment_scorer(setting, [20.0], 1),
        )
    )
    assert [score for _, score in seen] == sorted(score for _, score in seen)
    assert SEARCH_SEEDS > 100
    assert compare_policies({"fifo": POLICIES["fifo"]}, setting, [5.0], 1)[0]["by_seed"][
        "requests"
    ] == [80]


@pytest.mark.parametrize("name", SPACES)
def test_search_spaces_name_knobs(name):
    policy = SIMULATED[name]
    inner = getattr(policy, "batching", policy)
    assert set(SPACES[name]) <= set(inner.__dataclass_fields__)


def test_linear_cost_closed_form():
    cost = LinearCost()
    for batch, context, steps in ((1, 10, 1), (7, 500, 40)):
        one_by_one = sum(cost.decode_step_s(batch, context + batch * s) for s in range(steps))
        assert cost.decode_s(batch, context, steps) == pytest.approx(one_by_one, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(SIMULATED)))
def test_random_settings_agree_with_every_iteration(seed, name):
    rng = np.random.default_rng(seed)
    most = int(rng.integers(160, 400))
    limits = Limits(
        int(rng.integers(1, 8)), most + int(rng.integers(0, 600)), most, int(rng.integers(1, 200))
    )
    requests = mixed(int(rng.integers(1, 25)), seed, float(rng.uniform(0.001, 0.2)))
    fast, _, _ = serve(SIMULATED[name], requests, limits)
    slow, _, _ = serve(SIMULATED[name], requests, limits, TokenByToken(COST, limits))
    assert [(e.kind, e.id) for e in fast] == [(e.kind, e.id) for e in slow]


def test_residuals_of_an_exported_predictor(tmp_path):
    card = {
        "format": "glm-foundry length predictor",
        "format_version": 1,
        "served_model": {"length_limit": 512},
    }
    (tmp_path / "predictor.json").write_text(json.dumps(card | {"residuals": [-0.5, 0.0, 1.0]}))
    model = PredictorModel.from_card(tmp_path)
    assert model.limit == 512 and model.residuals.tolist() == [-0.5, 0.0, 1.0]


def test_a_row_that_comes_back_may_end_where_its_past_did():
    """A preempted, readmitted row can be due at the step that its first run was.

    The entries differ only in their serial.
    """
    from serving.request import Plan, Record

    engine = SimulatedEngine(COST, Limits(prefill_tokens=4096))
    record = Record(ask(0, 10, 50))
    engine.step(Plan((record,), (), {0: 200}, horizon_steps=5))
    for _ in range(3):
        record.generated = engine.generated(record)
        engine.step(Plan(preempt=(record,)))
        result = engine.step(Plan((record,), (), {0: 200}, horizon_steps=1))
    assert not result.finished and engine.step(Plan()).finished == ((0, 50, False),)


@pytest.mark.parametrize("prompt, output", [(10, 3), (67, 90)], ids=["whole", "cut"])
def test_an_ended_row_of_a_static_batch_can_be_preempted(prompt, output):
    """It waits for the others; put out and admitted again it has nothing left to make."""
    from serving.request import Plan, Record

    engine = SimulatedEngine(COST, Limits(max_tokens=70))
    records = [Record(ask(0, prompt, output)), Record(ask(1, 10, 50)), Record(ask(2, 10, 60))]
    engine.step(Plan(tuple(records), (), {0: 130, 1: 130, 2: 130}, together=True, horizon_steps=10))
    first = records[0]
    first.generated = engine.generated(first)
    assert first.generated == 3
    assert engine.step(Plan(preempt=(first,))).finished == ((1, 50, False), (2, 60, False))
    result = engine.step(Plan((first,), (), {0: 130}, together=True))
    assert (
        result.finished == ((0, 3, output > 3),)
        and result.emitted_tokens == 0
        and not result.started
    )
    assert not engine.rows and engine._decoding == engine._context == engine._reserved == 0


def test_a_card_without_residuals_says_so(tmp_path):
    card = {
        "format": "glm-foundry length predictor",
        "format_version": 1,
        "served_model": {"length_limit": 512},
    }
    (tmp_path / "predictor.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="card has no residuals"):
        PredictorModel.from_card(tmp_path)


@dataclass(frozen=True)
class TrueLengths:
    """Reads every `every` tokens, and knows then how long the answer is."""

    requests: tuple
    every: int
    seconds: float = 0.0

    def __call__(self, request_id, generated):
        length = self.requests[request_id].output_tokens
        assert 0 < generated < length and generated % self.every == 0
        return prediction_of(length)


def test_rereads_are_reported_charged_and_seen_by_the_policy():
    """Two answers thought to be of equal length: the longer one is known for it once it is read."""
    limits = Limits(2, 1000, 500)
    requests = (ask(0, 5, 90, predicted=20), ask(1, 5, 30, predicted=20))
    seen = {}

    class Watching(Sjf):
        def __call__(self, view, cost):
            for record in view.running.values():
                seen[view.generated(record), record.request.id] = record.prediction
            return super().__call__(view, cost)

    def run(reader):
        engine = SimulatedEngine(COST, limits, rereads=reader)
        events, _, engine = serve(Watching(), list(requests), limits, engine)
        return events, engine.busy_s, {e.id: e.time_s for e in events if e.kind == "finished"}

    _, free_s, before = run(TrueLengths(requests, 16))
    events, charged_s, done = run(TrueLengths(requests, 16, seconds=0.5))
    reread = [event for event in events if event.kind == "reread"]
    assert {event.id for event in reread} == {0}  # of one that has ended nothing is said
    at_last = max(seen)
    assert at_last[1] == 0 and at_last[0] >= 30  # the longer one, when the other has ended
    assert seen[at_last].expected_tokens == prediction_of(90).expected_tokens
    reads = 89 // 16 + 29 // 16  # an answer that has ended is not read
    assert charged_s == pytest.approx(free_s + 0.5 * reads)
    assert done[0] == pytest.approx(before[0] + 0.5 * reads)


def test_a_plan_is_charged_once_a_step():
    """A request alone: one step to its end; its first token and its end are that much later."""
    limits = Limits(4, 1000, 500)
    slow = SimulatedEngine(replace(COST, plan_s=0.25), limits)
    _, plain, _ = serve(SIMULATED["sjf"], [ask(0, 50, 20, predicted=40)], limits)
    _, charged, engine = serve(SIMULATED["sjf"], [ask(0, 50, 20, predicted=40)], limits, slow)
    for name in ("first_token_s", "finish_s"):
        assert charged.columns[name][0] == pytest.approx(plain.columns[name][0] + 0.25)
    assert engine.busy_s == pytest.approx(charged.columns["finish_s"][0])
