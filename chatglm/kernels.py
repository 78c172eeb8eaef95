"""Autograd functions with hand-written backward passes, for operations whose plain form is slow.

The plain forms keep large intermediates or pass over memory several times; the results are equal.

Each saves for the backward pass only what is expensive to recompute, computes in fp32 whatever
the tensors' dtype, and skips the gradients of frozen weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS_BYTES = 64 * 2**20  # at most so much of the logits exists at a time
QUERY_BLOCK = 128  # queries of attention's backward on a CPU
CACHED_BYTES = 2**20  # of fp32 scratch: a piece of the logits that stays in a core's cache


def wide_product(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor as a new fp32 tensor.

    One dtype in each operation: mixed ones are not vectorised on a CPU.
    """
    wide = x.float()
    return wide * factor if wide is x else wide.mul_(factor)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight, arXiv 1910.07467 eq. 4. Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide_product(x, scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = wide_product(x, scale)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = wide_product(grad, normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = wide_product(grad, weight.float())
            along = (weighted * normed).sum(-1, keepdim=True).div_(x.shape[-1])
            grad_x = weighted.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up of (..., 2 F) -> (..., F), arXiv 2002.05202. Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


class RotateFunction(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864, eq. 34) of the first heads of x (B, S, heads, D).

    `turns` (B, S, 1, n) are complex: cos + i sin of each angle.

    `turn_` turns a tensor in place: `turn_pairs_` or `turn_halves_`. Saves nothing but the turns.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, turns: Tensor, heads: int, turn_: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.turns, ctx.heads, ctx.turn_ = turns, heads, turn_
        x = x.clone(memory_format=torch.contiguous_format)
        turn_(x[:, :, :heads], turns)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.turn_(grad[:, :, : ctx.heads], ctx.turns.conj_physical())
        return grad, None, None, None


def turn_pairs_(x: Tensor, turns: Tensor) -> None:
    """ChatGLM2's way: dims (0, 1), (2, 3), ... of each head up to 2 n form the pairs."""
    part = x[..., : 2 * turns.shape[-1]]
    wide = part.float()  # fp32: the part itself, turned in place
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turns)
    if wide is not part:
        part.copy_(wide)


def turn_halves_(x: Tensor, turns: Tensor) -> None:
    """ChatGLM-6B's way: the halves of a head by the halves of the turns.

    The first half of the turns applies to the first half of each head, the second to the second;
    in each half dims (0, D/4), (1, D/4 + 1), ... form the pairs.
    """
    cos, sin = (t.unflatten(-1, (2, -1)) for t in (turns.real, turns.imag))
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turn_(a, b, cos, sin)


def turn_rotated_halves_(x: Tensor, turns: Tensor) -> None:
    """Llama's way: dims (0, D/2), (1, D/2 + 1), ... of each head form the pairs.

    Args:
        x: (1, N, heads, D), turned in place.
        turns: (1, N, 1, D / 2) complex64.
    """
    half = x.shape[-1] // 2
    turn_(x[..., :half], x[..., half:], turns.real, turns.imag)


def turn_(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the pairs of two tensors in place, in fp32."""
    wide = a.float() * cos
    b_turned = b.float() * cos
    b_turned.addcmul_(a.float(), sin)
    a.copy_(wide.addcmul_(b.float(), sin, value=-1))
    b.copy_(b_turned)


class CpuAttentionFunction(torch.autograd.Function):
    """scaled_dot_product_attention on a CPU with a backward pass of a few large products.

    torch's own backward is several times slower in bf16 on a CPU.

    query (B, heads, Q, D), key and value (B, kv_heads, K, D), mask (1, 1, Q, K) bool, True =
    visible. `causal`: the mask says that query i sees the first K - Q + i + 1 keys, and is None
    where Q = K. No dropout. The backward pass takes QUERY_BLOCK queries at a time: scores and
    softmax in fp32, the heads that share a key head side by side, so that their gradients add up
    in the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, None if causal else mask)
        ctx.scaling = scaling
        is_causal = mask is None and query.shape[2] > 1
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, is_causal=is_causal, enable_gqa=grouped
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        batch, heads, length, dim = query.shape
        kv_heads, keys = key.shape[1:3]
        dtype, kv_shape = query.dtype, key.shape
        # oneDNN compiles its half-precision products again for every shape: few shapes, then.
        unit = 1 if dtype == torch.float32 else 64
        rows, width = round_up(length, unit), round_up(keys, unit)
        # (batch * kv_heads, heads that share them, Q, D) and (batch * kv_heads, K, D), padded with
        # zeros
        q_shape, q_padding = (-1, heads // kv_heads, length, dim), (0, 0, 0, rows - length)
        query, grad = (F.pad(x.reshape(q_shape), q_padding) for x in (query, grad))
        k_shape, k_padding = (-1, keys, dim), (0, 0, 0, width - keys)
        key, value = (F.pad(x.reshape(k_shape), k_padding) for x in (key, value))
        wide_key = key.float()
        if mask is not None:
            bias = mask_bias(mask, rows, width)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_key)
        for start in range(0, rows, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, rows)
            if mask is not None:
                seen = width
                hidden = bias[start:end, :seen]
            else:
                seen = min(width, round_up(keys - length + end, unit))
                hidden = causal_bias(end - start, seen, keys - length + start + 1)
            q, g = (x[:, :, start:end].flatten(1, 2) for x in (query, grad))
            scores = torch.bmm(q.float(), wide_key[:, :seen].transpose(1, 2)).mul_(ctx.scaling)
            scores.unflatten(1, (-1, end - start)).add_(hidden)
            weights = torch.softmax(scores, dim=-1)
            grad_value[:, :seen].add_(torch.bmm(weights.to(dtype).transpose(1, 2), g))
            scores = torch.bmm(g, value[:, :seen].transpose(1, 2)).float().mul_(weights)
            # The softmax's backward, dS = P dP - P (sum of P dP)
            scores.addcmul_(weights, scores.sum(-1, keepdim=True), value=-1).mul_(ctx.scaling)
            scores = scores.to(dtype)
            block_shape = (-1, heads // kv_heads, end - start, dim)
            grad_query[:, :, start:end] = torch.bmm(scores, key[:, :seen]).view(block_shape)
            grad_key[:, :seen].add_(torch.bmm(scores.transpose(1, 2), q))
        grad_query = grad_query[:, :, :length].reshape(batch, heads, length, dim)
        grad_key = grad_key[:, :keys].reshape(kv_shape).to(dtype)
        grad_value = grad_value[:, :keys].reshape(kv_shape).to(dtype)
        return grad_query, grad_key, grad_value, None, None, None


def causal_bias(rows: int, keys: int, first: int) -> Tensor:
    """(rows, keys) fp32 to add to scores: row i is far below zero from key `first` + i on."""
    return torch.full((rows, keys), -1e30).triu_(first)


def mask_bias(mask: Tensor, rows: int, keys: int) -> Tensor:
    """(rows, keys) fp32 to add to scores: far below zero where mask (1, 1, Q, K) hides a key."""
    length, width = mask.shape[2:]
    visible = F.pad(mask[0, 0], (0, keys - width, 0, rows - length), value=False)
    return torch.zeros(rows, keys).masked_fill_(~visible, -1e30)


class CrossEntropyFunction(torch.autograd.Function):
    """`scale` times the summed cross entropy of hidden (N, H) @ weight.T (V, H) against targets.

    targets (N,): those below 0 carry no loss. Returns a scalar, fp32.

    With `smoothing` the target distribution is 1 - smoothing on the target plus smoothing spread
    evenly over all V words, as in F.cross_entropy(label_smoothing=).

    The logits exist in pieces of LOGITS_BYTES, each turned into its own gradient in place and used
    at once, so neither the logits nor their gradient is ever whole. The gradients are computed in
    the forward pass for an incoming gradient of 1: pass the divisor of the loss through `scale`,
    and the backward pass has nothing to do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        smoothing: float = 0.0,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        needed = need_hidden or need_weight or need_bias
        # A softmax over thousands of words, divided by thousands of tokens, underflows in fp16: it
        # is scaled afterwards.
        ctx.rest = 1.0
        if hidden.dtype == torch.float16:
            ctx.rest, scale = scale, 1.0
        rows = max(1, LOGITS_BYTES // (weight.shape[0] * hidden.element_size()))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight and not len(hidden) else None
        grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            part_targets = targets[start : start + rows]
            logits = F.linear(part, weight, bias)
            total += softmax_gradient_(logits, part_targets, scale, needed, smoothing)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), part)
            elif need_weight:
                grad_weight = logits.t() @ part
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            del logits
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return total * (scale * ctx.rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # a second backward is an error, as for any freed graph
        grad = grad * ctx.rest
        if grad.device.type != "cpu" or grad.item() != 1:
            gradients = tuple(g if g is None else g.mul_(grad.to(g.dtype)) for g in gradients)
        return *gradients, None, None, None


def softmax_gradient_(
    logits: Tensor, targets: Tensor, scale: float, needed: bool, smoothing: float = 0.0
) -> Tensor:
    """The summed cross entropy of logits (N, V), fp32.

    With `needed`, logits become scale * (softmax - target distribution) in place.

    Works in pieces that a CPU's cache holds, each in fp32: half-precision logits are exponentiated
    and summed at full precision.
    """
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, CACHED_BYTES // (4 * logits.shape[1]))
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), rows):
        piece = logits[start : start + rows]
        wanted = targets[start : start + rows, None]
        counted = (wanted >= 0).float()
        wanted = wanted.clamp(min=0)
        wide = piece.float() if needed or piece.dtype != torch.float32 else piece.clone()
        wide.sub_(wide.amax(-1, keepdim=True))
        target_logits = wide.gather(-1, wanted)
        if smoothing:
            target_logits = torch.lerp(target_logits, wide.mean(-1, keepdim=True), smoothing)
        mass = wide.exp_().sum(-1, keepdim=True)
        total += torch.sum((mass.log() - target_logits) * counted)
        if needed:
            wide.mul_(scale * counted / mass)
            wide.scatter_add_(-1, wanted, -scale * (1 - smoothing) * counted)
            if smoothing:
                wide.sub_(scale * smoothing / wide.shape[-1] * counted)
            if wide is not piece:
                piece.copy_(wide)
    return total


class LogProbsFunction(torch.autograd.Function):
    """(N,) fp32 log-probabilities of targets (N,) under softmax(hidden (N, H) @ weight.T + bias).

    Targets below 0 have 0. The logits exist in pieces of LOGITS_BYTES: the backward pass computes
    them again from the hidden states and saves one number a row, the logarithm of its sum.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        mass = torch.empty_like(result)
        wanted = targets.clamp(min=0)[:, None]
        for rows in logit_pieces(hidden, weight):
            logits = F.linear(hidden[rows], weight, bias).float()
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.sub_(largest).gather(-1, wanted[rows])
            total = logits.exp_().sum(-1, keepdim=True).log_()
            result[rows] = (chosen - total)[:, 0]
            mass[rows] = (total + largest)[:, 0]
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, mass)
        return result.masked_fill_(targets < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, mass = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad.masked_fill(targets < 0, 0.0)
        wanted = targets.clamp(min=0)[:, None]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        for rows in logit_pieces(hidden, weight):
            # d log p(target) / d logits = (one at the target) - p
            wide = F.linear(hidden[rows], weight, bias).float()
            wide.sub_(mass[rows, None]).exp_().mul_(-grad[rows, None])
            wide.scatter_add_(-1, wanted[rows], grad[rows, None])
            piece = wide.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(piece, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(piece.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias += piece.sum(0)
        return grad_hidden, grad_weight, grad_bias, None


def logit_pieces(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The rows of hidden (N, H) whose logits are computed at a time."""
    rows = max(1, LOGITS_BYTES // (weight.shape[0] * hidden.element_size()))
    for start in range(0, len(hidden), rows):
        yield slice(start, min(start + rows, len(hidden)))


class OutputLayer(nn.Linear):
    """Hidden states to logits; with `targets`, to the loss, which needs no whole logits.

    The loss is computed by calling the module, so that ZeRO-3, which gathers a module's weight
    around its call, gathers it here too.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        scale: float = 1.0,
        smoothing: float = 0.0,
        log_probs: bool = False,
    ) -> Tensor:
        """hidden (..., H) -> logits (..., V).

        With targets: hidden (N, H), targets (N,) -> scale * summed cross entropy, fp32; with
        log_probs their log-probabilities (N,), fp32.
        """
        if targets is None:
            return super().forward(hidden)
        if log_probs:
            return cast(Tensor, LogProbsFunction.apply(hidden, self.weight, self.bias, targets))
        return CrossEntropyFunction.apply(hidden, self.weight, self.bias, targets, scale, smoothing)
