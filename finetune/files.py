"""Files that are there whole or not at all. Free of torch, so that small programs may use it."""

import ctypes
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

CACHE_GB = 20.0  # what --data_cache may take


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path):
    """Force a file, or a folder's own list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path):
    """Force every file and folder below `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def put_in_place(aside: Path, output: Path):
    """Flush the folder `aside` and put it at `output`, at once where the system can; what was there lies at `aside` then."""
    flush_tree(aside)
    if output.exists():
        exchange(aside, output)
    else:
        os.replace(aside, output)
    flush(output.parent)


def exchange(aside: Path, output: Path):
    """Swap two folders in one step where the system can (renameat2 of Linux), else in two renames."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with suppress(OSError, AttributeError):
        if ctypes.CDLL(None).renameat2(here, os.fsencode(aside), here, os.fsencode(output), swap) == 0:
            return
    old = aside.with_name(f"{aside.name}.old")
    os.replace(output, old)
    try:
        os.replace(aside, output)
    except OSError:
        os.replace(old, output)
        raise
    os.replace(old, aside)


def write_aside(path: Path, content: str | bytes):
    """Write a file whole or not at all; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that stands at `path` when the block ends, whole and on disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, content):
    """As `write_aside`, what `content` is in JSON."""
    write_aside(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_arrays(file: Path) -> dict:
    """Arrays by name that `cache_arrays` wrote; empty where the file is not there or not whole. It counts as used now."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
        with suppress(OSError):  # another user's cache can be read too
            os.utime(file)
        return arrays
    except (OSError, SafetensorError):
        return {}


def cache_arrays(file: Path, arrays: dict, limit_gb: float = CACHE_GB):
    """Keep numpy arrays for the next start; a disk that does not want them is no reason to stop.

    The .safetensors files of the folder take at most `limit_gb` GB afterwards.
    """
    from safetensors.numpy import save_file

    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, aside)
        os.replace(aside, file)
        prune(file.parent, limit_gb * 1e9)
    except OSError as error:
        print(f"--data_cache: {file.parent} cannot be written ({error.strerror}); going on without", flush=True)
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def prune(folder: Path, limit: float):
    """Delete the .safetensors files of a cache that were not used for the longest time, until the others take `limit` bytes.

    What a run that was killed left half-written goes after a day.
    """
    for path in folder.glob(".*.safetensors.*.tmp"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - 86400:
                path.unlink()
    found = []
    for path in folder.glob("[!.]*.safetensors"):
        with suppress(FileNotFoundError):  # another run prunes too
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > limit:
            path.unlink(missing_ok=True)
