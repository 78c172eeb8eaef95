"""Going on with another number of ranks: DeepSpeed's shards read as whole parameters, and put into the engine of this run.

DeepSpeed's own way, ds_to_universal, writes every parameter and moment into files of their own first; here each rank maps the shards
into memory and copies what is its own, one parameter at a time. A stage may turn into another on the way (ds_file.stage_for).
"""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.distributed import rank, world_size

MASTER = "fp32"  # beside the optimizer's own names of what it keeps per parameter


@contextmanager
def weights_only() -> Iterator[None]:
    """DeepSpeed unpickles its shards whole; in here nothing but tensors and its own few value classes loads."""
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
    """What the shards of a checkpoint hold, whoever wrote them.

    Attributes:
        pieces: parameter name -> MASTER or the optimizer's key -> flat tensors that follow one another; the last may be padded.
        step: the optimizer's own count (a tensor, or an int of DeepSpeed's CPU Adam), None where it counts none.
        rates: the learning rate of each parameter group.
        counters: the engine's counts and its schedule, as DeepSpeed saves them.
        scaler: fp16's loss scale, None in a run without ZeRO.
    """

    pieces: dict[str, dict[str, list[Tensor]]]
    step: Tensor | int | None
    rates: list[float]
    counters: dict
    scaler: object = None

    def whole(self, name: str, key: str, numel: int) -> Tensor:
        """(numel,) of one parameter; raises ValueError where the shards hold less."""
        pieces = self.pieces.get(name, {}).get(key, ())
        if sum(piece.numel() for piece in pieces) < numel:
            raise ValueError(f"the shards hold no {key} of all {numel} numbers of {name}")
        return torch.cat([piece.flatten() for piece in pieces])[:numel]


def read_shards(folder: Path) -> TrainerState:
    """The shards in trainer/state of a checkpoint; call it inside weights_only(). Raises ValueError where some are missing."""

    def load(path: Path) -> dict:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def by_rank(pattern: str) -> list[Path]:
        found = {
            int(number.group(1)) if (number := re.search(r"zero_pp_rank_(\d+)_", p.name)) else 0: p
            for p in folder.glob(pattern)
        }
        return [found[number] for number in sorted(found)]

    models = by_rank("*model_states.pt")
    if not models:
        raise ValueError(f"{folder}: no *model_states.pt")
    model = load(models[0])
    shards = [load(path)["optimizer_state_dict"] for path in by_rank("*optim_states.pt")]
    if shards and len(shards) != model["dp_world_size"]:
        raise ValueError(
            f"{folder}: {model['dp_world_size']} ranks wrote it, shards of {len(shards)} are there"
        )
    if not shards:
        optimizer, pieces = model["optimizer"], read_plain(model)
    elif "param_slice_mappings" in shards[0]:
        optimizer, pieces = shards[0]["base_optimizer_state"], read_flat(shards)
    else:
        optimizer, pieces = (
            shards[0]["optimizer_state_dict"],
            read_partitioned(shards, model["param_shapes"]),
        )
    step = next((state["step"] for state in optimizer["state"].values() if "step" in state), None)
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return TrainerState(
        pieces, step, rates, model, shards[0].get("loss_scaler") if shards else None
    )


def kept(state: dict) -> dict[str, Tensor]:
    """What an optimizer keeps per number of a parameter."""
    return {key: value for key, value in state.items() if key != "step" and torch.is_tensor(value)}


def read_plain(model: dict) -> dict:
    """A run without ZeRO: torch's optimizer numbers the trained parameters in their order (fp32, so they are their own masters)."""
    names = (
        [name for group in model["param_shapes"] for name in group]
        if model.get("param_shapes")
        else list(model["module"])
    )
    numbers = [number for group in model["optimizer"]["param_groups"] for number in group["params"]]
    if (
        len(model["optimizer"]["param_groups"]) > 1
    ):  # LoRA+: A's before B's (distributed.parameter_groups)
        names.sort(key=lambda name: ".lora_B." in name)
    if len(names) != len(numbers):
        raise ValueError(f"{len(numbers)} parameters in the optimizer, {len(names)} in the model")
    states = model["optimizer"]["state"]
    return {
        name: {
            key: [value]
            for key, value in ({MASTER: model["module"][name]} | kept(states.get(i, {}))).items()
        }
        for name, i in zip(names, numbers)
    }


def read_flat(shards: list[dict]) -> dict:
    """ZeRO-1 and 2, BF16_Optimizer: each group one vector, cut into the ranks' parts; a shard tells where its pieces lie."""
    pieces: dict = {}
    for shard in shards:
        for number, mapping in enumerate(shard["param_slice_mappings"]):
            flat = {MASTER: shard["single_partition_of_fp32_groups"][number]} | kept(
                shard["base_optimizer_state"]["state"].get(number, {})
            )
            for name, place in mapping.items():
                for key, vector in flat.items():
                    pieces.setdefault(name, {}).setdefault(key, []).append(
                        vector.narrow(0, place.start, place.numel)
                    )
    return pieces


def read_partitioned(shards: list[dict], shapes: list[dict]) -> dict:
    """ZeRO-3: every parameter cut into equal parts, one a rank, the last padded; parts of a rank lie end to end in sub-groups."""
    pieces: dict = {}
    for shard in shards:
        states = shard["optimizer_state_dict"]["state"]
        group, start = 0, 0
        for name, shape in (item for part in shapes for item in part.items()):
            size = -(-shape.numel() // len(shards))
            if start == shard["fp32_flat_groups"][group].numel():
                group, start = group + 1, 0
            for key, vector in (
                {MASTER: shard["fp32_flat_groups"][group]} | kept(states.get(group, {}))
            ).items():
                pieces.setdefault(name, {}).setdefault(key, []).append(
                    vector.narrow(0, start, size)
                )
            start += size
    return pieces


def restore(engine: "DeepSpeedEngine", saved: TrainerState) -> None:
    """Put a trainer state into an engine that has not stepped yet. No rank talks to another.

    Raises:
        ValueError: a trained parameter is not in it.
    """
    outer = engine.optimizer
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if lost := [name for name in trained if name not in saved.pieces]:
        raise ValueError(f"the shards hold nothing of {lost[0]}")
    keys = [key for key in next(iter(saved.pieces.values())) if key != MASTER]
    inner = outer if is_plain(outer) else outer.optimizer
    for vector in trained.values() if is_plain(outer) else flat_groups(outer):
        inner.state[vector] = empty_state(vector, saved.step, keys)
    with torch.no_grad():
        for name, parameter in trained.items():
            size = parameter.ds_numel if is_partitioned(parameter) else parameter.numel()
            for key in (MASTER, *keys):
                copy_part(outer, parameter, key, saved.whole(name, key, size))
    restore_counters(engine, inner, saved)


def is_plain(optimizer: object) -> bool:
    """torch's own optimizer, without DeepSpeed's around it."""
    return isinstance(optimizer, torch.optim.Optimizer)


def is_partitioned(parameter: Tensor) -> bool:
    """ZeRO-3 has cut the parameter."""
    return hasattr(parameter, "ds_id")


def flat_groups(optimizer: "ZeROOptimizer") -> list[Tensor]:
    """This rank's part of each parameter group in fp32, one vector a group: what DeepSpeed's
    optimizers give to torch's."""
    names = (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # BF16_Optimizer
    )
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def empty_state(vector: Tensor, step: Tensor | int | None, keys: list[str]) -> dict:
    """An optimizer's state of one tensor: zeros under each key, and the count of steps."""
    if torch.is_tensor(step):
        step = step.clone().to(vector.device)
    state = {} if step is None else {"step": step}
    return state | {key: torch.zeros_like(vector) for key in keys}


def copy_part(optimizer: "Optimizer", parameter: Tensor, key: str, whole: Tensor) -> None:
    """Copy what this rank holds of a parameter's master or of what the optimizer keeps of it.

    Args:
        whole: (numel,) of the whole parameter.
    """
    if is_partitioned(parameter):
        copy_partition(optimizer, parameter, key, whole)
    elif not is_plain(optimizer):
        copy_fragment(optimizer, parameter, key, whole)
    elif key != MASTER:
        optimizer.state[parameter][key].copy_(whole.view_as(parameter))
    # There whole: without ZeRO-3, and the small ones under it.
    if key == MASTER and parameter.numel() == whole.numel():
        parameter.data.copy_(whole.view_as(parameter))


def copy_partition(optimizer: "ZeROOptimizer", parameter: Tensor, key: str, whole: Tensor) -> None:
    """ZeRO-3: the rank's one of world-size equal parts, the last padded with zeros."""
    state_key = None if key == MASTER else key
    place, _ = optimizer._get_fp32_opt_state_partition(parameter, False, state_key)
    padded = whole.new_zeros(place.numel() * world_size())
    padded[: whole.numel()] = whole
    part = padded.narrow(0, place.numel() * rank(), place.numel())
    place.copy_(part)
    if key == MASTER:
        parameter.ds_tensor.copy_(part)


def copy_fragment(optimizer: "ZeROOptimizer", parameter: Tensor, key: str, whole: Tensor) -> None:
    """ZeRO-1 and 2, BF16_Optimizer: the part that lies in this rank's flat vector, if any does."""
    mapping = parameter._hp_mapping
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
    """Learning rates, the loss scale, the schedule, and the engine's counts of steps."""
    for group, rate in zip(inner.param_groups, saved.rates):
        group["lr"] = rate
    if saved.scaler is not None and engine.fp16_enabled():
        engine.optimizer.loss_scaler = saved.scaler
    engine.lr_scheduler.load_state_dict(saved.counters["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.counters[name])
