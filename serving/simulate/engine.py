"""An engine that only counts: the cost model says how long decode steps and prefills take, and time
jumps from event to event.

One iteration of a continuous engine is one pass: every decoding sequence makes a token, and up to
prefill_tokens prompt tokens are computed, the longest-admitted sequence's first; a sequence whose
prompt is done makes its first token at the iteration's end. It takes decode_step_s(batch, context)
+ chunk_s of those prompt tokens. So k iterations without an event take decode_s(batch, context, k)
and the prompts' chunks, and need not be taken one by one. A static batch is prefilled padded and at
once, then decodes with all its rows until the last has ended; or, not `padded`, as the continuous
engine runs it: in chunks, and without the rows that have ended.
"""

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from predictor.prediction import LengthPrediction
from serving.request import FOREVER, CostEstimator, Limits, Plan, Record, StepResult

NO_STEP_LIMIT = 1 << 60


@dataclass(frozen=True)
class LinearCost:
    """Straight lines for trying policies and for tests; the defaults are near ChatGLM2-6B in fp16
    on one A100.

    Attributes:
        step_s: of any decode step: the weights are read once. row_s: more for each sequence,
            token_s: for each token of context.
        call_s, prompt_token_s: of a prefill, and for each of its tokens, padding included.
        plan_s: between two steps of the engine: scheduler, policy, admissions, moves.
    """

    kv_capacity_tokens: int = 100_000
    step_s: float = 8e-3
    row_s: float = 3e-5
    token_s: float = 2e-8
    call_s: float = 2e-3
    prompt_token_s: float = 6.5e-5
    plan_s: float = 0.0

    def prefill_s(self, tokens: int, batch: int = 1) -> float:
        return self.call_s + self.prompt_token_s * tokens if tokens > 0 else 0.0

    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float:
        return self.prompt_token_s * tokens + (0.0 if rows else self.call_s)

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return self.step_s + self.row_s * batch + self.token_s * context_tokens

    def decode_s(self, batch: int, context_tokens: int, steps: int) -> float:
        mean_context = context_tokens + batch * (steps - 1) / 2
        return steps * (self.step_s + self.row_s * batch + self.token_s * mean_context)


class Rereads(Protocol):
    """What an engine that re-reads its answers would say of them.

    Attributes:
        every: an answer is read when it has so many tokens, and a multiple of it.
        seconds: that reading one answer takes.
    """

    every: int
    seconds: float

    def __call__(self, request_id: int, generated: int) -> LengthPrediction | None:
        """The prediction of the whole length after so many tokens; None for no newer one."""


class SimulatedSequence:
    """A sequence in the engine.

    Attributes:
        base: tokens before its new ones, those of padding included.
        context: of them, those that are computed.
        target: answer tokens to make since its admission; 0 of one that had ended in a static batch
            when it was preempted.
        cut: its answer stops before its own end.
        generated_before: answer tokens made before its admission.
        reserve: KV tokens held for it.
        joined: the step after which its first new token is there; -1 before.
        prefilled: prompt tokens computed so far.
        ends_at: the step at which it has made its last token or fills its reservation.
        read_at: answer tokens, before this admission included, when it was last re-read.
        alive: it is in the engine.
    """

    __slots__ = (
        "id",
        "base",
        "context",
        "target",
        "cut",
        "generated_before",
        "reserve",
        "joined",
        "prefilled",
        "ends_at",
        "read_at",
        "alive",
    )

    def __init__(
        self,
        record: Record,
        limits: Limits,
        reserve: int,
        base: int,
        context: int,
        stop_tokens: int | None,
    ) -> None:
        request = record.request
        full_length, max_tokens = (
            request.output_tokens,
            limits.max_answer_tokens(request, stop_tokens),
        )
        self.id, self.base, self.context = request.id, base, context
        self.generated_before, self.reserve = record.generated, reserve
        ended = record.generated >= min(full_length, limits.max_answer_tokens(request))
        self.target = 0 if ended else max(min(full_length, max_tokens) - record.generated, 1)
        self.cut = record.generated + self.target < full_length
        self.joined = -1
        self.prefilled = min(request.cached_tokens, context - 1)  # the last one makes the answer
        self.ends_at, self.alive = -1, True
        self.read_at = record.generated


class StepProgress:
    """What a step has done so far.

    Attributes:
        elapsed: seconds. emitted: answer tokens.
        started: (request id, seconds from the step's start) of first tokens.
        finished, overran: rows that have ended, and that fill their reservation.
    """

    __slots__ = ("elapsed", "emitted", "started", "finished", "overran")

    def __init__(self) -> None:
        self.elapsed, self.emitted = 0.0, 0
        self.started: list[tuple[int, float]] = []
        self.finished: list[SimulatedSequence] = []
        self.overran: list[SimulatedSequence] = []

    def postpone(self, seconds: float) -> None:
        """Add seconds before the step's start."""
        self.elapsed += seconds
        self.started = [(i, after_s + seconds) for i, after_s in self.started]

    def result(self, reread: tuple[tuple[int, LengthPrediction], ...] = ()) -> StepResult:
        done: tuple[tuple[int, int, bool], ...] = ()
        if self.finished:
            done = tuple(
                [(row.id, row.generated_before + row.target, row.cut) for row in self.finished]
            )
        full = tuple([row.id for row in self.overran]) if self.overran else ()
        started = tuple(self.started)
        return StepResult(self.elapsed, self.emitted, started, done, full, reread)


class SimulatedEngine:
    """An engine whose time is a cost model's.

    Attributes (sums over the run, for metrics):
        busy_s: seconds at work.
        row_s, reserved_token_s, used_token_s: sequences, KV tokens reserved and KV tokens in use,
            times seconds.
        prefill_tokens, step_rows: prompt tokens and rows of decode steps computed, padding
            included.

    Args:
        padded: static batches are padded and compute on rows that have ended, as transformers'
            generate does.
        rereads: predictions as answers grow; they are reported at the end of the step in which the
            answers reach their lengths. None for an engine that reads none.
    """

    def __init__(
        self,
        cost: CostEstimator,
        limits: Limits,
        padded: bool = True,
        rereads: Rereads | None = None,
    ) -> None:
        self.cost, self.limits, self.padded = cost, limits, padded
        self.rereads = rereads
        self.steps = 0
        self.rows: dict[int, SimulatedSequence] = {}
        self._decoding = self._context = self._reserved = self._serial = 0
        # (step at which it ends or is full, id, serial, row); dead rows are skipped when met
        self._ends: list[tuple[int, int, int, SimulatedSequence]] = []
        self._prefills: deque[SimulatedSequence] = deque()
        self._together = False
        # Ended rows of a static batch that wait for its other rows.
        self._ended_waiting: dict[int, SimulatedSequence] = {}
        # The additional time of a process's first call.
        self._startup_s = getattr(cost, "startup_s", 0.0)
        # The time between two steps: scheduler, policy and the plan's execution.
        self.plan_s = getattr(cost, "plan_s", 0.0)
        self.busy_s = self.row_s = self.reserved_token_s = self.used_token_s = 0.0
        self.prefill_tokens = self.step_rows = 0

    @property
    def kv_tokens(self) -> int:
        """The KV cache, over all sequences."""
        return self.limits.kv_tokens

    def generated(self, record: Record) -> int:
        row = self.rows[record.request.id]
        if row.joined < 0:
            return row.generated_before
        return row.generated_before + min(1 + self.steps - row.joined, row.target)

    def computed(self, record: Record) -> int:
        return self.rows[record.request.id].prefilled

    def next_end_s(self) -> float:
        """Seconds until a row ends or fills its reservation, if none joins or leaves before.

        No more than it really is, where prompts are still to be computed.
        """
        steps = NO_STEP_LIMIT
        if ends := self._current_ends():
            steps = max(ends[0][0] - self.steps, 1)
        for row in self._prefills:
            steps = min(steps, max(min(row.target, row.reserve - row.base), 1))
        return self.cost.decode_s(max(self._decoding, 1), self._context, steps)

    # ---- one step

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """Preempt, reserve and admit what the plan says, then decode until a row ends or fills its
        reservation, the plan's horizon is reached, or budget_s seconds have gone by."""
        for record in plan.preempt:
            self._remove(self.rows[record.request.id])
        if plan.reserve_tokens:
            self._reserve(plan.reserve_tokens)
        progress = StepProgress()
        if plan.admit:
            self._admit(plan, progress)
        self._decode(plan, budget_s, progress)
        reread = () if self.rereads is None else self._reread(self.rereads, progress)
        if self._together and not self.rows:
            self._together = False
        if plan.admit and self._startup_s:
            progress.postpone(self._startup_s)
            self._startup_s = 0.0
        if self.plan_s:
            progress.postpone(self.plan_s)
            self.busy_s += self.plan_s
        return progress.result(reread)

    def _reread(
        self, rereads: Rereads, progress: StepProgress
    ) -> tuple[tuple[int, LengthPrediction], ...]:
        """Read the answers that have reached a multiple of rereads.every since the last time.

        One that passed several in this step is charged for each, and reported for the last.
        """
        news = []
        reads = 0
        for row in progress.finished:  # read while it grew; at its end there is nothing to read
            last = row.generated_before + row.target - 1
            reads += max(last // rereads.every - row.read_at // rereads.every, 0)
        for row in self.rows.values():
            if row.joined < 0 or not row.target or row.id in self._ended_waiting:
                continue
            made = row.generated_before + min(1 + self.steps - row.joined, row.target)
            count = made // rereads.every - row.read_at // rereads.every
            if count < 1:
                continue
            reads += count
            row.read_at = made - made % rereads.every
            prediction = rereads(row.id, row.read_at)
            if prediction is not None:
                news.append((row.id, prediction))
        progress.elapsed += reads * rereads.seconds
        self.busy_s += reads * rereads.seconds
        return tuple(news)

    def _reserve(self, reserve_tokens: Mapping[int, int]):
        """Change the reservations of rows that are in the engine already."""
        for request_id, tokens in reserve_tokens.items():
            row = self.rows.get(request_id)
            if row is None:
                continue
            self._reserved += tokens - row.reserve
            row.reserve = tokens
            if row.joined >= 0 and request_id not in self._ended_waiting:
                self._schedule_end(row)

    def _admit(self, plan: Plan, progress: StepProgress):
        if plan.together:
            self._start_together(plan, progress)
            return
        for record in plan.admit:
            reserve, context = plan.reserve_tokens[record.request.id], record.context_tokens
            row = SimulatedSequence(record, self.limits, reserve, context, context, None)
            self.rows[row.id] = row
            self._reserved += row.reserve
            self._prefills.append(row)

    def _decode(self, plan: Plan, budget_s: float, progress: StepProgress):
        """Iterate from event to event, until one is the scheduler's or the budget is spent."""
        chunk = plan.prefill_tokens or self.limits.prefill_tokens
        last_step = self.steps + (plan.horizon_steps or NO_STEP_LIMIT)
        self._collect_ended(progress)
        # Until a row stops or the budget is spent; a step that has taken no time continues in any
        # case.
        while (
            self.rows
            and self.steps < last_step
            and not progress.finished
            and not progress.overran
            and (progress.elapsed < budget_s or not progress.elapsed)
        ):
            k = self._next_event(last_step, chunk) - self.steps
            if self._prefills:
                seconds = self._seconds(k, chunk)
            else:
                seconds = self.cost.decode_s(self._decoding, self._context, k)
            if progress.elapsed + seconds > budget_s and k > 1:
                remaining = budget_s - progress.elapsed
                k, seconds = smallest_step_count(
                    lambda n: self._seconds(n, chunk), k, seconds, remaining
                )
            progress.elapsed += seconds
            making = self._decoding
            if self._ended_waiting and self.padded:
                making -= len(self._ended_waiting)
            progress.emitted += k * making
            self._advance(k, seconds)
            if self._prefills:
                self._prefill(k * chunk, progress)
            self._collect_ended(progress)

    def _next_event(self, last_step: int, chunk: int) -> int:
        """The step, at most last_step, at which a row ends or fills its reservation, or at which
        the prompt at the queue's head is done."""
        ends = self._current_ends()
        until = last_step
        if ends and ends[0][0] < until:
            until = ends[0][0]
        if self._prefills:
            head = self._prefills[0]
            done = self.steps + max(1, -(-(head.context - head.prefilled) // chunk))
            if done < until:
                until = done
        return until

    def _current_ends(self) -> list[tuple[int, int, int, SimulatedSequence]]:
        """The heap of ends, whose first one is a living row's."""
        ends = self._ends
        while ends and not (ends[0][3].alive and ends[0][0] == ends[0][3].ends_at):
            heapq.heappop(ends)
        return ends

    def _seconds(self, k: int, chunk: int) -> float:
        """k iterations without an event."""
        seconds = self.cost.decode_s(self._decoding, self._context, k) if self._decoding else 0.0
        if not self._prefills:
            return seconds
        prompts = iter(self._prefills)
        row: SimulatedSequence | None = self._prefills[0]
        next(prompts)
        done = self._prefills[0].prefilled
        for _ in range(k):
            remaining, rows = chunk, self._decoding
            while remaining > 0 and row is not None:
                take = min(remaining, row.context - done)
                seconds += self.cost.chunk_s(take, done, rows)
                remaining, rows, done = remaining - take, rows + take, done + take
                if done == row.context:
                    row = next(prompts, None)
                    done = row.prefilled if row else 0
        return seconds

    def _advance(self, k: int, seconds: float):
        grown = k * self._decoding
        self.busy_s += seconds
        self.row_s += seconds * len(self.rows)
        self.reserved_token_s += seconds * self._reserved
        self.used_token_s += seconds * (self._context + grown / 2)
        self.step_rows += grown
        self.steps += k
        self._context += grown

    def _prefill(self, remaining: int, progress: StepProgress):
        """Compute so many prompt tokens; a prompt that is done makes its first answer token."""
        while remaining > 0 and self._prefills:
            row = self._prefills[0]
            take = min(remaining, row.context - row.prefilled)
            row.prefilled += take
            self.prefill_tokens += take
            remaining -= take
            if row.prefilled == row.context:
                self._prefills.popleft()
                self._start(row, progress)

    def _start(self, row: SimulatedSequence, progress: StepProgress):
        self._start_decoding(row)
        if row.target:
            progress.started.append((row.id, progress.elapsed))
            progress.emitted += 1

    def _start_decoding(self, row: SimulatedSequence):
        row.joined = self.steps
        self._decoding += 1
        self._context += row.context + 1
        self._schedule_end(row)

    def _schedule_end(self, row: SimulatedSequence):
        """Note the step at which the row has made its last token or fills its reservation."""
        tokens = row.reserve - row.base
        if row.target < tokens:
            tokens = row.target
        ends_at = row.joined - 1 + tokens
        if ends_at != row.ends_at:
            row.ends_at = ends_at
            self._serial += 1  # ties between a row and its own past are broken by it
            heapq.heappush(self._ends, (ends_at, row.id, self._serial, row))

    def _collect_ended(self, progress: StepProgress):
        """Note the rows that end or fill their reservation at this step."""
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            step, _, _, row = heapq.heappop(ends)
            if row.alive and step == row.ends_at and row.id not in self._ended_waiting:
                self._end_row(row, progress)
        if self._ended_waiting and len(self._ended_waiting) == len(self.rows):
            ended = [self._ended_waiting[i] for i in sorted(self._ended_waiting)]
            progress.finished += ended
            for row in ended:
                self._remove(row)

    def _end_row(self, row: SimulatedSequence, progress: StepProgress):
        """A row has filled its reservation, or made its last token."""
        if row.target > row.reserve - row.base:
            progress.overran.append(row)
        elif self._together:
            self._ended_waiting[row.id] = row
            if not self.padded:
                self._stop_computing(row)
        else:
            progress.finished.append(row)
            self._remove(row)

    def _remove(self, row: SimulatedSequence):
        row.alive = False
        del self.rows[row.id]
        held = self._ended_waiting.pop(row.id, None)
        self._reserved -= row.reserve
        if row.joined < 0:
            self._prefills.remove(row)
        elif self.padded or not held:
            self._stop_computing(row)

    def _stop_computing(self, row: SimulatedSequence):
        """Stop counting the row among those that are computed."""
        self._decoding -= 1
        self._context -= row.context + 1 + self.steps - row.joined

    # ---- static batches

    def _start_together(self, plan: Plan, progress: StepProgress):
        """Prefill a static batch at once; every row makes its first token."""
        self._together = True
        rows = self._batch_rows(plan)
        tokens = reserved = 0
        for row in rows:
            tokens += row.context
            reserved += row.reserve
            self.rows[row.id] = row
        passes = 1 if self.padded else -(-tokens // self.limits.prefill_tokens)
        progress.elapsed = passes * self.cost.prefill_s(
            -(-tokens // passes), -(-len(rows) // passes)
        )
        self._reserved += reserved
        self._advance(0, progress.elapsed)
        self.prefill_tokens += tokens
        for row in rows:
            row.prefilled = row.context
            self._start(row, progress)

    def _batch_rows(self, plan: Plan) -> list[SimulatedSequence]:
        """The rows of a static batch: as long as its longest, computed so far where padded."""
        longest = max(record.context_tokens for record in plan.admit)
        rows = []
        for record in plan.admit:
            reserve = plan.reserve_tokens[record.request.id]
            context = longest if self.padded else record.context_tokens
            rows.append(
                SimulatedSequence(record, self.limits, reserve, longest, context, plan.stop_tokens)
            )
        return rows


def smallest_step_count(
    seconds_of: Callable[[int], float], max_steps: int, seconds: float, budget_s: float
) -> tuple[int, float]:
    """(k, seconds_of(k)) for the smallest k >= 1 with seconds_of(k) >= budget_s; seconds_of grows,
    and seconds_of(max_steps) = seconds > budget_s.

    Interpolates between the ends, and halves where that moves too little.
    """
    low, low_s, high, high_s = 0, 0.0, max_steps, seconds
    halve = False
    while high - low > 1:
        if halve:
            middle = (low + high) // 2
        else:
            middle = low + int((high - low) * (budget_s - low_s) / (high_s - low_s)) + 1
            middle = min(max(middle, low + 1), high - 1)
        middle_s = seconds_of(middle)
        if middle_s >= budget_s:
            halve = high - middle < (high - low) // 4
            high, high_s = middle, middle_s
        else:
            halve = middle - low < (high - low) // 4
            low, low_s = middle, middle_s
    return high, high_s
