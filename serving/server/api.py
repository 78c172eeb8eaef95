"""The HTTP API of a Service: OpenAI's chat completions and models, health, metrics.

Errors are OpenAI's error objects. serving.server.access checks host and key,
serving.server.fields the fields of a request; serving.server.openapi describes both in
/openapi.json.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.engines.adapter_errors import UnknownAdapter
from serving.server.access import AccessControl, AccessLog, AccessRules, ApiError
from serving.server.adapters import add_adapter_routes
from serving.server.chat import ChatRequest, TextStream, parse_body
from serving.server.openapi import openapi_document
from serving.server.service import (
    ActiveRequest,
    PredictionFailed,
    PromptTooLong,
    QueueFull,
    Service,
    ServiceClosed,
)
from serving.server.tools import begins_as_call, parsed_answer

BODY_BYTES = 2 * 2**20
CLIENT_S = 30.0  # for a whole body
RETRY_S = 2  # Retry-After of a busy server
CLOSING = "the server is shutting down"
CLIENT_CLOSED_REQUEST = 499  # for the access log: the client has disconnected
FINISH = {"stop": "stop", "length": "length", "cut": "length"}


def make_app(
    service: Service,
    access_rules: AccessRules | None = None,
    cors_origins: Sequence[str] = (),
    access_log: bool = False,
    client_s: float = CLIENT_S,
) -> FastAPI:
    """The application.

    Its state.closing is an asyncio.Event that ends the wait for bodies that are still being sent.

    Args:
        access_rules: the hosts and the key that requests must carry; None accepts all requests.
        cors_origins: origins of web pages that may send requests; "*" for all.
        access_log: log a line for each request.
        client_s: within which a client must have sent its body.
    """
    app = FastAPI(title="GLM Foundry", docs_url=None, redoc_url=None, redirect_slashes=False)
    schema = partial(
        openapi_document, service.name, needs_key=bool(access_rules and access_rules.api_key)
    )
    app.openapi = schema  # type: ignore[method-assign]  # FastAPI's documented way
    app.state.closing = asyncio.Event()
    if access_rules is not None:
        app.add_middleware(AccessControl, rules=access_rules)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
        )
    if access_log:
        app.add_middleware(AccessLog)
    get = partial(app.api_route, methods=["GET", "HEAD"])

    async def checked_body(http: Http) -> Any:
        try:
            service.check_open()
        except ServiceClosed as error:
            raise ApiError(503, str(error), "unavailable") from None
        check_json(http)
        return await read_json_body(http, app.state.closing, client_s)

    add_adapter_routes(app, service.adapters, checked_body)

    @app.exception_handler(ApiError)
    async def api_error(http: Http, error: ApiError):
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(http: Http, error: HTTPException):
        wrapped = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
        return JSONResponse(wrapped.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def internal_error(http: Http, error: Exception):
        return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").body(), 500)

    @get("/health")
    async def health():
        state = service.failure or ("draining" if service.draining else "ok")
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @get("/v1/models")
    async def models():
        return {"object": "list", "data": [model_card(service), *service.adapters.cards()]}

    @get("/v1/models/{name:path}")
    async def model(name: str):
        check_model(service, name)
        return service.adapters.card(name) or model_card(service)

    @get("/metrics")
    async def metrics():
        if service.monitor.registry is None:
            raise ApiError(501, "metrics need the package prometheus-client")
        return Response(
            service.monitor.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Http):
        try:
            check_json(http)
            chat_request = parse_body(await read_json_body(http, app.state.closing, client_s))
            check_model(service, chat_request.model)
            active = await service.ask(chat_request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except ServiceClosed as error:
            raise ApiError(503, str(error), "unavailable") from None
        except QueueFull as error:
            raise ApiError(429, str(error), "busy", {"Retry-After": str(RETRY_S)}) from None
        except PredictionFailed as error:
            raise ApiError(500, str(error), "failed") from None
        except UnknownAdapter as error:  # unloaded since
            raise ApiError(404, str(error), "model_not_found") from None
        except PromptTooLong as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        response = ChatResponse(service, chat_request, active, http)
        if chat_request.stream:
            return EventStream(response)
        return await response.complete()

    return app


def model_card(service: Service) -> dict:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "glm-foundry",
        "root": service.name,
        "parent": None,
    }


def check_model(service: Service, name: str | None) -> None:
    if name not in (None, service.name) and name not in service.adapters:
        served = ", ".join(map(repr, [service.name, *service.adapters.names()[:8]]))
        raise ApiError(404, f"there is no model {name!r} here, only {served}", "model_not_found")


def check_json(http: Http) -> None:
    """Raises ApiError where the body is not declared as JSON.

    A web page of another origin can send other content types without a CORS preflight.
    """
    declared = http.headers.get("content-type", "")
    if declared.split(";")[0].strip().lower() != "application/json":
        wanted = "wanted the header Content-Type: application/json"
        remedy = "(curl -H content-type:application/json)"
        raise ApiError(415, f"{wanted} {remedy}, got {declared[:64]!r}")


async def read_json_body(http: Http, closing: asyncio.Event, client_s: float) -> Any:
    """The body's JSON.

    Raises:
        ApiError: it is too large or too late, or `closing` came first.
        ValueError: it is no JSON.
    """
    reading, closing_wait = (
        asyncio.create_task(read_body(http)),
        asyncio.create_task(closing.wait()),
    )
    try:
        await asyncio.wait(
            {reading, closing_wait}, timeout=client_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not reading.done():
            if closing.is_set():
                raise ApiError(503, CLOSING, "unavailable", {"Connection": "close"})
            late = f"the body did not come within {client_s:g} s"
            raise ApiError(408, late, None, {"Connection": "close"})
        body = reading.result()
    finally:
        reading.cancel()
        closing_wait.cancel()
    try:
        return json.loads(body.decode(), parse_constant=not_a_number)
    except RecursionError:
        raise ValueError("the body is not valid JSON: nested too deep") from None
    except ValueError as error:
        why = getattr(error, "msg", None) or str(error)[:100]
        raise ValueError(f"the body is not valid JSON: {why}") from None


async def read_body(http: Http) -> bytearray:
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"the body is larger than {BODY_BYTES:,} bytes")
    return body


def not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class ChatResponse:
    """The response to one chat request. The answer is cancelled when its client disconnects."""

    def __init__(
        self, service: Service, chat_request: ChatRequest, active: ActiveRequest, http: Http
    ) -> None:
        self.service, self.chat_request, self.active, self.http = (
            service,
            chat_request,
            active,
            http,
        )
        self.stream = TextStream(service.tokenizer, chat_request.stop)
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat_request.model or service.name,
        }
        self.disconnected = self.token_stopped = False
        self.ids: list[int] = []  # of the answer, without what ended it
        self.decided = (-1, False)  # (number of a message, whether it is a call of a tool)
        self.reported = 0  # how many of them a stream has given the log probabilities of

    @property
    def stopped(self) -> bool:
        """The client's stop string or stop token has come."""
        return self.stream.stopped or self.token_stopped

    async def _watch(self):
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.disconnected = True
        self.active.tokens.put_nowait(None)

    async def text_pieces(self) -> AsyncGenerator[str, None]:
        """New text, piece by piece.

        Ends with the answer, at a stop string, or when the client has disconnected.
        """
        watcher = asyncio.create_task(self._watch())
        answer, stops = self.active.answer, self.service.engine.stop_ids
        try:
            while (token := await self.active.tokens.get()) is not None:
                if token in self.chat_request.stop_token_ids:
                    self.token_stopped = True
                    break
                if token in stops:
                    continue
                self.ids.append(token)
                if new := self.stream.add(token):
                    yield new
                if self.stream.stopped:
                    break
            is_complete = self.token_stopped or answer.reason in FINISH
            if is_complete and not self.stream.stopped and (new := self.stream.end()):
                yield new
            if self.stopped:
                self.service.monitor.stopped(answer.id)
        finally:
            watcher.cancel()
            self.service.cancel(self.active)

    def check_ended(self) -> None:
        """Raises ApiError where the answer failed or was cancelled."""
        reason = self.active.answer.reason
        if not self.stopped and reason not in FINISH:
            if reason == "failed":
                why = "the model's output was not finite, or could not be sampled"
                raise ApiError(500, self.service.failure or why, "failed")
            if self.service.draining:
                raise ApiError(503, f"{CLOSING}; the answer was {reason}", "unavailable")
            raise ApiError(500, f"the answer was {reason}", reason)

    def tool_calls(self) -> tuple[str, list[dict]]:
        """(text beside them, OpenAI's tool_calls) of an ended answer."""
        if not self.chat_request.tools or self.stopped:
            return "", []
        return parsed_answer(self.service.tokenizer, self.ids, self.chat_request.tools)

    def message_of(self, text: str, calls: list[dict]) -> dict:
        """OpenAI's message: text, or calls of tools."""
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if self.chat_request.gives_function_call:
            return message | {"function_call": calls[0]["function"]}
        return message | {"tool_calls": calls}

    def next_logprobs(self) -> dict | None:
        """OpenAI's logprobs of the tokens that it has not given yet."""
        if not self.chat_request.logprobs:
            return None
        start, self.reported = self.reported, len(self.ids)
        entries = []
        for place in range(start, self.reported):
            chosen, top = self.active.answer.logprobs[place]
            alternatives = [self.logprob_entry(token, value) for token, value in top]
            entry = self.logprob_entry(self.ids[place], chosen)
            entries.append(entry | {"top_logprobs": alternatives})
        return {"content": entries, "refusal": None}

    def logprob_entry(self, token: int, logprob: float) -> dict:
        """OpenAI's object of one token."""
        text = self.service.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(str(text).encode())}

    def may_be_call(self) -> bool:
        """Whether what is being written is a call of a tool, or its first line has not ended."""
        if not self.chat_request.tools:
            return False
        tokenizer = self.service.tokenizer
        message = self.ids.count(tokenizer.get_command("<|assistant|>"))
        if message != self.decided[0]:  # else its first line, which ended before, said it
            is_call = begins_as_call(tokenizer, self.ids)
            if is_call is None:
                return True
            self.decided = (message, is_call)
        return self.decided[1]

    def calls_delta(self, text: str, calls: list[dict]) -> dict:
        """A stream's delta of calls, each whole."""
        delta: dict[str, Any] = {"content": text} if text else {}
        if self.chat_request.gives_function_call:
            return delta | {"function_call": calls[0]["function"]}
        return delta | {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]}

    def calls_reason(self) -> str:
        return "function_call" if self.chat_request.gives_function_call else "tool_calls"

    def finish_reason(self) -> str:
        """OpenAI's; of an answer that `check_ended` has passed."""
        reason = self.active.answer.reason
        return "stop" if self.stopped or reason is None else FINISH[reason]

    def usage(self) -> dict:
        prompt, completion_tokens = (
            self.active.request.prompt_tokens,
            self.service.length(self.active.answer),
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt + completion_tokens,
        }

    async def complete(self) -> Response | dict:
        async with aclosing(self.text_pieces()) as texts:
            text = "".join([piece async for piece in texts])
        if self.disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        self.check_ended()
        beside, calls = self.tool_calls()
        message = {"role": "assistant", "content": text}
        choice = {
            "index": 0,
            "message": self.message_of(beside, calls) if calls else message,
            "finish_reason": self.calls_reason() if calls else self.finish_reason(),
            "logprobs": self.next_logprobs(),
        }
        report = self.service.report(self.active)
        return self.head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(),
            "glm_foundry": report,
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events.

        The role, pieces of text, the finish reason with `glm_foundry`, usage where the client asks
        for it, [DONE].
        """
        usage = {"usage": None} if self.chat_request.include_usage else {}

        def chunk(delta: dict, reason: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            has_new = len(self.ids) > self.reported
            choice["logprobs"] = self.next_logprobs() if has_new else None
            return event(
                self.head | {"object": "chat.completion.chunk", "choices": [choice]} | usage | more
            )

        held = ""  # text that may turn out to be a call of a tool
        streamed = False
        async with aclosing(self.text_pieces()) as texts:
            yield chunk({"role": "assistant", "content": ""})
            async for piece in texts:
                held += piece
                if not self.may_be_call():
                    yield chunk({"content": held})
                    held, streamed = "", True
        if self.disconnected:
            return
        try:
            self.check_ended()
        except ApiError as error:
            yield event(error.body())
            return
        beside, calls = self.tool_calls()
        if calls:
            yield chunk(self.calls_delta("" if streamed else beside, calls))
        elif held:
            yield chunk({"content": held})
        reason = self.calls_reason() if calls else self.finish_reason()
        yield chunk({}, reason, glm_foundry=self.service.report(self.active))
        if self.chat_request.include_usage:
            yield event(
                self.head
                | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage()}
            )
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A ChatResponse's events.

    When the stream ends, even before its first event, so does the answer.
    """

    def __init__(self, response: ChatResponse) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(response.events(), media_type="text/event-stream", headers=headers)
        self.response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.response.service.cancel(self.response.active)


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=True)}\n\n"
