"""LoRA adapters from folders, for serving: what is read of one, and which are refused.

A folder may come from anybody while answers run: its configuration is data of a few known keys, its
weights are safetensors, its patterns are names and never regular expressions.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from chatglm.adapters import (
    PEFT,
    SAVERS_KEYS,
    adapter_file,
    read_adapter,
    refuse_changed_base,
    refuse_layout,
)
from chatglm.checksums import CHECKSUMS, check_folder_files, is_top
from chatglm.files import read_json, shorten
from chatglm.weights import open_safetensors

CONFIG = "adapter_config.json"
LARGEST_FILE_BYTES = 2**32
LARGEST_JSON_BYTES = 2**20
LARGEST_RANK = 1024
MOST_ENTRIES = 2048  # of a list or pattern of modules
# Keys that are read here, or that change no number of an adapter that is only applied.
READ_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
KNOWN_KEYS = {
    *READ_KEYS,
    *SAVERS_KEYS,
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "init_lora_weights"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
MODULE_NAME = re.compile(r"\^?[A-Za-z0-9_.]{1,512}")


class LoraFactors(NamedTuple):
    """What LoRA adds to a linear layer's output: x A^T B^T (arXiv 2106.09685, eq. 3).

    Attributes:
        a: (r, in). b: (r, out), the transposed B, multiplied by the scale.
    """

    a: Tensor
    b: Tensor


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of a model's linear modules but its output layer, quantised ones too."""
    sizes = {}
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    for name, module in model.named_modules():
        if module is head:
            continue
        rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(rows, int) and isinstance(columns, int):
            sizes[name] = rows, columns
    return sizes


def read_lora(
    folder: Path, sizes: Mapping[str, tuple[int, int]], base: str, is_chatglm: bool
) -> dict[str, LoraFactors]:
    """{module of the base: its factors, fp32 on the CPU} of an adapter folder.

    Args:
        sizes: `linear_sizes` of the base. base: its name, for messages.
        is_chatglm: the base is of this project's classes.
    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it is no plain LoRA, is damaged, or does not fit the base; in one line.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no adapter: it has no {CONFIG}")
    file = adapter_file(folder)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not served: wanted adapter_model.safetensors")
    check_bytes(file, LARGEST_FILE_BYTES)
    for name in (CONFIG, CHECKSUMS):
        check_bytes(folder / name, LARGEST_JSON_BYTES)
    check_folder_files(folder, wanted=is_top)
    config = read_lora_config(folder)
    with open_safetensors(file) as tensors:
        count = len(tensors.keys())
    if count > 2 * len(sizes):
        room = f"{base} has {len(sizes)} linear layers"
        raise ValueError(f"{file} does not fit {base}: it holds {count:,} tensors, {room}")
    state = read_adapter(folder)
    if is_chatglm:
        refuse_layout(folder, state)
    pairs = paired_factors(file, state)
    factors = {}
    for name, (a, b) in pairs.items():
        fits = a.dim() == b.dim() == 2 and (b.shape[0], a.shape[1]) == sizes.get(name)
        if not fits:
            found = f"A of {list(a.shape)} and B of {list(b.shape)}"
            wanted = f"the layer has {sizes[name]}" if name in sizes else "it has no such layer"
            raise ValueError(f"{file} does not fit {base}: {found} for {name}, {wanted} (out, in)")
        factors[name] = scaled_factors(file, name, a, b, config)
    check_targets(file, config.targets, sizes, pairs)
    return factors


def scaled_factors(
    file: Path, module: str, a: Tensor, b: Tensor, config: "LoraSettings"
) -> LoraFactors:
    """The factors of a layer from its A (r, in) and B (out, r).

    Raises:
        ValueError: another rank than the configuration's, or not finite numbers.
    """
    rank = config.rank_of(module)
    if not a.shape[0] == b.shape[1] == rank:
        ranks = f"A of rank {a.shape[0]} and B of rank {b.shape[1]}"
        raise ValueError(f"{file}: {ranks} for {module}, {CONFIG} says {rank}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"{file}: the factors of {module} are {a.dtype} and {b.dtype}")
    scaled = b.float() * config.scale_of(module)
    factors = LoraFactors(a.float(), scaled.t().contiguous())
    check_finite(file, module, factors)
    return factors


def check_bytes(file: Path, most: int) -> None:
    """Raises ValueError where a file is larger than `most` bytes."""
    size = file.stat().st_size if file.is_file() else 0
    if size > most:
        raise ValueError(f"{file} has {size:,} bytes, wanted at most {most:,}")


class LoraSettings(NamedTuple):
    """The values of an adapter_config.json by which factors are read.

    Attributes:
        targets: names of the changed modules, or their ends; None where it does not list them all.
        ranks, alphas: {module or its end: value} beside `rank` and `alpha`, in order.
        by_root: the scale is alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), else alpha / r.
    """

    targets: tuple[str, ...] | None
    rank: int
    alpha: float
    ranks: dict[str, Any]
    alphas: dict[str, Any]
    by_root: bool

    def rank_of(self, module: str) -> int:
        return value_for(module, self.ranks, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = value_for(module, self.alphas, self.alpha)
        return alpha / math.sqrt(rank) if self.by_root else alpha / rank


def value_for(module: str, pattern: dict[str, Any], default: Any) -> Any:
    """The value of the first key of a pattern that names a module, or else the default."""
    for key, value in pattern.items():
        if names_module(key, module):
            return value
    return default


def names_module(key: str, module: str) -> bool:
    """Whether a key is the module's name or its last parts; with ^ before it, the whole name."""
    if key.startswith("^"):
        return module == key[1:]
    return module == key or module.endswith(f".{key}")


def read_lora_config(folder: Path) -> LoraSettings:
    """The settings of an adapter folder.

    Raises:
        ValueError: it is none of plain LoRA, or a value is not what it should be.
    """
    path = folder / CONFIG
    values = read_json(path)
    kind = values.get("peft_type") or values.get("swift_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type {shorten(kind)} is not served, wanted LORA")
    if (bias := values.pop("bias", None)) not in (None, "none"):
        raise ValueError(f"{path}: bias {shorten(bias)} is not served, wanted none")
    for key, value in values.items():
        if value and key not in KNOWN_KEYS:
            raise ValueError(f"{path}: {shorten(key)} is not served, wanted plain LoRA")
    refuse_changed_base(folder, values.get("init_lora_weights"))
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    check_rank(path, "r", rank)
    check_alpha(path, "lora_alpha", alpha)
    ranks = read_pattern(path, values, "rank_pattern")
    for key, value in ranks.items():
        check_rank(path, f"rank_pattern of {key}", value)
    alphas = read_pattern(path, values, "alpha_pattern")
    for key, value in alphas.items():
        check_alpha(path, f"alpha_pattern of {key}", value)
    by_root = values.get("use_rslora") or False
    if type(by_root) is not bool:
        raise ValueError(f"{path}: use_rslora must be true or false, got {shorten(by_root)}")
    return LoraSettings(listed_targets(path, values), rank, alpha, ranks, alphas, by_root)


def check_rank(path: Path, key: str, value: Any) -> None:
    if type(value) is not int or not 0 < value <= LARGEST_RANK:
        wanted = f"a whole number from 1 to {LARGEST_RANK}"
        raise ValueError(f"{path}: {key} must be {wanted}, got {shorten(value)}")


def check_alpha(path: Path, key: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise ValueError(f"{path}: {key} must be a number below 1e9, got {shorten(value)}")


def read_pattern(path: Path, values: dict[str, Any], key: str) -> dict[str, Any]:
    """{module name or its end: value} of a pattern; peft's would be regular expressions.

    Raises:
        ValueError: a key is more than a name: a regular expression may take forever.
    """
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict) or len(pattern) > MOST_ENTRIES:
        wanted = f"an object of at most {MOST_ENTRIES} modules"
        raise ValueError(f"{path}: {key} must be {wanted}, got {shorten(pattern)}")
    names = {}
    for given, value in pattern.items():
        name = given.replace("\\.", ".")
        if not MODULE_NAME.fullmatch(name):
            raise ValueError(f"{path}: {key} must name modules, got {shorten(given)}")
        names[name] = value
    return names


def listed_targets(path: Path, values: dict[str, Any]) -> tuple[str, ...] | None:
    """target_modules; None where other keys take some of the modules out, or it is a pattern."""
    targets = values.get("target_modules")
    if targets is None or isinstance(targets, str):
        return None
    is_list = isinstance(targets, list) and len(targets) <= MOST_ENTRIES
    if not is_list or not all(isinstance(target, str) for target in targets):
        wanted = f"a list of at most {MOST_ENTRIES} names"
        raise ValueError(f"{path}: target_modules must be {wanted}, got {shorten(targets)}")
    is_whole = values.get("exclude_modules") is None and values.get("layers_to_transform") is None
    return tuple(targets) if is_whole else None


def paired_factors(file: Path, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} of `read_adapter`.

    Raises:
        ValueError: it holds something else than pairs of both.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in state.items():
        matched = FACTOR.fullmatch(stored.removeprefix(PEFT))
        if matched is None:
            raise ValueError(
                f"{file}: {shorten(stored)} is not served, wanted A and B of linear layers"
            )
        found.setdefault(matched[1], {})[matched[2]] = tensor
    if not found:
        raise ValueError(f"{file} holds no LoRA weights")
    pairs = {}
    for name, parts in found.items():
        if len(parts) != 2:
            raise ValueError(f"{file} holds lora_{''.join(parts)} alone for {name}, wanted A and B")
        pairs[name] = parts["A"], parts["B"]
    return pairs


def check_targets(
    file: Path,
    targets: tuple[str, ...] | None,
    sizes: Mapping[str, tuple[int, int]],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Raises ValueError where a module that the configuration targets has no factors."""
    for name in targeted(targets or (), sizes):
        if name not in pairs:
            raise ValueError(f"{file} holds no factors of {name}, which {CONFIG} targets")


def targeted(targets: tuple[str, ...], sizes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """The modules that a list of names or their ends means."""
    for name in sizes:
        if any(name == target or name.endswith(f".{target}") for target in targets):
            yield name


def check_finite(place: Path, module: str, factors: LoraFactors) -> None:
    """Raises ValueError where factors hold nan or are infinite, as they may be in half precision.

    A token of another adapter adds 0 times each of B's numbers.
    """
    if not all(bool(factor.isfinite().all()) for factor in factors):
        dtype = str(factors.a.dtype).removeprefix("torch.")
        raise ValueError(f"{place}: the factors of {module} are not finite numbers in {dtype}")
