"""The metrics of a server, for Prometheus. Free of torch."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)

RECENT = 1000  # answers over which attainment, drift and coverage are taken
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2, 4, 10)

# Each metric's name without "glm_" (Prometheus adds "_total" to counters), its help text, and
# its labels or buckets.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests that ended, by how", ("reason",)),
    "refused_requests": ("Requests that were not served, by why", ("reason",)),
    "http_requests": ("HTTP requests that ended, by route and status", ("route", "status")),
    "key_requests": ("HTTP requests that ended, by the name of their API key", ("key",)),
    "scheduler_events": ("Preemptions and overruns", ("kind",)),
    "rereads": ("Predictions made anew from the hidden states of running answers", ()),
    "tokens": ("Tokens of requests that ended", ("kind",)),
    "slo": ("Answers by whether they were whole and in time", ("in_time",)),
    "predictions": ("Whole answers by whether they were within the predicted q90", ("within_q90",)),
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "queue_seconds": ("Arrival to leaving the queue for the first time", SECONDS),
    "time_to_first_token_seconds": ("Arrival to first token", SECONDS),
    "time_per_output_token_seconds": ("Between two tokens, mean of an answer", TOKEN_SECONDS),
    "latency_seconds": ("Arrival to last token", SECONDS),
    "answer_tokens": ("Length of answers that were not cancelled", TOKENS),
    "predicted_tokens": ("Predicted median length of the same answers", TOKENS),
    "length_ratio": ("(1 + actual) / (1 + predicted median) tokens of whole answers", RATIOS),
}
GAUGES = {
    "waiting_requests": "In the queue",
    "running_requests": "On the engine: the batch size",
    "kv_used_tokens": "Prompt and answer tokens of running requests",
    "kv_reserved_tokens": "KV tokens reserved",
    "kv_limit_tokens": "KV tokens there are",
    "slo_attainment": f"Share in time of the last {RECENT}",
    "length_drift_log_ratio": "Mean of log((1 + actual) / (1 + predicted median)), "
    f"last {RECENT} whole answers",
    "q90_coverage_ratio": f"Share within the predicted q90 of the last {RECENT} whole answers",
    "reread_q90_coverage_ratio": f"Share of the last {RECENT} predictions made anew whose answers "
    "ended within their q90",
}
REPLICA_GAUGES = {  # of a server with replicas in processes of their own
    "replicas_ready": "Replicas that answer",
    "replica_restarts": "Starts of replicas after their first",
    "requeued_requests": "Requests that another replica went on with",
}
DEVICE_GAUGES = {
    "device_load": "Share of time in which the GPU was at work",
    "device_memory_bytes": "Memory in use on the GPU, by anyone",
}
REFUSALS = {  # by status; other errors are failures, not refusals
    400: "bad_request",
    401: "unauthorized",
    403: "host",
    404: "not_found",
    405: "method",
    408: "slow_body",
    413: "large_body",
    415: "not_json",
    429: "queue_full",
    503: "unavailable",
}


def mean_or_nan(values: Sequence[float]) -> float:
    """nan of none."""
    return sum(values) / len(values) if values else math.nan


def refusal_reason(status: int, code: str | None) -> str | None:
    """The label of an error's refusal; None where it is a failure."""
    return "too_long" if code == "context_length_exceeded" else REFUSALS.get(status)


class Figures:
    """All metrics, in a registry of their own. May be used from any thread.

    Args:
        gauges: what gives the value of each of GAUGES.

    Attributes:
        registry: of prometheus_client.
    """

    def __init__(self, gauges: dict[str, Callable[[], float]]) -> None:
        """Raises ImportError without prometheus-client."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, (text, labels) in COUNTERS.items():
            self._counters[name] = Counter(f"glm_{name}", text, labels, registry=self.registry)
        for name, (text, buckets) in HISTOGRAMS.items():
            self._histograms[name] = Histogram(
                f"glm_{name}", text, buckets=buckets, registry=self.registry
            )
        for name, text in GAUGES.items():
            gauge = Gauge(f"glm_{name}", text, registry=self.registry)
            gauge.set_function(gauges[name])
        self._add_device_gauges()

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to one of COUNTERS, at these values of its labels."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def observe(self, name: str, value: float) -> None:
        """Add a value to one of HISTOGRAMS."""
        self._histograms[name].observe(value)

    def _add_device_gauges(self) -> None:
        """Load and memory of every GPU."""
        handles = nvml_handles()
        if not handles:
            return
        import pynvml
        from prometheus_client import Gauge

        gauges: list[Any] = []
        for name, text in DEVICE_GAUGES.items():
            gauges.append(Gauge(f"glm_{name}", text, ["gpu"], registry=self.registry))
        load, memory = gauges
        for i, handle in enumerate(handles):
            load.labels(str(i)).set_function(
                lambda h=handle: pynvml.nvmlDeviceGetUtilizationRates(h).gpu / 100
            )
            memory.labels(str(i)).set_function(
                lambda h=handle: pynvml.nvmlDeviceGetMemoryInfo(h).used
            )


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
