"""Atomic writes of files and folders, locks and caches. Free of torch, for small programs too."""

import errno
import glob
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from chatglm.checksums import hash_file
from chatglm.files import name_aside
from chatglm.saving import CANNOT, disk_errors, held_aside, put_in_place, remove_empty

CACHE_GB = 20.0  # default limit of --data_cache
ABANDONED_S = 86_400.0  # age of a half-written file that nobody writes any more


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hash_file(path, fast=False)["sha256"]


class LastingStream:
    """A text stream that ignores errors of writing, so that a log on a full disk ends no run."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class LineFile:
    """Appends lines to a file; lines that cannot be written wait in memory for the next attempt."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def add(self, line: str) -> None:
        """Append a line; raises OSError where it could not be written yet."""
        self.waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        while self.waiting:
            count = os.write(self.handle, self.waiting)
            self.waiting = self.waiting[count:]

    def close(self) -> None:
        os.close(self.handle)


def utf8_json(value: object, indent: int | None = None) -> str:
    """A value as JSON, by default on one line; what UTF-8 cannot hold is escaped.

    Raises:
        ValueError: JSON has no such value: a time or bytes of a Parquet file.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, indent=indent)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    return text


class KeptLines:
    """Results on disk, a line of JSON each, beside the file that they are for: a command resumes.

    The first line says what all of them depend on; where that has changed, they are discarded.

    Attributes:
        lines: what an earlier command has kept; damaged ones are not among them.
        file: open once something is kept: a command that fails before it leaves no file.
    """

    def __init__(self, final: Path, depends_on: Mapping[str, Any]) -> None:
        self.final = final
        self.path = final.with_name(f".{final.name}.partial")
        self._header = json.dumps(depends_on, ensure_ascii=False, sort_keys=True)
        lines: list[str] = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        # What follows the last line's end was not written whole.
        kept = lines[1:-1] if lines[:1] == [self._header] else []
        self.lines = list(filter(self.is_whole, kept))
        self.file: TextIO | None = None

    def is_whole(self, line: str) -> bool:
        """Whether a line is a result as `keep` writes it."""
        try:
            return isinstance(json.loads(line), list)
        except (ValueError, RecursionError):
            return False

    def keep(self, *entries: object) -> None:
        """Append results, each a list."""
        if self.file is None:
            earlier = (self._header, *self.lines)
            write_aside(self.path, "".join(line + "\n" for line in earlier))
            self.file = open(self.path, "a", encoding="utf-8")
        for entry in entries:
            self.file.write(utf8_json(entry) + "\n")
        self.file.flush()

    def replace_by(self, text: str) -> None:
        """Write the final file, then remove the kept results."""
        write_aside(self.final, text)
        if self.file is not None:
            self.file.close()
        self.path.unlink(missing_ok=True)


def overwrite(path: Path, content: str) -> None:
    """Overwrite a file in place, which needs no room on the disk.

    Raises:
        OSError: the content is longer than the file.
    """
    data = content.encode()
    if path.stat().st_size < len(data):
        raise OSError(f"{path}: {len(data)} bytes do not fit over it")
    with open(path, "r+b", buffering=0) as file:
        file.write(data)
        file.truncate()
        os.fsync(file.fileno())


def check_folder_to_write(folder: Path, flag: str) -> None:
    """Raises ValueError where files cannot be put into a folder, which need not be there yet.

    For commands that write after long work; what it makes it removes.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex[:12]}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {folder} cannot be written: {error.strerror}") from None
    finally:
        remove_empty(new)


def check_file_to_write(path: Path, flag: str, inputs: Iterable[str | Path] = ()) -> None:
    """As `check_folder_to_write`, for a file, which must be none of the command's `inputs`."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    for each in map(Path, inputs):
        if path.exists() and each.exists() and path.samefile(each):
            raise ValueError(f"{flag} {path} is read, and cannot be written too")
    check_folder_to_write(path.parent, flag)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which errors of writing become an OSError that names `path`.

    The original error may name a temporary file, or none. One that names a file elsewhere, such as
    one that is read meanwhile, stays, and so does one that is a library's text, not the system's.
    """
    try:
        with disk_errors(path):
            yield
    except OSError as error:
        names = named_files(error)
        if not any(belongs_to(name, path) for name in names) and (names or error.errno is None):
            raise
        reason = (error.strerror or str(error)).removeprefix(CANNOT)
        if names and names[0] in path.parents:
            reason = f"{names[0]}: {reason}"
        raise OSError(error.errno or errno.EIO, CANNOT + reason, str(path)) from None


def named_files(error: OSError) -> list[Path]:
    """The files that an error names: of one that was copied, where from and where to."""
    names = []
    for name in (error.filename, error.filename2):
        if name:
            names.append(Path(os.fsdecode(name)))
    return names


def belongs_to(named: Path, path: Path) -> bool:
    """Whether a file is written on behalf of `path`: itself, inside or above it, or aside."""
    if named == path or named in path.parents or path in named.parents:
        return True
    return any(part.startswith(f".{path.name}.") for part in named.parts)


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file atomically, and make its folders; text as UTF-8.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    with writing(path), written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is moved to `path` once the block ends without an error.

    Until then it has a name beside `path` that no other writer uses; of several, the last one's
    file stays. Where it is not written, it goes again, and so do the folders that were made for it.

    Raises:
        IsADirectoryError: `path` is a folder; before anything is written.
    """
    aside = name_aside(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    remove_abandoned(path.parent, f".{glob.escape(path.name)}.*.tmp")
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with suppress(OSError):  # the first error says more
            aside.unlink(missing_ok=True)
        remove_empty(new)


@contextmanager
def written_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output` to write into, renamed into its place when the block ends.

    Raises:
        OSError: naming the folder that cannot be written, of which nothing is left.
        ValueError: another process is writing it.
    """
    with writing(output), held_aside(output) as aside:
        yield aside
        put_in_place(aside, output)


def write_json(path: str | Path, content: object) -> None:
    """As `write_aside`, with `content` as JSON."""
    write_aside(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_arrays(file: Path) -> dict:
    """{name: array} that `cache_arrays` wrote; empty where the file is missing or damaged.

    The file's time is set to now, which is what `prune` goes by.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
        with suppress(OSError):  # the file may be another user's
            os.utime(file)
        return arrays
    except (OSError, SafetensorError):
        return {}


def cache_arrays(file: Path, arrays: dict, limit_gb: float = CACHE_GB) -> None:
    """Write numpy arrays to a cache and prune it to `limit_gb` GB.

    Errors of the disk are only a warning.
    """
    from safetensors.numpy import save_file

    aside = name_aside(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        mode = aside.stat().st_mode & 0o777
        save_file(arrays, aside)
        aside.chmod(mode)  # safetensors leaves 0600
        os.replace(aside, file)
        prune(file.parent, limit_gb * 1e9)
    except OSError as error:
        print(
            f"--data_cache: {file.parent} cannot be written ({error.strerror}); going on without",
            flush=True,
        )
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Delete the files of a pattern that were last written to a day ago, by killed processes."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process may do so at the same time
            if path.stat().st_mtime < time.time() - ABANDONED_S:
                path.unlink()


def prune(folder: Path, limit: float) -> None:
    """Delete the least recently used .safetensors files of a cache beyond `limit` bytes.

    Half-written files, of runs that were killed, are deleted after a day.
    """
    remove_abandoned(folder, ".*.safetensors.*.tmp")
    files = []
    for path in folder.glob("[!.]*.safetensors"):
        with suppress(FileNotFoundError):  # another run may prune at the same time
            stat = path.stat()
            files.append((stat.st_mtime_ns, stat.st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > limit:
            path.unlink(missing_ok=True)
