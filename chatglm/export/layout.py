"""Names and configurations of the same model as ChatGLM2 to GLM-4 and as GlmForCausalLM.

The two differ in names, in query_key_value, whose rows are q_proj's, k_proj's and v_proj's in that
order, and in how the configuration says the rotary positions: `rope_ratio` divides positions in
ChatGLM2 (transformers' rope_type "linear") and multiplies the base in ChatGLM3 and GLM-4.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration import SHARED_LAYOUT, ChatGLM2Config
from ..evidence import GLM4_VOCABULARY
from ..families import FAMILIES
from ..files import shorten

BASE = 10000.0  # of the rotary angles
FUSED = "self_attention.query_key_value"
SPLIT = ("q_proj", "k_proj", "v_proj")
# Parts of a layer that differ in their names alone.
LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
OTHER_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
CHATGLM_LAYER = "transformer.encoder.layers."
GLM_LAYER = "model.layers."


def glm_modules(module: str) -> list[str]:
    """GlmForCausalLM's names of a module of ChatGLM2ForConditionalGeneration: three of the fused.

    Raises:
        KeyError: there is no such module.
    """
    if module in OTHER_NAMES:
        return [OTHER_NAMES[module]]
    number, _, part = module.removeprefix(CHATGLM_LAYER).partition(".")
    if part == FUSED:
        return [f"{GLM_LAYER}{number}.self_attn.{name}" for name in SPLIT]
    return [f"{GLM_LAYER}{number}.{LAYER_NAMES[part]}"]


def chatglm_module(module: str) -> str:
    """The reverse of `glm_modules`. Raises KeyError for a module of no ChatGLM."""
    for ours, theirs in OTHER_NAMES.items():
        if module == theirs:
            return ours
    found = re.fullmatch(rf"{re.escape(GLM_LAYER)}(\d+)\.(.+)", module)
    if found is None:
        raise KeyError(module)
    number, part = found.groups()
    if part.removeprefix("self_attn.") in SPLIT:
        return f"{CHATGLM_LAYER}{number}.{FUSED}"
    names = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
    return f"{CHATGLM_LAYER}{number}.{names[part]}"


def fused_sizes(config: ChatGLM2Config) -> list[int]:
    """Rows of queries, keys and values in query_key_value."""
    keys = config.num_key_value_heads * config.kv_channels
    return [config.num_attention_heads * config.kv_channels, keys, keys]


def refuse_structure(folder: Path, config: ChatGLM2Config) -> None:
    """Raises ValueError where GlmForCausalLM has no place for a part of a model."""
    reason = None
    if config.add_bias_linear:
        reason = "add_bias_linear: GlmForCausalLM has biases of queries, keys and values alone"
    elif not config.multi_query_attention:
        reason = "multi_query_attention false: no release has it"
    elif config.pre_seq_len:
        reason = "a P-Tuning prefix has no place in GlmForCausalLM"
    if reason:
        raise ValueError(f"{folder} cannot be exported: {reason}")


def glm_config(config: ChatGLM2Config) -> dict[str, Any]:
    """The fields of GlmForCausalLM's config.json that say the same as a ChatGLM's.

    Both spellings of the rotary positions are there: rope_parameters of transformers 5, and the
    three fields of transformers 4 and of other readers.
    """
    ratio, family = float(config.rope_ratio), config.glm_family
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": BASE}
    if family == "glm2" and ratio != 1:
        rope = {"rope_type": "linear", "factor": ratio, "rope_theta": BASE}
    elif family != "glm2":
        rope["rope_theta"] = BASE * ratio
    rope["partial_rotary_factor"] = 0.5
    fields: dict[str, Any] = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout,
        "max_position_embeddings": config.seq_length,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.layernorm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": 0.5,
    }
    if rope["rope_type"] == "linear":
        fields["rope_scaling"] = {"rope_type": "linear", "factor": ratio}
    return fields


def chatglm_config(file: Path, config: Any, family: str) -> dict[str, Any]:
    """The fields of a ChatGLM's config.json that say the same as a GlmConfig.

    Args:
        file: the config.json, for errors.
        config: transformers' GlmConfig.
        family: glm2, glm3 or glm4.
    Raises:
        ValueError: ChatGLM has no field for a part of it.
    """
    rope = config.rope_parameters
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    wanted: dict[str, tuple[Any, Any]] = {"hidden_act": (config.hidden_act, "silu")}
    wanted["partial_rotary_factor"] = (rope.get("partial_rotary_factor", 1.0), 0.5)
    if kind == "linear":
        wanted["rope_theta"] = (theta, BASE)
        wanted["rope_type"] = (family, "glm2")
    else:
        wanted["rope_type"] = (kind, "default")
        if family == "glm2":
            wanted["rope_theta"] = (theta, BASE)
    for name, (found, value) in wanted.items():
        if found != value:
            raise ValueError(
                f"{file}: {name} {shorten(found)} cannot be said by a {FAMILIES[family].title}'s "
                f"config.json, wanted {value}"
            )
    ratio = float(rope["factor"]) if kind == "linear" else theta / BASE
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "glm_family": family,
        "num_layers": config.num_hidden_layers,
        "padded_vocab_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "seq_length": config.max_position_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": config.attention_dropout,
        "layernorm_epsilon": config.rms_norm_eps,
        "rmsnorm": True,
        "apply_residual_connection_post_layernorm": False,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "bias_dropout_fusion": True,
        "attention_softmax_in_fp32": True,
        "apply_query_key_layer_scaling": True,
        "fp32_residual_connection": False,
        "original_rope": True,
        "rope_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


# Fields of ChatGLM2Config that decide what a model computes.
STRUCTURE = (
    *("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels"),
    *("num_attention_heads", "multi_query_group_num", "layernorm_epsilon", "add_qkv_bias"),
    *("seq_length", "tie_word_embeddings", "rope_ratio", "glm_family"),
)


def says_the_same(values: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two ChatGLM configurations, the values of config.json, are of the same model.

    False also where the first is no valid configuration.
    """
    try:
        first = ChatGLM2Config.from_dict(dict(values) | {"glm_family": others["glm_family"]})
        second = ChatGLM2Config.from_dict(dict(others))
    except (ValueError, TypeError):
        return False
    return all(getattr(first, name) == getattr(second, name) for name in STRUCTURE)


def family_of_config(file: Path, config: Any, noted: object, mode: str | None) -> str:
    """The family of a GlmForCausalLM: what the export noted, or was asked for, or its config shows.

    Args:
        file: its config.json, for errors.
        noted: the family that the export noted; None without a note.
    Raises:
        ValueError: nothing tells it, or `mode` is no family of this layout, or another than noted.
    """
    if mode is not None and mode not in SHARED_LAYOUT:
        raise ValueError(f"--mode {mode} has another layout; wanted {', '.join(SHARED_LAYOUT)}")
    if isinstance(noted, str) and noted in SHARED_LAYOUT:
        if mode not in (None, noted):
            raise ValueError(f"--mode {mode} does not fit {file.parent}: exported from {noted}")
        return noted
    if mode is not None:
        return mode
    if config.vocab_size == GLM4_VOCABULARY:
        return "glm4"
    if config.rope_parameters.get("rope_type") == "linear":
        return "glm2"
    raise ValueError(f"{file} does not tell its family: say --mode {', '.join(SHARED_LAYOUT)}")
