"""The JSON of a request's body, with its size, time and content type; and that of a response."""

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import Request as Http
from fastapi.responses import JSONResponse

from serving.server.access import ApiError
from serving.server.choices import CLOSING

BODY_BYTES = 2 * 2**20
CLIENT_S = 30.0  # for a whole body


@dataclass(frozen=True)
class BodyReader:
    """Reads bodies, until the server ends.

    Attributes:
        closing: ends the wait for bodies that are still being sent.
        client_s: within which a client must have sent its body.
    """

    closing: asyncio.Event
    client_s: float

    async def read(self, http: Http) -> Any:
        """The body's JSON.

        Raises:
            ApiError: it is not declared as JSON, is too large or too late, or `closing` came first.
            ValueError: it is no JSON.
        """
        check_json(http)
        return parse_json(await self.read_in_time(http))

    async def read_in_time(self, http: Http) -> bytearray:
        """The body; raises ApiError where it is too large or too late, or `closing` came first."""
        reading = asyncio.create_task(read_body(http))
        closing = asyncio.create_task(self.closing.wait())
        try:
            await asyncio.wait(
                {reading, closing}, timeout=self.client_s, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                return reading.result()
            if self.closing.is_set():
                raise ApiError(503, CLOSING, "unavailable", {"Connection": "close"})
            late = f"the body did not come within {self.client_s:g} s"
            raise ApiError(408, late, None, {"Connection": "close"})
        finally:
            reading.cancel()
            closing.cancel()


def check_json(http: Http) -> None:
    """Raises ApiError where the body is not declared as JSON.

    A web page of another origin can send other content types without a CORS preflight.
    """
    declared = http.headers.get("content-type", "")
    if declared.split(";")[0].strip().lower() != "application/json":
        wanted = "wanted the header Content-Type: application/json"
        remedy = "(curl -H content-type:application/json)"
        raise ApiError(415, f"{wanted} {remedy}, got {declared[:64]!r}")


async def read_body(http: Http) -> bytearray:
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"the body is larger than {BODY_BYTES:,} bytes")
    return body


def parse_json(body: bytearray) -> Any:
    """Raises ValueError where it is no JSON."""
    try:
        return json.loads(body.decode(), parse_constant=not_a_number, parse_float=finite_number)
    except RecursionError:
        raise ValueError("the body is not valid JSON: nested too deep") from None
    except ValueError as error:
        why = getattr(error, "msg", None) or str(error)[:100]
        raise ValueError(f"the body is not valid JSON: {why}") from None


def not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def finite_number(text: str) -> float:
    """The number of a text. Raises ValueError where it is beyond a double's range."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:32]} is beyond the range of a number")
    return number


class Utf8Json(JSONResponse):
    """A response's JSON in UTF-8; escaped where a text holds half of a surrogate pair.

    UTF-8 has no bytes for it, and a client's JSON, or a model's, can hold one.
    """

    def render(self, content: Any) -> bytes:
        try:
            return bytes(super().render(content))
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
