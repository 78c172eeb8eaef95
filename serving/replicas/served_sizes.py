"""The sizes of what is loaded of a folder: a model, or an adapter or prefix with its base.

Nothing is read but JSON, the sizes of files, and the headers of safetensors files.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatglm.files import read_json
from chatglm.folders import check_folder, find_base
from finetune.memory.shapes import make_shape
from serving.cost_model.model import ModelSizes

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class ServedSizes:
    """A model as it is loaded.

    Attributes:
        model: with an adapter's weights in its layers, and packed ones at their size.
        prefix_bytes: a P-Tuning encoder's, on the first device.
        virtual_tokens: of its prefix, in the KV of every sequence.
    """

    model: ModelSizes
    prefix_bytes: int = 0
    virtual_tokens: int = 0


def element_bytes_of(precision: str, on_gpu: bool) -> int:
    """Bytes of a weight, and of a key's or value's number; auto: half precision on GPUs alone."""
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    return ELEMENT_BYTES[precision]


def weights_folder(folder: Path, base: str | None = None) -> Path:
    """The folder whose config.json describes the model: of an adapter or prefix, its base's."""
    folder = check_folder(folder)
    if (folder / "adapter_config.json").is_file() or not has_weights(folder):
        return find_base(folder, base)
    return folder


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights, and not a P-Tuning prefix alone."""
    from chatglm.weights import stored_prefix

    if not (folder / "config.json").is_file():
        return False
    if read_json(folder / "config.json").get("pre_seq_len") is None:
        return True
    prefix = stored_prefix(folder)
    return prefix is None or not prefix["only"]


def served_sizes(
    folder: str, *, base: str | None, element_bytes: int, keep_quantized: bool = False
) -> ServedSizes:
    """The sizes of a folder's model.

    Raises:
        ValueError, FileNotFoundError: it is no model's, or an adapter's base is not there.
    """
    path = check_folder(folder)
    whole = weights_folder(path, base)
    config = read_json(whole / "config.json")
    sizes = ModelSizes.from_config(config, element_bytes)
    if keep_quantized and config.get("quantization_bit"):
        sizes = packed_sizes(sizes, config)
    if (path / "adapter_config.json").is_file():
        sizes = add_to_layers(sizes, adapter_bytes(path))
    prefix = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    length = prefix.get("pre_seq_len") or 0
    if not length:
        return ServedSizes(sizes)
    return ServedSizes(sizes, prefix_bytes(prefix, config, element_bytes), length)


def packed_sizes(sizes: ModelSizes, config: dict[str, Any]) -> ModelSizes:
    """With the linear layers in 8 or 4 bits, and the embeddings where the release packs them.

    Norms, biases and scales are a few thousandths of a layer.
    """
    share = config["quantization_bit"] / 8 / sizes.element_bytes
    packed = replace(sizes, layer_bytes=round(sizes.layer_bytes * share))
    if config.get("quantization_embeddings"):
        packed = replace(
            packed,
            embedding_bytes=round(sizes.embedding_bytes * share),
            output_bytes=round(sizes.output_bytes * share),
        )
    return packed


def add_to_layers(sizes: ModelSizes, extra_bytes: int) -> ModelSizes:
    """With so many bytes more, in equal shares on the layers."""
    return replace(sizes, layer_bytes=sizes.layer_bytes + -(-extra_bytes // sizes.layers))


def adapter_bytes(folder: Path) -> int:
    """Bytes of an adapter's weights, which are stored in fp32, as they are loaded."""
    total = 0
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            total += (folder / name).stat().st_size
    return total


def prefix_bytes(config: dict[str, Any], whole: dict[str, Any], element_bytes: int) -> int:
    """Bytes of the P-Tuning encoder that a config.json names, for the model of another."""
    shape = make_shape(whole)
    version = config.get("ptuning_version") or "v2"
    sizes = shape.prefix(config["pre_seq_len"], bool(config.get("prefix_projection")), version)
    return element_bytes * sum(sizes.values())
