"""DeepSpeed files: reads and checks them, and adapts their ZeRO section. Free of torch."""

from pathlib import Path
from typing import Any

from chatglm.files import read_json, shorten

ROOT = Path(__file__).resolve().parent.parent
NUMBER = (int, float)
EXAMPLES = {"optimizer": "AdamW", "scheduler": "WarmupDecayLR"}
# The keys that must hold an object, since train.py or DeepSpeed reads keys in them.
OBJECTS = (
    "fp16",
    "bf16",
    "data_types",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "activation_checkpointing",
    "aio",
    "amp",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "elasticity",
    "autotuning",
    "data_efficiency",
    "compression_training",
    "checkpoint",
    "curriculum_learning",
)
# What a key must hold: dotted path -> (type, in words).
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **{path: (dict, "an object") for path in OBJECTS},
    "optimizer.type": (str, "text"),
    "optimizer.params.betas": (list, "a list of two numbers"),
    "optimizer.params.eps": (NUMBER, "a number"),
    "scheduler.type": (str, "text"),
    "zero_optimization.stage": (int, "a whole number from 0 to 3"),
    "zero_optimization.offload_optimizer.device": (str, "text"),
    "zero_optimization.offload_param.device": (str, "text"),
    "gradient_clipping": (NUMBER, "a number"),
}


def read_ds_file(name: str) -> tuple[Path, dict[str, Any]]:
    """(path, content without nulls) of a DeepSpeed file; a bare name may be one of ds_configs/.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object, or one of its sections is not.
    """
    folder = ROOT / "ds_configs"
    path = Path(name) if Path(name).is_file() else folder / name
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in folder.glob("*.json")))
        raise FileNotFoundError(f"--ds_file: no such file: {name}; ds_configs/ has {shipped}")
    try:
        ds = without_nulls(read_json(path))
        check_kinds(ds)
    except ValueError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(f"--ds_file: {where}{error}") from None
    return path, ds


def without_nulls(value: Any) -> Any:
    """JSON without the keys whose value is null: they count as absent."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


def check_kinds(ds: dict[str, Any]) -> None:
    """Raises ValueError naming the first key whose value is not of the type that KINDS says."""
    for path, (kind, wanted) in KINDS.items():
        value: Any = ds
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None or (value == "auto" and kind is not dict):
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not dict):
            raise ValueError(f"{path} must be {wanted}, got {shorten(value)}")
    betas = ds.get("optimizer", {}).get("params", {}).get("betas", "auto")
    if betas != "auto" and not is_pair(betas):
        raise ValueError(
            f"optimizer.params.betas must be a list of two numbers, got {shorten(betas)}"
        )
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if stage != "auto" and not 0 <= stage <= 3:
        raise ValueError(
            f"zero_optimization.stage must be a whole number from 0 to 3, got {shorten(stage)}"
        )
    for section in ("optimizer", "scheduler"):
        if "type" not in ds.get(section, {"type": ""}):
            raise ValueError(f'{section} needs a "type", such as {EXAMPLES[section]}')


def is_pair(values: list[object]) -> bool:
    """Whether they are two numbers."""
    return len(values) == 2 and type(values[0]) in NUMBER and type(values[1]) in NUMBER


def fill_sizes(zero: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """zero_optimization with its "auto" sizes as transformers chooses them for a model's width.

    ZeRO-1 and 2 get buckets of at least 2**24 elements, 64 MiB in fp32: small models would wait
    for many small messages.
    """
    square = hidden_size**2
    by_width = {
        "reduce_bucket_size": square if zero.get("stage") == 3 else max(square, 2**24),
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled = dict(zero)
    for key, value in by_width.items():
        if zero.get(key) == "auto":
            filled[key] = value
    return filled


# Keys of zero_optimization about partitioning and communication: no effect on a single rank.
BETWEEN_RANKS = {
    "stage",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "contiguous_gradients",
    "round_robin_gradients",
}


def stage_for(ds: dict[str, Any], precision: str, adapters: bool, world: int) -> int:
    """The ZeRO stage to use: the file's, or on one rank the cheapest that computes the same.

    On one rank ZeRO-2 still copies every gradient into a bucket, sums it into a new buffer and
    takes its norm in fp64, which adds two thirds to a step's time. In bf16, stage 1 uses
    DeepSpeed's BF16_Optimizer, which adds each gradient to its fp32 sum during backward; fp32 needs
    no ZeRO.
    The file's stage stays with several ranks, with adapters, and where the file sets more of ZeRO
    than BETWEEN_RANKS; but DeepSpeed sums bf16 gradients in fp32 from stage 1 on alone.
    """
    zero = ds["zero_optimization"]
    stage = zero.get("stage", 0)
    sums_in_fp32 = ds.get("data_types", {}).get("grad_accum_dtype", "fp32") == "fp32"
    if precision == "bf16" and not adapters and stage == 0 and sums_in_fp32:
        return 1
    if world > 1 or adapters or stage > 2 or not zero.keys() <= BETWEEN_RANKS:
        return stage
    if precision == "fp32" and ds.get("gradient_clipping", 1.0) != 0:
        return 0
    if precision == "bf16" and sums_in_fp32:
        return 1
    return stage
