"""Several sequences end to end in one row, each unable to see the others.

There is no padding, and no mask over pairs of sequences.

Positions separate the sequences: where they fall back to 0, one ends and the next begins. Where
they fall back to p > 0, the next one shares the row's first p tokens, its *trunk*: a beginning that
sequences have in common is computed once. (A causal model's output at a token depends only on the
tokens up to it, so this changes no number. ChatGLM-6B's context is bidirectional: its sequences
share nothing.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .kernels import CpuAttentionFunction
from .layers import (
    AttentionModule,
    Device,
    attention_backend,
    attention_visibility,
    causal_mask,
)


@dataclass(frozen=True)
class Packing:
    """The sequences of one row, and attention over them.

    Args:
        lengths: tokens of each sequence in the row; a shared trunk is counted in the first alone.
        shared: tokens of the trunk that each one sees before its own; the first sees none.
        context: per sequence the tokens at its front that all of its tokens see (ChatGLM-6B), or
            None where attention is causal.
        keep: (N,) ascending places in the row; the last layer computes no others. None for all.
    """

    lengths: list[int]
    shared: list[int]
    context: list[int] | None = None
    keep: Tensor | None = None

    def with_prompt(self, count: int) -> tuple["Packing", Tensor]:
        """The packing with `count` virtual tokens (P-Tuning v1) before each sequence.

        A sequence that sees a trunk gets none: the trunk's come before it.

        Returns the new packing and (S,) the places of the old tokens in the new row.
        """
        before = [0 if shared else count for shared in self.shared]
        spans, start = [], 0
        for length, virtual in zip(self.lengths, before):
            spans.append(torch.arange(start + virtual, start + virtual + length))
            start += virtual + length
        places = torch.cat(spans)
        packing = Packing(
            lengths=[length + virtual for length, virtual in zip(self.lengths, before)],
            shared=[shared + count if shared else 0 for shared in self.shared],
            context=self.context and [n + virtual for n, virtual in zip(self.context, before)],
            keep=None if self.keep is None else places.to(self.keep.device)[self.keep],
        )
        return packing, places

    def masks(self, prefix_len: int, device: Device, backend: str) -> "PackedMasks":
        """The masks of all layers but the last, built once.

        `prefix_len` keys are seen by every query (P-Tuning v2).
        """
        masks = [self.mask(i, prefix_len, device, backend) for i in range(len(self.lengths))]
        return PackedMasks(self, prefix_len, masks, self.lengths, causal=self.context is None)

    def mask(self, i: int, prefix_len: int, device: Device, backend: str) -> Tensor | None:
        """(1, 1, L, keys) bool of sequence i, True = visible.

        None where causality alone says what is visible, or where the backend takes no mask.
        """
        length = self.lengths[i]
        context = None
        if self.context:
            context = torch.arange(length, device=device)[None] < self.context[i]
        return attention_visibility(
            q_len=length,
            kv_len=length,
            device=device,
            padding=None,
            context=context,
            prefix_len=prefix_len + self.shared[i],
            backend=backend,
        )


@dataclass(frozen=True)
class PackedMasks:
    """Masks of a packed row's sequences; a layer computes `queries[i]` tokens of sequence i.

    `causal`: every mask says that a sequence's last query sees all keys, the one before it all but
        one, and so on, and no more.
    `keep`: the places of the row whose queries are computed, None for all.
    """

    packing: Packing
    prefix_len: int
    masks: list[Tensor | None]
    queries: list[int]
    causal: bool
    keep: Tensor | None = None

    def of_last_layer(self, keep: Tensor) -> "PackedMasks":
        """The masks for the kept tokens alone; `keep` is the packing's."""
        lengths = self.packing.lengths
        edges = torch.tensor([0, *lengths]).cumsum(0)
        places = torch.searchsorted(keep.cpu(), edges).tolist()
        masks: list[Tensor | None] = []
        queries = []
        for i, (start, end) in enumerate(zip(places, places[1:])):
            mask = self.masks[i]
            if mask is None:
                keys = self.prefix_len + self.packing.shared[i] + lengths[i]
                mask = causal_mask(lengths[i], keys, keep.device)
            masks.append(mask[:, :, keep[start:end] - int(edges[i])])
            queries.append(end - start)
        return replace(self, masks=masks, queries=queries, causal=False, keep=keep)

    def attend(
        self,
        module: AttentionModule,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Tensor | None,
    ) -> Tensor:
        """(1, Q, heads * D) from query (1, heads, S, D) and key, value (1, kv_heads, S, D).

        prefix: (2, sequences, kv_heads, P, D).

        Q is the number of kept tokens, or S.
        """
        backend, name = attention_backend(module), module.config._attn_implementation
        options = {
            "scaling": module.scaling,
            "dropout": module.attention_dropout if module.training else 0.0,
        }
        if "flash" in name:
            # Its kernels know no mask but causality, aligned to the last key: queries that are not
            # kept are dropped afterwards.
            out = self.attend_flash(module, backend, query, key, value, prefix, options)
            return out if self.keep is None else out[:, self.keep]
        use_cpu_kernel = query.device.type == "cpu" and not options["dropout"] and name == "sdpa"
        if self.keep is not None:
            query = query[:, :, self.keep]
        outs = []
        keys, values = self.keys_and_values(key, value, prefix)
        for q, k, v, mask in zip(query.split(self.queries, dim=2), keys, values, self.masks):
            if not q.shape[2]:
                continue
            if use_cpu_kernel:
                out = CpuAttentionFunction.apply(q, k, v, mask, self.causal, module.scaling)
                out = out.transpose(1, 2)
            else:
                out = backend(module, q, k, v, mask, **options)[0]
            outs.append(out.flatten(2))
        return torch.cat(outs, dim=1)

    def keys_and_values(
        self, key: Tensor, value: Tensor, prefix: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values that each sequence may see: prefix, shared trunk, its own tokens."""
        if prefix is None:
            return self.with_shared(key, None), self.with_shared(value, None)
        return self.with_shared(key, prefix[0]), self.with_shared(value, prefix[1])

    def with_shared(self, x: Tensor, prefix: Tensor | None) -> list[Tensor]:
        """Each sequence's part of x (1, kv_heads, S, D), after its prefix and shared trunk.

        prefix: (sequences, kv_heads, P, D).
        """
        parts = x.split(self.packing.lengths, dim=2)
        extended = []
        for i, part in enumerate(parts):
            before = [] if prefix is None else [prefix[i : i + 1].to(x.dtype)]
            if shared := self.packing.shared[i]:
                before.append(parts[0][:, :, :shared])
            extended.append(torch.cat([*before, part], dim=2) if before else part)
        return extended

    def attend_flash(
        self,
        module: AttentionModule,
        backend: Callable[..., tuple[Tensor, Tensor | None]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """All sequences in one call of a kernel for rows of several lengths."""
        keys, values = self.keys_and_values(key, value, prefix)
        q_lengths = self.packing.lengths
        k_lengths = [k.shape[2] for k in keys]
        out, _ = backend(
            module,
            query,
            torch.cat(keys, dim=2),
            torch.cat(values, dim=2),
            None,
            **options,
            cu_seq_lens_q=cumulative_lengths(q_lengths, query.device),
            cu_seq_lens_k=cumulative_lengths(k_lengths, query.device),
            max_length_q=max(q_lengths),
            max_length_k=max(k_lengths),
        )
        return out.flatten(2)


def consecutive_positions(padding: Tensor | None, past: int, length: int, device: Device) -> Tensor:
    """(B or 1, length) positions after `past` cached ones; padding (B, K) is not counted."""
    if padding is not None:
        return (padding.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    return torch.arange(past, past + length, device=device)[None]


def positions_end_to_end(input_ids: Tensor, lengths: list[int], shared: list[int]) -> Tensor:
    """(1, S) positions of sequences end to end in input_ids (1, S).

    Those that share a trunk count on from it.
    """
    positions = []
    for length, start in zip(lengths, shared):
        positions.append(torch.arange(start, start + length, device=input_ids.device))
    return torch.cat(positions)[None]


def cumulative_lengths(lengths: list[int], device: Device) -> Tensor:
    """(sequences + 1,) int32: the edges of the sequences, from 0, as flash kernels take them."""
    edges = torch.tensor([0, *lengths], dtype=torch.int32, device=device)
    return edges.cumsum(0, dtype=torch.int32)


def packed_states(
    model: Any, input_ids: Tensor, lengths: list[int], shared: list[int], keep: Tensor
) -> Tensor:
    """(N, H) last hidden states at the places `keep` (N,) of a packed row (1, S).

    Args:
        model: a ChatGLM, which computes only those places in its last block; or another causal
            model of transformers, whose masks find the sequences by positions that begin anew
            (transformers.masking_utils.find_packed_sequence_indices).
        lengths, shared: of the row's sequences, as in Packing; another model's share nothing.
    """
    body = getattr(model, "transformer", None)
    if body is not None:
        positions = body.packed_positions(input_ids, lengths, shared)
        states = body(input_ids=input_ids, position_ids=positions, keep=keep, use_cache=False)
        return states.last_hidden_state[0]
    parts = [torch.arange(length, device=input_ids.device) for length in lengths]
    positions = torch.cat(parts)[None]
    states = model.model(input_ids=input_ids, position_ids=positions, use_cache=False)
    return states.last_hidden_state[0, keep]


def find_sequences(positions: Tensor) -> tuple[list[int], list[int]]:
    """(lengths, shared) of the sequences in a row of positions (S,), as Packing has them.

    Positions that never fall are one sequence, whatever they are.

    Raises:
        ValueError: of several sequences, one has a position that jumps upward, or falls back into
            a sequence that is not the first.
    """
    steps = positions[1:] - positions[:-1]
    if (steps > 0).all():
        return [len(positions)], [0]
    if len(jumps := (steps > 1).nonzero().flatten()):
        before, after = positions[jumps[0]], positions[jumps[0] + 1]
        raise ValueError(
            f"positions jump from {before} to {after}: within a sequence they count up by one"
        )
    falls = (steps <= 0).nonzero().flatten() + 1
    starts = [0, *falls.tolist()]
    lengths = [b - a for a, b in zip(starts, [*starts[1:], len(positions)])]
    shared = [0, *positions[falls].tolist()]
    if any(s > lengths[0] for s in shared):
        raise ValueError(
            f"positions fall back to {max(shared)}, "
            f"but the row's first sequence has {lengths[0]} tokens"
        )
    if any(shared) and positions[0] != 0:
        raise ValueError(
            f"a shared beginning has the positions from 0, this row begins at {positions[0]}"
        )
    return lengths, shared
