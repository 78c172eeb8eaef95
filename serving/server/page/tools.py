"""The tools of the server's page: routes that run a call and end a conversation's interpreter.

The page runs the loop of serving.tools.loop itself, and sends each call here. Free of torch and,
until the routes are made, of HTTP.
"""

import asyncio
import base64
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from chatglm.files import shorten
from serving.server.access import ApiError
from serving.server.fields import Text
from serving.server.page.bodies import ReadBody, check_fields, key_of, read_page_body
from serving.tools.flags import PYTHON, named_tools, started_interpreter
from serving.tools.interpreter import InterpreterRefused
from serving.tools.python_tool import InterpreterPool, described_python, python_tool
from serving.tools.registry import ToolRegistry, ToolResult, failure, read_arguments
from serving.tools.schemas import ArgumentsRefused

if TYPE_CHECKING:
    from fastapi import FastAPI

AT_ONCE = 4  # calls that run; no more than the pool's interpreters
CALL_S = 120.0
CLOSE_S = 2.0
RETRY_S = 2
CONVERSATION_CHARACTERS = 64
ARGUMENT_CHARACTERS = 200_000
CALL_ROUTE, END_ROUTE = "/page/api/tools/call", "/page/api/tools/end"
Result = TypeVar("Result")


class PageTools:
    """The tools that the page offers, and the interpreters of its conversations.

    Args:
        registry: without the code interpreter's.
        pool: of interpreters; None without them.
        call_s: after which a call has failed. Its thread goes on, and counts as one that runs.
    """

    def __init__(
        self, registry: ToolRegistry, pool: InterpreterPool | None = None, call_s: float = CALL_S
    ) -> None:
        self.registry, self.pool, self.call_s = registry, pool, call_s
        self._running = 0

    @classmethod
    def open(cls, words: list[str], code_interpreter: bool) -> "PageTools":
        """The tools that flags name.

        Raises:
            ValueError: as `named_tools` has it, or this machine cannot lock an interpreter in.
        """
        registry = named_tools(words, code_interpreter)
        if not code_interpreter:
            return cls(registry)
        started_interpreter().close()
        return cls(registry, InterpreterPool(most=AT_ONCE))

    def descriptions(self) -> list[dict[str, Any]]:
        """OpenAI's `tools`."""
        described = self.registry.descriptions()
        if self.pool is not None:
            described.append(described_python())
        return described

    def run(self, conversation: str, name: str, arguments: str) -> ToolResult:
        """Run a call; whatever it names, the result is a text. Blocks.

        Args:
            conversation: whose interpreter runs code.
        """
        if self.pool is None or name != PYTHON:
            return self.registry.call(name, arguments)
        try:
            values = read_arguments(arguments)
            return python_tool(self.pool.of(conversation)).call(values)
        except (ArgumentsRefused, InterpreterRefused) as error:
            return failure(f"{name}: {error}")

    async def call(self, conversation: str, name: str, arguments: str) -> ToolResult:
        """`run` in a thread of its own. Raises ApiError where AT_ONCE calls run already."""
        if self._running >= AT_ONCE:
            retry = {"Retry-After": str(RETRY_S)}
            raise ApiError(429, f"{AT_ONCE} tools run already; try again later", "busy", retry)
        self._running += 1
        ended = in_thread(lambda: self.run(conversation, name, arguments))
        ended.add_done_callback(self._call_ended)
        try:
            return await asyncio.wait_for(asyncio.shield(ended), self.call_s)
        except asyncio.TimeoutError:  # another class than TimeoutError before Python 3.11
            return failure(f"{name} took longer than {self.call_s:g} s")

    def _call_ended(self, call: "asyncio.Future[ToolResult]") -> None:
        self._running -= 1
        if not call.cancelled():
            call.exception()  # asyncio warns of one that nobody has seen

    async def end(self, conversation: str) -> None:
        """End a conversation's interpreter, once its run has ended."""
        if self.pool is not None:
            pool = self.pool
            await in_thread(lambda: pool.end(conversation))

    def close(self) -> None:
        """End all interpreters. Code that runs is not waited for: it ends with this process."""
        if self.pool is not None:
            closing = threading.Thread(target=self.pool.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)


class OffersTools(Protocol):
    """What of a Service the routes take."""

    page_tools: PageTools | None


def in_thread(work: Callable[[], Result]) -> "asyncio.Future[Result]":
    """What `work` returns, of a thread that no exit waits for: a tool may never return."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Result] = loop.create_future()

    def deliver(settle: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(lambda: None if ended.done() else settle(value))

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            deliver(ended.set_exception, error)
        else:
            deliver(ended.set_result, result)

    threading.Thread(target=run, name="tool", daemon=True).start()
    return ended


def read_conversation(body: dict[str, Any]) -> str:
    """The field `conversation`. Raises ValueError."""
    name = Text("", CONVERSATION_CHARACTERS).read("conversation", body.get("conversation"))
    plain = name.replace("-", "a")
    if not (plain.isascii() and plain.isalnum()):
        raise ValueError(f"conversation must be 1 to 64 letters, digits and -, got {shorten(name)}")
    return name


def read_call(body: dict[str, Any]) -> tuple[str, str, str]:
    """(conversation, name of a tool, arguments). Raises ValueError."""
    check_fields(body, "conversation", "name", "arguments")
    conversation = read_conversation(body)
    name = Text("", 256).read("name", body.get("name"))
    arguments = Text("", ARGUMENT_CHARACTERS).read("arguments", body.get("arguments"))
    return conversation, name, arguments


def read_end(body: dict[str, Any]) -> str:
    """The conversation that ends. Raises ValueError."""
    check_fields(body, "conversation")
    return read_conversation(body)


def add_tool_routes(app: "FastAPI", service: OffersTools, read_body: ReadBody) -> None:
    """The page's routes of tools, where the server has --tools or --code_interpreter.

    Args:
        read_body: the JSON of a request; raises ApiError or ValueError.
    """
    if service.page_tools is None:
        return
    from fastapi import Request as HttpRequest

    tools = service.page_tools

    def of_key(http: HttpRequest, conversation: str) -> str:
        """A name that no other key's conversation has: neither part has a slash."""
        return f"{key_of(http) or ''}/{conversation}"

    @app.post(CALL_ROUTE, include_in_schema=False)
    async def call_tool(http: HttpRequest) -> dict[str, Any]:
        conversation, name, arguments = await read_page_body(http, read_body, read_call)
        result = await tools.call(of_key(http, conversation), name, arguments)
        images = [base64.b64encode(image).decode() for image in result.images]
        return {"text": result.text, "images": images, "failed": result.failed}

    @app.post(END_ROUTE, include_in_schema=False)
    async def end_tools(http: HttpRequest) -> dict[str, Any]:
        conversation = await read_page_body(http, read_body, read_end)
        await tools.end(of_key(http, conversation))
        return {"ended": True}
