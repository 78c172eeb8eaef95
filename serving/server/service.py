"""Between a server's handlers and its engine.

One thread runs the scheduler; handlers ask and listen. Free of torch and of HTTP.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.engines import Answer, Inbox, Sampling, TextEngine, WallClock
from serving.request import Event, Policy, Request
from serving.scheduler import run_scheduler
from serving.server.chat import ChatRequest, encode_messages, prompt_of
from serving.server.monitor import Monitor

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.prediction import LengthPrediction
    from predictor.runtime import LengthPredictor

log = logging.getLogger(__name__)

CHARACTERS = 100  # a token; a prompt of more than that is too long without being tokenized
OBEYED = (  # as Sampling has them
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class TooLong(ValueError):
    """A prompt that leaves no room for an answer."""


class Busy(RuntimeError):
    """As many requests are under way and wait as may."""


class Unpredicted(RuntimeError):
    """The predictor failed on this prompt."""


class Closed(RuntimeError):
    """No new requests: the server is shutting down, or its engine has failed."""


@dataclass(frozen=True)
class Exchange:
    """One request under way.

    Attributes:
        tokens: yields each token as it comes, and None when there is no more.
        ignored: names of its unknown fields.
    """

    request: Request
    answer: Answer
    tokens: asyncio.Queue
    ignored: tuple[str, ...] = ()


class Service:
    """A model, its predictor, a policy, and the thread in which they work.

    Attributes:
        name: of the served model. slo_s: of requests that do not say.
        defaults: temperature and top_p of requests that do not say.
        as_tuned: options of the family's encode_chat.
        max_queue: requests that may wait beside the max_batch that run.
        draining: no new requests are taken. failure: why the engine has ended, or None.
        on_failure: called in the engine's thread, once the engine has failed and all have heard of
            it.
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
        as_tuned: dict,
        max_queue: int = 256,
    ) -> None:
        self.engine, self.tokenizer, self.policy, self.predictor, self.monitor = (
            engine,
            tokenizer,
            policy,
            predictor,
            monitor,
        )
        self.name, self.slo_s, self.defaults, self.as_tuned = name, slo_s, defaults, as_tuned
        self.max_queue = max_queue
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
        """End the engine's thread; no more events of what is under way are read."""
        self.draining = True
        self.inbox.shut()
        self.cancel_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():  # it may yet write to the log, which the process's end closes
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
        except BaseException as error:  # out of memory, a bug: every client must get an answer
            log.exception("the engine has failed")
            what = " ".join(str(error).split())[:200]
            self.failure = f"the engine has failed: {type(error).__name__}: {what}"
            # First: later requests are refused there, and the engine knows all earlier ones.
            self.inbox.shut()
            self.engine.end_all("failed")
            if self.on_failure is not None:
                self.on_failure()

    def _observe(self, event: Event):
        try:
            self.monitor(event)
        except Exception:  # figures and logs must not end the answers
            log.exception("request %s: the monitor failed at %r", event.id, event.kind)

    def check_open(self) -> None:
        """Raises Closed."""
        if self.failure or self.draining:
            raise Closed(self.failure or "the server is shutting down")

    async def ask(self, asked: ChatRequest) -> Exchange:
        """Tokenize, predict, and hand over to the engine.

        Raises:
            ValueError: messages that the family has no form for.
            TooLong: they leave no room for an answer.
            Closed, Busy, Unpredicted: none is made.
        """
        self.check_open()
        limits = self.engine.limits
        if self.engine.count() + self._preparing >= limits.max_batch + self.max_queue:
            raise Busy(f"{self.max_queue} requests wait already (--max_queue); try again later")
        arrival_s = self.clock.now_s()
        prompt = prompt_of(asked.messages)
        self._preparing += 1
        try:
            ids, prediction = await asyncio.to_thread(self._prepare, asked, prompt)
        finally:
            self._preparing -= 1
        self.check_open()
        slo_s = self.slo_s if asked.slo_s is None else asked.slo_s
        request = Request(
            next(self._ids),
            len(ids),
            arrival_s,
            slo_s,
            prediction,
            predict_s=self.clock.now_s() - arrival_s,
        )
        sampling = self.sampling_of(asked, len(ids))
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()

        def listener(answer: Answer, token: int | None):
            if token is not None:
                loop.call_soon_threadsafe(tokens.put_nowait, token)
            if answer.reason is not None:
                loop.call_soon_threadsafe(tokens.put_nowait, None)

        answer = self.engine.submit(request, ids, sampling, listener)
        self.monitor.watch(request, prompt, answer)
        try:
            self.inbox.put(request)
        except RuntimeError as error:  # it was shut in between
            self.engine.forget(request.id)
            self.monitor.forget(request.id)
            raise Closed(str(self.failure or error)) from None
        return Exchange(request, answer, tokens, asked.ignored)

    def cancel(self, exchange: Exchange) -> None:
        """Cancel an answer; nothing happens where it has ended."""
        if exchange.answer.reason is None:
            self.engine.cancel(exchange.request.id)
            self.inbox.withdraw(exchange.request.id)

    def sampling_of(self, asked: ChatRequest, prompt_tokens: int) -> Sampling:
        """Raises TooLong where max_length leaves no room for an answer."""
        most = [asked.max_tokens] if asked.max_tokens is not None else []
        if asked.max_length is not None:
            if asked.max_length <= prompt_tokens:
                counts = f"counts the prompt too, which has {prompt_tokens} tokens"
                raise TooLong(f"max_length ({asked.max_length}) {counts}; say max_tokens")
            most.append(asked.max_length - prompt_tokens)
        options = dict(self.defaults)
        for name in OBEYED:
            if (value := getattr(asked, name)) is not None:
                options[name] = value
        if asked.do_sample is False:
            options["temperature"] = 0.0
        top_k = max(asked.top_k or 0, 0)
        most_tokens = min(most, default=None)
        return Sampling(max_new_tokens=most_tokens, seed=asked.seed, top_k=top_k, **options)

    def _prepare(
        self, asked: ChatRequest, prompt: str
    ) -> "tuple[list[int], LengthPrediction | None]":
        """(prompt ids, prediction or None). Raises TooLong, ValueError, Unpredicted."""
        most = self.engine.limits.max_tokens
        room = f"which leaves no room for an answer within {most} tokens (--max_tokens)"
        count, characters = len(asked.messages), sum(len(text) for _, text in asked.messages)
        if characters > CHARACTERS * most or count > most:
            raise TooLong(f"the prompt has {count} messages and {characters} characters, {room}")
        ids = encode_messages(self.tokenizer, asked.messages, **self.as_tuned)
        if len(ids) >= most:
            raise TooLong(f"the prompt has {len(ids)} tokens, {room}")
        if self.predictor is None:
            return ids, None
        try:
            return ids, self.predictor.predict(prompt)[0]
        except Exception as error:  # whatever a predictor raises is no fault of the request
            log.exception("the predictor failed")
            why = type(error).__name__
            raise Unpredicted(f"the answer's length could not be predicted: {why}") from None

    def report(self, exchange: Exchange) -> dict:
        """Predicted and actual length of an ended answer; the `glm_foundry` field of a response."""
        request, answer = exchange.request, exchange.answer
        latency_s = self.clock.now_s() - request.arrival_s
        found: dict[str, Any] = {
            "output_tokens": self.length(answer),
            "finished": answer.reason == "stop",
            "slo_s": request.slo_s,
            "latency_s": round(latency_s, 4),
            "in_time": latency_s <= request.slo_s,
        }
        if exchange.ignored:
            found["ignored"] = exchange.ignored
        if (prediction := request.prediction) is not None:
            predicted = {
                "expected": prediction.expected_tokens,
                "median": prediction.median_tokens,
                "q90": prediction.quantile(0.9),
            }
            found["predicted_tokens"] = {name: round(n, 1) for name, n in predicted.items()}
        return found

    @staticmethod
    def length(answer: Answer) -> int:
        """Tokens without the end token."""
        return len(answer.tokens) - (answer.reason == "stop")
