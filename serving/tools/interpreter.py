"""Runs Python code that a model wrote, in a process of serving.tools.sandbox, and brings it back.

A process is one conversation's: variables stay between runs. What comes from it is not trusted: it
is read with a deadline and a size, is JSON and PNG alone, and is shown without control characters.
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from serving.tools.sandbox.frames import (
    Frame,
    FrameError,
    encode_frame,
    read_frame,
    write_all,
)
from serving.tools.sandbox.isolation import WAYS, SandboxLimits
from serving.tools.sandbox.launch import CONTINUE, STOP
from serving.tools.sandbox.worker import OutputLimits

ROOT = str(Path(__file__).resolve().parents[2])
START = "import sys; sys.path.insert(0, sys.argv[1]); "
START += "from serving.tools.sandbox.launch import main; sys.exit(main())"
START_S = 30.0
CODE_CHARACTERS = 50_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_SIDE = 8192  # pixels
KILLED = 128 + signal.SIGKILL


class InterpreterRefused(RuntimeError):
    """This machine has not what the sandbox needs; the message says what, in one line."""


@dataclass(frozen=True)
class InterpreterLimits:
    """Attributes:
    wall_s: of a run, the start of its process aside.
    sandbox, output: what the process may use and send.
    """

    wall_s: float = 30.0
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)
    output: OutputLimits = field(default_factory=OutputLimits)


@dataclass(frozen=True)
class RunResult:
    """What came of a piece of code.

    Attributes:
        text: its output, the value of its last line, its traceback: as the model reads it.
        images: PNG files.
        failed: it raised, or was ended.
    """

    text: str
    images: tuple[bytes, ...] = ()
    failed: bool = False


class PythonInterpreter:
    """One conversation's sandboxed Python. Its process starts with the first run.

    Calls from several threads wait for one another.

    Args:
        way: "namespaces" or "landlock" (serving.tools.sandbox.isolation); None: the first that
            this machine has.
    """

    def __init__(self, limits: InterpreterLimits | None = None, way: str | None = None) -> None:
        self.limits = limits or InterpreterLimits()
        self.way = way
        self._process: subprocess.Popen[bytes] | None = None
        self._control: io.FileIO | None = None  # a pipe to its supervisor
        self._folder: str | None = None  # of a process that has no root of its own
        self._run = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "PythonInterpreter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """Whether it starts, runs code or ends."""
        return self._lock.locked()

    def start(self) -> None:
        """Start the process, where none runs.

        Raises:
            InterpreterRefused: a protection that it needs cannot be had on this machine.
        """
        with self._lock:
            self._start()

    def run(self, code: str) -> RunResult:
        """Run code; whatever it does, the result is a text.

        Raises:
            InterpreterRefused: as of `start`.
        """
        if len(code) > CODE_CHARACTERS:
            return RunResult(f"Error: code of more than {CODE_CHARACTERS} characters", failed=True)
        with self._lock:
            was_lost = self._process is not None and self._process.poll() is not None
            self._start()
            if was_lost:
                return lost("the process of earlier runs had ended; this code was not run")
            self._run += 1
            request = {"id": self._run, "code": code}
            deadline_s = time.monotonic() + self.limits.wall_s
            try:
                self._steer(CONTINUE)
                self._send(request, deadline_s)
                answer = self._receive(deadline_s)
                if answer is not None:
                    self._steer(STOP)
            except TimeoutError:
                self._end()
                return lost(f"the code ran longer than {self.limits.wall_s:g} s")
            except FrameError:
                self._end()
                return lost("its process sent what is no answer")
            except OSError:
                answer = None
            except BaseException:  # an interrupt: the answer is not waited for
                self._end()
                raise
            if answer is None:
                return lost(self._cause(self._end()))
            if answer.body.get("id") != self._run:
                self._end()
                return lost("its process sent what is no answer")
            return result_of(answer, self.limits.output)

    def close(self) -> None:
        """End the process and all that it has."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        if sys.platform != "linux":
            raise InterpreterRefused(
                f"the code interpreter needs Linux, whose kernel locks its process in; this is "
                f"{sys.platform}"
            )
        reasons = []
        for way in WAYS if self.way is None else (self.way,):
            reason = self._start_in(way)
            if reason is None:
                self.way = way
                return
            reasons.append(reason)
        raise InterpreterRefused(
            f"the code interpreter cannot be locked in here, so it is off: {'; '.join(reasons)}"
        )

    def _start_in(self, way: str) -> str | None:
        """None, or why this way cannot be had."""
        folder = "/"
        if way == "landlock":  # to read; matplotlib wants one
            self._folder = folder = tempfile.mkdtemp(prefix="glm-foundry-python-")
        ours, control = os.pipe()
        self._control = io.FileIO(control, "w")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", START, ROOT, way, str(ours)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment(folder),
            start_new_session=True,
            pass_fds=(ours,),
        )
        os.close(ours)
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        limits = self.limits
        deadline_s = time.monotonic() + START_S
        first = {"limits": asdict(limits.sandbox), "output": asdict(limits.output)}
        answer = None
        try:
            self._send(first, deadline_s)
            answer = self._receive(deadline_s)
        except (OSError, FrameError):
            pass
        except BaseException:  # an interrupt: nobody would read what it answers
            self._end()
            raise
        if answer is not None and answer.body.get("ready") == way:
            return None
        status = self._end()
        if answer is not None and isinstance(answer.body.get("refused"), str):
            return printable(answer.body["refused"])
        return f"{way}: its process ended with status {status}"

    def _send(self, body: dict[str, Any], deadline_s: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        write_all(self._process.stdin.fileno(), encode_frame(body), deadline_s)

    def _receive(self, deadline_s: float) -> Frame | None:
        assert self._process is not None and self._process.stdout is not None
        most = self.limits.output.image_bytes
        return read_frame(self._process.stdout.fileno(), most, deadline_s)

    def _steer(self, order: bytes) -> None:
        """STOP or CONTINUE the process that runs code."""
        assert self._control is not None
        self._control.write(order)

    def _cause(self, status: int | None) -> str:
        """Why a process ended by itself."""
        if status == KILLED:
            return f"it used its {self.limits.sandbox.cpu_s} CPU seconds, or too much memory"
        crashes = {128 + number: number.name for number in signal.Signals}
        if status in crashes:
            return f"it crashed ({crashes[status]})"
        return f"it ended its process (status {status})"

    def _end(self) -> int | None:
        """Kill what runs; the status of a process that had ended by itself."""
        process, self._process = self._process, None
        control, self._control = self._control, None
        status = None
        if control is not None:
            control.close()  # its supervisor kills the child, and ends
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                status = process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        return status


def environment(folder: str) -> dict[str, str]:
    """All that the process has of variables: nothing of this one's."""
    values = {"HOME": folder, "TMPDIR": folder, "MPLCONFIGDIR": folder, "MPLBACKEND": "Agg"}
    for name in ("OPENBLAS", "OMP", "MKL"):
        values[f"{name}_NUM_THREADS"] = "1"
    return {**values, "LANG": "C.UTF-8", "PATH": ""}


def lost(reason: str) -> RunResult:
    text = f"Error: {reason}. Its process was ended; variables and files are lost."
    return RunResult(text, failed=True)


def result_of(answer: Frame, limits: OutputLimits) -> RunResult:
    """The result in a frame, whatever it says."""
    parts = []
    for name in ("output", "value", "error"):
        value = answer.body.get(name)
        if isinstance(value, str) and value:
            parts.append(printable(value[: limits.characters]).rstrip("\n"))
        dropped = answer.body.get("dropped")
        if name == "output" and type(dropped) is int and dropped > 0:
            parts.append(f"[TRUNCATED: {dropped} more characters]")
    images = answer.images[: limits.images]
    images = tuple(image for image in images if is_png(image))
    parts += ["[Image]"] * len(images)
    failed = isinstance(answer.body.get("error"), str)
    return RunResult("\n".join(parts) or "(no output)", images, failed)


def is_png(image: bytes) -> bool:
    """Whether bytes begin as a PNG of a size that can be shown."""
    if not image.startswith(PNG_SIGNATURE) or image[12:16] != b"IHDR" or len(image) < 33:
        return False
    width, height = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
    return 0 < width <= PNG_SIDE and 0 < height <= PNG_SIDE


def printable(text: str) -> str:
    """A text without what steers terminals: control characters, halves of surrogate pairs."""
    kept = []
    for character in text:
        number = ord(character)
        is_control = number < 32 and character not in "\n\t" or 127 <= number < 160
        if not is_control and not 0xD800 <= number < 0xE000:
            kept.append(character)
    return "".join(kept)
