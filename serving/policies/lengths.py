"""Cached figures of predicted lengths, which requests share and policies ask for repeatedly.

numpy is imported when the first is asked for: a command's --help names the policies without it.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from serving.request import CostEstimator, Limits, Record

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction

COARSE = 16  # tokens: the remaining length of an answer is computed at multiples of it


@lru_cache(maxsize=1 << 16)
def expected_tokens(prediction: "LengthPrediction") -> float:
    """Predicted mean of the answer's tokens, at least 1."""
    return max(prediction.expected_tokens, 1.0)


@lru_cache(maxsize=1 << 16)
def quantile_tokens(prediction: "LengthPrediction", q: float) -> float:
    """The q-quantile of the answer's tokens, at least 1."""
    return max(prediction.quantile(q), 1.0)


@lru_cache(maxsize=1 << 16)
def bucket_tokens(prediction: "LengthPrediction", buckets: int, longest_tokens: int) -> float:
    """The upper bound of the likeliest of equal buckets, as S3's classifier predicts it."""
    import numpy as np

    bounds = np.linspace(0, longest_tokens, buckets + 1)
    mass = np.diff(np.interp(bounds, prediction.edges, prediction.cumulative))
    return float(bounds[1 + int(np.argmax(mass))])


@lru_cache(maxsize=1 << 18)
def expected_remaining(prediction: "LengthPrediction", generated: int) -> float:
    """Predicted mean of the tokens that follow the `generated` ones, at least 1."""
    from predictor.prediction import remaining

    return max(remaining(prediction, generated).expected_tokens, 1.0)


@lru_cache(maxsize=1 << 18)
def quantile_remaining(prediction: "LengthPrediction", generated: int, q: float) -> float:
    """The q-quantile of the tokens that follow the `generated` ones, at least 1."""
    from predictor.prediction import remaining

    return max(remaining(prediction, generated).quantile(q), 1.0)


def remaining_tokens(record: Record, generated: int) -> float:
    """Predicted mean of the tokens that follow the `generated` ones, to multiples of COARSE."""
    return expected_remaining(record.prediction, generated - generated % COARSE)


def left_of(record: Record, generated: int) -> "LengthPrediction":
    """The distribution of the tokens that follow the `generated` ones, to multiples of COARSE."""
    from predictor.prediction import remaining

    assert record.prediction is not None, "the policy reads predictions and has none"
    return remaining(record.prediction, generated - generated % COARSE)


@lru_cache(maxsize=1 << 18)
def tail_remaining(prediction: "LengthPrediction", generated: int, level: float) -> float:
    """CVaR: the mean of the tokens that follow the `generated` ones where they exceed their
    `level`-quantile."""
    import numpy as np

    from predictor.prediction import remaining

    left = remaining(prediction, generated)
    edges = left.edges
    above = np.maximum(left.cumulative, level)
    mass = np.diff(above)
    starts = np.interp(above[:-1], left.cumulative, edges)
    ends = np.interp(above[1:], left.cumulative, edges)
    return float(mass @ (starts + ends)) / 2 / (1 - level)


def token_s(context_tokens: int, left: float, limits: Limits, cost: CostEstimator) -> float:
    """Seconds of the machine that one more answer token costs.

    A step's time over the sequences that share it in a full machine: limits.max_batch, or as many
    as limits.kv_tokens holds of this size. So memory has a price where it is what limits the batch.
    """
    size = context_tokens + left / 2
    batch = max(min(limits.max_batch, limits.kv_tokens / size), 1.0)
    return cost.decode_step_s(int(batch), int(batch * size)) / int(batch)
