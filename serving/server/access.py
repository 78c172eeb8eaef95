"""Access control before the application, by Host header and API key; and the access log.

ASGI middleware, free of torch.
"""

import hmac
import ipaddress
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

access_logger = logging.getLogger("serving.access")

OPEN_PATHS = ("/health",)  # a supervisor's probe sends no key


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
        api_key: required as "Authorization: Bearer KEY" for all paths but OPEN_PATHS;
            None for no key.
        hosts: values that the Host header may have, besides those of loopback; None for any.
    """

    api_key: str | None = None
    hosts: frozenset[str] | None = None

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError."""
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts and not is_loopback(host):
            raise ApiError(
                403, f"this server is not {host[:64]!r} (--allowed_hosts)", "host_not_allowed"
            )
        if self.api_key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(
            key.strip(), self.api_key.encode()
        ):
            wanted = "wanted the header Authorization: Bearer KEY, with the key of --api_key"
            raise ApiError(401, wanted, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


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
                self.rules.check(scope["path"], dict(scope["headers"]))
            except ApiError as error:
                await send_error(error, send)
                return
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


class AccessLog:
    """A line for each request when it has ended: client, method, path, status and seconds.

    Headers, queries and bodies are not logged.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def send_and_note_status(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            client = (scope.get("client") or ("-",))[0]
            # The raw path is percent-encoded, so that it cannot contain a newline.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
            access_logger.info(
                "%s %s %s %d %.3f s",
                client,
                scope["method"],
                path,
                status or 500,
                time.perf_counter() - begin,
            )
