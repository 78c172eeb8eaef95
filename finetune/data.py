"""From rows to encodings to batches. The order of rows is a pure function of (seed, epoch), so a resume needs one number."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from chatglm.conversations import CONVERSATIONS, GLM3_LABELS, IGNORED
from finetune.files import CACHE_GB, cache_arrays, read_arrays
from finetune.formats import BadRow, Row
from finetune.sources import read_rows as read_rows

SHORTEST_TRUNK = 8  # tokens; a shorter common beginning is not worth an attention call
CACHE_FORMAT = 1  # of --data_cache; raised where the same rows and settings give other ids than before
CHUNK = 64  # rows that a process of tokenise takes at a time


class EncodedRow(NamedTuple):
    """One training row: its first `n_masked` ids carry no loss; `labels`, where the ids after them are not simply their labels."""

    input_ids: list[int]
    n_masked: int
    truncated: bool
    labels: list[int] | None = None

    @property
    def learns(self) -> bool:
        return self.n_masked < len(self.input_ids)


@dataclass(frozen=True)
class Dataset:
    """Encoded rows. `input_ids[i]` is a list of ids whose first `n_masked[i]` carry no loss.

    labels: of the rows (by number) of several answers: as long as the ids, IGNORED where there is no loss.
    """

    input_ids: list[list[int]]
    n_masked: list[int]
    places: list[str]
    truncated: int
    skipped: int
    labels: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self):
        return len(self.input_ids)


@dataclass(frozen=True)
class Encoder:
    """Rows to ids as a family is trained. Lengths are in tokens; role_labels as `chatglm.conversations` has it."""

    tokenizer: object
    family: object
    max_len: int
    max_src_len: int
    glm3_labels: str = GLM3_LABELS[0]

    def encode(self, row: Row) -> list[EncodedRow]:
        """One row; of a conversation in ChatGLM-6B's layout, one an answer. A row cut so short that no answer is left learns nothing.

        Raises ValueError: several answers (a test file), or limits that leave no room.
        """
        if len(row.answers) != 1:
            raise BadRow(f"{row.place}: a training row has one output, got a list of {len(row.answers)}")
        role_labels = self.glm3_labels == GLM3_LABELS[0]
        if not row.turns:
            made = self.family.encode_example(self.tokenizer, row.prompt, row.answers[0], self.max_len, self.max_src_len)
            return [EncodedRow(made.input_ids, made.n_masked + (self.family.name == "glm3" and not role_labels), made.truncated)]
        encoded = []
        for ids, labels, cut in CONVERSATIONS[self.family.name](self.tokenizer, list(row.turns), self.max_len, self.max_src_len, role_labels):
            first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
            encoded.append(EncodedRow(ids, first, cut, None if labels[first:] == ids[first:] else labels))
        return encoded

    def key(self, rows: list[Row]) -> str:
        """A name for all that encoded rows depend on: their text, the tokenizer's model, the settings and CACHE_FORMAT."""
        tokenizer = self.tokenizer
        digest = hashlib.sha256(f"{CACHE_FORMAT} {self.family.name} {self.max_len} {self.max_src_len} {self.glm3_labels} ".encode())
        settings = {k: v for k, v in tokenizer.init_kwargs.items() if k not in ("vocab_file", "name_or_path")}
        digest.update(json.dumps([settings, len(tokenizer)], default=str, sort_keys=True).encode())
        digest.update(hashlib.sha256(Path(tokenizer.vocab_file).read_bytes()).digest())
        for row in rows:
            digest.update(json.dumps([row.prompt, *row.answers, *row.turns]).encode())
        return digest.hexdigest()[:32]


def encode_rows(
    rows: list[Row], tokenizer, family, *, max_len: int, max_src_len: int, glm3_labels=GLM3_LABELS[0], is_skip=False, progress=False,
    cache: Path | None = None, cache_gb: float = CACHE_GB, workers: int = 1,
) -> Dataset:  # fmt: skip
    """Encode rows as `family` trains on them; cut rows are counted, or dropped with `is_skip`. Rows without a label are dropped.

    With `cache`, a folder, what was encoded once from the same rows, tokenizer and settings is read from there. It holds at most
    `cache_gb` GB: what was not used for the longest time goes.

    Raises:
        ValueError: nothing is left, or a row has several answers (a test file).
    """
    encoder = Encoder(tokenizer, family, max_len, max_src_len, glm3_labels)
    file = cache / f"{encoder.key(rows)}.safetensors" if cache else None
    encoded = read_encoded(file) if file else None
    if encoded is None:
        encoded = tokenise(encoder, rows, progress, workers)
        if file:
            write_encoded(file, encoded, cache_gb)
    pairs = [(place.place, row) for place, made in zip(rows, encoded) for row in made]
    kept = [(place, row) for place, row in pairs if row.learns and not (is_skip and row.truncated)]
    if not kept:
        raise ValueError(f"all {len(rows)} rows are longer than --max_len {max_len} / --max_src_len {max_src_len}")
    return dataset_of(kept, sum(row.truncated for _, row in pairs), len(pairs) - len(kept))


def dataset_of(rows: list[tuple[str, EncodedRow]], truncated: int = 0, skipped: int = 0) -> Dataset:
    """A Dataset of (place, encoded row)."""
    labels = {i: row.labels for i, (_, row) in enumerate(rows) if row.labels is not None}
    return Dataset([row.input_ids for _, row in rows], [row.n_masked for _, row in rows], [place for place, _ in rows], truncated, skipped, labels)


def join(parts: list[Dataset]) -> Dataset:
    """Several as one, in this order."""
    rows = [
        (place, EncodedRow(ids, n, False, part.labels.get(i)))
        for part in parts for i, (ids, n, place) in enumerate(zip(part.input_ids, part.n_masked, part.places))
    ]  # fmt: skip
    return dataset_of(rows, sum(part.truncated for part in parts), sum(part.skipped for part in parts))


def tokenise(encoder: Encoder, rows: list[Row], progress: bool, workers: int = 1) -> list[list[EncodedRow]]:
    """What `encoder` makes of each row, in their order; over `workers` processes. A bar shows where it takes seconds."""
    from tqdm import tqdm

    with tqdm(total=len(rows), desc="encoding", unit="row", disable=not progress, delay=2) as bar:
        encoded: list[list[EncodedRow]] = []
        for part in encode_chunks(encoder, rows, workers):
            encoded += part
            bar.update(len(part))
    return encoded


def encode_chunks(encoder: Encoder, rows: list[Row], workers: int) -> Iterator[list[list[EncodedRow]]]:
    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    if min(workers, len(chunks)) < 2:
        yield from ([encoder.encode(row) for row in chunk] for chunk in chunks)
        return
    # Forked, so that the tokenizer needs no pickling and transformers no second import.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (encoder,)) as pool:
        yield from pool.map(_encode_chunk, chunks)


def _start_worker(encoder: Encoder):
    global _encoder
    _encoder = encoder


def _encode_chunk(rows: list[Row]) -> list[list[EncodedRow]]:
    return [_encoder.encode(row) for row in rows]


def read_encoded(file: Path) -> list[list[EncodedRow]] | None:
    """What `write_encoded` wrote; None where it is not there or not whole."""
    arrays = read_arrays(file)
    try:
        ids, labels = (np.split(arrays[name], arrays[lengths].cumsum()[:-1]) for name, lengths in (("ids", "lengths"), ("labels", "label_lengths")))
        rows = iter([
            EncodedRow(i.tolist(), n, cut, own.tolist() if len(own) else None)
            for i, n, cut, own in zip(ids, arrays["n_masked"].tolist(), arrays["truncated"].tolist(), labels)
        ])  # fmt: skip
        return [[next(rows) for _ in range(count)] for count in arrays["made"].tolist()]
    except KeyError:
        return None


def write_encoded(file: Path, encoded: list[list[EncodedRow]], limit_gb: float = CACHE_GB):
    rows = [row for made in encoded for row in made]
    labels = [row.labels or [] for row in rows]
    cache_arrays(file, {
        "ids": np.array([i for row in rows for i in row.input_ids], np.int32), "lengths": np.array([len(row.input_ids) for row in rows], np.int64),
        "labels": np.array([i for own in labels for i in own], np.int32), "label_lengths": np.array([len(own) for own in labels], np.int64),
        "n_masked": np.array([row.n_masked for row in rows], np.int32), "truncated": np.array([row.truncated for row in rows], bool),
        "made": np.array([len(made) for made in encoded], np.int32),
    }, limit_gb)  # fmt: skip


def epoch_order(lengths: np.ndarray, seed: int, epoch: int, *, group: int = 0) -> np.ndarray:
    """The permutation of the rows in an epoch (from 0); the same on every rank and after every resume.

    With `group`, rows of like length come together in batches of so many: sorted inside windows of 50 batches, the batches
    then shuffled, the last, incomplete one left last.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(lengths))
    if group:
        window = 50 * group
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(window, len(order), window))])
        whole = len(order) // group * group
        batches = order[:whole].reshape(-1, group)
        order = np.concatenate([batches[draw.permutation(len(batches))].ravel(), order[whole:]])
    return order


def step_rows(
    order: np.ndarray, step: int, lengths: np.ndarray, *, micro: int, accumulation: int, rank: int, world: int
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
        chosen = min((i for i in range(passes) if len(dealt[i]) < room), key=lambda i: (tokens[i], i))
        dealt[chosen].append(row)
        tokens[chosen] += int(lengths[row])
    return [(rows + [-1] * room)[:room] for rows in dealt[rank::world]]


def collate(data: Dataset, rows: list[int], *, ragged: bool = True, share: bool = False, multiple: int = 1, pad_id: int = 0) -> dict:
    """What nll_sum takes, for these rows: a ragged row of all of them, or a batch padded on the right.

    Nothing real looks right, so padding needs no attention mask. An empty place (-1) becomes the shortest row without labels,
    so that every rank runs every pass.

    Args:
        share: let the beginning that all rows have in common, if they have, be computed once (ragged, causal models).
        multiple: make a ragged row's length a multiple of this, its number of predictions one of half of it, with what is
            not counted.
    """
    filler = min(range(len(data)), key=lambda i: len(data.input_ids[i])) if -1 in rows else None
    ids = [data.input_ids[filler if r == -1 else r] for r in rows]
    masked = [len(ids[i]) if r == -1 else data.n_masked[r] for i, r in enumerate(rows)]
    known = [data.labels.get(r) for r in rows]
    if ragged:
        return lay_end_to_end(ids, masked, share, multiple, known)
    longest = max(map(len, ids))
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (row, n, own) in enumerate(zip(ids, masked, known)):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, n : len(row)] = torch.tensor((own or row)[n:], dtype=torch.long)
    return {"input_ids": input_ids, "labels": labels}


def lay_end_to_end(ids: list[list[int]], masked: list[int], share: bool, multiple: int, labels: list | None = None) -> dict:
    """A ragged row (1, S) of sequences, without their last tokens, which predict nothing; see nll_sum for the other entries.

    `labels`: of each sequence, None where they are its ids after the first `masked`.
    """
    # A trunk ends before the first place that predicts, and every sequence keeps a token of its own.
    heads = [row[: min(n, len(row) - 1) - 1] for row, n in zip(ids, masked)]
    trunk = len(os.path.commonprefix(heads)) if share and len(ids) > 1 else 0
    trunk = trunk if trunk >= SHORTEST_TRUNK else 0
    row, lengths, shared = (list(ids[0][:trunk]), [trunk], [0]) if trunk else ([], [], [])
    keep, targets = [], []
    for sequence, n, known in zip(ids, masked, labels or [None] * len(ids)):
        own = sequence[trunk:-1]
        predicts = [place for place in range(n - 1, len(sequence) - 1) if not known or known[place + 1] != IGNORED]
        if not predicts:  # an empty place: one prediction that is not counted keeps the shapes usual
            keep.append(len(row))
            targets.append(IGNORED)
        keep += [len(row) + place - trunk for place in predicts]
        targets += [(known or sequence)[place + 1] for place in predicts]
        row += own
        lengths.append(len(own))
        shared.append(trunk)
    spare = -len(keep) % max(1, multiple // 2)
    keep += keep[-1:] * spare
    targets += [IGNORED] * spare
    spare = -len(row) % multiple
    row += row[-1:] * spare  # after the last sequence, where nobody looks
    lengths[-1] += spare
    return {
        "input_ids": torch.tensor([row]), "lengths": lengths, "shared": shared,
        "keep": torch.tensor(keep), "targets": torch.tensor(targets),
    }  # fmt: skip


def count_labels(batch: dict) -> int:
    """Tokens of a collated batch that carry loss; the first column of labels has nothing that predicts it."""
    labels = batch["labels"][:, 1:] if "labels" in batch else batch["targets"]
    return int((labels != IGNORED).sum())
