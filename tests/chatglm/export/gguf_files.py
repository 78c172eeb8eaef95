"""Tiny models as GGUF files, what is in them, and what llama.cpp answers."""

import json
import subprocess

import gguf
import numpy as np
import torch
from sentencepiece import sentencepiece_model_pb2

from benchmarks.client_env import environment_python
from chatglm import load_model, load_tokenizer
from chatglm.export.command import main
from chatglm.export.gguf_file import gguf_name
from tests.conftest import REPO_ROOT, tiny_model, write_tokenizer
from tests.finetune.runs import child_env

# Heads times kv_channels is the hidden size, as llama.cpp wants it; rows can be packed by 32.
SIZES = {"hidden_size": 64, "kv_channels": 16, "num_attention_heads": 4, "ffn_hidden_size": 96}
SIZES |= {"multi_query_group_num": 2, "padded_vocab_size": 400}
RELEASES = {
    "glm2": ("glm2", {}),
    "glm2-32k": ("glm2", {"rope_ratio": 16}),
    "glm3": ("glm3", {}),
    "glm3-32k": ("glm3", {"rope_ratio": 50}),
    "glm4": ("glm4", {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}),
    "glm4-tied": ("glm4", {"tie_word_embeddings": True}),
}
# By type of the matrices: the most by which a chosen token is less likely than ours. llama.cpp
# rounds what it multiplies to q8_0 where weights are packed, and to f16 where they are f16.
TIES = {"f16": 0.02, "q8_0": 0.6, "q4_0": 0.6}
TOKENS = 16  # of an answer


def make_folder(place, name):
    """A tiny model of RELEASES with its tokenizer."""
    family, changes = RELEASES[name]
    folder = place / name
    folder.mkdir(parents=True)
    write_tokenizer(folder, family)
    if family != "glm4":
        keep_spaces(folder / "tokenizer.model")
    tiny_model(family, **SIZES | changes).save_pretrained(folder)
    load_tokenizer(folder).save_pretrained(folder)
    return folder


def keep_spaces(file):
    """Let a SentencePiece model read repeated spaces, as the releases' do."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    model.normalizer_spec.remove_extra_whitespaces = False
    file.write_bytes(model.SerializeToString())


def export(folder, file, *words) -> "gguf.GGUFReader":
    words = [str(folder), "--to", "gguf", "--output", str(file), *map(str, words)]
    assert main(words) == 0
    return gguf.GGUFReader(file)


def settings(reader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader) -> dict[str, np.ndarray]:
    found = {}
    for tensor in reader.tensors:
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def model_of(reader, folder):
    """Our model with the weights that a GGUF file holds."""
    model, found = load_model(folder, dtype=torch.float32), tensors(reader)
    state = {}
    for name, tensor in model.state_dict().items():
        if gguf_name(name) in found:
            state[name] = torch.tensor(found[gguf_name(name)]).view_as(tensor)
    lost = model.load_state_dict(state, strict=False).missing_keys
    assert lost in ([], ["transformer.output_layer.weight"])
    return model


def random_prompts(seed: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 330, size=5 + 3 * row).tolist() for row in range(13)]


@torch.inference_mode()
def check_answers(model, prompts, answers, kind):
    """Every token of the answers is our likeliest one too, or nearly."""
    for prompt, answer in zip(prompts, answers):
        assert len(answer) == TOKENS
        whole = torch.tensor([prompt + answer])
        scores = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (scores.max(dim=1).values - chosen).max() < TIES[kind]


def run_llama(place, case: dict) -> dict:
    """What llama_answers.py finds."""
    (place / "case.json").write_text(json.dumps(case), encoding="utf-8")
    python = environment_python("llama_cpp")
    script = REPO_ROOT / "tests" / "chatglm" / "export" / "llama_answers.py"
    words = [python, script, place / "case.json"]
    done = subprocess.run(
        words, env=child_env(PYTHONPATH=""), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "case.json.found").read_text())
