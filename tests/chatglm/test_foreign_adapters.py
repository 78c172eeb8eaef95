"""Adapters of other programs: each layout as its program saves it, against the updated weights.

The oracle is algebra: a base whose weights are W + scaling * B A, or peft's own model.
"""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from chatglm import convert_adapter as command
from chatglm import load_model
from chatglm.convert_adapter import convert_adapter as convert
from finetune.evaluation import predict
from tests.chatglm.test_loading import edit_config, logits_of
from tests.conftest import REPO_ROOT
from tests.warm import warm_python

QKV = {
    "glm": "transformer.layers.{}.attention.query_key_value",
    "glm2": "transformer.encoder.layers.{}.self_attention.query_key_value",
}
QKV["glm4"] = QKV["glm3"] = QKV["glm2"]
LAYERS = 3


def updated(base, updates):
    """The logits of a base whose layers' weights have these updates added."""
    model = load_model(base)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update
    return logits_of(model)


def random_lora(base, rank=4, layers=range(LAYERS), names=None):
    """{layer: (A, B)} of a base's query_key_value, or of the layers of these short names."""
    torch.manual_seed(3)
    model = load_model(base)
    found = {}
    for number in layers:
        for pattern in names or [QKV[model.config.glm_family]]:
            name = pattern.format(number)
            out, inputs = model.get_submodule(name).weight.shape
            found[name] = (torch.randn(rank, inputs), 0.2 * torch.randn(out, rank))
    return found


def peft_config(base, **changes):
    """adapter_config.json as peft wrote it in 2023, with what a program adds."""
    return {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    } | changes


def write_adapter(folder, config, tensors, name="adapter_model.bin"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, {"format": "pt"})
    return folder


def named(lora, pattern):
    """{pattern.format(module, "A" or "B"): tensor}"""
    state = {}
    for module, (a, b) in lora.items():
        state |= {pattern.format(module, "A"): a, pattern.format(module, "B"): b}
    return state


def products(lora, scaling=2.0):
    return {module: scaling * b @ a for module, (a, b) in lora.items()}


def opens_everywhere(folder, base, wanted, tmp_path):
    """load_model and merge_lora give the wanted logits."""
    assert torch.allclose(logits_of(load_model(folder)), wanted, atol=2e-3)
    merge_lora.merge(base, folder, tmp_path / "merged", other_name=True)
    assert torch.allclose(logits_of(load_model(tmp_path / "merged")), wanted, atol=2e-3)


# ---- folders that are read as they are

FACTORY = {  # LLaMA-Factory with peft 0.12
    "alpha_pattern": {},
    "auto_mapping": None,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "revision": None,
    "use_dora": False,
    "use_rslora": False,
}
SWIFT = {  # ms-swift's LoRAConfig
    "swift_type": "LORA",
    "enable_lora": None,
    "group_size": None,
    "lora_dtype": None,
    "lorap_emb_lr": 1e-06,
    "lorap_lr_ratio": 16.0,
    "model_key_mapping": None,
    "use_merged_linear": False,
    "use_qa_lora": False,
}
PEFT_NAMES = "base_model.model.{}.lora_{}.weight"
READ = {  # test id -> (keys of adapter_config.json, names of the tensors, file)
    "chatglm-efficient-tuning": ({}, PEFT_NAMES, "adapter_model.bin"),
    "llama-factory": (FACTORY, PEFT_NAMES, "adapter_model.safetensors"),
    "ms-swift-2-peft": (
        FACTORY | {"target_modules": r"^(transformer.encoder)(?!.*(lm_head|output)).*value$"},
        PEFT_NAMES,
        "adapter_model.safetensors",
    ),
    "ms-swift": (SWIFT, "{}.lora_{}.default.weight", "adapter_model.bin"),
    "ms-swift-1.4": (
        SWIFT | {"peft_type": None},
        "{}.loramodule_default.lora_{}.default.weight",
        "adapter_model.bin",
    ),
}


@pytest.mark.parametrize("program", READ)
def test_adapter_folders_of_other_programs_are_read(tiny_folders, tmp_path, recwarn, program):
    base = tiny_folders["glm2"]
    keys, names, file = READ[program]
    lora = random_lora(base)
    folder = write_adapter(tmp_path / "ad", peft_config(base, **keys), named(lora, names), file)
    (folder / "finetuning_args.json").write_text('{"finetuning_type": "lora"}')
    (folder / "additional_config.json").write_text('{"lora_dtype": null}')
    opens_everywhere(folder, base, updated(base, products(lora)), tmp_path)
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]


# ---- tensors without a configuration

FLAT = {  # test id -> (family, names of the tensors)
    "chatglm-tuning": ("glm", "base_model.model.{}.lora_{}.weight"),
    "chatglm-lora-multi-gpu": ("glm", "base_model.model.{}.lora_{}.default.weight"),
    "engine": ("glm2", "module.base_model.model.{}.lora_{}.default.weight"),
    "basemodel-demo": ("glm3", "base_model.model.{}.lora_{}.default.weight"),
    "glm4": ("glm4", "base_model.model.{}.lora_{}.default.weight"),
}


@pytest.mark.parametrize("program", FLAT)
def test_flat_files_are_converted(tiny_folders, tmp_path, program):
    family, names = FLAT[program]
    base, out = tiny_folders[family], tmp_path / "out"
    lora = random_lora(base)
    parameters = {k: torch.nn.Parameter(t) for k, t in named(lora, names).items()}
    torch.save(parameters, tmp_path / "chatglm-lora.pt")
    convert(tmp_path / "chatglm-lora.pt", base, out, lora_alpha=8)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == ["query_key_value"]
    assert not config["rank_pattern"]
    opens_everywhere(out, base, updated(base, products(lora)), tmp_path)


def test_a_part_of_the_layers_is_an_adapter_of_that_part(tiny_folders, tmp_path):
    base = tiny_folders["glm2"]
    lora = random_lora(base, layers=[1]) | random_lora(base, rank=2, layers=[2])
    torch.save(named(lora, PEFT_NAMES), tmp_path / "lora.bin")
    convert(tmp_path / "lora.bin", base, tmp_path / "out", lora_alpha=8)
    updates = {name: 8 / len(a) * b @ a for name, (a, b) in lora.items()}
    opens_everywhere(tmp_path / "out", base, updated(base, updates), tmp_path)


# ---- MergedLinear


def merged_linear(base, rank=4, convolution=True):
    """(tensors, updates) of peft 0.2's LoRA of the first and last third of the outputs."""
    torch.manual_seed(4)
    model, pairs, updates = load_model(base), {}, {}
    for number in range(LAYERS):
        name = QKV[model.config.glm_family].format(number)
        out, inputs = model.get_submodule(name).weight.shape
        third = out // 3
        a = torch.randn(2 * rank, inputs)
        layer = torch.nn.Conv1d(2 * rank, 2 * third, 1, groups=2, bias=False)
        with torch.no_grad():  # what the layer adds to each unit input
            added = layer((a @ torch.eye(inputs)).T[..., None])[..., 0].T
        whole = torch.zeros(out, inputs)
        whole[:third], whole[2 * third :] = added[:third], added[third:]
        pairs[name] = (a, layer.weight.detach() if convolution else layer.weight.detach()[..., 0])
        updates[name] = 2 * whole
    return pairs, updates


@pytest.mark.parametrize("convolution", [True, False], ids=["peft-0.2", "ms-swift"])
@pytest.mark.parametrize("configured", [True, False])
def test_merged_linear(tiny_folders, tmp_path, convolution, configured):
    base = tiny_folders["glm"]
    pairs, updates = merged_linear(base, convolution=convolution)
    keys = {"enable_lora": [True, False, True], "merge_weights": True}
    folder = write_adapter(tmp_path / "ad", peft_config(base, **keys), named(pairs, PEFT_NAMES))
    for door in (lambda: load_model(folder), lambda: merge(base, folder, tmp_path)):
        with pytest.raises(ValueError, match=r"MergedLinear.*python -m chatglm\.convert_adapter"):
            door()
    if not configured:
        (folder / "adapter_config.json").unlink()
    alpha = None if configured else 8
    convert(folder / "adapter_model.bin", base, tmp_path / "out", lora_alpha=alpha)
    opens_everywhere(tmp_path / "out", base, updated(base, updates), tmp_path)


def merge(base, folder, tmp_path):
    return merge_lora.merge(base, folder, tmp_path / "refused", other_name=True)


# ---- GlmForCausalLM


def glm_for_causal_lm(base):
    """transformers' own model with the weights of a base, by its published conversion."""
    from transformers import GlmConfig, GlmForCausalLM

    ours = load_model(base)
    c = ours.config
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.kv_channels,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4 * c.rope_ratio, "partial_rotary_factor": 0.5}
    model = GlmForCausalLM(
        GlmConfig(
            **sizes,
            attention_bias=True,
            rms_norm_eps=c.layernorm_epsilon,
            rope_parameters=rope,
            pad_token_id=0,
        )
    ).eval()
    q, k = c.num_attention_heads * c.kv_channels, c.num_key_value_heads * c.kv_channels
    renamed = {}
    for name, tensor in ours.state_dict().items():
        for old, new in {
            "transformer.output_layer": "lm_head",
            "transformer.embedding.word_embeddings": "model.embed_tokens",
            "transformer.encoder.final_layernorm": "model.norm",
            "transformer.encoder.layers": "model.layers",
            "self_attention.dense": "self_attn.o_proj",
            "self_attention": "self_attn",
            "dense_h_to_4h": "gate_up_proj",
            "dense_4h_to_h": "down_proj",
        }.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for part, rows in zip("qkv", tensor.split([q, k, k])):
                renamed[name.replace("query_key_value", f"{part}_proj")] = rows
        else:
            renamed[name] = tensor
    lost = model.load_state_dict(renamed, strict=False)
    assert not lost.missing_keys, lost
    return model


def glm_adapter(base, folder, targets, **options):
    """(folder, logits) of a peft adapter of GlmForCausalLM."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **{"r": 4} | options,
    )
    plain = glm_for_causal_lm(base)
    assert torch.allclose(logits_of_glm(plain), logits_of(load_model(base)), atol=1e-4)
    model = get_peft_model(plain, config).eval()
    model.save_pretrained(folder)
    edit_config(folder, "adapter_config.json", base_model_name_or_path=str(base))
    return folder, logits_of_glm(model)


@torch.no_grad()
def logits_of_glm(model):
    return model(torch.arange(270, 279)[None]).logits


SPLIT = {  # test id -> (targets, options)
    "all": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], {}),
    "q-v": (["q_proj", "v_proj"], {"use_rslora": True}),
    "ranks": (
        ["q_proj", "k_proj"],
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    ),
}


@pytest.mark.parametrize("case", SPLIT)
@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_adapters_of_glm_for_causal_lm(tiny_folders, tmp_path, family, case):
    base = tiny_folders[family]
    targets, options = SPLIT[case]
    folder, wanted = glm_adapter(base, tmp_path / "ad", targets, **options)
    for door in (lambda: load_model(folder), lambda: merge(base, folder, tmp_path)):
        with pytest.raises(ValueError, match=r"made for GlmForCausalLM.*chatglm\.convert_adapter"):
            door()
    convert(folder, base, tmp_path / "out")
    opens_everywhere(tmp_path / "out", base, wanted, tmp_path)
    with pytest.raises(ValueError, match="ChatGLM-6B does not have"):
        convert(folder, tiny_folders["glm"], tmp_path / "other")


# ---- prefixes


def peft_prefix(base, folder):
    """(folder, the keys and values that peft's PREFIX_TUNING gives each layer), of 3 tokens."""
    from peft import PrefixTuningConfig, get_peft_model

    model = load_model(base)
    c = model.config
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=c.num_hidden_layers,
        num_attention_heads=c.num_key_value_heads,
        token_dim=c.num_key_value_heads * c.head_dim,
    )
    torch.manual_seed(6)
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(folder)
    edit_config(folder, "adapter_config.json", base_model_name_or_path=str(base))
    cache = tuned.get_prompt(1)
    pairs = (
        [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]
        if hasattr(cache, "self_attention_cache")
        else [(layer.keys, layer.values) for layer in cache.layers]
    )
    return folder, pairs


@pytest.mark.parametrize("family", ["glm", "glm2", "glm4"])
def test_prefix_tuning(tiny_folders, tmp_path, family):
    base = tiny_folders[family]
    folder, pairs = peft_prefix(base, tmp_path / "ad")
    for door in (lambda: load_model(folder), lambda: merge(base, folder, tmp_path)):
        with pytest.raises(ValueError, match=r"PREFIX_TUNING.*chatglm\.convert_adapter"):
            door()
    convert(folder, base, tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (3, False)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert list(stored) == ["transformer.prefix_encoder.embedding.weight"]
    with torch.no_grad():
        prefix = model.transformer.virtual_tokens(1)
    for number, (key, value) in enumerate(pairs):
        assert torch.equal(prefix[2 * number].squeeze(), key.squeeze())
        assert torch.equal(prefix[2 * number + 1].squeeze(), value.squeeze())
    assert not torch.allclose(logits_of(model), logits_of(load_model(base)), atol=1e-2)


# ---- adapters whose start changed the base


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_changes_the_base(tiny_folders, tmp_path, start):
    """load_model repeats the start, as peft does; a merge, which does not, refuses."""
    from peft import LoraConfig, get_peft_model

    base = tiny_folders["glm2"]
    config = LoraConfig(
        r=2, target_modules=["query_key_value"], init_lora_weights=start, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 1.5
    model.save_pretrained(tmp_path / "ad")
    edit_config(tmp_path / "ad", "adapter_config.json", base_model_name_or_path=str(base))
    for door in (
        lambda: merge(base, tmp_path / "ad", tmp_path),
        lambda: convert(tmp_path / "ad", base, tmp_path / "out"),
    ):
        with pytest.raises(
            ValueError, match=f"init_lora_weights {start}: training changed its base"
        ):
            door()
    torch.manual_seed(0)
    if start != "pissa_niter_2":  # whose SVD is drawn at random
        assert torch.allclose(logits_of(load_model(tmp_path / "ad")), logits_of(model), atol=1e-4)


# ---- errors, and the command


def flat(folder, lora, names=PEFT_NAMES, **more):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(named(lora, names) | more, folder / "chatglm-lora.pt")
    return folder / "chatglm-lora.pt"


NAME = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
WRONG = {  # test id -> (tensors that replace some of a file's, what is said)
    "others": ({"base_model.model.lm_head.weight": torch.ones(2)}, "it holds .*lm_head.weight"),
    "zero3": ({NAME: torch.ones(0)}, "is empty, as ZeRO-3 leaves a tensor"),
    "pair": ({NAME.replace("layers.0", "layers.9"): torch.ones(4, 40)}, "lacks .*lora_B"),
    "width": ({NAME: torch.ones(4, 39)}, r"is \[96, 40\] there, its LoRA is of \[96, 39\]"),
    "group": ({NAME: torch.ones(6, 40)}, "are no LoRA of 1 of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_cannot_be_converted(tiny_folders, tmp_path, case):
    base = tiny_folders["glm2"]
    tensors, said = WRONG[case]
    file = flat(tmp_path / "ad", random_lora(base), **tensors)
    with pytest.raises(ValueError, match=said):
        convert(file, base, tmp_path / "out", lora_alpha=8)
    assert [path.name for path in tmp_path.iterdir()] == ["ad"]


CONFIGS = {  # test id -> (changes of adapter_config.json, what is said)
    "dora": ({"use_dora": True}, "use_dora is not converted"),
    "rank": ({"r": 8}, "says r 8, .* has rank 4"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha must be int or float"),
    "pattern": ({"alpha_pattern": [1]}, "alpha_pattern must be dict"),
    "kind": ({"peft_type": "IA3"}, "wanted peft_type LORA, got .IA3."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_cannot_be_converted(tiny_folders, tmp_path, case):
    base = tiny_folders["glm2"]
    changes, said = CONFIGS[case]
    lora = named(random_lora(base), PEFT_NAMES)
    folder = write_adapter(tmp_path / "ad", peft_config(base, **changes), lora)
    with pytest.raises(ValueError, match=said):
        convert(folder, base, tmp_path / "out")


def test_a_llama_made_of_a_chatglm_is_refused(tiny_folders, tmp_path):
    base = tiny_folders["glm3"]
    lora = {"model.layers.0.mlp.gate_proj": (torch.ones(4, 40), torch.ones(56, 4))}
    folder = write_adapter(tmp_path / "ad", peft_config(base), named(lora, PEFT_NAMES))
    with pytest.raises(ValueError, match="gate_proj is no layer of GlmForCausalLM.*Llama"):
        convert(folder, base, tmp_path / "out")


def test_a_prefix_of_other_heads_is_refused(tiny_folders, tmp_path):
    folder, _ = peft_prefix(tiny_folders["glm2"], tmp_path / "ad")
    with pytest.raises(ValueError, match=r"wanted one tensor of \(virtual tokens, \d+\)"):
        convert(folder, tiny_folders["glm"], tmp_path / "out")


def test_folders_of_ms_swift_1(tiny_folders, tmp_path):
    base = tiny_folders["glm2"]
    lora = random_lora(base)
    config = peft_config(base, **SWIFT)
    tensors = named(lora, "{}.lora_{}.default.weight")
    write_adapter(tmp_path / "checkpoint-2" / "default", config, tensors)
    (tmp_path / "checkpoint-2" / "configuration.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint of ms-swift, its adapter is in .*default"):
        load_model(tmp_path / "checkpoint-2")
    convert(tmp_path / "checkpoint-2", base, tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == set(
        named(lora, PEFT_NAMES)
    )


def test_code_in_a_file_is_never_run(tiny_folders, tmp_path):
    import os
    import pickle

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "chatglm-lora.pt").write_bytes(pickle.dumps({"a": Runs()}))
    with pytest.raises(ValueError, match="holds something else than tensors"):
        convert(tmp_path / "chatglm-lora.pt", tiny_folders["glm2"], tmp_path / "out", lora_alpha=8)
    assert not (tmp_path / "ran").exists()


def test_the_command(tiny_folders, tmp_path, capsys):
    base, out = tiny_folders["glm"], tmp_path / "out"
    file = flat(tmp_path / "ad", random_lora(base))
    assert predict.main(["--model_path", str(file.parent), "--prompt", "a", "--device", "cpu"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"python -m chatglm.convert_adapter {file} --base BASE --output FOLDER" in said
    words = [str(file), "--base", str(base), "--output", str(out)]
    assert command.main(words) == 1
    error = capsys.readouterr().err.strip()
    assert "give --lora_alpha" in error and len(error.splitlines()) == 1
    words += ["--lora_alpha", "8"]
    done = subprocess.run(
        [warm_python(), "-m", "chatglm.convert_adapter", *words],
        capture_output=True,
        text=True,
        cwd=REPO_ROOT,
        check=True,
    )
    assert done.stdout.strip() == f"{out}: LoRA of 3 layers, rank 4, alpha 8, of {base}"
    assert command.main(words) == 1
    assert "is there already" in capsys.readouterr().err
    greedy = ["--prompt", "你好", "--device", "cpu", "--max_new_tokens", "3"]
    assert predict.main(["--model_path", str(out), *greedy]) == 0


# ---- prefixes of THUDM's ptuning and of ChatGLM-Efficient-Tuning's p_tuning


@pytest.mark.parametrize("projection", [False, True])
def test_official_prefixes_are_read(tiny_folders, tmp_path, projection):
    source = tiny_folders["glm2"]
    torch.manual_seed(1)
    tuned = load_model(source, pre_seq_len=3, prefix_projection=projection)
    state = {k: t for k, t in tuned.state_dict().items() if "prefix_encoder" in k}
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    config |= {"pre_seq_len": 3, "prefix_projection": projection, "_name_or_path": str(source)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "finetuning_args.json").write_text('{"finetuning_type": "p_tuning"}')
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(tuned))
