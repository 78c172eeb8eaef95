"""Properties of the models at sizes that the fixtures lack, with random values in every tensor."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from chatglm.layers import inverse_frequencies
from tests.conftest import (
    INFILLING,
    LEARNED,
    SPECIAL,
    VARIANTS,
    decoder_layers,
    tiny_config,
    tiny_model,
)

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PREFIXES = {
    "plain": {},
    "v2": {"pre_seq_len": 4, "ptuning_version": "v2"},
    "v2-mlp": {"pre_seq_len": 4, "ptuning_version": "v2", "prefix_projection": True},
    "v1": {"pre_seq_len": 4, "ptuning_version": "v1"},
}
CHATGLM_LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
LINEAR = dict.fromkeys(("glm", "glm2", "glm3", "glm4", "glm_base"), CHATGLM_LINEAR)
LINEAR["pangu"] = ["q_proj", "c_proj", "c_fc", "k_proj", "v_proj"]
ROTARY = [name for name in VARIANTS if VARIANTS[name][0] not in LEARNED]
MODELS = {}


def model_of(variant, prefix="plain", **changes):
    """Cached: tests that change a model build their own with `tiny_model`."""
    key = (variant, prefix, *sorted(changes.items()))
    if key not in MODELS:
        family, own = VARIANTS[variant]
        MODELS[key] = tiny_model(family, **own | PREFIXES[prefix] | changes)
    return MODELS[key]


def family_of(model):
    return model.config.glm_family


def row(family, length, seed=0, answer=None):
    """One row of `length` >= 4 ids; ChatGLM-6B's is text, [gMASK], <sop> and `answer` ids."""
    ids = torch.randint(6, 50, (length,), generator=torch.Generator().manual_seed(seed))
    if family in INFILLING:
        answer = length // 3 if answer is None else answer
        ids[length - answer - 2] = SPECIAL["gmask"]
        ids[length - answer - 1] = SPECIAL["sop"]
    return ids


def pad(rows, side):
    ids = pad_sequence(rows, batch_first=True, padding_value=3, padding_side=side)
    real = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    return ids, real


def prompt_rows(family, *lengths):
    return [row(family, length, seed=length, answer=0) for length in lengths]


def step_logits(model, ids, cuts, give):
    """Logits of a row fed in chunks that end at `cuts`.

    `give` names what the caller passes with each.
    """
    cache, logits, start = None, [], 0
    for end in cuts:
        inputs = {}
        if "positions" in give:
            if family_of(model) in INFILLING:
                inputs["position_ids"] = model.transformer.count_positions(ids)[..., start:end]
            else:
                inputs["position_ids"] = torch.arange(start, end)[None]
        if "mask" in give:
            inputs["attention_mask"] = torch.ones(1, end, dtype=torch.long)
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **inputs)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


# ---- the same row, however it is fed


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_decoding_equals_one_forward(variant, prefix, attn):
    model = model_of(variant, prefix)
    model.set_attn_implementation(attn)
    ids = row(family_of(model), 14, answer=8)[None]
    whole = model(ids, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, whole, **CLOSE)  # and sdpa equals eager
    model.set_attn_implementation(attn)
    first = (
        6 if family_of(model) in INFILLING else 1
    )  # its context is bidirectional, so it goes in whole
    for cuts, give in (
        (range(first, 15), ()),
        (range(first, 15), ("mask", "positions")),
        ((6, 10, 14), ()),
        ((6, 10, 14), ("mask",)),
        ((7, 8, 14), ("positions",)),
        ((7, 8, 14), ("mask", "positions")),
    ):
        torch.testing.assert_close(step_logits(model, ids, cuts, give), whole, **CLOSE)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_changes_no_real_token(variant, prefix):
    model = model_of(variant, prefix)
    rows = [row(family_of(model), length, seed=length) for length in (5, 12, 9)]
    alone = torch.cat([model(ids[None]).logits[0] for ids in rows])
    for side in ("left", "right"):
        ids, real = pad(rows, side)
        for attn in ("sdpa", "eager"):
            model.set_attn_implementation(attn)
            torch.testing.assert_close(
                model(ids, attention_mask=real).logits[real.bool()], alone, **CLOSE
            )
    model.set_attn_implementation("sdpa")
    # training pads on the right and gives no mask: nothing real looks right
    torch.testing.assert_close(model(ids).logits[real.bool()], alone, **CLOSE)


SHAPES = st.integers(4, 24).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n - 2))
)  # length, answer


@settings(max_examples=60, deadline=None, database=None)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    prefix=st.sampled_from(list(PREFIXES)),
    seed=st.integers(0, 999),
    shapes=st.lists(SHAPES, min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    steps=st.integers(0, 3),
)
@torch.no_grad()
def test_any_batch_equals_its_rows(variant, prefix, seed, shapes, side, steps):
    """Rows of any length, padded on any side, then decoded on from the cache."""
    model = model_of(variant, prefix)
    rows = [row(family_of(model), n, seed + i, answer=a) for i, (n, a) in enumerate(shapes)]
    tails = torch.randint(6, 50, (len(rows), steps), generator=torch.Generator().manual_seed(seed))
    ids, real = pad(rows, side)
    cache, got = None, []
    for step in range(steps + 1):
        out = model(ids, attention_mask=real, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits[real.bool()] if step == 0 else out.logits[:, 0])
        ids = tails[:, step : step + 1]
        real = torch.cat([real, torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
    wanted = [
        model(torch.cat([ids, tail])[None]).logits[0] for ids, tail in zip(rows, tails, strict=True)
    ]
    torch.testing.assert_close(got[0], torch.cat([w[: len(w) - steps] for w in wanted]), **CLOSE)
    for step in range(1, steps + 1):
        torch.testing.assert_close(
            got[step], torch.stack([w[len(w) - steps + step - 1] for w in wanted]), **CLOSE
        )


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_embeddings_in_place_of_ids_and_logits_to_keep(variant, prefix):
    model = model_of(variant, prefix)
    family, body = family_of(model), model.transformer
    ids = row(family, 10)[None]
    whole = model(ids).logits
    positions = {"position_ids": body.count_positions(ids)} if family in INFILLING else {}
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, **positions).logits, whole, **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], **CLOSE)
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]], **CLOSE
    )
    assert model.base_model is body
    hidden = body(ids).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), whole, **CLOSE)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": hidden}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)
    with pytest.raises(ValueError, match="must cover all 10 positions"):
        model(ids, attention_mask=torch.ones(1, 7))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", [name for name in PREFIXES if name != "v1"])
def test_a_cache_of_fixed_size_gives_the_same_answers(variant, prefix):
    model = model_of(variant, prefix)
    rows = prompt_rows(family_of(model), 5, 7)
    fixed = generate(model, rows, 3, cache_implementation="static")
    assert fixed == generate(model, rows, 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_cache_of_fixed_size_cannot_hold_is_refused(variant):
    model = model_of(variant, "v1")
    with pytest.raises(ValueError, match="P-Tuning v1 needs a cache that grows"):
        generate(model, prompt_rows(family_of(model), 5, 7), 3, cache_implementation="static")


@torch.no_grad()
def test_glm_says_what_its_rows_lack():
    model = model_of("glm")
    good = row("glm", 8)
    for lost, named in ((SPECIAL["sop"], "<sop>"), (SPECIAL["gmask"], "gMASK")):
        ids = torch.stack([good, torch.where(good == lost, 7, good)])
        with pytest.raises(ValueError, match=rf"row 1 .*{named}"):
            model(ids)
    embeds = model.get_input_embeddings()(good[None])
    with pytest.raises(ValueError, match="row 0 .*<sop>.*give position_ids"):
        model(inputs_embeds=embeds + 1)
    with pytest.raises(ValueError, match=r"position_ids are \(B, 2, S\), got \[1, 7\]"):
        model(good[None], position_ids=torch.arange(7)[None])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_prompt_tuning_v1_is_embeddings_put_in_front(variant):
    tuned, plain = model_of(variant, "v1"), tiny_model(VARIANTS[variant][0], **VARIANTS[variant][1])
    plain.load_state_dict(tuned.state_dict(), strict=False)
    family, vectors = family_of(tuned), tuned.transformer.prefix_encoder.embedding.weight
    rows = prompt_rows(family, 6, 9)
    for ids in rows:
        embeds = torch.cat([vectors, plain.get_input_embeddings()(ids)])[None]
        own = torch.arange(len(embeds[0]))[None]
        if family in INFILLING:  # places move by P, block positions do not
            counted = plain.transformer.count_positions(ids[None]) + torch.tensor([4, 0])[:, None]
            own = torch.cat(
                [torch.stack([torch.arange(4), torch.zeros(4, dtype=torch.long)])[None], counted],
                dim=-1,
            )
        wanted = plain(inputs_embeds=embeds, position_ids=own).logits[:, 4:]
        torch.testing.assert_close(tuned(ids[None]).logits, wanted, **CLOSE)
        # greedy steps by hand, without a cache, against generate
        more = ids.tolist()
        for _ in range(6):
            full = torch.tensor([more])
            positions = own
            if family in INFILLING:
                positions = plain.transformer.count_positions(full) + torch.tensor([4, 0])[:, None]
                positions = torch.cat([own[..., :4], positions], dim=-1)
            else:
                positions = torch.arange(4 + len(more))[None]
            embeds = torch.cat([vectors, plain.get_input_embeddings()(full[0])])[None]
            more.append(
                plain(inputs_embeds=embeds, position_ids=positions).logits[0, -1].argmax().item()
            )
        assert generate(tuned, [ids], 6)[0] == more[len(ids) :]


# ---- generation


def generate(model, rows, count, **options):
    """New ids of each row (num_return_sequences rows of each), as one left-padded batch."""
    ids, real = pad(rows, "left")
    options = {
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": 10**6,
        "pad_token_id": 3,
    } | options
    return model.generate(ids, attention_mask=real, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_generation_equals_single(variant, prefix):
    model = model_of(variant, prefix)
    rows = prompt_rows(family_of(model), 5, 11, 8)
    single = [generate(model, [ids], 8)[0] for ids in rows]
    assert generate(model, rows, 8) == single
    greedy = []
    for ids in rows:  # a plain loop without a cache
        for _ in range(8):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        greedy.append(ids[-8:].tolist())
    assert greedy == single

    beams = {"num_beams": 3, "num_return_sequences": 2}
    searched = generate(model, rows, 8, **beams)
    assert len(searched) == 6 and searched == generate(model, rows, 8, use_cache=False, **beams)
    assert searched[2:4] == generate(model, rows[1:2], 8, **beams)
    torch.manual_seed(0)
    assert len(generate(model, rows, 3, do_sample=True, num_return_sequences=3)) == 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_from_embeddings_and_stop_ids(variant):
    model = model_of(variant)
    ids = prompt_rows(family_of(model), 7)[0][None]
    wanted = generate(model, list(ids), 6)[0]
    positions = (
        {"position_ids": model.transformer.count_positions(ids)}
        if family_of(model) in INFILLING
        else {}
    )
    embeds = model.get_input_embeddings()(ids)
    made = model.generate(
        inputs_embeds=embeds, **positions, max_new_tokens=6, do_sample=False, eos_token_id=10**6
    )
    assert made[0].tolist() == wanted
    stop = wanted[2]
    assert (
        generate(model, list(ids), 6, eos_token_id=[58, stop])[0]
        == wanted[: wanted.index(stop) + 1]
    )


# ---- what transformers expects of a model


@pytest.mark.parametrize("prefix", ["plain", "v2", "v1"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hidden_states_and_attentions(variant, prefix):
    family, own = VARIANTS[variant]
    model = tiny_model(family, "eager", **own | PREFIXES[prefix])
    ids = row(family, 9)[None]
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    length = 13 if prefix == "v1" else 9  # v1's vectors are positions of every block
    assert {h.shape[1] for h in out.hidden_states[:-1]} == {length} and out.hidden_states[-1].shape[
        1
    ] == 9
    if family not in LEARNED:  # which add positions
        torch.testing.assert_close(out.hidden_states[0][:, -9:], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    keys = 9 if prefix == "plain" else 13
    for weights in out.attentions:
        assert weights.shape == (1, 6, length, keys)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, length))
        if family not in INFILLING:
            assert not weights[..., keys - length :].triu(1).any()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_embeddings_get_set_and_resize(variant):
    family, own = VARIANTS[variant]
    model = tiny_model(family, **own)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ("glm", *LEARNED))
    ids = row(family, 8)[None]
    before = model(ids).logits
    model.resize_token_embeddings(66, mean_resizing=False)
    assert model.config.vocab_size == 66 and model.get_output_embeddings().weight.shape[0] == 66
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(model(ids).logits[..., :60], before)
    assert model(ids, labels=ids).loss > 0
    other = torch.nn.Embedding(66, model.config.hidden_size)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    head = torch.nn.Linear(model.config.hidden_size, 66)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(variant, prefix, lora):
    family, own = VARIANTS[variant]
    ids, real = pad([row(family, 12), row(family, 9)], "right")
    labels = torch.where(real.bool(), ids, -100)

    def gradients(checkpointing):
        model = tiny_model(family, **own | PREFIXES[prefix] | {"prefix_dropout": 0.0})
        if lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            targets = LINEAR[family][:3]
            model = get_peft_model(
                model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            )
            if prefix != "plain":
                model.base_model.model.transformer.prefix_encoder.requires_grad_(True)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        blocks = decoder_layers(model)
        blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        out = model(ids, labels=labels)
        out.loss.backward()
        assert len(calls) == 1 + checkpointing  # it really recomputes
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    unused = {name for name, grad in plain.items() if grad is None}
    assert not unused
    assert any(
        "prefix_encoder" in name and grad.abs().sum() > 0 for name, grad in plain.items()
    ) == (prefix != "plain")
    for name, grad in plain.items():
        torch.testing.assert_close(
            checkpointed[name], grad, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", ROTARY)
@torch.no_grad()
def test_half_precision_runs_and_keeps_fp32_angles(variant):
    family, own = VARIANTS[variant]
    exact = model_of(variant)
    ids = row(family, 12)[None]
    wanted = exact(ids).logits
    place = torch.arange(290, 700)
    positions = torch.stack([place, place - 290])[None] if family in INFILLING else place[None]
    for dtype in (torch.bfloat16, torch.float16):
        half = tiny_model(family, **own).to(dtype)
        logits = half(ids).logits
        assert logits.dtype == dtype and logits.isfinite().all()
        assert (logits.float() - wanted).norm() / wanted.norm() < (
            0.05 if dtype == torch.bfloat16 else 0.02
        )
        seen = []
        blocks = half.transformer.layers if family in INFILLING else half.transformer.encoder.layers
        attention = blocks[-1].attention if family in INFILLING else blocks[-1].self_attention
        hook = attention.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[2])
        )
        embeds = torch.zeros(1, 410, half.config.hidden_size, dtype=dtype)
        half(inputs_embeds=embeds, position_ids=positions)
        hook.remove()
        assert seen[0].dtype == torch.complex64
        if family in INFILLING:
            inv_freq = (
                inverse_frequencies(4, "cpu").half().double()
            )  # as the released weights were trained
            tables = [(place[:, None] * inv_freq), (place - 290)[:, None] * inv_freq]
        else:
            base = 10000.0 * (own.get("rope_ratio", 1) if family in ("glm3", "glm4") else 1)
            tables = [place[:, None].double() / base ** (torch.arange(0, 4, 2).double() / 4)]
        for turns, table in zip(seen[0][0, :, 0].chunk(len(tables), -1), tables):
            assert (turns.real - table.cos()).abs().max() < 1e-4 and (
                turns.imag - table.sin()
            ).abs().max() < 1e-4


def test_rope_ratio_stretches_positions_in_glm2_and_the_base_in_glm3():
    positions = torch.arange(50)[None]
    glm2 = tiny_model("glm2", rope_ratio=8).transformer.rotary(positions).real
    torch.testing.assert_close(
        glm2[:, ::8], tiny_model("glm2").transformer.rotary(positions).real[:, :7]
    )
    glm3 = tiny_model("glm3", rope_ratio=8).transformer.rotary(positions).real
    assert not torch.allclose(glm2, glm3)
    torch.testing.assert_close(glm3[0, :, 1], torch.cos(positions[0] / (80000.0**0.5)))


@torch.no_grad()
def test_without_multi_query_attention_each_head_has_its_own_query_key_and_value():
    """Fused q, k, v as in ChatGLM-6B; with groups the layout is all q, all k, all v.

    That also holds for as many groups as heads.
    """
    model = tiny_model("glm2", multi_query_attention=False)
    grouped = tiny_model("glm2", multi_query_group_num=6)
    state = model.state_dict()
    for name in state:
        if "query_key_value" in name:
            state[name] = state[name].unflatten(0, (6, 3, 8)).transpose(0, 1).flatten(0, 2)
    grouped.load_state_dict(state)
    ids = row("glm2", 10)[None]
    torch.testing.assert_close(model(ids).logits, grouped(ids).logits, **CLOSE)


# ---- folders


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_saving_and_loading_through_the_auto_classes(variant, prefix, tmp_path):
    model = model_of(variant, prefix)
    ids = row(family_of(model), 9)[None]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = LEARNED.get(family_of(model), ("chatglm", "ChatGLMModel"))
    assert (config["model_type"], *config["architectures"]) == wanted
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    differ = {
        key for key, value in again.config.to_dict().items() if model.config.to_dict()[key] != value
    }
    assert differ <= {"architectures", "_name_or_path"}
    assert torch.equal(again(ids).logits, model(ids).logits)
    body = AutoModel.from_pretrained(tmp_path).transformer
    assert torch.equal(body(ids).last_hidden_state, model.transformer(ids).last_hidden_state)
    assert again.dtype == torch.float32
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("variant", ROTARY)
@torch.no_grad()
def test_sharded_bin_with_old_rotary_tables(variant, tmp_path):
    model = model_of(variant)
    model.config.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    wrong = torch.full((4,), 7.0)  # must not be used, whatever it holds
    if family_of(model) in INFILLING:
        state |= {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": wrong for i in range(3)}
    else:
        state["transformer.rotary_pos_emb.inv_freq"] = wrong
    names, files = sorted(state), [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for i, file in enumerate(files):
        torch.save({name: state[name].clone() for name in names[i::2]}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = row(family_of(model), 9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not re.search("inv_freq", " ".join(again.state_dict()))


def test_fresh_weights_are_the_originals(tmp_path):
    """A prefix added to a checkpoint is initialised as torch's layers are.

    Dropout in training only.
    """
    base = model_of("glm2")
    base.save_pretrained(tmp_path)
    for name, width in (("v2", 2 * 3 * 3 * 8), ("v2-mlp", 2 * 3 * 3 * 8), ("v1", 40)):
        config = tiny_config("glm2", **PREFIXES[name] | {"pre_seq_len": 200})
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        encoder = model.transformer.prefix_encoder
        assert encoder.embedding.weight.shape == (200, width)
        assert encoder.embedding.weight.std().item() == pytest.approx(
            0.02 if name == "v1" else 1.0, rel=0.1
        )
        if name == "v2-mlp":
            assert encoder.trans[0].weight.abs().max().item() == pytest.approx(
                width**-0.5, rel=0.05
            )
        assert torch.equal(
            model.get_output_embeddings().weight, base.get_output_embeddings().weight
        )
        if name != "v1":
            model.eval()
            assert torch.equal(encoder(2), encoder(2)) and torch.equal(
                encoder(2)[:, 0], encoder(2)[:, 1]
            )
            model.train()
            assert 0.05 < (encoder(2) == 0).float().mean() < 0.15


# ---- training with the library's own loop


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer_trains(variant, tmp_path):
    """Two micro-batches with unequal label counts: the loss is the mean over the labels of both."""
    family, own = VARIANTS[variant]
    model = tiny_model(family, **own)
    data = []
    for length in (16, 6) * 6:
        ids = row(family, length, seed=length)
        data.append(
            {"input_ids": ids, "labels": torch.where(torch.arange(length) > length // 2, ids, -100)}
        )
    with torch.no_grad():
        shifted = [(model(r["input_ids"][None]).logits[0, :-1], r["labels"][1:]) for r in data[:2]]
    wanted = torch.nn.functional.cross_entropy(
        *(torch.cat(parts) for parts in zip(*shifted, strict=True))
    ).item()

    def collate(rows):
        ids, real = pad([r["input_ids"] for r in rows], "right")
        labels = pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": real, "labels": labels}

    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer._get_train_sampler = lambda *_: None  # in order
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    assert losses[0] == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_of_every_linear_layer_merges_to_the_same_logits(variant, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    family, own = VARIANTS[variant]
    targets = LINEAR[family]
    torch.manual_seed(0)
    options = LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_model(family, **own), options).eval()
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    assert adapted == (18 if family == "pangu" else 12)  # its two c_proj, and q, k, v apart
    rows = prompt_rows(family, 6, 9)
    ids = rows[1][None]
    with torch.no_grad():
        logits = model(ids).logits
        assert not torch.allclose(logits, model_of(variant)(ids).logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family, **own), tmp_path).eval()
    new = generate(model, rows, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-3)
    assert generate(merged, rows, 6) == new
