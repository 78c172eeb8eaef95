"""Policies x loads x seeds: runs, comparisons, searches over knobs, and their table."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TextIO, TypedDict, TypeVar

import numpy as np

from serving.policies.static import BatchPolicy, Static
from serving.request import FOREVER, CostEstimator, Limits, Policy
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import Rereads, SimulatedEngine
from serving.simulate.rereading import SyntheticRereads
from serving.simulate.statistics import Collector, SummedTotals, interval, share_of_gain
from serving.simulate.workload import PredictorModel, SloRule, Workload, make_workload

COLUMNS = {  # metric -> (heading, unit, factor)
    "attainment": ("in time", "%", 100),
    "goodput_rps": ("goodput", "1/s", 1),
    "latency_mean_s": ("latency", "s", 1),
    "latency_p99_s": ("p99", "s", 1),
    "ttft_mean_s": ("first token", "s", 1),
    "tpot_mean_s": ("a token", "ms", 1000),
    "norm_mean_s": ("latency/token", "ms", 1000),
    "largest_wait_s": ("longest wait", "s", 1),
    "utilisation": ("busy", "%", 100),
    "padding_waste": ("padding", "%", 100),
    "kv_waste": ("KV unused", "%", 100),
    "preempted": ("preempted", "", 1),
    "share_of_gain": ("share of gain", "%", 100),
}


SEARCH_SEEDS = 1000  # searches use seeds from here on, comparisons 0, 1, ...


SPACES: dict[
    str, dict[str, tuple[Any, ...]]
] = {  # fields of a policy that are worth a search, and values to try
    "odbs": {
        "threshold": (500, 1000, 2000, 4000, 8000, 15_000, 30_000, 60_000),
        "reserve_quantile": (0.5, 0.8, 0.9, 0.97),
    },
    "slo_dbs": {
        "threshold": (100, 300, 1000, 3000, 10_000, 30_000, 100_000),
        "reserve_quantile": (0.5, 0.8, 0.9, 0.97),
    },
    "slo_odbs": {
        "threshold": (500, 1000, 2000, 4000, 8000, 15_000, 30_000, 60_000, 120_000),
        "sort_by": ("slo", "length", "composite"),
        "slo_weight": (0.0, 0.3, 1.0, 3.0, 10.0, 30.0),
        "length_weight": (0.0, 0.1, 0.5, 1.0),
        "reserve_quantile": (0.5, 0.8, 0.9, 0.97),
    },
    "annealing": {
        "window": (32, 64, 128),
        "moves": (100, 300),
        "hot": (0.03, 0.1, 0.3),
        "reserve_quantile": (0.5, 0.9),
    },
    "fcfs": {"block_tokens": (64, 256), "watermark": (0.0, 0.01, 0.05)},
    "sjf": {"reserve_quantile": (0.3, 0.5, 0.7, 0.9)},
    "srpt": {"reserve_quantile": (0.3, 0.5, 0.7, 0.9), "advantage": (1.5, 2.0, 4.0, 8.0)},
    "boost": {"rate": (0.03, 0.1, 0.3, 1.0, 3.0)},
    "tie": {"inflation": (0.3, 1.0, 3.0), "level": (0.8, 0.9, 0.95)},
    "gittins": {
        "horizon_s": (3.0, 10.0, 30.0, 100.0, 1000.0),
        "hope": (0.02, 0.05, 0.1, 0.2),
        "patience": (1.0, 2.0, 4.0),
    },
    "deadline": {
        "admit_quantile": (0.3, 0.5, 0.7, 0.9),
        "hope_quantile": (0.02, 0.05, 0.1, 0.2, 0.5),
        "work_weight": (-0.5, 0.0, 0.5, 1.0, 3.0, 10.0),
        "preempt_gain": (1.0, 3.0, 10.0, FOREVER),
        "late_share": (0.02, 0.05, 0.1),
    },
}


class ComparisonRow(TypedDict):
    """One policy at one rate.

    Attributes:
        rate: requests a second.
        seconds: that the runs took.
        by_seed: the values of each metric, one a seed.
        metrics: (mean, half width of the 95 % interval) of each.
    """

    rate: float
    policy: str
    seconds: float
    by_seed: dict[str, list[float]]
    metrics: dict[str, tuple[float, float]]


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No garbage collection meanwhile: a run makes millions of short-lived objects, no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def simulate(
    policy: Policy,
    workload: Workload,
    cost: CostEstimator,
    limits: Limits,
    replicas: int = 1,
    rereads: Callable[[Workload], Rereads] | None = None,
) -> tuple[dict[str, float], Collector]:
    """(metrics, all completions) of one policy on one workload; deterministic.

    Args:
        rereads: makes what re-reads the answers of a replica's requests, for a policy that
            predicts; None for no re-reading.
    """
    engines = [SimulatedEngine(cost, limits) for _ in range(replicas)]
    metrics, collector, _ = serve(policy, workload, engines, rereads=rereads)
    return metrics, collector


def serve(
    policy: Policy,
    workload: Workload,
    engines: list[SimulatedEngine],
    speeds: list[float] | None = None,
    rereads: Callable[[Workload], Rereads] | None = None,
) -> tuple[dict[str, float], Collector, list[SimulatedEngine]]:
    """As `simulate`, on several replicas, each with its own queue; and the engines.

    Requests are distributed over the replicas in turn, in proportion to the speeds.
    """
    collector = Collector()
    which = assign_replicas(len(workload), speeds or [1.0] * len(engines))
    with garbage_collection_paused():
        for k, engine in enumerate(engines):
            part = workload.part(which == k) if len(engines) > 1 else workload
            if rereads is not None and policy.predicts:
                engine.rereads = rereads(part)
            arrivals = Replay(part.requests(policy.predicts))
            collector.consume(run_scheduler(policy, engine, VirtualClock(), arrivals))
    return collector.summary(engine_totals(engines)), collector, engines


def assign_replicas(count: int, speeds: list[float]) -> np.ndarray:
    """(count,) index of the replica of each request.

    Each replica's share is its speed's, and its requests are evenly spaced.
    """
    shares = np.asarray(speeds, float) / np.sum(speeds)
    numbers = np.ceil(count * shares).astype(int) + 1
    places = [(np.arange(number) + 0.5) / share for number, share in zip(numbers, shares)]
    owner = np.repeat(np.arange(len(speeds)), numbers)
    return owner[np.argsort(np.concatenate(places), kind="stable")][:count]


def engine_totals(engines: list[SimulatedEngine]) -> SummedTotals:
    """EngineTotals of all engines: seconds are means over replicas, tokens sums."""
    totals = SummedTotals()
    for engine in engines:
        totals.busy_s += engine.busy_s
        totals.row_s += engine.row_s
        totals.reserved_token_s += engine.reserved_token_s
        totals.used_token_s += engine.used_token_s
        totals.prefill_tokens += engine.prefill_tokens
        totals.step_rows += engine.step_rows
        totals.kv_tokens += engine.kv_tokens
    totals.busy_s /= len(engines)
    totals.row_s /= len(engines)
    return totals


@dataclass(frozen=True)
class ComparisonSetting:
    """All that a comparison of policies fixes, but for rate and seed."""

    workload: str
    requests: int
    cost: CostEstimator
    limits: Limits
    slo: SloRule = SloRule()
    predictor: PredictorModel | None = None
    predict_s: float = 1e-3
    traces: str = "../shared/data/traces"
    replicas: int = 1
    reread_tau: float | None = None

    @property
    def rereads(self) -> Callable[[Workload], Rereads] | None:
        """As of `simulate`."""
        if self.reread_tau is None:
            return None
        tau, limit = self.reread_tau, 2048 if self.predictor is None else self.predictor.limit
        return lambda workload: SyntheticRereads(workload.output_tokens, limit, tau)

    def make(self, rate: float, seed: int) -> Workload:
        """The workload. Raises ValueError where none of its requests can be served."""
        made = make_workload(
            self.workload,
            self.requests,
            rate,
            self.cost,
            seed=seed,
            slo=self.slo,
            predictor=self.predictor,
            predict_s=self.predict_s,
            traces=self.traces,
            max_tokens=self.limits.max_tokens,
        )
        if (shortest := int(made.prompt_tokens.min())) >= self.limits.max_tokens:
            raise ValueError(
                f"--max_tokens {self.limits.max_tokens}: no request fits, "
                f"the shortest prompt of {self.workload} has {shortest} tokens"
            )
        return made


def compare_policies(
    policies: dict[str, Policy],
    setting: ComparisonSetting,
    rates: list[float],
    seeds: int,
    first_seed: int = 0,
) -> list[ComparisonRow]:
    """One row a rate and policy.

    With fifo and oracle among the policies also share_of_gain, of the mean latency.
    """
    rows: list[ComparisonRow] = []
    for rate in rates:
        workloads = [setting.make(rate, first_seed + seed) for seed in range(seeds)]
        by_policy, seconds = {}, {}
        for name, policy in policies.items():
            started = time.perf_counter()
            by_policy[name] = metrics_by_seed(policy, workloads, setting)
            seconds[name] = time.perf_counter() - started
        if "fifo" in by_policy and "oracle" in by_policy:
            add_share_of_gain(by_policy)
        for name, by_seed in by_policy.items():
            rows.append(
                {
                    "rate": rate,
                    "policy": name,
                    "seconds": seconds[name],
                    "by_seed": by_seed,
                    "metrics": {key: interval(values) for key, values in by_seed.items()},
                }
            )
    return rows


def metrics_by_seed(
    policy: Policy, workloads: list[Workload], setting: ComparisonSetting
) -> dict[str, list[float]]:
    """{metric: its value on each workload}."""
    by_seed: dict[str, list[float]] = {}
    for workload in workloads:
        for name, value in run_setting(policy, workload, setting)[0].items():
            by_seed.setdefault(name, []).append(value)
    return by_seed


def run_setting(
    policy: Policy, workload: Workload, setting: ComparisonSetting
) -> tuple[dict[str, float], Collector]:
    """As `simulate`, with all that a setting fixes."""
    fixed = (setting.cost, setting.limits, setting.replicas, setting.rereads)
    return simulate(policy, workload, *fixed)


def add_share_of_gain(by_policy: dict[str, dict[str, list[float]]]) -> None:
    """Add share_of_gain by seed to each policy's metrics."""
    name = "latency_mean_s"
    for by_seed in by_policy.values():
        triples = zip(by_seed[name], by_policy["fifo"][name], by_policy["oracle"][name])
        by_seed["share_of_gain"] = [share_of_gain(*triple) for triple in triples]


def print_comparison(rows: list[ComparisonRow], file: TextIO | None = None) -> None:
    """A line for each rate and policy; units in the second line.

    The mean and, of 3 seeds or more, half of its 95 % interval.
    """
    present = set().union(*(row["metrics"] for row in rows))
    shown = [name for name in COLUMNS if name in present]
    headings, units = ["rate", "policy"], ["1/s", ""]
    for name in shown:
        headings.append(COLUMNS[name][0])
        units.append(COLUMNS[name][1])
    lines = [headings, units]
    for row in rows:
        line = [f"{row['rate']:g}", row["policy"]]
        for name in shown:
            mean, half = row["metrics"].get(name, (np.nan, np.nan))
            line.append(format_interval(mean, half, COLUMNS[name][2]))
        lines.append(line)
    print_aligned(lines, file)


def print_aligned(lines: list[list[str]], file: TextIO | None) -> None:
    """Columns side by side, aligned to the right but for the second one."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        aligned = [text.rjust(width) for text, width in zip(line, widths)]
        aligned[1] = line[1].ljust(widths[1])
        print("  ".join(aligned).rstrip(), file=file)


def format_interval(mean: float, half: float, factor: float) -> str:
    """A mean to 4 digits, without powers of ten; "-" where there is none."""
    if np.isnan(mean):
        return "-"
    return significant_digits(mean * factor, 4) + (
        "" if np.isnan(half) else f" ±{significant_digits(half * factor, 2)}"
    )


def significant_digits(value: float, count: int) -> str:
    """A number to `count` significant digits, whole ones as they are."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    after = count - 1 - int(np.floor(np.log10(abs(value))))
    text = f"{value:.{min(max(after, 0), 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


Choice = TypeVar("Choice", Policy, BatchPolicy)


def replace_knob(policy: Policy, knob: str, value: object) -> Policy:
    """The policy with another value of one field; a static one's is its batching's."""
    if isinstance(policy, Static):
        return Static(replace_field(policy.batching, knob, value))
    return replace_field(policy, knob, value)


def replace_field(choice: Choice, name: str, value: object) -> Choice:
    assert is_dataclass(choice) and not isinstance(choice, type)
    return replace(choice, **{name: value})


def search_knobs(
    policy: Policy,
    space: dict[str, tuple[Any, ...]],
    score: Callable[[Policy], float],
    rounds: int = 2,
) -> Iterator[tuple[Policy, float]]:
    """Coordinate descent: one field after the other, each at its best value in `space`.

    Ends after so many rounds, or when a round gains nothing.

    Args:
        score: policy -> number, larger is better.
    Yields:
        (policy, score) of the start and of each better one; the last is the result.
    """
    best = score(policy)
    yield policy, best
    tried: set[Policy] = set()
    for _ in range(rounds):
        before = best
        for knob, values in space.items():
            for value in values:
                other = replace_knob(policy, knob, value)
                if other in tried or other == policy:
                    continue
                tried.add(other)
                if (found := score(other)) > best:
                    policy, best = other, found
                    yield policy, best
        if best == before:
            return


def attainment_scorer(
    setting: ComparisonSetting, rates: list[float], seeds: int
) -> Callable[[Policy], float]:
    """policy -> mean attainment over rates and seeds.

    Less a millionth of the mean latency, which decides between equals.
    """
    workloads = []
    for rate in rates:
        workloads += [setting.make(rate, SEARCH_SEEDS + seed) for seed in range(seeds)]

    def score(policy: Policy) -> float:
        scores = []
        for workload in workloads:
            metrics, _ = run_setting(policy, workload, setting)
            scores.append(metrics["attainment"] - 1e-6 * metrics.get("latency_mean_s", 0.0))
        return float(np.mean(scores))

    return score
