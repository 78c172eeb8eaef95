"""Tiny checkpoints of every kind that people have, laid out as they were published."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from chatglm.families import FAMILIES
from chatglm.loading import load_model, load_tokenizer
from tests.causal_folders import KINDS, make_causal_folder

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# What of the releases' code tells the family; the code itself raises when it is run.
CODE_SIGNS = {"glm": "ice_text.model", "glm2": "", "glm3": "<|user|>", "glm4": "tiktoken"}


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


def change_config(folder, **changes):
    """Other values in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))
    return folder


def publish_packed(source, folder, family):
    """An int4 release: packed weights, quantization_bit in config.json, code beside them."""
    publish(source, folder, family)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    packed = load_model(source).half().quantize(4)
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return change_config(folder, quantization_bit=4)


def publish_adapter(base, folder):
    """A LoRA of peft, with updates that change what the model says."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    adapted = get_peft_model(load_model(base, dtype=torch.float32), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return folder


def publish_prefix(base, folder, family):
    """A P-Tuning v2 prefix alone, as THUDM's scripts save it."""
    torch.manual_seed(1)
    model = load_model(base, mode=family, pre_seq_len=3)
    model.config.save_pretrained(str(folder))
    state = {name: t.clone() for name, t in model.state_dict().items() if "prefix_encoder" in name}
    torch.save(state, folder / "pytorch_model.bin")
    return change_config(folder, _name_or_path=str(base))


def publish_all(tiny_folders, place: Path) -> dict[str, Path]:
    """{kind of checkpoint: its folder or file}."""
    made = {}
    for family, name in (
        ("glm", "chatglm-6b"),
        ("glm2", "chatglm2-6b"),
        ("glm3", "chatglm3-6b"),
        ("glm4", "glm-4-9b-chat"),
    ):
        made[name] = publish(tiny_folders[family], place / name, family)
    long = publish(tiny_folders["glm2"], place / "chatglm2-6b-32k", "glm2")
    made["chatglm2-6b-32k"] = change_config(long, rope_ratio=16)
    long = publish(tiny_folders["glm3"], place / "chatglm3-6b-128k", "glm3")
    made["chatglm3-6b-128k"] = change_config(long, rope_ratio=500)
    for family, name in (("glm", "chatglm-6b-int4"), ("glm2", "chatglm2-6b-int4")):
        made[name] = publish_packed(tiny_folders[family], place / name, family)
    made["LoRA of chatglm3-6b (peft)"] = publish_adapter(made["chatglm3-6b"], place / "lora")
    prefix = publish_prefix(made["chatglm2-6b"], place / "prefix", "glm2")
    made["P-Tuning v2 of chatglm2-6b"] = prefix
    names = {"glm": "glm-4-9b-chat-hf", "glm4": "GLM-4-9B-0414"}
    for kind in KINDS:
        name = names.get(kind, f"{kind} (instruct)")
        made[name] = make_causal_folder(place / kind, kind)
    return made | publish_refused(tiny_folders, place)


def publish_refused(tiny_folders, place: Path) -> dict[str, Path]:
    """Kinds that are refused."""
    made = {}
    images = shutil.copytree(tiny_folders["glm4"], place / "glm-4v-9b")
    (images / "checksums.json").unlink(missing_ok=True)
    state = load_file(images / "model.safetensors")
    state["transformer.vision.patch_embedding.proj.weight"] = torch.zeros(2)
    save_file(state, images / "model.safetensors", {"format": "pt"})
    made["glm-4v-9b (images)"] = images
    other = make_causal_folder(place / "mistral", "llama")
    made["Mistral"] = change_config(other, model_type="mistral")
    flat = place / "flat"
    flat.mkdir()
    torch.save({"x.lora_A.weight": torch.zeros(2, 2)}, flat / "chatglm-lora.pt")
    made["chatglm-lora.pt"] = flat
    return made


def tokens_of(folder, **options):
    """(tokenizer, ids of a chat's question) of a folder."""
    tokenizer = load_tokenizer(folder, **options)
    return tokenizer, FAMILIES[tokenizer.family].encode_chat(tokenizer, "你好")
