"""Rows -> a data set of token ids on disk, for train.py and for other programs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import TrainConfig
from finetune.files import write_json, written_folder
from finetune.prepare.lengths import LengthMeter, RowLengths
from finetune.rows.arrays import EncodedRow
from finetune.rows.encoding import Preparation, RowEncoder, count_rows, tokenise
from finetune.rows.formats import BadRow, Row
from finetune.rows.sources import Source, parse_sources
from finetune.rows.token_folders import TOKENISED, is_tokenised
from finetune.rows.tokenised import TOKENISED_FORMAT, card_text, write_parquet
from finetune.task import FineTuning

WHOLE = 2**20  # tokens: a limit that cuts no row


def check_replaceable(folder: Path) -> None:
    """Raises ValueError where a folder is there that is no such data set."""
    if folder.exists() and not is_tokenised(folder):
        raise ValueError(f"--output {folder} is there and is no tokenised data set")


@dataclass(frozen=True)
class UncutRows(RowEncoder):
    """Whole rows, of which `truncated` says whether `limited` cuts them."""

    limited: RowEncoder | None = None

    def encode(self, row: Row) -> list[EncodedRow]:
        limited_rows = self.limited.encode(row) if self.limited else []
        is_cut = any(part.truncated for part in limited_rows)
        return [part._replace(truncated=is_cut) for part in super().encode(row)]


class Tokenising:
    """The rows that the flags name, and their encoder, both as train.py has them.

    Attributes:
        counts: (good, bad) rows of each source.
    """

    def __init__(self, config: TrainConfig, *, whole: bool = False) -> None:
        """
        Args:
            whole: no row is cut; `truncated` says which ones a run would cut.
        Raises:
            ValueError, FileNotFoundError: flags, files or rows that do not fit; a bad row comes
                with its file and line.
        """
        task = FineTuning(config)
        self.config = config
        self.sources = parse_sources(config.train_path, weights=False)
        self.preparation = task.preparation("train")
        if whole:
            encoder = UncutRows(
                task.tokenizer, task.family, WHOLE, WHOLE, config.glm3_labels, task.encoder
            )
            self.preparation = Preparation(task.reader, encoder, config.on_bad_row)
        self.counts = [count_rows(source, self.preparation) for source in self.sources]

    @property
    def bad(self) -> int:
        """Bad rows that are skipped."""
        return sum(bad for _, bad in self.counts)

    def rows(self) -> Iterator[tuple[str, EncodedRow]]:
        """(place, row) of every row that has a label, in order."""
        for source, (good, _) in zip(self.sources, self.counts):
            for place, row in self.rows_of(source, good):
                if row.learns:
                    yield place, row

    def rows_of(self, source: Source, good: int) -> Iterator[tuple[str, EncodedRow]]:
        if source.is_tokenised:
            raise ValueError(f"{source.name} is tokenised already")
        names = [source.name] if source.is_hub else [str(file) for file in source.files]
        workers = self.config.preprocessing_num_workers
        good_rows = self.preparation.good_rows(source)
        for place, rows in tokenise(self.preparation.encoder, good_rows, good, True, workers):
            for row in rows:
                yield names[place.file] + place.tail, row


def write_tokenised(tokenising: Tokenising, output: Path) -> tuple[dict[str, Any], RowLengths]:
    """Write the data set; returns tokenised.json and the lengths of its rows.

    The folder appears whole or not at all; one that is there is replaced.

    Raises:
        BadRow: no row is left.
        OSError: it cannot be written.
    """
    meter = LengthMeter()

    def measured_rows() -> Iterator[tuple[str, EncodedRow]]:
        for place, row in tokenising.rows():
            meter.add(row)
            yield place, row

    with written_folder(output) as aside:
        files = write_parquet(aside, measured_rows())
        if not files:
            raise BadRow(f"{tokenising.config.train_path}: no rows are left")
        lengths = meter.lengths
        card = {
            "format_version": TOKENISED_FORMAT,
            "fingerprint": tokenising.preparation.encoder.fingerprint(),
            "rows": len(lengths.whole),
            "tokens": int(lengths.whole.sum()),
            "truncated": lengths.cut,
            "bad": tokenising.bad,
            "files": files,
        }
        write_json(aside / TOKENISED, card)
        text = card_text(output.name, card)
        (aside / "README.md").write_text(text, encoding="utf-8")
    return card, lengths
