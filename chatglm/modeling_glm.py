"""ChatGLM-6B: 2-D rotary positions, bidirectional context, residuals of the LayerNorm's output.

Layout of a row: context, [gMASK], <sop>, answer, <eop>. The context (all before <sop>) is seen by
every position; the answer is causal. Positions are pairs: (place, 0) in the context,
(place of the mask token, 1, 2, ...) from <sop> on.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .auto_classes import WITH_SCORE, register_model
from .configuration import ChatGLM1Config
from .kernels import OutputLayer, RotateFunction, turn_halves_
from .layers import (
    AttentionMask,
    attend,
    inverse_frequencies,
    make_prefix_encoder,
    rotary_turns,
)
from .modeling_base import ChatGLMPreTrainedModel
from .modeling_classification import ChatGLMClassifier
from .modeling_infilling import InfillingBody, InfillingCausalLM, InfillingMarks

# sqrt(2 * 28) whatever the depth: the original's blocks do not know the number of layers.
RESIDUAL_SCALE = 56**0.5


class GLMSelfAttention(nn.Module):
    """Multi-head attention; the names of its layers are the original's."""

    num_key_value_groups = 1
    attention_dropout = 0.0
    is_causal = True

    def __init__(self, config: ChatGLM1Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.score_coefficient = layer_idx + 1
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

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
        # From query, key and value of each head to all queries, all keys, all values.
        qkv = self.query_key_value(hidden_states)
        qkv = qkv.unflatten(-1, (self.heads, 3, self.head_dim)).transpose(2, 3).flatten(2, 3)
        qkv = RotateFunction.apply(qkv, turns, 2 * self.heads, turn_halves_)
        query, key, value = qkv.transpose(1, 2).chunk(3, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = attend(self, query, key, value, mask, prefix, **kwargs)
        return self.dense(out), weights


class GLMMLP(nn.Module):
    """The feed-forward part of a block, with GELU."""

    def __init__(self, config: ChatGLM1Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class ChatGLM1Block(GradientCheckpointingLayer):
    """A transformer block; its residuals are the scaled outputs of the norms."""

    def __init__(self, config: ChatGLM1Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = GLMSelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = GLMMLP(config)

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
        normed = self.input_layernorm(hidden_states)
        out, _ = self.attention(
            normed, mask, turns, prefix, past_key_values=past_key_values, keep=keep, **kwargs
        )
        if keep is not None:
            normed = normed[:, keep]
        normed = self.post_attention_layernorm(normed * RESIDUAL_SCALE + out)
        return normed * RESIDUAL_SCALE + self.mlp(normed)


class ChatGLM1PreTrainedModel(ChatGLMPreTrainedModel):
    config: ChatGLM1Config
    config_class = ChatGLM1Config
    scale_dtype = torch.float16
    _no_split_modules = ["ChatGLM1Block"]
    _supports_flash_attn = False  # flash kernels cannot express the bidirectional context
    _can_record_outputs = {"hidden_states": ChatGLM1Block, "attentions": GLMSelfAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]


class ChatGLM1Model(InfillingBody, ChatGLM1PreTrainedModel):
    """The body."""

    title = "ChatGLM-6B"
    config: ChatGLM1Config

    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLM1Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.prefix_encoder = make_prefix_encoder(config, embedding_dim=config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def rotary(self, position_ids: Tensor) -> Tensor:
        """Turns (B, S, head_dim / 2) complex64: the first half for places, then block positions."""
        # The released weights were trained with frequencies rounded to fp16.
        inv_freq = inverse_frequencies(self.config.head_dim // 2, position_ids.device)
        inv_freq = inv_freq.half().float()
        return torch.cat([rotary_turns(position_ids[:, row], inv_freq) for row in (0, 1)], dim=-1)

    @property
    def marks(self) -> InfillingMarks:
        config = self.config
        masks = (config.gmask_token_id or 0, config.mask_token_id or 0)
        return InfillingMarks(config.bos_token_id or 0, None, masks, masks[0], "[gMASK] or [MASK]")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.final_layernorm

    def count_positions(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, 2, S) places and block positions of whole rows. `padding` (B, S): True = real token.

        Raises:
            ValueError: a row has no <sop>, or neither [gMASK] nor [MASK].
        """
        config, length = self.config, input_ids.shape[1]
        real = self.real_tokens(input_ids, padding)
        is_sop = (input_ids == config.bos_token_id) & real.bool()
        is_gmask = (input_ids == config.gmask_token_id) & real.bool()
        is_mask = (input_ids == config.mask_token_id) & real.bool()
        self.check_marks(is_sop, is_gmask | is_mask)
        place = (real.cumsum(-1) - 1).clamp(min=0)
        # argmax finds the first; [gMASK] wins over [MASK] wherever it stands.
        is_marker = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, is_mask)
        marker = is_marker.long().argmax(-1, keepdim=True)
        sop = is_sop.long().argmax(-1, keepdim=True)
        after = torch.arange(length, device=input_ids.device) >= sop
        place = torch.where(after, place.gather(1, marker), place) * real
        block = (after & real.bool()).long().cumsum(-1) * real
        return torch.stack([place, block], dim=1)


class ChatGLM1ForConditionalGeneration(InfillingCausalLM, ChatGLM1PreTrainedModel, GenerationMixin):
    """The body with its output layer: `forward`, `generate`, `chat`, `stream_chat`."""

    config: ChatGLM1Config
    transformer: ChatGLM1Model

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.transformer = ChatGLM1Model(config)
        self.lm_head: nn.Module = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ChatGLM1ForSequenceClassification(ChatGLMClassifier, ChatGLM1PreTrainedModel):
    """ChatGLM-6B's body with a score."""

    config: ChatGLM1Config
    body_class = ChatGLM1Model


register_model(ChatGLM1ForConditionalGeneration)
register_model(ChatGLM1ForSequenceClassification, WITH_SCORE)
