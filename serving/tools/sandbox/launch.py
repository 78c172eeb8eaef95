"""What the interpreter's process does: locks a child in, lets it answer, and waits for its end.

    python -I -c "..." ROOT WAY CONTROL        started by serving.tools.interpreter alone

The first frame that comes says the limits; the first that goes is {"ready": WAY}, or {"refused"}
in one line. Through the pipe CONTROL come single bytes: STOP and CONTINUE for the child; its end
is the child's end.
"""

import os
import select
import signal
import sys
from contextlib import suppress

from serving.tools.sandbox.frames import encode_frame, read_frame, write_all
from serving.tools.sandbox.isolation import (
    IsolationRefused,
    SandboxLimits,
    lock_in,
    prepare_namespaces,
)
from serving.tools.sandbox.worker import OutputLimits, answer_runs, hide_standard_files

REFUSED = 3  # exit status
STOP, CONTINUE = b"s", b"c"
SIGNALS = {STOP: signal.SIGSTOP, CONTINUE: signal.SIGCONT}
PARENT_CHECK_MS = 5000


def main() -> int:
    way, control = sys.argv[2], int(sys.argv[3])
    sys.path.remove(sys.argv[1])
    sys.argv = [""]
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
        write_all(replies, encode_frame({"refused": f"namespaces: {error.strerror or error}"}))
        return REFUSED
    child = os.fork()
    if child == 0:
        os.close(control)
        os._exit(run_locked_in(way, limits, output, requests, replies))
    os.close(replies)
    os.close(requests)
    return supervise(child, control)


def run_locked_in(
    way: str, limits: SandboxLimits, output: OutputLimits, requests: int, replies: int
) -> int:
    """The child's life; its exit status."""
    try:
        lock_in(way, limits)
    except (OSError, IsolationRefused) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        write_all(replies, encode_frame({"refused": f"{way}: {reason or error}"}))
        return REFUSED
    write_all(replies, encode_frame({"ready": way}))
    answer_runs(requests, replies, output)
    return 0


def supervise(child: int, control: int) -> int:
    """Wait for the child's end, or end it with the parent; its status as a shell has it."""
    parent = os.getppid()
    handle = os.pidfd_open(child)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    waiting.register(control, select.POLLIN)
    while True:
        events = dict(waiting.poll(PARENT_CHECK_MS))
        if handle in events:
            break
        wanted = os.read(control, 4096) if control in events else CONTINUE
        is_over = not wanted or os.getppid() != parent
        number = signal.SIGKILL if is_over else SIGNALS[wanted[-1:]]
        if control in events or is_over:
            with suppress(OSError):  # it is just ending
                signal.pidfd_send_signal(handle, number)
        if is_over:
            break
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
