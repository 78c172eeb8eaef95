"""KV memory of running sequences, in length classes.

A class is a slab of rows that hold the same number of tokens, a power of two. A slab's rows lie
side by side without holes, the decoding ones first, so attention of a decode step reads
keys[:decoding, :, :longest] in place: no gathering, no concatenation. When a row leaves, the last
row is copied to its slot: one copy an answer, not one a token.
"""

from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from serving.engines.kv_memory import KvMemory

SMALLEST_SLAB = 64  # tokens of the smallest class


def slab_tokens(tokens: int) -> int:
    """The smallest class that holds so many tokens."""
    return max(SMALLEST_SLAB, 1 << (tokens - 1).bit_length())


class ArenaRow(Protocol):
    """A sequence in the arena, which sets these attributes.

    Attributes:
        slab: where it lies; None outside the arena. slot: its place in the slab.
        length: tokens written, which the writer counts up.
    """

    slab: "Slab[Any] | None"
    slot: int
    length: int


RowT = TypeVar("RowT", bound=ArenaRow)


def placed_slab(row: RowT) -> "Slab[RowT]":
    """The slab where a row lies. Raises RuntimeError for a row outside the arena."""
    if row.slab is None:
        raise RuntimeError("the sequence has no slot in the KV arena")
    return row.slab


class Slab(Generic[RowT]):
    """Rows of `size` tokens.

    Attributes:
        keys, values: by layer, (slots, kv_heads, size, head_dim), in the arena's memory.
        rows: in the order of their slots; the first `decoding` of them decode, the others are in
            prefill.
    """

    def __init__(self, size: int, memory: KvMemory):
        self.size = size
        self.memory = memory
        memory.do("resize", size, 0, 0)
        self.slots = 0
        self.rows: list[RowT] = []
        self.decoding = 0

    @property
    def keys(self) -> list[Tensor]:
        return self.memory.keys[self.size]

    @property
    def values(self) -> list[Tensor]:
        return self.memory.values[self.size]

    def resize(self, slots: int) -> None:
        self.memory.do("resize", self.size, slots, len(self.rows))
        self.slots = slots

    def copy(self, source: int, target: int) -> None:
        self.memory.do("copy", self.size, source, self.size, target, self.rows[source].length)

    def swap(self, a: int, b: int) -> None:
        if a == b:
            return
        rows = self.rows
        self.memory.do("swap", self.size, a, b, max(rows[a].length, rows[b].length))
        rows[a], rows[b] = rows[b], rows[a]
        rows[a].slot, rows[b].slot = a, b

    def remove(self, slot: int) -> None:
        """Remove a row and close the gap.

        The last decoding row moves to the slot of a decoding one; the last of all rows moves to the
        slot that is free then.
        """
        rows = self.rows
        if slot < self.decoding:
            self.decoding -= 1
            if slot != self.decoding:
                self.copy(self.decoding, slot)
                rows[slot] = rows[self.decoding]
                rows[slot].slot = slot
            slot = self.decoding
        last = len(rows) - 1
        if slot != last:
            self.copy(last, slot)
            rows[slot] = rows[last]
            rows[slot].slot = slot
        rows.pop()


class Arena(Generic[RowT]):
    """All slabs. The arena places rows; it does not count reservations.

    Memory follows reservations: a row's class is less than twice its reservation. Slabs have spare
    slots as long as all of them hold at most twice `tokens`; beyond that, none.

    Attributes:
        tokens: what the reservations add up to at most.
        capacity_tokens: tokens that the slabs have room for.
        migrations: rows that moved to a larger class.
    """

    def __init__(self, memory: KvMemory, tokens: int):
        self.memory = memory
        self.tokens = tokens
        self.slabs: dict[int, Slab[RowT]] = {}
        self.migrations = 0

    @property
    def capacity_tokens(self) -> int:
        return sum(slab.size * slab.slots for slab in self.slabs.values())

    def admit(self, row: RowT, tokens: int) -> None:
        """Give an empty row a slot for so many tokens; it does not decode yet."""
        self._append(row, self._slab(slab_tokens(tokens)))
        row.length = 0

    def reserve(self, row: RowT, tokens: int) -> None:
        """Make room for so many tokens; the row migrates where its class is too small."""
        size = slab_tokens(tokens)
        old, slot = placed_slab(row), row.slot
        if size <= old.size:
            return
        is_decoding = slot < old.decoding
        new = self._slab(size)
        self._append(row, new)
        self.memory.do("copy", old.size, slot, new.size, row.slot, row.length)
        old.remove(slot)
        self._trim(old)
        if is_decoding:
            self.start_decoding(row)
        self.migrations += 1

    def start_decoding(self, row: RowT) -> None:
        """Move the row to the decoding ones of its slab."""
        slab = placed_slab(row)
        slab.swap(row.slot, slab.decoding)
        slab.decoding += 1

    def release(self, row: RowT, zero: bool = False) -> None:
        """Remove a row; `zero`: zero its memory, because it is not finite."""
        slab = placed_slab(row)
        if zero:
            self.memory.do("zero", slab.size, row.slot, row.slot + 1)
        slab.remove(row.slot)
        if zero:
            self.memory.do("zero", slab.size, len(slab.rows), slab.slots)
        row.slab = None
        self._trim(slab)

    def _slab(self, size: int) -> Slab[RowT]:
        if size not in self.slabs:
            self.slabs[size] = Slab(size, self.memory)
        return self.slabs[size]

    def _append(self, row: RowT, slab: Slab[RowT]) -> None:
        if len(slab.rows) == slab.slots:
            self._grow(slab)
        row.slab, row.slot = slab, len(slab.rows)
        slab.rows.append(row)

    def _grow(self, slab: Slab[RowT]) -> None:
        """Add half as many slots; only one where the arena would exceed twice `tokens`."""
        spare = max(1, slab.slots // 2)
        if self._exceeds(spare * slab.size):
            for other in self.slabs.values():
                if other is not slab and other.slots > len(other.rows):
                    other.resize(len(other.rows))
            if self._exceeds(spare * slab.size):
                spare = 1
        slab.resize(slab.slots + spare)

    def _exceeds(self, more_tokens: int) -> bool:
        return self.capacity_tokens + more_tokens > 2 * self.tokens

    def _trim(self, slab: Slab[RowT]) -> None:
        """Free a large slab that is empty; a small one stays for the next row."""
        if not slab.rows and slab.slots * slab.size > self.tokens // 4:
            slab.resize(0)
