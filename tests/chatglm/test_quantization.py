"""Published int8 and int4 folders against the originals' goldens, and `quantize`."""

import json
import shutil
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatglm import load_model, load_tokenizer
from chatglm.families import FAMILIES
from chatglm.quantization import (
    BITS,
    QuantizedLinear,
    dequantize_rows,
    pack_pairs,
    quantize_rows,
    unpack_pairs,
)
from tests.conftest import shared_file

RELEASES = {
    "glm_int4": "glm",
    "glm_int8": "glm",
    "glm_int4_qe": "glm",
    "glm2_int4": "glm2",
    "glm2_int8": "glm2",
}
LOGITS = 5e-5


@cache
def golden(name):
    return load_file(shared_file(f"golden/relatives/{name}") / "golden.safetensors")


def folder_of(name):
    return shared_file(f"golden/relatives/{name}/checkpoint")


def bin_folder(name, target):
    """The release as it was published: one pytorch_model.bin."""
    shutil.copytree(folder_of(name), target)
    state = load_file(target / "model.safetensors")
    torch.save(state, target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return target


@pytest.fixture(scope="module")
def models():
    """{(release, kept packed): model in fp32}."""
    made = {}
    for name, family in RELEASES.items():
        for kept in (False, True):
            options = {"mode": family, "dtype": torch.float32, "keep_quantized": kept}
            made[name, kept] = load_model(folder_of(name), **options)
    return made


@pytest.mark.parametrize("kept", [False, True], ids=["dequantised", "packed"])
@pytest.mark.parametrize("name", RELEASES)
def test_release_computes_what_the_original_does(models, name, kept):
    tensors, model = golden(name), models[name, kept]
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert bool(packed) == kept
    assert model.config.quantization_bit == ((4 if "int4" in name else 8) if kept else None)
    with torch.no_grad():
        logits = model(tensors["hidden.input_ids"]).logits
        assert (logits - tensors["hidden.logits"]).abs().max() < LOGITS
        mask = tensors["left.attention_mask"]
        real = mask.bool() if mask.dim() == 2 else mask[:, 0, -1] == 0
        inputs = {"attention_mask": mask, "position_ids": tensors["left.position_ids"]}
        logits = model(tensors["left.input_ids"], **inputs).logits
        assert (logits[real] - tensors["left.logits"][real]).abs().max() < LOGITS
    prompt = tensors["gen.0.prompt"]
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=10**6)
    assert torch.equal(made[:, prompt.shape[1] :], tensors["gen.0.new_ids"])


@pytest.mark.parametrize("name", RELEASES)
def test_dequantised_matrices_are_the_originals(models, name):
    state = models[name, False].state_dict()
    compared = 0
    for key, wanted in golden(name).items():
        if key.startswith("dequant."):
            assert torch.equal(state[key.removeprefix("dequant.")], wanted), key
            compared += 1
    assert compared > 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["glm", "glm2", "glm3"])
def test_integers_and_scales_are_the_originals(family, bits):
    tensors = load_file(shared_file(f"golden/{family}") / "golden.safetensors")
    compared = 0
    for dtype in ("float16", "float32"):
        start = f"quant.{dtype}.int{bits}"
        weight = tensors["quant.weight"].to(getattr(torch, dtype))
        rounded = torch.float16 if family == "glm" else None
        integers, scale = quantize_rows(weight, bits, rounded)
        assert torch.equal(integers, tensors[f"{start}.weight"])
        assert torch.equal(scale, tensors[f"{start}.scale"])
        widened = dequantize_rows(integers, scale, bits, torch.float16)
        assert torch.equal(widened, tensors[f"{start}.dequant"])
        compared += 1
    assert compared


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40))
def test_pairs_come_back(values):
    integers = torch.tensor(values[: len(values) // 2 * 2], dtype=torch.int8)[None]
    assert torch.equal(unpack_pairs(pack_pairs(integers)), integers)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_weight_is_half_a_step_away(bits):
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    integers, scale = quantize_rows(weight, bits)
    assert integers.shape == (7, 12 if bits == 8 else 6)
    difference = (dequantize_rows(integers, scale, bits, torch.float32) - weight).abs()
    assert (difference <= scale[:, None] / 2 + 1e-6).all()
    assert torch.equal(difference[3], torch.zeros(12))


@pytest.mark.parametrize("family", ["glm", "glm2", "glm4"])
@pytest.mark.parametrize("bits", BITS)
def test_quantize_saves_what_loads_again(tiny_folders, family, bits, tmp_path):
    model = load_model(tiny_folders[family])
    tokenizer = load_tokenizer(tiny_folders[family])
    ids = torch.tensor([FAMILIES[family].encode_chat(tokenizer, "你好 world")])
    plain = model(ids).logits
    assert model.quantize(bits) is model
    logits = model(ids).logits
    assert 0 < (logits - plain).abs().max() < (0.1 if bits == 8 else 2) * plain.abs().max()
    with pytest.raises(ValueError, match=f"in {bits} bits already"):
        model.quantize(bits)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == bits
    packed = load_model(tmp_path, mode=family, keep_quantized=True)
    assert torch.equal(packed(ids).logits, logits)
    widened = load_model(tmp_path, mode=family)
    assert torch.allclose(widened(ids).logits, logits, atol=1e-4)
    widened.save_pretrained(tmp_path / "plain")
    assert "quantization_bit" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("name", ["glm_int4_qe", "glm2_int4"])
def test_published_form_loads_through_the_auto_class(name, tmp_path):
    folder = bin_folder(name, tmp_path / "chatglm")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = golden(name)
    with torch.no_grad():
        logits = model(tensors["hidden.input_ids"]).logits
    assert (logits - tensors["hidden.logits"]).abs().max() < LOGITS
    assert model.config.quantization_bit is None


def test_what_does_not_fit_is_one_line(tmp_path):
    folder = shutil.copytree(folder_of("glm2_int4"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def refusal(**changes):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError) as error:
            load_model(folder, mode="glm2")
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        return str(error.value)

    assert "its config.json has no quantization_bit" in refusal(quantization_bit=0)
    assert "quantization_bit must be 4 or 8, got 3" in refusal(quantization_bit=3)
    assert "config.json asks for" in refusal(quantization_bit=8)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised already .* fp16 release"):
        load_model(folder, mode="glm2", quantization_bit=4)
    state = load_file(folder / "model.safetensors")
    first = next(name for name in state if name.endswith("weight_scale"))
    save_file({n: t for n, t in state.items() if n != first}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"lack 1 tensors, the first is {first}"):
        load_model(folder, mode="glm2")
    with pytest.raises(ValueError, match="must be 4 or 8, got 2"):
        quantize_rows(torch.ones(2, 2), 2)
    with pytest.raises(ValueError, match="packed in pairs"):
        quantize_rows(torch.ones(2, 3), 4)
