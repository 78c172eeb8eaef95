"""JSON lines, as the benchmarks write their rows."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    """Write one JSON object a line, UTF-8; returns `path`."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, one a line."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def read_gzip(path: Path) -> list[dict]:
    """`read_lines` of a .jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return list(map(json.loads, lines))
