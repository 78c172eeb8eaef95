"""Drift is detected where there is some and only there; updates restore coverage, keep the order.

An update replaces a folder atomically.
"""

import json
import os
import subprocess

import numpy as np
import pytest

from chatglm import saving
from finetune.rows.formats import BadRow
from predictor import LengthPrediction, LengthPredictor
from predictor import update as module
from predictor.decoder import read_card
from predictor.evaluate import ObservedLengths
from predictor.export import main as export_command
from predictor.kernel import FILE as KERNEL_FILE
from predictor.labels import Label, LabelledPrompt
from predictor.monitor_log import read_log, served_coverage
from predictor.scores import kendall_tau
from predictor.update import (
    drift,
    fitted_prompt_count,
    update_predictor,
    write_updated,
)
from tests.conftest import REPO_ROOT
from tests.predictor.synthetic import cap_rows, examples_of, make_rows, train, write_rows
from tests.warm import warm_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("update"), make_rows(400, seed=1))


@pytest.fixture
def predictor(folder):
    return LengthPredictor.from_pretrained(folder)


@pytest.fixture(scope="module")
def shifted_update(folder):
    """(predictor, report) after 600 rows that are twice as long."""
    return update_predictor(
        LengthPredictor.from_pretrained(folder), examples_of(make_rows(600, seed=2, factor=2.0))
    )


def coverage(predictor, examples, q) -> float:
    seen = ObservedLengths.of(examples, "m")
    found = predictor.predict(seen.prompts)
    return float(np.mean([t <= found[i].quantile(q) for i, t in zip(seen.prompt, seen.tokens)]))


def tau(predictor, examples) -> float:
    return kendall_tau(
        np.array([p.rank_score for p in predictor.predict([e.prompt for e in examples])]),
        np.array([e.labels[0].tokens for e in examples]),
    )


def test_no_drift_without_a_shift(predictor):
    _, report = update_predictor(predictor, examples_of(make_rows(300, seed=3)), refit=False)
    assert not report["drifted"] and report["before"]["p"] > 0.05
    assert (
        abs(report["before"]["mean_log_ratio"]) < 0.1
        and 0.84 < report["before"]["coverage_90"] < 0.96
    )


@pytest.mark.parametrize("capped", [1.0, 0.6])
def test_false_alarms_are_as_rare_as_p_says(predictor, capped):
    """40 logs of the training distribution, whole or capped: p is below 0.05 in few of them.

    Whatever the sampling error of the calibration.
    """
    found = []
    for seed in range(100, 140):
        seen = ObservedLengths.of(examples_of(cap_rows(make_rows(200, seed=seed), capped)), "m")
        found.append(
            drift(
                predictor.decoder,
                predictor.score(seen.prompts),
                seen,
                fitted_prompt_count(predictor.card),
            )["p"]
        )
    assert np.mean(np.array(found) < 0.05) <= 0.15 and min(found) > 1e-4


def test_a_shift_is_seen_and_undone(predictor, shifted_update):
    new, report = shifted_update
    before, after = report["before"], report["after"]
    assert (
        report["drifted"]
        and before["p"] < 1e-6
        and before["ks"] > 0.3
        and before["coverage_90"] < 0.7
    )
    assert before["mean_log_ratio"] == pytest.approx(np.log(2), abs=0.15)
    assert (
        0.86 <= after["coverage_90"] <= 0.94
        and after["ks"] < 0.1
        and abs(after["mean_log_ratio"]) < 0.1
    )
    assert (
        after["tau"] >= before["tau"] - 0.02
        and after["mae"] < before["mae"]
        and after["pinball"] < before["pinball"]
    )
    fresh = examples_of(make_rows(600, seed=4, factor=2.0))
    assert (
        coverage(predictor, fresh, 0.9) < 0.7 and tau(new, fresh) >= tau(predictor, fresh) - 0.015
    )
    assert (
        0.85 <= coverage(new, fresh, 0.9) <= 0.95 and 0.95 <= coverage(new, fresh, 0.975) <= 0.995
    )
    again = update_predictor(new, fresh, refit=False)[1]
    assert not again["drifted"] and again["updates"] == 2


def test_a_head_learns_what_calibration_cannot(predictor):
    """Words that meant long mean short: order comes back with the head alone."""
    rows = make_rows(400, seed=5, turned=True)
    calibrated, plain = update_predictor(predictor, examples_of(rows), refit=False)
    fitted, better = update_predictor(predictor, examples_of(rows))
    assert plain["head"] == "as it was" and better["head"] == "fitted anew"
    assert better["before"] == plain["before"] and better["before"]["tau"] < 0
    assert better["after"]["tau"] > plain["after"]["tau"] + 0.3
    fresh = examples_of(make_rows(400, seed=6, turned=True))
    # The share of 400 answers within a quantile that 400 others placed: 0.9, give or take 0.02 (one
    # standard deviation).
    assert (
        abs(coverage(fitted, fresh, 0.9) - 0.9) < 0.07
        and abs(coverage(calibrated, fresh, 0.9) - 0.9) < 0.07
    )


def test_other_heads_are_calibrated_alone(predictor):
    """What stands for a backbone that was trained: a scorer without a kernel head."""
    trained = LengthPredictor(
        lambda prompts: predictor.score(prompts), predictor.decoder, predictor.card
    )
    new, report = update_predictor(trained, examples_of(make_rows(600, seed=2, factor=2.0)))
    assert report["head"].startswith("as it was: only kernel heads") and new.score is trained.score
    assert 0.85 <= coverage(new, examples_of(make_rows(600, seed=4, factor=2.0)), 0.9) <= 0.95


def test_the_old_predictor_serves_on(folder, predictor, shifted_update):
    prompts = [row["prompt"] for row in make_rows(5, seed=9)]
    assert (
        shifted_update[0].predict(prompts)[0].median_tokens
        != predictor.predict(prompts)[0].median_tokens
    )
    assert [p.to_dict() for p in predictor.predict(prompts)] == [
        p.to_dict() for p in LengthPredictor.from_pretrained(folder).predict(prompts)
    ]


def test_answers_that_were_cut_are_longer_than_that(predictor):
    """A cap in the log is not taken for shorter answers, neither as drift nor by what is fitted."""
    cut = cap_rows(make_rows(300, seed=17), 0.7)
    new, report = update_predictor(predictor, examples_of(cut), refit=False)
    believed, naive = update_predictor(
        predictor, examples_of([row | {"finished": True} for row in cut]), refit=False
    )
    assert report["cut"] > 60 and report["before"]["p"] > 1e-3 > 1e-5 > naive["before"]["p"]
    fresh = examples_of(make_rows(600, seed=8))
    assert coverage(new, fresh, 0.9) > max(0.75, coverage(believed, fresh, 0.9) + 0.1)


def test_a_repeated_prompt_counts_once(predictor):
    rows = make_rows(200, seed=10)
    report = update_predictor(predictor, examples_of(rows + [rows[0]] * 500), refit=False)[1]
    assert report["rows"] == 700 and report["prompts"] == 200 and not report["drifted"]


def test_rows_of_other_served_models_are_left_out(predictor):
    mine, others = make_rows(200, seed=11), make_rows(200, seed=12, factor=9.0)
    mixed = examples_of(mine) + [
        LabelledPrompt(row["prompt"], (Label(row["output_tokens"], "other"),), "log", "")
        for row in others
    ]
    alone, both = (
        update_predictor(predictor, examples_of(mine))[1],
        update_predictor(predictor, mixed)[1],
    )
    assert both["other_models_rows"] == 200 and both | {"other_models_rows": 0} == alone
    with pytest.raises(
        ValueError,
        match="--min_rows: wanted at least 50 rows of different prompts answered by 'm', "
        "got 40 rows of 40 prompts and 200 of",
    ):
        update_predictor(predictor, mixed[:40] + mixed[200:])


def test_too_few_rows_are_refused(predictor):
    with pytest.raises(ValueError, match="wanted at least 50 .* got 49 rows of 49 prompts"):
        update_predictor(predictor, examples_of(make_rows(49, seed=13)))
    with pytest.raises(ValueError, match="wanted at least 50 .* got 90 rows of 1 prompts"):
        update_predictor(predictor, examples_of(make_rows(1, seed=13) * 90))
    with pytest.raises(ValueError, match="none of the 60 answers of 'm' finished"):
        update_predictor(
            predictor, examples_of([row | {"finished": False} for row in make_rows(60, seed=13)])
        )


# ---- the log


def test_a_log_as_the_monitor_writes_it(tmp_path, predictor):
    rows = make_rows(60, seed=14)
    said = [p.to_dict() for p in predictor.predict([row["prompt"] for row in rows])]
    lines = [row | {"prediction": p, "arrived": 1.5, "slo_s": None} for row, p in zip(rows, said)]
    lines[3]["prediction"] = None
    del lines[4]["served_model"]
    path = write_rows(tmp_path / "log.jsonl", lines)
    with open(path, "a") as file:
        file.write('{"prompt": "torn')
    log = read_log([str(path)], "m")
    assert len(log.examples) == 60 and log.bad == 1 and log.predictions[3] is None
    assert all(e.labels[0].served_model == "m" for e in log.examples)
    served = served_coverage(log, "m")
    expected = np.mean(
        [
            row["output_tokens"] <= LengthPrediction.from_dict(p).quantile(0.9)
            for i, (row, p) in enumerate(zip(rows, said))
            if i != 3
        ]
    )
    assert served["rows"] == 59 and served["coverage_90"] == pytest.approx(expected)
    with pytest.raises(BadRow, match=r"log.jsonl:61: not valid JSON"):
        read_log([str(path)], "m", "error")


@pytest.mark.parametrize(
    "prediction",
    [
        3,
        [],
        {},
        {"probabilities": [1.0], "edges": [0.0], "rank_score": 1.0},
        {"probabilities": [0.5, 0.5], "edges": [0, 2, 1], "rank_score": 1},
        {"probabilities": [0.0, 0.0], "edges": [0, 1, 2], "rank_score": 1},
        {"probabilities": "no", "edges": [0, 1], "rank_score": 1},
        {"probabilities": [float("nan")], "edges": [0, 1], "rank_score": 1},
        {"probabilities": [1.0], "edges": [0, float("inf")], "rank_score": 1},
        {"probabilities": [1.0], "edges": [0, 10**400], "rank_score": 1},
        {"probabilities": [1.0], "edges": [[0], [1]], "rank_score": 1},
    ],
)
def test_what_is_no_prediction_is_a_bad_row(tmp_path, prediction):
    path = write_rows(
        tmp_path / "log.jsonl", [{"prompt": "p", "output_tokens": 3, "prediction": prediction}]
    )
    with pytest.raises(BadRow, match=r'log.jsonl:1: "prediction" is not what'):
        read_log([str(path)], "m", "error")


# ---- the folder


def test_the_folder_is_replaced_whole(tmp_path, folder, shifted_update):
    new = shifted_update[0]
    target = tmp_path / "there"
    write_updated(new, folder, target)
    prompts = [row["prompt"] for row in make_rows(20, seed=9)]
    loaded = LengthPredictor.from_pretrained(target)
    assert [p.to_dict() for p in loaded.predict(prompts)] == [
        p.to_dict() for p in new.predict(prompts)
    ]
    assert loaded.card["updated"]["updates"] == 1 and loaded.card["updated"]["rows"] == 600
    assert loaded.card["updated"]["drift"]["before"]["p"] < 1e-6 and "updated" not in read_card(
        folder
    )
    assert {p.name for p in target.iterdir()} == {p.name for p in folder.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(target)
    write_updated(LengthPredictor.from_pretrained(folder), folder, link)
    assert (
        link.is_symlink()
        and "updated" not in read_card(target)
        and sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]
    )


@pytest.mark.parametrize("one_step", [True, False])
def test_a_failed_write_leaves_the_old_folder(
    tmp_path, folder, shifted_update, monkeypatch, one_step
):
    target = tmp_path / "there"
    write_updated(LengthPredictor.from_pretrained(folder), folder, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    if one_step:  # the disk is full while the card is written
        monkeypatch.setattr(
            module,
            "write_card",
            lambda *_: (_ for _ in ()).throw(OSError("No space left on device")),
        )
    else:  # no renameat2, and the second rename fails
        monkeypatch.setattr(saving.ctypes, "CDLL", lambda _: object())
        real = os.replace
        monkeypatch.setattr(
            saving.os,
            "replace",
            lambda a, b: (
                real(a, b)
                if not (str(a).endswith(".tmp") and b == target)
                else (_ for _ in ()).throw(OSError("gone"))
            ),
        )
    with pytest.raises(OSError, match="No space left|gone"):
        write_updated(shifted_update[0], folder, target)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_two_renames_do_where_one_step_cannot(tmp_path, folder, shifted_update, monkeypatch):
    target = tmp_path / "there"
    write_updated(LengthPredictor.from_pretrained(folder), folder, target)
    monkeypatch.setattr(saving.ctypes, "CDLL", lambda _: object())
    write_updated(shifted_update[0], folder, target)
    assert read_card(target)["updated"]["updates"] == 1 and [
        p.name for p in tmp_path.iterdir()
    ] == ["there"]


def test_one_writer_at_a_time(tmp_path, folder, shifted_update, holder, capsys):
    """An update and an export wait for nobody, and leave the folder as it was."""
    target = tmp_path / "there"
    assert export_command(["--checkpoint", str(folder), "--output", str(target)]) == 0
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    holder(tmp_path / ".there.writing")
    with pytest.raises(ValueError, match="there is in use by another run"):
        write_updated(shifted_update[0], folder, target)
    words = ["--checkpoint", str(folder), "--output", str(target), "--overwrite"]
    assert export_command(words) == 1
    assert f"the folder {target} is in use by another run" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_other_folders_are_not_replaced(tmp_path, folder, predictor):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds other things than a predictor"):
        write_updated(predictor, folder, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="holds other things than a predictor"):
        write_updated(predictor, folder, tmp_path / "file")


# ---- the command


def test_the_command(tmp_path, folder):
    target = tmp_path / "p"
    write_updated(LengthPredictor.from_pretrained(folder), folder, target)
    rows = make_rows(80, seed=15, factor=2.0) + [
        row | {"served_model": "n"} for row in make_rows(10, seed=16)
    ]
    log = write_rows(tmp_path / "log.jsonl", rows)
    command = [
        warm_python(),
        "-m",
        "predictor.update",
        "--predictor",
        str(target),
        "--log",
        str(log),
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "10 of other served models left out" in done.stdout
        and "lengths have drifted" in done.stdout
        and "update 1" in done.stdout
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert (
        report["drifted"]
        and report["rows"] == 80
        and read_card(target)["updated"]["drift"]["before"] == report["before"]
    )


def test_the_command_refuses_in_one_line(tmp_path, folder, capsys):
    before = (folder / KERNEL_FILE).read_bytes()
    log = write_rows(tmp_path / "log.jsonl", make_rows(20, seed=15))
    base = ["--predictor", str(folder), "--log", str(log)]
    assert module.main(base) == 1
    assert capsys.readouterr().err.startswith(
        "predictor.update: error: --min_rows: wanted at least 50 rows"
    )
    assert module.main([*base, "--hold_out", "20"]) == 1
    assert "--hold_out 20: wanted also older rows of" in capsys.readouterr().err
    assert module.main([*base, "--min_rows", "20", "--dry_run"]) == 0
    assert "update 1" not in capsys.readouterr().out
    assert module.main(["--predictor", str(tmp_path), "--log", str(log)]) == 1
    assert module.main(["--predictor", str(folder), "--log", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    content = log.read_bytes()
    assert module.main([*base, "--json", str(log)]) == 1
    assert "is read, and cannot be written too" in capsys.readouterr().err
    assert log.read_bytes() == content
    with pytest.raises(SystemExit) as stopped:
        module.main([*base, "--min_rows", "0"])
    assert stopped.value.code == 2
    assert (folder / KERNEL_FILE).read_bytes() == before and "updated" not in read_card(folder)
