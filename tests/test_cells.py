"""benchmarks/cells.py: kept rows, what is missing of them, and tables of means."""

import pytest

from benchmarks.cells import (
    KeptCells,
    changes,
    compared_lines,
    in_turns,
    print_table,
    shown_mean,
)

CELLS = [{"name": name, "seed": seed} for seed in range(2) for name in "ab"]


def test_what_is_there_is_not_run_again(tmp_path, capsys):
    path = tmp_path / "new" / "cells.jsonl"
    kept = KeptCells(path, {"rows": 3}, ["speed"])
    assert kept.note("speed", lambda: {"speed": 2.0}) == {"speed": 2.0}
    kept.run_missing(CELLS[:2], lambda cell: {"value": cell["seed"] + 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"name": "a", "se')  # a run that was killed
    kept = KeptCells(path, {"rows": 3}, ["speed"])
    assert kept.note("speed", dict) == {"speed": 2.0} and kept.missing(CELLS) == CELLS[2:]
    run = []
    rows = kept.run_missing(CELLS, lambda cell: run.append(cell) or {"value": 0}, describe=str)
    assert run == CELLS[2:] and len(rows) == 4 and rows[0] == CELLS[0] | {"value": 1}
    assert capsys.readouterr().err.startswith("1/2 {'name': 'a', 'seed': 1, 'value': 0}\n2/2 ")
    assert KeptCells(path, {"rows": 3}, ["speed"]).rows == rows


def test_no_cell_is_begun_after_the_minutes(tmp_path, capsys):
    kept = KeptCells(tmp_path / "cells.jsonl")
    assert kept.run_missing(CELLS, lambda cell: {}, minutes=-1) == []
    assert capsys.readouterr().err == "4 cells are left\n"


def test_a_file_appears_with_its_first_row(tmp_path):
    """Flags that are refused after it was opened leave no file of other settings."""
    path = tmp_path / "cells.jsonl"
    KeptCells(path, {"rows": 3})
    assert not path.exists()
    KeptCells(path, {"rows": 4}).add(CELLS[0])
    assert KeptCells(path, {"rows": 4}).rows == CELLS[:1]


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"rows": 4}\n', "made with other settings; name another file"),
        ('{"rows": 3}\n[1]\n', "cells.jsonl:2: wanted a JSON object; got b'[1]'"),
        ('{"rows": 3}\n{"na\n', "cells.jsonl:2: wanted a JSON object"),
    ],
)
def test_another_file_is_refused(tmp_path, text, said):
    path = tmp_path / "cells.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^--cells .*") as error:
        KeptCells(path, {"rows": 3})
    assert said in str(error.value) and path.read_text() == text


def test_tables(capsys):
    assert shown_mean([]) == "" and shown_mean([1.0, 2.0]) == "1.5"
    assert shown_mean([1.0, 2.0, 3.0]) == "2 ± 2.5"  # Student's t: 4.303 / sqrt(3)
    runs = {0: {"s": 3.0}, 1: {"s": 1.0}, 2: {"s": 1.0}}
    assert changes(runs, {0: {"s": 2.0}, 1: {"s": 2.0}}, "s") == [50.0, -50.0]
    assert [in_turns("abc", turn) for turn in (0, 1, 5)] == [list("abc"), list("bca"), list("cab")]
    print_table(["x", "y"], [["1", "2"]])
    assert capsys.readouterr().out == "| x | y |\n|---|---|\n| 1 | 2 |\n"


def test_lines_of_what_takes_turns():
    """Means over repetitions, in per cent where asked, and changes of the pairs there are."""
    rows = []
    for policy, repetition, seconds in (("fcfs", 0, 2.0), ("sjf", 0, 1.0), ("sjf", 1, 4.0)):
        cell = {"policy": policy, "repetition": repetition}
        rows.append(cell | {"mean_s": seconds, "in_time": 0.5})
    shown = {"mean s": "mean_s", "in time %": "in_time"}
    lines = compared_lines(rows, "policy", shown, ["mean_s"])
    assert lines == [["fcfs", "1", "2", "50", "+0"], ["sjf", "2", "2.5", "50", "-50"]]
