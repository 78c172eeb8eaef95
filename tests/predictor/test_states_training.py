"""train.py --task predictor --backbone states, from files to posteriors, and what it refuses."""

import json

import numpy as np
import pytest

from predictor.decoder import read_card
from predictor.hidden_states import read_hidden_states
from predictor.prediction import remaining
from predictor.readings import Readings
from predictor.rereading import Posteriors, Rereader
from predictor.rereading_fit import bucket_starts, fit_map
from predictor.runtime import LengthPredictor
from predictor.scores import kendall_tau
from tests.predictor.states_folder import (
    CAP,
    EVERY,
    HIDDEN,
    SERVED,
    make_arrays,
    write_collection,
    write_states,
)

PROMPTS = 160
SHORT = ["--state_seeds", "1", "--state_units", "8", "--hash_bits", "8", "--landmarks", "32"]


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """(lengths file, states folder)."""
    return write_collection(tmp_path_factory.mktemp("collection"), PROMPTS)


@pytest.fixture(scope="session")
def states_flags(collection):
    """The flags of a short run."""

    def make(output, *more) -> list[str]:
        lengths, states = collection
        words = ["--task", "predictor", "--backbone", "states", "--train_path", lengths]
        words += ["--states", states, "--output_dir", output, "--length_limit", 512, *SHORT]
        return [str(word) for word in [*words, *more]]

    return make


@pytest.fixture(scope="session")
def trained_states(states_flags, train, tmp_path_factory):
    return train(states_flags(tmp_path_factory.mktemp("trained_states") / "out"))


def test_the_clock_is_found(trained_states, tmp_path):
    """On answers of new prompts: what is left ranks well, and q90 covers nine of ten."""
    lengths, folder = write_collection(tmp_path, 150, seed=9)
    rows = list(map(json.loads, lengths.read_text().splitlines()))
    states = read_hidden_states(folder)
    rereader = Rereader.from_pretrained(trained_states)
    priors = [None] * len(states)
    posteriors = rereader.read(states.at, states.last, states.mean, priors)
    left, scores, within, ended = [], [], [], []
    for answer, at, posterior in zip(states.answer, states.at, posteriors):
        row = rows[answer]
        left.append(row["output_tokens"] - at)
        scores.append(remaining(posterior, at).rank_score)
        ended.append(row["finished"])
        within.append(row["output_tokens"] <= posterior.quantile(0.9))
    later = states.at == 2 * EVERY
    assert kendall_tau(np.array(scores)[later], np.array(left)[later]) > 0.55
    assert 0.85 < np.mean(np.array(within)[np.array(ended)]) <= 1


def test_the_card_says_what_an_engine_needs(trained_states):
    card = read_card(trained_states)
    assert card["backbone"] == {
        "name": "states",
        "layers": [2, 3],
        "every": EVERY,
        "pooling": "both",
        "hidden_size": HIDDEN,
        "weights": "0123",
    }
    assert card["served_model"]["name"] == SERVED
    assert card["rereading"]["cap"] == CAP and card["rereading"]["limit"] == 512
    assert [bucket["start"] for bucket in card["rereading"]["buckets"]][:2] == [0, EVERY]
    figures = card["metrics"]["folds"]["32"]
    assert figures["posterior"]["crps"] < figures["prior"]["crps"]
    assert figures["posterior"]["tau"] > figures["prior"]["tau"] + 0.1


def test_export_and_evaluate(trained_states, lexical, collection, tmp_path, capsys):
    from predictor import evaluate, export

    output = tmp_path / "exported"
    assert export.main(["--checkpoint", str(trained_states), "--output", str(output)]) == 0
    exported = Rereader.from_pretrained(output)
    states = read_hidden_states(collection[1])
    given = (states.at[:9], states.last[:9], states.mean[:9], [None] * 9)
    before = Rereader.from_pretrained(trained_states).read(*given)
    for one, other in zip(before, exported.read(*given)):
        assert one.probabilities.tolist() == other.probabilities.tolist()
    words = ["--predictor", str(output), "--data", str(collection[0])]
    capsys.readouterr()
    report = tmp_path / "report.json"
    more = ["--states", str(collection[1]), "--prior", str(lexical), "--json", str(report)]
    assert evaluate.main(words + more) == 0
    assert "ms for 48 readings together" in capsys.readouterr().out
    places = json.loads(report.read_text())["places"]
    assert set(places["0"]) == {"posterior", "prior"} and places["0"]["prior"]["readings"] > 100
    assert evaluate.main(words) == 1
    assert "--states wants the folder" in capsys.readouterr().err
    file = output / "rereader.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert evaluate.main(words + ["--states", str(collection[1])]) == 1
    assert "rereader.safetensors" in capsys.readouterr().err


def test_it_reads_no_prompts(trained_states, lexical, collection, capsys):
    from predictor import evaluate

    with pytest.raises(ValueError, match="not prompts: give it as --rereader"):
        LengthPredictor.from_pretrained(trained_states)
    words = ["--predictor", str(lexical), "--data", str(collection[0]), "--states", "x"]
    assert evaluate.main(words) == 1
    assert "--states needs a --predictor of --backbone states" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--head", "bucket"], "--backbone states needs --head distribution; got bucket"),
        (["--train_path", "a.jsonl,b.jsonl"], "needs one file as --train_path"),
        (["--train_type", "lora"], "--backbone states has no weights for --train_type lora"),
        (["--state_layers", "0"], "--state_layers must be whole numbers from 1"),
        (["--state_dropout", "1"], r"--state_dropout must be in \[0, 1\)"),
        (["--state_units", "5000"], "--state_units must be from 0 to 4,096"),
        (["--states", ""], "--backbone states needs --states"),
    ],
)
def test_flags_that_do_not_fit(states_flags, train, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        train(states_flags(tmp_path / "out", *words))
    import re

    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--states", "nowhere"], "--states nowhere: there is no states.json"),
        (["--state_layers", "4"], "--state_layers: wanted layer 4; the states are of 2, 3"),
        (["--length_limit", "100"], "--length_limit 100 is below 128, the cap"),
        (["--served_model", "another"], "the states of .* are of 'clock'"),
        (["--state_pooling", "entropy"], "collected without --state_entropy"),
    ],
)
def test_data_that_do_not_fit(states_flags, train, tmp_path, words, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        train(states_flags(tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_states_of_more_answers_than_lengths(states_flags, collection, train, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text("".join(collection[0].read_text().splitlines(keepends=True)[:50]))
    with pytest.raises(ValueError, match="states of line 160, and 50 lines: they are of two"):
        train(states_flags(tmp_path / "out", "--train_path", short))


@pytest.mark.parametrize(
    "more, said",
    [
        (["--data", "{tmp}/short.jsonl"], "short.jsonl: there are states of line 160, and 50"),
        (["--states", "{tmp}/states"], "answers were cut at 256 tokens, those that the predictor"),
        (["--threads", "2"], "--threads is of --prior, which is not given"),
        (["--on_bad_row", "skip"], "--on_bad_row needs a predictor of prompts"),
        (["--batch_size", "8"], "--batch_size needs a predictor of prompts"),
        (["--json", "{tmp}"], "is a folder: name a file"),
    ],
)
def test_evaluations_that_do_not_fit(trained_states, collection, tmp_path, capsys, more, said):
    from predictor import evaluate

    lines = collection[0].read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(lines[:50]))
    states = write_states(tmp_path / "states", make_arrays(list(map(json.loads, lines))), cap=256)
    assert states.is_dir()
    words = ["--predictor", trained_states, "--data", collection[0], "--states", collection[1]]
    assert evaluate.main([str(word).format(tmp=tmp_path) for word in [*words, *more]]) == 1
    assert said in capsys.readouterr().err


def test_a_bucket_without_readings_in_the_other_folds():
    none = np.zeros((0, 3))
    readings = Readings(*[np.zeros(0)] * 6, np.zeros((0, 2)))
    conformal, crps = fit_map(Posteriors(np.zeros((0, 4)), none), readings, CAP)
    assert conformal.raw == (0.0, 1.0) and crps == np.inf


def test_the_benchmark_in_miniature(tmp_path, capsys):
    from benchmarks import rereading

    lengths, states = write_collection(tmp_path, 60, runs=2, seed=4)
    report, picture = tmp_path / "figures.json", tmp_path / "reread.png"
    words = ["--lengths", lengths, "--states", states, "--length_limit", 512, "--json", report]
    words += ["--picture", picture]
    words += ["--ablations", "pool", "every", "runs", "--state_units", 0, *SHORT[:2], *SHORT[4:]]
    assert rereading.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(report.read_text())
    assert figures["places"]["32"]["posterior"]["crps"] < figures["places"]["32"]["prior"]["crps"]
    assert figures["half_way"]["answers"] > 20
    names = [row[0] for row in figures["ablations"]]
    assert "pooled with the answer's last posterior (TRAIL)" in names
    assert "the median of a prompt's answers as label" in names
    for name in names[1:]:
        assert name in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_buckets_have_enough_readings():
    at = np.repeat([0, 64, 128, 192, 256, 320], [150, 300, 160, 90, 60, 20])
    assert bucket_starts(at).tolist() == [0, 64, 128, 192]
    assert bucket_starts(np.repeat([0, 64], [30, 9])).tolist() == [0, 64]
