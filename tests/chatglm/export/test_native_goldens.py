"""The original code's logits, by transformers' class on exported golden checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chatglm.export.folders import GlmExport
from chatglm.export.layout import glm_config
from tests.conftest import shared_file

CHECKPOINTS = {
    "golden/glm2": "glm2",
    "golden/glm3": "glm3",
    "golden/relatives/glm2_32k": "glm2",
    "golden/relatives/glm3_32k": "glm3",
    "golden/relatives/glm4": "glm4",
}


def exported_model(place, folder, family, dtype=None):
    export = GlmExport(folder, family, None)
    export.write_weights(place, dtype)
    ids = {"pad_token_id": 0, "eos_token_id": 2}
    (place / "config.json").write_text(json.dumps(glm_config(export.config) | ids))
    return AutoModelForCausalLM.from_pretrained(place).eval()


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_the_originals_logits(name, tmp_path):
    folder = shared_file(name)
    model = exported_model(tmp_path, folder / "checkpoint", CHECKPOINTS[name])
    golden = load_file(folder / "golden.safetensors")
    check_left(model, golden)
    if "far.input_ids" in golden:
        far = model(golden["far.input_ids"], position_ids=golden["far.position_ids"]).logits
        assert (far - golden["far.logits"]).abs().max() <= 2e-5


@pytest.mark.parametrize("bits", [4, 8])
@torch.inference_mode()
def test_the_originals_logits_of_quantised_releases(bits, tmp_path):
    folder = shared_file(f"golden/relatives/glm2_int{bits}")
    model = exported_model(tmp_path, folder / "checkpoint", "glm2", torch.float32)
    check_left(model, load_file(folder / "golden.safetensors"))


def check_left(model, golden):
    """The logits of a left-padded batch."""
    mask = golden["left.attention_mask"]
    logits = model(
        golden["left.input_ids"], attention_mask=mask, position_ids=golden["left.position_ids"]
    ).logits
    assert (logits - golden["left.logits"])[mask.bool()].abs().max() <= 2e-5
