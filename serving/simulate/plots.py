"""Plots of a comparison: attainment against load, and latency and queue at the highest load."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.files import write_aside
from serving.policies.static import Static
from serving.request import Policy
from serving.simulate.compare import ComparisonRow, ComparisonSetting, run_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_plots(
    rows: list[ComparisonRow],
    policies: dict[str, Policy],
    setting: ComparisonSetting,
    folder: Path,
) -> list[Path]:
    """The PNG files written: attainment against load, and latency and queue at the highest load.

    Latency is plotted as its distribution, the queue over time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    highest = max(row["rate"] for row in rows)
    figures = {name: pyplot.subplots(figsize=(7, 4)) for name in ("attainment", "latency", "queue")}
    rates: list[float] = []
    for name, policy in policies.items():
        style = {
            "label": name,
            "linestyle": "--" if isinstance(policy, Static) else "-",
            "linewidth": 1.4,
        }
        runs = sorted((row for row in rows if row["policy"] == name), key=rate_of)
        rates = list(map(rate_of, runs))
        plot_attainment(figures["attainment"][1], runs, style)
        plot_run(figures["latency"][1], figures["queue"][1], policy, setting, highest, style)
    labels = axis_labels(highest)
    written = []
    for name, (figure, axes) in figures.items():
        across, up, title = labels[name]
        title += f": {setting.workload}, {setting.requests} requests"
        axes.set(xlabel=across, ylabel=up, title=title)
        if name != "queue":
            axes.set(xscale="log", ylim=(0, 1.02))
        if name == "attainment":
            label_rates(axes, rates)
        finish_axes(axes)
        figure.tight_layout()
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        written.append(folder / f"{name}.png")
        write_aside(written[-1], image.getvalue())
        pyplot.close(figure)
    return written


def rate_of(row: ComparisonRow) -> float:
    return row["rate"]


def axis_labels(highest: float) -> dict[str, tuple[str, str, str]]:
    """(x label, y label, title) of each plot; `highest` in requests/s."""
    return {
        "attainment": (
            "requests a second",
            "share answered in time; band: all seeds",
            "Attainment against load",
        ),
        "latency": ("latency, s", "share of requests", f"Latency at {highest:g} requests/s"),
        "queue": ("time, s", "waiting requests", f"Queue at {highest:g} requests/s"),
    }


def plot_attainment(axes: "Axes", runs: list[ComparisonRow], style: dict[str, Any]) -> None:
    """The mean over seeds against the rate, in a band from the least to the largest."""
    rates = list(map(rate_of, runs))
    attained = np.array([row["by_seed"]["attainment"] for row in runs])
    (line,) = axes.plot(rates, attained.mean(axis=1), marker="o", markersize=3, **style)
    low, high = attained.min(axis=1), attained.max(axis=1)
    axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def plot_run(
    latency_axes: "Axes",
    queue_axes: "Axes",
    policy: Policy,
    setting: ComparisonSetting,
    rate: float,
    style: dict[str, Any],
) -> None:
    """The distribution of latency and the queue over time, of seed 0 at this rate."""
    workload = setting.make(rate, 0)
    _, collector = run_setting(policy, workload, setting)
    arrived = np.asarray(collector.columns["arrival_s"])
    admitted = np.asarray(collector.columns["admitted_s"])
    finished = np.asarray(collector.columns["finish_s"])
    latency = np.sort(finished - arrived)
    latency_axes.plot(latency, np.linspace(0, 1, len(latency)), **style)
    times = np.sort(np.concatenate([arrived, admitted]))
    waiting = np.searchsorted(np.sort(arrived), times, "right")
    waiting = waiting - np.searchsorted(np.sort(admitted), times, "right")
    queue_axes.plot(times, waiting, **style | {"linewidth": 0.9})


def label_rates(axes: "Axes", rates: Sequence[float]) -> None:
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.minorticks_off()


def finish_axes(axes: "Axes") -> None:
    """Grid, spines and the legend beside the plot."""
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        title="dashed: static batches",
        title_fontsize=7,
    )
