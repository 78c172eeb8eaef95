"""Answers that are compared: encoded, grouped, and laid end to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from finetune.preference.config import PreferenceConfig
from finetune.preference.formats import Preference, PreferenceReader
from finetune.row_task import RowTask
from finetune.rows.arrays import Dataset, EncodedRow, RowArrays
from finetune.rows.encoding import Preparation, RowEncoder
from finetune.rows.formats import Row, parse_columns
from finetune.rows.groups import RowGroups, join_groups
from finetune.rows.sources import Source
from finetune.rows.streaming import Stream


@dataclass(frozen=True)
class PreferenceEncoder(RowEncoder):
    """Preferences to ids: the two answers of each pair in turn, the better one first.

    Attributes:
        pairing: as PreferenceReader's; "labelled": each answer alone.
    """

    pairing: str = "all"

    def check(self, row: Row) -> None:
        """As RowEncoder's, of a question with one of its answers."""
        super().check(row.with_answer(0) if isinstance(row, Preference) else row)

    def encode(self, row: Row) -> list[EncodedRow]:
        """Rows with the scores of their answers: as RowEncoder's, of one answer each."""
        if not isinstance(row, Preference):
            raise TypeError(f"wanted a Preference, got {type(row).__name__}")
        if self.pairing == "labelled":
            return [self.answer(row, number, score) for number, score in row.labelled()]
        encoded = []
        for better, worse in row.pairs(self.pairing):
            encoded.append(self.answer(row, better, row.scores[better]))
            encoded.append(self.answer(row, worse, row.scores[worse]))
        return encoded

    def answer(self, row: Preference, number: int, score: float) -> EncodedRow:
        """One answer after its question, all of which carries no loss."""
        encoded = super().encode(row.with_answer(number))[-1]
        return encoded._replace(score=score)

    def settings(self) -> list[Any]:
        """As RowEncoder's."""
        return [*super().settings(), "preference", self.pairing]


def group_rows(rows: RowArrays, size: int, is_skip: bool, max_len: int) -> RowGroups:
    """Each `size` rows in turn as a group, where all of them have a label.

    Args:
        is_skip: a group with a row that was cut does not count.
    Raises:
        ValueError: none is left.
    """
    is_usable = rows.columns["n_masked"] < rows.lengths
    is_cut = rows.truncated
    if is_skip:
        is_usable &= ~is_cut
    is_group_usable = is_usable.reshape(-1, size).all(axis=1)
    chosen = np.flatnonzero(np.repeat(is_group_usable, size)).astype(np.int32)
    if not len(chosen):
        raise ValueError(
            f"the answers of all {rows.facts['good']} rows are longer than --max_len {max_len}"
        )
    skipped = int((~is_group_usable).sum())
    data = Dataset((rows,), (chosen,), int(is_cut.sum()), skipped)
    return RowGroups(data, size_starts(len(chosen), size))


def size_starts(rows: int, size: int) -> np.ndarray:
    """RowGroups.starts of groups of `size` rows each."""
    return np.arange(0, rows + 1, size, dtype=np.int64)


Config = TypeVar("Config", bound=PreferenceConfig)


class PreferenceTask(RowTask[Config, RowGroups]):
    """A task over groups of answers: pairs, or answers that are labelled."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.default_output_dir = f"output-{self.family.name}-{config.task}-{config.train_type}"

    @property
    def group_size(self) -> int:
        return 1 if self.config.pairing == "labelled" else 2

    @property
    def reader(self) -> PreferenceReader:
        config = self.config
        columns = parse_columns(config.columns, config.column_names)
        return PreferenceReader(
            "", config.data_format, columns, self.family.name, pairing=config.pairing
        )

    @property
    def encoder(self) -> PreferenceEncoder:
        config = self.config
        return PreferenceEncoder(
            self.tokenizer,
            self.family,
            config.max_len,
            config.max_src_len,
            config.glm3_labels,
            pairing=config.pairing,
        )

    def preparation(self, name: str) -> Preparation:
        """As RowTask's; an evaluation row's answers are compared too."""
        limit = self.config.dataset_length if name == "train" else None
        return Preparation(self.reader, self.encoder, self.config.on_bad_row, limit)

    def choose(self, rows: RowArrays, *, is_evaluation: bool) -> RowGroups:
        config = self.config
        is_skip = config.is_skip and not is_evaluation
        return group_rows(rows, self.group_size, is_skip, config.max_len)

    def join(self, parts: Sequence[RowGroups]) -> RowGroups:
        return join_groups(parts)

    def open_stream(self, sources: list[Source], replay: list[Source]) -> Stream:
        stream = super().open_stream(sources, replay)
        stream.group = self.group_size
        return stream

    def of_stream(self, data: Dataset) -> RowGroups:
        return RowGroups(data, size_starts(len(data), self.group_size))

    def count_labels(self, batch: Any) -> float:
        """The number of groups that are no empty places."""
        return float(batch["real"].sum())


def rows_of_groups(data: RowGroups, groups: list[int]) -> tuple[list[int], Tensor]:
    """(rows of the groups, (groups,) fp32: 1, or 0 for an empty place).

    An empty place (-1) has the rows of the shortest group, so that every rank runs every pass.
    """
    filler = int(data.row_lengths.argmin()) if -1 in groups else -1
    rows: list[int] = []
    is_real: list[float] = []
    for group in groups:
        rows += data.rows(filler if group == -1 else group)
        is_real.append(float(group != -1))
    return rows, torch.tensor(is_real)


def sequence_counts(lengths: list[int], keep: Tensor, sequences: int) -> list[int]:
    """How many of the places `keep` each of the last `sequences` of a ragged row has.

    The first of `lengths` may be a beginning that all share.
    """
    edges = np.cumsum([0, *lengths])[-sequences - 1 :]
    kept_before = np.searchsorted(keep.numpy(), edges)
    return np.diff(kept_before).tolist()
