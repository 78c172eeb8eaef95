"""What policies ask of a predicted length, remembered: requests share predictions, and the same is asked again and again."""

from functools import lru_cache

import numpy as np

from predictor.prediction import LengthPrediction, remaining
from serving.request import Request

COARSE = 16  # tokens: what is left of an answer is asked for at multiples of it


@lru_cache(maxsize=1 << 16)
def expected_tokens(prediction: LengthPrediction) -> float:
    return max(prediction.expected_tokens, 1.0)


@lru_cache(maxsize=1 << 16)
def quantile_tokens(prediction: LengthPrediction, q: float) -> float:
    return max(prediction.quantile(q), 1.0)


@lru_cache(maxsize=1 << 16)
def bucket_tokens(prediction: LengthPrediction, buckets: int, longest_tokens: int) -> float:
    """The upper bound of the likeliest of equal buckets, as S3's classifier would name it."""
    bounds = np.linspace(0, longest_tokens, buckets + 1)
    mass = np.diff(np.interp(bounds, prediction.edges, prediction.cumulative))
    return float(bounds[1 + int(np.argmax(mass))])


@lru_cache(maxsize=1 << 18)
def expected_left(prediction: LengthPrediction, generated: int) -> float:
    return max(remaining(prediction, generated).expected_tokens, 1.0)


@lru_cache(maxsize=1 << 18)
def quantile_left(prediction: LengthPrediction, generated: int, q: float) -> float:
    return max(remaining(prediction, generated).quantile(q), 1.0)


def tokens_left(request: Request, generated: int) -> float:
    """Predicted mean of the tokens still to come."""
    return expected_left(request.prediction, generated - generated % COARSE)
