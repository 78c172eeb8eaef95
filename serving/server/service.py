"""What connects a server's handlers with its engine.

A backend makes the answers; handlers submit requests and read tokens. Free of torch and of HTTP.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from predictor.prediction import from_bins
from serving.engines import Answer, Sampling
from serving.engines.runner import AnswerBackend
from serving.request import Event, Record, Request
from serving.server.adapters import AdapterRegistry
from serving.server.generation import (
    GenerationRequest,
    PromptIds,
    banned_sequences,
    reported_prediction,
    request_sampling,
)
from serving.server.grammars import GrammarCompiler
from serving.server.monitor import Monitor
from serving.server.refusals import (
    PredictionFailed,
    PromptTooLong,
    QueueFull,
    ServiceClosed,
)

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.prediction import LengthPrediction
    from predictor.runtime import LengthPredictor
    from serving.server.page.feedback import FeedbackFile
    from serving.server.page.tools import PageTools
    from serving.server.predictors import Predictors
    from serving.server.recalibration import Recalibrator
    from serving.server.text_encoder import TextEncoder

log = logging.getLogger(__name__)

TokenQueue: TypeAlias = "asyncio.Queue[tuple[int, int | None]]"
MAX_CHARACTERS_PER_TOKEN = 100  # a longer prompt is refused without being tokenized
ONE_TOKEN = from_bins(np.ones(1), np.array([0.0, 1.0]))  # of what makes no answer: embeddings


@dataclass
class ActiveRequest:
    """One answer under way.

    Attributes:
        admitted_s: when it first left the queue; None before.
    """

    request: Request
    answer: Answer
    admitted_s: float | None = None


class TokenRelay:
    """Brings tokens from the engine's thread to an event loop, which it wakes once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[TokenQueue, tuple[int, int | None]]] = deque()
        self._is_scheduled = False

    def put(self, tokens: "TokenQueue", entry: tuple[int, int | None]) -> None:
        """For the engine's thread. Raises RuntimeError where the loop is closed."""
        self._waiting.append((tokens, entry))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._is_scheduled = False
                raise

    def _deliver(self) -> None:
        self._is_scheduled = False  # before the queue is emptied: what comes after wakes again
        while self._waiting:
            tokens, entry = self._waiting.popleft()
            tokens.put_nowait(entry)


class AnswerGroup(NamedTuple):
    """The answers to one request of a client.

    Attributes:
        tokens: yields (place of an answer, its next token) as they come; None for a token when
            the answer has no more.
        unknown_fields: names of the request's unknown fields.
    """

    answers: list[ActiveRequest]
    tokens: TokenQueue
    unknown_fields: tuple[str, ...] = ()


def seed_of(seed: int | None, number: int) -> int | None:
    """Of a prompt's answer of this number."""
    if seed is None or seed + number < 2**63:
        return None if seed is None else seed + number
    return seed - number


class Service:
    """What makes answers, and what a server does with its requests before and after.

    Attributes:
        name: of the served model. slo_s: of requests without one.
        defaults: temperature and top_p of requests without them.
        prompt_options: options of the family's encode_chat.
        max_queue: requests that may wait beside the max_batch that run.
        text_encoder: what embeddings come from; None for the served model.
        predictors: what replaces `predictor` while serving; recalibrator: what updates it.
        adapters: those that a request's `model` may name.
        policy, engine: their names, for the page. page_tools, feedback: what the page offers
            beside chats; None where it does not.
        draining: no new requests are taken.
        on_failure: called after the backend has failed and every answer has ended.
    """

    def __init__(
        self,
        backend: AnswerBackend,
        tokenizer: "FamilyTokenizer",
        predictor: "LengthPredictor | None",
        monitor: Monitor,
        *,
        name: str,
        slo_s: float,
        defaults: dict,
        prompt_options: dict,
        max_queue: int = 256,
    ) -> None:
        self.backend, self.tokenizer, self.predictor, self.monitor = (
            backend,
            tokenizer,
            predictor,
            monitor,
        )
        self.name, self.slo_s, self.defaults, self.prompt_options = (
            name,
            slo_s,
            defaults,
            prompt_options,
        )
        self.max_queue = max_queue
        self.text_encoder: TextEncoder | None = None
        self.predictors: Predictors | None = None
        self.recalibrator: Recalibrator | None = None
        self.adapters = AdapterRegistry(backend, name)
        self.policy: str | None = None
        self.engine: str | None = None
        self.page_tools: PageTools | None = None
        self.feedback: FeedbackFile | None = None
        self.on_failure: Callable[[], None] | None = None
        self.draining = False
        self._preparing = 0
        self.started = int(time.time())
        self.clock = backend.clock
        self.grammars = GrammarCompiler(tokenizer, lambda: sorted(backend.stop_ids))
        self._ids = itertools.count()
        self._active: dict[int, ActiveRequest] = {}
        self._relay: TokenRelay | None = None

    @property
    def failure(self) -> str | None:
        """Why no more answers can be made; None as long as they can."""
        return self.backend.failure

    def start(self) -> None:
        self.backend.start(self._observe, self._backend_failed)
        if self.recalibrator is not None:
            self.recalibrator.start()

    def use_predictor(self, predictor: "LengthPredictor") -> None:
        """Predict later requests by this one; those in preparation keep the one before."""
        self.predictor = predictor

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the backend; events of running answers are no longer read."""
        self.draining = True
        if self.recalibrator is not None:
            self.recalibrator.close()
        if self.page_tools is not None:
            self.page_tools.close()
        if self.feedback is not None:
            self.feedback.close()
        if self.text_encoder is not None:
            self.text_encoder.close()
        if self.backend.stop(timeout_s):
            self.monitor.close()
        else:  # it may still write to the log, so the log stays open
            log.warning("the engine has not ended its step within %g s", timeout_s)

    def cancel_all(self) -> None:
        """End every answer, running or waiting."""
        self.backend.cancel_all()

    def _backend_failed(self) -> None:
        if self.on_failure is not None:
            self.on_failure()

    def _observe(self, event: Event):
        if event.kind == "admitted" and (active := self._active.get(event.id)) is not None:
            assert isinstance(event.what, Record)
            active.admitted_s = event.what.first_admitted_s
        try:
            self.monitor(event)
        except Exception:  # figures and logs must not end the answers
            log.exception("request %s: the monitor failed at %r", event.id, event.kind)

    def check_open(self) -> None:
        """Raises ServiceClosed."""
        if self.failure or self.draining:
            raise ServiceClosed(self.failure or "the server is shutting down")

    async def ask(self, asked: GenerationRequest) -> AnswerGroup:
        """Tokenize the prompts, predict their answers' lengths, and submit them to the engine.

        Raises:
            ValueError: the family's prompt format has no place for these prompts.
            PromptTooLong: one leaves no room for an answer.
            UnknownAdapter: `model` names no loaded adapter.
            ServiceClosed, QueueFull, PredictionFailed: none is made.
        """
        self.check_open()
        count = asked.prompt_count * asked.n
        self._check_room(count)
        arrival_s = self.clock.now_s()
        self._preparing += count
        try:
            prompts = await asyncio.to_thread(self._prepare, asked)
            bad_words: tuple[tuple[int, ...], ...] = ()
            if asked.bad_words:
                bad_words = await asyncio.to_thread(
                    banned_sequences, self.tokenizer, asked.bad_words
                )
            grammar = None
            if asked.has_grammar:
                write = partial(asked.grammar_source, self.tokenizer)
                grammar = await self.grammars.compiled(write)
        finally:
            self._preparing -= count
        self.check_open()
        adapter = self.adapters.chosen(asked.model)
        group = AnswerGroup([], asyncio.Queue(), asked.unknown_fields)
        try:
            for prompt, prediction in prompts:
                sampling = replace(
                    self.sampling_of(asked, len(prompt.ids)),
                    bad_words=bad_words,
                    grammar=grammar,
                    adapter=adapter,
                )
                for number in range(asked.n):
                    seeded = replace(sampling, seed=seed_of(asked.seed, number))
                    self._submit(group, asked, prompt, prediction, seeded, arrival_s)
        except BaseException:
            self.release(group)
            raise
        return group

    def _check_room(self, count: int) -> None:
        """Raises QueueFull, or ValueError where so many answers never have room."""
        room = self.backend.limits.max_batch + self.max_queue
        if count > room:
            raise ValueError(
                f"a request may ask for {room} answers (--max_batch and --max_queue), got {count}"
            )
        if self.backend.count() + self._preparing + count > room:
            raise QueueFull(
                f"{self.max_queue} requests wait already (--max_queue); try again later"
            )

    def _submit(
        self,
        group: AnswerGroup,
        asked: GenerationRequest,
        prompt: PromptIds,
        prediction: "LengthPrediction | None",
        sampling: Sampling,
        arrival_s: float,
    ) -> None:
        """Give an answer to the engine and to its group. Raises ServiceClosed."""
        slo_s = self.slo_s if asked.slo_s is None else asked.slo_s
        predict_s = self.clock.now_s() - arrival_s
        request = Request(
            next(self._ids),
            len(prompt.ids),
            arrival_s,
            slo_s,
            prediction,
            predict_s=predict_s,
            priority=asked.priority,
        )
        relay, tokens, place = self._relay_of_loop(), group.tokens, len(group.answers)

        def listener(answer: Answer, token: int | None):
            if token is not None:
                relay.put(tokens, (place, token))
            if answer.reason is not None:
                relay.put(tokens, (place, None))

        answer = self.backend.submit(request, prompt.ids, sampling, listener)
        active = self._active[request.id] = ActiveRequest(request, answer)
        group.answers.append(active)
        self.monitor.track(request, prompt.text, answer, sampling.adapter)
        try:
            self.backend.enqueue(request)
        except RuntimeError as error:  # it was shut in between
            self.monitor.forget(request.id)
            raise ServiceClosed(str(self.failure or error)) from None

    def _relay_of_loop(self) -> TokenRelay:
        """The relay of the running loop, of which a service has one."""
        loop = asyncio.get_running_loop()
        if self._relay is None or self._relay.loop is not loop:
            self._relay = TokenRelay(loop)
        return self._relay

    def cancel(self, active: ActiveRequest) -> None:
        """Cancel an answer; nothing happens where it has ended."""
        if active.answer.reason is None:
            self.backend.cancel(active.request.id)

    def release(self, group: AnswerGroup) -> None:
        """Cancel what has not ended of a group, which nobody reads any more."""
        for active in group.answers:
            self.cancel(active)
            self._active.pop(active.request.id, None)

    def sampling_of(self, asked: GenerationRequest, prompt_tokens: int) -> Sampling:
        """Of a prompt's first answer, but for its bad words, grammar and adapter.

        Raises:
            PromptTooLong: max_length leaves no room for an answer.
        """
        return request_sampling(asked, prompt_tokens, self.defaults)

    def _prepare(
        self, asked: GenerationRequest
    ) -> "list[tuple[PromptIds, LengthPrediction | None]]":
        """The prompts and the predictions of their answers.

        Raises:
            PromptTooLong, ValueError, PredictionFailed: none is made.
        """
        max_tokens = self.backend.limits.max_tokens
        room = f"which leaves no room for an answer within {max_tokens} tokens (--max_tokens)"
        count, characters = asked.sizes()
        if characters > MAX_CHARACTERS_PER_TOKEN * max_tokens or count > max_tokens:
            raise PromptTooLong(
                f"the prompt has {count} messages or tokens and {characters} characters, {room}"
            )
        prepared = []
        for prompt in asked.encoded(self.tokenizer, self.prompt_options):
            if len(prompt.ids) >= max_tokens:
                raise PromptTooLong(f"the prompt has {len(prompt.ids)} tokens, {room}")
            prediction = ONE_TOKEN if asked.embeds else self._predict(prompt.text)
            prepared.append((prompt, prediction))
        return prepared

    def _predict(self, text: str) -> "LengthPrediction | None":
        """None without a predictor. Raises PredictionFailed."""
        if self.predictor is None:
            return None
        try:
            return self.predictor.predict(text)[0]
        except Exception as error:  # a failing predictor is the server's error, not the request's
            log.exception("the predictor failed")
            why = type(error).__name__
            raise PredictionFailed(f"the answer's length could not be predicted: {why}") from None

    def report(self, group: AnswerGroup) -> dict[str, Any]:
        """Predicted and actual lengths of ended answers; the `glm_foundry` field of a response."""
        reports = [self.answer_report(active) for active in group.answers]
        report_fields = reports[0]
        if len(reports) > 1:
            report_fields = {
                "output_tokens": sum(report["output_tokens"] for report in reports),
                "finished": all(report["finished"] for report in reports),
                "slo_s": reports[0]["slo_s"],
                "queue_s": max(report["queue_s"] for report in reports),
                "latency_s": max(report["latency_s"] for report in reports),
                "in_time": all(report["in_time"] for report in reports),
                "answers": reports,
            }
        if group.unknown_fields:
            report_fields["ignored"] = group.unknown_fields
        return report_fields

    def answer_report(self, active: ActiveRequest) -> dict[str, Any]:
        """Of one ended answer."""
        request, answer = active.request, active.answer
        latency_s = self.clock.now_s() - request.arrival_s
        queue_s = latency_s
        if active.admitted_s is not None:
            queue_s = max(active.admitted_s - request.arrival_s, 0.0)
        report_fields: dict[str, Any] = {
            "output_tokens": self.length(answer),
            "finished": answer.reason == "stop",
            "slo_s": request.slo_s,
            "queue_s": round(queue_s, 4),
            "latency_s": round(latency_s, 4),
            "in_time": latency_s <= request.slo_s,
        }
        if (adapter := answer.sampling.adapter) is not None:
            report_fields["adapter"] = adapter
        if (prediction := request.prediction) is not None:
            report_fields["predicted_tokens"] = reported_prediction(prediction)
        return report_fields

    @staticmethod
    def length(answer: Answer) -> int:
        """Tokens without the end token."""
        return len(answer.tokens) - (answer.reason == "stop")
