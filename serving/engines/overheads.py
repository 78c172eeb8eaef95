"""Timings of what the continuous engine spends beside its passes (EngineOverheads).

Each is the difference of two timings that take turns, so that other load on the machine affects
both alike; the median over the turns counts, and at least 0.
"""

import statistics
from collections.abc import Callable
from itertools import count

import torch

from serving.cost_model.overheads import SMALLEST_CLASS, EngineOverheads, length_class
from serving.engines.answers import Sampling
from serving.engines.continuous_engine import ContinuousEngine
from serving.request import FOREVER, CostEstimator, Plan, Record, Request

PASSES = 12  # of one timing
PROMPT = 24  # tokens


def measure_overheads(
    engine: ContinuousEngine,
    prompt_of: Callable[[int], list[int]],
    cost: CostEstimator,
    seconds: Callable[[], float],
    turns: int = 5,
) -> EngineOverheads:
    """Measure an idle engine.

    Args:
        prompt_of: ids of a prompt of so many tokens.
        cost: what admissions cost beside their passes is relative to it.
        seconds: a clock, of the wall or of the processor.
    """
    timer = OverheadTimer(engine, prompt_of, cost, seconds)
    found: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        measured = {
            "class_s": timer.classes(),
            "step_s": timer.steps(),
            "admit_s": timer.admissions(),
            "move_s": timer.moves(),
        }
        if turn:  # the first turn warms up
            for name, value in measured.items():
                found.setdefault(name, []).append(value)
    medians = {name: max(statistics.median(values), 0.0) for name, values in found.items()}
    return EngineOverheads(**medians)


class OverheadTimer:
    """Times one engine; every timing leaves it empty."""

    def __init__(
        self,
        engine: ContinuousEngine,
        prompt_of: Callable[[int], list[int]],
        cost: CostEstimator,
        seconds: Callable[[], float],
    ) -> None:
        self.engine, self.prompt_of, self.cost = engine, prompt_of, cost
        self.clock = seconds
        self.ids = count(1 << 40)
        limits = engine.limits
        self.classes_used: list[int] = []
        size = SMALLEST_CLASS
        while size <= limits.max_tokens and len(self.classes_used) < min(limits.max_batch, 4):
            if sum(self.classes_used) + size > limits.kv_tokens:
                break
            self.classes_used.append(size)
            size *= 2

    def classes(self) -> float:
        """Seconds of a pass for one more length class."""
        used = self.classes_used
        if len(used) < 2:
            return 0.0
        spread = self.passes(self.admit(used))
        alike = self.passes(self.admit([used[0]] * len(used)))
        return (spread - alike) / PASSES / (len(used) - 1)

    def steps(self) -> float:
        """Seconds of one more step of the engine, with the same passes."""
        sizes = self.classes_used[:1]
        apart = self.passes(self.admit(sizes), each=1)
        together = self.passes(self.admit(sizes))
        return (apart - together) / (PASSES - 1)

    def admissions(self) -> float:
        """Seconds of an admission among decoding rows, beside what the cost model says."""
        sizes = self.classes_used[:1]
        records = self.admit(sizes * max(min(self.engine.limits.max_batch, 4) - 1, 1))
        if len(records) + 1 > self.engine.limits.max_batch:
            self.cancel(records)
            return 0.0
        alone = self.timed(Plan(horizon_steps=1))
        newcomer, plan = self.plan([sizes[0]])
        mixed = self.timed(plan)
        self.cancel(records + newcomer)
        return mixed - alone - self.cost.chunk_s(PROMPT, 0, len(records))

    @torch.inference_mode()
    def moves(self) -> float:
        """Seconds of a row's move to the next class."""
        if len(self.classes_used) < 2:
            return 0.0
        records = self.admit(self.classes_used[:1])
        row = self.engine.rows[records[0].request.id]
        begin = self.clock()
        self.engine.runner.arena.reserve(row, length_class(SMALLEST_CLASS + 1))
        seconds = self.clock() - begin
        self.cancel(records)
        return seconds

    def plan(self, sizes: list[int]) -> tuple[list[Record], Plan]:
        """Records to admit, each with a class's tokens reserved."""
        records = []
        reserve = {}
        for size in sizes:
            request = Request(next(self.ids), PROMPT, 0.0, FOREVER)
            sampling = Sampling(max_new_tokens=4 * PASSES, ignore_stops=True)
            self.engine.submit(request, self.prompt_of(PROMPT), sampling)
            records.append(Record(request))
            reserve[request.id] = size
        return records, Plan(tuple(records), (), reserve, horizon_steps=1)

    def admit(self, sizes: list[int]) -> list[Record]:
        """Records that are decoding."""
        records, plan = self.plan(sizes)
        self.engine.step(plan)
        while not all(map(self.engine.generated, records)):
            self.engine.step(Plan(horizon_steps=1))
        return records

    def passes(self, records: list[Record], each: int = PASSES) -> float:
        """Seconds of PASSES decode passes, `each` of them in a step; cancels the records."""
        seconds = 0.0
        for _ in range(PASSES // each):
            seconds += self.timed(Plan(horizon_steps=each))
        self.cancel(records)
        return seconds

    def timed(self, plan: Plan) -> float:
        begin = self.clock()
        self.engine.step(plan)
        return self.clock() - begin

    def cancel(self, records: list[Record]) -> None:
        for record in records:
            self.engine.cancel(record.request.id)
        self.engine.step(Plan())
