"""Many replicas behind one router: each runs the scheduler's own loop over a simulated engine.

A replica is run only as far as the router must know: to the time at which one of its answers may
end. So what happens in it is what would happen if it ran alone with the requests that it got.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from serving.request import FOREVER, CostEstimator, Event, Limits, Policy, Request
from serving.scheduler import VirtualClock, run_scheduler
from serving.simulate.compare import engine_totals, garbage_collection_paused
from serving.simulate.engine import SimulatedEngine
from serving.simulate.routers import Demand, Loads, Router
from serving.simulate.scaled_trace import ScaledTrace
from serving.simulate.statistics import Collector

ENDS = ("finished", "refused")  # events after which a replica has a request no longer
LEAVING = ("finished", "preempted", "overran")  # after which it may admit another


class GivenRequests:
    """A replica's arrivals: those it was given, and the time until which no other comes."""

    closed = False

    def __init__(self) -> None:
        self.given: deque[Request] = deque()
        self.until_s = 0.0

    def next_s(self) -> float:
        if self.given:
            return min(seen_s(self.given[0]), self.until_s)
        return self.until_s

    def due(self, now_s: float) -> list[Request]:
        requests: list[Request] = []
        while self.given and seen_s(self.given[0]) <= now_s:
            requests.append(self.given.popleft())
        return requests

    def withdrawn(self) -> tuple[int, ...]:
        return ()


def seen_s(request: Request) -> float:
    """When a request's prediction is made."""
    return request.arrival_s + request.predict_s


class BlockCache:
    """Beginnings of prompts whose KV a replica keeps beside the running ones; oldest first out.

    Args:
        blocks: how many it holds.
    """

    def __init__(self, blocks: int) -> None:
        self.size = blocks
        self._kept: OrderedDict[int, None] = OrderedDict()

    def take(self, blocks: tuple[int, ...]) -> int:
        """How many blocks of a prompt, from its first on, are there; all of them are afterwards."""
        kept, known, missed = self._kept, 0, False
        for block in blocks:
            if block in kept:
                kept.move_to_end(block)
                known += not missed
            else:
                missed = True
                kept[block] = None
        while len(kept) > self.size:
            kept.popitem(last=False)
        return known


class FleetReplica:
    """One engine with its queue and its clock."""

    def __init__(self, policy: Policy, cost: CostEstimator, limits: Limits) -> None:
        self.engine = SimulatedEngine(cost, limits)
        self.clock, self.inbox = VirtualClock(), GivenRequests()
        self.events = run_scheduler(policy, self.engine, self.clock, self.inbox, turns=True)
        self.step_s = cost.decode_step_s(1, 0)  # the shortest
        self.unfinished = 0
        self.look_s = FOREVER  # when it is to be run on

    def give(self, request: Request) -> None:
        """A request of now."""
        self.inbox.given.append(request)
        self.unfinished += 1
        self.look_s = min(self.look_s, self._earliest_end_s(request))

    def run_until(self, time_s: float) -> Iterator[Event]:
        """Let time pass, to the first end of a step at or after this time."""
        self.inbox.until_s = time_s
        is_between, has_room = True, False
        while self.unfinished and not (is_between and self.clock.now_s() >= time_s):
            event = next(self.events)
            if event.kind in ENDS:
                self.unfinished -= 1
            is_between = event.kind == "turn"
            has_room = has_room or event.kind in LEAVING
            if not is_between:
                yield event
        self.look_s = self._next_look_s(has_room)

    def _next_look_s(self, has_room: bool) -> float:
        """No later than the next end of an answer; FOREVER where there is none to end."""
        if not self.unfinished:
            return FOREVER
        engine, given, now = self.engine, self.inbox.given, self.clock.now_s()
        soonest = now + self.step_s
        waits = self.unfinished > len(engine.rows) + len(given)
        if not engine.rows or waits and has_room:
            return soonest  # the next plan may admit a request with a short answer
        look_s = now + engine.next_end_s()
        for request in given:
            look_s = min(look_s, max(self._earliest_end_s(request), soonest))
        return look_s

    def _earliest_end_s(self, request: Request) -> float:
        return seen_s(request) + request.output_tokens * self.step_s


@dataclass(frozen=True)
class FleetSetting:
    """What a fleet consists of, but for the router.

    Attributes:
        replicas: their number, all alike.
        cache_tokens: of a replica's prefix cache; 0 for none.
    """

    replicas: int
    policy: Policy
    cost: CostEstimator
    limits: Limits
    cache_tokens: int = 0


class Fleet:
    """The replicas, what each was given, and the completions.

    Attributes:
        collector: of all completions.
        cached_tokens, prompt_tokens: of all prompts, those that were not computed, and all.
        given: of each replica, its number of requests.
    """

    def __init__(self, setting: FleetSetting, router: Router, block_tokens: int) -> None:
        self.setting, self.router, self.block_tokens = setting, router, block_tokens
        self.replicas: list[FleetReplica] = []
        self.caches: list[BlockCache] = []
        for _ in range(setting.replicas):
            self.replicas.append(FleetReplica(setting.policy, setting.cost, setting.limits))
            self.caches.append(BlockCache(setting.cache_tokens // block_tokens))
        self.loads = Loads.none(setting.replicas, setting.limits.kv_tokens)
        self.given = np.zeros(setting.replicas, np.int64)
        self.collector = Collector()
        self.cached_tokens = self.prompt_tokens = 0
        self._demands: dict[int, Demand] = {}
        self._looks: list[tuple[float, int]] = []  # (time, replica) to run on
        self._ended: list[tuple[float, int, int]] = []  # (time, replica, request), not known yet

    def arrive(self, request: Request, demand: Demand) -> int:
        """Let time pass to the request's arrival, and give it to a replica; which one."""
        self.settle(seen_s(request))
        place = self.router.choose(self.loads, demand)
        if self.setting.cache_tokens and demand.blocks:
            known = self.caches[place].take(demand.blocks) * self.block_tokens
            known = min(known, request.prompt_tokens - 1)
            self.cached_tokens += known
            if known:
                request = replace(request, cached_tokens=known)
        self.prompt_tokens += request.prompt_tokens
        self.loads.count(place, demand, 1)
        self._demands[request.id] = demand
        self.given[place] += 1
        replica = self.replicas[place]
        before = replica.look_s
        replica.give(request)
        if replica.look_s < before:
            heapq.heappush(self._looks, (replica.look_s, place))
        return place

    def settle(self, time_s: float) -> None:
        """Run on every replica of which an answer may have ended by then."""
        looks, ended = self._looks, self._ended
        while looks and looks[0][0] <= time_s:
            look_s, place = heapq.heappop(looks)
            if look_s == self.replicas[place].look_s:
                self._run(place, look_s)
        while ended and ended[0][0] <= time_s:
            _, place, number = heapq.heappop(ended)
            self.loads.count(place, self._demands.pop(number), -1)

    def finish(self) -> dict[str, float]:
        """Run to the end; the metrics."""
        self.settle(FOREVER)
        engines = [replica.engine for replica in self.replicas]
        metrics = self.collector.summary(engine_totals(engines))
        busy = np.array([engine.busy_s for engine in engines])
        metrics["busy_spread"] = float(busy.std() / max(busy.mean(), 1e-9))
        metrics["cached_share"] = self.cached_tokens / max(self.prompt_tokens, 1)
        return metrics

    def _run(self, place: int, time_s: float) -> None:
        replica = self.replicas[place]
        for event in replica.run_until(time_s):
            self.collector(event)
            if event.kind in ENDS:
                heapq.heappush(self._ended, (event.time_s, place, event.id))
        if replica.look_s < FOREVER:
            heapq.heappush(self._looks, (replica.look_s, place))


def simulate_fleet(
    trace: ScaledTrace,
    setting: FleetSetting,
    router: Router,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The metrics of all requests of a trace, as `completion_metrics` has them, and

    busy_spread: standard deviation over mean of the replicas' seconds at work.
    cached_share: of all prompt tokens, those that a prefix cache had.

    Args:
        progress: called with the number of requests that have arrived, at every 4,096th.
    """
    fleet = Fleet(setting, router, trace.block_tokens)
    with garbage_collection_paused():
        for request, demand in trace.demands():
            fleet.arrive(request, demand)
            if progress is not None and not request.id % 4096:
                progress(request.id)
        return fleet.finish()
