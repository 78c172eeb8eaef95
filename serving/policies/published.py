"""Iteration-level policies of other works; each docstring has its source and equation."""

import math
from dataclasses import dataclass
from typing import ClassVar

from serving.policies.drafts import (
    BLOCK_TOKENS,
    WATERMARK,
    PlanDraft,
    make_room,
    plan_in_turn,
)
from serving.policies.lengths import (
    COARSE,
    expected_remaining,
    quantile_remaining,
    quantile_tokens,
    remaining_tokens,
    tail_remaining,
    token_s,
)
from serving.request import FOREVER, CostEstimator, Limits, Moment, Plan, Record, Request, View


@dataclass(frozen=True)
class Fcfs:
    """First come, first served, with KV memory in blocks as an answer grows.

    This is what vLLM does (Kwon et al., arXiv 2309.06180). Where memory runs out, the request that
    arrived last is preempted and computed again later. Needs no prediction.

    Attributes:
        block_tokens: an answer's reservation grows by so much at a time.
        watermark: share of the KV memory left free at admission.
    """

    block_tokens: int = BLOCK_TOKENS
    watermark: float = WATERMARK
    predicts: ClassVar[bool] = False

    def length(self, request: Request) -> float:
        return self.block_tokens

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        return record.request.arrival_s, FOREVER

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        draft, limits = PlanDraft(view), view.limits
        if view.overran:
            make_room(
                draft,
                lambda r: min(r.reserved_tokens + self.block_tokens, limits.max_tokens),
                lambda: self.victims(view),
            )
        if not draft.preempt and draft.rows < limits.max_batch:
            spare = int(self.watermark * limits.kv_tokens)
            for record in view.waiting:
                tokens = min(record.context_tokens + self.block_tokens, limits.max_tokens)
                if (draft.free - tokens < spare and draft.rows) or not draft.try_admit(
                    record, tokens
                ):
                    break
        all_admitted = len(view.waiting) <= len(draft.admit)
        return draft.plan(wake_on_arrival=draft.rows < limits.max_batch and all_admitted)

    def victims(self, view: View) -> list[Record]:
        """Running records, the one that arrived last first."""
        records = view.running.values()
        return sorted(records, key=lambda r: (-r.request.arrival_s, -r.request.id))


@dataclass(frozen=True)
class Sjf:
    """Shortest predicted answer first, run to its end (SSJF; Qiu et al., arXiv 2404.08509).

    Gives the least mean wait; long answers may starve.

    Attributes:
        reserve_quantile: KV memory is reserved for this quantile of the answer's length; an overrun
            gets the same quantile of the remaining length.
    """

    reserve_quantile: float = 0.9
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return quantile_tokens(request.prediction, self.reserve_quantile)

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        return remaining_tokens(record, record.generated), FOREVER

    def reserve(self, record: Record, generated: int, limits: Limits) -> int:
        """KV tokens for the prompt, the answer so far and the quantile of the rest."""
        remaining = record.length
        if generated:
            remaining = quantile_remaining(record.prediction, generated, self.reserve_quantile)
        return min(
            record.request.prompt_tokens + generated + math.ceil(remaining), limits.max_tokens
        )

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        draft = self.make_draft(view)
        return draft.plan(wake_on_arrival=draft.rows < view.limits.max_batch)

    def make_draft(self, view: View) -> PlanDraft:
        """A draft with the overruns handled and, where that preempted none, new requests."""
        draft = PlanDraft(view)
        if view.overran:
            make_room(
                draft,
                lambda r: self.reserve(r, view.generated(r), view.limits),
                lambda: self.victims(view),
            )
        if not draft.preempt:
            self.admit_waiting(draft)
        return draft

    def admit_waiting(self, draft: PlanDraft) -> None:
        """Admit in the queue's order while there is room."""
        limits = draft.view.limits
        if draft.rows < limits.max_batch:
            for record in draft.view.waiting:
                if not draft.try_admit(record, self.reserve(record, record.generated, limits)):
                    break

    def victims(self, view: View) -> list[Record]:
        """Running records, the one with most tokens left first."""
        return sorted(
            view.running.values(),
            key=lambda r: (-remaining_tokens(r, view.generated(r)), r.request.id),
        )


@dataclass(frozen=True)
class Srpt(Sjf):
    """Shortest remaining predicted answer first, running ones included.

    Source: TRAIL (Shahout et al., arXiv 2410.01035).

    Attributes:
        advantage: a waiting answer displaces a running one that has at least this many times as
            much left; what that one has computed is computed again.
    """

    advantage: float = 2.0

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        return self.make_draft(view).plan()

    def admit_waiting(self, draft: PlanDraft) -> None:
        """Admit while there is room, then displace longer running answers."""
        super().admit_waiting(draft)
        view, victims = draft.view, None
        if len(draft.admit) == len(view.waiting):
            return
        for record in view.waiting:
            if record.request.id in draft.reserve:
                continue
            if victims is None:
                victims = iter(self.victims(view))
            victim = next((v for v in victims if v.request.id not in draft.reserve), None)
            if victim is None:
                break
            remaining = remaining_tokens(record, record.generated)
            victim_left = remaining_tokens(victim, view.generated(victim))
            if victim_left < self.advantage * remaining:
                break
            draft.preempt_record(victim)
            if not draft.try_admit(record, self.reserve(record, record.generated, view.limits)):
                break


def boost_s(work_s: float, rate: float) -> float:
    """Seconds by which a request is taken to have arrived earlier: ln(1 / (1 - exp(-g w))) / g.

    Args:
        work_s: w, seconds of the machine. rate: g, per second.
    """
    return -math.log(-math.expm1(-rate * max(work_s, 1e-9))) / rate


@dataclass(frozen=True)
class InTurn(Sjf):
    """What Boost and Tie share: prompts admitted as passes have room, memory in blocks as Fcfs."""

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        return plan_in_turn(view, cost, lambda: self.victims(view))

    def victims(self, view: View) -> list[Record]:
        """Running records, the one that was last in the queue's order first."""
        return sorted(view.running.values(), key=lambda r: (-r.key, -r.request.id))


@dataclass(frozen=True)
class Boost(InTurn):
    """Order of arrival, small requests taken to have arrived earlier.

    UniBoost (arXiv 2606.18431), after gamma-Boost (Yu and Scully, 2024):

        key = arrival - ln(1 / (1 - exp(-g w))) / g.

    g -> infinity is first come, first served; g -> 0 smallest w first. A request that waits is
    overtaken by later ones only while their boost makes up for its wait, so none starves. Its
    controller of g by observed latencies is left out: a policy here has no state.

    Attributes:
        rate: g, per second.
        work: what w counts, in seconds of the machine: "prompt" the prompt's uncached tokens
            (UniBoost's own, which predicts nothing), "predicted" the answer's expected tokens
            too, "true" its true ones (an oracle, for benchmarks).
    """

    rate: float = 0.3
    work: str = "prompt"

    @property
    def predicts(self) -> bool:  # type: ignore[override]
        return self.work == "predicted"

    def length(self, request: Request) -> float:
        if self.work == "predicted":
            return super().length(request)
        return request.output_tokens if self.work == "true" else BLOCK_TOKENS

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        work_s = self.work_s(record, moment.cost, moment.limits)
        return record.request.arrival_s - boost_s(work_s, self.rate), FOREVER

    def work_s(self, record: Record, cost: CostEstimator, limits: Limits) -> float:
        """w."""
        context = record.context_tokens
        prompt = cost.prefill_s(context)
        if self.work == "prompt":
            return prompt
        left = max(record.request.output_tokens - record.generated, 1.0)
        if self.work == "predicted":
            left = remaining_tokens(record, record.generated)
        return prompt + left * token_s(context, left, limits, cost)


@dataclass(frozen=True)
class Tie(InTurn):
    """Shortest tail-inflated expectation first (TIE, arXiv 2604.00499).

        key = E[L] + inflation x CVaR_level(L),

    of the tokens left L: an answer that may become very long counts as longer. TIE fits a log-t
    distribution to a model's estimates; here L is the predictor's own distribution.

    Attributes:
        inflation: weight of the tail.
        level: CVaR_level is the mean beyond this quantile.
    """

    inflation: float = 1.0
    level: float = 0.9

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        generated = record.generated - record.generated % COARSE
        tail = tail_remaining(record.prediction, generated, self.level)
        return expected_remaining(record.prediction, generated) + self.inflation * tail, FOREVER
