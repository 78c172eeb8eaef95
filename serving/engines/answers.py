"""The text side of an engine: prompts in, tokens out as they are made, per-request ends and sampling. Free of torch at import."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from serving.request import CostModel, Limits, Record, Request

log = logging.getLogger(__name__)

COLDEST = 1e-5  # a temperature below takes the likeliest token; fp32 has no room for much less
NUCLEUS = 256  # top-p looks among so many likeliest tokens before it sorts a whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """How one answer is made.

    Attributes:
        max_new_tokens: it ends there, by its own wish; None leaves that to the engine's limits.
        temperature: 0, or less than COLDEST, takes the likeliest token.
        top_p: sample among the likeliest tokens that have this much probability together.
        seed: of its own generator; None draws one.
        ignore_stops: go on past stop ids (benchmarks).
        top_k: sample among so many likeliest tokens; 0 for all.
        min_p: leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: divides the logits of tokens in prompt or answer where they are above 0,
            else multiplies them (arXiv 1909.05858).
        presence_penalty, frequency_penalty: taken from the logits of the answer's tokens, once and
            for each time that they came.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_stops: bool = False
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        if not (self.top_k >= 0 and 0 <= self.min_p <= 1 and self.repetition_penalty > 0):
            wanted = "top_k >= 0, 0 <= min_p <= 1 and repetition_penalty > 0"
            raise ValueError(f"wanted {wanted}; got {self}")
        if not (
            self.temperature >= 0
            and 0 < self.top_p <= 1
            and (self.max_new_tokens is None or self.max_new_tokens >= 1)
        ):
            raise ValueError(
                f"wanted temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1; got {self}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def penalizes(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def plain(self) -> bool:
        """The likeliest token, of the model's logits as they are."""
        return self.greedy and not self.penalizes


class Answer:
    """One answer as it grows. The engine writes it, any thread may read it; iterating yields its tokens and ends with it.

    Attributes:
        tokens: ids so far, the stop id included where one came.
        reason: None while it grows; then "stop" (a stop id), "length" (max_new_tokens), "cut" (the engine's limits, or a plan's),
            "cancelled", "refused" or "failed" (the model's output was not finite, or sampling failed).
    """

    def __init__(
        self,
        id: int,
        prompt: list[int],
        sampling: Sampling,
        listener: Callable[["Answer", int | None], None] | None,
    ):
        self.id, self.prompt, self.sampling = id, prompt, sampling
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.generator = (
            None  # made when first needed, on the model's device; a preemption does not rewind it
        )
        self._listener = listener
        self._changed = threading.Condition()

    def add(self, token: int | None, reason: str | None = None) -> bool:
        """Append a token, or end with none; False, and nothing happens, where the answer has ended."""
        with self._changed:
            if self.reason is not None:
                return False
            if token is not None:
                self.tokens.append(token)
            self.reason = reason
            self._changed.notify_all()
        if self._listener is not None:
            try:
                self._listener(self, token)
            except Exception:  # one bad listener must not end everybody's answers
                log.exception("request %s: its listener failed; the answer is cancelled", self.id)
                self._listener = None
                self.add(None, "cancelled")
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended; False when that took longer than the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self.reason is not None, timeout_s)

    def __iter__(self) -> Iterator[int]:
        n = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda n=n: len(self.tokens) > n or self.reason is not None)
                fresh, ended = self.tokens[n:], self.reason is not None
            yield from fresh
            n += len(fresh)
            if ended:
                return


class TextEngine:
    """What both real engines do alike: who asked what, and when an answer ends.

    submit, wake, and what cancels or forgets may come from any thread; step and generated belong to the scheduler's.
    """

    def __init__(
        self, model, limits: Limits, cost: CostModel, stop_ids: Sequence[int] | None = None
    ):
        if stop_ids is None:
            stop_ids = model.generation_config.eos_token_id
            stop_ids = (
                [] if stop_ids is None else [stop_ids] if isinstance(stop_ids, int) else stop_ids
            )
        self.model, self.limits, self.cost = model, limits, cost
        self.stop_ids = frozenset(stop_ids)
        self._answers: dict[int, Answer] = {}
        self._woken = False
        self._lock = threading.Lock()

    def submit(
        self,
        request: Request,
        prompt_ids: Sequence[int],
        sampling: Sampling | None = None,
        listener: Callable[[Answer, int | None], None] | None = None,
    ) -> Answer:
        """Make a request's text known, before the scheduler hears of the request.

        Args:
            listener: called with (answer, token) in the engine's thread for each token, its last one with answer.reason set; with
                None for a token where it ends without one. It should return at once.
        Raises:
            ValueError: the prompt is not request.prompt_tokens long or not one of the model's; the id is in use.
        """
        prompt = list(prompt_ids)
        if len(prompt) != request.prompt_tokens or not prompt:
            raise ValueError(
                f"request {request.id} says {request.prompt_tokens} prompt tokens (at least 1), its prompt has {len(prompt)}"
            )
        self.check_prompt(prompt)
        answer = Answer(request.id, prompt, sampling or Sampling(), listener)
        with self._lock:
            if request.id in self._answers:
                raise ValueError(f"request {request.id} is being answered already")
            self._answers[request.id] = answer
        return answer

    def check_prompt(self, prompt: list[int]):
        """Raises ValueError where the model cannot read it."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(
                f"prompt ids must be from 0 to {vocabulary - 1}; got {min(prompt)} to {max(prompt)}"
            )

    def cancel(self, request_id: int):
        """End an answer now; its sequence leaves at the next iteration. One that waits leaves when it is admitted. Unknown ids: nothing."""
        if (answer := self._answers.get(request_id)) is not None:
            answer.add(None, "cancelled")
            self._woken = True

    def forget(self, request_id: int, reason: str = "refused"):
        """Drop a request that the scheduler refused, or never heard of."""
        with self._lock:
            answer = self._answers.pop(request_id, None)
        if answer is not None:
            answer.add(None, reason)

    def cancel_all(self) -> list[int]:
        """The ids of all that were known."""
        known = self._known()
        for request_id in known:
            self.cancel(request_id)
        return known

    def end_all(self, reason: str = "cancelled"):
        """End whatever is being answered, so that nobody waits for it, after step has raised."""
        for request_id in self._known():
            self.forget(request_id, reason)

    def count(self) -> int:
        """Answers that it knows: waiting or running, and cancelled ones that have not left yet."""
        return len(self._answers)

    def _known(self) -> list[int]:
        with self._lock:
            return list(self._answers)

    def wake(self):
        """Make a running step return after its iteration, if its plan wants to hear of arrivals."""
        self._woken = True

    def generated(self, record: Record) -> int:
        return len(self._answers[record.request.id].tokens)

    def answer_of(self, record: Record) -> Answer:
        try:
            return self._answers[record.request.id]
        except KeyError:
            raise RuntimeError(
                f"request {record.request.id} was admitted before its prompt was submitted"
            ) from None

    def give(self, answer: Answer, token: int, most: int) -> bool:
        """Add a token; whether the answer has ended, by this token or by somebody's wish. `most` tokens are the engine's limit."""
        sampling, made = answer.sampling, len(answer.tokens) + 1
        if token in self.stop_ids and not sampling.ignore_stops:
            reason = "stop"
        elif sampling.max_new_tokens is not None and made >= sampling.max_new_tokens:
            reason = "length"
        else:
            reason = "cut" if made >= most else None
        return not answer.add(token, reason) or answer.reason is not None

    def finished(self, answer: Answer) -> tuple[int, int, bool]:
        """The line of a StepResult; the engine knows the request no longer. An answer as long as was asked for is not cut."""
        with self._lock:
            self._answers.pop(answer.id, None)
        return answer.id, len(answer.tokens), answer.reason not in ("stop", "length")


def choose(logits, answers: Sequence[Answer]) -> list[int | None]:
    """The next token of each answer from logits (at least len(answers), V).

    None where they are not finite, or sampling fails.
    """
    best = logits[: len(answers)].max(
        -1
    )  # not argmax, which takes nine times as long in bf16 on a CPU
    tokens = [
        token if finite else None
        for token, finite in zip(best.indices.tolist(), best.values.isfinite().tolist())
    ]
    for i, answer in enumerate(answers):
        if tokens[i] is None or answer.sampling.plain:
            continue
        try:
            tokens[i] = sample(logits[i], answer)
        except Exception:  # one row's sampling must not end everybody's answers
            log.exception("request %s: sampling failed", answer.id)
            tokens[i] = None
    return tokens


def penalized(logits, answer: Answer):
    """fp32 logits (V,) under the answer's penalties; a copy where there are any."""
    import torch

    sampling = answer.sampling
    if not sampling.penalizes:
        return logits.float()
    logits = logits.to(torch.float32, copy=True)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(answer.prompt + answer.tokens, device=logits.device).unique()
        had, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(had > 0, had / penalty, had * penalty)
    if answer.tokens:
        made, times = torch.tensor(answer.tokens, device=logits.device).unique(return_counts=True)
        logits[made] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return logits


def sample(logits, answer: Answer) -> int:
    """One token from logits (V,): penalties, temperature, top-k, top-p, min-p, in this order.

    Top-p: arXiv 1904.09751; min-p: arXiv 2407.01082.
    """
    import torch

    sampling = answer.sampling
    logits = penalized(logits, answer)
    if sampling.greedy:
        return int(logits.argmax())
    if answer.generator is None:
        answer.generator = torch.Generator(logits.device)
        answer.generator.seed() if sampling.seed is None else answer.generator.manual_seed(
            sampling.seed
        )
    # Less their largest, so that none becomes infinite by a small temperature.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, dim=-1)
    ids = None
    if sampling.top_k:
        probabilities, ids = probabilities.topk(min(sampling.top_k, len(probabilities)))
        probabilities = probabilities / probabilities.sum()
    if sampling.top_p < 1:
        if ids is None:
            everything = probabilities
            probabilities, ids = everything.topk(min(NUCLEUS, len(everything)))
            if float(probabilities.sum()) < sampling.top_p:
                probabilities, ids = everything.sort(descending=True)
        beyond = probabilities.cumsum(0) - probabilities >= sampling.top_p
        beyond[0] = False  # though top_p be 0 in fp32
        probabilities = probabilities.masked_fill(beyond, 0.0)
    if sampling.min_p:
        least = sampling.min_p * probabilities.max()
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    drawn = int(torch.multinomial(probabilities, 1, generator=answer.generator))
    return drawn if ids is None else int(ids[drawn])
