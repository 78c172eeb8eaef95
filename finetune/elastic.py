"""Resuming with another number of ranks: reads DeepSpeed's shards as whole parameters.

DeepSpeed's ds_to_universal first writes a file for each parameter and moment. Here each rank maps
the shards into memory and copies its part of one parameter at a time. The ZeRO stage may change too
(ds_file.stage_for).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.distributed import rank, whole_size, world_size

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

MASTER = "fp32"  # key of the master weights, beside the optimizer's keys of its state
Pieces = dict[str, dict[str, list[Tensor]]]  # as in TrainerState


@contextmanager
def weights_only() -> Iterator[None]:
    """A context in which torch.load accepts only tensors and a few of DeepSpeed's classes.

    DeepSpeed itself would unpickle anything in its shards.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(
            [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass
class TrainerState:
    """The content of a checkpoint's shards, independent of stage and number of ranks.

    Attributes:
        pieces: parameter name -> MASTER or the optimizer's key -> consecutive parts of the
            parameter, flat; the last may be padded.
        step: the optimizer's count of steps (a tensor, or an int of DeepSpeed's CPU Adam), None
            where it has none.
        rates: the learning rate of each parameter group.
        counters: the engine's counts and its schedule, as DeepSpeed saves them.
        scaler: fp16's loss scale, None in a run without ZeRO.
    """

    pieces: Pieces
    step: Tensor | int | None
    rates: list[float]
    counters: dict[str, Any]
    scaler: object = None

    def whole(self, name: str, key: str, numel: int) -> Tensor:
        """(numel,) of one parameter; raises ValueError where the shards hold less."""
        pieces = self.pieces.get(name, {}).get(key, ())
        if sum(piece.numel() for piece in pieces) < numel:
            raise ValueError(f"the shards hold no {key} of all {numel} numbers of {name}")
        return torch.cat([piece.flatten() for piece in pieces])[:numel]


def read_shards(folder: Path) -> TrainerState:
    """The shards in trainer/state of a checkpoint; call it inside weights_only().

    Raises:
        ValueError: some of them are missing.
    """
    models = files_by_rank(folder, "*model_states.pt")
    if not models:
        raise ValueError(f"{folder}: no *model_states.pt")
    model = load_shard(models[0])
    optimizer_files = files_by_rank(folder, "*optim_states.pt")
    shards: list[dict[str, Any]] = []
    for path in optimizer_files:
        shards.append(load_shard(path)["optimizer_state_dict"])
    if shards and len(shards) != model["dp_world_size"]:
        raise ValueError(
            f"{folder}: {model['dp_world_size']} ranks wrote it, shards of {len(shards)} are there"
        )
    if not shards:
        optimizer = model["optimizer"]
        pieces = read_plain(model)
    elif "param_slice_mappings" in shards[0]:
        optimizer = shards[0]["base_optimizer_state"]
        pieces = read_flat(shards)
    else:
        optimizer = shards[0]["optimizer_state_dict"]
        pieces = read_partitioned(shards, model["param_shapes"])
    step = None
    for state in optimizer["state"].values():
        if step is None:
            step = state.get("step")
    rates = [group["lr"] for group in optimizer["param_groups"]]
    scaler = shards[0].get("loss_scaler") if shards else None
    return TrainerState(pieces, step, rates, model, scaler)


def load_shard(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, its tensors mapped into memory."""
    shard: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return shard


def files_by_rank(folder: Path, pattern: str) -> list[Path]:
    """The files that match a pattern, in the order of the ranks in their names (none: rank 0)."""
    files = {}
    for path in folder.glob(pattern):
        number = re.search(r"zero_pp_rank_(\d+)_", path.name)
        files[int(number.group(1)) if number else 0] = path
    return [files[number] for number in sorted(files)]


def state_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that have an element per element of the parameter."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if key != "step" and torch.is_tensor(value):
            tensors[key] = value
    return tensors


def add_part(pieces: Pieces, name: str, vectors: dict[str, Tensor], start: int, size: int) -> None:
    """Append elements `start` to `start + size` of each vector to the pieces of a parameter."""
    of_parameter = pieces.setdefault(name, {})
    for key, vector in vectors.items():
        of_parameter.setdefault(key, []).append(vector.narrow(0, start, size))


def read_plain(model: dict[str, Any]) -> Pieces:
    """The pieces of a run without ZeRO, each a whole parameter.

    torch's optimizer numbers the trained parameters in their order. They are fp32, so they are
    their own masters.
    """
    names = list(model["module"])
    if model.get("param_shapes"):
        names = []
        for shapes in model["param_shapes"]:
            names += shapes
    groups = model["optimizer"]["param_groups"]
    numbers = []
    for group in groups:
        numbers += group["params"]
    if len(groups) > 1:  # LoRA+: A's before B's (distributed.parameter_groups)
        names.sort(key=lambda name: ".lora_B." in name)
    if len(names) != len(numbers):
        raise ValueError(f"{len(numbers)} parameters in the optimizer, {len(names)} in the model")
    states = model["optimizer"]["state"]
    pieces: Pieces = {}
    for name, number in zip(names, numbers):
        tensors = {MASTER: model["module"][name]} | state_tensors(states.get(number, {}))
        pieces[name] = {key: [tensor] for key, tensor in tensors.items()}
    return pieces


def read_flat(shards: list[dict[str, Any]]) -> Pieces:
    """The pieces of ZeRO-1 and 2 and of BF16_Optimizer.

    Each group is one vector, cut into a part per rank; a shard says where its pieces start.
    """
    pieces: Pieces = {}
    for shard in shards:
        states = shard["base_optimizer_state"]["state"]
        for number, mapping in enumerate(shard["param_slice_mappings"]):
            master = shard["single_partition_of_fp32_groups"][number]
            vectors = {MASTER: master} | state_tensors(states.get(number, {}))
            for name, place in mapping.items():
                add_part(pieces, name, vectors, place.start, place.numel)
    return pieces


def read_partitioned(shards: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> Pieces:
    """The pieces of ZeRO-3.

    Every parameter is cut into equal parts, one per rank, the last padded. The parts of a rank lie
    end to end in sub-groups.
    """
    sizes: dict[str, int] = {}  # of a rank's part
    for group_shapes in shapes:
        for name, shape in group_shapes.items():
            sizes[name] = -(-shape.numel() // len(shards))
    pieces: Pieces = {}
    for shard in shards:
        masters = shard["fp32_flat_groups"]
        states = shard["optimizer_state_dict"]["state"]
        group = start = 0
        for name, size in sizes.items():
            if start == masters[group].numel():
                group += 1
                start = 0
            vectors = {MASTER: masters[group]} | state_tensors(states.get(group, {}))
            add_part(pieces, name, vectors, start, size)
            start += size
    return pieces


def restore(engine: "DeepSpeedEngine", saved: TrainerState) -> None:
    """Load a trainer state into an engine that has not stepped yet, without communication.

    Raises:
        ValueError: a trained parameter is not in it.
    """
    outer = engine.optimizer
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    for name in trained:
        if name not in saved.pieces:
            raise ValueError(f"the shards hold nothing of {name}")
    keys = list(next(iter(saved.pieces.values())))
    keys.remove(MASTER)
    inner = outer if is_plain(outer) else outer.optimizer
    for vector in trained.values() if is_plain(outer) else flat_groups(outer):
        inner.state[vector] = empty_state(vector, saved.step, keys)
    with torch.no_grad():
        for name, parameter in trained.items():
            for key in (MASTER, *keys):
                whole = saved.whole(name, key, whole_size(parameter))
                copy_part(outer, parameter, key, whole)
    restore_counters(engine, inner, saved)


def is_plain(optimizer: object) -> bool:
    """Whether it is torch's optimizer, not wrapped in one of DeepSpeed's."""
    return isinstance(optimizer, torch.optim.Optimizer)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned the parameter."""
    return hasattr(parameter, "ds_id")


def flat_groups(optimizer: "ZeROOptimizer") -> list[Tensor]:
    """This rank's part of each parameter group in fp32, one vector per group.

    These are the parameters of the torch optimizer inside of DeepSpeed's.
    """
    names = (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # BF16_Optimizer
    )
    for name in names:
        if hasattr(optimizer, name):
            groups: list[Tensor] = getattr(optimizer, name)
            return groups
    raise TypeError(f"{type(optimizer).__name__} has none of {', '.join(names)}")


def empty_state(
    vector: Tensor, step: Tensor | int | None, keys: list[str]
) -> dict[str, Tensor | int]:
    """An optimizer's state of one tensor: zeros for each key, and the count of steps."""
    if torch.is_tensor(step):
        step = step.clone().to(vector.device)
    state: dict[str, Tensor | int] = {} if step is None else {"step": step}
    for key in keys:
        state[key] = torch.zeros_like(vector)
    return state


def copy_part(
    optimizer: "torch.optim.Optimizer | ZeROOptimizer", parameter: Tensor, key: str, whole: Tensor
) -> None:
    """Copy this rank's part of a parameter's master or optimizer state.

    Args:
        key: MASTER or the optimizer's key.
        whole: (numel,) of the whole parameter.
    """
    if is_partitioned(parameter):
        copy_partition(optimizer, parameter, key, whole)
    elif not isinstance(optimizer, torch.optim.Optimizer):
        copy_fragment(optimizer, parameter, key, whole)
    elif key != MASTER:
        optimizer.state[parameter][key].copy_(whole.view_as(parameter))
    # Parameters that each rank holds whole: all without ZeRO-3, the small ones with it.
    if key == MASTER and parameter.numel() == whole.numel():
        parameter.data.copy_(whole.view_as(parameter))


def copy_partition(optimizer: "ZeROOptimizer", parameter: Tensor, key: str, whole: Tensor) -> None:
    """ZeRO-3: copy this rank's one of world-size equal parts, the last padded with zeros."""
    state_key = None if key == MASTER else key
    place, _ = optimizer._get_fp32_opt_state_partition(parameter, False, state_key)
    padded = whole.new_zeros(place.numel() * world_size())
    padded[: whole.numel()] = whole
    part = padded.narrow(0, place.numel() * rank(), place.numel())
    place.copy_(part)
    if key == MASTER:
        share: Tensor = vars(parameter)["ds_tensor"]
        share.copy_(part)


def copy_fragment(optimizer: "ZeROOptimizer", parameter: Tensor, key: str, whole: Tensor) -> None:
    """ZeRO-1 and 2, BF16_Optimizer: copy the part in this rank's flat vector, if there is one."""
    mapping: Any = vars(parameter)["_hp_mapping"]
    if mapping is None:
        return
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    vector = flat_groups(optimizer)[mapping.param_group_index]
    if key != MASTER:
        vector = optimizer.optimizer.state[vector][key]
    vector.narrow(0, here.start, here.numel).copy_(whole.narrow(0, there.start, there.numel))


def restore_counters(
    engine: "DeepSpeedEngine", inner: torch.optim.Optimizer, saved: TrainerState
) -> None:
    """Load learning rates, the loss scale, the schedule, and the engine's counts of steps."""
    for group, rate in zip(inner.param_groups, saved.rates):
        group["lr"] = rate
    if saved.scaler is not None and engine.fp16_enabled():
        engine.optimizer.loss_scaler = saved.scaler
    engine.lr_scheduler.load_state_dict(saved.counters["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.counters[name])
