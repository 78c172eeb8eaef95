"""The static engine: transformers' generate, a batch at once.

It is the baseline, and runs models that are spread over several devices.

generate() runs in a separate thread and pauses after each token until the engine asks for the next
one. So a step can end at a reservation, a budget or a horizon and the next step resumes; rows can
leave early (finished, preempted, cancelled) while the padding of the others stays; and each request
has its own sampling and its own end.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from serving.engines.adapters import AdapterSet
from serving.engines.answers import AdmittedAnswer, Answer, TextEngine, choose_tokens, read_prompt
from serving.request import FOREVER, CostEstimator, Limits, Plan, StepResult

# A stop id outside every vocabulary. Without a stop id, generate takes the model's own.
UNUSED_STOP_ID = 1 << 30


class StaticSequence(AdmittedAnswer):
    """A sequence of the batch.

    Attributes:
        inactive: no more tokens are generated for it.
    """

    inactive = False


class BatchGeneration:
    """generate() on a batch, one token at a time: next() makes one for each active row."""

    def __init__(self, engine: "StaticEngine", rows: list[StaticSequence]):
        self._engine = engine
        self._rows = rows
        self._resume: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # True: every active row has a new token; False: generate has returned.
        self._results: queue.SimpleQueue[BaseException | bool] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="generate").start()

    def next(self) -> bool:
        """False when generate has returned. Raises what it raised."""
        self._resume.put(True)
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def end(self) -> None:
        """End the thread."""
        self._resume.put(False)

    def _run(self) -> None:
        try:
            if not self._resume.get():
                return
            self._generate()
            self._results.put(False)
        except BaseException as error:  # the engine's thread raises it
            self._results.put(error)

    def _generate(self) -> None:
        engine = self._engine
        ids, mask = pad_left([row.answer.prompt + row.answer.tokens for row in self._rows])
        model: Any = engine.model  # PreTrainedModel does not declare generate()
        device = model.get_input_embeddings().weight.device
        adapters = [row.answer.adapter for row in self._rows]
        with torch.inference_mode(), engine.adapters.applied_to_rows(adapters):
            model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                top_p=None,
                top_k=None,
                temperature=None,
                max_new_tokens=engine.limits.max_tokens,
                eos_token_id=[UNUSED_STOP_ID],  # only PauseAfterToken ends a row
                pad_token_id=0,
                logits_processor=[SampledTokens(self._rows)],
                stopping_criteria=[PauseAfterToken(self._pause)],
            )

    def _pause(self, tokens: list[int]) -> list[bool]:
        """Add the newest token of each row, wait for next(); returns which rows are inactive."""
        for row, token in zip(self._rows, tokens):
            if row.inactive or row.answer.reason is not None:
                continue
            self._engine.add_token(row.answer, token, row.max_answer)
        self._results.put(True)
        if not self._resume.get():
            return [True] * len(self._rows)
        return [row.inactive for row in self._rows]


def pad_left(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, longest), int64; padding is 0 in both."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, longest - len(text) :] = torch.tensor(text)
        mask[i, longest - len(text) :] = 1
    return ids, mask


class PauseAfterToken(StoppingCriteria):
    """Calls `pause` with the newest token of each row; stops the rows for which it returns true."""

    def __init__(self, pause: Callable[[list[int]], list[bool]]):
        self._pause = pause

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(self._pause(input_ids[:, -1].tolist()), device=input_ids.device)


class SampledTokens(LogitsProcessor):
    """Makes greedy search take the sampled token of each row.

    Scores (B, V) of rows that take the likeliest token stay as they are.
    """

    def __init__(self, rows: list[StaticSequence]):
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for i, row in enumerate(self._rows):
            if row.inactive:
                continue
            sampling = row.answer.sampling
            if sampling.is_plain and sampling.logprobs is None:
                failed = not bool(scores[i].max().isfinite())
            else:
                failed = not self._force_sampled(scores, i, row.answer)
            if failed:
                row.answer.add(None, "failed")
        return scores

    @staticmethod
    def _force_sampled(scores: Tensor, i: int, answer: Answer) -> bool:
        """Sample row i and make that token its likeliest; False where sampling failed."""
        (token,) = choose_tokens(scores[i : i + 1], [answer])
        if token is None:
            return False
        scores[i] = -torch.inf
        scores[i, token] = 0
        return True


class StaticEngine(TextEngine):
    """Takes plans of batches that start together.

    Args:
        model: has generate(); on any devices (load_model(..., device_map=...) spreads it with
            accelerate).
        cost: for policies; the engine does not read it.
        stop_ids: what ends an answer; None for the model's own (chatglm.loading sets them).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits,
        cost: CostEstimator,
        stop_ids: Sequence[int] | None = None,
    ):
        super().__init__(model.eval(), limits, cost, stop_ids)
        self.adapters: AdapterSet = AdapterSet(model)
        self.rows: dict[int, StaticSequence] = {}
        self._generation: BatchGeneration | None = None

    def check_prompt(self, prompt: list[int]) -> None:
        super().check_prompt(prompt)
        body = getattr(self.model, "transformer", None)
        count_positions = getattr(body, "count_positions", None)
        if count_positions is not None:  # ChatGLM-6B: raises where [gMASK] or <sop> is missing
            count_positions(torch.tensor([prompt]))

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step.

        Raises:
            RuntimeError: the plan admits to a running batch, or does not admit a batch.
        """
        try:
            return self._step(plan, budget_s)
        except BaseException:
            self._end()  # otherwise its thread waits forever
            raise

    def end_all(self, reason: str = "cancelled") -> None:
        super().end_all(reason)
        self._end()

    def _step(self, plan: Plan, budget_s: float) -> StepResult:
        begin = time.perf_counter()
        self._apply_plan(plan)
        started: list[tuple[int, float]] = []
        emitted = iterations = 0
        last = FOREVER
        if plan.horizon_steps:
            last = plan.horizon_steps + bool(plan.admit)  # a prefill is no decode step
        while True:
            active_rows = self._active_rows()
            overran = [row.id for row in active_rows if row.is_full]
            if not active_rows or overran or iterations >= last:
                break
            if iterations and time.perf_counter() - begin >= budget_s:
                break
            if iterations and self._woken and plan.wake_on_arrival:
                break
            fresh = self._next_tokens(active_rows)
            now = time.perf_counter() - begin
            for row in fresh:
                if row.new_tokens == 1:
                    started.append((row.id, now))
            emitted += len(fresh)
            iterations += 1
        finished = [] if active_rows else self._finish_batch()
        if plan.wake_on_arrival:
            self._woken = False
        elapsed_s = time.perf_counter() - begin
        return StepResult(elapsed_s, emitted, tuple(started), tuple(finished), tuple(overran))

    def _active_rows(self) -> list[StaticSequence]:
        """Rows that make more tokens; those whose answers have ended become inactive."""
        for row in self.rows.values():
            row.inactive = row.inactive or row.answer.reason is not None
        return [row for row in self.rows.values() if not row.inactive]

    def _next_tokens(self, active_rows: list[StaticSequence]) -> list[StaticSequence]:
        """One token for each row; returns the rows that got it (not those that failed)."""
        before = [row.new_tokens for row in active_rows]
        assert self._generation is not None  # rows that make tokens have one
        if not self._generation.next():
            # max_new_tokens is more than any row may have
            raise RuntimeError("generate ended before its rows did")
        return [row for row, made in zip(active_rows, before) if row.new_tokens > made]

    def _finish_batch(self) -> list[tuple[int, int, bool]]:
        """End the batch; the lines of StepResult.finished, in order of id."""
        rows = sorted(self.rows.values(), key=lambda row: row.id)
        finished = [self.take_finished(row.answer) for row in rows]
        self.rows = {}
        self._end()
        return finished

    def _apply_plan(self, plan: Plan) -> None:
        """Preempt, reserve and admit, as the plan says."""
        for record in plan.preempt:
            self.rows.pop(record.request.id).inactive = True
        for request_id, tokens in plan.reserve_tokens.items():
            if (row := self.rows.get(request_id)) is not None:
                row.reserve = tokens
        if not plan.admit:
            return
        if self.rows or not plan.together:
            raise RuntimeError(
                "the static engine admits whole batches, when it is empty: "
                "take a static policy, or --engine continuous"
            )
        self._end()
        longest = plan.longest_context_tokens
        for record in plan.admit:
            most = self.limits.max_answer_tokens(record.request, plan.stop_tokens)
            row = StaticSequence(
                self.answer_of(record), longest, plan.reserve_tokens[record.request.id], most
            )
            self.rows[row.id] = row
        waiting = [row for row in self.rows.values() if row.answer.reason is None]
        for reader in waiting:
            if reader.answer.reads_prompt:
                self._read_prompt(reader.answer)
        if waiting:
            self._generation = BatchGeneration(self, waiting)

    @torch.inference_mode()
    def _read_prompt(self, answer: Answer) -> None:
        """A pass of its own: generate() gives no states of prompts."""
        # Any: transformers types a model's modules as Tensor | Module.
        model: Any = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        ids = torch.tensor([answer.prompt], device=model.get_input_embeddings().weight.device)
        with self.adapters.applied_to_rows([answer.adapter]):
            states = base.base_model(input_ids=ids).last_hidden_state[0]
        read_prompt(answer, states, 0, base.get_output_embeddings())

    def _end(self) -> None:
        """End the thread of the running batch, if there is one."""
        if self._generation is not None:
            self._generation.end()
            self._generation = None
