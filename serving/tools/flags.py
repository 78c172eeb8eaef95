"""The flags by which commands offer tools: --tools and --code_interpreter. Free of torch."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.tools.interpreter import PythonInterpreter
    from serving.tools.registry import ToolRegistry

SAMPLES_WORD = "samples"
PYTHON = "python"  # name of the code interpreter's tool


def add_tool_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tools")
    named = f"tools that the model may call: {SAMPLES_WORD} (weather, calculator, clock), or those "
    named += "of a Python file, which runs as your own program; repeatable"
    metavar = f"{SAMPLES_WORD}|FILE.py"
    group.add_argument("--tools", action="append", default=[], metavar=metavar, help=named)
    code = "let the model run Python in a sandbox without network (Linux) [off]"
    group.add_argument("--code_interpreter", action="store_true", help=code)


def named_tools(words: Sequence[str], code_interpreter: bool = False) -> "ToolRegistry":
    """The tools that --tools names.

    Args:
        words: each "samples" or a Python file.
        code_interpreter: the name `python` is the interpreter's.
    Raises:
        ValueError: a file does not run or has no tools, or two tools have one name.
    """
    from serving.tools.own_tools import load_tools
    from serving.tools.registry import ToolRegistry
    from serving.tools.samples import sample_registry

    registry = ToolRegistry()
    for word in dict.fromkeys(words):
        try:
            registry.add(*(sample_registry() if word == SAMPLES_WORD else load_tools(word)))
        except ValueError as error:
            raise ValueError(f"--tools {word}: {error}") from None
    if code_interpreter and PYTHON in registry:
        raise ValueError(f"--code_interpreter: --tools has a tool {PYTHON!r} already")
    return registry


def started_interpreter() -> "PythonInterpreter":
    """A code interpreter whose process runs.

    Raises:
        ValueError: this machine cannot lock it in; the message says why, in one line.
    """
    from serving.tools.interpreter import InterpreterRefused, PythonInterpreter

    interpreter = PythonInterpreter()
    try:
        interpreter.start()
    except InterpreterRefused as error:
        raise ValueError(f"--code_interpreter: {error}") from None
    return interpreter
