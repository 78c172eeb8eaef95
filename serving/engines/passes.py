"""One forward pass over many sequences: the model's own blocks on one row of tokens.

The new tokens of all sequences are in one row (1, N, hidden). Projections, norms and MLPs work on
each token alone, so the weights are read once. A ForwardPass takes the place of the mask in the
blocks and computes what depends on the sequence: attention against the KV arena.
serving.engines.bodies defines the blocks, serving.engines.pass_plans what a pass computes.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from chatglm.layers import causal_mask
from serving.engines.adapters import AdapterSet
from serving.engines.answers import read_prompt
from serving.engines.arena import Arena, Slab
from serving.engines.bodies import Attention, ServedBody, body_of
from serving.engines.kv_memory import KvMemory
from serving.engines.onednn_weights import OneDnnLinear
from serving.engines.pass_plans import (
    ChunkPlan,
    DecodingPlan,
    Lane,
    PassPlan,
    PlannedPass,
    Sequence,
    padded_indices,
)
from serving.engines.stage_reports import StageReport

if TYPE_CHECKING:
    from serving.engines.state_tap import StateTap


@dataclass
class Chunk:
    """A chunk of a prompt as the attention takes it.

    Attributes:
        keys, values: of its slab, by layer of the stage.
        mask: (1, 1, end - start, end); None where it is only causal.
    """

    plan: ChunkPlan
    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None


@dataclass
class Decoding:
    """The decoding rows of a slab.

    Attributes:
        keys, values: of the slab, by layer of the stage.
        slots: (rows,).
        lengths: (rows,), where in their slots the new tokens are written.
        longest: tokens of the longest row, the new one included.
        mask: (rows, 1, 1, longest); None where all rows are as long.
    """

    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    lengths: Tensor
    longest: int
    mask: Tensor | None


@dataclass
class ForwardPass:
    """Attends to the arena for the tokens of one forward pass.

    Attributes:
        first_layer: of the stage; last_layer: of the model.
        keep: (K,), the tokens that the last layer computes; None for all.
        adapters: told when only those are left.
    """

    decoding: list[Decoding]
    chunks: list[Chunk]
    first_layer: int
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
        place = layer - self.first_layer
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
            out[span] = attend_decoding(part, place, query[span], key[span], value[span], scale)
            start = span.stop
        target = start
        for chunk in self.chunks:
            kept = chunk.plan.kept
            span = slice(start, start + chunk.plan.end - chunk.plan.start)
            start = span.stop
            chunk_query, mask = query[span], chunk.mask
            write_chunk(chunk, place, key[span], value[span])
            if is_kept:
                if not kept:
                    continue
                if kept == 1:
                    chunk_query, mask = chunk_query[-1:], None  # the last token sees all others
            seen = attend_chunk(chunk, place, chunk_query, mask, scale)
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
    keys, values = part.keys[layer], part.values[layer]
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
    plan = chunk.plan
    chunk.keys[layer][plan.slot][:, plan.start : plan.end] = key.transpose(0, 1)
    chunk.values[layer][plan.slot][:, plan.start : plan.end] = value.transpose(0, 1)


def attend_chunk(
    chunk: Chunk, layer: int, query: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention (Q, heads, D) of queries (Q, heads, D) to a chunk's slot up to the chunk's end."""
    plan = chunk.plan
    keys, values = chunk.keys[layer][plan.slot], chunk.values[layer][plan.slot]
    seen = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None, :, : plan.end],
        values[None, :, : plan.end],
        mask,
        scale=scale,
        is_causal=mask is None and len(query) > 1,
        enable_gqa=len(keys) != query.shape[1],
    )
    return seen[0].transpose(0, 1)


class Stage:
    """Consecutive layers of a model, and the KV memories of its lanes.

    Args:
        start, end: its first layer, and the one after its last.
        memories: one a lane.
    Attributes:
        seconds, passes: computed so far.
        tap: sees the output of each block; None for none.
    """

    def __init__(
        self,
        body: ServedBody,
        adapters: AdapterSet,
        device: torch.device,
        memories: list[KvMemory],
        start: int,
        end: int,
    ):
        self.body = body
        self.adapters = adapters
        self.device = device
        self.memories = memories
        self.start, self.end = start, end
        self.seconds = 0.0
        self.passes = 0
        self.tap: StateTap | None = None

    @torch.inference_mode()
    def compute(self, plan: PassPlan, hidden: Tensor | None = None) -> Tensor:
        """Hidden states (1, N, hidden) after its last layer; (1, K, hidden) after the model's last.

        Args:
            hidden: (1, N, hidden) after the stage before; None for the first stage.
        """
        begin = time.perf_counter()
        forward_pass = self._forward_pass(plan)
        keep, tap = forward_pass.keep, self.tap
        if tap is not None and tap.wants_all_tokens:
            forward_pass.keep = None
        with self.adapters.applied(plan.adapters, plan.padding):
            turns = self.body.turns(torch.tensor(plan.positions, device=self.device))
            if hidden is None:
                hidden = self._embed(plan)
            last = len(self.body.blocks) - 1
            for layer in range(self.start, min(self.end, last)):
                hidden = self.body.blocks[layer](hidden, forward_pass, turns)
                if tap is not None:
                    tap.see(layer, hidden)
            if self.end > last:
                hidden = self.body.blocks[last](hidden, forward_pass, turns, keep=forward_pass.keep)
                if tap is not None and tap.wants_all_tokens:
                    tap.see(last, hidden)
                    hidden = hidden if keep is None else hidden[:, keep]
        self.seconds += time.perf_counter() - begin
        self.passes += 1
        return hidden

    def _embed(self, plan: PassPlan) -> Tensor:
        """The embeddings (1, N, hidden) of a pass's tokens, P-Tuning v1's vectors among them."""
        body = self.body
        hidden = body.embed(torch.tensor(plan.ids, device=self.device))[None]
        for start in plan.virtual_starts:
            assert body.prompt is not None  # a virtual start comes with a prompt_length
            hidden[:, start : start + body.prompt_length] = body.prompt
        return hidden

    def _forward_pass(self, plan: PassPlan) -> ForwardPass:
        memory = self.memories[plan.lane]
        keep = None
        if plan.keep is not None:
            keep = torch.tensor(plan.keep, device=self.device)
        return ForwardPass(
            [decoding_part(memory, part) for part in plan.decoding],
            [chunk_part(memory, chunk) for chunk in plan.chunks],
            self.start,
            len(self.body.blocks) - 1,
            keep,
            self.adapters,
        )


def decoding_part(memory: KvMemory, plan: DecodingPlan) -> Decoding:
    """The tensors of a slab's decoding rows."""
    device = memory.device
    longest = max(plan.lengths) + 1
    at = torch.tensor(plan.lengths, device=device)
    mask = None
    if min(plan.lengths) + 1 < longest:
        mask = (torch.arange(longest, device=device) <= at[:, None])[:, None, None]
    slots = torch.arange(len(plan.lengths), device=device)
    keys, values = memory.keys[plan.size], memory.values[plan.size]
    return Decoding(keys, values, slots, at, longest, mask)


def chunk_part(memory: KvMemory, plan: ChunkPlan) -> Chunk:
    """The tensors of a chunk."""
    keys, values = memory.keys[plan.size], memory.values[plan.size]
    return Chunk(plan, keys, values, chunk_mask(plan, memory.device))


def chunk_mask(plan: ChunkPlan, device: torch.device) -> Tensor | None:
    """The mask (count, end) of a chunk; None where it is only causal.

    As attention_visibility has it for a single row.
    """
    count, end = plan.end - plan.start, plan.end
    if count == 1 or (plan.start == 0 and not plan.seen_by_all):
        return None
    mask = causal_mask(count, end, device)
    if plan.start < plan.seen_by_all:
        mask = mask | (torch.arange(end, device=device) < plan.seen_by_all)
    return mask


def plain_model(model: Any) -> PreTrainedModel:
    """The model itself, or that in a peft model: it has LoRA's layers in it."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


class ModelRunner:
    """Runs an engine's passes on a model on one device, in the engine's thread.

    Attributes:
        stage: the layers in this process.
        lanes: the micro-batches, here one.
        lane_rows: sequences of a lane before another one is used.
        virtual: P-Tuning's tokens before each sequence.
    Raises:
        ValueError: the continuous engine does not know such a model, or it lies on several devices.
    """

    def __init__(self, model: PreTrainedModel, kv_tokens: int):
        model = plain_model(model)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or "meta" in str(devices):
            raise ValueError(
                "the continuous engine wants the model on one device, "
                f"found {sorted(map(str, devices))}; over several devices it runs as a pipeline "
                "(--deployer, --devices; serving.engines.pipeline), or try --engine static"
            )
        device = devices.pop()
        body = body_of(model)
        layers = len(body.blocks)
        memory = KvMemory(
            layers, body.kv_heads, body.head_dim, model.dtype, device, prefix=body.prefix
        )
        stage = Stage(body, AdapterSet(model), device, [memory], 0, layers)
        self._set_up(model, stage, kv_tokens)

    def _set_up(self, model: PreTrainedModel, stage: Stage, kv_tokens: int) -> None:
        self.model = model
        self.stage = stage
        self.body = stage.body
        self.adapters = stage.adapters
        self.virtual = self.body.prefix_length + self.body.prompt_length
        self.lanes: list[Lane] = []
        self.lane_rows = 1
        share = -(-kv_tokens // len(stage.memories))
        for number, memory in enumerate(stage.memories):
            self.lanes.append(Lane(number, Arena(memory, share)))

    @property
    def arena(self) -> Arena[Sequence]:
        """Of the first lane."""
        return self.lanes[0].arena

    def admit(self, row: Sequence) -> None:
        """Give the sequence a place in a lane, with P-Tuning v2's keys and values.

        It is the emptiest of as many lanes as can have `lane_rows` sequences each.
        """
        lane = self.lanes[0]
        if len(self.lanes) > 1:
            count = 1 + sum(lane.load[0] for lane in self.lanes)
            used = max(count // self.lane_rows, 1)
            lane = min(self.lanes[:used], key=lambda lane: lane.load)
        row.lane = lane
        lane.arena.admit(row, row.reserve + self.virtual)
        lane.prefills.append(row)
        if self.body.prefix_length and row.slab is not None:
            row.length = self.body.prefix_length
            lane.arena.memory.do("write_prefix", row.slab.size, row.slot)

    def plan(
        self, lane: Lane, decoding: list[Slab[Sequence]], chunks: list[tuple[Sequence, int]]
    ) -> PlannedPass:
        """The pass over the decoding rows of slabs and so many tokens of each chunk's sequence."""
        body = self.body
        planned = PlannedPass(lane.number, body.axes, body.prompt_length, self.virtual)
        for slab in decoding:
            planned.add_decoding(slab)
        for row, count in chunks:
            planned.add_chunk(row, count)
        planned.finish()
        return planned

    def submit(self, planned: PlannedPass) -> None:
        """Begin a pass; here nothing happens before `collect`."""

    def collect(self, planned: PlannedPass) -> Tensor | None:
        """The outputs of the pass that was submitted first of those not yet collected.

        Returns:
            Logits (at least K, V) of the K tokens after which another comes: of each decoding row,
            slab by slab, then of each sequence whose prompt is complete with its chunk. None where
            K is 0. Answers that read their prompts have got what they ask for.
        """
        hidden = self.stage.compute(planned.plan)
        if self.stage.tap is not None:
            self.stage.tap.add(planned, self._logits)
        return self.outputs(planned, hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of states (n, hidden_size) after the last block."""
        return self.body.head(self.body.norm(hidden[None]))[0]

    def attach(self, tap: "StateTap") -> None:
        """Show all later passes to a tap.

        Raises:
            ValueError: the model has no such layer, or is spread over several stages.
        """
        tap.attach(len(self.body.blocks))
        self.stage.tap = tap

    def outputs(self, planned: PlannedPass, hidden: Tensor) -> Tensor | None:
        """As `collect`, by the last block's hidden states (1, K, hidden)."""
        if not planned.output_indices:
            return None
        hidden = self.body.norm(hidden)
        if planned.prompts:
            hidden = self._read_prompts(planned, hidden[0])
        return self.body.head(hidden)[0] if planned.next_places else None

    def _read_prompts(self, planned: PlannedPass, hidden: Tensor) -> Tensor:
        """Give sequences the states that they read; the states (1, K', hidden) that are left.

        Args:
            hidden: (K, hidden), of planned.output_indices.
        """
        for part in planned.prompts:
            states = hidden[part.place : part.place + part.count]
            read_prompt(part.row.answer, states, part.start, self.body.head)
        return hidden[padded_indices(planned.next_places)][None]

    def reports(self) -> list[StageReport]:
        """Of each stage, in order."""
        return [report_of(self.stage, self.model)]

    def close(self) -> None:
        """Free what lies outside this process; here nothing does."""


def report_of(stage: Stage, model: PreTrainedModel) -> StageReport:
    """What a stage in this process holds and has done."""
    weights = 0
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            weights += parameter.nbytes
    for module in model.modules():
        if isinstance(module, OneDnnLinear):
            weights += module.weight_bytes
    kv_bytes = stage.memories[0].kept_bytes
    for memory in stage.memories:
        kv_bytes += memory.slab_bytes
    return StageReport(
        pid=os.getpid(),
        device=str(stage.device),
        threads=torch.get_num_threads(),
        start=stage.start,
        end=stage.end,
        weight_bytes=weights,
        kv_bytes=kv_bytes,
        resident_bytes=resident_bytes() if stage.device.type == "cpu" else None,
        seconds=stage.seconds,
        passes=stage.passes,
    )


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None
