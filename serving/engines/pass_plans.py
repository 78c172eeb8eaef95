"""What a forward pass computes, as lists on the host: planned by the engine, run by any process.

The new tokens of all sequences are in one row: first those of decoding sequences, one each, in the
order of their slabs; then chunks of prompts.
"""

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from serving.engines.answers import AdmittedAnswer, Answer
from serving.engines.arena import Arena, Slab, placed_slab
from serving.request import Record


class Sequence(AdmittedAnswer):
    """A sequence in an engine: its place in the arena, and the positions of its tokens.

    Attributes:
        ids: the prompt and the answer's tokens at its admission.
        context: so many first tokens see each other both ways, and are computed in one piece
            (ChatGLM-6B; else 0).
        key: sequences of another key share no prefix with it.
        computed: of ids, how many are in the arena.
        length: tokens in the arena, virtual ones included.
        positions: places of the prompt's tokens and, for ChatGLM-6B, their block positions; those
            of later tokens follow from the last.
        lane: the micro-batch that it is in.
        prior: the prediction of its length at its arrival, where there was one.
        is_finite: it has made a token, and the model's output has been finite at each of them.
        copied: of a common prefix, tokens and the marks (StateSums) of what they came from.
    """

    def __init__(
        self,
        answer: Answer,
        record: Record,
        base: int,
        reserve: int,
        most: int,
        positions: Tensor,
        context: int,
    ):
        super().__init__(answer, base, reserve, most)
        self.prior = record.request.prediction
        self.ids = answer.prompt + answer.tokens
        self.positions: list[list[int]] = positions.tolist()
        self.context = context
        self.key: Hashable = None if answer.adapter is None else answer.adapter.number
        self.computed = 0
        self.slab: Slab[Sequence] | None = None
        self.slot = self.length = 0
        self.lane: Lane | None = None
        self.is_finite = False
        self.copied: tuple[int, Mapping[int, Tensor]] | None = None

    @property
    def uncomputed(self) -> int:
        """Tokens of ids that are not computed yet."""
        return len(self.ids) - self.computed

    def positions_of(self, start: int, end: int) -> list[list[int]]:
        """Positions of tokens start to end of prompt and answer.

        One list of places and, for ChatGLM-6B, one of block positions.
        """
        if len(self.positions) == 1:
            return [list(range(start, end))]
        registered = len(self.positions[0])
        beyond = max(end - max(start, registered), 0)
        places, blocks = self.positions
        next_block = blocks[-1] + 1 + max(start - registered, 0)
        return [
            places[start:end] + [places[-1]] * beyond,
            blocks[start:end] + list(range(next_block, next_block + beyond)),
        ]


@dataclass
class ChunkPlan:
    """Tokens `start` to `end` of a sequence, virtual ones included.

    Attributes:
        size, slot: its place in the KV memory.
        seen_by_all: so many first tokens are seen by all.
        kept: how many of its last tokens the last layer computes: none, 1 or all.
    """

    size: int
    slot: int
    start: int
    end: int
    seen_by_all: int
    kept: int


@dataclass
class DecodingPlan:
    """The decoding rows of a slab: its slots from 0 on.

    Attributes:
        lengths: tokens of each before the pass.
    """

    size: int
    lengths: list[int]


@dataclass
class PassPlan:
    """A forward pass over N tokens.

    Attributes:
        lane: number of the micro-batch, each of which has its own KV memory.
        ids: token ids (N); 0 for a virtual token.
        positions: (axes, N) places, and block positions (ChatGLM-6B).
        virtual_starts: where P-Tuning v1's vectors begin.
        keep: (K) the tokens that the last layer computes, padded; None for all.
        adapters: (number of an adapter or 0, of how many tokens), in the order of the tokens.
        padding: tokens after the others.
    """

    lane: int
    ids: list[int] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    virtual_starts: list[int] = field(default_factory=list)
    decoding: list[DecodingPlan] = field(default_factory=list)
    chunks: list[ChunkPlan] = field(default_factory=list)
    keep: list[int] | None = None
    adapters: list[tuple[int, int]] = field(default_factory=list)
    padding: int = 0


class PromptPart:
    """Tokens of a prompt whose states its answer reads.

    Attributes:
        place: of the first of them among the tokens that the last layer computes.
        start: tokens of the prompt before them.
    """

    def __init__(self, row: Sequence, place: int, start: int, count: int):
        self.row, self.place, self.start, self.count = row, place, start, count


class ChunkPart(NamedTuple):
    """A chunk of a pass, without virtual tokens.

    Attributes:
        place: of its first token among all tokens of the pass.
        start: tokens of the sequence's prompt and answer before it.
    """

    row: Sequence
    place: int
    start: int
    tokens: int


class PlannedPass:
    """A pass, and what its outputs are of.

    Args:
        axes: of positions. prompt_length: P-Tuning v1's virtual tokens; virtual: those of any kind.
    Attributes:
        decoding: the sequences that decode, in the order of their tokens.
        output_indices: of the tokens that the last layer computes.
        next_places: which of those are followed by a token that is wanted.
        prompts: of the sequences that read their prompts' states.
        parts: its chunks, in the order of their tokens.
    """

    def __init__(self, lane: int, axes: int, prompt_length: int, virtual: int):
        self.plan = PassPlan(lane)
        self.decoding: list[Sequence] = []
        self.output_indices: list[int] = []
        self.next_places: list[int] = []
        self.prompts: list[PromptPart] = []
        self.parts: list[ChunkPart] = []
        self._axes, self._prompt_length, self._virtual = axes, prompt_length, virtual
        self._positions: list[list[int]] = [[], []]

    def add_decoding(self, slab: Slab[Sequence]) -> None:
        """Append the newest token of each decoding row of a slab."""
        lengths = []
        for row in slab.rows[: slab.decoding]:
            last = len(row.answer.prompt) + len(row.answer.tokens) - 1
            positions = row.positions_of(last, last + 1)
            self._add([row.answer.tokens[-1]], positions, self._prompt_length)
            self._keep_last(1, is_end=True)
            self._add_adapter(row, 1)
            lengths.append(row.length)
            row.length += 1
            self.decoding.append(row)
        self.plan.decoding.append(DecodingPlan(slab.size, lengths))

    def add_chunk(self, row: Sequence, count: int) -> None:
        """Append the next `count` tokens of a sequence, P-Tuning v1's vectors before its first."""
        virtual = self._prompt_length
        start = row.length
        if row.computed == 0 and virtual:
            self.plan.virtual_starts.append(len(self.plan.ids))
            self._add([0] * virtual, [list(range(virtual)), [0] * virtual])
            row.length += virtual
        before, end = row.computed, row.computed + count
        self.parts.append(ChunkPart(row, len(self.plan.ids), before, count))
        self._add(row.ids[before:end], row.positions_of(before, end), virtual)
        row.computed = end
        row.length += count
        kept = int(not row.uncomputed)
        if row.answer.reads_prompt:
            kept = row.length - start
            place = len(self.output_indices) + kept - count  # virtual tokens are left out
            self.prompts.append(PromptPart(row, place, before, count))
        self._keep_last(kept, is_end=not row.uncomputed)
        self._add_adapter(row, row.length - start)
        seen_by_all = row.context + self._virtual if row.context else 0
        size = placed_slab(row).size
        chunk = ChunkPlan(size, row.slot, start, row.length, seen_by_all, kept)
        self.plan.chunks.append(chunk)

    def finish(self) -> None:
        """Pad the tokens, and those that the last layer computes."""
        plan = self.plan
        plan.padding = padded_count(len(plan.ids)) - len(plan.ids)
        for row in self._positions[: self._axes]:
            plan.positions.append(row + [0] * plan.padding)
        plan.ids += [0] * plan.padding
        if plan.chunks:
            plan.keep = padded_indices(self.output_indices)

    def _add(self, ids: list[int], positions: list[list[int]], shift: int = 0) -> None:
        """Append tokens, their places moved on by `shift`."""
        self.plan.ids += ids
        self._positions[0] += [place + shift for place in positions[0]]
        self._positions[1] += positions[-1]

    def _add_adapter(self, row: Sequence, count: int) -> None:
        adapter = row.answer.adapter
        self.plan.adapters.append((adapter.number if adapter else 0, count))

    def _keep_last(self, count: int, is_end: bool) -> None:
        """The last layer computes the last `count` tokens; `is_end`: the last one's successor."""
        end = len(self.plan.ids)
        self.output_indices += range(end - count, end)
        if is_end:
            self.next_places.append(len(self.output_indices) - 1)


@dataclass(eq=False)
class Lane:
    """A micro-batch: sequences whose tokens are computed in the same passes.

    Attributes:
        prefills: those whose prompts are not complete, in order of admission.
        in_flight: its pass that is being computed; its sequences do not change meanwhile.
        steps: passes in the current step of the engine.
    """

    number: int
    arena: Arena[Sequence]
    prefills: deque[Sequence] = field(default_factory=deque)
    in_flight: PlannedPass | None = None
    steps: int = 0

    @property
    def load(self) -> tuple[int, int]:
        """(Sequences, KV tokens reserved for them)."""
        count = tokens = 0
        for slab in self.arena.slabs.values():
            count += len(slab.rows)
            for row in slab.rows:
                tokens += row.reserve
        return count, tokens


def padded_indices(indices: list[int]) -> list[int]:
    """Indices with as many zeros as `padded_count` adds."""
    return indices + [0] * (padded_count(len(indices)) - len(indices))


def padded_count(tokens: int) -> int:
    """The count that `tokens` is padded to: few shapes.

    oneDNN compiles its half-precision products for each new shape.
    """
    if tokens <= 16:
        unit = 4
    elif tokens <= 64:
        unit = 16
    else:
        unit = 64
    return max(-(-tokens // unit) * unit, 1)
