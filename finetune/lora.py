"""LoRA's linear layer in two small products beside the frozen one. peft's own forward copies inputs and outputs to fp32 on the way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraFunction(torch.autograd.Function):
    """x W^T + b + scaling * (dropped A^T) B^T, arXiv 2106.09685 eq. 3, with A and B in x's dtype and their gradients in their own.

    Saves `dropped` (x itself without dropout) and its (..., r) projection; W is read again in the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float):
        seen = x if dropped is None else dropped
        small_a, small_b = a.to(x.dtype), b.to(x.dtype)
        low = F.linear(seen, small_a)
        out = F.linear(x, weight, bias)
        # Not in place: selective checkpointing keeps the product itself.
        out = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), small_b.t(), alpha=scaling).view(out.shape)
        ctx.save_for_backward(seen, low, weight, small_a, small_b)
        ctx.dropped, ctx.scaling, ctx.dtypes = dropped is not None, scaling, (a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
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
        len(active) == 1 and active[0] in self.lora_A and not (self.disable_adapters or self.merged or self.lora_variant or args or kwargs)
        and not (any(p.requires_grad for p in base.parameters()) or hasattr(base.weight, "ds_id")) and x.dtype == base.weight.dtype
        and self.lora_A[active[0]].bias is None and self.lora_B[active[0]].bias is None and torch.is_grad_enabled()
    )  # fmt: skip
    if not plain:
        return type(self).forward(self, x, *args, **kwargs)
    name = active[0]
    dropout = self.lora_dropout[name]
    dropped = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.p and self.training else None
    return LoraFunction.apply(x, dropped, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
