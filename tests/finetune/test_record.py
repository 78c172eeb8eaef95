"""Evaluation in training: metrics, predictions, early stopping, run.json, loggers, resumes."""

import json
import math
import shutil
from pathlib import Path

import pytest

from finetune import record, report
from finetune.config import parse_config
from finetune.engine import Patience
from finetune.record import is_better_value, read_run
from tests.finetune.runs import ROOT, STOPS, make_rows, metrics, write_rows


def steps_of(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["step"]


@pytest.mark.parametrize(
    "metric, values, min_delta, since",
    [
        ("loss", [3, 2, 1, 1, 2], 0, [0, 0, 0, 1, 2]),
        ("rougeL", [0.1, 0.3, 0.2, 0.4], 0, [0, 0, 1, 0]),
        # each step improves on the last; by more than 0.3 only the third improves on the best that
        # counted
        ("loss", [1, 0.8, 0.6, 0.5], 0.3, [0, 1, 0, 1]),
        ("loss", [1, math.nan, 0.9], 0, [0, 1, 0]),
        ("bleu4", [math.nan, 0.1, 0.2], 0, [1, 0, 0]),
    ],
)
def test_patience_by_hand(metric, values, min_delta, since):
    patience = Patience(metric, min_delta, None)
    for value, wanted in zip(values, since):
        patience.see({metric: value})
        assert patience.since == wanted and [
            patience.ended(n) for n in (None, wanted, wanted + 1)
        ] == [False, wanted > 0, False]
        patience = Patience(
            metric, min_delta, json.loads(json.dumps(patience.state()))
        )  # as a resume does
    assert Patience("another", 0, patience.state()).best is None
    assert (
        is_better_value("mae", 1, 2)
        and is_better_value("bleu4", 2, 1)
        and not is_better_value("bleu4", 1, 1)
    )


@pytest.fixture(scope="module")
def stopped(flags, train, rows_file, tmp_path_factory):
    """(flags, output folder, last checkpoint) of a run that stopped early."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    words = flags(out, "--eval_path", rows_file, *STOPS, method="all")
    return words, out, train(words)


def test_a_run_stops_early(stopped):
    """It stops after three evaluations in a row that improve by less than 0.5, and not before."""
    _, out, folder = stopped
    losses = metrics(out, "eval_loss")
    counted = [losses[0]]
    for loss in losses[1:]:
        counted += [loss] if loss < counted[-1] - 0.5 else []
    assert (
        len(counted) > 2
        and losses.index(counted[-1]) == len(losses) - 4
        and steps_of(folder) == len(losses) < 24
    )
    assert json.loads((folder / "manifest.json").read_text())["early_stopping"] == {
        "metric": "loss",
        "best": counted[-1],
        "since": 3,
    }
    run, best = read_run(out), losses.index(min(losses)) + 1
    assert run["status"] == "stopped early" and run["best"] == {
        "step": best,
        "metric": "loss",
        "value": min(losses),
    }
    assert json.loads((out / "best.json").read_text())["checkpoint"].endswith(f"step-{best}")


def test_of_equal_checkpoints_the_first_is_the_best(flags, train, rows_file, tmp_path):
    """best.json, run.json and pruning agree, also where every score is the same."""
    words = [
        "--eval_path",
        rows_file,
        "--eval_metrics",
        "exact_match",
        "--metric_for_best",
        "exact_match",
        "--eval_max_new_tokens",
        1,
    ]
    train(flags(tmp_path / "out", *words, "--num_train_epochs", 3, "--save_total_limit", 1))
    best = json.loads((tmp_path / "out" / "best.json").read_text())["checkpoint"]
    there = sorted(p.name for p in (tmp_path / "out").glob("epoch-*"))
    assert (
        best in there
        and len(there) == 2
        and read_run(tmp_path / "out")["best"]["step"] == steps_of(tmp_path / "out" / best)
    )


def test_nan_is_never_the_best(tmp_path):
    found = None
    for value in (float("nan"), 0.9, 0.5, float("nan"), 0.5):
        if is_better_value("loss", value, found):
            found = value
    assert (
        found == 0.5
        and is_better_value("f1", 0.1, None)
        and not is_better_value("f1", float("nan"), None)
        and not is_better_value("f1", 0.6, 0.5, by=0.2)
    )


def test_early_stopping_survives_a_resume(stopped, train, tmp_path):
    """Resumed within its patience, a run stops where the uninterrupted one did.

    Stopped, it stays so.
    """
    words, out, folder = stopped
    again = tmp_path / "out"
    shutil.copytree(out, again)
    words = [word if word != str(out) else str(again) for word in words]
    assert (
        train([*words, "--resume_from_checkpoint", "auto"]).name == folder.name
    )  # nothing is left to do
    assert len(metrics(again, "eval_loss")) == len(metrics(out, "eval_loss"))
    shutil.rmtree(again / folder.name)
    left = max(map(steps_of, again.glob("epoch-*")))
    assert (
        left == steps_of(folder) - 1
        and train([*words, "--resume_from_checkpoint", "auto"]).name == folder.name
    )
    run, before = read_run(again), read_run(out)
    assert [line["step"] for line in run["steps"]] == [
        line["step"] for line in before["steps"]
    ]  # none twice
    assert [line.get("train_loss") for line in run["steps"]] == [
        line.get("train_loss") for line in before["steps"]
    ]
    assert (
        run["id"] == before["id"]
        and run["started"] == before["started"]
        and len(run["sittings"]) == 3
    )
    assert (
        run["seconds"] > before["seconds"]
        and run["best"] == before["best"]
        and run["status"] == "stopped early"
    )


def test_metrics_and_predictions_of_each_evaluation(flags, train, tmp_path):
    """Every evaluation writes its answers; the best is chosen by their score.

    Run.json has it all.
    """
    rows = write_rows(
        tmp_path / "eval.json",
        [row | {"output": [row["output"], "x"]} for row in make_rows(3, seed=3)],
    )
    out = tmp_path / "out"
    train(
        flags(
            out,
            "--eval_path",
            rows,
            "--eval_metrics",
            "exact_match,f1",
            "--metric_for_best",
            "f1",
            "--eval_max_new_tokens",
            4,
            "--eval_step",
            2,
        )
    )
    assert sorted(p.name for p in (out / "predictions").iterdir()) == [
        "step-2.jsonl",
        "step-4.jsonl",
    ]
    lines = [
        json.loads(line) for line in (out / "predictions" / "step-4.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 3 and all(
        line["reference"][1] == "x" and set(line["scores"]) == {"exact_match", "triple_f1"}
        for line in lines
    )
    run = read_run(out)
    evaluated = [line for line in run["steps"] if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4] and set(evaluated[0]) == {
        "step",
        "eval_loss",
        "eval_exact_match",
        "eval_triple_f1",
    }
    assert (
        run["best"]["metric"] == "triple_f1"
        and json.loads((out / "best.json").read_text())["metric"] == "triple_f1"
    )


def test_what_run_json_says(stopped, bases, rows_file):
    import hashlib

    run = read_run(stopped[1])
    sha = hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert run["data"] == {
        name: {"path": str(rows_file), "sha256": sha} for name in ("train", "eval")
    }
    assert (
        run["flags"]["learning_rate"] == 0.01
        and run["rows"] == 13
        and run["total_steps"] == 24
        and run["world_size"] == 1
    )
    assert (
        set(run["versions"])
        >= {"python", "torch", "transformers", "deepspeed", "peft", "glm-foundry"}
        and run["device"]
    )
    assert (
        run["base_model"]["name_or_path"] == str(bases["glm2"].resolve())
        and run["parameters"]["trainable"] == run["parameters"]["all"]
    )
    train_lines = [line for line in run["steps"] if "train_loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, len(train_lines) + 1))
    assert {"learning_rate", "tokens_per_second"} <= set(train_lines[0]) and run["seconds"] > 0
    commit = run["git_commit"]
    assert (
        commit is None
        if not (ROOT / ".git").exists()
        else commit is None or len(commit.removesuffix("+changes")) == 40
    )


def test_a_run_that_fails_says_so(flags, train, tmp_path):
    from finetune.engine import TrainingFailed

    with pytest.raises(TrainingFailed):
        train(
            flags(
                tmp_path / "out",
                "--learning_rate",
                "1e30",
                "--num_train_epochs",
                3,
                "--lora_alpha",
                10**9,
            )
        )
    assert read_run(tmp_path / "out")["status"] == "failed"


def strict(text: str):
    """The JSON value of a text that has neither Infinity nor NaN."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """In new lines and in an earlier session's lines.

    None is the best, and the table shows the run.
    """

    def told(done):
        config = parse_config(["--model_name_or_path", "m", "--train_path", "t", "--report_to="])
        return record.RunLog(
            config, tmp_path, done, {"total_steps": 3, "more": [math.inf, {"deep": math.nan}]}
        )

    log = told(0)
    log.add(1, {"train_loss": 2.0, "grad_norm": math.inf, "eval_loss": -math.inf})
    log.close("failed")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train_loss": NaN}\n{"step": 3, "train_l')  # torn by kill -9
    log = told(2)
    log.add(3, {"train_loss": 1.0, "eval_loss": math.nan})
    log.close("finished")
    wanted = [
        {"step": 1, "train_loss": 2.0, "grad_norm": None, "eval_loss": None},
        {"step": 2, "train_loss": None},
        {"step": 3, "train_loss": 1.0, "eval_loss": None},
    ]
    run = strict((tmp_path / "run.json").read_text())
    assert (
        [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        == wanted
        == read_run(tmp_path)["steps"]
    )
    assert run["best"] is None and run["more"] == [None, {"deep": None}]
    assert report.runs_table({"a": read_run(tmp_path)})[1][0][3:6] == [
        "3/3",
        "1.0000",
        "-",
    ] and report.series(read_run(tmp_path), "train_loss") == ([1, 3], [2.0, 1.0])


@pytest.mark.parametrize(
    "content",
    [
        '{"step": 1}\n{"st\n{"step": 3}\n',
        '{"step": 1}\n{"train_loss": 1}\n',
        '{"step": 1}\n[{}\n{"step": 3}\n',
    ],
)
def test_a_line_that_is_no_steps_is_named(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: wanted an object with a step"):
        record.read_steps(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "holds no run.json"),
        ("{", "not valid JSON"),
        ('{"format_version": 99}', "format version 99"),
    ],
)
def test_records_that_cannot_be_read(tmp_path, content, said):
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path)


def test_loggers(flags, train, tmp_path, monkeypatch):
    """Every logger gets every event, in order; a custom logger is an entry in LOGGERS."""

    class Lines:
        package = "json"

        def __init__(self, config, output_dir, run_id, done):
            self.file = open(output_dir / "lines.jsonl", "a")
            self.file.write(json.dumps({"id": run_id, "done": done}) + "\n")

        def add(self, step, values):
            self.file.write(json.dumps({"step": step, **values}) + "\n")

        def close(self):
            self.file.close()

    monkeypatch.setitem(record.LOGGERS, "lines", Lines)
    out = tmp_path / "out"
    train(flags(out, "--report_to", "lines, tensorboard", "--max_steps", 2))
    train(flags(out, "--report_to", "lines", "--max_steps", 2, "--resume_from_checkpoint", "auto"))
    first, *told, memory, second = [
        json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()
    ]
    assert (
        told == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        and len(told) == 2
    )
    epoch = read_run(out)["memory"][0]
    assert memory["step"] == 2 and memory["memory/epoch_peak_gb"] == epoch["peak_gb"]
    assert first == {"id": read_run(out)["id"], "done": 0} and second == {
        "id": first["id"],
        "done": 2,
    }
    assert list((out / "runs").glob("events*"))
    assert not parse_config(
        ["--model_name_or_path", "m", "--train_path", "t", "--report_to="]
    ).loggers


def test_wandb_offline(flags, train, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install -e .[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(flags(tmp_path / "out", "--report_to", "wandb", "--max_steps", 2))
    assert list((tmp_path / "out").rglob("*.wandb")) and not (tmp_path / "out" / "runs").exists()


def test_a_missing_logger_or_metric_is_named_before_anything_is_written(
    flags, tmp_path, capsys, monkeypatch, rows_file
):
    import train as command_line
    from finetune.evaluation import metrics as metrics_file

    monkeypatch.setattr(record, "find_spec", lambda name: None)
    monkeypatch.setattr(metrics_file, "find_spec", lambda name: None)
    for words, said in (
        (["--report_to", "swanlab"], 'the package swanlab: pip install -e ".[swanlab]"'),
        (
            ["--report_to=", "--eval_path", rows_file, "--eval_metrics", "bleu"],
            "the metric bleu4 needs nltk and jieba",
        ),
    ):
        assert command_line.main(flags(tmp_path / "out", *words)) == 1
        assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_t11_run_json_does_not_grow_with_the_steps(flags, train, tmp_path, monkeypatch):
    """Steps are in metrics.jsonl alone.

    Reading the run returns them, writing run.json needs none.
    """
    out = tmp_path / "out"
    train(flags(out, "--max_steps", 2))
    assert "steps" not in json.loads((out / "run.json").read_text())
    assert [line["step"] for line in read_run(out)["steps"]] == [1, 2]
    log = record.RunLog(parse_config(flags(tmp_path / "long")), tmp_path, 0, {})
    monkeypatch.setattr(record, "read_steps", None)
    sizes = []
    for step in range(1, 2001):
        log.add(step, {"train_loss": 1.0, "eval_loss": abs(step - 700)})
        if step in (1000, 2000):
            log.write()
            sizes.append((tmp_path / "run.json").stat().st_size)
    log.close("finished")
    assert abs(sizes[1] - sizes[0]) < 20 and json.loads((tmp_path / "run.json").read_text())[
        "best"
    ] == {"step": 700, "metric": "loss", "value": 0}
