"""From rows to encoded rows: read and tokenised once a node, kept in --data_cache or a temporary
file, mapped by all its ranks.

Free of torch.
"""

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from chatglm.conversations import GLM3_LABELS, IGNORED, encode_conversation
from chatglm.families import Family
from chatglm.prompts import pieces_of
from finetune.files import CACHE_GB, prune, sha256, written_whole
from finetune.rows.arrays import (
    Dataset,
    EncodedRow,
    Place,
    RowArrays,
    RowWriter,
    chosen_rows,
    map_rows,
)
from finetune.rows.documents import encode_document
from finetune.rows.formats import BadRow, Row
from finetune.rows.sources import RowReader, Source, hash_rows, no_rows, parse_items, read_parts
from finetune.rows.tokenised import check_tokenised, read_tokenised, token_fingerprint

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

# Of --data_cache; raised where the same files and settings give other ids or places than before.
CACHE_FORMAT = 3
CHUNK = 64  # rows that a process takes at a time
AHEAD = 4  # chunks a process that wait for their turn


@dataclass(frozen=True)
class RowEncoder:
    """Rows to ids as a family is trained. Lengths are in tokens; role_labels as
    `chatglm.conversations` has it.
    """

    tokenizer: "FamilyTokenizer"
    family: Family
    max_len: int
    max_src_len: int
    glm3_labels: str = GLM3_LABELS[0]

    def check(self, row: Row) -> None:
        """Raises BadRow: several answers (a test file), several turns of raw text or of a family
        that answers one prompt, or blanks that the answer does not fill.
        """
        if len(row.answers) != 1:
            raise BadRow(
                f"{row.place}: a training row has one output, got a list of {len(row.answers)}"
            )
        if self.family.raw and len(row.turns) > 2:
            raise BadRow(
                f"{row.place}: prompt_style raw: a text to go on with has one answer, "
                f"got {len(row.turns)} turns"
            )

        rounds = sum([turn.role == "user" for turn in row.turns])
        if self.family.single and rounds > 1:
            raise BadRow(
                f"{row.place}: {self.family.title} answers one prompt, got {rounds} rounds"
            )
        if self.family.name == "glm_base" and not self.family.raw and not row.is_document:
            try:
                pieces_of(row.prompt, row.answers[0])
            except ValueError as error:
                raise BadRow(f"{row.place}: {error}") from None

    def encode(self, row: Row) -> list[EncodedRow]:
        """One row; of a conversation in ChatGLM-6B's layout, one an answer; of a text without a
        question, one a piece of max_len. A row cut so short that
        no answer is left learns nothing.

        Raises ValueError: several answers (a test file), or limits that leave no room.
        """
        self.check(row)
        if row.is_document:
            return encode_document(self.tokenizer, self.family.name, row.answers[0], self.max_len)
        role_labels = self.glm3_labels == GLM3_LABELS[0]
        if not row.turns:
            made = self.family.encode_example(
                self.tokenizer, row.prompt, row.answers[0], self.max_len, self.max_src_len
            )
            return [
                EncodedRow(
                    made.input_ids,
                    made.n_masked + self.masks_role_token,
                    made.truncated,
                )
            ]
        encoded = []
        for ids, labels, cut in encode_conversation(
            self.family,
            self.tokenizer,
            list(row.turns),
            self.max_len,
            self.max_src_len,
            role_labels,
        ):
            first = count_ignored(labels)
            encoded.append(
                EncodedRow(ids, first, cut, None if labels[first:] == ids[first:] else labels)
            )
        return encoded

    @property
    def masks_role_token(self) -> bool:
        """Whether ChatGLM3's <|assistant|> before an answer carries no loss; else it does."""
        has_role = self.family.name == "glm3" and not self.family.raw
        return has_role and self.glm3_labels != GLM3_LABELS[0]

    def fingerprint(self) -> dict[str, Any]:
        """As `finetune.rows.tokenised` has it."""
        return token_fingerprint(
            self.tokenizer, self.family, self.max_len, self.max_src_len, self.glm3_labels
        )

    def settings(self) -> list[Any]:
        """All that encoded rows depend on but the rows: the tokenizer's model, the settings and
        CACHE_FORMAT; as JSON.
        """
        tokenizer = self.tokenizer
        options = dict(tokenizer.init_kwargs)
        for where in ("vocab_file", "name_or_path"):
            options.pop(where, None)
        lengths = [self.max_len, self.max_src_len]
        return [
            CACHE_FORMAT,
            self.family.name,
            self.family.raw,
            lengths,
            self.glm3_labels,
            options,
            len(tokenizer),
            sha256(Path(tokenizer.vocab_file)),
        ]


def count_ignored(labels: list[int]) -> int:
    """The number of labels before the first that carries loss."""
    for number, label in enumerate(labels):
        if label != IGNORED:
            return number
    return len(labels)


@dataclass(frozen=True)
class Preparation:
    """How a source becomes encoded rows.

    limit: read so many good rows. first_answer: of rows with several (a test file).
    """

    reader: RowReader
    encoder: RowEncoder
    on_bad_row: str = "error"
    limit: int | None = None
    first_answer: bool = False

    def rows(self, source: Source) -> Iterator[tuple[Place, Row | BadRow]]:
        """Every row as it is read; bad ones as BadRow where they are skipped."""
        good = 0
        for number, (name, items) in enumerate(read_parts(source)):
            for place, row in parse_items(items, self.reader, self.on_bad_row):
                if isinstance(row, Row):
                    row = row.with_first_answer() if self.first_answer else row
                    self.encoder.check(row)
                    good += 1
                yield Place(number, place.removeprefix(name)), row
                if good == self.limit:
                    return

    def good_rows(self, source: Source) -> Iterator[tuple[Place, Row]]:
        for place, row in self.rows(source):
            if isinstance(row, Row):
                yield place, row

    def encoded_rows(self, source: Source) -> Iterator[tuple[Place, EncodedRow]]:
        """The rows of a tokenised data set, at most `limit`; raises as check_tokenised."""
        if type(self.encoder) is not RowEncoder:
            raise ValueError(
                f"{source.name} is tokenised for fine-tuning, which this --task is not: "
                "give it the rows themselves"
            )
        check_tokenised(Path(source.name), self.encoder.fingerprint())
        file = -1
        for number, row in islice(read_tokenised(source.files), self.limit):
            file += number == 0
            yield Place(file, f"[{number}]"), row

    def hashes(self, source: Source) -> list[str]:
        """The SHA-256 of each file; of a hub, of its rows."""
        if source.is_hub:
            return [hash_rows(row for _, row in self.good_rows(source))]
        return [sha256(file) for file in source.files]

    def key(self, source: Source, hashes: list[str]) -> str:
        """A name for what the encoded rows depend on: content of the files and what kinds they are,
        and all settings.
        """
        kinds = [Path(file.name.removesuffix(".gz")).suffix for file in source.files]
        options = [asdict(self.reader), self.on_bad_row, self.limit, self.first_answer]
        if source.documents:
            options.append(source.documents)
        content = json.dumps(
            [self.encoder.settings(), options, kinds, hashes], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class Prepared(NamedTuple):
    """Encoded rows of a source, ready for all ranks of a node.

    path: the file that holds them; None: they are in memory, `rows`. temporary: the file is deleted
    once all ranks have mapped it.
    hashes: of the source's files.
    """

    key: str
    hashes: list[str]
    path: Path | None
    temporary: bool = False
    rows: RowArrays | None = None

    def load(self, source: Source) -> RowArrays:
        """Raises OSError where the file is gone."""
        rows = self.rows if self.path is None else map_rows(self.path, row_places(source), self.key)
        if rows is None:
            raise OSError(f"--data_cache: {self.path} went away before it was read; start again")
        return rows

    def release(self, cache_gb: float = CACHE_GB) -> None:
        """Delete a temporary file, which all ranks have mapped, or prune the cache to its limit."""
        if self.path is None:
            return
        if self.temporary:
            self.path.unlink(missing_ok=True)
        else:
            with suppress(OSError):
                prune(self.path.parent, cache_gb * 1e9)


def row_places(source: Source) -> tuple[str, ...]:
    """What places of its rows begin with."""
    return (source.name,) if source.is_hub else tuple(map(str, source.files))


def prepare_rows(
    source: Source,
    preparation: Preparation,
    *,
    cache: Path | None = None,
    workers: int = 1,
    progress: bool = False,
    shared: bool = False,
) -> Prepared:
    """Encode the rows of a source, or find them in the folder `cache`. A warm cache parses no row,
    but those of a hub.

    Args:
        workers: processes that tokenise.
        shared: other processes want the rows too, so they have to be in a file.
    Raises:
        BadRow, ValueError: as reading and encoding have it, before anything is tokenised where it
        can be.
    """
    stamps = [stamp(file) for file in source.files]
    hashes = preparation.hashes(source)
    key, names = preparation.key(source, hashes), row_places(source)
    file = cache / f"{key}.safetensors" if cache else None
    if file and map_rows(file, names, key, verify=True) is not None:
        with suppress(OSError):  # of another user
            os.utime(file)
        return Prepared(key, hashes, file)
    good, bad = count_rows(source, preparation)

    def encode(output: BinaryIO | None) -> RowWriter:
        writer = RowWriter(output)
        if source.is_tokenised:
            for place, row in preparation.encoded_rows(source):
                writer.add(place, row)
        else:
            for place, rows in tokenise(
                preparation.encoder, preparation.good_rows(source), good, progress, workers
            ):
                for row in rows:
                    writer.add(place, row)
        for path, before in zip(source.files, stamps):
            if stamp(path) != before:
                raise ValueError(f"{path} was changed while it was read; start again")
        return writer

    facts = {"good": good, "bad": bad}
    if file:
        try:
            with written_whole(file) as output:
                encode(output).finish(key, facts)
            return Prepared(key, hashes, file)
        except OSError as error:
            print(
                f"--data_cache: {file.parent} cannot be written ({error.strerror}); "
                f"going on without",
                flush=True,
            )
    if not shared:
        return Prepared(key, hashes, None, rows=encode(None).in_memory(names, facts))
    with tempfile.NamedTemporaryFile(
        prefix="glm-foundry-", suffix=".safetensors", delete=False
    ) as temporary:
        try:
            encode(cast(BinaryIO, temporary)).finish(key, facts)  # a wrapper of one
        except BaseException:
            os.unlink(temporary.name)
            raise
    return Prepared(key, hashes, Path(temporary.name), temporary=True)


def count_rows(source: Source, preparation: Preparation) -> tuple[int, int]:
    """(good, bad) rows: all of them are read before the first is tokenised, which takes much
    longer. Raises BadRow where none is good."""
    good = bad = 0
    if source.is_tokenised:
        for _ in preparation.encoded_rows(source):
            good += 1
    else:
        for _, row in preparation.rows(source):
            good += isinstance(row, Row)
            bad += isinstance(row, BadRow)
    if not good:
        raise no_rows(source.name, bad)
    return good, bad


def stamp(file: Path) -> tuple[int, int]:
    """What changes with a file's content: its size and its time."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def encode_rows(
    rows: list[Row],
    tokenizer: "FamilyTokenizer",
    family: Family,
    *,
    max_len: int,
    max_src_len: int,
    is_skip: bool = False,
    **options: Any,
) -> Dataset:
    """Rows in memory as `family` trains on them; `options` are RowEncoder's.

    Raises:
        ValueError: no row has a label within the lengths, or one has several answers (a test file).
    """
    encoder, writer = RowEncoder(tokenizer, family, max_len, max_src_len, **options), RowWriter()
    for row in rows:
        for made in encoder.encode(row):
            writer.add(Place(0, row.place), made)
    return choose_rows(writer.in_memory(("",), {"good": len(rows), "bad": 0}), encoder, is_skip)


def choose_rows(rows: RowArrays, encoder: RowEncoder, is_skip: bool) -> Dataset:
    """The rows that are trained on. Raises ValueError where none is left."""
    data = chosen_rows(rows, is_skip)
    if not len(data):
        raise ValueError(
            f"all {rows.facts['good']} rows are longer than --max_len {encoder.max_len} / "
            f"--max_src_len {encoder.max_src_len}"
        )
    return data


def tokenise(
    encoder: RowEncoder, rows: Iterable[tuple[Place, Row]], total: int, progress: bool, workers: int
) -> Iterator[tuple[Place, list[EncodedRow]]]:
    """What `encoder` makes of each row, in their order; over `workers` processes. A bar shows where
    it takes seconds.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc="encoding", unit="row", disable=not progress, delay=2) as bar:
        for chunk, encoded in encode_chunks(
            encoder, chunks_of(rows), workers if total > CHUNK else 1
        ):
            for (place, _), made in zip(chunk, encoded):
                yield place, made
            bar.update(len(chunk))


Chunk = list[tuple[Place, Row]]


def chunks_of(rows: Iterable[tuple[Place, Row]]) -> Iterator[Chunk]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def encode_chunks(
    encoder: RowEncoder, chunks: Iterator[Chunk], workers: int
) -> Iterator[tuple[Chunk, list[list[EncodedRow]]]]:
    if workers < 2:
        for chunk in chunks:
            yield chunk, [encoder.encode(row) for _, row in chunk]
        return
    # Forked, so that the tokenizer needs no pickling and transformers no second import.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _start_worker, (encoder,)
    ) as pool:
        waiting: deque[tuple[Chunk, Future[list[list[EncodedRow]]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode_chunk, [row for _, row in chunk])))
            if len(waiting) > AHEAD * workers:
                chunk, made = waiting.popleft()
                yield chunk, made.result()
        for chunk, made in waiting:
            yield chunk, made.result()


_encoder: RowEncoder | None = None  # of a worker process


def _start_worker(encoder: RowEncoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_chunk(rows: list[Row]) -> list[list[EncodedRow]]:
    assert _encoder is not None  # _start_worker has run
    return list(map(_encoder.encode, rows))
