"""KV memory of running sequences in length classes: slabs of rows that all hold the same power of two of tokens.

A slab's rows lie side by side without holes, the decoding ones first, so attention of a decode step reads
keys[:decoding, :, :longest] as they lie: no gathering, no concatenation. A row that leaves is replaced by the last one, which is copied
once for each answer, not for each token.
"""

import torch

SMALLEST = 64  # tokens of the smallest class


def class_of(tokens: int) -> int:
    """The smallest class that holds so many tokens."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


class Slab:
    """Rows of `size` tokens; keys and values are lists, by layer, of (slots, kv_heads, size, head_dim).

    Attributes:
        rows: those there, in the order of their slots; the first `decoding` of them decode, the others wait for their prompts.
    """

    def __init__(
        self,
        size: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.size, self.shape, self.like = (
            size,
            (kv_heads, size, head_dim),
            {"dtype": dtype, "device": device},
        )
        self.keys = [torch.zeros(0, *self.shape, **self.like) for _ in range(layers)]
        self.values = [torch.zeros(0, *self.shape, **self.like) for _ in range(layers)]
        self.rows: list = []
        self.decoding = 0

    @property
    def slots(self) -> int:
        return len(self.keys[0])

    def resize(self, slots: int):
        """Make room for so many rows, layer by layer: two copies of one layer exist at a time, not of all."""
        kept = len(self.rows)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros: what nobody wrote is masked, but 0 * nan would be nan.
                tensors[layer] = torch.zeros(slots, *self.shape, **self.like)
                tensors[layer][:kept] = old[:kept]

    def copy(self, source: int, target: int):
        length = self.rows[source].length
        for tensors in (self.keys, self.values):
            for x in tensors:
                x[target, :, :length] = x[source, :, :length]

    def swap(self, a: int, b: int):
        if a == b:
            return
        rows = self.rows
        length = max(rows[a].length, rows[b].length)
        for tensors in (self.keys, self.values):
            for x in tensors:
                kept = x[a, :, :length].clone()
                x[a, :, :length] = x[b, :, :length]
                x[b, :, :length] = kept
        rows[a], rows[b] = rows[b], rows[a]
        rows[a].slot, rows[b].slot = a, b

    def take_out(self, slot: int):
        """Close the hole that a row leaves: a decoding one first by the last decoding row, then by the last of all."""
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


class Arena:
    """All slabs. Rows have `slab`, `slot` and `length` (tokens written), which the arena sets; who reserves how much is not its business.

    Memory follows reservations: at most twice what is reserved (a class is less than twice its rows) where `tokens` would be
    exceeded, and some room to grow below that.

    Attributes:
        tokens: what the reservations add up to at most.
        held: tokens in slabs. migrations: rows that moved to a larger class.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        tokens: int,
    ):
        self.shape = (layers, kv_heads, head_dim, dtype, device)
        self.tokens = tokens
        self.slabs: dict[int, Slab] = {}
        self.migrations = 0

    @property
    def held(self) -> int:
        return sum(slab.size * slab.slots for slab in self.slabs.values())

    def admit(self, row, tokens: int):
        """A slot for a row, which holds nothing yet and does not decode."""
        self._append(row, self._slab(class_of(tokens)))
        row.length = 0

    def reserve(self, row, tokens: int):
        """Room for so many tokens; the row migrates where its class is too small."""
        size = class_of(tokens)
        if size <= row.slab.size:
            return
        old, slot, decoding = row.slab, row.slot, row.slot < row.slab.decoding
        new = self._slab(size)
        self._append(row, new)
        for before, after in ((old.keys, new.keys), (old.values, new.values)):
            for x, y in zip(before, after):
                y[row.slot, :, : row.length] = x[slot, :, : row.length]
        old.take_out(slot)
        self._trim(old)
        if decoding:
            self.join(row)
        self.migrations += 1

    def join(self, row):
        """The row decodes from now on."""
        slab = row.slab
        slab.swap(row.slot, slab.decoding)
        slab.decoding += 1

    def release(self, row, wipe: bool = False):
        """`wipe`: it holds numbers that are not finite, which no later row may find."""
        slab = row.slab
        if wipe:
            for x in (*slab.keys, *slab.values):
                x[row.slot].zero_()
        slab.take_out(row.slot)
        if wipe:
            for x in (*slab.keys, *slab.values):
                x[len(slab.rows) :].zero_()
        row.slab = None
        self._trim(slab)

    def _slab(self, size: int) -> Slab:
        layers, kv_heads, head_dim, dtype, device = self.shape
        if size not in self.slabs:
            self.slabs[size] = Slab(size, layers, kv_heads, head_dim, dtype, device)
        return self.slabs[size]

    def _append(self, row, slab: Slab):
        if len(slab.rows) == slab.slots:
            wanted = slab.slots + max(1, slab.slots // 2)
            if self.held + (wanted - slab.slots) * slab.size > 2 * self.tokens:
                for other in self.slabs.values():
                    if other is not slab and other.slots > len(other.rows):
                        other.resize(len(other.rows))
                if self.held + (wanted - slab.slots) * slab.size > 2 * self.tokens:
                    wanted = slab.slots + 1
            slab.resize(wanted)
        row.slab, row.slot = slab, len(slab.rows)
        slab.rows.append(row)

    def _trim(self, slab: Slab):
        """Give back a slab that stands empty and is large; small ones are kept for the next row."""
        if not slab.rows and slab.slots * slab.size > self.tokens // 4:
            slab.resize(0)
