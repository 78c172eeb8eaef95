"""UELLM's setting with the same rules, placement and answers for all policies, and the bounds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serving.cost_model.model import CostModel
from serving.policies.continuous import POLICIES
from serving.policies.static import Static
from serving.request import Limits, Policy
from serving.simulate.compare import serve
from serving.simulate.engine import SimulatedEngine
from serving.simulate.experiment_common import PREDICT_S, TableRow, mean_of
from serving.simulate.statistics import interval
from serving.simulate.uellm_lengths import RecordedAnswers
from serving.simulate.uellm_published import ChunkedBatching
from serving.simulate.workload import PredictorModel, SloRule, Workload, poisson_arrivals

# The same stopping rule (an answer's own end), predictions, arrivals, placement and limits for all.
FAIR_POLICIES: dict[str, Policy] = {
    "baseline, Morphling (10 by arrival)": Static(ChunkedBatching()),
    "FIFO (64 by arrival)": POLICIES["fifo"],
    "S3": POLICIES["s3"],
    "UELLM released (sort, chunks of 10)": POLICIES["uellm_released"],
    "UELLM's formula (slo_odbs)": POLICIES["slo_odbs"],
    "annealing": POLICIES["annealing"],
    "static oracle": POLICIES["oracle"],
    "fcfs (continuous)": POLICIES["fcfs"],
    "sjf (continuous)": POLICIES["sjf"],
    "srpt (continuous)": POLICIES["srpt"],
    "deadline (ours)": POLICIES["deadline"],
    "deadline, true lengths": POLICIES["deadline_oracle"],
    "gittins (ours)": POLICIES["gittins"],
    "gittins, true lengths": POLICIES["gittins_oracle"],
}
OURS = "deadline (ours)"
BASELINES = ("baseline, Morphling (10 by arrival)", "S3")  # of UELLM's paper, in static batches
CONTINUOUS = "fcfs (continuous)"  # what a server such as vLLM does without predictions

FAIR_COLUMNS = {  # heading -> (metric, factor)
    "attainment %": ("attainment", 100),
    "mean latency s": ("latency_mean_s", 1),
    "p99 s": ("latency_p99_s", 1),
    "largest wait s": ("largest_wait_s", 1),
    "useful tokens/s": ("throughput_tps", 1),
    "useful share of rows %": ("slots", 100),
    "busy %": ("utilisation", 100),
}


@dataclass(frozen=True, eq=False)
class FairSetting:
    """The fair setting.

    Instructions are drawn with one of their recorded answers; objectives are SloRule's.
    """

    recorded: RecordedAnswers
    cost: CostModel
    limits: Limits
    replicas: int
    predictor: PredictorModel
    count: int

    def workload(self, rate: float | None, seed: int) -> Workload:
        """At this rate in requests/s; None: all at time 0."""
        rng = np.random.default_rng(seed)
        which = rng.integers(0, len(self.recorded.prompts), self.count)
        prompts = self.recorded.prompts[which]
        answers = self.recorded.answers[which, rng.integers(0, 3, self.count)]
        slo_s = SloRule()(prompts, answers, self.cost, rng)
        index, predictions = self.predictor.predict(answers, rng)
        arrivals = np.zeros(self.count) if rate is None else poisson_arrivals(self.count, rate, rng)
        return Workload(arrivals, prompts, answers, slo_s, index, predictions, PREDICT_S)

    def run(self, policy: Policy, workload: Workload) -> dict[str, float]:
        """The metrics, with `slots`: the share of all rows of all steps that made a token."""
        engines = [SimulatedEngine(self.cost, self.limits) for _ in range(self.replicas)]
        metrics, _, _ = serve(policy, workload, engines)
        slots = 0
        for engine in engines:
            slots += engine.steps * self.limits.max_batch
        return metrics | {"slots": float((workload.output_tokens - 1).sum() / max(slots, 1))}

    def attainment_at(self, policy: Policy, rate: float, seeds: int) -> float:
        """The mean attainment over seeds at a rate in requests/s."""
        shares = []
        for seed in range(seeds):
            shares.append(self.run(policy, self.workload(rate, seed))["attainment"])
        return float(np.mean(shares))

    def rate_at(self, policy: Policy, seeds: int, wanted: float = 0.5, rounds: int = 10) -> float:
        """Requests a second at which the policy attains `wanted` on these seeds.

        Found by bisection of the logarithm.
        """
        low, high = 0.02, 50.0
        for _ in range(rounds):
            rate = float(np.sqrt(low * high))
            attained = self.attainment_at(policy, rate, seeds)
            low, high = (rate, high) if attained > wanted else (low, rate)
        return float(np.sqrt(low * high))

    def bounds(self, seeds: int) -> dict[str, float]:
        """The means of `bounds_of` over seeds, all requests at time 0."""
        bounds = [self.bounds_of(self.workload(None, seed)) for seed in range(seeds)]
        means = {}
        for key in bounds[0]:
            means[key] = float(np.mean([one[key] for one in bounds]))
        return means

    def bounds_of(self, workload: Workload) -> dict[str, float]:
        """What no policy can beat.

        For latency and attainment: each request alone on an idle engine. For tokens a second: an
        engine whose rows are always all useful, without prefill.
        """
        cost, prompts, outputs = self.cost, workload.prompt_tokens, workload.output_tokens
        seconds = []
        for prompt, output in zip(prompts.tolist(), outputs.tolist()):
            seconds.append(cost.prefill_s(prompt) + cost.decode_s(1, prompt + 1, output - 1))
        alone = np.array(seconds)
        steps = (outputs - 1).sum()
        # Of a row, the mean over steps.
        context = float(((prompts + outputs / 2) * (outputs - 1)).sum() / steps)
        batches = range(1, self.limits.max_batch + 1)
        pace = min(cost.decode_step_s(batch, batch * context) / batch for batch in batches)
        return {
            "latency_s": float(alone.mean()),
            "attainment": float((alone <= workload.slo_s).mean()),
            "tokens_s": float(self.replicas * outputs.sum() / (steps * pace)),
        }


def fair_rows(
    setting: FairSetting, policies: Mapping[str, Policy], rate: float | None, seeds: int
) -> list[TableRow]:
    """One row a policy, intervals over seeds."""
    rows = []
    workloads = [setting.workload(rate, seed) for seed in range(seeds)]
    for name, policy in policies.items():
        metrics = [setting.run(policy, workload) for workload in workloads]
        row: TableRow = {"system": name}
        for heading, (metric, factor) in FAIR_COLUMNS.items():
            row[heading] = interval([one[metric] * factor for one in metrics])
        rows.append(row)
    return rows


def by_system(rows: list[TableRow]) -> dict[str, TableRow]:
    return {str(row["system"]): row for row in rows}


def target_rows(
    load: list[TableRow], full: list[TableRow], bounds: dict[str, float], ours: str = OURS
) -> list[TableRow]:
    """The wanted gains over each rival: what is reached, and the bound over the same rival.

    Args:
        load, full: rows at the load of the comparison, and with all requests at once.
    """
    at_load, at_full = by_system(load), by_system(full)
    rows: list[TableRow] = []
    for baseline in (*BASELINES, CONTINUOUS):
        rows.append(latency_target(baseline, at_load[baseline], at_load[ours], bounds))
        rows += throughput_targets(baseline, at_full[baseline], at_full[ours], bounds)
    rows.append(
        {
            "against": "all",
            "target": "attainment >= 99 %",
            "reached": f"{mean_of(at_load[ours], 'attainment %'):.2f} %",
            "bound": f"{100 * bounds['attainment']:.2f} % (in time if alone)",
        }
    )
    return rows


def latency_target(
    baseline: str, theirs: TableRow, ours: TableRow, bounds: dict[str, float]
) -> TableRow:
    latency = mean_of(theirs, "mean latency s")
    return {
        "against": baseline,
        "target": "mean latency -90 %",
        "reached": f"{100 * (mean_of(ours, 'mean latency s') / latency - 1):.1f} %",
        "bound": f"{100 * (bounds['latency_s'] / latency - 1):.1f} % "
        f"(every request alone: {bounds['latency_s']:.2f} s)",
    }


def throughput_targets(
    baseline: str, theirs: TableRow, ours: TableRow, bounds: dict[str, float]
) -> list[TableRow]:
    tokens, slots = mean_of(theirs, "useful tokens/s"), mean_of(theirs, "useful share of rows %")
    return [
        {
            "against": baseline,
            "target": "useful tokens/s x 5, all at once",
            "reached": f"x {mean_of(ours, 'useful tokens/s') / tokens:.2f}",
            "bound": f"x {bounds['tokens_s'] / tokens:.2f} "
            f"(rows always full: {bounds['tokens_s']:.0f} tokens/s)",
        },
        {
            "against": baseline,
            "target": "utilisation x 4, all at once",
            "reached": f"x {mean_of(ours, 'useful share of rows %') / slots:.2f}",
            "bound": f"x {100 / slots:.2f} (every row of every step useful); "
            f"of its busy time x {100 / mean_of(theirs, 'busy %'):.2f}",
        },
    ]
