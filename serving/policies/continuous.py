"""Iteration-level policies: sequences join and leave the batch one by one. POLICIES, all that can be chosen, is at the foot.

    Policy = Callable[[View, CostModel], Plan]

with length() and order() beside it (serving.request.Policy): the queue keeps the order of keys, so a call looks at few requests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from serving.policies.lengths import (
    COARSE,
    expected_left,
    quantile_left,
    quantile_tokens,
    tokens_left,
)
from serving.policies.static import BATCH_POLICIES, Static
from serving.request import FOREVER, CostModel, Limits, Plan, Record, Request, View


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


def make_room(
    draft: Draft, wanted: Callable[[Record, int], int], victims: Callable[[], list[Record]]
):
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

    def order(
        self, record: Record, now_s: float, pace_s: float, cost: CostModel
    ) -> tuple[float, float]:
        return record.request.arrival_s, FOREVER

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft, limits = Draft(view), view.limits
        if view.overran:
            make_room(
                draft,
                lambda record, generated: min(
                    record.reserved_tokens + self.block_tokens, limits.max_tokens
                ),
                lambda: sorted(
                    view.running.values(), key=lambda r: (-r.request.arrival_s, -r.request.id)
                ),
            )
        if not draft.preempt and draft.rows < limits.max_batch:
            spare = int(self.watermark * limits.kv_tokens)
            for record in view.waiting:
                tokens = min(record.context_tokens + self.block_tokens, limits.max_tokens)
                if (draft.free - tokens < spare and draft.rows) or not draft.add(record, tokens):
                    break
        return draft.plan(
            wake_on_arrival=draft.rows < limits.max_batch
            and not len(view.waiting) > len(draft.admit)
        )


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

    def order(
        self, record: Record, now_s: float, pace_s: float, cost: CostModel
    ) -> tuple[float, float]:
        return tokens_left(record.request, record.generated), FOREVER

    def reserve(self, record: Record, generated: int, limits: Limits) -> int:
        """KV tokens for prompt, answer so far and this quantile of the rest."""
        left = (
            quantile_left(record.request.prediction, generated, self.reserve_quantile)
            if generated
            else record.length
        )
        return min(record.request.prompt_tokens + generated + math.ceil(left), limits.max_tokens)

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft = self.draft(view)
        return draft.plan(wake_on_arrival=draft.rows < view.limits.max_batch)

    def draft(self, view: View) -> Draft:
        """Overruns answered; where that preempted nobody, filled."""
        draft = Draft(view)
        if view.overran:
            make_room(
                draft,
                lambda r, generated: self.reserve(r, generated, view.limits),
                lambda: self.victims(view),
            )
        if not draft.preempt:
            self.fill(draft)
        return draft

    def fill(self, draft: Draft):
        limits = draft.view.limits
        if draft.rows < limits.max_batch:
            for record in draft.view.waiting:
                if not draft.add(record, self.reserve(record, record.generated, limits)):
                    break

    def victims(self, view: View) -> list[Record]:
        """Running records, the one with most left first."""
        return sorted(
            view.running.values(),
            key=lambda r: (-tokens_left(r.request, view.generated(r)), r.request.id),
        )


@dataclass(frozen=True)
class Srpt(Sjf):
    """Shortest remaining predicted answer first, also among those that run (TRAIL; Shahout et al., arXiv 2410.01035).

    Attributes:
        advantage: a waiting answer displaces a running one that has at least this many times as much left; what that one
            has computed is computed again.
    """

    advantage: float = 2.0

    def __call__(self, view: View, cost: CostModel) -> Plan:
        return self.draft(view).plan()

    def fill(self, draft: Draft):
        super().fill(draft)
        view, victims = draft.view, None
        if len(draft.admit) == len(view.waiting):
            return
        for record in view.waiting:
            if record.request.id in draft.reserve:
                continue
            victims = iter(self.victims(view)) if victims is None else victims
            victim = next((v for v in victims if v.request.id not in draft.reserve), None)
            left = tokens_left(record.request, record.generated)
            if (
                victim is None
                or tokens_left(victim.request, view.generated(victim)) < self.advantage * left
            ):
                break
            draft.drop(victim)
            if not draft.add(record, self.reserve(record, record.generated, view.limits)):
                break


@dataclass(frozen=True)
class Deadline:
    """Ours: as many answers in time as there can be, and none starves.

    Order. A request can be in time until its latest start,  arrival + slo - prefill_s(context) - pace x tokens left,  with tokens
    left at the hope_quantile: it counts as late only when even a short answer would be. Until then its key is
    arrival + slo_weight slo + work_weight (prefill_s + pace x mean tokens left):  the urgent first and, the more so the greater
    work_weight, the cheap first. Once late, its key is late_s more. It changes but that once, so a heap keeps the order.

    Ageing. ceil(late_share x rows) rows are a lane for the late, by arrival; where memory lacks for the first of them, nobody is
    admitted until it is there. So whoever is late and has n before it waits for n answers of that lane at most, whatever comes later.

    Memory. prompt + the conformal admit_quantile of the answer; an answer that outgrows it gets that quantile of what is left,
    at least grow_tokens.

    Preemption. A request that must start before another row is likely to end takes the place of a running one that is late
    by the same measure and has much left: the row-seconds this frees, tokens left x pace, less those lost while it is computed again, prefill_s(its
    context) x rows, must be preempt_gain of the newcomer's work, which is what a deadline costs. None is preempted twice for this,
    nor is anyone in the lane.

    Attributes:
        admit_quantile, hope_quantile, late_share: in 0..1.
        preempt_gain: 0 preempts lightly, inf never. Below about 3 it costs more objectives than it saves wherever the machine is
            full: what is freed is only put off, and computing a prompt again holds up every row.
        look_s: where all is full, arrivals are looked at this often at least, for one to preempt for.
        truth: count on true lengths (an oracle, for benchmarks).
    """

    admit_quantile: float = 0.4
    grow_tokens: int = 64
    hope_quantile: float = 0.07
    slo_weight: float = 1.0
    work_weight: float = 0.5
    late_s: float = 1000.0
    late_share: float = 0.05
    preempt_gain: float = 10.0
    look_s: float = 0.25
    truth: bool = False
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return (
            request.output_tokens
            if self.truth
            else quantile_tokens(request.prediction, self.admit_quantile)
        )

    def left(self, record: Record, generated: int, q: float | None = None) -> float:
        """Answer tokens still to come: their mean, or a quantile."""
        request = record.request
        if self.truth:
            return max(request.output_tokens - generated, 1)
        generated -= generated % COARSE
        return (
            expected_left(request.prediction, generated)
            if q is None
            else quantile_left(request.prediction, generated, q)
        )

    def reserve(self, record: Record, generated: int, limits: Limits) -> int:
        if self.truth:
            left = self.left(record, generated)
        else:
            left = (
                max(self.left(record, generated, self.admit_quantile), self.grow_tokens)
                if generated
                else record.length
            )
        return min(record.request.prompt_tokens + generated + math.ceil(left), limits.max_tokens)

    def order(
        self, record: Record, now_s: float, pace_s: float, cost: CostModel
    ) -> tuple[float, float]:
        request, context = record.request, record.context_tokens
        pace_s = pace_s or cost.decode_step_s(1, context)
        prefill = cost.prefill_s(context)
        latest = (
            request.arrival_s
            + request.slo_s
            - prefill
            - pace_s * self.left(record, record.generated, self.hope_quantile)
        )
        key = request.arrival_s + self.slo_weight * request.slo_s
        if self.work_weight:
            key += self.work_weight * (prefill + pace_s * self.left(record, record.generated))
        return (key, latest) if now_s <= latest else (key + self.late_s, FOREVER)

    def __call__(self, view: View, cost: CostModel) -> Plan:
        draft, limits = Draft(view), view.limits
        if view.overran:
            make_room(
                draft,
                lambda r, generated: self.reserve(r, generated, limits),
                lambda: self.victims(view),
            )
        blocked, wake_s = None, FOREVER
        if not draft.preempt and len(view.waiting):
            blocked = self.fill(draft)
            if (
                blocked is not None
                and not self.late(blocked, view.now_s)
                and self.preempt_gain < FOREVER
            ):
                wake_s = self.displace(draft, blocked, cost)
        full = draft.rows >= limits.max_batch or blocked is not None
        if full and self.preempt_gain < FOREVER:
            wake_s = min(wake_s, view.now_s + self.look_s)
        return draft.plan(wake_s=wake_s, wake_on_arrival=not full)

    @staticmethod
    def late(record: Record, at_s: float) -> bool:
        return record.until_s == FOREVER or at_s > record.until_s

    def fill(self, draft: Draft) -> Record | None:
        """Admit in order while there is room; who could not be admitted."""
        view, limits = draft.view, draft.view.limits
        if draft.rows >= limits.max_batch:
            return next(iter(view.waiting))
        first = view.waiting.oldest()
        if self.late(first, view.now_s):
            lane = sum(
                [not r.admitted_s <= r.until_s < FOREVER for r in view.running.values()]
            )  # late when admitted
            if lane < self.late_share * (draft.rows + 1) and not draft.add(
                first, self.reserve(first, first.generated, limits)
            ):
                return first
        for record in view.waiting:
            if record.request.id not in draft.reserve and not draft.add(
                record, self.reserve(record, record.generated, limits)
            ):
                return record
        return None

    def displace(self, draft: Draft, record: Record, cost: CostModel) -> float:
        """Preempt for a request that must start now; or when to look again."""
        view = draft.view
        now, pace = view.now_s, view.pace_s
        work = cost.prefill_s(record.context_tokens) + pace * self.left(record, record.generated)
        must_s = (
            record.request.deadline_s - work - work / max(draft.rows, 1)
        )  # a row ends about that often
        if now < must_s:
            return must_s
        best, victim = self.preempt_gain * work, None
        rows, prefill_s, generated_of = draft.rows, cost.prefill_s, view.generated
        for r in view.running.values():
            if (
                r.preemptions
                or r.until_s == FOREVER
                or r.admitted_s > r.until_s
                or r.request.id in draft.reserve
            ):
                continue
            request = r.request
            slack = request.arrival_s + request.slo_s - now
            if slack >= pace * r.length:  # most are: the rest need not be asked for
                continue
            generated = generated_of(r)
            saved = pace * self.left(r, generated)  # at most
            if saved > best and slack < pace * self.left(r, generated, self.hope_quantile):
                saved -= prefill_s(request.prompt_tokens + generated) * rows
                if saved > best:
                    best, victim = saved, r
        tokens = self.reserve(record, record.generated, view.limits)
        if victim is not None and tokens <= draft.free + victim.reserved_tokens:
            draft.drop(victim)
            draft.add(record, tokens)
        return FOREVER

    def victims(self, view: View) -> list[Record]:
        """Running records by their deadlines, the latest first; the one that came first comes last."""
        rows = sorted(view.running.values(), key=lambda r: (-r.request.deadline_s, -r.request.id))
        oldest = min(rows, key=lambda r: (r.request.arrival_s, r.request.id))
        rows.remove(oldest)
        return [*rows, oldest]


POLICIES = {name: Static(batching) for name, batching in BATCH_POLICIES.items()} | {
    "fcfs": Fcfs(),
    "sjf": Sjf(),
    "srpt": Srpt(),
    "deadline": Deadline(),
    "deadline_oracle": Deadline(truth=True),
}
