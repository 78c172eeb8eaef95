"""What every command does alike: flags with one-line errors, and failures in one line. Free of torch."""

import argparse
import os
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line; the usage is for --help."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run_command(prog: str, work: Callable[[], int | None]) -> int:
    """Run a command's work and return its exit code; what a user can mend becomes one line on stderr.

    Returns:
        What `work` returns (0 for None); 1 after a ValueError, OSError, MemoryError or a missing package; 130 after Ctrl-C.
    """
    try:
        return work() or 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"{prog}: error: {describe(error)}", file=sys.stderr)
        return 1


def describe(error: BaseException) -> str:
    """An exception in one line, without the parts that only a programmer reads."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}"
    return " ".join(str(error).split()) or type(error).__name__
