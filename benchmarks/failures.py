#!/usr/bin/env python3
"""Every command with every kind of wrong file: does it fail in one line, and leave nothing behind?

    python benchmarks/failures.py [--command train.py] [--kind empty] [--json FILE] [--show]

Each case is a command that works, with one of its files replaced by a wrong one, or one of its
outputs put where it cannot be written. The command is forked from a process that has imported it
already, in a folder of its own. A case is right where

- the exit code is 1 or 2;
- stderr has exactly one line, which begins with the command's name, besides progress bars and
  lines that begin with WARNING: or a logger's name and level;
- that line has the file's name or its flag in it;
- every file of the folder is as before, nothing is new but what the command documents to leave
  (a run's record in --output_dir), and no temporary file is left.

Some files may be missing or wrong without harm; the table lists those as `fine`, and their expected
exit code is 0. As root, the fork gives up the right to read and write everything. A full disk is a
small tmpfs, which needs root: other users' runs skip those cases.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.failing_commands import COMMANDS, Command, make_world  # noqa: E402
from benchmarks.forking import Outcome, import_everything, run_forked  # noqa: E402
from chatglm.commands import Parser, run_command  # noqa: E402
from chatglm.files import LFS_POINTER  # noqa: E402
from finetune.files import write_json  # noqa: E402

TIMEOUT_S = 30.0
LITTER = (".tmp", ".old")
FULL_DISK_KIB = 64

# ---- what is wrong with a file that is read


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def make_file(path: Path) -> None:
    remove(path)
    path.write_text("a file\n")


def make_empty_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def keep_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def put(content: bytes) -> Callable[[Path], None]:
    """A fault that replaces a file's content, compressed where the file is."""

    def write(path: Path) -> None:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

    return write


def make_pointer(path: Path) -> None:
    path.write_bytes(LFS_POINTER + b"\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def deny(path: Path) -> None:
    path.chmod(0)


FILE_KINDS = {
    "missing": remove,
    "folder": make_folder,
    "truncated": keep_half,
    "empty": make_empty,
    "list": put(b"[1, 2]\n"),
    "text": put(b'"text"\n'),
    "number": put(b"3\n"),
    "null": put(b"null\n"),
    "deep": put(b"[" * 100_000 + b"]" * 100_000),
    "not_utf8": put('{"键": "值"}\n'.encode("gbk")),
    "utf16": put('{"a": 1}\n'.encode("utf-16")),
    "pointer": make_pointer,
    "denied": deny,
}
FOLDER_KINDS = {
    "missing": remove,
    "file": make_file,
    "empty": make_empty_folder,
    "denied": deny,
}

# ---- what is wrong with a place that is written


def fill_disk(case: Path, output: Path, is_folder: bool) -> Path:
    """A file system of a few KiB under `case`; the place of the output in it."""
    disk = case / "disk"
    disk.mkdir()
    options = f"size={FULL_DISK_KIB}k,mode=777"
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    subprocess.run(words, check=True)
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    return disk / output.name


def read_only(case: Path, output: Path, is_folder: bool) -> Path:
    """A folder that nobody may write in."""
    (case / "read_only").mkdir(mode=0o555)
    return case / "read_only" / output.name


def in_a_file(case: Path, output: Path, is_folder: bool) -> Path:
    """A folder that is a file."""
    (case / "not_a_folder").write_text("a file\n")
    return case / "not_a_folder" / output.name


def of_other_type(case: Path, output: Path, is_folder: bool) -> Path:
    """A file where a folder is written, a folder where a file is."""
    place = case / "taken" / output.name
    place.parent.mkdir()
    if is_folder:
        place.write_text("a file\n")
    else:
        place.mkdir()
    return place


OUTPUT_KINDS = {
    "full_disk": fill_disk,
    "read_only": read_only,
    "in_a_file": in_a_file,
    "other_type": of_other_type,
}
NEEDS_ROOT = ("full_disk",)
KINDS = tuple(dict.fromkeys((*FILE_KINDS, *FOLDER_KINDS, *OUTPUT_KINDS)))


# ---- a case


@dataclass(frozen=True)
class Case:
    """A command, which of its files is wrong, and how."""

    command: Command
    flag: str
    path: str
    kind: str
    written: bool

    @property
    def name(self) -> str:
        return f"{self.command.name} {self.flag} {self.path} {self.kind}"

    @property
    def is_fine(self) -> bool:
        """The command may go on as if nothing were wrong."""
        return bool({self.kind, "*"} & {*self.command.fine.get(self.path, ())})

    @property
    def names(self) -> set[str]:
        """What its error may name: the file, its folder if that is one of several, or the flag."""
        path = Path(self.path)
        names = {path.name, self.flag, *path.parts[1:]}
        return names | ({"not_a_folder"} if self.kind == "in_a_file" else set())


def list_cases(world: Path) -> list[Case]:
    cases = []
    for command in COMMANDS:
        for path, flag in command.reads.items():
            kinds = FOLDER_KINDS if (world / path).is_dir() else FILE_KINDS
            cases += [Case(command, flag, path, kind, False) for kind in kinds]
        for path, flag in command.writes.items():
            cases += [Case(command, flag, path, kind, True) for kind in OUTPUT_KINDS]
    return cases


def listing(folder: Path) -> dict[str, tuple]:
    """{path: what may not change of it} of every file below a folder, folders too."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        whole = () if path.is_dir() else (state.st_size, state.st_mtime_ns)
        found[str(path.relative_to(folder))] = whole
    return found


def run_case(world: Path, case: Case, folder: Path) -> list[str]:
    """What is wrong with how the command fails: nothing where all is right. `folder` is made."""
    shutil.copytree(world, folder)
    argv = case.command.argv
    place = folder / case.path
    if case.written:
        place = OUTPUT_KINDS[case.kind](folder, Path(case.path), case.path.endswith("/"))
        for number, word in enumerate(argv):
            if word == case.path.rstrip("/"):
                argv[number] = str(place)
    else:
        kinds = FOLDER_KINDS if place.is_dir() else FILE_KINDS
        kinds[case.kind](place)
    try:
        before = listing(folder)
        done = run_forked(
            case.command.module, argv, folder, timeout_s=TIMEOUT_S, stop_at=case.command.stop_at
        )
        if case.kind == "denied" and place.exists():
            place.chmod(0o755)
        after = listing(folder)
    finally:
        if case.kind == "full_disk":
            subprocess.run(["umount", str(folder / "disk")], check=True)
    return faults_of(case, done, left_behind(before, after, case))


def contains_any(text: str, parts: Iterable[str]) -> bool:
    return any(part in text for part in parts)


def left_behind(before: dict, after: dict, case: Case) -> list[str]:
    """What a failed command has changed, removed or left."""
    keeps = case.command.keeps
    if case.written:  # another output may be there, whole
        others = [path.rstrip("/") for path in case.command.writes if path != case.path]
        keeps = (*keeps, *others)
    lost = before.keys() - after.keys()
    changed = [f"removed {path}" for path in lost if not contains_any(path, keeps)]
    for path, state in after.items():
        if Path(path).name.endswith(LITTER):
            changed.append(f"left {path}")
        elif before.get(path) != state and not contains_any(path, keeps):
            changed.append(f"{'changed' if path in before else 'new'} {path}")
    return sorted(changed)


def faults_of(case: Case, done: Outcome, left: list[str]) -> list[str]:
    """What is wrong with how a case ended; `left` is of left_behind()."""
    lines = done.error_lines()
    if case.is_fine and done.code == 0:
        return []
    wrong = []
    if done.timed_out:
        wrong.append(f"not done after {TIMEOUT_S:.0f} s")
    elif done.code not in (1, 2):
        wrong.append(f"exit code {done.code}")
    begins = f"{case.command.prog}: error: "
    if len(lines) != 1 or not lines[0].startswith(begins):
        shown = " / ".join(lines[-2:])[-300:]
        wrong.append(f"{len(lines)} lines on stderr: {shown}" if lines else "nothing on stderr")
    elif not contains_any(lines[0], case.names):
        wrong.append(f"names none of {', '.join(sorted(case.names))}: {lines[0]}")
    return wrong + left[:4]


# ---- all of them


def run_one(world: Path, scratch: Path, show: bool, case: Case) -> dict:
    """A case as a row of the result."""
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "case"
    started = time.monotonic()
    wrong = run_case(world, case, folder)
    seconds = time.monotonic() - started
    shutil.rmtree(folder.parent)
    if wrong or show:
        print(f"{case.name}: {'; '.join(wrong) or 'right'} ({seconds:.1f} s)", flush=True)
    row = {"command": case.command.name, "flag": case.flag, "path": case.path}
    return row | {"kind": case.kind, "wrong": wrong, "seconds": seconds}


def run_all(cases: list[Case], world: Path, scratch: Path, jobs: int, show: bool) -> list[dict]:
    one = partial(run_one, world, scratch, show)
    if jobs == 1:
        return list(map(one, cases))
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        return list(pool.map(one, cases))


def check_controls(commands: dict[str, Command], world: Path, scratch: Path) -> None:
    """Raises ValueError where a command fails though nothing is wrong."""
    for name, command in commands.items():
        folder = scratch / "control"
        shutil.copytree(world, folder)
        done = run_forked(command.module, command.argv, folder, stop_at=command.stop_at)
        shutil.rmtree(folder)
        if done.code:
            raise ValueError(
                f"{name} fails with right files: exit code {done.code}: {done.err[-300:]}"
            )


def print_totals(found: list[dict]) -> None:
    count: Counter[tuple[str, str]] = Counter()
    other: Counter[tuple[str, str]] = Counter()
    for row in found:
        count[row["command"], row["kind"]] += 1
        other[row["command"], row["kind"]] += bool(row["wrong"])
    print("\n| command | kind | cases | one line | other |\n|---|---|---|---|---|")
    for (command, kind), cases in sorted(count.items()):
        wrong = other[command, kind]
        print(f"| {command} | {kind} | {cases} | {cases - wrong} | {wrong} |")
    wrong = other.total()
    print(f"| all | | {len(found)} | {len(found) - wrong} | {wrong} |")


def choose(cases: list[Case], commands: list[str], kind: str, path: str) -> list[Case]:
    """The cases of some commands, a kind and a path, by parts of their names; "" is every one."""
    chosen = []
    impossible = 0
    for case in cases:
        if os.geteuid() and case.kind in NEEDS_ROOT:
            impossible += 1
            continue
        is_wanted = kind in ("", case.kind) and path in case.path
        if is_wanted and contains_any(case.command.name, commands):
            chosen.append(case)
    if impossible:
        print(f"{impossible} cases left out: they need root")
    return chosen


@dataclass(frozen=True)
class SweepFlags:
    """The command's flags; see main."""

    command: str
    kind: str
    path: str
    every: int
    jobs: int
    show: bool
    json: str | None


def run_sweep(flags: SweepFlags) -> int:
    """Run the chosen cases, print and write them; 1 where one is wrong, else 0."""
    import_everything()
    with tempfile.TemporaryDirectory(prefix="failures-") as temporary:
        scratch = Path(temporary)
        scratch.chmod(0o755)
        world = scratch / "world"
        started = time.monotonic()
        make_world(world)
        print(
            f"what the commands work on was made in {time.monotonic() - started:.0f} s", flush=True
        )
        cases = choose(list_cases(world), flags.command.split(","), flags.kind, flags.path)
        cases = cases[:: flags.every]
        check_controls({case.command.name: case.command for case in cases}, world, scratch)
        found = run_all(cases, world, scratch, flags.jobs, flags.show)
    print_totals(found)
    print(f"{time.monotonic() - started:.0f} s")
    if flags.json:
        write_json(flags.json, found)
    return int(any(row["wrong"] for row in found))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="failures.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--command",
        default="",
        metavar="PART[,PART]",
        help="only commands with one of these in their name",
    )
    parser.add_argument("--kind", default="", choices=("", *KINDS), help="only this kind of fault")
    parser.add_argument("--path", default="", help="only files with this in their path")
    parser.add_argument("--every", type=int, default=1, help="only each so manieth case [1]")
    parser.add_argument("--jobs", type=int, default=2, help="cases under way at once [2]")
    parser.add_argument("--show", action="store_true", help="print cases that are right, too")
    parser.add_argument("--json", metavar="FILE", help="write all cases there")
    flags = SweepFlags(**vars(parser.parse_args(argv)))
    return run_command(parser.prog, lambda: run_sweep(flags))


if __name__ == "__main__":
    sys.exit(main())
