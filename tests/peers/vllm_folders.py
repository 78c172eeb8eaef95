"""vLLM's environment, tiny releases that its CPU kernels serve, and prompts for them."""

import pytest
import torch

from benchmarks.client_env import environment_folder
from chatglm.tokenization import ChatGLMTokenizer
from tests.conftest import tiny_model, write_tokenizer
from tests.releases import publish

# vLLM's CPU kernels want heads of 32 numbers and more.
SIZES = {"hidden_size": 192, "kv_channels": 32, "padded_vocab_size": 400}
RELEASES = {
    "glm2": ("glm2", {}),
    "glm2-32k": ("glm2", {"rope_ratio": 16}),
    "glm3": ("glm3", {}),
    "glm3-32k": ("glm3", {"rope_ratio": 50}),
    "glm4": ("glm4", {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}),
    "glm4-tied": ("glm4", {"tie_word_embeddings": True}),
}
PROMPTS = 12


def made_python():
    """vLLM's python; skips where its environment was not made."""
    folder = environment_folder("vllm")
    if not (folder / "complete").exists():
        pytest.skip("vLLM is not there: python benchmarks/client_env.py vllm makes its environment")
    return folder / "bin" / "python"


def make_release(place, name):
    """A tiny model of RELEASES, laid out as it would be released."""
    family, changes = RELEASES[name]
    source = place / f"{name}-source"
    source.mkdir(parents=True)
    write_tokenizer(source, family)
    tokenizer = ChatGLMTokenizer.from_pretrained(str(source))
    tiny_model(family, **SIZES | changes).save_pretrained(source)
    tokenizer.save_pretrained(source)
    return publish(source, place / name, family)


def draw_prompts(seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for row in range(PROMPTS):
        prompts.append(torch.randint(3, 330, (4 + 7 * row,), generator=generator).tolist())
    return prompts
