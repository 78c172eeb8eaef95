"""What connects a server's handlers with its engine.

One thread runs the scheduler; handlers submit requests and read tokens. Free of torch and of HTTP.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from serving.engines import Answer, Inbox, Sampling, TextEngine, WallClock
from serving.request import Event, Policy, Request
from serving.scheduler import run_scheduler
from serving.server.adapters import AdapterRegistry
from serving.server.chat import ChatRequest, encode_messages, prompt_of
from serving.server.monitor import Monitor

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.prediction import LengthPrediction
    from predictor.runtime import LengthPredictor

log = logging.getLogger(__name__)

MAX_CHARACTERS_PER_TOKEN = 100  # a longer prompt is refused without being tokenized
SAMPLING_FIELDS = (  # those of a ChatRequest that Sampling has under the same name
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


class PromptTooLong(ValueError):
    """A prompt that leaves no room for an answer."""


class QueueFull(RuntimeError):
    """max_batch requests run and max_queue wait."""


class PredictionFailed(RuntimeError):
    """The predictor failed on this prompt."""


class ServiceClosed(RuntimeError):
    """No new requests: the server is shutting down, or its engine has failed."""


@dataclass(frozen=True)
class ActiveRequest:
    """One request under way.

    Attributes:
        tokens: yields each token as it comes, and None when there is no more.
        unknown_fields: names of its unknown fields.
    """

    request: Request
    answer: Answer
    tokens: asyncio.Queue
    unknown_fields: tuple[str, ...] = ()


class Service:
    """A model, its predictor, a policy, and the thread that runs them.

    Attributes:
        name: of the served model. slo_s: of requests without one.
        defaults: temperature and top_p of requests without them.
        prompt_options: options of the family's encode_chat.
        max_queue: requests that may wait beside the max_batch that run.
        adapters: those that a request's `model` may name.
        draining: no new requests are taken. failure: why the engine has ended, or None.
        on_failure: called in the engine's thread, after the engine has failed and every answer
            has ended.
    """

    def __init__(
        self,
        engine: TextEngine,
        tokenizer: "FamilyTokenizer",
        policy: Policy,
        predictor: "LengthPredictor | None",
        monitor: Monitor,
        *,
        name: str,
        slo_s: float,
        defaults: dict,
        prompt_options: dict,
        max_queue: int = 256,
    ) -> None:
        self.engine, self.tokenizer, self.policy, self.predictor, self.monitor = (
            engine,
            tokenizer,
            policy,
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
        self.adapters = AdapterRegistry(engine, name)
        self.on_failure: Callable[[], None] | None = None
        self.draining, self.failure = False, None
        self._preparing = 0
        self.started = int(time.time())
        self.clock = WallClock()
        self.inbox = Inbox(self.clock, engine)
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine's thread; events of running answers are no longer read."""
        self.draining = True
        self.inbox.close()
        self.cancel_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():  # it may still write to the log, so the log stays open
            log.warning("the engine has not ended its step within %g s", timeout_s)
        else:
            self.monitor.close()

    def cancel_all(self) -> None:
        """End every answer, running or waiting."""
        for request_id in self.engine.cancel_all():
            self.inbox.withdraw(request_id)

    def _serve(self):
        try:
            for event in run_scheduler(
                self.policy, self.engine, self.clock, self.inbox, self._observe
            ):
                if event.kind in ("refused", "withdrawn"):
                    self.engine.forget(event.id)
        except BaseException as error:  # out of memory, a bug: every client must get a response
            log.exception("the engine has failed")
            what = " ".join(str(error).split())[:200]
            self.failure = f"the engine has failed: {type(error).__name__}: {what}"
            # First, so that later requests are refused and the engine knows all earlier ones.
            self.inbox.close()
            self.engine.end_all("failed")
            if self.on_failure is not None:
                self.on_failure()

    def _observe(self, event: Event):
        try:
            self.monitor(event)
        except Exception:  # figures and logs must not end the answers
            log.exception("request %s: the monitor failed at %r", event.id, event.kind)

    def check_open(self) -> None:
        """Raises ServiceClosed."""
        if self.failure or self.draining:
            raise ServiceClosed(self.failure or "the server is shutting down")

    async def ask(self, chat_request: ChatRequest) -> ActiveRequest:
        """Tokenize the prompt, predict its length, and submit it to the engine.

        Raises:
            ValueError: the family's prompt format has no place for these messages.
            PromptTooLong: they leave no room for an answer.
            UnknownAdapter: `model` names no loaded adapter.
            ServiceClosed, QueueFull, PredictionFailed: none is made.
        """
        self.check_open()
        limits = self.engine.limits
        if self.engine.count() + self._preparing >= limits.max_batch + self.max_queue:
            raise QueueFull(
                f"{self.max_queue} requests wait already (--max_queue); try again later"
            )
        arrival_s = self.clock.now_s()
        prompt = prompt_of(chat_request.messages)
        self._preparing += 1
        try:
            ids, prediction = await asyncio.to_thread(self._prepare, chat_request, prompt)
        finally:
            self._preparing -= 1
        self.check_open()
        slo_s = self.slo_s if chat_request.slo_s is None else chat_request.slo_s
        request = Request(
            next(self._ids),
            len(ids),
            arrival_s,
            slo_s,
            prediction,
            predict_s=self.clock.now_s() - arrival_s,
        )
        adapter = self.adapters.chosen(chat_request.model)
        sampling = replace(self.sampling_of(chat_request, len(ids)), adapter=adapter)
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()

        def listener(answer: Answer, token: int | None):
            if token is not None:
                loop.call_soon_threadsafe(tokens.put_nowait, token)
            if answer.reason is not None:
                loop.call_soon_threadsafe(tokens.put_nowait, None)

        answer = self.engine.submit(request, ids, sampling, listener)
        self.monitor.track(request, prompt, answer, adapter)
        try:
            self.inbox.put(request)
        except RuntimeError as error:  # it was shut in between
            self.engine.forget(request.id)
            self.monitor.forget(request.id)
            raise ServiceClosed(str(self.failure or error)) from None
        return ActiveRequest(request, answer, tokens, chat_request.unknown_fields)

    def cancel(self, active: ActiveRequest) -> None:
        """Cancel an answer; nothing happens where it has ended."""
        if active.answer.reason is None:
            self.engine.cancel(active.request.id)
            self.inbox.withdraw(active.request.id)

    def sampling_of(self, chat_request: ChatRequest, prompt_tokens: int) -> Sampling:
        """Raises PromptTooLong where max_length leaves no room for an answer."""
        token_limits = [chat_request.max_tokens] if chat_request.max_tokens is not None else []
        if chat_request.max_length is not None:
            if chat_request.max_length <= prompt_tokens:
                counts = f"counts the prompt too, which has {prompt_tokens} tokens"
                raise PromptTooLong(
                    f"max_length ({chat_request.max_length}) {counts}; say max_tokens"
                )
            token_limits.append(chat_request.max_length - prompt_tokens)
        options = dict(self.defaults)
        for name in SAMPLING_FIELDS:
            if (value := getattr(chat_request, name)) is not None:
                options[name] = value
        if chat_request.do_sample is False or options.get("top_p") == 0:
            options |= {"temperature": 0.0, "top_p": 1.0}
        top_k = max(chat_request.top_k or 0, 0)
        max_new_tokens = min(token_limits, default=None)
        logprobs = chat_request.top_logprobs or 0 if chat_request.logprobs else None
        return Sampling(
            max_new_tokens=max_new_tokens,
            seed=chat_request.seed,
            top_k=top_k,
            logprobs=logprobs,
            **options,
        )

    def _prepare(
        self, chat_request: ChatRequest, prompt: str
    ) -> "tuple[list[int], LengthPrediction | None]":
        """(prompt ids, prediction or None). Raises PromptTooLong, ValueError,
        PredictionFailed."""
        max_tokens = self.engine.limits.max_tokens
        room = f"which leaves no room for an answer within {max_tokens} tokens (--max_tokens)"
        count, characters = (
            len(chat_request.messages),
            sum(len(message.text) for message in chat_request.messages),
        )
        if characters > MAX_CHARACTERS_PER_TOKEN * max_tokens or count > max_tokens:
            raise PromptTooLong(
                f"the prompt has {count} messages and {characters} characters, {room}"
            )
        ids = encode_messages(
            self.tokenizer, chat_request.messages, chat_request.tools, **self.prompt_options
        )
        if len(ids) >= max_tokens:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, {room}")
        if self.predictor is None:
            return ids, None
        try:
            return ids, self.predictor.predict(prompt)[0]
        except Exception as error:  # a failing predictor is the server's error, not the request's
            log.exception("the predictor failed")
            why = type(error).__name__
            raise PredictionFailed(f"the answer's length could not be predicted: {why}") from None

    def report(self, active: ActiveRequest) -> dict:
        """Predicted and actual length of an ended answer; the `glm_foundry` field of a response."""
        request, answer = active.request, active.answer
        latency_s = self.clock.now_s() - request.arrival_s
        report_fields: dict[str, Any] = {
            "output_tokens": self.length(answer),
            "finished": answer.reason == "stop",
            "slo_s": request.slo_s,
            "latency_s": round(latency_s, 4),
            "in_time": latency_s <= request.slo_s,
        }
        if (adapter := answer.sampling.adapter) is not None:
            report_fields["adapter"] = adapter
        if active.unknown_fields:
            report_fields["ignored"] = active.unknown_fields
        if (prediction := request.prediction) is not None:
            predicted = {
                "expected": prediction.expected_tokens,
                "median": prediction.median_tokens,
                "q90": prediction.quantile(0.9),
            }
            report_fields["predicted_tokens"] = {name: round(n, 1) for name, n in predicted.items()}
        return report_fields

    @staticmethod
    def length(answer: Answer) -> int:
        """Tokens without the end token."""
        return len(answer.tokens) - (answer.reason == "stop")
