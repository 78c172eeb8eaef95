"""Documents: how they are read, encoded, and joined to rows of --max_len tokens.

Free of torch.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from chatglm.families import RAW_FAMILIES
from chatglm.raw_prompts import RAW_TOKENS, raw_ids
from finetune.rows.arrays import Dataset, EncodedRow, RowArrays, chosen_rows
from finetune.rows.documents import encode_document
from finetune.rows.encoding import RowEncoder
from finetune.rows.fields import without_missing
from finetune.rows.formats import BadRow, Row, rename
from finetune.rows.groups import RowGroups
from finetune.rows.sources import RowReader

BLANK_LINE = "\n\n"  # between a prompt and its label, where both are one text
BLANK_SHARE = 0.15  # of a row's tokens, in a blank in the middle (arXiv 2103.10360, section 2.1)
SHORTEST_MIDDLE = 8  # tokens of a row; a shorter one has its blank at its end
PACK_WINDOW = 4096  # documents that are packed together


@dataclass(frozen=True)
class DocumentReader(RowReader):
    """Values as documents: {"text": ...}, or RLHF's {"prompt": ..., "label": ...}.

    Other keys are not read. The Row of a text has the prompt "".
    """

    def row(self, item: object, place: str) -> Row:
        """Raises BadRow."""
        if isinstance(item, BadRow):
            raise item
        try:
            if not isinstance(item, dict):
                raise ValueError(f"wanted an object, got {type(item).__name__}")
            item = without_missing(rename(item, self.columns) if self.columns else item)
            if "text" in item:
                row = Row("", (self.text(item, "text"),), place)
            elif "prompt" in item:
                prompt, label = self.text(item, "prompt"), item.get("label", "")
                if not isinstance(label, str):
                    raise ValueError(f'"label" must be text, got {label!r:.60}')
                row = Row(prompt, (label,), place) if label else Row("", (prompt,), place)
            else:
                keys = ", ".join(map(str, item))[:200] or "none"
                raise ValueError(f'wanted "text", or "prompt" and "label"; the row has {keys}')
            "".join((row.prompt, *row.answers)).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadRow(f"{place}: half a surrogate pair in the text: {half!a}") from None
        except ValueError as error:
            raise BadRow(f"{place}: {error}") from None
        return row

    @staticmethod
    def text(item: dict[str, Any], key: str) -> str:
        """Raises ValueError where the value is no text, or blank."""
        value = item[key]
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be text, got {value!r:.60}')
        if not value.strip():
            raise ValueError(f'"{key}" is empty')
        return value


def whole_text(row: Row) -> str:
    """A document as one text: a prompt, a blank line and its label where it has both."""
    return BLANK_LINE.join(filter(None, (row.prompt, row.answers[0])))


@dataclass(frozen=True)
class DocumentEncoder(RowEncoder):
    """Documents to ids.

    Attributes:
        packing, objective, gmask_share, seed: as the flags.
    """

    packing: str = "isolated"
    objective: str = "causal"
    gmask_share: float = 0.7
    seed: int = 0

    def check(self, row: Row) -> None:
        """Nothing: the reader has."""

    def encode(self, row: Row) -> list[EncodedRow]:
        """A document's pieces of at most max_len tokens; for `concatenated`, all of it as one.

        Raises ValueError where max_len leaves no room.
        """
        if self.objective == "infilling":
            return self.blanks(row)
        if self.packing == "concatenated":
            ids = self.tokenizer.encode_text(whole_text(row))
            return [EncodedRow([*ids, self.end], 0, False)]
        return encode_document(self.tokenizer, self.family.name, whole_text(row), self.max_len)

    @property
    def end(self) -> int:
        """The token after a document."""
        return self.tokenizer.get_command(RAW_FAMILIES[self.family.name].end_token)

    def blanks(self, row: Row) -> list[EncodedRow]:
        """The rows of a document, each with one blank that is learnt (arXiv 2103.10360).

        A prompt's label is its blank. Else each piece has one, drawn from the seed and the ids:
        with probability gmask_share the last half to all of it, [gMASK], which the end token
        follows only where the document ends; else BLANK_SHARE of it at any place, [MASK], and the
        end token.
        """
        encode = self.tokenizer.encode_text
        mask, gmask = map(self.tokenizer.get_command, ("[MASK]", "[gMASK]"))
        tokens = RAW_TOKENS[self.family.name]
        first = list(map(self.tokenizer.get_command, tokens.before))
        *last, sop = map(self.tokenizer.get_command, tokens.after[1:])

        def blank_row(context: list[int], learnt: list[int]) -> EncodedRow:
            seen = [*first, *context, *last]
            masked = len(seen) if tokens.last_is_learnt else len(seen) + 1
            return EncodedRow([*seen, sop, *learnt], masked, False)

        room = self.max_len - 3 - len(first) - len(last)
        if row.prompt and room > 0:
            label = [*encode(row.answers[0]), self.end][:room]
            return [blank_row([*encode(row.prompt)[: room + 1 - len(label)], mask], label)]
        ids = encode(row.answers[0])
        if room < 1:
            raise ValueError(f"max_len={self.max_len} leaves no room for text beside a blank")
        rows = []
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            draw = self.draw(piece)
            if draw.random() < self.gmask_share or len(piece) < SHORTEST_MIDDLE:
                size = int(draw.integers((len(piece) + 1) // 2, len(piece), endpoint=True))
                before, blank, after = piece[: len(piece) - size], piece[len(piece) - size :], []
                tail = [self.end] if start + room >= len(ids) else []
                context = [*before, gmask]
            else:
                size = max(1, round(BLANK_SHARE * len(piece)))
                begin = int(draw.integers(0, len(piece) - size, endpoint=True))
                before, blank = piece[:begin], piece[begin : begin + size]
                after, tail = piece[begin + size :], [self.end]
                context = [*before, mask, *after]
            rows.append(blank_row(context, [*blank, *tail]))
        return rows

    def draw(self, ids: list[int]) -> np.random.Generator:
        """The random numbers of a piece: the same wherever its file lies."""
        digest = hashlib.blake2b(f"{self.seed} {ids}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "big"))

    def settings(self) -> list[Any]:
        """As RowEncoder's."""
        drawn = [self.gmask_share, self.seed] if self.objective == "infilling" else []
        return [*super().settings(), "pretrain", self.packing, self.objective, *drawn]


# ---- documents to rows of the loop


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `lengths` in packs of at most `room` tokens: (order, starts) of the packs in it.

    Of PACK_WINDOW rows at a time, longest first, each goes into the pack that it fills best (best
    fit decreasing, arXiv 2404.10830 section 3).
    """
    order: list[int] = []
    starts = [0]
    for first in range(0, len(lengths), PACK_WINDOW):
        sizes = lengths[first : first + PACK_WINDOW]
        packs: list[list[int]] = []
        spaces: list[tuple[int, int]] = []  # (tokens that are left, pack), ascending
        for row in np.argsort(-sizes, kind="stable").tolist():
            size = int(sizes[row])
            place = bisect_left(spaces, (size, -1))
            if place == len(spaces):
                insort(spaces, (room - size, len(packs)))
                packs.append([first + row])
            else:
                space, pack = spaces.pop(place)
                packs[pack].append(first + row)
                insort(spaces, (space - size, pack))
        for rows in packs:
            order += rows
            starts.append(len(order))
    return np.array(order, np.int32), np.array(starts, np.int64)


def pack_documents(rows: RowArrays, room: int) -> RowGroups:
    """Encoded documents in packs of at most `room` tokens; raises ValueError without any."""
    data = chosen_rows(rows)
    if not len(data):
        raise ValueError(f"none of the {rows.facts['good']} texts has a token to learn")
    (chosen,) = data.chosen
    numbers = np.arange(len(rows), dtype=np.int32) if chosen is None else chosen
    order, starts = best_fit(data.row_lengths, room)
    return RowGroups(Dataset((rows,), (numbers[order],)), starts)


@dataclass(frozen=True, eq=False)
class Windows:
    """Documents end to end, cut in rows: to `collate`, a Dataset.

    Attributes:
        parts: the documents of each source.
        prefix: ids that every row begins with.
        masked: how many of a row's first ids carry no loss.
        room: tokens of text in a row that the row before does not have.
        overlap: tokens that a row has in common with the row before, whose last one predicts.
    """

    parts: tuple[RowArrays, ...]
    prefix: tuple[int, ...]
    masked: int
    room: int
    overlap: int
    truncated: int = 0
    skipped: int = 0

    @cached_property
    def starts(self) -> list[int]:
        """The number of each part's first row, and of all rows."""
        starts = [0]
        for part in self.parts:
            tokens = int(part.columns["starts"][-1])
            starts.append(starts[-1] + max(0, -(-(tokens - self.overlap) // self.room)))
        return starts

    def __len__(self) -> int:
        return self.starts[-1]

    def span(self, row: int) -> tuple[RowArrays, int, int]:
        """(part, first, last + 1) of a row's tokens in the part's ids."""
        part = bisect_right(self.starts, row) - 1
        first = (row - self.starts[part]) * self.room
        documents = self.parts[part]
        tokens = int(documents.columns["starts"][-1])
        return documents, first, min(first + self.overlap + self.room, tokens)

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int32."""
        documents, first, stop = self.span(row)
        text = documents.columns["ids"][first:stop]
        return np.concatenate([np.array(self.prefix, np.int32), text])

    def n_masked(self, row: int) -> int:
        return self.masked

    def labels(self, row: int) -> None:
        """None: the labels are the ids after the first n_masked."""

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """(rows,) int64."""
        lengths = np.full(len(self), len(self.prefix) + self.overlap + self.room)
        for stop in self.starts[1:]:
            if stop:
                _, first, last = self.span(stop - 1)
                lengths[stop - 1] = len(self.prefix) + last - first
        return lengths

    def place(self, row: int) -> str:
        """ "file:line" of the document that a row begins in, for messages."""
        documents, first, _ = self.span(row)
        number = int(np.searchsorted(documents.columns["starts"], first, side="right")) - 1
        return documents.place(min(number, len(documents) - 1))


def cut_windows(rows: RowArrays, encoder: RowEncoder) -> Windows:
    """Encoded documents end to end. Raises ValueError where max_len has no room for text."""
    source, after = raw_ids(RAW_TOKENS.get(encoder.family.name), encoder.tokenizer, [])
    prefix = (*source, *after)
    overlap = 0 if prefix else 1  # as encode_document's
    room = encoder.max_len - len(prefix) - overlap
    if room < 1:
        raise ValueError(
            f"max_len={encoder.max_len} leaves no room for text after {len(prefix)} control tokens"
        )
    masked = len(prefix) + overlap - bool(after)
    windows = Windows((rows,), prefix, masked, room, overlap)
    if not len(windows):
        raise ValueError(f"none of the {rows.facts['good']} texts has a token to learn")
    return windows


def join_windows(parts: Sequence[Windows]) -> Windows:
    """The rows of several sources, in this order; no row has text of two."""
    rows: list[RowArrays] = []
    for part in parts:
        rows += part.parts
    first = parts[0]
    return Windows(tuple(rows), first.prefix, first.masked, first.room, first.overlap)
