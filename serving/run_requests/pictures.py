"""A picture of the runs: when each request waited and was answered, and how many were late."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from predictor.pictures import new_figure, save_figure
from serving.run_requests.figures import PolicyRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAITING, IN_TIME, LATE = "#cfcfcf", "#0072b2", "#d55e00"


def draw_policy_runs(path: Path, runs: Sequence[PolicyRun], title: str) -> None:
    """A chart of rows over time for each policy, and the bars of their default rates.

    Args:
        path: .png, .svg or .pdf; written whole or not at all.
    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure()
    figure.set_size_inches(11, 2.2 * (len(runs) + 1))
    panels = figure.subplots(len(runs) + 1, 1)
    longest = max((run.figures.get("total_s") or 0.0) for run in runs)
    for panel, run in zip(panels, runs):
        draw_timeline(panel, run)
        panel.set_xlim(0, longest * 1.02)
    panels[len(runs) - 1].set_xlabel("seconds")
    draw_default_rates(panels[-1], runs)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    save_figure(figure, path)


def draw_timeline(panel: "Axes", run: PolicyRun) -> None:
    """A line for each request: grey while it waits, coloured while it is answered."""
    answered = [row for row in run.requests if "latency_s" in row]
    answered.sort(key=lambda row: (row["arrival_s"] + row["queue_s"], row["row"]))
    for height, row in enumerate(answered):
        begin_s, queue_s = row["arrival_s"], row["queue_s"]
        colour = IN_TIME if row["in_time"] else LATE
        panel.barh(height, queue_s, left=begin_s, height=1.0, color=WAITING)
        took_s = row["latency_s"] - queue_s
        panel.barh(height, took_s, left=begin_s + queue_s, height=0.85, color=colour)
    panel.set_ylim(len(answered) - 0.5, -0.5)
    panel.set_ylabel("requests by start")
    rate = run.figures["default_rate"] or 0.0
    panel.set_title(
        f"{run.name}: grey waits, blue is answered in time, orange is late ({rate:.0%})", fontsize=9
    )


def draw_default_rates(panel: "Axes", runs: Sequence[PolicyRun]) -> None:
    names = [run.name for run in runs]
    rates = [100 * (run.figures["default_rate"] or 0.0) for run in runs]
    bars = panel.bar(names, rates, color=LATE, width=0.5)
    panel.bar_label(bars, fmt="%.1f")
    panel.set_ylim(0, 112)
    panel.set_ylabel("default rate, %")
