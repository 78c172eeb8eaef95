"""A LoRA adapter of a ChatGLM: folded into the exported model, or as an adapter of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters import read_adapter, refuse_layout
from ..configuration import ChatGLM2Config
from ..convert_adapter import (
    check_updates,
    linear_layers,
    model_outline,
    read_source,
    read_updates,
    save_lora,
)
from ..files import read_json
from ..loading import base_fingerprint
from ..lora_layouts import Update
from ..runs import MANIFEST
from .layout import FUSED, fused_sizes, glm_modules

if TYPE_CHECKING:
    from ..convert_adapter import AdapterSource


def adapter_updates(
    adapter: Path, base: Path, config: ChatGLM2Config
) -> "tuple[AdapterSource, dict[str, Update]]":
    """What an adapter folder holds, and the updates of the base's layers.

    Raises:
        ValueError: it is no LoRA, of another base, or changes nothing.
    """
    refuse_layout(adapter, read_adapter(adapter))
    check_fingerprint(adapter, base)
    linear = linear_layers(model_outline(config))
    source = read_source(adapter)
    updates = read_updates(source, config, linear, None)
    check_updates(adapter, base, updates, linear)
    if config.tie_word_embeddings and "transformer.output_layer" in updates:
        raise ValueError(
            f"{adapter} changes the output layer, which shares its weight with the embedding of "
            f"{base}: it cannot be folded"
        )
    if not any(update.b.any() and update.a.any() for update in updates.values()):
        raise ValueError(f"{adapter} changes nothing: every A or B of it is zero")
    return source, updates


def check_fingerprint(adapter: Path, base: Path) -> None:
    """Raises ValueError where this toolkit trained the adapter on another base."""
    path = adapter / MANIFEST
    made_for = read_json(path).get("base_model") if path.is_file() else None
    wanted = made_for.get("fingerprint") if isinstance(made_for, dict) else None
    if wanted and wanted != base_fingerprint(base):
        raise ValueError(
            f"{adapter} was trained on another base, whose weights are not those of {base} "
            "(fingerprints differ)"
        )


def split_updates(updates: dict[str, Update], config: ChatGLM2Config) -> dict[str, Update]:
    """The updates by GlmForCausalLM's modules: q_proj, k_proj and v_proj share the fused one's A,
    and each has its rows of B.
    """
    split: dict[str, Update] = {}
    for module, update in updates.items():
        names = glm_modules(module)
        parts = [update.b]
        if FUSED in module:
            parts = list(update.b.split(fused_sizes(config)))
        for name, b in zip(names, parts):
            split[name] = Update(update.a.clone(), b.clone(), update.scaling)
    return split


def write_glm_adapter(
    source: "AdapterSource",
    updates: dict[str, Update],
    config: ChatGLM2Config,
    base: str,
    folder: Path,
) -> None:
    """Write a peft adapter of the exported model.

    Args:
        base: the exported model's folder, by which the adapter names it.
    """
    linear: dict[str, tuple[int, int]] = {}
    for module, (outputs, inputs) in linear_layers(model_outline(config)).items():
        names = glm_modules(module)
        sizes = fused_sizes(config) if len(names) > 1 else [outputs]
        for name, size in zip(names, sizes):
            linear[name] = (size, inputs)
    save_lora(source, split_updates(updates, config), linear, base, folder)
