"""Folders of every kind: what loads, what is refused with which error.

Chats with what was loaded.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm import load_model, load_tokenizer
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from chatglm.loading import base_fingerprint, resolve_mode, stop_ids
from tests.conftest import REPO_ROOT

WEIGHTS = "model.safetensors"


def ids_of(model):
    ids = torch.arange(270, 279)[None]
    if model.config.glm_family == "glm":
        ids[0, 5:7] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    return ids


@torch.no_grad()
def logits_of(model):
    return model(ids_of(model)).logits


def edit_config(folder, file="config.json", drop=(), **changes):
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def prefix_folder(source, target, family, keep_base=False, **options):
    """(folder with a P-Tuning prefix of 3 tokens, the tuned model); with or without the weights."""
    torch.manual_seed(1)
    model = load_model(source, mode=family, pre_seq_len=3, **options)
    model.config.save_pretrained(target)
    state = {
        k: v.contiguous()
        for k, v in model.state_dict().items()
        if keep_base or "prefix_encoder" in k
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, target / WEIGHTS, {"format": "pt"})
    edit_config(target, _name_or_path=str(source))
    return target, model


# ---- which family


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_mode_is_inferred_and_contradictions_are_refused(tiny_folders, family):
    folder = tiny_folders[family]
    assert resolve_mode(folder) == resolve_mode(folder, family) == family
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert model.config.glm_family == tokenizer.family == family and not model.training
    assert model.generation_config.eos_token_id == stop_ids(tokenizer)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    for other in set(CHATGLM_FAMILIES) - {family}:
        for load in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match=f"mode '{other}' does not fit .*glm_family"):
                load(folder, mode=other)
    with pytest.raises(ValueError, match="mode must be one of glm, .*, causal; got 'glm5'"):
        load_model(folder, mode="glm5")


def test_a_folder_that_does_not_tell_its_family_is_asked_about(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["glm3"], tmp_path / "weights")
    (folder / "tokenizer_config.json").unlink()
    edit_config(folder, drop=["glm_family"])
    with pytest.raises(ValueError, match="does not tell which of glm, .* it is: say --mode"):
        load_model(folder)
    assert load_model(folder, mode="glm3").config.glm_family == "glm3"
    with pytest.raises(ValueError, match="does not fit"):
        load_model(folder, mode="glm")


# ---- weights


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_dtype(tiny_folders, family, tmp_path):
    folder = tiny_folders[family]
    assert load_model(folder).dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        assert load_model(folder, dtype=dtype).dtype == torch.bfloat16
    half = load_model(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float16  # the checkpoint's
    full = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(
        full.get_input_embeddings().weight, half.get_input_embeddings().weight.float()
    )


def test_missing_folders_and_weights_are_named(tiny_folders, tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="no such model folder: .*nowhere"):
            load(tmp_path / "nowhere")
    folder = shutil.copytree(tiny_folders["glm2"], tmp_path / "model")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors and no pytorch_model.bin"):
        load_model(folder)
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match="model-00001-of-00001.safetensors, which is not there"
    ):
        load_model(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_missing_tensors_are_named_and_extra_ones_ignored(tiny_folders, family, tmp_path):
    folder = shutil.copytree(tiny_folders[family], tmp_path / "model")
    state = load_file(folder / WEIGHTS)
    wanted = logits_of(load_model(folder))
    state.pop("lm_head.weight", None)  # tied in ChatGLM-6B: whether it is stored does not matter
    tables = {f"{FAMILIES[family].layers_prefix}0.attention.rotary_emb.inv_freq": torch.ones(4)}
    if family != "glm":
        tables = {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
    for metadata in ({"format": "pt"}, None):  # old converters wrote none
        save_file(state | tables, folder / WEIGHTS, metadata)
        assert torch.equal(logits_of(load_model(folder)), wanted)
    lost = f"{FAMILIES[family].layers_prefix}1.mlp.dense_4h_to_h.weight"
    save_file({k: v for k, v in state.items() if k != lost}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"lack 1 tensors, the first is {lost}"):
        load_model(folder)


def write_bin(folder, **options):
    """The folder's weights as two .bin shards with an index, as the first releases had them."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, files = (
        sorted(state),
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    )
    for i, file in enumerate(files):
        torch.save({name: state[name] for name in names[i::2]}, folder / file, **options)
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_bin_shards(tiny_folders, family, legacy, tmp_path):
    folder = write_bin(
        shutil.copytree(tiny_folders[family], tmp_path / "m"),
        _use_new_zipfile_serialization=not legacy,
    )
    assert torch.equal(logits_of(load_model(folder)), logits_of(load_model(tiny_folders[family])))
    assert base_fingerprint(folder) == base_fingerprint(tiny_folders[family])


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_a_bin_with_code_is_refused(tiny_folders, legacy, tmp_path):
    folder = shutil.copytree(tiny_folders["glm2"], tmp_path / "model")
    state = load_file(folder / WEIGHTS) | {"extra": Payload(tmp_path / "ran")}
    (folder / WEIGHTS).unlink()
    if legacy:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": state["extra"]}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    for read in (load_model, base_fingerprint):
        with pytest.raises(ValueError, match=r"pytorch_model.bin.*(tensors|weights)"):
            read(folder)
    assert not (tmp_path / "ran").exists()


def test_fingerprint_knows_the_model_whatever_the_folder(tiny_folders, tmp_path):
    for family, source in tiny_folders.items():
        wanted = base_fingerprint(source)
        state = load_file(source / WEIGHTS)
        model = load_model(source)
        model.half().save_pretrained(tmp_path / f"{family}-half")
        load_model(source).save_pretrained(tmp_path / f"{family}-shards", max_shard_size="30KB")
        assert (tmp_path / f"{family}-shards" / "model.safetensors.index.json").is_file()
        copies = [tmp_path / f"{family}-half", tmp_path / f"{family}-shards"]
        tuned, _ = prefix_folder(source, tmp_path / f"{family}-prefix", family, keep_base=True)
        for copy in [*copies, tuned]:
            assert base_fingerprint(copy) == wanted, copy
        changed = tmp_path / f"{family}-changed"
        changed.mkdir()
        for name, tensor in state.items():
            if name == "lm_head.weight":
                continue  # tied to the embedding
            save_file(state | {name: tensor * 1.5}, changed / WEIGHTS)
            assert base_fingerprint(changed) != wanted, name
            save_file({k: v for k, v in state.items() if k != name}, changed / WEIGHTS)
            assert base_fingerprint(changed) != wanted, name
    assert len({base_fingerprint(folder) for folder in tiny_folders.values()}) == 6


# ---- P-Tuning prefixes and adapters

PREFIXES = {
    "v2": {"ptuning_version": "v2"},
    "v2-mlp": {"prefix_projection": True},
    "v1": {"ptuning_version": "v1"},
}


@pytest.mark.parametrize("keep_base", [False, True], ids=["prefix-only", "full"])
@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_prefix_folders(tiny_folders, family, options, keep_base, tmp_path):
    source = tiny_folders[family]
    folder, tuned = prefix_folder(source, tmp_path / "p", family, keep_base, **options)
    wanted = logits_of(tuned)
    assert not torch.allclose(wanted, logits_of(load_model(source)))
    found = load_model(folder)
    assert torch.equal(logits_of(found), wanted)
    if not keep_base:  # its tokenizer is the base's
        assert found.generation_config.eos_token_id == tuned.generation_config.eos_token_id
    assert torch.equal(logits_of(load_model(folder, pre_seq_len=3, **options)), wanted)

    with pytest.raises(ValueError, match="holds a prefix of 3 virtual tokens, but pre_seq_len=4"):
        load_model(folder, pre_seq_len=4)
    version = options.get("ptuning_version", "v2")
    other = {"v1": "v2", "v2": "v1"}[version]
    with pytest.raises(
        ValueError, match=f"holds a P-Tuning {version} prefix, but ptuning_version='{other}'"
    ):
        load_model(folder, ptuning_version=other)
    if "prefix_projection" not in options:
        with pytest.raises(ValueError, match="prefix.*without.*prefix_projection"):
            load_model(folder, pre_seq_len=3, prefix_projection=True)
    edit_config(folder, pre_seq_len=7)
    with pytest.raises(
        ValueError,
        match="holds a prefix of 3 virtual tokens, but its config.json says pre_seq_len 7",
    ):
        load_model(folder)
    edit_config(folder, drop=["pre_seq_len"])  # the weights say it
    assert torch.equal(logits_of(load_model(folder)), wanted)
    if not keep_base:
        edit_config(folder, drop=["_name_or_path"])
        assert torch.equal(logits_of(load_model(folder, base=source)), wanted)
        with pytest.raises(ValueError, match="names no base model; give base=FOLDER"):
            load_model(folder)
        edit_config(folder, _name_or_path=str(tmp_path / "gone"))
        with pytest.raises(
            FileNotFoundError, match="its base model .*gone is not there; give base=FOLDER"
        ):
            load_model(folder)
        edit_config(folder, _name_or_path=str(source), num_layers=3)
        state = load_file(folder / WEIGHTS)
        key = "transformer.prefix_encoder.embedding.weight"
        save_file(state | {key: state[key][:, :-2].contiguous()}, folder / WEIGHTS)
        with pytest.raises(
            ValueError,
            match=r"prefix_encoder.embedding.weight must be \[3, \d+\], found \[3, \d+\]",
        ):
            load_model(folder)


def test_a_config_with_a_prefix_needs_one_in_the_weights(tiny_folders, tmp_path):
    """Without it the model would answer from random virtual tokens."""
    folder = shutil.copytree(tiny_folders["glm2"], tmp_path / "m")
    edit_config(folder, pre_seq_len=5)
    with pytest.raises(
        ValueError, match="lack 1 tensors, the first is transformer.prefix_encoder.embedding.weight"
    ):
        load_model(folder)
    assert (
        load_model(folder, pre_seq_len=2).transformer.prefix_encoder.embedding.weight.shape[0] == 2
    )


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_adapter_folders(tiny_folders, family, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    source = tiny_folders[family]
    torch.manual_seed(0)
    options = LoraConfig(
        r=2, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(source), options).eval()
    wanted = logits_of(model)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, "adapter_config.json", base_model_name_or_path=str(source))
    found = load_model(tmp_path)
    assert (
        isinstance(found, PeftModel)
        and not found.training
        and torch.equal(logits_of(found), wanted)
    )
    assert load_tokenizer(tmp_path).family == family  # the base's
    assert load_model(tmp_path, dtype="bfloat16").base_model.model.dtype == torch.bfloat16
    other = "glm2" if family == "glm" else "glm"
    with pytest.raises(ValueError, match="does not fit .*base model"):
        load_model(tmp_path, mode=other)
    edit_config(tmp_path, "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(
        FileNotFoundError, match="its base model .*gone is not there; give base=FOLDER"
    ):
        load_model(tmp_path, mode=family)
    assert torch.equal(logits_of(load_model(tmp_path, mode=family, base=source)), wanted)
    edit_config(tmp_path, "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base model; give base=FOLDER"):
        load_model(tmp_path, mode=family)
    model = found.base_model.model
    query = "你好"
    tokenizer = load_tokenizer(source)
    greedy = {"do_sample": False, "max_new_tokens": 5}
    assert found.chat(tokenizer, query, **greedy) == model.chat(tokenizer, query, **greedy)
    with found.disable_adapter():
        plain = found.chat(tokenizer, query, **greedy)
    assert plain == load_model(source).chat(tokenizer, query, **greedy)


# ---- importing


def python(code):
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def test_import_is_quick_and_free_of_torch():
    code = """
import time; start = time.perf_counter()
import sys, chatglm
took = time.perf_counter() - start
heavy = {"torch", "transformers", "sentencepiece", "numpy"}
assert chatglm.FAMILIES and not heavy & set(sys.modules)
print(took)
"""
    assert min(float(python(code)) for _ in range(2)) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import chatglm; from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer",
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer; import chatglm",
    ],
    ids=["before", "after"],
)
def test_auto_classes_in_any_order_of_imports(tiny_folders, imports):
    code = f"""
{imports}
for family, folder in { ({f: str(p) for f, p in tiny_folders.items()})!r}.items():
    assert AutoConfig.from_pretrained(folder).glm_family == family
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("chatglm.modeling_")
    assert AutoTokenizer.from_pretrained(folder).family == family
print("fine")
"""
    assert python(code) == "fine"


# ---- conversations


@pytest.fixture(scope="module")
def chats(tiny_folders):
    return {
        name: (load_model(folder), load_tokenizer(folder)) for name, folder in tiny_folders.items()
    }


def script(model, ids):
    """Makes the model say `ids` whatever it is asked. Returns the hook's handle."""

    def say(module, args, out):
        said = script.said
        script.said += 1
        forced = torch.full_like(out, -100.0)
        forced[..., ids[min(said, len(ids) - 1)]] = 100.0
        return forced

    script.said = 0
    return model.get_output_embeddings().register_forward_hook(say)


def conversation(chats, family, answer, **options):
    """(chat's result, all of stream_chat's) for a model that answers `answer`.

    `answer` is a list of texts and control ids.
    """
    model, tokenizer = chats[family]
    ids = []
    for part in answer:
        ids += (
            [tokenizer.get_command(part)]
            if part in tokenizer._commands
            else tokenizer.encode_text(part)
        )
    options = {"query": "你好", "do_sample": False, "max_new_tokens": 60} | options
    handle = script(model, ids)
    try:
        result = model.chat(tokenizer, **options)
        script.said = 0
        return result, list(model.stream_chat(tokenizer, **options))
    finally:
        handle.remove()


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_chat_and_stream_chat_agree(chats, family):
    model, tokenizer = chats[family]
    for options in ({}, {"repetition_penalty": 1.5}):
        options = {"do_sample": False, "max_new_tokens": 10} | options
        answer, history = model.chat(tokenizer, "今天天气", **options)
        stream = list(model.stream_chat(tokenizer, "今天天气", **options))
        assert stream[-1] == (answer, history)
        assert len(stream) > 1 or not answer
        again, longer = model.chat(tokenizer, "hello", history, **options)
        assert longer[: len(history)] == history and len(longer) > len(history)
        assert list(model.stream_chat(tokenizer, "hello", history, **options))[-1] == (
            again,
            longer,
        )
    torch.manual_seed(0)
    sampled = model.chat(tokenizer, "今天天气", max_new_tokens=12)
    torch.manual_seed(0)
    assert sampled == model.chat(tokenizer, "今天天气", max_new_tokens=12)


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_an_answer_ends_at_each_stop_token_and_holds_none(chats, family):
    for stop in FAMILIES[family].stop_tokens:
        (answer, history), stream = conversation(chats, family, ["世界", stop, "hello"])
        assert answer == "世界" and stream[-1] == (answer, history), stop
        roles = FAMILIES[family].roles
        last = history[-1]["content"] if roles else history[-1][1]
        assert last == "世界"
        if not roles:
            assert history == [("你好", "世界")]
        # nothing but the stop token
        (answer, _), stream = conversation(chats, family, [stop])
        assert answer == "" and stream[-1][0] == ""
        # one stop id given as a number
        model, tokenizer = chats[family]
        (answer, _), stream = conversation(
            chats, family, ["世界", stop], eos_token_id=tokenizer.get_command(stop)
        )
        assert answer == stream[-1][0] == "世界"


def test_what_the_model_is_shown(chats):
    """chat() shows the model the family's own ids, history and roles included."""
    pairs, messages = [("a", "b")], [{"role": "user", "content": "a"}]
    for family, history in (
        ("glm", pairs),
        ("glm2", pairs),
        ("glm3", messages),
        ("glm4", messages),
    ):
        model, tokenizer = chats[family]
        seen = []
        hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0])
        )
        for past in (None, history):
            del seen[:]
            before = json.dumps(past)
            model.chat(tokenizer, "你好", past, do_sample=False, max_new_tokens=2)
            assert seen[0][0].tolist() == FAMILIES[family].encode_chat(tokenizer, "你好", past)
            assert json.dumps(past) == before
        hook.remove()
    model, tokenizer = chats["glm"]
    model.config.chat_prompt = "rounds"
    inputs, _ = model.prepare_chat(tokenizer, "你好", None, "user", {})
    assert (
        inputs["input_ids"][0].tolist()
        == FAMILIES["glm"].encode_prompt(tokenizer, "你好", 10**6).input_ids
    )
    asked, _ = model.prepare_chat(tokenizer, "世界", [("你好", "很 好")], "user", {})
    text = "[Round 1]\n问：你好\n答：很 好\n[Round 2]\n问：世界\n答："
    assert asked["input_ids"][0].tolist()[:-2] == tokenizer.encode_text(text)
    model.config.chat_prompt = None
    with pytest.raises(ValueError, match="only ChatGLM3 and GLM-4 have roles"):
        model.chat(tokenizer, "你好", role="observation")


def test_chatglm3_tools_and_roles(chats):
    tools = [{"name": "weather", "parameters": {"city": "string"}}]
    history = [{"role": "system", "content": "use tools", "tools": tools}]
    call = ["weather\n", "```python\ntool_call(city='hello')\n```", "<|observation|>"]
    (content, longer), stream = conversation(chats, "glm3", call, history=history)
    assert content == {"name": "weather", "parameters": {"city": "hello"}}
    assert stream[-1] == (content, longer)
    assert [m["role"] for m in longer] == ["system", "user", "assistant"] and history == history[:1]
    # the tool's answer goes back as an observation
    model, tokenizer = chats["glm3"]
    _, after = model.chat(
        tokenizer, "12", longer, role="observation", do_sample=False, max_new_tokens=3
    )
    assert after[3] == {"role": "observation", "content": "12"}
    # what is no tool call comes back as text, in both (A11)
    (content, longer), stream = conversation(
        chats, "glm3", ["weather\n", "```python\nimport a\n```", "<|observation|>"], history=history
    )
    assert content["name"] == "weather" and content["content"].strip() == "```python\nimport a\n```"
    assert stream[-1] == (content, longer) and longer[-1]["content"] == content["content"]
    with pytest.raises(ValueError, match="role is one of"):
        model.chat(tokenizer, "a", role="tool")


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_a10_a_chat_goes_on_from_either_form(chats, family):
    pairs = [("你好", "世界")]
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}]
    answer = ["好", FAMILIES[family].end_token]
    (from_pairs, longer), stream = conversation(chats, family, answer, history=pairs)
    assert stream[-1] == (from_pairs, longer) and pairs == [("你好", "世界")]
    (from_messages, later), stream = conversation(chats, family, answer, history=messages)
    assert from_pairs == from_messages == "好" and stream[-1][1] == later and len(messages) == 2
    asked, said = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}
    if FAMILIES[family].roles:
        assert longer == later == [*messages, asked, said | {"metadata": ""}]
    else:
        assert longer == [*pairs, ("你好", "好")] and later == [*messages, asked, said]
    model, tokenizer = chats[family]
    with pytest.raises(
        ValueError,
        match=r"history\[0\]: history must be \[\(query, answer\), ...\] or .*got \"你好\"",
    ):
        model.chat(tokenizer, "你好", ["你好"])


def test_stream_chat_raises_what_generation_raises(chats):
    model, tokenizer = chats["glm2"]
    with pytest.raises(ValueError, match="beam"):
        list(model.stream_chat(tokenizer, "你好", num_beams=3, do_sample=False))


def test_defaults_of_a_chat_are_the_originals(chats):
    originals = {"glm": (0.7, 0.95, 2048), "glm2": (0.8, 0.8, 8192), "glm3": (0.8, 0.8, 8192)}
    for family, (top_p, temperature, length) in originals.items():
        model, tokenizer = chats[family]
        _, options = model.prepare_chat(tokenizer, "a", None, "user", {})
        wanted = {
            "max_length": length,
            "num_beams": 1,
            "do_sample": True,
            "top_p": top_p,
            "temperature": temperature,
        }
        assert options == wanted | {
            "eos_token_id": stop_ids(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        }
        _, options = model.prepare_chat(tokenizer, "a", None, "user", {"max_new_tokens": 5})
        assert "max_length" not in options and FAMILIES[family].chat_defaults == wanted


@pytest.mark.parametrize("family", ["glm2", "glm3"])
def test_stream_chat_goes_on_from_its_own_cache(tiny_folders, family):
    model, tokenizer = (
        load_model(tiny_folders[family], mode=family),
        load_tokenizer(tiny_folders[family], mode=family),
    )
    options = {"do_sample": False, "max_new_tokens": 6, "return_past_key_values": True}
    *_, (answer, history, cache) = model.stream_chat(tokenizer, "你好", history=[], **options)
    prompt = FAMILIES[family].encode_chat(tokenizer, "你好", [])
    assert (
        cache.token_ids[: len(prompt)] == prompt and len(cache.token_ids) == cache.get_seq_length()
    )
    *_, (reused, _, _) = model.stream_chat(
        tokenizer, "世界", history, past_key_values=cache, **options
    )
    fresh, _ = model.chat(tokenizer, "世界", history, do_sample=False, max_new_tokens=6)
    assert reused == fresh


def test_an_abandoned_stream_stops_generating(tiny_folders):
    import threading
    import time

    model, tokenizer = (
        load_model(tiny_folders["glm2"], mode="glm2"),
        load_tokenizer(tiny_folders["glm2"], mode="glm2"),
    )
    before = threading.active_count()
    stream = model.stream_chat(
        tokenizer, "你好", do_sample=False, max_new_tokens=1500, eos_token_id=[10**6]
    )
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "code",
    [
        "import chatglm; import transformers.modeling_layers",
        pytest.param(
            "import chatglm; import transformers.models.auto.modeling_auto", marks=pytest.mark.slow
        ),
        pytest.param("import transformers.modeling_layers; import chatglm", marks=pytest.mark.slow),
    ],
)
def test_our_models_are_registered_whatever_is_imported_first(code):
    """transformers.modeling_layers imports the auto module, and our models import it."""
    check = (
        "import sys; from transformers import AutoModel; "
        "assert 'chatglm.modeling_glm2' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}"], cwd=REPO_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
