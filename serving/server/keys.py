"""API keys that a server knows by their hashes alone, and the command that makes new ones.

    python -m serving.server.keys NAME --file keys.txt

prints a new key once and adds its line, NAME and the key's SHA-256, to the file. Without --file
the line goes to standard error.
"""

import argparse
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from chatglm.commands import Parser, run_command
from chatglm.saving import flush

log = logging.getLogger(__name__)

KEY_VARIABLE = "GLM_API_KEY"  # of the environment: the flag's key
FLAG_NAME = "--api_key"  # of the flag's key; no name in a file begins with "-"
PREFIX = "glm-"
KEY_BYTES = 32
CHECK_S = 1.0  # a file is looked at once in so many seconds
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
NAME_WANTED = "1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"


class NamedKey(NamedTuple):
    """A key's name and its SHA-256 in lower-case hexadecimal."""

    name: str
    digest: str


def key_digest(key: bytes) -> str:
    """The SHA-256 of a key, in hexadecimal. Keys are random, so no salt or slow hash is needed."""
    return hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> list[NamedKey]:
    """The keys of a file: lines "NAME SHA256", empty lines and comments after "#".

    Raises:
        OSError: it cannot be read.
        ValueError: a line is wrong; in one line, with its number and without its content, which
            may be a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: a file of keys must be UTF-8") from None
    keys: list[NamedKey] = []
    lines: dict[str, int] = {}  # of names and digests: where they are
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key = read_entry(words, f"{path}:{number}")
        for value, what in zip(key, ("name", "key"), strict=True):
            if value in lines:
                raise ValueError(f"{path}:{number}: this {what} is in line {lines[value]} already")
            lines[value] = number
        keys.append(key)
    return keys


def read_entry(words: list[str], place: str) -> NamedKey:
    """The key in a line's words. Raises ValueError, which names `place`."""
    if len(words) != 2:
        raise ValueError(f"{place}: wanted NAME and the SHA-256 of a key, got {len(words)} words")
    name, digest = words[0], words[1].lower()
    if not NAME.fullmatch(name):
        raise ValueError(f"{place}: a name must be {NAME_WANTED}")
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{place}: wanted a SHA-256 of 64 hexadecimal digits after the name")
    return NamedKey(name, digest)


class KeyRing:
    """The keys that requests may carry: one from a flag, and those of a file.

    A changed file is read again, so a key can be added or revoked while the server runs; one that
    is wrong or gone leaves the earlier keys in force and logs one line.
    """

    def __init__(self, key: str | None = None, path: Path | None = None) -> None:
        """Raises OSError, ValueError: the file cannot be read, is wrong or has no key."""
        self._flag_keys: list[NamedKey] = []
        if key is not None:
            self._flag_keys = [NamedKey(FLAG_NAME, key_digest(key.encode()))]
        self._path = path
        self._file_keys: list[NamedKey] = []
        self._seen = self._signature()
        self._checked_s = time.monotonic()
        if path is not None:
            self._file_keys = read_keys(path)
            if not self._file_keys and key is None:
                raise ValueError(f"{path}: no keys (python -m serving.server.keys makes one)")

    def find(self, presented: bytes) -> str | None:
        """The name of the key that a request presents; None where it is none of these.

        Takes the same time whichever key it is: all are compared, each in constant time.
        """
        self._refresh()
        digest, found = key_digest(presented), None
        for key in (*self._flag_keys, *self._file_keys):
            if hmac.compare_digest(digest, key.digest):
                found = key.name
        return found

    def _signature(self) -> tuple[int, ...] | None:
        """What changes when the file does; None where it cannot be read."""
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if self._path is None or now_s - self._checked_s < CHECK_S:
            return
        self._checked_s = now_s
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature  # read before the file is: a change in between is seen next time
        try:
            self._file_keys = read_keys(self._path)
        except (OSError, ValueError) as error:
            log.error("%s; the earlier keys stay in force", error)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder's lock against other processes that take it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def append_key(path: Path, key: NamedKey) -> None:
    """Add a key's line to a file, which is replaced in one step; a new one has mode 0600.

    Raises:
        OSError: it cannot be written.
        ValueError: the file is wrong, or the name is in use.
    """
    path = path.resolve()  # a symbolic link stays one
    with folder_lock(path.parent):
        text, old = "", None
        if path.exists():
            if any(key.name == other.name for other in read_keys(path)):
                raise ValueError(f"{path}: there is a key named {key.name!r} already")
            text, old = path.read_text(encoding="utf-8"), path.stat()
        if text and not text.endswith("\n"):
            text += "\n"
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"{text}{key.name} {key.digest}\n")
                file.flush()
                if old is not None:
                    os.fchmod(file.fileno(), old.st_mode & 0o777)
                    with suppress(PermissionError):  # only root may give files away
                        os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        flush(path.parent)


def make_key(name: str, path: Path | None) -> int:
    """Print a new key to standard output, once its line is in the file or on standard error."""
    if not NAME.fullmatch(name):
        raise ValueError(f"NAME must be {NAME_WANTED}, got {name[:80]!r}")
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = NamedKey(name, key_digest(key.encode()))
    if path is not None:
        append_key(path, entry)
    else:
        print(f"{entry.name} {entry.digest}", file=sys.stderr)
    print(key)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="serving.server.keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="of the key, in logs and metrics")
    parser.add_argument("--file", type=Path, help="the server's --api_keys, which gets the line")
    flags = parser.parse_args(argv)
    return run_command("serving.server.keys", lambda: make_key(flags.name, flags.file))


if __name__ == "__main__":
    sys.exit(main())
