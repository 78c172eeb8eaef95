"""Where a model's layers go, and what that costs: python -m serving.deployment."""

from dataclasses import dataclass, replace

from chatglm.commands import Parser, run_command, whole
from finetune.files import write_json
from finetune.memory.shapes import shape_source
from serving.cost_model.devices import GIB, MAX_DEVICES, Cluster, Device
from serving.cost_model.model import ModelSizes, Profile, read_profile
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.packing import ModelToPack, describe_packing, pack_models
from serving.deployment.placement import Need


@dataclass(frozen=True)
class DeploymentFlags:
    """The flags of the command; `main` has their meaning and defaults."""

    model: str
    device: str | None
    gpus: int | None
    cluster: str | None
    profile: str
    deployer: str
    need_tokens: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    picture: str | None
    json: str | None
    pack: str | None
    free_gib: str | None


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="serving.deployment", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--model", default="chatglm2-6b", help="published name, folder or config.json [chatglm2-6b]"
    )
    add(
        "--device",
        help="of serving/cost_model/devices.py, or a .json file (default: the profile's)",
    )
    add("--gpus", type=whole(1, MAX_DEVICES), help="how many of them [1]")
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
    add(
        "--pack",
        metavar="MODELS",
        help="instead of --model: several, with commas, each perhaps with @KV_TOKENS; they are "
        "packed on the devices (best fit decreasing)",
    )
    add(
        "--free_gib",
        metavar="LIST",
        help="with --pack: free memory of each device, in GiB, where something lies there already",
    )
    args = parser.parse_args(argv)
    if args.cluster and (args.device or args.gpus):
        parser.error("--cluster says which devices there are: leave out --device and --gpus")
    if args.free_gib and not args.pack:
        parser.error("--free_gib is of --pack")
    if args.pack and args.picture:
        parser.error("--picture draws one placement: leave out --pack")
    flags = DeploymentFlags(**vars(args))
    return run_command(parser.prog, lambda: (pack if flags.pack else place_model)(flags))


def place_model(flags: DeploymentFlags) -> None:
    profile = read_profile(flags.profile)
    cluster = make_cluster(flags, profile)
    model = ModelSizes.from_config(flags.model)
    need = Need(flags.need_tokens, flags.batch, flags.prompt_tokens, flags.output_tokens)
    placement = DEPLOYERS[flags.deployer].place(model, cluster, need, profile)
    print(f"model: {shape_source(flags.model)}")
    print(placement.describe())
    if flags.json:
        write_json(flags.json, placement.report())
    if flags.picture:
        placement.draw(flags.picture)


def pack(flags: DeploymentFlags) -> None:
    """Print where each of several models goes."""
    assert flags.pack
    devices = with_free_memory(make_cluster(flags, read_profile(flags.profile)), flags.free_gib)
    models = []
    for text in flags.pack.split(","):
        name, _, tokens = text.strip().partition("@")
        if tokens and not tokens.isdecimal():
            raise ValueError(f"--pack: {text!r}: KV tokens must be a whole number, got {tokens!r}")
        need = Need(int(tokens or flags.need_tokens), flags.batch)
        models.append(ModelToPack(name, ModelSizes.from_config(name), need))
    packed = pack_models(models, devices)
    print(describe_packing(packed, devices))
    if flags.json:
        rows = []
        for each in packed:
            rows.append({"model": each.model.name, "stages": each.stages, "bytes": each.bytes_on})
        write_json(flags.json, rows)


def with_free_memory(cluster: Cluster, free_gib: str | None) -> list[Device]:
    """The cluster's devices, with only so many GiB free. Raises ValueError."""
    if free_gib is None:
        return list(cluster.devices)
    try:
        sizes = [float(text) for text in free_gib.split(",")]
    except ValueError:
        raise ValueError(f"--free_gib: wanted numbers with commas, got {free_gib!r}") from None
    if len(sizes) != len(cluster.devices):
        raise ValueError(
            f"--free_gib gives {len(sizes)} device(s), there are {len(cluster.devices)}"
        )
    devices = []
    for device, size in zip(cluster.devices, sizes):
        if not 0 < size * GIB <= device.memory_bytes:
            most = device.memory_bytes / GIB
            raise ValueError(f"--free_gib: {device.name} has up to {most:.4g} GiB, got {size:g}")
        devices.append(replace(device, memory_bytes=round(size * GIB)))
    return devices


def make_cluster(flags: DeploymentFlags, profile: Profile) -> Cluster:
    count = flags.gpus or 1
    if flags.cluster:
        return Cluster.from_json(flags.cluster)
    if flags.device:
        return Cluster.uniform(flags.device, count)
    return profile.cluster(count)
