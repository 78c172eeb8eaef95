"""python -m finetune.marks: a sheet for marks by hand, and its sum by the rubric."""

import csv
import io
import json
from pathlib import Path

import pytest

from finetune.evaluation.marking import CRITERIA, main, read_marks, sum_marks


@pytest.fixture
def sheet(tmp_path) -> Path:
    """The sheet of two documents with four questions each."""
    rows = []
    for number in range(2):
        answers = [f'问题{number}{n}，"是"什么？\n' for n in range(4)]
        rows.append({"prompt": f"文档{number}", "answer": answers, "reference": ["?"]})
    predictions = tmp_path / "answers.jsonl"
    predictions.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "sheet.csv"
    assert main(["--predictions", str(predictions), "--sheet", str(path)]) == 0
    return path


def mark(sheet: Path, **marks: dict[int, str]) -> None:
    """Fill in a sheet: {column: {row: mark}}."""
    rows = list(csv.DictReader(io.StringIO(sheet.read_text("utf-8-sig"), newline="")))
    for column, values in marks.items():
        for row, value in values.items():
            rows[row][column] = value
    with sheet.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_has_every_question(sheet, capsys):
    rows = list(csv.DictReader(io.StringIO(sheet.read_text("utf-8-sig"), newline="")))
    assert len(rows) == 8 and rows[5]["prompt"] == "文档1" and rows[5]["document"] == "2"
    assert rows[5]["answer"] == '问题11，"是"什么？\n' and rows[5]["harmful"] == ""
    assert main(["--marked", str(sheet)]) == 1
    assert "no document has been read: put 1 in column read" in capsys.readouterr().err


def test_marks_add_up_by_the_rubric(sheet, capsys):
    """A quarter of a point for each fault; a document that is not read to its end is left out."""
    mark(sheet, read=dict.fromkeys(range(7), "1"), harmful={7: "1"})
    mark(sheet, near_duplicate={1: "1", 2: "x"}, answer_repeats={3: "1"}, not_fluent={0: "1.0"})
    assert sum_marks(read_marks(sheet)) == (1, 0.75, 0.25, 4.0)
    mark(sheet, read={7: "1"})
    assert sum_marks(read_marks(sheet)) == (2, 0.375, 0.25, 4.375)
    assert main(["--marked", str(sheet)]) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[-4:] == ["2/2", "-0.375", "-0.250", "4.375"]


def test_all_faults_leave_nothing(sheet):
    every = dict.fromkeys(range(8), "1")
    mark(sheet, read=every, **dict.fromkeys(CRITERIA, every))
    assert sum_marks(read_marks(sheet))[3] == 0.0


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text.replace("harmful", "bad"), "sheet.csv:1: no column 'harmful'"),
        (lambda text: text.splitlines()[0], "no rows"),
        (lambda text: "", "sheet.csv:1: no column 'document'"),
        (lambda text: text + "3,half\r\n", "sheet.csv:18: wanted 9 cells, as the header has"),
        (lambda text: text + '3,"half', "not valid CSV: unexpected end of data"),
        (lambda text: text.replace(",,,,,", ",maybe,,,,", 1), "read: wanted 1, or 0 or nothing"),
    ],
)
def test_a_wrong_sheet_is_one_line(sheet, capsys, change, said):
    sheet.write_text(change(sheet.read_text("utf-8-sig")), encoding="utf-8")
    capsys.readouterr()
    assert main(["--marked", str(sheet)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error


def test_a_sheet_is_not_overwritten_and_rows_are_checked(sheet, tmp_path, capsys):
    predictions = tmp_path / "answers.jsonl"
    words = ["--predictions", str(predictions), "--sheet", str(sheet)]
    before = sheet.read_bytes()
    assert main(words) == 1 and "is there already" in capsys.readouterr().err
    assert sheet.read_bytes() == before
    predictions.write_text('{"prompt": "a", "answer": 3}\n')
    words[-1] = str(tmp_path / "new.csv")
    assert main(words) == 1 and not (tmp_path / "new.csv").exists()
    error = capsys.readouterr().err
    assert "answers.jsonl" in error and "wanted finetune.evaluate's prompt and answer" in error
    for wrong in (words[:2], ["--marked", str(sheet), "--documents", "2"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_blank_rows_and_long_documents(sheet):
    """A spreadsheet leaves blank rows; a document may be longer than csv's limit of a cell."""
    with sheet.open("a", encoding="utf-8", newline="") as file:
        file.write(f'3,"{"文" * 140_000}",a,1,,,,,\r\n,,,,,,,,\r\n')
    limit = csv.field_size_limit(131_072)
    assert list(read_marks(sheet)) == ["1", "2", "3"]
    csv.field_size_limit(limit)


@pytest.mark.parametrize(
    "row, said",
    [("{bad", "answers.jsonl:1: not valid JSON"), ('{"prompt": "\\ud800", "answer": "a"}', "half")],
)
def test_predictions_that_are_none(row, said, tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text(row)
    words = ["--predictions", str(tmp_path / "answers.jsonl"), "--sheet", str(tmp_path / "s.csv")]
    assert main(words) == 1 and not (tmp_path / "s.csv").exists()
    error = capsys.readouterr().err
    assert error.startswith("finetune.marks: error: --predictions ") and said in error


def test_some_documents(tmp_path, sheet):
    words = ["--predictions", str(tmp_path / "answers.jsonl"), "--documents", "1"]
    assert main([*words, "--sheet", str(tmp_path / "one.csv")]) == 0
    [document] = read_marks(tmp_path / "one.csv").values()
    assert document.questions == 4 and document.unread == 4
