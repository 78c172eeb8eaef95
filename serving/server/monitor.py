"""The server's log and metrics, from the scheduler's events.

predictor.update reads the log, Prometheus the metrics. Free of torch.
"""

import json
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from predictor.prediction import LengthPrediction
from serving.request import Completion, Event, Limits, Record, Request
from serving.server.access import Exchange, current_request_id
from serving.server.figures import (
    RECENT,
    REPLICA_GAUGES,
    Figures,
    mean_or_nan,
    refusal_reason,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from serving.engines import Answer
    from serving.replicas.pool import ReplicaPool

log = logging.getLogger(__name__)

TURNED_AWAY = ("queue_full", "connections", "unavailable")  # refusals of requests that are right


class LogFile:
    """Lines appended to a file.

    What cannot be written is dropped with one warning; each later line tries again, on its own
    line.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises OSError where it cannot be opened."""
        self._file = open(path, "a+b", buffering=0)
        self._ends_mid_line = self._has_partial_line()
        self.lost_lines = 0

    def _has_partial_line(self) -> bool:
        """Whether the file ends within a line: its writer was killed, or the disk was full."""
        if not self._file.seekable() or not self._file.seek(0, os.SEEK_END):
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"

    def write(self, text: str) -> None:
        data = (b"\n" if self._ends_mid_line else b"") + text.encode() + b"\n"
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            self._ends_mid_line = self._ends_mid_line or written > 0
            self.lost_lines += 1
            if self.lost_lines == 1:
                name = self._file.name
                log.error("the log %s: %s; lines are lost until it can be written", name, error)
            return
        self._ends_mid_line = False
        if self.lost_lines:
            log.warning("the log %s goes on; lines lost: %d", self._file.name, self.lost_lines)
            self.lost_lines = 0

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


class Forecast(NamedTuple):
    """Quantiles of a predicted length, in tokens."""

    median: float
    q10: float
    q90: float


def forecast_of(prediction: LengthPrediction | None) -> Forecast | None:
    """None without a prediction."""
    if prediction is None:
        return None
    return Forecast(*(prediction.quantile(q) for q in (0.5, 0.1, 0.9)))


@dataclass
class TrackedRequest:
    """A request under way.

    Attributes:
        prompt: its text.
        answer: its `reason` says how it ended.
        request_id: of the client's HTTP request; None where none is known.
        stopped: a stop string has ended it.
        adapter: name of the one that answers.
        reread: the newest prediction, by hidden states; None where there was none.
        reread_q90s: the q90 of each, in tokens.
    """

    request: Request
    prompt: str
    answer: "Answer"
    request_id: str | None = None
    stopped: bool = False
    adapter: str | None = None
    reread: LengthPrediction | None = None
    reread_q90s: list[float] = field(default_factory=list)

    @property
    def embeds(self) -> bool:
        """Whether its mean state was wanted: the engine's one token is no answer."""
        return self.answer.sampling.embeds

    @property
    def reason(self) -> str:
        return "stop_string" if self.stopped else self.answer.reason or "unknown"

    @property
    def made(self) -> int:
        """Answer tokens so far, without the end token."""
        return len(self.answer.tokens) - (self.answer.reason == "stop")

    @cached_property
    def forecast(self) -> Forecast | None:
        """Of the prediction at its arrival; None without one."""
        return forecast_of(self.request.prediction)

    @property
    def newest_forecast(self) -> Forecast | None:
        """By what is known now; None without any prediction."""
        return self.forecast if self.reread is None else forecast_of(self.reread)


class EndedAnswer(NamedTuple):
    """An answer that has ended.

    Attributes:
        tokens: without the end token. reason: as the log has it.
        in_time: it is whole, and came by its deadline.
        tracked: None where nothing was known of it.
    """

    done: Completion
    tokens: int
    reason: str
    in_time: bool
    tracked: TrackedRequest | None


class Monitor:
    """Receives every event of the schedulers, one at a time (AnswerBackend.start).

    A line of the log: served_model, output_tokens (without the end token), finished (the answer
    ended by itself; else it is at least so long), reason, prompt_tokens, slo_s, in_time, arrived
    (seconds since 1970), queue_s, ttft_s, latency_s, preemptions, overruns, request_id,
    "prediction" where one was made, "adapter" where one answered, and "prompt" with log_prompts:
    predictor.update needs it.

    Attributes:
        figures: the metrics; None without prometheus-client.
        on_answer: called with each answer's prompt, tokens (without the end token) and whether it
            ended by itself, in the scheduler's thread.
        on_end: called with each answer that ends, cancelled ones too, in the scheduler's thread.
        events: how many there were of each kind.
        turned_away: HTTP requests that a lack of room refused: TURNED_AWAY.
    """

    def __init__(
        self,
        served_model: str,
        limits: Limits,
        path: str | Path | None = None,
        log_prompts: bool = False,
    ) -> None:
        """Raises OSError where the log cannot be written."""
        self.served_model, self.limits, self.log_prompts = served_model, limits, log_prompts
        self._file = LogFile(path) if path else None
        self._tracked: dict[int, TrackedRequest] = {}
        self._running: dict[int, Record] = {}
        self._recent: deque[bool] = deque(maxlen=RECENT)
        # Of whole answers: (log of actual over predicted length, whether it is within the q90).
        self._predicted: deque[tuple[float, bool]] = deque(maxlen=RECENT)
        # Of predictions made anew, whether the answer ended within the q90.
        self._reread: deque[bool] = deque(maxlen=RECENT)
        self.figures: Figures | None = None
        self.on_answer: Callable[[str, int, bool], None] | None = None
        self.on_end: Callable[[EndedAnswer], None] | None = None
        self.events: Counter[str] = Counter()
        self.turned_away = 0
        with suppress(ImportError):
            self.figures = Figures(self._gauges())

    @property
    def registry(self) -> "CollectorRegistry | None":
        """Of prometheus_client; None without the package."""
        return self.figures.registry if self.figures is not None else None

    def watch_prefixes(self, copied_tokens: Callable[[], int]) -> None:
        """Show, as a metric, how many prompt tokens the engine has copied from common prefixes."""
        if self.registry is not None:
            from prometheus_client import Gauge

            text = "Prompt tokens copied from common prefixes instead of computed"
            gauge = Gauge("glm_prefix_copied_tokens", text, registry=self.registry)
            gauge.set_function(copied_tokens)

    def watch_replicas(self, pool: "ReplicaPool") -> None:
        """Show, as metrics, how many replicas are ready, and what becomes of those that end."""
        if self.registry is None:
            return
        from prometheus_client import Gauge

        values: dict[str, Callable[[], float]] = {
            "replicas_ready": lambda: len(pool.ready_replicas()),
            "replica_restarts": lambda: sum(replica.restarts for replica in pool.replicas),
            "requeued_requests": lambda: pool.requeued,
        }
        for name, text in REPLICA_GAUGES.items():
            Gauge(f"glm_{name}", text, registry=self.registry).set_function(values[name])

    def track(
        self, request: Request, prompt: str, answer: "Answer", adapter: str | None = None
    ) -> None:
        """Register a request's text and answer, before the scheduler gets it.

        May be called from any thread.
        """
        request_id = current_request_id.get()
        self._tracked[request.id] = TrackedRequest(
            request, prompt, answer, request_id, adapter=adapter
        )

    def stopped(self, request_id: int) -> None:
        """Record that a stop string has ended the answer.

        The answer is complete for its client; the length without the stop string stays unknown.
        """
        if (tracked := self._tracked.get(request_id)) is not None:
            tracked.stopped = True

    def forget(self, request_id: int) -> None:
        self._tracked.pop(request_id, None)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format; `registry` must be there."""
        from prometheus_client import generate_latest

        assert self.registry is not None
        return generate_latest(self.registry)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __call__(self, event: Event) -> None:
        kind = event.kind
        self.events[kind] += 1
        if kind == "admitted":
            assert isinstance(event.what, Record)
            self._running[event.id] = event.what
            if self.figures is not None and not event.what.preemptions:
                queue_s = event.what.first_admitted_s - event.what.request.arrival_s
                self.figures.observe("queue_seconds", max(queue_s, 0.0))
        elif kind == "preempted":
            self._running.pop(event.id, None)
        elif kind == "refused":
            self.forget(event.id)
        elif kind == "reread":
            self._note_reread(event)
        if self.figures is not None and kind in ("preempted", "overran"):
            self.figures.count("scheduler_events", kind)
        if self.figures is not None and kind in ("finished", "withdrawn", "refused"):
            self.figures.count("requests", self._reason(event))
        if kind in ("finished", "withdrawn"):
            self._running.pop(event.id, None)
            assert isinstance(event.what, Completion)
            self._finish(event.what, self._tracked.pop(event.id, None))

    def _note_reread(self, event: Event) -> None:
        """Keep the newer prediction, and count it."""
        assert isinstance(event.what, Record)
        if (tracked := self._tracked.get(event.id)) is not None:
            tracked.reread = prediction = event.what.prediction
            if prediction is not None:
                tracked.reread_q90s.append(prediction.quantile(0.9))
        if self.figures is not None:
            self.figures.count("rereads")

    def _reason(self, event: Event) -> str:
        tracked = self._tracked.get(event.id)
        return "refused" if event.kind == "refused" else tracked.reason if tracked else "unknown"

    def _finish(self, done: Completion, tracked: TrackedRequest | None):
        request = done.request
        reason = tracked.reason if tracked else "cut" if done.cut else "stop"
        finished = reason == "stop"
        tokens = done.output_tokens - finished  # without the end token
        in_time = done.finish_s <= request.deadline_s and (not done.cut or reason == "stop_string")
        if reason != "cancelled":
            self._recent.append(in_time)
        if self.on_end is not None:
            self.on_end(EndedAnswer(done, tokens, reason, in_time, tracked))
        if self.figures is not None:
            self._count(self.figures, done, tokens, reason, in_time)
        if tracked is not None and tracked.embeds:
            return
        if self._file is not None and (tokens or finished):
            self._write(done, tokens, reason, finished, in_time, tracked)
        if finished:
            self._compare_lengths(done, tokens, tracked)
        if self.figures is not None and reason != "cancelled":
            self.figures.observe("answer_tokens", tokens)
            if request.prediction is not None:
                self.figures.observe("predicted_tokens", request.prediction.median_tokens)
        if self.on_answer is not None and tracked is not None and (tokens or finished):
            self.on_answer(tracked.prompt, tokens, finished)

    def _compare_lengths(
        self, done: Completion, tokens: int, tracked: TrackedRequest | None
    ) -> None:
        """Predicted with actual length, of an answer that ended by itself."""
        if tracked is not None:
            self._reread.extend([tokens <= q90 for q90 in tracked.reread_q90s])
        prediction = done.request.prediction
        if prediction is None:
            return
        ratio = (1 + tokens) / (1 + prediction.median_tokens)
        within = bool(tokens <= prediction.quantile(0.9))
        self._predicted.append((math.log(ratio), within))
        if self.figures is not None:
            self.figures.observe("length_ratio", ratio)
            self.figures.count("predictions", str(within).lower())

    def _write(
        self,
        done: Completion,
        tokens: int,
        reason: str,
        finished: bool,
        in_time: bool,
        tracked: TrackedRequest | None,
    ):
        """Append an answer's line to the log, which must be open."""
        assert self._file is not None
        request = done.request
        row: dict[str, Any] = {"prompt": tracked.prompt} if tracked and self.log_prompts else {}
        ttft_s = None
        if done.first_token_s >= 0:
            ttft_s = round(done.first_token_s - request.arrival_s, 4)
        row |= {
            "served_model": self.served_model,
            "output_tokens": tokens,
            "finished": finished,
            "reason": reason,
            "prompt_tokens": request.prompt_tokens,
            "slo_s": request.slo_s,
            "in_time": in_time,
            "arrived": round(time.time() - done.latency_s, 3),
            "queue_s": round(max(done.admitted_s - request.arrival_s, 0.0), 4),
            "ttft_s": ttft_s,
            "latency_s": round(done.latency_s, 4),
            "preemptions": done.preemptions,
            "overruns": done.overruns,
            "request_id": tracked.request_id if tracked else None,
            "prediction": request.prediction.to_dict() if request.prediction is not None else None,
        }
        self._file.write(json.dumps(row | adapter_field(tracked)))

    @staticmethod
    def _count(figures: Figures, done: Completion, tokens: int, reason: str, in_time: bool) -> None:
        request = done.request
        figures.count("tokens", "prompt", by=request.prompt_tokens)
        figures.count("tokens", "output", by=tokens)
        if done.first_token_s >= 0:
            ttft_s = max(done.first_token_s - request.arrival_s, 0.0)
            figures.observe("time_to_first_token_seconds", ttft_s)
            if done.output_tokens > 1:
                tpot_s = (done.finish_s - done.first_token_s) / (done.output_tokens - 1)
                figures.observe("time_per_output_token_seconds", max(tpot_s, 0.0))
        if reason != "cancelled":
            figures.observe("latency_seconds", done.latency_s)
            figures.count("slo", str(in_time).lower())

    def count_exchange(self, route: str, exchange: Exchange) -> None:
        """Count an HTTP request that has ended; `route`: the template of its path."""
        if self.figures is not None:
            self.figures.count("http_requests", route, str(exchange.logged_status))
            if exchange.key is not None:
                self.figures.count("key_requests", exchange.key)
        if exchange.error is not None:
            reason = refusal_reason(exchange.error.status, exchange.error.code)
            if reason is not None:
                self.count_refusal(reason)

    def count_refusal(self, reason: str) -> None:
        """Count a request, or a connection, that was not served."""
        self.turned_away += reason in TURNED_AWAY
        if self.figures is not None:
            self.figures.count("refused_requests", reason)

    def attainment(self) -> float:
        """Share of the RECENT last answers that were whole and in time; nan before there are any.

        Cancelled ones do not count.
        """
        return mean_or_nan(list(self._recent))

    def drift(self) -> float:
        """Mean of log((1 + actual) / (1 + predicted median)) over the RECENT last whole answers.

        Above 0, answers are longer than predicted; nan before there are any.
        """
        return mean_or_nan([log_ratio for log_ratio, _ in list(self._predicted)])

    def coverage(self) -> float:
        """Share of the RECENT last whole answers within their predicted q90; nan before any."""
        return mean_or_nan([within for _, within in list(self._predicted)])

    def reread_coverage(self) -> float:
        """Share of the RECENT last predictions made anew whose answers ended within their q90.

        Of answers that ended by themselves; nan before any.
        """
        return mean_or_nan(list(self._reread))

    def under_way(self) -> tuple[list[tuple[Record, TrackedRequest]], list[TrackedRequest]]:
        """(what runs, in the order of its admission; what waits, in that of its arrival).

        From any thread: copies, so an event that comes meanwhile may be seen in part. No request is
        in both. Waiting is also what no replica has yet.
        """
        records, known = list(self._running.items()), dict(self._tracked)
        running = []
        for request_id, record in records:
            if (tracked := known.pop(request_id, None)) is not None:
                running.append((record, tracked))
        waiting = [tracked for tracked in known.values() if tracked.answer.reason is None]
        return running, waiting

    def used_tokens(self) -> int:
        """Prompt and answer tokens of the running requests."""
        total = 0
        for request_id, record in list(self._running.items()):
            total += record.request.prompt_tokens
            if (tracked := self._tracked.get(request_id)) is not None:
                total += len(tracked.answer.tokens)
        return total

    def reserved_tokens(self) -> int:
        """KV tokens reserved for the running requests."""
        return sum(record.reserved_tokens for record in list(self._running.values()))

    def _gauges(self) -> dict[str, Callable[[], float]]:
        """What gives each of the figures' GAUGES."""
        return {
            "waiting_requests": lambda: len(self.under_way()[1]),
            "running_requests": lambda: len(self._running),
            "kv_used_tokens": self.used_tokens,
            "kv_reserved_tokens": self.reserved_tokens,
            "kv_limit_tokens": lambda: self.limits.kv_tokens,
            "slo_attainment": self.attainment,
            "length_drift_log_ratio": self.drift,
            "q90_coverage_ratio": self.coverage,
            "reread_q90_coverage_ratio": self.reread_coverage,
        }


def adapter_field(tracked: TrackedRequest | None) -> dict[str, str]:
    """The adapter that answered, as a field of the log; empty where it was the model itself."""
    if tracked is None or tracked.adapter is None:
        return {}
    return {"adapter": tracked.adapter}
