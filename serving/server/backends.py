"""What makes a server's answers: an engine in its own process, or replicas in others.

Free of torch at import.
"""

import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

from finetune.placing import PlacementFlags
from serving.cost_model.model import CostModel, read_profile
from serving.engines import make_engine
from serving.engines.runner import AnswerBackend, EngineRunner
from serving.engines.served_cost import served_cost_model
from serving.policies.continuous import POLICIES
from serving.replicas.messages import ReplicaJob, ReplicaReady
from serving.replicas.planning import DeploymentPlan, comparison, plan_deployment
from serving.replicas.pool import ReplicaPool
from serving.request import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TYPICAL_TOKENS = 256  # of a prompt, and of an answer, of the batch that a deployer plans for
LONGEST_PROBE_S = 10.0  # predicted, of a prefill that is timed once the model is loaded


class BackendFlags(Protocol):
    """Those of a server's flags that say what makes its answers."""

    @property
    def model(self) -> str: ...
    @property
    def mode(self) -> str | None: ...
    @property
    def base_model(self) -> str | None: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def keep_quantized(self) -> bool: ...
    @property
    def engine(self) -> str: ...
    @property
    def policy(self) -> str: ...
    @property
    def profile(self) -> str | None: ...
    @property
    def prefix_cache_tokens(self) -> int: ...


class OpenedBackend(NamedTuple):
    """A backend that can be started.

    Attributes:
        chat_prompt: of the model's configuration.
    """

    backend: AnswerBackend
    chat_prompt: str | None


def open_in_process(flags: BackendFlags, limits: Limits) -> OpenedBackend:
    """An engine on one device, in this process.

    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    from finetune.evaluation.predict import load_ready

    profile = read_profile(flags.profile or "datasheet")
    model: PreTrainedModel = load_ready(
        flags.model,
        mode=flags.mode,
        base=flags.base_model,
        device=flags.device,
        precision=flags.precision,
        keep_quantized=flags.keep_quantized,
    )
    options = {}
    if flags.engine == "continuous":
        options["prefix_cache_tokens"] = flags.prefix_cache_tokens
    engine = make_engine(flags.engine, model, limits, served_cost_model(model, profile), **options)
    runner = EngineRunner(engine, POLICIES[flags.policy])
    return OpenedBackend(runner, getattr(model.config, "chat_prompt", None))


def open_placed(flags: BackendFlags, placed: PlacementFlags, limits: Limits) -> OpenedBackend:
    """Replicas where a deployer puts them, loaded.

    Prints the placement with what is predicted, then what was taken.

    Args:
        limits: of each replica.
    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    half = max(min(limits.max_tokens // 2, TYPICAL_TOKENS), 1)
    plan = plan_deployment(
        placed,
        flags.model,
        kv_tokens=limits.kv_tokens,
        batch=max(min(limits.max_batch, limits.kv_tokens // (2 * half)), 1),
        prompt_tokens=half,
        output_tokens=half,
        precision=flags.precision,
        base=flags.base_model,
        keep_quantized=flags.keep_quantized,
    )
    print(plan.describe(), flush=True)
    pool = ReplicaPool(replica_jobs(flags, plan, limits))
    said = pool.open()
    print(loading_report(plan, said), flush=True)
    return OpenedBackend(pool, said[0].chat_prompt)


def replica_jobs(flags: BackendFlags, plan: DeploymentPlan, limits: Limits) -> list[ReplicaJob]:
    """What each replica of a plan loads and how it serves."""
    placed = plan.placement
    cost = CostModel(placed.model, placed.cluster, placed.stages, plan.profile)
    predicted_s = cost.prefill_s(placed.need.batch * placed.need.prompt_tokens, placed.need.batch)
    jobs = []
    for number, replica in enumerate(plan.replicas):
        job = ReplicaJob(
            number=number,
            model=flags.model,
            mode=flags.mode,
            base_model=flags.base_model,
            precision=flags.precision,
            keep_quantized=flags.keep_quantized,
            placement=replica,
            engine=flags.engine,
            policy=flags.policy,
            limits=limits,
            cost=cost,
            prefix_cache_tokens=flags.prefix_cache_tokens,
            zero_s=0.0,
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
