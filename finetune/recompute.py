"""Gradient checkpointing: which blocks compute their activations again in the backward pass, and which of them."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute(model: nn.Module, how: str, layers: str = "") -> None:
    """Switch it on: `how` is "False", "True" or "selective", `layers` what --gradient_checkpointing_layers says.

    Raises:
        ValueError: the model has no such layers.
    """
    if how == "False":
        return
    options = {"use_reentrant": False} | (
        {"context_fn": keep_products} if how == "selective" else {}
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if not layers:
        return
    first, last = map(int, layers.split("-")) if "-" in layers else (0, int(layers) - 1)
    blocks = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not first <= last < len(blocks):
        raise ValueError(
            f"--gradient_checkpointing_layers {layers}: this model has {len(blocks)} layers, 0 to {len(blocks) - 1}"
        )
    for i, block in enumerate(
        blocks
    ):  # of N the first: backward frees what the others keep before it comes to recompute
        block.gradient_checkpointing = first <= i <= last


def keep_products() -> tuple:
    """Selective gradient checkpointing: the results of matrix products and attention stay, all else is computed again."""
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
