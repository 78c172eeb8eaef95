"""Several runs side by side: a table, and one picture of their loss, learning rate and metrics.

python -m finetune.report output-a output-b --output report.png
"""

import argparse
import io
import math
import statistics
import sys
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.commands import Parser, run_command
from finetune.files import write_aside
from finetune.record import print_table, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#7F7F7F",
)  # told apart by the colour-blind too
SMOOTHING = 40  # a noisy curve's line is a mean over this share (1/N) of its steps
TITLES = {
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "eval_loss": "evaluation loss",
}


def names_of(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart, at least their names."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(
        (
            n
            for n in range(1, max(map(len, parts)) + 1)
            if len({p[-n:] for p in parts}) == len(parts)
        ),
        1,
    )
    return ["/".join(p[-length:]) for p in parts]


def series(run: dict, key: str) -> tuple[list[int], list[float]]:
    """Steps and values where a run has a finite value of `key`."""
    found = [
        (line["step"], line[key])
        for line in run["steps"]
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: list[float], reach: int) -> list[float]:
    """Means over `reach` values on each side, over fewer, as many on both, near the ends."""
    sums = [0.0, *accumulate(values)]
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reaches)]


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def table(runs: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: what each run was and came to."""
    heads = [
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
    lines = []
    for name, run in runs.items():
        steps, losses = series(run, "train_loss")
        speeds, best = series(run, "tokens_per_second")[1], run.get("best")
        lines.append(
            [
                name,
                run["flags"]["train_type"],
                run["status"],
                f"{steps[-1] if steps else 0}/{run['total_steps']}",
                f"{losses[-1]:.4f}" if losses else "-",
                *(
                    [best["metric"], f"{best['value']:.4f}", str(best["step"])]
                    if best
                    else ["-"] * 3
                ),
                f"{statistics.median(speeds):.0f}" if speeds else "-",
                clock(run["seconds"]),
            ]
        )
    return heads, lines


def panels(runs: dict[str, dict]) -> list[str]:
    """What is drawn, in order: losses, learning rate, the metrics that any run has."""
    measured = {
        key
        for run in runs.values()
        for line in run["steps"]
        for key in line
        if key.startswith("eval_")
    }
    first = [
        key
        for key in ("train_loss", "eval_loss", "learning_rate")
        if key != "eval_loss" or key in measured
    ]
    return first + sorted(measured - {"eval_loss"}) + ["tokens_per_second"]


def draw(runs: dict[str, dict]) -> bytes:
    """The picture as PNG; raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
        from PIL import Image  # matplotlib's own
    except ImportError:
        raise ValueError("--output needs matplotlib: pip install matplotlib") from None
    shown = panels(runs)
    columns = 2 if len(shown) in (2, 4) else 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.0 * rows + 0.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # no window, and the program's own backend stays as it is
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    longest = max(1, *(line["step"] for run in runs.values() for line in run["steps"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}
    for axes, key in zip(grid, shown):
        draw_panel(axes, key, runs, colours)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlim(0, 1.02 * longest)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    handles = [
        figure.axes[0].plot([], [], color=colour, linewidth=2.2, label=name.replace("$", r"\$"))[0]
        for name, colour in colours.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=10,
    )
    figure.canvas.draw()
    drawn, picture = (
        Image.frombytes("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()),
        io.BytesIO(),
    )
    drawn.convert("RGB").quantize(128).save(
        picture, "PNG", optimize=True
    )  # a third of the bytes, and looks the same
    return picture.getvalue()


def draw_panel(axes: "Axes", key: str, runs: dict[str, dict], colours: dict[str, str]) -> None:
    """One measurement of all runs over their steps; a star marks the best evaluation that the run
    went by.
    """
    for name, run in runs.items():
        steps, values = series(run, key)
        if not steps:
            continue
        if key in ("train_loss", "tokens_per_second") and len(steps) > SMOOTHING:
            axes.plot(steps, values, color=colours[name], linewidth=0.8, alpha=0.35)
            axes.plot(
                steps,
                smooth(values, -(-len(values) // (2 * SMOOTHING))),
                color=colours[name],
                linewidth=1.8,
            )
        else:
            few = (
                {"marker": "o", "markersize": 3.5}
                if len(steps) <= 30 and key != "learning_rate"
                else {}
            )
            axes.plot(steps, values, color=colours[name], linewidth=1.8, **few)
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
    axes.set_title(
        TITLES.get(key, key.removeprefix("eval_").replace("train_loss", "training loss")),
        fontsize=11,
        loc="left",
    )
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8.5, length=3, color="#999999")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    if key == "learning_rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if key in ("learning_rate", "tokens_per_second"):
        axes.set_ylim(bottom=0)


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
    return run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if len({folder.resolve() for folder in args.runs}) < len(args.runs):
        raise ValueError("a run is named twice")
    runs = {name: read_run(folder) for name, folder in zip(names_of(args.runs), args.runs)}
    print_table(*table(runs))
    if args.output:
        write_aside(args.output, draw(runs))


if __name__ == "__main__":
    sys.exit(main())
