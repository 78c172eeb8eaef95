"""A model in this process that answers chats: prompts, sampling and texts are the server's.

Free of torch at import, and of HTTP.
"""

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.endpoints.replies import (
    CHAT_PATH,
    AnswerRefused,
    ChatReply,
    EndpointDown,
    NumberedRequest,
    completion_body,
    usage_of,
)
from serving.engines import Answer
from serving.engines.runner import AnswerBackend
from serving.request import Event, Request
from serving.server.chat import ChatRequest, parse_body, prompt_of
from serving.server.fields import CHAT_TABLE
from serving.server.generation import (
    PromptIds,
    banned_sequences,
    reported_prediction,
    request_sampling,
)
from serving.server.grammars import GrammarCompiler
from serving.server.tools import CallWatch, check_tools, parsed_answer

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.prediction import LengthPrediction
    from predictor.runtime import LengthPredictor

FINISHES = {"stop": "stop", "length": "length", "cut": "length", "cancelled": "cancelled"}
WINDOW = 4096  # answers that the scheduler chooses among at once
CHUNK = 64  # prompts whose lengths are predicted together
STOPPED = -1  # put among tokens: whoever reads the answer wants no more
TokenSink = Callable[[int | None], None]


class LocalAnswer:
    """One answer of a LocalModel.

    Text that may turn out to be a call of a tool is held back.

    Attributes:
        ended: its end, a stop string or a stop token has come.
    """

    def __init__(self, model: "LocalModel", asked: ChatRequest, request: Request) -> None:
        self.model, self.asked, self.request = model, asked, request
        self.answer: Answer | None = None  # once it is submitted
        self.tokens: SimpleQueue[int | None] = SimpleQueue()
        self.ids: list[int] = []
        self.ended = self.stopped = False
        self._text = self._held = ""
        self._calls: list[dict[str, Any]] = []
        self._watch = CallWatch(model.tokenizer) if asked.shown_tools else None
        self._started_s = time.perf_counter()
        self._seconds = 0.0

    def begin(self, prompt: PromptIds, answer: Answer) -> None:
        """Take what the engine makes. Tokens may come before."""
        self._stream = self.asked.text_stream(self.model.tokenizer, prompt.ids)
        self.answer = answer

    def __iter__(self) -> Iterator[str]:
        try:
            while not self.ended:
                if piece := self.add(self.tokens.get()):
                    yield piece
        finally:
            self.cancel()
        self.check()

    def add(self, token: int | None) -> str:
        """The new text since this token; None for the answer's end."""
        if self.ended:
            return ""
        new = ""
        if token is not None and token != STOPPED:
            if token in self.model.backend.stop_ids and not self._is_stop_token(token):
                return ""  # the engine's end follows
            if not self._is_stop_token(token):
                self.ids.append(token)
                new = self._stream.add(token)
                if not self._stream.stopped:
                    return self._released(new)
        self.ended = True
        self.stopped = token == STOPPED
        if not (self.stopped or self._stream.stopped):
            new += self._stream.end()
        new = self._last_piece(new)
        self._seconds = time.perf_counter() - self._started_s
        self.cancel()
        return new

    def _released(self, new: str) -> str:
        """What of the text so far is surely no call of a tool."""
        self._held += new
        if not new or (self._watch is not None and self._watch.may_be_call(self.ids)):
            return ""
        piece, self._held = self._held, ""
        self._text += piece
        return piece

    def _last_piece(self, new: str) -> str:
        """The text that is left at the end; calls of tools are read."""
        piece = "" if self.stopped else self._held + new
        if self.asked.shown_tools and self._finish() == "stop" and not self._stream.stopped:
            tools = self.asked.shown_tools
            beside, calls = parsed_answer(self.model.tokenizer, self.ids, tools)
            if calls:
                self._calls = calls if self.asked.parallel_tool_calls else calls[:1]
                piece = "" if self._text else beside
        self._text += piece
        return piece

    def _finish(self) -> str:
        """OpenAI's finish_reason, but for calls of tools."""
        assert self.answer is not None
        finish = FINISHES.get(self.answer.reason or "stop", "stop")
        if self.stopped:
            return "cancelled"
        return "stop" if finish == "cancelled" else finish  # by a stop string or a stop token

    def _is_stop_token(self, token: int) -> bool:
        return token in self.asked.stop_token_ids

    def stop(self) -> None:
        self.tokens.put(STOPPED)

    def cancel(self) -> None:
        """Let the engine end it, if it has not."""
        if self.answer is not None and self.answer.reason is None:
            self.model.backend.cancel(self.request.id)

    def check(self) -> None:
        """Raises AnswerRefused, EndpointDown where it failed or was cancelled from elsewhere."""
        assert self.answer is not None
        reason = self.answer.reason
        if self.model.backend.failure:
            raise EndpointDown(self.model.backend.failure)
        if reason == "refused":
            raise AnswerRefused(self.answer.refusal or "the answer was refused")
        if reason == "failed":
            why = "the model's output was not finite, or could not be sampled"
            raise AnswerRefused(why, 500, "failed")

    def reply(self) -> ChatReply:
        assert self.answer is not None
        message: dict[str, Any] = {"role": "assistant", "content": self._text}
        finish = self._finish()
        if self._calls:
            message |= {"content": self._text or None, "tool_calls": self._calls}
            finish = "tool_calls"
        body = completion_body(
            self.asked.model or self.model.name,
            message,
            finish,
            usage_of(self.request.prompt_tokens, len(self.ids)),
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            glm_foundry=self._report(),
        )
        return ChatReply(body, self._seconds)

    def _report(self) -> dict[str, Any]:
        """The fields of the server's `glm_foundry` that are known here."""
        assert self.answer is not None
        known: dict[str, Any] = {
            "output_tokens": len(self.ids),
            "finished": self.answer.reason == "stop",
            "latency_s": round(self._seconds, 4),
        }
        if (adapter := self.answer.sampling.adapter) is not None:
            known["adapter"] = adapter
        if (prediction := self.request.prediction) is not None:
            known["predicted_tokens"] = reported_prediction(prediction)
        return known


class PreparedChat(NamedTuple):
    """A request that is checked and encoded."""

    asked: ChatRequest
    prompt: PromptIds


class LocalModel:
    """An Endpoint of an AnswerBackend in this process.

    Args:
        predictor: of the answers' lengths; None for policies that use none.
        defaults: temperature and top_p of requests without them.
        prompt_options: options of the family's encode_chat.
        slo_s: of requests without one.
    """

    def __init__(
        self,
        backend: AnswerBackend,
        tokenizer: "FamilyTokenizer",
        predictor: "LengthPredictor | None" = None,
        *,
        name: str,
        defaults: Mapping[str, float],
        prompt_options: Mapping[str, Any] | None = None,
        slo_s: float = 30.0,
    ) -> None:
        self.backend, self.tokenizer, self.predictor = backend, tokenizer, predictor
        self.name, self.defaults, self.slo_s = name, defaults, slo_s
        self.prompt_options = dict(prompt_options or {})
        self._adapters: list[str] = []
        self._ids = itertools.count()
        self._grammars = GrammarCompiler(tokenizer, lambda: sorted(backend.stop_ids))
        backend.start(ignore_event, lambda: None)

    def models(self) -> list[str]:
        return [self.name, *self._adapters]

    def load_adapter(self, name: str, folder: str) -> None:
        if self.backend.adapters is None:
            raise ValueError("this engine takes no adapters")
        if name in self.models():
            raise ValueError(f"{name!r} is a loaded model's name already")
        self.backend.adapters.load(name, folder)
        self._adapters.append(name)

    def check_setting(self, name: str, value: Any) -> None:
        if name not in CHAT_TABLE.fields:
            raise ValueError(f"no setting {name!r}; there are {', '.join(CHAT_TABLE.fields)}")
        CHAT_TABLE.fields[name].read(name, value)

    def check_tools(self) -> None:
        check_tools(self.tokenizer)

    def ask(self, body: Mapping[str, Any]) -> LocalAnswer:
        prepared = self.prepare(body)
        [prediction] = self._predictions([prepared])
        return self._submit(prepared, prediction)

    def replies(
        self, requests: Iterable[NumberedRequest]
    ) -> Iterator[tuple[int, ChatReply | AnswerRefused]]:
        left = iter(requests)
        news: SimpleQueue[tuple[int, int | None]] = SimpleQueue()
        running: dict[int, LocalAnswer] = {}
        exhausted = False
        try:
            while running or not exhausted:
                if not exhausted and len(running) < WINDOW:
                    chunk = list(itertools.islice(left, CHUNK))
                    exhausted = not chunk
                    yield from self._begin_all(chunk, running, news)
                is_full = exhausted or len(running) >= WINDOW
                for _ in range(max(news.qsize(), int(is_full and bool(running)))):
                    number, token = news.get()
                    if (answer := running.get(number)) is None:
                        continue
                    answer.add(token)
                    if answer.ended:
                        del running[number]
                        yield number, outcome(answer)
        finally:
            for answer in running.values():
                answer.cancel()

    def _begin_all(
        self,
        chunk: list[NumberedRequest],
        running: dict[int, LocalAnswer],
        news: "SimpleQueue[tuple[int, int | None]]",
    ) -> Iterator[tuple[int, AnswerRefused]]:
        """Submit the requests of a chunk; yields those that are refused."""
        prepared: list[tuple[int, PreparedChat]] = []
        for number, body, path in chunk:
            try:
                if path != CHAT_PATH:
                    known = f"/v1{CHAT_PATH} alone; others need a server"
                    raise AnswerRefused(f"a model in this process answers {known}", 404)
                prepared.append((number, self.prepare(body)))
            except AnswerRefused as refusal:
                yield number, refusal
        predictions = self._predictions([entry for _, entry in prepared])
        for (number, entry), prediction in zip(prepared, predictions):
            try:
                running[number] = self._submit(entry, prediction, relay(news, number))
            except AnswerRefused as refusal:
                yield number, refusal

    def prepare(self, body: Mapping[str, Any]) -> PreparedChat:
        """A body's request and prompt. Raises AnswerRefused."""
        try:
            asked = parse_body(dict(body))
            if asked.n > 1:
                raise ValueError(f"n must be 1 here, got {asked.n}")
            if asked.unknown_fields:
                raise ValueError(f"unknown field {asked.unknown_fields[0]!r}")
            if asked.model is not None and asked.model not in self.models():
                known = ", ".join(self.models())
                raise ValueError(f"no model {asked.model[:64]!r}; there are {known}")
            [prompt] = asked.encoded(self.tokenizer, self.prompt_options)
        except ValueError as error:
            raise AnswerRefused(str(error)) from None
        most = self.backend.limits.max_tokens
        if len(prompt.ids) >= most:
            raise AnswerRefused(
                f"the prompt has {len(prompt.ids)} tokens, which leaves no room for an answer "
                f"within {most} tokens (--max_tokens)",
                code="context_length_exceeded",
            )
        return PreparedChat(asked, prompt)

    def _predictions(self, prepared: list[PreparedChat]) -> "list[LengthPrediction | None]":
        if self.predictor is None or not prepared:
            return [None] * len(prepared)
        return [*self.predictor.predict([prompt_of(entry.asked.messages) for entry in prepared])]

    def _submit(
        self,
        prepared: PreparedChat,
        prediction: "LengthPrediction | None",
        sink: TokenSink | None = None,
    ) -> LocalAnswer:
        """Give a request to the engine.

        Args:
            sink: takes its tokens in the engine's thread, then None; by default the answer's
                queue does.
        Raises:
            AnswerRefused, EndpointDown.
        """
        asked, prompt = prepared
        slo_s = self.slo_s if asked.slo_s is None else asked.slo_s
        now_s = self.backend.clock.now_s()
        request = Request(
            next(self._ids), len(prompt.ids), now_s, slo_s, prediction, priority=asked.priority
        )
        begun = LocalAnswer(self, asked, request)
        take = sink or begun.tokens.put

        def listener(answer: Answer, token: int | None) -> None:
            if token is not None:
                take(token)
            if answer.reason is not None:
                take(None)

        try:
            sampling = request_sampling(asked, len(prompt.ids), self.defaults)
            if asked.bad_words:
                banned = banned_sequences(self.tokenizer, asked.bad_words)
                sampling = replace(sampling, bad_words=banned)
            if asked.has_grammar:
                grammar = self._grammars.compile(asked.grammar_source(self.tokenizer))
                sampling = replace(sampling, grammar=grammar)
            if asked.model not in (None, self.name):
                sampling = replace(sampling, adapter=asked.model)
            begun.begin(prompt, self.backend.submit(request, prompt.ids, sampling, listener))
        except ValueError as error:
            raise AnswerRefused(str(error)) from None
        try:
            self.backend.enqueue(request)
        except RuntimeError as error:
            raise EndpointDown(str(self.backend.failure or error)) from None
        return begun

    def close(self) -> None:
        self.backend.stop(10.0)


def ignore_event(event: Event) -> None:
    """Nothing is kept of the scheduler's events."""


def relay(news: "SimpleQueue[tuple[int, int | None]]", number: int) -> TokenSink:
    """Puts the tokens of an answer into a queue of many."""
    return lambda token: news.put((number, token))


def outcome(answer: LocalAnswer) -> ChatReply | AnswerRefused:
    """What came of an ended answer. Raises EndpointDown."""
    try:
        answer.check()
    except AnswerRefused as refusal:
        return refusal
    return answer.reply()
