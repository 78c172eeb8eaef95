"""Around the application: request ids, the access log, and access by Host header and API key.

ASGI middleware, free of torch.
"""

import ipaddress
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from starlette.routing import Match

from serving.server.keys import KEY_VARIABLE, KeyRing

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
access_logger = logging.getLogger("serving.access")

# A supervisor's probe sends no key; the page asks for it, once it knows that one is needed.
OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/", "/page/api/access")
PAGE_FILES, PAGE_API = "/page/", "/page/api/"  # files below the one are open, but for the other
REQUEST_ID = "X-Request-Id"
FIT_ID = re.compile(rb"[!-~]{1,128}")  # printable ASCII without spaces
MAX_PATH_CHARACTERS = 200  # of a line of the access log
CLIENT_CLOSED_REQUEST = 499  # the client has disconnected before the response's end
EXCHANGE = "glm_foundry.exchange"  # the scope's key of the Exchange
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)


class ApiError(Exception):
    """An answer of HTTP status `status` with one line of what is wrong, and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class AccessRules:
    """The host and the key that a request must carry to be served.

    Attributes:
        keys: one of them is required as "Authorization: Bearer KEY" for all paths that are not
            `is_open_path`; None for no key.
        hosts: values that the Host header may have, besides those of loopback; None for any.
    """

    keys: KeyRing | None = None
    hosts: frozenset[str] | None = None

    def check(self, path: str, headers: dict[bytes, bytes]) -> str | None:
        """The name of the request's key; None where none is needed. Raises ApiError."""
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts and not is_loopback(host):
            raise ApiError(
                403, f"this server is not {host[:64]!r} (--allowed_hosts)", "host_not_allowed"
            )
        if self.keys is None or is_open_path(path):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        name = self.keys.find(key.strip()) if scheme.lower() == b"bearer" else None
        if name is None:
            wanted = "wanted the header Authorization: Bearer KEY, with a key of this server"
            raise ApiError(401, wanted, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return name


class AccessFlags(Protocol):
    """The flags that say who may ask, of serving.server and serving.gateway."""

    @property
    def host(self) -> str: ...
    @property
    def api_key(self) -> str | None: ...
    @property
    def api_keys(self) -> str | None: ...
    @property
    def allowed_hosts(self) -> str: ...


def access_rules_of(flags: AccessFlags, sock: socket.socket) -> AccessRules:
    """`access_rules_at` of the address of a listening socket."""
    return access_rules_at(flags, sock.getsockname()[0])


def access_rules_at(flags: AccessFlags, address: str) -> AccessRules:
    """The hosts and the keys that are accepted, from the flags and the environment.

    Args:
        address: that clients connect to; on loopback only its own names are accepted.
    Raises:
        ValueError, OSError: a key that no header can hold, or a file of keys that is wrong.
    """
    key = flags.api_key if flags.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        wanted = "printable ASCII characters, not empty, without spaces around them"
        raise ValueError(f"--api_key (or {KEY_VARIABLE}) must be {wanted}")
    keys = None
    if key is not None or flags.api_keys is not None:
        keys = KeyRing(key, Path(flags.api_keys) if flags.api_keys is not None else None)
    hosts = filter(None, map(str.strip, flags.allowed_hosts.split(",")))
    named = set(map(host_name, hosts))
    if named or is_loopback(address):
        return AccessRules(keys, frozenset(named | {flags.host.lower()}))
    return AccessRules(keys)


def is_open_path(path: str) -> bool:
    """Whether a path is answered without a key: probes, and the page's files."""
    if path in OPEN_PATHS:
        return True
    return path.startswith(PAGE_FILES) and not path.startswith(PAGE_API)


def host_name(host: str) -> str:
    """Of a Host header, without the port and an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def is_loopback(host: str) -> bool:
    """localhost or a loopback address; no other name, since its DNS record may change."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AccessControl:
    """ASGI middleware that answers requests against `rules` with an error."""

    def __init__(self, app: "ASGIApp", rules: AccessRules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http":
            try:
                key = self.rules.check(scope["path"], dict(scope["headers"]))
            except ApiError as error:
                note_error(scope, error)
                await send_error(error, send)
                return
            if (exchange := scope.get(EXCHANGE)) is not None:
                exchange.key = key
        await self.app(scope, receive, send)


async def send_error(error: ApiError, send: "Send") -> None:
    body = json.dumps(error.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(error.headers or {}),
    }
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Exchange:
    """One request and its response, while they last and when they have ended.

    Attributes:
        request_id: the client's, or a new one.
        key: the name of the key that it carries; None without one.
        error: what the application or the access control has answered instead of a response.
        status: sent; 0 before.
        sent_bytes: of the response's body.
        ended: the response is whole.
        disconnected: the client left before that.
    """

    request_id: str
    key: str | None = None
    error: ApiError | None = None
    status: int = 0
    sent_bytes: int = 0
    ended: bool = False
    disconnected: bool = False
    began: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    _began_s: float = field(default_factory=time.perf_counter)

    @property
    def logged_status(self) -> int:
        """The status of the response, and 499 where its client did not wait for its end."""
        return CLIENT_CLOSED_REQUEST if self.disconnected else self.status or 500

    def line(self, scope: "Scope") -> str:
        """The access log's JSON line, in ASCII. It has no headers, query or body."""
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
        fields = {
            "time": self.began.isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "client": (scope.get("client") or (None,))[0],
            "method": scope["method"],
            "path": path[:MAX_PATH_CHARACTERS],
            "status": self.logged_status,
            "seconds": round(time.perf_counter() - self._began_s, 4),
            "bytes": self.sent_bytes,
            "key": self.key,
        }
        return json.dumps(fields)


def note_error(scope: "Scope", error: ApiError) -> None:
    """Tell the observer of a request that it is answered with an error."""
    if (exchange := scope.get(EXCHANGE)) is not None:
        exchange.error = error


def request_id_of(scope: "Scope") -> str:
    """The client's X-Request-Id where it is fit to be logged, else a new one."""
    for name, value in scope["headers"]:
        if name == REQUEST_ID.lower().encode() and FIT_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex


def route_label(scope: "Scope") -> str:
    """The template of the route that a request goes to; "other" without one."""
    for route in scope["app"].routes:
        if route.matches(scope)[0] != Match.NONE:
            return route.path.replace(":path", "")
    return "other"


class RequestObserver:
    """The outermost middleware: gives each request its id, then logs and counts it.

    An exception of the application is answered here with 500, so that this response has an id too.

    Args:
        count: called with the route's template and the exchange when it has ended.
        writes_log: whether a line is written to the access log.
    """

    def __init__(
        self, app: "ASGIApp", count: Callable[[str, Exchange], None], writes_log: bool
    ) -> None:
        self.app, self.count, self.writes_log = app, count, writes_log

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = scope[EXCHANGE] = Exchange(request_id_of(scope))
        current_request_id.set(exchange.request_id)
        id_header = (REQUEST_ID.lower().encode(), exchange.request_id.encode())

        async def observed_receive() -> "Message":
            message = await receive()
            if message["type"] == "http.disconnect" and not exchange.ended:
                exchange.disconnected = True
            return message

        async def observed_send(message: "Message") -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message["headers"], id_header]}
            elif message["type"] == "http.response.body":
                if scope["method"] != "HEAD":
                    exchange.sent_bytes += len(message.get("body", b""))
                exchange.ended = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, observed_receive, observed_send)
        except Exception as error:
            if not exchange.status:
                failure = ApiError(500, f"internal error: {type(error).__name__}")
                await send_error(failure, observed_send)
            exchange.status = 500
            raise  # for the traceback that the server logs
        finally:
            self._observe(scope, exchange)

    def _observe(self, scope: "Scope", exchange: Exchange) -> None:
        if self.writes_log:
            access_logger.info(exchange.line(scope))
        try:
            self.count(route_label(scope), exchange)
        except Exception:  # figures must not end a connection
            log.exception("request %s was not counted", exchange.request_id)


def write_access_log() -> None:
    """Write the access log's lines to standard error as they are, without a logger's name."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_logger.addHandler(handler)
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False
