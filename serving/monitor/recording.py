"""A recording: a CSV file of whole lines, and its picture."""

import csv
import errno
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.files import read_text
from predictor.pictures import new_figure, save_figure
from serving.monitor.meters import Meter, column_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class WholeLineFile:
    """A new file that only ever holds whole lines, each on disk when `add` returns.

    Raises OSError where a line cannot be written; what was written of it is taken back.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._size = 0

    def add(self, cells: Sequence[str]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        line = text.getvalue().encode()
        try:
            count = os.write(self._handle, line)
            if count != len(line):
                os.ftruncate(self._handle, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno, f"cannot be written: {error.strerror}", str(self.path)
            ) from None
        self._size += count

    def close(self) -> None:
        os.close(self._handle)


def record_meter(
    meter: Meter,
    output: Path,
    interval_s: float,
    seconds: float | None,
    wait: Callable[[float], bool],
    has_ended: Callable[[], bool],
) -> int:
    """Write a line every `interval_s` until an end comes; returns the lines.

    The first comes after one interval. A reading that takes longer than the interval delays the
    next, and the missed ones are left out.

    Args:
        seconds: the longest recording; None for no limit.
        wait: wait(seconds) -> whether it is asked to end.
        has_ended: whether what is watched has ended.
    """
    file = WholeLineFile(output)
    lines = 0
    try:
        file.add(column_names(meter))
        begin = time.monotonic()
        due_s = interval_s
        while seconds is None or due_s <= seconds:
            if wait_until_due(begin + due_s, wait, has_ended):
                return lines
            loads, memory_mib = meter.read()
            now_s = time.monotonic() - begin
            file.add([f"{now_s:.3f}", *map(load_cell, loads), f"{memory_mib:.1f}"])
            lines += 1
            due_s += interval_s * max(1, math.ceil((now_s - due_s) / interval_s))
        if seconds is not None:
            wait_until_due(begin + seconds, wait, has_ended)
        return lines
    finally:
        file.close()


def load_cell(load: float) -> str:
    """A load in percent; empty where it is not known."""
    return "" if math.isnan(load) else f"{load:.1f}"


def wait_until_due(
    due: float, wait: Callable[[float], bool], has_ended: Callable[[], bool]
) -> bool:
    """Wait until this time of time.monotonic; True where the recording is to end before."""
    while True:
        if has_ended():
            return True
        left_s = due - time.monotonic()
        if left_s <= 0:
            return False
        if wait(min(left_s, 0.1)):
            return True


def read_recording(path: Path) -> tuple[list[str], list[list[float]]]:
    """(column names, columns) of a recording; empty cells are nan.

    Raises:
        ValueError: the file is not a recording, or has no lines yet.
    """
    names, *lines = list(csv.reader(read_text(path).splitlines())) or [[]]
    if len(names) < 3 or names[0] != "Time":
        raise ValueError(f"{path}: not a recording: wanted the columns Time, GPU1 Load, ...")
    columns: list[list[float]] = [[] for _ in names]
    for line in lines:
        for column, cell in zip(columns, line):
            column.append(float(cell) if cell else math.nan)
    if not lines:
        raise ValueError(f"{path}: no lines were recorded, so there is nothing to draw")
    return names, columns


def draw_recording(recording: Path, picture: Path) -> None:
    """Draw load and memory over time.

    Args:
        picture: .png, .svg or .pdf; written whole or not at all.
    Raises:
        ValueError: as `read_recording`; or matplotlib is not installed.
    """
    names, columns = read_recording(recording)
    figure = new_figure()
    figure.set_size_inches(11, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    draw_loads(above, names[1:-1], columns)
    below.plot(columns[0], columns[-1], color="#d55e00")
    below.set_ylabel("memory in use, MiB")
    below.set_xlabel("seconds")
    for panel in (above, below):
        panel.grid(alpha=0.25, linewidth=0.5)
    save_figure(figure, picture)


def draw_loads(panel: "Axes", names: Sequence[str], columns: Sequence[Sequence[float]]) -> None:
    for name, column in zip(names, columns[1:]):
        panel.plot(columns[0], column, label=name.removesuffix(" Load"), linewidth=1)
    panel.set_ylim(0, 105)
    panel.set_ylabel("load, %")
    if len(names) <= 16:
        panel.legend(fontsize=8, frameon=False, ncols=8)
