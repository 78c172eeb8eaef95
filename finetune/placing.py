"""Where a model is loaded: its layers on this machine's devices, once or several times.

The flags of every command that can use several devices, and what comes of them. Deployers choose
(serving.deployment); processes load by it. Free of torch.
"""

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune.config import parse_positive

DEPLOYER_NAMES = ("even", "single", "he", "lr", "helr", "morphling", "exhaustive")
PLANNER = "serving.replicas.planning"  # stands above this package, and is imported when asked for


@dataclass(frozen=True)
class StageSpec:
    """The layers that one device holds.

    Attributes:
        device: as torch names it.
        start, end: the first layer, and the one after the last.
        threads: of a process on a CPU; None leaves torch's number.
    """

    device: str
    start: int
    end: int
    threads: int | None = None


@dataclass(frozen=True)
class ReplicaSpec:
    """One whole model: a chain of stages, or one stage that holds all of it.

    Attributes:
        stages: in the order of their layers.
        device_map: for a single process that holds all stages: {module: device}, as accelerate and
            load_model take it; None where there is one stage.
    """

    stages: tuple[StageSpec, ...]
    device_map: dict[str, int | str] | None = None

    @property
    def devices(self) -> str:
        """As --devices has them: "cuda:0", "cpu@2", "cuda:0+cuda:1"."""
        names = []
        for stage in self.stages:
            names.append(f"{stage.device}@{stage.threads}" if stage.threads else stage.device)
        return "+".join(names)


class StageFigures(Protocol):
    """What is predicted of one stage: bytes, and seconds of a batch's prefill and of one step."""

    @property
    def weight_bytes(self) -> int: ...

    @property
    def prefill_s(self) -> float: ...

    @property
    def decode_s(self) -> float: ...


class ReplicaPlan(Protocol):
    """What a planner makes of the flags; `stages` are those of one replica."""

    @property
    def replicas(self) -> Sequence[ReplicaSpec]: ...

    @property
    def stages(self) -> Sequence[StageFigures]: ...

    def describe(self) -> str:
        """The placement with its predicted seconds and bytes, as text."""


@dataclass(frozen=True)
class PlacementFlags:
    """The flags of `add_placing_flags`."""

    deployer: str | None
    num_gpus: int | None
    devices: str | None
    device_map: str | None
    cluster: str | None
    profile: str | None
    measure: bool
    measure_s: float

    @property
    def is_placed(self) -> bool:
        """Whether a placement is asked for, and not the one device of --device."""
        return bool(self.deployer or self.num_gpus or self.devices or self.device_map)


def add_placing_flags(parser: argparse.ArgumentParser) -> None:
    """The flags by which a model is placed on several devices."""
    add = parser.add_argument
    add(
        "--deployer",
        choices=DEPLOYER_NAMES,
        help="what chooses the devices of the layers [helr, with --num_gpus or --devices alone]",
    )
    add(
        "--num_gpus",
        "--gpus",
        type=parse_positive,
        metavar="N",
        help="use the first N devices [all]; without GPUs, N processes that share the CPU's cores",
    )
    add(
        "--devices",
        metavar="LIST",
        help='use these devices: "cuda:0,cuda:2", or "cpu@2,cpu@1" for CPU processes of 2 threads '
        "and of 1",
    )
    add(
        "--device_map",
        metavar="FILE|auto",
        help="no deployer: a JSON file of {module: device}, or auto for equal shares",
    )
    add(
        "--cluster",
        metavar="FILE",
        help="a JSON file of the devices' sizes, speeds and links (default: they are measured)",
    )
    add(
        "--profile",
        help="what this engine's steps take (scripts/profile_engine.py); default: measured where a "
        "placement is asked for, else the device's datasheet",
    )
    add(
        "--measure",
        action="store_true",
        help="with --deployer morphling: stress-test the real engine, not the cost model",
    )
    add(
        "--measure_s",
        type=float,
        default=120.0,
        metavar="S",
        help="with --measure: seconds for all stress tests [120]",
    )


def check_is_placed(flags: PlacementFlags) -> None:
    """Raises ValueError where a flag describes a placement that is not asked for."""
    if not flags.is_placed and (flags.cluster or flags.measure):
        flag = "--cluster" if flags.cluster else "--measure"
        raise ValueError(f"{flag} needs --deployer, --num_gpus, --devices or --device_map")


def plan_replicas(
    flags: PlacementFlags,
    folder: str,
    *,
    kv_tokens: int,
    batch: int,
    prompt_tokens: int = 256,
    output_tokens: int = 256,
    precision: str = "auto",
    base: str | None = None,
    keep_quantized: bool = False,
) -> ReplicaPlan:
    """The replicas that the flags ask for.

    Args:
        folder: of the model, adapter or prefix. base, precision, keep_quantized: as `load_ready`'s.
        kv_tokens: tokens whose keys and values each replica must hold at once.
        batch, prompt_tokens, output_tokens: the batch whose latency the deployer minimises.
    Raises:
        ValueError: the flags contradict each other, a device is not there, or nothing fits.
    """
    planner = importlib.import_module(PLANNER)
    return planner.plan_deployment(
        flags,
        folder,
        kv_tokens=kv_tokens,
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        precision=precision,
        base=base,
        keep_quantized=keep_quantized,
    )
