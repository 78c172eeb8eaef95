"""From flags to a placement that processes can load, and how true its predictions were.

plan = plan_replicas(flags, folder, kv_tokens=16384, batch=8)   # finetune.placing
print(plan.describe())
for replica in plan.replicas: ...                               # each in processes of its own
print(comparison(plan, engine.stage_reports()))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatglm.files import read_json
from finetune.placing import PlacementFlags, ReplicaSpec, StageSpec
from serving.cost_model import model as cm
from serving.cost_model.devices import Cluster, Device
from serving.cost_model.model import CostModel, Profile, read_profile
from serving.deployment.deployers import DEPLOYERS, Morphling
from serving.deployment.placement import (
    MODULES,
    LatencyTerms,
    Need,
    Placement,
    kv_layer_bytes,
    make_placement,
    modules_of,
)
from serving.engines.pipeline import open_pipeline
from serving.engines.stage_reports import ModelLoading, StageReport
from serving.replicas.devices import (
    LocalDevice,
    count_cores,
    count_gpus,
    device_of,
    first_devices,
    joined,
    parse_devices,
    profile_cores,
    scaled_by_threads,
)
from serving.replicas.measuring import StageTiming, StressTester, limits_of
from serving.replicas.probe import ProbeResult, ProbeTask, run_probe
from serving.replicas.served_sizes import ServedSizes, element_bytes_of, served_sizes
from serving.replicas.speeds import (
    fit_first,
    fit_other,
    timed_layers,
    timed_settings,
    with_layers,
    with_speeds,
)

if TYPE_CHECKING:
    from serving.engines.answers import TextEngine


@dataclass(frozen=True)
class StagePrediction:
    """What the deployer expects of one stage.

    Attributes:
        device: as a reader knows it. start, end: its layers, the end not included.
        weight_bytes, kv_bytes: of its layers and ends, and of the need's KV tokens.
        prefill_s: of the need's batch, in one pass. decode_s: of one step of that batch, near the
            beginning of its answers. Neither has the output layer in it.
    """

    device: str
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class DeploymentPlan:
    """A placement on this machine's devices.

    Attributes:
        replicas: what each process, or chain of processes, loads.
        stages: of one replica; all are alike.
        profile: the coefficients of the predictions; `placement.cluster` has the devices.
        measured_s: seconds that measuring the devices took.
        stress_tests, stress_s: of --measure: how many, and the seconds they took.
        rates: (stages, requests/s) of each stress test.
    """

    placement: Placement
    profile: Profile
    replicas: tuple[ReplicaSpec, ...]
    stages: tuple[StagePrediction, ...]
    measured_s: float = 0.0
    stress_tests: int = 0
    stress_s: float = 0.0
    rates: tuple[tuple[tuple[tuple[int, int], ...], float], ...] = ()

    def describe(self) -> str:
        """The placement, and what is predicted of each stage."""
        lines = [self.placement.describe()]
        for number, stage in enumerate(self.stages):
            lines.append(
                f"stage {number} on {stage.device}, layers {stage.start}-{stage.end - 1}: "
                f"{stage.weight_bytes:,} bytes of weights, {stage.kv_bytes:,} of KV; "
                f"{1000 * stage.prefill_s:.4g} ms a prefill, {1000 * stage.decode_s:.4g} ms a step"
            )
        if self.measured_s:
            lines.append(f"devices measured in {self.measured_s:.1f} s")
        if self.stress_tests:
            lines.append(f"{self.stress_tests} stress test(s) in {self.stress_s:.1f} s:")
        for stages, rate in self.rates:
            parts = []
            for device, layers in stages:
                parts.append(f"{layers} layers on {self.placement.cluster.devices[device].label}")
            lines.append(f"  {', '.join(parts)}: {rate:.4g} requests/s")
        return "\n".join(lines)


def plan_deployment(
    flags: PlacementFlags,
    folder: str,
    *,
    kv_tokens: int,
    batch: int,
    prompt_tokens: int = 256,
    output_tokens: int = 256,
    precision: str = "auto",
    base: str | None = None,
    keep_quantized: bool = False,
) -> DeploymentPlan:
    """The plan of `finetune.placing.plan_replicas`, whose arguments these are.

    Raises:
        ValueError: the flags contradict each other, a device is not there, or nothing fits.
    """
    check_placement_flags(flags)
    gpus, cores = count_gpus(), count_cores()
    need = Need(kv_tokens, batch, prompt_tokens, output_tokens)
    cluster_file = Cluster.from_json(flags.cluster) if flags.cluster else None
    kind = "cuda" if gpus else "cpu"
    if cluster_file is not None:
        kind = cluster_file.devices[0].kind
    elif flags.devices:
        kind = parse_devices(flags.devices, gpus, cores)[0].kind
    width = element_bytes_of(precision, kind == "cuda")
    sizes = served_sizes(folder, base=base, element_bytes=width, keep_quantized=keep_quantized)
    need = replace(need, kv_tokens_q90=kv_tokens + batch * sizes.virtual_tokens)
    measured_s = 0.0
    if cluster_file is not None:
        cluster = first_of(cluster_file, flags.num_gpus)
        profile = read_profile(flags.profile or "datasheet")
    else:
        if flags.devices:
            devices = parse_devices(flags.devices, gpus, cores)
        else:
            devices = first_devices(flags.num_gpus, gpus, cores)
        task = ProbeTask(
            tuple(dict.fromkeys(device.name for device in devices)),
            links=len(devices) > 1,
            folder=folder,
            base=base,
            precision=precision,
            keep_quantized=keep_quantized,
        )
        cluster, profile, measured_s = measured_cluster(devices, task, sizes, need, flags.profile)
    if flags.measure:
        loading = ModelLoading(
            folder, base=base, precision=precision, keep_quantized=keep_quantized
        )
        return stress_tested(loading, flags.measure_s, sizes, cluster, need, profile, measured_s)
    placement = place(flags, sizes, cluster, need, profile)
    return make_plan(placement, profile, sizes, measured_s)


def stress_tested(
    loading: ModelLoading,
    budget_s: float,
    sizes: ServedSizes,
    cluster: Cluster,
    need: Need,
    profile: Profile,
    measured_s: float,
) -> DeploymentPlan:
    """Morphling's plan, whose stress tests load each configuration and run the need's batch."""

    def opened(placement: Placement) -> "TextEngine":
        replica = make_plan(placement, profile, sizes).replicas[0]
        cost = CostModel(sizes.model, cluster, placement.stages, profile)
        return open_pipeline(loading, replica, limits_of(need), cost, stop_ids=[])

    tester = StressTester(opened, budget_s)
    placement = Morphling(stress_test=tester).place(sizes.model, cluster, need, profile)
    found = make_plan(placement, profile, sizes, measured_s)
    return replace(found, stress_tests=tester.tests, stress_s=tester.seconds, rates=tester.rates)


def check_placement_flags(flags: PlacementFlags) -> None:
    """Raises ValueError for flags that contradict each other."""
    pairs = (
        ("--num_gpus", flags.num_gpus, "--devices", flags.devices),
        ("--device_map", flags.device_map, "--deployer", flags.deployer),
        ("--cluster", flags.cluster, "--devices", flags.devices),
    )
    for name, value, other, other_value in pairs:
        if value and other_value:
            raise ValueError(f"{name} and {other} contradict each other: give one of them")
    if flags.measure and flags.deployer != "morphling":
        raise ValueError("--measure is of --deployer morphling, whose stress tests it makes real")
    if flags.measure and not flags.measure_s > 0:
        raise ValueError(f"--measure_s must be above 0, got {flags.measure_s:g}")


def first_of(cluster: Cluster, count: int | None) -> Cluster:
    """The first `count` devices of a cluster; None: all. Raises ValueError where it has fewer."""
    if count is None:
        return cluster
    if count > len(cluster.devices):
        raise ValueError(f"--num_gpus {count}: --cluster has {len(cluster.devices)} device(s)")
    links = tuple(row[:count] for row in cluster.links[:count])
    return Cluster(cluster.devices[:count], links)


def measured_cluster(
    devices: Sequence[LocalDevice],
    task: ProbeTask,
    sizes: ServedSizes,
    need: Need,
    profile_name: str | None,
) -> tuple[Cluster, Profile, float]:
    """(cluster, profile, seconds that measuring took); a profile that is given is not measured."""
    if profile_name is None:
        task = replace(task, settings=timed_settings(need), layers=timed_layers(sizes.model))
    needs_probe = profile_name is None or task.links or devices[0].kind == "cuda"
    probed = run_probe(task) if needs_probe else ProbeResult()
    given: Device | None = None
    if profile_name is not None:
        profile = read_profile(profile_name)
        given = profile.cluster(1).devices[0]
    found = [device_of(device, devices, probed, given) for device in devices]
    if profile_name is not None:
        if found[0].kind == "cpu":
            cores = profile_cores(profile, count_cores())
            found = [scaled_by_threads(device, cores) for device in found]
        return joined(found, devices, probed), profile, probed.seconds
    timed = with_layers(sizes.model, task.layers)
    by_name = dict(zip((device.name for device in devices), found))
    for name, device in by_name.items():
        by_name[name] = with_speeds(timed, device, probed.rows[name])
    order = sorted(by_name, key=lambda name: -(by_name[name].threads or 0))
    first = order[0]
    profile = fit_first(timed, by_name[first], probed.rows[first])
    for name in order[1:]:
        by_name[name] = fit_other(timed, by_name[name], probed.rows[name], profile)
    found = [by_name[device.name] for device in devices]
    return joined(found, devices, probed), profile, probed.seconds


def place(
    flags: PlacementFlags, sizes: ServedSizes, cluster: Cluster, need: Need, profile: Profile
) -> Placement:
    """The placement that the flags ask for."""
    model = sizes.model
    if flags.device_map and flags.device_map != "auto":
        stages = read_device_map(flags.device_map, model, cluster)
        terms = LatencyTerms(model, cluster, need, profile)
        return make_placement(terms, stages, profile, 1, "device_map")
    name = "even" if flags.device_map == "auto" else flags.deployer or "helr"
    return DEPLOYERS[name].place(model, cluster, need, profile)


def read_device_map(path: str, model: cm.ModelSizes, cluster: Cluster) -> list[tuple[int, int]]:
    """[(device, layers), ...] of a JSON file of {module: device}.

    A device is its number in the cluster, or its name there. The ends go with the first and the
    last layer, whatever the file says of them.

    Raises:
        ValueError: a layer is not placed, a device is not there, or a device's layers do not follow
            each other.
    """
    given = read_json(path)
    pattern = MODULES[modules_of(model)][1]
    stages: list[tuple[int, int]] = []
    for layer in range(model.layers):
        name = pattern.format(layer)
        if name not in given:
            raise ValueError(f"{path}: {name} is on no device; it must name every layer once")
        device = device_index(path, given[name], cluster)
        if stages and stages[-1][0] == device:
            stages[-1] = (device, stages[-1][1] + 1)
        elif device in [d for d, _ in stages]:
            raise ValueError(
                f"{path}: {name} returns to device {given[name]!r}; the layers of a device must "
                "follow each other"
            )
        else:
            stages.append((device, 1))
    before, after = pattern.split("{}")
    for name in given:
        number = name.removeprefix(before).removesuffix(after)
        if name.startswith(before) and number.isdecimal() and int(number) >= model.layers:
            raise ValueError(f"{path}: {name}: the model has {model.layers} layers, from 0")
    return stages


def device_index(path: str, value: object, cluster: Cluster) -> int:
    """The device of a value of a device map; raises ValueError."""
    names: list[str | None] = []
    for device in cluster.devices:
        names.append(device.name if device.kind == "cpu" else device.torch_name)
    if type(value) is int and f"cuda:{value}" in names:
        value = f"cuda:{value}"
    if type(value) is int and 0 <= value < len(names):
        return value
    if isinstance(value, str) and value in names:
        return names.index(value)
    known = ", ".join(str(name) for name in names)
    raise ValueError(f"{path}: no device {value!r}; there are {known}, or their numbers from 0")


def make_plan(
    placement: Placement, profile: Profile, sizes: ServedSizes, measured_s: float = 0.0
) -> DeploymentPlan:
    """The plan of a placement: a spec for each replica, a prediction for each stage."""
    replicas = []
    for chain in placement.replica_devices():
        moved = replace(placement, stages=tuple(zip(chain, placement.layers)))
        stages = []
        start = 0
        for device, count in moved.stages:
            there = placement.cluster.devices[device]
            name = "cpu" if there.kind == "cpu" else there.torch_name or f"cuda:{device}"
            stages.append(StageSpec(name, start, start + count, there.threads))
            start += count
        device_map = None
        if len(stages) > 1:
            device_map = moved.to_device_map(prefix=bool(sizes.virtual_tokens))
        replicas.append(ReplicaSpec(tuple(stages), device_map))
    predicted = predict_stages(placement, profile, sizes.prefix_bytes)
    return DeploymentPlan(placement, profile, tuple(replicas), predicted, measured_s)


def predict_stages(
    placement: Placement, profile: Profile, prefix_bytes: int = 0
) -> tuple[StagePrediction, ...]:
    """Bytes and seconds of each stage, without what moves between them."""
    model, cluster, need = placement.model, placement.cluster, placement.need
    cost = CostModel(model, cluster, placement.stages, profile)
    tokens = need.batch * need.prompt_tokens
    context = need.batch * (need.prompt_tokens + 8)
    predicted = []
    start = 0
    for number, (index, count) in enumerate(placement.stages):
        device = cluster.devices[index]
        prefill = cm.layer_seconds(model, device, profile, tokens)
        prefill += cm.prefill_attention_seconds(model, device, profile, tokens, need.batch)
        decode = cm.layer_seconds(model, device, profile, need.batch, context)
        prefill, decode = count * prefill, count * decode
        weights = cost.weight_bytes_on(index) + (prefix_bytes if number == 0 else 0)
        kv = count * kv_layer_bytes(model, need)
        predicted.append(
            StagePrediction(device.label, start, start + count, weights, kv, prefill, decode)
        )
        start += count
    return tuple(predicted)


def comparison(
    plan: DeploymentPlan,
    reports: Sequence[StageReport],
    timings: Sequence[StageTiming] | None = None,
) -> str:
    """A table of what was predicted of each stage against what it took.

    Args:
        reports: an engine's `stage_reports()`.
        timings: of serving.replicas.measuring.time_batch; without them the seconds taken are those
            of the mean pass so far, whatever was in it.
    Raises:
        ValueError: the plan has another number of stages.
    """
    if len(reports) != len(plan.stages):
        raise ValueError(f"the plan has {len(plan.stages)} stage(s), the engine {len(reports)}")
    lines = [f"{'stage':28} {'':>9} {'weight bytes':>15} {'KV bytes':>15} {'ms':>24}"]
    for number, (said, took) in enumerate(zip(plan.stages, reports)):
        if timings is not None:
            timing = timings[number]
            seconds = both_seconds(timing.prefill_s, timing.decode_s)
        else:
            mean_s = took.seconds / took.passes if took.passes else 0.0
            seconds = f"{1000 * mean_s:.4g} a pass" if took.passes else "no pass yet"
        name = f"{number} {said.device} {said.start}-{said.end - 1}"
        predicted = both_seconds(said.prefill_s, said.decode_s)
        lines += [
            f"{name:28} predicted {said.weight_bytes:15,} {said.kv_bytes:15,} {predicted:>24}",
            f"{'':28}     taken {took.weight_bytes:15,} {took.kv_bytes:15,} {seconds:>24}",
        ]
    return "\n".join(lines)


def both_seconds(prefill_s: float, decode_s: float) -> str:
    return f"{1000 * prefill_s:.4g} + {1000 * decode_s:.4g} a step"
