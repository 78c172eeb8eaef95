"""The code interpreter as a tool, and the interpreters of many conversations."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any

from serving.tools.interpreter import InterpreterLimits, PythonInterpreter, RunResult
from serving.tools.registry import Tool, ToolResult, tool_of

CONVERSATIONS = 4  # whose processes stay
IDLE_S = 900.0


def python_tool(interpreter: PythonInterpreter) -> Tool:
    """The tool `python` of a conversation's interpreter. Off unless a program adds it.

    Raises:
        InterpreterRefused: this machine cannot lock it in.
    """
    interpreter.start()
    return tool_running(interpreter.run)


def described_python() -> dict[str, Any]:
    """OpenAI's object of the tool `python`."""
    return tool_running(PythonInterpreter().run).described()


def tool_running(run: Callable[[str], RunResult]) -> Tool:
    """The tool `python`, whose code goes to `run`."""

    def python(
        code: Annotated[str, "Python code; the value of its last line is shown"],
    ) -> ToolResult:
        """Run Python code in a sandbox without network; variables stay until the next call.

        print() what you need to see. numpy and matplotlib may be there; figures come back as
        images. Files can be written in the current folder alone.
        """
        result = run(code)
        return ToolResult(result.text, result.images, result.failed)

    return tool_of(python)


class InterpreterPool:
    """Interpreters by conversation. One conversation never sees another's variables or files.

    Args:
        most: conversations whose processes stay; the one that was used longest ago ends first, of
            those that do not run code.
        idle_s: after which a process ends, when another is asked for.
    """

    def __init__(
        self,
        limits: InterpreterLimits | None = None,
        most: int = CONVERSATIONS,
        idle_s: float = IDLE_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self.most, self.idle_s = limits, most, idle_s
        self._now_s = now_s
        self._open: OrderedDict[str, tuple[PythonInterpreter, float]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, conversation: str) -> PythonInterpreter:
        """The conversation's interpreter, new where it has none (any more)."""
        ended: list[PythonInterpreter] = []
        with self._lock:
            now_s = self._now_s()
            known = self._open.pop(conversation, None)
            interpreter = PythonInterpreter(self.limits) if known is None else known[0]
            self._open[conversation] = (interpreter, now_s)
            for other, (oldest, used_s) in list(self._open.items()):
                is_beyond = len(self._open) > self.most or used_s < now_s - self.idle_s
                if is_beyond and other != conversation and not oldest.is_busy:
                    del self._open[other]
                    ended.append(oldest)
        for oldest in ended:
            oldest.close()
        return interpreter

    def end(self, conversation: str) -> None:
        with self._lock:
            known = self._open.pop(conversation, None)
        if known is not None:
            known[0].close()

    def close(self) -> None:
        """End every process."""
        with self._lock:
            left = [interpreter for interpreter, _ in self._open.values()]
            self._open.clear()
        for interpreter in left:
            interpreter.close()
