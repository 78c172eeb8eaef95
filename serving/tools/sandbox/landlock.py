"""Which files a process may open, by Landlock (Linux 5.13; userspace-api/landlock.rst)."""

import ctypes
import os
from collections.abc import Iterable

from serving.tools.sandbox.kernel import LANDLOCK, system_call

VERSION_FLAG = 1  # LANDLOCK_CREATE_RULESET_VERSION
PATH_BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH
READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
TRUNCATE = 1 << 14
TRUNCATE_VERSION = 3  # the first that keeps other files from being emptied
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # of files
NETWORK_VERSION, NETWORK = 4, 0x3  # bind and connect of TCP
SCOPE_VERSION, SCOPES = 6, 0x3  # abstract sockets, signals to others


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class PathRule(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def landlock_version() -> int:
    """Of the kernel's interface; 0 without one."""
    try:
        return system_call(
            "landlock", LANDLOCK["create_ruleset"], ctypes.c_void_p(), 0, VERSION_FLAG
        )
    except OSError:
        return 0


def restrict_files(readable: Iterable[str], writable: Iterable[str] = ()) -> None:
    """Let this process, for good, open only these folders and files; it needs no_new_privs.

    Network and signals are taken too where the kernel's Landlock knows them.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    files = RIGHTS[max(known for known in RIGHTS if known <= max(version, 1))]
    attributes = Ruleset(files=files)
    size = 8
    if version >= NETWORK_VERSION:
        attributes.network = NETWORK
        size = 16
    if version >= SCOPE_VERSION:
        attributes.scoped = SCOPES
        size = 24
    create = LANDLOCK["create_ruleset"]
    rules = system_call("landlock_create_ruleset", create, ctypes.byref(attributes), size, 0)
    for path in readable:
        allow(rules, path, READ_FILE | READ_FOLDER)
    for path in writable:
        allow(rules, path, files)
    system_call("landlock_restrict_self", LANDLOCK["restrict_self"], rules, 0)
    os.close(rules)


def allow(rules: int, path: str, rights: int) -> None:
    """Add a folder and what is below it, or a file. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= READ_FILE | WRITE_FILE | TRUNCATE
    rule = PathRule(allowed=rights, parent=descriptor)
    add = LANDLOCK["add_rule"]
    system_call("landlock_add_rule", add, rules, PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(descriptor)
