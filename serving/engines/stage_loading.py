"""The part of a model that a stage of a pipeline holds.

All modules are built, so that layers keep their numbers and names; those of other stages are on the
meta device, without memory. Weights in the dtype of their safetensors files are mapped into memory
and read when they are first used, so other stages' are never read: a folder is loaded in the files'
dtype, and what belongs to the stage is converted and moved. Where the files hold several dtypes, or
are .bin files, or an int8 or int4 release, the whole model is in memory for a moment.
"""

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chatglm.folders import check_folder, find_base
from chatglm.hub import resolve_folder
from chatglm.loading import base_of_adapter, load_adapter, load_model, load_prefix, resolve_mode
from chatglm.weights import open_safetensors, stored_prefix, weight_files
from finetune.distributed import DTYPES, resolve_precision
from finetune.placing import StageSpec
from serving.engines.adapters import AdapterSet
from serving.engines.bodies import ServedBody, body_of, decoder_layers, final_norm
from serving.engines.kv_memory import KvMemory, LoggedMemory
from serving.engines.passes import Stage, plain_model
from serving.engines.stage_types import ModelLoading

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StagePart:
    """What a stage holds beside its layers.

    Attributes:
        embeds: the embedding, and P-Tuning v1's vectors. heads: the last norm and the output layer.
    """

    spec: StageSpec
    embeds: bool
    heads: bool


def resolve_dtype(precision: str, stages: Sequence[StageSpec]) -> torch.dtype:
    """The dtype of all stages: "auto" is fp32 where one of them is on a CPU."""
    if precision == "auto" and any(pick_name(spec) == "cpu" for spec in stages):
        return torch.float32
    return DTYPES[resolve_precision(precision)]


def pick_name(spec: StageSpec) -> str:
    """The kind of a stage's device, without a look whether it is there."""
    if spec.device.isdigit():
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(spec.device).type


class OpenedModel:
    """A model whose weights are mapped, not read, where its files allow it.

    Args:
        dtype: that its stage computes in.
    Attributes:
        layers: how many decoder layers it has.
        is_tied: the output layer's weight is the embedding's.
    """

    def __init__(self, loading: ModelLoading, dtype: torch.dtype):
        if loading.keep_quantized:
            raise ValueError(
                "a pipeline takes no packed weights (--keep_quantized): leave the flag out, and "
                "they are dequantised; or use one device"
            )
        self.dtype = dtype
        self.folder = check_folder(resolve_folder(loading.path, weights=True))
        mode = resolve_mode(self.folder, loading.mode, loading.base)
        self.has_adapter = (self.folder / "adapter_config.json").is_file()
        self.has_prefix_alone = False
        opened, weights = self.folder, self.folder
        if self.has_adapter:
            opened = weights = base_of_adapter(self.folder, loading.base)
        elif mode != "causal":
            stored = stored_prefix(self.folder)
            if stored and stored["only"]:
                self.has_prefix_alone = True
                weights = check_folder(find_base(self.folder, loading.base))
        loaded = load_model(
            opened,
            mode=mode,
            base=None if self.has_adapter else loading.base,
            dtype=stored_dtype(weights) or dtype,
            verify=loading.verify,
        )
        assert isinstance(loaded, PreTrainedModel)  # an adapter is put on below
        if getattr(loaded, "hf_quantizer", None) is not None:
            raise ValueError(f"{weights}: a pipeline takes no weights quantised by bitsandbytes")
        self.model: Any = loaded
        body = body_of(loaded)
        self.layers = len(body.blocks)
        self.is_tied = body.head.weight is body.embed.weight

    def keep(self, part: StagePart, device: torch.device) -> PreTrainedModel:
        """Free what the stage does not hold; the rest on its device, in its dtype."""
        model = self.model
        place_parts(model, part, device, self.dtype)
        if self.has_prefix_alone:
            load_prefix(model, self.folder)  # again, as it is stored: it was in the files' dtype
        if self.has_adapter:
            model = load_adapter(model, self.folder)
            place_parts(plain_model(model), part, device, None)
        gc.collect()
        return plain_model(model.eval())


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The one dtype of a folder's safetensors; None where there are several, or .bin files."""
    found: set[str] = set()
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            return None
        with open_safetensors(file) as tensors:
            for name in tensors.keys():
                found.add(tensors.get_slice(name).get_dtype())
    return STORED_DTYPES.get(found.pop()) if len(found) == 1 else None


def place_parts(
    model: PreTrainedModel, part: StagePart, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Move a stage's modules to its device, and all others to the meta device.

    Args:
        dtype: of both; None leaves each parameter's.
    """
    body: Any = getattr(model, "transformer", None) or getattr(model, "model", None)
    embed: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    held: list[tuple[nn.Module, bool]] = []
    for number, layer in enumerate(decoder_layers(model)):
        held.append((layer, part.spec.start <= number < part.spec.end))
    held += [(embed, part.embeds), (head, part.heads), (final_norm(model), part.heads)]
    if (encoder := getattr(body, "prefix_encoder", None)) is not None:
        held.append((encoder, True))
    for module, is_held in held:
        module.to(device=device if is_held else "meta", dtype=dtype)
    if (rotary := getattr(body, "rotary_emb", None)) is not None:
        rotary.to(device)  # its table stays fp32


def make_stage(
    model: PreTrainedModel,
    part: StagePart,
    device: torch.device,
    adapters: AdapterSet,
    lanes: int,
    log: Callable[[int, str, tuple[Any, ...]], None] | None = None,
) -> Stage:
    """The stage of a model whose other parts are freed.

    Args:
        log: called with (lane, operation, arguments) of each operation of a lane's memory.
    """
    body = stage_body(model, part)
    start, end = part.spec.start, part.spec.end
    sizes = end - start, body.kv_heads, body.head_dim, model.dtype, device
    kept: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    memories: list[KvMemory] = []
    for lane in range(lanes):
        if log is None:
            memories.append(KvMemory(*sizes, prefix=body.prefix, kept=kept))
        else:
            log_lane = partial(log, lane)
            memories.append(LoggedMemory(log_lane, *sizes, prefix=body.prefix, kept=kept))
    return Stage(body, adapters, device, memories, start, end)


def stage_body(model: PreTrainedModel, part: StagePart) -> ServedBody:
    """The body of a model whose other parts are freed, with the stage's share of a prefix."""
    body = body_of(model)
    start, end = part.spec.start, part.spec.end
    if body.prefix is not None:
        body.prefix = body.prefix[2 * start : 2 * end].clone()
    chatglm: Any = getattr(model, "transformer", None)
    if chatglm is not None and chatglm.prefix_encoder is not None:
        chatglm.prefix_encoder.to("meta")  # what it makes is made
    return body
