"""Prompts that begin alike: their common keys and values are copied, not computed again.

Each sequence has a slot of its own in the KV arena, so memory is not shared, computation is. A
prompt's source is a sequence in the arena, or a prefix that a sequence has left here. Keys and
values of a token depend on the tokens before it alone, so a copy is what would be computed; this
does not hold for ChatGLM-6B, whose prompts are read both ways.

In a pipeline every stage copies and keeps the keys and values of its own layers, by the same
operations (serving.engines.kv_memory); rows of one lane share, and what is kept serves all lanes.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from serving.engines.arena import placed_slab
from serving.engines.kv_memory import KvMemory
from serving.engines.pass_plans import Sequence

SHORTEST = 32  # tokens of the shortest prefix that is copied
BEGINNINGS = 1024  # beginnings of prompts that are remembered

Beginning = tuple[Hashable, tuple[int, ...]]  # (Sequence.key, the first SHORTEST tokens)


@dataclass(frozen=True)
class KeptPrefix:
    """What a sequence has left.

    Attributes:
        ids: its n tokens.
        name: of its keys and values, virtual tokens included, in the KV memory.
        marks: sums of its hidden states, where the engine reads them (StateSums.marks).
    """

    ids: list[int]
    name: int
    marks: Mapping[int, Tensor]


class PrefixCache:
    """Copies common prefixes between sequences, and keeps those that have been common.

    A sequence that leaves the arena leaves its tokens' keys and values here if another prompt has
    begun with the same SHORTEST tokens: the last such sequence of each beginning, the beginnings
    least recently used leaving first. One that has failed, or has not made a token yet, leaves
    nothing.

    Args:
        memory: one of the engine's; all of them share what is kept.
        tokens: kept at most, virtual tokens not counted.
        virtual: P-Tuning's tokens before each sequence.
    Attributes:
        unit: prefixes are copied in multiples of so many tokens.
        kept_tokens: kept now.
        copied_tokens: prompt tokens that were copied instead of computed.
    """

    def __init__(self, memory: KvMemory, tokens: int, virtual: int):
        self.memory = memory
        self.unit = 1
        self.tokens, self.virtual = tokens, virtual
        self._names = itertools.count()
        self.kept: OrderedDict[Beginning, KeptPrefix] = OrderedDict()
        self.kept_tokens = self.copied_tokens = 0
        self._prompts: OrderedDict[Beginning, set[int]] = OrderedDict()  # ids of sequences, up to 2

    def copy_in_units(self) -> int:
        """Copy prefixes in multiples of SHORTEST tokens, which is returned, from now on."""
        self.unit = SHORTEST
        return self.unit

    def share(
        self, row: Sequence, rows: Iterable[Sequence], chunks: list[tuple[Sequence, int]]
    ) -> bool:
        """Copy the longest prefix there is into a sequence of which nothing is computed yet.

        Args:
            rows: those in the arena.
            chunks: what the next pass computes of them: (sequence, tokens).
        Returns:
            True, and nothing is copied, where the next pass computes more of its prefix.
        """
        beginning = beginning_of(row.key, row.ids)
        if beginning is None or row.answer.reads_prompt:
            return False
        self._remember(beginning, row.id)
        wanted = row.ids[:-1]  # the last one is computed: its logits are wanted
        best, source = 0, None
        for other in rows:
            if other is row or other.slab is None or other.key != row.key:
                continue
            if other.lane is not row.lane:
                continue
            if other.answer.reason == "failed":
                continue
            common = self._common(wanted, tokens_in_arena(other, self.virtual))
            if common > best:
                best, source = common, other
        kept = self.kept.get(beginning)
        common = self._common(wanted, kept.ids) if kept is not None else 0
        for other, count in chunks:
            soon = self._common(wanted, other.ids[: other.computed + count])
            if other.key == row.key and soon >= max(best, common) + SHORTEST:
                return True
        slab = placed_slab(row)
        if kept is not None and common >= best:
            self.kept.move_to_end(beginning)
            if self._count_copied(row, common, kept.marks):
                self.memory_of(row).do("paste", kept.name, slab.size, row.slot, row.length)
        elif source is not None and self._count_copied(row, best, marks_of(source)):
            place = placed_slab(source).size, source.slot
            self.memory_of(row).do("copy", *place, slab.size, row.slot, row.length)
        return False

    def memory_of(self, row: Sequence) -> KvMemory:
        """Where a sequence of the arena lies."""
        return placed_slab(row).memory

    def _common(self, wanted: list[int], ids: list[int]) -> int:
        """How many first tokens can be copied."""
        common = common_length(wanted, ids)
        return common - common % self.unit

    def _count_copied(self, row: Sequence, count: int, marks: Mapping[int, Tensor]) -> bool:
        """Count the first `count` tokens of a row as computed, unless they are too few."""
        if count < SHORTEST:
            return False
        row.copied = count, marks
        row.computed, row.length = count, self.virtual + count
        self.copied_tokens += count
        return True

    def keep(self, row: Sequence) -> None:
        """Keep what a sequence has computed, as far as there is room; it leaves the arena now."""
        if row.slab is None or row.answer.reason == "failed" or not row.is_finite:
            return
        ids = tokens_in_arena(row, self.virtual)[: self.tokens]
        beginning = beginning_of(row.key, ids)
        if beginning is None or len(self._prompts.get(beginning, ())) < 2:
            return
        before = self.kept.get(beginning)
        if before is not None and before.ids[: len(ids)] == ids:
            self.kept.move_to_end(beginning)
            return
        name = next(self._names)
        memory = self.memory_of(row)
        memory.do("keep", name, row.slab.size, row.slot, self.virtual + len(ids))
        keys, values = memory.kept[name]
        if not all(bool(layer.isfinite().all()) for layer in keys + values):
            memory.do("drop", name)
            return  # it has been cancelled before its failure was seen
        if before is not None:
            self._drop(beginning)
        while self.kept and self.kept_tokens + len(ids) > self.tokens:
            self._drop(next(iter(self.kept)))
        self.kept[beginning] = KeptPrefix(ids, name, dict(marks_of(row)))
        self.kept_tokens += len(ids)

    def _drop(self, beginning: Beginning):
        kept = self.kept.pop(beginning)
        self.kept_tokens -= len(kept.ids)
        self.memory.do("drop", kept.name)

    def _remember(self, beginning: Beginning, request_id: int):
        prompts = self._prompts.setdefault(beginning, set())
        if len(prompts) < 2:
            prompts.add(request_id)
        self._prompts.move_to_end(beginning)
        if len(self._prompts) > BEGINNINGS:
            self._prompts.popitem(last=False)


def marks_of(row: Sequence) -> Mapping[int, Tensor]:
    """The sums of a sequence's first states; empty where none are read."""
    return {} if row.answer.states is None else row.answer.states.marks


def beginning_of(key: Hashable, ids: list[int]) -> Beginning | None:
    """What prompts must have in common to share anything; None for one that is too short."""
    return (key, tuple(ids[:SHORTEST])) if len(ids) >= SHORTEST else None


def tokens_in_arena(row: Sequence, virtual: int) -> list[int]:
    """The tokens of prompt and answer whose keys and values are in the sequence's slot."""
    count = max(row.length - virtual, 0)
    return (row.answer.prompt + row.answer.tokens)[:count]


def common_length(a: list[int], b: list[int]) -> int:
    """How many first tokens two lists have in common."""
    least, most = 0, min(len(a), len(b))
    while least < most:  # slices are compared faster than tokens one by one
        middle = (least + most + 1) // 2
        if a[least:middle] == b[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
