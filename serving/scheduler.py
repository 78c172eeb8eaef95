"""The only loop of serving: arrivals -> queue -> policy -> engine -> completions.

The caller chooses the policy, the engine and the clock.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator

from serving.request import (
    FOREVER,
    Arrivals,
    Backlog,
    Clock,
    Completion,
    Engine,
    Event,
    Limits,
    Moment,
    Plan,
    Policy,
    Record,
    Request,
    StepResult,
    View,
)

# Priority, key, request id, the record's version, record.
HeapEntry = tuple[int, float, int, int, Record]

PACE_MEMORY_S = 5.0  # memory of the pace's running mean


class VirtualClock:
    """Simulated time: it passes only by advance() and wait_until()."""

    def __init__(self, now_s: float = 0.0):
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    def wait_until(self, time_s: float) -> None:
        self._now_s = max(self._now_s, time_s)


class Replay:
    """Arrivals from any iterable of requests in order of arrival.

    Reads one request ahead, so that a million of them need not be in memory at once.
    """

    def __init__(self, requests: Iterable[Request]):
        self._requests = iter(requests)
        self._read()

    def _read(self) -> None:
        self._next: Request | None = next(self._requests, None)
        if self._next is None:
            self._next_s = FOREVER
        else:
            self._next_s = self._next.arrival_s + self._next.predict_s

    @property
    def closed(self) -> bool:
        return self._next is None

    def next_s(self) -> float:
        """When the next request can be seen: after its arrival and its prediction."""
        return self._next_s

    def due(self, now_s: float) -> list[Request]:
        """The requests that can be seen by now, each returned once."""
        requests: list[Request] = []
        while self._next is not None and self._next_s <= now_s:
            requests.append(self._next)
            self._read()
        return requests

    def withdrawn(self) -> tuple[int, ...]:
        """Ids of cancelled requests: none."""
        return ()


class Level:
    """The waiting records of one priority by request id, and sums over them.

    Attributes:
        context_tokens, answer_tokens: as of Backlog.
    """

    __slots__ = ("members", "context_tokens", "answer_tokens")

    def __init__(self) -> None:
        self.members: dict[int, Record] = {}
        self.context_tokens, self.answer_tokens = 0, 0.0

    def add(self, record: Record) -> None:
        self.members[record.request.id] = record
        self.context_tokens += record.context_tokens
        self.answer_tokens += record.length

    def remove(self, record: Record) -> None:
        del self.members[record.request.id]
        self.context_tokens -= record.context_tokens
        self.answer_tokens -= record.length


class Queue:
    """Waiting records in a heap of their priorities and their policy's keys.

    A key holds until its record's until_s; after that it is computed again, but only when its entry
    comes to the top. That is exact as long as keys only grow. Entries of records that were removed
    or pushed again are skipped when they come up: each carries its record's version.
    """

    def __init__(self, order: Callable[[Record], tuple[float, float]]):
        self._order = order
        self._heap: list[HeapEntry] = []
        self._members: dict[int, Record] = {}
        self._levels: dict[int, Level] = {}  # the same, by priority
        # Entries that iteration has yielded and restore_unadmitted has not put back.
        self._yielded: list[HeapEntry] = []
        # Records were yielded, pushed or removed since the last call of restore_unadmitted.
        self.is_touched = False
        # A second heap, by priority and arrival.
        self._by_arrival: list[tuple[int, float, int, Record]] = []
        self.now_s = 0.0

    def __len__(self) -> int:
        return len(self._members)

    def most_urgent(self) -> Collection[Record]:
        if not self._levels:
            return ()
        return self._levels[min(self._levels)].members.values()

    def backlog(self) -> Backlog:
        if not self._levels:
            return Backlog(0, 0, 0.0)
        level = self._levels[min(self._levels)]
        return Backlog(len(level.members), level.context_tokens, level.answer_tokens)

    def get(self, request_id: int) -> Record | None:
        return self._members.get(request_id)

    def push(self, record: Record) -> None:
        self.is_touched = True
        record.waiting = True
        record.version += 1
        record.key, record.until_s = self._order(record)
        request = record.request
        if request.id not in self._members:
            self._members[request.id] = record
            if request.priority not in self._levels:
                self._levels[request.priority] = Level()
            self._levels[request.priority].add(record)
            place = (request.priority, request.arrival_s, request.id, record)
            heapq.heappush(self._by_arrival, place)
        entry = (request.priority, record.key, request.id, record.version, record)
        heapq.heappush(self._heap, entry)

    def remove(self, record: Record) -> None:
        self.is_touched = True
        record.waiting = False
        request = record.request
        del self._members[request.id]
        level = self._levels[request.priority]
        level.remove(record)
        if not level.members:
            del self._levels[request.priority]

    def oldest(self) -> Record:
        while not self._by_arrival[0][-1].waiting:
            heapq.heappop(self._by_arrival)
        return self._by_arrival[0][-1]

    def __iter__(self) -> Iterator[Record]:
        """In order of keys, lazily; what was yielded stays in the queue until it is removed."""
        self.is_touched = True
        for *_, record in self._yielded:
            yield record
        while (entry := self._pop()) is not None:
            self._yielded.append(entry)
            yield entry[-1]

    def restore_unadmitted(self) -> None:
        """Put back the entries that a policy has read and not admitted."""
        self.is_touched = False
        if self._yielded:
            for entry in self._yielded:
                if entry[-1].waiting:
                    heapq.heappush(self._heap, entry)
            self._yielded.clear()
        # Records that are removed out of order leave their entries behind: rebuild when most are.
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [e for e in self._heap if _is_current(e)]
            heapq.heapify(self._heap)
        if len(self._by_arrival) > 2 * len(self._members) + 64:
            self._by_arrival = [e for e in self._by_arrival if e[-1].waiting]
            heapq.heapify(self._by_arrival)

    def _pop(self) -> HeapEntry | None:
        while self._heap:
            entry = heapq.heappop(self._heap)
            record = entry[-1]
            if not record.waiting or entry[3] != record.version:
                continue
            if self.now_s > record.until_s:
                self.push(record)
                continue
            return entry
        return None


def _is_current(entry: HeapEntry) -> bool:
    return entry[-1].waiting and entry[3] == entry[-1].version


def run_scheduler(
    policy: Policy,
    engine: Engine,
    clock: Clock,
    arrivals: Arrivals,
    monitor: Callable[[Event], None] | None = None,
    turns: bool = False,
) -> Iterator[Event]:
    """Serve all arrivals; yields every event in order of time, those of a plan or step together.

    Args:
        monitor: called with every event before it is yielded.
        turns: yield an event `turn` after each step, so that who reads the events can let time pass
            elsewhere.
    Raises:
        RuntimeError: the policy exceeded a limit, admitted a record that does not wait, neither
            grew nor preempted an overrun, or makes no progress.
    """
    events = _Run(policy, engine, clock, arrivals).events(turns)
    return events if monitor is None else _monitored(events, monitor)


def _monitored(events: Iterator[Event], monitor: Callable[[Event], None]) -> Iterator[Event]:
    for event in events:
        monitor(event)
        yield event


class _Run:
    """One run of the loop, and its state between two plans.

    Attributes:
        running: admitted records by request id.
        overran: those of them that fill their reservation.
        free: KV tokens that are not reserved.
        pace_s: recent seconds between two tokens of a running answer.
        news: events that are not yielded yet.
    """

    __slots__ = (
        "policy",
        "engine",
        "clock",
        "arrivals",
        "queue",
        "running",
        "overran",
        "free",
        "pace_s",
        "news",
    )

    def __init__(self, policy: Policy, engine: Engine, clock: Clock, arrivals: Arrivals):
        self.policy, self.engine = policy, engine
        self.clock, self.arrivals = clock, arrivals
        self.queue = Queue(self._order)
        self.running: dict[int, Record] = {}
        self.overran: tuple[Record, ...] = ()
        self.free = engine.limits.kv_tokens
        self.pace_s = 0.0
        self.news: list[Event] = []

    def _order(self, record: Record) -> tuple[float, float]:
        engine = self.engine
        moment = Moment(self.queue.now_s, self.pace_s, engine.cost, engine.limits)
        return self.policy.order(record, moment)

    def events(self, turns: bool = False) -> Iterator[Event]:
        queue, running, arrivals, clock = self.queue, self.running, self.arrivals, self.clock
        news, step = self.news, self.engine.step
        while True:
            if news:
                yield from news
                news.clear()
            now = queue.now_s = clock.now_s()
            self._receive(now)
            if news:
                yield from news
                news.clear()
            if not running and not len(queue):
                if arrivals.closed:
                    return
                clock.wait_until(arrivals.next_s())
                continue

            plan = self._make_plan(now)
            if plan.preempt or plan.admit or plan.reserve_tokens:
                self._apply_plan(plan, now)
                yield from news
                news.clear()
            if queue.is_touched:
                queue.restore_unadmitted()
            wake_s = plan.wake_s
            if plan.wake_on_arrival and (next_s := arrivals.next_s()) < wake_s:
                wake_s = next_s
            if not running and not plan.preempt:
                self._wait(wake_s, now)
                continue
            result = step(plan, wake_s - now)
            clock.advance(result.elapsed_s)
            self._record_result(result, now)
            if turns:
                news.append(Event(clock.now_s(), "turn", -1, None))

    def _receive(self, now_s: float) -> None:
        """Queue the requests that have arrived, drop those that were cancelled."""
        arrivals, queue, news = self.arrivals, self.queue, self.news
        # Asked before due(): by then every request that it names has arrived.
        withdrawn = arrivals.withdrawn()
        for request in arrivals.due(now_s):
            if reason := self.engine.limits.refusal(request):
                news.append(Event(now_s, "refused", request.id, reason))
                continue
            record = Record(request, self.policy.length(request), generated=request.generated)
            queue.push(record)
            news.append(Event(now_s, "arrived", request.id, record))
        for request_id in withdrawn:
            if (waiting := queue.get(request_id)) is not None:
                queue.remove(waiting)
                completion = completion_of(waiting, now_s, waiting.generated, cut=True)
                news.append(Event(now_s, "withdrawn", request_id, completion))

    def _make_plan(self, now_s: float) -> Plan:
        """The policy's plan, checked; `free` becomes what the plan leaves."""
        engine = self.engine
        view = View(
            now_s,
            self.queue,
            self.running,
            self.overran,
            self.free,
            engine.limits,
            engine.generated,
            engine.computed,
            self.pace_s,
        )
        plan = self.policy(view, engine.cost)
        if plan.admit or plan.preempt or plan.reserve_tokens or self.overran:
            self.free = _check_plan(plan, self.running, self.overran, self.free, engine.limits)
        return plan

    def _apply_plan(self, plan: Plan, now_s: float) -> None:
        """Preempt, admit and reserve in the scheduler's own records."""
        queue, running, news = self.queue, self.running, self.news
        for record in plan.preempt:
            record.generated = self.engine.generated(record)
            record.preemptions += 1
            record.reserved_tokens = 0
            del running[record.request.id]
            queue.push(record)
            news.append(Event(now_s, "preempted", record.request.id, record))
        padded = _padded_tokens(plan) if plan.together else 0
        for record in plan.admit:
            queue.remove(record)
            running[record.request.id] = record
            record.base_tokens = padded or record.context_tokens
            record.admitted_s = now_s
            if record.first_admitted_s < 0:
                record.first_admitted_s = now_s
            reserve(record, plan.reserve_tokens[record.request.id])
            news.append(Event(now_s, "admitted", record.request.id, record))
        for request_id, tokens in plan.reserve_tokens.items():
            holder = running.get(request_id)
            if holder is not None and tokens > holder.reserved_tokens:
                reserve(holder, tokens)
                news.append(Event(now_s, "grew", request_id, holder))

    def _wait(self, wake_s: float, now_s: float) -> None:
        """Wait for the next arrival or the policy's own time, with nothing running."""
        wake_s = min(wake_s, self.arrivals.next_s())
        if wake_s == FOREVER or wake_s <= now_s:
            raise RuntimeError(
                f"{self.policy} admits none of {len(self.queue)} waiting requests to an empty "
                "engine and names no time to look again"
            )
        self.clock.wait_until(wake_s)

    def _record_result(self, result: StepResult, start_s: float) -> None:
        """Record what the engine's step, begun at start_s, has done."""
        running, news = self.running, self.news
        if result.emitted_tokens and result.elapsed_s:
            between_s = result.elapsed_s * len(running) / result.emitted_tokens
            self.pace_s = updated_pace(self.pace_s, result.elapsed_s, between_s)
        for request_id, after_s in result.started:
            record = running[request_id]
            if record.first_token_s < 0:
                record.first_token_s = start_s + after_s
                news.append(Event(start_s + after_s, "started", request_id, record))
        now_s = self.clock.now_s()
        for request_id, prediction in result.reread:
            record = running[request_id]
            record.prediction = prediction
            news.append(Event(now_s, "reread", request_id, record))
        for request_id, tokens, cut in result.finished:
            record = running.pop(request_id)
            self.free += record.reserved_tokens
            completion = completion_of(record, now_s, tokens, cut)
            news.append(Event(now_s, "finished", request_id, completion))
        self.overran = ()
        if result.overran:
            self.overran = tuple([running[request_id] for request_id in result.overran])
            for record in self.overran:
                record.overruns += 1
                news.append(Event(now_s, "overran", record.request.id, record))


def reserve(record: Record, tokens: int) -> None:
    """Note how many KV tokens a plan reserves for a record."""
    record.reserved_tokens = tokens
    if tokens > record.most_reserved_tokens:
        record.most_reserved_tokens = tokens


def updated_pace(pace_s: float, elapsed_s: float, latest_s: float) -> float:
    """A running mean of the seconds between two tokens of an answer.

    Its memory is PACE_MEMORY_S; `latest_s` is the mean over the last `elapsed_s`.
    """
    if not pace_s:
        return latest_s
    if elapsed_s > PACE_MEMORY_S:
        return pace_s + 1.0 * (latest_s - pace_s)
    return pace_s + elapsed_s / PACE_MEMORY_S * (latest_s - pace_s)


def completion_of(record: Record, now_s: float, tokens: int, cut: bool) -> Completion:
    """The completion of a record whose answer has so many tokens."""
    return Completion(
        record.request,
        record.first_admitted_s,
        record.first_token_s,
        now_s,
        tokens,
        record.most_reserved_tokens,
        record.preemptions,
        record.overruns,
        cut,
    )


def _padded_tokens(plan: Plan) -> int:
    """The context that a static batch's records are padded to; 0 for any other plan."""
    return plan.longest_context_tokens if plan.together else 0


def _check_plan(
    plan: Plan,
    running: dict[int, Record],
    overran: tuple[Record, ...],
    free: int,
    limits: Limits,
) -> int:
    """KV tokens that the plan leaves free. Raises RuntimeError where it exceeds a limit."""
    admitted: set[int] = set()
    preempted: set[int] = set()
    if plan.preempt:
        preempted, free = _check_preemptions(plan, running, free)
    if plan.admit:
        admitted = {record.request.id for record in plan.admit}
        _check_admissions(plan, admitted)
    free = _check_reservations(plan, running, admitted, preempted, free)
    if overran:
        _check_overruns(plan, overran, preempted)
    rows = len(running) - len(preempted) + len(admitted)
    if free < 0 or rows > limits.max_batch:
        raise RuntimeError(f"the plan is {-free} KV tokens or {rows} sequences large; {limits}")
    if plan.together and plan.admit and len(running) > len(preempted):
        raise RuntimeError("a static batch can only start on an empty engine")
    return free


def _check_preemptions(plan: Plan, running: dict[int, Record], free: int) -> tuple[set[int], int]:
    """(ids preempted, KV tokens free after that)."""
    preempted: set[int] = set()
    for record in plan.preempt:
        request_id = record.request.id
        if running.get(request_id) is not record or request_id in preempted:
            raise RuntimeError(f"the plan preempts request {request_id}, which does not run")
        preempted.add(request_id)
        free += record.reserved_tokens
    return preempted, free


def _check_reservations(
    plan: Plan, running: dict[int, Record], admitted: set[int], preempted: set[int], free: int
) -> int:
    """KV tokens free after the plan's reservations; those of a running record may only grow."""
    for request_id, tokens in plan.reserve_tokens.items():
        if request_id in admitted:
            free -= tokens
        elif request_id not in preempted and (record := running.get(request_id)) is not None:
            reserved = record.reserved_tokens
            free -= tokens - reserved
            if tokens < reserved:
                raise RuntimeError(
                    f"the plan takes KV memory from request {request_id} while it runs"
                )
    return free


def _check_admissions(plan: Plan, admitted: set[int]) -> None:
    """Each record waits, is admitted once, and gets KV memory for an answer.

    A plan for one step may admit with KV memory for a part of the prompt.
    """
    padded = _padded_tokens(plan)
    in_parts = plan.horizon_steps == 1 and not plan.together
    for record in plan.admit:
        request_id = record.request.id
        if not record.waiting or len(admitted) != len(plan.admit):
            raise RuntimeError(
                f"the plan admits request {request_id}, which does not wait, or admits it twice"
            )
        least = 0 if in_parts else max(padded, record.context_tokens)
        if plan.reserve_tokens.get(request_id, 0) <= least:
            raise RuntimeError(
                f"the plan reserves no KV memory for an answer to request {request_id}"
            )


def _check_overruns(plan: Plan, overran: tuple[Record, ...], preempted: set[int]) -> None:
    """Each record that fills its reservation gets more or is preempted."""
    for record in overran:
        request_id = record.request.id
        if request_id in preempted:
            continue
        if plan.reserve_tokens.get(request_id, 0) <= record.reserved_tokens:
            raise RuntimeError(
                f"request {request_id} fills its KV memory; the plan neither gives it more "
                "nor preempts it"
            )
