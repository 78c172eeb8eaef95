"""Weights of one layout as those of the other, read tensor by tensor and written shard by shard."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration import ChatGLM2Config
from ..lora_layouts import Update
from ..quantization import SCALE, dequantize_rows
from ..saving import check_disk
from ..shards import (
    SHARD_BYTES,
    BaseWeights,
    NamedTensors,
    plan_shards,
    save_shards,
    write_index,
)
from ..weights import BODY
from .layout import FUSED, chatglm_module, fused_sizes, glm_modules

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # a table that the releases' files hold
EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as `dtype`; as it is where that is None or it holds whole numbers."""
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def folded(weight: Tensor, update: Update) -> Tensor:
    """weight (out, in) + scaling * B A in fp32, in the order that peft computes it."""
    return weight.float() + (update.b.float() @ update.a.float()) * update.scaling


class ChatGLMTensors:
    """The tensors of a ChatGLM2 to GLM-4 folder by ChatGLM2ForConditionalGeneration's names.

    Weights of int4 and int8 releases are dequantised.

    Attributes:
        updates: {module: its LoRA}, added to its weight.
        dtype: of the tensors; None keeps each one's own (dequantised: its scale's).
    """

    def __init__(
        self,
        weights: BaseWeights,
        bits: int | None,
        updates: dict[str, Update],
        dtype: torch.dtype | None,
    ):
        self.weights = weights
        self.bits = bits
        self.updates = updates
        self.dtype = dtype
        # A body may be saved alone, without BODY before its names.
        self.stored: dict[str, str] = {}
        for name in weights.files:
            self.stored[BODY + name.removeprefix(BODY)] = name

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[self.stored[name]]
        own = tensor.dtype
        module, part = name.rsplit(".", 1)
        scale_name = f"{module}.{SCALE}"
        if part == "weight" and scale_name in self.stored:
            assert self.bits is not None  # the folder was checked against its configuration
            scale = self.weights[self.stored[scale_name]]
            own = scale.dtype
            tensor = dequantize_rows(tensor, scale, self.bits, self.dtype or own)
        if part == "weight" and module in self.updates:
            tensor = folded(tensor, self.updates[module]).to(own)
        return cast(tensor, self.dtype)


class GlmTensors:
    """A ChatGLM's tensors by GlmForCausalLM's names: query_key_value in three parts."""

    def __init__(self, source: ChatGLMTensors, config: ChatGLM2Config):
        self.source = source
        self.sizes = fused_sizes(config)
        self.latest: tuple[str, list[Tensor]] = ("", [])  # the fused tensor that was cut last

    def __getitem__(self, name: str) -> Tensor:
        module, part = name.rsplit(".", 1)
        ours = f"{chatglm_module(module)}.{part}"
        if FUSED not in ours:
            return self.source[ours]
        if self.latest[0] != ours:
            self.latest = (ours, list(self.source[ours].split(self.sizes)))
        place = glm_modules(ours.rsplit(".", 1)[0]).index(module)
        return self.latest[1][place].clone()


class RestoredTensors:
    """A GlmForCausalLM's tensors by the releases' names: query_key_value in one."""

    def __init__(self, weights: BaseWeights, table: Tensor | None, dtype: torch.dtype | None):
        """`table`: the rotary frequencies that the releases' files hold; None for none."""
        self.weights = weights
        self.table = table
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        if name == INV_FREQ:
            assert self.table is not None
            return self.table
        module, part = name.rsplit(".", 1)
        parts = [self.weights[f"{theirs}.{part}"] for theirs in glm_modules(module)]
        return cast(torch.cat(parts) if len(parts) > 1 else parts[0], self.dtype)


def rotary_table(config: Any, dtype: torch.dtype) -> Tensor:
    """inv_freq as the releases' files hold it, always of base 10000. `config`: a ChatGLM2Config."""
    size = config.kv_channels // 2
    return 1.0 / (10000.0 ** (torch.arange(0, size, 2).to(dtype) / size))


def write_tensors(
    tensors: NamedTensors,
    shapes: dict[str, list[int]],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write model.safetensors, or shards with an index; memory holds one of them.

    Args:
        shapes: of the tensors that are written.
        dtype: of most of them, by which files are planned.
    Raises:
        OSError: the disk is full, or cannot be written.
    """
    from tqdm import tqdm

    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    check_disk(folder, sum(sizes.values()) + 10_000_000, "the model")
    with tqdm(
        total=sum(sizes.values()), desc="exporting", unit="B", unit_scale=True, disable=None
    ) as bar:

        def saved(names: list[str]) -> None:
            bar.update(sum(sizes[name] for name in names))

        files, written = save_shards(tensors, plan_shards(sizes, SHARD_BYTES), folder, saved)
    write_index(files, written, folder)
