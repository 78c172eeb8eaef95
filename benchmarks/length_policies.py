"""Policies by predicted length against each other, in the simulator, from half to twice capacity.

python benchmarks/length_policies.py --output cells.jsonl      all cells, then the tables
python benchmarks/length_policies.py --output cells.jsonl --seconds 500    a piece; again goes on
python benchmarks/length_policies.py --output cells.jsonl --tables --picture frontier.png

A cell is a workload, a load and a seed; all policies see the same requests, predictions and engine.
Loads are shares of what `fcfs` serves when it never idles. One line a cell, so a run that is cut
off goes on where it was. Predictions have the encoder's errors and take its time (docs/results.md).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import print_table  # noqa: E402
from serving.policies.continuous import POLICIES  # noqa: E402
from serving.policies.gittins import OBJECTIVES  # noqa: E402
from serving.request import Limits, Policy  # noqa: E402
from serving.simulate.compare import serve  # noqa: E402
from serving.simulate.engine import LinearCost, SimulatedEngine  # noqa: E402
from serving.simulate.experiment_common import LONGEST, PREDICT_S, RESIDUALS  # noqa: E402
from serving.simulate.rereading import SyntheticRereads  # noqa: E402
from serving.simulate.statistics import interval  # noqa: E402
from serving.simulate.uellm_lengths import recorded_answers  # noqa: E402
from serving.simulate.workload import (  # noqa: E402
    TRACES,
    PredictorModel,
    SloRule,
    Workload,
    make_workload,
    poisson_arrivals,
)

LIMITS = Limits(64, 100_000, 8192)
LOADS = (0.5, 0.8, 1.0, 1.3, 2.0)
CAPACITY_SEED = 1000  # not among those of the cells
CHARACTERS_A_TOKEN, TEMPLATE_TOKENS = 4, 30  # of English prompts, where a file has no token counts

REREAD = "gittins, re-read"
MEAN_ORACLE = "gittins_mean_oracle"
PREDICTING = ("sjf", "srpt", "boost_work", "tie")  # the rivals that predict
COMPARED: dict[str, Policy] = {
    "fcfs": POLICIES["fcfs"],
    "sjf": POLICIES["sjf"],
    "srpt": POLICIES["srpt"],
    "tie": POLICIES["tie"],
    "boost": POLICIES["boost"],
    "boost_work": POLICIES["boost_work"],
    "deadline": POLICIES["deadline"],
    "gittins_mean": POLICIES["gittins_mean"],
    "gittins_tail": POLICIES["gittins_tail"],
    "gittins": POLICIES["gittins"],
    REREAD: POLICIES["gittins"],
    "boost_oracle": POLICIES["boost_oracle"],
    "deadline_oracle": POLICIES["deadline_oracle"],
    "gittins_oracle": POLICIES["gittins_oracle"],
    MEAN_ORACLE: replace(OBJECTIVES["mean"], truth=True),
}
METRICS = (
    "attainment",
    "latency_mean_s",
    "latency_p99_s",
    "largest_wait_s",
    "ttft_max_s",
    "preempted",
)
# fcfs admits what has a row and memory, though its prompt is computed later: until admission it
# waits for less than it seems, so waits are compared until the first token too.
WAITS = {"largest_wait_s": "largest wait", "ttft_max_s": "longest time to a first token"}


@dataclass(frozen=True)
class BenchFlags:
    """The flags; `build_parser` has their meaning and defaults."""

    output: Path
    workloads: list[str]
    loads: list[float]
    seeds: int
    requests: int
    policies: list[str]
    traces: str
    uellm_data: str | None
    lengths: Path | None
    workers: int
    seconds: float
    tables: bool
    picture: Path | None


@dataclass(frozen=True)
class CellTask:
    """One cell: its place in the table, and what it is made of."""

    workload: str
    load: float
    seed: int
    flags: BenchFlags

    @property
    def key(self) -> tuple[str, float, int]:
        return self.workload, self.load, self.seed


# ---- requests


@lru_cache(maxsize=4)
def read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(prompt tokens, answer tokens) of a lengths file of scripts/collect_lengths.py.

    Prompts are counted as characters / 4, with a chat template around them.
    """
    prompts, answers = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompts.append(len(row["prompt"]) // CHARACTERS_A_TOKEN + TEMPLATE_TOKENS)
        answers.append(max(int(row["output_tokens"]), 1))
    if not prompts:
        raise ValueError(f"--lengths {path}: no rows in it")
    return np.array(prompts), np.array(answers)


def drawn_workload(
    prompts: np.ndarray, answers: np.ndarray, count: int, seed: int, predictor: PredictorModel
) -> Workload:
    """Prompts drawn with one of their answers, Poisson arrivals at 1 request/s."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, len(prompts), count)
    chosen = answers[which]
    if answers.ndim == 2:
        chosen = answers[which, rng.integers(0, answers.shape[1], count)]
    slo_s = SloRule()(prompts[which], chosen, LinearCost(), rng)
    index, predictions = predictor.predict(chosen, rng)
    arrivals = poisson_arrivals(count, 1.0, rng)
    return Workload(arrivals, prompts[which], chosen, slo_s, index, predictions, PREDICT_S)


def make_cell_workload(name: str, seed: int, flags: BenchFlags) -> Workload:
    """At 1 request/s. Raises ValueError for a workload without its file."""
    predictor = PredictorModel(np.array(RESIDUALS), LONGEST)
    if name in TRACES:
        return make_workload(
            name,
            flags.requests,
            1.0,
            LinearCost(),
            seed=seed,
            predictor=predictor,
            predict_s=PREDICT_S,
            traces=flags.traces,
            max_tokens=LIMITS.max_tokens,
        )
    if name == "uellm":
        recorded = recorded_answers(flags.uellm_data)
        return drawn_workload(recorded.prompts, recorded.answers, flags.requests, seed, predictor)
    if flags.lengths is None:
        raise ValueError("the workload lengths needs --lengths FILE, of scripts/collect_lengths.py")
    prompts, answers = read_pairs(flags.lengths)
    return drawn_workload(prompts, answers, flags.requests, seed, predictor)


def warn_of_substitutes(flags: BenchFlags) -> None:
    """Say where UELLM's recorded lengths are not there."""
    if "uellm" in flags.workloads and recorded_answers(flags.uellm_data).is_substitute:
        print("uellm: lengths drawn like the recorded ones; give --uellm_data", file=sys.stderr)


@lru_cache(maxsize=16)
def fcfs_capacity(
    name: str, requests: int, flags_key: tuple[str, str | None, Path | None]
) -> float:
    """Requests a second that `fcfs` serves when all are there at time 0."""
    traces, uellm_data, lengths = flags_key
    flags = BenchFlags(
        Path(), [], [], 0, requests, [], traces, uellm_data, lengths, 1, 0.0, False, None
    )
    workload = make_cell_workload(name, CAPACITY_SEED, flags)
    at_once = replace(workload, arrival_s=np.zeros(len(workload)))
    metrics, _, _ = serve(POLICIES["fcfs"], at_once, [SimulatedEngine(LinearCost(), LIMITS)])
    return len(workload) / metrics["span_s"]


# ---- cells


def run_cell(task: CellTask) -> dict[str, Any]:
    """The line of a cell."""
    flags = task.flags
    key = (flags.traces, flags.uellm_data, flags.lengths)
    capacity = fcfs_capacity(task.workload, flags.requests, key)
    workload = make_cell_workload(task.workload, task.seed, flags).at_rate(task.load * capacity)
    rows = {}
    for name in flags.policies:
        rereads = None
        if name == REREAD:
            rereads = SyntheticRereads(workload.output_tokens, LONGEST, seed=task.seed)
        engine = SimulatedEngine(LinearCost(), LIMITS, rereads=rereads)
        metrics, _, _ = serve(COMPARED[name], workload, [engine])
        rows[name] = chosen_metrics(metrics)
    return {
        "workload": task.workload,
        "load": task.load,
        "seed": task.seed,
        "requests": flags.requests,
        "capacity": capacity,
        "policies": rows,
    }


def chosen_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Those of METRICS."""
    chosen = {}
    for metric in METRICS:
        chosen[metric] = metrics[metric]
    return chosen


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a file; a last line that was cut off is left out."""
    cells = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                cells.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return cells


def open_tasks(flags: BenchFlags) -> list[CellTask]:
    """The cells that are not in the file, seed by seed, so that a part of them is balanced."""
    done: dict[tuple[str, float, int], set[str]] = {}
    for cell in read_cells(flags.output):
        if cell["requests"] != flags.requests:
            raise ValueError(
                f"--output {flags.output} has cells of {cell['requests']} requests, wanted "
                f"{flags.requests}: give another file, or --requests {cell['requests']}"
            )
        key = cell["workload"], cell["load"], cell["seed"]
        done.setdefault(key, set()).update(cell["policies"])
    tasks = []
    for seed in range(flags.seeds):
        for workload in flags.workloads:
            for load in flags.loads:
                task = CellTask(workload, load, seed, flags)
                there = done.get(task.key, set())
                missing = sorted(set(flags.policies) - there, key=flags.policies.index)
                if missing:
                    tasks.append(replace(task, flags=replace(flags, policies=missing)))
    return tasks


def results_of(tasks: list[CellTask], workers: int) -> Iterator[dict[str, Any]]:
    """The lines, in the order of tasks, in this process or in a pool."""
    if workers < 2:
        yield from map(run_cell, tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(run_cell, tasks)


def run_cells(flags: BenchFlags) -> None:
    """Add the open cells to the file, for at most flags.seconds."""
    started = time.monotonic()
    tasks = open_tasks(flags)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    torn = flags.output.is_file() and not flags.output.read_bytes().endswith(b"\n")
    with flags.output.open("a", encoding="utf-8") as file:
        if torn:
            file.write("\n")
        for number, cell in enumerate(results_of(tasks, flags.workers), 1):
            file.write(json.dumps(cell) + "\n")
            file.flush()
            spent = time.monotonic() - started
            print(f"{number} of {len(tasks)} cells, {spent:.0f} s", file=sys.stderr)
            if spent > flags.seconds:
                return


# ---- tables


Columns = dict[str, dict[str, list[float]]]  # policy -> metric -> one value a seed


def group_cells(cells: Iterable[dict[str, Any]], seeds: int) -> dict[tuple[str, float], Columns]:
    """{(workload, load): columns} of so many seeds; the newest line of a policy counts.

    A seed that lacks policies which another has is left out, so that all columns are paired.
    """
    newest: dict[tuple[str, float, int], dict[str, dict[str, float]]] = {}
    for cell in cells:
        key = cell["workload"], cell["load"], cell["seed"]
        if key[2] >= seeds:
            continue
        newest.setdefault(key, {}).update(cell["policies"])
    groups: dict[tuple[str, float], Columns] = {}
    most: dict[tuple[str, float], int] = {}
    for workload, load, seed in newest:
        count = len(newest[workload, load, seed])
        most[workload, load] = max(most.get((workload, load), 0), count)
    for workload, load, seed in sorted(newest):
        if len(newest[workload, load, seed]) < most[workload, load]:
            continue
        group = groups.setdefault((workload, load), {})
        for name, metrics in newest[workload, load, seed].items():
            columns = group.setdefault(name, {})
            for metric in METRICS:
                columns.setdefault(metric, []).append(metrics[metric])
    return groups


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval) of ours - theirs over seeds, Student's t."""
    return interval((np.array(ours) - np.array(theirs)).tolist())


def clearly_above(ours: list[float], theirs: list[float]) -> bool:
    """Whether the paired interval of ours - theirs lies above zero."""
    mean, half = paired(ours, theirs)
    return mean > 0 if np.isnan(half) else mean - half > 0


def goal_lines(groups: dict[tuple[str, float], Columns]) -> list[tuple[str, str, str]]:
    """(goal, by means, unless the paired interval says otherwise) of the shares of cells."""
    counts: dict[str, list[tuple[bool, bool]]] = {}

    def count(goal: str, ours: list[float], most: list[float]) -> None:
        """Whether ours are at most theirs, by the mean and by the paired interval."""
        met = float(np.mean(ours)) <= float(np.mean(most)) + 1e-9
        counts.setdefault(goal, []).append((met, not clearly_above(ours, most)))

    for columns in groups.values():
        if not {"fcfs", "sjf", "gittins"} <= set(columns):
            continue
        missed: dict[str, list[float]] = {}
        for name, column in columns.items():
            missed[name] = (1 - np.array(column["attainment"])).tolist()
        rivals = filter(missed.__contains__, PREDICTING)
        best = min(rivals, key=lambda name: float(np.mean(missed[name])))
        count(
            "gittins: attainment at least each predicting rival's", missed["gittins"], missed[best]
        )
        if "deadline" in missed:
            goal = "gittins: attainment at least deadline's"
            count(goal, missed["gittins"], missed["deadline"])
        if "boost" in columns and "gittins_tail" in columns:
            p99 = columns["gittins_tail"]["latency_p99_s"], columns["boost"]["latency_p99_s"]
            count("gittins_tail: p99 at most boost's", *p99)
            near = (1.02 * np.array(p99[1])).tolist()
            count("gittins_tail: p99 at most boost's + 2 %", p99[0], near)
        if "gittins_mean" in columns:
            most = (1.02 * np.array(columns["sjf"]["latency_mean_s"])).tolist()
            ours = columns["gittins_mean"]["latency_mean_s"]
            count("gittins_mean: mean at most sjf's + 2 %", ours, most)
        for metric, what in WAITS.items():
            most = (5 * np.array(columns["fcfs"][metric])).tolist()
            for name in ("gittins", "gittins_mean", "gittins_tail", "sjf"):
                if name in columns:
                    count(f"{name}: {what} at most 5 x fcfs's", columns[name][metric], most)
    lines = []
    for goal, cells in counts.items():
        by_mean, by_interval = np.sum(cells, axis=0)
        lines.append((goal, f"{by_mean} of {len(cells)}", f"{by_interval} of {len(cells)}"))
    return lines


def gap_to_truth(
    groups: dict[tuple[str, float], Columns], metric: str, ours: str
) -> tuple[float, float, float] | None:
    """Means over cells of sjf, of a policy and of true lengths; None without any.

    True lengths are the best of the policies that have them, cell by cell.
    """
    better = max if metric == "attainment" else min
    cells = []
    for columns in groups.values():
        truths = []
        for name, column in columns.items():
            if "oracle" in name:
                truths.append(float(np.mean(column[metric])))
        if not truths or not {"sjf", ours} <= set(columns):
            continue
        means = [float(np.mean(columns[name][metric])) for name in ("sjf", ours)]
        cells.append([*means, better(truths)])
    if not cells:
        return None
    base, found, truth = np.mean(cells, axis=0).tolist()
    return base, found, truth


def print_tables(groups: dict[tuple[str, float], Columns]) -> None:
    """A table a workload, and the goals."""
    by_workload: dict[str, list[float]] = {}
    for workload, load in groups:
        by_workload.setdefault(workload, []).append(load)
    for workload, loads in by_workload.items():
        seeds = len(groups[workload, loads[0]]["fcfs"]["attainment"])
        print(f"\n*{workload}, {seeds} seeds: in time %, mean s, p99 s, largest wait s*\n")
        lines = []
        for name in COMPARED:
            if name in groups[workload, loads[0]]:
                cells = [cell_text(groups[workload, load][name]) for load in loads]
                lines.append([name, *cells])
        print_table(["", *map("x {:g}".format, loads)], lines)
    print()
    goals = ["goal", "cells, by means", "cells where the interval does not say no"]
    print_table(goals, goal_lines(groups))
    print()
    for metric, ours in (("attainment", "gittins"), ("latency_mean_s", "gittins_mean")):
        if (means := gap_to_truth(groups, metric, ours)) is None:
            continue
        base, found, truth = means
        share = (found - base) / (truth - base) if truth != base else float("nan")
        print(
            f"{metric}, mean of all cells: sjf {base:.3f}, {ours} {found:.3f}, true lengths "
            f"{truth:.3f}: {share:.0%} of the gap"
        )


def cell_text(columns: dict[str, list[float]]) -> str:
    """Attainment with its interval, then the other means."""
    mean, half = interval((100 * np.array(columns["attainment"])).tolist())
    text = f"{mean:.1f}" + ("" if np.isnan(half) else f" ± {half:.1f}")
    for metric in ("latency_mean_s", "latency_p99_s", "largest_wait_s"):
        text += f", {float(np.mean(columns[metric])):.3g}"
    return text


def draw_frontier(groups: dict[tuple[str, float], Columns], path: Path) -> None:
    """Mean and p99 against the share in time, a panel each, relative to fcfs, loads from 1 on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    names = [name for name in COMPARED if "oracle" not in name and name != REREAD]
    for place, name in enumerate(names):
        points = frontier_point(groups, name)
        if points is None:
            continue
        mean, p99, attained = points
        ours = name.startswith("gittins")
        for panel, value in zip(panels, (mean, p99)):
            marker = "*" if ours else "o"
            panel.scatter(value, attained, s=130 if ours else 45, marker=marker, c=f"C{place % 10}")
            panel.annotate(name, (value, attained), textcoords="offset points", xytext=(6, 4))
    for panel, what in zip(panels, ("mean latency", "p99 latency")):
        panel.set(xlabel=f"{what} / fcfs's (geometric mean of cells)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("in time, % (mean of cells)")
    figure.suptitle("Loads from 1 to 2 times fcfs's capacity, all workloads")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def frontier_point(
    groups: dict[tuple[str, float], Columns], name: str
) -> tuple[float, float, float] | None:
    """(mean / fcfs's, p99 / fcfs's, % in time) of a policy over cells with a load of at least 1."""
    means, tails, shares = [], [], []
    for (_, load), columns in groups.items():
        if load < 1 or name not in columns:
            continue
        base, column = columns["fcfs"], columns[name]
        for values, metric in ((means, "latency_mean_s"), (tails, "latency_p99_s")):
            values.append(np.log(np.mean(column[metric]) / np.mean(base[metric])))
        shares.append(100 * float(np.mean(column["attainment"])))
    if not shares:
        return None
    return float(np.exp(np.mean(means))), float(np.exp(np.mean(tails))), float(np.mean(shares))


# ---- the command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON lines, a cell each; cells in it are kept")
    add("--workloads", default="azure_conv,azure_code,uellm,mooncake", help="and lengths; a list")
    add("--loads", default=",".join(map(str, LOADS)), help="shares of fcfs's capacity")
    add("--seeds", type=int, default=10)
    add("--requests", type=int, default=800, help="of each run")
    add("--policies", default="", help=f"of {'; '.join(COMPARED)}; semicolons between [all]")
    add("--traces", default="../shared/data/traces", help="folder of the recorded traces")
    add("--uellm_data", metavar="FOLDER", help="UELLM's recorded lengths")
    add("--lengths", type=Path, help="lengths of scripts/collect_lengths.py, for `lengths`")
    add("--workers", type=int, default=1, help="processes")
    add("--seconds", type=float, default=1e9, help="start no cell after so many")
    add("--tables", action="store_true", help="print the tables of the cells there are, run none")
    add("--picture", type=Path, help="draw the frontier here")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    words = vars(parser.parse_args(argv))
    words["workloads"] = words["workloads"].split(",")
    words["loads"] = list(map(float, words["loads"].split(",")))
    words["policies"] = words["policies"].split(";") if words["policies"] else list(COMPARED)
    flags = BenchFlags(**words)
    if unknown := [name for name in flags.policies if name not in COMPARED]:
        parser.error(f"--policies: {', '.join(unknown)} unknown; there are {'; '.join(COMPARED)}")
    known = (*TRACES, "uellm", "lengths")
    if unknown := [name for name in flags.workloads if name not in known]:
        parser.error(f"--workloads: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    try:
        if not flags.tables:
            warn_of_substitutes(flags)
            run_cells(flags)
        groups = group_cells(read_cells(flags.output), flags.seeds)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print_tables(groups)
    if flags.picture:
        draw_frontier(groups, flags.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
