"""Metrics of a run, from its events. Columns of numbers: a million completions need 80 MB."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serving.request import Completion, Event

COLUMNS = (
    "arrival_s",
    "slo_s",
    "admitted_s",
    "first_token_s",
    "finish_s",
    "prompt",
    "output",
    "reserved",
    "cut",
)


class EngineTotals(Protocol):
    """What the metrics read of a simulated engine (engine.SimulatedEngine), or of several."""

    busy_s: float
    row_s: float
    reserved_token_s: float
    used_token_s: float
    prefill_tokens: int
    step_rows: int

    @property
    def kv_tokens(self) -> int:
        """The KV cache, over all sequences."""


@dataclass
class SummedTotals:
    """EngineTotals of several engines."""

    busy_s: float = 0.0
    row_s: float = 0.0
    reserved_token_s: float = 0.0
    used_token_s: float = 0.0
    prefill_tokens: int = 0
    step_rows: int = 0
    kv_tokens: int = 0


def empty_columns() -> dict[str, "array[float]"]:
    return {name: array("d") for name in COLUMNS}


@dataclass(eq=False)
class Collector:
    """A monitor that keeps completions as columns, and counts the events of each kind."""

    columns: dict[str, "array[float]"] = field(default_factory=empty_columns)
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        self.consume((event,))

    def add(self, done: Completion) -> None:
        request, columns = done.request, self.columns
        columns["arrival_s"].append(request.arrival_s)
        columns["slo_s"].append(request.slo_s)
        columns["admitted_s"].append(done.admitted_s)
        columns["first_token_s"].append(done.first_token_s)
        columns["finish_s"].append(done.finish_s)
        columns["prompt"].append(request.prompt_tokens)
        columns["output"].append(done.output_tokens)
        columns["reserved"].append(done.reserved_tokens)
        columns["cut"].append(done.cut)

    def consume(self, events: Iterable[Event]) -> "Collector":
        counts = self.counts
        for _, kind, _, what in events:
            counts[kind] = counts.get(kind, 0) + 1
            if kind == "finished":
                assert isinstance(what, Completion)
                self.add(what)
        return self

    def summary(self, engine: EngineTotals | None = None) -> dict[str, float]:
        """`completion_metrics` of all completions; refused requests count as late."""
        columns = {name: np.asarray(column) for name, column in self.columns.items()}
        return completion_metrics(columns, self.counts, engine)


def completion_metrics(
    c: dict[str, np.ndarray], counts: dict[str, int], engine: EngineTotals | None = None
) -> dict[str, float]:
    """Metrics of completions in columns (COLUMNS).

    attainment: share of all requests answered whole and within their slo_s.
    goodput_rps: such answers a second, over the span from the first arrival to the last finish.
    ttft: first token - arrival; ttft_max_s is the longest.
    tpot: seconds a token after the first.
    norm: latency / answer tokens.
    largest_wait_s: arrival to first admission.

    With a simulated engine also:
    utilisation: busy share of the span.
    mean_rows: while busy.
    padding_waste: share of the computed prompt tokens and row steps that no answer used, recomputed
        ones included.
    kv_waste: unused share of reserved KV tokens x seconds.
    kv_used: share of all KV memory x span in use.
    """
    n, refused = len(c["finish_s"]), counts.get("refused", 0)
    if not n:
        return {"requests": refused, "refused": refused, "attainment": 0.0}
    latency = c["finish_s"] - c["arrival_s"]
    in_time = (latency <= c["slo_s"]) & (c["cut"] == 0)
    span = max(float(c["finish_s"].max() - c["arrival_s"].min()), 1e-9)
    norm = latency / c["output"]
    ttft = c["first_token_s"] - c["arrival_s"]
    tpot = np.zeros(1)
    many = c["output"] > 1
    if many.any():
        tpot = (c["finish_s"] - c["first_token_s"])[many] / (c["output"][many] - 1)
    metrics = {
        "requests": n + refused,
        "refused": refused,
        "attainment": float(in_time.sum() / (n + refused)),
        "goodput_rps": float(in_time.sum() / span),
        "throughput_tps": float(c["output"].sum() / span),
        "latency_mean_s": float(latency.mean()),
        "norm_mean_s": float(norm.mean()),
        "ttft_mean_s": float(ttft.mean()),
        "ttft_max_s": float(ttft.max()),
        "tpot_mean_s": float(tpot.mean()),
        "largest_wait_s": float((c["admitted_s"] - c["arrival_s"]).max()),
        "span_s": span,
        "preempted": counts.get("preempted", 0),
        "overran": counts.get("overran", 0),
    }
    for name, values in {"latency": latency, "ttft": ttft, "tpot": tpot, "norm": norm}.items():
        for q in (50, 90, 99):
            metrics[f"{name}_p{q}_s"] = float(np.percentile(values, q))
    if engine is not None:
        useful_tokens = float(c["prompt"].sum() + (c["output"] - 1).sum())
        metrics |= engine_metrics(engine, span, useful_tokens)
    return metrics


def engine_metrics(engine: EngineTotals, span_s: float, useful_tokens: float) -> dict[str, float]:
    """The part of `completion_metrics` that needs a simulated engine."""
    return {
        "utilisation": engine.busy_s / span_s,
        "mean_rows": engine.row_s / max(engine.busy_s, 1e-9),
        "padding_waste": 1 - useful_tokens / max(engine.prefill_tokens + engine.step_rows, 1),
        "kv_waste": 1 - engine.used_token_s / max(engine.reserved_token_s, 1e-9),
        "kv_used": engine.used_token_s / (engine.kv_tokens * span_s),
    }


def share_of_gain(value: float, fifo: float, oracle: float) -> float:
    """(value - FIFO's) / (oracle's - FIFO's): the share of the oracle's gain that a policy reaches.

    nan where the oracle gains nothing.
    """
    return (value - fifo) / (oracle - fifo) if abs(oracle - fifo) > 1e-12 else float("nan")


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval, Student's t) over seeds.

    The second is nan for fewer than 3 seeds.
    """
    x = np.asarray(values, float)
    if len(x) < 3:
        return float(x.mean()), float("nan")
    # The inverse of Student's t alone: scipy.stats takes a second of each command to import.
    from scipy.special import stdtrit

    factor = stdtrit(len(x) - 1, 0.975)
    return float(x.mean()), float(factor * x.std(ddof=1) / np.sqrt(len(x)))
