"""The process that a recording lasts for: one that runs already, or a command."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

PROC = Path("/proc")
END_S = 10.0  # for a command to end after SIGTERM


class Watched(Protocol):
    """What a recording ends with."""

    def has_ended(self) -> bool: ...

    def close(self) -> int:
        """End what was started here; the exit code."""


class Nothing:
    """Nothing is watched: other limits end the recording."""

    def has_ended(self) -> bool:
        return False

    def close(self) -> int:
        return 0


class WatchedProcess:
    """A process by its id, of any user. Raises ValueError where there is none."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = process_start(pid)
        if self._began is None:
            raise ValueError(f"--pid {pid}: no such process runs")

    def has_ended(self) -> bool:
        # Another process may have the id by now: its start differs.
        return process_start(self._pid) != self._began

    def close(self) -> int:
        return 0


def process_start(pid: int) -> str | None:
    """When a process began, in ticks; None where it has ended (a zombie has)."""
    try:
        text = (PROC / str(pid) / "stat").read_text("utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return None if fields[0] in ("Z", "X") else fields[19]


class WatchedCommand:
    """A command that is started now. Raises ValueError where it cannot be."""

    def __init__(self, words: Sequence[str]) -> None:
        if shutil.which(words[0]) is None:
            raise ValueError(f"-- {words[0]}: no such program")
        try:
            self._process = subprocess.Popen(list(words), env=os.environ)
        except OSError as error:
            raise ValueError(f"-- {words[0]}: {error.strerror or error}") from None

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> int:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        code = self._process.returncode
        return 128 - code if code < 0 else code
