"""LoRA's linear layer in two small products beside the frozen one (peft's own forward copies inputs and outputs to fp32 on the way);
adapters that began by taking their start out of the base, told as changes of the original base.
"""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraFunction(torch.autograd.Function):
    """x W^T + b + scaling * (dropped A^T) B^T, arXiv 2106.09685 eq. 3, with A and B in x's dtype and their gradients in their own.

    Saves `dropped` (x itself without dropout) and its (..., r) projection; W is read again in the backward pass.
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
        out = F.linear(x, weight, bias)
        # Not in place: selective checkpointing keeps the product itself.
        out = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), small_b.t(), alpha=scaling).view(
            out.shape
        )
        ctx.save_for_backward(seen, low, weight, small_a, small_b)
        ctx.dropped, ctx.scaling, ctx.dtypes = dropped is not None, scaling, (a.dtype, b.dtype)
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
    """Let every plain LoRA layer of a peft model run LoraFunction while nothing about it is special.

    Special is what peft must see to itself: merged or disabled adapters, several at once, variants such as DoRA, weights
    partitioned by ZeRO-3 or quantised, a base layer that trains.
    """
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.forward = _lean_forward.__get__(module)
    return model


def _lean_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
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
    dropped = (
        dropout(x) if isinstance(dropout, nn.Dropout) and dropout.p and self.training else None
    )
    return LoraFunction.apply(
        x,
        dropped,
        base.weight,
        base.bias,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
    )


def remember_start(model: nn.Module) -> None:
    """Keep the A and B that a start such as PiSSA's has just taken out of the base weights: W = rest + scaling * B0 A0."""
    model.lora_start = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            model.lora_start[name] = parameter.detach().float().cpu().clone()


@contextmanager
def on_original_base(model: nn.Module, state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The trained state of a peft model as an adapter of the original base; inside, peft's configuration is that adapter's.

    rest + scaling * B A = W + scaling * [B, -B0] [A; A0]: a plain adapter of twice the rank. Any other model: its state as it is.
    """
    start = getattr(model, "lora_start", None)
    if start is None:
        yield state
        return
    signs = {".lora_A.": (1, 0), ".lora_B.": (-1, 1)}
    told = dict(state)
    for name, first in start.items():
        sign, axis = next(value for part, value in signs.items() if part in name)
        told[name] = torch.cat([state[name].float(), sign * first], dim=axis)
    own = model.peft_config["default"]
    model.peft_config["default"] = config = copy.deepcopy(own)
    config.r, config.init_lora_weights = 2 * own.r, True
    config.lora_alpha = own.lora_alpha * (2**0.5 if own.use_rslora else 2)  # the same scaling
    try:
        yield told
    finally:
        model.peft_config["default"] = own


def check_lora_start(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Raises ValueError where this model's start is not the one that an exported adapter holds: its base would lack another part.

    Only products count: the factors of an SVD may turn up with other signs on another machine.
    """
    start = model.lora_start
    for name in (n for n in start if ".lora_A." in n):
        a, b = start[name], start[name.replace(".lora_A.", ".lora_B.")]
        rank, stored = len(a), name.replace(".default.", ".")
        old_a, old_b = (
            adapter[stored][rank:],
            -adapter[stored.replace(".lora_A.", ".lora_B.")][:, rank:],
        )
        probe = torch.randn(a.shape[1], 1, generator=torch.Generator().manual_seed(0))
        here, there = b @ (a @ probe), old_b @ (old_a @ probe)
        if not (here - there).norm() <= 1e-3 * there.norm():
            raise ValueError(
                f"{stored}: --init_lora_weights gives another start here than in the checkpoint (its SVD is drawn at random)"
            )
