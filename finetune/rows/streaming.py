"""Rows of files larger than memory, read, shuffled and encoded while training runs.

Row n of the stream is a pure function of (seed, n). The lines of all files, pass after pass, are
cut into blocks of --shuffle_buffer lines, and block b is permuted by (seed, b). So a run resumes at
any row by counting lines up to its block: no state of an iterator is saved.
"""

import hashlib
import heapq
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from finetune.files import sha256
from finetune.rows.arrays import Dataset, EncodedRow, dataset_of
from finetune.rows.encoding import RowEncoder
from finetune.rows.formats import BadRow
from finetune.rows.sources import RowReader, Source, over_several_lines, parse_row_line, read_lines

OPEN_FILES = 64
HASHED_WHOLE = 2**30  # bytes of a file; a larger one takes longer than a few seconds
PIECES, PIECE = 1024, 2**16  # what of a larger one is hashed, and their size in bytes
Line = tuple[str, bytes]  # place, text


def file_lines(path: Path) -> Iterator[tuple[float, Line]]:
    """(share of the file that was read, line) of each line that is not blank.

    The share of a .gz file is an estimate: it assumes that the file unpacks to four times its size.

    Raises:
        BadRow: JSON that is no JSON lines, or as `read_lines`.
    """
    size = path.stat().st_size * (4 if path.suffix == ".gz" else 1)
    seen = 0
    begun = False
    for number, line in read_lines(path):
        seen += len(line)
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith(b"["):
            raise BadRow(f"{path}: --streaming reads JSON lines, not a JSON list")
        if not begun and over_several_lines(line):
            raise BadRow(f"{path}: --streaming reads JSON lines, not objects over several lines")
        begun = True
        yield seen / size, (f"{path}:{number}", line)


def copies(weight: float, place: str, seed: int, turn: int) -> int:
    """How often pass `turn` reads a line: `weight` on average.

    Args:
        place: the number of the line's file, and of the line in it.
    """
    whole = int(weight)
    if whole == weight:
        return whole
    number = hashlib.blake2b(f"{seed} {turn} {place}".encode(), digest_size=8).digest()
    return whole + (int.from_bytes(number, "big") / 2**64 < weight - whole)


def one_pass(sources: list[Source], seed: int, turn: int) -> Iterator[Line]:
    """The lines of one pass over all files, each as often as its file's weight asks for.

    At most OPEN_FILES files are open at a time. The next line comes from the one of which the
    smallest share was read, so that they end together.
    """
    files: list[tuple[float, Path]] = []
    for source in sources:
        for path in source.files:
            files.append((source.weight, path))
    order = iter(np.random.default_rng([seed, turn, 0]).permutation(len(files)).tolist())
    # (share that was read, number of the file, its lines)
    readers: list[tuple[float, int, Iterator[tuple[float, Line]]]] = []
    while True:
        while len(readers) < OPEN_FILES and (number := next(order, None)) is not None:
            heapq.heappush(readers, (0.0, number, file_lines(files[number][1])))
        if not readers:
            return
        _, number, lines = readers[0]
        next_line = next(lines, None)
        if next_line is None:
            heapq.heappop(readers)
            continue
        share, line = next_line
        heapq.heapreplace(readers, (share, number, lines))
        # By the file's number, not its path: the same files in another folder give the same rows.
        place = f"{number}:{line[0].rpartition(':')[2]}"
        for _ in range(copies(files[number][0], place, seed, turn)):
            yield line


def endless(sources: list[Source], seed: int) -> Iterator[Line]:
    """The lines of pass after pass, without end. Raises BadRow where the files are empty."""
    turn = 0
    while True:
        empty = True
        for line in one_pass(sources, seed, turn):
            empty = False
            yield line
        if empty:
            raise BadRow(f"{', '.join(source.name for source in sources)}: no rows")
        turn += 1


def mixed(lines: Iterator[Line], replay: Iterator[Line], ratio: float) -> Iterator[Line]:
    """Two endless streams as one; `ratio` of it comes from `replay`, at even distances."""
    n = 0
    while True:
        is_replay = int((n + 1) * ratio) > int(n * ratio)
        yield next(replay if is_replay else lines)
        n += 1


def check_streamable(source: Source) -> None:
    """Raises ValueError where a source is no JSON lines."""
    for path in source.files:
        if not path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
            raise not_json_lines(path)
    if source.is_hub:
        raise not_json_lines(source.name)


def not_json_lines(name: str | Path) -> ValueError:
    return ValueError(f"--streaming reads JSON lines (.json, .jsonl, or those as .gz), got {name}")


class Stream:
    """Encoded rows by number. Several threads may share it.

    Args:
        block: lines of a block.
        skip_bad: replace a row that does not parse by another one of its block, else raise BadRow.
        skip_long: the same for a row that would be truncated.
        replay_ratio: share of the stream that comes from `replay`.
        group: how many encoded rows in turn are one of the stream's, such as the two of a pair.
        workers: threads that read so many steps ahead, in any order.
    """

    def __init__(
        self,
        sources: list[Source],
        reader: RowReader,
        encoder: RowEncoder,
        *,
        seed: int,
        block: int,
        skip_bad: bool = False,
        skip_long: bool = False,
        replay: tuple[Source, ...] = (),
        replay_ratio: float = 0.0,
        group: int = 1,
        workers: int = 1,
    ):
        for source in (*sources, *replay):
            check_streamable(source)
        self.sources = sources
        self.replay = list(replay)
        self.ratio = replay_ratio
        self.reader = reader
        self.encoder = encoder
        self.seed = seed
        self.size = block
        self.skip_bad = skip_bad
        self.skip_long = skip_long
        self.group = group
        self.workers = workers
        self.lock = threading.Lock()
        self.lines: Iterator[Line] | None = None
        self.next_block = 0
        self.blocks: dict[int, list[Line]] = {}
        self.kept = 2  # the number of blocks in memory at most
        self.dropped: set[str] = set()  # places of rows that were read and not used

    def all_lines(self) -> Iterator[Line]:
        """The endless stream of lines, before it is cut into blocks."""
        lines = endless(self.sources, self.seed)
        if not self.replay:
            return lines
        return mixed(lines, endless(self.replay, self.seed), self.ratio)

    def count(self) -> int:
        """Rows of the first pass, those of replay included; reads every file once."""
        lines = sum(1 for _ in one_pass(self.sources, self.seed, 0))
        return round(lines / (1 - self.ratio)) if self.replay else lines

    def block(self, number: int) -> list[Line]:
        """The lines of a block, shuffled."""
        with self.lock:
            if number not in self.blocks:
                try:
                    self.read_to(number)
                except BaseException:
                    # A generator that raised has ended. Start anew, so that other threads get the
                    # error too.
                    self.lines = None
                    raise
            return self.blocks[number]

    def read_to(self, number: int) -> None:
        """Read on to a block. The blocks before it stay: a slower thread may still need them."""
        if self.lines is None or number < self.next_block:
            self.lines = self.all_lines()
            self.next_block = 0
            self.blocks = {}
        passed = max(0, number + 1 - self.kept - self.next_block)
        for _ in islice(self.lines, passed * self.size):  # lines of blocks that are not needed
            pass
        for block in range(self.next_block + passed, number + 1):
            lines = list(islice(self.lines, self.size))
            order = np.random.default_rng([self.seed, block]).permutation(self.size)
            self.blocks[block] = [lines[i] for i in order]
            self.next_block = block + 1
            while len(self.blocks) > self.kept:
                self.blocks.pop(min(self.blocks))

    def rows_of(self, number: int) -> tuple[str, list[EncodedRow]]:
        """(place, encoded rows) of a number; for dropped ones the next usable ones of its block.

        Raises:
            BadRow: the row is malformed, without skip_bad; or its block has no usable row.
        """
        block = self.block(number // self.size)
        start = number % self.size
        refusal = None
        for i in range(self.size):
            place, line = block[(start + i) % self.size]
            try:
                encoded = self.encoder.encode(self.reader.row(parse_row_line(line, place), place))
            except BadRow as error:
                if not self.skip_bad:
                    raise
                refusal = error
                self.dropped.add(place)
                continue
            groups = [encoded[i : i + self.group] for i in range(0, len(encoded), self.group)]
            usable = [rows for rows in groups if all(map(self.is_usable, rows))]
            if usable:
                # A conversation may make several rows (ChatGLM-6B), scored answers several pairs:
                # the block's number picks one.
                return place, usable[number // self.size % len(usable)]
            self.dropped.add(place)
            limits = f"--max_len {self.encoder.max_len} / --max_src_len {self.encoder.max_src_len}"
            refusal = BadRow(f"{place}: longer than {limits}")
        raise BadRow(f"{refusal}; nor is any other of the {self.size} rows around it of use")

    def is_usable(self, row: EncodedRow) -> bool:
        """The row has a label, and is not truncated where such rows are skipped."""
        return row.learns and not (self.skip_long and row.truncated)

    def rows(self, start: int, stop: int) -> Dataset:
        """The rows `start` to `stop` (excluded), which are a step's.

        As many blocks stay in memory as this step and those that workers read ahead need.
        """
        self.kept = max(self.kept, 2 + (self.workers + 1) * (stop - start) // self.size)
        made = []
        for number in range(start, stop):
            place, rows = self.rows_of(number)
            made += [(place, row) for row in rows]
        return dataset_of(made)

    def data_hash(self) -> str:
        """The SHA-256 of the fingerprints of all files."""
        digest = hashlib.sha256()
        for source in (*self.sources, *self.replay):
            for file in source.files:
                digest.update(fingerprint(file).encode())
        return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """A hash of a file, that reads little of a large one.

    Up to HASHED_WHOLE bytes it is the SHA-256 of the content; beyond, of the size, the mtime and
    PIECES pieces spread over the file.
    """
    stat = path.stat()
    if stat.st_size <= HASHED_WHOLE:
        return sha256(path)
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
    with open(path, "rb") as content:
        for place in np.linspace(0, stat.st_size - PIECE, PIECES, dtype=np.int64).tolist():
            content.seek(place)
            digest.update(content.read(PIECE))
    return digest.hexdigest()
