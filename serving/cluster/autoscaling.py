"""How many replicas the predicted work needs: a policy for Ray Serve's autoscaler.

Free of Ray, which calls it in its controller and gives it what the replicas last said.
"""

from collections.abc import Mapping
from typing import Any, Protocol

PREDICTED_TOKENS = "predicted_tokens"  # of a replica's requests, running or waiting, still to make


class ScalingContext(Protocol):
    """The part of ray.serve.config.AutoscalingContext that the policy reads."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...
    @property
    def target_num_replicas(self) -> int: ...


class PredictedTokensPolicy:
    """As many replicas as give each of them `tokens_per_replica` of the predicted tokens.

    Ray applies the bounds and the delays to what it returns.

    Args:
        tokens_per_replica: predicted outstanding tokens that a replica should have.
    """

    def __init__(self, tokens_per_replica: float) -> None:
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: ScalingContext) -> tuple[float, dict[str, Any]]:
        """(replicas, state that is kept for the next call); before any figure, as it is now."""
        metrics = context.aggregated_metrics or {}
        tokens_by_replica = metrics.get(PREDICTED_TOKENS)
        if not tokens_by_replica:
            return float(context.target_num_replicas), {}
        return sum(tokens_by_replica.values()) / self.tokens_per_replica, {}
