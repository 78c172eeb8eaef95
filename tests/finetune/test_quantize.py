"""Quantized folders: their weights, and what transformers and vLLM make of them.

GPTQModel runs in an environment of its own (benchmarks/client_env.py gptq), vLLM in another.
"""

import json
import random
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.client_env import environment_folder, environment_python
from chatglm import load_model, load_tokenizer
from chatglm.export.folders import export_glm
from finetune import quantize
from tests.chatglm.export.outside import make_release, read_json
from tests.chatglm.export.test_native_adapter import make_adapter
from tests.conftest import tiny_model, write_tokenizer
from tests.finetune.runs import child_env

# Heads of 32 numbers, as vLLM's kernels want them; inputs in groups of 32.
SIZES = {"hidden_size": 128, "kv_channels": 32, "num_attention_heads": 4, "ffn_hidden_size": 256}
SIZES |= {"multi_query_group_num": 2, "padded_vocab_size": 400}
GROUP = 32
# name: (family, changes of the configuration, method, is an adapter folded in)
CASES = {
    "gptq": ("glm4", {"rope_ratio": 500}, "gptq", False),
    "awq": ("glm3", {}, "awq", False),
    "adapter": ("glm2", {"rope_ratio": 16}, "gptq", True),
}
WORDS = ["hello", "world", "a", "b", "c", "今天", "天气", "很", "好", "你好", "世界"]
NEW = 8
OPENED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    assert type(model).__name__ == "GlmForCausalLM"
    assert "Linear" != type(model.model.layers[0].mlp.gate_up_proj).__name__
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = load_file(f"{folder}.ids")["ids"]
    with torch.inference_mode():
        logits = model(ids).logits.float()
    chat = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ends = model.generation_config.eos_token_id
    found = {"logits": logits, "prompt": torch.tensor(prompt), "ends": torch.tensor(ends)}
    save_file(found, f"{folder}.found")
assert "chatglm" not in sys.modules
"""
ASKED = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from vllm import LLM, SamplingParams

folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=8)
sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
asked = [{"prompt_token_ids": ids} for ids in prompts]
answers = [list(a.outputs[0].token_ids) for a in model.generate(asked, sampling)]
with open(f"{folder}.answers", "w") as file:
    json.dump(answers, file)
"""


def make_folder(place, name):
    family, changes, _, adapted = CASES[name]
    folder = place / f"{name}-base"
    folder.mkdir()
    write_tokenizer(folder, family)
    tiny_model(family, **SIZES | changes).save_pretrained(folder)
    load_tokenizer(folder).save_pretrained(folder)
    return make_adapter(folder, place / f"{name}-lora") if adapted else folder


def write_texts(file):
    draw = random.Random(0)
    with open(file, "w", encoding="utf-8") as rows:
        for _ in range(40):
            row = {"instruction": " ".join(draw.choices(WORDS, k=20))}
            row["output"] = " ".join(draw.choices(WORDS, k=30))
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def run(python, *words, place, **env):
    done = subprocess.run(
        [python, *map(str, words)],
        cwd=place,
        env=child_env(HF_HUB_OFFLINE="1", **env),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def unpacked(words, dim):
    """The numbers of 4 bits in int32 words, the lowest first, along a dimension."""
    parts = [(words >> (4 * place)) & 15 for place in range(8)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def dequantized(state, name, method):
    """A layer's weight (out, in), by the formats' definitions."""
    words, zeros = state[f"{name}.qweight"], unpacked(state[f"{name}.qzeros"], 1)
    if method == "gptq":  # AutoGPTQ's: zeros are stored less 1
        values, zeros = unpacked(words, 0), zeros + 1
        groups = state[f"{name}.g_idx"].long()
    else:  # AutoAWQ's: outputs are packed in this order
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        values = unpacked(words, 1).unflatten(1, (-1, 8))[:, :, order].flatten(1)
        zeros = zeros.unflatten(1, (-1, 8))[:, :, order].flatten(1)
        groups = torch.arange(len(values)) // GROUP
    return ((values - zeros[groups]) * state[f"{name}.scales"].float()[groups]).T


def rounded(weight):
    """The weight to the nearest of 16 values a group."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)


def with_weights(folder, weights):
    """Our model of an exported folder with some of its weights changed."""
    model = load_model(folder, dtype=torch.float32)
    lost = model.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys
    return model.eval()


class Quantized:
    """A case, run.

    Attributes:
        exported: the folder as --to glm writes it; output: the quantized one.
        ids: texts as those that it was calibrated on.
        weights: of its output under the exported folder's names, dequantized by hand.
    """

    def __init__(self, name, place):
        family, _, self.method, _ = CASES[name]
        folder = make_folder(place, name)
        self.exported, self.output = place / f"{name}-native", place / name
        export_glm(folder, self.exported)
        texts = write_texts(place / "rows.jsonl")
        words = ["-m", "finetune.quantize", folder, "--method", self.method, "--calibrate", texts]
        words += ["--output", self.output, "--group_size", GROUP]
        self.said = run(environment_python("gptq"), *words, place=place).splitlines()[-1]
        tokenizer = load_tokenizer(folder)
        rows = [tokenizer(" ".join(WORDS * (i + 2)))["input_ids"][:20] for i in range(4)]
        self.ids = torch.tensor(rows)
        state = load_file(self.output / "model.safetensors")
        self.weights = {}
        for key in load_file(self.exported / "model.safetensors"):
            layer = key.removesuffix(".weight")
            if f"{layer}.qweight" in state:
                self.weights[key] = dequantized(state, layer, self.method)
            else:  # AWQ scales norms too
                self.weights[key] = state[key].float()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """{name: its Quantized}, opened by transformers in one process."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("quantized")
    cases = {name: Quantized(name, place) for name in CASES}
    for case in cases.values():
        save_file({"ids": case.ids}, f"{case.output}.ids")
    outputs = [case.output for case in cases.values()]
    run(environment_python("gptq"), "-P", "-c", OPENED, *outputs, place=place, PYTHONPATH="")
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_transformers_opens_what_was_packed(quantized, name):
    case = quantized[name]
    exact = load_file(case.exported / "model.safetensors")
    layers = [key for key in exact if "_proj.weight" in key]
    assert len(layers) == 3 * 6
    for key in layers if case.method == "gptq" else []:  # AWQ scales inputs
        assert (case.weights[key] - exact[key]).std() < 0.2 * exact[key].std(), key
    packed = load_file(case.output / "model.safetensors")
    assert all([f"{key.removesuffix('.weight')}.qweight" in packed for key in layers])
    found = load_file(f"{case.output}.found")
    model = with_weights(case.exported, case.weights)
    logits = model(case.ids).logits
    assert (found["logits"] - logits).std() < 0.06 * logits.std()  # bf16's rounding
    best = with_weights(case.exported, {})(case.ids).logits
    plain = {key: rounded(exact[key]) for key in layers}
    nearest = with_weights(case.exported, plain)(case.ids).logits
    assert (logits - best).std() < 0.9 * (nearest - best).std()  # than without calibration


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_the_export(quantized, name):
    case = quantized[name]
    for file in quantize.KEPT_FILES:
        assert (case.output / file).read_bytes() == (case.exported / file).read_bytes()
    config, wanted = (
        read_json(case.output / "config.json"),
        read_json(case.exported / "config.json"),
    )
    settings = config.pop("quantization_config")
    assert settings["quant_method"] == case.method and settings["bits"] == 4
    assert settings["group_size"] == GROUP and "offload_to_disk_path" not in settings["meta"]
    assert config | {"torch_dtype": "float32"} == wanted
    found = load_file(f"{case.output}.found")
    tokenizer = load_tokenizer(case.exported)
    assert found["ends"].tolist() == tokenizer.stop_ids
    assert "calibrated on 40 rows" in case.said
    assert ("its adapter folded in" in case.said) == (name == "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_vllm_answers_as_the_packed_weights_do(quantized, name):
    if not (environment_folder("vllm") / "complete").exists():
        pytest.skip("vLLM is not there: python benchmarks/client_env.py vllm makes its environment")
    case = quantized[name]
    prompts = case.ids.tolist()
    words = ["-P", "-c", ASKED, case.output, json.dumps(prompts), NEW]
    place = case.output.parent
    run(environment_folder("vllm") / "bin" / "python", *words, place=place, PYTHONPATH="")
    model = with_weights(case.exported, case.weights)
    for prompt, answer in zip(prompts, read_json(case.output.with_name(f"{name}.answers"))):
        scores = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (scores.max(dim=1).values - chosen).max() < 0.1 and len(answer) == NEW


# ---- without GPTQModel


def test_gate_and_up_become_one_layer():
    gate, up = torch.arange(6).view(2, 3), torch.arange(6, 12).view(2, 3)
    stored = {
        "a.mlp.gate_proj.qweight": gate,
        "a.mlp.up_proj.qweight": up,
        "a.mlp.gate_proj.g_idx": gate[0],
        "a.mlp.up_proj.g_idx": gate[0],
        "a.mlp.down_proj.g_idx": up[0],
    }
    names = quantize.fused_names(list(stored))
    assert names == [
        "a.mlp.gate_up_proj.qweight",
        "a.mlp.gate_up_proj.g_idx",
        "a.mlp.down_proj.g_idx",
    ]
    tensors = quantize.FusedTensors(stored)
    assert torch.equal(tensors[names[0]], torch.cat([gate, up], 1))
    assert torch.equal(tensors[names[1]], gate[0]) and torch.equal(tensors[names[2]], up[0])
    stored["a.mlp.up_proj.g_idx"] = up[0]
    with pytest.raises(ValueError, match="groups of their own"):
        tensors[names[1]]


def refused(capsys, *words):
    capsys.readouterr()
    assert quantize.main([str(word) for word in words]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("finetune.quantize: error: "), message
    return message


def test_what_cannot_be_quantized(tmp_path, tiny_folders, capsys, monkeypatch):
    rows = write_texts(tmp_path / "rows.jsonl")
    flags = ("--method", "gptq", "--calibrate", rows, "--output", tmp_path / "out")
    assert "two dimensions" in refused(capsys, tiny_folders["glm"], *flags)
    narrow = make_release(tmp_path / "narrow", "glm3")
    message = refused(capsys, narrow, *flags, "--group_size", 32)
    assert f"--group_size 32: {narrow} has hidden_size 40, no multiple" in message
    monkeypatch.setitem(CASES, "plain", ("glm3", {}, "gptq", False))
    folder = make_folder(tmp_path, "plain")
    (tmp_path / "bad.jsonl").write_text('{"instruction": 1}\n')
    other = [tmp_path / "bad.jsonl" if word == rows else word for word in flags]
    assert "bad.jsonl:1" in refused(capsys, folder, *other)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[gptq]'" in refused(capsys, folder, *flags)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
