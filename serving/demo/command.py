"""Serving on paper in a second: requests, GPUs, where the layers go, batches, and a schedule.

python -m serving.demo

Nothing is downloaded, no model is loaded: a cost model fitted to RTX 3090s gives the seconds, the
lengths are of the demo. What it prints is made by the same policies, deployers and scheduler as
serve a model.
"""

import argparse
import sys
from collections.abc import Sequence

from chatglm.commands import Parser, run_command, whole
from serving.cost_model.devices import GIB, Cluster, Device
from serving.cost_model.model import CostModel, ModelSizes, read_profile
from serving.demo.requests import DEMO_REQUESTS, LIMITS, DemoWorkload
from serving.deployment.command import with_free_memory
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.packing import ModelToPack, describe_packing, pack_models
from serving.deployment.placement import Need, Placement
from serving.run_requests.figures import PolicyRun
from serving.simulate.experiment_common import TableRow, print_markdown

PROG = "serving.demo"
PROFILE, MODEL, DEPLOYER = "rtx3090", "chatglm2-6b", "helr"
GPUS = ("RTX3090", "RTX3090", "A40")
STATIC, CONTINUOUS = ("uellm_baseline", "slo_odbs"), ("fcfs", "deadline")
PACKED = (("chatglm-6b", 16_000), ("chatglm2-6b", 32_000), ("chatglm3-6b", 64_000))
FREE_GIB = "24,15,40"  # something lies on the second GPU already
WIDTH = 60  # columns of the schedule's chart


def demo_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    drawn = "of the predictions' errors [0]"
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help=drawn)
    return parser


def section(title: str) -> None:
    print(f"\n== {title}")


def show_requests(workload: DemoWorkload) -> None:
    section("1. Requests, all there at 0 s, and what a predictor says of their answers")
    rows: list[TableRow] = []
    for request, one in zip(workload.requests, workload.given):
        assert request.prediction is not None
        rows.append(
            {
                "row": request.id + 1,
                "prompt": one.prompt,
                "prompt tokens": one.prompt_tokens,
                "predicted": round(request.prediction.expected_tokens),
                "90 % within": round(request.prediction.quantile(0.9)),
                "true tokens": one.output_tokens,
                "SLO s": one.slo_s,
            }
        )
    print_markdown("No policy sees the true lengths.", rows)


def show_devices(devices: Sequence[Device]) -> None:
    section("2. GPUs")
    for number, device in enumerate(devices):
        print(
            f"{number} {device.name}: {device.memory_bytes / GIB:.0f} GiB, "
            f"{device.bandwidth_bytes_s / 1e9:.0f} GB/s, {device.flops_s / 1e12:.0f} TFLOP/s"
        )


def place_one(cluster: Cluster) -> Placement:
    """The model's layers on the GPUs, printed."""
    section(f"3. One model: {MODEL}, where {DEPLOYER} puts its layers")
    profile = read_profile(PROFILE)
    need = Need(kv_tokens_q90=LIMITS.kv_tokens, batch=LIMITS.max_batch)
    placement = DEPLOYERS[DEPLOYER].place(ModelSizes.from_config(MODEL), cluster, need, profile)
    for line in placement.describe().splitlines():
        if not line.startswith(("device_map", "vLLM")):  # long; serving.deployment prints them
            print(line)
    return placement


def pack_several(cluster: Cluster) -> None:
    section(f"4. Several models, best fit decreasing, where {FREE_GIB} GiB are free")
    devices = with_free_memory(cluster, FREE_GIB)
    models = []
    for name, kv_tokens in PACKED:
        models.append(ModelToPack(name, ModelSizes.from_config(name), Need(kv_tokens)))
    print(describe_packing(pack_models(models, devices), devices))


def show_batches(runs: Sequence[PolicyRun]) -> None:
    section("5. Batches: which rows run together, by two static policies")
    for run in runs:
        print("\n".join(run.group_lines()))


def show_schedule(run: PolicyRun) -> None:
    """A line for each request: when it waited, and when it was answered."""
    section(f"6. The schedule of {run.name}, which admits rows one by one (. waits, # is answered)")
    span = run.figures["total_s"] or 1.0
    print(f"{'row':>3}  0 s{'':{WIDTH - 9}}{span:4.0f} s")
    for row in run.requests:
        start = round(WIDTH * row["queue_s"] / span)
        end = max(start + 1, round(WIDTH * row["latency_s"] / span))
        bar = "." * start + "#" * (end - start)
        late = "" if row["in_time"] else f"  late: {row['latency_s']:.1f} of {row['slo_s']:g} s"
        print(f"{row['row']:3}  {bar:<{WIDTH}}{late}".rstrip())


def run_demo(seed: int) -> None:
    """Print the whole demo."""
    workload = DemoWorkload.of(DEMO_REQUESTS, seed)
    cluster = Cluster.uniform(GPUS)
    show_requests(workload)
    show_devices(cluster.devices)
    placement = place_one(cluster)
    pack_several(cluster)
    cost = CostModel.of(placement.model, placement, read_profile(PROFILE))
    runs = {name: workload.run(name, cost) for name in (*STATIC, *CONTINUOUS)}
    show_batches([runs[name] for name in STATIC])
    show_schedule(runs[CONTINUOUS[-1]])
    section("7. What each policy made of it")
    title = f"{len(DEMO_REQUESTS)} requests on one replica of {MODEL}, simulated; default: too late"
    print_markdown(title, [run.table_row() for run in runs.values()])
    print()
    print(runs[CONTINUOUS[-1]].memory_line())
    print(
        "\nYour own requests on your own model: python -m serving.run_requests LIST --model DIR\n"
        "Larger loads without a model:        python -m serving.simulate --help"
    )


def main(argv: list[str] | None = None) -> int:
    flags = demo_parser().parse_args(argv)
    return run_command(PROG, lambda: run_demo(flags.seed))


if __name__ == "__main__":
    sys.exit(main())
