"""Gradient checkpointing: which blocks recompute which activations in the backward pass."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute(model: nn.Module, how: str, layers: str = "") -> None:
    """Switch on gradient checkpointing.

    Args:
        how: "False" (off), "True" or "selective" (save_products).
        layers: --gradient_checkpointing_layers, "" for all layers.

    Raises:
        ValueError: the model has no such layers.
    """
    if how == "False":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = save_products
    transformer: Any = model  # of transformers or peft, or a length network with the method
    transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if not layers:
        return
    # N means the first N: backward frees the activations of the others before it recomputes theirs.
    first, last = map(int, layers.split("-")) if "-" in layers else (0, int(layers) - 1)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not first <= last < len(blocks):
        raise ValueError(
            f"--gradient_checkpointing_layers {layers}: this model has {len(blocks)} layers, "
            f"0 to {len(blocks) - 1}"
        )
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = first <= number <= last


def save_products() -> tuple[Any, Any]:
    """The contexts of selective gradient checkpointing.

    The results of matrix products and attention are saved, everything else is recomputed.
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    aten = torch.ops.aten
    return create_selective_checkpoint_contexts(
        [
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.linear.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )
