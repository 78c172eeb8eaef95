"""Policies compared on a simulated engine: one table, policy x metric, over seeds and loads.

    python -m serving.simulate --policies fifo,s3,slo_odbs,fcfs,sjf,deadline,oracle --workload azure_conv --rate 4,6,8 --seeds 5
    python -m serving.simulate --profile rtx3090 --gpus 4 --deployer even --rate 2
    python -m serving.simulate --experiment uellm --seeds 5 --json uellm.json
    python -m serving.simulate --search slo_odbs --workload poisson --rate 8 --seeds 3

`--search` prints the knobs that a coordinate descent over SPACES finds on other seeds than a comparison uses.
"""

import argparse
import gc
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from finetune.commands import Parser, number, run_command, whole
from finetune.files import write_aside, write_json
from serving.batching import Static
from serving.continuous import POLICIES
from serving.devices import MOST_DEVICES
from serving.metrics import Collector, interval, share_of_gain
from serving.request import FOREVER, CostModel, Limits, Policy
from serving.scheduler import Replay, VirtualClock, run
from serving.simulated import LinearCost, SimulatedEngine
from serving.workload import WORKLOADS, PredictorModel, SloRule, Workload, make_workload

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
SEARCH_SEEDS = 1000  # searches look at seeds from here on, comparisons at 0, 1, ...
SPACES = {  # knobs of a policy that are worth a search, and values to try
    "odbs": {"threshold": (500, 1000, 2000, 4000, 8000, 15_000, 30_000, 60_000), "reserve_quantile": (0.5, 0.8, 0.9, 0.97)},
    "slo_dbs": {"threshold": (100, 300, 1000, 3000, 10_000, 30_000, 100_000), "reserve_quantile": (0.5, 0.8, 0.9, 0.97)},
    "slo_odbs": {
        "threshold": (500, 1000, 2000, 4000, 8000, 15_000, 30_000, 60_000, 120_000), "sort_by": ("slo", "length", "composite"),
        "slo_weight": (0.0, 0.3, 1.0, 3.0, 10.0, 30.0), "length_weight": (0.0, 0.1, 0.5, 1.0), "reserve_quantile": (0.5, 0.8, 0.9, 0.97),
    },
    "annealing": {"window": (32, 64, 128), "moves": (100, 300), "hot": (0.03, 0.1, 0.3), "reserve_quantile": (0.5, 0.9)},
    "fcfs": {"block_tokens": (64, 256), "watermark": (0.0, 0.01, 0.05)},
    "sjf": {"reserve_quantile": (0.3, 0.5, 0.7, 0.9)},
    "srpt": {"reserve_quantile": (0.3, 0.5, 0.7, 0.9), "advantage": (1.5, 2.0, 4.0, 8.0)},
    "deadline": {
        "admit_quantile": (0.3, 0.5, 0.7, 0.9), "hope_quantile": (0.02, 0.05, 0.1, 0.2, 0.5), "work_weight": (-0.5, 0.0, 0.5, 1.0, 3.0, 10.0),
        "preempt_gain": (1.0, 3.0, 10.0, FOREVER), "late_share": (0.02, 0.05, 0.1),
    },
}  # fmt: skip


@contextmanager
def collected_later():
    """No garbage collection meanwhile: a run makes millions of short-lived objects and no cycles."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def simulate(policy: Policy, workload: Workload, cost: CostModel, limits: Limits, replicas: int = 1) -> tuple[dict[str, float], Collector]:
    """(metrics, everything kept) of one policy on one workload; deterministic."""
    found, collector, _ = serve(policy, workload, [SimulatedEngine(cost, limits) for _ in range(replicas)])
    return found, collector


def serve(
    policy: Policy, workload: Workload, engines: list[SimulatedEngine], speeds: list[float] | None = None
) -> tuple[dict[str, float], Collector, list[SimulatedEngine]]:  # fmt: skip
    """Several replicas, each with a queue of its own; requests are dealt out in turn, by the speeds. As `simulate`, and the engines."""
    collector = Collector()
    which = deal(len(workload), speeds or [1.0] * len(engines))
    with collected_later():
        for k, engine in enumerate(engines):
            part = workload.part(which == k) if len(engines) > 1 else workload
            collector.watch(run(policy, engine, VirtualClock(), Replay(part.requests(policy.predicts))))
    return collector.summary(total_of(engines)), collector, engines


def deal(count: int, speeds: list[float]) -> np.ndarray:
    """(count,) index of the replica of each request: each replica's share is its speed's, and its requests are evenly apart."""
    share = np.asarray(speeds, float) / np.sum(speeds)
    made = [(np.arange(int(np.ceil(count * s)) + 1) + 0.5) / s for s in share]
    owner = np.repeat(np.arange(len(speeds)), [len(m) for m in made])
    return owner[np.argsort(np.concatenate(made), kind="stable")][:count]


def total_of(engines: list[SimulatedEngine]) -> SimpleNamespace:
    """What metrics read of an engine, of all: seconds are means over replicas, tokens sums."""
    n = len(engines)
    seconds = {name: sum(getattr(e, name) for e in engines) / n for name in ("busy_s", "row_s")}
    sums = {name: sum(getattr(e, name) for e in engines) for name in ("reserved_token_s", "used_token_s", "prefill_tokens", "step_rows", "steps")}
    return SimpleNamespace(**seconds, **sums, limits=SimpleNamespace(kv_tokens=sum(e.limits.kv_tokens for e in engines)))


@dataclass(frozen=True)
class Setting:
    """What policies are compared on, but for rate and seed."""

    workload: str
    requests: int
    cost: CostModel
    limits: Limits
    slo: SloRule = SloRule()
    predictor: PredictorModel | None = None
    predict_s: float = 1e-3
    traces: str = "../shared/data/traces"
    replicas: int = 1

    def make(self, rate: float, seed: int) -> Workload:
        """Raises ValueError where no request of it can be served."""
        made = make_workload(
            self.workload, self.requests, rate, self.cost, seed=seed, slo=self.slo, predictor=self.predictor, predict_s=self.predict_s,
            traces=self.traces, max_tokens=self.limits.max_tokens,
        )  # fmt: skip
        if (shortest := int(made.prompt_tokens.min())) >= self.limits.max_tokens:
            raise ValueError(f"--max_tokens {self.limits.max_tokens}: no request fits, the shortest prompt of {self.workload} has {shortest} tokens")
        return made


def compare(policies: dict[str, Policy], setting: Setting, rates: list[float], seeds: int, first_seed: int = 0) -> list[dict]:
    """One row a rate and policy: {rate, policy, seconds, metrics: {name: (mean, half width)}, by_seed: {name: [...]}}.

    With fifo and oracle among the policies also share_of_gain: of what the oracle's mean latency is better than FIFO's.
    """
    rows = []
    for rate in rates:
        made = [setting.make(rate, first_seed + seed) for seed in range(seeds)]
        found = {}
        for name, policy in policies.items():
            started = time.perf_counter()
            by_seed = [simulate(policy, workload, setting.cost, setting.limits, replicas=setting.replicas)[0] for workload in made]
            found[name] = {key: [one[key] for one in by_seed] for key in by_seed[0]}
            rows.append({"rate": rate, "policy": name, "seconds": time.perf_counter() - started, "by_seed": found[name]})
        for row in rows[-len(policies) :]:
            if "fifo" in found and "oracle" in found:
                triples = zip(row["by_seed"]["latency_mean_s"], found["fifo"]["latency_mean_s"], found["oracle"]["latency_mean_s"])
                row["by_seed"]["share_of_gain"] = [share_of_gain(*triple) for triple in triples]
            row["metrics"] = {key: interval(values) for key, values in row["by_seed"].items()}
    return rows


def print_table(rows: list[dict], file=None):
    """A line for each rate and policy, the mean and, of 3 seeds or more, half of its 95 % interval; units in the second line."""
    found = [name for name in COLUMNS if any(name in row["metrics"] for row in rows)]
    lines = [["rate", "policy", *(COLUMNS[name][0] for name in found)], ["1/s", "", *(COLUMNS[name][1] for name in found)]]
    for row in rows:
        cells = [cell(*row["metrics"].get(name, (np.nan, np.nan)), COLUMNS[name][2]) for name in found]
        lines.append([f"{row['rate']:g}", row["policy"], *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        aligned = [text.ljust(width) if i == 1 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))]
        print("  ".join(aligned).rstrip(), file=file)


def cell(mean: float, half: float, factor: float) -> str:
    """A mean to 4 digits, never in powers of ten; "-" where there is none."""
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


def search(policy: Policy, space: dict[str, tuple], score, rounds: int = 2) -> Iterator[tuple[Policy, float]]:
    """Coordinate descent: one knob after the other, each at its best value in `space`, for so many rounds or until nothing gains.

    Args:
        score: policy -> number, larger is better.
    Yields:
        (policy, score) of each better one found, the start first; the last is the result.
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


def scorer(setting: Setting, rates: list[float], seeds: int):
    """policy -> mean attainment over rates and seeds, less a millionth of the mean latency to decide between equals."""
    made = [setting.make(rate, SEARCH_SEEDS + seed) for rate in rates for seed in range(seeds)]

    def score(policy: Policy) -> float:
        results = [simulate(policy, workload, setting.cost, setting.limits, replicas=setting.replicas)[0] for workload in made]
        return float(np.mean([r["attainment"] - 1e-6 * r.get("latency_mean_s", 0.0) for r in results]))

    return score


def plot(rows: list[dict], policies: dict[str, Policy], setting: Setting, folder: Path) -> list[Path]:
    """Attainment against load, and at the highest load the distribution of latency and the queue over time; PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    highest = max(row["rate"] for row in rows)
    figures = {name: pyplot.subplots(figsize=(7, 4)) for name in ("attainment", "latency", "queue")}
    for name, policy in policies.items():
        style = {"label": name, "linestyle": "--" if isinstance(policy, Static) else "-", "linewidth": 1.4}
        own = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["rate"])
        rates, seen = [row["rate"] for row in own], np.array([row["by_seed"]["attainment"] for row in own])
        (line,) = figures["attainment"][1].plot(rates, seen.mean(axis=1), marker="o", markersize=3, **style)
        figures["attainment"][1].fill_between(rates, seen.min(axis=1), seen.max(axis=1), color=line.get_color(), alpha=0.15, linewidth=0)
        kept = simulate(policy, setting.make(highest, 0), setting.cost, setting.limits, replicas=setting.replicas)[1].columns
        arrived, admitted, finished = (np.asarray(kept[c]) for c in ("arrival_s", "admitted_s", "finish_s"))
        latency = np.sort(finished - arrived)
        figures["latency"][1].plot(latency, np.linspace(0, 1, len(latency)), **style)
        times = np.sort(np.concatenate([arrived, admitted]))
        waiting = np.searchsorted(np.sort(arrived), times, "right") - np.searchsorted(np.sort(admitted), times, "right")
        figures["queue"][1].plot(times, waiting, **style | {"linewidth": 0.9})
    labels = {
        "attainment": ("requests a second", "share answered in time; band: all seeds", "Attainment against load"),
        "latency": ("latency, s", "share of requests", f"Latency at {highest:g} requests/s"),
        "queue": ("time, s", "waiting requests", f"Queue at {highest:g} requests/s"),
    }  # fmt: skip
    written = []
    for name, (figure, axes) in figures.items():
        across, up, title = labels[name]
        axes.set(xlabel=across, ylabel=up, title=f"{title}: {setting.workload}, {setting.requests} requests")
        if name != "queue":
            axes.set(xscale="log", ylim=(0, 1.02))
        if name == "attainment":
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
            axes.minorticks_off()
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="dashed: static batches", title_fontsize=7)
        figure.tight_layout()
        written.append(folder / f"{name}.png")
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        write_aside(written[-1], image.getvalue())
        pyplot.close(figure)
    return written


def parse_rates(text: str) -> list[float]:
    """Requests a second, with commas between them."""
    parse = number(1e-6, 1e6)
    return [parse(part) for part in text.split(",")]


def make_cost(args) -> tuple[CostModel, int]:
    """(--profile or --device: the calibrated model of serving.cost_model, placed by --deployer; else LinearCost's lines, replicas)."""
    if not args.device and not args.profile:
        for flag in ("gpus", "deployer"):
            if getattr(args, flag) != build_parser().get_default(flag):
                raise ValueError(f"--{flag} goes with --profile or --device")
        return LinearCost() if not args.kv_tokens else replace(LinearCost(), kv_capacity_tokens=args.kv_tokens), 1
    from serving.cost_model import CostModel, ModelShape, read_profile
    from serving.deployment import DEPLOYERS
    from serving.devices import Cluster
    from serving.placement import Need

    profile = read_profile(args.profile or "datasheet")
    cluster = Cluster.uniform(args.device, args.gpus) if args.device else profile.cluster(args.gpus)
    placement = DEPLOYERS[args.deployer].place(ModelShape.from_config(args.model, args.element_bytes), cluster, Need(args.need_tokens), profile)
    return CostModel.of(placement.model, placement, profile), placement.replicas


def make_setting(args) -> Setting:
    cost, replicas = make_cost(args)
    kv_tokens = args.kv_tokens or cost.kv_capacity_tokens
    if args.predictor:
        predictor = PredictorModel.from_card(args.predictor, args.longest_answer)
    else:
        predictor = PredictorModel.normal(args.predictor_sigma, args.longest_answer)
    return Setting(
        args.workload, args.requests, cost, Limits(args.max_batch, kv_tokens, min(args.max_tokens, kv_tokens), args.prefill_tokens),
        SloRule(args.slo_scale, args.slo_floor_s, args.slo_length), predictor, args.predict_s, args.traces, replicas,
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="serving.simulate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--policies", default="fifo,s3,slo_odbs,fcfs,sjf,deadline,oracle", help=f"of {', '.join(POLICIES)}; comma between them")
    add("--workload", default="poisson", choices=WORKLOADS)
    add("--rate", type=parse_rates, default="8", help="requests a second; several with commas make a load sweep")
    add("--requests", type=whole(1, 10_000_000), default=2000, help="of each run")
    add("--seeds", type=whole(1, 10_000), default=5)
    add("--slo_scale", type=number(0, above=True), default=5.0, help="objective: so many times the latency of a request alone on the engine")
    add("--slo_floor_s", type=number(0), default=1.0, help="and no less than this")
    add("--slo_length", default="typical", choices=("typical", "own"), help="alone with an answer of typical length, or of its own")
    add("--predictor", help="an exported predictor's folder, whose residuals predictions get; default: --predictor_sigma")
    add("--predictor_sigma", type=number(0, 10), default=0.8, help="standard deviation of the error of the predicted log length")
    add("--predict_s", type=number(0, 1e6), default=1e-3, help="what a prediction takes, charged to every policy that asks for one")
    add("--longest_answer", type=whole(2, 10_000_000), default=2048, help="tokens, by the predictor's knowledge")
    add("--max_batch", type=whole(), default=64)
    add("--kv_tokens", type=whole(2), help="KV cache in tokens; default: the cost model's capacity")
    add("--max_tokens", type=whole(2), default=8192, help="prompt and answer of one request; longer ones of a trace are left out")
    add("--prefill_tokens", type=whole(), default=2048, help="prompt tokens between two decode steps")
    add("--profile", help="calibrated cost model, such as rtx3090, or a file; default: straight lines near ChatGLM2-6B on one A100")
    add("--device", help="serving.cost_model's device, such as A100-80G; default: the profile's")
    add("--gpus", type=whole(1, MOST_DEVICES), default=1, help="how many of them")
    add("--deployer", default="helr", choices=("even", "single", "he", "lr", "helr", "morphling"), help="places the layers; room for more chains makes replicas")
    add("--need_tokens", type=whole(0), default=20_000, help="KV tokens at the predicted q90 that a placement must hold")
    add("--model", default="chatglm2-6b", help="published name, folder or config.json")
    add("--element_bytes", type=whole(1, 8), default=2, help="of a weight: 2 in half precision, 4 in fp32")
    add("--traces", default="../shared/data/traces", help="folder of the recorded traces")
    add("--uellm_data", default="../shared/data/uellm", help="folder of UELLM's recorded lengths and logs")
    add("--experiment", choices=("uellm", "trace"), help="run this one of serving.experiments; of the other flags it reads --seeds, --requests, --predictor and folders")
    add("--search", choices=sorted(SPACES), help="look for this policy's knobs instead of comparing")
    add("--json", type=Path, help="write the table here too")
    add("--plots", type=Path, help="write attainment, latency and queue plots into this folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    names = [name for name in args.policies.split(",") if name]
    if unknown := [name for name in names if name not in POLICIES]:
        parser.error(f"--policies: {', '.join(unknown)} unknown; there are {', '.join(POLICIES)}")
    if not names:
        parser.error(f"--policies: name at least one of {', '.join(POLICIES)}")
    return run_command(parser.prog, lambda: run_simulation(args, names))


def run_simulation(args, names: list[str]):
    setting, rates = make_setting(args), args.rate
    if args.experiment:
        from serving.experiments import EXPERIMENTS

        tables = EXPERIMENTS[args.experiment](args)
        if args.json:
            write_json(args.json, {"settings": printable(args), "tables": tables})
        return
    if args.search:
        for policy, got in search(POLICIES[args.search], SPACES[args.search], scorer(setting, rates, args.seeds)):
            print(f"{got:.4f}  {policy}", flush=True)
        return
    policies = {name: POLICIES[name] for name in names}
    rows = compare(policies, setting, rates, args.seeds)
    print_table(rows)
    if args.json:
        knobs = {name: {f.name: getattr(p, f.name) for f in fields(p)} if is_dataclass(p) else {} for name, p in inner_of(policies).items()}
        write_json(args.json, {"settings": printable(args), "policies": knobs, "rows": rows})
    if args.plots:
        for path in plot(rows, policies, setting, args.plots):
            print(f"wrote {path}", file=sys.stderr)


def printable(args) -> dict:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def inner_of(policies: dict[str, Policy]) -> dict:
    return {name: p.batching if isinstance(p, Static) else p for name, p in policies.items()}


if __name__ == "__main__":
    sys.exit(main())
