"""The HTTP face of a Service: OpenAI's chat completions and models, health, metrics.

Errors are OpenAI's error objects. serving.server.door says who may come in,
serving.server.fields what a request may say, serving.server.openapi what /openapi.json says of
both.
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

from serving.server.chat import ChatRequest, TextStream, parse_body
from serving.server.door import AccessLog, ApiError, Door, Keys
from serving.server.openapi import document
from serving.server.service import Busy, Closed, Exchange, Service, TooLong, Unpredicted

BODY_BYTES = 2 * 2**20
CLIENT_S = 30.0  # for a whole body
RETRY_S = 2  # what a busy server tells its clients to wait
CLOSING = "the server is shutting down"
GONE = 499  # for the access log: the client has left
FINISH = {"stop": "stop", "length": "length", "cut": "length"}


def make_app(
    service: Service,
    keys: Keys | None = None,
    cors_origins: Sequence[str] = (),
    access_log: bool = False,
    client_s: float = CLIENT_S,
) -> FastAPI:
    """The application.

    Its state.closing is an asyncio.Event that ends the wait for bodies that are still being sent.

    Args:
        keys: who may come in; None for everybody.
        cors_origins: origins of web pages that may ask; "*" for all.
        access_log: log a line for each request.
        client_s: within which a client must have sent its body.
    """
    app = FastAPI(title="GLM Foundry", docs_url=None, redoc_url=None)
    schema = partial(document, service.name, guarded=bool(keys and keys.api_key))
    app.openapi = schema  # type: ignore[method-assign]  # FastAPI's documented way
    app.state.closing = asyncio.Event()
    if keys is not None:
        app.add_middleware(Door, keys=keys)
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

    @app.exception_handler(ApiError)
    async def api_error(http: Http, error: ApiError):
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(http: Http, error: HTTPException):
        found = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
        return JSONResponse(found.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def our_error(http: Http, error: Exception):
        return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").body(), 500)

    @get("/health")
    async def health():
        state = service.failure or ("draining" if service.draining else "ok")
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @get("/v1/models")
    async def models():
        return {"object": "list", "data": [model_card(service)]}

    @get("/v1/models/{name:path}")
    async def model(name: str):
        check_model(service, name)
        return model_card(service)

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
            asked = parse_body(await read_json_body(http, app.state.closing, client_s))
            check_model(service, asked.model)
            exchange = await service.ask(asked)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Closed as error:
            raise ApiError(503, str(error), "unavailable") from None
        except Busy as error:
            raise ApiError(429, str(error), "busy", {"Retry-After": str(RETRY_S)}) from None
        except Unpredicted as error:
            raise ApiError(500, str(error), "failed") from None
        except TooLong as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        talk = Talk(service, asked, exchange, http)
        if asked.stream:
            return EventStream(talk)
        return await talk.whole()

    return app


def model_card(service: Service) -> dict:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "glm-foundry",
    }


def check_model(service: Service, name: str | None) -> None:
    if name not in (None, service.name):
        raise ApiError(
            404, f"there is no model {name!r} here, only {service.name!r}", "model_not_found"
        )


def check_json(http: Http) -> None:
    """Raises ApiError where the body is not declared as JSON; what any page may send is not."""
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
    reading, ending = asyncio.create_task(read_body(http)), asyncio.create_task(closing.wait())
    try:
        await asyncio.wait({reading, ending}, timeout=client_s, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            if closing.is_set():
                raise ApiError(503, CLOSING, "unavailable", {"Connection": "close"})
            late = f"the body did not come within {client_s:g} s"
            raise ApiError(408, late, None, {"Connection": "close"})
        body = reading.result()
    finally:
        reading.cancel()
        ending.cancel()
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


class Talk:
    """One answer on its way to its client. A client that goes away ends it."""

    def __init__(
        self, service: Service, asked: ChatRequest, exchange: Exchange, http: Http
    ) -> None:
        self.service, self.asked, self.exchange, self.http = service, asked, exchange, http
        self.stream = TextStream(service.tokenizer, asked.stop)
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }
        self.gone = self.token_stopped = False

    @property
    def stopped(self) -> bool:
        """The client's stop string or stop token has come."""
        return self.stream.stopped or self.token_stopped

    async def _watch(self):
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.exchange.tokens.put_nowait(None)

    async def texts(self) -> AsyncGenerator[str, None]:
        """New text, piece by piece.

        Ends with the answer, at a stop string, or when the client has gone.
        """
        watcher = asyncio.create_task(self._watch())
        answer, stops = self.exchange.answer, self.service.engine.stop_ids
        try:
            while (token := await self.exchange.tokens.get()) is not None:
                if token in self.asked.stop_token_ids:
                    self.token_stopped = True
                    break
                if token not in stops and (new := self.stream.add(token)):
                    yield new
                if self.stream.stopped:
                    break
            whole = self.token_stopped or answer.reason in FINISH
            if whole and not self.stream.stopped and (new := self.stream.end()):
                yield new
            if self.stopped:
                self.service.monitor.stopped(answer.id)
        finally:
            watcher.cancel()
            self.service.cancel(self.exchange)

    def check(self) -> None:
        """Raises ApiError where the answer did not come to an end of its own."""
        reason = self.exchange.answer.reason
        if not self.stopped and reason not in FINISH:
            if reason == "failed":
                why = "the model's output was not finite, or could not be sampled"
                raise ApiError(500, self.service.failure or why, "failed")
            if self.service.draining:
                raise ApiError(503, f"{CLOSING}; the answer was {reason}", "unavailable")
            raise ApiError(500, f"the answer was {reason}", reason)

    def finish_reason(self) -> str:
        """OpenAI's; of an answer that `check` has passed."""
        reason = self.exchange.answer.reason
        return "stop" if self.stopped or reason is None else FINISH[reason]

    def usage(self) -> dict:
        prompt, made = (
            self.exchange.request.prompt_tokens,
            self.service.length(self.exchange.answer),
        )
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    async def whole(self) -> Response | dict:
        async with aclosing(self.texts()) as texts:
            text = "".join([piece async for piece in texts])
        if self.gone:
            return Response(status_code=GONE)
        self.check()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": self.finish_reason(),
            "logprobs": None,
        }
        report = self.service.report(self.exchange)
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
        usage = {"usage": None} if self.asked.include_usage else {}

        def chunk(delta: dict, reason: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            return event(
                self.head | {"object": "chat.completion.chunk", "choices": [choice]} | usage | more
            )

        async with aclosing(self.texts()) as texts:
            yield chunk({"role": "assistant", "content": ""})
            async for piece in texts:
                yield chunk({"content": piece})
        if self.gone:
            return
        try:
            self.check()
        except ApiError as error:
            yield event(error.body())
            return
        yield chunk({}, self.finish_reason(), glm_foundry=self.service.report(self.exchange))
        if self.asked.include_usage:
            yield event(
                self.head
                | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage()}
            )
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A Talk's events. However it ends, be it before its first event, so does its answer."""

    def __init__(self, talk: Talk) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(talk.events(), media_type="text/event-stream", headers=headers)
        self.talk = talk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.talk.service.cancel(self.talk.exchange)


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=True)}\n\n"
