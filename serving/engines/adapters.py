"""Several LoRA adapters on one model: each token of a forward pass has its own, or none.

The factors of all adapters are stacked for each changed layer: A (R, in), B (R, out), where R is
the sum of the ranks. A hook of the layer adds x A^T B^T to its output, after the columns of x A^T
that belong to other adapters than the token's are set to 0. So a pass reads each layer's weights
once, whatever adapters its tokens have (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

Which token has which adapter is state of the thread that runs the pass: `AdapterSet.applied` sets
it before the pass and clears it after. Stacks are never changed: a load or unload builds new ones
aside and puts them in place, and a pass that is under way keeps those that it began with.
"""

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from serving.engines.adapter_errors import AdapterExists, UnknownAdapter
from serving.engines.adapter_files import (
    LoraFactors,
    check_finite,
    linear_sizes,
    read_lora,
)

log = logging.getLogger(__name__)

MOST_ADAPTERS = 64  # loaded at once


@dataclass
class LoadedAdapter:
    """An adapter and its users.

    Attributes:
        number: of its columns, never given to another; 0 stands for no adapter.
        users: answers that wait or run with it.
        is_unloaded: no new ones; it is dropped when the last of them has ended.
    """

    name: str
    number: int
    users: int = 0
    is_unloaded: bool = False


@dataclass(frozen=True)
class Stack:
    """The factors of all adapters that change one layer.

    Attributes:
        a: (R, in). b: (R, out), scaled.
        owners: (R,), the number of each column's adapter.
        spans: (number, first column, end) of each adapter.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Tensor, Tensor]]) -> "Stack":
        """The stack of (number, A (r, in), B (r, out)) of each adapter."""
        spans = []
        end = 0
        owners: list[int] = []
        for number, a, _ in parts:
            start, end = end, end + len(a)
            spans.append((number, start, end))
            owners += [number] * len(a)
        _, every_a, every_b = zip(*parts)
        a, b = torch.cat(every_a), torch.cat(every_b)
        return cls(a, b, torch.tensor(owners, device=a.device), tuple(spans))

    def parts(self) -> list[tuple[int, Tensor, Tensor]]:
        return [(number, self.a[start:end], self.b[start:end]) for number, start, end in self.spans]


class AdapterPass:
    """The adapters of the tokens of one pass, or of the rows of a batch.

    Attributes:
        numbers: (1, N) or (B, 1) on the CPU or the model's device, broadcast over the rest.
        active: the numbers that occur, without 0.
        is_uniform: all tokens but padding have the same adapter.
    """

    def __init__(
        self, stacks: dict[str, Stack], numbers: Tensor, active: set[int], is_uniform: bool
    ):
        self.stacks = stacks
        self.numbers = numbers
        self.active = active
        self.is_uniform = is_uniform
        self._columns: dict[Any, tuple[slice, Tensor | None] | None] = {}

    def narrow(self, keep: Tensor) -> None:
        """From here on the layers see the tokens `keep` (K,) alone."""
        self.numbers = self.numbers[:, keep.to(self.numbers.device)]
        self._columns = {}

    def add(self, stack: Stack, x: Tensor, output: Tensor) -> Tensor:
        """A layer's output (..., out) with what the adapters add for its input x (..., in)."""
        key = stack.spans, stack.a.device
        if key not in self._columns:
            self._columns[key] = self._used_columns(stack)
        if (used := self._columns[key]) is None:
            return output
        columns, foreign = used
        low = F.linear(x.to(stack.a), stack.a[columns])
        if foreign is not None:
            # Not multiplied: another adapter's product may be infinite.
            low.masked_fill_(foreign, 0)
        b = stack.b[columns]
        if output.dtype == b.dtype and output.device == b.device and output.is_contiguous():
            output.view(-1, output.shape[-1]).addmm_(low.flatten(0, -2), b)
            return output
        return output + (low @ b).to(output)

    def _used_columns(self, stack: Stack) -> tuple[slice, Tensor | None] | None:
        """(The columns of the pass's adapters, which of them are not the token's); None without.

        The mask is (1, N, columns) or (B, 1, columns), None where all columns are every token's.
        """
        used = [span for span in stack.spans if span[0] in self.active]
        if not used:
            return None
        columns = slice(used[0][1], used[-1][2])
        if self.is_uniform:
            return columns, None
        numbers = self.numbers.to(stack.owners.device)
        return columns, stack.owners[columns] != numbers[..., None]


@dataclass
class ThreadState(threading.local):
    """The pass that a thread runs, None between passes."""

    active: AdapterPass | None = field(default=None)


class AdapterSet:
    """The adapters of a served model.

    Args:
        device: of a stage of a pipeline, which takes what belongs to its own layers; the others are
            on the meta device. None for a whole model.

    load, unload, acquire and release may be called from any thread; applied only from the thread
    that runs the model, and narrow from within its pass.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None):
        self._model = model
        self._device = device
        self._state = ThreadState()
        self._lock = threading.Lock()  # of what follows; held for a moment
        self._loaded: dict[str, LoadedAdapter] = {}
        self._stacks: dict[str, Stack] = {}
        self._building = threading.Lock()  # held while new stacks are made
        self._numbers = itertools.count(1)
        # Of the thread that runs the model.
        self._hooks: dict[str, Any] = {}

    def names(self) -> list[str]:
        with self._lock:
            return list(self._loaded)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter and give it to requests by a name.

        Raises:
            AdapterExists: the name is taken.
            FileNotFoundError: a file is not there.
            ValueError: the adapter is refused, or the model takes none; in one line.
        """
        self._check_room(name)
        self._check_model()
        factors = self._read(Path(folder))
        number = next(self._numbers)
        self._load_elsewhere(Path(folder), number)
        with self._building:
            try:
                self._check_room(name)
            except ValueError:
                self._drop_elsewhere(number)
                raise
            stacks = self._with_factors(number, factors)
            with self._lock:
                self._stacks = stacks
                self._loaded[name] = LoadedAdapter(name, number)

    def load_numbered(self, folder: Path, number: int) -> None:
        """Read an adapter that another stage's set has given a number.

        Raises as `load`.
        """
        factors = self._read(folder)
        with self._building:
            stacks = self._with_factors(number, factors)
            with self._lock:
                self._stacks = stacks

    def _load_elsewhere(self, folder: Path, number: int) -> None:
        """Load an adapter in the other stages of a pipeline; here there are none."""

    def _drop_elsewhere(self, number: int) -> None:
        """Drop an adapter in the other stages of a pipeline; here there are none."""

    def _read(self, folder: Path) -> dict[str, LoraFactors]:
        """The factors of an adapter's layers, where those layers lie."""
        model = self._model
        is_chatglm = getattr(model.config, "model_type", None) == "chatglm"
        factors = read_lora(
            folder, linear_sizes(model), str(model.name_or_path) or "the model", is_chatglm
        )
        on_device = {}
        for module, pair in factors.items():
            device = self._device_of(module)
            if device is None:
                continue
            moved = LoraFactors(pair.a.to(device, model.dtype), pair.b.to(device, model.dtype))
            check_finite(folder, module, moved)
            on_device[module] = moved
        return on_device

    def _with_factors(self, number: int, factors: dict[str, LoraFactors]) -> dict[str, Stack]:
        """The stacks with one more adapter."""
        stacks = dict(self._stacks)
        for module, pair in factors.items():
            stacks[module] = with_factors(stacks.get(module), number, pair)
        return stacks

    def unload(self, name: str) -> None:
        """Take no new requests for an adapter; it is dropped when its last answer has ended.

        Raises:
            UnknownAdapter: it is not loaded.
        """
        with self._lock:
            adapter = self._loaded.pop(name, None)
            if adapter is None:
                raise UnknownAdapter(f"no adapter {name!r} is loaded")
            adapter.is_unloaded = True
            is_unused = not adapter.users
        if is_unused:
            self._drop(adapter.number)

    def acquire(self, name: str) -> LoadedAdapter:
        """An adapter for one more answer. Raises UnknownAdapter."""
        with self._lock:
            adapter = self._loaded.get(name)
            if adapter is None:
                raise UnknownAdapter(f"no adapter {name!r} is loaded")
            adapter.users += 1
            return adapter

    def release(self, adapter: LoadedAdapter) -> None:
        """An answer with the adapter has ended."""
        with self._lock:
            adapter.users -= 1
            is_unused = adapter.is_unloaded and not adapter.users
        if is_unused:
            self._drop(adapter.number)

    def _drop(self, number: int) -> None:
        """Free an adapter, in all stages."""
        self._drop_elsewhere(number)
        self.drop_numbered(number)

    def drop_numbered(self, number: int) -> None:
        """Free this set's part of an adapter; nothing where it has none."""
        with self._building:
            try:
                stacks = {}
                for module, stack in self._stacks.items():
                    parts = [part for part in stack.parts() if part[0] != number]
                    if len(parts) == len(stack.spans):
                        stacks[module] = stack
                    elif parts:
                        stacks[module] = Stack.of(parts)
            except RuntimeError:  # out of memory; its columns stay, and no token has its number
                log.exception("adapter %d: its memory is not freed", number)
                return
            with self._lock:
                self._stacks = stacks

    def _check_room(self, name: str) -> None:
        with self._lock:
            if name in self._loaded:
                raise AdapterExists(f"an adapter {name!r} is loaded already; unload it first")
            if len(self._loaded) >= MOST_ADAPTERS:
                raise ValueError(f"{MOST_ADAPTERS} adapters are loaded; unload one first")

    def _check_model(self) -> None:
        """Raises ValueError where the served model takes no adapters."""
        if getattr(self._model.config, "pre_seq_len", None):
            raise ValueError("the served model has a P-Tuning prefix: adapters need one without")
        for module in self._model.modules():
            if type(module).__module__.startswith("peft."):
                raise ValueError("the served model is an adapter itself: serve its base")

    def _device_of(self, module: str) -> torch.device | None:
        """Where a layer's weight lies; None for one of another stage.

        Raises ValueError where it is moved for each pass.
        """
        for parameter in self._model.get_submodule(module).parameters():
            if parameter.device.type == "meta" and self._device is not None:
                return None
            if parameter.device.type == "meta":
                raise ValueError(f"{module} is offloaded; adapters need a model on devices")
            return parameter.device
        return self._model.device

    @contextmanager
    def applied(self, adapters: Sequence[tuple[int, int]], padding: int = 0) -> Iterator[None]:
        """Within, this thread's pass has (1, N) tokens, of which so many have each adapter.

        Args:
            adapters: (its number, 0 for none; how many tokens), in the order of the tokens.
            padding: tokens after them.
        """
        numbers: list[int] = []
        for number, count in adapters:
            numbers += [number] * count
        with self._running(numbers, padding, by_row=False):
            yield

    @contextmanager
    def applied_to_rows(self, adapters: Sequence[LoadedAdapter | None]) -> Iterator[None]:
        """Within, this thread's passes have (B, T) tokens; each row has one adapter or None."""
        numbers = [adapter.number if adapter else 0 for adapter in adapters]
        with self._running(numbers, 0, by_row=True):
            yield

    @contextmanager
    def _running(self, numbers: list[int], padding: int, by_row: bool) -> Iterator[None]:
        with self._lock:
            stacks = self._stacks
        if stacks.keys() != self._hooks.keys():
            self._set_hooks(stacks)
        distinct = set(numbers)
        if distinct <= {0}:
            yield
            return
        device = self._device or self._model.device
        tensor = torch.tensor(numbers + [0] * padding, device=device)
        self._state.active = AdapterPass(
            stacks, tensor[:, None] if by_row else tensor[None], distinct - {0}, len(distinct) == 1
        )
        try:
            yield
        finally:
            self._state.active = None

    def narrow(self, keep: Tensor) -> None:
        """The rest of this thread's pass computes the tokens `keep` (K,) alone."""
        if self._state.active is not None:
            self._state.active.narrow(keep)

    def _set_hooks(self, stacks: dict[str, Stack]) -> None:
        """Hook the layers that adapters change, and no others."""
        for name in self._hooks.keys() - stacks.keys():
            self._hooks.pop(name).remove()
        for name in stacks.keys() - self._hooks.keys():
            module = self._model.get_submodule(name)
            self._hooks[name] = module.register_forward_hook(partial(self._add, name))

    def _add(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The forward hook of a layer; None leaves the output as it is."""
        active = self._state.active
        if active is None or (stack := active.stacks.get(name)) is None:
            return None
        return active.add(stack, inputs[0], output)


def with_factors(stack: Stack | None, number: int, factors: LoraFactors) -> Stack:
    """A stack with one more adapter's factors."""
    parts = stack.parts() if stack else []
    return Stack.of([*parts, (number, factors.a, factors.b)])
