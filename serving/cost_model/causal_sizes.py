"""Sizes of transformers' GLM, Llama and Qwen models by arithmetic on their config.json.

Counts are elements, widths are elements of one token.
"""

from dataclasses import dataclass
from typing import Any

from chatglm.evidence import is_glm_base


@dataclass(frozen=True)
class CausalParts:
    """What a layer of one model_type has beside its projections.

    Attributes:
        qkv_bias: queries, keys and values have biases, whatever `attention_bias` says.
        output_bias: `attention_bias` gives the attention's output one too.
        norms: of the hidden width.
        head_norms: of queries and of keys, of a head's width.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    norms: int = 2
    head_norms: int = 0


CAUSAL_PARTS: dict[str, CausalParts] = {  # by config.json's model_type
    "glm": CausalParts(),
    "glm4": CausalParts(norms=4),
    "llama": CausalParts(output_bias=True),
    "qwen2": CausalParts(qkv_bias=True),
    "qwen3": CausalParts(output_bias=True, head_norms=2),
}
CAUSAL_WIDTHS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class CausalShape:
    """The settings of a causal model's config that decide sizes.

    Attributes:
        query, kv: widths of a layer's queries, and of its keys; the values have the same.
        per_layer: parameters of one layer.
        tied: embedding and output layer share their matrix.
    """

    layers: int
    hidden: int
    query: int
    kv: int
    vocab: int
    per_layer: int
    tied: bool

    @property
    def total(self) -> int:
        """Parameters of the model."""
        ends = 1 if self.tied else 2
        return self.layers * self.per_layer + (ends * self.vocab + 1) * self.hidden


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a config.json is of one of CAUSAL_PARTS, which have other names than a ChatGLM's."""
    return config.get("model_type") in CAUSAL_PARTS and not is_glm_base(config)


def causal_shape(config: dict[str, Any]) -> CausalShape:
    """The shape of a config.

    Raises:
        ValueError: a width is missing, or no whole number of at least 1.
    """
    parts = CAUSAL_PARTS[config["model_type"]]
    for name in CAUSAL_WIDTHS:
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.json: {name} must be a whole number of at least 1, got {value!r}"
            )
    layers, hidden, inner, heads, vocab = (config[name] for name in CAUSAL_WIDTHS)
    head_dim = config.get("head_dim") or hidden // heads
    query = heads * head_dim
    kv = (config.get("num_key_value_heads") or heads) * head_dim
    attention = hidden * (2 * query + 2 * kv)
    if parts.qkv_bias or config.get("attention_bias"):
        attention += query + 2 * kv
    if parts.output_bias and config.get("attention_bias"):
        attention += hidden
    mlp = 3 * hidden * inner
    if config.get("mlp_bias"):
        mlp += 2 * inner + hidden
    norms = parts.norms * hidden + parts.head_norms * head_dim
    return CausalShape(
        layers=layers,
        hidden=hidden,
        query=query,
        kv=kv,
        vocab=vocab,
        per_layer=attention + mlp + norms,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
