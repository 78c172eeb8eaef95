"""Pangu-alpha (arXiv 2104.12369): a decoder with learned positions and a query layer on top.

The last block is the query layer: its queries are an embedding of the position, `wqe`, in the place
of the hidden states, which give its keys, values and residual. The final norm stands before it.
Names of weights are those of sunzeyeah/RLHF's releases.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .auto_classes import WITH_SCORE, register_model
from .configuration import PanguConfig
from .kernels import OutputLayer
from .layers import AttentionMask, attend, make_prefix_encoder
from .modeling_base import ChatGLMPreTrainedModel
from .modeling_body import ChatGLMBody
from .modeling_classification import ChatGLMClassifier
from .modeling_head import ChatGLMCausalLM


class PanguAttention(nn.Module):
    """Multi-head attention with projections of their own for queries, keys and values."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: PanguConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attn_pdrop
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.c_proj = nn.Linear(hidden, hidden)

    def forward(
        self,
        asking: Tensor,
        hidden_states: Tensor,
        mask: AttentionMask,
        prefix: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, S, hidden_size), or of the kept tokens, and the attention weights or None.

        Args:
            asking: (B, S, hidden_size) what the queries are made of.
        """
        by_head = (-1, self.head_dim)
        query = self.q_proj(asking).unflatten(-1, by_head).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, by_head).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, by_head).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kwargs.pop("keep", None)
        out, weights = attend(self, query, key, value, mask, prefix, **kwargs)
        return self.c_proj(out), weights


class PanguMLP(nn.Module):
    """The feed-forward part of a block, with GELU."""

    def __init__(self, config: PanguConfig):
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.c_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class PanguBlock(GradientCheckpointingLayer):
    """A transformer block with pre-norm residuals; the last one is the query layer."""

    def __init__(self, config: PanguConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = PanguAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = PanguMLP(config)
        self.is_query_layer = layer_idx == config.num_layers - 1
        self.dropout = config.resid_pdrop

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        asking: Tensor,
        prefix: Tensor | None = None,
        past_key_values: Cache | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # `prefix` is a separate argument: gradient checkpointing drops any past_key_values.
        normed = self.ln_1(hidden_states)
        out, _ = self.attn(
            asking if self.is_query_layer else normed,
            normed,
            mask,
            prefix,
            past_key_values=past_key_values,
            **kwargs,
        )
        if keep is not None:
            hidden_states = hidden_states[:, keep]
        hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.ln_2(hidden_states))
        return hidden_states + F.dropout(out, self.dropout, self.training)


class PanguPreTrainedModel(ChatGLMPreTrainedModel):
    config: PanguConfig
    config_class = PanguConfig
    _no_split_modules = ["PanguBlock"]
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": PanguBlock, "attentions": PanguAttention}
    # tables of the causal mask
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]


class PanguModel(ChatGLMBody, PanguPreTrainedModel):
    """The body."""

    config: PanguConfig

    def __init__(self, config: PanguConfig):
        super().__init__(config)
        places = config.max_position_embeddings
        self.max_positions = places
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(places, config.hidden_size)
        self.wqe = nn.Embedding(places, config.hidden_size)
        self.h = nn.ModuleList(PanguBlock(config, i) for i in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.prefix_encoder = make_prefix_encoder(config, embedding_dim=config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    @property
    def blocks(self) -> list[Callable[..., Tensor]]:
        return [*self.h[:-1], self.query_layer]

    @property
    def final_norm(self) -> nn.Module:
        """Nothing: ln_f stands before the query layer."""
        return nn.Identity()

    def with_positions(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, hidden_size) and what the query layer asks, (B or 1, S, hidden_size).

        Both are in the embeddings' dtype, as positions are looked up outside of autocast.
        """
        embeds = embeds + self.wpe(position_ids).to(embeds.dtype)
        embeds = F.dropout(embeds, self.config.embd_pdrop, self.training)
        return embeds, self.wqe(position_ids).to(embeds.dtype).expand_as(embeds)

    def query_layer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The last block, after the final norm."""
        return self.h[-1](self.ln_f(hidden_states), *args, **kwargs)


class PanguForCausalLM(ChatGLMCausalLM, PanguPreTrainedModel, GenerationMixin):
    """The body with its output layer: `forward`, `generate`, `chat`, `stream_chat`."""

    config: PanguConfig
    transformer: PanguModel

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: PanguConfig):
        super().__init__(config)
        self.transformer = PanguModel(config)
        self.lm_head: nn.Module = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class PanguForSequenceClassification(ChatGLMClassifier, PanguPreTrainedModel):
    """Pangu-alpha's body with a score."""

    config: PanguConfig
    body_class = PanguModel


register_model(PanguForCausalLM)
register_model(PanguForSequenceClassification, WITH_SCORE)
