"""peft's methods on every family: what trains without named modules, padding, and reloading."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from chatglm import load_tokenizer
from chatglm.families import CHATGLM_FAMILIES
from tests.conftest import tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TEXTS = ["你好", "hello world 今天天气"]
WITHOUT_MODULES = {  # their configurations name no modules
    "LoRA": peft.LoraConfig(),
    "AdaLoRA": peft.AdaLoraConfig(total_step=10),
    "IA3": peft.IA3Config(),
    "VB-LoRA": peft.VBLoRAConfig(num_vectors=4, vector_length=4),
    "LN tuning": peft.LNTuningConfig(),
}
VIRTUAL = {
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prefix, MLP": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3),
    "P-Tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}


class Loaded:
    """A tiny model whose hidden size is a multiple of its heads, as the releases' is."""

    def __init__(self, folder):
        self.tokenizer = load_tokenizer(folder)
        self.family = self.tokenizer.family
        self.rows = [torch.tensor([self.tokenizer(text)["input_ids"]]) for text in TEXTS]

    def fresh(self):
        if self.family != "glm":
            return tiny_model(self.family, padded_vocab_size=400, hidden_size=48)
        tokens = {"mask": "[MASK]", "gmask": "[gMASK]", "bos": "<sop>", "eos": "<eop>"}
        ids = {f"{name}_token_id": self.tokenizer.get_command(t) for name, t in tokens.items()}
        return tiny_model("glm", vocab_size=400, **ids)

    def batch(self):
        longest = max(row.shape[1] for row in self.rows)
        ids = torch.full((len(self.rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(self.rows):
            ids[i, longest - row.shape[1] :], mask[i, longest - row.shape[1] :] = row[0], 1
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=CHATGLM_FAMILIES)
def loaded(request, tiny_folders):
    return Loaded(tiny_folders[request.param])


def check_method(loaded, config, folder):
    """Gradients in every trained tensor that has one, padded as alone, saved as read again."""
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    model = get_peft_model(loaded.fresh(), config)
    batch = loaded.batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.05 * torch.randn_like(parameter)
        model.eval()
        whole = model(**batch).logits
        for i, row in enumerate(loaded.rows):
            alone = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
            torch.testing.assert_close(whole[i, -1], alone[0, -1], **CLOSE)
        base = loaded.fresh()(**batch).logits
        assert (whole[:, -1] - base[:, -1]).abs().max() > 1e-3
    options = {"do_sample": False, "max_new_tokens": 1}
    first = model.generate(**batch, **options)[:, -1]
    assert torch.equal(first, whole[:, -1].argmax(-1))
    model.save_pretrained(str(folder))
    again = PeftModel.from_pretrained(loaded.fresh(), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, whole, **CLOSE)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("name", WITHOUT_MODULES)
def test_methods_without_named_modules(loaded, name, tmp_path):
    check_method(loaded, WITHOUT_MODULES[name], tmp_path)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens(loaded, name, tmp_path):
    if loaded.family == "glm" and name.startswith("prefix"):
        with pytest.raises(ValueError, match="this cache does not know its positions"):
            check_method(loaded, VIRTUAL[name], tmp_path)
        return
    check_method(loaded, VIRTUAL[name], tmp_path)


def test_ia3_scales_what_the_feed_forward_layer_reads(loaded):
    config = peft.IA3Config(task_type="CAUSAL_LM")
    model = get_peft_model(loaded.fresh(), config)
    scaled = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = model.config.num_layers
    assert sum("query_key_value" in name for name in scaled) == layers
    assert sum("mlp.dense_4h_to_h" in name for name in scaled) == layers
    for name, module in model.named_modules():
        if name.endswith("mlp.dense_4h_to_h"):
            assert module.is_feedforward
