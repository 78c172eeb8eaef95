"""A picture of a sweep: seconds and tokens a second by batch, a line for each number of GPUs."""

from collections.abc import Sequence
from pathlib import Path

from predictor.pictures import new_figure, save_figure
from serving.sweep.rows import SweepRow

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_sweep(path: Path, rows: Sequence[SweepRow], title: str) -> None:
    """Write the picture; predictions beside measurements are dashed.

    Args:
        path: .png, .svg or .pdf; written whole or not at all.
    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    for place, gpus in enumerate(dict.fromkeys(row.gpus for row in rows)):
        colour = COLOURS[place % len(COLOURS)]
        label = f"{gpus} device" if gpus == 1 else f"{gpus} devices"
        fitting = [row for row in rows if row.gpus == gpus and row.seconds is not None]
        batches = [row.batch for row in fitting]
        left.plot(batches, [row.seconds for row in fitting], "o-", color=colour, label=label)
        right.plot(batches, [row.tokens_s for row in fitting], "o-", color=colour, label=label)
        guesses = [row for row in fitting if row.predicted_s is not None]
        if guesses:
            sizes = [row.batch for row in guesses]
            seconds = [row.predicted_s for row in guesses]
            left.plot(sizes, seconds, "--", color=colour, label=f"{label}, predicted")
    left.set(xlabel="requests of a batch", ylabel="seconds")
    right.set(xlabel="requests of a batch", ylabel="answer tokens a second")
    for panel in (left, right):
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    save_figure(figure, path)
