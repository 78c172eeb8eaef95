"""A LoRA layer with less copying, and adapters of starts such as PiSSA's.

peft's forward copies inputs and outputs to fp32; LoraFunction does not. A start such as PiSSA's
changes the base weights: its adapter is exported as one of the original base.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatglm.adapters import (
    check_names,
    check_shapes,
    fit_adapter,
    read_adapter,
    read_adapter_config,
    refuse_changed_base,
    refuse_layout,
)
from chatglm.folders import check_folder, reading


class LoraFunction(torch.autograd.Function):
    """x W^T + b + scaling * (dropped A^T) B^T, arXiv 2106.09685 eq. 3.

    A and B are cast to x's dtype, their gradients to the dtypes of A and B. For the backward pass
    it saves `dropped` (x itself without dropout) and its (..., r) projection, and W is read again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        seen = x if dropped is None else dropped
        small_a, small_b = a.to(x.dtype), b.to(x.dtype)
        low = F.linear(seen, small_a)
        frozen = F.linear(x, weight, bias)
        # Not in place: selective checkpointing keeps the frozen layer's output.
        out = torch.addmm(
            frozen.flatten(0, -2), low.flatten(0, -2), small_b.t(), alpha=scaling
        ).view(frozen.shape)
        ctx.save_for_backward(seen, low, weight, small_a, small_b)
        ctx.dropped = dropped is not None
        ctx.scaling = scaling
        ctx.dtypes = (a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, a, b = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_low = (flat @ b).mul_(ctx.scaling)
        grad_b = (flat.t() @ low.flatten(0, -2)).to(ctx.dtypes[1]).mul_(ctx.scaling)
        grad_a = (grad_low.t() @ seen.flatten(0, -2)).to(ctx.dtypes[0])
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ weight).view(seen.shape)
            if not ctx.dropped:
                grad_x.flatten(0, -2).addmm_(grad_low, a)
        if ctx.dropped and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a).view(seen.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def use_lean_lora(model: nn.Module) -> nn.Module:
    """Make the plain LoRA layers of a peft model use LoraFunction; returns the model.

    peft's forward stays in use for merged or disabled adapters, several at once, variants such as
    DoRA, weights partitioned by ZeRO-3 or quantised, and a base layer that trains.
    """
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            vars(module)["forward"] = MethodType(_lean_forward, module)
    return model


def _lean_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a peft LoRA layer `self`, by LoraFunction where the layer is plain."""
    base, active = self.base_layer, self.active_adapters
    plain = (
        len(active) == 1
        and active[0] in self.lora_A
        and not (self.disable_adapters or self.merged or self.lora_variant or args or kwargs)
        and not (any(p.requires_grad for p in base.parameters()) or hasattr(base.weight, "ds_id"))
        and x.dtype == base.weight.dtype
        and self.lora_A[active[0]].bias is None
        and self.lora_B[active[0]].bias is None
        and torch.is_grad_enabled()
    )
    if not plain:
        return type(self).forward(self, x, *args, **kwargs)
    name = active[0]
    dropout = self.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p and self.training
    dropped = dropout(x) if drops else None
    return LoraFunction.apply(
        x,
        dropped,
        base.weight,
        base.bias,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
    )


def continue_adapter(model: Any, path: str, dropout: float) -> Any:
    """`model` in a PeftModel whose trainable LoRA has the values of an adapter.

    Args:
        model: the adapter's base, of transformers.
        path: its folder, or a hub's name.
        dropout: on LoRA's input.
    Raises:
        ValueError: it does not fit the base, or is relative to a changed one.
        FileNotFoundError: it is not there.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    folder = check_folder(path, weights=True)
    config: Any = read_adapter_config(folder)  # of LoRA
    state = read_adapter(folder)
    if model.config.model_type == "chatglm":
        refuse_layout(folder, state)
    refuse_changed_base(folder, config.init_lora_weights)
    config.lora_dropout, config.inference_mode = dropout, False
    config.init_lora_weights = True
    base = str(model.name_or_path)
    with reading(folder, f"does its adapter belong to {base}?"):
        adapted = get_peft_model(model, config)
    fit = fit_adapter(adapted, state)
    check_names(folder, base, fit)
    check_shapes(folder, base, fit)
    set_peft_model_state_dict(adapted, state)
    return adapted


def remember_start(model: nn.Module) -> None:
    """Store in `model.lora_start` the A and B that a start such as PiSSA's took from the base.

    The original weight is W = rest + scaling * B0 A0.
    """
    start: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            start[name] = parameter.detach().float().cpu().clone()
    vars(model)["lora_start"] = start


@contextmanager
def on_original_base(model: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The trained state of a model, plain or of peft, as an adapter of the original base.

    rest + scaling * B A = W + scaling * [B, -B0] [A; A0], a plain adapter of twice the rank. Within
    the context, peft's configuration of the model is that adapter's. A model without a stored
    start: its state unchanged.
    """
    start: dict[str, Tensor] | None = getattr(model, "lora_start", None)
    if start is None:
        yield state
        return
    adapter = dict(state)
    for name, initial in start.items():
        if ".lora_A." in name:
            adapter[name] = torch.cat([state[name].float(), initial], dim=0)
        else:
            adapter[name] = torch.cat([state[name].float(), -initial], dim=1)
    trained = model.peft_config["default"]
    config = copy.deepcopy(trained)
    config.r = 2 * trained.r
    config.init_lora_weights = True
    # The same scaling at twice the rank.
    config.lora_alpha = trained.lora_alpha * (2**0.5 if trained.use_rslora else 2)
    model.peft_config["default"] = config
    try:
        yield adapter
    finally:
        model.peft_config["default"] = trained


def check_lora_start(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Raises ValueError where this model's start differs from the one in an exported adapter.

    With another start, the base lacks another part. Only the products B A are compared: the signs
    of an SVD's factors may differ between machines.
    """
    start: dict[str, Tensor] = vars(model)["lora_start"]
    for name, a in start.items():
        if ".lora_A." not in name:
            continue
        b = start[name.replace(".lora_A.", ".lora_B.")]
        rank = len(a)
        stored = name.replace(".default.", ".")
        stored_a = adapter[stored][rank:]
        stored_b = -adapter[stored.replace(".lora_A.", ".lora_B.")][:, rank:]
        probe = torch.randn(a.shape[1], 1, generator=torch.Generator().manual_seed(0))
        output = b @ (a @ probe)
        stored_output = stored_b @ (stored_a @ probe)
        if not (output - stored_output).norm() <= 1e-3 * stored_output.norm():
            raise ValueError(
                f"{stored}: --init_lora_weights gives another start here than in the checkpoint "
                f"(its SVD is drawn at random)"
            )
