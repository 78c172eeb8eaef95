"""The rows of a task: files below the data folder that the user names. Free of torch."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatglm.files import shorten
from finetune.benchmark.questions import Doc
from finetune.benchmark.tasks import BenchmarkTask
from finetune.rows.formats import BadRow
from finetune.rows.sources import LINE_LIMIT, good_items, read_file_items, text_lines

# Where a split of a hub's data set lies: as its authors pack it, then as a hub's clone has it.
PLACES = (
    "{split}/{name}_{split}.csv",
    "{split}/{name}.csv",
    "{name}/{split}.jsonl",
    "{name}/{split}.csv",
    "{name}/{split}-00000-of-00001.parquet",
)
MMLU = "cais/mmlu"  # whose own files are tables without a header
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
LETTERS = "ABCD"


def split_file(task: BenchmarkTask, split: str, folder: Path) -> Path:
    """The file of a split below the data folder.

    Raises:
        FileNotFoundError: it is not there; the message says where it was looked for.
        ValueError: the task has no such split.
    """
    if task.data_files:
        if split not in task.data_files:
            raise ValueError(f"{task.file}: data_files has no split {split!r}")
        places = [task.data_files[split]]
        roots = [folder]
    else:
        places = []
        for place in PLACES:
            places.append(place.format(split=split, name=task.dataset_name or "default"))
        roots = [folder / task.dataset_path.rpartition("/")[2], folder]
    for root in roots:
        for place in places:
            if (root / place).is_file():
                return root / place
    looked = ", ".join(places)
    owner = "" if task.data_files else f" of {task.dataset_path}"
    raise FileNotFoundError(
        f"{task.name}: no rows of the split {split!r}{owner}: looked for {looked} in {folder}"
    )


def read_docs(task: BenchmarkTask, split: str, folder: Path) -> list[Doc]:
    """The rows of a split, as the task's templates expect them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that cannot be read, or none.
    """
    file = split_file(task, split, folder)
    headless = task.dataset_path == MMLU and file.suffix == ".csv"
    items = read_mmlu(file) if headless else read_file_items(file)
    docs: list[Doc] = []
    for place, item in good_items(items):
        if not isinstance(item, dict):
            raise ValueError(f"{place}: wanted an object, got {shorten(item)}")
        docs.append(item)
    if not docs:
        raise ValueError(f"{file}: no rows")
    return docs


def read_mmlu(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of MMLU's own files, with the columns that its data set on the hub has.

    Raises ValueError for a row of other than six cells, or whose answer is no letter.
    """
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(text_lines(file), strict=True)
    try:
        for cells in reader:
            place = f"{file}:{reader.line_num}"
            row = dict(zip(MMLU_COLUMNS, cells))
            if len(cells) != len(MMLU_COLUMNS) or row["answer"] not in tuple(LETTERS):
                got = shorten(cells)
                wanted = "question, four choices and the letter of the right one"
                raise ValueError(f"{place}: wanted {wanted}; got {got}")
            choices = [row[letter] for letter in LETTERS]
            answer = LETTERS.index(row["answer"])
            yield place, {"question": row["question"], "choices": choices, "answer": answer}
    except csv.Error as error:
        raise BadRow(f"{file}:{reader.line_num}: not valid CSV: {error}") from None
