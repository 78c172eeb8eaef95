"""What a run was like, from its events. Columns of numbers, so a million completions need 80 MB."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class Collector:
    """A monitor that keeps completions as columns, and counts the rest."""

    columns: dict[str, array] = field(
        default_factory=lambda: {name: array("d") for name in COLUMNS}
    )
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: Event):
        kind = event.kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == "finished":
            self.add(event.what)

    def add(self, done: Completion):
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

    def watch(self, events: Iterable[Event]) -> "Collector":
        for event in events:
            self(event)
        return self

    def summary(self, engine=None) -> dict[str, float]:
        """All of `summary`, with refused requests counted as late."""
        return summary(
            {name: np.asarray(column) for name, column in self.columns.items()}, self.counts, engine
        )


def summary(c: dict[str, np.ndarray], counts: dict[str, int], engine=None) -> dict[str, float]:
    """Metrics of completions in columns (COLUMNS).

    attainment: share of all requests answered whole and within their slo_s. goodput_rps: such answers a second, over the span from
    the first arrival to the last finish. ttft: first token - arrival; tpot: seconds a token after the first; norm: latency / answer
    tokens. largest_wait_s: arrival to first admission. With a simulated engine also: utilisation (busy share of the span),
    mean_rows while busy, padding_waste (computed prompt tokens and row steps that served no one, recomputed ones included),
    kv_waste (reserved and unused share of reserved KV tokens x seconds), kv_used (share of all KV memory x span in use).
    """
    n, refused = len(c["finish_s"]), counts.get("refused", 0)
    if not n:
        return {"requests": refused, "refused": refused, "attainment": 0.0}
    latency = c["finish_s"] - c["arrival_s"]
    in_time = (latency <= c["slo_s"]) & (c["cut"] == 0)
    span = max(float(c["finish_s"].max() - c["arrival_s"].min()), 1e-9)
    ttft = c["first_token_s"] - c["arrival_s"]
    many = c["output"] > 1
    tpot = (
        (c["finish_s"] - c["first_token_s"])[many] / (c["output"][many] - 1)
        if many.any()
        else np.zeros(1)
    )
    found = {
        "requests": n + refused,
        "refused": refused,
        "attainment": float(in_time.sum() / (n + refused)),
        "goodput_rps": float(in_time.sum() / span),
        "throughput_tps": float(c["output"].sum() / span),
        "latency_mean_s": float(latency.mean()),
        "norm_mean_s": float((latency / c["output"]).mean()),
        "ttft_mean_s": float(ttft.mean()),
        "tpot_mean_s": float(tpot.mean()),
        "largest_wait_s": float((c["admitted_s"] - c["arrival_s"]).max()),
        "span_s": span,
        "preempted": counts.get("preempted", 0),
        "overran": counts.get("overran", 0),
    }
    for name, values in (
        ("latency", latency),
        ("ttft", ttft),
        ("tpot", tpot),
        ("norm", latency / c["output"]),
    ):
        for q in (50, 90, 99):
            found[f"{name}_p{q}_s"] = float(np.percentile(values, q))
    if engine is not None:
        useful = float(c["prompt"].sum() + (c["output"] - 1).sum())
        found |= {
            "utilisation": engine.busy_s / span,
            "mean_rows": engine.row_s / max(engine.busy_s, 1e-9),
            "padding_waste": 1 - useful / max(engine.prefill_tokens + engine.step_rows, 1),
            "kv_waste": 1 - engine.used_token_s / max(engine.reserved_token_s, 1e-9),
            "kv_used": engine.used_token_s / (engine.limits.kv_tokens * span),
        }
    return found


def share_of_gain(value: float, fifo: float, oracle: float) -> float:
    """(value - FIFO's) / (oracle's - FIFO's): how much of what knowing lengths can bring a policy brings; nan where that is nothing."""
    return (value - fifo) / (oracle - fifo) if abs(oracle - fifo) > 1e-12 else float("nan")


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval, Student's t) over seeds; nan for that where they are fewer than 3."""
    from scipy.stats import t

    x = np.asarray(values, float)
    if len(x) < 3:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
