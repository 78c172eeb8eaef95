"""From a file of rows to batches. The order of rows is a pure function of (seed, epoch), so a resume needs one number."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from finetune.files import cache_arrays, read_arrays

IGNORED = -100  # label of a token that carries no loss
SHORTEST_TRUNK = 8  # tokens; a shorter common beginning is not worth an attention call


@dataclass(frozen=True)
class Row:
    """One question and its answer(s); `place` is "file:line" for messages."""

    prompt: str
    answers: tuple[str, ...]
    place: str

    def with_first_answer(self) -> "Row":
        return replace(self, answers=self.answers[:1])


class BadRow(ValueError):
    """A row that is not {instruction, input, output} or {text, answer}."""


def parse_row(item, place: str, prompt_text: str = "") -> Row:
    """A JSON value to a Row; raises BadRow saying what was wanted, what came, and where.

    An empty answer is one: "nothing", and the end token is learnt (spo_0.json has such rows).
    """
    if not isinstance(item, dict):
        raise BadRow(f"{place}: wanted an object, got {type(item).__name__}")
    if "instruction" in item or "output" in item:
        wanted, answer_key = ("instruction", "input", "output"), "output"
        item = {"input": "", **item}
    else:
        wanted, answer_key = ("text", "answer"), "answer"
    for key in wanted:
        if key not in item:
            raise BadRow(f'{place}: no key "{key}"; wanted instruction, input, output (or text, answer)')
        is_list = isinstance(item[key], list) and item[key] and all(isinstance(x, str) for x in item[key])
        if not (isinstance(item[key], str) or (key == answer_key and is_list)):
            raise BadRow(f'{place}: "{key}" must be text, got {json.dumps(item[key], ensure_ascii=False)[:60]}')
    answers = item[answer_key] if isinstance(item[answer_key], list) else [item[answer_key]]
    prompt = item["instruction"] + item["input"] if answer_key == "output" else prompt_text + item["text"]
    if not prompt:
        raise BadRow(f"{place}: the prompt is empty")
    try:
        "".join([prompt, *answers]).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{place}: half a surrogate pair in the text: {error.object[error.start]!a}") from None
    return Row(prompt, tuple(answers), place)


def read_json_items(path: str | Path) -> Iterator[tuple[str, object]]:
    """(place, value) of a JSON-lines file or a JSON list; a value that does not parse comes as BadRow."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadRow(f"{path}:{line}: not UTF-8") from None
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {getattr(error, 'msg', error)}") from None
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(items))
        return
    # Not splitlines(): that also breaks at characters which JSON allows inside a string.
    yield from parse_lines(path, text.split("\n"))


def parse_lines(path: Path, lines: list[str] | list[bytes]) -> Iterator[tuple[str, object]]:
    """(place, value) of the lines of a file, text or UTF-8; one that does not parse comes as BadRow."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line if isinstance(line, str) else line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # also numbers and nesting beyond Python's limits
                yield f"{path}:{number}", BadRow(f"{path}:{number}: not valid JSON: {getattr(error, 'msg', error)}")


def read_rows(path: str | Path, *, prompt_text="", on_bad_row="error", limit: int | None = None) -> tuple[list[Row], int]:
    """All rows of a file and the number of bad ones skipped.

    Raises:
        BadRow: the first bad row, with on_bad_row "error"; or no good row at all.
    """
    rows, bad = [], 0
    for place, item in read_json_items(path):
        if limit is not None and len(rows) == limit:
            break
        try:
            if isinstance(item, BadRow):
                raise item
            rows.append(parse_row(item, place, prompt_text))
        except BadRow:
            if on_bad_row == "error":
                raise
            bad += 1
    if not rows:
        raise BadRow(f"{path}: no rows" + (f" ({bad} bad ones skipped)" if bad else ""))
    return rows, bad


@dataclass(frozen=True)
class Dataset:
    """Encoded rows. `input_ids[i]` is a list of ids whose first `n_masked[i]` carry no loss."""

    input_ids: list[list[int]]
    n_masked: list[int]
    places: list[str]
    truncated: int
    skipped: int

    def __len__(self):
        return len(self.input_ids)


def encode_rows(
    rows: list[Row], tokenizer, family, *, max_len: int, max_src_len: int, is_skip=False, progress=False, cache: Path | None = None
) -> Dataset:  # fmt: skip
    """Encode rows as `family` trains on them; cut rows are counted, or dropped with `is_skip`.

    With `cache`, a folder, what was encoded once from the same rows, tokenizer, code and lengths is read from there.

    Raises:
        ValueError: nothing is left, or a row has several answers (a test file).
    """
    for row in rows:
        if len(row.answers) != 1:
            raise BadRow(f"{row.place}: a training row has one output, got a list of {len(row.answers)}")
    file = cache / f"{encoding_key(rows, tokenizer, family, max_len, max_src_len)}.safetensors" if cache else None
    encoded = read_encoded(file) if file else None
    if encoded is None:
        encoded = tokenise(rows, tokenizer, family, max_len, max_src_len, progress)
        if file:
            write_encoded(file, encoded)
    ids, n_masked, cut = encoded
    kept = [i for i in range(len(rows)) if not (is_skip and cut[i])]
    if not kept:
        raise ValueError(f"all {len(rows)} rows are longer than --max_len {max_len} / --max_src_len {max_src_len}")
    return Dataset([ids[i] for i in kept], [n_masked[i] for i in kept], [rows[i].place for i in kept], sum(cut), len(rows) - len(kept))


def tokenise(rows: list[Row], tokenizer, family, max_len: int, max_src_len: int, progress: bool) -> tuple[list, list, list]:
    """(input_ids, n_masked, truncated) of each row."""
    import datasets

    def encode(row):
        example = family.encode_example(tokenizer, row["prompt"], row["answer"], max_len, max_src_len)
        return {"input_ids": example.input_ids, "n_masked": example.n_masked, "truncated": example.truncated}

    table = datasets.Dataset.from_dict({"prompt": [r.prompt for r in rows], "answer": [r.answers[0] for r in rows]})
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    # The fingerprint would hash the whole tokenizer to name a cache file that an in-memory table does not have.
    encoded = table.map(encode, new_fingerprint="encoded", desc="encoding", load_from_cache_file=False)
    return list(encoded["input_ids"]), list(encoded["n_masked"]), list(encoded["truncated"])


def encoding_key(rows: list[Row], tokenizer, family, max_len: int, max_src_len: int) -> str:
    """A name for all that encoded rows depend on: their text, the tokenizer's model, our code, the lengths."""
    from chatglm import families, tokenization

    digest = hashlib.sha256(f"{family.name} {max_len} {max_src_len} ".encode())
    settings = {k: v for k, v in tokenizer.init_kwargs.items() if k not in ("vocab_file", "name_or_path")}
    digest.update(json.dumps([settings, len(tokenizer)], default=str, sort_keys=True).encode())
    for file in (tokenizer.vocab_file, families.__file__, tokenization.__file__):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    for row in rows:
        digest.update(json.dumps([row.prompt, *row.answers]).encode())
    return digest.hexdigest()[:32]


def read_encoded(file: Path) -> tuple[list, list, list] | None:
    """What `write_encoded` wrote; None where it is not there or not whole."""
    arrays = read_arrays(file)
    try:
        ids = np.split(arrays["ids"], arrays["lengths"].cumsum()[:-1])
        return [row.tolist() for row in ids], arrays["n_masked"].tolist(), arrays["truncated"].tolist()
    except KeyError:
        return None


def write_encoded(file: Path, encoded: tuple[list, list, list]):
    ids, n_masked, cut = encoded
    cache_arrays(file, {
        "ids": np.array([i for row in ids for i in row], np.int32), "lengths": np.array([len(row) for row in ids], np.int64),
        "n_masked": np.array(n_masked, np.int32), "truncated": np.array(cut, bool),
    })  # fmt: skip


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
    if ragged:
        return lay_end_to_end(ids, masked, share, multiple)
    longest = max(map(len, ids))
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (row, n) in enumerate(zip(ids, masked)):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, n : len(row)] = torch.tensor(row[n:], dtype=torch.long)
    return {"input_ids": input_ids, "labels": labels}


def lay_end_to_end(ids: list[list[int]], masked: list[int], share: bool, multiple: int) -> dict:
    """A ragged row (1, S) of sequences, without their last tokens, which predict nothing; see nll_sum for the other entries."""
    # A trunk ends before the first place that predicts, and every sequence keeps a token of its own.
    heads = [row[: min(n, len(row) - 1) - 1] for row, n in zip(ids, masked)]
    trunk = len(os.path.commonprefix(heads)) if share and len(ids) > 1 else 0
    trunk = trunk if trunk >= SHORTEST_TRUNK else 0
    row, lengths, shared = (list(ids[0][:trunk]), [trunk], [0]) if trunk else ([], [], [])
    keep, targets = [], []
    for sequence, n in zip(ids, masked):
        own = sequence[trunk:-1]
        predicts = range(n - 1, len(sequence) - 1)
        if not predicts:  # an empty place: one prediction that is not counted keeps the shapes usual
            keep.append(len(row))
            targets.append(IGNORED)
        keep += [len(row) + place - trunk for place in predicts]
        targets += [sequence[place + 1] for place in predicts]
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
