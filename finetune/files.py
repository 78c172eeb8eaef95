"""Files that are there whole or not at all. Free of torch, so that small programs may use it."""

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses while `path` is written is an OSError of that name.

    The error of a temporary file, or of a library that says no name, tells a user nothing.
    """
    from safetensors import SafetensorError

    said = "cannot be written: "
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, said + str(error), str(path)) from None
    except OSError as error:
        reason = (error.strerror or str(error)).removeprefix(said)
        if error.filename and Path(os.fsdecode(error.filename)) in path.parents:
            reason = f"{os.fsdecode(error.filename)}: {reason}"
        raise OSError(error.errno or errno.EIO, said + reason, str(path)) from None


def write_aside(path: Path, content: str | bytes):
    """Write a file whole or not at all, its folders with it; text as UTF-8. Raises OSError with its name."""
    aside = path.with_name(f".{path.name}.tmp")
    new = [folder for folder in path.parents if not folder.exists()]
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
                for folder in new:  # those that hold nothing
                    folder.rmdir()


def write_json(path: str | Path, content):
    """As `write_aside`, what `content` is in JSON."""
    write_aside(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_arrays(file: Path) -> dict:
    """Arrays by name that `cache_arrays` wrote; empty where the file is not there or not whole."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return {}


def cache_arrays(file: Path, arrays: dict):
    """Keep numpy arrays for the next start; a disk that does not want them is no reason to stop."""
    from safetensors.numpy import save_file

    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, aside)
        os.replace(aside, file)
    except OSError as error:
        print(f"--data_cache: {file.parent} cannot be written ({error.strerror}); going on without", flush=True)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
