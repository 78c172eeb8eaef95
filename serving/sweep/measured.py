"""A sweep of the real engine, on this machine: every answer has exactly so many tokens."""

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from finetune.placing import PlacementFlags
from serving.cost_model.model import CostModel, ModelSizes, Profile
from serving.engines import Sampling
from serving.engines.profiling import prompt_maker
from serving.engines.runner import AnswerBackend
from serving.policies.continuous import POLICIES
from serving.replicas.backends import open_in_process, open_placed
from serving.replicas.served_model import ServedModel, ServedModelFlags
from serving.request import Limits
from serving.run_requests.runs import (
    STOP_S,
    OpenBackend,
    PreparedRequest,
    rescheduled_pool,
    run_list,
    running_engine,
    warm_up,
)
from serving.sweep.rows import SweepRow, SweptSizes

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

POLICY = "fcfs"  # all requests are there at once, and all fit: it admits them together
LATE_S = 1e6  # no objective


class SweepProgress(Protocol):
    """What is told of each run: a progress bar."""

    def update(self) -> Any: ...


@dataclass(frozen=True)
class SweptModel:
    """What answers, and where its layers are.

    Attributes:
        layers: of the stages, as text.
    """

    open_backend: OpenBackend
    layers: str
    starts_idle: bool


def limits_of_sweep(sizes: SweptSizes) -> Limits:
    """Room for the largest batch at its end, in slabs of powers of two, as the engine has them."""
    slab = 1 << (sizes.tokens + 1).bit_length()
    most = max(sizes.batches)
    return Limits(max_batch=most, kv_tokens=most * slab, max_tokens=sizes.tokens + 1)


def random_requests(
    sizes: SweptSizes, tokenizer: "FamilyTokenizer", count: int
) -> list[PreparedRequest]:
    """Requests of random prompts.

    Raises:
        ValueError: the family's frame alone is longer than --prompt_tokens.
    """
    prompt_of, frame = prompt_maker(tokenizer, tokenizer.vocab_size)
    if frame >= sizes.prompt_tokens:
        raise ValueError(
            f"--prompt_tokens {sizes.prompt_tokens}: this family's prompts have {frame} tokens of "
            f"their own; give at least {frame + 1}"
        )
    sampling = Sampling(sizes.output_tokens, ignore_stops=True)
    requests = []
    for number in range(count):
        ids = prompt_of(sizes.prompt_tokens)
        requests.append(PreparedRequest(number, "", ids, 0.0, LATE_S, sampling))
    return requests


@contextmanager
def swept_model(
    flags: ServedModelFlags, count: int, sizes: SweptSizes, limits: Limits
) -> Iterator[SweptModel]:
    """The model on `count` devices: one in this process, several by the deployer."""
    served = ServedModel.of(flags)
    if count == 1:
        engine = open_in_process(served, limits).backend.engine
        failures: list[BaseException] = []

        def open_here(name: str) -> AbstractContextManager[AnswerBackend]:
            return running_engine(engine, POLICIES[name], failures.append)

        try:
            yield SweptModel(open_here, "", starts_idle=True)
        except RuntimeError:
            if failures:  # of the engine's thread
                raise failures[0] from None
            raise
        return
    placing = PlacementFlags(
        sizes.deployer, count, None, None, None, flags.profile, measure=False, measure_s=0.0
    )
    pool = open_placed(served, placing, limits).backend

    def open_there(name: str) -> AbstractContextManager[AnswerBackend]:
        return rescheduled_pool(pool, name)

    try:
        yield SweptModel(open_there, f"{len(pool.replicas)} replica(s)", starts_idle=False)
    finally:
        pool.stop(STOP_S)


def measure_sweep(
    flags: ServedModelFlags,
    sizes: SweptSizes,
    tokenizer: "FamilyTokenizer",
    model: ModelSizes,
    profile: Profile | None,
    repetitions: int,
    progress: SweepProgress,
) -> Iterator[SweepRow]:
    """A row for each number of devices and batch; the seconds are the median of the repetitions.

    Batches are timed in turns, so that other load on the machine affects all alike.

    Args:
        profile: of this engine and machine, for a prediction beside each; None for none.
    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    limits = limits_of_sweep(sizes)
    requests = random_requests(sizes, tokenizer, limits.max_batch)
    for count in sizes.gpus:
        with swept_model(flags, count, sizes, limits) as opened:
            seconds: dict[int, list[float]] = {batch: [] for batch in sizes.batches}
            warm_up(opened.open_backend, requests)
            for _ in range(repetitions):
                for batch in sizes.batches:
                    seconds[batch].append(timed(opened, requests[:batch]))
                    progress.update()
        for batch in sizes.batches:
            yield SweepRow(
                count,
                batch,
                sizes.output_tokens,
                kv_bytes=batch * sizes.tokens * model.kv_bytes_per_token,
                layers=opened.layers,
                seconds=statistics.median(seconds[batch]),
                predicted_s=predicted(model, profile, sizes, count, batch),
            )


def timed(opened: SweptModel, requests: list[PreparedRequest]) -> float:
    """Seconds from the first admission to the last token.

    Raises:
        ValueError: a request was refused, or an answer is shorter than was asked for.
    """
    with opened.open_backend(POLICY) as backend:
        record = run_list(backend, requests, None, False, starts_idle=opened.starts_idle)
    if record.refused:
        raise ValueError(f"a request was refused: {next(iter(record.refused.values()))}")
    begin = min(done.admitted_s for done in record.completions.values())
    end = max(done.finish_s for done in record.completions.values())
    return end - begin


def predicted(
    model: ModelSizes, profile: Profile | None, sizes: SweptSizes, count: int, batch: int
) -> float | None:
    """Seconds by the profile, of one device; None without a profile, and of several devices."""
    if profile is None or count > 1:
        return None
    cost = CostModel.of(model, profile.cluster(1), profile)
    return cost.equal_batch_s(batch, sizes.prompt_tokens, sizes.output_tokens)
