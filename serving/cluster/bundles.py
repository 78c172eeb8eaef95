"""A deployer's placement as what Ray reserves for each replica.

An actor sees the devices of one bundle alone, and the stages of a replica are processes of one
machine, so that a replica's chain is one bundle: Ray finds a node that has all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.placing import ReplicaSpec

GPU, CPU = "GPU", "CPU"  # Ray's names


@dataclass(frozen=True)
class ReplicaPlace:
    """What a replica gets of a node.

    Attributes:
        cpus, gpus: of Ray's resources.
        devices: as --devices of serving.server has them, for a chain of several; None for one
            device.
        device_map: {module: number in the chain}, where there are several.
    """

    cpus: int = 1
    gpus: int = 0
    devices: str | None = None
    device_map: dict[str, int] = field(default_factory=dict)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Ray's placement_group_bundles of one replica."""
        bundle = {CPU: float(self.cpus)}
        if self.gpus:
            bundle[GPU] = float(self.gpus)
        return [bundle]


def place_of_replica(replica: "ReplicaSpec", layer: str, layers: int) -> ReplicaPlace:
    """What a replica of a plan needs of a node.

    Args:
        layer: the name of a layer's module, with {} for its number.
        layers: of the model.
    """
    gpus = sum(stage.device.startswith("cuda") for stage in replica.stages)
    cpus = sum(stage.threads or 1 for stage in replica.stages)
    if len(replica.stages) == 1:
        return ReplicaPlace(cpus, gpus)
    device_map = {}
    for number, stage in enumerate(replica.stages):
        for index in range(stage.start, stage.end):
            device_map[layer.format(index)] = number
    if len(device_map) != layers:
        raise ValueError(f"a placement holds {len(device_map)} of {layers} layers")
    return ReplicaPlace(cpus, gpus, chain_of(replica), device_map)


def chain_of(replica: "ReplicaSpec") -> str:
    """The chain's devices by the numbers that they have in the replica's own process."""
    names: list[str] = []
    gpus = 0
    for stage in replica.stages:
        if stage.device.startswith("cuda"):
            names.append(f"cuda:{gpus}")
            gpus += 1
        else:
            names.append(f"cpu@{stage.threads or 1}")
    return ",".join(names)


def common_place(places: Sequence[ReplicaPlace]) -> ReplicaPlace:
    """The place of all replicas, which Ray wants alike. Raises ValueError where they differ."""
    first = places[0]
    if any(place != first for place in places):
        raise ValueError("Ray's replicas are alike, this placement has some that differ")
    return first
