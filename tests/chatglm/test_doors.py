"""The snippets that users of the originals have, on folders laid out as the releases are."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
)

from chatglm.families import FAMILIES
from chatglm.loading import load_model, load_tokenizer
from chatglm.modeling_base import ChatGLMCausalLM
from chatglm.multi_gpu import auto_configure_device_map, load_model_on_gpus

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# What of the releases' code tells the family; the code itself raises when it is run.
CODE_SIGNS = {"glm": "ice_text.model", "glm2": "", "glm3": "<|user|>", "glm4": "tiktoken"}
GREEDY = {"do_sample": False, "max_new_tokens": 4}


def publish(source, folder, family):
    """A folder as the releases are: auto_map, code, sharded fp16 .bin, no generation_config."""
    folder.mkdir()
    shutil.copy(source / FAMILIES[family].tokenizer_file, folder)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config = {key: value for key, value in config.items() if key not in ("glm_family", "dtype")}
    config |= {"auto_map": AUTO_MAP, "_name_or_path": "THUDM/model", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}
    tokenizer["tokenizer_class"] = "ChatGLM4Tokenizer" if family == "glm4" else "ChatGLMTokenizer"
    if family == "glm":
        tokenizer["num_image_tokens"] = 0
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for kind in ("configuration", "modeling", "tokenization"):
        code = f"raise SystemExit('code of the folder ran')  # {CODE_SIGNS[family]}\n"
        (folder / f"{kind}_chatglm.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text("raise SystemExit('code ran')\n")
    state = load_model(source).half().state_dict()
    if family == "glm":
        state.pop("lm_head.weight")
    names = sorted(state)
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {}
    for i, file in enumerate(files):
        torch.save({name: state[name].clone() for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def published(tiny_folders, tmp_path_factory):
    parent = tmp_path_factory.mktemp("published")
    return {family: publish(tiny_folders[family], parent / family, family) for family in FAMILIES}


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_snippet_of_every_release(published, family, auto):
    folder = str(published[family])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = auto.from_pretrained(folder, trust_remote_code=True, device="cpu", empty_init=False)
    assert isinstance(model, ChatGLMCausalLM) and model.dtype == torch.float16
    model = model.half().float().to("cpu").eval()
    assert tokenizer.family == family and model.config.glm_family == family
    answer, history = model.chat(tokenizer, "你好", history=[], **GREEDY)
    wanted = load_model(folder, dtype=torch.float32)
    said, wanted_history = wanted.chat(load_tokenizer(folder), "你好", history=[], **GREEDY)
    assert (answer, history) == (said, wanted_history)
    *_, last = model.stream_chat(tokenizer, "今天", history=history, **GREEDY)
    assert last[:2] == wanted.chat(tokenizer, "今天", history=history, **GREEDY)
