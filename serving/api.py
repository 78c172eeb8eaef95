"""The HTTP face of a Service: OpenAI's chat completions, models, health, metrics; errors as OpenAI's error objects."""

import asyncio
import json
import time
import uuid
from contextlib import aclosing

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.chat import ChatRequest, TextStream, parse_body
from serving.service import Closed, Exchange, Service, TooLong

BODY_BYTES = 8 * 2**20
GONE = 499  # for the access log; nobody reads it
FINISH = {"stop": "stop", "length": "length", "cut": "length"}


class ApiError(Exception):
    """An answer of HTTP status `status` with one line of what is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


def make_app(service: Service) -> FastAPI:
    app = FastAPI(title="GLM Foundry", openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(http: Http, error: ApiError):
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def http_error(http: Http, error: HTTPException):
        found = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
        return JSONResponse(found.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def our_error(http: Http, error: Exception):
        return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").body(), 500)

    @app.get("/health")
    async def health():
        state = service.failure or ("draining" if service.draining else "ok")
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        check_model(service, name)
        return model_card(service)

    @app.get("/metrics")
    async def metrics():
        if service.monitor.registry is None:
            raise ApiError(501, "metrics need the package prometheus-client")
        return Response(service.monitor.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Http):
        try:
            asked = parse_body(await read_json(http))
            check_model(service, asked.model)
            exchange = await service.ask(asked)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Closed as error:
            raise ApiError(503, str(error), "unavailable") from None
        except TooLong as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        talk = Talk(service, asked, exchange, http)
        if asked.stream:
            return StreamingResponse(talk.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await talk.whole()

    return app


def model_card(service: Service) -> dict:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "glm-foundry"}


def check_model(service: Service, name: str | None):
    if name not in (None, service.name):
        raise ApiError(404, f"there is no model {name!r} here, only {service.name!r}", "model_not_found")


async def read_json(http: Http):
    """Raises ApiError where the body is too large, ValueError where it is no JSON."""
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"the body is larger than {BODY_BYTES:,} bytes")
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not valid JSON: {getattr(error, 'msg', None) or 'not UTF-8, or nested too deep'}") from None


class Talk:
    """One answer on its way to its client. A client that goes away ends it."""

    def __init__(self, service: Service, asked: ChatRequest, exchange: Exchange, http: Http):
        self.service, self.asked, self.exchange, self.http = service, asked, exchange, http
        self.stream = TextStream(service.tokenizer, asked.stop)
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self.gone = False

    async def _watch(self):
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.exchange.tokens.put_nowait(None)

    async def texts(self):
        """New text, piece by piece; ends with the answer, at a stop string, or when the client has gone."""
        watcher = asyncio.create_task(self._watch())
        answer, stops = self.exchange.answer, self.service.engine.stop_ids
        try:
            while (token := await self.exchange.tokens.get()) is not None:
                if token not in stops and (new := self.stream.add(token)):
                    yield new
                if self.stream.stopped:
                    break
            if not self.stream.stopped and answer.reason in FINISH and (new := self.stream.end()):
                yield new
            if self.stream.stopped:
                self.service.monitor.stopped(answer.id)
        finally:
            watcher.cancel()
            self.service.cancel(self.exchange)

    def check(self):
        """Raises ApiError where the answer did not come to an end of its own."""
        reason = self.exchange.answer.reason
        if not self.stream.stopped and reason not in FINISH:
            if reason == "failed":
                raise ApiError(500, self.service.failure or "the model's output was not finite", "failed")
            raise ApiError(503 if self.service.draining else 500, f"the answer was {reason}", reason)

    def finish_reason(self) -> str:
        return "stop" if self.stream.stopped else FINISH[self.exchange.answer.reason]

    def usage(self) -> dict:
        prompt, made = self.exchange.request.prompt_tokens, self.service.length(self.exchange.answer)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    async def whole(self):
        async with aclosing(self.texts()) as texts:
            text = "".join([piece async for piece in texts])
        if self.gone:
            return Response(status_code=GONE)
        self.check()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish_reason(), "logprobs": None}
        report = self.service.report(self.exchange)
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": self.usage(), "glm_foundry": report}

    async def events(self):
        """Server-sent events: the role, pieces of text, the reason of the end with `glm_foundry`, usage where asked for, [DONE]."""
        usage = {"usage": None} if self.asked.include_usage else {}

        def chunk(delta: dict, reason: str | None = None, **more) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            return event(self.head | {"object": "chat.completion.chunk", "choices": [choice]} | usage | more)

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
            yield event(self.head | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=True)}\n\n"
