"""One request through an ASGI application in this process, as a stream of parts."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Protocol

from serving.cluster.messages import ForwardedRequest, ResponseHead

MOST_WAITING = 16  # messages of an application that nobody has read; then it waits
LEAVE_S = 5.0  # for an application to end after its client has left


class Application(Protocol):
    """An ASGI application."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None: ...


def scope_of_request(request: ForwardedRequest) -> dict[str, Any]:
    """ASGI's description of a request over HTTP."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
        "state": {},
    }


async def response_of(
    application: Application, request: ForwardedRequest
) -> AsyncGenerator[ResponseHead | bytes, None]:
    """The head of the response, then its body as it comes.

    A reader that stops is a client that has left: the application is told so.

    Raises:
        Exception: what the application raises before its response is whole.
    """
    messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(MOST_WAITING)
    left = asyncio.Event()
    unread = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if not left.is_set():
            await messages.put(message)

    async def run() -> None:
        try:
            await application(scope_of_request(request), receive, send)
        finally:
            if not left.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while True:
            message = await messages.get()
            if message is None:
                break
            if message["type"] == "http.response.start":
                headers = tuple((name, value) for name, value in message["headers"])
                yield ResponseHead(message["status"], headers)
                continue
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                return
        await task  # it has raised, or has ended without a response
        raise RuntimeError("the application ended before its response")
    finally:
        left.set()
        while not messages.empty():  # where it waits for room
            messages.get_nowait()
        await end_task(task)


async def end_task(task: "asyncio.Task[None]") -> None:
    """Wait for a task a little, then cancel it; what it raises is of no interest any more."""
    done, _ = await asyncio.wait([task], timeout=LEAVE_S)
    if not done:
        task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
