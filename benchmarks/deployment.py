"""What the deployer predicts of a model on this machine's devices, against what the engine takes.

    python benchmarks/deployment.py --tokenizer DIR --hidden 512,1024 --json output/deployment.json

For random models of `--layers` layers: bytes and seconds of every stage on each of `--devices`, and
HELR's choice against equal shares on the last of them. Seconds are the least of a few repetitions,
predicted and taken: other work on the machine only adds.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command
from finetune.files import write_json
from finetune.placing import PlacementFlags
from scripts.prepare_small_model import make_model
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Need
from serving.engines.answers import TextEngine
from serving.engines.arena import slab_tokens
from serving.engines.pipeline import open_pipeline
from serving.engines.stage_reports import ModelLoading
from serving.replicas.measuring import BatchRunner, BatchTiming, cost_of, limits_of, time_batch
from serving.replicas.planning import DeploymentPlan, make_plan, plan_deployment
from serving.replicas.served_sizes import ServedSizes

DEVICES = "cpu@1;cpu@1,cpu@1;cpu@2,cpu@1"


@dataclass(frozen=True)
class StageRow:
    """One stage, predicted and taken."""

    model: str
    devices: str
    stage: int
    device: str
    layers: str
    weight_bytes: tuple[int, int]
    kv_bytes: tuple[int, int]
    prefill_s: tuple[float, float]
    decode_s: tuple[float, float]

    @property
    def worst(self) -> float:
        """The largest relative error of weights and seconds."""
        errors = []
        for said, took in (self.weight_bytes, self.prefill_s, self.decode_s):
            errors.append(abs(said / took - 1))
        return max(errors)


@dataclass(frozen=True)
class WholeRow:
    """A whole batch: seconds by the cost model, and by the engine."""

    model: str
    devices: str
    deployer: str
    layers: str
    predicted_s: float
    taken_s: float


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="deployment.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="folder of a tokenizer of the family")
    add("--family", default="glm2", help="of the random models [glm2]")
    add("--hidden", default="512,1024", help="widths of the random models [512,1024]")
    add("--layers", type=int, default=8, help="[8]")
    add("--devices", default=DEVICES, help=f"lists of devices, with semicolons [{DEVICES}]")
    add("--batch", type=int, default=4, help="[4]")
    add("--prompt_tokens", type=int, default=128, help="[128]")
    add("--output_tokens", type=int, default=48, help="[48]")
    add("--repetitions", type=int, default=3, help="[3]")
    add("--json", help="write the rows here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


def flags_of(devices: str, deployer: str) -> PlacementFlags:
    return PlacementFlags(
        deployer=deployer,
        num_gpus=None,
        devices=devices,
        device_map=None,
        cluster=None,
        profile=None,
        measure=False,
        measure_s=1.0,
    )


def planned(folder: Path, devices: str, deployer: str, need: Need) -> DeploymentPlan:
    return plan_deployment(
        flags_of(devices, deployer),
        str(folder),
        kv_tokens=need.kv_tokens_q90,
        batch=need.batch,
        prompt_tokens=need.prompt_tokens,
        output_tokens=need.output_tokens,
    )


@contextlib.contextmanager
def opened(folder: Path, found: DeploymentPlan) -> Iterator[TextEngine]:
    """The engine of a plan's first replica, one micro-batch, so that stages do not overlap."""
    engine = open_pipeline(
        ModelLoading(str(folder)),
        found.replicas[0],
        limits_of(found.placement.need),
        cost_of(found.placement, found.profile),
        stop_ids=[],
        micro_batches=1,
    )
    try:
        yield engine
    finally:
        engine.close()


def stage_rows(
    model: str, devices: str, found: DeploymentPlan, took: BatchTiming, weights: Sequence[int]
) -> list[StageRow]:
    rows = []
    for i, said in enumerate(found.stages):
        rows.append(
            StageRow(
                model,
                devices,
                i,
                said.device,
                f"{said.start}-{said.end - 1}",
                (said.weight_bytes, weights[i]),
                (said.kv_bytes, took.kv_bytes[i]),
                (said.prefill_s, took.stages[i].prefill_s),
                (said.decode_s, took.stages[i].decode_s),
            )
        )
    return rows


def print_stages(rows: Sequence[StageRow]) -> None:
    print(
        f"{'model':>8} {'devices':14} {'stage':>5} {'layers':7} {'weights MB':>15} "
        f"{'KV MB':>13} {'prefill ms':>17} {'step ms':>15} {'worst':>6}"
    )
    for row in rows:
        weights, kv = (pair(values, 1e-6) for values in (row.weight_bytes, row.kv_bytes))
        prefill, decode = (pair(values, 1e3) for values in (row.prefill_s, row.decode_s))
        print(
            f"{row.model:>8} {row.devices:14} {row.stage:5} {row.layers:7} {weights:>15} "
            f"{kv:>13} {prefill:>17} {decode:>15} {row.worst:6.1%}"
        )


def pair(values: tuple[float, float], scale: float) -> str:
    """Predicted and taken."""
    return f"{values[0] * scale:.1f} {values[1] * scale:.1f}"


def compare_helr(folder: Path, model: str, devices: str, even: DeploymentPlan) -> list[WholeRow]:
    """The need's batch by HELR's placement and by equal shares, predicted and taken."""
    rows = []
    cluster, need, profile = even.placement.cluster, even.placement.need, even.profile
    placement = DEPLOYERS["helr"].place(even.placement.model, cluster, need, profile)
    plans = {"helr": make_plan(placement, profile, ServedSizes(placement.model)), "even": even}
    for deployer, found in plans.items():
        with opened(folder, found) as engine:
            runner = BatchRunner(engine, need)
            seconds = [need.batch / runner.requests_s() for _ in range(3)]
        layers = "|".join(f"{stage.device}:{stage.end - stage.start}" for stage in found.stages)
        said = found.placement.expected_latency_s
        rows.append(WholeRow(model, devices, deployer, layers, said, min(seconds)))
    return rows


def run(args: argparse.Namespace) -> None:
    # As the engine allocates them: in length classes.
    tokens = args.batch * slab_tokens(args.prompt_tokens + args.output_tokens)
    need = Need(tokens, args.batch, args.prompt_tokens, args.output_tokens)
    stages: list[StageRow] = []
    wholes: list[WholeRow] = []
    lists = args.devices.split(";")
    for hidden in map(int, args.hidden.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_model(
                args.family,
                args.tokenizer,
                Path(temporary, "model"),
                hidden_size=hidden,
                num_layers=args.layers,
                heads=8,
                ffn=round(2.7 * hidden),
            )
            for devices in lists:
                found = planned(folder, devices, "even", need)
                with opened(folder, found) as engine:
                    took = time_batch(engine, need, args.repetitions)
                    weights = [report.weight_bytes for report in engine.stage_reports()]
                stages += stage_rows(str(hidden), devices, found, took, weights)
                print_stages(stages[-len(found.stages) :])
            wholes += compare_helr(folder, str(hidden), lists[-1], found)
    print_stages(stages)
    for row in wholes:
        print(
            f"{row.model:>8} {row.devices} {row.deployer:5} {row.layers:24} predicted "
            f"{row.predicted_s:.3f} s, taken {row.taken_s:.3f} s"
        )
    if args.json:
        rows = {"stages": list(map(asdict, stages)), "wholes": list(map(asdict, wholes))}
        write_json(args.json, rows)


if __name__ == "__main__":
    sys.exit(main())
