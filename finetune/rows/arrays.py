"""Encoded rows as flat arrays: 4 bytes a token, in memory or mapped from a file that ranks share.

The file is a safetensors file that is written as the rows come: the ids at once, what is small
beside them at the end. Free of torch.
"""

import json
import mmap
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from chatglm.conversations import IGNORED

HEADER = 4096  # bytes before the arrays; safetensors allows a header that ends in spaces
FLUSH = 1 << 18  # tokens that are held back before they are written
BLOCK = 1 << 24  # bytes that are summed at a time
CODES = {
    "q": ("I64", np.int64),
    "i": ("I32", np.int32),
    "f": ("F32", np.float32),
    "B": ("U8", np.uint8),
}
NUMBERED = re.compile(r"(.*?)(0|[1-9]\d{0,17})(\D*)", re.DOTALL)  # ":12", "[5]", ":data[7]"

# What is kept of the rows; the ids lead, then the widest, so that every array is aligned.
COLUMNS = {
    "ids": "i",  # of all rows, end to end; one more where they would be odd
    "starts": "q",  # where each row begins in `ids`, and where the last one ends
    "number": "q",  # of the row in its file; -1: none
    "labelled": "q",  # rows whose labels are not simply their ids after `n_masked`
    "learnt_starts": "q",  # where their bits begin in `learnt`, and where the last ones end
    "changed_starts": "q",
    "scored": "q",  # rows that have a score
    "n_masked": "i",
    "form": "i",  # of the row's place, by number in `forms`
    "changed_at": "i",  # tokens of a labelled row whose label is another id
    "changed_to": "i",
    "scores": "f",
    "learnt": "B",  # a bit a token of a labelled row: its label is its id
    "truncated": "B",
    "facts": "B",  # JSON: forms, and what the writer has to say
}


class EncodedRow(NamedTuple):
    """One training row: its first `n_masked` ids carry no loss.

    labels: as long as the ids, IGNORED where there is no loss; None where they are the ids after
    the first `n_masked`.
    score: of the answer, where rows are answers that are compared.
    """

    input_ids: list[int]
    n_masked: int
    truncated: bool
    labels: list[int] | None = None
    score: float | None = None

    @property
    def learns(self) -> bool:
        return self.n_masked < len(self.input_ids)


class Place(NamedTuple):
    """Where a row comes from: a file by its number, and what follows its name ("a.jsonl:12")."""

    file: int
    tail: str


@dataclass(frozen=True, eq=False)
class RowArrays:
    """Encoded rows as the arrays of COLUMNS; `names` are the files, `facts` the writer's."""

    columns: dict[str, np.ndarray]
    names: tuple[str, ...]
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["n_masked"])

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int32, a view."""
        start, stop = self.columns["starts"][row : row + 2].tolist()
        return self.columns["ids"][start:stop]

    def n_masked(self, row: int) -> int:
        return int(self.columns["n_masked"][row])

    def labels(self, row: int) -> np.ndarray | None:
        """(tokens,) int32, of a row that has labels of its own."""
        columns = self.columns
        labelled = columns["labelled"]
        number = int(np.searchsorted(labelled, row)) if len(labelled) else 0
        if number == len(labelled) or labelled[number] != row:
            return None
        ids = self.ids(row)
        start, stop = columns["learnt_starts"][number : number + 2].tolist()
        learnt = np.unpackbits(columns["learnt"][start:stop], count=len(ids)).astype(bool)
        labels = np.where(learnt, ids, np.int32(IGNORED))
        start, stop = columns["changed_starts"][number : number + 2].tolist()
        labels[columns["changed_at"][start:stop]] = columns["changed_to"][start:stop]
        return labels

    @cached_property
    def scores(self) -> np.ndarray:
        """(rows,) fp32, the score of each; 0 where it has none."""
        scores = np.zeros(len(self), np.float32)
        scores[self.columns["scored"]] = self.columns["scores"]
        return scores

    def place(self, row: int) -> str:
        """ "file:line", for messages."""
        file, before, after = self.facts["forms"][self.columns["form"][row]]
        number = int(self.columns["number"][row])
        return f"{self.names[file]}{before}{number if number >= 0 else ''}{after}"

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int32, tokens of each row."""
        return np.diff(self.columns["starts"]).astype(np.int32)

    @property
    def truncated(self) -> np.ndarray:
        """(rows,) bool."""
        return self.columns["truncated"].astype(bool)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The rows of several sources under one numbering.

    chosen: of each part, the rows of it that count; None: all.
    truncated, skipped: how many rows were cut, and how many do not count.
    """

    parts: tuple[RowArrays, ...]
    chosen: tuple[np.ndarray | None, ...]
    truncated: int = 0
    skipped: int = 0

    @cached_property
    def starts(self) -> list[int]:
        """The number of each part's first row, and of all rows."""
        starts = [0]
        for part, rows in zip(self.parts, self.chosen):
            starts.append(starts[-1] + len(part if rows is None else rows))
        return starts

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, row: int) -> tuple[RowArrays, int]:
        """The part of a row, and its number there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = bisect_right(self.starts, row) - 1
        number, chosen = row - self.starts[part], self.chosen[part]
        return self.parts[part], number if chosen is None else int(chosen[number])

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int32, a view."""
        part, number = self.find(row)
        return part.ids(number)

    def n_masked(self, row: int) -> int:
        """How many of the row's first ids carry no loss."""
        part, number = self.find(row)
        return part.n_masked(number)

    def labels(self, row: int) -> np.ndarray | None:
        """(tokens,) int32, IGNORED where there is no loss; None where they are the ids after the
        first `n_masked`.
        """
        part, number = self.find(row)
        return part.labels(number)

    def place(self, row: int) -> str:
        """ "file:line", for messages."""
        part, number = self.find(row)
        return part.place(number)

    def score(self, row: int) -> float:
        """The score of an answer; 0 where it has none."""
        part, number = self.find(row)
        return float(part.scores[number])

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """(rows,) int32, tokens of each row."""
        lengths = []
        for part, rows in zip(self.parts, self.chosen):
            lengths.append(part.lengths if rows is None else part.lengths[rows])
        return np.concatenate(lengths)


def chosen_rows(part: RowArrays, is_skip: bool = False) -> Dataset:
    """The rows of a part that have a label; with `is_skip` none that was cut."""
    truncated = part.truncated
    counts = part.columns["n_masked"] < part.lengths
    if is_skip:
        counts &= ~truncated
    rows = None if counts.all() else np.flatnonzero(counts).astype(np.int32)
    return Dataset((part,), (rows,), int(truncated.sum()), int(len(part) - counts.sum()))


def join_datasets(parts: Sequence[Dataset]) -> Dataset:
    """Several as one, in this order; nothing is copied."""
    arrays: list[RowArrays] = []
    chosen: list[np.ndarray | None] = []
    truncated = skipped = 0
    for data in parts:
        arrays += data.parts
        chosen += data.chosen
        truncated += data.truncated
        skipped += data.skipped
    return Dataset(tuple(arrays), tuple(chosen), truncated, skipped)


def dataset_of(rows: Iterable[tuple[str, EncodedRow]]) -> Dataset:
    """A Dataset of (place, encoded row)."""
    writer = RowWriter()
    for place, row in rows:
        writer.add(Place(0, place), row)
    part = writer.in_memory(("",), {})
    return Dataset((part,), (None,))


class RowWriter:
    """Collects encoded rows. With `file`, the ids go there as they come; little else is kept."""

    def __init__(self, file: BinaryIO | None = None):
        self.file, self.crc, self.tokens = file, 0, 0
        self.columns: dict[str, array[Any]] = {}
        for name, code in COLUMNS.items():
            self.columns[name] = array(code)
        for name in ("starts", "learnt_starts", "changed_starts"):
            self.columns[name].append(0)
        self.forms: dict[tuple[int, str, str], int] = {}
        if file is not None:
            file.write(bytes(HEADER))

    def add(self, place: Place, row: EncodedRow) -> None:
        columns = self.columns
        if row.labels is not None:
            self.add_labels(len(columns["n_masked"]), row)
        columns["ids"].extend(row.input_ids)
        self.tokens += len(row.input_ids)
        columns["starts"].append(self.tokens)
        if row.score is not None:
            columns["scored"].append(len(columns["n_masked"]))
            columns["scores"].append(row.score)
        columns["n_masked"].append(row.n_masked)
        columns["truncated"].append(row.truncated)
        found = NUMBERED.fullmatch(place.tail)
        before, number, after = found.groups() if found else (place.tail, "-1", "")
        columns["number"].append(int(number))
        columns["form"].append(self.forms.setdefault((place.file, before, after), len(self.forms)))
        if self.file is not None and len(columns["ids"]) >= FLUSH:
            self.write(columns["ids"])
            columns["ids"] = array(COLUMNS["ids"])

    def add_labels(self, number: int, row: EncodedRow) -> None:
        columns = self.columns
        ids, labels = np.array(row.input_ids, np.int32), np.array(row.labels, np.int32)
        learnt = ids == labels
        changed = np.flatnonzero(~learnt & (labels != IGNORED))
        columns["labelled"].append(number)
        columns["learnt"].extend(np.packbits(learnt).tolist())
        columns["learnt_starts"].append(len(columns["learnt"]))
        columns["changed_at"].extend(changed.tolist())
        columns["changed_to"].extend(labels[changed].tolist())
        columns["changed_starts"].append(len(columns["changed_at"]))

    def write(self, content: "array[Any]") -> None:
        """Raises ValueError without a file."""
        if self.file is None:
            raise ValueError("the rows are in memory: there is no file to write")
        self.file.write(content)
        self.crc = zlib.crc32(content, self.crc)

    def in_memory(self, names: tuple[str, ...], facts: dict[str, Any]) -> RowArrays:
        """The rows without a file, not copied."""
        columns = {}
        for name, code in COLUMNS.items():
            columns[name] = np.frombuffer(self.columns[name], CODES[code][1])
        return RowArrays(columns, names, facts | {"forms": list(self.forms)})

    def finish(self, key: str, facts: dict[str, Any]) -> None:
        """Write what is left. `key` says what the rows depend on, `facts` are JSON.

        Raises ValueError without a file.
        """
        if self.file is None:
            raise ValueError("the rows are in memory: there is no file to finish")
        columns = self.columns
        columns["facts"].frombytes(json.dumps(facts | {"forms": list(self.forms)}).encode())
        if self.tokens % 2:
            columns["ids"].append(0)
        sizes = []
        for name in COLUMNS:
            sizes.append(len(columns[name]))
            self.write(columns[name])
        sizes[0] = self.tokens + self.tokens % 2  # most of the ids have been written before
        metadata = {"key": key, "crc32": str(self.crc)}
        text = json.dumps({"__metadata__": metadata} | layout(sizes)).encode()
        self.file.seek(0)
        self.file.write((HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8))
        self.file.flush()


def map_rows(
    path: Path, names: tuple[str, ...], key: str, *, verify: bool = False
) -> RowArrays | None:
    """The rows of a file, mapped into memory.

    None where the file is not there, not whole or of another key; `verify` compares its checksum
    too, which reads it once.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = read_header(content[:HEADER], len(content))
            if header is None or header["__metadata__"]["key"] != key:
                return None
            if verify and header["__metadata__"]["crc32"] != checksum(file):
                return None
    except (OSError, ValueError):  # mmap's, of an empty file
        return None
    columns = {}
    for name, code in COLUMNS.items():
        (size,), (start, _) = header[name]["shape"], header[name]["data_offsets"]
        columns[name] = np.frombuffer(content, CODES[code][1], size, HEADER + start)
    return RowArrays(columns, names, json.loads(columns["facts"].tobytes()))


def layout(sizes: list[int]) -> dict[str, dict[str, Any]]:
    """What safetensors' header says of the arrays of COLUMNS, of these sizes."""
    found: dict[str, dict[str, Any]] = {}
    start = 0
    for (name, code), size in zip(COLUMNS.items(), sizes):
        stop = start + size * array(code).itemsize
        found[name] = {"dtype": CODES[code][0], "shape": [size], "data_offsets": [start, stop]}
        start = stop
    return found


def read_header(content: bytes, total: int) -> dict[str, Any] | None:
    """The header that RowWriter writes to a file of `total` bytes; None for any other."""
    try:
        header = json.loads(content[8:])
        wanted = layout([header[name]["shape"][0] for name in COLUMNS])
        metadata = {name: header["__metadata__"][name] for name in ("key", "crc32")}
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    begun = int.from_bytes(content[:8], "little") == HEADER - 8
    whole = total == HEADER + wanted["facts"]["data_offsets"][1]
    return header if begun and whole and header == wanted | {"__metadata__": metadata} else None


def checksum(file: BinaryIO) -> str:
    """Of what follows the header of a file."""
    file.seek(HEADER)
    crc = 0
    while block := file.read(BLOCK):
        crc = zlib.crc32(block, crc)
    return str(crc)
