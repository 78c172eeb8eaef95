"""What the interpreter's process does: locks a child in, lets it answer, and waits for its end.

    python -I -c "..." ROOT WAY        started by serving.tools.interpreter alone

The first frame that comes says the limits; the first that goes is {"ready": WAY}, or {"refused"}
in one line. SIGUSR1 stops the child between two runs, SIGUSR2 lets it go on.
"""

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from serving.tools.sandbox.frames import encode_frame, read_frame, write_all
from serving.tools.sandbox.isolation import (
    IsolationRefused,
    SandboxLimits,
    lock_in,
    prepare_namespaces,
)
from serving.tools.sandbox.worker import OutputLimits, answer_runs, hide_standard_files

REFUSED = 3  # exit status
PARENT_CHECK_MS = 5000


def main() -> int:
    way = sys.argv[2]
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # may come before `supervise`
        signal.signal(number, signal.SIG_IGN)
    sys.path.remove(sys.argv[1])
    requests, replies = hide_standard_files()
    asked = read_frame(requests, 0)
    if asked is None:
        return REFUSED
    limits = SandboxLimits(**asked.body["limits"])
    output = OutputLimits(**asked.body["output"])
    try:
        if way == "namespaces":
            prepare_namespaces()
    except OSError as error:
        write_all(replies, encode_frame({"refused": f"namespaces: {error}"}))
        return REFUSED
    child = os.fork()
    if child == 0:
        os._exit(run_locked_in(way, limits, output, requests, replies))
    os.close(replies)
    return supervise(child, requests)


def run_locked_in(
    way: str, limits: SandboxLimits, output: OutputLimits, requests: int, replies: int
) -> int:
    """The child's life; its exit status."""
    try:
        lock_in(way, limits)
    except (OSError, IsolationRefused) as error:
        write_all(replies, encode_frame({"refused": f"{way}: {error}"}))
        return REFUSED
    write_all(replies, encode_frame({"ready": way}))
    answer_runs(requests, replies, output)
    return 0


def supervise(child: int, requests: int) -> int:
    """Wait for the child's end, or end it with the parent; its status as a shell has it."""
    parent = os.getppid()
    handle = os.pidfd_open(child)

    def send(number: int) -> None:
        with suppress(OSError):  # it is just ending
            signal.pidfd_send_signal(handle, number)

    def pass_on(number: int) -> Callable[[int, FrameType | None], Any]:
        return lambda received, frame: send(number)

    signal.signal(signal.SIGUSR1, pass_on(signal.SIGSTOP))
    signal.signal(signal.SIGUSR2, pass_on(signal.SIGCONT))
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    waiting.register(requests, 0)  # POLLHUP: the parent has closed its end, or has ended
    while True:
        events = dict(waiting.poll(PARENT_CHECK_MS))
        if handle in events:
            break
        if requests in events or os.getppid() != parent:
            send(signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
