"""Iteration-level policies: sequences join and leave the batch one by one.

    Policy = Callable[[View, CostEstimator], Plan]

with length() and order() beside it (serving.request.Policy): the queue is ordered by keys, so a
call looks at few requests. POLICIES, all policies that can be chosen, is at the foot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from serving.policies.drafts import PlanDraft, make_room
from serving.policies.gittins import OBJECTIVES, Gittins
from serving.policies.lengths import (
    COARSE,
    expected_remaining,
    quantile_remaining,
    quantile_tokens,
)
from serving.policies.published import Boost, Fcfs, Sjf, Srpt, Tie
from serving.policies.static import BATCH_POLICIES, Static
from serving.policies.vllm import Vllm
from serving.request import (
    FOREVER,
    CostEstimator,
    Limits,
    Moment,
    Plan,
    Policy,
    Record,
    Request,
    View,
)


@dataclass(frozen=True)
class Deadline:
    """This project's policy: as many answers in time as possible, and no request starves.

    Order. A request can be in time until its latest start,

        latest = arrival + slo - prefill_s(context) - pace x tokens left,

    with tokens left at the hope_quantile: it counts as late only when even a short answer would be.
    Until then its key is

        arrival + slo_weight slo + work_weight (prefill_s + pace x mean tokens left):

    urgent requests first and, the more so the greater work_weight, cheap ones. Once a request is
    late, late_s is added to its key. The key changes only that once, so a heap keeps the order.

    Ageing. ceil(late_share x rows) rows are a lane for late requests, by arrival; where memory
    lacks for the first of them, none is admitted until it is free. So a late request with n before
    it waits for at most n answers of that lane, whatever arrives later.

    Memory. prompt + the conformal admit_quantile of the answer; an answer that outgrows it gets
    that quantile of the remaining length, at least grow_tokens.

    Preemption. A request that must start before another row is likely to end takes the place of a
    running one that is late by the same measure and has much left. The row-seconds that this frees,
    tokens left x pace, less those lost while it is computed again, prefill_s(its context) x rows,
    must be preempt_gain times the newcomer's work, which is what a missed deadline costs. No
    request is preempted twice for this, nor any in the lane.

    Attributes:
        admit_quantile, hope_quantile, late_share: in 0..1.
        preempt_gain: 0 preempts lightly, inf never. Below about 3 it misses more objectives than it
            saves wherever the machine is full: what is freed is only put off, and computing a
            prompt again delays every row.
        look_s: with a full batch, plan at least this often, to see arrivals worth a preemption.
        truth: use true lengths (an oracle, for benchmarks).
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
        if self.truth:
            return request.output_tokens
        return quantile_tokens(request.prediction, self.admit_quantile)

    def remaining(self, record: Record, generated: int, q: float | None = None) -> float:
        """Answer tokens that follow the `generated` ones: their mean, or the q-quantile."""
        if self.truth:
            return max(record.request.output_tokens - generated, 1)
        generated -= generated % COARSE
        if q is None:
            return expected_remaining(record.prediction, generated)
        return quantile_remaining(record.prediction, generated, q)

    def reserve(self, record: Record, generated: int, limits: Limits) -> int:
        """KV tokens for the prompt, the answer so far and what is expected of the rest."""
        if self.truth:
            remaining = self.remaining(record, generated)
        elif generated:
            remaining = max(
                self.remaining(record, generated, self.admit_quantile), self.grow_tokens
            )
        else:
            remaining = record.length
        return min(
            record.request.prompt_tokens + generated + math.ceil(remaining), limits.max_tokens
        )

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        request, context, cost = record.request, record.context_tokens, moment.cost
        pace_s = moment.pace_s or cost.decode_step_s(1, context)
        prefill = cost.prefill_s(context)
        shortest = pace_s * self.remaining(record, record.generated, self.hope_quantile)
        latest = request.arrival_s + request.slo_s - prefill - shortest
        key = request.arrival_s + self.slo_weight * request.slo_s
        if self.work_weight:
            key += self.work_weight * (prefill + pace_s * self.remaining(record, record.generated))
        return (key, latest) if moment.now_s <= latest else (key + self.late_s, FOREVER)

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        draft, limits = PlanDraft(view), view.limits
        if view.overran:
            make_room(
                draft,
                lambda r: self.reserve(r, view.generated(r), limits),
                lambda: self.victims(view),
            )
        blocked, wake_s = None, FOREVER
        may_preempt = self.preempt_gain < FOREVER
        if not draft.preempt and len(view.waiting):
            blocked = self.admit_waiting(draft)
            if blocked is not None and may_preempt and not self.is_late(blocked, view.now_s):
                wake_s = self.displace(draft, blocked, cost)
        full = draft.rows >= limits.max_batch or blocked is not None
        if full and may_preempt:
            wake_s = min(wake_s, view.now_s + self.look_s)
        return draft.plan(wake_s=wake_s, wake_on_arrival=not full)

    @staticmethod
    def is_late(record: Record, at_s: float) -> bool:
        """Whether the record's latest start lies before this time."""
        return record.until_s == FOREVER or at_s > record.until_s

    def admit_waiting(self, draft: PlanDraft) -> Record | None:
        """Admit in order while there is room; the first record that could not be admitted."""
        view, limits = draft.view, draft.view.limits
        if draft.rows >= limits.max_batch:
            return next(iter(view.waiting))
        first = view.waiting.oldest()
        if self.is_late(first, view.now_s):
            # The rows of the lane: those that were late when they were admitted.
            lane = sum([not r.admitted_s <= r.until_s < FOREVER for r in view.running.values()])
            if lane < self.late_share * (draft.rows + 1):
                tokens = self.reserve(first, first.generated, limits)
                if not draft.try_admit(first, tokens):
                    return first
        for record in view.waiting:
            if record.request.id in draft.reserve:
                continue
            if not draft.try_admit(record, self.reserve(record, record.generated, limits)):
                return record
        return None

    def displace(self, draft: PlanDraft, record: Record, cost: CostEstimator) -> float:
        """Preempt for a request that must start now; the time to plan again."""
        view = draft.view
        work = cost.prefill_s(record.context_tokens)
        work += view.pace_s * self.remaining(record, record.generated)
        # A row ends about every work / rows seconds.
        must_s = record.request.deadline_s - work - work / max(draft.rows, 1)
        if view.now_s < must_s:
            return must_s
        victim = self.late_victim(draft, cost, self.preempt_gain * work)
        tokens = self.reserve(record, record.generated, view.limits)
        if victim is not None and tokens <= draft.free + victim.reserved_tokens:
            draft.preempt_record(victim)
            draft.try_admit(record, tokens)
        return FOREVER

    def late_victim(self, draft: PlanDraft, cost: CostEstimator, least: float) -> Record | None:
        """The late running record whose preemption saves most row-seconds, above `least`."""
        view = draft.view
        now, pace = view.now_s, view.pace_s
        rows, prefill_s, generated_of = draft.rows, cost.prefill_s, view.generated
        best, victim = least, None
        for record in view.running.values():
            if record.preemptions or record.until_s == FOREVER:
                continue
            request = record.request
            if record.admitted_s > record.until_s or request.id in draft.reserve:
                continue
            slack = request.arrival_s + request.slo_s - now
            # Rejects most records before the costlier quantiles are computed.
            if slack >= pace * record.length:
                continue
            generated = generated_of(record)
            # An upper bound: prefilling it again is still to be subtracted.
            saved = pace * self.remaining(record, generated)
            if saved > best and slack < pace * self.remaining(
                record, generated, self.hope_quantile
            ):
                saved -= prefill_s(request.prompt_tokens + generated) * rows
                if saved > best:
                    best, victim = saved, record
        return victim

    def victims(self, view: View) -> list[Record]:
        """Running records, the latest deadline first; the one that arrived first comes last."""
        rows = sorted(view.running.values(), key=lambda r: (-r.request.deadline_s, -r.request.id))
        oldest = min(rows, key=lambda r: (r.request.arrival_s, r.request.id))
        rows.remove(oldest)
        return [*rows, oldest]


POLICIES: dict[str, Policy] = {
    **{name: Static(batching) for name, batching in BATCH_POLICIES.items()},
    "fcfs": Fcfs(),
    "sjf": Sjf(),
    "srpt": Srpt(),
    "deadline": Deadline(),
    "deadline_oracle": Deadline(truth=True),
    "boost": Boost(),
    "boost_work": Boost(work="predicted"),
    "boost_oracle": Boost(work="true"),
    "tie": Tie(),
    "gittins": OBJECTIVES["deadline"],
    "gittins_mean": OBJECTIVES["mean"],
    "gittins_tail": OBJECTIVES["tail"],
    "gittins_oracle": Gittins(truth=True),
}

# What the simulator runs: vLLM reserves prompts in parts, which engines with a model do not take.
SIMULATED: dict[str, Policy] = {**POLICIES, "vllm": Vllm()}

POLICY_HELP = (
    "continuous batching by fcfs (order of arrival) and boost without predictions, by sjf, srpt, "
    "tie, deadline and gittins with them; fifo to annealing cut static batches (docs/scheduling.md)"
)
OBJECTIVE_HELP = (
    "what the policy gittins optimises: mean latency, p99 latency, or the share of answers within "
    "their SLO [deadline]"
)


def with_objective(names: Sequence[str], objective: str | None) -> list[str]:
    """The names, `gittins` being that of its setting for the objective; None changes nothing.

    Raises:
        ValueError: an objective, and gittins is not among the names.
    """
    if objective is None:
        return list(names)
    if "gittins" not in names:
        raise ValueError(
            f"--objective {objective} is of the policy gittins; got {', '.join(names)}"
        )
    setting = "gittins" if objective == "deadline" else f"gittins_{objective}"
    return [setting if name == "gittins" else name for name in names]
