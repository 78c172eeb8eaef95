"""Model and adapter folders as people bring them: what loads, and one-line errors for the rest."""

import ast
import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chatglm import load_model, load_tokenizer
from chatglm.families import CHATGLM_FAMILIES
from chatglm.folders import reading
from chatglm.loading import base_fingerprint, read_config
from tests.chatglm.test_loading import WEIGHTS, edit_config, logits_of, prefix_folder, write_bin
from tests.conftest import REPO_ROOT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1018370\n"
ADAPTER = "adapter_model.safetensors"


def refusal(load, *args, **options) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(*args, **options)
    text = str(caught.value)
    assert (
        "\n" not in text
        and len(text) < 700
        and caught.value.__suppress_context__ | (caught.value.__context__ is None)
    )
    return text


def add_mark(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@pytest.fixture
def model_folder(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["glm2"], tmp_path / "model")


@pytest.fixture(scope="module")
def trained_adapter(tiny_folders, tmp_path_factory):
    """A LoRA adapter on tiny glm2, with its logits."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    options = LoraConfig(
        r=2,
        target_modules=["query_key_value", "dense"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_model(tiny_folders["glm2"]), options).eval()
    model.save_pretrained(folder)
    edit_config(folder, "adapter_config.json", base_model_name_or_path=str(tiny_folders["glm2"]))
    return folder, logits_of(model)


@pytest.fixture
def adapter_folder(trained_adapter, tmp_path):
    return shutil.copytree(trained_adapter[0], tmp_path / "adapter")


# ---- adapters

RENAMINGS = {
    "peft": lambda name: name,
    "bare": lambda name: name.removeprefix("base_model.model."),
    "trl": lambda name: name.replace("base_model.model.", "pretrained_model."),
    "trl in peft": lambda name: name.replace(
        "base_model.model.", "base_model.model.pretrained_model."
    ),
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS)
def test_a1_an_adapter_is_read_under_every_savers_names(trained_adapter, adapter_folder, rename):
    state = {rename(name): tensor for name, tensor in load_file(adapter_folder / ADAPTER).items()}
    save_file(state | {"v_head.summary.weight": torch.ones(1, 4)}, adapter_folder / ADAPTER)
    assert torch.equal(logits_of(load_model(adapter_folder)), trained_adapter[1])
    torch.save(state, adapter_folder / "adapter_model.bin")
    (adapter_folder / ADAPTER).unlink()
    assert torch.equal(logits_of(load_model(adapter_folder)), trained_adapter[1])


def test_a1_what_would_not_be_read_is_counted_and_named(adapter_folder):
    state = load_file(adapter_folder / ADAPTER)
    names = sorted(state)
    layer = [name for name in names if "layers.0." in name]
    save_file(
        {name: tensor for name, tensor in state.items() if name not in layer},
        adapter_folder / ADAPTER,
    )
    text = refusal(load_model, adapter_folder)
    assert (
        f"{len(layer)} of the {len(names)} tensors" in text
        and text.split("the first is ")[1] in layer
    )

    save_file({f"model.{name}": tensor for name, tensor in state.items()}, adapter_folder / ADAPTER)
    text = refusal(load_model, adapter_folder)
    assert (
        f"{len(names)} of the {len(names)} tensors that {adapter_folder}" in text
        and "such as base_model.model.model." in text
    )

    extra = {"base_model.model.transformer.encoder.layers.9.mlp.lora_A.weight": torch.ones(2, 40)}
    save_file(state | extra, adapter_folder / ADAPTER)
    text = refusal(load_model, adapter_folder)
    assert (
        f"1 of its {len(names) + 1} tensors have no place" in text
        and "layers.9.mlp.lora_A.weight" in text
    )

    twice = {names[0].removeprefix("base_model.model."): state[names[0]].clone()}
    save_file(state | twice, adapter_folder / ADAPTER)
    assert f"holds two tensors for {names[0]}" in refusal(load_model, adapter_folder)


def test_a6_an_adapter_of_other_shapes_names_the_first(adapter_folder):
    state = load_file(adapter_folder / ADAPTER)
    name = next(name for name in sorted(state) if "query_key_value.lora_A" in name)
    save_file(state | {name: torch.ones(2, 7)}, adapter_folder / ADAPTER)
    assert f"{name} has shape [2, 7], wanted [2, 40]" in refusal(load_model, adapter_folder)


def test_a7_adapter_configurations(adapter_folder):
    path = adapter_folder / "adapter_config.json"
    original = path.read_text()
    add_mark(path)
    assert hasattr(load_model(adapter_folder), "peft_config")
    values = json.loads(original)
    for content, word in {
        "[]": "wanted an object, got []",
        '"text"': 'wanted an object, got "text"',
        "[" * 50000: "not JSON that can be read",
        "{": "not valid JSON",
        json.dumps(
            {k: v for k, v in values.items() if k != "peft_type"}
        ): "has no peft_type, such as LORA",
        json.dumps({"model_type": "chatglm", "num_layers": 3}): "has no peft_type",
        json.dumps(values | {"peft_type": "FOO"}): 'knows no peft_type "FOO"',
        json.dumps(values | {"peft_type": ["LORA"]}): 'knows no peft_type ["LORA"]',
        json.dumps(values | {"r": "many"}): "cannot be read",
        json.dumps(values | {"target_modules": ["no_such"]}): "cannot be read",
        json.dumps(values | {"target_modules": 5}): "cannot be read",
        json.dumps(
            values | {"base_model_name_or_path": ["a"]}
        ): 'base_model_name_or_path must be text, got ["a"]',
    }.items():
        path.write_text(content)
        text = refusal(
            load_model,
            adapter_folder,
            base=values["base_model_name_or_path"] if "base_model_name" not in word else None,
        )
        assert word in text and str(adapter_folder) in text, content[:200]
    prefix = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_layers": 3,
    }
    prefix |= {
        "token_dim": 40,
        "num_attention_heads": 6,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": values["base_model_name_or_path"],
    }
    path.write_text(json.dumps(prefix))
    assert "peft's PREFIX_TUNING, which is P-Tuning v2's here; convert it" in refusal(
        load_model, adapter_folder
    )
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(adapter_folder)}))
    assert "is an adapter itself" in refusal(load_model, adapter_folder)


def test_a7_adapter_weights_that_are_none(adapter_folder):
    weights = adapter_folder / ADAPTER
    content = weights.read_bytes()
    for broken, word in (
        (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (content[:-9], "fetch adapter_model"),
        (b"", "cannot be read"),
        (content[:40], "cannot be read"),
    ):
        weights.write_bytes(broken)
        assert word in refusal(load_model, adapter_folder)
    weights.unlink()
    assert (
        "has no adapter weights: wanted adapter_model.safetensors or adapter_model.bin"
        in refusal(load_model, adapter_folder)
    )
    weights = adapter_folder / "adapter_model.bin"
    torch.save({"a": torch.ones(50)}, weights)
    content = weights.read_bytes()
    for broken, word in (
        (POINTER, "is a Git LFS pointer"),
        (content[:-9], "cut short or damaged"),
        (b"", "damaged"),
        (b"text", "damaged"),
    ):
        weights.write_bytes(broken)
        text = refusal(load_model, adapter_folder)
        assert word in text and "adapter_model.bin" in text and "weights_only" not in text


# ---- which family


@pytest.mark.parametrize("family", ["glm2", "glm3"])
def test_a3_rope_ratio_is_the_familys_through_every_door(tiny_folders, family, tmp_path):
    folder = shutil.copytree(tiny_folders[family], tmp_path / "m")
    edit_config(folder, drop=["glm_family"], rope_ratio=7)  # tokenizer_config.json still tells
    wanted = logits_of(load_model(folder))
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert loaded.config.glm_family == family
        body = getattr(loaded, "transformer", loaded)
        hidden = body(torch.arange(270, 279)[None]).last_hidden_state
        assert torch.equal(body.output_layer(hidden), wanted)
    assert AutoConfig.from_pretrained(folder).glm_family == load_tokenizer(folder).family == family
    assert load_model(folder, mode=family).config.glm_family == family


def test_a3_where_nothing_tells_rope_ratio_is_not_guessed(model_folder, caplog):
    (model_folder / "tokenizer_config.json").unlink()
    edit_config(model_folder, drop=["glm_family"], rope_ratio=7)
    for load in (load_model, AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert (
            "rope_ratio 7 divides positions in ChatGLM2 and multiplies the base in ChatGLM3"
            in refusal(load, model_folder)
        )
    for family in ("glm2", "glm3"):
        assert load_model(model_folder, mode=family).config.glm_family == family
        assert AutoConfig.from_pretrained(model_folder, glm_family=family).glm_family == family
    for ratio, family in {16: "glm2", 50: "glm3", 500: "glm3"}.items():  # those that are published
        edit_config(model_folder, rope_ratio=ratio)
        assert load_model(model_folder).config.glm_family == family
        assert AutoConfig.from_pretrained(model_folder).glm_family == family
    assert not caplog.records


# ---- weights


def test_a4_a_prefix_alone_is_no_model(tiny_folders, tmp_path):
    folder, tuned = prefix_folder(tiny_folders["glm2"], tmp_path / "p", "glm2")
    for auto in (AutoModelForCausalLM, AutoModel):
        text = refusal(auto.from_pretrained, folder)
        assert (
            "holds a P-Tuning prefix alone, no model: chatglm.load_model(" in text
            and str(folder) in text
        )
    assert torch.equal(logits_of(load_model(folder)), logits_of(tuned))
    # a new prefix over a whole model stays possible
    fresh = AutoModelForCausalLM.from_pretrained(
        tiny_folders["glm2"], config=AutoConfig.from_pretrained(tiny_folders["glm2"], pre_seq_len=4)
    )
    assert fresh.transformer.prefix_encoder.embedding.weight.shape[0] == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_a6_half_quantised_folders_are_named(model_folder, bits):
    edit_config(model_folder, quantization_bit=bits)
    state = load_file(model_folder / WEIGHTS)
    for key in [key for key in state if key.endswith("query_key_value.weight")]:
        rows, columns = state[key].shape
        state[key] = torch.zeros(rows, columns * bits // 8, dtype=torch.int8)
        state[key + "_scale"] = torch.ones(rows, dtype=torch.float16)
    save_file(state, model_folder / WEIGHTS)
    # The other layers of a release are quantised too (test_quantization.py loads whole ones).
    wanted = "config.json asks for" if bits == 4 else "weight_scale"
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        text = refusal(load, model_folder)
        assert str(model_folder) in text and wanted in text
    edit_config(model_folder, quantization_bit=0)
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        assert "its config.json has no quantization_bit" in refusal(load, model_folder)


def test_a6_the_first_misfit_is_named_with_both_shapes(model_folder):
    edit_config(model_folder, hidden_size=48)
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        text = refusal(load, model_folder)
        assert (
            f"{model_folder}: transformer.embedding.word_embeddings.weight has shape [400, 40], "
            "config.json asks for [400, 48]" in text
        )


def test_a7_git_lfs_pointers(model_folder):
    (model_folder / "tokenizer.model").write_bytes(POINTER)
    wanted = "is a Git LFS pointer, not the file itself: run `git lfs pull` in " + str(model_folder)
    assert wanted in refusal(load_tokenizer, model_folder)
    (model_folder / WEIGHTS).write_bytes(POINTER)
    for load in (load_model, base_fingerprint, AutoModelForCausalLM.from_pretrained):
        assert wanted in refusal(load, model_folder)
    (model_folder / WEIGHTS).rename(model_folder / "pytorch_model.bin")
    assert wanted in refusal(load_model, model_folder)
    (model_folder / "config.json").write_bytes(POINTER)
    assert wanted in refusal(load_model, model_folder)


def test_a7_a_stale_safetensors_index_does_not_hide_bin_shards(tiny_folders, model_folder, caplog):
    write_bin(model_folder)
    wanted = logits_of(load_model(tiny_folders["glm2"]))
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00007.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits_of(load_model(model_folder)), wanted)
    assert (
        "names model-00001-of-00007.safetensors, which is not there" in caplog.text
        and "reading pytorch_model-00001" in caplog.text
    )
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(model_folder)), wanted)
    (model_folder / "pytorch_model-00001-of-00002.bin").unlink()
    assert "model-00001-of-00007.safetensors, which is not there; fetch it, or delete" in refusal(
        load_model, model_folder
    )


def test_a7_byte_order_marks_are_read(tiny_folders, tmp_path):
    for family in CHATGLM_FAMILIES:
        folder = tmp_path / family
        load_model(tiny_folders[family]).save_pretrained(folder, max_shard_size="30KB")
        load_tokenizer(tiny_folders[family]).save_pretrained(folder)
        marked = sorted(folder.glob("*.json"))
        assert {
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "tokenizer_config.json",
        } <= {p.name for p in marked}
        for path in marked:
            add_mark(path)
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        assert torch.equal(logits_of(model), logits_of(load_model(tiny_folders[family])))
        assert model.name_or_path == tokenizer.name_or_path == str(folder)
        assert tokenizer("你好").input_ids == load_tokenizer(tiny_folders[family])("你好").input_ids


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", '"text"', "null", "[" * 50000, '{"a": ' * 50000, "{", "", "\xff"],
    ids=range(8),
)
def test_a7_json_files_that_hold_no_object(model_folder, content):
    load_model(model_folder).save_pretrained(model_folder, max_shard_size="30KB")
    (model_folder / WEIGHTS).unlink()
    files = (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    for name in files:
        path = model_folder / name
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(content.encode("latin-1"))
        for load in (load_model, load_tokenizer) if "token" in name else (load_model,):
            text = refusal(load, model_folder)
            assert name in text and any(
                word in text
                for word in ("wanted an object", "not valid JSON", "not JSON", "not UTF-8")
            )
        path.write_bytes(before) if before is not None else path.unlink()
    assert load_model(model_folder)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("config.json", {"num_layers": "28"}),
        ("config.json", {"hidden_size": None}),
        ("config.json", {"rope_ratio": 0}),
        ("config.json", {"multi_query_group_num": 0}),
        ("config.json", {"glm_family": "glm9"}),
        ("config.json", {"model_type": ["chatglm"]}),
        ("config.json", {"attn_implementation": 1.5}),
        ("config.json", {"cache_implementation": {}}),
        ("config.json", {"kv_channels": [8]}),
        ("config.json", {"dtype": "float99"}),
        ("config.json", {"dtype": 5}),
        ("generation_config.json", {"max_length": "x"}),
        ("generation_config.json", {"temperature": {}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": "b"}}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
        ("tokenizer_config.json", {"pad_token": ["a"]}),
        ("tokenizer_config.json", {"padding_side": "up"}),
        ("tokenizer_config.json", {"init_inputs": 7}),
    ],
    ids=str,
)
def test_a7_values_of_the_wrong_kind_are_one_line(model_folder, name, changes):
    edit_config(model_folder, name, **changes)
    text = refusal(load_tokenizer if "token" in name else load_model, model_folder)
    assert str(model_folder) in text


def test_a7_torn_files_are_one_line(model_folder):
    wanted = logits_of(load_model(model_folder))
    for name in ("config.json", "tokenizer.model", WEIGHTS):
        path = model_folder / name
        content = path.read_bytes()
        for size in (0, 9, len(content) // 2, len(content) - 3):
            path.write_bytes(content[:size])
            text = refusal(load_model, model_folder)
            assert str(model_folder) in text and name in text, (name, size)
        path.write_bytes(content)
    state = load_file(model_folder / WEIGHTS)
    (model_folder / WEIGHTS).unlink()
    path = model_folder / "pytorch_model.bin"
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert torch.equal(logits_of(load_model(model_folder)), wanted)
        content = path.read_bytes()
        for size in (0, 9, len(content) // 2, len(content) - 3):
            path.write_bytes(content[:size])
            assert f"{path} is " in refusal(load_model, model_folder), (legacy, size)


def test_a7_errors_of_unknown_cause_keep_their_type():
    with (
        pytest.raises(
            ValueError,
            match="^here cannot be read: AttributeError: 'int' object has no attribute 'x'$",
        ),
        reading("here"),
    ):
        (5).x  # noqa: B018
    with (
        pytest.raises(ValueError, match=r"^here cannot be read: KeyError: 'x{200,}\.\.\.$"),
        reading("here"),
    ):
        {}["x" * 1000]
    for error in (
        MemoryError(),
        ImportError("a"),
        FileNotFoundError(2, "No such file", "x"),
        ValueError("here: a line"),
    ):
        with pytest.raises(type(error)) as caught, reading("here"):
            raise error
        assert caught.value is error


# ---- what a folder must not do


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "sub/a.safetensors",
        "..",
        "",
        5,
        None,
        ["a"],
    ],
)
def test_a9_an_index_names_files_of_its_folder_only(model_folder, shard):
    shutil.copy(model_folder / WEIGHTS, model_folder.parent / "secret.safetensors")
    (model_folder / WEIGHTS).unlink()
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    for load in (load_model, base_fingerprint, AutoModelForCausalLM.from_pretrained):
        text = refusal(load, model_folder)
        assert f'{index}: "a" must lie in a file of this folder' in text
    for weight_map in ([], {}, "text", None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert f"{index}: wanted a weight_map" in refusal(load_model, model_folder)


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 10**8}, {"num_layers": -1}, {"hidden_size": 10**12}, {"pre_seq_len": 10**12}],
    ids=str,
)
def test_a9_sizes_that_no_model_has_are_refused(tiny_folders, tmp_path, family, changes):
    folder = shutil.copytree(tiny_folders[family], tmp_path / "m")
    edit_config(folder, **changes)
    (name,) = changes
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        assert f"{name} must be " in refusal(load, folder)


def test_a9_layers_that_the_weights_lack_are_found_before_they_are_made(model_folder):
    edit_config(model_folder, num_layers=60)
    assert "the weights lack" in refusal(load_model, model_folder)


@pytest.mark.parametrize("model_type", ["llama", "evil", None])
def test_a8_code_that_comes_with_a_folder_never_runs(model_folder, monkeypatch, model_type):
    ran = model_folder / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass Config: pass\n"
    (model_folder / "evil.py").write_text(code)
    auto_map = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Config",
        "AutoModelForCausalLM": "evil.Config",
        "AutoTokenizer": ["evil.Config", None],
    }
    edit_config(model_folder, model_type=model_type, auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    for load in (load_model, load_tokenizer):
        text = refusal(load, model_folder)
        if model_type != "llama":
            assert 'wanted "model_type": "chatglm"' in text
            assert "code that comes with a model (auto_map) is never run" in text
    if model_type != "llama":
        text = refusal(read_config, model_folder)
        assert f"{model_folder}/config.json: model_type" in text and "is never run" in text
    assert not ran.exists()


def test_a8_an_encoder_with_code_of_its_own_is_refused(model_folder, monkeypatch):
    from predictor.backbones import EncoderBackbone

    edit_config(
        model_folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    )
    (model_folder / "evil.py").write_text("raise SystemExit('this file must not run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    encoder = EncoderBackbone(str(model_folder), max_src_len=8)
    for load in (encoder.load_tokenizer, lambda: encoder.load_model(torch.float32, {})):
        assert "is never run" in refusal(load)


def test_a8_every_auto_class_is_told_to_run_no_code():
    folders = (
        REPO_ROOT / name
        for name in ("chatglm", "finetune", "predictor", "serving", "scripts", "benchmarks")
    )
    calls = 0
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"Auto\w+\.from_pretrained", ast.unparse(node.func)
            ):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                calls += 1
    assert calls >= 3


def test_a1_an_adapter_is_not_put_on_a_base_on_disk(adapter_folder):
    """peft would copy its tensors to nowhere."""
    places = {
        "transformer.embedding": "cpu",
        "transformer.encoder": "disk",
        "transformer.output_layer": "cpu",
    }
    assert "partly on disk; merge it" in refusal(load_model, adapter_folder, device_map=places)


def test_a_runs_folder_names_a_checkpoint(tmp_path):
    (tmp_path / "run" / "epoch-1-step-40").mkdir(parents=True)
    (tmp_path / "run" / "epoch-1-step-40" / "manifest.json").write_text("{}")
    for load in (load_model, load_tokenizer):
        assert f"{tmp_path / 'run' / 'epoch-1-step-40'} (the last)" in refusal(
            load, tmp_path / "run"
        )


def test_a8_an_adapter_names_no_module_to_import(adapter_folder, monkeypatch):
    """peft imports megatron_core, which may exist in the folder that a command is started in."""
    (adapter_folder / "evil_layers.py").write_text(f"open({str(adapter_folder / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(adapter_folder))
    edit_config(
        adapter_folder, "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil_layers"
    )
    assert "adapter_config.json: an adapter of Megatron's layers" in refusal(
        load_model, adapter_folder
    )
    assert not (adapter_folder / "ran").exists()
