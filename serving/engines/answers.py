"""The answers of an engine: prompts, tokens as they are generated, stop conditions, sampling.

Free of torch at import.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.engines.adapter_errors import UnknownAdapter
from serving.request import FOREVER, CostEstimator, Limits, Plan, Record, Request, StepResult

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

    from predictor.prediction import LengthPrediction
    from serving.engines.adapters import AdapterSet, LoadedAdapter
    from serving.engines.constraints import Grammar, Matcher
    from serving.engines.state_sums import StateSums

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-5  # a lower one takes the likeliest token; fp32 has no range for it
LOGPROB_TOKENS = 128  # of a prompt whose logits are in memory at once
TOP_P_CANDIDATES = 256  # top-p tries so many likeliest tokens before it sorts the whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled.

    Attributes:
        max_new_tokens: the answer ends there, for "length"; None: at the engine's limits, "cut".
        temperature: 0, or less than MIN_TEMPERATURE, takes the likeliest token.
        top_p: sample among the likeliest tokens that have this much probability together.
        seed: of the answer's generator; None draws one.
        ignore_stops: go on past stop ids (benchmarks).
        top_k: sample among so many likeliest tokens; 0 for all.
        min_p: leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: divides the logits of tokens in prompt or answer where they are above 0,
            else multiplies them (arXiv 1909.05858).
        presence_penalty, frequency_penalty: subtracted from the logits of the answer's tokens, once
            and for each of their occurrences.
        logit_bias: (token id, what is added to its logit); ids beyond the vocabulary count for
            nothing.
        bad_words: token sequences that the answer must not hold.
        logprobs: keep the log probability of each token, and of so many likeliest ones, by the
            model's unchanged logits; None for none.
        prompt_logprobs: as logprobs, of the prompt's tokens.
        embeds: keep the mean of the prompt's hidden states.
        adapter: name of the loaded adapter that answers; None for the model itself.
        grammar: what the answer's text must be; None for any text.
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
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    embeds: bool = False
    adapter: str | None = None
    grammar: "Grammar | None" = None

    def __post_init__(self) -> None:
        if not (self.top_k >= 0 and 0 <= self.min_p <= 1 and self.repetition_penalty > 0):
            wanted = "top_k >= 0, 0 <= min_p <= 1 and repetition_penalty > 0"
            raise ValueError(f"wanted {wanted}; got {self}")
        has_room = self.max_new_tokens is None or self.max_new_tokens >= 1
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and has_room):
            raise ValueError(
                f"wanted temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1; got {self}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def penalizes(self) -> bool:
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.bad_words
        )

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token of the model's unchanged logits."""
        return self.greedy and not self.penalizes and self.grammar is None


class TokenLogprobs(NamedTuple):
    """Log probabilities at one place of an answer.

    Attributes:
        chosen: of the token there.
        top: (token, its log probability) of the likeliest ones, the likeliest first.
    """

    chosen: float
    top: list[tuple[int, float]]


class Answer:
    """One answer as it grows. The engine writes it, any thread may read it.

    Iterating yields its tokens as they are made, until it ends.

    Attributes:
        tokens: ids so far, the stop id included.
        reason: None while it grows; then "stop" (a stop id), "length" (max_new_tokens), "cut" (the
            engine's limits, or a plan's), "cancelled", "refused" or "failed" (the model's output
            was not finite, or sampling failed).
        logprobs: of each token, where its sampling asks for them.
        prompt_logprobs: of each of the prompt's tokens, where asked for; None for its first.
        embedding: mean (hidden_size,) of the prompt's states after the final norm, fp32, where
            asked for.
        prompt_seen: how many of the prompt's tokens the last two cover.
        generator: of its sampling, on the model's device; created when first needed. A
            preemption does not rewind it.
        adapter: the adapter of its sampling, held until the engine drops the answer.
        matcher: of its grammar, where it has one; created when first needed.
        states: running sums of its hidden states, where the engine has a StateTap.
        after_prompt: its length as predicted from the states of the prompt, where it was.
        refusal: why it was refused after it had been submitted, where its process knows more.
        replica: number of the one that makes it (AnswerBackend.replica_states); None while it
            waits for one.
    """

    def __init__(
        self,
        id: int,
        prompt: list[int],
        sampling: Sampling,
        listener: Callable[["Answer", int | None], None] | None,
    ):
        self.id = id
        self.prompt = prompt
        self.sampling = sampling
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.embedding: Tensor | None = None
        self.prompt_seen = 0
        self.reason: str | None = None
        self.generator: Generator | None = None
        self.adapter: LoadedAdapter | None = None
        self.matcher: Matcher | None = None
        self.states: StateSums | None = None
        self.after_prompt: LengthPrediction | None = None
        self.refusal: str | None = None
        self.replica: int | None = None
        self._listener = listener
        self._changed = threading.Condition()

    @property
    def reads_prompt(self) -> bool:
        """Whether states of its prompt are still asked for."""
        asks = self.sampling.embeds or self.sampling.prompt_logprobs is not None
        return asks and self.prompt_seen < len(self.prompt)

    def add(self, token: int | None, reason: str | None = None) -> bool:
        """Append a token, if there is one, and end where `reason` is given.

        Returns:
            False where the answer has ended already; then nothing happens.
        """
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
            except Exception:  # one bad listener must not end the other answers
                log.exception("request %s: its listener failed; the answer is cancelled", self.id)
                self._listener = None
                self.add(None, "cancelled")
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended; False when that took longer than the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self.reason is not None, timeout_s)

    def __iter__(self) -> Iterator[int]:
        n = 0

        def has_news() -> bool:
            return len(self.tokens) > n or self.reason is not None

        while True:
            with self._changed:
                self._changed.wait_for(has_news)
                fresh = self.tokens[n:]
                ended = self.reason is not None
            yield from fresh
            n += len(fresh)
            if ended:
                return


class AdmittedAnswer:
    """An answer that a plan has admitted, and the KV tokens that it may take.

    Attributes:
        base: KV tokens at its admission: prompt, earlier answer and what pads them.
        reserve: KV tokens reserved for it.
        max_answer: answer tokens after which it is truncated.
        tokens_at_admission: answer tokens that it had then.
    """

    def __init__(self, answer: Answer, base: int, reserve: int, most: int):
        self.id = answer.id
        self.answer = answer
        self.base = base
        self.reserve = reserve
        self.max_answer = most
        self.tokens_at_admission = len(answer.tokens)

    @property
    def new_tokens(self) -> int:
        """Answer tokens since its admission."""
        return len(self.answer.tokens) - self.tokens_at_admission

    @property
    def is_full(self) -> bool:
        return self.base + self.new_tokens >= self.reserve


class TextEngine:
    """Base class of the real engines: the answers by request id, and when an answer ends.

    submit, wake, cancel and forget may be called from any thread; step and generated only from the
    scheduler's.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        limits: Limits,
        cost: CostEstimator,
        stop_ids: Sequence[int] | None = None,
    ):
        self.model = model
        self.limits = limits
        self.cost = cost
        self.stop_ids = frozenset(model_stop_ids(model) if stop_ids is None else stop_ids)
        self.adapters: AdapterSet | None = None  # of the engines that take adapters
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
        """Register a request's text, before the scheduler gets the request.

        Args:
            listener: called with (answer, token) in the engine's thread for each token, at the last
                one with answer.reason set; token is None where the answer ends without one. It
                should return at once.
        Raises:
            ValueError: the prompt is not request.prompt_tokens long, or the model cannot read it;
                the id is in use; no such adapter is loaded (UnknownAdapter).
        """
        prompt = checked_prompt(request, prompt_ids)
        self.check_prompt(prompt)
        answer = Answer(request.id, prompt, sampling or Sampling(), listener)
        with self._lock:
            if request.id in self._answers:
                raise ValueError(f"request {request.id} is being answered already")
            answer.adapter = self._acquire(answer.sampling.adapter)
            self._answers[request.id] = answer
        return answer

    def _acquire(self, name: str | None) -> "LoadedAdapter | None":
        """The adapter of a name for one more answer. Raises UnknownAdapter."""
        if name is None:
            return None
        if self.adapters is None:
            raise UnknownAdapter(f"no adapter {name!r}: this engine takes none")
        return self.adapters.acquire(name)

    def check_prompt(self, prompt: list[int]) -> None:
        """Raises ValueError where the model cannot read it."""
        check_ids(prompt, vocabulary_of(self.model))

    def cancel(self, request_id: int) -> None:
        """End an answer now; nothing where the id is unknown.

        A running sequence leaves at the next iteration, a waiting one when it is admitted.
        """
        if (answer := self._answers.get(request_id)) is not None:
            answer.add(None, "cancelled")
            self._woken = True

    def forget(self, request_id: int, reason: str = "refused") -> None:
        """Drop a request that the scheduler refused or did not receive."""
        if (answer := self._drop_answer(request_id)) is not None:
            answer.add(None, reason)

    def _drop_answer(self, request_id: int) -> Answer | None:
        """Forget an answer and release its adapter; None where the id is unknown."""
        with self._lock:
            answer = self._answers.pop(request_id, None)
        if answer is not None and answer.adapter is not None and self.adapters is not None:
            self.adapters.release(answer.adapter)
        return answer

    def cancel_all(self) -> list[int]:
        """Cancel every answer; returns their ids."""
        registered = self._registered_ids()
        for request_id in registered:
            self.cancel(request_id)
        return registered

    def end_all(self, reason: str = "cancelled") -> None:
        """End every answer after step has raised, so that no thread waits for one."""
        for request_id in self._registered_ids():
            self.forget(request_id, reason)

    def close(self) -> None:
        """Give back what outlives the answers; no step comes after."""

    def count(self) -> int:
        """Registered answers: waiting, running, and cancelled ones that have not left yet."""
        return len(self._answers)

    def copied_tokens(self) -> int:
        """Prompt tokens that were copied from common prefixes instead of computed."""
        return 0

    def _registered_ids(self) -> list[int]:
        with self._lock:
            return list(self._answers)

    def wake(self) -> None:
        """Make a running step return after its iteration, where its plan has wake_on_arrival."""
        self._woken = True

    def generated(self, record: Record) -> int:
        return len(self._answers[record.request.id].tokens)

    def computed(self, record: Record) -> int:
        return record.context_tokens

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step."""
        raise NotImplementedError

    def answer_of(self, record: Record) -> Answer:
        try:
            return self._answers[record.request.id]
        except KeyError:
            raise RuntimeError(
                f"request {record.request.id} was admitted before its prompt was submitted"
            ) from None

    def add_token(self, answer: Answer, token: int, most: int) -> bool:
        """Add a token; `most` tokens are the engine's limit.

        Returns:
            Whether the answer has ended: by this token, or because it was cancelled.
        """
        sampling = answer.sampling
        made = len(answer.tokens) + 1
        if token in self.stop_ids and not sampling.ignore_stops:
            reason = "stop"
        elif sampling.max_new_tokens is not None and made >= sampling.max_new_tokens:
            reason = "length"
        elif made >= most:
            reason = "cut"
        else:
            reason = None
        return not answer.add(token, reason) or answer.reason is not None

    def take_finished(self, answer: Answer) -> tuple[int, int, bool]:
        """Drop an ended answer; returns its line of StepResult.finished: (id, tokens, cut).

        An answer that reached its max_new_tokens is not cut.
        """
        self._drop_answer(answer.id)
        return answer.id, len(answer.tokens), answer.reason not in ("stop", "length")


def checked_prompt(request: Request, prompt_ids: Sequence[int]) -> list[int]:
    """The ids of a request's prompt; raises ValueError where they are not as many as it says."""
    prompt = list(prompt_ids)
    if len(prompt) != request.prompt_tokens or not prompt:
        raise ValueError(
            f"request {request.id} says {request.prompt_tokens} prompt tokens (at least 1), "
            f"its prompt has {len(prompt)}"
        )
    return prompt


def check_ids(prompt: list[int], vocabulary: int) -> None:
    """Raises ValueError where a prompt has an id that is not below `vocabulary`."""
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ValueError(
            f"prompt ids must be from 0 to {vocabulary - 1}; got {min(prompt)} to {max(prompt)}"
        )


def vocabulary_of(model: "PreTrainedModel") -> int:
    """Rows of a model's embedding: its token ids are below."""
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def model_stop_ids(model: "PreTrainedModel") -> Sequence[int]:
    """The stop ids of a model's generation_config."""
    stop_ids = model.generation_config.eos_token_id
    if stop_ids is None:
        return []
    return [stop_ids] if isinstance(stop_ids, int) else stop_ids


def choose_tokens(logits: "Tensor", answers: Sequence[Answer]) -> list[int | None]:
    """The next token of each answer from logits (at least len(answers), V).

    None where they are not finite, or sampling fails.
    """
    # Not argmax, which takes nine times as long in bf16 on a CPU.
    best = logits[: len(answers)].max(-1)
    is_finite = best.values.isfinite().tolist()
    tokens = [token if is_finite[i] else None for i, token in enumerate(best.indices.tolist())]
    for i, answer in enumerate(answers):
        if tokens[i] is None:
            continue
        try:
            if not answer.sampling.is_plain:
                tokens[i] = sample(logits[i], answer)
            if answer.sampling.logprobs is not None:
                chosen = [int(tokens[i] or 0)]
                found = token_logprobs(logits[i : i + 1], chosen, answer.sampling.logprobs)
                answer.logprobs += found
        except Exception:  # one row's sampling must not end the other answers
            log.exception("request %s: sampling failed", answer.id)
            tokens[i] = None
    return tokens


def token_logprobs(logits: "Tensor", tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log probabilities of tokens (N) and of the `count` likeliest ones by logits (N, V)."""
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    top = logprobs.topk(min(count, logprobs.shape[1]))
    found = []
    for value, ids, values in zip(chosen.tolist(), top.indices.tolist(), top.values.tolist()):
        found.append(TokenLogprobs(value, list(zip(ids, values))))
    return found


def read_prompt(
    answer: Answer, states: "Tensor", start: int, head: Callable[["Tensor"], "Tensor"]
) -> None:
    """Keep what an answer's sampling asks of its prompt.

    Args:
        states: (count, hidden_size), after the final norm, of the prompt's tokens from `start`;
            tokens that were read before, and those beyond the prompt, are left out.
        head: of hidden states into logits.
    """
    first, size = max(answer.prompt_seen, start), len(answer.prompt)
    states = states[first - start : size - start]
    if not len(states):
        return
    answer.prompt_seen = first + len(states)
    if answer.sampling.embeds:
        part = states.float().sum(0) / size
        answer.embedding = part if answer.embedding is None else answer.embedding + part
    if (count := answer.sampling.prompt_logprobs) is None:
        return
    if first == 0:
        answer.prompt_logprobs.append(None)
    followers = answer.prompt[first + 1 : answer.prompt_seen + 1]
    for place in range(0, len(followers), LOGPROB_TOKENS):
        tokens = followers[place : place + LOGPROB_TOKENS]
        logits = head(states[place : place + len(tokens)])
        answer.prompt_logprobs += token_logprobs(logits, tokens, count)


def penalized(logits: "Tensor", answer: Answer) -> "Tensor":
    """Logits (V,) under the answer's penalties, fp32; a copy where there are any."""
    import torch

    sampling = answer.sampling
    if not sampling.penalizes:
        return logits.float()
    logits = logits.to(torch.float32, copy=True)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(answer.prompt + answer.tokens, device=logits.device).unique()
        before = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(before > 0, before / penalty, before * penalty)
    if answer.tokens:
        made, times = torch.tensor(answer.tokens, device=logits.device).unique(return_counts=True)
        logits[made] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in sampling.logit_bias:
        if token < len(logits):
            logits[token] += bias
    for word in sampling.bad_words:
        if word[-1] < len(logits) and ends_with(answer.tokens, word[:-1]):
            logits[word[-1]] = -torch.inf
    return logits


def ends_with(tokens: Sequence[int], ending: Sequence[int]) -> bool:
    return not ending or tuple(tokens[-len(ending) :]) == tuple(ending)


def generator_of(answer: Answer, device: "torch.device") -> "Generator":
    """The answer's generator, made and seeded on the first call."""
    import torch

    if answer.generator is None:
        answer.generator = torch.Generator(device)
        if answer.sampling.seed is None:
            answer.generator.seed()
        else:
            answer.generator.manual_seed(answer.sampling.seed)
    return answer.generator


def matcher_of(answer: Answer) -> "Matcher | None":
    """The state of an answer's grammar after its tokens; None where it has no grammar."""
    if answer.sampling.grammar is None:
        return None
    if answer.matcher is None:
        answer.matcher = answer.sampling.grammar.matcher()
    answer.matcher.follow(answer.tokens)
    return answer.matcher


def sample(logits: "Tensor", answer: Answer) -> int:
    """One token from logits (V,): penalties, grammar, temperature, top-k, top-p, min-p.

    Top-p: arXiv 1904.09751; min-p: arXiv 2407.01082.
    """
    import torch

    sampling = answer.sampling
    logits = penalized(logits, answer)
    matcher = matcher_of(answer)
    if sampling.greedy:
        return int(logits.argmax()) if matcher is None else matcher.best(logits)
    if matcher is not None:
        logits = matcher.masked(logits)
    generator = generator_of(answer, logits.device)
    # Less their largest, so that a small temperature makes none infinite.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, dim=-1)
    ids = None
    if sampling.top_k:
        probabilities, ids = probabilities.topk(min(sampling.top_k, len(probabilities)))
        probabilities = probabilities / probabilities.sum()
    if sampling.top_p < 1:
        if ids is None:
            vocabulary = probabilities
            probabilities, ids = vocabulary.topk(min(TOP_P_CANDIDATES, len(vocabulary)))
            if float(probabilities.sum()) < sampling.top_p:
                probabilities, ids = vocabulary.sort(descending=True)
        beyond = probabilities.cumsum(0) - probabilities >= sampling.top_p
        beyond[0] = False  # even where top_p is 0 in fp32
        probabilities = probabilities.masked_fill(beyond, 0.0)
    if sampling.min_p:
        least = sampling.min_p * probabilities.max()
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return drawn if ids is None else int(ids[drawn])
