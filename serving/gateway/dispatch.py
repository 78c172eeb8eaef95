"""Which request is sent next, and where: the gateway's queue, ordered by a policy.

Dispatcher.acquire gives a request its upstream, Dispatcher.release takes it back.

Only a policy's order is used: what an engine has begun is its own, so that nothing is preempted
here and no memory is reserved.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.gateway.upstreams import (
    InFlightRequest,
    PrefixUpstreams,
    Upstream,
    any_up,
    chosen_upstream,
    load_of,
)
from serving.policies.continuous import POLICIES
from serving.request import Limits, Moment, Policy, Record
from serving.scheduler import Queue

# A policy's name -> whether its keys are tokens; the others' are seconds of the clock.
ORDERS = {
    "fcfs": False,
    "sjf": True,
    "tie": True,
    "boost": False,
    "boost_work": False,
    "deadline": False,
    "gittins": False,
    "gittins_mean": False,
    "gittins_tail": False,
}
FIRST_PACE_S = 0.03  # seconds between two tokens before any were seen
PACE_SHARE = 0.05  # of a new answer in the running mean
PROMPT_SHARE = 0.01  # of the pace, that a prompt's token takes
QUEUE_LIMITS = Limits(max_batch=64, kv_tokens=1 << 20, max_tokens=1 << 20)


class QueueIsFull(RuntimeError):
    """--max_queue requests wait."""


class NoUpstream(RuntimeError):
    """No upstream answers."""


@dataclass(frozen=True)
class PaceCost:
    """A serving.request.CostEstimator of what a gateway sees of an engine: its pace."""

    pace_s: float
    kv_capacity_tokens: int = QUEUE_LIMITS.kv_tokens

    def prefill_s(self, tokens: int, batch: int = 1) -> float:
        return PROMPT_SHARE * self.pace_s * tokens

    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float:
        return self.prefill_s(tokens)

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return self.pace_s

    def decode_s(self, batch: int, context_tokens: int, steps: int) -> float:
        return steps * self.pace_s


class Dispatcher:
    """Gives requests their upstreams, in the order of a policy.

    Its methods belong to one event loop.

    Attributes:
        upstreams: all of them.
        policy_name: of ORDERS.
        max_queue: requests that may wait.
        prefixes: which upstream computed them; None without affinity.
        pace_s: running mean of the seconds between two tokens of an answer.
        waiting: how many requests wait.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        policy: str,
        *,
        max_queue: int,
        prefixes: PrefixUpstreams | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.upstreams, self.max_queue, self.prefixes = upstreams, max_queue, prefixes
        self.policy_name = policy
        self.policy: Policy = POLICIES[policy]
        self.in_tokens = ORDERS[policy]
        self.pace_s = FIRST_PACE_S
        self._clock, self._zero_s = now_s, now_s()
        self._queue = Queue(self.order)
        self._waiters: dict[int, tuple[InFlightRequest, asyncio.Future[Upstream]]] = {}

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def now_s(self) -> float:
        """Seconds since the gateway's start."""
        return self._clock() - self._zero_s

    def order(self, record: Record) -> tuple[float, float]:
        """The policy's (key, until)."""
        cost = PaceCost(self.pace_s)
        return self.policy.order(record, Moment(self.now_s(), self.pace_s, cost, QUEUE_LIMITS))

    async def acquire(self, inflight: InFlightRequest, wait_s: float) -> Upstream:
        """The upstream of a request, which counts as its own until `release`.

        Args:
            wait_s: how long it may wait while no upstream answers.
        Raises:
            QueueIsFull, NoUpstream.
        """
        if not self._queue:
            upstream = self._enter(inflight)
            if upstream is not None:
                return upstream
        if len(self._queue) >= self.max_queue:
            raise QueueIsFull(f"{len(self._queue)} requests wait (--max_queue)")
        future: asyncio.Future[Upstream] = asyncio.get_running_loop().create_future()
        record = inflight.record
        self._waiters[record.request.id] = (inflight, future)
        self._queue.push(record)
        self.pump()
        try:
            return await self._wait(future, wait_s)
        except BaseException:
            was_given_upstream = future.done() and not future.cancelled()
            if was_given_upstream:  # in the same moment
                self.release(inflight)
            raise
        finally:
            self._waiters.pop(record.request.id, None)
            if record.waiting:
                self._queue.remove(record)

    async def _wait(self, future: "asyncio.Future[Upstream]", wait_s: float) -> Upstream:
        down_s = 0.0
        while True:
            done, _ = await asyncio.wait([future], timeout=1.0)
            if done:
                return future.result()
            down_s = 0.0 if any_up(self.upstreams) else down_s + 1.0
            if down_s >= wait_s:
                raise NoUpstream("no upstream answers")

    def any_upstream(self, inflight: InFlightRequest) -> Upstream:
        """An upstream for what is no answer and takes no place. Raises NoUpstream."""
        up = [upstream for upstream in self.upstreams if upstream.up]
        fresh = [upstream for upstream in up if upstream.base not in inflight.failed]
        if not up:
            raise NoUpstream("no upstream answers")
        return min(fresh or up, key=load_of)

    def release(self, inflight: InFlightRequest) -> None:
        """A request has left its upstream; others may enter."""
        inflight.leave()
        self.pump()

    def pump(self) -> None:
        """Send the first of the queue while there are places. Called when a place may be free."""
        self._queue.now_s = self.now_s()
        for record in self._queue:
            inflight, future = self._waiters[record.request.id]
            if future.done():  # its request has gone
                self._queue.remove(record)
                continue
            upstream = self._enter(inflight)
            if upstream is None:
                break
            self._queue.remove(record)
            future.set_result(upstream)
        self._queue.restore_unadmitted()

    def _enter(self, inflight: InFlightRequest) -> Upstream | None:
        upstream = chosen_upstream(self.upstreams, inflight, self.prefixes)
        if upstream is not None:
            inflight.enter(upstream)
            upstream.served += 1
            if self.prefixes is not None:
                self.prefixes.note(inflight, upstream)
        return upstream

    def note_pace(self, seconds: float, tokens: int) -> None:
        """An answer of so many tokens has taken so long from its first to its last."""
        if tokens > 1 and seconds > 0:
            pace_s = seconds / (tokens - 1)
            self.pace_s += PACE_SHARE * (pace_s - self.pace_s)
