"""How long rows are in tokens: percentiles, the share that a run would cut, a small picture.

Free of torch.
"""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.rows.arrays import EncodedRow

PERCENTILES = (50, 90, 95, 99, 100)
SIDES = ("prompt", "answer", "whole")


@dataclass(frozen=True)
class RowLengths:
    """Tokens of rows: (rows,) int64 each. The prompt is what comes before the first label.

    Attributes:
        cut: how many rows a run cuts.
    """

    prompt: np.ndarray
    whole: np.ndarray
    cut: int

    @property
    def answer(self) -> np.ndarray:
        """Tokens from the first label on."""
        return self.whole - self.prompt

    def figures(self, max_len: int) -> dict[str, Any]:
        """Percentiles, means, and the shares of rows over --max_len, and that are cut."""
        figures: dict[str, Any] = {"rows": len(self.whole), "tokens": int(self.whole.sum())}
        for side in SIDES:
            lengths = getattr(self, side)
            side_figures: dict[str, float] = {"mean": round(float(lengths.mean()), 1)}
            for percentile in PERCENTILES:
                name = f"p{percentile}" if percentile < 100 else "max"
                value = np.percentile(lengths, percentile, method="inverted_cdf")
                side_figures[name] = int(value)
            figures[side] = side_figures
        figures["over_max_len"] = float((self.whole > max_len).mean())
        figures["cut"] = self.cut / len(self.whole)
        return figures


class LengthMeter:
    """Collects the lengths of encoded rows as they pass."""

    def __init__(self) -> None:
        self.prompts = array("q")
        self.wholes = array("q")
        self.cut = 0

    def add(self, row: EncodedRow) -> None:
        """Note a row's lengths."""
        self.wholes.append(len(row.input_ids))
        self.prompts.append(min(row.n_masked, len(row.input_ids)))
        self.cut += row.truncated

    @property
    def lengths(self) -> RowLengths:
        """Those of all rows that were seen."""
        prompts, wholes = np.array(self.prompts, np.int64), np.array(self.wholes, np.int64)
        return RowLengths(prompts, wholes, self.cut)


def lengths_text(figures: dict[str, Any], max_len: int, max_src_len: int) -> str:
    """The figures as a table for people."""
    heads = ["tokens", *list(figures["whole"])]
    lines = ["".join(f"{head:>9}" for head in heads)]
    for side in SIDES:
        values = figures[side].values()
        lines.append(f"{side:>9}" + "".join(f"{value:>9}" for value in values))
    lines.append(
        f"{figures['rows']} rows, {figures['tokens']} tokens; over --max_len {max_len}: "
        f"{100 * figures['over_max_len']:.1f} %; cut with --max_src_len {max_src_len} too: "
        f"{100 * figures['cut']:.1f} %"
    )
    return "\n".join(lines)


def lengths_picture(lengths: RowLengths, max_len: int) -> bytes:
    """Histograms of prompts and answers as PNG; raises ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib") from None
    from finetune.report import COLOURS, small_png, style_axes

    figure = Figure(figsize=(6.4, 2.8), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest = max(int(lengths.whole.max()), 2)
    edges = np.unique(np.geomspace(1, longest + 1, 41).astype(int))
    for side, colour in zip(SIDES, COLOURS):
        values = np.maximum(getattr(lengths, side), 1)
        axes.hist(values, edges.tolist(), histtype="step", color=colour, linewidth=1.6, label=side)
    axes.axvline(max_len, color="#7F7F7F", linestyle="--", linewidth=1, label="--max_len")
    axes.set_xscale("log")
    style_axes(axes)
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel("rows", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    canvas.draw()
    return small_png(canvas)
