"""Where a model's layers go, and what that costs: python -m serving.deployment."""

import argparse

from chatglm.commands import Parser, run_command, whole
from finetune.files import write_json
from finetune.memory.shapes import shape_source
from serving.cost_model.devices import MOST_DEVICES, Cluster
from serving.cost_model.model import ModelShape, Profile, read_profile
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Need


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="serving.deployment", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model", default="chatglm2-6b", help="published name, folder or config.json [chatglm2-6b]"
    )
    add(
        "--device",
        help="of serving/cost_model/devices.py, or a .json file (default: the profile's)",
    )
    add("--gpus", type=whole(1, MOST_DEVICES), help="how many of them [1]")
    add("--cluster", help="instead of --device and --gpus: a .json file of devices and links")
    add(
        "--profile",
        default="datasheet",
        help="calibrated coefficients: a name of serving/cost_model/profiles, or a .json file "
        "[datasheet]",
    )
    add("--deployer", default="helr", choices=tuple(DEPLOYERS))
    add(
        "--need_tokens",
        type=whole(),
        default=20_000,
        help="KV tokens at the predicted q90 that must fit [20000]",
    )
    for name, default in (("batch", 1), ("prompt_tokens", 35), ("output_tokens", 256)):
        add(
            f"--{name}",
            type=whole(),
            default=default,
            help=f"of the batch whose latency counts [{default}]",
        )
    add("--picture", help="draw each device's memory into this file")
    add("--json", help="write what is printed here too")
    args = parser.parse_args(argv)
    if args.cluster and (args.device or args.gpus):
        parser.error("--cluster says which devices there are: leave out --device and --gpus")
    return run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    profile = read_profile(args.profile)
    cluster = make_cluster(args, profile)
    model = ModelShape.from_config(args.model)
    need = Need(args.need_tokens, args.batch, args.prompt_tokens, args.output_tokens)
    placement = DEPLOYERS[args.deployer].place(model, cluster, need, profile)
    print(f"model: {shape_source(args.model)}")
    print(placement.describe())
    if args.json:
        write_json(args.json, placement.report())
    if args.picture:
        placement.picture(args.picture)


def make_cluster(args: argparse.Namespace, profile: Profile) -> Cluster:
    count = args.gpus or 1
    if args.cluster:
        return Cluster.from_json(args.cluster)
    if args.device:
        return Cluster.uniform(args.device, count)
    return profile.cluster(count)
