"""Tiny models as GGUF files, what is in them, and what llama.cpp answers."""

import json
import subprocess

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from benchmarks.client_env import environment_python
from chatglm import load_tokenizer
from chatglm.export.command import main
from tests.conftest import REPO_ROOT, tiny_model, write_tokenizer
from tests.finetune.runs import child_env

# Heads times kv_channels is the hidden size, as llama.cpp wants it; rows can be packed by 32.
SIZES = {"hidden_size": 64, "kv_channels": 16, "num_attention_heads": 4, "ffn_hidden_size": 96}
SIZES |= {"multi_query_group_num": 2, "padded_vocab_size": 400}
RELEASES = {
    "glm2": ("glm2", {}),
    "glm2-32k": ("glm2", {"rope_ratio": 16}),
    "glm3-32k": ("glm3", {"rope_ratio": 50}),
    "glm4": ("glm4", {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}),
    "glm4-tied": ("glm4", {"tie_word_embeddings": True}),
}


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
