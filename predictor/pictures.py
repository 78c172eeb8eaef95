"""Pictures of how good a predictor is. matplotlib is imported when one is drawn."""

import io
from pathlib import Path

import numpy as np

from finetune.files import write_aside
from predictor.scores import quantiles

STEPS = 12  # groups of prompts that the band's ends are averaged over


def draw(
    path: Path,
    probabilities: np.ndarray,
    edges: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    report: dict,
):
    """Two panels: predicted median against real length with the 10-90 band, and nominal against observed coverage.

    Args:
        path: .png, .svg or .pdf; written whole or not at all.
        probabilities, edges, tokens, finished: (M, K), (K + 1,), (M,), (M,) of M answers.
        report: predictor.evaluate's, of the same answers.
    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and the program's own backend stays as it is
    left, right = figure.subplots(1, 2)
    at_least_one = np.maximum(tokens, 1)
    low, median, high = (np.maximum(quantiles(probabilities, edges, q), 1) for q in (0.1, 0.5, 0.9))
    parts = [
        part for part in np.array_split(np.argsort(median), min(STEPS, len(median))) if len(part)
    ]
    middle = [np.exp(np.log(x)[part].mean()) for x in (median, low, high) for part in parts]
    at, band_low, band_high = np.reshape(middle, (3, -1))
    left.fill_between(
        at, band_low, band_high, color="tab:blue", alpha=0.15, label="predicted, 10 to 90 %"
    )
    left.scatter(
        median[finished],
        at_least_one[finished],
        s=9,
        alpha=0.5,
        color="tab:blue",
        linewidths=0,
        label="answers",
    )
    if not finished.all():
        left.scatter(
            median[~finished],
            at_least_one[~finished],
            s=14,
            marker="^",
            alpha=0.5,
            color="tab:orange",
            linewidths=0,
            label="cut, would go on",
        )
    ends = [
        min(median.min(), at_least_one.min()) * 0.8,
        max(median.max(), at_least_one.max()) * 1.25,
    ]
    left.plot(ends, ends, color="gray", linewidth=0.8)
    left.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="predicted median (tokens)",
        ylabel="real length (tokens)",
    )
    figures = report["all"]
    left.set_title(
        f"tau-b {figures['tau']:.3f}, MAE {figures['mae']:.1f} (constant {figures['mae_constant']:.1f})"
    )
    left.legend(loc="upper left", frameon=False, fontsize=8)
    curve = report["calibration"]
    right.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    right.plot(curve["nominal"], curve["observed"], marker="o", markersize=4, color="tab:blue")
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="quantile", ylabel="share of answers within it")
    right.set_title(f"q90 covers {figures['coverage_90']:.1%}, q97.5 {figures['coverage_975']:.1%}")
    figure.suptitle(
        f"{report['prompts']} prompts, answers of {report['served_model']}".replace("$", r"\$"),
        fontsize=10,
    )
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=110)
    write_aside(path, image.getvalue())
