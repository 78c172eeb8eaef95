"""benchmarks/smollm2.py and length_serving.py: what they read, and what is made again."""

import json
from functools import partial

import pytest

from benchmarks.length_serving import main as serve
from benchmarks.length_serving import read_collected
from benchmarks.smollm2 import Results, read_prompts
from benchmarks.smollm2 import main as smollm2


def test_a_result_is_made_again_of_other_flags(tmp_path):
    """And one whose making failed is not there."""
    made = []
    for count in (10, 10, 20):
        Results(tmp_path).make("lengths", ["--count", count], partial(made.append, count))
    assert made == [10, 20]

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError):
        Results(tmp_path).make("lengths", ["--count", 30], fail)
    assert json.loads((tmp_path / "made.json").read_text()) == {"lengths": ["--count", "20"]}


def test_prompts_of_every_form(tmp_path):
    file = tmp_path / "prompts.json"
    rows = [{"prompt": "a b"}, {"instruction": "a", "input": " b"}, {"text": "c", "lang": "en"}]
    file.write_text(json.dumps([*rows, {"prompt": "你好", "lang": "zh"}]))
    assert read_prompts(file) == ["a b", "c"]


@pytest.mark.parametrize(
    "content, said", [("[1]", "wanted an object"), ('{"x": 1}', "no key"), ("{", "not valid JSON")]
)
def test_prompts_that_are_none(tmp_path, capsys, content, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    words = ["--prompts", file, "--output", tmp_path / "out", "--model", tmp_path]
    assert smollm2([str(word) for word in words]) == 1
    err = capsys.readouterr().err
    assert err.startswith("smollm2: error: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]\n", '{"prompt": "a"}\n', '{"prompt'])
def test_lengths_that_were_not_collected(tmp_path, capsys, content):
    file = tmp_path / "lengths.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="lengths.jsonl"):
        read_collected(file)
    words = ["--model", "m", "--predictor", "p", "--lengths", file, "--cells", tmp_path / "c"]
    assert serve([str(word) for word in words]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_numbers_are_one_line(tmp_path, capsys):
    words = ["--model", "m", "--predictor", "p", "--lengths", "l", "--cells", "c", "--loads", "1,x"]
    for main, flags, said in ((serve, words, "--loads"), (smollm2, ["--count", "0"], "--count")):
        with pytest.raises(SystemExit) as left:
            main(flags)
        err = capsys.readouterr().err
        assert left.value.code == 2 and said in err and err.count("\n") == 1
