"""Results as bars: a row for each task, a bar for each number of shots, chance as a line."""

from collections.abc import Sequence

from finetune.benchmark.results import TaskResult
from finetune.report import small_png

COLOURS = ("#9db7d5", "#3b76af", "#1d3b57", "#c44e52", "#55a868", "#8172b2")


def scores_picture(results: Sequence[TaskResult], title: str) -> bytes:
    """PNG of each task's first metric; raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    names = {}  # of the rows: a task with the metric that is drawn
    for result in results:
        names[result.task] = f"{result.task} ({next(iter(result.metrics))})"
    tasks = list(names)
    shots = sorted({result.shots for result in results})
    size = (7.2, 1.3 + len(tasks) * (0.16 + 0.16 * len(shots)))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)  # no window, and the program's own backend stays as it is
    axes = figure.subplots()
    height = 0.8 / len(shots)
    for number, count in enumerate(shots):
        places, values, errors = [], [], []
        for result in results:
            if result.shots != count:
                continue
            metric = next(iter(result.metrics))
            offset = number - (len(shots) - 1) / 2
            places.append(tasks.index(result.task) + height * offset)
            values.append(result.metrics[metric])
            errors.append(result.errors[metric])
        colour = COLOURS[number % len(COLOURS)]
        label = f"{count} shots" if count != 1 else "1 shot"
        axes.barh(places, values, height, xerr=errors, color=colour, label=label)
    for result in results:
        if result.chance is not None:
            row = tasks.index(result.task)
            axes.plot([result.chance] * 2, [row - 0.45, row + 0.45], color="black", linewidth=1)
    labels = [name.replace("$", r"\$") for name in names.values()]
    axes.set_yticks(range(len(tasks)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("score; black: chance")
    axes.set_title(title.replace("$", r"\$"))
    axes.legend(loc="best", frameon=False)
    canvas.draw()
    return small_png(canvas)
