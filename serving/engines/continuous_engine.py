"""The continuous engine: iteration-level batching over a KV arena in length classes.

Iteration-level batching is that of Orca (OSDI 2022); the engine runs ChatGLM and GLM.

One iteration is one forward pass: the last token of every decoding sequence, and up to
prefill_tokens prompt tokens, in order of admission. A sequence whose prompt is complete makes its
first token in that pass. These are the iterations that the simulated engine counts. The two differ
in this: here a static batch is not padded and its ended rows are not computed (they only wait for
the others), and a ChatGLM-6B context is computed in one piece, whatever prefill_tokens says.
"""

import time
from collections import deque
from collections.abc import Sequence as Ids

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serving.engines.answers import TextEngine, choose_tokens
from serving.engines.passes import ModelRunner, Sequence
from serving.engines.prefix_sharing import PrefixCache
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
            ChatGLM-6B.
    Raises:
        ValueError: not such a model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits,
        cost: CostEstimator,
        stop_ids: Ids[int] | None = None,
        prefix_cache_tokens: int = 0,
    ):
        self.runner = ModelRunner(model.eval(), limits.kv_tokens)
        self.prefixes: PrefixCache | None = None
        if prefix_cache_tokens and self.runner.body.axes == 1:
            self.prefixes = PrefixCache(prefix_cache_tokens, self.runner.virtual)
        super().__init__(self.runner.model, limits, cost, stop_ids)
        self.adapters = self.runner.adapters
        self.rows: dict[int, Sequence] = {}
        self._prefills: deque[Sequence] = deque()
        self._together = False
        # Ended rows of a static batch, which are reported when the whole batch has ended.
        self._unreported: dict[int, Sequence] = {}

    def copied_tokens(self) -> int:
        return 0 if self.prefixes is None else self.prefixes.copied_tokens

    def check_prompt(self, prompt: list[int]):
        super().check_prompt(prompt)
        self.runner.body.positions(prompt)

    @torch.inference_mode()
    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step."""
        begin = time.perf_counter()
        started: list[tuple[int, float]] = []
        ended: list[Sequence] = []
        emitted = self._apply_plan(plan, begin, started)
        prefill_tokens = plan.prefill_tokens or self.limits.prefill_tokens
        steps = 0
        last_step = plan.horizon_steps or FOREVER
        while True:
            ended += self._remove_ended()
            overran = self._overrun_ids()
            if ended or overran or not self.rows or steps >= last_step:
                break
            if (steps or emitted) and time.perf_counter() - begin >= budget_s:
                break
            if self._woken and plan.wake_on_arrival and steps:
                break
            emitted += self._iterate(prefill_tokens, begin, started)
            steps += 1
        if plan.wake_on_arrival:
            self._woken = False
        elapsed_s = time.perf_counter() - begin
        finished = tuple(self.take_finished(row.answer) for row in ended)
        return StepResult(elapsed_s, emitted, tuple(started), finished, tuple(overran))

    def _overrun_ids(self) -> list[int]:
        """Ids of the decoding rows whose answers fill what is reserved for them."""
        ids = []
        for row in self.rows.values():
            is_decoding = not row.uncomputed and row.answer.reason is None
            if is_decoding and row.is_full:
                ids.append(row.id)
        return ids

    def _apply_plan(self, plan: Plan, begin: float, started: list[tuple[int, float]]) -> int:
        """Preempt, reserve, admit; prefill a static batch at once. Returns first tokens made."""
        for record in plan.preempt:
            if self._unreported.pop(record.request.id, None) is None:
                self._remove(self.rows[record.request.id])
        for request_id, tokens in plan.reserve_tokens.items():
            if (row := self.rows.get(request_id)) is not None:
                row.reserve = tokens
                if row.slab is not None:
                    self.runner.arena.reserve(row, tokens + self.runner.virtual)
        longest = plan.longest_context_tokens
        for record in plan.admit:
            self._admit(record, plan, longest)
        emitted = 0
        if plan.together and plan.admit:
            self._together = True
            while self._prefills:
                emitted += self._iterate(self.limits.prefill_tokens, begin, started, decode=False)
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
            self._prefills.append(row)

    def _iterate(
        self,
        prefill_tokens: int,
        begin: float,
        started: list[tuple[int, float]],
        decode: bool = True,
    ) -> int:
        """One forward pass with at most `prefill_tokens` prompt tokens; returns tokens made."""
        slabs = []
        if decode:
            slabs = [slab for slab in self.runner.arena.slabs.values() if slab.decoding]
        decoding: list[Sequence] = []
        for slab in slabs:
            decoding += slab.rows[: slab.decoding]
        chunks = self._next_chunks(prefill_tokens)
        if not decoding and not chunks:
            return 0
        logits = self.runner.run(slabs, chunks)
        prefilled = self._start_prefilled()
        if logits is None:
            return 0
        emitted = self._add_tokens(decoding + prefilled, logits)
        now = time.perf_counter() - begin
        for row in prefilled:
            if row.new_tokens > 0:
                started.append((row.id, now))
        return emitted

    def _next_chunks(self, prefill_tokens: int) -> list[tuple[Sequence, int]]:
        """(sequence, its next so many prompt tokens), in order of admission.

        At most `prefill_tokens` together, but for a ChatGLM-6B context: it is one piece, and comes
        alone where it is longer.
        """
        chunks: list[tuple[Sequence, int]] = []
        for row in self._prefills:
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

    def _start_prefilled(self) -> list[Sequence]:
        """Move the sequences whose prompts are complete to decoding; returns them."""
        prefilled = []
        while self._prefills and not self._prefills[0].uncomputed:
            row = self._prefills.popleft()
            self.runner.arena.start_decoding(row)
            prefilled.append(row)
        return prefilled

    def _add_tokens(self, rows: list[Sequence], logits: Tensor) -> int:
        """Choose each row's next token from logits (at least len(rows), V); returns tokens made."""
        emitted = 0
        for row, token in zip(rows, choose_tokens(logits, [row.answer for row in rows])):
            if token is None:
                row.answer.add(None, "failed")
            else:
                emitted += row.answer.reason is None
                self.add_token(row.answer, token, row.max_answer)
        return emitted

    def _remove_ended(self) -> list[Sequence]:
        """Drop rows whose answers have ended; returns those to report now, in order of id."""
        ended = [row for row in self.rows.values() if row.answer.reason is not None]
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
        if row in self._prefills:
            self._prefills.remove(row)
        if self.prefixes is not None:
            self.prefixes.keep(row)
        if row.slab is not None:
            self.runner.arena.release(row, zero=row.answer.reason == "failed")
