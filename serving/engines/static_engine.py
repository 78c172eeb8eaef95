"""The static engine: transformers' generate, a batch at once. The baseline, and the way to models spread over several devices.

generate() runs in a thread of its own and stops after each token for the engine's word: so a step can end at a reservation, a
budget or a horizon and the next one goes on, rows can leave early (finished, preempted, cancelled) while the others' padding stays,
and requests end and sample each in their own way.
"""

import queue
import threading
import time

import torch
from transformers import LogitsProcessor, StoppingCriteria

from serving.engines.answers import Answer, TextEngine, choose
from serving.request import FOREVER, CostModel, Limits, Plan, StepResult

NOWHERE = (
    1 << 30
)  # an id that no vocabulary has: told none, generate would take the model's own stop ids


class Row:
    """A sequence of the batch; `out`: it makes no more tokens."""

    def __init__(self, answer: Answer, reserve: int, base: int, most: int):
        self.id, self.answer, self.reserve, self.base, self.most = (
            answer.id,
            answer,
            reserve,
            base,
            most,
        )
        self.kept = len(answer.tokens)
        self.out = False

    @property
    def full(self) -> bool:
        return self.base + len(self.answer.tokens) - self.kept >= self.reserve


class Generation:
    """generate() on a batch, one token at a time: next() makes one for each row that is not out."""

    def __init__(self, engine: "StaticEngine", rows: list[Row]):
        self._engine, self._rows = engine, rows
        self._go: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[BaseException | bool] = (
            queue.SimpleQueue()
        )  # True: a token each; False: it has ended
        threading.Thread(target=self._run, daemon=True, name="generate").start()

    def next(self) -> bool:
        """False when generate has returned. Raises what it raised."""
        self._go.put(True)
        result = self._made.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def end(self):
        """Let the thread go."""
        self._go.put(False)

    def _run(self):
        engine, rows = self._engine, self._rows
        try:
            if not self._go.get():
                return
            texts = [row.answer.prompt + row.answer.tokens for row in rows]
            longest = max(map(len, texts))
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, text in enumerate(texts):
                ids[i, longest - len(text) :] = torch.tensor(text)
                mask[i, longest - len(text) :] = 1
            device = engine.model.get_input_embeddings().weight.device
            with torch.inference_mode():
                engine.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    do_sample=False,
                    top_p=None,
                    top_k=None,
                    temperature=None,
                    max_new_tokens=engine.limits.max_tokens,
                    eos_token_id=[NOWHERE],
                    pad_token_id=0,  # ends are Control's alone
                    logits_processor=[Chooser(rows)],
                    stopping_criteria=[Control(self._pause)],
                )
            self._made.put(False)
        except BaseException as error:  # the engine's thread raises it
            self._made.put(error)

    def _pause(self, tokens: list[int]) -> list[bool]:
        """Tokens of all rows in; which rows are out, once the engine wants the next."""
        for row, token in zip(self._rows, tokens):
            if row.out or row.answer.reason is not None:
                continue
            self._engine.give(row.answer, token, row.most)
        self._made.put(True)
        if not self._go.get():
            return [True] * len(self._rows)
        return [row.out for row in self._rows]


class Control(StoppingCriteria):
    def __init__(self, pause):
        self._pause = pause

    def __call__(self, input_ids, scores, **_):
        return torch.tensor(self._pause(input_ids[:, -1].tolist()), device=input_ids.device)


class Chooser(LogitsProcessor):
    """Puts each sampled row's own choice before greedy search; scores (B, V) are greedy rows' as they were."""

    def __init__(self, rows: list[Row]):
        self._rows = rows

    def __call__(self, input_ids, scores):
        for i, row in enumerate(self._rows):
            if row.out:
                continue
            if row.answer.sampling.plain:
                token = 0 if bool(scores[i].max().isfinite()) else None
            else:
                (token,) = choose(scores[i : i + 1], [row.answer])
                if token is not None:
                    scores[i] = -torch.inf
                    scores[i, token] = 0
            if token is None:
                row.answer.add(None, "failed")
        return scores


class StaticEngine(TextEngine):
    """Takes plans of batches that start together.

    Args:
        model: with generate(), on any devices (load_model(..., device_map=...) spreads it by accelerate).
        cost: what policies are told; nothing here reads it.
        stop_ids: what ends an answer; None for the model's own (chatglm.loading sets them).
    """

    def __init__(self, model, limits: Limits, cost: CostModel, stop_ids=None):
        super().__init__(model.eval(), limits, cost, stop_ids)
        self.rows: dict[int, Row] = {}
        self._generation: Generation | None = None

    def check_prompt(self, prompt: list[int]):
        super().check_prompt(prompt)
        body = getattr(self.model, "transformer", None)
        if hasattr(body, "count_positions"):  # ChatGLM-6B says what its prompt lacks
            body.count_positions(torch.tensor([prompt]))

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step.

        Raises:
            RuntimeError: the plan admits to a batch that runs, or not as a batch.
        """
        try:
            return self._step(plan, budget_s)
        except BaseException:
            self._end()  # its thread would wait for ever
            raise

    def end_all(self, reason: str = "cancelled"):
        super().end_all(reason)
        self._end()

    def _step(self, plan: Plan, budget_s: float) -> StepResult:
        begin = time.perf_counter()
        self._carry_out(plan)
        started: list[tuple[int, float]] = []
        overran: list[int] = []
        emitted = made = 0
        last = (
            plan.horizon_steps + bool(plan.admit) if plan.horizon_steps else FOREVER
        )  # a prefill's tokens are no decode step's
        while True:
            for row in self.rows.values():
                row.out = row.out or row.answer.reason is not None
            going = [row for row in self.rows.values() if not row.out]
            overran = [row.id for row in going if row.full]
            if not going or overran or made >= last:
                break
            if made and (
                time.perf_counter() - begin >= budget_s or (self._woken and plan.wake_on_arrival)
            ):
                break
            before = [len(row.answer.tokens) for row in going]
            if not self._generation.next():
                raise RuntimeError(
                    "generate ended before its rows did"
                )  # max_new_tokens is more than any row may have
            now = time.perf_counter() - begin
            fresh = [row for row, n in zip(going, before) if len(row.answer.tokens) > n]
            started += [(row.id, now) for row in fresh if len(row.answer.tokens) == row.kept + 1]
            emitted += len(fresh)
            made += 1
        finished = []
        if not going:
            finished = [
                self.finished(row.answer)
                for row in sorted(self.rows.values(), key=lambda row: row.id)
            ]
            self.rows = {}
            self._end()
        if plan.wake_on_arrival:
            self._woken = False
        return StepResult(
            time.perf_counter() - begin, emitted, tuple(started), tuple(finished), tuple(overran)
        )

    def _carry_out(self, plan: Plan):
        for record in plan.preempt:
            self.rows.pop(record.request.id).out = True
        for request_id, tokens in plan.reserve_tokens.items():
            if (row := self.rows.get(request_id)) is not None:
                row.reserve = tokens
        if not plan.admit:
            return
        if self.rows or not plan.together:
            raise RuntimeError(
                "the static engine admits whole batches, when it is empty: take a static policy, or --engine continuous"
            )
        self._end()
        longest = max(record.context_tokens for record in plan.admit)
        for record in plan.admit:
            most = self.limits.most_tokens(record.request, plan.stop_tokens)
            row = Row(self.answer_of(record), plan.reserve_tokens[record.request.id], longest, most)
            self.rows[row.id] = row
        waiting = [row for row in self.rows.values() if row.answer.reason is None]
        if waiting:
            self._generation = Generation(self, waiting)

    def _end(self):
        if self._generation is not None:
            self._generation.end()
            self._generation = None
