"""Layers laid out for oneDNN compute what they were made of."""

import pytest
import torch
from torch import nn

from serving.engines import Sampling
from serving.engines.onednn_weights import OneDnnLinear, use_onednn_layout
from serving.engines.passes import report_of
from serving.policies.continuous import POLICIES
from tests.causal_folders import random_causal_model
from tests.conftest import VARIANTS, tiny_model
from tests.serving.engines.test_engines import engine_of, serve, some
from tests.serving.lora_folders import write_adapter

has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not has_bf16, reason="oneDNN has no bfloat16 on this CPU")
KINDS = ("glm", "glm2", "llama")


def model_of(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return random_causal_model("llama", vocab_size=100).to(torch.bfloat16)
    family, changes = VARIANTS[kind]
    return tiny_model(family, **changes).to(torch.bfloat16)


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_layer_computes_what_it_was_made_of(rows, bias):
    torch.manual_seed(rows)
    plain = nn.Linear(48, 80, bias=bias).bfloat16()
    x = torch.randn(2, rows, 48).bfloat16()
    torch.testing.assert_close(OneDnnLinear(plain)(x), plain(x))


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_plain_models(kind):
    plain, model = model_of(kind), model_of(kind)
    asked = some(plain, 5, 3)
    expected, _ = serve(engine_of("continuous", plain), POLICIES["fcfs"], asked)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert use_onednn_layout(model) == len(linear)
    engine = engine_of("continuous", model)
    answers, _ = serve(engine, POLICIES["fcfs"], asked)
    for i in asked:
        assert answers[i].tokens == expected[i].tokens
    before = report_of(engine_of("continuous", plain).runner.stage, plain).weight_bytes
    tied = model.get_input_embeddings().weight.nbytes if model.config.tie_word_embeddings else 0
    assert report_of(engine.runner.stage, model).weight_bytes == before + tied


@needs_bf16
def test_adapters_are_added(tmp_path):
    plain, model = model_of("glm2"), model_of("glm2")
    folder = write_adapter(tmp_path / "a", plain, 1, ("query_key_value", "dense"), 2)
    use_onednn_layout(model)
    answers = []
    for served in (plain, model):
        engine = engine_of("continuous", served)
        engine.adapters.load("a", folder)
        asked = {}
        for i, (prompt, sampling) in some(plain, 4, 5).items():
            asked[i] = prompt, Sampling(sampling.max_new_tokens, adapter="a")
        answers.append(serve(engine, POLICIES["fcfs"], asked)[0])
    for i, answer in answers[0].items():
        assert answers[1][i].tokens == answer.tokens


def test_other_layers_stay():
    """fp32, packed integers and what is no nn.Linear itself."""
    assert use_onednn_layout(tiny_model("glm2")) == 0
    quantised = tiny_model("glm2").quantize(8).to(torch.bfloat16)
    kept = {name: type(m) for name, m in quantised.named_modules() if "Quantized" in str(type(m))}
    use_onednn_layout(quantised)
    for name, kind in kept.items():
        assert type(quantised.get_submodule(name)) is kind
    assert kept
