"""Calls of the Linux kernel that Python 3.10 has no functions for."""

import ctypes
import os
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x40000, 0x2, 0x4
MS_RDONLY, MS_REMOUNT = 0x1, 0x20
MNT_DETACH = 2
CAPABILITY_VERSION_3 = 0x20080522
CAPABILITIES = 64  # more than any kernel has
NUMBERS = {  # of calls without a function in the C library
    "x86_64": {"pivot_root": 155, "capset": 126, "mount_setattr": 442},
    "aarch64": {"pivot_root": 41, "capset": 91, "mount_setattr": 442},
}
LANDLOCK = {"create_ruleset": 444, "add_rule": 445, "restrict_self": 446}


def library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a call. Raises OSError, with what was tried, where it is -1."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system_call(what: str, number: int, *arguments: Any) -> int:
    """Raises OSError."""
    words = []
    for argument in arguments:
        words.append(ctypes.c_long(argument) if isinstance(argument, int) else argument)
    return checked(library().syscall(ctypes.c_long(number), *words), what)


def named_call(name: str, *arguments: Any) -> int:
    """One of NUMBERS. Raises OSError."""
    numbers = NUMBERS.get(os.uname().machine, {})
    if name not in numbers:
        raise OSError(f"{name}: its number on {os.uname().machine} is not known here")
    return system_call(name, numbers[name], *arguments)


def prctl(option: int, *arguments: int) -> int:
    """Raises OSError."""
    words = []
    for value in (*arguments, *(4 - len(arguments)) * (0,)):
        words.append(ctypes.c_ulong(value))
    return checked(library().prctl(ctypes.c_int(option), *words), f"prctl({option})")


def unshare(flags: int) -> None:
    """Raises OSError."""
    checked(library().unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Raises OSError."""
    result = library().mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    checked(result, f"mount on {target}")


class MountAttributes(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = [
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    ]


def make_read_only(target: str) -> None:
    """A mount and those below it: no writing, no devices, no set-user-ID. Linux 5.12. OSError."""
    attributes = MountAttributes(set=0x1 | 0x2 | 0x4)  # RDONLY, NOSUID, NODEV
    at_current_folder, recursive = -100, 0x8000
    named_call(
        "mount_setattr",
        at_current_folder,
        ctypes.c_char_p(target.encode()),
        recursive,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )


def make_root(folder: str) -> None:
    """A mount as the root, and nothing of the old one in reach. Raises OSError."""
    os.chdir(folder)
    here = ctypes.c_char_p(b".")
    named_call("pivot_root", here, here)
    checked(library().umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def drop_capabilities() -> None:
    """None is held or can be got again. Raises OSError."""
    for capability in range(CAPABILITIES):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the kernel has no more, or this process may not; no_new_privs holds as well
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    named_call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
