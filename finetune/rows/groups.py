"""Encoded rows that belong together: the documents of a pack, the two answers of a pair.

Free of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from finetune.rows.arrays import Dataset, join_datasets


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Each group of consecutive rows is one row to the loop.

    Attributes:
        data: the rows.
        starts: (groups + 1,) int64, where each group begins in `data`, and where the last one ends.
    """

    data: Dataset
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def truncated(self) -> int:
        """Rows that were cut."""
        return self.data.truncated

    @property
    def skipped(self) -> int:
        """Rows that do not count."""
        return self.data.skipped

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """(groups,) int64, tokens of each group."""
        return np.add.reduceat(self.data.row_lengths.astype(np.int64), self.starts[:-1])

    def place(self, row: int) -> str:
        """ "file:line" of a group's first row, for messages."""
        return self.data.place(int(self.starts[row]))

    def rows(self, row: int) -> range:
        """The numbers in `data` of a group's rows."""
        return range(int(self.starts[row]), int(self.starts[row + 1]))


def join_groups(parts: Sequence[RowGroups]) -> RowGroups:
    """Several as one, in this order; nothing is copied."""
    starts = [np.zeros(1, np.int64)]
    rows = 0
    for part in parts:
        starts.append(part.starts[1:] + rows)
        rows += len(part.data)
    return RowGroups(join_datasets([part.data for part in parts]), np.concatenate(starts))
