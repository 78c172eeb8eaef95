"""Where rows come from: files, folders, patterns and hubs, each with a weight.

Also which of their rows an epoch reads. Free of torch.
"""

import ast
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from chatglm.files import decode_utf8, is_lfs_pointer, pointer_error
from finetune.rows.formats import BadRow, Row, parse_row, refused_by, single_questions
from finetune.rows.token_folders import is_tokenised, tokenised_files

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # of tables, by their suffix
SUFFIXES = (".json", ".jsonl", *DELIMITERS, ".parquet")
HUBS = ("hf://", "ms://")
# Bytes of a line: no row is as long, and a packed file may unpack to a line of any length.
LINE_LIMIT = 2**26
# Bytes that a packed JSON file may unpack to where it is not read line by line.
WHOLE_LIMIT = 2**30
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
BOM = b"\xef\xbb\xbf"
SPACE = re.compile("[ \t\r\n\ufeff]*")


@dataclass(frozen=True)
class Source:
    """What one entry of --train_path names: files, or a data set of a hub.

    Attributes:
        weight: how often an epoch reads each of its rows. At 0.3 an epoch reads three rows of ten,
            and the next epoch others.
        documents: what of a .txt file is a row, as read_documents; "" where none is read.
    """

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    documents: str = ""

    @property
    def is_hub(self) -> bool:
        return self.name.startswith(HUBS)

    @property
    def is_tokenised(self) -> bool:
        """Whether its rows are token ids already."""
        return not self.is_hub and is_tokenised(self.name)


def parse_sources(
    text: str, flag: str = "--train_path", *, weights: bool = True, documents: str = ""
) -> list[Source]:
    """ "a.json,b.jsonl:0.3,folder,part-*.jsonl,hf://owner/name:2" -> sources.

    Args:
        documents: as Source's.
    Raises:
        FileNotFoundError: nothing has that name, or a folder is empty.
        ValueError: there is no name at all, a weight is not above 0, or there is one although
            `weights` is False.
    """
    sources = []
    for name in split_names(text, flag):
        source = parse_source(name, flag, documents)
        sources.append(source)
        if source.weight != 1 and not weights:
            raise ValueError(f"{flag} takes no weights, got {source.name}:{source.weight:g}")
    return sources


def split_names(text: str, flag: str) -> list[str]:
    """The names of a comma list; a file that has a comma in its own name is one of them.

    Raises:
        ValueError: there is no name at all.
    """
    if text and Path(text).exists():
        return [text]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"{flag}: no file in {text!r}")
    return names


def parse_source(name: str, flag: str, documents: str = "") -> Source:
    """One entry of a comma list, "NAME" or "NAME:WEIGHT"; raises as `parse_sources`."""
    if not Path(name).exists():
        path, colon, weight = name.rpartition(":")
        try:
            number = float(weight) if colon else None
        except ValueError:
            number = None  # the colon belongs to the name
        if number is not None:
            if not 0 < number < float("inf"):
                raise ValueError(f"{flag}: a weight must be above 0, got {name}")
            return Source(path, find_files(path, flag, documents), number, documents)
    return Source(name, find_files(name, flag, documents), documents=documents)


def find_files(name: str, flag: str, documents: str = "") -> tuple[Path, ...]:
    """The files of a name, sorted: the file itself, all of a folder, or all that match a pattern.

    A hub's data set has no files. Raises FileNotFoundError where there are none.
    """
    path = Path(name)
    if name.startswith(HUBS):
        return ()
    if path.is_file():
        return (path,)
    if is_tokenised(path):
        return tokenised_files(path)
    if path.is_dir():
        suffixes = (*SUFFIXES, ".txt") if documents else SUFFIXES
        files = sorted(file for file in path.rglob("*") if is_data_file(file, suffixes))
        if not files:
            raise FileNotFoundError(f"{flag}: no {', '.join(suffixes)} (or .gz) in {path}")
        return tuple(files)
    if any(mark in name for mark in "*?["):
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        files = sorted(file for file in matches if file.is_file())
        if files:
            return tuple(files)
    raise FileNotFoundError(f"{flag}: no such file: {name}")


def is_data_file(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """A file with one of `suffixes`, perhaps before .gz, and not hidden."""
    if not path.is_file() or path.name.startswith("."):
        return False
    return path.name.removesuffix(".gz").endswith(suffixes)


# ---- files to JSON values


def read_parts(source: Source) -> Iterator[tuple[str, Iterator[tuple[str, object]]]]:
    """(name, (place, value) of every row) of each file, or of the hub.

    A place begins with that name. Raises ValueError for rows of token ids, which have no text.
    """
    if source.is_tokenised:
        raise ValueError(
            f"{source.name} is a tokenised data set, without its texts: only --train_path, "
            "--replay_path and --eval_path of fine-tuning read one"
        )
    if source.is_hub:
        yield source.name, read_hub(source.name)
    for path in source.files:
        yield str(path), read_file_items(path, source.documents)


def read_items(source: Source) -> Iterator[tuple[str, object]]:
    """(place, value) of every row; a value that does not parse comes as BadRow."""
    for _, items in read_parts(source):
        yield from items


def read_file_items(path: str | Path, documents: str = "") -> Iterator[tuple[str, object]]:
    """(place, value) of every row of a file.

    Files are JSON, csv or tsv with a header, or parquet, and text where `documents` says what of
    it is a row (read_documents); all but parquet also as .gz.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        yield from read_parquet(path)
    elif kind in DELIMITERS:
        yield from read_table(path, DELIMITERS[kind])
    elif kind == ".txt" and documents:
        yield from read_documents(path, documents)
    else:
        yield from read_json_items(path)


def open_data(path: Path) -> BinaryIO:
    """The open file, unpacked while it is read; raises ValueError where it is a Git LFS pointer."""
    if is_lfs_pointer(path):
        raise pointer_error(path)
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without a byte order mark) of every line.

    One line at a time is in memory.

    Raises:
        BadRow: a line has more than LINE_LIMIT bytes, or the gzip file is not whole.
    """
    # A local name: a generator may be closed when Python ends, after the modules.
    broken = BROKEN_GZIP
    number = 0
    try:
        with open_data(path) as file:
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise BadRow(
                        f"{path}:{number}: a line of more than {LINE_LIMIT:,} bytes, "
                        "which no row is"
                    )
                yield number, line.removeprefix(BOM)
    except broken as error:
        raise BadRow(f"{path}: not a whole gzip file ({error})") from None


def read_whole(path: Path) -> str:
    """The text of a file, unpacked.

    Raises:
        BadRow: it is not UTF-8, not a whole gzip file, or unpacks to more than WHOLE_LIMIT bytes.
    """
    packed = path.suffix == ".gz"
    try:
        with open_data(path) as file:
            content = file.read(WHOLE_LIMIT + 1) if packed else file.read()
    except BROKEN_GZIP as error:
        raise BadRow(f"{path}: not a whole gzip file ({error})") from None
    if packed and len(content) > WHOLE_LIMIT:
        raise BadRow(
            f"{path}: unpacks to more than {WHOLE_LIMIT:,} bytes; "
            "write one JSON object a line, or unpack it"
        )
    try:
        return decode_utf8(content, path)
    except ValueError as error:
        raise BadRow(str(error)) from None


def good_items(items: Iterable[tuple[str, object]]) -> Iterator[tuple[str, Any]]:
    """The same items; raises the first that is a BadRow."""
    for place, item in items:
        if isinstance(item, BadRow):
            raise item
        yield place, item


def read_json_items(path: str | Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each row of a JSON file; a line that does not parse comes as BadRow.

    It reads JSON lines, a JSON list, objects one after the other over several lines each, and
    {"data": [rows]}.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if begins_list(path):
        for i, item in enumerate(read_list(path)):
            yield f"{path}[{i}]", item
        return
    lines = filled_lines(path)
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    number, line = first
    item = parse_row_line(line, f"{path}:{number}")
    if isinstance(item, BadRow) and over_several_lines(line):
        yield from read_values(path)
    elif second is None and (rows := wrapped_rows(item)):
        for i, row in enumerate(rows):
            yield f"{path}:data[{i}]", row
    else:
        yield f"{path}:{number}", item
        for number, line in chain([second] if second else [], lines):
            yield f"{path}:{number}", parse_row_line(line, f"{path}:{number}")


def filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """`read_lines` without the blank ones."""
    for number, line in read_lines(path):
        if line.strip():
            yield number, line


def begins_list(path: Path) -> bool:
    """Whether the first character of a JSON file is "["."""
    try:
        with open_data(path) as file:
            while block := file.read(1 << 16):
                if content := block.lstrip(BOM + b" \t\r\n"):
                    return content.startswith(b"[")
    except BROKEN_GZIP as error:
        raise BadRow(f"{path}: not a whole gzip file ({error})") from None
    return False


def read_list(path: Path) -> list:
    """The values of a JSON list; raises BadRow where the file is none."""
    text = read_whole(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        message = getattr(error, "msg", error)
        raise BadRow(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {message}") from None


def over_several_lines(line: bytes) -> bool:
    """Whether a file's first line begins a JSON object that continues in the next line, as with
    `indent`."""
    text = line.strip()
    if not text.startswith(b"{") or text.endswith(b"},"):
        return False
    return text.endswith((b"{", b"[", b","))


def read_values(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of JSON objects one after the other, or of the rows of one {"data": [rows]}.

    Raises:
        BadRow: the file holds neither.
    """
    text = read_whole(path)
    decoder = json.JSONDecoder()
    values: list[tuple[int, int, object]] = []  # (offset in the text, line number, value)
    start = skip_space(text, 0)
    number = 1
    while start < len(text):
        try:
            value, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            message = getattr(error, "msg", error)
            wanted = "wanted one JSON object a line, objects one after the other, or a JSON list"
            raise BadRow(f"{path}:{line}: not valid JSON: {message}; {wanted}") from None
        number += text.count("\n", values[-1][0] if values else 0, start)
        values.append((start, number, value))
        start = skip_space(text, stop)
    rows = wrapped_rows(values[0][2]) if len(values) == 1 else None
    if rows:
        for i, row in enumerate(rows):
            yield f"{path}:data[{i}]", row
        return
    for _, number, value in values:
        yield f"{path}:{number}", value


def skip_space(text: str, start: int) -> int:
    """The offset of the first character from `start` on that is no white space."""
    found = SPACE.match(text, start)
    return found.end() if found else start


def wrapped_rows(value: object) -> list[dict] | None:
    """The rows of {"data": [rows]}; None for any other value."""
    rows = value.get("data") if isinstance(value, dict) else None
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return rows
    return None


def parse_row_line(line: str | bytes, place: str) -> object:
    """The JSON value of a line, or a BadRow.

    Belle's lines are Python literals of JSON values; they begin with "{'", as no JSON does.
    """
    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig")
        if text.lstrip().startswith("{'"):
            # Through JSON: it refuses sets, bytes and tuples as keys, so formats get JSON alone.
            text = json.dumps(ast.literal_eval(text.strip()))
        return json.loads(text)
    except UnicodeDecodeError:
        return BadRow(f"{place}: not UTF-8; save it as UTF-8")
    # Numbers and nesting beyond Python's limits too.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        return BadRow(f"{place}: not valid JSON: {getattr(error, 'msg', error)}")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, whichever characters end them."""
    for number, line in read_lines(path):
        try:
            yield from io.StringIO(line.decode("utf-8"), newline="")
        except UnicodeDecodeError:
            raise BadRow(f"{path}:{number}: not UTF-8; save it as UTF-8") from None


def read_table(path: Path, delimiter: str) -> Iterator[tuple[str, object]]:
    """(place, {column: text}) of every row of a table with a header; a row with a wrong number of
    cells comes as BadRow."""
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.DictReader(text_lines(path), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise BadRow(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
        if row is None:
            return
        place = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            wanted = f"wanted {len(reader.fieldnames or [])} cells, as the header has"
            yield place, BadRow(f"{place}: {wanted}")
        else:
            yield place, row


def read_documents(path: Path, documents: str) -> Iterator[tuple[str, object]]:
    """(place, {"text": ...}) of every document of a text file; one not in UTF-8 comes as BadRow.

    Args:
        documents: "file", "blank_line" or "line": what a document is. Blank ones are none.
    """
    if documents == "file":
        text = read_whole(path)
        if text.strip():
            yield f"{path}:1", {"text": text}
        return
    lines: list[bytes] = []
    first = 1
    for number, line in read_lines(path):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        if lines and (documents == "line" or not line.strip()):
            yield text_of_lines(lines, f"{path}:{first}")
            lines = []
    if lines:
        yield text_of_lines(lines, f"{path}:{first}")


def text_of_lines(lines: list[bytes], place: str) -> tuple[str, object]:
    """(place, {"text": ...}) of a document's lines, or BadRow where they are not UTF-8."""
    try:
        return place, {"text": b"".join(lines).decode("utf-8").strip("\r\n")}
    except UnicodeDecodeError:
        return place, BadRow(f"{place}: not UTF-8; save it as UTF-8")


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of every row; raises ValueError without pyarrow."""
    if is_lfs_pointer(path):
        raise pointer_error(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs the library pyarrow: pip install pyarrow") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"{path}[{number}]", drop_nulls(row)
                number += 1
    except pyarrow.ArrowException as error:
        raise BadRow(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def drop_nulls(value: object) -> object:
    """A value without keys that are null: tables fill in null for keys that a row does not have."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def read_hub(name: str) -> Iterator[tuple[str, object]]:
    """Rows of "hf://owner/name" or "ms://owner/name"; "#test" names another split than train.

    Raises:
        ValueError: the library is not installed, or the hub does not give the data set.
    """
    data_set, _, split = name.split("://", 1)[1].partition("#")
    try:
        if name.startswith("hf://"):
            from datasets import load_dataset

            rows = load_dataset(data_set, split=split or "train")
        else:
            from modelscope.msdatasets import MsDataset

            rows = MsDataset.load(data_set, split=split or "train")
    except ImportError as error:
        needed = "datasets" if name.startswith("hf://") else "modelscope[datasets]"
        raise ValueError(
            f'{name} needs a library that is not here ({error.name}): pip install "{needed}"'
        ) from None
    except Exception as error:  # whatever a hub, a proxy or a lack of network raises
        lines = str(error).splitlines() or [""]
        raise ValueError(f"{name}: {type(error).__name__}: {lines[0][:200]}") from None
    yield from ((f"{name}[{i}]", drop_nulls(dict(row))) for i, row in enumerate(rows))


# ---- values to rows


@dataclass(frozen=True)
class RowReader:
    """How values become rows: parse_row's options, and the family that is trained, if any."""

    prompt_text: str = ""
    data_format: str = "auto"
    columns: dict[str, str] | None = None
    family: str | None = None

    def row(self, item: object, place: str) -> Row:
        """The row of a JSON value; raises BadRow, also where the family has no layout for it."""
        if isinstance(item, BadRow):
            raise item
        row = parse_row(item, place, self.prompt_text, self.data_format, self.columns)
        if self.family and (refusal := refused_by(row, self.family)):
            raise BadRow(refusal)
        return row


def parse_items(
    items: Iterable[tuple[str, object]], reader: RowReader, on_bad_row: str
) -> Iterator[tuple[str, Row | BadRow]]:
    """(place, row) of each value.

    Bad rows are raised with on_bad_row "error", else they come as BadRow.
    """
    for place, item in items:
        row: Row | BadRow
        try:
            row = reader.row(item, place)
        except BadRow as error:
            if on_bad_row == "error":
                raise
            row = error
        yield place, row


def no_rows(name: str | Path, bad: int) -> BadRow:
    """The error of a file or source without a good row; `bad` rows were skipped."""
    skipped = f" ({bad} bad ones skipped)" if bad else ""
    return BadRow(f"{name}: no rows{skipped}")


def read_rows(
    path: str | Path | Source,
    *,
    on_bad_row: str = "error",
    limit: int | None = None,
    reader: RowReader | None = None,
    prompt_text: str = "",
) -> tuple[list[Row], int]:
    """All rows of a file or source, at most `limit`, and the number of bad ones skipped.

    Raises:
        BadRow: the first bad row, with on_bad_row "error"; or there is no good row.
    """
    items = read_items(path) if isinstance(path, Source) else read_file_items(path)
    rows: list[Row] = []
    bad = 0
    for _, row in parse_items(items, reader or RowReader(prompt_text), on_bad_row):
        if isinstance(row, BadRow):
            bad += 1
            continue
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise no_rows(path.name if isinstance(path, Source) else path, bad)
    return rows, bad


def read_questions(text: str, flag: str, reader: RowReader) -> list[Row]:
    """The rows of the sources in `text`, each a single question.

    Raises:
        ValueError, FileNotFoundError: as `parse_sources`, `read_rows` and `single_questions`.
    """
    rows: list[Row] = []
    for source in parse_sources(text, flag, weights=False):
        rows += read_rows(source, reader=reader)[0]
    return single_questions(rows, flag)


def hash_rows(rows: Iterable[Row]) -> str:
    """The SHA-256 of rows; for those of a hub, which has no files to hash."""
    digest = hashlib.sha256(b"[")
    separator = b""
    for row in rows:
        digest.update(separator + repr(row.content()).encode())
        separator = b", "
    digest.update(b"]")
    return digest.hexdigest()


def join_hashes(digests: list[str]) -> str:
    """One hash for those of several files and hubs; a single one stays as it is."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


# ---- which rows an epoch reads


def replay_count(others: int, ratio: float) -> int:
    """The number of replay rows that make up `ratio` of an epoch with `others` other rows."""
    return round(others * ratio / (1 - ratio))
