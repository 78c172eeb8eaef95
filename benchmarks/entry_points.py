#!/usr/bin/env python3
"""A markdown table of every kind of checkpoint through every way in: Auto classes, load_model,
predict, server, training.

    python benchmarks/entry_points.py [--kinds "chatglm2-6b,qwen2 (instruct)"]

The checkpoints are tiny, random and laid out as published. "same": the greedy answer of load_model,
token for token. Exits with 1 where a way gives another answer.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import print_table  # noqa: E402

SHORT = 20  # characters; what is longer is an error, which gets a note


def print_ways(table: dict[str, dict[str, str]], ways: list[str]) -> None:
    """Rows of checkpoints, columns of ways in; errors as numbered notes below."""
    notes: list[str] = []

    def cell(text: str) -> str:
        if len(text) <= SHORT:
            return text
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    lines = []
    for kind, found in table.items():
        refusal = found["load_model"]  # where that refuses, so do all the others
        lines.append([kind, *(cell(found.get(way, refusal)) for way in ways)])
    print_table(["checkpoint", *ways], lines)
    print()
    for number, note in enumerate(notes, 1):
        print(f"{number}. {note}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", help="comma list of kinds [all]")
    args = parser.parse_args(argv)
    from tests.conftest import make_tiny_folders
    from tests.test_entry_points import OTHER, WAYS, entry_table

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "published").mkdir()

        def make_folder(name: str) -> Path:
            return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))

        kinds = tuple(args.kinds.split(",")) if args.kinds else None
        with contextlib.redirect_stdout(sys.stderr):
            table = entry_table(kinds, make_tiny_folders(make_folder), place)
    print_ways(table, ["load_model", *WAYS])
    return int(any(OTHER in found.values() for found in table.values()))


if __name__ == "__main__":
    sys.exit(main())
