"""Reading the files that users bring: JSON, text, weights; names of files that are being written.

Free of torch. Every error names the file and what to do.
"""

import json
import uuid
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
JSON_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "text"}


def name_aside(path: Path) -> Path:
    """A name beside `path` that no other writer uses, of this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read; the error has its name.
        ValueError: it is a Git LFS pointer.
    """
    path = Path(path)
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise pointer_error(path)
    return content


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, or a Git LFS pointer. OSError: as `read_bytes`.
    """
    return decode_utf8(read_bytes(path), path)


def decode_utf8(content: bytes, path: str | Path) -> str:
    """UTF-8 as text, without a byte order mark. Raises ValueError, which names `path`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8; save it as UTF-8") from None


def read_json(path: str | Path, wanted: type = dict) -> Any:
    """The JSON value of a UTF-8 file, with or without a byte order mark: an instance of `wanted`.

    Raises:
        ValueError: it is not UTF-8, not JSON, of another type than `wanted`, or a Git LFS pointer.
        OSError: as `read_bytes`.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(value, wanted):
        raise ValueError(
            f"{path}: wanted {JSON_TYPES.get(wanted, wanted.__name__)}, got {shorten(value)}"
        )
    return value


def is_lfs_pointer(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def pointer_error(path: str | Path) -> ValueError:
    return ValueError(
        f"{path} is a Git LFS pointer, not the file itself: "
        f"run `git lfs pull` in {Path(path).parent}"
    )


def shorten(value: object, length: int = 60) -> str:
    """A value as an error shows it: JSON where it is JSON, and at most `length` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= length else f"{text[: length - 3]}..."
