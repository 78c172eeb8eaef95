"""A terminal, or a pipe: lines read, pieces of text written, signals and lines while it writes.

What a model writes is shown without control characters: it must not drive the terminal.
"""

import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

BLOCK = '"""'
COLORS = {"prompt": "1;32", "answer": "", "note": "2", "error": "31"}
# C0 and C1 but tab and line feed, and what turns text around.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
CONTROLS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


class Screen:
    """Where a conversation takes place.

    Attributes:
        interactive: a person types at a terminal.
    """

    def __init__(self, stdin: TextIO, stdout: TextIO, history_file: str | None = None) -> None:
        self.stdin, self.stdout = stdin, stdout
        self.interactive = stdin.isatty()
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colored = stdout.isatty() and not is_plain
        self.typed: deque[str] = deque()  # lines that came while an answer was written
        self._history_file = history_file
        self._readline_is_ready = False
        if isinstance(getattr(stdout, "errors", None), str) and hasattr(stdout, "reconfigure"):
            stdout.reconfigure(errors="replace")  # a terminal without this character

    def write(self, text: str) -> None:
        """A piece of an answer, at once."""
        self._put(text.translate(CONTROLS) if self.stdout.isatty() else text)

    def note(self, text: str, kind: str = "note") -> None:
        """A line of the program's own, for a person alone; `kind`: of COLORS."""
        if self.interactive:
            self._put_line(kind, text)

    def tell(self, text: str) -> None:
        """A line that is wanted with a pipe too: there it goes to the standard error output."""
        if self.interactive:
            self._put_line("note", text)
        else:
            print(f"serving.chat: {text.translate(CONTROLS)}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """A line of what is wrong."""
        if self.interactive:
            self._put_line("error", text)
        else:
            print(f"serving.chat: error: {text}", file=sys.stderr, flush=True)

    def _put_line(self, kind: str, text: str) -> None:
        line = self._colored(kind, text.translate(CONTROLS)) + "\n"
        if self.stdout.isatty():
            self._put(line)
        else:  # the answers go to a file
            print(line, end="", file=sys.stderr, flush=True)

    def _put(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()

    def read(self, prompt: str = "> ", prefill: str = "") -> str:
        """What is typed next: a line, lines joined by a backslash, or a block of three quotes.

        Raises:
            EOFError: no more comes. KeyboardInterrupt: Ctrl-C.
        """
        first = self._line(prompt, prefill)
        if first.strip().startswith(BLOCK):
            return self._block(first)
        lines = [first]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line("... "))
        return "\n".join(lines)

    def read_line(self) -> str:
        """A line of a pipe, as it is. Raises EOFError."""
        line = self.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _block(self, first: str) -> str:
        """Lines up to one that ends with three quotes."""
        rest = first.strip().removeprefix(BLOCK)
        lines = [rest] if rest else []
        if rest.endswith(BLOCK):
            return rest.removesuffix(BLOCK)
        while True:
            line = self._line("... ")
            if line.rstrip().endswith(BLOCK):
                last = line.rstrip().removesuffix(BLOCK)
                return "\n".join([*lines, last] if last else lines)
            lines.append(line)

    def _line(self, prompt: str, prefill: str = "") -> str:
        if self.typed:
            line = self.typed.popleft()
            self.note(f"{prompt}{line}")
            return line
        if not self.interactive:
            return self.read_line()
        self._prepare_readline(prefill)
        if not self.stdout.isatty():  # the answers go to a file
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        return input(self._colored("prompt", prompt, is_read=True))

    def _prepare_readline(self, prefill: str) -> None:
        """Line editing where Python has it; `prefill` stands in the line already."""
        try:
            import readline
        except ImportError:
            return
        readline.set_startup_hook(lambda: readline.insert_text(prefill) if prefill else None)
        if self._readline_is_ready:
            return
        self._readline_is_ready = True
        if self._history_file and os.path.exists(self._history_file):
            readline.read_history_file(self._history_file)

    def close(self) -> None:
        """Keep the typed lines, where a file for them is given."""
        if not (self._history_file and self._readline_is_ready):
            return
        import readline

        readline.write_history_file(self._history_file)

    def _colored(self, kind: str, text: str, is_read: bool = False) -> str:
        if not (self.colored and COLORS[kind]):
            return text
        begin, end = f"\x1b[{COLORS[kind]}m", "\x1b[0m"
        if is_read:  # readline counts no columns between these two
            begin, end = f"\001{begin}\002", f"\001{end}\002"
        return f"{begin}{text}{end}"

    @contextmanager
    def stoppable(self, stop: Callable[[], None]) -> Iterator["StopRequests"]:
        """Within it Ctrl-C, or a typed /stop, calls `stop`; a second Ctrl-C interrupts.

        Other lines that are typed meanwhile are read later.
        """
        requests = StopRequests(stop)
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, requests.on_signal) if is_main else None
        watcher = TypedLines(self.stdin, requests, self.typed) if self.interactive else None
        try:
            yield requests
        finally:
            if watcher is not None:
                watcher.close()
            if is_main:
                signal.signal(signal.SIGINT, before)


class StopRequests:
    """How often an answer was to be stopped."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop
        self.interrupts = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += 1
        if self.interrupts > 1:
            raise KeyboardInterrupt
        self.stop()


class TypedLines:
    """Reads a terminal's lines in a thread while an answer is written: "/stop" stops it."""

    def __init__(self, stdin: TextIO, requests: StopRequests, others: "deque[str]") -> None:
        self._input, self._requests, self._others = stdin.fileno(), requests, others
        self._awake, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="typed", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._input, self._awake], [], [])
            if self._awake in ready:
                return
            # A terminal gives one line at a time.
            data = os.read(self._input, 4096)
            if not data:
                return
            line = data.decode("utf-8", "replace").rstrip("\n")
            if line.strip() == "/stop":
                self._requests.stop()
            else:
                self._others.append(line)

    def close(self) -> None:
        os.write(self._wake, b".")
        self._thread.join()
        os.close(self._awake)
        os.close(self._wake)
