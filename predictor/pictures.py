"""Pictures of how good a predictor is. matplotlib is imported when one is drawn."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.files import check_file_to_write, write_aside
from predictor.scores import quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 12  # groups of prompts that the band's ends are averaged over


def draw_evaluation(
    path: Path,
    probabilities: np.ndarray,
    edges: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    report: dict,
) -> None:
    """Draw predicted against real length, and nominal against observed coverage.

    The left panel shows the predicted median with its 10-90 % band, the right one the calibration
    curve.

    Args:
        path: .png, .svg or .pdf; written whole or not at all.
        probabilities, edges, tokens, finished: (M, K), (K + 1,), (M,), (M,) of M answers.
        report: predictor.evaluate's, of the same answers.
    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    draw_lengths(left, probabilities, edges, tokens, finished)
    figures = report["all"]
    left.set_title(
        f"tau-b {figures['tau']:.3f}, MAE {figures['mae']:.1f}"
        f" (constant {figures['mae_constant']:.1f})"
    )
    draw_calibration(right, report["calibration"])
    right.set_title(f"q90 covers {figures['coverage_90']:.1%}, q97.5 {figures['coverage_975']:.1%}")
    title = f"{report['prompts']} prompts, answers of {report['served_model']}"
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    save_figure(figure, path)


def new_figure() -> "Figure":
    """An empty figure. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)  # opens no window and leaves the program's backend as it is
    return figure


def check_picture(path: Path, flag: str = "--picture") -> None:
    """For commands that draw after long work.

    Raises ValueError for another ending, where the picture cannot be written, or where matplotlib
    is not installed.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{flag} {path}: wanted .png, .svg or .pdf")
    check_file_to_write(path, flag)
    new_figure()


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the name's ending, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=110)
    write_aside(path, image.getvalue())


def draw_lengths(
    panel: "Axes",
    probabilities: np.ndarray,
    edges: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
) -> None:
    """Real length against predicted median, one point an answer, with the 10-90 % band."""
    low = np.maximum(quantiles(probabilities, edges, 0.1), 1)
    median = np.maximum(quantiles(probabilities, edges, 0.5), 1)
    high = np.maximum(quantiles(probabilities, edges, 0.9), 1)
    lengths = np.maximum(tokens, 1)
    # The band's ends are geometric means over groups of answers of like median.
    groups = np.array_split(np.argsort(median), min(STEPS, len(median)))
    groups = [group for group in groups if len(group)]
    panel.fill_between(
        geometric_means(median, groups),
        geometric_means(low, groups),
        geometric_means(high, groups),
        color="tab:blue",
        alpha=0.15,
        label="predicted, 10 to 90 %",
    )
    draw_points(panel, median, lengths, finished)
    ends = (min(median.min(), lengths.min()) * 0.8, max(median.max(), lengths.max()) * 1.25)
    panel.plot(ends, ends, color="gray", linewidth=0.8)
    panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    panel.set(xlabel="predicted median (tokens)", ylabel="real length (tokens)")
    panel.legend(loc="upper left", frameon=False, fontsize=8)


def draw_points(
    panel: "Axes", median: np.ndarray, lengths: np.ndarray, finished: np.ndarray
) -> None:
    """One point an answer: dots for finished ones, triangles for those that were cut."""
    whole, cut = finished, ~finished
    panel.scatter(
        median[whole],
        lengths[whole],
        s=9,
        color="tab:blue",
        label="answers",
        alpha=0.5,
        linewidths=0,
    )
    if cut.any():
        panel.scatter(
            median[cut],
            lengths[cut],
            s=14,
            marker="^",
            color="tab:orange",
            label="cut, would go on",
            alpha=0.5,
            linewidths=0,
        )


def geometric_means(values: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """(len(groups),): the geometric mean of `values` over each group of indices."""
    logs = np.log(values)
    return np.exp([logs[group].mean() for group in groups])


def draw_calibration(panel: "Axes", curve: dict) -> None:
    """Observed against nominal coverage; `curve` is the report's "calibration"."""
    panel.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    panel.plot(curve["nominal"], curve["observed"], marker="o", markersize=4, color="tab:blue")
    panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="quantile", ylabel="share of answers within it")
