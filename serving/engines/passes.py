"""One forward pass over many sequences: the model's own blocks on one row of tokens, attention against a KV arena.

All sequences' new tokens stand in one row (1, N, hidden): first those of decoding sequences, one each, in the order of their slabs;
then chunks of prompts. Projections, norms and MLPs do not care whose tokens they are, so the weights are read once. A Pass goes
through the blocks in the place of their mask and does what depends on the sequence. serving.engines.bodies says what the blocks are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chatglm.layers import causal_mask
from serving.engines.arena import Arena, Slab
from serving.engines.bodies import body_of


class Sequence:
    """A sequence in an engine: its place in the arena, and positions of its tokens.

    Attributes:
        ids: prompt and the answer kept so far, as of its admission.
        context: the first so many tokens see each other both ways and cannot be computed in pieces (ChatGLM-6B; else 0).
        computed: of ids, how many are in the arena.
        length: tokens in the arena, virtual ones included.
        positions: places of the prompt's tokens and, for ChatGLM-6B, their block positions; later ones follow from the last.
        base, reserve, most: context at admission, KV tokens reserved, answer tokens after which it is cut.
    """

    def __init__(
        self, answer, record, base: int, reserve: int, most: int, positions: Tensor, context: int
    ):
        self.id, self.answer, self.base, self.reserve, self.most = (
            record.request.id,
            answer,
            base,
            reserve,
            most,
        )
        self.ids = answer.prompt + answer.tokens
        self.kept = len(answer.tokens)
        self.positions, self.context = positions.tolist(), context
        self.computed = 0
        self.slab: Slab | None = None
        self.slot = self.length = 0

    @property
    def left(self) -> int:
        return len(self.ids) - self.computed

    @property
    def full(self) -> bool:
        return self.base + len(self.answer.tokens) - self.kept >= self.reserve

    def place(self, start: int, end: int) -> list[list[int]]:
        """Positions of tokens start to end of prompt and answer: a list of places and, for ChatGLM-6B, one of block positions."""
        known = len(self.positions[0])
        if len(self.positions) == 1:
            return [list(range(start, end))]
        beyond = max(end - max(start, known), 0)
        place, block = (row[-1] for row in self.positions)
        after = block + 1 + max(start - known, 0)
        found = [row[start:end] for row in self.positions]
        return [found[0] + [place] * beyond, found[1] + list(range(after, after + beyond))]


@dataclass
class Chunk:
    """Tokens start to end of a sequence's slot, virtual ones included; `mask` (1, 1, end - start, end) or None where causality is all."""

    row: Sequence
    start: int
    end: int
    mask: Tensor | None


@dataclass
class Decoding:
    """The decoding rows of a slab, their new tokens at `lengths` (rows,) of their slots; `mask` (rows, 1, 1, longest) or None."""

    slab: Slab
    slots: Tensor
    lengths: Tensor
    longest: int
    mask: Tensor | None


class Pass:
    """Attends to the arena for the tokens of one forward pass. `keep` (K,): those that the last layer computes, None for all."""

    def __init__(
        self,
        decoding: list[Decoding],
        chunks: list[Chunk],
        last_layer: int,
        keep: Tensor | None,
        ends: list[bool],
    ):
        self.decoding, self.chunks, self.last_layer, self.keep, self.ends = (
            decoding,
            chunks,
            last_layer,
            keep,
            ends,
        )

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, prefix=None) -> Tensor:
        """query (1, heads, N, D), key and value (1, kv_heads, N, D) -> (1, N or K, heads * D); writes keys and values to the arena."""
        layer, kv_heads, scale = module.layer_idx, key.shape[1], module.scaling
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
        keeping = self.keep is not None and layer == self.last_layer
        out = query.new_zeros(len(self.keep) if keeping else len(query), *query.shape[1:])
        at = 0
        for part in self.decoding:
            span = slice(at, at + len(part.slots))
            at = span.stop
            keys, values = part.slab.keys[layer], part.slab.values[layer]
            keys[part.slots, :, part.lengths] = key[span]
            values[part.slots, :, part.lengths] = value[span]
            rows, longest = len(part.slots), part.longest
            # The query heads that share a key head are queries of that head: nothing is repeated.
            grouped = query[span].unflatten(1, (kv_heads, -1))
            seen = F.scaled_dot_product_attention(
                grouped,
                keys[:rows, :, :longest],
                values[:rows, :, :longest],
                part.mask,
                scale=scale,
            )
            out[span] = seen.flatten(1, 2)
        kept = at
        for part, is_end in zip(self.chunks, self.ends):
            count, slot, slab = part.end - part.start, part.row.slot, part.row.slab
            keys, values = slab.keys[layer][slot], slab.values[layer][slot]
            keys[:, part.start : part.end] = key[at : at + count].transpose(0, 1)
            values[:, part.start : part.end] = value[at : at + count].transpose(0, 1)
            own, mask, target = query[at : at + count], part.mask, slice(at, at + count)
            at += count
            if keeping:
                if not is_end:
                    continue
                own, mask, target = (
                    own[-1:],
                    None,
                    slice(kept, kept + 1),
                )  # the last token sees everything
                kept += 1
            seen = F.scaled_dot_product_attention(
                own.transpose(0, 1)[None],
                keys[None, :, : part.end],
                values[None, :, : part.end],
                mask,
                scale=scale,
                is_causal=mask is None and len(own) > 1,
                enable_gqa=len(keys) != own.shape[1],
            )
            out[target] = seen[0].transpose(0, 1)
        return out.flatten(1)[None]


class Runner:
    """A model's body and an arena that fits it.

    Raises:
        ValueError: the continuous engine does not know such a model, or it lies on several devices.
    """

    def __init__(self, model, kv_tokens: int):
        model = (
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )  # LoRA's layers are in it
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or "meta" in str(devices):
            raise ValueError(
                f"the continuous engine wants the model on one device, found {sorted(map(str, devices))}; try --engine static"
            )
        self.model, self.body, self.device = model, body_of(model), devices.pop()
        self.virtual = self.body.prefix_length + self.body.prompt_length
        self.arena = Arena(
            len(self.body.blocks),
            self.body.kv_heads,
            self.body.head_dim,
            model.dtype,
            self.device,
            kv_tokens,
        )

    def admit(self, row: Sequence):
        """A slot for the sequence, P-Tuning v2's keys and values in it."""
        self.arena.admit(row, row.reserve + self.virtual)
        if (prefix := self.body.prefix) is not None:
            row.length = self.body.prefix_length
            for layer in range(len(prefix) // 2):
                row.slab.keys[layer][row.slot, :, : row.length] = prefix[2 * layer, 0]
                row.slab.values[layer][row.slot, :, : row.length] = prefix[2 * layer + 1, 0]

    def run(self, decoding: list[Slab], chunks: list[tuple[Sequence, int]]) -> Tensor | None:
        """Logits (at least K, V) of the K tokens after which another comes: of each decoding row, slab by slab, then of each
        sequence whose prompt is complete with its chunk of so many tokens. None where K is 0."""
        ids, positions, parts, pieces, ends, firsts = [], [[], []], [], [], [], []
        body = self.body
        virtual = body.prompt_length  # P-Tuning v1's vectors, positions before the text
        for slab in decoding:
            rows = slab.rows[: slab.decoding]
            parts.append(self.decode_part(slab, rows))
            for row in rows:
                ids.append(row.answer.tokens[-1])
                last = len(row.answer.prompt) + len(row.answer.tokens) - 1
                extend(positions, row.place(last, last + 1), virtual)
        kept = list(range(len(ids)))
        for row, count in chunks:
            start = row.length
            if row.computed == 0 and virtual:
                firsts.append(len(ids))
                ids += [0] * virtual
                extend(positions, [list(range(virtual)), [0] * virtual])
                row.length += virtual
            ids += row.ids[row.computed : row.computed + count]
            extend(positions, row.place(row.computed, row.computed + count), virtual)
            row.computed += count
            row.length += count
            ends.append(not row.left)
            kept += [len(ids) - 1] if ends[-1] else []
            pieces.append(Chunk(row, start, row.length, self.chunk_mask(row, start)))
        wanted, padding = len(kept), rounded(len(ids)) - len(ids)
        keep = (
            torch.tensor(kept + [0] * (rounded(wanted) - wanted), device=self.device)
            if chunks
            else None
        )
        one_pass = Pass(parts, pieces, len(body.blocks) - 1, keep, ends)

        turns = body.turns(
            torch.tensor(
                [row + [0] * padding for row in positions[: body.axes]], device=self.device
            )
        )
        hidden = body.embed(torch.tensor(ids + [0] * padding, device=self.device))[None]
        for first in firsts:
            hidden[:, first : first + virtual] = body.prompt
        for block in body.blocks[:-1]:
            hidden = block(hidden, one_pass, turns)
        hidden = body.blocks[-1](hidden, one_pass, turns, keep=keep)
        for slab in decoding:
            for row in slab.rows[: slab.decoding]:
                row.length += 1
        return body.head(body.norm(hidden))[0] if wanted else None

    def decode_part(self, slab: Slab, rows: list[Sequence]) -> Decoding:
        lengths = [row.length for row in rows]
        longest = max(lengths) + 1
        at = torch.tensor(lengths, device=self.device)
        mask = None
        if min(lengths) + 1 < longest:
            mask = (torch.arange(longest, device=self.device) <= at[:, None])[:, None, None]
        return Decoding(slab, torch.arange(len(rows), device=self.device), at, longest, mask)

    def chunk_mask(self, row: Sequence, start: int) -> Tensor | None:
        """Of a chunk from `start` to the row's length, as attention_visibility has it for a single row."""
        count, end = row.length - start, row.length
        seen_by_all = row.context + self.virtual if row.context else 0
        if count == 1 or (start == 0 and not seen_by_all):
            return None
        mask = causal_mask(count, end, self.device)
        return (
            mask | (torch.arange(end, device=self.device) < seen_by_all)
            if start < seen_by_all
            else mask
        )


def extend(positions: list[list[int]], more: list[list[int]], shift: int = 0):
    """Append positions, their places moved on by `shift`."""
    positions[0] += [place + shift for place in more[0]] if shift else more[0]
    positions[1] += more[-1]


def rounded(tokens: int) -> int:
    """Few shapes: oneDNN compiles its half-precision products for each new one."""
    unit = 4 if tokens <= 16 else 16 if tokens <= 64 else 64
    return max(-(-tokens // unit) * unit, 1)
