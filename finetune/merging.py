"""Merges a LoRA adapter into its base, tensor by tensor.

Memory holds the adapter and one shard of the result.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chatglm.adapters import (
    adapter_file,
    read_adapter,
    read_adapter_config,
    refuse_changed_base,
)
from chatglm.causal import empty_causal
from chatglm.configuration import ChatGLMConfig
from chatglm.folders import read_model_config
from chatglm.loading import model_class_of, set_prefix
from chatglm.saving import check_disk
from chatglm.shards import SHARD_BYTES, BaseWeights, plan_shards, save_shards, write_index
from chatglm.weights import (
    check_fit,
    refuse_missing,
    refuse_quantized,
    stored_prefix,
    stored_shapes,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of a layer's outputs in fp32, merged against adapted, over the largest of them


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        layers: number of layers that have an adapter.
        difference: the largest over the layers of the difference between merged and adapted
            outputs, relative to the largest output.
        dtype: of the merged weights.
    """

    layers: int
    difference: float
    dtype: torch.dtype


def empty_model(base: Path, mode: str, shapes: dict[str, list[int]]) -> "PreTrainedModel":
    """The model of a folder on the meta device, without memory for its weights.

    Args:
        shapes: `stored_shapes` of the folder.

    Raises:
        ValueError: the folder has no valid config.json, or holds a P-Tuning prefix alone.
    """
    if mode == "causal":
        return empty_causal(base)
    config = ChatGLMConfig.from_dict(read_model_config(base) | {"glm_family": mode})
    if stored := stored_prefix(base, shapes):
        if stored["only"]:
            raise ValueError(
                f"{base} holds a P-Tuning prefix alone; LoRA was trained over a whole model"
            )
        set_prefix(config, base, stored, None, False, None)
    with torch.device("meta"):
        return model_class_of(config)(config).eval()


def adapted_model(model: "PreTrainedModel", adapter: Path) -> "PeftModel":
    """`model` in a PeftModel whose adapter has weights, in fp32, and whose base has none yet.

    Raises:
        ValueError: the adapter's file and its configuration do not fit each other or the model.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    file = adapter_file(adapter)
    config = read_adapter_config(adapter)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter}: only LoRA adapters are merged, this is {config.peft_type}")
    refuse_changed_base(adapter, config.init_lora_weights)
    for name in ("layer_replication", "trainable_token_indices", "target_parameters"):
        if getattr(config, name, None):
            raise ValueError(
                f"{adapter / 'adapter_config.json'}: {name} is not supported by this merge"
            )
    state = {name: tensor.float() for name, tensor in read_adapter(adapter).items()}
    config.inference_mode = True
    try:
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                # peft moves an adapter to its base's device, which must not be "meta".
                inner: Any = module.get_base_layer()
                inner.weight = placeholder(inner.weight.shape)
        result: Any = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{adapter} does not fit its base: {reason}") from None
    check_loaded(adapted, file, result.unexpected_keys)
    return adapted.eval()


def check_loaded(adapted: "PeftModel", file: Path, unexpected: list[str]) -> None:
    """Raises ValueError where an adapter's file lacks tensors, or has some that no layer takes."""
    missing: list[str] = []
    for name, parameter in adapted.named_parameters():
        if parameter.is_meta and is_adapters(name):
            missing.append(name)
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} tensors that adapter_config.json names are not in it, "
            f"the first is {missing[0]}"
        )
    if unexpected:
        raise ValueError(
            f"{file}: {len(unexpected)} of its tensors belong to no part of the model, "
            f"the first is {unexpected[0]}"
        )


def placeholder(shape: torch.Size) -> nn.Parameter:
    """A frozen parameter of zeros on the CPU that takes the memory of a single number."""
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def is_adapters(name: str) -> bool:
    """Whether a tensor of a PeftModel belongs to its adapter."""
    return ".lora_" in name or ".modules_to_save." in name


class Merger:
    """The tensors of the merged model by their names in the base."""

    def __init__(
        self, base: BaseWeights, adapted: "PeftModel", device: torch.device, dtype: torch.dtype
    ):
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        self.base = base
        self.device = device
        self.dtype = dtype
        self.layers: dict[str, Any] = {}  # peft's LoraLayer, each a module too
        self.replaced: dict[str, Any] = {}  # trained whole
        base_model: Any = adapted.base_model
        for name, module in base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                self.layers[name] = module
            if isinstance(module, ModulesToSaveWrapper):
                self.replaced[name] = module
        self.difference = 0.0
        self.changed = 0  # number of tensors that differ from the base's
        self.base_parts: dict[str, list[str]] = {}  # layer -> its tensors that are the base's
        self.latest: tuple[str, dict[str, Tensor]] = ("", {})  # the layer merged last

    def __getitem__(self, name: str) -> Tensor:
        layer, part = name.rsplit(".", 1)
        if layer in self.layers:
            if self.latest[0] != layer:
                self.latest = (layer, self.merge_layer(layer))
            tensor = self.latest[1][part]
        else:
            tensor = self.base[name]
            for module, wrapper in self.replaced.items():
                if name.startswith(f"{module}."):
                    trained = wrapper.modules_to_save["default"].state_dict()
                    tensor = trained[name.removeprefix(f"{module}.")]
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
        parts = list(dict(inner.named_parameters(recurse=False)))
        # The adapter may include the bias. The first call decides which tensors are the base's: a
        # layer is merged twice where its weight and bias are in two files.
        if name not in self.base_parts:
            in_base = [part for part in parts if part == "weight" or getattr(inner, part).is_meta]
            self.base_parts[name] = in_base
        for part in self.base_parts[name]:
            tensor = self.base[f"{name}.{part}"].float()
            setattr(inner, part, nn.Parameter(tensor, requires_grad=False))
        layer.to(self.device)
        if isinstance(inner, nn.Embedding):
            probe = torch.arange(min(8, inner.num_embeddings), device=self.device)
        else:
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(8, inner.in_features, generator=generator).to(self.device)
        self.difference = max(self.difference, merge_and_compare(name, layer, probe))
        merged = {part: getattr(inner, part).detach() for part in parts}
        base = self.base[f"{name}.weight"].to(self.device)
        self.changed += bool((merged["weight"].to(self.dtype) != base.to(self.dtype)).any())
        layer.merged_adapters.clear()
        inner.weight = placeholder(inner.weight.shape)
        return merged


def merge_and_compare(name: str, layer: Any, probe: Tensor) -> float:
    """Merge a peft layer; returns the difference of its outputs, relative to the largest.

    Raises:
        ValueError: it is above TOLERANCE, or not a number.
    """
    before = layer(probe)
    layer.merge()
    after = layer(probe)
    difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-9))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{name}: merged outputs differ from adapted ones by {difference:.2e} "
            f"(allowed {TOLERANCE:.0e}); nothing was written"
        )
    return difference


def merge_weights(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    mode: str,
    dtype: torch.dtype | None,
    device: str,
) -> Merged:
    """Write the weights and config.json of base + adapter into the folder `output`.

    Args:
        mode: the base's family.
        dtype: of the result; None keeps the base's.
        device: where the products are computed.

    Raises:
        ValueError: they do not fit each other, a merged layer's outputs differ from the adapted
            one's, or nothing changes.
        OSError: the disk is full, or cannot be written.
    """
    weights = BaseWeights(base)
    dtype = dtype or weights.dtype()
    stored = stored_shapes(base)
    model = empty_model(base, mode, stored)
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        shapes[name] = tensor.shape
    # Old folders hold tables besides, which are not copied.
    names = list(filter(shapes.__contains__, weights.files))
    check_base(base, model, stored)
    sizes = {name: math.prod(shapes[name]) * dtype.itemsize for name in names}
    total = sum(sizes.values())
    check_disk(output, total + 10_000_000, "the merged model")
    merger = Merger(weights, adapted_model(model, adapter), torch.device(device), dtype)
    for name in tied_parts(model):
        if name in merger.layers or name in merger.replaced:
            raise ValueError(
                f"{adapter} changes {name}, which shares its weight with another part of {base}: "
                f"it cannot be merged"
            )
    files, _ = save_shards(merger, plan_shards(sizes, SHARD_BYTES), output)
    if not merger.changed:
        raise ValueError(
            f"{adapter} changes nothing: every merged weight is the base's ({base}); "
            f"nothing was written"
        )
    write_index(files, total, output)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(output))
    return Merged(len(merger.layers), merger.difference, dtype)


def check_base(base: Path, model: "PreTrainedModel", stored: dict[str, list[int]]) -> None:
    """Raises ValueError where the folder lacks a tensor of the model, or its shape differs.

    `stored` are the folder's shapes. A body under its own names loads, but is not merged.
    """
    refuse_quantized(base, stored)
    check_fit(base, model, stored)
    tied = model.all_tied_weights_keys
    missing = [name for name in model.state_dict() if name not in stored and name not in tied]
    refuse_missing(base, missing)


def tied_parts(model: "PreTrainedModel") -> Iterator[str]:
    """Names of modules that share their weight with another."""
    if model.config.tie_word_embeddings:
        for name, source in (model._tied_weights_keys or {}).items():
            yield from (name.removesuffix(".weight"), source.removesuffix(".weight"))
