"""Ranks, ports and DeepSpeed's configuration: what `deepspeed.initialize` needs."""

import io
import itertools
import os
import socket
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist

from chatglm.hub import parse_hub_name, resolve_folder
from finetune.config import RowsConfig, RunConfig
from finetune.ds_file import fill_sizes, read_ds_file, stage_for
from finetune.stages import check_zero_stage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")
Config = TypeVar("Config", bound=RunConfig)
BARRIERS = itertools.count()  # numbers of the barriers, the same on every rank
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """The number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def data_world(config: RunConfig) -> int:
    """The number of copies of the model, which read different rows: a pipeline's ranks are one."""
    return world_size() // config.stages


def data_rank(config: RunConfig) -> int:
    """The number of this rank's copy; ranks of one stage are neighbours, as DeepSpeed has them."""
    return rank() % data_world(config)


def say(*words: object) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(*words, flush=True)


def local_rank() -> int:
    """The number of this rank on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def without_prints() -> redirect_stdout:
    """A context that hides what DeepSpeed's BF16_Optimizer prints, but not its log."""
    return redirect_stdout(io.StringIO())


def free_port() -> int:
    """A TCP port of this machine that no program uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def allowed_port(port: int) -> int:
    """`port`, or port + 20000 where a port below 1024 needs root rights (often --master_port 520).

    Every rank computes the same answer without communication.
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
            pass  # in use: by our own rank 0, or binding it later raises an error
    return port


def check_not_mpi() -> None:
    """Raises ValueError where MPI started several processes."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, 1)) > 1:
            raise ValueError(
                f"started by MPI ({name}), which gives no RANK: "
                f"use deepspeed's pdsh launcher or torchrun"
            )


def init_distributed() -> None:
    """Join the process group of deepspeed or torchrun; without a launcher, one of a single rank.

    The variables of ranks are set where they are missing: DeepSpeed reads some again later.

    Raises:
        ValueError: started by MPI, which sets no RANK.
    """
    env = os.environ
    if "RANK" not in env:
        check_not_mpi()
        env.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    if dist.is_initialized():
        return
    import deepspeed

    # DeepSpeed and transformers use deprecated names, with a warning at every step.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|transformers"
    )
    env["MASTER_PORT"] = str(allowed_port(int(env["MASTER_PORT"])))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(env.get("LOCAL_RANK", 0)))
    elif int(env["WORLD_SIZE"]) > 1 and "OMP_NUM_THREADS" not in env:
        # Ranks that each start a thread per core slow each other down several times.
        local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    # DeepSpeed's shared-memory all-reduce for CPUs compiles for over a minute at first use, or
    # fails; gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A collated batch with its tensors on `device`."""
    moved = dict(batch)
    for name, value in moved.items():
        if isinstance(value, torch.Tensor):
            moved[name] = value.to(device, non_blocking=True)
    return moved


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """A context in which ZeRO-3's weights of a model are whole on every rank, and its modules may
    be called in any order, by each rank on its own. A collective operation at both ends.
    """
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    # DeepSpeed's hooks gather a module's weights at each call, for which all ranks must wait.
    kept = []
    for module in model.modules():
        kept.append((module, module._forward_pre_hooks, module._forward_hooks))
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        with zero.GatheredParameters(partitioned):
            yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after


def whole_size(parameter: torch.nn.Parameter) -> int:
    """Number of elements of a parameter before ZeRO-3 partitions it."""
    size: int = getattr(parameter, "ds_numel", None) or parameter.numel()
    return size


def agree(decide: Callable[[], T]) -> T:
    """What `decide()` returns on rank 0, on every rank; an error there is raised on all.

    For what is read from a disk, which ranks may see in different states.
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


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a rank tells the others: a value or an error.

    Attributes:
        made: the value alone, or nothing.
    """

    made: tuple[T, ...] = ()
    error: Exception | None = None


def outcome_of(make: Callable[[], T]) -> Outcome[T]:
    try:
        return Outcome((make(),))
    except (ValueError, OSError, MemoryError, ImportError) as error:
        return Outcome(error=error)


def gather_outcomes(outcome: Outcome[T]) -> list[Outcome[T]]:
    """Those of all ranks; raises the first error there is. No time limit applies."""
    outcomes: list[Any] = [outcome]
    if world_size() > 1:
        wait_for_all()
        outcomes = [None] * world_size()
        dist.all_gather_object(outcomes, outcome)
    for other in outcomes:
        if other.error is not None:
            raise other.error
    return outcomes


def first_of_node(make: Callable[[], T]) -> T:
    """What `make()` returns on the first rank of a node, on all ranks of the node.

    It may take hours: no time limit applies. An error on one node is raised on all.
    """
    outcomes = gather_outcomes(outcome_of(make) if local_rank() == 0 else Outcome())
    for other in reversed(outcomes[: rank() + 1]):
        if other.made:
            return other.made[0]
    raise RuntimeError("no rank below this one is the first of a node")


def on_each_rank(make: Callable[[], T]) -> T:
    """What `make()` returns on this rank; an error on one is raised on all.

    It may take hours: no time limit applies.
    """
    outcome = outcome_of(make)
    gather_outcomes(Outcome[T](error=outcome.error))
    return outcome.made[0]


def with_local_model(config: Config) -> Config:
    """`config`, in which a hub's name of the base is its folder; one rank of a node downloads it.

    Raises: as chatglm.hub.resolve_folder.
    """
    name = config.model_name_or_path
    if not parse_hub_name(name):
        return config
    init_distributed()
    weights = getattr(config, "backbone", "chatglm") == "chatglm"
    folder = first_of_node(lambda: resolve_folder(name, weights=weights))
    return replace(config, model_name_or_path=str(folder))


def wait_for_all() -> None:
    """A barrier without a time limit, for work of hours on some ranks.

    Collective operations of torch.distributed time out after minutes.
    """
    if world_size() == 1:
        return
    store = dist.PrefixStore(
        f"barrier {next(BARRIERS)}", dist.distributed_c10d._get_default_store()
    )
    store.set(str(rank()), "")
    ranks = list(map(str, range(world_size())))
    pause = 0.002
    while not store.check(ranks):
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks, in fp64."""
    if world_size() == 1:  # saves waiting for the device
        return list(map(float, values))
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def resolve_precision(precision: str) -> str:
    """--precision, with "auto" replaced by bf16 or fp16 on a GPU, fp32 on a CPU."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def deepspeed_config(
    config: RunConfig,
    *,
    precision: str,
    adapters: bool,
    total_steps: int,
    hidden_size: int,
    world: int,
) -> dict[str, Any]:
    """The DeepSpeed file with batch, optimizer, schedule and precision filled from the flags.

    Args:
        precision: "fp32", "bf16" or "fp16", resolved.
        adapters: only fp32 adapters are trained over a frozen model, so bf16 is the dtype of the
            frozen weights and not DeepSpeed's.
        total_steps: optimizer steps of the whole run.
        hidden_size: the model's width.
        world: number of ranks.

    Raises:
        ValueError: the file is not JSON, has an "auto" that no flag fills, or its ZeRO-3 cannot
            be combined with the flags.
    """
    path, ds = read_ds_file(config.ds_file)
    fill_batch(ds, config, world)
    fill_scheduler(ds, config, total_steps, str(path))
    fill_precision(ds, precision, adapters, path.name)
    zero = ds.setdefault("zero_optimization", {"stage": 0})
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") in ("auto", "none"):
            del zero[part]
    zero = ds["zero_optimization"] = fill_sizes(zero, hidden_size)
    fill_optimizer(ds, config)
    if place := find_auto(ds):
        raise ValueError(
            f'--ds_file: {path}: {place} is "auto" and no flag fills it; write a value'
        )

    asked = zero.get("stage", 0)
    zero["stage"] = stage_for(ds, precision, adapters, world)
    if asked == 3:
        check_zero3(config, path.name)
        if str(config.gradient_checkpointing) == "selective":
            # ZeRO-3's linear adds the bias in place to a product that selective checkpointing has
            # saved: with it every gradient before that layer is wrong.
            zero["memory_efficient_linear"] = False
    if world == 1 and zero["stage"] == 1:
        ds["bf16"].setdefault("immediate_grad_update", True)
    if zero["stage"] != asked:
        reason = "one rank has nothing to share out" if asked else "bf16 gradients are summed there"
        say(f"ZeRO: stage {zero['stage']} ({path.name} asks for {asked}; {reason})")
    return ds


def fill_batch(ds: dict[str, Any], config: RunConfig, world: int) -> None:
    """Fill the batch sizes of a DeepSpeed configuration, and its gradient clipping."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    ds["train_micro_batch_size_per_gpu"] = micro
    ds["gradient_accumulation_steps"] = accumulation
    ds["train_batch_size"] = micro * accumulation * world
    ds["steps_per_print"] = 10**9  # never: the progress bar shows the steps
    if ds.get("gradient_clipping", "auto") == "auto":
        ds["gradient_clipping"] = 1.0


def fill_scheduler(ds: dict[str, Any], config: RunConfig, total_steps: int, path: str) -> None:
    """Fill the scheduler of a DeepSpeed configuration with warmup, learning rates and steps.

    Raises:
        ValueError: LoRA+ with a schedule that has one learning rate for all groups.
    """
    ds.setdefault("scheduler", {"type": "WarmupDecayLR", "params": {}})
    kind = ds["scheduler"]["type"]
    schedule = ds["scheduler"].setdefault("params", {})
    rates = [config.learning_rate * ratio for ratio in lr_ratios(config)]
    if kind not in ("WarmupDecayLR", "WarmupLR"):
        if len(rates) > 1:
            raise ValueError(
                f"--loraplus_lr_ratio needs the schedule WarmupDecayLR or WarmupLR; "
                f"{path} has {kind}"
            )
        return
    warmup = max(1, int(config.warmup_ratio * total_steps))
    schedule["warmup_num_steps"] = warmup
    schedule["warmup_max_lr"] = rates if len(rates) > 1 else rates[0]
    schedule["warmup_min_lr"] = [0.1 * rate for rate in rates] if len(rates) > 1 else 0.1 * rates[0]
    if kind == "WarmupDecayLR":
        schedule["total_num_steps"] = max(total_steps, warmup + 1)
        # ChatGLM-Finetuning's files say cosine; DeepSpeed has log and linear only.
        if schedule.get("warmup_type") == "cosine":
            schedule["warmup_type"] = "linear"
    schedule.pop("last_batch_iteration", None)


def fill_precision(ds: dict[str, Any], precision: str, adapters: bool, file_name: str) -> None:
    """Set fp16 and bf16 of a DeepSpeed configuration, and the dtype of accumulated gradients."""
    asked = None
    if is_on(ds, "bf16"):
        asked = "bf16"
    elif is_on(ds, "fp16"):
        asked = "fp16"
    if asked and asked != precision:
        say(f"precision: {precision} ({file_name} asks for {asked}; --precision decides)")
    for name in ("fp16", "bf16"):
        ds.setdefault(name, {})["enabled"] = precision == name and not (adapters and name == "bf16")
    if not ds["fp16"]["enabled"]:
        ds["fp16"] = {"enabled": False}
    if ds["bf16"]["enabled"]:
        # Sums over passes need more than the 8 bits of bf16.
        ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def fill_optimizer(ds: dict[str, Any], config: RunConfig) -> None:
    """Set learning rate, weight decay and "auto" values of the optimizer in a configuration."""
    optimizer = ds.get("optimizer", {"type": "AdamW"})
    params = optimizer.setdefault("params", {})
    params.update(lr=config.learning_rate, weight_decay=config.weight_decay)
    is_adam = optimizer["type"].lower() in ("adam", "adamw")
    for name, value in {"betas": [0.9, 0.95], "eps": 1e-8}.items():
        # Without the key only Adam gets it: SGD has no betas.
        if params.get(name, "auto" if is_adam else None) == "auto":
            params[name] = value
    ds["optimizer"] = optimizer


def check_zero3(config: RunConfig, file_name: str) -> None:
    """Raises ValueError for flags that need whole weights, which ZeRO-3 partitions."""
    if config.train_type == "lora" and config.use_dora:
        raise ValueError(
            f"--use_dora reads whole base weights, which ZeRO-3 takes apart ({file_name}): "
            f"use ZeRO-2, ds_zero2.json"
        )
    if isinstance(config, RowsConfig) and config.quantization_bit:
        raise ValueError(
            f"--quantization_bit: ZeRO-3 cannot take quantised weights apart ({file_name}): "
            f"use ZeRO-2, ds_zero2.json"
        )


def check_stages(config: RunConfig) -> None:
    """Raises ValueError where ranks, or the ZeRO of --ds_file, do not fit --num_stages."""
    if config.stages == 1:
        return
    if world_size() % config.stages:
        raise ValueError(
            f"--num_stages {config.stages}: wanted a multiple of {config.stages} ranks, as by "
            f"deepspeed --num_gpus {config.stages} train.py; this run has {world_size()}"
        )
    check_zero_stage(config.stages, config.ds_file)


def lr_ratios(config: RunConfig) -> list[float]:
    """The learning rate of each parameter group, divided by --learning_rate."""
    if config.train_type == "lora" and config.loraplus_lr_ratio != 1:
        return [1.0, config.loraplus_lr_ratio]
    return [1.0]


def parameter_groups(model: torch.nn.Module, config: RunConfig) -> list[Any]:
    """The trainable parameters as the optimizer takes them.

    A list of parameters; under LoRA+ (arXiv 2402.12354) two groups, the second with B and its own
    learning rate.
    """
    others: list[torch.nn.Parameter] = []
    b_matrices: list[torch.nn.Parameter] = []
    ratios = lr_ratios(config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_second = len(ratios) > 1 and ".lora_B." in name
            (b_matrices if is_second else others).append(parameter)
    if len(ratios) == 1:
        return others
    rates = [config.learning_rate * ratio for ratio in ratios]
    return [{"params": others, "lr": rates[0]}, {"params": b_matrices, "lr": rates[1]}]


def fit_to_one_rank(engine: "DeepSpeedEngine", parameters: list) -> None:
    """Turn off what an engine on one rank (stage_for) does for other ranks, and fix its norm.

    Args:
        parameters: the trained ones.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    bf16 = isinstance(engine.optimizer, BF16_Optimizer)
    plain = isinstance(engine.optimizer, torch.optim.Optimizer)
    if world_size() == 1 and (bf16 or plain):
        # Its all-reduce would copy all gradients and round their fp32 sums to bf16.
        engine.enable_backward_allreduce = False
    if bf16:
        whole = engine.optimizer.get_grads_for_norm

        def grads_for_norm(for_clipping: bool = False) -> Any:
            return whole(for_clipping=True) if for_clipping else (pieces(whole()[0]), {})

        engine.optimizer.get_grads_for_norm = grads_for_norm
    if plain:  # DeepSpeed clips without ZeRO too, but does not store the norm

        def clip() -> None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(pieces(gradients))
            torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
            engine._global_grad_norm = norm

        engine.clip_fp32_gradients = clip


def pieces(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors; on a CPU cut into pieces, so that their norm is accurate.

    There torch adds in fp32, with an error of 0.2 % at 3e7 numbers.
    """
    if torch.cuda.is_available():
        return list(tensors)
    cut: list[torch.Tensor] = []
    for tensor in tensors:
        cut += tensor.reshape(-1).split(2**18)
    return cut


def is_on(ds: dict[str, Any], name: str) -> bool:
    """Whether a section of a DeepSpeed configuration is enabled."""
    return ds.get(name, {}).get("enabled") is True


def find_auto(node: object, where: str = "") -> str | None:
    """The dotted path of the first "auto" in a configuration; None where there is none.

    Args:
        node: the configuration, or a part of it.
        where: the dotted path of that part.
    """
    if node == "auto":
        return where
    items: Iterable = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    for key, value in items:
        if place := find_auto(value, f"{where}.{key}".lstrip(".")):
            return place
    return None


def make_optimizer(parameters: list, ds: dict[str, Any]) -> torch.optim.Optimizer | None:
    """AdamW, removed from the configuration `ds`: torch's fused one, or DeepSpeed's under offload.

    None for any other optimizer, which stays in `ds` for DeepSpeed to build.
    """
    if ds["optimizer"]["type"].lower() not in ("adam", "adamw"):
        return None
    given = ds.pop("optimizer")["params"]
    names = ("lr", "betas", "eps", "weight_decay")
    params = dict(given)
    for name in given.keys() - set(names):
        del params[name]
    params["betas"] = tuple(params["betas"])
    zero = ds["zero_optimization"]
    ds["zero_allow_untested_optimizer"] = True
    if "offload_optimizer" in zero:
        # DeepSpeed's CPU Adam compiles for minutes at first use; without a GPU it has no use.
        if torch.cuda.is_available() and (optimizer := cpu_adam(parameters, params)):
            return optimizer
        ds["zero_force_ds_cpu_optimizer"] = False
    return torch.optim.AdamW(parameters, fused=True, **params)


def cpu_adam(parameters: list, params: dict[str, Any]) -> torch.optim.Optimizer | None:
    """DeepSpeed's CPU Adam, or None where its C++ part cannot be built."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **params)
    except Exception as error:  # compilers fail in many ways, and the run can do without
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        say(
            f"DeepSpeed's CPU Adam cannot be built ({reason}); using torch's AdamW, which is slower"
        )
        return None
