"""Runs the code that it is sent, in one namespace, and answers with its output. Locked in before.

This is the one place of the project that executes text: it runs in a process of which
serving.tools.sandbox.isolation has taken what it could do harm with.
"""

import ast
import builtins
import io
import linecache
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from serving.tools.sandbox.frames import encode_frame, read_frame, write_all


@dataclass(frozen=True)
class OutputLimits:
    """What of a run is sent back.

    Attributes:
        characters: of the output, of the value, and of the traceback, each.
        images: of a run. image_bytes: of all of them.
        image_pixels: of a figure's side.
    """

    characters: int = 4000
    images: int = 4
    image_bytes: int = 4 << 20
    image_pixels: int = 2000


class BoundedText(io.TextIOBase):
    """A text stream that keeps its first characters."""

    def __init__(self, most: int) -> None:
        self.most, self.kept, self.dropped = most, "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        room = self.most - len(self.kept)
        self.kept += text[:room]
        self.dropped += max(0, len(text) - room)
        return len(text)


class Session:
    """The variables of a conversation, and what of its runs is told."""

    def __init__(self, limits: OutputLimits) -> None:
        self.limits = limits
        self.variables: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
        self.runs = 0

    def run(self, code: str) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        """The answer's fields and images of a piece of code."""
        self.runs += 1
        output = BoundedText(self.limits.characters)
        answer: dict[str, Any] = {"value": None, "error": None}
        images: list[bytes] = []
        with redirect_stdout(output), redirect_stderr(output), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*non-interactive.*")  # plt.show() of Agg
            try:
                value = self.execute(code)
                if value is not None:
                    images += picture_of(value, self.limits)
                    answer["value"] = repr(value)[: self.limits.characters]
                    self.variables["_"] = value
            except BaseException as error:
                answer["error"] = self.describe(error)
            try:
                images += figures(self.limits)
            except Exception as error:
                answer["error"] = answer["error"] or self.describe(error)
        answer["output"] = output.kept
        answer["dropped"] = output.dropped
        return answer, within(images, self.limits)

    def execute(self, code: str) -> Any:
        """Run it; the value of its last line, where that is an expression."""
        name = f"<run {self.runs}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self.variables)
        if not isinstance(last, ast.Expr):
            return None
        return eval(compile(ast.Expression(last.value), name, "eval"), self.variables)

    def describe(self, error: BaseException) -> str:
        """A traceback's end, without the frames of this file."""
        shown = error.__traceback__
        while shown is not None and shown.tb_frame.f_code.co_filename == __file__:
            shown = shown.tb_next
        lines = traceback.format_exception(type(error), error, shown, limit=-20)
        return "".join(lines)[-self.limits.characters :]


def picture_of(value: Any, limits: OutputLimits) -> list[bytes]:
    """The PNG that a value shows itself as in notebooks; a figure is among `figures`."""
    draw: Callable[[], Any] | None = getattr(type(value), "_repr_png_", None)
    if draw is None:
        return []
    drawn = value._repr_png_()
    return [drawn] if isinstance(drawn, bytes) else []


def figures(limits: OutputLimits) -> list[bytes]:
    """The PNGs of matplotlib's open figures, which are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    drawn = []
    for number in pyplot.get_fignums()[: limits.images]:
        figure = pyplot.figure(number)
        longest = max(1.0, *figure.get_size_inches())
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=min(100.0, limits.image_pixels / longest))
        drawn.append(file.getvalue())
    pyplot.close("all")
    return drawn


def within(images: list[bytes], limits: OutputLimits) -> tuple[bytes, ...]:
    """The first images that fit."""
    kept: list[bytes] = []
    left = limits.image_bytes
    for image in images[: limits.images]:
        if 0 < len(image) <= left:
            kept.append(image)
            left -= len(image)
    return tuple(kept)


def answer_runs(requests: int, replies: int, limits: OutputLimits) -> None:
    """Run what comes through a pipe until it ends."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its cache is not kept
    session = Session(limits)
    while (request := read_frame(requests, 0)) is not None:
        answer, images = session.run(request.body["code"])
        answer["id"] = request.body["id"]
        write_all(replies, encode_frame(answer, images))


def hide_standard_files() -> tuple[int, int]:
    """Take the pipes from standard input and output; what is printed there is lost.

    Returns:
        The pipe of requests, the pipe of replies.
    """
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return requests, replies
