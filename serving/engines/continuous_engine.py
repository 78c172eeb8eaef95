"""The continuous engine: iteration-level batching over a KV arena in length classes.

Iteration-level batching is that of Orca (OSDI 2022); the engine runs ChatGLM and GLM.

One iteration is one forward pass: the last token of every decoding sequence, and up to
prefill_tokens prompt tokens, in order of admission. A sequence whose prompt is complete makes its
first token in that pass. These are the iterations that the simulated engine counts. The two differ
in this: here a static batch is not padded and its ended rows are not computed (they only wait for
the others), and a ChatGLM-6B context is computed in one piece, whatever prefill_tokens says.

Over several devices (serving.engines.pipeline) the sequences are divided into lanes, whose passes
are computed at the same time in different stages. On one device there is one lane.
"""

import time
from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Ids

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serving.engines.answers import TextEngine, choose_tokens
from serving.engines.bodies import hidden_size_of
from serving.engines.pass_plans import Lane, Sequence
from serving.engines.passes import ModelRunner
from serving.engines.prefix_sharing import PrefixCache
from serving.engines.rereads import StateRereader, StepRereads
from serving.engines.stage_reports import StageReport
from serving.engines.state_tap import StateTap
from serving.request import FOREVER, CostEstimator, Limits, Plan, Record, StepResult


class ContinuousEngine(TextEngine):
    """Takes any plan.

    Args:
        model: a ChatGLM, or transformers' GlmForCausalLM or Glm4ForCausalLM, on one device; with or
            without adapters and P-Tuning prefixes.
        cost: for policies; the engine does not read it.
        stop_ids: what ends an answer; None for those of its generation_config.
        prefix_cache_tokens: prompts that begin alike share what is computed of them, and so many
            tokens of common prefixes are kept beside the arena; 0 turns both off. Without effect on
            ChatGLM-6B, and where a tap weighs prompts by entropy.
        runner: what computes its passes; None for the model in this process.
        rereader: predicts the length of an answer anew from its hidden states, at the end of its
            prompt and every `rereader.every` tokens (StepResult.reread); None for never.
        tap: where the hidden states go of an engine without a rereader.
        timer: seconds, by which a step's time and budget are counted.
    Raises:
        ValueError: not such a model; or it is not the rereader's or the tap's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits,
        cost: CostEstimator,
        stop_ids: Ids[int] | None = None,
        prefix_cache_tokens: int = 0,
        runner: ModelRunner | None = None,
        rereader: StateRereader | None = None,
        tap: StateTap | None = None,
        timer: Callable[[], float] = time.perf_counter,
    ):
        self.runner = runner or ModelRunner(model.eval(), limits.kv_tokens)
        self.prefixes: PrefixCache | None = None
        if prefix_cache_tokens and self.runner.body.axes == 1:
            memory = self.runner.arena.memory
            self.prefixes = PrefixCache(memory, prefix_cache_tokens, self.runner.virtual)
        super().__init__(self.runner.model, limits, cost, stop_ids)
        self.adapters = self.runner.adapters
        self.timer = timer
        self.rows: dict[int, Sequence] = {}
        # Lanes whose passes are computed now, the first submitted first.
        self._in_flight: deque[Lane] = deque()
        self._together = False
        # Ended rows of a static batch, which are reported when the whole batch has ended.
        self._unreported: dict[int, Sequence] = {}
        self.rereads: StepRereads | None = None
        if rereader is not None:
            self.rereads = StepRereads(rereader, hidden_size_of(self.model))
            tap = self.rereads.tap
        if tap is not None:
            self.runner.attach(tap)
            if tap.entropy:
                self.prefixes = None  # of a token that is copied the entropy is not known
            elif self.prefixes is not None:
                tap.mark_every = self.prefixes.copy_in_units()

    def copied_tokens(self) -> int:
        return 0 if self.prefixes is None else self.prefixes.copied_tokens

    def computed(self, record: Record) -> int:
        return self.rows[record.request.id].computed

    def check_prompt(self, prompt: list[int]):
        super().check_prompt(prompt)
        self.runner.body.positions(prompt)

    @torch.inference_mode()
    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step."""
        begin = self.timer()
        started: list[tuple[int, float]] = []
        ended: list[Sequence] = []
        emitted = self._apply_plan(plan, begin, started)
        prefill_tokens = plan.prefill_tokens or self.limits.prefill_tokens
        steps = 0
        last_step = plan.horizon_steps or FOREVER
        while True:
            ended += self._remove_ended()
            overran = self._overrun_ids()
            if ended or overran or not self.rows:
                break
            if (steps or emitted) and self.timer() - begin >= budget_s:
                break
            if self._woken and plan.wake_on_arrival and steps:
                break
            self._submit_passes(prefill_tokens, last_step)
            if not self._in_flight:
                break
            emitted += self._collect_pass(begin, started)
            steps += 1
        if plan.wake_on_arrival:
            self._woken = False
        reread = () if self.rereads is None else self.rereads.read(self.rows)
        elapsed_s = self.timer() - begin
        finished = tuple(self.take_finished(row.answer) for row in ended)
        return StepResult(elapsed_s, emitted, tuple(started), finished, tuple(overran), reread)

    def _overrun_ids(self) -> list[int]:
        """Ids of the decoding rows whose answers fill what is reserved for them."""
        ids = []
        for row in self.rows.values():
            if is_in_flight(row):
                continue
            is_decoding = not row.uncomputed and row.answer.reason is None
            if is_decoding and row.is_full:
                ids.append(row.id)
        return ids

    def _apply_plan(self, plan: Plan, begin: float, started: list[tuple[int, float]]) -> int:
        """Preempt, reserve, admit; prefill a static batch at once. Returns tokens made.

        A sequence that is in a pass in flight is changed after it. One that is preempted gets no
        token of that pass: the plan was made without it.
        """
        emitted = 0
        preempted = {record.request.id for record in plan.preempt}
        for request_id in (*preempted, *plan.reserve_tokens):
            row = self.rows.get(request_id)
            while row is not None and is_in_flight(row):
                emitted += self._collect_pass(begin, started, preempted)
        for record in plan.preempt:
            if self._unreported.pop(record.request.id, None) is None:
                self._remove(self.rows[record.request.id])
        for request_id, tokens in plan.reserve_tokens.items():
            if (row := self.rows.get(request_id)) is not None:
                row.reserve = tokens
                if row.slab is not None and row.lane is not None:
                    row.lane.arena.reserve(row, tokens + self.runner.virtual)
        longest = plan.longest_context_tokens
        for record in plan.admit:
            self._admit(record, plan, longest)
        if plan.together and plan.admit:
            self._together = True
            while any(lane.prefills for lane in self.runner.lanes):
                self._submit_passes(self.limits.prefill_tokens, decode=False)
                emitted += self._collect_pass(begin, started)
        for lane in self.runner.lanes:
            lane.steps = int(lane.in_flight is not None)
        return emitted

    def _admit(self, record: Record, plan: Plan, longest: int):
        """Make the sequence of a record; `longest` context of the plan's records, in tokens."""
        answer = self.answer_of(record)
        positions = self.runner.body.positions(answer.prompt)
        row = Sequence(
            answer,
            record,
            base=longest if plan.together else record.context_tokens,
            reserve=plan.reserve_tokens[record.request.id],
            most=self.limits.max_answer_tokens(
                record.request, plan.stop_tokens if plan.together else None
            ),
            positions=positions,
            context=self.runner.body.context(positions),
        )
        self.rows[row.id] = row
        if answer.reason is None:
            self.runner.admit(row)

    def _submit_passes(
        self, prefill_tokens: int, last_step: float = FOREVER, decode: bool = True
    ) -> None:
        """Begin the next pass of each lane that has none in flight and has work.

        Args:
            prefill_tokens: prompt tokens of a pass at most.
            last_step: passes of a lane in this step at most.
        """
        for lane in self.runner.lanes:
            if lane.in_flight is not None or lane.steps >= last_step:
                continue
            slabs = []
            if decode:
                slabs = [slab for slab in lane.arena.slabs.values() if slab.decoding]
            chunks = self._next_chunks(lane, prefill_tokens)
            if not slabs and not chunks:
                continue
            lane.in_flight = self.runner.plan(lane, slabs, chunks)
            self.runner.submit(lane.in_flight)
            self._in_flight.append(lane)
            lane.steps += 1

    def _collect_pass(
        self, begin: float, started: list[tuple[int, float]], preempted: Collection[int] = ()
    ) -> int:
        """Wait for the first pass in flight and add its tokens; returns tokens made.

        Args:
            preempted: ids of sequences that get none.
        """
        lane = self._in_flight.popleft()
        planned = lane.in_flight
        assert planned is not None  # a lane in flight has a pass
        logits = self.runner.collect(planned)
        lane.in_flight = None
        prefilled = self._start_prefilled(lane)
        if logits is None:
            return 0
        rows = planned.decoding + prefilled
        for place in reversed(range(len(rows))):
            if rows[place].id in preempted:
                del rows[place]
                logits = torch.cat([logits[:place], logits[place + 1 :]])
        emitted = self._add_tokens(rows, logits) if rows else 0
        now = self.timer() - begin
        for row in prefilled:
            if row.new_tokens > 0:
                started.append((row.id, now))
        return emitted

    def _next_chunks(self, lane: Lane, prefill_tokens: int) -> list[tuple[Sequence, int]]:
        """(sequence, its next so many prompt tokens), in order of admission.

        At most `prefill_tokens` together, but for a ChatGLM-6B context: it is one piece, and comes
        alone where it is longer.
        """
        chunks: list[tuple[Sequence, int]] = []
        for row in lane.prefills:
            if prefill_tokens > 0 and self._waits_for_prefix(row, chunks):
                break
            count = min(prefill_tokens, row.uncomputed)
            if row.computed < row.context:
                whole = row.context - row.computed
                if count < whole and chunks:
                    break  # it is the first of a later pass
                count = max(count, whole)
            if count <= 0:
                break
            chunks.append((row, count))
            prefill_tokens -= count
        return chunks

    def _waits_for_prefix(self, row: Sequence, chunks: list[tuple[Sequence, int]]) -> bool:
        """Copy what others have computed of its prompt; whether these chunks will give more."""
        if self.prefixes is None or row.computed:
            return False
        return self.prefixes.share(row, self.rows.values(), chunks)

    def _start_prefilled(self, lane: Lane) -> list[Sequence]:
        """Move the sequences whose prompts are complete to decoding; returns them."""
        prefilled = []
        while lane.prefills and not lane.prefills[0].uncomputed:
            row = lane.prefills.popleft()
            lane.arena.start_decoding(row)
            prefilled.append(row)
        return prefilled

    def _add_tokens(self, rows: list[Sequence], logits: Tensor) -> int:
        """Choose each row's next token from logits (at least len(rows), V); returns tokens made."""
        emitted = 0
        for row, token in zip(rows, choose_tokens(logits, [row.answer for row in rows])):
            row.is_finite = token is not None
            if token is None:
                row.answer.add(None, "failed")
            else:
                emitted += row.answer.reason is None
                self.add_token(row.answer, token, row.max_answer)
        return emitted

    def _remove_ended(self) -> list[Sequence]:
        """Drop rows whose answers have ended; returns those to report now, in order of id."""
        ended = []
        for row in self.rows.values():
            if row.answer.reason is not None and not is_in_flight(row):
                ended.append(row)
        for row in ended:
            self._remove(row)
        if not self._together:
            return sorted(ended, key=lambda row: row.id)
        for row in ended:
            self._unreported[row.id] = row
        if self.rows:
            return []
        ended = sorted(self._unreported.values(), key=lambda row: row.id)
        self._unreported = {}
        self._together = False
        return ended

    def _remove(self, row: Sequence):
        del self.rows[row.id]
        if row.lane is None or row.slab is None:
            return
        if row in row.lane.prefills:
            row.lane.prefills.remove(row)
        if self.prefixes is not None:
            self.prefixes.keep(row)
        row.lane.arena.release(row, zero=row.answer.reason == "failed")

    def stage_reports(self) -> list[StageReport]:
        """What each stage holds and has computed; one entry where the model is in this process."""
        return self.runner.reports()

    def close(self) -> None:
        """End the processes of other stages, if there are any; the engine cannot run then."""
        self.runner.close()


def is_in_flight(row: Sequence) -> bool:
    """Whether the row's lane is in a pass that is being computed."""
    return row.slab is not None and row.lane is not None and row.lane.in_flight is not None
