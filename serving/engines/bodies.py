"""Models as the continuous engine sees them: their blocks, positions, rotary angles, virtual tokens and ends.

Every body has
    blocks                          called with (hidden (1, N, hidden_size), a passes.Pass, turns, keep=None): (1, N or K, hidden_size)
    embed, norm, head               the model's own modules
    kv_heads, head_dim              of the keys and values that a block hands to the Pass
    axes                            1, or 2 where each token has a place and a block position (ChatGLM-6B)
    positions(prompt), context(positions), turns(positions)
    prompt, prefix                  P-Tuning's vectors (1, P, hidden) of v1, keys and values (2 * layers, 1, kv_heads, P, D) of v2; or None
    prompt_length, prefix_length    their P; 0 without

and runs the modules in place: adapters on them take part, no weight is copied.
"""

import torch
from torch import Tensor
from transformers import Glm4ForCausalLM, GlmForCausalLM

from chatglm.kernels import turn_pairs_


class ChatGLM:
    """ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B in this project's classes. Their blocks take a Pass where a mask would stand."""

    def __init__(self, model):
        self.body, config = model.transformer, model.config
        holder = getattr(self.body, "encoder", self.body)
        self.blocks, self.norm = list(holder.layers), holder.final_layernorm
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.axes = 2 if config.glm_family == "glm" else 1
        self.prompt_length, self.prefix_length = self.body.prompt_length, self.body.prefix_length
        with torch.inference_mode():
            virtual = (
                self.body.prefix_encoder(1).to(model.dtype)
                if self.prompt_length or self.prefix_length
                else None
            )
        self.prompt = virtual if self.prompt_length else None
        self.prefix = virtual if self.prefix_length else None

    def positions(self, prompt: list[int]) -> Tensor:
        """(axes, S): of a prompt's tokens, virtual ones not counted.

        Raises:
            ValueError: ChatGLM-6B's prompt lacks [gMASK] or <sop>.
        """
        return (
            self.body.count_positions(torch.tensor([prompt]))[0]
            if self.axes == 2
            else torch.arange(len(prompt))[None]
        )

    def context(self, positions: Tensor) -> int:
        """How many tokens, the first ones, see each other both ways."""
        return int((positions[1] == 0).sum()) if self.axes == 2 else 0

    def turns(self, positions: Tensor) -> Tensor:
        """What the blocks want for positions (axes, N)."""
        return self.body.rotary(positions[None] if self.axes == 2 else positions)[:, :, None]


class NativeGLM:
    """transformers' GlmForCausalLM and Glm4ForCausalLM.

    Raises:
        ValueError: the rotary angles of one sequence would follow from the longest (rope_type dynamic or longrope).
    """

    axes, prompt_length, prefix_length, prompt, prefix = 1, 0, 0, None, None

    def __init__(self, model):
        body, self.rotary = model.model, model.model.rotary_emb
        if self.rotary.rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"the continuous engine wants rotary angles that depend on positions alone, got rope_type {self.rotary.rope_type!r}"
            )
        self.blocks, self.norm = [NativeBlock(layer) for layer in body.layers], body.norm
        self.embed, self.head = body.embed_tokens, model.lm_head
        self.kv_heads, self.head_dim = (
            model.config.num_key_value_heads,
            body.layers[0].self_attn.head_dim,
        )

    def positions(self, prompt: list[int]) -> Tensor:
        return torch.arange(len(prompt))[None]

    def context(self, positions: Tensor) -> int:
        return 0

    def turns(self, positions: Tensor) -> Tensor:
        """(1, N, 1, rotary_dim / 2) complex64, from fp32 tables: the model itself rounds them to its dtype."""
        cos, sin = self.rotary(torch.empty(0, device=positions.device), positions)
        half = cos.shape[-1] // 2
        return torch.complex(cos[..., :half], sin[..., :half])[:, :, None]


class NativeBlock:
    """A decoder layer of transformers' GLM with attention by a Pass, which its own forward has no place for."""

    def __init__(self, layer):
        self.layer, self.attention = layer, layer.self_attn
        # GLM-4-0414 norms what comes out of attention and MLP too.
        self.norms = [
            getattr(layer, name, torch.nn.Identity())
            for name in ("post_self_attn_layernorm", "post_mlp_layernorm")
        ]

    def __call__(
        self, hidden: Tensor, one_pass, turns: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        layer, attention = self.layer, self.attention
        normed = layer.input_layernorm(hidden)
        # (1, N, heads, D) of tensors that the projections have just made, so they can be turned where they are
        query, key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turn_pairs_(query, turns)
        turn_pairs_(key, turns)
        out = one_pass.attend(attention, *(x.transpose(1, 2) for x in (query, key, value)))
        if keep is not None:
            hidden = hidden[:, keep]
        hidden = hidden + self.norms[0](attention.o_proj(out))
        return hidden + self.norms[1](layer.mlp(layer.post_attention_layernorm(hidden)))


def body_of(model) -> ChatGLM | NativeGLM:
    """The body of a model with its output layer.

    Raises:
        ValueError: the continuous engine has none for it.
    """
    if hasattr(getattr(model, "transformer", None), "prefix_length"):
        return ChatGLM(model)
    if isinstance(model, (GlmForCausalLM, Glm4ForCausalLM)):
        return NativeGLM(model)
    raise ValueError(
        f"the continuous engine runs ChatGLM and GLM models, got {type(model).__name__}; try --engine static"
    )
