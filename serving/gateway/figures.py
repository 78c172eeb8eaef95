"""The gateway's metrics, for Prometheus."""

from collections.abc import Callable, Sequence
from functools import partial

from serving.gateway.predicting import OUTCOMES
from serving.gateway.upstreams import Upstream
from serving.server.figures import RATIOS, SECONDS, TOKENS

MILLISECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
PREFIX = "glm_gateway_"
GATEWAY_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests that ended, by the upstream and the status", ("upstream", "status")),
    "refusals": ("Requests that the gateway refused itself, by why", ("reason",)),
    "retries": ("Attempts after the first, by the upstream that had failed", ("upstream",)),
    "broken_streams": ("Answers that broke off after a part had been sent", ("upstream",)),
    "predictions": ("Requests by what became of their prediction", ("outcome",)),
}
GATEWAY_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "queue_seconds": ("Arrival to an upstream", SECONDS),
    "first_byte_seconds": ("Arrival to the answer's first byte", SECONDS),
    "latency_seconds": ("Arrival to the answer's last byte", SECONDS),
    "predict_seconds": ("A prediction, its wait for the predictor's thread included", MILLISECONDS),
    "answer_tokens": ("Length of answers, where the upstream tells it", TOKENS),
    "length_ratio": ("(1 + actual) / (1 + predicted median) tokens of whole answers", RATIOS),
}
GATEWAY_GAUGES = {
    "waiting_requests": "In the gateway's queue",
    "length_drift_log_ratio": "Mean of log((1 + actual) / (1 + predicted median)) of late",
    "q90_coverage_ratio": "Share of late within the predicted q90",
    "pace_seconds": "Between two tokens of an answer, running mean",
}
UPSTREAM_GAUGES: dict[str, tuple[str, Callable[[Upstream], float]]] = {
    "upstream_up": ("1 where it answers", lambda upstream: float(upstream.up)),
    "upstream_requests": ("Requests that it has", lambda upstream: upstream.running),
    "upstream_outstanding_tokens": (
        "Predicted tokens that it still has to make",
        lambda upstream: upstream.outstanding_tokens,
    ),
    "upstream_kv_tokens": ("Predicted q90 of its KV tokens", lambda upstream: upstream.kv_taken),
}


class GatewayFigures:
    """All metrics, in a registry of their own.

    Args:
        gauges: what gives each of GATEWAY_GAUGES.
    Attributes:
        registry: of prometheus_client.
    """

    def __init__(
        self, upstreams: Sequence[Upstream], gauges: dict[str, Callable[[], float]]
    ) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, (text, labels) in GATEWAY_COUNTERS.items():
            self._counters[name] = Counter(PREFIX + name, text, labels, registry=registry)
        for name, (text, buckets) in GATEWAY_HISTOGRAMS.items():
            histogram = Histogram(PREFIX + name, text, buckets=buckets, registry=registry)
            self._histograms[name] = histogram
        for name, text in GATEWAY_GAUGES.items():
            Gauge(PREFIX + name, text, registry=registry).set_function(gauges[name])
        for name, (text, value_of) in UPSTREAM_GAUGES.items():
            gauge = Gauge(PREFIX + name, text, ["upstream"], registry=registry)
            for upstream in upstreams:
                gauge.labels(upstream.base).set_function(partial(value_of, upstream))
        for outcome in OUTCOMES:
            self._counters["predictions"].labels(outcome)

    def count(self, name: str, *labels: str) -> None:
        """Add 1 to one of GATEWAY_COUNTERS, at these values of its labels."""
        self._counters[name].labels(*labels).inc()

    def observe(self, name: str, value: float) -> None:
        """Add a value to one of GATEWAY_HISTOGRAMS."""
        self._histograms[name].observe(value)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
