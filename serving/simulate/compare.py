"""Policies x loads x seeds: runs, comparisons, searches over knobs, and their table."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TextIO

import numpy as np

from serving.policies.static import Static
from serving.request import FOREVER, CostEstimator, Limits, Policy
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import SimulatedEngine
from serving.simulate.statistics import Collector, interval, share_of_gain
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


SPACES = {  # fields of a policy that are worth a search, and values to try
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
    "deadline": {
        "admit_quantile": (0.3, 0.5, 0.7, 0.9),
        "hope_quantile": (0.02, 0.05, 0.1, 0.2, 0.5),
        "work_weight": (-0.5, 0.0, 0.5, 1.0, 3.0, 10.0),
        "preempt_gain": (1.0, 3.0, 10.0, FOREVER),
        "late_share": (0.02, 0.05, 0.1),
    },
}


@contextmanager
def collected_later() -> Iterator[None]:
    """No garbage collection meanwhile: a run makes millions of short-lived objects, no cycles."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def simulate(
    policy: Policy, workload: Workload, cost: CostEstimator, limits: Limits, replicas: int = 1
) -> tuple[dict[str, float], Collector]:
    """(metrics, all completions) of one policy on one workload; deterministic."""
    engines = [SimulatedEngine(cost, limits) for _ in range(replicas)]
    metrics, collector, _ = serve(policy, workload, engines)
    return metrics, collector


def serve(
    policy: Policy,
    workload: Workload,
    engines: list[SimulatedEngine],
    speeds: list[float] | None = None,
) -> tuple[dict[str, float], Collector, list[SimulatedEngine]]:
    """As `simulate`, on several replicas, each with its own queue; and the engines.

    Requests are distributed over the replicas in turn, in proportion to the speeds.
    """
    collector = Collector()
    which = deal(len(workload), speeds or [1.0] * len(engines))
    with collected_later():
        for k, engine in enumerate(engines):
            part = workload.part(which == k) if len(engines) > 1 else workload
            arrivals = Replay(part.requests(policy.predicts))
            collector.watch(run_scheduler(policy, engine, VirtualClock(), arrivals))
    return collector.summary(total_of(engines)), collector, engines


def deal(count: int, speeds: list[float]) -> np.ndarray:
    """(count,) index of the replica of each request.

    Each replica's share is its speed's, and its requests are evenly spaced.
    """
    share = np.asarray(speeds, float) / np.sum(speeds)
    made = [(np.arange(int(np.ceil(count * s)) + 1) + 0.5) / s for s in share]
    owner = np.repeat(np.arange(len(speeds)), [len(m) for m in made])
    return owner[np.argsort(np.concatenate(made), kind="stable")][:count]


def total_of(engines: list[SimulatedEngine]) -> SimpleNamespace:
    """EngineTotals of all engines: seconds are means over replicas, tokens sums."""
    totals = {}
    for name in ("busy_s", "row_s"):
        totals[name] = sum(getattr(e, name) for e in engines) / len(engines)
    for name in ("reserved_token_s", "used_token_s", "prefill_tokens", "step_rows", "steps"):
        totals[name] = sum(getattr(e, name) for e in engines)
    limits = SimpleNamespace(kv_tokens=sum(e.limits.kv_tokens for e in engines))
    return SimpleNamespace(**totals, limits=limits)


@dataclass(frozen=True)
class Setting:
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


def compare(
    policies: dict[str, Policy],
    setting: Setting,
    rates: list[float],
    seeds: int,
    first_seed: int = 0,
) -> list[dict]:
    """One row a rate and policy.

    {rate, policy, seconds, metrics: {name: (mean, half width)}, by_seed: {name: [...]}}; with fifo
    and oracle among the policies also share_of_gain, of the mean latency.
    """
    rows = []
    for rate in rates:
        workloads = [setting.make(rate, first_seed + seed) for seed in range(seeds)]
        by_policy = {}
        for name, policy in policies.items():
            started = time.perf_counter()
            by_seed = [run_setting(policy, workload, setting) for workload in workloads]
            seconds = time.perf_counter() - started
            by_policy[name] = {key: [one[key] for one in by_seed] for key in by_seed[0]}
            rows.append(
                {"rate": rate, "policy": name, "seconds": seconds, "by_seed": by_policy[name]}
            )
        if "fifo" in by_policy and "oracle" in by_policy:
            add_shares(by_policy)
        for row in rows[-len(policies) :]:
            row["metrics"] = {key: interval(values) for key, values in row["by_seed"].items()}
    return rows


def run_setting(policy: Policy, workload: Workload, setting: Setting) -> dict[str, float]:
    """The metrics of one policy on one workload of a setting."""
    return simulate(policy, workload, setting.cost, setting.limits, setting.replicas)[0]


def add_shares(by_policy: dict[str, dict[str, list[float]]]) -> None:
    """Add share_of_gain by seed to each policy's metrics."""
    name = "latency_mean_s"
    for by_seed in by_policy.values():
        triples = zip(by_seed[name], by_policy["fifo"][name], by_policy["oracle"][name])
        by_seed["share_of_gain"] = [share_of_gain(*triple) for triple in triples]


def print_table(rows: list[dict], file: TextIO | None = None) -> None:
    """A line for each rate and policy; units in the second line.

    The mean and, of 3 seeds or more, half of its 95 % interval.
    """
    shown = [name for name in COLUMNS if any(name in row["metrics"] for row in rows)]
    lines = [
        ["rate", "policy", *(COLUMNS[name][0] for name in shown)],
        ["1/s", "", *(COLUMNS[name][1] for name in shown)],
    ]
    for row in rows:
        line = [f"{row['rate']:g}", row["policy"]]
        for name in shown:
            mean, half = row["metrics"].get(name, (np.nan, np.nan))
            line.append(cell(mean, half, COLUMNS[name][2]))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        aligned = [text.rjust(width) for text, width in zip(line, widths)]
        aligned[1] = line[1].ljust(widths[1])  # the policy
        print("  ".join(aligned).rstrip(), file=file)


def cell(mean: float, half: float, factor: float) -> str:
    """A mean to 4 digits, without powers of ten; "-" where there is none."""
    if np.isnan(mean):
        return "-"
    return digits(mean * factor, 4) + ("" if np.isnan(half) else f" ±{digits(half * factor, 2)}")


def digits(value: float, count: int) -> str:
    """A number to `count` significant digits, whole ones as they are."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    after = count - 1 - int(np.floor(np.log10(abs(value))))
    text = f"{value:.{min(max(after, 0), 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def search(
    policy: Policy,
    space: dict[str, tuple],
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
    inner = policy.batching if isinstance(policy, Static) else policy
    best = score(policy)
    yield policy, best
    tried = set()
    for _ in range(rounds):
        before = best
        for knob, values in space.items():
            for value in values:
                other = replace(inner, **{knob: value})
                if other in tried or other == inner:
                    continue
                tried.add(other)
                wrapped = Static(other) if isinstance(policy, Static) else other
                if (got := score(wrapped)) > best:
                    inner, best = other, got
                    yield wrapped, got
        if best == before:
            return


def scorer(setting: Setting, rates: list[float], seeds: int) -> Callable[[Policy], float]:
    """policy -> mean attainment over rates and seeds.

    Less a millionth of the mean latency, which decides between equals.
    """
    workloads = []
    for rate in rates:
        workloads += [setting.make(rate, SEARCH_SEEDS + seed) for seed in range(seeds)]

    def score(policy: Policy) -> float:
        scores = []
        for workload in workloads:
            metrics = run_setting(policy, workload, setting)
            scores.append(metrics["attainment"] - 1e-6 * metrics.get("latency_mean_s", 0.0))
        return float(np.mean(scores))

    return score
