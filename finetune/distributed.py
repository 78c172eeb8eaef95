"""Ranks, ports and DeepSpeed's configuration: everything between the flags and `deepspeed.initialize`."""

import io
import itertools
import os
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TypeVar

import torch
import torch.distributed as dist

from finetune.config import TrainConfig
from finetune.ds_file import fill_sizes, read_ds_file, stage_for

T = TypeVar("T")
BARRIERS = itertools.count()  # their numbers, the same on every rank
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def say(*words) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(*words, flush=True)


def local_rank() -> int:
    """The number of this rank on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def without_prints() -> redirect_stdout:
    """Keep to itself what DeepSpeed's BF16_Optimizer prints; its log goes on."""
    return redirect_stdout(io.StringIO())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def allowed_port(port: int) -> int:
    """`port`, or port + 20000 where ports that low need rights we lack (the well-known --master_port 520).

    Every rank comes to the same answer by itself.
    """
    if port >= 1024:
        return port
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except PermissionError:
            say(f"port {port} needs root rights; using {port + 20000}")
            return port + 20000
        except OSError:
            pass  # in use: by our own rank 0, or its own error will say so
    return port


def init_distributed() -> None:
    """Join the process group that deepspeed or torchrun prepared; alone, make one of a single rank."""
    import deepspeed

    # DeepSpeed and transformers call what their own libraries are about to rename, once a step.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|transformers"
    )
    env = os.environ
    if "RANK" not in env:
        started_by_mpi = [
            name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if int(env.get(name, 1)) > 1
        ]
        if started_by_mpi:
            raise ValueError(
                f"started by MPI ({started_by_mpi[0]}), which gives no RANK: use deepspeed's pdsh launcher or torchrun"
            )
        env.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    env["MASTER_PORT"] = str(allowed_port(int(env["MASTER_PORT"])))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(env.get("LOCAL_RANK", 0)))
    elif int(env["WORLD_SIZE"]) > 1 and "OMP_NUM_THREADS" not in env:
        # Ranks that each start a thread per core slow one another several times.
        local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    # Its shared-memory all-reduce for CPUs is compiled for over a minute at first use, or fails; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False
    )


def device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def on_device(batch: dict, device: torch.device) -> dict:
    """A collated batch with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def agree(decide: Callable[[], T]) -> T:
    """What `decide()` returns on rank 0, on every rank: one view of a disk that ranks may see at different times.

    An error on rank 0 is raised on all.
    """
    answer: list = [None, None]
    if rank() == 0:
        try:
            answer[0] = decide()
        except (ValueError, OSError) as error:
            answer[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0, device=device())
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def first_of_node(make: Callable[[], T]) -> T:
    """What `make()` returns on the first rank of a node, on all ranks of it, however long it takes.

    An error on one node is raised on all.
    """
    answer: tuple = (False, None, None)
    if local_rank() == 0:
        try:
            answer = (True, make(), None)
        except (ValueError, OSError, MemoryError, ImportError) as error:
            answer = (True, None, error)
    of_rank = [answer]
    if world_size() > 1:
        wait_for_all()
        of_rank = [None] * world_size()
        dist.all_gather_object(of_rank, answer)
    if error := next((error for _, _, error in of_rank if error is not None), None):
        raise error
    return next(made for first, made, _ in reversed(of_rank[: rank() + 1]) if first)


def wait_for_all() -> None:
    """A barrier without a time limit, for work of hours on some ranks; collective operations give up after minutes."""
    if world_size() == 1:
        return
    store = dist.PrefixStore(
        f"barrier {next(BARRIERS)}", dist.distributed_c10d._get_default_store()
    )
    store.set(str(rank()), "")
    ranks, pause = list(map(str, range(world_size()))), 0.002
    while not store.check(ranks):
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks, in fp64."""
    if world_size() == 1:  # nothing to wait for a device for
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def resolve_precision(precision: str) -> str:
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def deepspeed_config(
    config: TrainConfig,
    *,
    precision: str,
    adapters: bool,
    total_steps: int,
    hidden_size: int,
    world: int,
) -> dict:
    """The DeepSpeed file with batch, optimizer, schedule and precision filled from the flags.

    Args:
        precision: "fp32", "bf16" or "fp16", resolved.
        adapters: only fp32 adapters are trained over a frozen model, so bf16 is the frozen weights' dtype, not DeepSpeed's.
        world: number of ranks.
    Raises:
        ValueError: the file is not JSON, keeps an "auto" that nobody fills, or asks ZeRO-3 for what it cannot do.
    """
    path, ds = read_ds_file(config.ds_file)
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    ds["train_micro_batch_size_per_gpu"] = micro
    ds["gradient_accumulation_steps"] = accumulation
    ds["train_batch_size"] = micro * accumulation * world
    ds["steps_per_print"] = 10**9  # the progress bar speaks
    if ds.get("gradient_clipping", "auto") == "auto":
        ds["gradient_clipping"] = 1.0

    warmup = max(1, int(config.warmup_ratio * total_steps))
    ds.setdefault("scheduler", {"type": "WarmupDecayLR", "params": {}})
    schedule = ds["scheduler"].setdefault("params", {})
    rates = [config.learning_rate * ratio for ratio in lr_ratios(config)]
    highest, lowest = (
        (rates, [0.1 * rate for rate in rates]) if len(rates) > 1 else (rates[0], 0.1 * rates[0])
    )
    fill = {"warmup_num_steps": warmup, "warmup_max_lr": highest, "warmup_min_lr": lowest}
    if ds["scheduler"]["type"] == "WarmupDecayLR":
        fill["total_num_steps"] = max(total_steps, warmup + 1)
        if (
            schedule.get("warmup_type") == "cosine"
        ):  # in the seeds' files; DeepSpeed knows log and linear only
            schedule["warmup_type"] = "linear"
    if ds["scheduler"]["type"] in ("WarmupDecayLR", "WarmupLR"):
        schedule.update(fill)
        schedule.pop("last_batch_iteration", None)
    elif len(rates) > 1:
        raise ValueError(
            f"--loraplus_lr_ratio needs the schedule WarmupDecayLR or WarmupLR; {path} has {ds['scheduler']['type']}"
        )

    asked = "bf16" if is_on(ds, "bf16") else "fp16" if is_on(ds, "fp16") else None
    if asked and asked != precision:
        say(f"precision: {precision} ({path.name} asks for {asked}; --precision decides)")
    for name in ("fp16", "bf16"):
        ds.setdefault(name, {})["enabled"] = precision == name and not (adapters and name == "bf16")
    if not ds["fp16"]["enabled"]:
        ds["fp16"] = {"enabled": False}
    if ds["bf16"]["enabled"]:
        ds.setdefault("data_types", {}).setdefault(
            "grad_accum_dtype", "fp32"
        )  # sums over passes keep more than bf16's 8 bits

    zero = ds.setdefault("zero_optimization", {"stage": 0})
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") in ("auto", "none"):
            del zero[part]
    zero = ds["zero_optimization"] = fill_sizes(zero, hidden_size)

    optimizer = ds.get("optimizer", {"type": "AdamW"})
    params = optimizer.setdefault("params", {})
    params.update(lr=config.learning_rate, weight_decay=config.weight_decay)
    absent = (
        "auto" if optimizer["type"].lower() in ("adam", "adamw") else None
    )  # SGD would not know betas
    params.update(
        {
            k: v
            for k, v in {"betas": [0.9, 0.95], "eps": 1e-8}.items()
            if params.get(k, absent) == "auto"
        }
    )
    ds["optimizer"] = optimizer
    if left := find_auto(ds):
        raise ValueError(f'--ds_file: {path}: {left} is "auto" and no flag fills it; write a value')
    stage, zero["stage"] = zero.get("stage", 0), stage_for(ds, precision, adapters, world)
    if stage == 3 and config.train_type == "lora" and config.use_dora:
        raise ValueError(
            f"--use_dora reads whole base weights, which ZeRO-3 takes apart ({path.name}): use ZeRO-2, ds_zero2.json"
        )
    if stage == 3 and config.quantization_bit:
        raise ValueError(
            f"--quantization_bit: ZeRO-3 cannot take quantised weights apart ({path.name}): use ZeRO-2, ds_zero2.json"
        )
    if world == 1 and zero["stage"] == 1:
        ds["bf16"].setdefault("immediate_grad_update", True)
    if zero["stage"] != stage:
        say(
            f"ZeRO: stage {zero['stage']} ({path.name} asks for {stage}; one rank has nothing to share out)"
        )
    return ds


def lr_ratios(config: TrainConfig) -> list[float]:
    """The learning rates of the parameter groups over --learning_rate."""
    return (
        [1.0, config.loraplus_lr_ratio]
        if config.train_type == "lora" and config.loraplus_lr_ratio != 1
        else [1.0]
    )


def parameter_groups(model: torch.nn.Module, config: TrainConfig) -> list:
    """What the optimizer gets: the trainable parameters; under LoRA+ (arXiv 2402.12354) two groups, B with a rate of its own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ratios = lr_ratios(config)
    if len(ratios) == 1:
        return list(trained.values())
    groups = [
        [p for name, p in trained.items() if (".lora_B." in name) == second]
        for second in (False, True)
    ]
    return [
        {"params": group, "lr": config.learning_rate * ratio}
        for group, ratio in zip(groups, ratios)
    ]


def fit_to_one_rank(engine: "DeepSpeedEngine", parameters: list) -> None:
    """Take out of an engine that shares nothing out (stage_for) what it still does for other ranks, and put right its norm."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    bf16, plain = (
        isinstance(engine.optimizer, BF16_Optimizer),
        isinstance(engine.optimizer, torch.optim.Optimizer),
    )
    if world_size() == 1 and (bf16 or plain):
        # It would copy all gradients to sum them over one rank, and round their fp32 sums to bf16 on the way.
        engine.enable_backward_allreduce = False
    if bf16:
        whole = engine.optimizer.get_grads_for_norm
        engine.optimizer.get_grads_for_norm = lambda for_clipping=False: (
            whole(for_clipping=True) if for_clipping else (pieces(whole()[0]), {})
        )
    if plain:  # DeepSpeed clips without ZeRO too, but forgets the norm

        def clip():
            norm = torch.nn.utils.get_total_norm(
                pieces(p.grad for p in parameters if p.grad is not None)
            )
            torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
            engine._global_grad_norm = norm

        engine.clip_fp32_gradients = clip


def pieces(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, cut small where a CPU is to sum them up: torch adds in fp32 there, and is off by 0.2 % at 3e7 numbers."""
    if torch.cuda.is_available():
        return list(tensors)
    return [piece for tensor in tensors for piece in tensor.reshape(-1).split(2**18)]


def is_on(ds: dict, name: str) -> bool:
    return ds.get(name, {}).get("enabled") is True


def find_auto(node: object, where: str = "") -> str | None:
    """The dotted place of the first "auto" left in a configuration."""
    if node == "auto":
        return where
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return next(
        (
            found
            for key, value in items
            if (found := find_auto(value, f"{where}.{key}".lstrip(".")))
        ),
        None,
    )


def make_optimizer(parameters: list, ds: dict) -> torch.optim.Optimizer | None:
    """Take AdamW out of the DeepSpeed file and build it here: torch's fused one, or DeepSpeed's CPU Adam under offload.

    Any other optimizer stays in the file, for DeepSpeed to build; then None is returned.
    """
    if ds["optimizer"]["type"].lower() not in ("adam", "adamw"):
        return None
    params = {
        k: v
        for k, v in ds.pop("optimizer")["params"].items()
        if k in ("lr", "betas", "eps", "weight_decay")
    }
    params["betas"] = tuple(params["betas"])
    zero = ds["zero_optimization"]
    ds["zero_allow_untested_optimizer"] = True
    if "offload_optimizer" in zero:
        # DeepSpeed's CPU Adam is compiled for minutes at first use; without a GPU it has nothing to offload from.
        if torch.cuda.is_available() and (optimizer := cpu_adam(parameters, params)):
            return optimizer
        ds["zero_force_ds_cpu_optimizer"] = False
    return torch.optim.AdamW(parameters, fused=True, **params)


def cpu_adam(parameters: list, params: dict) -> torch.optim.Optimizer | None:
    """DeepSpeed's CPU Adam, or None where its C++ part cannot be built."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **params)
    except (
        Exception
    ) as error:  # whatever a compiler may do, it must not stop a run that can do without
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        say(
            f"DeepSpeed's CPU Adam cannot be built ({reason}); using torch's AdamW, which is slower"
        )
        return None
