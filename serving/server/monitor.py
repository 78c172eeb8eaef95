"""The server's log and metrics, from the scheduler's events.

predictor.update reads the log, Prometheus the metrics. Free of torch.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.request import Completion, Event, Limits, Record, Request

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from serving.engines import Answer

log = logging.getLogger(__name__)

RECENT = 1000  # answers over which attainment is taken
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2, 4, 10)


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


@dataclass
class TrackedRequest:
    """A request under way.

    Attributes:
        prompt: its text.
        answer: its `reason` says how it ended.
        stopped: a stop string has ended it.
        adapter: name of the one that answers.
    """

    request: Request
    prompt: str
    answer: "Answer"
    stopped: bool = False
    adapter: str | None = None

    @property
    def reason(self) -> str:
        return "stop_string" if self.stopped else self.answer.reason or "unknown"


class Monitor:
    """Receives every event of the scheduler, in its thread (`observe` of run_scheduler).

    A line of the log: served_model, output_tokens (without the end token), finished (the answer
    ended by itself; else it is at least so long), reason, prompt_tokens, slo_s, in_time, arrived
    (seconds since 1970), queue_s, ttft_s, latency_s, preemptions, overruns, "prediction" where one
    was made, "adapter" where one answered, and "prompt" with log_prompts: predictor.update needs
    it.

    Attributes:
        registry: of prometheus_client; None without the package.
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
        self._waiting: set[int] = set()
        self._running: dict[int, Record] = {}
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self.registry: CollectorRegistry | None = None
        with suppress(ImportError):
            self._make_metrics()

    def track(
        self, request: Request, prompt: str, answer: "Answer", adapter: str | None = None
    ) -> None:
        """Register a request's text and answer, before the scheduler gets it.

        May be called from any thread.
        """
        self._tracked[request.id] = TrackedRequest(request, prompt, answer, adapter=adapter)

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
        if kind == "arrived":
            self._waiting.add(event.id)
        elif kind == "admitted":
            assert isinstance(event.what, Record)
            self._waiting.discard(event.id)
            self._running[event.id] = event.what
        elif kind == "preempted":
            self._running.pop(event.id, None)
            self._waiting.add(event.id)
        elif kind == "refused":
            self.forget(event.id)
        if self.registry is not None and kind in ("preempted", "overran"):
            self.events.labels(kind).inc()
        if kind in ("finished", "withdrawn", "refused") and self.registry is not None:
            self.requests.labels(self._reason(event)).inc()
        if kind in ("finished", "withdrawn"):
            self._waiting.discard(event.id)
            self._running.pop(event.id, None)
            assert isinstance(event.what, Completion)
            self._finish(event.what, self._tracked.pop(event.id, None))

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
        if self.registry is not None:
            self._count(done, tokens, reason, in_time)
        if self._file is not None and (tokens or finished):
            self._write(done, tokens, reason, finished, in_time, tracked)
        if request.prediction is not None and finished and self.registry is not None:
            self.ratio.observe((1 + tokens) / (1 + request.prediction.median_tokens))
            self.within.labels(str(tokens <= request.prediction.quantile(0.9)).lower()).inc()

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
            "prediction": request.prediction.to_dict() if request.prediction is not None else None,
        }
        self._file.write(json.dumps(row | adapter_field(tracked)))

    def _count(self, done: Completion, tokens: int, reason: str, in_time: bool):
        request = done.request
        self.tokens.labels("prompt").inc(request.prompt_tokens)
        self.tokens.labels("output").inc(tokens)
        if done.first_token_s >= 0:
            self.ttft.observe(max(done.first_token_s - request.arrival_s, 0.0))
        if reason != "cancelled":
            self.latency.observe(done.latency_s)
            self.slo.labels(str(in_time).lower()).inc()

    def attainment(self) -> float:
        """Share of the RECENT last answers that were whole and in time; nan before there are any.

        Cancelled ones do not count.
        """
        recent = list(self._recent)
        return sum(recent) / len(recent) if recent else float("nan")

    def _make_metrics(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = CollectorRegistry()

        def make_metric(
            kind: type, name: str, text: str, labels: Sequence[str] = (), **more: Any
        ) -> Any:
            return kind(f"glm_{name}", text, labels, registry=registry, **more)

        self.requests = make_metric(Counter, "requests", "Requests that ended, by how", ["reason"])
        self.events = make_metric(Counter, "scheduler_events", "Preemptions and overruns", ["kind"])
        self.tokens = make_metric(Counter, "tokens", "Tokens of requests that ended", ["kind"])
        self.slo = make_metric(
            Counter, "slo", "Answers by whether they were whole and in time", ["in_time"]
        )
        self.ttft = make_metric(
            Histogram, "time_to_first_token_seconds", "Arrival to first token", buckets=SECONDS
        )
        self.latency = make_metric(
            Histogram, "latency_seconds", "Arrival to last token", buckets=SECONDS
        )
        self.ratio = make_metric(
            Histogram,
            "length_ratio",
            "(1 + actual) / (1 + predicted median) tokens of whole answers",
            buckets=RATIOS,
        )
        self.within = make_metric(
            Counter,
            "predictions",
            "Whole answers by whether they were within the predicted q90",
            ["within_q90"],
        )
        make_metric(Gauge, "waiting_requests", "In the queue").set_function(
            lambda: len(self._waiting)
        )
        make_metric(Gauge, "running_requests", "On the engine").set_function(
            lambda: len(self._running)
        )
        make_metric(Gauge, "kv_reserved_tokens", "KV tokens reserved").set_function(
            lambda: sum(record.reserved_tokens for record in list(self._running.values()))
        )
        make_metric(Gauge, "kv_limit_tokens", "KV tokens there are").set(self.limits.kv_tokens)
        make_metric(Gauge, "slo_attainment", f"Share in time of the last {RECENT}").set_function(
            self.attainment
        )
        self._make_device_metrics(make_metric)
        self.registry = registry

    def _make_device_metrics(self, make_metric: Callable[..., Any]):
        """Load and memory of every GPU; `make_metric` is that of _make_metrics."""
        if handles := nvml_handles():
            import pynvml
            from prometheus_client import Gauge

            load = make_metric(
                Gauge, "device_load", "Share of time in which the GPU was at work", ["gpu"]
            )
            memory = make_metric(
                Gauge, "device_memory_bytes", "Memory in use on the GPU, by anyone", ["gpu"]
            )
            for i, handle in enumerate(handles):
                load.labels(str(i)).set_function(
                    lambda h=handle: pynvml.nvmlDeviceGetUtilizationRates(h).gpu / 100
                )
                memory.labels(str(i)).set_function(
                    lambda h=handle: pynvml.nvmlDeviceGetMemoryInfo(h).used
                )


def adapter_field(tracked: TrackedRequest | None) -> dict[str, str]:
    """The adapter that answered, as a field of the log; empty where it was the model itself."""
    if tracked is None or tracked.adapter is None:
        return {}
    return {"adapter": tracked.adapter}


def nvml_handles() -> list[Any]:
    """The NVML handle of every GPU; empty without GPUs or without nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return list(map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())))
    except (
        Exception
    ) as error:  # no package, no driver, no GPU: each library version has its own error
        log.debug("no GPU metrics: %s", error)
        return []
