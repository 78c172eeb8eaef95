"""Checksums of the files in a folder that this toolkit writes: its checksums.json. Free of torch.

python -m chatglm.checksums FOLDER            compare every file with its SHA-256
python -m chatglm.checksums FOLDER --renew    accept the files as they are, after a planned change

Loading compares XXH3, which takes a fraction of the time that reading the weights takes; resuming
and merging compare SHA-256.
A folder without checksums.json was written by another program and loads as it is.
"""

import argparse
import functools
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from .commands import Parser, run_command
from .files import name_aside, read_bytes, read_json
from .hub import resolve_folder

CHECKSUMS = "checksums.json"
FORMAT_VERSION = 1
LEVELS = ("fast", "full", "off")  # XXH3, SHA-256, nothing
ENVIRONMENT = "GLM_FOUNDRY_VERIFY"  # one of LEVELS, for commands without a flag for it
UNREAD = ("README.md",)  # model cards: people edit them and no program reads them
WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx", ".npz")
BLOCK = 1 << 24  # bytes, 2 ms of XXH3
THREADS = min(8, os.cpu_count() or 1)
Loaded = TypeVar("Loaded")
Item = TypeVar("Item")
Result = TypeVar("Result")
# The level of the load in progress; the load of its base model inherits it.
asked_level: ContextVar[str | None] = ContextVar("asked_level", default=None)


class FileHashes(TypedDict, total=False):
    """A file's size and hashes, in hexadecimal, as checksums.json lists them."""

    bytes: int
    xxh3: str
    sha256: str


def hash_file(path: Path, *, fast: bool = True, strong: bool = True) -> FileHashes:
    """{"bytes", "xxh3", "sha256"} of a file; without the hash that is not asked for.

    The fast one is the XXH3 of the XXH3s of the file's blocks, so several threads can share a file.
    """
    import xxhash

    size = path.stat().st_size
    if not size:
        blocks, sha256 = [], hashlib.sha256().hexdigest()
    else:
        # Memory-mapped: a thread that reads into a buffer takes the GIL for every block, and
        # loading holds it.
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
        ):
            spans = [content[start : start + BLOCK] for start in range(0, size, BLOCK)]
            try:
                blocks = in_threads(xxhash.xxh3_64_digest, spans) if fast else []
                sha256 = hashlib.sha256(content).hexdigest() if strong else ""
            finally:
                for span in spans:
                    span.release()
    hashes: FileHashes = {"bytes": size}
    if fast:
        hashes["xxh3"] = xxhash.xxh3_64_hexdigest(b"".join(blocks))
    if strong:
        hashes["sha256"] = sha256
    return hashes


def in_threads(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """work(item) of each, in their order."""
    if len(items) < 2 or THREADS == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


def write_checksums(folder: str | Path) -> int:
    """Write checksums.json for the files in `folder` and below; it holds its own checksum too.

    Returns the number of files.
    """
    folder = Path(folder)
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_ours = name == CHECKSUMS or name.startswith(f".{CHECKSUMS}.")
        if path.is_file() and path.name not in UNREAD and not is_ours:
            names.append(name)
    names.sort()
    hashes = in_threads(lambda name: hash_file(folder / name), names)
    aside = name_aside(folder / CHECKSUMS)
    try:
        aside.write_bytes(render(dict(zip(names, hashes))))
        os.replace(aside, folder / CHECKSUMS)
    finally:
        aside.unlink(missing_ok=True)
    return len(names)


def render(files: dict[str, FileHashes]) -> bytes:
    """The content of checksums.json: the last entry is the XXH3 of all the others."""
    import xxhash

    content = {"format_version": FORMAT_VERSION, "files": files}
    self_hash = xxhash.xxh3_64_hexdigest(json.dumps(content).encode())
    return (json.dumps(content | {"self": self_hash}, indent=1) + "\n").encode()


def read_checksums(folder: Path) -> dict[str, FileHashes] | None:
    """{name: its hashes} as `write_checksums` wrote them, None where there are none.

    Raises:
        ValueError: any byte of the file has changed, or it is of a newer format.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        version = content["format_version"]
        if version == FORMAT_VERSION and render(content["files"]) == read_bytes(path):
            return content["files"]
    except (ValueError, KeyError, TypeError):
        raise damaged(path, folder) from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}"
        )
    raise damaged(path, folder)


def damaged(path: Path, folder: Path, what: str = "changed since it was written") -> ValueError:
    return ValueError(
        f"{path}: {what}; take an undamaged copy of it. If it was changed on purpose: "
        f"python -m chatglm.checksums {folder} --renew, or {ENVIRONMENT}=off"
    )


def level_of(verify: str | None, default: str = "fast") -> str:
    """One of LEVELS: what a flag says, else the environment, else `default`.

    Raises:
        ValueError: the environment says something else.
    """
    level = verify or asked_level.get() or os.environ.get(ENVIRONMENT) or default
    if level not in LEVELS:
        raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(LEVELS)}; got {level!r}")
    return level


def check_folder_files(
    folder: str | Path,
    verify: str | None = None,
    *,
    default: str = "fast",
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Compare the files of a folder that this toolkit wrote with its checksums.

    Args:
        verify: one of LEVELS; None: as the environment says, else `default`.
        wanted: of a file's name inside the folder, whether it is compared.
    Raises:
        ValueError: a file changed, is gone or cannot be read.
    """
    folder, level = Path(folder), level_of(verify, default)
    if level == "off" or (files := read_checksums(folder)) is None:
        return
    chosen = {name: hashes for name, hashes in files.items() if wanted(name)}
    compare_all(folder, chosen, "xxh3" if level == "fast" else "sha256")


def compare_all(
    folder: Path, files: dict[str, FileHashes], kind: Literal["xxh3", "sha256"]
) -> None:
    """Compare one kind of hash of `files`, {name: hashes}; blocks or files are hashed in threads.

    Raises:
        ValueError: a file is missing or differs; the first one is named.
    """

    def compare(name: str) -> None:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            same = size == expected.get("bytes", size)
            if same:
                hashes = hash_file(path, fast=kind == "xxh3", strong=kind == "sha256")
                same = hashes[kind] == expected[kind]
        except FileNotFoundError:
            raise damaged(path, folder, "missing, though checksums.json lists it") from None
        if not same:
            raise damaged(path, folder)

    if kind == "sha256":  # one thread a file; hash_file runs XXH3 in threads
        in_threads(compare, list(files))
    else:
        for name in files:
            compare(name)


def is_top(name: str) -> bool:
    """Whether loading reads the file: it lies in the folder itself, training's files lie below."""
    return "/" not in name


def is_small(name: str) -> bool:
    """Whether loading reads the file and it holds no weights."""
    return is_top(name) and not name.endswith(WEIGHTS)


@contextmanager
def verified(
    folder: str | Path, verify: str | None = None, wanted: Callable[[str], bool] = is_top
) -> Iterator[None]:
    """Compare a folder's checksums around a block that reads the folder.

    Small files are compared before the block, weights in a thread while the block reads them.

    The block's result counts only if they agree: leaving the block raises what
    `check_folder_files` raises, also in place of an error of the block, which damage may have
    caused.
    """
    token = asked_level.set(verify or asked_level.get())
    try:
        if level_of(None) == "off" or not (Path(folder) / CHECKSUMS).is_file():
            yield
            return
        level = level_of(None)
        check_folder_files(folder, level, wanted=lambda name: wanted(name) and is_small(name))
        with ThreadPoolExecutor(1) as pool:
            check = pool.submit(
                check_folder_files,
                folder,
                level,
                wanted=lambda name: wanted(name) and not is_small(name),
            )
            try:
                yield
            finally:
                if error := check.exception():
                    raise error from None
    finally:
        asked_level.reset(token)


def checks_folder(
    wanted: Callable[[str], bool] = is_top,
) -> Callable[[Callable[..., Loaded]], Callable[..., Loaded]]:
    """Decorator of a loader whose first argument is a folder or a hub's name, which becomes the
    folder: checks the files that it reads.

    The loader gets one more keyword, `verify`: one of LEVELS.
    """

    def decorate(load: Callable[..., Loaded]) -> Callable[..., Loaded]:
        @functools.wraps(load)
        def loading(
            path: str | Path, *args: Any, verify: str | None = None, **options: Any
        ) -> Loaded:
            folder = resolve_folder(path, weights=wanted("model.safetensors"))
            with verified(folder, verify, wanted):
                return load(folder, *args, **options)

        return loading

    return decorate


def add_verify_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """--verify, for commands that read our folders."""
    parser.add_argument(
        "--verify",
        choices=LEVELS,
        help=(
            "compare files with their checksums.json: fast (XXH3), full (SHA-256) or off "
            f"[{ENVIRONMENT}, else {default}]"
        ),
    )


def compare_or_renew(folder: Path, renew: bool) -> None:
    """Compare a folder with its checksums, or write them anew; raises ValueError, OSError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not renew and not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{folder} has no {CHECKSUMS}: there is nothing to compare with")
    if renew:
        count = write_checksums(folder)
        print(f"{folder}: {count} files, checksums written")
        return

    def is_wanted(name: str) -> bool:  # trainer/ may be deleted to save room
        return is_top(name) or (folder / name).parent.exists()

    check_folder_files(folder, "full", wanted=is_wanted)
    print(f"{folder}: every file is as it was written")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="chatglm.checksums",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="a checkpoint, merged model or predictor that this toolkit wrote"
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="write the checksums anew for the files as they are now",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: compare_or_renew(args.folder, args.renew))


if __name__ == "__main__":
    sys.exit(main())
