"""GLM-350M and GLM-10B (arXiv 2103.10360): blank infilling with two learned positions.

Names of weights are the releases'. A row is [CLS], text with mask tokens, <|endoftext|>, then a
piece for each mask: <|startofpiece|>, what fills it, <|endofpiece|>. Positions of the first piece
are the first mask's, of the second piece the second mask's, and so on.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .auto_classes import register_model
from .configuration import GLMBaseConfig
from .kernels import OutputLayer
from .layers import AttentionMask, attend, make_prefix_encoder
from .modeling_base import ChatGLMPreTrainedModel
from .modeling_infilling import InfillingBody, InfillingCausalLM, InfillingMarks

# Ids after that of <|endoftext|>, as in both vocabularies.
MASK, SOP, EOP, SMASK, GMASK = 3, 6, 7, 8, 9


class GLMBaseAttention(nn.Module):
    """Multi-head attention; all queries, all keys and all values are made together."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: GLMBaseConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout_prob
        # GLM-10B divides scores by it in fp16, and multiplies them again before softmax.
        self.score_coefficient = config.attention_scale
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        prefix: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, S, hidden_size), or of the kept tokens, and the attention weights or None."""
        qkv = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))
        query, key, value = qkv.transpose(1, 2).chunk(3, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = attend(self, query, key, value, mask, prefix, **kwargs)
        return self.dense(out), weights


class GLMBaseMLP(nn.Module):
    """The feed-forward part of a block, with GELU."""

    def __init__(self, config: GLMBaseConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class GLMBaseBlock(GradientCheckpointingLayer):
    """A transformer block with pre-norm residuals."""

    def __init__(self, config: GLMBaseConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = GLMBaseAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = GLMBaseMLP(config)
        self.dropout = config.output_dropout_prob

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask,
        positions: Tensor,
        prefix: Tensor | None = None,
        past_key_values: Cache | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # `prefix` is a separate argument: gradient checkpointing drops any past_key_values.
        normed = self.input_layernorm(hidden_states)
        out, _ = self.attention(normed, mask, prefix, past_key_values=past_key_values, **kwargs)
        if keep is not None:
            hidden_states = hidden_states[:, keep]
        hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(out, self.dropout, self.training)


class GLMBaseLayers(nn.Module):
    """Holds positions and blocks under the releases' names; GLMBaseModel runs them."""

    def __init__(self, config: GLMBaseConfig):
        super().__init__()
        places = config.max_sequence_length + 1
        self.position_embeddings = nn.Embedding(places, config.hidden_size)
        self.block_position_embeddings = nn.Embedding(places, config.hidden_size)
        self.layers = nn.ModuleList(GLMBaseBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)


class GLMBasePreTrainedModel(ChatGLMPreTrainedModel):
    config: GLMBaseConfig
    config_class = GLMBaseConfig
    base_model_prefix = "glm"
    _no_split_modules = ["GLMBaseBlock"]
    _supports_flash_attn = False  # flash kernels cannot express the bidirectional context
    _can_record_outputs = {"hidden_states": GLMBaseBlock, "attentions": GLMBaseAttention}


class GLMBaseModel(InfillingBody, GLMBasePreTrainedModel):
    """The body."""

    title = "GLM-10B"
    config: GLMBaseConfig

    def __init__(self, config: GLMBaseConfig):
        super().__init__(config)
        self.max_positions = config.max_sequence_length
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GLMBaseLayers(config)
        self.prefix_encoder = make_prefix_encoder(config, embedding_dim=config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def marks(self) -> InfillingMarks:
        first = self.config.pad_token_id or 0
        masks = (first + MASK, first + SMASK, first + GMASK)
        names = "[MASK], [sMASK] or [gMASK]"
        return InfillingMarks(first + SOP, first + EOP, masks, masks[-1], names)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.transformer.final_layernorm

    def with_positions(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, hidden_size) with those of places and of block positions."""
        places = self.transformer.position_embeddings(position_ids[:, 0])
        within = self.transformer.block_position_embeddings(position_ids[:, 1])
        embeds = embeds + places.to(embeds.dtype) + within.to(embeds.dtype)
        dropped = F.dropout(embeds, self.config.embedding_dropout_prob, self.training)
        return dropped, position_ids

    def count_positions(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, 2, S) places and block positions of whole rows. `padding` (B, S): True = real token.

        The first <|startofpiece|> of a row begins what fills its first mask, the next one that
        follows an <|endofpiece|> what fills the second, and so on; pieces without a mask of their
        own stand at the last one.

        Raises:
            ValueError: a row has no <|startofpiece|>, or no mask token before it.
        """
        real = self.real_tokens(input_ids, padding)
        marks = self.marks
        is_sop = (input_ids == marks.sop) & real.bool()
        is_first = is_sop & (is_sop.long().cumsum(-1) == 1)
        ends = torch.eq(input_ids[:, :-1], -1 if marks.eop is None else marks.eop)
        is_sop = is_first | (is_sop & F.pad(ends, (1, 0)))
        piece = is_sop.long().cumsum(-1)  # 0 in the context, then the number of the piece
        is_mask = torch.isin(input_ids, torch.tensor(marks.masks, device=input_ids.device))
        is_mask &= (piece == 0) & real.bool()
        self.check_marks(is_sop, is_mask)
        count = real.cumsum(-1)
        place = (count - 1).clamp(min=0)
        rank = is_mask.long().cumsum(-1)
        # Column r holds the place of the r-th mask; 0 takes what is no mask.
        table = torch.zeros_like(place).scatter(-1, rank * is_mask, place)
        wanted = table.gather(-1, torch.minimum(piece, rank[:, -1:]))
        place = torch.where(piece > 0, wanted, place) * real
        begin = (count * is_sop).cummax(-1).values
        block = torch.where(piece > 0, count - begin + 1, 0) * real
        return torch.stack([place, block], dim=1)


class GLMForConditionalGeneration(InfillingCausalLM, GLMBasePreTrainedModel, GenerationMixin):
    """The body with its output layer: `forward`, `generate`, `chat`, `stream_chat`."""

    config: GLMBaseConfig
    glm: GLMBaseModel

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}

    def __init__(self, config: GLMBaseConfig):
        super().__init__(config)
        self.glm = GLMBaseModel(config)
        self.lm_head: nn.Module = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def transformer(self) -> GLMBaseModel:  # type: ignore[override]  # the releases' name is glm
        return self.glm


register_model(GLMForConditionalGeneration)
