"""One forward pass over many sequences: the model's own blocks on one row of tokens.

The new tokens of all sequences are in one row (1, N, hidden): first those of decoding sequences,
one each, in the order of their slabs; then chunks of prompts. Projections, norms and MLPs work on
each token alone, so the weights are read once. A ForwardPass takes the place of the mask in the
blocks and computes what depends on the sequence: attention against the KV arena.
serving.engines.bodies defines the blocks.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from chatglm.layers import causal_mask
from serving.engines.adapters import AdapterSet, LoadedAdapter
from serving.engines.answers import Answer, read_prompt
from serving.engines.arena import Arena, Slab, placed_slab
from serving.engines.bodies import Attention, ServedBody, body_of
from serving.request import Record


class Sequence:
    """A sequence in an engine: its place in the arena, and the positions of its tokens.

    Attributes:
        ids: the prompt and the answer's tokens at its admission.
        tokens_at_admission: answer tokens at its admission.
        context: so many first tokens see each other both ways, and are computed in one piece
            (ChatGLM-6B; else 0).
        key: sequences of another key share no prefix with it.
        computed: of ids, how many are in the arena.
        length: tokens in the arena, virtual ones included.
        positions: places of the prompt's tokens and, for ChatGLM-6B, their block positions; those
            of later tokens follow from the last.
        base, reserve, max_answer: context at admission, KV tokens reserved, answer tokens after
            which it is truncated.
    """

    def __init__(
        self,
        answer: Answer,
        record: Record,
        base: int,
        reserve: int,
        most: int,
        positions: Tensor,
        context: int,
    ):
        self.id = record.request.id
        self.answer = answer
        self.base = base
        self.reserve = reserve
        self.max_answer = most
        self.ids = answer.prompt + answer.tokens
        self.tokens_at_admission = len(answer.tokens)
        self.positions: list[list[int]] = positions.tolist()
        self.context = context
        self.key: Hashable = None if answer.adapter is None else answer.adapter.number
        self.computed = 0
        self.slab: Slab[Sequence] | None = None
        self.slot = self.length = 0

    @property
    def uncomputed(self) -> int:
        """Tokens of ids that are not computed yet."""
        return len(self.ids) - self.computed

    @property
    def new_tokens(self) -> int:
        """Answer tokens since its admission."""
        return len(self.answer.tokens) - self.tokens_at_admission

    @property
    def is_full(self) -> bool:
        return self.base + self.new_tokens >= self.reserve

    def positions_of(self, start: int, end: int) -> list[list[int]]:
        """Positions of tokens start to end of prompt and answer.

        One list of places and, for ChatGLM-6B, one of block positions.
        """
        if len(self.positions) == 1:
            return [list(range(start, end))]
        registered = len(self.positions[0])
        beyond = max(end - max(start, registered), 0)
        places, blocks = self.positions
        next_block = blocks[-1] + 1 + max(start - registered, 0)
        return [
            places[start:end] + [places[-1]] * beyond,
            blocks[start:end] + list(range(next_block, next_block + beyond)),
        ]


@dataclass
class Chunk:
    """Tokens `start` to `end` of a sequence's slot, virtual ones included.

    Attributes:
        slab: where the sequence lies.
        mask: (1, 1, end - start, end); None where it is only causal.
        kept: how many of its last tokens the last layer computes: none, 1 or all.
    """

    row: Sequence
    slab: Slab[Sequence]
    start: int
    end: int
    mask: Tensor | None
    kept: int

    @property
    def count(self) -> int:
        return self.end - self.start


@dataclass
class Decoding:
    """The decoding rows of a slab.

    Attributes:
        slots: (rows,).
        lengths: (rows,), where in their slots the new tokens are written.
        longest: tokens of the longest row, the new one included.
        mask: (rows, 1, 1, longest); None where all rows are as long.
    """

    slab: Slab[Sequence]
    slots: Tensor
    lengths: Tensor
    longest: int
    mask: Tensor | None


@dataclass
class ForwardPass:
    """Attends to the arena for the tokens of one forward pass.

    Attributes:
        keep: (K,), the tokens that the last layer computes; None for all.
        adapters: told when only those are left.
    """

    decoding: list[Decoding]
    chunks: list[Chunk]
    last_layer: int
    keep: Tensor | None
    adapters: AdapterSet

    def attend(
        self,
        module: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer; writes keys and values to the arena.

        Args:
            query: (1, heads, N, D). key, value: (1, kv_heads, N, D).
            prefix: not used: P-Tuning's prefix is in the arena.
        Returns:
            (1, N or K, heads * D).
        """
        layer, scale = module.layer_idx, module.scaling
        query = query[0].transpose(0, 1)  # (N, heads, D)
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
        is_kept = self.keep is not None and layer == self.last_layer
        count = len(query)
        if self.keep is not None and is_kept:
            count = len(self.keep)
            self.adapters.narrow(self.keep)
        out = query.new_zeros(count, *query.shape[1:])
        start = 0
        for part in self.decoding:
            span = slice(start, start + len(part.slots))
            out[span] = attend_decoding(part, layer, query[span], key[span], value[span], scale)
            start = span.stop
        target = start
        for chunk in self.chunks:
            span = slice(start, start + chunk.count)
            start = span.stop
            chunk_query, mask = query[span], chunk.mask
            write_chunk(chunk, layer, key[span], value[span])
            if is_kept:
                if not chunk.kept:
                    continue
                if chunk.kept == 1:
                    chunk_query, mask = chunk_query[-1:], None  # the last token sees all others
            seen = attend_chunk(chunk, layer, chunk_query, mask, scale)
            out[target : target + len(seen)] = seen
            target += len(seen)
        return out.flatten(1)[None]


def attend_decoding(
    part: Decoding, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention (rows, heads, D) of a slab's new tokens, whose keys and values are written first.

    Args:
        query: (rows, heads, D). key, value: (rows, kv_heads, D).
    """
    keys, values = part.slab.keys[layer], part.slab.values[layer]
    keys[part.slots, :, part.lengths] = key
    values[part.slots, :, part.lengths] = value
    rows = len(part.slots)
    # The query heads that share a key head are queries of that head: nothing is repeated.
    grouped = query.unflatten(1, (key.shape[1], -1))
    seen = F.scaled_dot_product_attention(
        grouped,
        keys[:rows, :, : part.longest],
        values[:rows, :, : part.longest],
        part.mask,
        scale=scale,
    )
    return seen.flatten(1, 2)


def write_chunk(chunk: Chunk, layer: int, key: Tensor, value: Tensor) -> None:
    """Write a chunk's keys and values (count, kv_heads, D) to its slot."""
    slab, slot = chunk.slab, chunk.row.slot
    slab.keys[layer][slot][:, chunk.start : chunk.end] = key.transpose(0, 1)
    slab.values[layer][slot][:, chunk.start : chunk.end] = value.transpose(0, 1)


def attend_chunk(
    chunk: Chunk, layer: int, query: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention (Q, heads, D) of queries (Q, heads, D) to a chunk's slot up to the chunk's end."""
    slab, slot = chunk.slab, chunk.row.slot
    keys, values = slab.keys[layer][slot], slab.values[layer][slot]
    seen = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None, :, : chunk.end],
        values[None, :, : chunk.end],
        mask,
        scale=scale,
        is_causal=mask is None and len(query) > 1,
        enable_gqa=len(keys) != query.shape[1],
    )
    return seen[0].transpose(0, 1)


class PassInputs:
    """The token row of a pass while it is built.

    Attributes:
        ids: token ids; 0 for a virtual token.
        positions: places, and block positions (ChatGLM-6B).
        output_indices: of the tokens that the last layer computes.
        next_places: which of them are those whose successor is computed.
        prompts: (sequence, where its chunk begins in output_indices, its tokens computed before
            the chunk), of those that read their prompts' states.
        virtual_starts: where P-Tuning v1's vectors begin.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[list[int]] = [[], []]
        self.output_indices: list[int] = []
        self.next_places: list[int] = []
        self.prompts: list[tuple[Sequence, int, int]] = []
        self.virtual_starts: list[int] = []

    def add(self, ids: list[int], positions: list[list[int]], shift: int = 0) -> None:
        """Append tokens, their places moved on by `shift`."""
        self.ids += ids
        self.positions[0] += [place + shift for place in positions[0]]
        self.positions[1] += positions[-1]

    def keep_last(self, count: int, is_end: bool) -> None:
        """The last layer computes the last `count` tokens; `is_end`: the last one's successor."""
        self.output_indices += range(len(self.ids) - count, len(self.ids))
        if is_end:
            self.next_places.append(len(self.output_indices) - 1)


class ModelRunner:
    """A model's body and an arena that fits it.

    Raises:
        ValueError: the continuous engine does not know such a model, or it lies on several devices.
    """

    def __init__(self, model: PreTrainedModel, kv_tokens: int):
        get_base_model: Any = getattr(model, "get_base_model", None)
        if get_base_model is not None:  # a peft model; its base has LoRA's layers in it
            model = get_base_model()
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or "meta" in str(devices):
            raise ValueError(
                "the continuous engine wants the model on one device, "
                f"found {sorted(map(str, devices))}; try --engine static"
            )
        self.model = model
        self.adapters = AdapterSet(model)
        self.body: ServedBody = body_of(model)
        self.device = devices.pop()
        self.virtual = self.body.prefix_length + self.body.prompt_length
        self.arena: Arena[Sequence] = Arena(
            len(self.body.blocks),
            self.body.kv_heads,
            self.body.head_dim,
            model.dtype,
            self.device,
            kv_tokens,
        )

    def admit(self, row: Sequence) -> None:
        """Give the sequence a slot, with P-Tuning v2's keys and values in it."""
        self.arena.admit(row, row.reserve + self.virtual)
        if (prefix := self.body.prefix) is not None:
            row.length = self.body.prefix_length
            slab = placed_slab(row)
            for layer in range(len(prefix) // 2):
                slab.keys[layer][row.slot, :, : row.length] = prefix[2 * layer, 0]
                slab.values[layer][row.slot, :, : row.length] = prefix[2 * layer + 1, 0]

    def run(
        self, decoding: list[Slab[Sequence]], chunks: list[tuple[Sequence, int]]
    ) -> Tensor | None:
        """One forward pass; each chunk is so many tokens of its sequence.

        Returns:
            Logits (at least K, V) of the K tokens after which another comes: of each decoding row,
            slab by slab, then of each sequence whose prompt is complete with its chunk. None where
            K is 0. Answers that read their prompts have got what they ask for.
        """
        inputs = PassInputs()
        parts = [self._add_decoding(inputs, slab) for slab in decoding]
        pieces = [self._add_chunk(inputs, row, count) for row, count in chunks]
        count, wanted = len(inputs.ids), len(inputs.output_indices)
        keep = None
        if chunks:
            kept_padding = padded_count(wanted) - wanted
            keep = torch.tensor(inputs.output_indices + [0] * kept_padding, device=self.device)
        padding = padded_count(count) - count
        forward_pass = ForwardPass(parts, pieces, len(self.body.blocks) - 1, keep, self.adapters)
        with self.adapters.applied(adapters_of(decoding, pieces), padding):
            hidden = self._blocks(inputs, forward_pass, padding)
            logits = self._outputs(inputs, hidden) if wanted else None
        for slab in decoding:
            for row in slab.rows[: slab.decoding]:
                row.length += 1
        return logits

    def _outputs(self, inputs: PassInputs, hidden: Tensor) -> Tensor | None:
        """Logits of inputs.next_places, by the last block's (1, K, hidden); None without any."""
        hidden = self.body.norm(hidden)
        if inputs.prompts:
            hidden = self._read_prompts(inputs, hidden[0])
        return self.body.head(hidden)[0] if inputs.next_places else None

    def _read_prompts(self, inputs: PassInputs, hidden: Tensor) -> Tensor:
        """Give sequences the states that they read; the states (1, K', hidden) that are left.

        Args:
            hidden: (K, hidden), of inputs.output_indices.
        """
        for row, place, start in inputs.prompts:
            count = row.computed - start
            read_prompt(row.answer, hidden[place : place + count], start, self.body.head)
        padding = padded_count(len(inputs.next_places)) - len(inputs.next_places)
        return hidden[inputs.next_places + [0] * padding][None]

    def _add_decoding(self, inputs: PassInputs, slab: Slab[Sequence]) -> Decoding:
        """Append the newest token of each decoding row of a slab."""
        rows = slab.rows[: slab.decoding]
        for row in rows:
            last = len(row.answer.prompt) + len(row.answer.tokens) - 1
            inputs.add(
                [row.answer.tokens[-1]], row.positions_of(last, last + 1), self.body.prompt_length
            )
            inputs.keep_last(1, is_end=True)
        return self.decode_part(slab, rows)

    def _add_chunk(self, inputs: PassInputs, row: Sequence, count: int) -> Chunk:
        """Append the next `count` tokens of a sequence, P-Tuning v1's vectors before its first."""
        virtual = self.body.prompt_length
        start = row.length
        if row.computed == 0 and virtual:
            inputs.virtual_starts.append(len(inputs.ids))
            inputs.add([0] * virtual, [list(range(virtual)), [0] * virtual])
            row.length += virtual
        before, end = row.computed, row.computed + count
        inputs.add(row.ids[before:end], row.positions_of(before, end), virtual)
        row.computed = end
        row.length += count
        kept = int(not row.uncomputed)
        if row.answer.reads_prompt:
            kept = row.length - start
            place = len(inputs.output_indices) + kept - count  # virtual tokens are left out
            inputs.prompts.append((row, place, before))
        inputs.keep_last(kept, is_end=not row.uncomputed)
        return Chunk(row, placed_slab(row), start, row.length, self.chunk_mask(row, start), kept)

    def _blocks(self, inputs: PassInputs, forward_pass: ForwardPass, padding: int) -> Tensor:
        """Hidden states (1, N + padding or K, hidden) after the last block."""
        body = self.body
        positions = [row + [0] * padding for row in inputs.positions[: body.axes]]
        turns = body.turns(torch.tensor(positions, device=self.device))
        ids = torch.tensor(inputs.ids + [0] * padding, device=self.device)
        hidden = body.embed(ids)[None]
        for start in inputs.virtual_starts:
            assert body.prompt is not None  # a virtual start comes with a prompt_length
            hidden[:, start : start + body.prompt_length] = body.prompt
        for block in body.blocks[:-1]:
            hidden = block(hidden, forward_pass, turns)
        return body.blocks[-1](hidden, forward_pass, turns, keep=forward_pass.keep)

    def decode_part(self, slab: Slab[Sequence], rows: list[Sequence]) -> Decoding:
        lengths = [row.length for row in rows]
        longest = max(lengths) + 1
        at = torch.tensor(lengths, device=self.device)
        mask = None
        if min(lengths) + 1 < longest:
            mask = (torch.arange(longest, device=self.device) <= at[:, None])[:, None, None]
        return Decoding(slab, torch.arange(len(rows), device=self.device), at, longest, mask)

    def chunk_mask(self, row: Sequence, start: int) -> Tensor | None:
        """The mask of a chunk from `start` to the row's length; None where it is only causal.

        As attention_visibility has it for a single row.
        """
        count, end = row.length - start, row.length
        seen_by_all = row.context + self.virtual if row.context else 0
        if count == 1 or (start == 0 and not seen_by_all):
            return None
        mask = causal_mask(count, end, self.device)
        if start < seen_by_all:
            mask = mask | (torch.arange(end, device=self.device) < seen_by_all)
        return mask


def adapters_of(
    decoding: list[Slab[Sequence]], chunks: list[Chunk]
) -> list[tuple[LoadedAdapter | None, int]]:
    """(Adapter, number of tokens) of a pass's rows, in the order of its tokens."""
    found = []
    for slab in decoding:
        for row in slab.rows[: slab.decoding]:
            found.append((row.answer.adapter, 1))
    for chunk in chunks:
        found.append((chunk.row.answer.adapter, chunk.count))
    return found


def padded_count(tokens: int) -> int:
    """The count that `tokens` is padded to: few shapes.

    oneDNN compiles its half-precision products for each new shape.
    """
    if tokens <= 16:
        unit = 4
    elif tokens <= 64:
        unit = 16
    else:
        unit = 64
    return max(-(-tokens // unit) * unit, 1)
