"""Several models on partly used devices: best fit decreasing.

The largest model first, each on the fullest device that still holds it whole, weights and KV at the
q90; a model that no device holds goes on a chain of the fewest devices that do, of those on the one
with the least free memory. On single equal devices the rule takes at most 11/9 of the fewest
possible, and a constant (Johnson et al., Worst-case performance bounds for simple one-dimensional
packing algorithms, SIAM J. Comput. 3, 1974). Where the rule finds no place for a model, the next
best places of those before it are tried. Free of torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, permutations
from operator import attrgetter

import numpy as np

from serving.cost_model.devices import Device
from serving.cost_model.model import ModelSizes, layers_by_device
from serving.deployment.deployers import fill_in_order
from serving.deployment.placement import Infeasible, Need, kv_layer_bytes, layers_that_fit

MAX_STEPS = 20_000  # places tried before the search is given up
MAX_CHAINS = 2_000  # chains of one length that are looked at for one model
LONGEST_REORDERED = 3  # devices of a chain of which every order is tried


@dataclass(frozen=True)
class ModelToPack:
    """A model, and the KV tokens that must fit beside it."""

    name: str
    sizes: ModelSizes
    need: Need

    @property
    def whole_bytes(self) -> int:
        """Weights and KV on one device."""
        layer = self.sizes.layer_bytes + kv_layer_bytes(self.sizes, self.need)
        return self.sizes.layers * layer + self.sizes.end_bytes(True, True)


@dataclass(frozen=True)
class PackedModel:
    """A model where it lies.

    Attributes:
        stages: ((device, layers), ...) in the order of its layers.
    """

    model: ModelToPack
    stages: tuple[tuple[int, int], ...]

    @property
    def bytes_on(self) -> dict[int, int]:
        """{device: weights and KV}."""
        sizes = self.model.sizes
        layer = sizes.layer_bytes + kv_layer_bytes(sizes, self.model.need)
        first, last = self.stages[0][0], self.stages[-1][0]
        found = {}
        for device, layers in layers_by_device(self.stages).items():
            found[device] = layers * layer + sizes.end_bytes(device == first, device == last)
        return found


def pack_models(models: Sequence[ModelToPack], devices: Sequence[Device]) -> list[PackedModel]:
    """Every model in its place, in the order given.

    Raises:
        Infeasible: they do not fit, or no packing was found in MAX_STEPS.
    """
    search = PackingSearch(devices)
    order = sorted(models, key=attrgetter("whole_bytes"), reverse=True)
    found = search.run(order, [device.usable_bytes for device in devices])
    if found is None:
        raise search.failure(order)
    by_model = {id(packed.model): packed for packed in found}
    return [by_model[id(model)] for model in models]


class PackingSearch:
    """Depth first over places, best fit first: its first path is best fit decreasing."""

    def __init__(self, devices: Sequence[Device]):
        self.devices = devices
        self.steps = 0
        self._deepest: tuple[int, list[int]] = (-1, [])  # models placed, free bytes then

    def run(self, models: Sequence[ModelToPack], free: list[int]) -> list[PackedModel] | None:
        """Places for all models within the free bytes of each device; None where none is found."""
        return self._place(list(models), free, 0)

    def _place(
        self, models: list[ModelToPack], free: list[int], done: int
    ) -> list[PackedModel] | None:
        if done > self._deepest[0]:
            self._deepest = (done, free)
        if done == len(models):
            return []
        for packed in self.options(models[done], free):
            if self.steps >= MAX_STEPS:
                return None
            self.steps += 1
            left = list(free)
            for device, size in packed.bytes_on.items():
                left[device] -= size
            rest = self._place(models, left, done + 1)
            if rest is not None:
                return [packed, *rest]
        return None

    def options(self, model: ModelToPack, free: Sequence[int]) -> Iterator[PackedModel]:
        """Places of one model, the best fit first: one device, then chains of two, and so on."""
        order = sorted(range(len(free)), key=lambda d: (free[d], d))
        seen = set()
        for d in order:
            # Of devices with equally much room one is as good as another.
            if free[d] >= model.whole_bytes and free[d] not in seen:
                seen.add(free[d])
                yield PackedModel(model, ((d, model.sizes.layers),))
        for count in range(2, min(len(free), model.sizes.layers) + 1):
            chains = list(islice(combinations(order, count), MAX_CHAINS))
            chains.sort(key=lambda chain: sum(free[d] for d in chain))
            for chain in chains:
                if (stages := self.fill(model, chain, free)) is not None:
                    yield PackedModel(model, stages)

    def fill(
        self, model: ModelToPack, chain: Sequence[int], free: Sequence[int]
    ) -> tuple[tuple[int, int], ...] | None:
        """The stages of a model on these devices, each filled before the next; None: no room."""
        if sum(free[d] for d in chain) < model.whole_bytes:
            return None
        orders: Iterator[tuple[int, ...]] = iter([tuple(chain), tuple(reversed(chain))])
        if len(chain) <= LONGEST_REORDERED:
            orders = permutations(chain)
        for devices in orders:
            room = []
            for place, d in enumerate(devices):
                device = replace(self.devices[d], memory_bytes=max(1, free[d]), reserved_bytes=0)
                ends = (place == 0, place == len(devices) - 1)
                room.append(layers_that_fit(model.sizes, device, model.need, *ends))
            layers = fill_in_order(np.array(room), model.sizes.layers)
            if layers is not None:
                return tuple(zip(devices, layers))
        return None

    def failure(self, models: Sequence[ModelToPack]) -> Infeasible:
        """The error that names the first model without a place."""
        done, free = self._deepest
        model = models[done]
        tried = f"none found in {MAX_STEPS:,} tries" if self.steps >= MAX_STEPS else "there is none"
        total = sum(each.whole_bytes for each in models)
        room = ", ".join(f"{size:,}" for size in free)
        usable = sum(device.usable_bytes for device in self.devices)
        return Infeasible(
            f"pack: no place for {model.name}, which needs {model.whole_bytes:,} bytes, beside the "
            f"{done} larger model(s) ({tried}); free then, device by device: {room}; "
            f"all models need {total:,} bytes, the devices have {usable:,}"
        )


def describe_packing(packed: Sequence[PackedModel], devices: Sequence[Device]) -> str:
    """What lies on each device, and how much of it stays free."""
    lines = []
    for d, device in enumerate(devices):
        parts = []
        used = 0
        for each in packed:
            size = each.bytes_on.get(d)
            if size is None:
                continue
            used += size
            parts.append(f"{each.model.name} layers {layer_range(each, d)} {size:,} bytes")
        what = "; ".join(parts) or "nothing"
        free = device.usable_bytes - used
        lines.append(f"device {d} {device.label}: {what}; {free:,} bytes free")
    return "\n".join(lines)


def layer_range(packed: PackedModel, device: int) -> str:
    """The layers of a packed model on a device: "0-13"."""
    start = 0
    for d, layers in packed.stages:
        if d == device:
            return f"{start}-{start + layers - 1}" if layers > 1 else f"{start}"
        start += layers
    raise ValueError(f"{packed.model.name} has no layer on device {device}")
