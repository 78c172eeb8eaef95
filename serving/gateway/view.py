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
from serving.gateway.upstreams import InFlightRequest, Upstream
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
        self.under_way: dict[int, InFlightRequest] = {}
        self.refused = self.retried = 0
        self.totals = AnswerTotals()
        self._ended: deque[Json] = deque(maxlen=ENDED_SHOWN)
        self._in_time: deque[bool] = deque(maxlen=RECENT_ANSWERS)

    @contextmanager
    def showing(self, inflight: InFlightRequest) -> Iterator[None]:
        """Show a request while its answer is made, and count it when it has ended."""
        number = inflight.record.request.id
        self.under_way[number] = inflight
        try:
            yield
        except Exception:
            inflight.reason = inflight.reason or "failed"
            raise
        finally:
            del self.under_way[number]
            self._count(inflight)

    def _count(self, inflight: InFlightRequest) -> None:
        request, reason = inflight.record.request, inflight.reason or "cancelled"
        if reason == "failed" and inflight.first_s < 0:
            return  # it was refused, or nobody has answered it
        done = Completion(
            request,
            admitted_s=request.arrival_s,
            first_token_s=inflight.first_s,
            finish_s=self.dispatcher.now_s(),
            output_tokens=inflight.made,
            reserved_tokens=round(inflight.kv_tokens),
            preemptions=0,
            overruns=0,
            cut=reason != "stop",
        )
        self.totals.add(EndedAnswer(done, inflight.made, reason, done.in_time, None))
        if reason != "cancelled":
            self._in_time.append(done.in_time)
        prediction = request.prediction if inflight.is_predicted else None
        self._ended.append(
            {
                "id": request.id,
                "made": inflight.made,
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
        running: list[InFlightRequest] = []
        waiting: list[InFlightRequest] = []
        for inflight in self.under_way.values():
            if inflight.upstream is None:
                waiting.append(inflight)
            else:
                running.append(inflight)
        queue, rows = [], []
        for inflight in heapq.nsmallest(QUEUE_SHOWN, waiting, key=arrival_of):
            queue.append(waiting_entry(inflight, now_s))
        for inflight in running[:ROWS_SHOWN]:
            rows.append(running_row(inflight, upstreams, now_s))
        ended = list(self._ended)
        self._ended.clear()
        in_time = list(self._in_time)
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
                "used": sum(held_tokens(inflight) for inflight in running),
                "reserved": round(sum(upstream.kv_taken for upstream in upstreams)),
                "limit": sum(upstream.kv_tokens or 0 for upstream in upstreams),
            },
            "recent": self.totals.recent_figures(now_s),
            "attainment": finite(sum(in_time) / len(in_time), 4) if in_time else None,
            "coverage": finite(self.drift.coverage(), 4),
            "drift": finite(self.drift.drift(), 4),
            "replicas": replica_entries(upstreams, running),
        }

    def _totals(self, running: Sequence[InFlightRequest]) -> Json:
        totals = self.totals
        return {
            "tokens": totals.tokens + sum(inflight.made for inflight in running),
            "ended": totals.ended,
            "in_time": totals.in_time,
            "late": totals.late,
            "cancelled": totals.cancelled,
            "refused": self.refused,
            "preempted": 0,
            "overran": 0,
            "requeued": self.retried,
        }


def arrival_of(inflight: InFlightRequest) -> float:
    return inflight.record.request.arrival_s


def forecast_of_request(inflight: InFlightRequest) -> Forecast | None:
    """None where its length was not predicted."""
    return forecast_of(inflight.record.request.prediction) if inflight.is_predicted else None


def held_tokens(inflight: InFlightRequest) -> int:
    """Tokens of its prompt, as estimated, and of its answer so far."""
    return inflight.record.request.prompt_tokens + inflight.made


def waiting_entry(inflight: InFlightRequest, now_s: float) -> Json:
    fields = waiting_fields(inflight.record.request, forecast_of_request(inflight), now_s)
    return fields | {"priority": 0, "adapter": None}


def running_row(inflight: InFlightRequest, upstreams: Sequence[Upstream], now_s: float) -> Json:
    """A request that one of the upstreams has."""
    assert inflight.upstream is not None
    fields = running_fields(inflight.record.request, forecast_of_request(inflight), now_s)
    return fields | {
        "replica": upstreams.index(inflight.upstream),
        "made": inflight.made,
        "reread": False,
        "reserved": round(inflight.kv_tokens),
        "preemptions": 0,
        "overruns": 0,
        "adapter": None,
    }


def replica_entries(
    upstreams: Sequence[Upstream], running: Sequence[InFlightRequest]
) -> list[Json]:
    used = dict.fromkeys((upstream.base for upstream in upstreams), 0)
    for inflight in running:
        if inflight.upstream is not None:
            used[inflight.upstream.base] += held_tokens(inflight)
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
