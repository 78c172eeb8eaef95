"""Between a server's handlers and its engine: one thread runs the scheduler, handlers ask and listen. Free of torch and of HTTP."""

import asyncio
import itertools
import logging
import threading
import time
from dataclasses import dataclass

from serving.chat import ChatRequest, encode_messages, prompt_of
from serving.engines import Answer, Inbox, Sampling, WallClock
from serving.monitor import Monitor
from serving.request import Policy, Request
from serving.scheduler import run

log = logging.getLogger(__name__)


class TooLong(ValueError):
    """A prompt that leaves no room for an answer."""


class Closed(RuntimeError):
    """No new requests: the server is shutting down, or its engine has failed."""


@dataclass(frozen=True)
class Exchange:
    """One request under way; `tokens` yields each token as it comes, and None when there is no more."""

    request: Request
    answer: Answer
    tokens: asyncio.Queue


class Service:
    """A model, its predictor, a policy, and the thread in which they work.

    Attributes:
        name: of the served model. slo_s: of requests that do not say.
        defaults: temperature and top_p of requests that do not say.
        as_tuned: options of the family's encode_chat.
        draining: no new requests are taken. failure: why the engine has ended, or None.
    """

    def __init__(
        self, engine, tokenizer, policy: Policy, predictor, monitor: Monitor, *, name: str, slo_s: float, defaults: dict, as_tuned: dict
    ):  # fmt: skip
        self.engine, self.tokenizer, self.policy, self.predictor, self.monitor = engine, tokenizer, policy, predictor, monitor
        self.name, self.slo_s, self.defaults, self.as_tuned = name, slo_s, defaults, as_tuned
        self.draining, self.failure = False, None
        self.started = int(time.time())
        self.clock = WallClock()
        self.inbox = Inbox(self.clock, engine)
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self):
        self._thread.start()

    def stop(self, timeout_s: float = 10.0):
        """End the engine's thread; nobody listens any more to what is under way."""
        self.draining = True
        self.inbox.shut()
        self.engine.cancel_all()
        self._thread.join(timeout_s)
        self.monitor.close()

    def _serve(self):
        try:
            for event in run(self.policy, self.engine, self.clock, self.inbox, self.monitor):
                if event.kind == "refused":
                    self.engine.forget(event.id)
        except Exception as error:  # out of memory, a bug: nobody may wait for ever
            log.exception("the engine has failed")
            self.failure = f"the engine has failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.inbox.shut()  # first: whoever comes later is refused by it, all others the engine knows
            self.engine.end_all("failed")

    def check_open(self):
        """Raises Closed."""
        if self.failure or self.draining:
            raise Closed(self.failure or "the server is shutting down")

    async def ask(self, asked: ChatRequest) -> Exchange:
        """Tokenize, predict, and hand over to the engine.

        Raises:
            ValueError: messages that the family has no form for. TooLong: they leave no room for an answer. Closed.
        """
        self.check_open()
        arrival_s = self.clock.now_s()
        prompt = prompt_of(asked.messages)
        ids, prediction = await asyncio.to_thread(self._prepare, asked, prompt)
        self.check_open()
        slo_s = self.slo_s if asked.slo_s is None else asked.slo_s
        request = Request(next(self._ids), len(ids), arrival_s, slo_s, prediction, predict_s=self.clock.now_s() - arrival_s)
        limits = self.engine.limits
        if limits.refusal(request):
            raise TooLong(f"the prompt has {len(ids)} tokens, which leaves no room for an answer within {limits.max_tokens} tokens (--max_tokens)")
        given = {name: getattr(asked, name) for name in ("temperature", "top_p") if getattr(asked, name) is not None}
        sampling = Sampling(max_new_tokens=asked.max_tokens, seed=asked.seed, **self.defaults | given)
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue()

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
        return Exchange(request, answer, tokens)

    def cancel(self, exchange: Exchange):
        """Nobody listens any more; nothing, where the answer has ended."""
        self.engine.cancel(exchange.request.id)

    def _prepare(self, asked: ChatRequest, prompt: str):
        ids = encode_messages(self.tokenizer, asked.messages, **self.as_tuned)
        return ids, None if self.predictor is None else self.predictor.predict(prompt)[0]

    def report(self, exchange: Exchange) -> dict:
        """Predicted and actual length of an ended answer; the `glm_foundry` field of a response."""
        request, answer = exchange.request, exchange.answer
        latency_s = self.clock.now_s() - request.arrival_s
        found = {
            "output_tokens": self.length(answer), "finished": answer.reason == "stop",
            "slo_s": request.slo_s, "latency_s": round(latency_s, 4), "in_time": latency_s <= request.slo_s,
        }  # fmt: skip
        if (prediction := request.prediction) is not None:
            said = {"expected": prediction.expected_tokens, "median": prediction.median_tokens, "q90": prediction.quantile(0.9)}
            found["predicted_tokens"] = {name: round(tokens, 1) for name, tokens in said.items()}
        return found

    @staticmethod
    def length(answer: Answer) -> int:
        """Tokens without the end token."""
        return len(answer.tokens) - (answer.reason == "stop")
