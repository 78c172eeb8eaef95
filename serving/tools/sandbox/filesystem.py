"""The files of a sandboxed process: Python and the system's libraries to read, one folder to write.

They are a new root in a mount namespace: what is not mounted there does not exist.
"""

import os
import site
import stat
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from serving.tools.sandbox.kernel import (
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    make_read_only,
    make_root,
    mount,
)

MOUNT_POINT = "/proc"  # is everywhere, and holds nothing that the new root takes
WORK_FOLDERS = ("/tmp", "/sandbox")  # the second where Python itself is in the first
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
# Shared libraries, fonts and time zones; no configuration beside what they are found by.
SYSTEM = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/usr/share/fonts",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/fonts",
    "/etc/localtime",
)
INODES = 4096  # files in the work folder


def readable_paths() -> list[str]:
    """Folders and files that Python reads, that are there, none below another."""
    wanted = list(SYSTEM)
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        wanted.append(sysconfig.get_path(name))
    wanted.append(str(Path(sysconfig.get_path("stdlib")).parent))  # libpython, Tcl
    wanted += site.getsitepackages()
    if library := sysconfig.get_config_var("LIBDIR"):
        wanted.append(library)
    found: set[str] = set()
    for path in wanted:
        if os.path.exists(path):
            found |= {os.path.abspath(path), os.path.realpath(path)}
    kept: list[str] = []
    for path in sorted(found):
        if not any(path.startswith(f"{above}/") for above in kept):
            kept.append(path)
    return kept


def enter_new_root(mib: int, owner: int) -> str:
    """Make a root of `readable_paths`, some devices and a folder to write in, and enter it.

    Args:
        mib: what that folder may hold, in memory.
        owner: its user and group.
    Returns:
        The folder.
    Raises:
        OSError: the kernel does not let this process mount.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    sources = [(path, os.path.isdir(path)) for path in readable_paths()]
    work = work_folder([path for path, _ in sources])
    mount("tmpfs", MOUNT_POINT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, is_folder in sources:
        target = MOUNT_POINT + path
        place_for(target, is_folder)
        mount(path, target, None, MS_BIND | MS_REC)
        make_read_only(target)
    for path in DEVICES:
        if stat.S_ISCHR(os.stat(path).st_mode):
            place_for(MOUNT_POINT + path, False)
            mount(path, MOUNT_POINT + path, None, MS_BIND)
    os.mkdir(MOUNT_POINT + work)
    options = f"size={mib}m,nr_inodes={INODES},mode=700"
    mount("tmpfs", MOUNT_POINT + work, "tmpfs", MS_NOSUID | MS_NODEV, options)
    if owner != os.getuid():
        os.chown(MOUNT_POINT + work, owner, owner)
    make_root(MOUNT_POINT)
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    return work


def work_folder(sources: Sequence[str]) -> str:
    """The first of WORK_FOLDERS that holds nothing of what is mounted."""
    for folder in WORK_FOLDERS:
        if not any(path.startswith(f"{folder}/") for path in sources):
            return folder
    raise OSError(f"Python's folders lie in {' and '.join(WORK_FOLDERS)}")


def place_for(target: str, is_folder: bool) -> None:
    """Something to mount on."""
    if is_folder:
        os.makedirs(target, exist_ok=True)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    Path(target).touch()
