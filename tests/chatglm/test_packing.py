"""Packed sequences equal the sequences alone: values, gradients, no attention across sequences.

For every architecture and every P-Tuning.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.recompute import save_products
from tests.chatglm.test_models import CLOSE, PREFIXES, family_of, model_of, row
from tests.conftest import INFILLING, VARIANTS, decoder_layers, tiny_model

CAUSAL = [variant for variant in VARIANTS if VARIANTS[variant][0] not in INFILLING]
RECOMPUTE = {"True": {}, "selective": {"context_fn": save_products}}
# each sequence: its length, and the seed of its tokens
SEQUENCES = st.lists(st.tuples(st.integers(4, 14), st.integers(0, 99)), min_size=1, max_size=4)


def pack(model, sequences, shared=None):
    """The body's arguments for packed sequences; with `shared`, the first is the others' prefix."""
    ids, lengths = torch.cat(sequences)[None], [len(ids) for ids in sequences]
    shared = [0] + [shared] * (len(lengths) - 1) if shared else [0] * len(lengths)
    return {
        "input_ids": ids,
        "position_ids": model.transformer.packed_positions(ids, lengths, shared),
        "use_cache": False,
    }


def hidden(model, **inputs):
    return model.transformer(**inputs).last_hidden_state


def draw_rows(model, shapes):
    return [row(family_of(model), length, seed) for length, seed in shapes]


def gradients(model, loss):
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)


def assert_near(found, wanted):
    # a gradient that is 0 but for rounding, as of a key's bias, has a norm of up to 1e-4
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-4


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8, deadline=None, database=None)
@given(shapes=SEQUENCES, draw=st.data())
def test_packed_is_separate(variant, prefix, shapes, draw):
    """Hidden states and every gradient.

    With `keep`, the last layer computes only those positions.
    """
    model = model_of(variant, prefix)
    rows = draw_rows(model, shapes)
    alone = torch.cat([hidden(model, input_ids=ids[None], use_cache=False) for ids in rows], dim=1)
    inputs = pack(model, rows)
    packed = hidden(model, **inputs)
    torch.testing.assert_close(packed, alone, **CLOSE)
    places = st.lists(
        st.integers(0, alone.shape[1] - 1), min_size=1, max_size=20
    )  # repetition fills a row up
    keep = torch.tensor(sorted(draw.draw(places)))
    kept = hidden(model, **inputs, keep=keep)
    torch.testing.assert_close(kept, alone[:, keep], **CLOSE)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients(model, (alone[:, keep] * weights[:, keep]).sum())
    for found in (packed[:, keep], kept):
        for grad, exact in zip(gradients(model, (found * weights[:, keep]).sum()), wanted):
            assert_near(grad, exact)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", CAUSAL)
@settings(max_examples=8, deadline=None, database=None)
@given(
    trunk=st.integers(4, 12),
    shapes=st.lists(st.tuples(st.integers(4, 9), st.integers(0, 99)), min_size=1, max_size=3),
    draw=st.data(),
)
def test_a_shared_trunk_changes_nothing(variant, prefix, trunk, shapes, draw):
    model = model_of(variant, prefix)
    common = row(family_of(model), trunk, seed=7)
    tails = [
        ids[: draw.draw(st.integers(1, len(ids)))] for ids in draw_rows(model, shapes)
    ]  # down to one token
    alone = [
        hidden(model, input_ids=torch.cat([common, ids])[None], use_cache=False)[:, trunk:]
        for ids in tails
    ]
    inputs = pack(model, [common, *tails], trunk)
    packed = hidden(model, **inputs)[:, trunk:]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **CLOSE)
    keep = torch.arange(trunk, inputs["input_ids"].shape[1])[
        draw.draw(st.sampled_from([slice(None), slice(None, None, 2), slice(-1, None)]))
    ]
    kept = hidden(model, **inputs, keep=keep)
    torch.testing.assert_close(kept, packed[:, keep - trunk], **CLOSE)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))[:, keep - trunk]
    wanted = gradients(model, (torch.cat(alone, dim=1)[:, keep - trunk] * weights).sum())
    for grad, exact in zip(gradients(model, (kept * weights).sum()), wanted):
        assert_near(grad, exact)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_no_sequence_sees_another(variant, prefix, attn):
    """Other tokens in one sequence change no bit of the others.

    Naive packing, one row under a mask of ones, leaks; that shows what this test would see.
    """
    model = model_of(variant, prefix)
    model.set_attn_implementation(attn)
    shapes = [(9, 1), (7, 2), (11, 3)]
    rows, starts = draw_rows(model, shapes), [0, 9, 16, 27]
    before = hidden(model, **pack(model, rows))
    for changed in range(3):
        others = [
            row(family_of(model), n, seed + 50 * (i == changed))
            for i, (n, seed) in enumerate(shapes)
        ]
        after = hidden(model, **pack(model, others))
        moved = [bool((before != after)[:, a:b].any()) for a, b in zip(starts, starts[1:])]
        assert moved == [i == changed for i in range(3)]
    other = [row(family_of(model), 9, 51), *rows[1:]]
    naive = [
        hidden(model, **pack(model, r), attention_mask=torch.ones(1, 27)) for r in (rows, other)
    ]
    assert (naive[0] - naive[1])[:, 9:].abs().max() > 1e-3 and (naive[0] - before)[
        :, 9:
    ].abs().max() > 1e-3
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", CAUSAL)
@torch.no_grad()
def test_no_sequence_sees_another_beside_a_trunk(variant, prefix):
    model = model_of(variant, prefix)
    shapes = [(6, 1), (5, 2), (4, 3), (5, 4)]
    before = hidden(model, **pack(model, draw_rows(model, shapes), 6))
    for changed in (1, 2, 3):
        others = [
            row(family_of(model), n, seed + 50 * (i == changed))
            for i, (n, seed) in enumerate(shapes)
        ]
        moved = (
            (before != hidden(model, **pack(model, others, 6)))
            .any(-1)[0]
            .split([n for n, _ in shapes])
        )
        assert [bool(part.any()) for part in moved] == [i == changed for i in range(4)]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(variant, prefix):
    model = model_of(variant, prefix)
    rows = draw_rows(model, [(9, 1), (4, 2), (11, 3)])
    keep = torch.tensor([2, 3, 8, 14, 23])
    for trunk in [None] if family_of(model) in INFILLING else [None, 9]:
        results = []
        for attn in ("sdpa", "eager"):
            model.set_attn_implementation(attn)
            out = hidden(model, **pack(model, rows, trunk), keep=keep)
            results.append([out, *gradients(model, out.square().sum())])
        model.set_attn_implementation("sdpa")
        for sdpa, eager in zip(*results):
            assert_near(sdpa, eager)


@pytest.mark.parametrize("variant", CAUSAL)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_flash_backends_get_no_mask_that_they_cannot_take(variant, prefix):
    """Flash kernels know a causal mask and 2-D padding only.

    Packed rows need no more than that, or are refused.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from chatglm.layers import eager_attention

    family, own = VARIANTS[variant]
    model, seen = tiny_model(family, **own | PREFIXES[prefix]), []

    def flash(module, query, key, value, attention_mask, **options):
        seen.append(None if attention_mask is None else attention_mask.dim())
        return eager_attention(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS["flash_test"] = flash
    try:
        model.config._attn_implementation = "flash_test"
        rows = draw_rows(model, [(9, 1), (4, 2), (11, 3)])
        for inputs in (
            pack(model, rows),
            pack(model, rows, 9),
            pack(model, rows) | {"keep": torch.tensor([3, 10, 20])},
        ):
            try:
                hidden(model, **inputs)
            except ValueError as error:
                assert "flash" in str(error)
    finally:
        del ALL_ATTENTION_FUNCTIONS._local_mapping["flash_test"]
    assert set(seen) <= {None, 2}


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(variant, prefix, how):
    """Also the gradients of the prefix, which is no hidden state, and with `keep` and a trunk."""
    family, own = VARIANTS[variant]
    model = tiny_model(family, **own | PREFIXES[prefix] | {"prefix_dropout": 0.0}).train()
    rows = draw_rows(model, [(12, 1), (9, 2), (7, 3)])
    keep, calls = torch.tensor([3, 4, 11, 15, 27]), []
    decoder_layers(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def run():
        found = []
        for trunk in [None] if family in INFILLING else [None, 12]:
            out = hidden(model, **pack(model, rows, trunk), keep=keep)
            found += [out, *gradients(model, out.square().sum())]
        return found

    plain = run()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False} | RECOMPUTE[how]
    )
    once = len(calls)
    again = run()
    assert len(calls) == 3 * once  # it really recomputes
    for wanted, found in zip(plain, again, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    named = dict(model.transformer.named_parameters())
    moved = dict(zip(named, again[1:]))
    assert all(
        moved[name].abs().sum() > 0
        for name in named
        if "prefix_encoder" in name or re.search(r"(query_key_value|q_proj)\.weight", name)
    )


@pytest.mark.parametrize("prefix", ["plain", "v1"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_what_is_refused(variant, prefix):
    model = model_of(variant, prefix)
    rows = draw_rows(model, [(9, 1), (7, 2)])
    packed = pack(model, rows)
    twice = {name: torch.cat([packed[name]] * 2) for name in ("input_ids", "position_ids")}
    keep = torch.tensor([2])
    for inputs, said in (
        (twice, "positions fall back: put the sequences in one row"),
        (
            twice | {"position_ids": packed["position_ids"]},
            "positions fall back: put the sequences in one row",
        ),
        (twice | {"keep": keep}, "`keep` needs position_ids and one row"),
        (
            packed | {"keep": keep, "attention_mask": torch.ones(1, 16)},
            "`keep` needs .* without attention_mask or cache",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            hidden(model, **inputs)
    if family_of(model) in INFILLING:
        with pytest.raises(ValueError, match="cannot share a beginning"):
            pack(model, rows, 9)
    else:  # ChatGLM-6B finds its own
        with pytest.raises(ValueError, match="`keep` needs position_ids"):
            hidden(model, input_ids=packed["input_ids"], keep=keep)
        with pytest.raises(
            ValueError, match="fall back to 3, but the row's first sequence has 2 tokens"
        ):
            hidden(
                model,
                input_ids=packed["input_ids"][:, :8],
                position_ids=torch.tensor([[0, 1, 0, 1, 2, 3, 3, 4]]),
            )
    # one sequence a row, in several rows, is what it always was
    same = [
        torch.stack([ids, ids.flip(0)])
        if family_of(model) not in INFILLING
        else torch.stack([ids, ids])
        for ids in rows
    ]
    for ids in same:
        positions = torch.cat([pack(model, [x])["position_ids"] for x in ids])
        torch.testing.assert_close(
            hidden(model, input_ids=ids, position_ids=positions),
            hidden(model, input_ids=ids),
            **CLOSE,
        )


@pytest.mark.parametrize(
    "positions, said",
    [
        ([0, 1, 2, 0, 1, 7, 8], "positions jump from 1 to 7"),
        ([0, 1, 2, 5, 0, 1], "positions jump from 2 to 5"),
        ([2, 3, 4, 1, 2], "this row begins at 2"),
    ],
)
def test_p6_positions_that_jump_are_refused(positions, said):
    from chatglm.packing import find_sequences

    with pytest.raises(ValueError, match=said):
        find_sequences(torch.tensor(positions))


def test_p6_sequences_that_count_up_are_found():
    from chatglm.packing import find_sequences

    assert find_sequences(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0])) == ([4, 5, 1], [0, 0, 0])
    assert find_sequences(torch.tensor([0, 1, 2, 3, 2, 3, 4, 2, 3])) == ([4, 3, 2], [0, 2, 2])
    assert find_sequences(torch.tensor([5, 6, 7])) == ([3], [0])
