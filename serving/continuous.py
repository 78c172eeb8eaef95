"""Iteration-level policies: sequences join and leave the batch one by one. POLICIES, all that can be chosen, is at the foot.

    Policy = Callable[[View, CostModel], Plan]

with length() and order() beside it (serving.request.Policy): the queue keeps the order of keys, so a call looks at few requests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from predictor.prediction import LengthPrediction, remaining
from serving.batching import BATCH_POLICIES, as_policy, expected_tokens, quantile_tokens
from serving.request import FOREVER, CostModel, Limits, Plan, Record, Request, View

COARSE = 16  # tokens: what is left of an answer is asked for at multiples of it


@lru_cache(maxsize=1 << 18)
def expected_left(prediction: LengthPrediction, generated: int) -> float:
    return max(remaining(prediction, generated).expected_tokens, 1.0)


@lru_cache(maxsize=1 << 18)
def quantile_left(prediction: LengthPrediction, generated: int, q: float) -> float:
    return max(remaining(prediction, generated).quantile(q), 1.0)


def tokens_left(request: Request, generated: int) -> float:
    """Predicted mean of the tokens still to come."""
    return expected_left(request.prediction, generated - generated % COARSE)


class Draft:
    """A plan in the making, and the memory and rows it leaves."""

    __slots__ = ("view", "free", "rows", "admit", "preempt", "reserve", "gone")

    def __init__(self, view: View):
        self.view, self.free, self.rows = view, view.kv_free_tokens, len(view.running)
        self.admit, self.preempt, self.reserve = [], [], {}
        self.gone: set[int] = set()

    def add(self, record: Record, tokens: int) -> bool:
        """Admit with so many KV tokens reserved, if they are there and a row is."""
        if tokens > self.free or self.rows >= self.view.limits.max_batch:
            return False
        self.admit.append(record)
        self.reserve[record.request.id] = tokens
        self.free -= tokens
        self.rows += 1
        return True

    def grow(self, record: Record, tokens: int) -> bool:
        """Raise a running record's reservation to so many KV tokens, if they are there."""
        if tokens - record.reserved_tokens > self.free:
            return False
        self.reserve[record.request.id] = tokens
        self.free -= tokens - record.reserved_tokens
        return True

    def drop(self, record: Record):
        self.preempt.append(record)
        self.gone.add(record.request.id)
        self.free += self.reserve.pop(record.request.id, record.reserved_tokens)
        self.rows -= 1

    def plan(self, **more) -> Plan:
        return Plan(tuple(self.admit), tuple(self.preempt), self.reserve, **more)


def make_room(draft: Draft, wanted: Callable[[Record, int], int], victims: Callable[[], list[Record]]):
    """Answer all overruns: wanted(record, generated) KV tokens while there are any, else those of the next victim, or its own end here."""
    queue = None
    for record in draft.view.overran:
        if record.request.id in draft.gone:
            continue
        tokens = wanted(record, draft.view.generated(record))
        while not draft.grow(record, tokens):
            if queue is None:
                queue = iter(victims())
            victim = next((v for v in queue if v.request.id not in draft.gone), record)
            draft.drop(victim)
            if victim is record:
                break


@dataclass(frozen=True)
class Fcfs:
    """First come, first served, memory in blocks as an answer grows: what vLLM does (Kwon et al., arXiv 2309.06180).

    Where memory runs out, the last to come is preempted and computed again later. Needs no prediction.

    Attributes:
        block_tokens: an answer's memory grows by so much at a time. watermark: share of the memory left free at admission.
    """

    block_tokens: int = 64
    watermark: float = 0.01
    predicts: ClassVar[bool] = False

    def length(self, request: Request) -> float:
        return self.block_tokens

    def order(self, record: Record, now_s: float, limits: Limits, cost: CostModel) -> tuple[float, float]:
        return record.request.arrival_s, FOREVER

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft, limits = Draft(view), view.limits
        if view.overran:
            make_room(
                draft, lambda record, generated: min(record.reserved_tokens + self.block_tokens, limits.max_tokens),
                lambda: sorted(view.running.values(), key=lambda r: (-r.request.arrival_s, -r.request.id)),
            )  # fmt: skip
        if not draft.preempt and draft.rows < limits.max_batch:
            spare = int(self.watermark * limits.kv_tokens)
            for record in view.waiting:
                tokens = min(record.context_tokens + self.block_tokens, limits.max_tokens)
                if (draft.free - tokens < spare and draft.rows) or not draft.add(record, tokens):
                    break
        return draft.plan(wake_on_arrival=draft.rows < limits.max_batch and not len(view.waiting) > len(draft.admit))


@dataclass(frozen=True)
class Sjf:
    """Shortest predicted answer first, run to its end (SSJF; Qiu et al., arXiv 2404.08509): the least mean wait, and long ones starve.

    Attributes:
        reserve_quantile: KV memory is kept for this quantile of the answer's length; an overrun asks for that of what is left.
    """

    reserve_quantile: float = 0.9
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return quantile_tokens(request.prediction, self.reserve_quantile)

    def order(self, record: Record, now_s: float, limits: Limits, cost: CostModel) -> tuple[float, float]:
        return tokens_left(record.request, record.generated), FOREVER

    def reserve(self, record: Record, generated: int, limits: Limits) -> int:
        """KV tokens for prompt, answer so far and this quantile of the rest."""
        left = quantile_left(record.request.prediction, generated, self.reserve_quantile) if generated else record.length
        return min(record.request.prompt_tokens + generated + math.ceil(left), limits.max_tokens)

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft = Draft(view)
        if view.overran:
            make_room(draft, lambda r, generated: self.reserve(r, generated, view.limits), lambda: self.victims(view))
        if not draft.preempt:
            self.fill(draft)
        return draft.plan(wake_on_arrival=draft.rows < view.limits.max_batch)

    def fill(self, draft: Draft):
        limits = draft.view.limits
        if draft.rows < limits.max_batch:
            for record in draft.view.waiting:
                if not draft.add(record, self.reserve(record, record.generated, limits)):
                    break

    def victims(self, view: View) -> list[Record]:
        """Running records, the one with most left first."""
        return sorted(view.running.values(), key=lambda r: (-tokens_left(r.request, view.generated(r)), r.request.id))


@dataclass(frozen=True)
class Srpt(Sjf):
    """Shortest remaining predicted answer first, also among those that run (TRAIL; Shahout et al., arXiv 2410.01035).

    Attributes:
        advantage: a waiting answer displaces a running one that has at least this many times as much left; what that one
            has computed is computed again.
    """

    advantage: float = 2.0

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft = Draft(view)
        if view.overran:
            make_room(draft, lambda r, generated: self.reserve(r, generated, view.limits), lambda: self.victims(view))
        if draft.preempt:
            return draft.plan()
        self.fill(draft)
        if len(draft.admit) < len(view.waiting):
            victims = None
            for record in view.waiting:
                if record.request.id in draft.reserve:
                    continue
                victims = iter(self.victims(view)) if victims is None else victims
                victim = next((v for v in victims if v.request.id not in draft.reserve), None)
                left = tokens_left(record.request, record.generated)
                if victim is None or tokens_left(victim.request, view.generated(victim)) < self.advantage * left:
                    break
                draft.drop(victim)
                if not draft.add(record, self.reserve(record, record.generated, view.limits)):
                    break
        return draft.plan()


POLICIES = {name: as_policy(batching) for name, batching in BATCH_POLICIES.items()} | {
    "fcfs": Fcfs(),
    "sjf": Sjf(),
    "srpt": Srpt(),
}
