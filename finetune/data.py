"""From a file of rows to padded batches. The order of rows is a pure function of (seed, epoch), so a resume needs one number."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

IGNORED = -100  # label of a token that carries no loss


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
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
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


def encode_rows(rows: list[Row], tokenizer, family, *, max_len: int, max_src_len: int, is_skip=False, progress=False) -> Dataset:
    """Encode rows as `family` trains on them; cut rows are counted, or dropped with `is_skip`.

    Raises:
        ValueError: nothing is left, or a row has several answers (a test file).
    """
    import datasets

    for row in rows:
        if len(row.answers) != 1:
            raise BadRow(f"{row.place}: a training row has one output, got a list of {len(row.answers)}")

    def encode(row):
        example = family.encode_example(tokenizer, row["prompt"], row["answer"], max_len, max_src_len)
        return {"input_ids": example.input_ids, "n_masked": example.n_masked, "truncated": example.truncated}

    table = datasets.Dataset.from_dict(
        {"prompt": [r.prompt for r in rows], "answer": [r.answers[0] for r in rows], "place": [r.place for r in rows]}
    )
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    # The fingerprint would hash the whole tokenizer to name a cache file that an in-memory table does not have.
    encoded = table.map(encode, new_fingerprint="encoded", desc="encoding", load_from_cache_file=False)
    truncated = sum(encoded["truncated"])
    if is_skip:
        encoded = encoded.filter(lambda cut: not cut, input_columns="truncated", new_fingerprint="kept", desc="dropping cut rows")
    if not len(encoded):
        raise ValueError(f"all {len(rows)} rows are longer than --max_len {max_len} / --max_src_len {max_src_len}")
    return Dataset(
        list(encoded["input_ids"]), list(encoded["n_masked"]), list(encoded["place"]),
        truncated, truncated if is_skip else 0,
    )  # fmt: skip


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `rows` in an epoch (from 0); the same on every rank and after every resume."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def step_rows(order: np.ndarray, step: int, *, micro: int, accumulation: int, rank: int, world: int) -> list[list[int]]:
    """The rows of one optimizer step on one rank: `accumulation` lists of row numbers, -1 for a place left empty.

    The global batch is cut into forward passes first and ranks second, so its rows do not depend on the number of ranks.
    Every list is the same length on every rank; an epoch's last step may hold empty places, never an empty list.
    """
    size = micro * accumulation * world
    chunk = order[step * size : (step + 1) * size]
    # As even as possible: an epoch's last rows are spread over all ranks and passes.
    passes = accumulation * world
    micro = -(-len(chunk) // passes)
    padded = np.full(passes * micro, -1)
    padded[: len(chunk)] = chunk
    return padded.reshape(accumulation, world, micro)[:, rank].tolist()


def collate(data: Dataset, rows: list[int], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and labels (B, longest), padded on the right; no attention mask: nothing real looks right.

    An empty place (-1) becomes the shortest row without labels, so that every rank runs every pass.
    """
    filler = min(range(len(data)), key=lambda i: len(data.input_ids[i])) if -1 in rows else None
    ids = [data.input_ids[filler if r == -1 else r] for r in rows]
    masked = [len(ids[i]) if r == -1 else data.n_masked[r] for i, r in enumerate(rows)]
    longest = max(map(len, ids))
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (row, n) in enumerate(zip(ids, masked)):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, n : len(row)] = torch.tensor(row[n:], dtype=torch.long)
    return {"input_ids": input_ids, "labels": labels}
