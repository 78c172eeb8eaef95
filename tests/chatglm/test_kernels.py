"""Hand-written backward passes against autograd through the plain formula in fp64.

Every choice of trained inputs, every dtype.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from chatglm import kernels
from chatglm.kernels import (
    CpuAttentionFunction,
    CrossEntropyFunction,
    OutputLayer,
    RMSNormFunction,
    RotateFunction,
    SwiGLUFunction,
    turn_halves_,
    turn_pairs_,
)
from chatglm.layers import causal_mask

CLOSE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}  # norm of the difference over the norm
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
GRADS = st.sampled_from(
    ["dense", "transposed", "expanded"]
)  # how an incoming gradient lies in memory
quick = settings(max_examples=150, deadline=None, database=None)


def noise(seed: int, *shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, what=""):
    assert found.dtype == dtype and found.shape == wanted.shape, what
    error = float((found.double() - wanted).norm())
    assert error <= CLOSE[dtype] * float(wanted.norm()) + 1e-12, (
        f"{what}: {error / float(wanted.norm()):.2e} of the norm"
    )


def check(function, plain, inputs, trained, dtype, *, kind="dense", factor=1.0, out_dtype=None):
    """`function` in `dtype` equals `plain` on the same numbers in fp64, and so do the gradients.

    Inputs that are `trained` get equal gradients, the others none; neither the inputs nor the
    incoming gradient are written to.
    """
    inputs = [x.to(dtype) for x in inputs]

    def run(call, inputs, grad=None):
        leaves = [x.detach().clone().requires_grad_(wanted) for x, wanted in zip(inputs, trained)]
        out = call(*leaves)
        if any(trained):
            out.backward(grad(out) if grad else None)
        assert all(torch.equal(leaf, x) for leaf, x in zip(leaves, inputs))
        return out.detach(), [leaf.grad for leaf in leaves]

    given = []

    def incoming(out):
        grad = noise(99, *out.shape).to(out.dtype) * factor
        if kind == "transposed" and out.dim() > 1:
            grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
        elif kind == "expanded":
            grad = torch.full((), factor, dtype=out.dtype).expand(out.shape)
        given.append((grad, grad.clone()))
        return grad

    found, grads = run(function, inputs, incoming)
    assert all(torch.equal(grad, copy) for grad, copy in given)
    wanted, exact = run(plain, [x.double() for x in inputs], lambda out: given[0][0].double())
    assert_close(found, wanted, out_dtype or dtype, "output")
    for i, (grad, reference) in enumerate(zip(grads, exact)):
        assert (grad is None) == (not trained[i])
        if grad is not None:
            assert_close(grad, reference, dtype, f"gradient of input {i}")


@quick
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(4, 70),
    st.tuples(st.booleans(), st.booleans()),
    DTYPES,
    GRADS,
)
def test_rms_norm(batch, length, width, trained, dtype, kind):
    def plain(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    inputs = [3 * noise(1, batch, length, width), 1 + noise(2, width)]
    check(lambda x, w: RMSNormFunction.apply(x, w, 1e-5), plain, inputs, trained, dtype, kind=kind)


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), DTYPES, GRADS)
def test_swiglu(batch, length, width, dtype, kind):
    def plain(both):
        gate, up = both.chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up

    check(
        SwiGLUFunction.apply,
        plain,
        [3 * noise(1, batch, length, 2 * width)],
        [True],
        dtype,
        kind=kind,
    )


def rotate(x, turns, heads, pairs_of):
    """eq. 34 as complex products; `pairs_of` lists the two dims of each number and its angle."""
    out = x.clone()
    for a, b, turn in pairs_of:
        z = torch.complex(x[:, :, :heads, a], x[:, :, :heads, b]) * turns[..., turn]
        out[:, :, :heads, a], out[:, :, :heads, b] = z.real, z.imag
    return out


@quick
@given(
    st.sampled_from(["pairs", "halves"]),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 4),
    st.booleans(),
    DTYPES,
    GRADS,
)
def test_rotate(way, batch, length, turned, others, quarter, per_row, dtype, kind):
    """The first heads rotate.

    The others, and the second half of a head in pairs, stay bit for bit.
    """
    dim, heads = 4 * quarter, turned + others
    angles = 7 * noise(
        3, batch if per_row else 1, length, 1, quarter if way == "pairs" else 2 * quarter
    )
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = [(2 * k, 2 * k + 1, k) for k in range(quarter)]
    halves = [
        (half * dim // 2 + k, half * dim // 2 + quarter + k, half * quarter + k)
        for half in (0, 1)
        for k in range(quarter)
    ]
    turn_, which = (turn_pairs_, pairs) if way == "pairs" else (turn_halves_, halves)
    x = noise(1, batch, length, heads, dim)
    short = turns.to(torch.complex64)
    check(
        lambda x: RotateFunction.apply(x, short, turned, turn_),
        lambda x: rotate(x, turns, turned, which),
        [x],
        [True],
        dtype,
        kind=kind,
    )
    found, x = RotateFunction.apply(x.to(dtype), short, turned, turn_), x.to(dtype)
    assert torch.equal(found[:, :, turned:], x[:, :, turned:])
    if way == "pairs":
        assert torch.equal(found[..., dim // 2 :], x[..., dim // 2 :])
    # of a view, as a chunk of a larger product is
    wide = torch.cat([x, x], dim=-1)
    assert torch.equal(
        RotateFunction.apply(wide[..., :dim], short, turned, turn_), found
    ) and torch.equal(wide[..., :dim], x)


def plain_attention(query, key, value, visible, scaling):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


@quick
@given(
    st.sampled_from(["square", "prefix", "any mask"]),
    st.sampled_from([1, 5, 24]),
    st.integers(1, 60),
    st.integers(0, 9),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    DTYPES,
    GRADS,
)
def test_cpu_attention(which, block, length, more, batch, heads, dtype, kind):
    """Up to 60 blocks of queries; with more keys than queries, the first ones are seen by all."""
    keys = length + (more if which != "square" else 0)
    visible = causal_mask(length, keys, "cpu")
    if which == "any mask":
        visible = noise(5, 1, 1, length, keys) > 0.3
        visible[..., torch.arange(length), torch.arange(length) % keys] = (
            True  # nobody sees nothing
        )
    mask, causal = (
        (None if keys == length or length == 1 else visible, True)
        if which != "any mask"
        else (visible, False)
    )
    inputs = [
        noise(1, batch, heads[0], length, 8),
        noise(2, batch, heads[1], keys, 8),
        noise(3, batch, heads[1], keys, 8),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "QUERY_BLOCK", block)
        check(
            lambda q, k, v: CpuAttentionFunction.apply(q, k, v, mask, causal, 0.3),
            lambda q, k, v: plain_attention(q, k, v, visible, 0.3),
            inputs,
            [True] * 3,
            dtype,
            kind=kind,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2 * kernels.QUERY_BLOCK + 7, 2 * kernels.QUERY_BLOCK])
def test_cpu_attention_of_whole_blocks(length, dtype):
    """At the size used in training, and with its views: heads of one product, transposed."""
    qkv = noise(1, 1, length, 6, 16)
    for prefix in (0, 9):
        mask = causal_mask(length, length + prefix, "cpu")

        def split(qkv, prefix=prefix):
            query, key, value = (
                qkv[:, prefix:].transpose(1, 2),
                qkv[:, :, :2].transpose(1, 2),
                qkv[:, :, 2:4].transpose(1, 2),
            )
            return query, key, value

        def fast(row, mask=mask if prefix else None, split=split):
            return CpuAttentionFunction.apply(*split(row), mask, True, 0.25)

        def plain(row, mask=mask, split=split):
            return plain_attention(*split(row), mask, 0.25)

        row = torch.cat([noise(2, 1, prefix, 6, 16), qkv], dim=1)
        check(fast, plain, [row], [True], dtype)


# ---- the loss


def plain_loss(hidden, weight, bias, targets, scale, smoothing=0.0):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return scale * F.cross_entropy(
        logits, targets.clamp(min=-1), reduction="sum", ignore_index=-1, label_smoothing=smoothing
    )


def loss_inputs(rows: int, words: int, biased: bool, size=1.0):
    targets = torch.randint(0, words, (rows,), generator=torch.Generator().manual_seed(rows))
    targets[1::3] = torch.where(torch.arange(len(targets[1::3])) % 2 == 0, -100, -1)
    inputs = [size * noise(1, rows, 6), noise(2, words, 6)] + [noise(3, words)] * biased
    return inputs, targets


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.integers(1, 30),
    st.integers(2, 40),
    st.booleans(),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from([1.0, 20.0]),
    st.sampled_from([1.0, 1 / 7, 1 / 30000]),
    st.sampled_from([1.0, -2.5]),
    st.sampled_from([1, 300, 2**26]),
    st.sampled_from([1, 500, 2**20]),
    DTYPES,
    st.sampled_from([0.0, 0.1, 0.7]),
)
def test_cross_entropy(
    rows, words, biased, trained, size, scale, factor, logits_bytes, cached_bytes, dtype, smoothing
):
    """In one chunk and in many, for every choice of trained inputs.

    Also with the loss scaled after.
    """
    inputs, targets = loss_inputs(
        rows, words, biased, size if dtype == torch.float32 else 1
    )  # large logits in bf16 are other logits
    trained = trained[: len(inputs)]

    def function(hidden, weight, bias=None):
        return CrossEntropyFunction.apply(hidden, weight, bias, targets, scale, smoothing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LOGITS_BYTES", logits_bytes)
        patch.setattr(kernels, "CACHED_BYTES", cached_bytes)
        leaves = [x.to(dtype).requires_grad_(wanted) for x, wanted in zip(inputs, trained)]
        exact = [x.detach().double().requires_grad_(wanted) for x, wanted in zip(leaves, trained)]
        found, wanted = (
            function(*leaves),
            plain_loss(*exact, *[None] * (not biased), targets, scale, smoothing),
        )
    close = (
        {"rel": 1e-5, "abs": 1e-5 * scale}
        if dtype == torch.float32
        else {"rel": 2e-2, "abs": 2e-2 * scale * rows}
    )
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), **close)
    if any(trained):
        (found * factor).backward()
        (wanted * factor).backward()
    for i, (leaf, reference) in enumerate(zip(leaves, exact)):
        assert (leaf.grad is None) == (not trained[i])
        if trained[i]:
            # Rows cancel in a gradient, and a probability with a smoothed target; the rounding of
            # either does not.
            floor = scale * 0.05 * size
            if dtype != torch.float32:
                floor = scale * max(1.0, factor) * 0.1 * rows**0.5
            error = (leaf.grad.double() - reference.grad).norm() / (reference.grad.norm() + floor)
            assert leaf.grad.dtype == dtype and error < (2e-5 if dtype == torch.float32 else 0.03)


def test_cross_entropy_in_fp16_scales_at_last():
    """A softmax share of 1 in 30 million underflows in fp16; with the loss scale it does not."""
    inputs, targets = loss_inputs(40, 300, False, 0.3)
    leaves = [x.half().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    (CrossEntropyFunction.apply(*leaves, None, targets, 1e-6) * 2.0**16).backward()
    (plain_loss(*exact, None, targets, 1e-6) * 2.0**16).backward()
    for leaf, reference in zip(leaves, exact):
        assert (leaf.grad.double() - reference.grad).norm() < 0.01 * reference.grad.norm()


def test_a_second_backward_is_an_error():
    inputs, targets = loss_inputs(5, 9, False)
    loss = CrossEntropyFunction.apply(
        inputs[0].float().requires_grad_(), inputs[1].float(), None, targets, 1.0
    )
    loss.backward(retain_graph=True)
    with pytest.raises((RuntimeError, AttributeError)):
        loss.backward()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_logits_are_never_whole(monkeypatch, dtype, trained):
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 2**16)
    monkeypatch.setattr(kernels, "CACHED_BYTES", 2**15)
    layer = OutputLayer(8, 500).to(dtype).requires_grad_(trained)
    hidden = noise(1, 700, 8).to(dtype).requires_grad_()
    with Largest() as largest:
        (3 * layer(hidden, torch.arange(700) % 500)).backward()
    # not even the scratch in fp32; hidden states, weights and their gradients are smaller still
    assert 2**15 < largest.bytes <= 2**16 < hidden.element_size() * 700 * 500


@pytest.mark.parametrize("bias", [True, False])
def test_output_layer(bias):
    """A linear layer; with targets, the loss of its logits, for what it trains."""
    layer, hidden = OutputLayer(6, 20, bias=bias), noise(1, 3, 4, 6).float()
    assert torch.equal(layer(hidden), F.linear(hidden, layer.weight, layer.bias))
    targets = torch.arange(12) % 20
    targets[3] = -100
    loss = layer(hidden.flatten(0, 1), targets, 0.5)
    wanted = 0.5 * F.cross_entropy(layer(hidden).flatten(0, 1), targets, reduction="sum")
    grads = [torch.autograd.grad(x, list(layer.parameters())) for x in (loss, wanted)]
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*grads)
    with torch.no_grad():  # an evaluation
        torch.testing.assert_close(layer(hidden.flatten(0, 1), targets, 0.5), wanted)
    assert set(layer.state_dict()) == set(torch.nn.Linear(6, 20, bias=bias).state_dict())
