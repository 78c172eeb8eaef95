"""What the page sends: read from requests of the server's own page alone. Free of torch."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from serving.server.access import EXCHANGE, ApiError

if TYPE_CHECKING:
    from fastapi import Request as HttpRequest

ReadBody = Callable[[Any], Awaitable[Any]]
Parsed = TypeVar("Parsed")


def check_own_page(http: "HttpRequest") -> None:
    """Raises ApiError where a browser says that another site's page sends the request.

    --cors_origins lets other pages chat; what runs code or writes files is for the own one.
    """
    if http.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ApiError(403, f"{http.url.path} is for this server's own page", "not_own_page")


async def read_page_body(
    http: "HttpRequest", read_body: ReadBody, parse: Callable[[dict[str, Any]], Parsed]
) -> Parsed:
    """What `parse` makes of the JSON object of a request of the server's own page.

    Args:
        read_body: the JSON of a request; raises ApiError or ValueError.
        parse: raises ValueError where a field is wrong.
    Raises:
        ApiError: another page sends it, or its body is wrong.
    """
    check_own_page(http)
    try:
        body = await read_body(http)
        if not isinstance(body, dict):
            raise ValueError(f"the body must be a JSON object, got {type(body).__name__}")
        return parse(body)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def check_fields(body: dict[str, Any], *names: str) -> None:
    """Raises ValueError where a body has other fields."""
    for name in body:
        if name not in names:
            raise ValueError(f"unknown field {name[:64]!r}; there are {', '.join(names)}")


def key_of(http: "HttpRequest") -> str | None:
    """The name of a request's API key; None without one."""
    exchange = http.scope.get(EXCHANGE)
    return exchange.key if exchange is not None else None
