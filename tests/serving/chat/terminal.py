"""A command at a real terminal (pty): what it shows is read, keys are typed."""

import os
import pty
import select
import subprocess
import termios
import time
from pathlib import Path

from tests.finetune.runs import ROOT, child_env
from tests.warm import warm_python

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """python -m MODULE WORDS at a terminal of its own.

    Args:
        python: the executable; where the command hands file descriptors on, sys.executable.
    Attributes:
        shown: all that has come so far.
    """

    def __init__(self, *words, cwd: Path = ROOT, python: str | None = None, **env):
        self.master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO  # what is typed while an answer is written is not shown
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        # setsid makes the terminal the process's own, which Ctrl-C needs.
        command = ["setsid", "--ctty", "--wait", python or warm_python(), "-m"]
        command += map(str, words)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=child_env(TERM="xterm", **env),
        )
        os.close(slave)
        self.shown = ""
        self._bytes = b""
        self._seen = 0  # characters that `until` has passed

    def until(self, text: str, timeout_s: float = 60.0) -> str:
        """Wait until this is shown, after what was waited for before; what came up to its end."""
        end_s = time.monotonic() + timeout_s
        while (place := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end_s, f"no {text!r} in {self.shown[self._seen :]!r}"
            assert self._read(0.2), f"ended before {text!r}: {self.shown!r}"
        start, self._seen = self._seen, place + len(text)
        return self.shown[start : self._seen]

    def type(self, text: str):
        os.write(self.master, text.encode())

    def enter(self, text: str):
        self.type(text + "\n")

    def press(self, key: str, text: str):
        """Press a control key until this is shown.

        One that comes while the line editor sets the terminal up may be lost, as for a person.
        """
        for _ in range(20):
            self.type(key)
            end_s = time.monotonic() + 1.0
            while time.monotonic() < end_s and text not in self.shown[self._seen :]:
                self._read(0.1)
            if text in self.shown[self._seen :]:
                break
        self.until(text, 1.0)

    def end(self, key: str = "", timeout_s: float = 30.0) -> int:
        """Read to the end; the exit code. A key is pressed every second until then."""
        end_s = time.monotonic() + timeout_s
        press_s = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() < end_s, f"it goes on: {self.shown[-300:]!r}"
            if key and time.monotonic() >= press_s:
                self.type(key)
                press_s += 1.0
            self._read(0.2)
        while self._read(0.2):
            pass
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, wait_s: float) -> bool:
        """Take what is shown; False where there is nothing more."""
        ready, _, _ = select.select([self.master], [], [], wait_s)
        if not ready:
            return self.process.poll() is None
        try:
            data = os.read(self.master, 65536)
        except OSError:  # its other end is closed
            return False
        self._bytes += data
        self.shown = self._bytes.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_):
        self.close()
