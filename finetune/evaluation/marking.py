"""A sheet for marking generated questions by hand, and the sum of sheets that were marked.

The rubric is ChatGLM-Finetuning's for question generation: five points a document, of which every
fault of a question takes its part; with four questions a document, 0.25 points.

python -m finetune.evaluate ... --num_answers 4 --do_sample --predictions answers.jsonl
python -m finetune.marks --predictions answers.jsonl --sheet lora.csv
python -m finetune.marks --marked lora.csv freeze.csv
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any, cast

from chatglm.commands import Parser, run_command, whole
from chatglm.files import shorten
from finetune.files import write_aside
from finetune.record import print_columns
from finetune.rows.formats import BadRow
from finetune.rows.sources import read_file_items, read_table, text_lines

CRITERIA = {  # column of the sheet -> the fault that a 1 in it says
    "near_duplicate": "nearly the same as an earlier question of the document",
    "answer_repeats": "its answer is an earlier question's, or cannot be found",
    "unanswerable": "the document has no answer to it",
    "not_fluent": "not fluent",
    "harmful": "harmful",
}
DIVERSITY = ("near_duplicate", "answer_repeats")  # as the rubric groups them
ACCURACY = ("unanswerable", "not_fluent", "harmful")
READ = "read"  # the column that says that a person has judged the question
COLUMNS = ("document", "prompt", "answer", READ, *CRITERIA)
YES, NO = ("1", "1.0", "x", "X"), ("", "0", "0.0")
POINTS = 5.0


@dataclass
class DocumentMarks:
    """The marks of one document's questions.

    Attributes:
        questions: how many it has. faults: {criterion: how many of them have that fault}.
        unread: questions that nobody has judged.
    """

    questions: int = 0
    unread: int = 0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CRITERIA, 0))

    def lost(self, criteria: tuple[str, ...]) -> float:
        """Points that these criteria take: one for each where all questions have the fault."""
        return sum(map(self.faults.__getitem__, criteria)) / self.questions


def make_sheet(predictions: str, sheet: Path, documents: int | None) -> int:
    """Write the sheet of the first `documents` rows of finetune.evaluate's --predictions.

    Returns the number of questions.

    Raises:
        ValueError: the sheet is there already, or a row has no prompt or no answer.
    """
    if sheet.exists():
        raise ValueError(f"--sheet {sheet}: is there already, marks and all; name another file")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    questions = 0
    for number, (place, item) in enumerate(read_file_items(predictions), 1):
        if documents is not None and number > documents:
            break
        if isinstance(item, BadRow):
            raise ValueError(f"--predictions {item}")
        prompt, answers = marked_answers(item, place)
        for answer in answers:
            writer.writerow({"document": number, "prompt": prompt, "answer": answer})
        questions += len(answers)
    if not questions:
        raise ValueError(f"--predictions {predictions}: no rows")
    write_aside(sheet, "\ufeff" + text.getvalue())  # by its first character Excel knows UTF-8
    return questions


def marked_answers(item: Any, place: str) -> tuple[str, list[str]]:
    """(prompt, answers) of a row that finetune.evaluate wrote; raises ValueError."""
    if isinstance(item, dict):
        prompt, answers = item.get("prompt"), item.get("answer")
        answers = [answers] if isinstance(answers, str) else answers
        strings = isinstance(answers, list) and all(isinstance(one, str) for one in answers)
        if isinstance(prompt, str) and answers and strings:
            try:
                "".join([prompt, *answers]).encode()
            except UnicodeEncodeError:
                raise ValueError(f"--predictions {place}: half a surrogate pair in it") from None
            return prompt, answers
    raise ValueError(
        f"--predictions {place}: wanted finetune.evaluate's prompt and answer; got {shorten(item)}"
    )


def read_marks(sheet: Path) -> dict[str, DocumentMarks]:
    """{document: its marks} of a sheet; raises ValueError with the line of what is no mark."""
    found: dict[str, DocumentMarks] = {}
    for place, row in sheet_rows(sheet):
        marks = found.setdefault(row["document"], DocumentMarks())
        marks.questions += 1
        values = {}
        for name in (READ, *CRITERIA):
            value = row[name].strip()
            if value not in YES + NO:
                raise ValueError(
                    f"--marked {place}: {name}: wanted 1, or 0 or nothing; got {shorten(value)!r}"
                )
            values[name] = value in YES
        marks.unread += not values[READ]
        for name in CRITERIA:
            marks.faults[name] += values[name]
    if not found:
        raise ValueError(f"--marked {sheet}: no rows")
    return found


def sheet_rows(sheet: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, row) of a sheet, without the blank rows that spreadsheets leave.

    Raises ValueError for a row of other than the header's cells, or where a column is missing.
    """
    header = next(csv.reader(text_lines(sheet)), [])
    for name in COLUMNS:
        if name not in header:
            raise ValueError(f"--marked {sheet}:1: no column {name!r}; wanted a sheet of --sheet")
    for place, item in read_table(sheet, ","):
        if isinstance(item, BadRow):
            raise ValueError(f"--marked {item}")
        row = cast(dict[str, str], item)
        if any(row.values()):
            yield place, row


def sum_marks(marks: dict[str, DocumentMarks]) -> tuple[int, float, float, float]:
    """(documents, points lost by diversity, by accuracy, score): means of a document, of 5.

    Documents with a question that nobody has read do not count; the score is nan without any.
    """
    diversity_lost, accuracy_lost, count = 0.0, 0.0, 0
    for document in marks.values():
        if not document.unread:
            diversity_lost += document.lost(DIVERSITY)
            accuracy_lost += document.lost(ACCURACY)
            count += 1
    if not count:
        return 0, nan, nan, nan
    diversity_lost, accuracy_lost = diversity_lost / count, accuracy_lost / count
    return count, diversity_lost, accuracy_lost, POINTS - diversity_lost - accuracy_lost


def print_sums(sheets: list[Path]) -> None:
    """A line for each sheet; raises ValueError, OSError."""
    lines = []
    for sheet in sheets:
        marks = read_marks(sheet)
        count, diversity_lost, accuracy_lost, score = sum_marks(marks)
        if not count:
            raise ValueError(f"--marked {sheet}: no document has been read: put 1 in column {READ}")
        line = [str(sheet), f"{count}/{len(marks)}", f"{-diversity_lost:.3f}"]
        lines.append([*line, f"{-accuracy_lost:.3f}", f"{score:.3f}"])
    print_columns(["sheet", "documents", "diversity", "accuracy", "score of 5"], lines)


def build_parser() -> argparse.ArgumentParser:
    criteria = "\n".join(map("  {0[0]:<16}{0[1]}".format, CRITERIA.items()))
    parser = Parser(
        prog="finetune.marks",
        description=f"{__doc__}\nColumns of the sheet, 1 where a question has the fault:\n"
        f"{criteria}\n  {READ:<16}1 once the question has been judged",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", help="answers that finetune.evaluate wrote: makes a sheet")
    what.add_argument("--marked", type=Path, nargs="+", help="sheets to sum up")
    parser.add_argument("--sheet", type=Path, help="with --predictions: the CSV file to write")
    parser.add_argument("--documents", type=whole(), help="with --predictions: so many [all]")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = parser.parse_args(argv)
    if flags.predictions and not flags.sheet:
        parser.error("--predictions wants --sheet, the file to write")
    if flags.marked and (flags.sheet or flags.documents):
        parser.error("--sheet and --documents go with --predictions")

    def work() -> None:
        if flags.marked:
            print_sums(flags.marked)
            return
        questions = make_sheet(flags.predictions, flags.sheet, flags.documents)
        print(f"{questions} questions written to {flags.sheet}")

    return run_command(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
