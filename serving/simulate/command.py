"""Policies compared on a simulated engine: one table, policy x metric, over seeds and loads.

    python -m serving.simulate --policies fifo,s3,slo_odbs,fcfs,sjf,deadline,oracle \\
        --workload azure_conv --rate 4,6,8 --seeds 5
    python -m serving.simulate --profile rtx3090 --gpus 4 --deployer even --rate 2
    python -m serving.simulate --experiment uellm --seeds 5 --json uellm.json
    python -m serving.simulate --search slo_odbs --workload poisson --rate 8 --seeds 3

`--search` prints the knobs that a coordinate descent over SPACES finds on other seeds than a
comparison uses.
"""

import argparse
import io
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np

from chatglm.commands import Parser, number, run_command, whole
from finetune.files import write_aside, write_json
from serving.cost_model.devices import MOST_DEVICES
from serving.policies.continuous import POLICIES
from serving.policies.static import Static
from serving.request import CostEstimator, Limits, Policy
from serving.simulate.compare import SPACES, Setting, compare, print_table, scorer, search, simulate
from serving.simulate.engine import LinearCost
from serving.simulate.workload import WORKLOADS, PredictorModel, SloRule


def plot(
    rows: list[dict], policies: dict[str, Policy], setting: Setting, folder: Path
) -> list[Path]:
    """The PNG files written: attainment against load, and latency and queue at the highest load.

    Latency is plotted as its distribution, the queue over time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    highest = max(row["rate"] for row in rows)
    figures = {name: pyplot.subplots(figsize=(7, 4)) for name in ("attainment", "latency", "queue")}
    for name, policy in policies.items():
        style = {
            "label": name,
            "linestyle": "--" if isinstance(policy, Static) else "-",
            "linewidth": 1.4,
        }
        own = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["rate"])
        rates, seen = (
            [row["rate"] for row in own],
            np.array([row["by_seed"]["attainment"] for row in own]),
        )
        (line,) = figures["attainment"][1].plot(
            rates, seen.mean(axis=1), marker="o", markersize=3, **style
        )
        figures["attainment"][1].fill_between(
            rates,
            seen.min(axis=1),
            seen.max(axis=1),
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
        kept = simulate(
            policy,
            setting.make(highest, 0),
            setting.cost,
            setting.limits,
            replicas=setting.replicas,
        )[1].columns
        arrived, admitted, finished = (
            np.asarray(kept[c]) for c in ("arrival_s", "admitted_s", "finish_s")
        )
        latency = np.sort(finished - arrived)
        figures["latency"][1].plot(latency, np.linspace(0, 1, len(latency)), **style)
        times = np.sort(np.concatenate([arrived, admitted]))
        waiting = np.searchsorted(np.sort(arrived), times, "right") - np.searchsorted(
            np.sort(admitted), times, "right"
        )
        figures["queue"][1].plot(times, waiting, **style | {"linewidth": 0.9})
    labels = {
        "attainment": (
            "requests a second",
            "share answered in time; band: all seeds",
            "Attainment against load",
        ),
        "latency": ("latency, s", "share of requests", f"Latency at {highest:g} requests/s"),
        "queue": ("time, s", "waiting requests", f"Queue at {highest:g} requests/s"),
    }
    written = []
    for name, (figure, axes) in figures.items():
        across, up, title = labels[name]
        axes.set(
            xlabel=across,
            ylabel=up,
            title=f"{title}: {setting.workload}, {setting.requests} requests",
        )
        if name != "queue":
            axes.set(xscale="log", ylim=(0, 1.02))
        if name == "attainment":
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
            axes.minorticks_off()
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            fontsize=8,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1, 1),
            title="dashed: static batches",
            title_fontsize=7,
        )
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


def make_cost(args: argparse.Namespace) -> tuple[CostEstimator, int]:
    """(cost model, replicas).

    With --profile or --device the calibrated model of serving.cost_model, placed by --deployer;
    else LinearCost.
    """
    if not args.device and not args.profile:
        for flag in ("gpus", "deployer"):
            if getattr(args, flag) != build_parser().get_default(flag):
                raise ValueError(f"--{flag} goes with --profile or --device")
        return LinearCost() if not args.kv_tokens else replace(
            LinearCost(), kv_capacity_tokens=args.kv_tokens
        ), 1
    from serving.cost_model.devices import Cluster
    from serving.cost_model.model import CostModel, ModelShape, read_profile
    from serving.deployment.deployers import DEPLOYERS
    from serving.deployment.placement import Need

    profile = read_profile(args.profile or "datasheet")
    cluster = Cluster.uniform(args.device, args.gpus) if args.device else profile.cluster(args.gpus)
    placement = DEPLOYERS[args.deployer].place(
        ModelShape.from_config(args.model, args.element_bytes),
        cluster,
        Need(args.need_tokens),
        profile,
    )
    return CostModel.of(placement.model, placement, profile), placement.replicas


def make_setting(args: argparse.Namespace) -> Setting:
    cost, replicas = make_cost(args)
    kv_tokens = args.kv_tokens or cost.kv_capacity_tokens
    if args.predictor:
        predictor = PredictorModel.from_card(args.predictor, args.longest_answer)
    else:
        predictor = PredictorModel.normal(args.predictor_sigma, args.longest_answer)
    return Setting(
        args.workload,
        args.requests,
        cost,
        Limits(args.max_batch, kv_tokens, min(args.max_tokens, kv_tokens), args.prefill_tokens),
        SloRule(args.slo_scale, args.slo_floor_s, args.slo_length),
        predictor,
        args.predict_s,
        args.traces,
        replicas,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="serving.simulate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--policies",
        default="fifo,s3,slo_odbs,fcfs,sjf,deadline,oracle",
        help=f"of {', '.join(POLICIES)}; comma between them",
    )
    add("--workload", default="poisson", choices=WORKLOADS)
    add(
        "--rate",
        type=parse_rates,
        default="8",
        help="requests a second; several with commas make a load sweep",
    )
    add("--requests", type=whole(1, 10_000_000), default=2000, help="of each run")
    add("--seeds", type=whole(1, 10_000), default=5)
    add(
        "--slo_scale",
        type=number(0, above=True),
        default=5.0,
        help="objective: so many times the latency of a request alone on the engine",
    )
    add("--slo_floor_s", type=number(0), default=1.0, help="and no less than this")
    add(
        "--slo_length",
        default="typical",
        choices=("typical", "own"),
        help="alone with an answer of typical length, or of its own",
    )
    add(
        "--predictor",
        help="an exported predictor's folder, whose residuals predictions get; "
        "default: --predictor_sigma",
    )
    add(
        "--predictor_sigma",
        type=number(0, 10),
        default=0.8,
        help="standard deviation of the error of the predicted log length",
    )
    add(
        "--predict_s",
        type=number(0, 1e6),
        default=1e-3,
        help="what a prediction takes, charged to every policy that asks for one",
    )
    add(
        "--longest_answer",
        type=whole(2, 10_000_000),
        default=2048,
        help="tokens, by the predictor's knowledge",
    )
    add("--max_batch", type=whole(), default=64)
    add("--kv_tokens", type=whole(2), help="KV cache in tokens; default: the cost model's capacity")
    add(
        "--max_tokens",
        type=whole(2),
        default=8192,
        help="prompt and answer of one request; longer ones of a trace are left out",
    )
    add(
        "--prefill_tokens",
        type=whole(),
        default=2048,
        help="prompt tokens between two decode steps",
    )
    add(
        "--profile",
        help="calibrated cost model, such as rtx3090, or a file; "
        "default: straight lines near ChatGLM2-6B on one A100",
    )
    add("--device", help="serving.cost_model's device, such as A100-80G; default: the profile's")
    add("--gpus", type=whole(1, MOST_DEVICES), default=1, help="how many of them")
    add(
        "--deployer",
        default="helr",
        choices=("even", "single", "he", "lr", "helr", "morphling"),
        help="places the layers; room for more chains makes replicas",
    )
    add(
        "--need_tokens",
        type=whole(0),
        default=20_000,
        help="KV tokens at the predicted q90 that a placement must hold",
    )
    add("--model", default="chatglm2-6b", help="published name, folder or config.json")
    add(
        "--element_bytes",
        type=whole(1, 8),
        default=2,
        help="of a weight: 2 in half precision, 4 in fp32",
    )
    add("--traces", default="../shared/data/traces", help="folder of the recorded traces")
    add(
        "--uellm_data",
        default="../shared/data/uellm",
        help="folder of UELLM's recorded lengths and logs",
    )
    add(
        "--experiment",
        choices=("uellm", "trace"),
        help="run this one of serving.simulate.experiments; of the other flags it reads --seeds, "
        "--requests, --predictor and folders",
    )
    add(
        "--search", choices=sorted(SPACES), help="look for this policy's knobs instead of comparing"
    )
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


def run_simulation(args: argparse.Namespace, names: list[str]) -> None:
    setting, rates = make_setting(args), args.rate
    if args.experiment:
        from serving.simulate.experiments import EXPERIMENTS

        tables = EXPERIMENTS[args.experiment](args)
        if args.json:
            write_json(args.json, {"settings": printable(args), "tables": tables})
        return
    if args.search:
        for policy, got in search(
            POLICIES[args.search], SPACES[args.search], scorer(setting, rates, args.seeds)
        ):
            print(f"{got:.4f}  {policy}", flush=True)
        return
    policies = {name: POLICIES[name] for name in names}
    rows = compare(policies, setting, rates, args.seeds)
    print_table(rows)
    if args.json:
        knobs = {name: knobs_of(policy) for name, policy in inner_of(policies).items()}
        write_json(args.json, {"settings": printable(args), "policies": knobs, "rows": rows})
    if args.plots:
        for path in plot(rows, policies, setting, args.plots):
            print(f"wrote {path}", file=sys.stderr)


def printable(args: argparse.Namespace) -> dict:
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }


def knobs_of(policy: Policy) -> dict:
    """A policy's fields and their values; none of one that is a plain function."""
    if not is_dataclass(policy):
        return {}
    return {field.name: getattr(policy, field.name) for field in fields(policy)}


def inner_of(policies: dict[str, Policy]) -> dict:
    return {name: p.batching if isinstance(p, Static) else p for name, p in policies.items()}


if __name__ == "__main__":
    sys.exit(main())
