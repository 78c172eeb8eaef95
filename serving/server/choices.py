"""The answers to one client's request as they come: their text, their ends, what is reported.

The endpoints make OpenAI's objects of them. Free of torch.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import Request as Http
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.engines.answers import TokenLogprobs
from serving.server.access import ApiError
from serving.server.generation import GenerationRequest
from serving.server.service import ActiveRequest, AnswerGroup, Service
from serving.server.tools import CallWatch, parsed_answer

CLOSING = "the server is shutting down"
Result = TypeVar("Result")
FINISH = {"stop": "stop", "length": "length", "cut": "length"}


class Choice:
    """One answer, in the words of OpenAI's API.

    Attributes:
        place: its place in the response.
        ids: of the answer, without what ended it.
        ended: no more comes: its end, a stop string or a stop token.
    """

    def __init__(
        self, service: Service, asked: GenerationRequest, active: ActiveRequest, place: int
    ) -> None:
        self.service, self.asked, self.active, self.place = service, asked, active, place
        self.stream = asked.text_stream(service.tokenizer, active.answer.prompt)
        self.ids: list[int] = []
        self.ended = self.token_stopped = False
        self._watch = CallWatch(service.tokenizer)
        self._reported = 0  # how many of ids the log probabilities have been given of

    @property
    def stopped(self) -> bool:
        """The client's stop string or stop token has come."""
        return self.stream.stopped or self.token_stopped

    def add(self, token: int | None) -> str:
        """The new text since this token; None for the answer's end."""
        new = ""
        if token is not None:
            self.token_stopped = token in self.asked.stop_token_ids
            if not self.token_stopped:
                if token in self.service.backend.stop_ids:
                    return ""
                self.ids.append(token)
                new = self.stream.add(token)
                if not self.stream.stopped:
                    return new
        self.ended = True
        is_complete = self.token_stopped or self.active.answer.reason in FINISH
        if is_complete and not self.stream.stopped:
            new += self.stream.end()
        if self.stopped:
            self.service.monitor.stopped(self.active.answer.id)
        return new

    def check_ended(self) -> None:
        """Raises ApiError where the answer failed or was cancelled."""
        reason = self.active.answer.reason
        if not self.stopped and reason not in FINISH:
            if reason == "failed":
                why = "the model's output was not finite, or could not be sampled"
                if self.asked.has_grammar:
                    why += ", or its grammar became too complex"
                raise ApiError(500, self.service.failure or why, "failed")
            if self.active.answer.refusal is not None:
                raise ApiError(400, self.active.answer.refusal)
            if self.service.draining:
                raise ApiError(503, f"{CLOSING}; the answer was {reason}", "unavailable")
            raise ApiError(500, f"the answer was {reason}", reason)

    def finish_reason(self) -> str:
        """OpenAI's; of an answer that `check_ended` has passed."""
        reason = self.active.answer.reason
        return "stop" if self.stopped or reason is None else FINISH[reason]

    def tool_calls(self) -> tuple[str, list[dict[str, Any]]]:
        """(text beside them, OpenAI's tool_calls) of an ended answer."""
        if not self.asked.shown_tools or self.stopped:
            return "", []
        text, calls = parsed_answer(self.service.tokenizer, self.ids, self.asked.shown_tools)
        return text, calls if self.asked.parallel_tool_calls else calls[:1]

    def may_be_call(self) -> bool:
        """Whether what is being written is a call of a tool, or its first line has not ended."""
        return bool(self.asked.shown_tools) and self._watch.may_be_call(self.ids)

    def next_logprobs(self, with_end: bool = False) -> list[tuple[int, TokenLogprobs]]:
        """(token, its log probabilities) of the tokens that have not been given yet.

        Args:
            with_end: the end token counts as one.
        """
        answer = self.active.answer
        ids = self.ids
        if with_end and self.ended and answer.reason == "stop" and not self.stopped:
            ids = answer.tokens
        start, self._reported = self._reported, len(ids)
        return list(zip(ids[start:], answer.logprobs[start:]))


class Choices:
    """The answers of one request, read until they have ended or their client has disconnected.

    Attributes:
        disconnected: nobody reads the response.
    """

    def __init__(
        self, service: Service, asked: GenerationRequest, group: AnswerGroup, http: Http
    ) -> None:
        self.service, self.asked, self.group, self.http = service, asked, group, http
        self.all: list[Choice] = []
        for place, active in enumerate(group.answers):
            self.all.append(Choice(service, asked, active, place))
        self.disconnected = False

    async def _watch(self) -> None:
        await until_disconnected(self.http)
        self.disconnected = True
        self.group.tokens.put_nowait((0, None))

    async def pieces(self) -> AsyncGenerator[tuple[Choice, str], None]:
        """(answer, its new text) as it comes; each answer's last has `ended` set.

        What has not ended is cancelled when the client disconnects or nobody reads on.
        """
        watcher = asyncio.create_task(self._watch())
        left = len(self.all)
        try:
            while left:
                place, token = await self.group.tokens.get()
                choice = self.all[place]
                if self.disconnected:
                    return
                if choice.ended:
                    continue
                new = choice.add(token)
                if choice.ended:
                    left -= 1
                    self.service.cancel(choice.active)
                if new or choice.ended:
                    yield choice, new
        finally:
            watcher.cancel()
            self.release()

    async def texts(self) -> list[str]:
        """The whole texts of the answers.

        Raises:
            ClientDisconnect: the client has disconnected.
            ApiError: an answer failed or was cancelled.
        """
        texts = [""] * len(self.all)
        async for choice, new in self.pieces():
            texts[choice.place] += new
        if self.disconnected:
            raise ClientDisconnect
        for choice in self.all:
            choice.check_ended()
        return texts

    def release(self) -> None:
        """Cancel what has not ended."""
        self.service.release(self.group)

    def report(self) -> dict[str, Any]:
        """The `glm_foundry` field of a response."""
        return self.service.report(self.group)

    def usage(self) -> dict[str, int]:
        """OpenAI's: a prompt counts once, whatever its answers."""
        prompt_tokens = completion_tokens = 0
        for choice in self.all:
            if choice.place % self.asked.n == 0:
                prompt_tokens += choice.active.request.prompt_tokens
            completion_tokens += self.service.length(choice.active.answer)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


async def until_disconnected(http: Http) -> None:
    """Return when the client has disconnected; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(http: Http, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; where the client leaves, it is cancelled.

    Raises:
        ClientDisconnect: the client has left.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(until_disconnected(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


class Streamed(Protocol):
    """The response of an endpoint that can stream."""

    choices: Choices

    def events(self) -> AsyncIterator[str]:
        """Server-sent events."""


class EventStream(StreamingResponse):
    """A response's events.

    When the stream ends, even before its first event, so do the answers.
    """

    def __init__(self, response: Streamed) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(response.events(), media_type="text/event-stream", headers=headers)
        self.choices = response.choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.choices.release()


def response_head(kind: str, service: Service, model: str | None) -> dict[str, Any]:
    """id, created and model of a response.

    Args:
        kind: what its id begins with.
        model: that of the request: the served model, an adapter, or None.
    """
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model or service.name,
    }


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=True)}\n\n"


DONE = "data: [DONE]\n\n"
