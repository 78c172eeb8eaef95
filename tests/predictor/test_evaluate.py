"""Figures against separate arithmetic: tables, groups, noise ceiling, censoring, pictures."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from predictor import LengthPrediction, LengthPredictor
from predictor import evaluate as module
from predictor.decoder import read_card, write_card
from predictor.evaluate import (
    NOMINAL,
    ObservedLengths,
    evaluate_predictor,
    evaluation_table,
    groups_of,
    noise_ceiling,
)
from predictor.labels import Label, LabelledPrompt
from predictor.scores import kendall_tau, metrics_of
from tests.conftest import REPO_ROOT, write_tokenizer
from tests.predictor.synthetic import NOISE, cap_rows, examples_of, make_rows, train, write_rows
from tests.warm import warm_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("evaluate"), make_rows(400, seed=1))


@pytest.fixture(scope="module")
def predictor(folder):
    return LengthPredictor.from_pretrained(folder)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "TIMED_SECONDS", 0.05)


def test_figures_of_a_good_predictor(predictor, quick):
    rows = make_rows(400, seed=2)
    report = evaluate_predictor(predictor, examples_of(rows))
    tokens = np.array([row["output_tokens"] for row in rows])
    found = predictor.predict([row["prompt"] for row in rows])
    figures = report["all"]
    assert figures["mae"] == pytest.approx(
        np.mean([abs(p.median_tokens - t) for p, t in zip(found, tokens)])
    )
    assert figures["coverage_90"] == pytest.approx(
        np.mean([t <= p.quantile(0.9) for p, t in zip(found, tokens)])
    )
    assert figures["reserved_90"] == pytest.approx(np.mean([p.quantile(0.9) for p in found]))
    assert figures["tau"] == pytest.approx(
        kendall_tau(np.array([p.rank_score for p in found]), tokens)
    )
    median = np.median([row["output_tokens"] for row in make_rows(400, seed=1)])
    assert report["constant"] == {"tokens": median, "of": "the training data"}
    assert figures["mae_constant"] == pytest.approx(np.abs(tokens - median).mean())
    assert figures["mae"] < 0.7 * figures["mae_constant"] and 0.86 < figures["coverage_90"] < 0.94
    assert np.abs(np.array(report["calibration"]["observed"]) - NOMINAL).max() < 0.08
    assert (
        figures["answers"] == 400
        and figures["cut"] == 0
        and report["product_limit"] is None
        and report["noise_ceiling"] is None
    )
    assert (
        sum(
            part["answers"] for name, part in report["groups"].items() if name.startswith("length=")
        )
        == 400
    )
    assert not report["training_rows"] and json.loads(json.dumps(report)) == report


def test_groups_are_figures_of_their_rows(predictor, quick):
    rows = make_rows(120, seed=3) + [
        row | {"prompt": "请列出河流、灯和面包" + row["prompt"][-8:]}
        for row in make_rows(60, seed=4)
    ]
    report = evaluate_predictor(predictor, examples_of(rows))
    alone = evaluate_predictor(predictor, examples_of(rows[:120]))
    assert report["groups"]["language=other"] == pytest.approx(alone["all"])
    assert report["groups"]["language=zh"]["answers"] == 60
    lengths = {name: part for name, part in report["groups"].items() if name.startswith("length=")}
    assert [name[:8] for name in lengths] == ["length=1", "length=2", "length=3", "length=4"]
    assert sum(part["mae"] * part["answers"] for part in lengths.values()) / 180 == pytest.approx(
        report["all"]["mae"]
    )
    assert list(np.diff([part["reserved_90"] for part in lengths.values()]) > 0) == [True] * 3


def test_one_predicted_length_is_one_group():
    assert set(groups_of(["a", "b", "c"], np.full(3, 7.0))["length"]) == {"1 (to 7)"}
    assert list(groups_of(["写一首诗", "write", ""], np.arange(3.0))["language"]) == [
        "zh",
        "other",
        "other",
    ]


def test_cut_answers(predictor, quick):
    """Excluded from tau and MAE; covered where the quantile lies beyond the cut.

    The product-limit estimate corrects for the cap.
    """
    rows = make_rows(400, seed=5)
    full = evaluate_predictor(predictor, examples_of(rows))
    cut = cap_rows(rows, 0.75)
    report = evaluate_predictor(predictor, examples_of(cut))
    done = evaluate_predictor(predictor, examples_of([row for row in cut if row["finished"]]))
    for name in ("tau", "mae", "pinball", "crps", "mae_constant"):
        assert report["all"][name] == pytest.approx(done["all"][name], rel=1e-5)
    found = predictor.predict([row["prompt"] for row in cut])
    within = [
        p.quantile(0.9) > row["output_tokens"]
        or (row["finished"] and p.quantile(0.9) == row["output_tokens"])
        for p, row in zip(found, cut)
    ]
    assert report["all"]["coverage_90"] == pytest.approx(np.mean(within)) and report["all"][
        "cut"
    ] == sum(not row["finished"] for row in cut)
    assert report["product_limit"]["coverage_90"] == pytest.approx(
        full["all"]["coverage_90"], abs=0.05
    )
    assert report["calibration"]["observed"][NOMINAL.index(0.9)] == pytest.approx(
        report["all"]["coverage_90"], abs=0.01
    )
    assert "answers were cut" in evaluation_table(
        report
    ) and "answers were cut" not in evaluation_table(full)


def test_a_cut_at_the_quantile_is_not_covered():
    edges, probabilities = np.array([0.0, 10.0, 20.0]), np.array([[0.9, 0.1]] * 2)
    both = metrics_of(
        probabilities, edges, np.zeros(2), np.array([10.0, 10.0]), np.array([True, False])
    )
    assert both["coverage_90"] == 0.5 and both["coverage_975"] == 1.0
    nothing = metrics_of(
        probabilities, edges, np.zeros(2), np.array([3.0, 4.0]), np.array([False, False])
    )
    assert nothing["mae"] == nothing["tau"] == 0 and nothing["coverage_90"] == 1.0


def test_the_noise_ceiling_is_that_of_the_noise():
    """Runs around a known mean: tau between two runs, and to the mean, simulated and computed."""
    generator = np.random.default_rng(0)
    mean = generator.normal(0, 0.8, 500)
    runs = np.exp(mean[:, None] + generator.normal(0, NOISE, (500, 5)) + 4)
    examples = [
        LabelledPrompt(f"p {i}", tuple(Label(int(t * 100), "m") for t in row), "", "")
        for i, row in enumerate(runs)
    ]
    examples += [
        LabelledPrompt("alone", (Label(3, "m"),), "", ""),
        LabelledPrompt("cut", (Label(3, "m"), Label(4, "m", False)), "", ""),
    ]
    seen = ObservedLengths.of(examples, "m")
    found = noise_ceiling(seen, np.append(mean, [0, 0]))
    assert found["prompts"] == 500
    correlation = 0.8**2 / (0.8**2 + NOISE**2)  # tau of normals: 2 / pi asin(r)
    assert found["tau_of_one_run"] == pytest.approx(2 / np.pi * np.arcsin(correlation), abs=0.03)
    assert found["tau_of_predictor"] == pytest.approx(
        2 / np.pi * np.arcsin(np.sqrt(correlation)), abs=0.03
    )
    assert found["tau_of_one_run"] < found["tau_of_median_of_others"] < found["tau_of_predictor"]


def test_rows_of_other_served_models(predictor, quick):
    rows = make_rows(60, seed=6)
    mixed = examples_of(rows + [row | {"served_model": "n", "output_tokens": 999} for row in rows])
    report = evaluate_predictor(predictor, mixed)
    assert report["other_models_answers"] == 60 and report["all"] == pytest.approx(
        evaluate_predictor(predictor, examples_of(rows))["all"]
    )
    assert "60 of other served models left out" in evaluation_table(report)
    other = evaluate_predictor(predictor, mixed, served_model="n")
    assert other["constant"]["of"] == "these rows" and other["constant"]["tokens"] == 999
    with pytest.raises(
        ValueError, match="--served_model 'q': no row is of it; the rows are of m, n"
    ):
        evaluate_predictor(predictor, mixed, served_model="q")
    with pytest.raises(ValueError, match="none of the 60 answers of 'm' finished"):
        evaluate_predictor(predictor, examples_of([row | {"finished": False} for row in rows]))


def test_training_rows_are_told(predictor, quick):
    report = evaluate_predictor(predictor, examples_of(make_rows(400, seed=1)))
    assert report["training_rows"] and "rows it was trained on" in evaluation_table(report)


def test_the_command(tmp_path, folder):
    data = write_rows(
        tmp_path / "rows.jsonl", make_rows(80, seed=7) + [{"prompt": "", "output_tokens": 3}]
    )
    command = [
        warm_python(),
        "-m",
        "predictor.evaluate",
        "--predictor",
        str(folder),
        "--data",
        str(data),
        "--on_bad_row",
        "skip",
    ]
    outputs = ["--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    done = subprocess.run(command + outputs, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert (
        report["bad_rows"] == 1 and report["prompts"] == 80 and "1 bad rows skipped" in done.stdout
    )
    assert (
        f"{report['all']['tau']:.3f}" in done.stdout
        and f"{report['milliseconds']['single_p50']:.2f}" in done.stdout
    )
    image = (tmp_path / "r.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.png", "rows.jsonl"]


def test_the_command_refuses_in_one_line(tmp_path, folder, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "an answer"}])
    assert module.main(["--predictor", str(folder), "--data", str(data)]) == 1
    assert 'rows.jsonl:1: no "output_tokens"' in capsys.readouterr().err
    assert module.main(["--predictor", str(tmp_path), "--data", str(data)]) == 1
    assert module.main(["--predictor", str(folder), "--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    card = json.loads((folder / "predictor.json").read_text())
    for key in ("backbone", "training_data"):
        broken = {name: value for name, value in card.items() if name != key}
        (tmp_path / "predictor.json").write_text(json.dumps(broken))
        assert module.main(["--predictor", str(tmp_path), "--data", str(data)]) == 1
        assert "predictor.json: damaged" in capsys.readouterr().err
    (tmp_path / "predictor.json").unlink()
    for flags in (["--picture", "p.bmp"], ["--batch_size", "0"], ["--on_bad_row", "what"]):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--predictor", str(folder), "--data", str(data), *flags])
        assert stopped.value.code == 2


def test_answers_are_counted_by_the_served_models_tokenizer(tmp_path, folder, quick):
    """As many tokens as the tokenizer gives; a predictor for another is refused unless allowed."""
    from chatglm.loading import load_tokenizer

    (tmp_path / "served").mkdir()
    served = write_tokenizer(tmp_path / "served", "glm2")
    answers = ["hello world", "a b c", "今天 天气 很 好"]
    data = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"p {i}", "response": answer} for i, answer in enumerate(answers)],
    )
    command = [
        "--predictor",
        str(folder),
        "--data",
        str(data),
        "--model_path",
        str(served),
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert module.main(command) == 0
    tokens = [len(load_tokenizer(served).encode_text(answer)) for answer in answers]
    found = LengthPredictor.from_pretrained(folder).predict([f"p {i}" for i in range(3)])
    assert json.loads((tmp_path / "r.json").read_text())["all"]["mae"] == pytest.approx(
        np.mean([abs(p.median_tokens - t) for p, t in zip(found, tokens)])
    )
    made_for_another = tmp_path / "other"
    shutil.copytree(folder, made_for_another)
    card = read_card(folder)
    write_card(
        made_for_another,
        card | {"served_model": card["served_model"] | {"tokenizer_sha256": "0" * 64}},
    )
    (made_for_another / "checksums.json").unlink()
    command[1] = str(made_for_another)
    assert module.main(command) == 1 and module.main([*command, "--allow_other_tokenizer"]) == 0


def test_a_predictor_that_knows_nothing_has_every_figure(quick):
    """No logarithm of 0, no empty mean, where all lengths are 0."""

    class Constant:
        card = {
            "served_model": {"name": "m"},
            "training_data": {"sha256": ""},
            "backbone": {"name": "lexical"},
            "head": {"name": "bucket"},
        }

        def predict(self, prompts):
            return [
                LengthPrediction(np.ones(2) / 2, np.array([0.0, 4.0, 8.0]), 1.0) for _ in prompts
            ]

    report = evaluate_predictor(
        Constant(), [LabelledPrompt(f"p {i}", (Label(0, "m"),), "", "") for i in range(30)]
    )
    assert (
        report["all"]["tau"] == 0
        and report["all"]["coverage_90"] == 1
        and report["constant"]["of"] == "these rows"
    )
    assert "nan" not in evaluation_table(report)
