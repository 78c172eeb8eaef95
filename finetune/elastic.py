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
def weights_only():
    """DeepSpeed unpickles its shards whole; in here nothing but tensors and its own few value classes loads."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
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
        found = {int(number.group(1)) if (number := re.search(r"zero_pp_rank_(\d+)_", p.name)) else 0: p for p in folder.glob(pattern)}
        return [found[number] for number in sorted(found)]

    models = by_rank("*model_states.pt")
    if not models:
        raise ValueError(f"{folder}: no *model_states.pt")
    model = load(models[0])
    shards = [load(path)["optimizer_state_dict"] for path in by_rank("*optim_states.pt")]
    if shards and len(shards) != model["dp_world_size"]:
        raise ValueError(f"{folder}: {model['dp_world_size']} ranks wrote it, shards of {len(shards)} are there")
    if not shards:
        optimizer, pieces = model["optimizer"], read_plain(model)
    elif "param_slice_mappings" in shards[0]:
        optimizer, pieces = shards[0]["base_optimizer_state"], read_flat(shards)
    else:
        optimizer, pieces = shards[0]["optimizer_state_dict"], read_partitioned(shards, model["param_shapes"])
    step = next((state["step"] for state in optimizer["state"].values() if "step" in state), None)
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return TrainerState(pieces, step, rates, model, shards[0].get("loss_scaler") if shards else None)


def kept(state: dict) -> dict[str, Tensor]:
    """What an optimizer keeps per number of a parameter."""
    return {key: value for key, value in state.items() if key != "step" and torch.is_tensor(value)}


def read_plain(model: dict) -> dict:
    """A run without ZeRO: torch's optimizer numbers the trained parameters in their order (fp32, so they are their own masters)."""
    names = [name for group in model["param_shapes"] for name in group] if model.get("param_shapes") else list(model["module"])
    numbers = [number for group in model["optimizer"]["param_groups"] for number in group["params"]]
    if len(model["optimizer"]["param_groups"]) > 1:  # LoRA+: A's before B's (distributed.parameter_groups)
        names.sort(key=lambda name: ".lora_B." in name)
    if len(names) != len(numbers):
        raise ValueError(f"{len(numbers)} parameters in the optimizer, {len(names)} in the model")
    states = model["optimizer"]["state"]
    return {name: {key: [value] for key, value in ({MASTER: model["module"][name]} | kept(states.get(i, {}))).items()} for name, i in zip(names, numbers)}


def read_flat(shards: list[dict]) -> dict:
    """ZeRO-1 and 2, BF16_Optimizer: each group one vector, cut into the ranks' parts; a shard tells where its pieces lie."""
    pieces: dict = {}
    for shard in shards:
        for number, mapping in enumerate(shard["param_slice_mappings"]):
            flat = {MASTER: shard["single_partition_of_fp32_groups"][number]} | kept(shard["base_optimizer_state"]["state"].get(number, {}))
            for name, place in mapping.items():
                for key, vector in flat.items():
                    pieces.setdefault(name, {}).setdefault(key, []).append(vector.narrow(0, place.start, place.numel))
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
            for key, vector in ({MASTER: shard["fp32_flat_groups"][group]} | kept(states.get(group, {}))).items():
                pieces.setdefault(name, {}).setdefault(key, []).append(vector.narrow(0, start, size))
            start += size
    return pieces


def restore(engine, saved: TrainerState):
    """Put a trainer state into an engine that has not stepped yet. No rank talks to another.

    Raises:
        ValueError: a trained parameter is not in it.
    """
    outer, trained = engine.optimizer, {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if lost := [name for name in trained if name not in saved.pieces]:
        raise ValueError(f"the shards hold nothing of {lost[0]}")
    plain = isinstance(outer, torch.optim.Optimizer)
    inner = outer if plain else outer.optimizer
    keys = [key for key in next(iter(saved.pieces.values())) if key != MASTER]

    def empty_state(vector: Tensor) -> dict:
        step = saved.step.clone().to(vector.device) if torch.is_tensor(saved.step) else saved.step
        state = {} if step is None else {"step": step}
        return state | {key: torch.zeros_like(vector) for key in keys}

    if plain:
        for parameter in trained.values():
            inner.state[parameter] = empty_state(parameter)
    else:
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")  # ZeRO-3, 2, BF16_Optimizer
        flats = next(getattr(outer, name) for name in names if hasattr(outer, name))
        for vector in flats:
            inner.state[vector] = empty_state(vector)
    with torch.no_grad():
        for name, parameter in trained.items():
            partitioned = hasattr(parameter, "ds_id")
            size = parameter.ds_numel if partitioned else parameter.numel()
            for key in (MASTER, *keys):
                whole = saved.whole(name, key, size)
                if partitioned:
                    place, _ = outer._get_fp32_opt_state_partition(parameter, False, None if key == MASTER else key)
                    part = whole.new_zeros(place.numel() * world_size())
                    part[:size] = whole
                    part = part.narrow(0, place.numel() * rank(), place.numel())
                    place.copy_(part)
                    if key == MASTER:
                        parameter.ds_tensor.copy_(part)
                elif not plain and (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    vector = flats[mapping.param_group_index]
                    vector = vector if key == MASTER else inner.state[vector][key]
                    vector.narrow(0, here.start, here.numel).copy_(whole.narrow(0, there.start, there.numel))
                elif plain and key != MASTER:
                    inner.state[parameter][key].copy_(whole.view_as(parameter))
                if key == MASTER and parameter.numel() == size:  # there whole; under ZeRO-3 the small ones are
                    parameter.data.copy_(whole.view_as(parameter))
    for group, rate in zip(inner.param_groups, saved.rates):
        group["lr"] = rate
    if saved.scaler is not None and engine.fp16_enabled():
        outer.loss_scaler = saved.scaler
    engine.lr_scheduler.load_state_dict(saved.counters["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.counters[name])
