"""How long an answer will be, before it is written: LengthPredictor.from_pretrained(folder).predict(prompts)."""

from predictor.prediction import LengthPrediction, remaining

__all__ = ["LengthPrediction", "LengthPredictor", "remaining"]


def __getattr__(name):
    if name == "LengthPredictor":
        from predictor.runtime import LengthPredictor

        return LengthPredictor
    raise AttributeError(f"module 'predictor' has no attribute {name!r}")
