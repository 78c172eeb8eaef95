"""Rows of any format in one file of JSON lines: merged, without duplicates, with a held-out part.

The main function is `rewrite`, at the end. Free of torch.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from tqdm import tqdm

from finetune.files import written_whole
from finetune.rows.fields import is_missing
from finetune.rows.formats import BadRow, Row
from finetune.rows.near_duplicates import group_prompts, normalise
from finetune.rows.sources import RowReader, Source, read_items

Value = dict[str, Any]


@dataclass(frozen=True)
class ReadRow:
    """A row as it is in its file, and what train.py reads of it."""

    value: Value
    row: Row


# ---- layouts that are written


def single_answer(read: ReadRow, layout: str) -> tuple[str, str]:
    """(prompt, answer); raises BadRow for a conversation, a document or several answers."""
    row = read.row
    if row.turns or row.is_document or len(row.answers) != 1:
        raise BadRow(f"{row.place}: --to {layout} writes one question and one answer")
    return row.prompt, row.answers[0]


def as_is(read: ReadRow) -> Value:
    """The row unchanged, but for the NaN of a table's empty cells, which is no JSON."""
    found = {}
    for key, value in read.value.items():
        if value is None or not is_missing(value):
            found[key] = value
    return found


def as_belle(read: ReadRow) -> Value:
    """Belle's {input, target}, without the space that its converter adds."""
    prompt, answer = single_answer(read, "belle")
    return {"input": prompt, "target": answer}


def as_instruction(read: ReadRow) -> Value:
    """{instruction, output}."""
    prompt, answer = single_answer(read, "instruction")
    return {"instruction": prompt, "output": answer}


def as_context(read: ReadRow) -> Value:
    """{context, target}, as Chatglm_lora_multi-gpu converts Alpaca's rows."""
    _, answer = single_answer(read, "context")
    instruction, input_text = read.value.get("instruction"), read.value.get("input")
    if not isinstance(instruction, str):
        raise BadRow(f"{read.row.place}: --to context wants rows with instruction and output")
    context = f"Instruction: {instruction}\n"
    if input_text:
        context += f"Input: {input_text}\n"
    return {"context": f"{context}Answer: ", "target": answer}


def as_openai(read: ReadRow) -> Value:
    """Messages with roles, also of conversations; calls of tools are refused."""
    row = read.row
    if not row.turns:
        prompt, answer = single_answer(read, "openai")
        user = {"role": "user", "content": prompt}
        assistant = {"role": "assistant", "content": answer}
        return {"messages": [user, assistant]}
    messages = []
    for turn in row.turns:
        is_plain = turn.role in ("system", "user", "assistant") and not turn.metadata
        if not is_plain or not turn.loss:
            raise BadRow(
                f"{row.place}: --to openai writes neither calls of tools nor answers without "
                "loss; --to as_is keeps them"
            )
        messages.append({"role": turn.role, "content": turn.content})
    return {"messages": messages}


LAYOUTS: dict[str, Callable[[ReadRow], Value]] = {
    "as_is": as_is,
    "belle": as_belle,
    "instruction": as_instruction,
    "context": as_context,
    "openai": as_openai,
}
Written = tuple[Row, bytes]  # a row, and its line in a layout


def written_row(value: Value, row: Row, layout: str) -> Written:
    """A row with its line of JSON; raises BadRow where the layout or JSON does not hold it."""
    laid_out = LAYOUTS[layout](ReadRow(value, row))
    try:
        return row, json.dumps(laid_out, ensure_ascii=False, default=as_text).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{row.place}: the row cannot be written as JSON: {error}") from None


def as_text(value: object) -> str:
    """A Parquet file's time or decimal number; raises TypeError for what is no text, as bytes."""
    if isinstance(value, (date, time, timedelta, Decimal, UUID)):
        return str(value)
    raise TypeError(f"a value is {type(value).__name__}")


# ---- which rows are written

DUPLICATES = ("exact", "near", "keep")
COMPARED = ("row", "prompt")


@dataclass(frozen=True)
class Counts:
    """What became of the rows that were read."""

    rows: int
    bad: int
    duplicates: int
    written: int
    held_out: int

    @property
    def text(self) -> str:
        parts = [f"{self.rows} rows read"]
        if self.bad:
            parts.append(f"{self.bad} bad ones skipped")
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates left out")
        parts.append(f"{self.written} written")
        if self.held_out:
            parts.append(f"{self.held_out} held out")
        return ", ".join(parts)


@dataclass(frozen=True)
class Selection:
    """Which rows are kept.

    Attributes:
        duplicates: "exact" ones (the same normalised text) or "near" ones are left out, or all rows
            are kept.
        compare: the whole "row", or its "prompt" alone.
        threshold: Jaccard similarity of character 5-grams from which texts are near.
        share: of the rows that are held out, by a hash of their prompts: the same prompt is on one
            side.
    """

    duplicates: str = "exact"
    compare: str = "row"
    threshold: float = 0.8
    share: float = 0.0
    seed: int = 1234

    def text(self, row: Row) -> str:
        """What is compared."""
        if self.compare == "prompt":
            return "\n".join([*(turn.content for turn in row.turns[:-1]), row.prompt])
        return "\n".join([row.prompt, *row.answers, *(turn.content for turn in row.turns)])

    def kept(self, texts: Iterable[str]) -> list[bool]:
        """Whether each row is kept: of its duplicates the first is."""
        if self.duplicates == "near":
            groups = group_prompts(list(texts), threshold=self.threshold)
            return [number == group for number, group in enumerate(groups.tolist())]
        seen: set[bytes] = set()
        is_kept = []
        for text in texts:
            content = normalise(text).encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(content, digest_size=16).digest()
            is_kept.append(self.duplicates == "keep" or digest not in seen)
            seen.add(digest)
        return is_kept

    def holds_out(self, prompt: str) -> bool:
        """Whether a prompt is of the held-out part."""
        content = f"{self.seed}\n{normalise(prompt)}".encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        return number < self.share * 2**64


def read_all(
    sources: list[Source], reader: RowReader, on_bad_row: str, layout: str, title: str
) -> Iterator[Written | BadRow]:
    """Every row of the sources in order, with a progress bar.

    Raises:
        BadRow: the first bad row, or one that the layout does not hold, with on_bad_row "error";
            else it comes as BadRow.
    """
    with tqdm(desc=title, unit="row", disable=None, delay=1) as bar:
        for source in sources:
            for place, item in read_items(source):
                bar.update()
                found: Written | BadRow
                try:
                    row = reader.row(item, place)
                    found = written_row(cast(Value, item), row, layout)
                except BadRow as error:
                    if on_bad_row == "error":
                        raise
                    found = error
                yield found


def rewrite(
    read: Callable[[str], Iterator[Written | BadRow]],
    selection: Selection,
    output: Path,
    held_out: Path | None = None,
) -> Counts:
    """Write the rows that are kept, as JSON lines; the files appear whole or not at all.

    Args:
        read: title of a progress bar -> the rows; it is called twice.
        held_out: the file of the held-out part, where selection.share is above 0.
    Raises:
        BadRow: as `read`.
        ValueError: no row is left for a file.
    """
    texts: list[str] = []
    bad = 0
    for item in read("reading"):
        if isinstance(item, BadRow):
            bad += 1
        else:
            row, _ = item
            texts.append(selection.text(row))
    is_kept = selection.kept(texts)
    del texts
    written = held = 0
    with ExitStack() as files:
        output_file = files.enter_context(written_whole(output))
        held_out_file = files.enter_context(written_whole(held_out)) if held_out else None
        for row, line in kept_rows(read("writing"), is_kept):
            if held_out_file is not None and selection.holds_out(row.prompt):
                held_out_file.write(line)
                held += 1
            else:
                output_file.write(line)
                written += 1
        if not written:
            raise ValueError(f"nothing to write to {output}")
        if held_out and not held:
            raise ValueError(f"nothing to write to {held_out}")
    return Counts(len(is_kept) + bad, bad, is_kept.count(False), written, held)


def kept_rows(items: Iterable[Written | BadRow], is_kept: Sequence[bool]) -> Iterator[Written]:
    """The good rows that are kept.

    Raises:
        ValueError: there are more or fewer than `is_kept`: their files were changed.
    """
    number = 0
    for item in items:
        if isinstance(item, BadRow):
            continue
        if number >= len(is_kept):
            raise ValueError("the rows were changed while they were read; start again")
        if is_kept[number]:
            yield item
        number += 1
    if number != len(is_kept):
        raise ValueError("the rows were changed while they were read; start again")
