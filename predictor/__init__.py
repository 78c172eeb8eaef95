"""Predicts how long an answer will be before it is generated.

LengthPredictor.from_pretrained(folder).predict(prompts) gives one LengthPrediction per prompt.
"""

from typing import Any

from predictor.prediction import LengthPrediction, remaining

__all__ = ["LengthPrediction", "LengthPredictor", "remaining"]


def __getattr__(name: str) -> Any:
    if name == "LengthPredictor":
        from predictor.runtime import LengthPredictor

        return LengthPredictor
    raise AttributeError(f"module 'predictor' has no attribute {name!r}")
