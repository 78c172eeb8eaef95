"""The figures of a run: of all requests, of each request, and which ran together."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from serving.cost_model.devices import MIB
from serving.policies.static import Static
from serving.request import Policy
from serving.run_requests.runs import Admission, PreparedRequest, RunRecord
from serving.simulate.experiment_common import TableRow

LISTED_GROUPS = 12  # printed of one policy; --json has all
HEADINGS = {  # heading of the printed table -> (figure, factor)
    "groups": ("groups", 1),
    "total s": ("total_s", 1),
    "makespan s": ("makespan_s", 1),
    "mean latency s": ("latency_mean_s", 1),
    "p99 s": ("latency_p99_s", 1),
    "first token s": ("ttft_mean_s", 1),
    "default rate %": ("default_rate", 100),
    "attainment %": ("attainment", 100),
    "useful tokens/s": ("useful_tokens_s", 1),
    "padded tokens/s": ("padded_tokens_s", 1),
}


@dataclass(frozen=True)
class PolicyRun:
    """One policy's run of the list.

    Attributes:
        figures: by name, those of HEADINGS and more; None where a figure has no meaning.
        groups: {admitted_s, rows (their numbers from 1), longest, padded_tokens} of each static
            batch; empty for continuous policies.
        requests: a row for each request, in the list's order.
    """

    name: str
    figures: dict[str, float | None]
    groups: list[dict[str, Any]]
    requests: list[dict[str, Any]]

    def memory_line(self) -> str:
        """The KV memory of a request, predicted where the policy predicts, and as it was."""
        predicted, actual = [], []
        for row in self.requests:
            if "kv_bytes" in row:
                actual.append(row["kv_bytes"])
                if row["predicted_kv_bytes"] is not None:
                    predicted.append(row["predicted_kv_bytes"])
        if not actual:
            return f"{self.name}: no answers"
        parts = [f"mean {fmean(actual) / MIB:.3g} MiB", f"largest {max(actual) / MIB:.3g}"]
        if predicted:
            parts.insert(1, f"predicted {fmean(predicted) / MIB:.3g}")
        return f"{self.name}: KV memory of a request: {', '.join(parts)}"

    def table_row(self) -> TableRow:
        row: TableRow = {"policy": self.name}
        for heading, (key, factor) in HEADINGS.items():
            value = self.figures.get(key)
            if value is None:
                row[heading] = "-"
            else:
                row[heading] = value if factor == 1 else value * factor
        return row

    def group_lines(self) -> list[str]:
        """Which rows ran together, a line for each of the first LISTED_GROUPS batches."""
        if not self.groups:
            return [f"{self.name}: continuous, no groups"]
        lines = [f"{self.name}: {len(self.groups)} groups"]
        for number, group in enumerate(self.groups[:LISTED_GROUPS], 1):
            rows = " ".join(map(str, group["rows"]))
            shape = f"{len(group['rows'])} x {group['longest']} tokens"
            lines.append(f"  {number}. at {group['admitted_s']:.2f} s, {shape}: rows {rows}")
        if len(self.groups) > LISTED_GROUPS:
            lines.append(f"  ... and {len(self.groups) - LISTED_GROUPS} more, in --json")
        return lines


def policy_run(
    name: str,
    policy: Policy,
    record: RunRecord,
    requests: list[PreparedRequest],
    kv_token_bytes: int = 0,
) -> PolicyRun:
    """The figures of a recorded run.

    Args:
        kv_token_bytes: keys and values of one token, of the model that ran.
    """
    batches = record.batches() if isinstance(policy, Static) else None
    groups = []
    group_of: dict[int, int] = {}  # the last one, of a row that was preempted
    if batches is not None:
        for place, admission in enumerate(batches, 1):
            group_of |= dict.fromkeys(admission.numbers, place)
            group = {
                "admitted_s": admission.admitted_s - record.zero_s,
                "rows": [number + 1 for number in admission.numbers],
                "longest": admission.longest,
                "padded_tokens": admission.padded_tokens,
            }
            groups.append(group)
    rows = []
    for request in sorted(requests, key=lambda one: one.number):
        row = request_row(request, record)
        row |= kv_memory(row, kv_token_bytes)
        rows.append(row | {"group": group_of.get(request.number)})
    return PolicyRun(name, run_figures(record, batches), groups, rows)


def kv_memory(row: dict[str, Any], token_bytes: int) -> dict[str, float | None]:
    """Bytes of a request's keys and values at its end: by the predicted length, and as they were.

    UELLM's profiler predicts a prompt's change of memory; this is what it consists of.
    """
    predicted, made = row["predicted_tokens"], row.get("output_tokens")
    memory: dict[str, float | None] = {"predicted_kv_bytes": None}
    if predicted is not None:
        memory["predicted_kv_bytes"] = token_bytes * (row["prompt_tokens"] + predicted)
    if made is not None:
        memory["kv_bytes"] = token_bytes * (row["prompt_tokens"] + made)
    return memory


def run_figures(record: RunRecord, batches: list[Admission] | None) -> dict[str, float | None]:
    """The figures of all requests.

    default_rate: the share of requests not answered whole within their objectives (UELLM's word).
    useful_tokens_s: tokens of the answers, end tokens included, a second of the makespan.
    padded_tokens_s: UELLM's throughput, the sum over batches of rows x longest answer; without
        batches nothing is padded.
    makespan_s: from the first arrival to the last answer.
    """
    measured = record.collector.summary()
    figures: dict[str, float | None] = dict(measured)
    figures["total_s"] = record.total_s
    figures["predict_s"] = record.predict_s
    figures["default_rate"] = 1 - measured["attainment"]
    makespan = measured.get("span_s")
    useful = measured.get("throughput_tps")
    figures["makespan_s"], figures["useful_tokens_s"] = makespan, useful
    figures["groups"], figures["padded_tokens_s"] = None, useful
    if batches is not None:
        figures["groups"] = len(batches)
        padded = 0
        for admission in batches:
            padded += admission.padded_tokens
        figures["padded_tokens_s"] = padded / makespan if makespan else 0.0
    cut = 0
    for done in record.completions.values():
        cut += done.cut
    figures["cut"] = cut
    return figures


def request_row(request: PreparedRequest, record: RunRecord) -> dict[str, Any]:
    """What became of one request; times in seconds from its arrival, rows numbered from 1."""
    row: dict[str, Any] = {
        "row": request.number + 1,
        "arrival_s": request.arrival_s,
        "slo_s": request.slo_s,
        "prompt_tokens": len(request.prompt_ids),
        "predicted_tokens": record.predicted.get(request.number),
    }
    done = record.completions.get(request.number)
    if done is None:
        reason = record.refused.get(request.number, "not answered")
        return row | {"in_time": False, "refused": reason}
    return row | {
        "queue_s": done.admitted_s - done.request.arrival_s,
        "ttft_s": done.first_token_s - done.request.arrival_s,
        "latency_s": done.latency_s,
        "output_tokens": done.output_tokens,
        "preemptions": done.preemptions,
        "cut": done.cut,
        "in_time": done.in_time,
    }
