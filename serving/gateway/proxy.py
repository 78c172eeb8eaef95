"""The gateway's proxy: from a client's request to an upstream's answer, byte for byte.

`Gateway.handle` is the handler of every request: it reads the body, predicts the answer's length
(`_call_of`), waits for an upstream (`_forward`) and sends its answer on (`_relay`). A request is
tried again at another upstream as long as nothing of its answer has been sent to the client.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from serving.gateway.bodies import RequestBody, parse_request_body, prompt_prefix_hashes
from serving.gateway.dispatch import Dispatcher, NoUpstream, QueueIsFull
from serving.gateway.figures import GatewayFigures
from serving.gateway.in_flight import in_flight_answer, in_flight_other
from serving.gateway.kinds import LENGTH_HEADER, Added, Hints, Kind
from serving.gateway.observed import AnswerTail, LengthDrift, PromptSizes
from serving.gateway.predicting import MADE, GuardedPredictor, Predicted
from serving.gateway.upstreams import InFlightRequest, Upstream, any_up
from serving.gateway.view import GatewayView
from serving.server.access import (
    CLIENT_CLOSED_REQUEST,
    FIT_ID,
    REQUEST_ID,
    AccessRules,
    ApiError,
    Exchange,
    access_logger,
)
from serving.server.monitor import LogFile
from serving.server.predictors import one_line_of

log = logging.getLogger(__name__)

MOST_TRIES = 4  # of a request, in all; it may be the reason why upstreams fail
MOST_BODY_BYTES = 64 * 2**20
MOST_HELD_BYTES = 2**30  # of the bodies of all open requests
BODY_S = 60.0  # for a client to send a body
READ_S = 30.0  # for a client to read a part of its answer
RETRY_AFTER_S = "2"
BUSY_STATUSES = (429, 502, 503, 504)  # that another upstream may answer better
# Of one connection (RFC 9110, 7.6.1), or written anew for the next one.
HOP_HEADERS = (
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "content-length",
    "expect",
)
OUTCOME_HEADER = "x-glm-prediction"
TURNED_AWAY = (429, 503)  # of requests that are right


class UpstreamFailed(Exception):
    """An upstream has not answered, and the client has seen nothing of it."""


class ClientGone(Exception):
    """The client has left while it was written to."""


class AnswerBroken(Exception):
    """An upstream broke off after a part of its answer had been sent."""


@dataclass(eq=False)
class Call:
    """One request of a client while it is served.

    Attributes:
        body: as it came. path: with the query.
        parsed: its body's fields; None where they cannot be read, or it makes no answer.
        is_answer: its path makes answers.
        predicted: its answer's length. inflight: it in the queue, and its load on an upstream.
        exchange: for the log.
    """

    request: web.BaseRequest
    body: bytes
    exchange: Exchange
    is_answer: bool
    parsed: RequestBody | None
    predicted: Predicted
    inflight: InFlightRequest
    tries: int = 0


class OwnPage(Protocol):
    """Answers some requests beside the upstreams: serving.gateway.page.GatewayPage."""

    def answers(self, request: web.BaseRequest) -> bool: ...
    async def answer(self, request: web.BaseRequest) -> web.StreamResponse: ...


class Gateway:
    """Answers clients by upstreams.

    Attributes:
        kind: of the upstreams.
        dispatcher: the queue, and the upstreams' load.
        guarded: the predictor.
        observe: called with each answer's prompt, tokens and whether it ended by itself.
        log_file: of the same, as rows of a length predictor; None without --log.
        session: of HTTP to the upstreams; set while it serves.
        open: requests in it; held_bytes: of their bodies. draining: it takes no more.
        view: of what it does. page: what shows it; None without.
        unknown_lengths: answers whose upstream reported no usage.
    """

    def __init__(
        self,
        kind: Kind,
        dispatcher: Dispatcher,
        guarded: GuardedPredictor,
        *,
        rules: AccessRules,
        slo_s: float = 30.0,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        wait_s: float = 30.0,
        max_requests: int = 8192,
        upstream_key: str | None = None,
        access_log: bool = False,
    ) -> None:
        self.kind, self.dispatcher, self.guarded, self.rules = kind, dispatcher, guarded, rules
        self.slo_s, self.ttft_ms, self.tpot_ms = slo_s, ttft_ms, tpot_ms
        self.wait_s, self.max_requests, self.upstream_key = wait_s, max_requests, upstream_key
        self.access_log = access_log
        self.drift, self.sizes = LengthDrift(), PromptSizes()
        self.observe: Callable[[str, int, bool], None] = lambda prompt, tokens, finished: None
        self.log_file: LogFile | None = None
        self.session: aiohttp.ClientSession | None = None
        self.open = self.held_bytes = self.unknown_lengths = 0
        self.draining = False
        self.view = GatewayView(dispatcher, self.drift)
        self.page: OwnPage | None = None
        gauges: dict[str, Callable[[], float]] = {
            "waiting_requests": lambda: dispatcher.waiting,
            "length_drift_log_ratio": self.drift.drift,
            "q90_coverage_ratio": self.drift.coverage,
            "pace_seconds": lambda: dispatcher.pace_s,
        }
        self.figures = GatewayFigures(dispatcher.upstreams, gauges)

    # ---- one request

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler of every request."""
        exchange = Exchange(request_id_of_headers(request))
        try:
            return await self._answer(request, exchange)
        except ApiError as error:
            exchange.status = error.status
            self.figures.count("refusals", error.code or str(error.status))
            self.view.refused += error.status in TURNED_AWAY
            return refusal_response(error, exchange)
        except asyncio.CancelledError:
            exchange.disconnected = True
            raise
        except ClientGone:
            exchange.disconnected = True
            return web.Response(status=CLIENT_CLOSED_REQUEST)  # nobody reads it
        except Exception:
            exchange.status = 500
            log.exception("request %s failed", exchange.request_id)
            return refusal_response(ApiError(500, "internal error"), exchange)
        finally:
            if self.access_log:
                access_logger.info(exchange.line(scope_of(request)))

    async def _answer(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.raw_headers}
        is_get = request.method in ("GET", "HEAD")
        own_path = OWN_PATHS.get(request.path) if is_get else None
        page = self.page if self.page is not None and self.page.answers(request) else None
        # Paths that serving.server answers without a key, such as its page's, need one here.
        is_own = own_path is not None or page is not None
        exchange.key = self.rules.check(request.path if is_own else "", headers)
        if not request.raw_path.startswith("/"):  # else it could name another host
            raise ApiError(400, "wanted a path that begins with a slash", "bad_path")
        response: web.StreamResponse | None = None
        if own_path is not None:
            response = own_path(self)
        elif page is not None:
            response = await page.answer(request)
        if response is not None:
            exchange.status, exchange.ended = response.status, True
            return response
        return await self._answer_by_upstream(request, exchange)

    async def _answer_by_upstream(
        self, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """Raises ApiError, also where there is no room for another request."""
        if self.draining:
            raise ApiError(503, "the gateway is shutting down", "unavailable", retry_later())
        if self.open >= self.max_requests:
            text = f"{self.open} requests are open (--max_requests)"
            raise ApiError(429, text, "queue_full", retry_later())
        self.open += 1
        held = 0
        try:
            body = await body_of_request(request)
            if self.held_bytes + len(body) > MOST_HELD_BYTES:
                text = f"the bodies of open requests have {self.held_bytes:,} bytes, with this one "
                text += f"{self.held_bytes + len(body):,}: more than {MOST_HELD_BYTES:,}"
                raise ApiError(429, text, "queue_full", retry_later())
            held = len(body)
            self.held_bytes += held
            call = await self._call_of(request, body, exchange)
            if not call.is_answer:
                response = await self._forward(call)
            else:
                with self.view.showing(call.inflight):
                    response = await self._forward(call)
            exchange.ended = True
            return response
        finally:
            self.open -= 1
            self.held_bytes -= held

    async def _call_of(self, request: web.BaseRequest, body: bytes, exchange: Exchange) -> Call:
        """A request with its prediction, and its place in the order."""
        arrival_s = self.dispatcher.now_s()
        is_answer = request.method == "POST" and request.path in self.kind.answer_paths
        if not is_answer:
            inflight = in_flight_other(arrival_s, self.slo_s)
            return Call(request, body, exchange, False, None, Predicted(""), inflight)
        parsed = parse_request_body(body)
        predicted = await self._predict(parsed.prompt if parsed else None)
        prefix_hashes: tuple[int, ...] = ()
        if parsed is not None and self.dispatcher.prefixes is not None:
            prefix_hashes = prompt_prefix_hashes(parsed)
        inflight = in_flight_answer(
            parsed,
            predicted.prediction,
            prompt_tokens=self.sizes.tokens(len(body)),
            arrival_s=arrival_s,
            slo_s=self.slo_s,
            prefix_hashes=prefix_hashes,
        )
        inflight.is_predicted = predicted.outcome == MADE
        return Call(request, body, exchange, True, parsed, predicted, inflight)

    async def _predict(self, prompt: str | None) -> Predicted:
        began_s = time.perf_counter()
        predicted = await self.guarded.predict(prompt)
        if predicted.outcome == MADE:
            self.figures.observe("predict_seconds", time.perf_counter() - began_s)
        self.figures.count("predictions", predicted.outcome)
        return predicted

    async def _forward(self, call: Call) -> web.StreamResponse:
        """Try upstreams until one answers. Raises ApiError."""
        dispatcher, inflight = self.dispatcher, call.inflight
        why = ""
        while call.tries < MOST_TRIES:
            try:
                if call.is_answer:
                    upstream = await dispatcher.acquire(inflight, self.wait_s)
                else:  # a list of models does not wait for answers
                    upstream = dispatcher.any_upstream(inflight)
            except QueueIsFull as error:
                raise ApiError(429, str(error), "queue_full", retry_later()) from None
            except NoUpstream as error:
                text = f"{error}{why}"
                raise ApiError(503, text, "unavailable", retry_later()) from None
            call.tries += 1
            try:
                queue_s = dispatcher.now_s() - inflight.record.request.arrival_s
                self.figures.observe("queue_seconds", queue_s)
                return await self._try(call, upstream)
            except UpstreamFailed as failure:
                why = f" (last: {failure})"
                inflight.failed.add(upstream.base)
                self.figures.count("retries", upstream.base)
                self.view.retried += 1
            finally:
                dispatcher.release(inflight)
        raise ApiError(502, f"{call.tries} attempts failed{why}", "upstream_failed")

    async def _try(self, call: Call, upstream: Upstream) -> web.StreamResponse:
        """One attempt. Raises UpstreamFailed while the client has seen nothing."""
        added = self._added(call, upstream)
        body = self._body(call, added)
        request = call.request
        assert self.session is not None
        try:
            async with self.session.request(
                request.method,
                URL(upstream.base + request.raw_path, encoded=True),
                data=body or None,
                headers=self._headers(call, added),
                allow_redirects=False,
            ) as reply:
                return await self._relay(call, upstream, reply)
        except ClientGone:
            call.inflight.reason = "cancelled"
            raise
        except aiohttp.ClientConnectorError as error:
            self._note_failure(upstream, error)
            raise UpstreamFailed(f"{upstream.base}: {upstream.why}") from None
        except (aiohttp.ClientError, OSError) as error:
            # A connection that an upstream has closed while it was idle fails so, too.
            upstream.failures += 1
            if not call.is_answer and request.method not in ("GET", "HEAD"):
                text = f"{upstream.base}: {type(error).__name__}"
                raise ApiError(502, text, "upstream_failed") from None
            raise UpstreamFailed(f"{upstream.base}: {type(error).__name__}") from None

    def _note_failure(self, upstream: Upstream, error: Exception) -> None:
        upstream.failures += 1
        upstream.why = one_line_of(error)
        if upstream.up:
            log.warning("%s does not answer: %s", upstream.base, upstream.why)
        upstream.up = False

    def _added(self, call: Call, upstream: Upstream) -> Added:
        """What this upstream gets beside the client's own request; nothing without a prediction."""
        prediction = call.inflight.record.request.prediction
        is_made = call.predicted.outcome == MADE
        if call.parsed is None or (self.dispatcher.policy.predicts and not is_made):
            return Added()
        expected = q90 = None
        if is_made and prediction is not None:
            expected = round(prediction.expected_tokens)
            q90 = round(prediction.q90_tokens)
        key, _ = self.dispatcher.order(call.inflight.record)
        hints = Hints(
            key=key,
            in_tokens=self.dispatcher.in_tokens,
            arrival_s=call.inflight.record.request.arrival_s,
            expected=expected,
            q90=q90,
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
            client=call.exchange.key,
        )
        return self.kind.added(hints, upstream.facts)

    def _body(self, call: Call, added: Added) -> bytes:
        """The client's body, with what is added and without what the kind of engine refuses."""
        refused = self.kind.refused_field
        if call.parsed is None or not (added.fields or refused in call.parsed.members):
            return call.body
        return call.parsed.with_fields(added.fields, without=refused).encode()

    def _headers(self, call: Call, added: Added) -> CIMultiDict[str]:
        """The client's headers, without those of its connection, and what is added."""
        headers = CIMultiDict(call.request.headers)
        drop_hop_headers(headers)
        headers.popall(LENGTH_HEADER, None)
        if self.rules.keys is not None:
            headers.popall("authorization", None)  # a key of the gateway's
        if self.upstream_key is not None:
            headers["Authorization"] = f"Bearer {self.upstream_key}"
        headers[REQUEST_ID] = call.exchange.request_id
        for name, value in added.headers.items():
            headers[name] = value
        return headers

    # ---- its answer

    async def _relay(
        self, call: Call, upstream: Upstream, reply: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        """Send an upstream's answer on. Raises UpstreamFailed before anything is sent."""
        if reply.status in BUSY_STATUSES and self._may_go_elsewhere(call, upstream):
            raise UpstreamFailed(f"{upstream.base}: HTTP {reply.status}")
        headers = CIMultiDict(reply.headers)
        drop_hop_headers(headers)
        headers[REQUEST_ID] = call.exchange.request_id
        if call.is_answer:
            headers[OUTCOME_HEADER] = call.predicted.outcome
            prediction = call.inflight.record.request.prediction
            if call.predicted.outcome == MADE and prediction is not None:
                headers[LENGTH_HEADER] = str(round(prediction.expected_tokens))
        call.exchange.status = reply.status
        is_stream = is_streamed(reply)
        tail = AnswerTail(is_stream)
        if not is_stream and call.is_answer:
            response = await self._relay_whole(call, reply, headers, tail)
        else:
            response = await self._relay_stream(call, upstream, reply, headers, tail)
        call.exchange.sent_bytes = tail.sent
        self._note_answer(call, upstream, reply, tail)
        return response

    def _may_go_elsewhere(self, call: Call, upstream: Upstream) -> bool:
        if not call.is_answer or call.tries >= MOST_TRIES:
            return False
        tried = {*call.inflight.failed, upstream.base}
        return any(other.up and other.base not in tried for other in self.dispatcher.upstreams)

    async def _relay_whole(
        self,
        call: Call,
        reply: aiohttp.ClientResponse,
        headers: CIMultiDict[str],
        tail: AnswerTail,
    ) -> web.StreamResponse:
        body = await reply.read()
        call.inflight.first_s = self.dispatcher.now_s()
        tail.add(body)
        return web.Response(body=body, status=reply.status, reason=reply.reason, headers=headers)

    async def _relay_stream(
        self,
        call: Call,
        upstream: Upstream,
        reply: aiohttp.ClientResponse,
        headers: CIMultiDict[str],
        tail: AnswerTail,
    ) -> web.StreamResponse:
        """Send chunks on as they come, the first with the head."""
        content = reply.content
        chunk = await content.readany()
        call.inflight.first_s = self.dispatcher.now_s()
        response = web.StreamResponse(status=reply.status, reason=reply.reason, headers=headers)
        if reply.content_length is not None:
            response.content_length = reply.content_length
        await deliver(call.request, response.prepare(call.request))
        try:
            while chunk:
                call.inflight.progress(tail.add(chunk))
                await deliver(call.request, response.write(chunk))
                chunk = await self._next_chunk(content)
        except AnswerBroken as error:
            self.figures.count("broken_streams", upstream.base)
            log.warning("%s broke off an answer: %s", upstream.base, error)
            upstream.failures += 1
            call.exchange.disconnected = True
            if call.request.transport is not None:
                call.request.transport.abort()  # its client must not take it for whole
            return response
        await deliver(call.request, response.write_eof())
        return response

    @staticmethod
    async def _next_chunk(content: aiohttp.StreamReader) -> bytes:
        try:
            return await content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise AnswerBroken(one_line_of(error)) from None

    def _note_answer(
        self, call: Call, upstream: Upstream, reply: aiohttp.ClientResponse, tail: AnswerTail
    ) -> None:
        """Count an answer, and learn of its length."""
        figures, inflight, now_s = self.figures, call.inflight, self.dispatcher.now_s()
        figures.count("requests", upstream.base, str(reply.status))
        inflight.reason = "failed"
        if not call.is_answer or reply.status != 200 or call.exchange.disconnected:
            return
        arrival_s = inflight.record.request.arrival_s
        figures.observe("first_byte_seconds", inflight.first_s - arrival_s)
        figures.observe("latency_seconds", now_s - arrival_s)
        finished = tail.is_whole()
        inflight.reason = "stop" if finished else "length"
        prompt_tokens = tail.prompt_tokens()
        if prompt_tokens is not None:
            self.sizes.note(len(call.body), prompt_tokens)
        tokens = tail.output_tokens()
        if tokens is None:
            self.unknown_lengths += 1
            return
        figures.observe("answer_tokens", tokens)
        inflight.made = tokens
        if tail.is_stream:
            self.dispatcher.note_pace(now_s - inflight.first_s, tokens)
        if call.parsed is None or call.parsed.answers != 1 or call.parsed.prompt is None:
            return
        if finished and call.predicted.prediction is not None:
            figures.observe("length_ratio", self.drift.add(call.predicted.prediction, tokens))
        self.observe(call.parsed.prompt, tokens, finished)
        if self.log_file is not None:
            self.log_file.write(answered_row(call.parsed, tokens, finished))

    # ---- itself

    def status(self) -> dict[str, Any]:
        """What GET /gateway/status answers."""
        upstreams = []
        for upstream in self.dispatcher.upstreams:
            upstreams.append(
                {
                    "base": upstream.base,
                    "up": upstream.up,
                    "why": None if upstream.up else upstream.why,
                    "obeys_priorities": upstream.facts.priorities,
                    "kv_tokens": upstream.kv_tokens,
                    "requests": upstream.running,
                    "outstanding_tokens": round(upstream.outstanding_tokens),
                    "failures": upstream.failures,
                }
            )
        return {
            "upstreams": upstreams,
            "waiting": self.dispatcher.waiting,
            "open": self.open,
            "draining": self.draining,
            "predictions": dict(self.guarded.outcomes),
            "prediction_failure": self.guarded.reason or None,
            "drift": number_or_none(self.drift.drift()),
            "q90_coverage": number_or_none(self.drift.coverage()),
            "answers_without_length": self.unknown_lengths,
        }

    def ready_response(self) -> web.Response:
        if self.draining:
            return json_response({"status": "draining"}, 503)
        if not any_up(self.dispatcher.upstreams):
            return json_response({"status": "no upstream answers"}, 503)
        return json_response({"status": "ok"})


OWN_PATHS: Mapping[str, Callable[[Gateway], web.Response]] = {
    "/health": Gateway.ready_response,
    "/health/ready": Gateway.ready_response,
    "/health/live": lambda gateway: json_response({"status": "ok"}),
    "/metrics": lambda gateway: web.Response(
        body=gateway.figures.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"}
    ),
    "/gateway/status": lambda gateway: json_response(gateway.status()),
}


def json_response(value: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        body=json.dumps(value).encode(),
        status=status,
        headers={"Content-Type": "application/json"},
    )


def refusal_response(error: ApiError, exchange: Exchange) -> web.Response:
    """OpenAI's error object."""
    response = json_response(error.body(), error.status)
    response.headers.update(error.headers or {})
    response.headers[REQUEST_ID] = exchange.request_id
    return response


def retry_later() -> dict[str, str]:
    return {"Retry-After": RETRY_AFTER_S}


async def deliver(request: web.BaseRequest, writing: Awaitable[Any]) -> None:
    """Write to the client. Raises ClientGone, never what an upstream's failure raises.

    A client that does not read for READ_S is dropped: it would hold its place at the upstream.
    """
    late = None
    if request.transport is not None:
        late = asyncio.get_running_loop().call_later(READ_S, request.transport.abort)
    try:
        await writing
    except ConnectionError:
        raise ClientGone from None
    finally:
        if late is not None:
            late.cancel()


async def body_of_request(request: web.BaseRequest) -> bytes:
    """The body of a request. Raises ApiError."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        if request.content.is_eof():  # it has come with its head
            return await request.read()
        return await asyncio.wait_for(request.read(), BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_S:g} s", "slow_body") from None
    except web.HTTPRequestEntityTooLarge:
        limit = MOST_BODY_BYTES // 2**20
        raise ApiError(413, f"the body is over {limit} MiB", "large_body") from None


def request_id_of_headers(request: web.BaseRequest) -> str:
    """The client's X-Request-Id where it is fit to be logged, else a new one."""
    given = request.headers.get(REQUEST_ID)
    if given is not None and FIT_ID.fullmatch(given.encode("utf-8", "surrogateescape")):
        return given
    return new_request_id()


def new_request_id() -> str:
    import uuid

    return uuid.uuid4().hex


def drop_hop_headers(headers: CIMultiDict[str]) -> None:
    """Take out what is of one connection, and what the header Connection names."""
    names = list(HOP_HEADERS)
    for name in headers.get("connection", "").lower().split(","):
        names.append(name.strip())
    for name in names:
        if name and name in headers:
            headers.popall(name)


def is_streamed(reply: aiohttp.ClientResponse) -> bool:
    """Whether an answer comes in parts that its client should see as they are made."""
    return reply.content_type in ("text/event-stream", "application/x-ndjson")


def answered_row(parsed: RequestBody, tokens: int, finished: bool) -> str:
    """A line that train.py --task predictor and predictor.update read."""
    row: dict[str, Any] = {"prompt": parsed.prompt, "output_tokens": tokens, "finished": finished}
    model = parsed.members.get("model")
    if model is not None and isinstance(model.value, str):
        row["served_model"] = model.value
    return json.dumps(row)


def scope_of(request: web.BaseRequest) -> dict[str, Any]:
    """What Exchange.line reads of a request."""
    return {
        "raw_path": request.raw_path.partition("?")[0].encode("utf-8", "surrogateescape"),
        "client": (request.remote,),
        "method": request.method,
    }


def number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
