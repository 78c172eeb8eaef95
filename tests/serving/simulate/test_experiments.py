"""The experiments on made-up recordings: small, but whole."""

import json

import numpy as np
import pytest

from serving.cost_model.model import CostModel, ModelSizes, read_profile
from serving.policies.continuous import POLICIES
from serving.policies.static import Static
from serving.request import Limits
from serving.simulate.command import main
from serving.simulate.compare import assign_replicas, serve, simulate
from serving.simulate.engine import SimulatedEngine
from serving.simulate.experiment_common import RESIDUALS, ExperimentFlags, format_cell
from serving.simulate.experiments import trace_experiment
from serving.simulate.uellm_fair import FAIR_POLICIES, FairSetting
from serving.simulate.uellm_lengths import LOG_BETWEEN, LOG_MEAN, RecordedAnswers
from serving.simulate.uellm_published import ChunkedBatching, published_workload
from serving.simulate.workload import PredictorModel, make_workload
from tests.serving.conftest import COST, ask
from tests.serving.conftest import serve as run_all

HEADER = "path,n_queries,time_s,slo_default_rate,padded_tokens\n"


@pytest.fixture
def recorded(tmp_path):
    rng = np.random.default_rng(0)
    rows = [",".join(map(str, (f"q{i}", "", *rng.integers(10, 120, 3), 8))) for i in range(100)]
    (tmp_path / "length_runs.csv").write_text(
        "instruction,input,run_1,run_2,run_3,prompt_tokens_chatglm2\n" + "\n".join(rows) + "\n"
    )
    outputs = [{"output": 30 if i < 3 else "x" * int(rng.integers(5, 90))} for i in range(100)]
    (tmp_path / "alpaca_data_zh_output.json").write_text(json.dumps(outputs))
    (tmp_path / "measured.csv").write_text(
        HEADER + "UELM/UELM-all/1/1.txt,100,65.0,0.0,23000\nUELM/S3/1/1.txt,100,500.0,0.4,44000\n"
    )
    return tmp_path


def test_the_experiment_prints_and_writes_its_tables(recorded, capsys):
    out = recorded / "u.json"
    main(
        [
            "--experiment",
            "uellm",
            "--seeds",
            "2",
            "--requests",
            "12",
            "--uellm_data",
            str(recorded),
            "--json",
            str(out),
        ]
    )
    tables = json.loads(out.read_text())["tables"]
    printed = capsys.readouterr().out
    assert all(title in printed for title in tables) and len(tables) == 9
    first = {row["system"]: row for row in next(iter(tables.values()))}
    assert (
        first["UELLM-all"]["time s, logged"][0] == 65
        and first["S3"]["late %, logged"][0] == 40
        and first["baseline"]["time s, logged"] is None
    )
    assert first["UELLM-all"]["answers cut %"][0] > 0 == first["S3"]["answers cut %"][0]
    for title, rows in tables.items():
        if title.startswith("Fair"):
            assert [row["system"] for row in rows] == list(FAIR_POLICIES)
    assert any("bound" in row for row in tables["Targets and bounds, same placement"])


def test_the_experiment_runs_in_a_clone(tmp_path, capsys, monkeypatch):
    """Without any data beside: it says that its lengths are a substitute."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "u.json"
    words = ["--experiment", "uellm", "--seeds", "1", "--requests", "12", "--json", str(out)]
    assert main(words) == 0
    title, *others = json.loads(out.read_text())["tables"]
    assert title.startswith("A SUBSTITUTE for UELLM's recorded lengths") and len(others) == 9
    assert title in capsys.readouterr().out


def test_the_substitute_is_distributed_as_the_recorded_lengths():
    drawn = RecordedAnswers.substitute(4000)
    logs = np.log(drawn.answers)
    assert logs.mean() == pytest.approx(LOG_MEAN, abs=0.03)
    assert logs.mean(axis=1).std() == pytest.approx(np.hypot(LOG_BETWEEN, 0.48 / 3**0.5), abs=0.03)
    assert drawn.prompts.min() > 12 and drawn.answers.min() >= 1
    again = RecordedAnswers.substitute()
    assert (again.answers == RecordedAnswers.substitute().answers).all()
    assert len(again.prompts) == 100 and again.is_substitute


def test_the_lists_of_uellms_own_repository(tmp_path):
    for run, name in enumerate(["output", "alpaca_data_output", "alpaca_data_output_1"]):
        rows = [{"instruction": "a" * 10, "input": "", "output": 100 * run + i} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    with pytest.raises(FileNotFoundError, match="alpaca_data_zh_output.json; --uellm_data names"):
        RecordedAnswers.read(tmp_path)
    rows = [{"output": 30}, {"output": "four"}, {"output": "seven.."}]
    (tmp_path / "alpaca_data_zh_output.json").write_text(json.dumps(rows))
    read = RecordedAnswers.read(tmp_path)
    assert read.answers.tolist() == [[0, 100, 200], [1, 101, 201], [2, 102, 202]]
    assert read.reference.tolist() == [30, 4, 7] and read.prompts.tolist() == [18] * 3
    assert read.logs == () and not read.is_substitute
    (tmp_path / "output.json").write_text('[{"instruction": "a"}]')
    with pytest.raises(ValueError, match="its recorded answers have no 'input'"):
        RecordedAnswers.read(tmp_path)


def test_published_objectives_follow_the_place_in_the_file(recorded):
    made = published_workload(RecordedAnswers.read(recorded), 300, 0)
    for part, (low, high) in zip(
        range(0, 300, 20),
        [(220, 250), (180, 220), (150, 180), (100, 120), (90, 100)] + [(150, 300)] * 10,
    ):
        assert (
            low <= made.slo_s[part : part + 20].min() and made.slo_s[part : part + 20].max() <= high
        )
    assert not made.arrival_s.any() and made.predictions[
        made.prediction[0]
    ].expected_tokens == pytest.approx(30, abs=0.01)


@pytest.mark.parametrize(
    "chunks, sizes",
    [(ChunkedBatching(rows=4), [4, 4, 2]), (ChunkedBatching("length", 20, 60), [5, 2, 1, 1, 1])],
)
def test_chunks_by_rows_and_by_sum(chunks, sizes):
    lengths = [5, 8, 10, 15, 20, 25, 30, 40, 50, 60]
    requests = [ask(i, 10, n, predicted=n) for i, n in enumerate(lengths)]
    policy = Static(chunks)
    events, _, _ = run_all(policy, requests, Limits(64, 100_000, 4096))
    starts: dict[float, int] = {}
    for event in events:
        if event.kind == "admitted":
            starts[event.time_s] = starts.get(event.time_s, 0) + 1
    sums = [r.prediction.expected_tokens for r in requests]
    if chunks.sort == "length":  # by hand, from the expected lengths
        wanted, total = [], float("inf")
        for length in sorted(sums):
            if total + length > 60:
                wanted.append(0)
                total = 0.0
            wanted[-1] += 1
            total += length
        sizes = wanted
    assert list(starts.values()) == sizes


def test_a_stop_counts_the_prompt():
    policy = Static(ChunkedBatching("slo", extra_tokens=50))
    request = ask(0, 30, 500, predicted=100)
    events, _, _ = run_all(policy, [request], Limits(8, 10_000, 2048))
    done = next(e.what for e in events if e.kind == "finished")
    assert done.cut and done.output_tokens == round(request.prediction.expected_tokens) + 50 - 30


def test_no_policy_beats_the_bounds():
    model, profile = ModelSizes.from_config("chatglm2-6b"), read_profile("rtx3090")
    cost = CostModel.of(model, profile.cluster(1), profile)
    rng = np.random.default_rng(0)
    recorded = RecordedAnswers(
        rng.integers(5, 60, 30), rng.integers(5, 300, (30, 3)), rng.integers(5, 300, 30)
    )
    fair = FairSetting(
        recorded,
        cost,
        Limits(16, cost.kv_capacity_tokens, 2048),
        2,
        PredictorModel(np.array(RESIDUALS)),
        60,
    )
    for rate in (2.0, None):
        workload = fair.workload(rate, 1)
        bounds = fair.bounds_of(workload)
        for policy in FAIR_POLICIES.values():
            got = fair.run(policy, workload)
            assert (
                got["latency_mean_s"] >= bounds["latency_s"]
                and got["attainment"] <= bounds["attainment"] + 1e-9
            )
            assert got["throughput_tps"] <= bounds["tokens_s"] and 0 < got["slots"] <= 1


def test_start_up_is_charged_once():
    model, profile = ModelSizes.from_config("chatglm2-6b"), read_profile("rtx3090")
    cost = CostModel.of(model, profile.cluster(2), profile)
    assert cost.startup_s > 1
    limits = Limits(4, 10_000, 2048)
    for name in ("fifo", "fcfs"):
        _, collector, _ = run_all(
            POLICIES[name],
            [ask(0, 50, 20), ask(1, 50, 20, arrival=100.0)],
            limits,
            SimulatedEngine(cost, limits),
        )
        wanted = cost.prefill_s(50) + cost.decode_s(1, 51, 19)
        assert collector.columns["finish_s"][0] == pytest.approx(wanted + cost.startup_s)
        assert collector.columns["first_token_s"][0] == pytest.approx(
            cost.prefill_s(50) + cost.startup_s
        )
        assert collector.columns["finish_s"][1] == pytest.approx(100 + wanted)


def test_replicas_share_by_speed_and_lose_nobody():
    owner = assign_replicas(1000, [3.0, 1.0])
    assert np.bincount(owner).tolist() == [750, 250] and np.bincount(
        assign_replicas(10, [1.0] * 4)
    ).tolist() == [3, 3, 2, 2]
    assert all(
        250 - 1 <= (owner[i : i + 333] == 1).sum() * 3 <= 250 + 3 for i in range(0, 666, 333)
    )
    workload = make_workload("poisson", 200, 40.0, COST, seed=3)
    limits = Limits(8, 20_000, 4096)
    one, _ = simulate(POLICIES["deadline"], workload, COST, limits)
    four, collector, engines = serve(
        POLICIES["deadline"], workload, [SimulatedEngine(COST, limits) for _ in range(4)]
    )
    assert four["requests"] == 200 and four["latency_mean_s"] < one["latency_mean_s"]
    assert (
        0 < four["utilisation"] <= 1
        and sorted(collector.columns["arrival_s"]) == workload.arrival_s.tolist()
    )
    again, _ = simulate(POLICIES["deadline"], workload, COST, limits, replicas=4)
    assert again == four


def test_placed_by_a_deployer(capsys):
    for flags in ([], ["--deployer", "even"]):
        main(
            [
                "--profile",
                "rtx3090",
                "--gpus",
                "4",
                "--policies",
                "fcfs",
                "--rate",
                "2",
                "--requests",
                "40",
                "--seeds",
                "1",
                *flags,
            ]
        )
    helr, even = (
        float(line.split()[4]) for line in capsys.readouterr().out.splitlines() if "fcfs" in line
    )
    assert helr < even  # four replicas against one chain that moves its caches
    assert main(["--gpus", "4"]) == 1
    assert "--gpus" in capsys.readouterr().err


def test_trace_finds_a_load(tmp_path):
    import gzip

    for name in ("conv", "code"):
        with gzip.open(tmp_path / f"AzureLLMInferenceTrace_{name}.csv.gz", "wt") as file:
            file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
            file.writelines(
                f"2023-11-16 18:{i // 60:02d}:{i % 60:02d}.0000000,{100 + i},{20 + i % 7}\n"
                for i in range(120)
            )
    tables = trace_experiment(
        ExperimentFlags(traces=str(tmp_path), seeds=1),
        {"mixed": {"A100-80G": 1, "RTX3090": 1}},
        per_device=10,
        least=20,
    )
    assert set(tables) == {"azure_conv", "azure_code"}
    for row in tables["azure_conv"]:
        assert row["load at 99%"] == "none" or row["load at 99%"] <= row["load at 90%"]
        assert 0 <= row["goodput in overload"][0] <= row["overload"]


def test_format_cell():
    assert [format_cell(x) for x in ((0.12345, float("nan")), (1234.5, 6.0), "x", None, 3)] == [
        "0.123",
        "1234 ± 6",
        "x",
        "",
        "3",
    ]
