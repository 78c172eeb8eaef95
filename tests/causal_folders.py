"""Tiny folders of other causal models, as their makers publish them: random weights, a byte-level
vocabulary, the control tokens and the chat template of each.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = [
    "你是一个信息抽取专家。请从文本中抽取三元组。",
    "The quick brown fox asks a question and gets an answer.",
    "问题和答案，训练和推理。 What is the length of an answer? It is 12 tokens.",
]
CHATML = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Earlier answers have no thoughts, the last one has.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.metadata or '' }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
LLAMA_TOKENS += ["<|end_header_id|>"]
GLM_TOKENS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
GLM_TOKENS += ["<|observation|>"]
# model_type: (config class, model class, template, control tokens, ends of an answer)
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, CHATML, CHATML_TOKENS, ["<|im_end|>"]),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, QWEN3, CHATML_TOKENS, ["<|im_end|>"]),
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA3, LLAMA_TOKENS, ["<|eot_id|>"]),
    "glm": (GlmConfig, GlmForCausalLM, GLM, GLM_TOKENS, ["<|endoftext|>", "<|user|>"]),
    "glm4": (Glm4Config, Glm4ForCausalLM, GLM, GLM_TOKENS, ["<|endoftext|>", "<|user|>"]),
}


def byte_level_tokenizer(controls: list[str], **options) -> PreTrainedTokenizerFast:
    """Byte pairs of a few texts, `controls` as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def make_causal_folder(folder: Path, kind: str, template: str | None = "", **changes) -> Path:
    """A tiny model of a kind of KINDS.

    Args:
        template: another chat template; None for a base model without one.
        changes: of its configuration.
    """
    own_template, controls, ends = KINDS[kind][2:]
    tokenizer = byte_level_tokenizer(controls, eos_token=ends[-1], pad_token=controls[0])
    if kind == "llama":
        tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = own_template if template == "" else template
    tokenizer.save_pretrained(folder)
    model = random_causal_model(
        kind,
        vocab_size=len(tokenizer) + 4,
        eos_token_id=tokenizer.convert_tokens_to_ids(ends),
        **changes,
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == kind
    return folder


def random_causal_model(kind: str, **changes):
    """A model of 2 layers with random weights, norms and biases too; `changes` of its config."""
    config_class, model_class, *_ = KINDS[kind]
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": kind == "qwen2",
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
