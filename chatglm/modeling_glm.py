"""ChatGLM-6B: 2-D rotary positions, bidirectional context, residuals of the LayerNorm's output.

Layout of a row: context, [gMASK], <sop>, answer, <eop>. The context (all before <sop>) is seen by
every position; the answer is causal. Positions are pairs: (place, 0) in the context,
(place of the mask token, 1, 2, ...) from <sop> on.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .auto_classes import WITH_SCORE, register_model
from .configuration import ChatGLM1Config
from .kernels import OutputLayer, RotateFunction, turn_halves_
from .layers import (
    AttentionMask,
    attend,
    inverse_frequencies,
    make_prefix_encoder,
    rotary_turns,
    visible_keys,
)
from .modeling_base import ChatGLMBody, ChatGLMCausalLM, ChatGLMPreTrainedModel
from .modeling_classification import ChatGLMClassifier
from .packing import Packing

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


class ChatGLM1Model(ChatGLMBody, ChatGLM1PreTrainedModel):
    """The body."""

    config: ChatGLM1Config

    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLM1Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.prefix_encoder = make_prefix_encoder(config, embedding_dim=config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.final_layernorm

    def rotary(self, position_ids: Tensor) -> Tensor:
        """Turns (B, S, head_dim / 2) complex64: the first half for places, then block positions."""
        # The released weights were trained with frequencies rounded to fp16.
        inv_freq = inverse_frequencies(self.config.head_dim // 2, position_ids.device)
        inv_freq = inv_freq.half().float()
        return torch.cat([rotary_turns(position_ids[:, row], inv_freq) for row in (0, 1)], dim=-1)

    def read_packing(self, position_ids: Tensor) -> Packing:
        """The sequences of one row of positions (1, 2, S).

        One begins where place and block position are both 0.
        """
        place, block = position_ids[0]
        starts = ((place == 0) & (block == 0)).nonzero().flatten().tolist()
        starts = [0, *(s for s in starts if s)]
        lengths = [b - a for a, b in zip(starts, [*starts[1:], len(place)])]
        context = [int((part == 0).sum()) for part in block.split(lengths)]
        return Packing(lengths, [0] * len(lengths), context)

    def packed_positions(self, input_ids: Tensor, lengths: list[int], shared: list[int]) -> Tensor:
        """(1, 2, S) positions of sequences end to end in input_ids (1, S).

        Raises:
            ValueError: a shared trunk, which a context that looks ahead cannot have.
        """
        if any(shared):
            raise ValueError("ChatGLM-6B's context looks ahead: sequences cannot share a beginning")
        positions = [self.count_positions(ids) for ids in input_ids.split(lengths, dim=1)]
        return torch.cat(positions, dim=-1)

    def seen_by_all(self, position_ids: Tensor, past: int) -> Tensor:
        return F.pad(position_ids[:, 1] == 0, (past, 0))

    def count_positions(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, 2, S) places and block positions of whole rows. `padding` (B, S): True = real token.

        Raises:
            ValueError: a row has no <sop>, or neither [gMASK] nor [MASK].
        """
        config, length = self.config, input_ids.shape[1]
        if padding is not None and padding.shape[-1] != length:
            raise ValueError(
                f"attention_mask must cover all {length} positions, got {padding.shape[-1]}"
            )
        real = torch.ones_like(input_ids) if padding is None else padding.long()
        is_sop = (input_ids == config.bos_token_id) & real.bool()
        is_gmask = (input_ids == config.gmask_token_id) & real.bool()
        is_mask = (input_ids == config.mask_token_id) & real.bool()
        mask_ids = f"{config.gmask_token_id} or {config.mask_token_id}"
        check_every_row(is_sop, f"<sop> (id {config.bos_token_id})")
        check_every_row(is_gmask | is_mask, f"[gMASK] or [MASK] (id {mask_ids})")
        place = (real.cumsum(-1) - 1).clamp(min=0)
        # argmax finds the first; [gMASK] wins over [MASK] wherever it stands.
        is_marker = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, is_mask)
        marker = is_marker.long().argmax(-1, keepdim=True)
        sop = is_sop.long().argmax(-1, keepdim=True)
        after = torch.arange(length, device=input_ids.device) >= sop
        place = torch.where(after, place.gather(1, marker), place) * real
        block = (after & real.bool()).long().cumsum(-1) * real
        return torch.stack([place, block], dim=1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, S) or inputs_embeds (B, S, hidden_size), never with P-Tuning's virtual
                tokens.
            attention_mask: (B, cached + S), 1 = real token, padded on either side; or
                (B, 1, S, cached + S), as the originals or transformers build it
                (see layers.visible_keys).
            position_ids: (B, 2, S); by default found from [gMASK] or [MASK] and <sop>, continued
                from the cache. Without mask and cache another sequence begins where both of a
                single row's are 0, and the two cannot see each other (see packing.py). Of other
                programs' (B, S) count only the places where they begin anew, as sequences do.
            keep: (N,) ascending places of a single row: the last layer computes these alone, and
                the result is (1, N, hidden_size).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None or position_ids.dim() != 3:
            ids = self.marks_of(embeds) if input_ids is None else input_ids
            position_ids = self.find_positions(ids, attention_mask, past_key_values, position_ids)
        packing = self.find_packing(
            position_ids, attention_mask, past_key_values, len(embeds), keep
        )
        if past_key_values is not None:
            last = last_positions(position_ids)
            # a field of ours, which find_positions reads
            past_key_values.last_positions = last  # type: ignore[attr-defined]
        hidden_states = self.run_layers(
            self.layers,
            embeds,
            attention_mask,
            position_ids,
            past_key_values,
            packing,
            **kwargs,
        )
        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )

    def marks_of(self, embeds: Tensor) -> Tensor:
        """(B, S) ids of the tokens that positions depend on, -1 for all others.

        embeds: (B, S, hidden_size); a token is known by its embedding.
        """
        config = self.config
        names = [config.mask_token_id, config.gmask_token_id, config.bos_token_id]
        marks = torch.tensor(names, device=embeds.device)
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for mark, vector in zip(marks, self.word_embeddings(marks)):
            ids[(embeds == vector).all(-1)] = mark
        return ids

    def find_positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Positions (B, 2, S): counted in a new row, or continued after the cache's last.

        Args:
            places: another program's (B, S) positions; a single row without mask holds a sequence
                from each 0 on.
        Raises:
            ValueError: the cache has no last positions for these rows, or `places` another shape.
        """
        if places is not None and places.shape[-1:] != input_ids.shape[-1:]:
            raise ValueError(
                f"ChatGLM-6B's position_ids are (B, 2, S), got {list(places.shape)} "
                f"of {input_ids.shape[-1]} tokens"
            )
        if not self.cached_length(cache):
            if places is not None and len(input_ids) == 1 and attention_mask is None:
                starts = [0, *(places.flatten()[1:] == 0).nonzero().flatten().add(1).tolist()]
                ends = [*starts[1:], input_ids.shape[1]]
                lengths = [end - start for start, end in zip(starts, ends)]
                return self.packed_positions(input_ids, lengths, [0] * len(lengths))
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = visible_keys(attention_mask)[:, 0, -1]
            padding = None if attention_mask is None else attention_mask.bool()
            return self.count_positions(input_ids, padding)
        last = getattr(cache, "last_positions", None)
        if last is None or last.shape[0] not in (1, input_ids.shape[0]):
            raise ValueError(
                "ChatGLM-6B: this cache does not know its positions; give position_ids (B, 2, S)"
            )
        return advance_positions(last, input_ids.shape[1]).expand(input_ids.shape[0], -1, -1)


def check_every_row(found: Tensor, name: str) -> None:
    """Raises ValueError where a row of `found` (B, S) bool has no True; `name` is what it lacks."""
    if not bool(found.any(-1).all()):
        row = int((~found.any(-1)).nonzero()[0])
        raise ValueError(f"ChatGLM-6B: row {row} of input_ids has no {name}; give position_ids")


def last_positions(position_ids: Tensor) -> Tensor:
    """(B, 2, 1) positions of each row's last real token, of position_ids (B, 2, S).

    It has the greatest block position; padding, on either side, has 0.
    """
    last = position_ids.shape[-1] - 1 - position_ids[:, 1].flip(-1).argmax(-1)
    return position_ids.gather(-1, last[:, None, None].expand(-1, 2, 1))


def advance_positions(last: Tensor, count: int) -> Tensor:
    """(B, 2, count) positions after `last` (B, 2, 1): one place, block positions that count on."""
    steps = torch.arange(1, count + 1, device=last.device)
    return last + torch.stack([torch.zeros_like(steps), steps])


class ChatGLM1ForConditionalGeneration(ChatGLMCausalLM, ChatGLM1PreTrainedModel, GenerationMixin):
    """The body with its output layer: `forward`, `generate`, `chat`, `stream_chat`."""

    config: ChatGLM1Config
    transformer: ChatGLM1Model

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.transformer = ChatGLM1Model(config)
        self.lm_head: nn.Module = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    # generate() counts positions in one dimension; these three methods give it ChatGLM-6B's pairs.

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "ChatGLM-6B cannot extend a cache with a new prompt: its context is bidirectional"
            )
        padding = None if mask is None else mask.bool()
        if inputs_tensor.dim() == 3:
            inputs_tensor = self.transformer.marks_of(inputs_tensor)
        return self.transformer.count_positions(inputs_tensor, padding)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ChatGLMCausalLM.generate; without negative_prompt_ids guidance is against no text."""
        scale = self.generation_option("guidance_scale", kwargs)
        given: Any = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        given = given if inputs is None else inputs
        is_guided = scale not in (None, 1) and given is not None
        if is_guided and kwargs.get("negative_prompt_ids") is None:
            beams = self.generation_option("num_beams", kwargs) or 1
            answers = self.generation_option("num_return_sequences", kwargs) or 1
            marks = [self.config.gmask_token_id, self.config.bos_token_id]
            no_text = torch.tensor([marks], device=given.device)
            kwargs["negative_prompt_ids"] = no_text.expand(len(given) * max(beams, answers), -1)
        return super().generate(inputs, *args, **kwargs)

    def generation_option(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What a call of generate() with `kwargs` means by an option."""
        config = kwargs.get("generation_config") or self.generation_config
        return kwargs.get(name, getattr(config, name))

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        positions = model_kwargs.pop("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        following = advance_positions(positions[..., -1:], num_new_tokens)
        return model_kwargs | {"position_ids": torch.cat([positions, following], dim=-1)}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        position_ids = model_kwargs.pop("position_ids", None)
        # transformers types self as a class of its own, of which no model is
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if position_ids is not None:
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs


class ChatGLM1ForSequenceClassification(ChatGLMClassifier, ChatGLM1PreTrainedModel):
    """ChatGLM-6B's body with a score."""

    config: ChatGLM1Config
    transformer: ChatGLM1Model

    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.transformer = ChatGLM1Model(config)
        self.add_score()


register_model(ChatGLM1ForConditionalGeneration)
register_model(ChatGLM1ForSequenceClassification, WITH_SCORE)
