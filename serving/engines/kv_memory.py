"""The tensors of a KV arena, and the operations that change where sequences lie in them.

serving.engines.arena decides; this carries out. Each stage of a pipeline has the memory of its own
layers, and carries out the same operations in the same order.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class KvMemory:
    """Keys and values of some layers, by length class.

    A place is (size of the class, slot). `do` runs the methods named in OPERATIONS.

    Args:
        layers: how many.
        prefix: P-Tuning v2's keys and values (2 * layers, 1, kv_heads, P, D) of these layers, which
            stand before each sequence.
    Attributes:
        keys, values: by class, then layer: (slots, kv_heads, size, head_dim).
        kept: keys and values (kv_heads, n, head_dim) of each layer, of what `keep` has copied; the
            memories of one engine share it.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Tensor | None = None,
        kept: dict[Hashable, tuple[list[Tensor], list[Tensor]]] | None = None,
    ):
        self.layers = layers
        self.shape = (kv_heads, head_dim)
        self.dtype = dtype
        self.device = device
        self.prefix = prefix
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.kept = {} if kept is None else kept

    @property
    def slab_bytes(self) -> int:
        total = 0
        for by_class in (self.keys, self.values):
            for tensors in by_class.values():
                for tensor in tensors:
                    total += tensor.nbytes
        return total

    @property
    def kept_bytes(self) -> int:
        total = 0
        for keys, values in self.kept.values():
            for tensor in (*keys, *values):
                total += tensor.nbytes
        return total

    def _zeros(self, size: int, slots: int) -> Tensor:
        kv_heads, head_dim = self.shape
        shape = (slots, kv_heads, size, head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def resize(self, size: int, slots: int, used: int) -> None:
        """Make room for so many slots, layer by layer: only one layer exists twice at a time.

        Args:
            used: slots that keep what they hold.
        """
        for by_class in (self.keys, self.values):
            if size not in by_class:
                by_class[size] = [self._zeros(size, slots) for _ in range(self.layers)]
                continue
            tensors = by_class[size]
            for layer, old in enumerate(tensors):
                # Zeros: unwritten places are masked, but 0 * nan would be nan.
                tensors[layer] = self._zeros(size, slots)
                tensors[layer][:used] = old[:used]

    def copy(self, size: int, source: int, target_size: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a place to another."""
        for by_class in (self.keys, self.values):
            for x, y in zip(by_class[size], by_class[target_size]):
                y[target, :, :length] = x[source, :, :length]

    def swap(self, size: int, a: int, b: int, length: int) -> None:
        """Exchange the first `length` tokens of two slots."""
        for by_class in (self.keys, self.values):
            for x in by_class[size]:
                saved = x[a, :, :length].clone()
                x[a, :, :length] = x[b, :, :length]
                x[b, :, :length] = saved

    def zero(self, size: int, start: int, end: int) -> None:
        """Zero the slots from `start` to `end`."""
        for by_class in (self.keys, self.values):
            for x in by_class[size]:
                x[start:end].zero_()

    def write_prefix(self, size: int, slot: int) -> None:
        """Write P-Tuning v2's keys and values to the beginning of a place."""
        if self.prefix is None:
            return
        length = self.prefix.shape[-2]
        for layer in range(self.layers):
            self.keys[size][layer][slot, :, :length] = self.prefix[2 * layer, 0]
            self.values[size][layer][slot, :, :length] = self.prefix[2 * layer + 1, 0]

    def keep(self, name: Hashable, size: int, slot: int, length: int) -> None:
        """Keep a copy of the first `length` tokens of a place under a name."""
        keys = [layer[slot, :, :length].clone() for layer in self.keys[size]]
        values = [layer[slot, :, :length].clone() for layer in self.values[size]]
        self.kept[name] = keys, values

    def drop(self, name: Hashable) -> None:
        """Free what is kept under a name."""
        del self.kept[name]

    def paste(self, name: Hashable, size: int, slot: int, length: int) -> None:
        """Write the first `length` tokens of what is kept under a name to a place."""
        keys, values = self.kept[name]
        for layer, (key, value) in enumerate(zip(keys, values)):
            self.keys[size][layer][slot, :, :length] = key[:, :length]
            self.values[size][layer][slot, :, :length] = value[:, :length]

    def do(self, operation: str, *arguments: Any) -> None:
        """Carry out one of OPERATIONS. Raises ValueError for another name."""
        if operation not in OPERATIONS:
            raise ValueError(f"no such operation of a KV memory: {operation!r}")
        getattr(self, operation)(*arguments)


OPERATIONS = ("resize", "copy", "swap", "zero", "write_prefix", "keep", "drop", "paste")


class LoggedMemory(KvMemory):
    """A memory that also tells what it does, for the memories of other stages to do it too.

    Args:
        log: called with each operation and its arguments.
        options: KvMemory's.
    """

    def __init__(self, log: Callable[[str, tuple[Any, ...]], None], *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._log = log

    def do(self, operation: str, *arguments: Any) -> None:
        self._log(operation, arguments)
        super().do(operation, *arguments)
