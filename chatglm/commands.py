"""What all commands share: flag errors and failures in one line. Free of torch."""

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).resolve().parents[1]
RANK_0_FIRST_S = 3.0  # how long the other ranks wait before they print


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and leave with exit code 2."""
        sys.exit(fail(self.prog, f"error: {one_line(message)} (--help lists the flags)", 2))


def run_command(prog: str, work: Callable[[], int | None]) -> int:
    """Run a command's work and return its exit code; a user's error becomes one line on stderr.

    Returns:
        What `work` returns (0 for None); 1 after a ValueError, OSError, MemoryError or a missing
        package; 130 after Ctrl-C.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    try:
        return work() or 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        return fail(prog, str(stop) or "interrupted", 130)
    except (ValueError, OSError, MemoryError, ImportError) as error:
        return fail(prog, f"error: {describe(error)}", 1)


def child_environment(threads: int | None = None) -> dict[str, str]:
    """The environment of a process that runs a module of this project (python -m).

    It finds the project's packages wherever this process was started.

    Args:
        threads: of its products on the CPU; None leaves what this environment says.
    """
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return environment


def fail(prog: str, message: str, code: int) -> int:
    """Print a command's last line to stderr and return `code`.

    Of ranks that all fail alike one line is printed. Rank 0 is the first to print and to leave, and
    the launcher ends the others while they wait; a rank that fails alone prints after the wait.
    """
    if int(os.environ.get("RANK") or 0):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_FIRST_S)
    print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return code


def describe(error: BaseException) -> str:
    """An exception in one line, without the parts that only a programmer reads."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}"
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    return " ".join(text.split())


def whole(least: int = 1, most: int = 10**9) -> Callable[[str], int]:
    """A `type` for argparse: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"wanted a whole number from {least:,} to {most:,}, got {text[:40]!r}"
            )
        return value

    return parse


def number(least: float = 0.0, most: float = 1e9, *, above: bool = False) -> Callable[[str], float]:
    """A `type` for argparse: a finite number from `least` (with `above`: above it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (above and value == least):
            start = "above" if above else "from"
            raise argparse.ArgumentTypeError(
                f"wanted a number {start} {least:g} to {most:g}, got {text[:40]!r}"
            )
        return value

    return parse
