"""The tables and the picture of the cells of benchmarks/methods_quality.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import print_table, shown_mean, split_by
from benchmarks.methods_tasks import SKILLS, TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE = "base"  # the method of a cell that trains nothing
CellRow = dict[str, Any]
Groups = dict[str, dict[str, list[float]]]  # label -> method -> values


def column(rows: Sequence[CellRow], *names: str) -> list[float]:
    """A value of each row, by the names that lead to it."""
    values: list[Any] = list(rows)
    for name in names:
        values = [value[name] for value in values]
    return values


def trainable_percent(row: CellRow) -> float:
    return 100 * row["trainable"] / row["parameters"]


def print_tables(rows: Sequence[CellRow]) -> None:
    """One table for each task, then the same probe's rows by every method."""
    for task, of_task in split_by(rows, "task").items():
        names = list(of_task[0]["scores"])
        columns = ["method", "seeds", *names, "trainable %", "memory GB", "CPU s"]
        columns += map("{}: before -> after".format, SKILLS)
        lines = []
        for method, of_method in split_by(of_task, "method").items():
            lines.append(table_line(method, of_method, names))
        print(f"\n{task}\n")
        print_table(columns, lines)
    print_answers(rows)


def table_line(method: str, rows: list[CellRow], names: list[str]) -> list[str]:
    line = [method, str(len(rows))]
    for name in names:
        line.append(shown_mean(column(rows, "scores", name), ".3f"))
    if method == BASE:
        return line + [""] * (3 + len(SKILLS))
    line.append(f"{trainable_percent(rows[0]):.3g}")
    for name in ("memory_gb", "cpu_s"):
        line.append(shown_mean(column(rows, name)))
    for kind in SKILLS:
        after = shown_mean(column(rows, "probe", kind, "after"), ".2f")
        line.append(f"{rows[0]['probe'][kind]['before']:.2f} -> {after}")
    return line


def print_answers(rows: Sequence[CellRow]) -> None:
    """A question of each kind of the probe, answered before and after each method's first run."""
    first: dict[tuple[str, str], CellRow] = {}
    for row in rows:
        if row["method"] != BASE:
            first.setdefault((row["task"], row["method"]), row)
    if not first:
        return
    questions, before = ["", "question"], ["", "before"]
    lines = [questions, before]
    for kind in SKILLS:
        shown = next(iter(first.values()))["probe"][kind]["shown"]
        questions.append(one_line(shown["prompt"]))
        before.append(one_line(shown["answer_before"]))
    for name, row in first.items():
        lines.append(list(name))
        for kind in SKILLS:
            lines[-1].append(one_line(row["probe"][kind]["shown"]["answer_after"]))
    print("\nthe same questions before and after\n")
    print_table(["task", "method", *SKILLS], lines)


def one_line(text: str) -> str:
    """The beginning of a text, for a table."""
    return " ".join(text.replace("|", "/").split())[:60]


def draw(rows: Sequence[CellRow], path: Path) -> None:
    """Scores, what stays of the skills, and the cost of each method.

    Raises ValueError: no method has a row, or matplotlib is not installed.
    """
    from predictor.pictures import new_figure, save_figure

    by_method = split_by(rows, "method")
    by_method.pop(BASE, None)
    if not by_method:
        raise ValueError(f"--picture {path}: there is no cell of a method yet")
    figure = new_figure()
    figure.set_size_inches(11, 7)
    scores, skills, share, cpu = figure.subplots(2, 2).flat
    groups: Groups = {}
    for task, of_task in split_by(rows, "task").items():
        main = TASKS[task].main
        of_methods = split_by(of_task, "method")
        of_methods.pop(BASE, None)
        if of_methods:
            groups[f"{task}: {main}"] = columns_of(of_methods, "scores", main)
    draw_bars(scores, "score on the task", groups)
    groups = {}
    for kind in SKILLS:
        before = {BASE: column(next(iter(by_method.values()))[:1], "probe", kind, "before")}
        groups[kind] = before | columns_of(by_method, "probe", kind, "after")
    draw_bars(skills, "what the base can do, before and after training", groups)
    for panel in (scores, skills):
        panel.set_ylim(0, 1)
    draw_bars(share, "trainable parameters, %", {"": of_each(by_method, trainable_percent)})
    share.set_yscale("log")
    draw_bars(cpu, "CPU seconds of training", {"": columns_of(by_method, "cpu_s")})
    save_figure(figure, path)


def columns_of(runs: dict[str, list[CellRow]], *names: str) -> dict[str, list[float]]:
    return {method: column(rows, *names) for method, rows in runs.items()}


def of_each(
    runs: dict[str, list[CellRow]], value: Callable[[CellRow], float]
) -> dict[str, list[float]]:
    return {method: list(map(value, rows)) for method, rows in runs.items()}


def draw_bars(panel: "Axes", title: str, groups: Groups) -> None:
    """A bar for each method in each group: the mean, with a point for every value."""
    methods: dict[str, int] = {}
    for group in groups.values():
        for method in group:
            methods.setdefault(method, len(methods))
    width = 0.8 / max(len(groups), 1)
    for place, (label, group) in enumerate(groups.items()):
        left = (place - (len(groups) - 1) / 2) * width
        for method, values in group.items():
            x = methods[method] + left
            panel.bar(x, sum(values) / len(values), width * 0.9, color=f"C{place}")
            panel.scatter([x] * len(values), values, color="black", s=6, zorder=3)
        panel.bar(0, 0, 0, color=f"C{place}", label=label)
    panel.set_xticks(range(len(methods)), list(methods), fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.grid(axis="y", alpha=0.3)
    if len(groups) > 1:
        panel.legend(fontsize=7)
