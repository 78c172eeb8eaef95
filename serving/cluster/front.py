"""What Ray's proxies send requests to: it predicts, has them routed, and passes answers on.

Front is called with every request. It is tried again at another replica as long as nothing of its
answer has been sent to the client.
Free of Ray: the replicas are a protocol, which serving.cluster.application fills.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.cluster.ledger import process_ledger
from serving.cluster.messages import (
    Accepted,
    ForwardedRequest,
    Part,
    RawHeaders,
    ResponseHead,
)
from serving.gateway.bodies import parse_request_body
from serving.gateway.in_flight import in_flight_answer, in_flight_other
from serving.gateway.kinds import LENGTH_HEADER
from serving.gateway.observed import AnswerTail, PromptSizes
from serving.gateway.predicting import MADE, GuardedPredictor, Predicted
from serving.gateway.proxy import BUSY_STATUSES, MOST_BODY_BYTES, MOST_TRIES, OUTCOME_HEADER
from serving.gateway.starting import open_predictor
from serving.gateway.upstreams import InFlightRequest
from serving.server.access import (
    CLIENT_CLOSED_REQUEST,
    REQUEST_ID,
    AccessRules,
    ApiError,
    access_rules_at,
    request_id_of,
)

log = logging.getLogger(__name__)

ANSWER_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OTHER_PATHS = {"/v1/embeddings": "POST", "/v1/models": "GET", "/openapi.json": "GET"}
MODEL_PATH = "/v1/models/"
STATUS_PATH = "/cluster/status"
OWN_PATHS = ("/health", "/health/live", "/health/ready", STATUS_PATH)
RETRY_LATER = {"Retry-After": "2"}
# Written anew for the next connection.
HOP_NAMES = (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"host")
ID_NAME = REQUEST_ID.lower().encode()  # Ray's proxy writes it to clients


@dataclass(frozen=True)
class FrontOptions:
    """The options of the front, from serving.cluster.flags.

    Attributes:
        kv_tokens: of each replica.
        host: that Ray's proxies listen at.
    """

    predictor: str | None
    predict_ms: float
    kv_tokens: int
    slo_s: float
    wait_s: float
    host: str
    api_key: str | None
    api_keys: str | None
    allowed_hosts: str


class AttemptFailed(Exception):
    """A replica has not answered, or has broken off; the text says why."""


class Replicas(Protocol):
    """Where requests go."""

    def parts(self, request: ForwardedRequest) -> AsyncIterator[Part]:
        """One attempt: Accepted, the head, and the body's parts. Raises AttemptFailed."""
        ...


class Front:
    """Answers clients by replicas.

    Attributes:
        rules: who may ask. guarded: the predictor. open: requests in it.
        retries: attempts after the first. broken: answers that broke off after their beginning.
    """

    def __init__(self, options: FrontOptions, replicas: Replicas) -> None:
        self.options, self.replicas = options, replicas
        self.rules: AccessRules = access_rules_at(options, options.host)
        predictor = open_predictor(options.predictor)
        self.guarded = GuardedPredictor(predictor, options.predict_ms / 1000)
        self.sizes = PromptSizes()
        self.ledger = process_ledger()
        self.ledger.kv_tokens = options.kv_tokens
        self.open = self.retries = self.broken = 0

    def status(self) -> dict[str, Any]:
        """What GET /cluster/status answers."""
        return {
            "replicas": self.ledger.status(),
            "open": self.open,
            "retries": self.retries,
            "broken": self.broken,
            "predictions": dict(self.guarded.outcomes),
            "prediction_failure": self.guarded.reason or None,
        }

    async def __call__(self, http: Request) -> Response:
        """The response to a request, whatever happens."""
        request_id = request_id_of(http.scope)
        self.open += 1
        is_streamed = False
        try:
            response = await self._answer(http, request_id)
            is_streamed = isinstance(response, StreamingResponse)
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, headers=error.headers)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it
        except Exception:
            log.exception("request %s failed", request_id)
            response = JSONResponse(ApiError(500, "internal error").body(), 500)
        finally:
            if not is_streamed:  # a stream counts until its end
                self.open -= 1
        return response

    async def _answer(self, http: Request, request_id: str) -> Response:
        path, method = http.url.path, http.method
        self.rules.check(path, dict(http.headers.raw))
        if path in OWN_PATHS and method in ("GET", "HEAD"):
            return JSONResponse(self.status() if path == STATUS_PATH else {"status": "ok"})
        is_answer = method == "POST" and path in ANSWER_PATHS
        if not is_answer:
            check_path(method, path)
        body = await read_request_body(http)
        if not is_answer:
            inflight = in_flight_other(time.monotonic(), self.options.slo_s)
            return await self._respond(http, body, request_id, inflight)
        parsed = parse_request_body(body)
        predicted = await self.guarded.predict(parsed.prompt if parsed else None)
        inflight = in_flight_answer(
            parsed,
            predicted.prediction,
            prompt_tokens=self.sizes.tokens(len(body)),
            arrival_s=time.monotonic(),
            slo_s=self.options.slo_s,
        )
        response = await self._respond(http, body, request_id, inflight)
        add_prediction(response, predicted, inflight)
        return response

    async def _respond(
        self, http: Request, body: bytes, request_id: str, inflight: InFlightRequest
    ) -> Response:
        """The response of a replica. Raises ApiError."""
        request = ForwardedRequest(
            number=self.ledger.open(inflight),
            method=http.method,
            path=http.url.path,
            query=http.scope["query_string"],
            headers=forwarded_headers(http.headers.raw, request_id),
            body=body,
            tokens=inflight.tokens,
        )
        try:
            return await self._forward(request)
        except BaseException:
            self.ledger.close(request.number)
            raise

    async def _forward(self, request: ForwardedRequest) -> Response:
        """Try replicas until one answers. Raises ApiError."""
        why = ""
        for attempt in range(1, MOST_TRIES + 1):
            if attempt > 1:
                self.retries += 1
            try:
                return await self._try(request, is_last=attempt == MOST_TRIES)
            except AttemptFailed as failure:
                why = str(failure)
                self.ledger.fail(request.number)
                log.warning("request %d: %s", request.number, why)
        raise ApiError(502, f"{MOST_TRIES} attempts failed (last: {why})", "upstream_failed")

    async def _try(self, request: ForwardedRequest, is_last: bool) -> Response:
        """One attempt. Raises AttemptFailed while the client has seen nothing, ApiError."""
        parts = self.replicas.parts(request)
        try:
            head = await self._head_of(parts)
            if head.status in BUSY_STATUSES and not is_last:
                another_may_answer = self.ledger.fail(request.number)
                if another_may_answer:
                    raise AttemptFailed(f"HTTP {head.status}")
            tail = AnswerTail(is_stream(head))
            if tail.is_stream:
                first = await anext(parts, b"")
                relayed = self._relay(request, parts, first, tail)
                return with_headers(StreamingResponse(relayed, head.status), head)
            body = bytearray()
            async for part in parts:
                body += bytes_of(part)
        except BaseException:
            await close_parts(parts)
            raise
        tail.add(bytes(body))
        self._note_sizes(request, tail)
        self.ledger.close(request.number)
        return with_headers(Response(bytes(body), head.status), head)

    async def _head_of(self, parts: AsyncIterator[Part]) -> ResponseHead:
        """The head of an answer. Raises ApiError where no replica takes it within `wait_s`."""
        try:
            accepted = await asyncio.wait_for(anext(parts), self.options.wait_s)
            head = await anext(parts)
        except asyncio.TimeoutError:
            text = f"no replica takes requests (waited {self.options.wait_s:g} s)"
            raise ApiError(503, text, "unavailable", RETRY_LATER) from None
        except StopAsyncIteration:
            raise AttemptFailed("a replica ended without an answer") from None
        if not isinstance(accepted, Accepted) or not isinstance(head, ResponseHead):
            raise AttemptFailed("a replica's answer has no head")
        return head

    async def _relay(
        self,
        request: ForwardedRequest,
        parts: AsyncIterator[Part],
        first: Part,
        tail: AnswerTail,
    ) -> AsyncIterator[bytes]:
        """The body of an answer as it comes.

        Raises:
            AttemptFailed: it breaks off; Ray cuts the client's connection, so that what came does
                not pass for a whole answer.
        """
        try:
            chunk = bytes_of(first)
            self.ledger.progress(request.number, tail.add(chunk))
            yield chunk
            async for part in parts:
                chunk = bytes_of(part)
                self.ledger.progress(request.number, tail.add(chunk))
                yield chunk
            self._note_sizes(request, tail)
        except AttemptFailed as failure:
            self.broken += 1
            log.warning("request %d broke off: %s", request.number, failure)
            raise
        finally:
            self.open -= 1
            self.ledger.close(request.number)
            await close_parts(parts)

    def _note_sizes(self, request: ForwardedRequest, tail: AnswerTail) -> None:
        tokens = tail.prompt_tokens()
        if tokens is not None:
            self.sizes.note(len(request.body), tokens)


def check_path(method: str, path: str) -> None:
    """Raises ApiError for what is not asked of any one replica, such as loading an adapter."""
    allowed = OTHER_PATHS.get(path)
    if path.startswith(MODEL_PATH):
        allowed = "GET"
    if allowed is None:
        raise ApiError(404, f"{method} {path}: not of a cluster", "not_found")
    is_head = method == "HEAD" and allowed == "GET"
    if method != allowed and not is_head:
        raise ApiError(405, f"{method} {path}: wanted {allowed}", None, {"Allow": allowed})


async def read_request_body(http: Request) -> bytes:
    """The body of a request. Raises ApiError."""
    body = bytearray()
    async with aclosing(http.stream()) as stream:
        async for chunk in stream:
            body += chunk
            if len(body) > MOST_BODY_BYTES:
                limit = MOST_BODY_BYTES // 2**20
                raise ApiError(413, f"the body is over {limit} MiB", "large_body")
    return bytes(body)


def forwarded_headers(headers: list[tuple[bytes, bytes]], request_id: str) -> RawHeaders:
    """A client's headers for a replica: without its connection's and its key, with the id."""
    left_out = (*HOP_NAMES, b"authorization", ID_NAME)
    forwarded = []
    for name, value in headers:
        if name not in left_out:
            forwarded.append((name, value))
    forwarded.append((ID_NAME, request_id.encode()))
    return tuple(forwarded)


def with_headers(response: Response, head: ResponseHead) -> Response:
    """The response with a replica's headers, as they are."""
    for name, value in head.headers:
        if name.lower() not in (*HOP_NAMES, ID_NAME):
            response.raw_headers.append((name.lower(), value))
    return response


def add_prediction(response: Response, predicted: Predicted, inflight: InFlightRequest) -> None:
    """Say what was predicted, as the gateway does."""
    response.headers[OUTCOME_HEADER] = predicted.outcome
    prediction = inflight.record.request.prediction
    if predicted.outcome == MADE and prediction is not None:
        response.headers[LENGTH_HEADER] = str(round(prediction.expected_tokens))


def is_stream(head: ResponseHead) -> bool:
    """Whether an answer comes in parts that its client should see as they are made."""
    kind = dict(head.headers).get(b"content-type", b"")
    return kind.startswith(b"text/event-stream")


def bytes_of(part: Part) -> bytes:
    """A part of a body. Raises AttemptFailed for what is none."""
    if not isinstance(part, bytes):
        raise AttemptFailed(f"wanted a part of a body, got {type(part).__name__}")
    return part


async def close_parts(parts: AsyncIterator[Part]) -> None:
    """End an attempt, whose replica may stop its answer."""
    closing: Any = getattr(parts, "aclose", None)
    if closing is not None:
        with suppress(Exception):
            await closing()
