"""A list of requests run on a tiny model: reading, the runs themselves, and the whole command."""

import json
import re

import numpy as np
import pytest

from predictor.prediction import from_bins
from serving.engines import Sampling, make_engine
from serving.policies.continuous import POLICIES
from serving.request import Event, Limits, Record, Request
from serving.run_requests.command import RUNNABLE, main
from serving.run_requests.figures import policy_run
from serving.run_requests.listed import ListedRow, arrival_times, objectives, read_request_list
from serving.run_requests.runs import PreparedRequest, RunRecord, run_list, running_engine
from tests.conftest import tiny_model
from tests.predictor import synthetic
from tests.serving.conftest import COST
from tests.warm import warm_python

LENGTHS = [3, 30, 5, 12, 7, 25, 4, 18, 9, 6, 21, 8]


@pytest.fixture(scope="module")
def model():
    return tiny_model("glm2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a random glm2 model, a lexical predictor of it)."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer
    from tests.finetune.runs import make_rows, write_rows

    folder = tmp_path_factory.mktemp("listed")
    rows = write_rows(folder / "rows.json", make_rows(60, seed=9))
    words = ["--input", str(rows), "--output_dir", str(folder / "tokenizer")]
    assert make_tokenizer([*words, "--vocab_size", "420", "--family", "glm2"]) == 0
    model = make_model(
        "glm2",
        folder / "tokenizer",
        folder / "model",
        hidden_size=64,
        num_layers=2,
        heads=4,
        ffn=128,
    )
    return model, synthetic.train(folder, synthetic.make_rows(120, seed=1))


def write_list(folder, rows):
    path = folder / "requests.json"
    path.write_text(json.dumps(rows))
    return path


def uellm_rows(count=12):
    rows = []
    for place, length in enumerate(LENGTHS[:count]):
        rows.append({"instruction": f"{place}?", "input": "", "output": length, "SLO": 90 + place})
    return rows


# ---- the list


def test_rows_of_uellm_and_of_our_own(tmp_path):
    path = write_list(
        tmp_path,
        [
            {"instruction": "a", "input": "b", "output": 7, "SLO": 120},
            {"instruction": "c", "output": "an answer", "arrival": 1.5},
            {"instruction": "d", "input": None, "length": 9, "output": 7, "SLO": None},
        ],
    )
    first, second, third = read_request_list(path)
    assert first == ListedRow(f"{path}[0]", "ab", 120.0, None, 7)
    assert second == ListedRow(f"{path}[1]", "c", None, 1.5, None)
    assert third == ListedRow(f"{path}[2]", "d", None, None, 9)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"instruction": "a"}\n{"prompt": "b", "slo_s": 2}\n')
    assert [row.slo_s for row in read_request_list(lines)] == [None, 2.0]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"input": ""}, '[0]: wanted an "instruction"'),
        ({"instruction": 3}, '"instruction" must be text, got 3'),
        ({"instruction": "a", "SLO": "soon"}, '"SLO" must be seconds, a number, got "soon"'),
        ({"instruction": "a", "SLO": 0}, '"SLO" must be seconds above 0'),
        ({"instruction": "a", "SLO": -1}, '"SLO" must be seconds, at least 0, got -1'),
        ({"instruction": "a", "arrival": True}, '"arrival" must be seconds'),
        ({"instruction": "a", "SLO": 10**400}, '"SLO" must be seconds, at least 0, got 1000'),
        ({"instruction": "a", "length": 10**20}, '"length" must be tokens, a whole number'),
        ({"instruction": "a", "length": "long"}, '"length" must be tokens'),
        ({"instruction": "a", "output": 0}, '"output" must be tokens, a whole number, got 0'),
        ("a", "wanted an object"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_request_list(write_list(tmp_path, [row]))


def test_objectives_are_the_rows_then_the_flags_then_uellms():
    rows = [ListedRow("", "a", 10.0), *[ListedRow("", "b")] * 99]
    assert objectives(rows, 2.0, 0.5, 0) == [5.0] + [1.0] * 99
    dealt = objectives(rows, None, 1.0, 3)
    assert dealt[0] == 10 and min(dealt[1:20]) >= 220 and max(dealt[80:]) <= 100
    assert dealt == objectives(rows, None, 1.0, 3)


def test_arrivals_are_the_rows_or_drawn():
    rows = [ListedRow("", "a", arrival_s=2.0), ListedRow("", "b")]
    assert arrival_times(rows, None, False, 0) == [2.0, 0.0]
    assert arrival_times(rows, None, True, 0) == [0.0, 0.0]
    drawn = arrival_times([rows[1]] * 2000, 4.0, False, 0)
    assert drawn == sorted(drawn) and drawn[-1] / 2000 == pytest.approx(0.25, rel=0.1)


# ---- the runs


def prepared(lengths, arrivals=None):
    requests = []
    for number, length in enumerate(lengths):
        table = from_bins(np.array([1e-9, 1.0]), np.array([0.0, length - 0.5, length + 0.5]))
        arrival_s = 0.0 if arrivals is None else arrivals[number]
        ids = [5 + number] * (3 + number)
        sampling = Sampling(length, ignore_stops=True)
        requests.append(PreparedRequest(number, "", ids, arrival_s, 60.0, sampling, table))
    return requests


def run_on(model, name, requests, limits=None):
    limits = limits or Limits(4, 400, 100)
    engine = make_engine("continuous", model, limits, COST)
    with running_engine(engine, POLICIES[name]) as backend:
        return run_list(backend, requests, None, POLICIES[name].predicts)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_policy_answers_each_row_once(model, name):
    requests = prepared(LENGTHS)
    run = policy_run(name, POLICIES[name], run_on(model, name, requests), requests)
    assert [row["output_tokens"] for row in run.requests] == LENGTHS
    assert [row["row"] for row in run.requests] == list(range(1, 13))
    assert run.figures["default_rate"] == 0 and run.figures["attainment"] == 1
    assert run.figures["useful_tokens_s"] * run.figures["makespan_s"] == pytest.approx(sum(LENGTHS))
    for row in run.requests:
        assert 0 <= row["queue_s"] < row["ttft_s"] <= row["latency_s"] <= run.figures["total_s"]
    if run.groups and name != "s3":  # which preempts: a row is then in two groups
        together = [number for group in run.groups for number in group["rows"]]
        assert sorted(together) == list(range(1, 13))


def test_groups_are_the_batches_by_hand(model):
    """Ten by arrival, then the rest; padded tokens are rows x the longest answer."""
    requests = prepared(LENGTHS)
    record = run_on(model, "uellm_baseline", requests, Limits(64, 4000, 100))
    run = policy_run("uellm_baseline", POLICIES["uellm_baseline"], record, requests)
    assert [group["rows"] for group in run.groups] == [list(range(1, 11)), [11, 12]]
    assert [group["padded_tokens"] for group in run.groups] == [10 * 30, 2 * 21]
    padded = run.figures["padded_tokens_s"] * run.figures["makespan_s"]
    assert padded == pytest.approx(342)
    assert [row["group"] for row in run.requests] == [1] * 10 + [2] * 2


def test_what_uellm_would_pad_is_less_by_predicted_length(model):
    requests = prepared([4, 40] * 6)
    padded = {}
    for name in ("uellm_baseline", "odbs"):
        record = run_on(model, name, requests, Limits(6, 4000, 100))
        padded[name] = sum(admission.padded_tokens for admission in record.batches())
    assert padded["uellm_baseline"] == 12 * 40 and padded["odbs"] < 12 * 30


def test_requests_are_not_answered_before_they_arrive(model):
    requests = prepared([4, 4, 4], [0.0, 0.0, 1.5])
    record = run_on(model, "fcfs", requests)
    late = record.completions[2]
    assert record.completions[0].finish_s - record.zero_s < 1.5
    assert late.admitted_s - record.zero_s >= 1.5 and late.latency_s < 1.5
    assert late.request.arrival_s - record.zero_s == pytest.approx(1.5)


def test_predictions_are_charged_to_policies_that_read_them(model):
    import time

    asked = []

    def predict(prompts):
        time.sleep(0.2)
        asked.append(len(prompts))
        return [request.length for request in prepared(LENGTHS[: len(prompts)])]

    requests = prepared(LENGTHS[:3])
    for name, least in (("sjf", 0.2), ("fcfs", 0.0)):
        engine = make_engine("continuous", model, Limits(4, 400, 100), COST)
        with running_engine(engine, POLICIES[name]) as backend:
            record = run_list(backend, requests, predict, POLICIES[name].predicts)
        assert min(done.latency_s for done in record.completions.values()) >= least
        assert record.predict_s >= least and bool(record.predicted) == bool(least)
    assert asked == [3]


def test_batches_of_two_replicas_whose_events_come_mixed():
    record = RunRecord()
    for number, time_s in ((0, 1.0), (1, 2.0), (2, 1.0), (3, 2.0)):
        request = Request(number, 3, 0.0, 9.0)
        record(Event(time_s, "admitted", number, Record(request)))
    assert [batch.numbers for batch in record.batches()] == [[0, 2], [1, 3]]


def test_replicas_that_are_open_already_answer_the_list(model):
    """As a pool does: a request may be answered before the next one is submitted."""
    requests = prepared(LENGTHS)
    engine = make_engine("continuous", model, Limits(4, 400, 100), COST)
    with running_engine(engine, POLICIES["uellm_baseline"]) as backend:
        record = run_list(backend, requests, None, False, starts_idle=False)
    assert sorted(record.completions) == list(range(12))
    assert sum(len(batch.numbers) for batch in record.batches()) == 12


def test_a_failing_engine_ends_the_run(model):
    class Failing:
        """A policy that fails."""

        predicts = False

        def length(self, request):
            return 1.0

        def order(self, record, moment):
            return 0.0, float("inf")

        def __call__(self, view, cost):
            raise RuntimeError("no plan")

    engine = make_engine("continuous", model, Limits(4, 400, 100), COST)
    failures = []
    with (
        pytest.raises(RuntimeError, match="no plan"),
        running_engine(engine, Failing(), failures.append) as backend,
    ):
        run_list(backend, prepared([3, 4]), None, False)
    assert len(failures) == 1


# ---- the command


def command(folders, path, *more, predictor=False):
    words = [path, "--model", folders[0], "--device", "cpu", "--max_batch", 4]
    words += ["--kv_tokens", 1024, "--max_tokens", 128, *more]
    if predictor:
        words += ["--predictor", folders[1]]
    return main(list(map(str, words)))


def test_a_uellm_list_in_miniature(folders, tmp_path, capsys):
    path = write_list(tmp_path, uellm_rows())
    found, picture = tmp_path / "found.json", tmp_path / "found.png"
    more = ("--policies", "slo_odbs,uellm_baseline,fcfs", "--replay_lengths", "--slo_factor", 2)
    assert command(folders, path, *more, "--json", found, "--picture", picture) == 0
    printed = capsys.readouterr().out
    assert "uellm_baseline: 3 groups" in printed and "fcfs: continuous, no groups" in printed
    assert "SLOs of the list, times 2" in printed and "| slo_odbs |" in printed
    policies = json.loads(found.read_text())["policies"]
    assert list(policies) == ["slo_odbs", "uellm_baseline", "fcfs"]
    for name, run in policies.items():
        assert [row["output_tokens"] for row in run["requests"]] == LENGTHS
        assert [row["slo_s"] for row in run["requests"]] == [2 * (90 + i) for i in range(12)]
        predicted = [row["predicted_tokens"] for row in run["requests"]]
        if POLICIES[name].predicts:
            assert predicted == pytest.approx(LENGTHS, abs=0.01)
        else:
            assert predicted == [None] * 12
        check_memory(run["requests"], folders[0])
    assert re.search(r"slo_odbs: KV memory of a request: mean \S+ MiB, predicted \S+,", printed)
    assert policies["fcfs"]["groups"] == [] and len(policies["slo_odbs"]["groups"]) >= 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def check_memory(rows, folder):
    """Bytes of a request's keys and values: its tokens, times those of the configuration."""
    config = json.loads((folder / "config.json").read_text())
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else None
    heads = groups or config["num_attention_heads"]
    width = 2 * 4 * config["num_layers"] * heads * config["kv_channels"]
    for row in rows:
        assert row["kv_bytes"] == width * (row["prompt_tokens"] + row["output_tokens"])
        if row["predicted_tokens"] is None:
            assert row["predicted_kv_bytes"] is None
        else:
            assert row["predicted_kv_bytes"] == pytest.approx(row["kv_bytes"], rel=0.01)


def test_by_a_predictor_at_a_rate(folders, tmp_path, capsys):
    rows = [{"instruction": row["prompt"]} for row in synthetic.make_rows(8, seed=3)]
    path = write_list(tmp_path, rows)
    found = tmp_path / "found.json"
    more = ("--rate", 40, "--slo_s", 1e-4, "--max_new_tokens", 6, "--json", found)
    assert command(folders, path, "--policies", "fifo,deadline", *more, predictor=True) == 0
    assert "SLOs 0.0001 s" in capsys.readouterr().out
    policies = json.loads(found.read_text())["policies"]
    assert policies["deadline"]["figures"]["default_rate"] == 1  # nothing is that fast
    assert policies["deadline"]["figures"]["predict_s"] > 0
    assert policies["fifo"]["figures"]["predict_s"] == 0
    arrivals = [row["arrival_s"] for row in policies["fifo"]["requests"]]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0
    assert arrivals == [row["arrival_s"] for row in policies["deadline"]["requests"]]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--policies", "deadline"], "deadline read predicted lengths: give --predictor DIR"),
        (["--policies", "best"], "--policies: 'best' unknown; there are fifo"),
        (["--policies", "oracle"], "'oracle' unknown"),
        (["--policies", ","], "--policies: name at least one of"),
        (["--replay_lengths"], "--replay_lengths wants the tokens of its answer in every row"),
        (["--kv_tokens", "100"], "--max_batch, --kv_tokens, --max_tokens: wanted"),
        (["--max_tokens", "4"], "do not fit in --max_tokens 4"),
        (["--picture", "a.txt"], "--picture a.txt: wanted .png, .svg or .pdf"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--predictor", "/nowhere"], "/nowhere"),
        (["--profile", "none"], "no profile 'none'"),
        (["--slo_factor", "0"], "--slo_factor: wanted a number above 0"),
        (["--cluster", "c.json"], "--cluster needs --deployer, --num_gpus, --devices or"),
        (["--rate", "3", "--at_once"], "not allowed with"),
    ],
)
def test_each_refusal_is_one_line(folders, tmp_path, capsys, more, said):
    path = write_list(tmp_path, [{"instruction": "a"}])
    try:
        code = command(folders, path, "--policies", "fcfs", *more)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code and said in error and error.count("\n") == 1


def test_a_missing_and_an_empty_list(folders, tmp_path, capsys):
    assert command(folders, tmp_path / "none.json") == 1
    assert "no such file" in capsys.readouterr().err
    assert command(folders, write_list(tmp_path, [])) == 1
    assert "no requests in it" in capsys.readouterr().err


def test_replicas_run_the_list_too(folders, tmp_path, monkeypatch, capsys):
    """The same answers, static batches and continuous ones, without loading again."""
    device = {"name": "cpu@1", "memory_bytes": 2**32, "reserved_bytes": 0, "kind": "cpu"}
    device |= {"threads": 1, "bandwidth_bytes_s": 1e10, "flops_s": 3e10}
    cluster = tmp_path / "two.json"
    cluster.write_text(json.dumps({"devices": [device, device]}))
    requests = write_list(tmp_path, uellm_rows())
    monkeypatch.setattr("sys.executable", warm_python())
    words = [requests, "--model", folders[0], "--policies", "fifo,sjf", "--replay_lengths"]
    placed = ["--deployer", "helr", "--cluster", cluster]
    found = []
    for name, more in (("one", ["--device", "cpu"]), ("two", placed)):
        out = tmp_path / f"{name}.json"
        assert main([str(word) for word in (*words, *more, "--json", out)]) == 0
        found.append(json.loads(out.read_text())["policies"])
    assert "2 replica(s)" in capsys.readouterr().out
    one, two = found
    for policy in ("fifo", "sjf"):
        for a, b in zip(one[policy]["requests"], two[policy]["requests"], strict=True):
            assert a["output_tokens"] == b["output_tokens"]
        assert two[policy]["figures"]["refused"] == 0
    assert len(two["fifo"]["groups"]) >= 2  # one in each replica at least
