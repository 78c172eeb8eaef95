"""Base and LoRA adapter to one model, tensor by tensor: memory holds the adapter and one shard of the result."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from chatglm.configuration import ChatGLM1Config, ChatGLMConfig
from chatglm.folders import read_model_config
from chatglm.loading import (
    open_safetensors,
    read_bin,
    read_tensors,
    set_prefix,
    stored_prefix,
    weight_files,
)
from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
from chatglm.modeling_glm2 import ChatGLM2ForConditionalGeneration
from finetune.checkpoint import check_disk, one_kind_of_error

SHARD_BYTES = 2_000_000_000
TOLERANCE = 1e-4  # of a layer's outputs in fp32, merged against adapted, over the largest of them
PREFIXES = (
    "base_model.model.",
    "base_model.",
    "pretrained_model.",
)  # of peft, of TRL; savers leave them out or add them


@dataclass(frozen=True)
class Merged:
    """What a merge found. `difference`: largest of a layer's outputs, merged against adapted, relative to the largest output."""

    layers: int
    difference: float
    dtype: torch.dtype


class BaseWeights:
    """The tensors of a model folder by name, read when asked for."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.bins = folder, {}, {}
        for file in weight_files(folder):
            self.files |= dict.fromkeys(self.names_in(file), file)

    def names_in(self, file: Path) -> list[str]:
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                return list(tensors.keys())
        self.bins[file] = read_bin(file)
        return list(self.bins[file])

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        if file in self.bins:
            return self.bins[file][name]
        with open_safetensors(file) as tensors:
            return tensors.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """Read without the tensor where the format allows."""
        file = self.files[name]
        if file in self.bins:
            return list(self.bins[file][name].shape)
        with open_safetensors(file) as tensors:
            return tensors.get_slice(name).get_shape()

    def dtype(self) -> torch.dtype:
        """Of the first tensor that is a number with a fraction."""
        return next(dtype for name in self.files if (dtype := self[name].dtype).is_floating_point)


def empty_model(base: Path, mode: str) -> nn.Module:
    """The model of a folder without memory for its weights."""
    read_model_config(base)  # the library takes defaults where there is none
    config = ChatGLMConfig.from_pretrained(str(base))
    if stored := stored_prefix(base):
        if stored["only"]:
            raise ValueError(
                f"{base} holds a P-Tuning prefix alone; LoRA was trained over a whole model"
            )
        set_prefix(config, base, stored, None, False, None)
    config.glm_family = mode
    model_class = (
        ChatGLM1ForConditionalGeneration
        if isinstance(config, ChatGLM1Config)
        else ChatGLM2ForConditionalGeneration
    )
    with torch.device("meta"):
        return model_class(config).eval()


def adapted_model(model: nn.Module, adapter: Path, file: Path) -> "PeftModel":
    """`model` in a PeftModel whose adapter has its weights, in fp32, and whose base still has none.

    Raises:
        ValueError: the adapter's file and its configuration do not fit each other or the model.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter}: only LoRA adapters are merged, this is {config.peft_type}")
    for name in ("layer_replication", "trainable_token_indices", "target_parameters"):
        if getattr(config, name, None):
            raise ValueError(
                f"{adapter / 'adapter_config.json'}: {name} is not supported by this merge"
            )
    state = {peft_name(name): tensor.float() for name, tensor in read_tensors(file)}
    config.inference_mode = True
    try:
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
        for module in adapted.modules():
            if isinstance(
                module, LoraLayer
            ):  # peft moves an adapter to where its base lies: that must not be "meta"
                inner = module.get_base_layer()
                inner.weight = nn.Parameter(
                    torch.zeros(()).expand(inner.weight.shape), requires_grad=False
                )
        found = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{adapter} does not fit its base: {' '.join(str(error).split())[:300]}"
        ) from None
    empty = [name for name, p in adapted.named_parameters() if p.is_meta and is_adapters(name)]
    if empty or found.unexpected_keys:
        what = (
            f"{len(empty)} tensors that adapter_config.json names are not in it, the first is {empty[0]}"
            if empty
            else (
                f"{len(found.unexpected_keys)} of its tensors belong to no part of the model, the first is {found.unexpected_keys[0]}"
            )
        )
        raise ValueError(f"{file}: {what}")
    return adapted.eval()


def peft_name(name: str) -> str:
    """A tensor's name as peft reads it."""
    return f"base_model.model.{base_name(name)}"


def base_name(name: str) -> str:
    """The same as the base would name it."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def is_adapters(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


class Merger:
    """Tensors of the merged model by their names in the base."""

    def __init__(
        self, base: BaseWeights, adapted: "PeftModel", device: torch.device, dtype: torch.dtype
    ):
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        self.base, self.device, self.dtype = base, device, dtype
        named = dict(adapted.base_model.model.named_modules())
        self.layers = {
            name: module for name, module in named.items() if isinstance(module, LoraLayer)
        }
        self.replaced = {
            name: module
            for name, module in named.items()
            if isinstance(module, ModulesToSaveWrapper)
        }
        self.difference, self.changed = 0.0, 0
        self.wanted: dict[str, list[str]] = {}  # layer -> its tensors that are the base's
        self.latest: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        where, part = name.rsplit(".", 1)
        if where in self.layers:
            if self.latest[0] != where:
                self.latest = where, self.merge_layer(where)
            tensor = self.latest[1][part]
        else:
            tensor = self.base[name]
            for module, wrapper in self.replaced.items():
                if name.startswith(f"{module}."):
                    tensor = wrapper.modules_to_save["default"].state_dict()[
                        name.removeprefix(f"{module}.")
                    ]
                    self.changed += 1
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensor.contiguous().cpu()

    @torch.inference_mode()
    def merge_layer(self, name: str) -> dict[str, Tensor]:
        """{"weight": ..., "bias": ...} of a layer, computed in fp32.

        Raises:
            ValueError: the merged layer's outputs differ from the adapted one's, or are not finite.
        """
        layer = self.layers[name]
        inner = layer.get_base_layer()
        parts = [part for part, _ in inner.named_parameters(recurse=False)]
        # A bias may have come with the adapter; a layer is merged twice where its weight and bias lie in two files.
        wanted = self.wanted.setdefault(
            name, [part for part in parts if part == "weight" or getattr(inner, part).is_meta]
        )
        for part in wanted:
            setattr(
                inner, part, nn.Parameter(self.base[f"{name}.{part}"].float(), requires_grad=False)
            )
        layer.to(self.device)
        if isinstance(inner, nn.Embedding):
            probe = torch.arange(min(8, inner.num_embeddings), device=self.device)
        else:
            probe = torch.randn(
                8, inner.in_features, generator=torch.Generator().manual_seed(0)
            ).to(self.device)
        before = layer(probe)
        layer.merge()
        after = layer(probe)
        difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-9))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name}: merged outputs differ from adapted ones by {difference:.2e} (allowed {TOLERANCE:.0e}); nothing was written"
            )
        self.difference = max(self.difference, difference)
        merged = {part: getattr(inner, part).detach() for part in parts}
        base = self.base[f"{name}.weight"].to(self.device)
        self.changed += bool((merged["weight"].to(self.dtype) != base.to(self.dtype)).any())
        layer.merged_adapters.clear()
        inner.weight = nn.Parameter(torch.zeros(()).expand(inner.weight.shape), requires_grad=False)
        return merged


def plan_shards(
    shapes: dict[str, torch.Size], names: list[str], dtype: torch.dtype
) -> list[list[str]]:
    """The names in order, as files of at most SHARD_BYTES."""
    shards, size = [[]], 0
    for name in names:
        more = math.prod(shapes[name]) * dtype.itemsize
        if shards[-1] and size + more > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def merge_weights(
    base: Path,
    adapter: Path,
    file: Path,
    output: Path,
    *,
    mode: str,
    dtype: torch.dtype | None,
    device: str,
) -> Merged:
    """Write the weights and config.json of base + adapter into the folder `output`.

    Args:
        file: the adapter's weights. dtype: of the result; None keeps the base's. device: where the products are computed.
    Raises:
        ValueError: they do not fit each other, a merged layer answers otherwise than the adapted one, or nothing changes.
        OSError: the disk is full, or cannot be written.
    """
    from safetensors.torch import save_file

    weights = BaseWeights(base)
    dtype = dtype or weights.dtype()
    model = empty_model(base, mode)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = [
        name for name in weights.files if name in shapes
    ]  # without tables that old folders hold
    check_names(base, model, shapes, weights)
    total = sum(math.prod(shapes[name]) for name in names) * dtype.itemsize
    check_disk(output, total + 10_000_000, "the merged model")
    merger = Merger(weights, adapted_model(model, adapter, file), torch.device(device), dtype)
    for name in tied_parts(model):
        if name in merger.layers or name in merger.replaced:
            raise ValueError(
                f"{adapter} changes {name}, which shares its weight with another part of {base}: it cannot be merged"
            )
    shards = plan_shards(shapes, names, dtype)
    places = {}
    for number, shard in enumerate(shards, 1):
        target = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        with one_kind_of_error(output):
            save_file({name: merger[name] for name in shard}, output / target, {"format": "pt"})
        places |= dict.fromkeys(shard, target)
    if not merger.changed:
        raise ValueError(
            f"{adapter} changes nothing: every merged weight is the base's ({base}); nothing was written"
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (output / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    model.config.save_pretrained(str(output))
    return Merged(len(merger.layers), merger.difference, dtype)


def check_names(
    base: Path, model: nn.Module, shapes: dict[str, torch.Size], weights: BaseWeights
) -> None:
    """Raises ValueError where the folder lacks tensors of the model, or has one of another shape."""
    tied = (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
    if lost := [name for name in shapes if name not in weights.files and name not in tied]:
        raise ValueError(f"{base}: the weights lack {len(lost)} tensors, the first is {lost[0]}")
    for name, shape in shapes.items():
        if name in weights.files and (found := weights.shape(name)) != list(shape):
            raise ValueError(f"{base}: {name} is {found}, wanted {list(shape)}")


def tied_parts(model: nn.Module) -> Iterator[str]:
    """Names of modules that share their weight with another."""
    if model.config.tie_word_embeddings:
        for name, source in (model._tied_weights_keys or {}).items():
            yield from (name.removesuffix(".weight"), source.removesuffix(".weight"))
