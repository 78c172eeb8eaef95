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
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from chatglm.commands import Parser, number, run_command, whole
from finetune.files import write_json
from serving.cost_model.devices import MAX_DEVICES
from serving.policies.continuous import OBJECTIVE_HELP, POLICY_HELP, SIMULATED, with_objective
from serving.policies.gittins import OBJECTIVES
from serving.policies.static import BatchPolicy, Static
from serving.request import CostEstimator, Limits, Policy
from serving.simulate.compare import (
    SPACES,
    ComparisonSetting,
    attainment_scorer,
    compare_policies,
    print_comparison,
    search_knobs,
)
from serving.simulate.engine import LinearCost
from serving.simulate.workload import WORKLOADS, PredictorModel, SloRule

GPUS, DEPLOYER = 1, "helr"  # the defaults


@dataclass(frozen=True)
class SimulationFlags:
    """The flags of the command; `simulation_parser` has their meaning and defaults."""

    policies: str
    objective: str | None
    workload: str
    rate: list[float]
    requests: int
    seeds: int
    slo_scale: float
    slo_floor_s: float
    slo_length: str
    predictor: str | None
    predictor_sigma: float
    predict_s: float
    reread_tau: float | None
    longest_answer: int
    max_batch: int
    kv_tokens: int | None
    max_tokens: int
    prefill_tokens: int
    profile: str | None
    device: str | None
    gpus: int
    deployer: str
    need_tokens: int
    model: str
    element_bytes: int
    traces: str
    uellm_data: str | None
    experiment: str | None
    search: str | None
    json: Path | None
    plots: Path | None

    def printable(self) -> dict[str, Any]:
        """By name, with paths as text."""
        values = {}
        for name, value in vars(self).items():
            values[name] = str(value) if isinstance(value, Path) else value
        return values


def parse_rates(text: str) -> list[float]:
    """Requests a second, with commas between them."""
    return list(map(number(1e-6, 1e6), text.split(",")))


def make_cost(flags: SimulationFlags) -> tuple[CostEstimator, int]:
    """(cost model, replicas).

    With --profile or --device the calibrated model of serving.cost_model, placed by --deployer;
    else LinearCost.
    """
    if flags.device or flags.profile:
        return make_placed_cost(flags)
    if flags.gpus != GPUS:
        raise ValueError("--gpus goes with --profile or --device")
    if flags.deployer != DEPLOYER:
        raise ValueError("--deployer goes with --profile or --device")
    if flags.kv_tokens:
        return replace(LinearCost(), kv_capacity_tokens=flags.kv_tokens), 1
    return LinearCost(), 1


def make_placed_cost(flags: SimulationFlags) -> tuple[CostEstimator, int]:
    """(cost model of one replica, replicas) of the calibrated model, placed by --deployer."""
    from serving.cost_model.devices import Cluster
    from serving.cost_model.model import CostModel, ModelSizes, read_profile
    from serving.deployment.deployers import DEPLOYERS
    from serving.deployment.placement import Need

    profile = read_profile(flags.profile or "datasheet")
    if flags.device:
        cluster = Cluster.uniform(flags.device, flags.gpus)
    else:
        cluster = profile.cluster(flags.gpus)
    model = ModelSizes.from_config(flags.model, flags.element_bytes)
    need = Need(flags.need_tokens)
    placement = DEPLOYERS[flags.deployer].place(model, cluster, need, profile)
    return CostModel.of(placement.model, placement, profile), placement.replicas


def make_setting(flags: SimulationFlags) -> ComparisonSetting:
    cost, replicas = make_cost(flags)
    kv_tokens = flags.kv_tokens or cost.kv_capacity_tokens
    max_tokens = min(flags.max_tokens, kv_tokens)
    if flags.predictor:
        predictor = PredictorModel.from_card(flags.predictor, flags.longest_answer)
    else:
        predictor = PredictorModel.normal(flags.predictor_sigma, flags.longest_answer)
    return ComparisonSetting(
        flags.workload,
        flags.requests,
        cost,
        Limits(flags.max_batch, kv_tokens, max_tokens, flags.prefill_tokens),
        SloRule(flags.slo_scale, flags.slo_floor_s, flags.slo_length),
        predictor,
        flags.predict_s,
        flags.traces,
        replicas,
        flags.reread_tau,
    )


def simulation_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="serving.simulate", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--policies",
        default="fifo,s3,slo_odbs,fcfs,sjf,deadline,oracle",
        help=f"comma list of {', '.join(SIMULATED)}: {POLICY_HELP} "
        "[fifo,s3,slo_odbs,fcfs,sjf,deadline,oracle]",
    )
    add("--objective", choices=tuple(OBJECTIVES), help=OBJECTIVE_HELP)
    workload = "arrivals: Poisson, gamma (bursts), or a recorded trace [poisson]"
    add("--workload", default="poisson", choices=WORKLOADS, help=workload)
    add(
        "--rate",
        type=parse_rates,
        default="8",
        help="requests per second; a comma list gives a load sweep [8]",
    )
    add("--requests", type=whole(1, 10_000_000), default=2000, help="of each run [2000]")
    add("--seeds", type=whole(1, 10_000), default=5, help="runs with seeds 0, 1, ... [5]")
    add(
        "--slo_scale",
        type=number(0, above=True),
        default=5.0,
        help="SLO of a request: this times its latency alone on the engine [5]",
    )
    add("--slo_floor_s", type=number(0), default=1.0, help="least SLO, in seconds [1]")
    add(
        "--slo_length",
        default="typical",
        choices=("typical", "own"),
        help="latency alone: with the workload's mean answer length, or its own [typical]",
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
        help="without --predictor: standard deviation of the predicted log length's error [0.8]",
    )
    add(
        "--predict_s",
        type=number(0, 1e6),
        default=1e-3,
        help="seconds of one prediction, charged to policies that use predictions [0.001]",
    )
    add(
        "--reread_tau",
        type=number(0, 0.99, above=True),
        help="policies that use predictions get newer ones of running answers every 64 tokens, in "
        "this rank agreement (Kendall's tau) with the tokens left; predictor.evaluate prints it of "
        "a predictor of --backbone states [off]",
    )
    add(
        "--longest_answer",
        type=whole(2, 10_000_000),
        default=2048,
        help="longest answer the predictor reckons with, in tokens [2048]",
    )
    add("--max_batch", type=whole(), default=64, help="largest batch, in requests [64]")
    add("--kv_tokens", type=whole(2), help="KV cache in tokens; default: the cost model's capacity")
    add(
        "--max_tokens",
        type=whole(2),
        default=8192,
        help="longest prompt and answer; longer requests of a trace are left out [8192]",
    )
    add(
        "--prefill_tokens",
        type=whole(),
        default=2048,
        help="prefill budget: prompt tokens computed beside one decode step [2048]",
    )
    add(
        "--profile",
        help="calibrated cost model, such as rtx3090, or a file; "
        "default: straight lines near ChatGLM2-6B on one A100",
    )
    add("--device", help="serving.cost_model's device, such as A100-80G; default: the profile's")
    add("--gpus", type=whole(1, MAX_DEVICES), default=GPUS, help=f"how many of them [{GPUS}]")
    add(
        "--deployer",
        default=DEPLOYER,
        choices=("even", "single", "he", "lr", "helr", "morphling"),
        help=f"what chooses the GPU of each layer; spare GPUs hold replicas [{DEPLOYER}]",
    )
    add(
        "--need_tokens",
        type=whole(0),
        default=20_000,
        help="KV cache a placement must have room for, in tokens [20000]",
    )
    model = "published name, folder or config.json [chatglm2-6b]"
    add("--model", default="chatglm2-6b", help=model)
    add(
        "--element_bytes",
        type=whole(1, 8),
        default=2,
        help="bytes per weight: 2 in half precision, 4 in fp32 [2]",
    )
    add("--traces", default="../shared/data/traces", help="folder of the recorded traces")
    add(
        "--uellm_data",
        metavar="FOLDER",
        help="UELLM's recorded lengths, or dataset/ of its clone (default: ../shared/data/uellm "
        "where that is, else a substitute, which the output says)",
    )
    add(
        "--experiment",
        choices=("uellm", "trace"),
        help="run this one of serving.simulate.experiments; of the other flags it reads --seeds, "
        "--requests, --predictor and folders",
    )
    add("--search", choices=sorted(SPACES), help="search this policy's knobs instead of comparing")
    add("--json", type=Path, help="write the table here too")
    add("--plots", type=Path, help="write attainment, latency and queue plots into this folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = simulation_parser()
    flags = SimulationFlags(**vars(parser.parse_args(argv)))
    names = list(filter(None, flags.policies.split(",")))
    if unknown := [name for name in names if name not in SIMULATED]:
        parser.error(f"--policies: {', '.join(unknown)} unknown; there are {', '.join(SIMULATED)}")
    if not names:
        parser.error(f"--policies: name at least one of {', '.join(SIMULATED)}")
    try:
        names = with_objective(names, flags.objective)
    except ValueError as error:
        parser.error(str(error))
    return run_command(parser.prog, lambda: run_simulation(flags, names))


def run_simulation(flags: SimulationFlags, names: list[str]) -> None:
    """An experiment, a search, or the comparison of the named policies."""
    setting = make_setting(flags)
    if flags.experiment:
        run_experiment(flags, flags.experiment)
    elif flags.search:
        policy, score = SIMULATED[flags.search], attainment_scorer(setting, flags.rate, flags.seeds)
        for better, reached in search_knobs(policy, SPACES[flags.search], score):
            print(f"{reached:.4f}  {better}", flush=True)
    else:
        run_comparison(flags, setting, {name: SIMULATED[name] for name in names})


def run_experiment(flags: SimulationFlags, name: str) -> None:
    from serving.simulate.experiment_common import ExperimentFlags
    from serving.simulate.experiments import EXPERIMENTS

    tables = EXPERIMENTS[name](
        ExperimentFlags(
            flags.seeds, flags.requests, flags.predictor, flags.uellm_data, flags.traces
        )
    )
    if flags.json:
        write_json(flags.json, {"settings": flags.printable(), "tables": tables})


def run_comparison(
    flags: SimulationFlags, setting: ComparisonSetting, policies: dict[str, Policy]
) -> None:
    rows = compare_policies(policies, setting, flags.rate, flags.seeds)
    print_comparison(rows)
    if flags.json:
        knobs = {name: knobs_of(policy) for name, policy in policies.items()}
        write_json(flags.json, {"settings": flags.printable(), "policies": knobs, "rows": rows})
    if flags.plots:
        from serving.simulate.plots import write_plots

        for path in write_plots(rows, policies, setting, flags.plots):
            print(f"wrote {path}", file=sys.stderr)


def knobs_of(policy: Policy | BatchPolicy) -> dict[str, Any]:
    """The fields of a policy, or of a static one's batching; none of a plain function."""
    inner = policy.batching if isinstance(policy, Static) else policy
    if not is_dataclass(inner):
        return {}
    return {field.name: getattr(inner, field.name) for field in fields(inner)}


if __name__ == "__main__":
    sys.exit(main())
