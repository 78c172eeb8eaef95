"""Runs Python as a user who is not root, in a mount namespace where this Python can be read.

python tests/serving/tools/as_user.py PROGRAM [ARGUMENT ...]      as root
"""

import os
import sys
import tempfile
from pathlib import Path

USER = 54321
CAP_SYS_ADMIN = 21


def main() -> None:
    root = Path(__file__).resolve().parents[3]
    sys.path.insert(0, str(root))
    from serving.tools.sandbox import kernel

    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    for folder in sorted({closed_parent(Path(sys.base_prefix)), closed_parent(root)} - {None}):
        open_parent(kernel, folder, [Path(sys.base_prefix), root])
    if sys.argv[1] == "user":
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    else:
        kernel.prctl(kernel.PR_CAPBSET_DROP, CAP_SYS_ADMIN)
    os.environ.update(HOME="/tmp")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])


def closed_parent(path: Path) -> Path | None:
    """The topmost folder above a path that others may not enter."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def open_parent(kernel, folder: Path, wanted: list[Path]) -> None:
    """Put an open folder in a closed one's place, with what is wanted of it."""
    inside = [path for path in wanted if path.is_relative_to(folder)]
    handles = []
    for path in inside:
        handles.append(tempfile.mkdtemp())
        kernel.mount(str(path), handles[-1], None, kernel.MS_BIND)
    kernel.mount("tmpfs", str(folder), "tmpfs", 0, "mode=755")
    for path, handle in zip(inside, handles):
        path.mkdir(parents=True)
        kernel.mount(handle, str(path), None, kernel.MS_BIND)
        kernel.checked(kernel.library().umount2(handle.encode(), 0), "umount2")
        os.rmdir(handle)


if __name__ == "__main__":
    main()
