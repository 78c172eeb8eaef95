"""The experiments that ship: `python -m serving.simulate --experiment uellm | trace`.

uellm: the setting of UELLM (arXiv 2409.14961): ChatGLM2-6B on 4 RTX 3090. uellm_published repeats
its runs, each system by its own rules; uellm_fair gives all the same rules, placement and answers.
trace: the Azure traces on clusters of A100 and of mixed devices, the load swept.
Both print tables and return them as {title: [row, ...]}.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from serving.cost_model.devices import Cluster
from serving.cost_model.model import CostModel, ModelSizes, Profile, read_profile
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Need
from serving.policies.continuous import POLICIES
from serving.request import Limits, Policy
from serving.simulate.compare import serve
from serving.simulate.engine import SimulatedEngine
from serving.simulate.experiment_common import (
    LONGEST,
    PREDICT_S,
    ExperimentFlags,
    PrintedTables,
    TableRow,
    print_markdown,
)
from serving.simulate.statistics import interval
from serving.simulate.uellm_fair import (
    BASELINES,
    CONTINUOUS,
    FAIR_POLICIES,
    OURS,
    FairSetting,
    fair_rows,
    target_rows,
)
from serving.simulate.uellm_lengths import RecordedAnswers, recorded_answers
from serving.simulate.uellm_published import published_rows
from serving.simulate.workload import SloRule, Workload, make_workload

Tables = dict[str, list[TableRow]]

# ---- uellm

SUBSTITUTE_TITLE = (
    "A SUBSTITUTE for UELLM's recorded lengths: instructions of data/probe.jsonl, answer lengths "
    "drawn as the recorded ones are distributed, no logged runs beside; --uellm_data dataset/ of a "
    "clone of github.com/HYIUYOU/UELLM reads its own"
)


def uellm_experiment(flags: ExperimentFlags) -> Tables:
    """The published runs repeated, then the fair setting and its bounds."""
    recorded = recorded_answers(flags.uellm_data)
    printed = PrintedTables()
    if recorded.is_substitute:
        printed.add(SUBSTITUTE_TITLE, [length_row(recorded)])
    for count in (100, 300):
        printed.add(
            f"As published, {count} requests, all at once",
            published_rows(recorded, count, flags.seeds),
        )
    settings = {name: make_fair_setting(flags, recorded, name) for name in ("helr", "even")}
    add_fair_tables(printed, flags, settings)
    return printed.tables


def length_row(recorded: RecordedAnswers) -> TableRow:
    """What the answers' lengths are like, in tokens."""
    answers = recorded.answers
    return {
        "instructions": len(recorded.prompts),
        "runs": answers.shape[1],
        "mean prompt": float(recorded.prompts.mean()),
        "mean answer": float(answers.mean()),
        "median": float(np.median(answers)),
        "longest": int(answers.max()),
    }


def make_fair_setting(
    flags: ExperimentFlags, recorded: RecordedAnswers, deployer: str
) -> FairSetting:
    """ChatGLM2-6B on 4 RTX 3090, placed by this deployer."""
    model, profile = ModelSizes.from_config("chatglm2-6b"), read_profile("rtx3090")
    placement = DEPLOYERS[deployer].place(model, profile.cluster(4), Need(20_000, 10), profile)
    cost = CostModel.of(model, placement, profile)
    limits = Limits(64, cost.kv_capacity_tokens, LONGEST + 64)
    predictor = flags.predictor_model()
    return FairSetting(recorded, cost, limits, placement.replicas, predictor, flags.requests)


def add_fair_tables(
    printed: PrintedTables, flags: ExperimentFlags, settings: dict[str, FairSetting]
) -> None:
    """All policies on helr's placement at two loads and in saturation, then the targets."""
    fair, seeds = settings["helr"], flags.seeds
    rate = fair.rate_at(FAIR_POLICIES["FIFO (64 by arrival)"], seeds)
    what = f"{flags.requests} requests, {seeds} seeds, helr: {fair.replicas} replicas of 1 GPU"
    load = fair_rows(fair, FAIR_POLICIES, rate, seeds)
    printed.add(f"Fair, {rate:.2f} requests/s, where FIFO attains 50 %; {what}", load)
    heavy = fair.rate_at(FAIR_POLICIES["fcfs (continuous)"], seeds)
    printed.add(
        f"Fair, {heavy:.2f} requests/s, where fcfs (continuous) attains 50 %; {what}",
        fair_rows(fair, FAIR_POLICIES, heavy, seeds),
    )
    # Twice as many, so that the last long answers weigh little.
    twice = replace(fair, count=2 * fair.count)
    full = fair_rows(twice, FAIR_POLICIES, None, seeds)
    printed.add(
        f"Fair, {twice.count} requests all at once (saturation), {seeds} seeds, the same placement",
        full,
    )
    bounds = fair.bounds(seeds) | {"tokens_s": twice.bounds(seeds)["tokens_s"]}
    printed.add("Targets and bounds, same placement", target_rows(load, full, bounds))
    chain = settings["even"]
    chain_load, chain_full = add_chain_tables(printed, chain, rate, seeds)
    printed.add(
        "Targets and bounds, rivals on one chain of 4 GPUs, ours on helr",
        target_rows(replace_ours(chain_load, load), replace_ours(chain_full, full), bounds),
    )


def add_chain_tables(
    printed: PrintedTables, chain: FairSetting, rate: float, seeds: int
) -> tuple[list[TableRow], list[TableRow]]:
    """(rows at the rate, rows of twice as many requests at once) on one chain of 4 GPUs."""
    policies = {name: FAIR_POLICIES[name] for name in (*BASELINES, CONTINUOUS, OURS)}
    twice = replace(chain, count=2 * chain.count)
    load = fair_rows(chain, policies, rate, seeds)
    full = fair_rows(twice, policies, None, seeds)
    printed.add(f"All on one chain of 4 GPUs (even), {rate:.2f} requests/s", load)
    printed.add(f"All on one chain of 4 GPUs (even), {twice.count} requests all at once", full)
    return load, full


def replace_ours(baselines: list[TableRow], best: list[TableRow]) -> list[TableRow]:
    """The rows of the rivals, and our row of `best`."""
    theirs = [row for row in baselines if row["system"] != OURS]
    return theirs + [row for row in best if row["system"] == OURS]


# ---- trace

CLUSTERS = {
    "1 A100": {"A100-80G": 1},
    "8 A100": {"A100-80G": 8},
    "64 A100": {"A100-80G": 64},
    "4 A100 + 4 A40 + 4 RTX3090": {"A100-80G": 4, "A40": 4, "RTX3090": 4},
}
TRACE_POLICIES = ("s3", "slo_odbs", "fcfs", "sjf", "deadline")
# Below this scale the longest answers of the class with the shortest objectives are late even
# alone, and no policy reaches 99 %.
TRACE_SLO = SloRule(scale=15.0)


@dataclass(frozen=True, eq=False)
class ReplicaCluster:
    """One replica of the model on each device.

    Attributes:
        costs: the cost model of each replica.
    """

    costs: list[CostModel]

    @classmethod
    def make(
        cls, devices: Mapping[str, int], model: ModelSizes, profile: Profile
    ) -> "ReplicaCluster":
        """So many replicas on each kind of device."""
        costs = []
        for device, number in devices.items():
            for _ in range(number):
                costs.append(CostModel.of(model, Cluster.uniform(device, 1), profile))
        return cls(costs)

    def engines(self) -> list[SimulatedEngine]:
        engines = []
        for cost in self.costs:
            engines.append(SimulatedEngine(cost, Limits(64, cost.kv_capacity_tokens, 8192)))
        return engines

    def speeds(self) -> list[float]:
        """Requests/s of each replica: prompts of 1,000 tokens, answers of 200, in batches of 32."""
        speeds = []
        for cost in self.costs:
            decode_s = cost.decode_step_s(32, 32 * 1000) / 32 * 200
            speeds.append(1 / (decode_s + cost.prefill_s(1000)))
        return speeds


def trace_experiment(
    flags: ExperimentFlags,
    clusters: Mapping[str, Mapping[str, int]] = CLUSTERS,
    per_device: int = 300,
    least: int = 1500,
) -> Tables:
    """The largest load, in requests a second, at which 90 and 99 % of the requests are in time.

    With goodput (load x share in time) there and in overload: 1.5 times the largest load at which
    any policy has 90 %.

    Args:
        per_device, least: requests of a run: so many a device, and at least so many.
    """
    model, profile = ModelSizes.from_config("chatglm2-6b"), read_profile("datasheet")
    tables: Tables = {}
    for name in ("azure_conv", "azure_code"):
        rows: list[TableRow] = []
        for title, devices in clusters.items():
            cluster = ReplicaCluster.make(devices, model, profile)
            count = max(least, per_device * len(cluster.costs))
            workloads = trace_workloads(flags, name, count, cluster.costs[0])
            rows += cluster_rows(title, cluster, workloads)
        tables[name] = rows
        print_markdown(
            f"{name}: ChatGLM2-6B, one replica a device, {flags.seeds} seeds, requests/s", rows
        )
    return tables


def trace_workloads(
    flags: ExperimentFlags, name: str, count: int, cost: CostModel
) -> list[Workload]:
    """One workload a seed, at 1 request/s."""
    predictor = flags.predictor_model()
    workloads = []
    for seed in range(flags.seeds):
        workload = make_workload(
            name,
            count,
            1.0,
            cost,
            seed=seed,
            slo=TRACE_SLO,
            traces=flags.traces,
            predictor=predictor,
            predict_s=PREDICT_S,
            max_tokens=8192,
        )
        workloads.append(workload)
    return workloads


Attainment = Callable[[float], tuple[float, ...]]  # load -> share in time on each workload


def cluster_rows(title: str, cluster: ReplicaCluster, workloads: list[Workload]) -> list[TableRow]:
    """One row a policy of TRACE_POLICIES on one cluster."""
    rows: list[TableRow] = []
    attainments: list[Attainment] = []
    at_90 = []
    for policy in TRACE_POLICIES:
        attained = attainment_of(POLICIES[policy], workloads, cluster)
        row: TableRow = {"cluster": title, "policy": policy}
        loads = largest_loads(attained, len(cluster.costs))
        for wanted, load in loads.items():
            row[f"load at {wanted:.0%}"] = load or "none"
            row[f"goodput at {wanted:.0%}"] = goodput(attained, load) if load else "none"
        if loads[0.9]:
            at_90.append(loads[0.9])
        rows.append(row)
        attainments.append(attained)
    overload = 1.5 * max(at_90, default=float(len(cluster.costs)))
    for row, attained in zip(rows, attainments):
        row["overload"] = overload
        row["goodput in overload"] = goodput(attained, overload)
    return rows


def goodput(attained: Attainment, load: float) -> tuple[float, float]:
    """Answers in time a second, as an interval over workloads."""
    return interval([load * share for share in attained(load)])


def attainment_of(policy: Policy, workloads: list[Workload], cluster: ReplicaCluster) -> Attainment:
    """load -> share in time on each workload, cached by load."""
    speeds = cluster.speeds()

    @lru_cache
    def attained(load: float) -> tuple[float, ...]:
        shares = []
        for workload in workloads:
            metrics, _, _ = serve(policy, workload.at_rate(load), cluster.engines(), speeds)
            shares.append(metrics["attainment"])
        return tuple(shares)

    return attained


def largest_loads(attained: Attainment, devices: int, rounds: int = 6) -> dict[float, float | None]:
    """{share in time: largest load with it}; None where no load tried has it.

    By bisection of the logarithm from 0.2 to 20 requests/s a device.
    """
    loads: dict[float, float | None] = {}
    for wanted in (0.9, 0.99):
        low, high, best = 0.2 * devices, 20.0 * devices, None
        for _ in range(rounds):
            load = float(np.sqrt(low * high))
            if np.mean(attained(load)) >= wanted:
                low = best = load
            else:
                high = load
        loads[wanted] = best
    return loads


EXPERIMENTS = {"uellm": uellm_experiment, "trace": trace_experiment}
