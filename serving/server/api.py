"""The HTTP API of a Service: OpenAI's endpoints, health, metrics.

Each endpoint's requests and responses are a module of their own. Errors are OpenAI's error
objects. serving.server.access checks host and key, serving.server.fields the fields of a request;
serving.server.openapi describes them in /openapi.json.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from serving.engines.adapter_errors import UnknownAdapter
from serving.server.access import (
    CLIENT_CLOSED_REQUEST,
    REQUEST_ID,
    AccessControl,
    AccessRules,
    ApiError,
    RequestObserver,
    note_error,
)
from serving.server.adapters import add_adapter_routes
from serving.server.chat import parse_body
from serving.server.chat_completions import ChatResponse
from serving.server.choices import EventStream, unless_disconnected
from serving.server.completions import CompletionResponse, parse_completion
from serving.server.embeddings import EmbeddingResponse, embedding_list, parse_embedding
from serving.server.json_bodies import CLIENT_S, BodyReader, Utf8Json
from serving.server.openapi import openapi_document
from serving.server.page.routes import add_page_routes
from serving.server.predictors import add_predictor_routes
from serving.server.refusals import PredictionFailed, PromptTooLong, QueueFull, ServiceClosed
from serving.server.responses import ResponsesResponse, parse_response
from serving.server.service import Service

SHOWN_MODELS = 9  # names that an error lists
RETRY_S = 2  # Retry-After of a busy server
Parse = Callable[[Any], Any]  # of a body's JSON into a GenerationRequest
Respond = Callable[..., Any]  # of (service, request, group, http) into an endpoint's response


def make_app(
    service: Service,
    access_rules: AccessRules | None = None,
    cors_origins: Sequence[str] = (),
    access_log: bool = False,
    client_s: float = CLIENT_S,
    page: bool = True,
) -> FastAPI:
    """The application.

    Its state.closing is an asyncio.Event that ends the wait for bodies that are still being sent,
    and the live streams; state.live is the LiveView, to be started with the server, or None.

    Args:
        access_rules: the hosts and the key that requests must carry; None accepts all requests.
        cors_origins: origins of web pages that may send requests; "*" for all.
        access_log: log a line for each request.
        client_s: within which a client must have sent its body.
        page: serve a page at `/`.
    """
    app = FastAPI(
        title="GLM Foundry",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=Utf8Json,
    )
    needs_key = bool(access_rules and access_rules.keys)
    schema = partial(openapi_document, service.name, needs_key=needs_key)
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
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_middleware(RequestObserver, count=service.monitor.count_exchange, writes_log=access_log)
    add_error_handlers(app)
    bodies = BodyReader(app.state.closing, client_s)

    async def checked_body(http: Http) -> Any:
        try:
            service.check_open()
        except ServiceClosed as error:
            raise api_error_of(error) from None
        return await bodies.read(http)

    add_state_routes(app, service)
    add_adapter_routes(app, service.adapters, checked_body)
    add_answer_routes(app, service, bodies)
    add_predictor_routes(app, lambda: service.predictors, checked_body)
    app.state.live = None
    if page:
        app.state.live = add_page_routes(
            app, service, checked_body, needs_key=needs_key, closing=app.state.closing
        )
    return app


def add_error_handlers(app: FastAPI) -> None:
    """What clients get for errors: OpenAI's error objects."""

    @app.exception_handler(ApiError)
    async def api_error(http: Http, error: ApiError):
        note_error(http.scope, error)
        return Utf8Json(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(http: Http, error: HTTPException):
        wrapped = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
        note_error(http.scope, wrapped)
        headers = error.headers
        if error.status_code == 405:
            headers = {"Allow": ", ".join(allowed_methods(app, http))}
        return Utf8Json(wrapped.body(), error.status_code, headers=headers)

    @app.exception_handler(ClientDisconnect)
    async def client_gone(http: Http, error: Exception):
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def add_state_routes(app: FastAPI, service: Service) -> None:
    """What the server is, and how it is: health, models, metrics."""
    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/health")
    async def health():
        state = service.failure or ("draining" if service.draining else service.backend.state())
        return Utf8Json({"status": state}, 200 if state == "ok" else 503)

    @get("/health/live")
    async def live():
        return {"status": "ok"}

    @get("/health/ready")
    async def ready():
        return await health()

    @get("/v1/models")
    async def models():
        cards = [model_card(service.name, service.started), *service.adapters.cards()]
        if service.text_encoder is not None:
            cards.append(model_card(service.text_encoder.name, service.started))
        return {"object": "list", "data": cards}

    @get("/v1/models/{name:path}")
    async def model(name: str):
        if service.text_encoder is None or name != service.text_encoder.name:
            check_model(name, service.name, *service.adapters.names())
        return service.adapters.card(name) or model_card(name, service.started)

    @get("/metrics")
    async def metrics():
        if service.monitor.registry is None:
            raise ApiError(501, "metrics need the package prometheus-client")
        return Response(
            service.monitor.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def add_answer_routes(app: FastAPI, service: Service, bodies: BodyReader) -> None:
    """The endpoints that ask a model."""
    post = partial(app.post, response_model=None)

    async def read(http: Http, parse: Parse) -> Any:
        with api_errors():
            return parse(await bodies.read(http))

    async def answer(http: Http, parse: Parse, respond: Respond) -> Response | dict[str, Any]:
        asked = await read(http, parse)
        check_model(asked.model, service.name, *service.adapters.names())
        with api_errors():
            group = await unless_disconnected(http, service.ask(asked))
        response = respond(service, asked, group, http)
        if asked.stream:
            return EventStream(response)
        return await response.complete()

    @post("/v1/chat/completions")
    async def chat_completions(http: Http):
        return await answer(http, parse_body, ChatResponse)

    @post("/v1/completions")
    async def completions(http: Http):
        return await answer(http, parse_completion, CompletionResponse)

    @post("/v1/embeddings")
    async def embeddings(http: Http):
        if (encoder := service.text_encoder) is None:
            return await answer(http, parse_embedding, EmbeddingResponse)
        asked = await read(http, parse_embedding)
        check_model(asked.model, encoder.name)
        with api_errors():
            service.check_open()
            encoding = encoder.encoded(asked.inputs, service.max_queue)
            vectors, tokens = await unless_disconnected(http, encoding)
        return embedding_list(vectors, tokens, asked.as_base64, encoder.name)

    @post("/v1/responses")
    async def responses(http: Http):
        return await answer(http, parse_response, ResponsesResponse)


def allowed_methods(app: FastAPI, http: Http) -> list[str]:
    """Of all routes of a request's path; a route alone names only its own."""
    methods: set[str] = set()
    for route in app.routes:
        if route.matches(http.scope)[0] != Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods)


@contextmanager
def api_errors() -> Iterator[None]:
    """Raises ApiError where a request is wrong or the service takes none."""
    try:
        yield
    except (ServiceClosed, QueueFull, PredictionFailed, ValueError) as error:
        raise api_error_of(error) from None


def api_error_of(error: Exception) -> ApiError:
    """What a client gets for an error of the service."""
    if isinstance(error, ServiceClosed):
        return ApiError(503, str(error), "unavailable")
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "busy", {"Retry-After": str(RETRY_S)})
    if isinstance(error, PredictionFailed):
        return ApiError(500, str(error), "failed")
    if isinstance(error, UnknownAdapter):  # unloaded since
        return ApiError(404, str(error), "model_not_found")
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
    return ApiError(400, str(error), code)


def model_card(name: str, started: int) -> dict[str, Any]:
    """OpenAI's object of a model that is no adapter."""
    card = {"id": name, "object": "model", "created": started, "owned_by": "glm-foundry"}
    return card | {"root": name, "parent": None}


def check_model(name: str | None, *served: str) -> None:
    """Raises ApiError where a request names another model than these."""
    if name is not None and name not in served:
        only = ", ".join(map(repr, served[:SHOWN_MODELS]))
        raise ApiError(404, f"there is no model {name!r} here, only {only}", "model_not_found")
