"""Locks this process in, for good: namespaces, limits, Landlock and seccomp, in this order.

Two ways: a root, network, processes and users of its own (namespaces) where the kernel lets this
user make them; else Landlock over the files that are there, and no file to write. Both have a
seccomp filter, and neither goes without: what cannot be had raises IsolationRefused.
"""

import ctypes
import os
import random
import resource
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass

from serving.tools.sandbox.filesystem import (
    DEVICES,
    enter_new_root,
    readable_paths,
)
from serving.tools.sandbox.kernel import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    drop_capabilities,
    prctl,
    unshare,
)
from serving.tools.sandbox.landlock import TRUNCATE_VERSION, landlock_version, restrict_files
from serving.tools.sandbox.system_calls import restrict_calls

NAMESPACES = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
UNMAPPED = (0x70000000, 0x7FFF0000)  # users that no system gives to anybody
NOBODY = 65534
INSIDE = 1000  # the user as the namespace sees it
MIB = 1 << 20
WAYS = ("namespaces", "landlock")


class IsolationRefused(Exception):
    """A protection cannot be had here; the message says which, in one line."""


@dataclass(frozen=True)
class SandboxLimits:
    """What the process may use.

    Attributes:
        cpu_s: CPU seconds of its whole life.
        memory_mib: addresses that it may map.
        files_mib: in its folder.
        open_files, threads: at a time.
    """

    cpu_s: int = 120
    memory_mib: int = 1024
    files_mib: int = 64
    open_files: int = 64
    threads: int = 32


def prepare_namespaces() -> None:
    """Own namespaces for this process, and of processes for its children. Raises OSError."""
    if os.geteuid() == 0:
        unshare(NAMESPACES)
    else:
        user, group = os.geteuid(), os.getegid()
        unshare(NAMESPACES | CLONE_NEWUSER)
        write_line("/proc/self/setgroups", "deny")
        write_line("/proc/self/uid_map", f"{INSIDE} {user} 1")
        write_line("/proc/self/gid_map", f"{INSIDE} {group} 1")
    socket.sethostname("sandbox")
    with suppress(OSError):
        unshare(CLONE_NEWCGROUP)


def write_line(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def lock_in(way: str, limits: SandboxLimits) -> None:
    """Lock this process in. It has one thread, and in namespaces its parent has prepared them.

    Raises:
        OSError, IsolationRefused.
    """
    if way == "landlock" and landlock_version() < TRUNCATE_VERSION:
        raise IsolationRefused(
            f"Landlock has version {landlock_version()}, and {TRUNCATE_VERSION} (Linux 6.2) or "
            "later is needed without user namespaces"
        )
    files = [*readable_paths(), *DEVICES]
    user = unprivileged_user()
    work = os.environ["HOME"]
    if way == "namespaces":
        work = enter_new_root(limits.files_mib, os.getuid() if user is None else user)
        for name in ("HOME", "TMPDIR", "MPLCONFIGDIR"):
            os.environ[name] = work
    set_limits(limits)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    drop_capabilities()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(work if way == "namespaces" else "/")
    if way == "landlock":
        restrict_files([path for path in files if os.access(path, os.R_OK)])
    elif landlock_version():
        restrict_files(["/"], [work, "/dev/null"])
    restrict_calls(attributes=way == "namespaces")
    check_walls(way)


def unprivileged_user() -> int | None:
    """Who a process of root becomes; None where it is nobody special."""
    if os.getuid() != 0 and os.geteuid() != 0:
        return None
    candidate = random.SystemRandom().randrange(*UNMAPPED)
    return candidate if is_mapped(candidate) else NOBODY


def is_mapped(user: int) -> bool:
    """Whether this user namespace has such a user: that of a container may have few."""
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        for line in lines:
            first, _, count = map(int, line.split())
            if first <= user < first + count:
                return True
    return False


def set_limits(limits: SandboxLimits) -> None:
    """Hard limits, which nothing inside can raise."""
    memory = limits.memory_mib * MIB
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.files_mib * MIB,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: limits.threads,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in wanted.items():
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            value = min(value, most)
        resource.setrlimit(kind, (value, value))


def check_walls(way: str) -> None:
    """Try what must fail. Raises IsolationRefused where it does not, or Python cannot be read."""
    try:
        os.listdir(os.path.dirname(os.__file__))
    except OSError as error:
        raise IsolationRefused(f"Python's own folder cannot be read there: {error}") from None
    for path in ("/etc/passwd", "/proc/self/status", "/sys", *(["/"] if way == "landlock" else [])):
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))
            raise IsolationRefused(f"{path} can be read in spite of {way}")
    with suppress(OSError):
        socket.socket().close()
        raise IsolationRefused("a socket can be made in spite of seccomp")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setuid(0) == 0 and os.getuid() == 0:
        raise IsolationRefused("the process can become root")
    with suppress(OSError):
        child = os.fork()
        if child == 0:
            os._exit(0)
        raise IsolationRefused("a process can be started in spite of seccomp")
