"""collect_lengths.py --states: states beside their lengths, resumed, refused in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from chatglm import load_model, load_tokenizer
from finetune.evaluation.generation import encode_prompts
from scripts.collect_lengths import main
from serving.engines.bodies import decoder_layers
from serving.engines.state_shards import StateFolder
from serving.engines.state_tap import StateReading
from tests.predictor.test_collect import PROMPTS, SAMPLED, in_order, rows_of

CAP, EVERY, LAYERS = 12, 4, [1, 2, 3]


@pytest.fixture(scope="module")
def folder(tiny_folders, tmp_path_factory):
    """A model that ends some of its answers before the cap."""
    model = load_model(tiny_folders["glm2"], dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_folders["glm2"])
    with torch.no_grad():
        model.transformer.output_layer.weight[tokenizer.get_command("</s>")] *= 1.5
    folder = tmp_path_factory.mktemp("made") / "served"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def collect(folder, tmp_path):
    """collect(*flags) -> exit code; writes lengths.jsonl and states/."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def run(*more, states=True) -> int:
        words = ["--model_path", folder, "--prompts", prompts, "--device", "cpu"]
        words += ["--output", tmp_path / "lengths.jsonl", "--max_new_tokens", CAP]
        words += ["--batch_size", 4]
        if states:
            words += ["--states", tmp_path / "states", "--state_every", EVERY]
            words += ["--state_layers", "3,1,2"]
        return main([str(word) for word in [*words, *more]])

    return run


def states_of(folder) -> dict[str, np.ndarray]:
    """The rows of all shards, in order."""
    shards = [load_file(path) for path in sorted(folder.glob("states-*.safetensors"))]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def test_states_of_every_line(collect, folder, tmp_path):
    """At the prompt's end and every few tokens before the answer's: those of a plain pass."""
    assert collect("--state_entropy", "--keep_answers") == 0
    rows = rows_of((tmp_path / "lengths.jsonl").read_bytes())
    states = states_of(tmp_path / "states")
    assert json.loads((tmp_path / "states" / "states.json").read_text()) == {
        "version": 1,
        "served_model": "served",
        "weights": rows[0]["settings"]["weights"],
        "hidden_size": 40,
        "layers": LAYERS,
        "every": EVERY,
        "cap": CAP,
        "entropy": True,
    }
    wanted = []
    for number, row in enumerate(rows):
        ats = [at for at in range(0, CAP, EVERY) if at == 0 or at < row["output_tokens"]]
        wanted += [(number, at) for at in ats]
    assert list(zip(states["answer"].tolist(), states["at"].tolist())) == wanted
    assert {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in states.items()} == {
        "answer": (np.int64, ()),
        "at": (np.int32, ()),
        "last": (np.float16, (3, 40)),
        "mean": (np.float16, (3, 40)),
        "entropy": (np.float16, (3, 40)),
    }
    assert {row["finished"] for row in rows} == {True, False}
    check_prompts(folder, rows, states)


def check_prompts(folder, rows, states):
    """The rows at 0 against the model's own pass over each prompt."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    encoded = encode_prompts(tokenizer, [row["prompt"] for row in rows], 1024)
    seen = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    at_start = np.flatnonzero(states["at"] == 0)
    for place, encoding in zip(at_start, encoded):
        seen.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([encoding.input_ids]), use_cache=False)
        plain = torch.stack(seen).numpy()
        np.testing.assert_allclose(states["last"][place], plain[:, -1], atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(states["mean"][place], plain.mean(1), atol=2e-3, rtol=2e-3)


def test_greedy_lengths_are_those_of_batches(collect, tmp_path):
    """By both engines, and with states or without them."""
    output = tmp_path / "lengths.jsonl"
    found = []
    for states, more in ((True, ()), (False, ("--engine", "continuous")), (False, ())):
        assert collect("--keep_answers", *more, states=states) == 0
        found.append(in_order(rows_of(output.read_bytes())))
        output.unlink()
    tapped, continuous, batched = found
    assert tapped == continuous
    assert {row["settings"].pop("engine") for row in continuous} == {"continuous"}
    assert continuous == batched


def test_the_continuous_engine_is_stopped_and_gone_on_with(collect, tmp_path):
    sampled = [*SAMPLED, "--samples", "2", "--engine", "continuous"]
    assert collect(*sampled, states=False) == 0
    output = tmp_path / "lengths.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([*lines[:7], lines[7][:9]]))
    assert collect(*sampled, states=False) == 0
    again = output.read_bytes()
    assert again.splitlines(keepends=True)[:7] == lines[:7]
    assert in_order(rows_of(again)) == in_order(rows_of(b"".join(lines)))


def test_stopped_and_gone_on_with(collect, tmp_path):
    """Killed between lines, within one, between states and lines: the same rows in the end."""
    sampled = [*SAMPLED, "--samples", "2"]
    assert collect(*sampled) == 0
    output, folder = tmp_path / "lengths.jsonl", tmp_path / "states"
    lines = output.read_bytes().splitlines(keepends=True)
    wanted = in_order(rows_of(b"".join(lines)))
    whole = by_answer(lines, states_of(folder))
    for kept, torn in ((7, b""), (4, lines[5][:9]), (len(lines), b"")):
        start = [*lines[:kept], torn]
        output.write_bytes(b"".join(start))
        assert collect(*sampled) == 0
        lines = output.read_bytes().splitlines(keepends=True)
        assert lines[:kept] == start[:-1]
        assert in_order(rows_of(b"".join(lines))) == wanted
        again = by_answer(lines, states_of(folder))
        assert again.keys() == whole.keys()
        for key, values in whole.items():
            np.testing.assert_allclose(again[key], values, atol=2e-3, rtol=2e-3)


def by_answer(lines, states) -> dict:
    """{(prompt, sample, at): mean} of the rows."""
    found = {}
    for answer, at, mean in zip(states["answer"], states["at"], states["mean"]):
        row = json.loads(lines[answer])
        found[row["prompt"], row["sample"], int(at)] = mean
    assert len(found) == len(states["at"])
    return found


def reading_of(number: int, at: int) -> StateReading:
    states = np.full((2, 8), number + at / 100, np.float32)
    return StateReading(number, at, states, states)


def test_shards_are_full_in_turn(tmp_path):
    """Rows of an answer stay together; the newest shard grows until it is full."""
    about = {"every": 4}
    states = StateFolder(tmp_path, about, 0, shard_bytes=400)
    for number in range(5):
        states.add(number, [reading_of(number, at) for at in (0, 4)])
        if number % 2:
            states.flush()
    states.flush()
    sizes = [len(load_file(path)["at"]) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sizes == [4, 4, 2] and states_of(tmp_path)["answer"].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        *[3] * 2,
        4,
        4,
    ]
    # Answers 3 and 4 have lost their lines; then 3 is made anew.
    states = StateFolder(tmp_path, about, 3, shard_bytes=400)
    states.add(3, [reading_of(3, 0)])
    states.flush()
    assert states_of(tmp_path)["answer"].tolist() == [0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="has the states of 4 of the 6 answers of --output"):
        StateFolder(tmp_path, about, 6)


def test_states_of_another_output_stay(collect, tmp_path, holder, capsys):
    """They took hours; and while one command collects, a second one does not."""
    assert collect("--limit", 2) == 0
    shard = tmp_path / "states" / "states-00001.safetensors"
    before = shard.read_bytes()
    assert collect("--output", tmp_path / "other.jsonl") == 1
    assert "has states, and --output has no answers yet" in capsys.readouterr().err
    assert shard.read_bytes() == before
    for name, flag in (("lengths.jsonl", "--output"), ("states", "--states")):
        first = holder(tmp_path / f".{name}.writing")
        assert collect() == 1
        assert f"{flag} {tmp_path / name} is in use by another run" in capsys.readouterr().err
        first.kill()
        first.wait()
    shard.write_bytes(before[:-9])
    assert collect() == 1
    assert f"{shard}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        (["--state_every", "5"], "made with every 4, now it is 5; name another folder"),
        (["--state_layers", "2"], "made with layers [1, 2, 3], now it is [2]"),
        (["--state_layers", "2,9"], "layer 9 are wanted, the model has 3"),
        (["--states", "{tmp}/other"], "has 2 answers without states"),
        (["--max_new_tokens", "9"], "made with max_new_tokens 12, now it is 9"),
        (["--max_src_len", "77"], "made with max_src_len 1024, now it is 77"),
    ],
)
def test_other_settings_are_refused(collect, tmp_path, capsys, more, said):
    assert collect("--limit", 2) == 0
    before = (tmp_path / "lengths.jsonl").read_bytes()
    capsys.readouterr()
    assert collect(*(word.format(tmp=tmp_path) for word in more)) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "lengths.jsonl").read_bytes() == before
    assert collect("--limit", 2) == 0  # nothing is spoilt


def test_lines_of_the_other_kind_are_refused(collect, capsys):
    """Answers of generate() and of the engine are not mixed in one file."""
    assert collect("--limit", 2, states=False) == 0
    assert collect("--limit", 2) == 1
    assert "made with engine None, now it is 'continuous'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        (["--state_layers", "0"], "wanted layers from 1"),
        (["--state_layers", "a"], "wanted layers from 1"),
        (["--device", "0", "--devices", "cpu,cpu"], "--devices places replicas"),
        (["--engine", "static"], "--states: only --engine continuous reads hidden states"),
        (["--do_sample", "--temperature", "0"], "--temperature must be above 0"),
    ],
)
def test_wrong_flags_of_states(collect, capsys, more, said):
    with pytest.raises(SystemExit) as stop:
        collect(*more)
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_flags_without_states_are_refused(collect, capsys):
    for flag in (["--state_every", "4"], ["--state_layers", "1"], ["--state_entropy"]):
        with pytest.raises(SystemExit):
            collect(*flag, states=False)
        assert f"{flag[0]} is of --states DIR" in capsys.readouterr().err.splitlines()[-1]
