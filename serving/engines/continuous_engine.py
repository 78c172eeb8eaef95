"""The continuous engine: iteration-level batching (Orca, OSDI 2022) over a KV arena in length classes, for ChatGLM and GLM.

One iteration is one forward pass: every decoding sequence's last token and up to prefill_tokens prompt tokens, the longest-admitted
sequence's first; a sequence whose prompt is complete makes its first token in that pass. These are the iterations that the
simulated engine counts. Where this one differs: a static batch is not padded and its ended rows are not computed on (they only
wait for the others), and a ChatGLM-6B context is computed in one piece, whatever prefill_tokens says.
"""

import time
from collections import deque

import torch

from serving.engines.answers import TextEngine, choose
from serving.engines.passes import Runner, Sequence
from serving.request import FOREVER, CostModel, Limits, Plan, StepResult


class ContinuousEngine(TextEngine):
    """Takes any plan.

    Args:
        model: a ChatGLM, or transformers' GlmForCausalLM or Glm4ForCausalLM, on one device; adapters and P-Tuning prefixes included.
        cost: what policies are told; nothing here reads it.
        stop_ids: what ends an answer; None for those of its generation_config.
    Raises:
        ValueError: not such a model.
    """

    def __init__(self, model, limits: Limits, cost: CostModel, stop_ids=None):
        self.runner = Runner(model.eval(), limits.kv_tokens)
        super().__init__(self.runner.model, limits, cost, stop_ids)
        self.rows: dict[int, Sequence] = {}
        self._prefills: deque[Sequence] = deque()
        self._together = False
        self._held: dict[int, Sequence] = {}  # ended rows of a static batch, waiting for its others

    def check_prompt(self, prompt: list[int]):
        super().check_prompt(prompt)
        self.runner.body.positions(prompt)

    @torch.inference_mode()
    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        begin = time.perf_counter()
        started: list[tuple[int, float]] = []
        ended: list[Sequence] = []
        emitted = self._carry_out(plan, begin, started)
        chunk = plan.prefill_tokens or self.limits.prefill_tokens
        steps, last_step = 0, plan.horizon_steps or FOREVER
        while True:
            ended += self._take_ended()
            overran = [
                row.id
                for row in self.rows.values()
                if row.full and not row.left and row.answer.reason is None
            ]
            if ended or overran or not self.rows or steps >= last_step:
                break
            if (steps or emitted) and time.perf_counter() - begin >= budget_s:
                break
            if self._woken and plan.wake_on_arrival and steps:
                break
            emitted += self._iterate(chunk, begin, started)
            steps += 1
        if plan.wake_on_arrival:
            self._woken = False
        return StepResult(
            time.perf_counter() - begin,
            emitted,
            tuple(started),
            tuple(self.finished(row.answer) for row in ended),
            tuple(overran),
        )

    def _carry_out(self, plan: Plan, begin: float, started: list) -> int:
        """Preempt, reserve, admit; a static batch's prompts at once. Returns the first tokens that this made."""
        for record in plan.preempt:
            if self._held.pop(record.request.id, None) is None:
                self._drop(self.rows[record.request.id])
        for request_id, tokens in plan.reserve_tokens.items():
            if (row := self.rows.get(request_id)) is not None:
                row.reserve = tokens
                if row.slab is not None:
                    self.runner.arena.reserve(row, tokens + self.runner.virtual)
        longest = max((record.context_tokens for record in plan.admit), default=0)
        for record in plan.admit:
            answer = self.answer_of(record)
            positions = self.runner.body.positions(answer.prompt)
            row = Sequence(
                answer,
                record,
                longest if plan.together else record.context_tokens,
                plan.reserve_tokens[record.request.id],
                self.limits.most_tokens(
                    record.request, plan.stop_tokens if plan.together else None
                ),
                positions,
                self.runner.body.context(positions),
            )
            self.rows[row.id] = row
            if answer.reason is None:
                self.runner.admit(row)
                self._prefills.append(row)
        emitted = 0
        if plan.together and plan.admit:
            self._together = True
            while self._prefills:
                emitted += self._iterate(self.limits.prefill_tokens, begin, started, decode=False)
        return emitted

    def _iterate(self, left: int, begin: float, started: list, decode: bool = True) -> int:
        """One forward pass with at most `left` prompt tokens; the number of tokens made."""
        slabs = (
            [slab for slab in self.runner.arena.slabs.values() if slab.decoding] if decode else []
        )
        rows = [row for slab in slabs for row in slab.rows[: slab.decoding]]
        chunks: list[tuple[Sequence, int]] = []
        for row in self._prefills:
            take = min(left, row.left)
            if row.computed < row.context:
                whole = row.context - row.computed
                if take < whole and chunks:
                    break  # next time, as the first
                take = max(take, whole)
            if take <= 0:
                break
            chunks.append((row, take))
            left -= take
        if not rows and not chunks:
            return 0
        logits = self.runner.run(slabs, chunks)
        first = []
        while self._prefills and not self._prefills[0].left:
            row = self._prefills.popleft()
            self.runner.arena.join(row)
            first.append(row)
        if logits is None:
            return 0
        made, emitted = rows + first, 0
        for row, token in zip(made, choose(logits, [row.answer for row in made])):
            if token is None:
                row.answer.add(None, "failed")
            else:
                emitted += row.answer.reason is None
                self.give(row.answer, token, row.most)
        now = time.perf_counter() - begin
        started += [(row.id, now) for row in first if len(row.answer.tokens) > row.kept]
        return emitted

    def _take_ended(self) -> list[Sequence]:
        """Rows whose answers have ended leave the arena; those that may be reported, in order of id."""
        ended = [row for row in self.rows.values() if row.answer.reason is not None]
        for row in ended:
            self._drop(row)
        if not self._together:
            return sorted(ended, key=lambda row: row.id)
        self._held |= {row.id: row for row in ended}
        if self.rows:
            return []
        ended = [self._held[i] for i in sorted(self._held)]
        self._together, self._held = False, {}
        return ended

    def _drop(self, row: Sequence):
        del self.rows[row.id]
        if row in self._prefills:
            self._prefills.remove(row)
        if row.slab is not None:
            self.runner.arena.release(row, wipe=row.answer.reason == "failed")
