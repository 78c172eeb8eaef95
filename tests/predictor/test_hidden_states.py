"""The folder of hidden states: what is read, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from predictor.hidden_states import pool_states, read_hidden_states
from predictor.readings import AnswerLines, join_readings
from tests.predictor.states_folder import (
    EVERY,
    HIDDEN,
    SERVED,
    make_answers,
    make_arrays,
    write_states,
)

ROWS = make_answers(6, seed=3)


def test_shards_are_one_array_in_order(tmp_path):
    arrays = make_arrays(ROWS)
    write_states(tmp_path, arrays, shards=3)
    states = read_hidden_states(tmp_path)
    for name, values in arrays.items():
        assert np.array_equal(getattr(states, name), values), name
    assert (states.layers, states.every, states.hidden_size) == ((2, 3), EVERY, HIDDEN)


@pytest.mark.parametrize(
    "pooling, layers, width",
    [("last", (), 2), ("mean", (3,), 1), ("both", (2,), 2), ("both", (), 4), ("entropy", (3,), 2)],
)
def test_vectors(tmp_path, pooling, layers, width):
    arrays = make_arrays(ROWS)
    arrays["entropy"] = arrays["mean"] + 1
    states = read_hidden_states(write_states(tmp_path, arrays))
    vectors = states.vectors(pooling, layers)
    assert vectors.shape == (len(states), width * HIDDEN) and vectors.dtype == np.float32
    if pooling == "entropy":
        assert np.array_equal(vectors[:, HIDDEN:], arrays["entropy"][:, 1])
    if pooling == "last":
        assert np.array_equal(vectors[:, :HIDDEN], arrays["last"][:, 0])


def test_pooling_of_an_engine_is_that_of_a_folder(tmp_path):
    states = read_hidden_states(write_states(tmp_path, make_arrays(ROWS)))
    given = pool_states(states.last[:, 1:], states.mean[:, 1:], "both")
    assert np.array_equal(given, states.vectors("both", (3,)))


def test_states_that_are_not_there_are_refused(tmp_path):
    states = read_hidden_states(write_states(tmp_path, make_arrays(ROWS)))
    with pytest.raises(ValueError, match="--state_layers: wanted layer 7; the states are of 2, 3"):
        states.vectors("both", (2, 7))
    with pytest.raises(ValueError, match="collected without --state_entropy"):
        states.vectors("entropy")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no states.json"):
        read_hidden_states(tmp_path)
    write_states(tmp_path, make_arrays(ROWS), shards=1)
    (tmp_path / "states-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="there is no states-"):
        read_hidden_states(tmp_path)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"version": 2}, "version 2, this program reads up to 1"),
        ({"version": None}, "no version"),
        ({"every": 0}, "every must be a whole number above 0, got 0"),
        ({"layers": []}, "layers must be whole numbers"),
        ({"layers": [2, 3, 4]}, r"last must be \(\d+, 3, 12\)"),
        ({"served_model": 3}, "served_model must be text"),
        ({"every": 24}, "a row was read at 16 tokens, wanted multiples of 24"),
        ({"cap": 32}, "below 32"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, said):
    write_states(tmp_path, make_arrays(ROWS), **settings)
    with pytest.raises(ValueError, match=said):
        read_hidden_states(tmp_path)


def edit_shard(folder, edit):
    file = folder / "states-00001.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda t: t.pop("mean"), "there is no tensor 'mean'"),
        (lambda t: t.update(at=t["at"][:-1]), "must be"),
        (lambda t: t["last"].__setitem__(0, np.nan), "not finite"),
        (lambda t: t.update(at=t["at"].astype(np.float32)), "at must not be float32"),
        (lambda t: t.update(last=t["last"].astype(np.int16)), "last must not be int16"),
        (lambda t: t["answer"].__setitem__(0, -1), "a row is of line"),
        (lambda t: t["at"].__setitem__(1, 0), "two rows of the same place"),
    ],
)
def test_damaged_shards(tmp_path, edit, said):
    folder = write_states(tmp_path, make_arrays(ROWS))
    edit_shard(folder, edit)
    with pytest.raises(ValueError, match=said):
        read_hidden_states(folder)


def test_states_weighted_by_entropy_are_finite_too(tmp_path):
    arrays = make_arrays(ROWS)
    arrays["entropy"] = np.full_like(arrays["mean"], np.inf)
    with pytest.raises(ValueError, match=r"a state is not finite \(entropy\)"):
        read_hidden_states(write_states(tmp_path, arrays))


def test_a_torn_shard_is_named(tmp_path):
    folder = write_states(tmp_path, make_arrays(ROWS))
    file = folder / "states-00002.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="states-00002.safetensors: cannot be read"):
        read_hidden_states(folder)
    file.unlink()
    with pytest.raises(ValueError, match="the lengths file has 2"):
        read_hidden_states(folder, answers=2)


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lengths_and_states_are_joined_by_line(tmp_path):
    rows = make_answers(4, runs=2, seed=1)
    other = {"prompt": rows[0]["prompt"], "output_tokens": 9, "served_model": "another"}
    rows.insert(1, other)
    arrays = make_arrays([row | {"finished": row.get("finished", True)} for row in rows])
    states = read_hidden_states(write_states(tmp_path / "states", arrays))
    file = tmp_path / "lengths.jsonl"
    write_lines(file, rows)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    lines = AnswerLines.read(file, prompts, SERVED, SERVED)
    readings = join_readings(states, lines, "both", (), file)
    assert 1 not in readings.answer  # the other model's line
    for prompt, answer, tokens in zip(readings.prompt, readings.answer, readings.tokens):
        assert rows[answer]["prompt"] == prompts[prompt]
        assert rows[answer]["output_tokens"] == tokens
    first = readings.at == 0
    assert readings.weights[first].tolist() == [0.5] * 8  # two answers a prompt


def test_lengths_of_another_collection_are_refused(tmp_path):
    rows = make_answers(4, seed=1)
    states = read_hidden_states(write_states(tmp_path / "states", make_arrays(rows)))
    longest = int(np.argmax([row["output_tokens"] for row in rows]))
    rows[longest]["output_tokens"] = EVERY
    file = tmp_path / "lengths.jsonl"
    write_lines(file, rows)
    lines = AnswerLines.read(file, [row["prompt"] for row in rows], SERVED, SERVED)
    with pytest.raises(ValueError, match=f"lengths.jsonl:{longest + 1}: .* two collections"):
        join_readings(states, lines, "both", (), file)
