"""Which rows of a loaded set an epoch reads, and in what order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from finetune.rows.batches import epoch_order


class RowSet(Protocol):
    """What the loop asks of its rows: a Dataset has it, and the prompts of a length predictor."""

    @property
    def row_lengths(self) -> np.ndarray:
        """(rows,) tokens of each."""

    def __len__(self) -> int: ...

    def place(self, row: int) -> str:
        """ "file:line", for messages."""


Rows = TypeVar("Rows", bound=RowSet)


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in a step.

    Attributes:
        rows: numbers of the rows of `data`, without empty places.
        tokens: of these rows.
        batches: one per pass.
        metrics: what a task measured while it made them; the run's log gets it.
    """

    data: RowSet
    rows: list[int]
    tokens: int
    batches: list[Mapping[str, Any]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EpochRows(Generic[Rows]):
    """Loaded rows, and the order in which each epoch reads them: a pure function of the seed.

    Attributes:
        grouped: rows of like length come together.
        draws: (rows, rows drawn an epoch) of each source; empty where every row is read once.
    """

    data: Rows
    seed: int
    grouped: bool = False
    draws: tuple[tuple[int, int], ...] = ()

    def count(self) -> int:
        """The number of rows that an epoch reads."""
        return sum(drawn for _, drawn in self.draws) or len(self.data)

    def of_step(self, epoch: int, place: int, step_rows: int) -> tuple[Rows, np.ndarray, int]:
        """(rows, their order, number of the step in that order) of step `place` of an epoch.

        `step_rows` is the number of rows of a step.
        """
        return self.data, self.order(epoch, step_rows if self.grouped else 0), place

    @cached_property
    def order(self) -> Callable[[int, int], np.ndarray]:
        """`make_order`, which remembers two epochs."""
        return lru_cache(2)(self.make_order)

    def make_order(self, epoch: int, group: int) -> np.ndarray:
        """(rows of the epoch,) int32: row numbers; `group` as in epoch_order."""
        lengths = self.data.row_lengths
        if not self.draws:
            return epoch_order(lengths, self.seed, epoch, group=group).astype(np.int32)
        drawn = self.drawn_rows(epoch)
        order = epoch_order(lengths[drawn], self.seed, epoch, group=group)
        return drawn[order].astype(np.int32)

    def drawn_rows(self, epoch: int) -> np.ndarray:
        """The numbers of the rows that an epoch draws, source by source."""
        parts = []
        start = 0
        for number, (rows, count) in enumerate(self.draws):
            parts.append(start + draw_rows(rows, count, self.seed, number, epoch))
            start += rows
        return np.concatenate(parts)


def draw_rows(rows: int, drawn: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """The numbers of the rows that an epoch (from 0) reads of a source: `drawn` of its `rows` rows.

    Where `drawn` equals `rows`, each is read once. Each epoch continues where the last one stopped
    in a sequence of permutations, so at any time no row has been read more than once more often
    than another.
    """
    start = epoch * drawn
    stop = start + drawn
    cycles = range(start // rows, -(-stop // rows))
    permutations = []
    for cycle in cycles:
        permutations.append(np.random.default_rng([seed, stream, cycle]).permutation(rows))
    walk = np.concatenate(permutations)
    first = cycles.start * rows
    return walk[start - first : stop - first]
