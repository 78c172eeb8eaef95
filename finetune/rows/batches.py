"""The rows of a step, and batches of them. The order of rows is a pure function of (seed, epoch), so a resume needs one number."""

from collections.abc import Sequence

import numpy as np
import torch

from chatglm.conversations import IGNORED
from finetune.rows.arrays import Dataset

SHORTEST_TRUNK = 8  # tokens; a shorter common beginning is not worth an attention call


def epoch_order(lengths: np.ndarray, seed: int, epoch: int, *, group: int = 0) -> np.ndarray:
    """The permutation of the rows in an epoch (from 0); the same on every rank and after every resume.

    With `group`, rows of like length come together in batches of so many: sorted inside windows of 50 batches, the batches
    then shuffled, the last, incomplete one left last.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(lengths))
    if group:
        window = 50 * group
        order = np.concatenate(
            [
                part[np.argsort(lengths[part], kind="stable")]
                for part in np.split(order, range(window, len(order), window))
            ]
        )
        whole = len(order) // group * group
        batches = order[:whole].reshape(-1, group)
        order = np.concatenate([batches[draw.permutation(len(batches))].ravel(), order[whole:]])
    return order


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
    """The rows of one optimizer step on one rank: `accumulation` lists of row numbers, -1 for a place left empty.

    The step's rows do not depend on the number of ranks. They are dealt to passes and ranks longest first, each to the pass
    with the fewest tokens so far, so that no rank waits long for another. Every list is the same length on every rank;
    an epoch's last step may hold empty places, never an empty list.
    """
    passes = accumulation * world
    chunk = order[step * micro * passes : (step + 1) * micro * passes]
    room = -(-len(chunk) // passes)
    dealt: list[list[int]] = [[] for _ in range(passes)]
    tokens = [0] * passes
    for row in chunk[np.argsort(-lengths[chunk], kind="stable")].tolist():
        chosen = min(
            (i for i in range(passes) if len(dealt[i]) < room), key=lambda i: (tokens[i], i)
        )
        dealt[chosen].append(row)
        tokens[chosen] += int(lengths[row])
    return [(rows + [-1] * room)[:room] for rows in dealt[rank::world]]


def collate(
    data: Dataset,
    rows: list[int],
    *,
    ragged: bool = True,
    share: bool = False,
    multiple: int = 1,
    pad_id: int = 0,
) -> dict:
    """What nll_sum takes, for these rows: a ragged row of all of them, or a batch padded on the right.

    Nothing real looks right, so padding needs no attention mask. An empty place (-1) becomes the shortest row without labels,
    so that every rank runs every pass.

    Args:
        share: let the beginning that all rows have in common, if they have, be computed once (ragged, causal models).
        multiple: make a ragged row's length a multiple of this, its number of predictions one of half of it, with what is
            not counted.
    """
    filler = int(data.row_lengths.argmin()) if -1 in rows else None
    ids = [data.ids(filler if r == -1 else r) for r in rows]
    masked = [len(ids[i]) if r == -1 else data.n_masked(r) for i, r in enumerate(rows)]
    known = [None if r == -1 else data.labels(r) for r in rows]
    if ragged:
        return lay_end_to_end(ids, masked, share, multiple, known)
    shape = len(rows), max(map(len, ids))
    input_ids, labels = np.full(shape, pad_id), np.full(shape, IGNORED)
    for i, (row, n, own) in enumerate(zip(ids, masked, known)):
        input_ids[i, : len(row)] = row
        labels[i, n : len(row)] = (row if own is None else own)[n:]
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def lay_end_to_end(
    ids: Sequence[Sequence[int]],
    masked: list[int],
    share: bool,
    multiple: int,
    labels: Sequence[np.ndarray | None] | None = None,
) -> dict:
    """A ragged row (1, S) of sequences, without their last tokens, which predict nothing; see nll_sum for the other entries.

    `labels`: of each sequence, None where they are its ids after the first `masked`.
    """
    sequences = [np.asarray(sequence) for sequence in ids]
    trunk = common_beginning(sequences, masked) if share and len(ids) > 1 else 0
    pieces, lengths, shared = ([sequences[0][:trunk]], [trunk], [0]) if trunk else ([], [], [])
    keep, targets = [], []
    stop = trunk
    for sequence, n, known in zip(sequences, masked, labels or [None] * len(ids)):
        predicts = np.arange(n - 1, len(sequence) - 1)
        if known is not None:
            predicts = predicts[known[n:] != IGNORED]
        if len(predicts):
            keep.append(predicts + stop - trunk)
            targets.append((sequence if known is None else known)[predicts + 1])
        else:  # an empty place: one prediction that is not counted keeps the shapes usual
            keep.append([stop])
            targets.append([IGNORED])
        pieces.append(sequence[trunk:-1])
        lengths.append(len(pieces[-1]))
        shared.append(trunk)
        stop += lengths[-1]
    row, kept, wanted = (
        np.concatenate(parts).astype(np.int64, copy=False) for parts in (pieces, keep, targets)
    )
    spare = -len(kept) % max(1, multiple // 2)
    kept, wanted = (
        np.append(kept, np.full(spare, kept[-1])),
        np.append(wanted, np.full(spare, IGNORED)),
    )
    spare = -len(row) % multiple  # after the last sequence, where nothing looks
    row = np.append(row, np.full(spare, row[-1]))
    lengths[-1] += spare
    return {
        "input_ids": torch.from_numpy(row)[None],
        "lengths": lengths,
        "shared": shared,
        "keep": torch.from_numpy(kept),
        "targets": torch.from_numpy(wanted),
    }


def common_beginning(sequences: list[np.ndarray], masked: list[int]) -> int:
    """Tokens that all begin with; 0 where they are too few. They end before the first that predicts, and none is all of a sequence."""
    trunk = max(0, min(min(n, len(row) - 1) - 1 for row, n in zip(sequences, masked)))
    for row in sequences[1:]:
        differs = row[:trunk] != sequences[0][:trunk]
        trunk = int(differs.argmax()) if differs.any() else trunk
    return trunk if trunk >= SHORTEST_TRUNK else 0


def count_labels(batch: dict) -> int:
    """Tokens of a collated batch that carry loss; the first column of labels has nothing that predicts it."""
    labels = batch["labels"][:, 1:] if "labels" in batch else batch["targets"]
    return int((labels != IGNORED).sum())
