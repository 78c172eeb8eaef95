"""What makes answers: an engine in this process, or replicas in others, from a command's flags.

Free of torch at import.
"""

from typing import NamedTuple

from finetune.placing import PlacementFlags
from serving.cost_model.model import CostModel
from serving.engines.answers import TextEngine
from serving.engines.runner import EngineRunner
from serving.policies.continuous import POLICIES
from serving.replicas.messages import ReplicaJob, ReplicaReady
from serving.replicas.planning import DeploymentPlan, comparison, plan_deployment
from serving.replicas.pool import ReplicaPool
from serving.replicas.served_model import ServedModel
from serving.replicas.vllm_serving import open_vllm, with_parallel_sizes
from serving.request import Limits

TYPICAL_TOKENS = 256  # of a prompt, and of an answer, of the batch that a deployer plans for
LONGEST_PROBE_S = 10.0  # predicted, of a prefill that is timed once the model is loaded


class OpenedEngine(NamedTuple):
    """An engine of this process, which can be started.

    Attributes:
        chat_prompt: of the model's configuration.
    """

    backend: EngineRunner
    chat_prompt: str | None


class OpenedPool(NamedTuple):
    """As OpenedEngine, of replicas."""

    backend: ReplicaPool
    chat_prompt: str | None


def open_backend(
    served: ServedModel, flags: PlacementFlags, limits: Limits
) -> OpenedEngine | OpenedPool:
    """Replicas where the flags place them, else an engine in this process. Raises as these.

    With the engine vllm, one server with as many stages and replicas as are placed.
    """
    if flags.is_placed and served.engine == "vllm":
        plan = planned(served, flags, limits)
        print(plan.describe(), flush=True)
        return open_in_process(with_parallel_sizes(served, plan.replicas), limits)
    if flags.is_placed:
        return open_placed(served, flags, limits)
    return open_in_process(served, limits)


def open_in_process(served: ServedModel, limits: Limits) -> OpenedEngine:
    """An engine on one device, in this process.

    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    engine: TextEngine
    if served.engine == "vllm":
        engine = open_vllm(served, limits)
    else:
        engine = served.load_engine(limits, served.device)
    # vLLM's process would outlive this one's.
    closes = served.engine == "vllm"
    runner = EngineRunner(engine, POLICIES[served.policy], closes_engine=closes)
    return OpenedEngine(runner, getattr(engine.model.config, "chat_prompt", None))


def open_placed(served: ServedModel, flags: PlacementFlags, limits: Limits) -> OpenedPool:
    """Replicas where a deployer puts them, loaded.

    Prints the placement with what is predicted, then what was taken.

    Args:
        limits: of each replica.
    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    plan = planned(served, flags, limits)
    stages = max(len(replica.stages) for replica in plan.replicas)
    if served.rereader is not None and stages > 1:
        raise ValueError(
            "--rereader reads the states of a model on one device, this placement has replicas of "
            f"{stages} stages: leave it out, or give each replica one device"
        )
    print(plan.describe(), flush=True)
    predicted_bytes = [stage.weight_bytes for stage in plan.stages]
    pool = ReplicaPool(replica_jobs(served, plan, limits), predicted_bytes)
    said = pool.open()
    print(loading_report(plan, said), flush=True)
    return OpenedPool(pool, said[0].chat_prompt)


def planned(served: ServedModel, flags: PlacementFlags, limits: Limits) -> DeploymentPlan:
    """What a deployer makes of the flags.

    Raises:
        ValueError: they contradict each other, a device is not there, or nothing fits.
    """
    if served.device != ServedModel.device:
        raise ValueError(
            f"--device {served.device} is of one device, and --deployer, --num_gpus, --devices and "
            "--device_map name others: leave it out"
        )
    half = max(min(limits.max_tokens // 2, TYPICAL_TOKENS), 1)
    return plan_deployment(
        flags,
        served.loading.path,
        kv_tokens=limits.kv_tokens,
        batch=max(min(limits.max_batch, limits.kv_tokens // (2 * half)), 1),
        prompt_tokens=half,
        output_tokens=half,
        precision=served.loading.precision,
        base=served.loading.base,
        keep_quantized=served.loading.keep_quantized,
    )


def replica_jobs(served: ServedModel, plan: DeploymentPlan, limits: Limits) -> list[ReplicaJob]:
    """What each replica of a plan loads and how it serves."""
    placed = plan.placement
    cost = CostModel(placed.model, placed.cluster, placed.stages, plan.profile)
    predicted_s = cost.prefill_s(placed.need.batch * placed.need.prompt_tokens, placed.need.batch)
    jobs = []
    for number, replica in enumerate(plan.replicas):
        job = ReplicaJob(
            number=number,
            served=served,
            placement=replica,
            limits=limits,
            cost=cost,
            probe=placed.need if predicted_s < LONGEST_PROBE_S else None,
        )
        jobs.append(job)
    return jobs


def loading_report(plan: DeploymentPlan, said: list[ReplicaReady]) -> str:
    """How long loading took, and a table of predicted against taken for each replica."""
    seconds = [ready.seconds for ready in said]
    lines = [f"{len(said)} replica(s) loaded in {max(seconds):.1f} s"]
    for number, ready in enumerate(said):
        if not ready.reports:
            continue
        if len(said) > 1:
            lines.append(f"replica {number}:")
        lines.append(comparison(plan, ready.reports, ready.timings))
    return "\n".join(lines)
