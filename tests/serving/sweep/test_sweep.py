"""Sweeps over batches and GPUs: on paper by the cost model, and of the real engine."""

import json

import pytest

from serving.cost_model.devices import Cluster
from serving.cost_model.model import CostModel, ModelSizes, read_profile
from serving.sweep.command import main
from serving.sweep.paper import sweep_on_paper
from serving.sweep.rows import SweepRow, SweptSizes, table_rows
from tests.warm import warm_python

MODEL, PROFILE = ModelSizes.from_config("chatglm2-6b"), read_profile("rtx3090")
SIZES = SweptSizes((1, 2, 4), (1, 8, 100_000), 35, 256, "even")


def rows_of(sizes=SIZES, gpu=None):
    return {(row.gpus, row.batch): row for row in sweep_on_paper(MODEL, PROFILE, gpu, sizes)}


def command(*words) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def test_paper_is_the_cost_model():
    rows = rows_of()
    assert list(rows) == [(gpus, batch) for gpus in (1, 2, 4) for batch in (1, 8, 100_000)]
    for gpus, layers in ((1, "28"), (2, "13+15"), (4, "6+8+8+6")):
        cost = CostModel.of(MODEL, PROFILE.cluster(gpus), PROFILE)
        row = rows[gpus, 8]
        assert row.layers == layers
        assert row.seconds == pytest.approx(cost.equal_batch_s(8, 35, 256))
        assert row.tokens_s == pytest.approx(8 * 256 / row.seconds)
        assert row.kv_bytes == 8 * 291 * MODEL.kv_bytes_per_token
        kv = row.kv_bytes // MODEL.layers
        fullest = max(cost.weight_bytes_on(d) + kv * n for d, n in cost.stages)
        assert row.device_bytes == fullest and 0 < row.busy <= 1
        assert rows[gpus, 100_000].seconds is None and "needs" in rows[gpus, 100_000].why
    # A chain works on one device at a time: it answers later, and holds more.
    assert rows[1, 8].seconds < rows[2, 8].seconds and rows[2, 8].busy < 0.5
    assert rows[2, 8].device_bytes < 0.6 * rows[1, 8].device_bytes


def test_replicas_share_a_batch():
    rows = rows_of(SweptSizes((1, 3), (1, 8), 35, 256, "helr"))
    assert rows[3, 8].layers == "28 x 3"
    cost = CostModel.of(MODEL, Cluster.uniform("RTX3090", 1), PROFILE)
    assert rows[3, 8].seconds == pytest.approx(cost.equal_batch_s(3, 35, 256))
    assert rows[3, 1].seconds == pytest.approx(rows[1, 1].seconds)


def test_another_gpu_and_a_model_that_fits_on_several_alone(tmp_path):
    assert rows_of(gpu="A100-80G")[1, 8].seconds < rows_of(gpu="RTX3090")[1, 8].seconds
    small = tmp_path / "small.json"
    device = {"name": "small", "memory_bytes": 9 * 2**30, "bandwidth_bytes_s": 9e11}
    small.write_text(json.dumps(device | {"flops_s": 7e13}))
    rows = rows_of(gpu=str(small))
    assert rows[1, 8].seconds is None and rows[2, 8].seconds


def test_the_table_leaves_out_what_is_empty():
    rows = [SweepRow(1, 1, 5, 0, seconds=2.0), SweepRow(1, 9, 5, 0, why="too large")]
    first, second = table_rows(rows)
    assert list(first) == list(second) == ["devices", "batch", "seconds", "tokens/s", "KV MiB"]
    assert first["tokens/s"] == 2.5 and second["seconds"] == "-" == second["tokens/s"]


def test_a_sweep_on_paper_is_printed_drawn_and_kept(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture, kept = tmp_path / "sweep.png", tmp_path / "sweep.json"
    words = ["--gpus", "2,1", "--batches", "10,5,5,90000", "--profile", "rtx3090"]
    assert command(*words, "--picture", picture, "--json", kept) == 0
    text = capsys.readouterr().out
    assert "| 1 | 5 | 28 |" in text and "| 2 | 10 | 13+15 |" in text and "| 1 | 90000 | - |" in text
    assert "1 device(s), batch 90000: even: " in text
    found = json.loads(kept.read_text())
    places = [(row["gpus"], row["batch"]) for row in found["rows"]]
    assert places == [(1, 5), (1, 10), (1, 90000), (2, 5), (2, 10), (2, 90000)]
    assert found["settings"]["profile"] == "rtx3090"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--batches", "0"], "--batches"),
        (["--gpus", "1,x"], "--gpus"),
        (["--repetitions", "2"], "--repetitions needs --run"),
        (["--run", "--gpu", "A40"], "--gpu needs a sweep on paper"),
        (["--gpu", "GTX"], "no device 'GTX'"),
        (["--profile", "none"], "no profile 'none'"),
        (["--model", "nowhere"], "nowhere"),
        (["--picture", "sweep.gif"], "wanted .png, .svg or .pdf"),
    ],
)
def test_errors_are_one_line(words, said, capsys):
    assert command(*words)
    out, error = capsys.readouterr()
    assert not out and said in error and error.count("\n") == 1


def test_the_engine_is_measured(tiny_folders, tmp_path, capsys):
    """Larger batches make more tokens; --profile puts a prediction beside."""
    kept = tmp_path / "sweep.json"
    words = ["--run", "--model", tiny_folders["glm2"], "--device", "cpu", "--profile", "datasheet"]
    words += ["--prompt_tokens", 20, "--output_tokens", 12, "--batches", "1,3", "--repetitions", 2]
    assert command(*words, "--json", kept) == 0
    one, three = json.loads(kept.read_text())["rows"]
    assert (one["batch"], three["batch"]) == (1, 3)
    for row in (one, three):
        assert row["tokens_s"] == pytest.approx(row["batch"] * 12 / row["seconds"])
        assert row["predicted_s"] > 0 and row["layers"] == ""
    assert 0 < one["seconds"] < 60 and three["tokens_s"] > one["tokens_s"]
    assert "median of 2 runs" in capsys.readouterr().out


def test_a_prompt_shorter_than_its_frame_is_refused(tiny_folders, capsys):
    words = ["--run", "--model", tiny_folders["glm3"], "--device", "cpu", "--prompt_tokens", 2]
    assert command(*words) == 1
    assert "this family's prompts have" in capsys.readouterr().err


def test_too_little_memory_is_one_line(tiny_folders, capsys, monkeypatch):
    def step(self, plan, horizon_s=None):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("serving.engines.continuous_engine.ContinuousEngine.step", step)
    words = ["--run", "--model", tiny_folders["glm2"], "--device", "cpu", "--output_tokens", 4]
    assert command(*words, "--batches", "2,7") == 1
    error = capsys.readouterr().err
    assert "with 7 requests of 39 tokens needs more than the" in error and "Traceback" not in error


@pytest.mark.slow
def test_several_devices_are_measured(tiny_folders, tmp_path, monkeypatch, capsys):
    """Two processes of the CPU, as a pipeline and as replicas."""
    monkeypatch.setattr("sys.executable", warm_python())
    for deployer, layers in (("even", "1 replica(s)"), ("helr", "2 replica(s)")):
        kept = tmp_path / f"{deployer}.json"
        words = ["--run", "--model", tiny_folders["glm2"], "--gpus", "2", "--deployer", deployer]
        words += ["--output_tokens", 8, "--batches", "2", "--repetitions", 1, "--json", kept]
        assert command(*words) == 0, capsys.readouterr().err
        [row] = json.loads(kept.read_text())["rows"]
        assert row["layers"] == layers and 0 < row["seconds"] < 60
