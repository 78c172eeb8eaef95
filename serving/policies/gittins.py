"""This project's policy by predicted lengths: one index, and what it is derived from.

`gittins` is POLICIES' name for it; OBJECTIVES are its settings.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from serving.policies.drafts import plan_in_turn
from serving.policies.lengths import (
    COARSE,
    expected_remaining,
    expected_tokens,
    left_of,
    quantile_remaining,
    token_s,
)
from serving.policies.published import boost_s
from serving.request import (
    FOREVER,
    Backlog,
    CostEstimator,
    Limits,
    Moment,
    Plan,
    Record,
    Request,
    View,
)

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction

LATE_S = 1e5  # what puts requests that cannot be in time behind all others


def log_index(left: "LengthPrediction", before_s: float, token_s: float, rate: float) -> float:
    """ln of the largest E[exp(g W(L)); L <= D] / (E[exp(g W(min(L, D)))] - 1) over D.

    W(n) = before_s + token_s n is the work of n tokens, L has the distribution `left`, D is one of
    its edges. With g -> 0, g times the index is Gittins's P(L <= D) / E[W(min(L, D))]; of a length
    that is known it is 1 / (1 - exp(-g W)), gamma-Boost's.

    Args:
        before_s: work before the first token. token_s: of each token. rate: g, per second.
    """
    import numpy as np  # here, as in lengths.py

    exponents = rate * token_s * left.edges
    growth = np.exp(exponents)
    steps = exponents[1:] - exponents[:-1]
    # The mean of exp over each bin, in which lengths are spread evenly; near 1 its middle's.
    middles = np.exp((exponents[1:] + exponents[:-1]) / 2)
    rises = growth[1:] - growth[:-1]
    inside = np.where(steps > 1e-5, rises / np.maximum(steps, 1e-12), middles)
    mass = left.probabilities
    done = (mass * inside).cumsum()
    # exp(g before_s) stands in all terms but the 1, so all are divided by it.
    spent = done + (1 - mass.cumsum()) * growth[1:] - math.exp(-rate * before_s)
    return math.log(max(float((done / np.maximum(spent, 1e-300)).max()), 1e-300))


def backlog_s(backlog: Backlog, limits: Limits, cost: CostEstimator) -> float:
    """Seconds of the machine that waiting requests take, each as long as their mean."""
    if not backlog.requests:
        return 0.0
    context = backlog.context_tokens // backlog.requests
    answer = backlog.answer_tokens / backlog.requests
    each_s = cost.prefill_s(context) + answer * token_s(context, answer, limits, cost)
    return backlog.requests * each_s


@dataclass(frozen=True)
class Gittins:
    """Serve first what takes most cost away per second of the machine.

    Derivation. A request that is done t seconds after its due time d costs exp(g (t - d)): with a
    small g the sum of costs goes by mean latency, with a large one by the latest. Of two requests
    that are taken one after the other, the first should be the one with the larger

        exp(-g d) sup_D E[exp(g W(L)); L <= D] / (E[exp(g W(min(L, D)))] - 1),

    the Gittins index of this cost (Gittins 1979; for exp(g t), gamma-Boost: Yu and Scully, and
    Harlev, Yu and Scully, "A Gittins policy for optimizing tail latency"): the cost taken away by
    working on it until it is done or has D tokens, per growth of all other costs meanwhile. L is
    the tokens left by what is predicted now (Record.prediction: the posterior where answers are
    re-read), W = prefill_s(context) + price x tokens its work. The key is its logarithm:

        key = d - ln(sup ...) / g.

    Rows run side by side, so a request takes longer than its work: d is due - pace x the
    hope-quantile of its tokens left, a time it takes in any case. (With T the time it takes, the
    index of rows that run side by side is exp(-g due) E[exp(g T)] / (E[exp(g W)] - 1); T = W + pace
    x that quantile gives the above. A low one, as an error in T counts exponentially.)

    Prices. A token's price is a step's time over the sequences that share it in a full machine:
    the engine's max_batch, or as many of this size as its KV memory holds. Memory costs what it
    keeps out. Not `priced`, rows and memory are taken to be there and only prompts to delay others:
    then W is known, the index is gamma-Boost's of the prompt, and lengths count by d alone.

    Deadlines. With `deadlines`, due is arrival + slo, and a request whose latest start has passed
    costs nothing more whatever is done: it goes behind all others. Else due is the arrival.

    Promise. Nobody waits longer than 1 + patience times the longest wait by order of arrival and
    one request's work. V(t), the work that is there at t, is the same under every order that leaves
    no machine idle, and what arrives at t would wait V(t) by order of arrival. So where the oldest
    request has waited longer than patience times the work behind it, which is less than V(t), it is
    the next one, and nothing else is admitted until it is. It then waits for what arrived before
    it, V(t) at most. Rows that run side by side hold work of V(t) for which nobody waits, and less
    of it where short requests go first; so 2, which alone would give 3 times, for 5 in practice.

    Admission. No more prompts than the next pass computes (drafts.admit_in_turn); memory in blocks,
    as Fcfs; the smallest index is preempted when it runs out.

    Attributes:
        horizon_s: 1 / g: a request waits for others that are e times cheaper by as much.
        hope: quantile of the tokens left that its latest start assumes.
        priced: answer tokens have a price.
        patience: the oldest request waits as long as the work behind it takes, so many times.
        truth: use true lengths (an oracle, for benchmarks).
    """

    horizon_s: float = 30.0
    deadlines: bool = True
    hope: float = 0.05
    priced: bool = True
    patience: float = 2.0
    truth: bool = False
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        if self.truth:
            return request.output_tokens
        return expected_tokens(request.prediction)

    def mean_left(self, record: Record, generated: int) -> float:
        """Expected tokens after the `generated` ones; with `truth`, the true number."""
        if self.truth:
            return max(record.request.output_tokens - generated, 1)
        return expected_remaining(record.prediction, generated - generated % COARSE)

    def least_left(self, record: Record, generated: int) -> float:
        """The hope-quantile of the tokens after the `generated` ones."""
        if self.truth:
            return self.mean_left(record, generated)
        return quantile_remaining(record.prediction, generated - generated % COARSE, self.hope)

    def head_start_s(
        self,
        record: Record,
        generated: int,
        before_s: float,
        cost: CostEstimator,
        limits: Limits,
    ) -> float:
        """ln(index) / g of what is left after `generated` tokens and before_s of work."""
        rate = 1 / self.horizon_s
        if not self.priced:
            return boost_s(before_s, rate)
        mean = self.mean_left(record, generated)
        price = token_s(record.request.prompt_tokens + generated, mean, limits, cost)
        if self.truth:
            return boost_s(before_s + price * mean, rate)
        left = left_of(record, generated)
        return log_index(left, before_s, price, rate) * self.horizon_s

    def must_decode_s(self, record: Record, generated: int, pace_s: float) -> float:
        """When it must decode to be done when it is due, at its least length: d."""
        request = record.request
        due = request.arrival_s + (request.slo_s if self.deadlines else 0.0)
        return due - pace_s * self.least_left(record, generated)

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        context, generated, cost = record.context_tokens, record.generated, moment.cost
        prefill = cost.prefill_s(context)
        pace_s = moment.pace_s or cost.decode_step_s(1, context)
        must_s = self.must_decode_s(record, generated, pace_s)
        key = must_s - self.head_start_s(record, generated, prefill, cost, moment.limits)
        if not self.deadlines:
            return key, FOREVER
        latest = must_s - prefill
        return (key, latest) if moment.now_s <= latest else (key + LATE_S, FOREVER)

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        return plan_in_turn(
            view, cost, lambda: self.victims(view, cost), lambda: self.overdue(view, cost)
        )

    def overdue(self, view: View, cost: CostEstimator) -> Record | None:
        """The oldest waiting request, where it has waited longer than the promise allows."""
        oldest = view.waiting.oldest()
        requests, context, answer = view.waiting.backlog()
        behind = Backlog(requests - 1, context - oldest.context_tokens, answer - oldest.length)
        allowed_s = self.patience * backlog_s(behind, view.limits, cost)
        return oldest if view.now_s - oldest.request.arrival_s > allowed_s else None

    def victims(self, view: View, cost: CostEstimator) -> list[Record]:
        """Running records, the one with the largest key first; the oldest comes last."""
        keyed = []
        for record in view.running.values():
            generated = view.generated(record)
            key = self.must_decode_s(record, generated, view.pace_s)
            key -= self.head_start_s(record, generated, 0.0, cost, view.limits)
            keyed.append((-key, record.request.id, record))
        keyed.sort(key=lambda entry: entry[:2])
        records = [record for *_, record in keyed]
        oldest = min(records, key=lambda r: (r.request.arrival_s, r.request.id))
        records.remove(oldest)
        return [*records, oldest]


# What --objective chooses: the least mean latency, the least p99, the most answers in time. The
# horizons were searched on other seeds than comparisons use.
OBJECTIVES: dict[str, Gittins] = {
    "mean": Gittins(horizon_s=1000.0, deadlines=False),
    "tail": Gittins(horizon_s=4.0, deadlines=False, hope=0.02, priced=False),
    "deadline": Gittins(),
}
