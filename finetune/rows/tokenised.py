"""Data sets of token ids on disk: Parquet files that `datasets` reads, and tokenised.json, which
says what they were made with.

`python -m finetune.prepare tokenise` writes them. Free of torch.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.conversations import IGNORED
from chatglm.files import read_json
from finetune.files import sha256
from finetune.rows.arrays import EncodedRow
from finetune.rows.formats import BadRow
from finetune.rows.token_folders import FILES, TOKENISED

if TYPE_CHECKING:
    import pyarrow

    from chatglm.families import Family
    from chatglm.family_tokenizer import FamilyTokenizer

TOKENISED_FORMAT = 1
COLUMNS = ("input_ids", "labels", "truncated", "source")
ROWS_A_FILE = 200_000
ROWS_A_GROUP = 1024  # of Parquet: what is read at a time
SAMPLE = ("示例 Sample 123：", "答案 answer。\n")  # its ids are a part of the fingerprint
SAMPLE_LENGTH = 256


def token_fingerprint(
    tokenizer: "FamilyTokenizer",
    family: "Family",
    max_len: int,
    max_src_len: int,
    glm3_labels: str,
) -> dict[str, Any]:
    """What token ids depend on, the same on every machine: a row's layout, the limits, and of the
    tokenizer its vocabulary file, its size and the ids of a sample."""
    sample = family.encode_example(tokenizer, *SAMPLE, SAMPLE_LENGTH, SAMPLE_LENGTH)
    return {
        "family": family.name,
        "prompt_style": "raw" if family.raw else "chat",
        "max_len": max_len,
        "max_src_len": max_src_len,
        "glm3_labels": glm3_labels,
        "tokenizer": {
            "sha256": sha256(Path(tokenizer.vocab_file)),
            "size": len(tokenizer),
            "sample": list(sample.input_ids),
        },
    }


def check_tokenised(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError where a data set was not made as `wanted` (a fingerprint) says."""
    path = folder / TOKENISED
    card = read_json(path)
    if card.get("format_version") != TOKENISED_FORMAT:
        raise ValueError(
            f"{path}: format version {card.get('format_version')}, "
            f"this program reads {TOKENISED_FORMAT}"
        )
    made = card.get("fingerprint")
    if not isinstance(made, dict):
        raise ValueError(f"{path}: wanted an object at fingerprint")
    for name, value in wanted.items():
        if made.get(name) == value:
            continue
        if name == "tokenizer":
            raise ValueError(
                f"{folder} was tokenised with another tokenizer than this model's: "
                "run python -m finetune.prepare tokenise with this model"
            )
        raise ValueError(
            f"{folder} was tokenised with {name} {made.get(name)}, this run has {value}: "
            f"give --{name} {made.get(name)}, or tokenise it again"
        )


def parquet_schema() -> "pyarrow.Schema":
    """The columns: ids, labels of the same length (-100: no loss), whether the row was cut, and
    the place that it comes from."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    kinds = (ids, ids, pyarrow.bool_(), pyarrow.string())
    return pyarrow.schema(list(zip(COLUMNS, kinds)))


def labels_of(row: EncodedRow) -> list[int]:
    """A row's labels, one a token; -100 where there is no loss."""
    if row.labels is not None:
        return row.labels
    masked = min(row.n_masked, len(row.input_ids))
    return [IGNORED] * masked + row.input_ids[masked:]


def write_parquet(folder: Path, rows: Iterable[tuple[str, EncodedRow]]) -> list[str]:
    """Write (place, row) of each into files of ROWS_A_FILE rows; returns their names."""
    import pyarrow
    import pyarrow.parquet

    names: list[str] = []
    writer = None
    waiting: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def flush() -> None:
        if writer is not None and waiting["source"]:
            writer.write_table(pyarrow.table(waiting, parquet_schema()))
            for values in waiting.values():
                values.clear()

    for written, (place, row) in enumerate(rows):
        if written % ROWS_A_FILE == 0:
            flush()
            if writer is not None:
                writer.close()
            names.append(f"train-{len(names):05d}.parquet")
            writer = pyarrow.parquet.ParquetWriter(
                folder / names[-1], parquet_schema(), write_page_checksum=True
            )
        for name, value in zip(COLUMNS, (row.input_ids, labels_of(row), row.truncated, place)):
            waiting[name].append(value)
        if len(waiting["source"]) == ROWS_A_GROUP:
            flush()
    flush()
    if writer is not None:
        writer.close()
    return names


def read_tokenised(files: Iterable[Path]) -> Iterator[tuple[int, EncodedRow]]:
    """(number of the row in its file, row) of every row.

    Raises:
        BadRow: a file is no such Parquet file, or is damaged; names it.
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "a tokenised data set needs the library pyarrow: pip install pyarrow"
        ) from None
    for path in files:
        number = 0
        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            for batch in file.iter_batches(ROWS_A_GROUP, columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    yield number, encoded_row(row, f"{path}[{number}]")
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise BadRow(f"{path}: not a Parquet file of token ids: {reason}") from None


def encoded_row(row: dict[str, Any], place: str) -> EncodedRow:
    """A row of the file; raises BadRow where ids and labels are not of one length."""
    ids, labels = row["input_ids"], row["labels"]
    if not ids or labels is None or len(ids) != len(labels):
        raise BadRow(f"{place}: wanted input_ids and as many labels")
    first = 0
    while first < len(labels) and labels[first] == IGNORED:
        first += 1
    own = None if labels[first:] == ids[first:] else labels
    return EncodedRow(ids, first, bool(row["truncated"]), own)


def card_text(title: str, card: dict[str, Any]) -> str:
    """README.md of a data set: what it is, and which files `datasets` is to read."""
    made = json.dumps(card["fingerprint"], ensure_ascii=False, indent=2)
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        f"    path: {FILES}\n---\n\n# {title}\n\n"
        f"{card['rows']:,} rows of {card['tokens']:,} tokens, made by "
        "`python -m finetune.prepare tokenise`; `-100` in labels carries no loss.\n\n"
        f"Made with\n\n```json\n{made}\n```\n"
    )
