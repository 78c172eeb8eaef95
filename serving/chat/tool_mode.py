"""Tools in a conversation at a terminal: calls and results are lines, images are files."""

import json
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from serving.chat.screen import Screen
from serving.endpoints.replies import AnswerStream, ChatReply, completion_body
from serving.tools.flags import PYTHON, named_tools, started_interpreter
from serving.tools.interpreter import PythonInterpreter
from serving.tools.loop import ChatMessages, ToolStep, run_tools
from serving.tools.python_tool import python_tool
from serving.tools.registry import ToolRegistry, ToolResult, failure

LINE_CHARACTERS = 100  # of a call or a result on the screen
LOST = "; its variables and files are lost"
AskOnce = Callable[[dict[str, Any]], AnswerStream]


class ToolStopped(BaseException):
    """The person has stopped the tool that runs; no tool catches it."""


class ToolMode:
    """The tools of a session.

    Attributes:
        is_on: whether the model is shown them.
        images: folder of the images that tools give; None for a new temporary one.
    """

    def __init__(
        self,
        registry: ToolRegistry,
        screen: Screen,
        images: Path | None = None,
        interpreter: PythonInterpreter | None = None,
    ) -> None:
        self.registry, self.screen, self.images = registry, screen, images
        self.interpreter = interpreter
        self.is_on = True
        if interpreter is not None:
            registry.add(python_tool(interpreter))

    @classmethod
    def open(
        cls, words: list[str], screen: Screen, images: Path | None, code_interpreter: bool
    ) -> "ToolMode":
        """The tools that flags name.

        Raises:
            ValueError: as `named_tools` and `started_interpreter` have it.
        """
        registry = named_tools(words, code_interpreter)
        return cls(registry, screen, images, started_interpreter() if code_interpreter else None)

    def answering(self, ask: AskOnce) -> AskOnce:
        """What begins an answer, with the calls before it; `ask` asks the model once."""

        def begin(body: dict[str, Any]) -> AnswerStream:
            if self.is_on:
                return ToolTurn(self, ask, body)
            return ask(without_choice(body))

        return begin

    def lines(self) -> list[str]:
        """Each tool with what it does."""
        width = max(len(tool.name) for tool in self.registry)
        return [f"{tool.name.ljust(width)}  {tool.description}" for tool in self.registry]

    def show_call(self, name: Any, arguments: Any) -> None:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        self.screen.note(f"→ {shortened(f'{name} {text}')}")

    def show_result(self, result: ToolResult) -> None:
        """A line, and the paths of its images. Raises OSError where these cannot be written."""
        if result.failed:
            self.screen.note(f"✗ {shortened(result.text.removeprefix('Error: '))}", "error")
        else:
            self.screen.note(f"← {shortened(result.text)}")
        for image in result.images:
            self.screen.tell(f"image: {self.save_image(image)}")

    def save_image(self, image: bytes) -> Path:
        """Write a PNG under the first free number; its path."""
        if self.images is None:
            self.images = Path(tempfile.mkdtemp(prefix="glm-foundry-images-"))
        self.images.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = self.images / f"image-{number}.png"
            try:
                with path.open("xb") as file:
                    file.write(image)
                return path
            except FileExistsError:
                number += 1

    def end_conversation(self) -> None:
        """End the interpreter's process; the next run has a new one."""
        if self.interpreter is not None:
            self.interpreter.close()


class ToolTurn:
    """An answer with the calls before it: an AnswerStream.

    Its texts go to the screen as they come, so iterating yields nothing. The messages of its calls
    and their results are appended to the body's list.
    """

    def __init__(self, mode: ToolMode, ask: AskOnce, body: dict[str, Any]) -> None:
        self.mode, self.body = mode, body
        self._ask_once = ask
        self._stream: AnswerStream | None = None  # that is being read
        self._reply: ChatReply | None = None  # the model's last
        self._final: dict[str, Any] = {}
        self._runs_tool = self._stopped = self._has_called = False

    def __iter__(self) -> Iterator[str]:
        for step in run_tools(self._ask, self, self.body["messages"]):
            if step.result is None and "tool_calls" not in step.message:
                self._final = step.message
            else:
                self._add(step)
        return iter(())

    def _add(self, step: ToolStep) -> None:
        self.body["messages"].append(step.message)
        self._has_called = True
        if step.result is not None:
            self.mode.show_result(step.result)

    def stop(self) -> None:
        """End the answer, or the tool that runs; a tool only in the main thread.

        Raises:
            ToolStopped: in the main thread, where a tool runs.
        """
        self._stopped = True
        if (stream := self._stream) is not None:
            stream.stop()
        if not self._runs_tool:
            return
        main = threading.main_thread()
        if threading.current_thread() is main:
            self._runs_tool = False
            raise ToolStopped
        assert main.ident is not None
        signal.pthread_kill(main.ident, signal.SIGINT)  # whose handler calls this again

    def reply(self) -> ChatReply:
        """The answer; empty and "cancelled" where it was stopped in a tool."""
        reply = self._reply
        if reply is None or (self._stopped and reply.finish_reason != "cancelled"):
            return ChatReply(completion_body("", self._final, "cancelled", {}), 0.0)
        choice = reply.body["choices"][0] | {"message": self._final}
        return reply._replace(body=reply.body | {"choices": [choice]})

    def _ask(self, messages: ChatMessages, tools: list[dict[str, Any]]) -> Mapping[str, Any]:
        """The model's next message; its text is written as it comes."""
        if self._stopped:
            return {"content": ""}
        body = self.body | {"messages": list(messages)}
        if tools:
            body["tools"] = tools
        # A call that is forced is so once, else there would never be an answer.
        if not tools or (self._has_called and body.get("tool_choice") != "none"):
            body = without_choice(body)
        stream = self._ask_once(body)
        self._stream = stream
        if self._stopped:
            stream.stop()
        text = self._read(stream)
        self._stream = None
        reply = self._reply = stream.reply()
        message = dict(reply.message)
        if reply.finish_reason == "cancelled":
            message.pop("tool_calls", None)
        calls = message.get("tool_calls") if tools else None
        if self.mode.screen.interactive:
            if text and calls:
                self.mode.screen.write("\n")
        elif not calls:
            self.mode.screen.write(text)
        return message

    def _read(self, stream: AnswerStream) -> str:
        """The text of an answer; in a pipe only the last answer's is written, when it is whole."""
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if self.mode.screen.interactive:
                self.mode.screen.write(piece)
        return "".join(pieces)

    # ---- the tools, as the loop calls them

    def descriptions(self) -> list[dict[str, Any]]:
        return self.mode.registry.descriptions()

    def call(self, name: Any, arguments: Any) -> ToolResult:
        """Run a call. One that the person stops fails, and so do those after it."""
        self.mode.show_call(name, arguments)
        if self._stopped:
            return failure("not run: the user has stopped the answer")
        try:
            self._runs_tool = True
            result = self.mode.registry.call(name, arguments)
            self._runs_tool = False
        except ToolStopped:
            lost = LOST if name == PYTHON and self.mode.interpreter is not None else ""
            return failure(f"{name}: stopped by the user{lost}")
        finally:
            self._runs_tool = False
        return result


def without_choice(body: dict[str, Any]) -> dict[str, Any]:
    """A request's body without tool_choice, which needs tools."""
    return {name: value for name, value in body.items() if name != "tool_choice"}


def shortened(text: str) -> str:
    """A text in one line of the screen."""
    line = " ".join(text.split())
    return line if len(line) <= LINE_CHARACTERS else f"{line[: LINE_CHARACTERS - 1]}…"
