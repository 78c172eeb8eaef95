"""What the gateway is doing at a moment, as the live view of serving.server's page shows it.

The fields are those of serving.server.page.snapshots: a row is a request that an upstream has, a
replica is an upstream. No HTTP here.
"""

import heapq
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serving.gateway.dispatch import Dispatcher
from serving.gateway.observed import LengthDrift
from serving.gateway.upstreams import Passage, Upstream
from serving.request import Completion
from serving.server.monitor import EndedAnswer, Forecast, forecast_of
from serving.server.page.snapshots import (
    ENDED_SHOWN,
    QUEUE_SHOWN,
    RECENT_ANSWERS,
    ROWS_SHOWN,
    AnswerTotals,
    Json,
    finite,
    running_fields,
    waiting_fields,
)


class GatewayView:
    """Counts the requests that make answers, and makes snapshots of them. For one event loop.

    Attributes:
        under_way: those that wait or run, by their number.
        refused: for lack of room. retried: attempts after the first.
    """

    def __init__(self, dispatcher: Dispatcher, drift: LengthDrift) -> None:
        self.dispatcher, self.drift = dispatcher, drift
        self.under_way: dict[int, Passage] = {}
        self.refused = self.retried = 0
        self.totals = AnswerTotals()
        self._ended: deque[Json] = deque(maxlen=ENDED_SHOWN)
        self._in_time: deque[bool] = deque(maxlen=RECENT_ANSWERS)

    @contextmanager
    def showing(self, passage: Passage) -> Iterator[None]:
        """Show a request while its answer is made, and count it when it has ended."""
        number = passage.record.request.id
        self.under_way[number] = passage
        try:
            yield
        except Exception:
            passage.reason = passage.reason or "failed"
            raise
        finally:
            del self.under_way[number]
            self._count(passage)

    def _count(self, passage: Passage) -> None:
        request, reason = passage.record.request, passage.reason or "cancelled"
        if reason == "failed" and passage.first_s < 0:
            return  # it was refused, or nobody has answered it
        done = Completion(
            request,
            admitted_s=request.arrival_s,
            first_token_s=passage.first_s,
            finish_s=self.dispatcher.now_s(),
            output_tokens=passage.made,
            reserved_tokens=round(passage.kv_tokens),
            preemptions=0,
            overruns=0,
            cut=reason != "stop",
        )
        self.totals.add(EndedAnswer(done, passage.made, reason, done.in_time, None))
        if reason != "cancelled":
            self._in_time.append(done.in_time)
        prediction = request.prediction if passage.is_predicted else None
        self._ended.append(
            {
                "id": request.id,
                "made": passage.made,
                "median": finite(prediction.median_tokens, 1) if prediction else None,
                "q90": finite(prediction.q90_tokens, 1) if prediction else None,
                "latency_s": finite(done.latency_s),
                "slo_s": finite(request.slo_s),
                "in_time": done.in_time,
                "reason": reason,
                "replica": None,
            }
        )

    def make(self) -> Json:
        """The snapshot of now; answers that have ended are in one snapshot each."""
        now_s, upstreams = self.dispatcher.now_s(), self.dispatcher.upstreams
        running: list[Passage] = []
        waiting: list[Passage] = []
        for passage in self.under_way.values():
            (waiting if passage.upstream is None else running).append(passage)
        queue, rows = [], []
        for passage in heapq.nsmallest(QUEUE_SHOWN, waiting, key=arrival_of):
            queue.append(waiting_entry(passage, now_s))
        for passage in running[:ROWS_SHOWN]:
            rows.append(running_row(passage, upstreams, now_s))
        ended, on_time = list(self._ended), list(self._in_time)
        self._ended.clear()
        return {
            "t": round(time.time(), 3),
            "policy": self.dispatcher.policy_name,
            "waiting": len(waiting),
            "running": len(running),
            "queue": queue,
            "rows": rows,
            "ended": ended,
            "totals": self._totals(running),
            "kv": {
                "used": sum(map(held_tokens, running)),
                "reserved": round(sum(upstream.kv_taken for upstream in upstreams)),
                "limit": sum(upstream.kv_tokens or 0 for upstream in upstreams),
            },
            "recent": self.totals.recent_figures(now_s),
            "attainment": finite(sum(on_time) / len(on_time), 4) if on_time else None,
            "coverage": finite(self.drift.coverage(), 4),
            "drift": finite(self.drift.drift(), 4),
            "replicas": replica_entries(upstreams, running),
        }

    def _totals(self, running: Sequence[Passage]) -> Json:
        totals = self.totals
        return {
            "tokens": totals.tokens + sum(passage.made for passage in running),
            "ended": totals.ended,
            "in_time": totals.in_time,
            "late": totals.late,
            "cancelled": totals.cancelled,
            "refused": self.refused,
            "preempted": 0,
            "overran": 0,
            "requeued": self.retried,
        }


def arrival_of(passage: Passage) -> float:
    return passage.record.request.arrival_s


def forecast_of_passage(passage: Passage) -> Forecast | None:
    """None where its length was not predicted."""
    return forecast_of(passage.record.request.prediction) if passage.is_predicted else None


def held_tokens(passage: Passage) -> int:
    """Tokens of its prompt, as estimated, and of its answer so far."""
    return passage.record.request.prompt_tokens + passage.made


def waiting_entry(passage: Passage, now_s: float) -> Json:
    fields = waiting_fields(passage.record.request, forecast_of_passage(passage), now_s)
    return fields | {"priority": 0, "adapter": None}


def running_row(passage: Passage, upstreams: Sequence[Upstream], now_s: float) -> Json:
    """A request that one of the upstreams has."""
    assert passage.upstream is not None
    fields = running_fields(passage.record.request, forecast_of_passage(passage), now_s)
    return fields | {
        "replica": upstreams.index(passage.upstream),
        "made": passage.made,
        "reread": False,
        "reserved": round(passage.kv_tokens),
        "preemptions": 0,
        "overruns": 0,
        "adapter": None,
    }


def replica_entries(upstreams: Sequence[Upstream], running: Sequence[Passage]) -> list[Json]:
    used = dict.fromkeys((upstream.base for upstream in upstreams), 0)
    for passage in running:
        if passage.upstream is not None:
            used[passage.upstream.base] += held_tokens(passage)
    entries: list[Json] = []
    for number, upstream in enumerate(upstreams):
        entries.append(
            {
                "number": number,
                "state": "ready" if upstream.up else "ended",
                "devices": upstream.base,
                "running": upstream.running,
                "waiting": 0,
                "kv_used": used[upstream.base],
                "kv_limit": upstream.kv_tokens or 0,
                "restarts": 0,
                "requests": upstream.served,
                "stages": [],
            }
        )
    return entries
