"""Models as the continuous engine runs them: blocks, positions, rotary angles, virtual tokens.

A body (ServedBody) runs the modules in place: adapters on them take part, no weight is copied.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    Glm4ForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from chatglm.configuration import ChatGLM1Config, ChatGLM2Config
from chatglm.kernels import turn_pairs_, turn_rotated_halves_

TURN_PAIRS = (GlmForCausalLM, Glm4ForCausalLM)  # of neighbouring values, by the rotary angles
TURN_HALVES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
STATIC_RUNS = "the server and run_requests run it with --engine static"


class Attention(Protocol):
    """What a ForwardPass needs of an attention module."""

    layer_idx: int
    scaling: float


class AttentionPass(Protocol):
    """What a block needs of a ForwardPass."""

    def attend(self, module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class Block(Protocol):
    """One decoder layer."""

    def __call__(
        self,
        hidden: Tensor,
        forward_pass: AttentionPass,
        turns: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """(1, N, hidden_size) -> (1, N or K, hidden_size); `keep` (K,) are the tokens computed."""


class ServedBody(Protocol):
    """What the continuous engine needs of a model.

    Attributes:
        blocks: the decoder layers, in order.
        embed, norm, head: the model's own modules.
        kv_heads, head_dim: of the keys and values that a block passes to the ForwardPass.
        axes: 1, or 2 where each token has a place and a block position (ChatGLM-6B).
        prompt: P-Tuning v1's vectors (1, P, hidden), or None.
        prefix: P-Tuning v2's keys and values (2 * layers, 1, kv_heads, P, D), or None.
        prompt_length, prefix_length: their P; 0 without.
    """

    blocks: list[Block]
    embed: nn.Module
    norm: nn.Module
    head: nn.Module
    kv_heads: int
    head_dim: int
    axes: int
    prompt: Tensor | None
    prefix: Tensor | None
    prompt_length: int
    prefix_length: int

    def positions(self, prompt: list[int]) -> Tensor:
        """Positions (axes, S) of a prompt's tokens, virtual ones not counted."""

    def context(self, positions: Tensor) -> int:
        """How many tokens, the first ones, see each other both ways."""

    def turns(self, positions: Tensor) -> Tensor:
        """The rotary angles of positions (axes, N), as the blocks take them."""


class ServedChatGLM:
    """ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B in this project's classes.

    Their blocks take a ForwardPass in the place of the mask.
    """

    def __init__(self, model: PreTrainedModel):
        # Any: transformers types a model's modules as Tensor | Module.
        body: Any = model.transformer
        config: Any = model.config
        holder = getattr(body, "encoder", body)
        self._body = body
        self.blocks: list[Block] = list(holder.layers)
        self.norm: nn.Module = holder.final_layernorm
        self.embed: nn.Module = model.get_input_embeddings()
        self.head: nn.Module = model.get_output_embeddings()
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.axes = 2 if config.glm_family == "glm" else 1
        self.prompt_length: int = body.prompt_length
        self.prefix_length: int = body.prefix_length
        virtual: Tensor | None = None
        if self.prompt_length or self.prefix_length:
            with torch.inference_mode():
                virtual = body.prefix_encoder(1).to(model.dtype)
        self.prompt = virtual if self.prompt_length else None
        self.prefix = virtual if self.prefix_length else None

    def positions(self, prompt: list[int]) -> Tensor:
        """Positions (axes, S) of a prompt's tokens, virtual ones not counted.

        Raises:
            ValueError: ChatGLM-6B's prompt lacks [gMASK] or <sop>.
        """
        if self.axes == 2:
            return self._body.count_positions(torch.tensor([prompt]))[0]
        return torch.arange(len(prompt))[None]

    def context(self, positions: Tensor) -> int:
        """How many tokens, the first ones, see each other both ways."""
        return int((positions[1] == 0).sum()) if self.axes == 2 else 0

    def turns(self, positions: Tensor) -> Tensor:
        """The rotary angles of positions (axes, N), as the blocks take them."""
        return self._body.rotary(positions[None] if self.axes == 2 else positions)[:, :, None]


class CausalBody:
    """transformers' GLM, GLM-4, Llama, Qwen2 and Qwen3.

    Args:
        make_block: of a decoder layer.
    """

    def __init__(self, model: PreTrainedModel, make_block: Callable[[Any], Block]):
        # Any: transformers types a model's modules as Tensor | Module.
        body: Any = model.model
        self.axes = 1
        self.prompt: Tensor | None = None
        self.prefix: Tensor | None = None
        self.prompt_length = self.prefix_length = 0
        self.rotary = body.rotary_emb
        self.blocks: list[Block] = [make_block(layer) for layer in body.layers]
        self.norm: nn.Module = body.norm
        self.embed: nn.Module = body.embed_tokens
        self.head: nn.Module = model.get_output_embeddings()
        self.kv_heads: int = body.config.num_key_value_heads
        self.head_dim: int = body.layers[0].self_attn.head_dim

    def positions(self, prompt: list[int]) -> Tensor:
        return torch.arange(len(prompt))[None]

    def context(self, positions: Tensor) -> int:
        return 0

    def turns(self, positions: Tensor) -> Tensor:
        """Rotary angles (1, N, 1, rotary_dim / 2), complex64.

        They come from fp32 tables; the model's own forward rounds them to its dtype.
        """
        cos, sin = self.rotary(torch.empty(0, device=positions.device), positions)
        half = cos.shape[-1] // 2
        return torch.complex(cos[..., :half], sin[..., :half])[:, :, None]


class CausalBlock:
    """A decoder layer of transformers' causal models, computed with a ForwardPass.

    The layer's own forward has no argument for one.

    Args:
        turn_: applies the rotary angles (1, N, 1, D / 2) to (1, N, heads, D) in place.
    """

    def __init__(self, layer: Any, turn_: Callable[[Tensor, Tensor], Any]):
        self.layer, self.attention, self.turn_ = layer, layer.self_attn, turn_
        # GLM-4-0414 norms the outputs of attention and MLP too, Qwen3 each head's query and key.
        self.attention_norm = getattr(layer, "post_self_attn_layernorm", nn.Identity())
        self.mlp_norm = getattr(layer, "post_mlp_layernorm", nn.Identity())
        self.query_norm = getattr(self.attention, "q_norm", nn.Identity())
        self.key_norm = getattr(self.attention, "k_norm", nn.Identity())

    def __call__(
        self,
        hidden: Tensor,
        forward_pass: AttentionPass,
        turns: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        layer, attention = self.layer, self.attention
        normed = layer.input_layernorm(hidden)
        # (1, N, heads, D); the projections have just made them, so they are turned in place.
        by_head = (-1, attention.head_dim)
        query = self.query_norm(attention.q_proj(normed).unflatten(-1, by_head))
        key = self.key_norm(attention.k_proj(normed).unflatten(-1, by_head))
        value = attention.v_proj(normed).unflatten(-1, by_head)
        self.turn_(query, turns)
        self.turn_(key, turns)
        out = forward_pass.attend(
            attention, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        if keep is not None:
            hidden = hidden[:, keep]
        hidden = hidden + self.attention_norm(attention.o_proj(out))
        return hidden + self.mlp_norm(layer.mlp(layer.post_attention_layernorm(hidden)))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model that `body_of` knows, as its own modules."""
    chatglm: Any = getattr(model, "transformer", None)
    if chatglm is not None:
        return getattr(chatglm, "encoder", chatglm).layers
    causal: Any = model
    return causal.model.layers


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last decoder layer of a model that `body_of` knows."""
    chatglm: Any = getattr(model, "transformer", None)
    if chatglm is not None:
        return getattr(chatglm, "encoder", chatglm).final_layernorm
    causal: Any = model
    return causal.model.norm


def hidden_size_of(model: PreTrainedModel) -> int:
    """Numbers of a token's hidden state."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[-1]


def body_of(model: PreTrainedModel) -> ServedBody:
    """The body of a model with its output layer.

    Raises:
        ValueError: as `check_runs`.
    """
    check_runs(model)
    if is_own_class(model):
        return ServedChatGLM(model)
    turn_ = turn_pairs_ if isinstance(model, TURN_PAIRS) else turn_rotated_halves_
    return CausalBody(model, lambda layer: CausalBlock(layer, turn_))


def check_runs(model: PreTrainedModel) -> None:
    """Read no weight, so that they may be partitioned.

    Raises:
        ValueError: the continuous engine cannot run such a model.
    """
    if is_own_class(model):
        return
    if not isinstance(model, (*TURN_PAIRS, *TURN_HALVES)):
        raise ValueError(
            "the continuous engine runs ChatGLM, GLM, Llama and Qwen models, "
            f"got {type(model).__name__}; {STATIC_RUNS}"
        )
    body: Any = model.model
    rope_type = body.rotary_emb.rope_type
    if rope_type in ("dynamic", "longrope"):  # by the longest sequence of a pass
        raise ValueError(
            "the continuous engine wants rotary angles that depend on positions alone, "
            f"got rope_type {rope_type!r}"
        )
    kinds = set(getattr(body.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"the continuous engine wants layers of full attention, got {', '.join(kinds)}; "
            + STATIC_RUNS
        )


def is_own_class(model: PreTrainedModel) -> bool:
    """Whether it is one of this project's ChatGLM classes."""
    return isinstance(getattr(model, "config", None), (ChatGLM1Config, ChatGLM2Config))
