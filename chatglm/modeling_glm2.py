"""ChatGLM2-6B and ChatGLM3-6B.

RMSNorm, SwiGLU, grouped queries, interleaved rotary positions on half of each head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .auto_classes import WITH_SCORE, register_model
from .configuration import ChatGLM2Config
from .kernels import OutputLayer, RMSNormFunction, RotateFunction, SwiGLUFunction, turn_pairs_
from .layers import (
    AttentionMask,
    attend,
    inverse_frequencies,
    make_prefix_encoder,
    rotary_turns,
)
from .modeling_base import ChatGLMPreTrainedModel
from .modeling_body import ChatGLMBody
from .modeling_classification import ChatGLMClassifier
from .modeling_head import ChatGLMCausalLM


class RMSNorm(nn.Module):
    """arXiv 1910.07467; variance in fp32, output in the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


class GLM2SelfAttention(nn.Module):
    """Grouped-query attention; the names of its layers are the originals'."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.kv_channels
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        qkv_size = (self.heads + 2 * self.kv_heads) * self.head_dim
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, qkv_size, bias=qkv_bias)
        self.dense = nn.Linear(
            self.heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear
        )

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        turns: Tensor,
        prefix: Tensor | None = None,
        past_key_values: Cache | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, S, hidden_size), or of the kept tokens, and the attention weights or None."""
        qkv = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))
        if not self.config.multi_query_attention:
            # From query, key and value of each head to all queries, all keys, all values.
            qkv = qkv.unflatten(2, (self.heads, 3)).transpose(2, 3).flatten(2, 3)
        qkv = RotateFunction.apply(qkv, turns, self.heads + self.kv_heads, turn_pairs_)
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        query, key, value = qkv.transpose(1, 2).split(sizes, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = attend(self, query, key, value, mask, prefix, **kwargs)
        return self.dense(out), weights


class GLM2MLP(nn.Module):
    """The feed-forward part of a block, with SwiGLU."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(hidden, 2 * inner, bias=bias)
        self.dense_4h_to_h = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(SwiGLUFunction.apply(self.dense_h_to_4h(x)))


class ChatGLM2Block(GradientCheckpointingLayer):
    """A transformer block with pre-norm residuals."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = GLM2SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = GLM2MLP(config)
        self.hidden_dropout = config.hidden_dropout

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        turns: Tensor,
        prefix: Tensor | None = None,
        past_key_values: Cache | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # `prefix` is a separate argument: gradient checkpointing drops any past_key_values.
        out = self.input_layernorm(hidden_states)
        out, _ = self.self_attention(
            out, mask, turns, prefix, past_key_values=past_key_values, keep=keep, **kwargs
        )
        if keep is not None:
            hidden_states = hidden_states[:, keep]
        hidden_states = hidden_states + F.dropout(out, self.hidden_dropout, self.training)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(out, self.hidden_dropout, self.training)


class TokenEmbedding(nn.Module):
    """Holds the token embeddings under the originals' name."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.word_embeddings: nn.Module = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class TransformerLayers(nn.Module):
    """Holds the blocks under the originals' names; ChatGLM2Model runs them."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class ChatGLM2PreTrainedModel(ChatGLMPreTrainedModel):
    config: ChatGLM2Config
    config_class = ChatGLM2Config
    _no_split_modules = ["ChatGLM2Block"]
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": GLM2SelfAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]


class ChatGLM2Model(ChatGLMBody, ChatGLM2PreTrainedModel):
    """The body.

    It also owns `output_layer`, as the originals do; ChatGLM2ForConditionalGeneration applies it.
    """

    config: ChatGLM2Config

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.embedding = TokenEmbedding(config)
        self.encoder = TransformerLayers(config)
        self.output_layer: nn.Module = OutputLayer(
            config.hidden_size, config.padded_vocab_size, bias=config.add_bias_linear
        )
        kv_size = 2 * config.num_layers * config.num_key_value_heads * config.kv_channels
        self.prefix_encoder = make_prefix_encoder(config, embedding_dim=kv_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = value

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.encoder.final_layernorm

    def rotary(self, position_ids: Tensor) -> Tensor:
        """Turns (B, S, kv_channels / 4) complex64.

        `rope_ratio` divides positions in ChatGLM2 and multiplies the base in ChatGLM3.
        """
        ratio, rotary_dim = self.config.rope_ratio, self.config.kv_channels // 2
        device = position_ids.device
        if self.config.glm_family == "glm2":
            return rotary_turns(
                position_ids.float() / ratio, inverse_frequencies(rotary_dim, device)
            )
        inv_freq = inverse_frequencies(rotary_dim, device, base=10000.0 * ratio)
        return rotary_turns(position_ids, inv_freq)


class ChatGLM2ForConditionalGeneration(ChatGLMCausalLM, ChatGLM2PreTrainedModel, GenerationMixin):
    """The body with its output layer: `forward`, `generate`, `chat`, `stream_chat`."""

    config: ChatGLM2Config
    transformer: ChatGLM2Model

    _tied_weights_keys = {
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.transformer.output_layer = value


class ChatGLM2ForSequenceClassification(ChatGLMClassifier, ChatGLM2PreTrainedModel):
    """The body of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B with a score."""

    config: ChatGLM2Config
    body_class = ChatGLM2Model


register_model(ChatGLM2ForConditionalGeneration)
register_model(ChatGLM2ForSequenceClassification, WITH_SCORE)
