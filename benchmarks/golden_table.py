#!/usr/bin/env python3
"""A markdown table of the largest difference from the originals' numbers, fixture by fixture.

    python benchmarks/golden_table.py [--json FILE]

Exits with 1 where a difference is beyond its tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--fixtures", type=int, help="compare only so many, the first ones [all]")
    args = parser.parse_args(argv)
    try:
        from tests.chatglm.test_goldens import golden_table, print_table
    except pytest.skip.Exception as error:
        sys.exit(f"golden_table: {error}")

    rows = golden_table(args.fixtures)
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["difference"] > row["tolerance"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
