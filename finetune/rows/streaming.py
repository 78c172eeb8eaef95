"""Rows of files larger than memory, read, shuffled and encoded on the way. Row n of the stream is a pure function of (seed, n).

The lines of all files, pass after pass, are cut into blocks of --shuffle_buffer lines, and block b is permuted by (seed, b). So a run
goes on at any row by counting lines up to its block: nothing of an iterator need be kept.
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
from finetune.rows.encoding import Encoder
from finetune.rows.formats import BadRow
from finetune.rows.sources import RowReader, Source, over_several_lines, parse_line, read_lines

OPEN_FILES = 64
HASHED_WHOLE = 2**30  # bytes of a file; a larger one takes longer than a few seconds
PIECES, PIECE = 1024, 2**16  # what of a larger one is hashed, and their size in bytes
Line = tuple[str, bytes]  # place, text


def file_lines(path: Path) -> Iterator[tuple[float, Line]]:
    """(share of the file that was read, line) of each line that is not blank. Of a packed file the share is a guess.

    Raises BadRow: JSON that is no JSON lines, or as `read_lines`.
    """
    size = path.stat().st_size * (4 if path.suffix == ".gz" else 1)
    seen, begun = 0, False
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
    """How often pass `turn` reads a line: `weight` on average. `place`: number of its file, and of the line in it."""
    whole = int(weight)
    if whole == weight:
        return whole
    number = hashlib.blake2b(f"{seed} {turn} {place}".encode(), digest_size=8).digest()
    return whole + (int.from_bytes(number, "big") / 2**64 < weight - whole)


def one_pass(sources: list[Source], seed: int, turn: int) -> Iterator[Line]:
    """All lines once, by weight. OPEN_FILES files at a time take turns, so that they end together."""
    files = [(source.weight, file) for source in sources for file in source.files]
    order = iter(np.random.default_rng([seed, turn, 0]).permutation(len(files)).tolist())
    readers: list = []
    while True:
        while len(readers) < OPEN_FILES and (number := next(order, None)) is not None:
            heapq.heappush(readers, (0.0, number, file_lines(files[number][1])))
        if not readers:
            return
        _, number, lines = readers[0]
        found = next(lines, None)
        if found is None:
            heapq.heappop(readers)
            continue
        share, line = found
        heapq.heapreplace(readers, (share, number, lines))
        place = f"{number}:{line[0].rpartition(':')[2]}"  # not the path: the same files elsewhere are the same rows
        for _ in range(copies(files[number][0], place, seed, turn)):
            yield line


def endless(sources: list[Source], seed: int) -> Iterator[Line]:
    """Pass after pass. Raises BadRow where there is nothing in the files."""
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
    """Two endless streams as one, `ratio` of it from the second at even distances."""
    n = 0
    while True:
        yield next(replay if int((n + 1) * ratio) > int(n * ratio) else lines)
        n += 1


class Stream:
    """Encoded rows by number. Threads may share it.

    Args:
        skip_bad: take another row of its block for one that does not parse, else raise BadRow.
        skip_long: the same for one that would be cut.
        workers: threads that read so many steps ahead, in any order.
    """

    def __init__(
        self,
        sources: list[Source],
        reader: RowReader,
        encoder: Encoder,
        *,
        seed: int,
        block: int,
        skip_bad=False,
        skip_long=False,
        replay: tuple[Source, ...] = (),
        replay_ratio: float = 0.0,
        workers: int = 1,
    ):
        for source in (*sources, *replay):
            wrong = next(
                (
                    p
                    for p in source.files
                    if not p.name.removesuffix(".gz").endswith((".json", ".jsonl"))
                ),
                None,
            )
            if wrong or source.is_hub:
                raise ValueError(
                    f"--streaming reads JSON lines (.json, .jsonl, or those as .gz), got {wrong or source.name}"
                )
        self.sources, self.replay, self.ratio = sources, list(replay), replay_ratio
        self.reader, self.encoder, self.seed, self.size = reader, encoder, seed, block
        self.skip_bad, self.skip_long, self.workers = skip_bad, skip_long, workers
        self.lock = threading.Lock()
        self.lines: Iterator[Line] | None = None
        self.next_block = 0
        self.blocks: dict[int, list[Line]] = {}
        self.kept = 2
        self.dropped: set[str] = set()  # places of rows that were met and not used

    def all_lines(self) -> Iterator[Line]:
        lines = endless(self.sources, self.seed)
        return mixed(lines, endless(self.replay, self.seed), self.ratio) if self.replay else lines

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
                    self.lines = None  # a generator that raised has ended: who asks next must meet the error too
                    raise
            return self.blocks[number]

    def read_to(self, number: int):
        """Read on to a block. Those before it are kept: a slower thread may ask for them yet."""
        if self.lines is None or number < self.next_block:
            self.lines, self.next_block, self.blocks = self.all_lines(), 0, {}
        passed = max(0, number + 1 - self.kept - self.next_block)
        for _ in islice(self.lines, passed * self.size):  # lines of no block that is kept
            pass
        for block in range(self.next_block + passed, number + 1):
            lines = list(islice(self.lines, self.size))
            order = np.random.default_rng([self.seed, block]).permutation(self.size)
            self.blocks[block] = [lines[i] for i in order]
            self.next_block = block + 1
            while len(self.blocks) > self.kept:
                self.blocks.pop(min(self.blocks))

    def row(self, number: int) -> tuple[str, EncodedRow]:
        """(place, encoded row). One that is dropped gives its turn to the next of its block that is not.

        Raises BadRow: it is malformed, without skip_bad; or none of its block is left.
        """
        block = self.block(number // self.size)
        start, refusal = number % self.size, None
        for place, line in (block[(start + i) % self.size] for i in range(self.size)):
            try:
                made = self.encoder.encode(self.reader.row(parse_line(line, place), place))
            except BadRow as error:
                if not self.skip_bad:
                    raise
                refusal = error
                self.dropped.add(place)
                continue
            made = [row for row in made if row.learns and not (self.skip_long and row.truncated)]
            if made:  # of a conversation that makes several rows (ChatGLM-6B), one
                return place, made[number // self.size % len(made)]
            self.dropped.add(place)
            refusal = BadRow(
                f"{place}: longer than --max_len {self.encoder.max_len} / --max_src_len {self.encoder.max_src_len}"
            )
        raise BadRow(f"{refusal}; nor is any other of the {self.size} rows around it of use")

    def rows(self, start: int, stop: int) -> Dataset:
        """The rows of these numbers: a step's. Blocks are kept for the step that is due and those that workers read ahead."""
        self.kept = max(self.kept, 2 + (self.workers + 1) * (stop - start) // self.size)
        return dataset_of([self.row(number) for number in range(start, stop)])

    def data_hash(self) -> str:
        """Of the content of the files up to HASHED_WHOLE bytes; of larger ones, the size, mtime and pieces all over."""
        digest = hashlib.sha256()
        for file in (file for source in (*self.sources, *self.replay) for file in source.files):
            digest.update(fingerprint(file).encode())
        return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Of a file's content, without reading a large one whole."""
    stat = path.stat()
    if stat.st_size <= HASHED_WHOLE:
        return sha256(path)
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
    with open(path, "rb") as content:
        for place in np.linspace(0, stat.st_size - PIECE, PIECES, dtype=np.int64).tolist():
            content.seek(place)
            digest.update(content.read(PIECE))
    return digest.hexdigest()
