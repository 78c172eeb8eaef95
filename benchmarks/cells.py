"""The cells of long benchmarks: kept as JSON lines, run where they are missing, shown as means.

A cell is a dict of what tells it from the others; its row holds the cell's items and its figures.
Rows are written as they end, so the same command goes on where it was stopped.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from serving.simulate.statistics import interval

Cell = dict[str, Any]


class KeptCells:
    """A file of cells: a line of settings where there are any, notes, then a row for each cell.

    Attributes:
        rows: the lines that are neither the settings nor notes, in the order of the file.
        notes: {key: line}: of each key in `note_keys`, the line that has it.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any] | None = None, note_keys: Sequence[str] = ()
    ) -> None:
        """Raises ValueError: the file was made with other settings, or holds something else."""
        self.path = path
        self.note_keys = note_keys
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, dict[str, Any]] = {}
        self.settings = settings  # which are not in the file yet
        lines = read_whole_lines(path)
        if settings is not None and lines:
            self.settings = None
            if lines[0] != settings:
                raise ValueError(f"--cells {path}: made with other settings; name another file")
            lines = lines[1:]
        for line in lines:
            self._take(line)

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The first row of a cell."""
        for row in self.rows:
            if row.items() >= cell.items():
                return row
        return None

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that have no row."""
        return [cell for cell in cells if self.find(cell) is None]

    def add(self, line: dict[str, Any]) -> None:
        """Keep a row or a note, in the file too."""
        self._write(line)
        self._take(line)

    def note(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The note of a key; measured, and kept, where there is none."""
        if key not in self.notes:
            self.add(measure())
        return self.notes[key]

    def run_missing(
        self,
        cells: Iterable[Cell],
        measure: Callable[[Cell], dict[str, Any]],
        minutes: float = inf,
        describe: Callable[[dict[str, Any]], str] | None = None,
    ) -> list[dict[str, Any]]:
        """Measure the cells that have no row; none is begun after so many minutes.

        `measure` returns a cell's figures, `describe` what is said of its row. Returns all rows.
        """
        begin = time.monotonic()
        missing = self.missing(cells)
        for number, cell in enumerate(missing, 1):
            if time.monotonic() - begin > 60 * minutes:
                print(f"{len(missing) - number + 1} cells are left", file=sys.stderr)
                break
            self.add(cell | measure(cell))
            if describe:
                said = describe(self.rows[-1])
                print(f"{number}/{len(missing)} {said}", file=sys.stderr, flush=True)
        return self.rows

    def _write(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first, self.settings = self.settings, None
        with self.path.open("a", encoding="utf-8") as file:
            for each in ([] if first is None else [first]) + [line]:
                file.write(json.dumps(each, ensure_ascii=False) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        for key in self.note_keys:
            if key in line:
                self.notes[key] = line
                return
        self.rows.append(line)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where it is absent.

    A last line without its end, as a killed run leaves one, is cut from the file. Raises
    ValueError, with the line's number, for what is no JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, text in enumerate(content[:whole].splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise ValueError(f"--cells {path}:{number}: wanted a JSON object; got {text[:60]!r}")
        lines.append(line)
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return lines


def in_turns(names: Sequence[str], turn: int) -> list[str]:
    """The names, begun at another one each turn: none is always the first."""
    begin = turn % len(names)
    return [*islice(names, begin, None), *islice(names, begin)]


def shown_mean(values: Sequence[float], form: str = ".3g") -> str:
    """A mean with half its 95 % interval where there are at least 3 values; "" for none."""
    if not values:
        return ""
    mean, half = interval(list(values))
    return f"{mean:{form}} ± {half:.2g}" if len(values) > 2 else f"{mean:{form}}"


def changes(runs: dict[int, dict], base: dict[int, dict], metric: str) -> list[float]:
    """The metric against the base's in the same repetitions, in per cent."""
    found = []
    for repetition, run in runs.items():
        if repetition in base:
            found.append(100 * (run[metric] / base[repetition][metric] - 1))
    return found


def split_by(rows: Iterable[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    """{value of that name: its rows}, in the order of the rows."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def compared_lines(
    rows: Iterable[dict[str, Any]], name: str, shown: dict[str, str], against: Sequence[str]
) -> list[list[str]]:
    """The lines of a table of what takes turns: of each its runs, means, changes against "fcfs".

    Args:
        name: the item of a cell that has a line for each value.
        shown: column -> metric, in per cent where the column has a %.
        against: the metrics whose changes are shown.
    """
    by_name: dict[str, dict[int, dict]] = {}
    for value, group in split_by(rows, name).items():
        by_name[value] = {row["repetition"]: row for row in group}
    lines = []
    for value, runs in by_name.items():
        line = [value, str(len(runs))]
        for column, metric in shown.items():
            scale = 100 if "%" in column else 1
            line.append(shown_mean([scale * run[metric] for run in runs.values()]))
        for metric in against:
            line.append(shown_mean(changes(runs, by_name.get("fcfs", {}), metric), "+.0f"))
        lines.append(line)
    return lines


def table_text(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in lines:
        text.append(f"| {' | '.join(line)} |")
    return "\n".join(text)


def print_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print(table_text(columns, lines))
