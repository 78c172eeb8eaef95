"""Signals that end a run before its last step: it saves first. Free of torch."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED = "stopped by signal"  # run.json's status
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedBySignal(Exception):
    """A signal ended the run before its last step; `folder` is the checkpoint of that step.

    Attributes:
        exit_code: 128 and the signal's number, as a shell has it: 143 after SIGTERM, 129 after
            SIGHUP, 130 after SIGINT.
    """

    def __init__(self, folder: Path, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {folder}")
        self.folder = folder
        self.exit_code = 128 + number


class SignalWatch:
    """A context in which STOP_SIGNALS are recorded; afterwards their handlers are as before.

    Attributes:
        number: of the last signal that came, 0 where none did.
    """

    number = 0

    def __enter__(self) -> "SignalWatch":
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may set none
            for number in STOP_SIGNALS:
                ignored = signal.getsignal(number) == signal.SIG_IGN
                if not (number == signal.SIGHUP and ignored):  # nohup
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember its number."""
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is meant

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
