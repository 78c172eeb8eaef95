"""Adapters: folded into the exported model as merge_lora.py does, or converted beside it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatglm import load_model
from chatglm.checksums import write_checksums
from chatglm.export.command import main
from chatglm.export.folders import export_glm
from merge_lora import merge
from tests.chatglm.export.outside import make_release, read_json, run_outside

LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TARGETS = {
    "query_key_value": ["query_key_value"],
    "layers": LAYERS,
    "all": [*LAYERS, "output_layer"],
}
OPENED = """
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(5, 25)[None]
with torch.inference_mode():
    plain = model(ids).logits
    adapted = PeftModel.from_pretrained(model, f"{sys.argv[1]}/adapter").eval()(ids).logits
save_file({"plain": plain, "adapted": adapted}, sys.argv[2])
"""


def make_adapter(base, folder, targets="all", **options):
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=TARGETS[targets], init_lora_weights=False, **options
    )
    adapted = get_peft_model(load_model(base, dtype=torch.float32), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=["glm2-32k", "glm4"])
def trained(request, tmp_path_factory):
    """(base, adapter of all its layers)."""
    place = tmp_path_factory.mktemp("trained")
    base = make_release(place / "base", request.param)
    rank = {"rank_pattern": {"dense": 2}, "alpha_pattern": {"dense_h_to_4h": 5}}
    return base, make_adapter(base, place / "adapter", **rank)


def test_folded_weights_are_those_of_merge_lora(trained, tmp_path):
    base, adapter = trained
    assert main([str(adapter), "--to", "glm", "--output", str(tmp_path / "folded")]) == 0
    merge(base, adapter, tmp_path / "merged")
    export_glm(tmp_path / "merged", tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted/model.safetensors")
    found = load_file(tmp_path / "folded/model.safetensors")
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name
    config = read_json(tmp_path / "folded/config.json")
    assert config == read_json(tmp_path / "wanted/config.json")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        adapted, plain = load_model(adapter)(ids).logits, load_model(base)(ids).logits
        logits = load_model(tmp_path / "folded")(ids).logits
    assert (logits - adapted).abs().max() <= 3e-5 < (plain - adapted).abs().max()


@pytest.mark.slow
def test_a_converted_adapter_equals_ours_outside(trained, tmp_path):
    base, adapter = trained
    output = tmp_path / "out"
    assert main([str(adapter), "--to", "glm", "--output", str(output), "--keep_adapter"]) == 0
    run_outside(OPENED, tmp_path, output, tmp_path / "found")
    found = load_file(tmp_path / "found")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert (load_model(base)(ids).logits - found["plain"]).abs().max() <= 1e-5
        wanted = load_model(adapter)(ids).logits
        assert (wanted - found["adapted"]).abs().max() <= 3e-5
        # merged == adapted
        model = AutoModelForCausalLM.from_pretrained(output)
        merged = PeftModel.from_pretrained(model, str(output / "adapter")).merge_and_unload()
        assert (merged(ids).logits - wanted).abs().max() <= 3e-5
    config = read_json(output / "adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str(output)


def test_query_key_value_becomes_three_layers_of_one_a(trained, tmp_path):
    base, _ = trained
    adapter = make_adapter(base, tmp_path / "adapter", "query_key_value")
    export_glm(adapter, tmp_path / "out", keep_adapter=True)
    config = read_json(tmp_path / "out/adapter/adapter_config.json")
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    state = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    ours = load_file(adapter / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1.self_attn."
    fused = "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value."
    rows = []
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(state[f"{layer}{name}.lora_A.weight"], ours[f"{fused}lora_A.weight"])
        rows.append(state[f"{layer}{name}.lora_B.weight"])
    assert torch.equal(torch.cat(rows), ours[f"{fused}lora_B.weight"])


def test_a_half_precision_base_is_merged_in_fp32(tmp_path):
    base = make_release(tmp_path / "base", "glm2")
    half = {name: t.half() for name, t in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", "query_key_value")
    export_glm(adapter, tmp_path / "folded")
    name = "transformer.encoder.layers.0.self_attention.query_key_value"
    state = load_file(adapter / "adapter_model.safetensors")
    a = state[f"base_model.model.{name}.lora_A.weight"]
    b = state[f"base_model.model.{name}.lora_B.weight"]
    wanted = (half[f"{name}.weight"].float() + (b @ a) * (7 / 3)).half()
    found = load_file(tmp_path / "folded/model.safetensors")
    parts = [
        found[f"model.layers.0.self_attn.{part}.weight"] for part in ["q_proj", "k_proj", "v_proj"]
    ]
    assert torch.equal(torch.cat(parts), wanted)


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_adapters_that_cannot_be_exported(tmp_path, capsys):
    base = make_release(tmp_path / "base", "glm2")
    to_glm = ("--to", "glm", "--output", tmp_path / "out")
    idle = make_adapter(base, tmp_path / "idle", "query_key_value")
    state = load_file(idle / "adapter_model.safetensors")
    zero = {name: t * ("lora_A" in name) for name, t in state.items()}
    save_file(zero, idle / "adapter_model.safetensors", {"format": "pt"})
    assert "changes nothing" in refused(capsys, idle, *to_glm)
    dora = make_adapter(base, tmp_path / "dora", "query_key_value", use_dora=True)
    assert "lora_magnitude_vector" in refused(capsys, dora, *to_glm)
    other = make_release(tmp_path / "other", "glm3")
    plain = make_adapter(base, tmp_path / "plain", "query_key_value")
    note = {"format_version": 1, "base_model": {"fingerprint": "0" * 64, "name_or_path": "x"}}
    (plain / "manifest.json").write_text(json.dumps(note))
    assert "fingerprints differ" in refused(capsys, plain, *to_glm)
    (plain / "manifest.json").unlink()
    write_checksums(plain)
    file = plain / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "adapter_model.safetensors" in refused(capsys, plain, *to_glm)
    file.write_bytes(whole)
    assert "mode 'glm3' does not fit" in refused(capsys, plain, *to_glm, "--mode", "glm3")
    packed = load_model(other).half().quantize(8)
    packed.save_pretrained(tmp_path / "packed")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "packed" / file).write_bytes((other / file).read_bytes())
    of_packed = make_adapter(other, tmp_path / "of", "query_key_value")
    message = refused(capsys, of_packed, *to_glm, "--base", tmp_path / "packed")
    assert "merged into the fp16 release" in message
    assert "convert it" in refused(capsys, plain, "--to", "chatglm", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
