"""The only loop of serving: arrivals -> queue -> policy -> engine -> completions. Which policy, engine and clock is the caller's choice."""

import heapq
from collections.abc import Callable, Iterable, Iterator

from serving.request import (
    FOREVER,
    Clock,
    Completion,
    Engine,
    Event,
    Limits,
    Plan,
    Policy,
    Record,
    Request,
    View,
)

PACE_MEMORY_S = 5.0


class VirtualClock:
    """Time that passes only when told to."""

    def __init__(self, now_s: float = 0.0):
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float):
        self._now_s += seconds

    def wait_until(self, time_s: float):
        self._now_s = max(self._now_s, time_s)


class Replay:
    """Arrivals known beforehand, in any iterable by arrival; read one ahead, so a million of them need not be there at once."""

    def __init__(self, requests: Iterable[Request]):
        self._requests = iter(requests)
        self._read()

    def _read(self):
        self._next = next(self._requests, None)
        self._next_s = (
            FOREVER if self._next is None else self._next.arrival_s + self._next.predict_s
        )

    @property
    def closed(self) -> bool:
        return self._next is None

    def next_s(self) -> float:
        """When the next one can be seen: after its arrival and its prediction."""
        return self._next_s

    def due(self, now_s: float) -> list[Request]:
        found = []
        while self._next_s <= now_s:
            found.append(self._next)
            self._read()
        return found

    def withdrawn(self) -> tuple[int, ...]:
        """Ids of requests that nobody waits for any more: none."""
        return ()


class Queue:
    """Waiting records in a heap of their policy's keys.

    A key holds until its record's until_s; then, and only when it has come to the top, it is asked for again. That is exact as
    long as keys only grow. Entries of records that left by other ways are skipped when met: each carries its record's version.
    """

    def __init__(self, order: Callable[[Record], tuple[float, float]]):
        self._order = order
        self._heap: list[tuple[float, int, int, Record]] = []
        self._members: dict[int, Record] = {}
        self._out: list[
            tuple[float, int, int, Record]
        ] = []  # handed to the policy, not yet put back
        self._ages: list[tuple[float, int, Record]] = []  # a second heap, by arrival
        self.now_s = 0.0

    def __len__(self) -> int:
        return len(self._members)

    def everyone(self):
        return self._members.values()

    def get(self, request_id: int) -> Record | None:
        return self._members.get(request_id)

    def push(self, record: Record):
        record.waiting, record.version = True, record.version + 1
        record.key, record.until_s = self._order(record)
        if record.request.id not in self._members:
            self._members[record.request.id] = record
            heapq.heappush(self._ages, (record.request.arrival_s, record.request.id, record))
        heapq.heappush(self._heap, (record.key, record.request.id, record.version, record))

    def remove(self, record: Record):
        record.waiting = False
        del self._members[record.request.id]

    def oldest(self) -> Record:
        while not self._ages[0][2].waiting:
            heapq.heappop(self._ages)
        return self._ages[0][2]

    def __iter__(self) -> Iterator[Record]:
        """In order of keys, lazily; what was handed out stays in the queue until it is removed."""
        for entry in self._out:
            yield entry[3]
        while (entry := self._pop()) is not None:
            self._out.append(entry)
            yield entry[3]

    def settle(self):
        """Put back what a policy looked at and did not take."""
        if self._out:
            for entry in self._out:
                if entry[3].waiting:
                    heapq.heappush(self._heap, entry)
            self._out.clear()
        if (
            len(self._heap) > 2 * len(self._members) + 64
        ):  # mostly entries of records that were taken past the heap
            self._heap = [e for e in self._heap if e[3].waiting and e[2] == e[3].version]
            heapq.heapify(self._heap)
        if len(self._ages) > 2 * len(self._members) + 64:
            self._ages = [e for e in self._ages if e[2].waiting]
            heapq.heapify(self._ages)

    def _pop(self):
        while self._heap:
            entry = heapq.heappop(self._heap)
            record = entry[3]
            if not record.waiting or entry[2] != record.version:
                continue
            if self.now_s > record.until_s:
                self.push(record)
                continue
            return entry
        return None


def run(
    policy: Policy,
    engine: Engine,
    clock: Clock,
    arrivals,
    monitor: Callable[[Event], None] | None = None,
) -> Iterator[Event]:
    """Serve all arrivals; every event as it happens, in order of time.

    Args:
        arrivals: has due(now_s), withdrawn(), next_s() and closed, as Replay has.
        monitor: sees every event before it is yielded.
    Raises:
        RuntimeError: the policy broke a limit, admitted what does not wait, left an overrun without an answer, or stands still.
    """
    for event in _events(policy, engine, clock, arrivals):
        if monitor is not None:
            monitor(event)
        yield event


def _events(policy: Policy, engine: Engine, clock: Clock, arrivals) -> Iterator[Event]:
    limits, cost = engine.limits, engine.cost
    pace = 0.0
    queue = Queue(lambda record: policy.order(record, queue.now_s, pace, cost))
    running: dict[int, Record] = {}
    overran: tuple[Record, ...] = ()
    free = limits.kv_tokens
    while True:
        now = queue.now_s = clock.now_s()
        withdrawn = arrivals.withdrawn()  # before due(): what it names has been put by then
        for request in arrivals.due(now):
            if reason := limits.refusal(request):
                yield Event(now, "refused", request.id, reason)
                continue
            record = Record(request, policy.length(request))
            queue.push(record)
            yield Event(now, "arrived", request.id, record)
        for request_id in withdrawn:
            if (record := queue.get(request_id)) is not None:
                queue.remove(record)
                completion = completion_of(record, now, record.generated, cut=True)
                yield Event(now, "withdrawn", request_id, completion)
        if not running and not len(queue):
            if arrivals.closed:
                return
            clock.wait_until(arrivals.next_s())
            continue

        plan = policy(
            View(now, queue, running, overran, free, limits, engine.generated, pace), cost
        )
        if plan.admit or plan.preempt or plan.reserve_tokens or overran:
            free = _check(plan, queue, running, overran, free, limits)
        for record in plan.preempt:
            record.generated = engine.generated(record)
            record.preemptions += 1
            record.reserved_tokens = 0
            del running[record.request.id]
            queue.push(record)
            yield Event(now, "preempted", record.request.id, record)
        padded = max((r.context_tokens for r in plan.admit), default=0) if plan.together else 0
        for record in plan.admit:
            queue.remove(record)
            running[record.request.id] = record
            record.base_tokens = padded or record.context_tokens
            record.admitted_s = now
            if record.first_admitted_s < 0:
                record.first_admitted_s = now
            yield Event(now, "admitted", record.request.id, record)
        for request_id, tokens in plan.reserve_tokens.items():
            if (record := running.get(request_id)) is not None:
                record.reserved_tokens = tokens
                if tokens > record.most_reserved_tokens:
                    record.most_reserved_tokens = tokens
        queue.settle()

        wake = min(plan.wake_s, arrivals.next_s()) if plan.wake_on_arrival else plan.wake_s
        if not running and not plan.preempt:
            wake = min(wake, arrivals.next_s())
            if wake == FOREVER or wake <= now:
                raise RuntimeError(
                    f"{policy} admits none of {len(queue)} waiting requests to an empty engine and names no time to look again"
                )
            clock.wait_until(wake)
            continue
        result = engine.step(plan, wake - now)
        clock.advance(result.elapsed_s)
        if result.emitted_tokens and result.elapsed_s:
            pace = paced(
                pace, result.elapsed_s, result.elapsed_s * len(running) / result.emitted_tokens
            )
        for request_id, after_s in result.started:
            record = running[request_id]
            if record.first_token_s < 0:
                record.first_token_s = now + after_s
                yield Event(now + after_s, "started", request_id, record)
        now = clock.now_s()
        for request_id, tokens, cut in result.finished:
            record = running.pop(request_id)
            free += record.reserved_tokens
            yield Event(now, "finished", request_id, completion_of(record, now, tokens, cut))
        overran = (
            tuple([running[request_id] for request_id in result.overran]) if result.overran else ()
        )
        for record in overran:
            record.overruns += 1
            yield Event(now, "overran", record.request.id, record)


def paced(pace_s: float, elapsed_s: float, seen_s: float) -> float:
    """A running mean of the seconds between two tokens of an answer, that forgets within PACE_MEMORY_S."""
    if not pace_s:
        return seen_s
    weight = min(elapsed_s / PACE_MEMORY_S, 1.0)
    return pace_s + weight * (seen_s - pace_s)


def completion_of(record: Record, now_s: float, tokens: int, cut: bool) -> Completion:
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


def _check(
    plan: Plan, queue: Queue, running: dict[int, Record], overran: tuple, free: int, limits: Limits
) -> int:
    """KV tokens free under the plan; RuntimeError where it breaks a limit, so that no policy can by mistake."""
    gone = set()
    for record in plan.preempt:
        if running.get(record.request.id) is not record or record.request.id in gone:
            raise RuntimeError(f"the plan preempts request {record.request.id}, which does not run")
        gone.add(record.request.id)
        free += record.reserved_tokens
    admitted = {record.request.id for record in plan.admit}
    for request_id, tokens in plan.reserve_tokens.items():
        if request_id in admitted:
            free -= tokens
        elif request_id in running and request_id not in gone:
            free -= tokens - running[request_id].reserved_tokens
            if tokens < running[request_id].reserved_tokens:
                raise RuntimeError(
                    f"the plan takes KV memory from request {request_id} while it runs"
                )
    padded = max((r.context_tokens for r in plan.admit), default=0) if plan.together else 0
    for record in plan.admit:
        if not record.waiting or len(admitted) != len(plan.admit):
            raise RuntimeError(
                f"the plan admits request {record.request.id}, which does not wait, or admits it twice"
            )
        if plan.reserve_tokens.get(record.request.id, 0) <= max(padded, record.context_tokens):
            raise RuntimeError(
                f"the plan reserves no KV memory for an answer to request {record.request.id}"
            )
    for record in overran:
        if (
            record.request.id not in gone
            and plan.reserve_tokens.get(record.request.id, 0) <= record.reserved_tokens
        ):
            raise RuntimeError(
                f"request {record.request.id} fills its KV memory; the plan neither gives it more nor preempts it"
            )
    if free < 0 or len(running) - len(gone) + len(admitted) > limits.max_batch:
        raise RuntimeError(
            f"the plan is {-free} KV tokens or {len(running) - len(gone) + len(admitted)} sequences large; {limits}"
        )
    if plan.together and plan.admit and len(running) > len(gone):
        raise RuntimeError("a static batch can only start on an empty engine")
    return free
