"""Several runs side by side: a table, and one picture of their loss, learning rate and metrics.

python -m finetune.report output-a output-b --output report.png
"""

import argparse
import io
import math
import statistics
import sys
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import Parser, run_command
from finetune.files import write_aside
from finetune.record import print_columns, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

# The colour-blind see the difference too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
SMOOTHING = 40  # a noisy curve's line is a mean over this share (1/N) of its steps
TITLES = {
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "eval_loss": "evaluation loss",
}


HEADS = [
    "run",
    "method",
    "status",
    "steps",
    "loss",
    "best metric",
    "value",
    "at step",
    "tokens/s",
    "time",
]


def run_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ, at least the folders' names."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path[-1:]) for path in parts]


def series(run: dict[str, Any], key: str) -> tuple[list[int], list[float]]:
    """Steps and values where a run has a finite value of `key`."""
    steps: list[int] = []
    values: list[float] = []
    for line in run["steps"]:
        value = line.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            steps.append(line["step"])
            values.append(value)
    return steps, values


def smooth(values: list[float], reach: int) -> list[float]:
    """Means over `reach` values on each side, over fewer, as many on both, near the ends."""
    sums = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        r = min(reach, i, len(values) - 1 - i)
        means.append((sums[i + r + 1] - sums[i - r]) / (2 * r + 1))
    return means


def clock(seconds: float) -> str:
    """Seconds as "hours:minutes:seconds"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def runs_table(runs: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: what each run was and came to."""
    return HEADS, [run_line(name, run) for name, run in runs.items()]


def run_line(name: str, run: dict[str, Any]) -> list[str]:
    """The cells of a run under HEADS."""
    steps, losses = series(run, "train_loss")
    _, speeds = series(run, "tokens_per_second")
    best = run.get("best")
    best_cells = ["-"] * 3
    if best:
        best_cells = [best["metric"], f"{best['value']:.4f}", str(best["step"])]
    return [
        name,
        run["flags"]["train_type"],
        run["status"],
        f"{steps[-1] if steps else 0}/{run['total_steps']}",
        f"{losses[-1]:.4f}" if losses else "-",
        *best_cells,
        f"{statistics.median(speeds):.0f}" if speeds else "-",
        clock(run["seconds"]),
    ]


MEMORY_HEADS = [
    "run",
    "epoch",
    "steps",
    "memory at its start",
    "peak",
    "at its end",
    "process peak",
]


def memory_table(runs: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: the memory of each epoch in GB, of the ranks' peaks the highest."""
    lines = []
    for name, run in runs.items():
        for epoch in run.get("memory", []):
            lines.append(
                [
                    name,
                    str(epoch["epoch"]),
                    f"{epoch['first_step']}-{epoch['last_step']}",
                    f"{epoch['begin_gb']:.2f}",
                    f"{max(epoch['rank_peaks_gb']):.2f}",
                    f"{epoch['end_gb']:.2f}",
                    f"{epoch['host_peak_gb']:.2f}",
                ]
            )
    return MEMORY_HEADS, lines


def panels(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What is drawn, in order: losses, learning rate, the metrics that any run has."""
    evaluated: set[str] = set()
    for run in runs.values():
        for line in run["steps"]:
            evaluated.update(key for key in line if key.startswith("eval_"))
    keys = ["train_loss"]
    if "eval_loss" in evaluated:
        keys.append("eval_loss")
    return [*keys, "learning_rate", *sorted(evaluated - {"eval_loss"}), "tokens_per_second"]


def runs_picture(runs: dict[str, dict[str, Any]]) -> bytes:
    """The picture as PNG; raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ValueError("--output needs matplotlib: pip install matplotlib") from None
    shown = panels(runs)
    columns = 2 if len(shown) in (2, 4) else 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.0 * rows + 0.5), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)  # no window, and the program's own backend stays as it is
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    longest = last_step(runs)
    colours = dict(zip(runs, cycle(COLOURS)))
    for axes, key in zip(grid, shown):
        draw_panel(axes, key, runs, colours)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlim(0, 1.02 * longest)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    add_legend(figure, colours)
    canvas.draw()
    return small_png(canvas)


def last_step(runs: dict[str, dict[str, Any]]) -> int:
    """The highest step of all runs, at least 1."""
    longest = 1
    for run in runs.values():
        for line in run["steps"]:
            longest = max(longest, line["step"])
    return longest


def add_legend(figure: "Figure", colours: dict[str, str]) -> None:
    """Put the runs' names above the panels."""
    handles = []
    for name, colour in colours.items():
        label = name.replace("$", r"\$")
        handles += figure.axes[0].plot([], [], color=colour, linewidth=2.2, label=label)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=10,
    )


def small_png(canvas: "FigureCanvasAgg") -> bytes:
    """A drawn canvas as PNG of 128 colours: a third of the bytes, and looks the same."""
    from PIL import Image  # matplotlib's own

    drawn = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    picture = io.BytesIO()
    drawn.convert("RGB").quantize(128).save(picture, "PNG", optimize=True)
    return picture.getvalue()


def draw_panel(
    axes: "Axes", key: str, runs: dict[str, dict[str, Any]], colours: dict[str, str]
) -> None:
    """One measurement of all runs over their steps; a star marks the best evaluation."""
    for name, run in runs.items():
        steps, values = series(run, key)
        if not steps:
            continue
        draw_curve(axes, key, steps, values, colours[name])
        best = run.get("best")
        if best and key == f"eval_{best['metric']}":
            axes.plot(
                best["step"],
                best["value"],
                marker="*",
                markersize=13,
                color=colours[name],
                markeredgecolor="white",
                zorder=3,
            )
    title = key.removeprefix("eval_").replace("train_loss", "training loss")
    axes.set_title(TITLES.get(key, title), fontsize=11, loc="left")
    style_axes(axes)
    if key == "learning_rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if key in ("learning_rate", "tokens_per_second"):
        axes.set_ylim(bottom=0)


def draw_curve(axes: "Axes", key: str, steps: list[int], values: list[float], colour: str) -> None:
    """One run's line: smoothed over its pale values where they are noisy and many."""
    if key in ("train_loss", "tokens_per_second") and len(steps) > SMOOTHING:
        means = smooth(values, -(-len(values) // (2 * SMOOTHING)))
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, means, color=colour, linewidth=1.8)
    elif len(steps) <= 30 and key != "learning_rate":
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3.5)
    else:
        axes.plot(steps, values, color=colour, linewidth=1.8)


def style_axes(axes: "Axes") -> None:
    """Grey axes left and below, and lines across."""
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8.5, length=3, color="#999999")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="finetune.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="--output_dir of a run, under way or done",
    )
    parser.add_argument("--output", type=Path, help="PNG of the curves")
    args = parser.parse_args(argv)
    if args.output and args.output.suffix != ".png":
        parser.error(f"--output: wanted a name that ends in .png, got {args.output}")
    return run_command(parser.prog, lambda: print_report(args.runs, args.output))


def print_report(folders: list[Path], output: Path | None) -> None:
    """Print the table of runs, and write their picture to `output`."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice")
    runs = dict(zip(run_names(folders), map(read_run, folders)))
    print_columns(*runs_table(runs))
    heads, lines = memory_table(runs)
    if lines:
        print("\nGB of each epoch, of its GPU, without one of its process:")
        print_columns(heads, lines)
    if output:
        write_aside(output, runs_picture(runs))


if __name__ == "__main__":
    sys.exit(main())
