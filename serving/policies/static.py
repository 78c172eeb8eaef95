"""Static batches: which waiting requests run together, padded to one shape, until all have ended.

    BatchPolicy: (View, CostEstimator) -> Iterable[Batch]

makes batches of all waiting requests, the one to run first first. `Static` turns it into a Policy:
it starts the first batch when nothing runs. So a policy that finds its first batch without looking
at all requests yields lazily and never makes the others.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from serving.policies.lengths import bucket_tokens, expected_tokens, quantile_tokens
from serving.request import (
    FOREVER,
    Batch,
    CostEstimator,
    Limits,
    Moment,
    Plan,
    Record,
    Request,
    View,
)


class BatchPolicy(Protocol):
    """A frozen dataclass that makes batches; `predicts` and `length` are a Policy's."""

    @property
    def predicts(self) -> bool: ...
    def length(self, request: Request) -> float: ...
    def __call__(self, view: View, cost: CostEstimator) -> Iterable[Batch]: ...


def reserved_answer_tokens(record: Record, limits: Limits) -> int:
    """Answer tokens to reserve for the rest of an answer.

    What the policy expects, doubled at every overrun, and at most what the limit leaves.
    """
    most = limits.max_tokens - record.context_tokens
    wanted = record.length * (1 << record.overruns) - record.generated
    if record.overruns:
        wanted = max(wanted, record.length)
    if wanted >= most:
        return max(1, most)
    return max(1, min(most, math.ceil(wanted)))


class BatchShape:
    """A padded batch that grows: rows x (longest prompt + longest answer) KV tokens."""

    __slots__ = ("records", "prompt", "answer", "limits")

    def __init__(self, limits: Limits):
        self.records: list[Record] = []
        self.prompt = self.answer = 0
        self.limits = limits

    def try_add(self, record: Record, answer: int) -> bool:
        """Add the record if the batch stays within the limits; an empty batch takes any."""
        rows = len(self.records) + 1
        prompt = max(self.prompt, record.context_tokens)
        longest = max(self.answer, answer)
        kv_tokens = rows * (prompt + longest)
        fits = rows <= self.limits.max_batch and kv_tokens <= self.limits.kv_tokens
        if rows > 1 and not fits:
            return False
        self.records.append(record)
        self.prompt, self.answer = prompt, longest
        return True

    def batch(self, stop_tokens: int | None = None) -> Batch:
        """The batch, with the padded shape reserved for every row."""
        reserve_tokens = (self.prompt + self.answer,) * len(self.records)
        return Batch(tuple(self.records), reserve_tokens, stop_tokens)


def chunks(records: Iterable[Record], limits: Limits) -> Iterator[Batch]:
    """Consecutive batches of records in their order, each as large as the limits allow."""
    shape = BatchShape(limits)
    for record in records:
        answer = reserved_answer_tokens(record, limits)
        if not shape.try_add(record, answer):
            yield shape.batch()
            shape = BatchShape(limits)
            shape.try_add(record, answer)
    if shape.records:
        yield shape.batch()


def by_arrival(record: Record) -> tuple[float, int]:
    """A sorting key: arrival, then id."""
    return record.request.arrival_s, record.request.id


@dataclass(frozen=True)
class Fifo:
    """In order of arrival, every answer reserved at its limit: serving without prediction.

    Attributes:
        reserve_tokens: the limit of an answer, for which KV memory is reserved.
        rows: the most in a batch; None for as many as the engine's limits allow.
    """

    reserve_tokens: int = 2048
    rows: int | None = None
    predicts: ClassVar[bool] = False

    def length(self, request: Request) -> float:
        return self.reserve_tokens

    def __call__(self, view: View, cost: CostEstimator) -> Iterator[Batch]:
        limits = view.limits
        if self.rows is not None:
            limits = replace(limits, max_batch=min(self.rows, limits.max_batch))
        return chunks(sorted(view.waiting.most_urgent(), key=by_arrival), limits)


@dataclass(frozen=True)
class S3:
    """S3 (Jin et al., arXiv 2306.06000): memory by length bucket, packed by decreasing first fit.

    A request weighs prompt + upper bound of its bucket; the heaviest goes first, into the first
    batch that still has the memory. The supervisor preempts a row that outgrows its bucket, and
    reserves twice as much the next time. The paper leaves open which batch runs first where
    requests arrive over time: here the one with the request that has waited longest, so that none
    starves.

    Attributes:
        buckets: equal ones up to longest_tokens.
        grows: whether an overrun may get more memory; if not, it is preempted.
    """

    buckets: int = 10
    longest_tokens: int = 2048
    predicts: ClassVar[bool] = True
    grows: ClassVar[bool] = False

    def length(self, request: Request) -> float:
        return bucket_tokens(request.prediction, self.buckets, self.longest_tokens)

    def __call__(self, view: View, cost: CostEstimator) -> list[Batch]:
        records = list(view.waiting.most_urgent())
        rooms = [reserved_answer_tokens(r, view.limits) for r in records]
        prompts = [r.context_tokens for r in records]
        bins = decreasing_first_fit(prompts, rooms, view.limits.kv_tokens, view.limits.max_batch)
        batches = []
        for rows in bins:
            longest = max(prompts[i] for i in rows)
            reserve_tokens = tuple([longest + rooms[i] for i in rows])
            batches.append(Batch(tuple([records[i] for i in rows]), reserve_tokens))
        return sorted(batches, key=lambda batch: min(map(by_arrival, batch.records)))


def decreasing_first_fit(
    prompts: Sequence[int], answers: Sequence[int], capacity: int, most: int
) -> list[list[int]]:
    """Bins of item indices, at most `most` a bin.

    Heaviest item first, each into the first bin where rows x longest prompt + sum of answers <=
    capacity. The prompts of a bin are padded to its longest, so an item needs answer + prompt, and
    what the padding of the other rows grows by.

    The first open bins are tried one by one, where most items fit; numpy tries all others at once.
    """
    import numpy as np  # here, as in lengths.py

    count = len(prompts)
    order = np.lexsort((np.arange(count), -np.add(prompts, answers)))
    # Of each bin: rows + 1, the sum of answers, and (rows + 1) x longest prompt + that sum.
    state: list[tuple[int, int, float]] = []
    # The same as columns.
    joined, answer_sum, padded = np.ones(count), np.zeros(count), np.zeros(count)
    longest: list[int] = []
    bins: list[list[int]] = []
    first = 0  # bins before it are full
    smallest = min(answers, default=0)
    for i in order.tolist():
        prompt, answer = prompts[i], answers[i]
        k, used, room = first, len(bins), capacity - answer
        few = min(first + 4, used)
        while k < few and (state[k][2] > room or state[k][0] * prompt + state[k][1] > room):
            k += 1
        if few <= k < used:
            need = joined[k:used] * prompt
            need += answer_sum[k:used]
            fits = np.maximum(need, padded[k:used], out=need) <= room
            at = int(fits.argmax())
            k = k + at if fits[at] else used
        if k == used:
            bins.append([])
            longest.append(0)
            state.append((1, 0, 0.0))
        bins[k].append(i)
        if prompt > longest[k]:
            longest[k] = prompt
        rows, total = state[k][0] + 1, state[k][1] + answer
        filled = rows * longest[k] + total if rows <= most else float("inf")
        state[k] = rows, total, filled
        joined[k], answer_sum[k], padded[k] = rows, total, filled
        while first < len(bins) and state[first][2] > capacity - smallest:
            first += 1
    return bins


@dataclass(frozen=True)
class SloOdbs:
    """SLO-ODBS, and its two halves SLO-DBS and ODBS (UELLM, arXiv 2409.14961).

    The paper's "SLO and output-driven dynamic batch scheduler". A request joins the batch while
    w1 T_l + w2 T_o <= threshold,  over the batch with the request in it, where

        T_l = sum_i (SLO_i + L_CM) (|batch| + 1) L1
        T_o = sum_i (Len_i + O_CM) (|batch| + 1) L2

    |batch| counts the rows before it joins. CM is the row before it joins with the largest
    w1 SLO + w2 Len (the request itself, in an empty batch); L_CM and O_CM are that row's SLO and
    length. Otherwise it opens the next batch. Requests are taken by SLO, batches run by the
    w1 SLO + w2 Len of their CM, smallest first. w2 = 0 is SLO-DBS, w1 = 0 ODBS, which takes
    requests by length. The paper's requests are all there at time 0; with arrivals SLO_i is what is
    left of it, at least 0.

    Attributes:
        slo_weight: w1, per second.
        length_weight: w2, per token.
        slo_overhead, length_overhead: L1, L2: how much an added row slows the others.
        threshold: on the weighted sum, no unit.
        sort_by: slo, length, or composite (w1 SLO + w2 Len): the order in which requests are taken.
        reserve_quantile: KV memory is reserved for this quantile of the answers' lengths.
        truth: use true lengths (an oracle, for benchmarks).
    """

    slo_weight: float = 1.0
    length_weight: float = 0.5
    slo_overhead: float = 1.2
    length_overhead: float = 1.2
    threshold: float = 15_000.0
    sort_by: str = "slo"
    reserve_quantile: float = 0.9
    truth: bool = False
    predicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sort_by not in ("slo", "length", "composite"):
            raise ValueError(f"sort_by is slo, length or composite; got {self.sort_by!r}")

    def length(self, request: Request) -> float:
        if self.truth:
            return request.output_tokens
        return quantile_tokens(request.prediction, self.reserve_quantile)

    def __call__(self, view: View, cost: CostEstimator) -> list[Batch]:
        if not len(view.waiting):
            return []
        limits = view.limits
        batches: list[tuple[float, BatchShape]] = []
        shape, largest = BatchShape(limits), (0.0, 0.0, 0.0)
        slo_sum = length_sum = 0.0
        for slo, length, composite, record in self.sorted_rows(view):
            rows, answer = len(shape.records), reserved_answer_tokens(record, limits)
            row = (composite, slo, length)
            slo_term, length_term = self.terms(
                rows, slo_sum + slo, length_sum + length, largest if rows else row
            )
            weighted = self.slo_weight * slo_term + self.length_weight * length_term
            if rows and (weighted > self.threshold or not shape.try_add(record, answer)):
                batches.append((largest[0], shape))
                shape, largest = BatchShape(limits), (0.0, 0.0, 0.0)
                slo_sum = length_sum = 0.0
                rows = 0
            if not rows:
                shape.try_add(record, answer)
            slo_sum += slo
            length_sum += length
            largest = max(largest, row)
        batches.append((largest[0], shape))
        # The sort is stable: of equal ones, the batch made first runs first.
        return [shape.batch() for _, shape in sorted(batches, key=lambda batch: batch[0])]

    def sorted_rows(self, view: View) -> list[tuple[float, float, float, Record]]:
        """(SLO left, length left, composite, record) of each waiting record, by `sort_by`."""
        now, w1, w2 = view.now_s, self.slo_weight, self.length_weight
        rows = []
        for record in view.waiting.most_urgent():
            request = record.request
            slo = max(request.arrival_s + request.slo_s - now, 0.0)
            answer = request.output_tokens if self.truth else expected_tokens(request.prediction)
            length = max(answer - record.generated, 1.0)
            composite = w1 * slo + w2 * length
            if self.sort_by == "slo":
                first = slo
            elif self.sort_by == "length":
                first = length
            else:
                first = composite
            rows.append((first, request.arrival_s, request.id, slo, length, composite, record))
        rows.sort()
        return [row[3:] for row in rows]

    def terms(
        self, rows: int, slo_sum: float, length_sum: float, largest: tuple[float, float, float]
    ) -> tuple[float, float]:
        """(T_l, T_o) of `rows` and one more row.

        Args:
            slo_sum, length_sum: over all those rows.
            largest: (composite, SLO, length) of CM.
        """
        _, slo, length = largest
        rows += 1
        return (
            (slo_sum + rows * slo) * rows * self.slo_overhead,
            (length_sum + rows * length) * rows * self.length_overhead,
        )


@dataclass(frozen=True)
class UellmReleased:
    """What UELLM's repository runs: sort by SLO + 0.5 length, split into chunks of 10.

    Its condition for another row, (len - largest so far) (rows + 1) 1.2 <= 15,000, hardly ever
    fails, and is kept. Its SLO is the whole objective, not what is left of it. KV memory is
    reserved for the predicted mean.

    Attributes:
        extra_tokens: truncate answers at the batch's largest predicted length + this, as its full
            system does (50); None: never.
    """

    slo_weight: float = 1.0
    length_weight: float = 0.5
    rows: int = 10
    overhead: float = 1.2
    threshold: float = 15_000.0
    extra_tokens: int | None = None
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return expected_tokens(request.prediction)

    def __call__(self, view: View, cost: CostEstimator) -> Iterator[Batch]:
        def composite(record: Record) -> tuple[float, float, int]:
            objective = self.slo_weight * record.request.slo_s
            return (objective + self.length_weight * record.length, *by_arrival(record))

        def batch() -> Batch:
            if self.extra_tokens is None:
                return shape.batch()
            return shape.batch(math.ceil(largest) + self.extra_tokens)

        limits = view.limits
        shape, largest = BatchShape(limits), 0.0
        for record in sorted(view.waiting.most_urgent(), key=composite):
            answer, n = reserved_answer_tokens(record, limits), len(shape.records)
            far = (record.length - largest) * (n + 1) * self.overhead > self.threshold
            if n and (n >= self.rows or far or not shape.try_add(record, answer)):
                yield batch()
                shape, largest, n = BatchShape(limits), 0.0, 0
            if not n:
                shape.try_add(record, answer)
            largest = max(largest, record.length)
        if shape.records:
            yield batch()


@dataclass(frozen=True)
class Annealing:
    """SLO-aware priorities by simulated annealing (Huang et al., arXiv 2504.14966).

    Searches the sequence of batches with the largest  G = n / t:  n requests that meet their
    objective, t the sum of all latencies, both predicted: wait so far + batches before it + its own
    batch. Starts from the better of order of arrival and shortest first. A move takes a request
    into the batch before or after its own, or swaps two requests; a worse G' is accepted with
    probability exp((G' / G - 1) / T). Temperatures are relative to G, unlike the paper's, whose G
    depends on the number of requests.

    Attributes:
        window: requests arranged at a time, the earliest deadlines; with more waiting, the paper's
            search takes longer than a batch.
        moves: tried for one plan; the temperature falls geometrically from `hot` to `cold` over
            them.
    """

    window: int = 64
    moves: int = 300
    hot: float = 0.1
    cold: float = 0.001
    reserve_quantile: float = 0.9
    seed: int = 0
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return quantile_tokens(request.prediction, self.reserve_quantile)

    def __call__(self, view: View, cost: CostEstimator) -> list[Batch]:
        waiting = view.waiting.most_urgent()
        by_deadline = sorted(waiting, key=lambda r: (r.request.deadline_s, r.request.id))
        chosen = by_deadline[: self.window]
        if not chosen:
            return []
        limits = view.limits
        lengths: dict[int, float] = {}
        answers: dict[int, int] = {}
        for record in chosen:
            answers[record.request.id] = reserved_answer_tokens(record, limits)
            left = expected_tokens(record.prediction) - record.generated
            lengths[record.request.id] = max(left, 1.0)

        def fits(rows: list[Record]) -> bool:
            if len(rows) == 1:
                return True
            padded = max(r.context_tokens for r in rows) + max(answers[r.request.id] for r in rows)
            return len(rows) <= limits.max_batch and len(rows) * padded <= limits.kv_tokens

        def seconds(rows: list[Record]) -> float:
            count = len(rows)
            longest = max(r.context_tokens for r in rows)
            steps = max(lengths[r.request.id] for r in rows) - 1
            prefill_s = cost.prefill_s(longest * count, count)
            return prefill_s + cost.decode_s(count, count * (longest + 1), max(math.ceil(steps), 0))

        def gain(times: list[float], batches: list[list[Record]]) -> float:
            met, total, now = 0, 0.0, view.now_s
            for took, rows in zip(times, batches):
                now += took
                for r in rows:
                    met += now <= r.request.arrival_s + r.request.slo_s
                    total += now - r.request.arrival_s
            # Where none can meet its objective, the shorter sum of latencies still wins.
            return (met + 1e-6) / total

        def start(order: Callable[[Record], tuple[float, int]]) -> tuple[float, list[list[Record]]]:
            batches = [list(batch.records) for batch in chunks(sorted(chosen, key=order), limits)]
            return gain(list(map(seconds, batches)), batches), batches

        first_gain, batches = start(by_arrival)
        other_gain, shortest_first = start(lambda r: (lengths[r.request.id], r.request.id))
        if other_gain > first_gain * (1 + 1e-9):
            batches = shortest_first
        best = anneal(batches, fits, seconds, gain, self)
        shape = BatchShape(limits)
        for record in best[0]:
            shape.try_add(record, answers[record.request.id])
        return [shape.batch()]


def anneal(
    batches: list[list[Record]],
    fits: Callable[[list[Record]], bool],
    seconds: Callable[[list[Record]], float],
    gain: Callable[[list[float], list[list[Record]]], float],
    knobs: Annealing,
) -> list[list[Record]]:
    """The best sequence of batches found; deterministic for a seed.

    Args:
        fits: whether rows can run as one batch.
        seconds: a batch's duration.
        gain: of the batches' durations and the batches; larger is better.
    """
    rng = random.Random(knobs.seed)
    times = list(map(seconds, batches))
    now = best_gain = gain(times, batches)
    best = batches
    for move in range(knobs.moves if len(batches) > 1 else 0):
        a = rng.randrange(len(batches))
        b = rng.choice([a - 1, a + 1, rng.randrange(len(batches))])
        if not 0 <= b < len(batches) or a == b:
            continue
        one, two = exchange_rows(batches[a], batches[b], abs(a - b) == 1, rng)
        if not fits(two) or (one and not fits(one)):
            continue
        trial, trial_times = list(batches), list(times)
        trial[a], trial_times[a] = one, seconds(one) if one else 0.0
        trial[b], trial_times[b] = two, seconds(two)
        if not one:
            del trial[a], trial_times[a]
        then = gain(trial_times, trial)
        heat = knobs.hot * (knobs.cold / knobs.hot) ** (move / knobs.moves)
        if then >= now * (1 - 1e-9) or rng.random() < math.exp((then / now - 1) / heat):
            batches, times, now = trial, trial_times, then
            if now > best_gain * (1 + 1e-9):
                best, best_gain = batches, now
    return best


def exchange_rows(
    one: list[Record], two: list[Record], adjacent: bool, rng: random.Random
) -> tuple[list[Record], list[Record]]:
    """Copies of two batches after one request moves from `one` to `two`, or two are swapped.

    Only adjacent batches move a request.
    """
    one, two = list(one), list(two)
    i = rng.randrange(len(one))
    if adjacent and rng.random() < 0.5:
        two.append(one.pop(i))
    else:
        k = rng.randrange(len(two))
        one[i], two[k] = two[k], one[i]
    return one, two


@dataclass(frozen=True)
class Oracle:
    """Shortest true answers first, in batches of like lengths with no memory to spare.

    For benchmarks: no server can know the true lengths.
    """

    predicts: ClassVar[bool] = False

    def length(self, request: Request) -> float:
        return request.output_tokens

    def __call__(self, view: View, cost: CostEstimator) -> Iterator[Batch]:
        waiting = view.waiting.most_urgent()
        shortest_first = sorted(waiting, key=lambda r: (r.length - r.generated, *by_arrival(r)))
        return chunks(shortest_first, view.limits)


@dataclass(frozen=True)
class Static:
    """A BatchPolicy as a Policy: starts the first batch when nothing runs.

    A row that outgrows its reservation gets twice as much while there is any, else it is preempted;
    S3 always preempts.
    """

    batching: BatchPolicy

    @property
    def predicts(self) -> bool:
        return self.batching.predicts

    def length(self, request: Request) -> float:
        return self.batching.length(request)

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        return record.request.arrival_s, FOREVER

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        if view.running:
            return self.replan_running(view)
        first = next(iter(self.batching(view, cost)), None)
        if first is None:
            return Plan()
        reserve = {r.request.id: tokens for r, tokens in zip(first.records, first.reserve_tokens)}
        return Plan(
            first.records,
            (),
            reserve,
            together=True,
            stop_tokens=first.stop_tokens,
            wake_on_arrival=False,
        )

    def replan_running(self, view: View) -> Plan:
        """A plan for a batch that runs: grow or preempt the rows that overran."""
        limits, free = view.limits, view.kv_free_tokens
        preempt: list[Record] = []
        reserve: dict[int, int] = {}
        may_grow = getattr(self.batching, "grows", True)
        for record in view.overran:
            had = record.reserved_tokens - record.base_tokens
            room = max(reserved_answer_tokens(record, limits), 2 * had)
            room = min(room, limits.max_tokens - record.context_tokens)
            if may_grow and room - had <= free:
                reserve[record.request.id] = record.base_tokens + room
                free -= room - had
            else:
                preempt.append(record)
                free += record.reserved_tokens
        return Plan(preempt=tuple(preempt), reserve_tokens=reserve, wake_on_arrival=False)


# The fields of odbs, slo_dbs and slo_odbs were found by `python -m serving.simulate --search NAME
# --workload poisson --rate 1.5,2.5,4 --seeds 2 --requests 600 --slo_scale 10` (its seeds are not
# those of comparisons). SloOdbs's own defaults are the repository's weights.
BATCH_POLICIES: dict[str, BatchPolicy] = {
    "fifo": Fifo(),
    "s3": S3(),
    "odbs": SloOdbs(slo_weight=0.0, sort_by="length"),
    "slo_dbs": SloOdbs(length_weight=0.0, threshold=100_000.0, reserve_quantile=0.5),
    "slo_odbs": SloOdbs(length_weight=0.1, threshold=8_000.0, sort_by="composite"),
    "uellm_released": UellmReleased(),
    # Of its repository too, where its baseline, its Morphling and its deployments batch so.
    "uellm_baseline": Fifo(rows=10),
    "annealing": Annealing(),
    "oracle": Oracle(),
}
