"""Faults found in the ways in: Auto classes, chats, families, quantisation, adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, BertConfig, BertTokenizer

from chatglm import load_model, load_tokenizer
from chatglm.convert_adapter import Scaling
from chatglm.download import verify_folder
from chatglm.evidence import infer_family
from chatglm.families import family_of
from chatglm.histories import history_messages, message_text
from chatglm.hub import missing_weights
from chatglm.lora_layouts import pair_tensors
from chatglm.multi_gpu import auto_configure_device_map, load_model_on_gpus
from chatglm.quantization import quantize_rows

GREEDY = {"do_sample": False, "max_new_tokens": 8}
TEMPLATE = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["glm2"], tmp_path / "m")


# ---- Auto classes


def test_an_auto_tokenizer_is_called_by_keyword(tmp_path, folder):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    BertConfig().save_pretrained(tmp_path / "bert")
    for place in (tmp_path / "bert", folder):
        found = AutoTokenizer.from_pretrained(pretrained_model_name_or_path=str(place))
        assert type(found) is type(AutoTokenizer.from_pretrained(str(place)))

    class Mine(AutoTokenizer):
        pass

    assert Mine.from_pretrained.__self__ is Mine


def test_code_of_another_repository_is_refused(folder, tmp_path):
    other = tmp_path / "evil"
    other.mkdir()
    (other / "processing_x.py").write_text("raise SystemExit('code ran')\n")
    processor = {"auto_map": {"AutoProcessor": f"{other}--processing_x.X"}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="is a ChatGLM, whose .*processing_x.X is never run"):
        AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)


def test_a_subfolder_is_checked_as_a_folder(folder, tmp_path):
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "inner")
    model = AutoModel.from_pretrained(
        str(outer), subfolder="inner", config=load_model(folder).config
    )
    assert model.name_or_path == str(outer / "inner")
    index = {"weight_map": {"a": "../../m/model.safetensors"}}
    (outer / "inner" / "model.safetensors").unlink()
    (outer / "inner" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must lie in a file of this folder"):
        type(model).from_pretrained(str(outer), subfolder="inner")
    with pytest.raises(ValueError, match="is not inside of"):
        type(model).from_pretrained(str(outer), subfolder="../m")


# ---- tensors


@pytest.mark.parametrize(
    "name, said",
    [
        ("transformer.encoder.layers.0.mlp.x.lora_A.default.weight", "LoRA that is not merged"),
        ("transformer.vision.patch.weight", "models of images are not loaded"),
    ],
)
def test_tensors_without_a_place_are_refused(folder, name, said):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(2)}, file, {"format": "pt"})
    (folder / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"holds 1 tensors .*{said}"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_changes_its_sign(dtype, bits):
    torch.manual_seed(0)
    weight = (torch.randn(500, 64) * (1e-5 if dtype == torch.float16 else 0.02)).to(dtype)
    integers, _ = quantize_rows(weight, 8)
    assert (integers.sign() * weight.sign() >= 0).all()


# ---- which family


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3"])
def test_a_template_does_not_overrule_the_vocabulary(tiny_folders, tmp_path, family):
    folder = shutil.copytree(tiny_folders[family], tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(folder).family == load_tokenizer(folder, mode=family).family == family
    assert load_model(folder).config.glm_family == family


def test_names_that_name_no_family(tiny_folders, tmp_path):
    for name in ("chatglm-3epochs", "chatglm_2e-5", "chatglm-4bit", "run1"):
        folder = shutil.copytree(tiny_folders["glm2"], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        config = {k: v for k, v in config.items() if k not in ("glm_family", "_name_or_path")}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text("{}")
        assert infer_family(folder) is None, name


# ---- chats


@pytest.fixture(scope="module")
def talker(tiny_folders):
    return load_model(tiny_folders["glm2"]), load_tokenizer(tiny_folders["glm2"])


def test_an_abandoned_stream_leaves_a_cache_that_is_read_rightly(talker):
    model, tokenizer = talker
    options = GREEDY | {"return_past_key_values": True}
    *_, (_, history, cache) = model.stream_chat(tokenizer, "你好", history=[], **options)
    other = model.stream_chat(tokenizer, "世界 hello", history=[], past_key_values=cache, **options)
    next(other)
    other.close()
    again = model.stream_chat(tokenizer, "再", history, past_key_values=cache, **options)
    assert list(again)[-1][0] == model.chat(tokenizer, "再", history, **GREEDY)[0]


def test_a_call_after_text_is_told_by_its_token(tiny_folders):
    model, tokenizer = load_model(tiny_folders["glm4"]), load_tokenizer(tiny_folders["glm4"])
    ids = tokenizer.encode_text("\nlook <|assistant|> up")
    ids += [tokenizer.get_command("<|assistant|>"), *tokenizer.encode_text('f\n{"city": "x"}')]
    system = {"role": "system", "content": "", "tools": [{"name": "f"}]}
    answer, history = model.finish_chat(tokenizer, ids, "q", [system], "user")
    assert answer == {"name": "f", "parameters": {"city": "x"}}
    assert [m["content"] for m in history[-2:]] == ["look <|assistant|> up", '{"city": "x"}']


def test_a_chat_has_one_answer(talker):
    model, tokenizer = talker
    with pytest.raises(ValueError, match="a chat has one answer"):
        model.chat_batch(tokenizer, ["a", "b"], num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="takes a list of queries"):
        model.chat_batch(tokenizer, "ab")
    answer, _ = model.chat(tokenizer, "a", eos_token_id=None, **GREEDY)
    assert isinstance(answer, str)


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"city": "x"}'}}


@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_openai_calls_are_the_familys_own(tiny_folders, family):
    tokenizer = load_tokenizer(tiny_folders[family])
    asked = {"role": "user", "content": "天气"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "sunny"}
    content = '{"city": "x"}' if family == "glm4" else "```python\ntool_call(city='x')\n```"
    own = {"role": "assistant", "metadata": "f", "content": content}
    observed = {"role": "observation", "content": "sunny"}
    wanted = tokenizer.apply_chat_template([asked, own, observed], add_generation_prompt=True)
    found = tokenizer.apply_chat_template([asked, called, told], add_generation_prompt=True)
    assert found["input_ids"] == wanted["input_ids"]
    odd = called | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    with pytest.raises(ValueError, match=r"messages\[1\]: a call is"):
        tokenizer.apply_chat_template([asked, odd])


def test_openai_calls_need_a_family_with_tools(tiny_folders):
    tokenizer = load_tokenizer(tiny_folders["glm2"])
    with pytest.raises(ValueError, match="ChatGLM2-6B knows no tools"):
        tokenizer.apply_chat_template([{"role": "assistant", "tool_calls": [CALL]}])


def test_tools_that_are_none_say_nothing():
    message = {"role": "system", "content": "x", "tools": None}
    assert message_text(message) == "x"
    with pytest.raises(ValueError, match="tools must be a list, got 5"):
        history_messages([message | {"tools": 5}])


def test_raw_text_has_no_template(tiny_folders):
    tokenizer = load_tokenizer(tiny_folders["glm3"], prompt_style="raw")
    wanted = family_of(tokenizer).encode_chat(tokenizer, "x")
    assert tokenizer.build_chat_input("x")["input_ids"][0].tolist() == wanted
    with pytest.raises(ValueError, match="without a template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    model = load_model(tiny_folders["glm3"])
    with pytest.raises(ValueError, match="no earlier turns"):
        model.build_stream_inputs(tokenizer, "x", [("a", "b")])


# ---- several GPUs, hubs, adapters


def test_a_device_map_places_virtual_tokens(folder):
    places = dict.fromkeys(auto_configure_device_map(1, num_layers=2), "cpu")
    model = load_model(folder, pre_seq_len=3, device_map=places)
    assert model.transformer.prefix_encoder is not None
    with pytest.raises(FileNotFoundError, match="no such model folder: nobody/none; nor"):
        load_model_on_gpus("hf://nobody/none", 1, places)


def test_a_deleted_file_is_missed(folder):
    import hashlib

    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (notes / f"{name}.metadata").write_text(f"commit\n{digest}\n1.0\n")
    assert verify_folder(folder) == 2
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is not as the hub has it: delete .*model.safetensors"):
        verify_folder(folder)


def test_an_odd_index_is_no_traceback(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}')
    assert missing_weights(tmp_path) == []


@pytest.mark.parametrize(
    "b, said",
    [
        (torch.zeros(4), r"no matrix of LoRA"),
        (torch.zeros(4, 2, dtype=torch.int32), "no matrix of LoRA"),
        (torch.full((4, 2), float("nan")), "not finite"),
    ],
)
def test_odd_tensors_of_an_adapter(b, said):
    state = {"base_model.model.x.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=f"file: x.lora_B.weight .*{said}|{said}"):
        pair_tensors("file", state | {"base_model.model.x.lora_B.weight": b})


@pytest.mark.parametrize(
    "values, said",
    [
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": 8, "alpha_pattern": {"(": 4}}, "is no pattern"),
        ({"lora_alpha": 8, "enable_lora": []}, "enable_lora must be true or false"),
        ({"lora_alpha": 8, "enable_lora": ["a"]}, "enable_lora must be true or false"),
    ],
)
def test_odd_settings_of_an_adapter(tmp_path, values, said):
    from chatglm.convert_adapter import AdapterSource

    source = AdapterSource(tmp_path, {}, {"peft_type": "LORA", "r": 2} | values)
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{said}"):
        Scaling.of(source, None)
