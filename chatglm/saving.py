"""Folders that are written aside and renamed into place, whole or not at all. Free of torch."""

import ctypes
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checksums import write_checksums

CANNOT = "cannot be written: "
LOCK = ".lock"


class NoRoom(OSError):
    """What is to be written would not fit on the disk; of a checkpoint, raised on every rank."""


def check_disk(folder: Path, needed: int, what: str = "a checkpoint") -> None:
    """Raises NoRoom naming the bytes wanted and free when `needed` bytes would not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(
            f"{folder}: {what} takes about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Force every file and folder below `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def set_modes(folder: Path) -> None:
    """Give the files below `folder` the mode of the umask: safetensors writes 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def is_free(output: Path) -> bool:
    """Whether a folder can be written there: there is nothing, or an empty folder."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def put_in_place(aside: Path, output: Path) -> None:
    """Write checksums in the folder `aside` and move it to `output`, as `move_in_place` does."""
    set_modes(aside)
    write_checksums(aside)
    move_in_place(aside, output)


def move_in_place(aside: Path, output: Path) -> None:
    """Flush the folder `aside` and move it to `output`.

    A folder at `output`, or where that is a link to, is swapped with it, atomically where the
    system can, and is at `aside` afterwards.
    """
    output = output.resolve()
    flush_tree(aside)
    if output.exists():
        exchange(aside, output)
    else:
        os.replace(aside, output)
    flush(output.parent)


def exchange(aside: Path, output: Path) -> None:
    """Swap two folders atomically where the system can (renameat2 of Linux), else by renames."""
    cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None).renameat2
        if rename(cwd, os.fsencode(aside), cwd, os.fsencode(output), swap) == 0:
            return
    old = aside.with_name(f"{aside.name}.old")
    os.replace(output, old)
    try:
        os.replace(aside, output)
    except OSError:
        os.replace(old, output)
        raise
    os.replace(old, aside)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A context in which torch's and safetensors' errors of the disk become an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        by_torch = "PytorchStreamWriter" in text or "iostream" in text
        if by_torch or isinstance(error, SafetensorError):
            raise OSError(errno.EIO, CANNOT + text[:200], str(path)) from error
        raise


@contextmanager
def held_aside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` to write into; what is left of it goes when the block ends.

    Raises:
        ValueError: another process is writing `output`.
        OSError: it cannot be made.
    """
    output = output.resolve()  # "." has no name, and of a link the folder is written
    aside = output.with_name(f".{output.name}.tmp")
    with locked_output(output, "the folder"):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked_output(output: Path, flag: str) -> Iterator[None]:
    """Hold the lock of a file or folder that this process writes: a folder beside it.

    Raises:
        ValueError: another process holds it; the message names `flag`.
        OSError: the folder cannot be made.
    """
    output = output.resolve()
    guard = output.with_name(f".{output.name}.writing")
    try:
        with locked_folder(guard, flag, output):
            yield
    finally:
        remove_empty([guard])  # a killed process leaves it


@contextmanager
def locked_folder(folder: Path, flag: str, named: Path | None = None) -> Iterator[None]:
    """Make `folder` and hold its lock; the lock of a killed process is free again.

    On NFS the lock holds between machines too, unless it is mounted with local_lock or nolock. On
    a file system without locks a warning is printed and no lock is held.

    Args:
        named: what messages call the folder, where that is another one.
    Raises:
        ValueError: another process holds it; the message names `flag`, process and machine.
    """
    import fcntl

    named = named or folder
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            if folder.is_dir():
                raise
            continue  # its owner has just ended and removed the folder
        try:
            # Not flock: a forked worker must not inherit the lock.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"{flag} {named} is in use by another run ({owner or 'just started'}); "
                "wait for it or name another one"
            ) from None
        except OSError as error:
            print(
                f"WARNING: {named} cannot be locked ({error.strerror}): start no second run in it",
                flush=True,
            )
        with suppress(OSError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # its owner has just ended and removed it
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        remove_empty(new)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, inner ones first, up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
