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

    def order(self, record: Record, now_s: float, pace_s: float, cost: CostModel) -> tuple[float, float]:
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

    def order(self, record: Record, now_s: float, pace_s: float, cost: CostModel) -> tuple[float, float]:
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


@dataclass(frozen=True)
class Deadline:
    """Ours: as many answers in time as there can be, and none starves.

    Order. A request of predicted work  work_s = prefill_s(context) + tokens left x pace  can still be in time until its latest
    start,  arrival + slo - work.  Until then its key is  arrival + slo_weight slo + work_weight work:  among those that can be in
    time, the urgent first and, the more so the greater work_weight, the cheap first, because in overload whoever takes less
    leaves more for the others. After it, it is late: the same key, `late_s` later. Keys are fixed but for that one step, so a heap keeps them.

    Ageing. One admission in `turns` goes to whoever came first, and waits for memory to be free for it: a request before which
    n wait is admitted within turns x (n + 1) admissions, whatever comes after it.

    Memory. prompt + the conformal `admit_quantile` of the answer; an answer that outgrows it gets that quantile of what is left.

    Preemption. A request that must start before a row is likely to end takes the place of a running one that will be late
    anyhow, if recomputing that one costs less than one deadline: prefill_s(its context) x rows / work_s of the newcomer < 1, the
    answers the engine could have made meanwhile. Nothing is preempted twice for this, nor is the oldest running request.

    Attributes:
        truth: count on true lengths (an oracle, for benchmarks).
    """

    admit_quantile: float = 0.5
    slo_weight: float = 1.0
    work_weight: float = 3.0
    late_s: float = 1000.0
    turns: int = 16
    preempts: bool = True
    truth: bool = False
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return request.output_tokens if self.truth else quantile_tokens(request.prediction, self.admit_quantile)

    def left(self, record: Record, generated: int) -> float:
        if self.truth:
            return max(record.request.output_tokens - generated, 1)
        return tokens_left(record.request, generated)

    def reserve(self, record: Record, generated: int, limits: Limits) -> int:
        if self.truth:
            left = self.left(record, generated)
        else:
            left = quantile_left(record.request.prediction, generated, self.admit_quantile) if generated else record.length
        return min(record.request.prompt_tokens + generated + math.ceil(left), limits.max_tokens)

    def order(self, record: Record, now_s: float, pace_s: float, cost: CostModel) -> tuple[float, float]:
        request = record.request
        context = record.context_tokens
        work = cost.prefill_s(context) + self.left(record, record.generated) * (pace_s or cost.decode_step_s(1, context))
        latest = request.arrival_s + request.slo_s - work
        key = request.arrival_s + self.slo_weight * request.slo_s + self.work_weight * work
        return (key, latest) if now_s <= latest else (key + self.late_s, FOREVER)

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft, limits = Draft(view), view.limits
        if view.overran:
            make_room(draft, lambda r, generated: self.reserve(r, generated, limits), lambda: self.victims(view))
        blocked = None
        if not draft.preempt and len(view.waiting):
            blocked = self.fill(draft)
            if blocked is not None and self.preempts and blocked.until_s < FOREVER:
                self.displace(draft, blocked, cost)
        full = draft.rows >= limits.max_batch or blocked is not None
        return draft.plan(wake_on_arrival=not full or self.preempts)

    def fill(self, draft: Draft) -> Record | None:
        """Admit in order while there is room; who could not be admitted."""
        view, limits = draft.view, draft.view.limits
        for record in view.waiting:
            if self.turns and (view.admissions + len(draft.admit)) % self.turns == 0:
                first = view.waiting.oldest()
                if first.request.id not in draft.reserve and not draft.add(first, self.reserve(first, first.generated, limits)):
                    return first
            if record.request.id not in draft.reserve and not draft.add(record, self.reserve(record, record.generated, limits)):
                return record
        return None

    def displace(self, draft: Draft, record: Record, cost: CostModel):
        view = draft.view
        now, pace = view.now_s, view.pace_s
        work = record.request.arrival_s + record.request.slo_s - record.until_s
        soon = now + work / max(draft.rows, 1)  # a row ends about that often
        if record.until_s > soon:
            return
        oldest = min(view.running.values(), key=lambda r: (r.request.arrival_s, r.request.id))
        best = None
        for r in view.running.values():
            if r is oldest or r.preemptions or r.request.id in draft.reserve:
                continue
            late = now - r.request.arrival_s - r.request.slo_s
            if late <= 0 and late + self.left(r, view.generated(r)) * pace <= 0:
                continue
            price = cost.prefill_s(r.request.prompt_tokens + view.generated(r))
            if price * draft.rows < work and (best is None or price < best[0]):
                best = (price, r)
        tokens = self.reserve(record, record.generated, view.limits)
        if best is not None and tokens <= draft.free + best[1].reserved_tokens:
            draft.drop(best[1])
            draft.add(record, tokens)

    def victims(self, view: View) -> list[Record]:
        """Running records by their deadlines, the latest first; the one that came first comes last."""
        rows = sorted(view.running.values(), key=lambda r: (-r.request.arrival_s - r.request.slo_s, -r.request.id))
        oldest = min(rows, key=lambda r: (r.request.arrival_s, r.request.id))
        rows.remove(oldest)
        return [*rows, oldest]


POLICIES = {name: as_policy(batching) for name, batching in BATCH_POLICIES.items()} | {
    "fcfs": Fcfs(),
    "sjf": Sjf(),
    "srpt": Srpt(),
    "deadline": Deadline(),
    "deadline_oracle": Deadline(truth=True),
}
