"""scripts/prepare_requests.py: objectives and measured lengths in a user's list."""

import json
import math

import pytest

from predictor.labels import Label
from scripts.prepare_requests import label_of, main
from serving.run_requests.listed import read_request_list

RANGES = [(220, 250), (180, 220), (150, 180), (100, 120), (90, 100)]  # dataset/deal.py's


def write_rows(folder, rows, name="rows.json"):
    path = folder / name
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


def prepared(rows, output, *words):
    assert main([str(word) for word in (rows, "--output", output, *words)]) == 0
    text = output.read_text("utf-8")
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def test_objectives_by_place(tmp_path):
    given = [{"instruction": f"{place}?", "input": "", "output": "x"} for place in range(120)]
    given[3]["SLO"] = 7
    path = write_rows(tmp_path, given)
    rows = prepared(path, tmp_path / "out.json")
    for place, row in enumerate(rows):
        low, high = RANGES[place // 20] if place < 100 else (150, 300)
        if place != 3:
            assert low <= row["SLO"] <= high and isinstance(row["SLO"], int)
        assert {key: row[key] for key in given[place] if key != "SLO"} == {
            key: value for key, value in given[place].items() if key != "SLO"
        }
    assert rows[3]["SLO"] == 7
    again = prepared(path, tmp_path / "again.jsonl", "--overwrite")
    assert again[3]["SLO"] >= 220 and again[:3] + again[4:] == rows[:3] + rows[4:]
    other = prepared(path, tmp_path / "other.json", "--seed", 1)
    assert other != rows and other[3] == rows[3]
    fixed = prepared(path, tmp_path / "fixed.json", "--slo_s", 2.5, "--overwrite")
    assert {row["SLO"] for row in fixed} == {2.5}


def test_empty_cells_have_no_objective(tmp_path):
    """NaN, as tables have it, is no SLO; half a surrogate pair costs no other row."""
    given = [{"prompt": "a", "SLO": math.nan}, {"prompt": "b\ud800"}]
    rows = prepared(write_rows(tmp_path, given), tmp_path / "o.jsonl", "--slo_s", 2.5)
    assert rows == [{"prompt": "a", "SLO": 2.5}, {"prompt": "b\ud800", "SLO": 2.5}]


def test_lengths_of_what_was_measured(tmp_path):
    """UELLM's label of several answers; run_requests reads what is written."""
    rows = write_rows(tmp_path, [{"instruction": "a", "input": "b"}, {"prompt": "c", "length": 4}])
    measured = []
    for prompt, tokens in (("ab", 10), ("ab", 21), ("c", 9)):
        line = {"prompt": prompt, "output_tokens": tokens, "served_model": "m", "finished": True}
        measured.append(line)
    lengths = write_rows(tmp_path, measured, "lengths.jsonl")
    out = tmp_path / "out.jsonl"
    first, second = prepared(rows, out, "--lengths", lengths)
    assert first["length"] == 19 and second["length"] == 4  # ceil(ceil(15.5) / 2 + 21 / 2)
    assert [row.length for row in read_request_list(out)] == [19, 4]
    uellm = prepared(rows, tmp_path / "u.json", "--lengths", lengths, "--length_key", "output")
    assert [row["output"] for row in uellm] == [19, 9]
    more = ("--lengths", lengths, "--overwrite")
    assert prepared(rows, tmp_path / "o.json", *more)[1]["length"] == 9


def test_the_label():
    assert label_of([Label(0, "m")]) == 1 and label_of([Label(5, "m")]) == 5
    runs = [Label(tokens, "m") for tokens in (100, 103, 110)]  # mean 104.3
    assert label_of(runs) == 108


@pytest.mark.parametrize(
    "rows, words, said",
    [
        ([], [], "no requests in it"),
        ([{"input": ""}], [], '[0]: wanted an "instruction"'),
        (["a"], [], "wanted an object"),
        ([{"prompt": "a", "SLO": -1}], [], '"SLO" must be seconds'),
        ([{"prompt": "x"}], ["--lengths", "{lengths}"], "[0]: its prompt is not among"),
        ([{"prompt": "a"}], ["--served_model", "m"], "--served_model needs --lengths"),
        ([{"prompt": "a"}], ["--slo_s", "0"], "--slo_s"),
        ([{"prompt": "a"}], ["--lengths", "{several}"], "lengths of m, n: name one by"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, rows, words, said):
    measured = [{"prompt": "a", "output_tokens": 3, "served_model": "m"}]
    lengths = write_rows(tmp_path, measured, "lengths.jsonl")
    more = [*measured, {"prompt": "a", "output_tokens": 3, "served_model": "n"}]
    several = write_rows(tmp_path, more, "several.jsonl")
    words = [word.format(lengths=lengths, several=several) for word in words]
    output = tmp_path / "out.json"
    try:
        code = main([str(write_rows(tmp_path, rows)), "--output", str(output), *words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code and said in error and error.count("\n") == 1 and not output.exists()
