"""What a server is doing at a moment, as the live view shows it. Free of torch and of HTTP.

Numbers are rounded for the wire; those that are not finite are None.
"""

import heapq
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.engines.runner import ReplicaState
from serving.request import Record, Request
from serving.server.monitor import EndedAnswer, Forecast, TrackedRequest
from serving.server.service import Service

QUEUE_SHOWN, ROWS_SHOWN, ENDED_SHOWN = 48, 64, 64
RECENT_S = 60.0
RECENT_ANSWERS = 4096  # at most, of the last RECENT_S
Json = dict[str, Any]


def finite(value: float | None, digits: int = 3) -> float | None:
    """A number for JSON; None where there is none."""
    return round(value, digits) if value is not None and math.isfinite(value) else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Of ascending values, between its two neighbours; None without any."""
    if not values:
        return None
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


@dataclass(frozen=True)
class RecentAnswer:
    """Seconds of an answer that was not cancelled; `ttft_s` is None where no token came."""

    finish_s: float
    latency_s: float
    ttft_s: float | None


class AnswerTotals:
    """Counts the answers that end (Monitor.on_end), in the scheduler's thread.

    Attributes:
        ended: all of them: in time, late (those that were cut or failed too), or cancelled.
        tokens: of all, without end tokens.
        fresh: the latest that no snapshot has shown.
        recent: the latest RECENT_ANSWERS, by when they ended.
    """

    def __init__(self) -> None:
        self.ended = self.in_time = self.late = self.cancelled = self.tokens = 0
        self.fresh: deque[EndedAnswer] = deque(maxlen=ENDED_SHOWN)
        self.recent: deque[RecentAnswer] = deque(maxlen=RECENT_ANSWERS)

    def add(self, answer: EndedAnswer) -> None:
        self.tokens += answer.tokens
        self.ended += 1
        if answer.reason == "cancelled":
            self.cancelled += 1
        elif answer.in_time:
            self.in_time += 1
        else:
            self.late += 1
        self.fresh.append(answer)
        if answer.reason == "cancelled":
            return
        done = answer.done
        ttft_s = None
        if done.first_token_s >= 0:
            ttft_s = max(done.first_token_s - done.request.arrival_s, 0.0)
        self.recent.append(RecentAnswer(done.finish_s, done.latency_s, ttft_s))

    def take_fresh(self) -> list[EndedAnswer]:
        """Those that ended since the last call."""
        return [self.fresh.popleft() for _ in range(len(self.fresh))]

    def recent_figures(self, now_s: float) -> Json:
        """How many ended in the last RECENT_S, and the quantiles of their seconds."""
        latencies, firsts = [], []
        for answer in list(self.recent):
            if answer.finish_s < now_s - RECENT_S:
                continue
            latencies.append(answer.latency_s)
            if answer.ttft_s is not None:
                firsts.append(answer.ttft_s)
        latencies.sort()
        firsts.sort()
        return {
            "answers": len(latencies),
            "ttft_p50": finite(percentile(firsts, 0.5)),
            "ttft_p95": finite(percentile(firsts, 0.95)),
            "latency_p50": finite(percentile(latencies, 0.5)),
            "latency_p95": finite(percentile(latencies, 0.95)),
        }


class SnapshotMaker:
    """Makes the snapshots of a service. It reads copies: the engine's thread never waits for it."""

    def __init__(self, service: Service) -> None:
        self.service, self.monitor = service, service.monitor
        self.totals = AnswerTotals()
        self.monitor.on_end = self.totals.add
        self._most_tokens = 0

    def make(self) -> Json:
        """The snapshot of now; answers that have ended are in one snapshot each."""
        now_s = self.service.clock.now_s()
        ended_tokens = self.totals.tokens
        running, waiting = self.monitor.under_way()
        made = sum(tracked.made for _, tracked in running)
        made += sum(tracked.made for tracked in waiting)  # before a preemption
        # An answer that ends between these lines is in neither sum: what was shown stays.
        self._most_tokens = max(self._most_tokens, ended_tokens + made)
        return {
            "t": round(time.time(), 3),
            "policy": self.service.policy,
            "waiting": len(waiting),
            "running": len(running),
            "queue": self._queue(waiting, now_s),
            "rows": [row_of(*entry, now_s) for entry in running[:ROWS_SHOWN]],
            "ended": [ended_entry(answer) for answer in self.totals.take_fresh()],
            "totals": self._totals(),
            "kv": {
                "used": sum(kv_used(tracked) for _, tracked in running),
                "reserved": sum(record.reserved_tokens for record, _ in running),
                "limit": self.monitor.limits.kv_tokens,
            },
            "recent": self.totals.recent_figures(now_s),
            "attainment": finite(self.monitor.attainment(), 4),
            "coverage": finite(self.monitor.coverage(), 4),
            "drift": finite(self.monitor.drift(), 4),
            "replicas": self._replicas(running, waiting),
        }

    def _queue(self, waiting: list[TrackedRequest], now_s: float) -> list[Json]:
        oldest = heapq.nsmallest(QUEUE_SHOWN, waiting, key=arrival_s)
        return [queue_entry(tracked, now_s) for tracked in oldest]

    def _totals(self) -> Json:
        totals, events = self.totals, self.monitor.events
        return {
            "tokens": self._most_tokens,
            "ended": totals.ended,
            "in_time": totals.in_time,
            "late": totals.late,
            "cancelled": totals.cancelled,
            "refused": events["refused"] + self.monitor.turned_away,
            "preempted": events["preempted"],
            "overran": events["overran"],
            "requeued": self.service.backend.requeued,
        }

    def _replicas(
        self, running: list[tuple[Record, TrackedRequest]], waiting: list[TrackedRequest]
    ) -> list[Json]:
        entries: dict[int | None, Json] = {}
        for state in self.service.backend.replica_states():
            entries[state.number] = replica_entry(state)
        for _, tracked in running:
            if (entry := entries.get(tracked.answer.replica)) is not None:
                entry["running"] += 1
                entry["kv_used"] += kv_used(tracked)
        for tracked in waiting:
            if (entry := entries.get(tracked.answer.replica)) is not None:
                entry["waiting"] += 1
        return list(entries.values())


def arrival_s(tracked: TrackedRequest) -> float:
    return tracked.request.arrival_s


def kv_used(tracked: TrackedRequest) -> int:
    """Prompt and answer tokens of a running request."""
    return tracked.request.prompt_tokens + len(tracked.answer.tokens)


def waiting_fields(request: Request, forecast: Forecast | None, now_s: float) -> Json:
    return {
        "id": request.id,
        "waited_s": finite(now_s - request.arrival_s),
        "due_s": finite(request.deadline_s - now_s),
        "prompt": request.prompt_tokens,
        "median": finite(forecast.median, 1) if forecast else None,
        "q90": finite(forecast.q90, 1) if forecast else None,
    }


def running_fields(request: Request, forecast: Forecast | None, now_s: float) -> Json:
    return {
        "id": request.id,
        "prompt": request.prompt_tokens,
        "median": finite(forecast.median, 1) if forecast else None,
        "q10": finite(forecast.q10, 1) if forecast else None,
        "q90": finite(forecast.q90, 1) if forecast else None,
        "age_s": finite(now_s - request.arrival_s),
        "due_s": finite(request.deadline_s - now_s),
    }


def queue_entry(tracked: TrackedRequest, now_s: float) -> Json:
    more = {"priority": tracked.request.priority, "adapter": tracked.adapter}
    return waiting_fields(tracked.request, tracked.forecast, now_s) | more


def row_of(record: Record, tracked: TrackedRequest, now_s: float) -> Json:
    """A running request; its forecast is the newest, `reread` whether that is by its states."""
    return running_fields(tracked.request, tracked.newest_forecast, now_s) | {
        "replica": tracked.answer.replica,
        "made": tracked.made,
        "reread": tracked.reread is not None,
        "reserved": record.reserved_tokens,
        "preemptions": record.preemptions,
        "overruns": record.overruns,
        "adapter": tracked.adapter,
    }


def ended_entry(answer: EndedAnswer) -> Json:
    request, tracked = answer.done.request, answer.tracked
    forecast = tracked.forecast if tracked else None
    return {
        "id": request.id,
        "made": answer.tokens,
        "median": finite(forecast.median, 1) if forecast else None,
        "q90": finite(forecast.q90, 1) if forecast else None,
        "latency_s": finite(answer.done.latency_s),
        "slo_s": finite(request.slo_s),
        "in_time": answer.in_time,
        "reason": answer.reason,
        "replica": tracked.answer.replica if tracked else None,
    }


def replica_entry(state: ReplicaState) -> Json:
    """A replica without its requests, which are counted in. `layers` are its first and last."""
    stages = []
    for stage in state.stages:
        entry: Json = {"device": stage.device, "layers": [stage.start, stage.end - 1]}
        entry |= {"bytes": stage.weight_bytes, "predicted_bytes": stage.predicted_bytes}
        stages.append(entry)
    return {
        "number": state.number,
        "state": state.state,
        "devices": state.devices,
        "running": 0,
        "waiting": 0,
        "kv_used": 0,
        "kv_limit": state.kv_limit,
        "restarts": state.restarts,
        "requests": state.finished,
        "stages": stages,
    }
