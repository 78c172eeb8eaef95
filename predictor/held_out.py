"""Whether an updated predictor is better on the newest answers, which it was not fitted to."""

from collections.abc import Sequence

import numpy as np

from predictor.evaluate import ObservedLengths
from predictor.labels import LabelledPrompt
from predictor.prediction import LengthPrediction
from predictor.runtime import LengthPredictor
from predictor.scores import PINBALL_LEVELS

LOWER_PINBALL = 0.99  # of the old predictor's pinball loss: an update must be below it
COVERAGE = (0.80, 0.97)  # of q90, within which it is right


def held_out_figures(predictor: LengthPredictor, examples: list[LabelledPrompt]) -> dict:
    """Pinball loss and coverage of a predictor on answers of its served model.

    Returns:
        {"rows", "pinball" in tokens, "coverage_90" as a share}.
    Raises:
        ValueError: none of the answers is of its served model.
    """
    name = predictor.card["served_model"]["name"]
    observed = ObservedLengths.of(examples, name)
    if not len(observed):
        raise ValueError(f"--hold_out: none of the rows was answered by {name!r}")
    of_prompts = predictor.predict(observed.prompts)
    predictions = [of_prompts[number] for number in observed.prompt]
    q90 = np.array([prediction.quantile(0.9) for prediction in predictions])
    beyond = np.where(observed.finished, observed.tokens <= q90, observed.tokens < q90)
    losses = censored_pinball(predictions, observed.tokens, observed.finished)
    return {
        "rows": len(observed),
        "pinball": float(losses.mean()),
        "coverage_90": float(beyond.mean()),
    }


def censored_pinball(
    predictions: Sequence[LengthPrediction], tokens: np.ndarray, finished: np.ndarray
) -> np.ndarray:
    """(N,): each prediction's pinball loss, in tokens, mean over PINBALL_LEVELS.

    Of an answer that was cut, a quantile beyond the cut costs nothing (Powell 1986, "Censored
    regression quantiles"): leaving such answers out would favour short predictions.

    Args:
        tokens, finished: (N,), lengths, and whether the answers ended by themselves.
    """
    losses = np.zeros(len(tokens))
    for q in PINBALL_LEVELS:
        guess = np.array([prediction.quantile(q) for prediction in predictions])
        guess = np.where(finished, guess, np.minimum(guess, tokens))
        miss = tokens - guess
        losses += np.maximum(q * miss, (q - 1) * miss)
    return losses / len(PINBALL_LEVELS)


def is_better_held_out(new: dict, old: dict) -> bool:
    """Whether an update is to be used, from both predictors' `held_out_figures`.

    Its pinball loss must be below LOWER_PINBALL times the old one, and its q90 must cover a share
    within COVERAGE or nearer to 90 % than the old one's.
    """
    if not new["pinball"] < LOWER_PINBALL * old["pinball"]:
        return False
    least, most = COVERAGE
    is_right = least <= new["coverage_90"] <= most
    return is_right or abs(new["coverage_90"] - 0.9) < abs(old["coverage_90"] - 0.9)


def compare_held_out(
    old: LengthPredictor, new: LengthPredictor, examples: list[LabelledPrompt]
) -> dict:
    """{"before", "after": held_out_figures, "better": is_better_held_out} of an update."""
    before, after = held_out_figures(old, examples), held_out_figures(new, examples)
    return {"before": before, "after": after, "better": is_better_held_out(after, before)}


def describe_held_out(figures: dict) -> str:
    """An update's "held_out" in words."""
    old, new = figures["before"], figures["after"]
    return (
        f"on the {new['rows']} newest answers, not fitted to: "
        f"q90 covers {old['coverage_90']:.1%} before, {new['coverage_90']:.1%} after; "
        f"pinball {old['pinball']:.2f} before, {new['pinball']:.2f} after"
    )
