"""What a real engine takes for a need's batch: its stages' seconds, and its requests a second."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.cost_model.model import CostModel, Profile
from serving.deployment.deployers import StressBudgetSpent
from serving.deployment.placement import Need, Placement
from serving.request import FOREVER, Limits, Plan, Record, Request

if TYPE_CHECKING:
    from serving.engines.answers import TextEngine
    from serving.engines.stage_reports import StageReport

STEPS = 12  # decode steps of one timing
PASS_TOKENS = 2048  # prompt tokens of one pass


@dataclass(frozen=True)
class StageTiming:
    """Seconds of one stage, for the need's prompts and for one decode step."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class BatchTiming:
    """Seconds of a batch: of the whole engine, and of each stage without waiting or output layer.

    Attributes:
        kv_bytes: of each stage, while the batch ran.
    """

    prefill_s: float
    decode_s: float
    stages: tuple[StageTiming, ...]
    kv_bytes: tuple[int, ...]


def prompt_ids(engine: "TextEngine", tokens: int, seed: int) -> list[int]:
    """Ids of a prompt of so many tokens that the engine's model can read.

    Prompts of different seeds do not begin alike: an engine copies what does.
    """
    frame: list[int] = []
    if marks := getattr(getattr(engine.model, "transformer", None), "marks", None):
        frame = [marks.masks[0], marks.sop]
    draw = random.Random(seed)
    return draw.choices(range(5, 25), k=tokens - len(frame)) + frame


class BatchRunner:
    """Runs batches of equal prompts on an engine."""

    def __init__(self, engine: "TextEngine", need: Need):
        self.engine, self.need = engine, need
        self._ids = itertools.count()

    def admit(self, answer_tokens: int) -> list[Record]:
        """Submit the batch, and step until every answer has its first token."""
        from serving.engines.answers import Sampling

        need, records, reserve = self.need, [], {}
        sampling = Sampling(max_new_tokens=answer_tokens, ignore_stops=True)
        for _ in range(need.batch):
            number = next(self._ids)
            prompt = prompt_ids(self.engine, need.prompt_tokens, number)
            request = Request(number, len(prompt), 0.0, FOREVER)
            self.engine.submit(request, prompt, sampling)
            records.append(Record(request))
            reserve[request.id] = len(prompt) + answer_tokens + 1
        plan = Plan(tuple(records), (), reserve, horizon_steps=1, prefill_tokens=PASS_TOKENS)
        self.engine.step(plan)
        while not all(map(self.engine.generated, records)):
            self.engine.step(Plan(horizon_steps=1, prefill_tokens=PASS_TOKENS))
        return records

    def time_once(self) -> BatchTiming:
        """One prefill, and STEPS decode steps."""
        engine: Any = self.engine  # of those that make reports
        reports: Callable[[], Sequence[StageReport]] = engine.stage_reports
        before = reports()
        begin = time.perf_counter()
        records = self.admit(STEPS + 3)
        prefill_s = time.perf_counter() - begin
        middle = reports()
        made = self.engine.generated(records[-1])
        begin = time.perf_counter()
        self.engine.step(Plan(horizon_steps=STEPS))
        elapsed_s = time.perf_counter() - begin
        steps = self.engine.generated(records[-1]) - made
        after = reports()
        for record in records:
            self.engine.cancel(record.request.id)
        self.engine.step(Plan())
        stages = []
        for x, y, z in zip(before, middle, after):
            decode_s = (z.seconds - y.seconds) / steps
            stages.append(StageTiming(y.seconds - x.seconds, decode_s))
        kv_bytes = tuple(report.kv_bytes for report in after)
        return BatchTiming(prefill_s, elapsed_s / steps, tuple(stages), kv_bytes)

    def requests_s(self) -> float:
        """Requests a second of the batch, from its submission to its last token."""
        begin = time.perf_counter()
        records = self.admit(self.need.output_tokens)
        left = {record.request.id for record in records}
        while left:
            result = self.engine.step(Plan())
            left -= {request_id for request_id, _, _ in result.finished}
        return self.need.batch / (time.perf_counter() - begin)


def time_batch(engine: "TextEngine", need: Need, repetitions: int = 3) -> BatchTiming:
    """The least of each figure, over repetitions after one that warms up.

    Other work on the machine only adds.
    """
    runner = BatchRunner(engine, need)
    runner.time_once()
    timings = [runner.time_once() for _ in range(repetitions)]
    stages = []
    for each in zip(*(timing.stages for timing in timings)):
        prefill_s = min(stage.prefill_s for stage in each)
        stages.append(StageTiming(prefill_s, min(stage.decode_s for stage in each)))
    return BatchTiming(
        min(timing.prefill_s for timing in timings),
        min(timing.decode_s for timing in timings),
        tuple(stages),
        timings[-1].kv_bytes,
    )


def limits_of(need: Need) -> Limits:
    """An engine's limits that hold a need."""
    tokens = need.prompt_tokens + need.output_tokens + STEPS + 8
    return Limits(need.batch, max(need.kv_tokens_q90, need.batch * tokens), tokens)


@dataclass
class StressTester:
    """Loads a placement for real and measures the need's batch: Morphling's stress test.

    Args:
        open_engine: makes the engine of a placement, which is closed after its test.
        budget_s: no test begins after it, but for the first.
    Attributes:
        tests, seconds: begun and spent so far.
        rates: (stages, requests/s) of each test.
    """

    open_engine: Callable[[Placement], "TextEngine"]
    budget_s: float
    clock: Callable[[], float] = time.perf_counter
    tests: int = 0
    seconds: float = 0.0
    rates: tuple[tuple[tuple[tuple[int, int], ...], float], ...] = ()

    def __call__(self, placement: Placement) -> float:
        """Requests a second. Raises StressBudgetSpent."""
        if self.tests and self.seconds >= self.budget_s:
            raise StressBudgetSpent
        begin = self.clock()
        self.tests += 1
        engine = self.open_engine(placement)
        try:
            rate = BatchRunner(engine, placement.need).requests_s()
        finally:
            if (close := getattr(engine, "close", None)) is not None:
                close()
            self.seconds += self.clock() - begin
        self.rates = (*self.rates, (placement.stages, rate))
        return rate


def cost_of(placement: Placement, profile: Profile) -> CostModel:
    """The cost model of a placement, for an engine."""
    return CostModel(placement.model, placement.cluster, placement.stages, profile)
