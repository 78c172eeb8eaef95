"""A clock by which the continuous engine runs as on a machine that does nothing else.

It counts CPU seconds. Every 8th pass a fixed forward of the model is timed beside, and the clock
runs by the median of the last 9 of those: what other programs on the machine take of the core's
speed is divided out. The engine times its passes by it, and costs are fitted to them.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from serving.engines.continuous_engine import ContinuousEngine
from serving.request import FOREVER, Limits, Plan, StepResult
from serving.simulate.engine import LinearCost

EVERY = 8  # passes between two timings of the reference
RECENT = 9  # of those timings, whose median is the machine's speed now


class SteadyTimer:
    """CPU seconds of this process, as if the machine were always as fast as it once was.

    Args:
        reference: a fixed piece of work, whose own time is left out.
    Attributes:
        usual_s: what the reference took then: when the timer was made, unless it is set.
    """

    def __init__(self, reference: Callable[[], object]) -> None:
        self.reference = reference
        self.now_s = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        for _ in range(3 * RECENT):
            self.recent.append(self._time_reference())
        self.usual_s = self.typical_s = median(self.recent)
        self.last_s = time.process_time()

    def _time_reference(self) -> float:
        begin = time.process_time()
        self.reference()
        return time.process_time() - begin

    def __call__(self) -> float:
        now_s = time.process_time()
        self.now_s += (now_s - self.last_s) * self.usual_s / self.typical_s
        self.last_s = now_s
        return self.now_s

    def observe_speed(self) -> None:
        """Time the reference, and go by it from now on."""
        self()
        self.recent.append(self._time_reference())
        self.typical_s = median(self.recent)
        self.last_s = time.process_time()


class TimerClock:
    """A Clock of a timer, which skips idle time."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self.timer, self.zero_s, self.idle_s = timer, timer(), 0.0

    def now_s(self) -> float:
        return self.timer() - self.zero_s + self.idle_s

    def advance(self, seconds: float) -> None:
        """Nothing: the step has taken its time."""

    def wait_until(self, time_s: float) -> None:
        self.idle_s += max(time_s - self.now_s(), 0.0)


@dataclass(frozen=True)
class TimedPass:  # the order of its fields is that of the lines of --cells
    """One pass: its decoding rows, their cached tokens, those that attention reads (each length
    class up to its longest row), its length classes, its prompt tokens, and what it took."""

    rows: int
    context: int
    read: int
    classes: int
    prompt: int
    seconds: float


class TimedEngine(ContinuousEngine):
    """The engine under a SteadyTimer, which observes the machine's speed between passes.

    Attributes:
        passes, plans: those since clear(), and their number.
    """

    timer: SteadyTimer

    def clear(self) -> None:
        self.passes: list[TimedPass] = []
        self.plans = 0

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        self.plans += 1
        return super().step(plan, budget_s)

    def _submit_passes(self, *rest: Any, **named: Any) -> None:
        self._begin_s = self.timer()
        super()._submit_passes(*rest, **named)

    def _collect_pass(self, *rest: Any, **named: Any) -> int:
        planned = self._in_flight[0].in_flight
        assert planned is not None
        emitted = super()._collect_pass(*rest, **named)
        seconds = self.timer() - self._begin_s
        rows = context = read = prompt = 0
        for part in planned.plan.decoding:
            rows += len(part.lengths)
            context += sum(part.lengths)
            read += len(part.lengths) * (max(part.lengths) + 1)
        for chunk in planned.plan.chunks:
            prompt += chunk.end - chunk.start
        classes = len(planned.plan.decoding)
        self.passes.append(TimedPass(rows, context, read, classes, prompt, seconds))
        if len(self.passes) % EVERY == 0:
            self.timer.observe_speed()
        return emitted


def short_forward(model: Any) -> Callable[[], object]:
    """A reference for SteadyTimer: the model over 8 tokens."""
    ids = torch.arange(2, 10)[None]

    @torch.inference_mode()
    def forward() -> object:
        return model(input_ids=ids, use_cache=False)

    return forward


def calibrate(
    engine: TimedEngine, count: int, serve: Callable[[int, float, int], tuple[float, float]]
) -> dict[str, Any]:
    """Capacity, and what the costs of a simulator are fitted to.

    Args:
        serve: (requests, arrivals a second, seed) serves so many first come first served; the
            seconds the engine was busy, and its capacity, should all have waited at once.
    """
    at_once = float("inf")
    serve(engine.limits.max_batch, at_once, 1000)  # warms up
    engine.clear()
    busy_s, capacity = serve(count, at_once, 1001)
    busy_s += serve(count, 0.6 * capacity, 1002)[0]
    return {
        "reference_s": engine.timer.usual_s,
        "capacity": capacity,
        "plans": engine.plans,
        "busy_s": busy_s,
        "moves": engine.runner.arena.migrations,
        "passes": [list(asdict(one).values()) for one in engine.passes],
    }


def fit_passes(passes: list[TimedPass]) -> dict[str, Any]:
    """Non-negative least squares of the passes' seconds, of which the sum is then right.

    `cost` is LinearCost's; `errors` the mean relative error of a pass by that, and where what
    attention reads and the number of length classes are known too.
    """
    seconds = np.array([one.seconds for one in passes])
    columns = []
    for one in passes:
        decodes = float(one.rows > 0)
        columns.append([decodes, one.rows, one.context, one.prompt, 1 - decodes])
    small = np.array(columns, float)
    classes = [[one.read - one.context, max(one.classes - 1, 0)] for one in passes]
    large = np.hstack([small, np.array(classes, float)])
    weights = 1 / np.sqrt(seconds)
    fitted, errors = [], []
    for matrix in (small, large):
        found, _ = nnls(matrix * weights[:, None], seconds * weights)
        found *= seconds.sum() / (matrix @ found).sum()
        fitted.append(found)
        errors.append(float(np.mean(np.abs(matrix @ found / seconds - 1))))
    step_s, row_s, token_s, prompt_token_s, call_s = fitted[0].tolist()
    cost = {"step_s": step_s, "row_s": row_s, "token_s": token_s}
    cost |= {"call_s": call_s, "prompt_token_s": prompt_token_s}
    share = float((large[:, 5:] @ fitted[1][5:]).sum() / seconds.sum())
    return {"cost": cost, "errors": errors, "classes_share": share}


def fitted_cost(made: dict[str, Any], limits: Limits) -> LinearCost:
    """The costs that a calibration shows."""
    passes = [TimedPass(*values) for values in made["passes"]]
    between_s = made["busy_s"] - sum([one.seconds for one in passes])
    plan_s = between_s / made["plans"]
    return LinearCost(limits.kv_tokens, **fit_passes(passes)["cost"], plan_s=plan_s)
