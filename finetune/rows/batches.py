"""The rows of a step, and batches of them.

The order of rows is a pure function of (seed, epoch), so a resumed run needs one number.
"""

from collections.abc import Sequence
from typing import Protocol, TypedDict, final

import numpy as np
import torch
from torch import Tensor

from chatglm.conversations import IGNORED

SHORTEST_TRUNK = 8  # tokens; a shorter common beginning is not worth an attention call


@final
class PaddedBatch(TypedDict):
    """Rows side by side: the arguments of nll_sum, both (B, S)."""

    input_ids: Tensor
    labels: Tensor


@final
class RaggedBatch(TypedDict):
    """Rows end to end: the arguments of nll_sum, which describes them."""

    input_ids: Tensor
    lengths: list[int]
    shared: list[int]
    keep: Tensor
    targets: Tensor


Batch = PaddedBatch | RaggedBatch


class BatchLayout(TypedDict):
    """How the rows of a pass are laid out: the options of `collate`."""

    ragged: bool
    share: bool
    multiple: int
    pad_id: int


def epoch_order(lengths: np.ndarray, seed: int, epoch: int, *, group: int = 0) -> np.ndarray:
    """The permutation of the rows in an epoch (from 0).

    It is the same on every rank and after every resume.

    With `group`, rows of like length come together in batches of so many rows: they are sorted
    inside windows of 50 batches, then the batches are shuffled. The last, incomplete batch stays
    last.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(lengths))
    if not group:
        return order
    window = 50 * group
    windows = np.split(order, range(window, len(order), window))
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in windows])
    whole = len(order) // group * group
    batches = order[:whole].reshape(-1, group)
    shuffled = batches[draw.permutation(len(batches))]
    return np.concatenate([shuffled.ravel(), order[whole:]])


def step_rows(
    order: np.ndarray,
    step: int,
    lengths: np.ndarray,
    *,
    micro: int,
    accumulation: int,
    rank: int,
    world: int,
) -> list[list[int]]:
    """The rows of one optimizer step on one rank: `accumulation` lists of row numbers.

    The step's rows do not depend on the world size. They are assigned to passes and ranks longest
    first, each to the pass with the fewest tokens so far, so that no rank waits long for another.
    Every list has the same length on every rank. An epoch's last step may hold empty places (-1),
    but no empty list.
    """
    passes = accumulation * world
    chunk = order[step * micro * passes : (step + 1) * micro * passes]
    room = -(-len(chunk) // passes)
    assigned: list[list[int]] = [[] for _ in range(passes)]
    tokens = [0] * passes
    for row in chunk[np.argsort(-lengths[chunk], kind="stable")].tolist():
        with_room = [i for i in range(passes) if len(assigned[i]) < room]
        lightest = min(with_room, key=lambda i: (tokens[i], i))
        assigned[lightest].append(row)
        tokens[lightest] += int(lengths[row])
    return [(rows + [-1] * room)[:room] for rows in assigned[rank::world]]


class LabelledRows(Protocol):
    """Encoded rows by number: a Dataset, or what is laid out as one."""

    @property
    def row_lengths(self) -> np.ndarray:
        """(rows,) tokens of each."""

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int32."""

    def n_masked(self, row: int) -> int:
        """How many of a row's first ids carry no loss."""

    def labels(self, row: int) -> np.ndarray | None:
        """(tokens,) int32, IGNORED where there is no loss; None: the ids after n_masked."""


def collate(
    data: LabelledRows,
    rows: list[int],
    *,
    ragged: bool = True,
    share: bool = False,
    multiple: int = 1,
    pad_id: int = 0,
) -> Batch:
    """The arguments of nll_sum for these rows: one ragged row, or a batch padded on the right.

    Attention is causal, so padding on the right needs no attention mask. An empty place (-1)
    becomes the shortest row without labels, so that every rank runs every pass.

    Args:
        ragged: join the rows end to end; else pad them with `pad_id`.
        share: compute a beginning that all rows have in common only once (ragged, causal models).
        multiple: make a ragged row's length a multiple of this, and its number of predictions a
            multiple of half of it; what is added carries no loss.
    """
    filler = int(data.row_lengths.argmin()) if -1 in rows else -1
    ids: list[np.ndarray] = []
    masked: list[int] = []
    labels_of_rows: list[np.ndarray | None] = []
    for row in rows:
        ids.append(data.ids(filler if row == -1 else row))
        masked.append(len(ids[-1]) if row == -1 else data.n_masked(row))
        labels_of_rows.append(None if row == -1 else data.labels(row))
    if ragged:
        return lay_end_to_end(ids, masked, share, multiple, labels_of_rows)
    shape = (len(rows), max(map(len, ids)))
    input_ids = np.full(shape, pad_id)
    labels = np.full(shape, IGNORED)
    for i, (row_ids, n_masked, row_labels) in enumerate(zip(ids, masked, labels_of_rows)):
        stop = len(row_ids)
        targets = row_ids if row_labels is None else row_labels
        input_ids[i, :stop] = row_ids
        labels[i, n_masked:stop] = targets[n_masked:]
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def lay_end_to_end(
    ids: Sequence[Sequence[int] | np.ndarray],
    masked: list[int],
    share: bool,
    multiple: int,
    labels: Sequence[np.ndarray | None] | None = None,
) -> RaggedBatch:
    """A ragged row (1, S) of sequences, without their last tokens, which predict nothing.

    nll_sum describes the other entries.

    Args:
        masked: of each sequence, the number of its first ids that carry no loss.
        labels: of each sequence; None where they are its ids after the first `masked`.
    """
    sequences = list(map(np.asarray, ids))
    trunk = common_beginning(sequences, masked) if share and len(ids) > 1 else 0
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    shared: list[int] = []
    if trunk:
        pieces.append(sequences[0][:trunk])
        lengths.append(trunk)
        shared.append(0)
    keep: list[np.ndarray | list[int]] = []  # positions that predict
    targets: list[np.ndarray | list[int]] = []
    stop = trunk
    for sequence, n_masked, row_labels in zip(sequences, masked, labels or [None] * len(ids)):
        n_masked = max(n_masked, 1)  # nothing predicts a sequence's first token
        predicts = np.arange(n_masked - 1, len(sequence) - 1)
        if row_labels is not None:
            predicts = predicts[row_labels[n_masked:] != IGNORED]
        if len(predicts):
            keep.append(predicts + stop - trunk)
            targets.append((sequence if row_labels is None else row_labels)[predicts + 1])
        else:  # an empty place: one prediction without loss keeps the shapes usual
            keep.append([stop])
            targets.append([IGNORED])
        pieces.append(sequence[trunk:-1])
        lengths.append(len(pieces[-1]))
        shared.append(trunk)
        stop += lengths[-1]
    row = join_integers(pieces)
    positions = join_integers(keep)
    spare = -len(positions) % max(1, multiple // 2)
    positions = np.append(positions, np.full(spare, positions[-1]))
    predicted = np.append(join_integers(targets), np.full(spare, IGNORED))
    # No other token attends to what follows the last sequence.
    spare = -len(row) % multiple
    row = np.append(row, np.full(spare, row[-1]))
    lengths[-1] += spare
    return {
        "input_ids": torch.from_numpy(row)[None],
        "lengths": lengths,
        "shared": shared,
        "keep": torch.from_numpy(positions),
        "targets": torch.from_numpy(predicted),
    }


def join_integers(parts: Sequence[np.ndarray | list[int]]) -> np.ndarray:
    """The parts end to end, int64."""
    return np.concatenate(parts).astype(np.int64, copy=False)


def common_beginning(sequences: list[np.ndarray], masked: list[int]) -> int:
    """The number of tokens that all sequences begin with; 0 where it is below SHORTEST_TRUNK.

    The beginning ends before the first token that predicts, and is never a whole sequence.
    """
    limits = [min(n, len(row) - 1) - 1 for row, n in zip(sequences, masked)]
    trunk = max(0, min(limits))
    for row in sequences[1:]:
        differs = row[:trunk] != sequences[0][:trunk]
        trunk = int(differs.argmax()) if differs.any() else trunk
    return trunk if trunk >= SHORTEST_TRUNK else 0


def count_labels(batch: Batch) -> int:
    """Tokens of a collated batch that carry loss; no token predicts the first column of labels."""
    labels = batch["labels"][:, 1:] if "labels" in batch else batch["targets"]
    return int((labels != IGNORED).sum())
