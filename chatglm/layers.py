"""What the two ChatGLM architectures share: attention, masks, rotary angles, prompt encoders."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration import (
    ChatGLM1Config,
    ChatGLM2Config,
    ChatGLMConfig,
    GLMBaseConfig,
    PanguConfig,
)

GLMConfig: TypeAlias = ChatGLM1Config | ChatGLM2Config | PanguConfig | GLMBaseConfig
Device: TypeAlias = torch.device | str


class AttentionModule(Protocol):
    """What attention functions read of a block's SelfAttention."""

    @property
    def config(self) -> ChatGLMConfig: ...

    layer_idx: int
    scaling: float
    attention_dropout: float
    num_key_value_groups: int
    training: bool


class SequenceAttention(Protocol):
    """Attention over a row that holds several sequences; blocks take it in the place of a mask.

    `packing.PackedMasks` separates sequences of a training row, `serving`'s ForwardPass attends to
    the sequences' cached keys and values.
    """

    def attend(
        self,
        module: AttentionModule,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Tensor | None,
    ) -> Tensor:
        """(1, Q, heads * D) from query (1, heads, S, D) and key, value (1, kv_heads, S, D)."""


# The `mask` of a block: `attention_visibility` returns a Tensor or None (causality alone).
AttentionMask: TypeAlias = Tensor | SequenceAttention | None


def rotary_turns(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """cos + i sin of each angle: `positions` (...) -> (..., len(inv_freq)).

    complex64 in every model dtype: the originals keep half-precision tables, whose angles are wrong
    past a few hundred positions.
    """
    angles = positions[..., None].float() * inv_freq
    return torch.polar(torch.ones_like(angles), angles)


def inverse_frequencies(rotary_dim: int, device: Device, base: float = 10000.0) -> Tensor:
    """(rotary_dim / 2,) fp32 on `device`.

    Computed when needed: a buffer would be lost by meta-device loading or ZeRO-3.
    """
    dims = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (dims / rotary_dim)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """(B, kv_heads, S, D) -> (B, kv_heads * times, S, D), each head repeated consecutively."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def eager_attention(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, softmax in fp32; also returns the weights (B, heads, Q, K)."""
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    # ChatGLM-6B in fp16 overflows in q @ k unless the query is divided by the layer's number first
    # (the original's `coeff`).
    coefficient = getattr(module, "score_coefficient", 1)
    scores = (query * (scaling / coefficient)) @ key.transpose(2, 3)
    scores = scores.float() * coefficient
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    prefix: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention through the library's backends (sdpa, eager, flash, flex).

    Args:
        query: (B, heads, Q, D). key, value: (B, kv_heads, K, D), rotary already applied.
        mask: what `attention_visibility` returned, or a SequenceAttention.
        prefix: None or (2, B, kv_heads, P, D), P-Tuning v2's keys and values; the keys have no
            rotary angle.
    Returns:
        (B, Q, heads * D) and the attention weights where the backend gives them.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        return mask.attend(module, query, key, value, prefix), None
    if prefix is not None:
        key = torch.cat([prefix[0].to(key.dtype), key], dim=2)
        value = torch.cat([prefix[1].to(value.dtype), value], dim=2)
    backend = attention_backend(module)
    dropout = module.attention_dropout if module.training else 0.0
    out, weights = backend(
        module, query, key, value, mask, scaling=module.scaling, dropout=dropout, **kwargs
    )
    return out.flatten(2), weights


def attention_backend(module: AttentionModule) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of a module's configuration."""
    name = module.config._attn_implementation
    if name == "flex_attention":
        return flex_attention
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


def flex_attention(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' flex attention, whose blocks come from a mask as other backends take it."""
    q_len, kv_len, device = query.shape[2], key.shape[2], query.device
    if attention_mask is None:
        attention_mask = causal_mask(q_len, kv_len, device)
    visible = attention_mask.expand(len(query), 1, q_len, kv_len)

    def is_visible(row: Tensor, head: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        return visible[row, 0, place, seen]

    blocks = create_block_mask(is_visible, len(query), None, q_len, kv_len, device=device)
    attend_blocks = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    out, _ = attend_blocks(module, query, key, value, blocks, **kwargs)
    return out, None


def causal_mask(
    q_len: int, kv_len: int, device: Device, first: int | Tensor | None = None
) -> Tensor:
    """(1, 1, Q, K) bool, True = visible.

    The queries are the Q of the K positions from `first` on, by default the last.
    """
    queries = query_places(q_len, kv_len, device, first)
    return (torch.arange(kv_len, device=device) <= queries)[None, None]


def query_places(q_len: int, kv_len: int, device: Device, first: int | Tensor | None) -> Tensor:
    """(Q, 1) places of the queries among K keys, from `first` on, by default the last Q."""
    start = kv_len - q_len if first is None else first
    return torch.arange(q_len, device=device)[:, None] + start


def attention_visibility(
    *,
    q_len: int,
    kv_len: int,
    device: Device,
    padding: Tensor | None,
    context: Tensor | None,
    prefix_len: int,
    backend: str,
    first: int | Tensor | None = None,
) -> Tensor | None:
    """The mask for `attend`: (B or 1, 1, Q, prefix_len + K) bool, True = visible.

    None where causality alone says what is visible.

    Args:
        padding: (B, K) bool, True = real token, or None when every token is real.
        context: (B, K) bool, True = column visible to every row (ChatGLM-6B's bidirectional
            context), or None.
        prefix_len: P key columns in front that every query sees; `padding` and `context` do not
            count them.
        backend: the attention implementation; flash kernels take the padding itself,
            (B, prefix_len + K).
        first: place of the first query among the K keys of a cache of fixed size; None where the
            queries are the last.
    """
    if "flash" in backend:
        if first is not None:
            raise ValueError("flash attention needs a cache that grows, such as DynamicCache")
        if padding is None:
            return None  # causality is aligned to the last position, so a prefix needs nothing
        return F.pad(padding, (prefix_len, 0), value=True).long()
    causality_suffices = first is None and (q_len == 1 or (kv_len == q_len and not prefix_len))
    if padding is None and context is None and causality_suffices:
        return None
    visible = causal_mask(q_len, kv_len, device, first)
    if context is not None and q_len > 1:
        visible = visible | context[:, None, None, :]
    if padding is not None:
        visible = visible & padding[:, None, None, :]
        # A padding row sees itself: a row that sees nothing would be nan. Its output is not used.
        keys = torch.arange(kv_len, device=device)
        visible = visible | (keys == query_places(q_len, kv_len, device, first))
    return F.pad(visible, (prefix_len, 0), value=True) if prefix_len else visible


def padding_mask(attention_mask: Tensor | None, kv_len: int, virtual: int = 0) -> Tensor | None:
    """A caller's 2-D mask (B, K), 1 = real token, as bool; None when it is None or masks nothing.

    `virtual` of its columns are P-Tuning v1's, which the caller has not counted.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] != kv_len:
        raise ValueError(
            f"attention_mask must cover all {kv_len - virtual} positions "
            "(those in the cache included), "
            f"got {attention_mask.shape[-1] - virtual}"
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def visible_keys(mask: Tensor) -> Tensor:
    """A caller's 4-D mask (B, 1, Q, K) as bool, True = visible.

    Floats are added to scores, as transformers has them: 0 = visible. Other types have the sense
    of the originals (1 = masked) or of transformers (1 = visible): a query that sees anything sees
    its own key, of which the last Q are, and some query sees something; one sense alone has both.
    """
    if mask.is_floating_point():
        return mask == 0
    visible = ~mask.bool()
    seen_itself = visible.diagonal(visible.shape[-1] - visible.shape[-2], -2, -1)
    sees = visible.any(-1)
    is_originals = sees.any() and not (sees & ~seen_itself).any()
    return visible if is_originals else ~visible


class PrefixEmbedding(nn.Embedding):
    """An embedding of a prefix; keeps torch's initialisation, from which the originals train it.

    `_init_weights` recognises PrefixEmbedding and PrefixLinear by their classes: transformers calls
    it only for modules that own parameters, so never for PrefixEncoder.
    """


class PrefixLinear(nn.Linear):
    """A linear layer of a prefix's MLP; keeps torch's initialisation too."""


class PrefixEncoder(nn.Module):
    """P-Tuning v2 (arXiv 2110.07602): P keys and values for every layer, direct or through an MLP.

    Parameter names and shapes are the originals': `embedding.weight` is
    (P, 2 * layers * kv_heads * head_dim) when direct; with the MLP it is (P, embedding_dim),
    followed by `trans.0`, tanh, `trans.2`.
    """

    def __init__(self, config: GLMConfig, embedding_dim: int):
        super().__init__()
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        length = config.pre_seq_len or 0
        self.shape = (length, 2 * config.num_layers, kv_heads, head_dim)
        kv_size = 2 * config.num_layers * kv_heads * head_dim
        if config.prefix_projection:
            self.embedding = PrefixEmbedding(length, embedding_dim)
            self.trans: nn.Sequential | None = nn.Sequential(
                PrefixLinear(embedding_dim, config.hidden_size),
                nn.Tanh(),
                PrefixLinear(config.hidden_size, kv_size),
            )
        else:
            self.embedding = PrefixEmbedding(length, kv_size)
            self.trans = None
        self.dropout = nn.Dropout(config.prefix_dropout)

    def forward(self, batch_size: int) -> Tensor:
        """(2 * layers, B, kv_heads, P, head_dim): layer l's keys at 2l, its values at 2l + 1."""
        # Call the module, do not read its weight: ZeRO-3 gathers the weight only during the call.
        tokens = torch.arange(self.shape[0], device=self.embedding.weight.device)
        kv = self.embedding(tokens)
        if self.trans is not None:
            kv = self.trans(kv)
        kv = kv.view(self.shape).expand(batch_size, *self.shape)
        return self.dropout(kv).permute(2, 0, 3, 1, 4)


class PromptEncoder(nn.Module):
    """P-Tuning v1 (arXiv 2103.10385) without its LSTM or MLP.

    P trainable vectors before the first input embedding.
    """

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.pre_seq_len or 0, config.hidden_size)

    def forward(self, batch_size: int) -> Tensor:
        """(B, P, hidden_size)."""
        device = self.embedding.weight.device
        vectors = self.embedding(torch.arange(self.embedding.num_embeddings, device=device))
        return vectors.expand(batch_size, -1, -1)


def make_prefix_encoder(
    config: GLMConfig, embedding_dim: int
) -> PromptEncoder | PrefixEncoder | None:
    """The encoder that `config` asks for, or None.

    By `pre_seq_len`, `ptuning_version` and `prefix_projection`.
    """
    if config.prefix_version is None:
        return None
    if config.prefix_version == "v1":
        return PromptEncoder(config)
    return PrefixEncoder(config, embedding_dim)
