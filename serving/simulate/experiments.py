"""The experiments that ship: `python -m serving.simulate --experiment uellm | trace`.

uellm: the setting of UELLM (arXiv 2409.14961): ChatGLM2-6B on 4 RTX 3090, its 100 Chinese
instructions with three recorded answer lengths each (length_runs.csv). `published` repeats its
runs, each system by its own rules; `fair` gives all the same rules, placement and answers.
trace: the Azure traces on clusters of A100 and of mixed devices, the load swept.
Both print tables and return them as {title: [row, ...]}.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chatglm.files import read_json, read_text
from predictor.prediction import from_bins
from serving.cost_model.devices import Cluster
from serving.cost_model.model import CostModel, ModelShape, read_profile
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Need
from serving.policies.continuous import POLICIES
from serving.policies.lengths import expected_tokens
from serving.policies.static import BatchShape, Static
from serving.request import Batch, Limits, Policy, Record, Request, View
from serving.simulate.compare import serve
from serving.simulate.engine import SimulatedEngine
from serving.simulate.statistics import interval
from serving.simulate.workload import (
    PredictorModel,
    SloRule,
    Workload,
    make_workload,
    poisson_arrivals,
)

# Of ChatGLM2's chat format around an instruction; the logged batches are about that much longer.
TEMPLATE_TOKENS = 12
LONGEST = 2048
PREDICT_S = 7.7e-3  # the encoder, p50 (docs/results.md)
# Residuals of the log length, 21 quantiles, cross-validated: the encoder of
# `python benchmarks/predictor.py` with a regression head on ChatGLM2-6B's answers to 644
# instructions (tau 0.46). --predictor DIR takes those of another exported predictor.
RESIDUALS = (
    -2.85,
    -1.09,
    -0.75,
    -0.51,
    -0.39,
    -0.26,
    -0.15,
    -0.11,
    -0.04,
    0.01,
    0.06,
    0.11,
    0.17,
    0.2,
    0.26,
    0.31,
    0.37,
    0.46,
    0.6,
    0.79,
    3.54,
)


def predictor_of(args: argparse.Namespace) -> PredictorModel:
    """With the residuals of --predictor, else RESIDUALS."""
    return (
        PredictorModel.from_card(args.predictor, LONGEST)
        if args.predictor
        else PredictorModel(np.array(RESIDUALS), LONGEST)
    )


def print_rows(title: str, rows: list[dict], notes: tuple[str, ...] = ()) -> None:
    """As a Markdown table."""
    print(f"\n{title}\n", flush=True)
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(shown(row[name]) for name in names) + " |")
    for note in notes:
        print(f"\n{note}", flush=True)


def shown(value: Any) -> str:
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, tuple):
        mean, half = value
        return shown(mean) + (f" ± {shown(half)}" if np.isfinite(half) and half else "")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


# ---- uellm, as published


@dataclass(frozen=True)
class Chunks:
    """The batching of UELLM's scripts.

    Sorts, then cuts where a batch has `rows` rows or its predicted lengths sum to `most_tokens`.

    Attributes:
        sort: arrival; length (its S3: by predicted length); slo (its UELLM: by SLO + length_weight
            x predicted length).
        extra_tokens: prompt and answer of a batch end at its largest predicted length + this;
            None: at 2,048.
        longest_tokens: and no later.
    """

    sort: str = "arrival"
    rows: int = 10
    most_tokens: float = float("inf")
    extra_tokens: int | None = None
    longest_tokens: int = LONGEST
    length_weight: float = 0.5
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return expected_tokens(request.prediction)

    def key(self, record: Record) -> tuple[float, float, int]:
        request = record.request
        first = {
            "arrival": 0.0,
            "length": record.length,
            "slo": request.slo_s + self.length_weight * record.length,
        }[self.sort]
        return first, request.arrival_s, request.id

    def __call__(self, view: View, cost: CostModel) -> list[Batch]:
        found: list[list[Record]] = []
        total = 0.0
        for record in sorted(view.waiting.everyone(), key=self.key):
            if not found or len(found[-1]) >= self.rows or total + record.length > self.most_tokens:
                found.append([])
                total = 0.0
            found[-1].append(record)
            total += record.length
        batches = []
        for records in found:
            shape, prompt = BatchShape(view.limits), max(r.context_tokens for r in records)
            for record in records:
                shape.takes(record, LONGEST - prompt)
            stop = (
                None
                if self.extra_tokens is None
                else max(
                    1,
                    min(
                        round(max(r.length for r in records)) + self.extra_tokens,
                        self.longest_tokens,
                    )
                    - prompt,
                )
            )
            batches.append(shape.batch(stop))
        return batches


@dataclass(frozen=True)
class System:
    """One of the paper's systems.

    Attributes:
        gpus: that its script loads the model on, by ChatGLM's even rule.
        logged: the start of its runs' paths.
        stress_gpus: Morphling serves half of the batches on so many first, then loads the model
            anew.
    """

    policy: Chunks
    gpus: int
    logged: str
    stress_gpus: int = 0


PUBLISHED = {
    "UELLM-all": System(Chunks("slo", extra_tokens=50), 1, "UELM/UELM-all/"),
    "UELLM-batch": System(
        Chunks("slo", extra_tokens=500, longest_tokens=1024, length_weight=0.3),
        4,
        "UELM/UELM-batch/",
    ),
    "UELLM-deploy": System(Chunks(), 1, "UELM/UELM-deploy/"),
    "S3": System(Chunks("length", 20, 1024), 4, "UELM/S3/"),
    "Morphling": System(Chunks(), 1, "UELM/Morphing/", stress_gpus=2),
    "baseline": System(Chunks(), 1, "UELM/baseline/300/"),
}


@dataclass(frozen=True)
class Recorded:
    """UELLM's instructions.

    Attributes:
        prompts: (n,) prompt tokens.
        answers: (n, 3) answer tokens of three runs.
        reference: (n,) characters of the reference answers.
    """

    prompts: np.ndarray
    answers: np.ndarray
    reference: np.ndarray

    @classmethod
    def read(cls, folder: str | Path) -> "Recorded":
        """The instructions in the folder of the recorded runs.

        Raises:
            FileNotFoundError: the folder is not that of the recorded runs.
            ValueError: its files of these names hold something else.
        """
        folder = Path(folder)
        rows, reference = (
            read_csv(folder / "length_runs.csv"),
            folder / "alpaca_data_zh_output.json",
        )
        try:
            outputs = [row["output"] for row in read_json(reference, list)]
            return cls(
                np.array([int(row["prompt_tokens_chatglm2"]) + TEMPLATE_TOKENS for row in rows]),
                np.array([[int(row[f"run_{k}"]) for k in (1, 2, 3)] for row in rows]),
                np.array([x if isinstance(x, int) else len(x) for x in outputs]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"--uellm_data {folder}: length_runs.csv or {reference.name} has no {error}"
            ) from None


def read_csv(path: Path) -> list[dict]:
    """The rows of a recorded table.

    Raises:
        FileNotFoundError: with the flag that names the folder.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file: {path}; --uellm_data names the folder of the recorded runs"
        )
    return list(csv.DictReader(read_text(path).splitlines()))


def published_workload(recorded: Recorded, count: int, seed: int) -> Workload:
    """The paper's requests, all at time 0.

    The predicted length is the reference answer's characters, as the repository's data has it; the
    true one is that of one of the three runs. Objectives are drawn as its dataset/deal.py draws
    them, by place in the file.
    """
    rng = np.random.default_rng(seed)
    which = np.arange(count) % len(recorded.prompts)
    ranges = [(220, 250), (180, 220), (150, 180), (100, 120), (90, 100)] + [(150, 300)] * (
        count // 20
    )
    slo_s = np.concatenate([rng.integers(low, high + 1, 20) for low, high in ranges])[
        :count
    ].astype(float)
    lengths, index = np.unique(recorded.reference[which], return_inverse=True)
    points = tuple(
        from_bins(np.array([1e-9, 1.0]), np.array([0.0, n - 0.5, n + 0.5]))
        for n in lengths.tolist()
    )
    answers = recorded.answers[which, rng.integers(0, 3, count)]
    return Workload(np.zeros(count), recorded.prompts[which], answers, slo_s, index, points)


def published(recorded: Recorded, logs: list[dict], count: int, seeds: int) -> list[dict]:
    model, profile = ModelShape.from_config("chatglm2-6b"), read_profile("rtx3090")
    rows = []
    for name, system in PUBLISHED.items():
        cost = CostModel.of(model, profile.cluster(system.gpus), profile)
        limits = Limits(64, cost.kv_capacity_tokens, LONGEST)
        found = []
        for seed in range(seeds):
            workload = published_workload(recorded, count, seed)
            _, collector, engines = serve(
                Static(system.policy), workload, [SimulatedEngine(cost, limits)]
            )
            kept = {key: np.asarray(column) for key, column in collector.columns.items()}
            seconds = kept["finish_s"].max()
            if system.stress_gpus:  # reported in its time, not in its objectives
                stress = CostModel.of(model, profile.cluster(system.stress_gpus), profile)
                half = workload.part(np.arange(count // 2))
                seconds += (
                    serve(Static(system.policy), half, [SimulatedEngine(stress, limits)])[0][
                        "span_s"
                    ]
                    + 7.0
                )  # and the second loading
            padded = engines[0].step_rows + count
            late = kept["finish_s"] > kept["slo_s"]
            found.append(
                (
                    seconds,
                    kept["finish_s"].mean(),
                    late.mean() * 100,
                    padded / seconds,
                    kept["output"].sum() / seconds,
                    kept["cut"].mean() * 100,
                )
            )
        means = [interval(list(column)) for column in zip(*found)]
        own = []
        for run in logs:
            if run["path"].startswith(system.logged) and int(run["n_queries"]) == count:
                own.append(run)
        seen = {
            "time s": [float(r["time_s"]) for r in own],
            "late %": [100 * float(r["slo_default_rate"]) for r in own],
            "padded tokens/s": [float(r["padded_tokens"]) / float(r["time_s"]) for r in own],
        }
        row: dict = {"system": name, "GPUs": system.gpus}
        for i, key in enumerate(
            (
                "time s",
                "mean latency s",
                "late %",
                "padded tokens/s",
                "useful tokens/s",
                "answers cut %",
            )
        ):
            row[key] = means[i]
            if key in seen:
                row[f"{key}, logged"] = interval(seen[key]) if own else None
        rows.append(row)
    return rows


# ---- uellm, fair

# The same stopping rule (an answer's own end), predictions, arrivals, placement and limits for all.
FAIR = {
    "baseline, Morphling (10 by arrival)": Static(Chunks()),
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
}
OURS = "deadline (ours)"
RIVALS = ("baseline, Morphling (10 by arrival)", "S3")  # of UELLM's paper, in static batches
CONTINUOUS = "fcfs (continuous)"  # what a server such as vLLM does without predictions


@dataclass(frozen=True, eq=False)
class Fair:
    """The fair setting.

    Instructions are drawn with one of their recorded answers; objectives are SloRule's.
    """

    recorded: Recorded
    cost: CostModel
    limits: Limits
    replicas: int
    predictor: PredictorModel
    count: int

    def workload(self, rate: float | None, seed: int) -> Workload:
        """At this rate; None: all at time 0."""
        rng = np.random.default_rng(seed)
        which = rng.integers(0, len(self.recorded.prompts), self.count)
        prompts, answers = (
            self.recorded.prompts[which],
            self.recorded.answers[which, rng.integers(0, 3, self.count)],
        )
        slo_s = SloRule()(prompts, answers, self.cost, rng)
        index, predictions = self.predictor.predict(answers, rng)
        arrivals = np.zeros(self.count) if rate is None else poisson_arrivals(self.count, rate, rng)
        return Workload(arrivals, prompts, answers, slo_s, index, predictions, PREDICT_S)

    def run(self, policy: Policy, workload: Workload) -> dict[str, float]:
        found, _, engines = serve(
            policy,
            workload,
            [SimulatedEngine(self.cost, self.limits) for _ in range(self.replicas)],
        )
        slots = sum(e.steps for e in engines) * self.limits.max_batch
        return found | {"slots": float((workload.output_tokens - 1).sum() / max(slots, 1))}

    def rate_at(self, policy: Policy, seeds: int, wanted: float = 0.5, rounds: int = 10) -> float:
        """Requests a second at which the policy attains `wanted` on these seeds.

        Found by bisection of the logarithm.
        """
        low, high = 0.02, 50.0
        for _ in range(rounds):
            rate = float(np.sqrt(low * high))
            got = np.mean(
                [self.run(policy, self.workload(rate, seed))["attainment"] for seed in range(seeds)]
            )
            low, high = (rate, high) if got > wanted else (low, rate)
        return float(np.sqrt(low * high))

    def bounds(self, seeds: int) -> dict[str, float]:
        found = [self.bounds_of(self.workload(None, seed)) for seed in range(seeds)]
        return {key: float(np.mean([one[key] for one in found])) for key in found[0]}

    def bounds_of(self, workload: Workload) -> dict[str, float]:
        """What no policy can beat.

        For latency and attainment: each request alone on an idle engine. For tokens a second: an
        engine whose rows are always all useful, without prefill.
        """
        cost, rows, prompts, outputs = (
            self.cost,
            self.limits.max_batch,
            workload.prompt_tokens,
            workload.output_tokens,
        )
        alone = np.array(
            [
                cost.prefill_s(int(p)) + cost.decode_s(1, int(p) + 1, int(o) - 1)
                for p, o in zip(prompts, outputs)
            ]
        )
        steps = (outputs - 1).sum()
        # Of a row, the mean over steps.
        context = float(((prompts + outputs / 2) * (outputs - 1)).sum() / steps)
        pace = min(cost.decode_step_s(b, b * context) / b for b in range(1, rows + 1))
        return {
            "latency_s": float(alone.mean()),
            "attainment": float((alone <= workload.slo_s).mean()),
            "tokens_s": float(self.replicas * outputs.sum() / (steps * pace)),
        }


def fair_rows(setting: Fair, policies: dict, rate: float | None, seeds: int) -> list[dict]:
    rows = []
    made = [setting.workload(rate, seed) for seed in range(seeds)]
    for name, policy in policies.items():
        found = [setting.run(policy, workload) for workload in made]
        keys = {
            "attainment %": ("attainment", 100),
            "mean latency s": ("latency_mean_s", 1),
            "p99 s": ("latency_p99_s", 1),
            "largest wait s": ("largest_wait_s", 1),
            "useful tokens/s": ("throughput_tps", 1),
            "useful share of rows %": ("slots", 100),
            "busy %": ("utilisation", 100),
        }
        rows.append(
            {"system": name}
            | {key: interval([one[of] * by for one in found]) for key, (of, by) in keys.items()}
        )
    return rows


def targets(
    load: list[dict], full: list[dict], bounds: dict[str, float], ours: str = OURS
) -> list[dict]:
    """The wanted gains over each rival: what is reached, and the bound over the same rival."""
    at, sat = ({row["system"]: row for row in rows} for rows in (load, full))
    rows = []
    for rival in (*RIVALS, CONTINUOUS):
        latency, ours_latency = at[rival]["mean latency s"][0], at[ours]["mean latency s"][0]
        tokens, slots = sat[rival]["useful tokens/s"][0], sat[rival]["useful share of rows %"][0]
        rows += [
            {
                "against": rival,
                "target": "mean latency -90 %",
                "reached": f"{100 * (ours_latency / latency - 1):.1f} %",
                "bound": f"{100 * (bounds['latency_s'] / latency - 1):.1f} % "
                f"(every request alone: {bounds['latency_s']:.2f} s)",
            },
            {
                "against": rival,
                "target": "useful tokens/s x 5, all at once",
                "reached": f"x {sat[ours]['useful tokens/s'][0] / tokens:.2f}",
                "bound": f"x {bounds['tokens_s'] / tokens:.2f} "
                f"(rows always full: {bounds['tokens_s']:.0f} tokens/s)",
            },
            {
                "against": rival,
                "target": "utilisation x 4, all at once",
                "reached": f"x {sat[ours]['useful share of rows %'][0] / slots:.2f}",
                "bound": f"x {100 / slots:.2f} (every row of every step useful); "
                f"of its busy time x {100 / sat[rival]['busy %'][0]:.2f}",
            },
        ]
    rows.append(
        {
            "against": "all",
            "target": "attainment >= 99 %",
            "reached": f"{at[ours]['attainment %'][0]:.2f} %",
            "bound": f"{100 * bounds['attainment']:.2f} % (in time if alone)",
        }
    )
    return rows


def uellm(args: argparse.Namespace) -> dict[str, list[dict]]:
    recorded = Recorded.read(args.uellm_data)
    logs = read_csv(Path(args.uellm_data) / "measured.csv")
    tables = {}

    def show(title: str, rows: list[dict], *notes: str) -> None:
        print_rows(title, rows, notes)
        tables[title] = rows

    for count in (100, 300):
        show(
            f"As published, {count} requests, all at once",
            published(recorded, logs, count, args.seeds),
        )
    model, profile = ModelShape.from_config("chatglm2-6b"), read_profile("rtx3090")
    predictor = predictor_of(args)
    settings = {}
    for deployer in ("helr", "even"):
        placement = DEPLOYERS[deployer].place(model, profile.cluster(4), Need(20_000, 10), profile)
        cost = CostModel.of(model, placement, profile)
        settings[deployer] = Fair(
            recorded,
            cost,
            Limits(64, cost.kv_capacity_tokens, LONGEST + 64),
            placement.replicas,
            predictor,
            args.requests,
        )
    fair = settings["helr"]
    rate = fair.rate_at(FAIR["FIFO (64 by arrival)"], args.seeds)
    what = f"{args.requests} requests, {args.seeds} seeds, helr: {fair.replicas} replicas of 1 GPU"
    load = fair_rows(fair, FAIR, rate, args.seeds)
    show(f"Fair, {rate:.2f} requests/s, where FIFO attains 50 %; {what}", load)
    heavy = fair.rate_at(FAIR["fcfs (continuous)"], args.seeds)
    show(
        f"Fair, {heavy:.2f} requests/s, where fcfs (continuous) attains 50 %; {what}",
        fair_rows(fair, FAIR, heavy, args.seeds),
    )
    # Twice as many, so that the last long answers weigh little.
    many = {name: replace(one, count=2 * one.count) for name, one in settings.items()}
    full = fair_rows(many["helr"], FAIR, None, args.seeds)
    show(
        f"Fair, {2 * args.requests} requests all at once (saturation), {args.seeds} seeds, "
        "the same placement",
        full,
    )
    bounds = fair.bounds(args.seeds) | {"tokens_s": many["helr"].bounds(args.seeds)["tokens_s"]}
    show("Targets and bounds, same placement", targets(load, full, bounds))
    chain = {name: FAIR[name] for name in (*RIVALS, CONTINUOUS, OURS)}
    own_load = fair_rows(settings["even"], chain, rate, args.seeds)
    own_full = fair_rows(many["even"], chain, None, args.seeds)
    show(f"All on one chain of 4 GPUs (even), {rate:.2f} requests/s", own_load)
    show(f"All on one chain of 4 GPUs (even), {2 * args.requests} requests all at once", own_full)
    mixed = []
    for rows, best in ((own_load, load), (own_full, full)):
        theirs = [row for row in rows if row["system"] != OURS]
        mixed.append(theirs + [row for row in best if row["system"] == OURS])
    show("Targets and bounds, rivals on one chain of 4 GPUs, ours on helr", targets(*mixed, bounds))
    return tables


# ---- trace

CLUSTERS = {
    "1 A100": {"A100-80G": 1},
    "8 A100": {"A100-80G": 8},
    "64 A100": {"A100-80G": 64},
    "4 A100 + 4 A40 + 4 RTX3090": {"A100-80G": 4, "A40": 4, "RTX3090": 4},
}
TRACE_POLICIES = ("s3", "slo_odbs", "fcfs", "sjf", "deadline")
# Below this scale the longest answers of the most hurried class are late even alone, and nobody
# reaches 99 %.
TRACE_SLO = SloRule(scale=15.0)


def trace(
    args: argparse.Namespace, clusters: dict = CLUSTERS, per_device: int = 300, least: int = 1500
) -> dict[str, list[dict]]:
    """The largest load, in requests a second, at which 90 and 99 % of the requests are in time.

    With goodput (load x share in time) there and in overload: 1.5 times the largest load at which
    any policy has 90 %.
    """
    model, profile = ModelShape.from_config("chatglm2-6b"), read_profile("datasheet")
    predictor = predictor_of(args)
    tables = {}
    for name in ("azure_conv", "azure_code"):
        rows = []
        for title, devices in clusters.items():
            costs = []
            for device, number in devices.items():
                for _ in range(number):
                    costs.append(CostModel.of(model, Cluster.uniform(device, 1), profile))
            pairs = [(cost, Limits(64, cost.kv_capacity_tokens, 8192)) for cost in costs]
            speeds = [
                1 / (cost.decode_step_s(32, 32 * 1000) / 32 * 200 + cost.prefill_s(1000))
                for cost in costs
            ]
            count = max(least, per_device * len(costs))
            made = [
                make_workload(
                    name,
                    count,
                    1.0,
                    costs[0],
                    seed=seed,
                    slo=TRACE_SLO,
                    traces=args.traces,
                    predictor=predictor,
                    predict_s=PREDICT_S,
                    max_tokens=8192,
                )
                for seed in range(args.seeds)
            ]
            own = []
            for policy in TRACE_POLICIES:
                attained = attainment_of(POLICIES[policy], made, pairs, speeds)
                row = {"cluster": title, "policy": policy, "attained": attained}
                for wanted, load in sweep(attained, len(pairs)).items():
                    row |= {
                        f"load at {wanted:.0%}": load or "none",
                        f"goodput at {wanted:.0%}": interval([load * a for a in attained(load)])
                        if load
                        else "none",
                    }
                own.append(row)
            overload = 1.5 * max(
                [load for row in own if isinstance(load := row["load at 90%"], float)],
                default=float(len(pairs)),
            )
            for row in own:
                row |= {
                    "overload": overload,
                    "goodput in overload": interval(
                        [overload * a for a in row.pop("attained")(overload)]
                    ),
                }
            rows += own
        tables[name] = rows
        print_rows(
            f"{name}: ChatGLM2-6B, one replica a device, {args.seeds} seeds, requests/s", rows
        )
    return tables


def attainment_of(
    policy: Policy, workloads: list[Workload], pairs: list, speeds: list[float]
) -> Callable[[float], tuple[float, ...]]:
    """load -> share in time on each workload, remembered."""

    @lru_cache
    def attained(load: float) -> tuple[float, ...]:
        return tuple(
            serve(policy, w.at_rate(load), [SimulatedEngine(*pair) for pair in pairs], speeds)[0][
                "attainment"
            ]
            for w in workloads
        )

    return attained


def sweep(
    attained: Callable[[float], tuple[float, ...]], devices: int, rounds: int = 6
) -> dict[float, float | None]:
    """{share in time: largest load with it}; None where no load tried has it.

    By bisection of the logarithm from 0.2 to 20 requests/s a device.
    """
    found: dict[float, float | None] = {}
    for wanted in (0.9, 0.99):
        low, high, best = 0.2 * devices, 20.0 * devices, None
        for _ in range(rounds):
            load = float(np.sqrt(low * high))
            if np.mean(attained(load)) >= wanted:
                low = best = load
            else:
                high = load
        found[wanted] = best
    return found


EXPERIMENTS = {"uellm": uellm, "trace": trace}
