"""A request's predicted work, as the queue and the ledger of upstreams count it."""

from typing import TYPE_CHECKING

import numpy as np

from predictor.prediction import from_bins
from serving.gateway.bodies import AskedAnswer
from serving.gateway.kinds import NEUTRAL_TOKENS
from serving.gateway.predicting import cut_prediction
from serving.gateway.upstreams import Passage, request_numbers
from serving.request import Record, Request

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction


def passage_of(
    asked: AskedAnswer | None,
    prediction: "LengthPrediction | None",
    *,
    prompt_tokens: int,
    arrival_s: float,
    slo_s: float,
    beginnings: tuple[int, ...] = (),
) -> Passage:
    """The passage of a request for answers, which counts as NEUTRAL_TOKENS without a prediction.

    Args:
        asked: what its body asks; None where that cannot be read.
        slo_s: where the body says none.
    """
    max_tokens = asked.max_tokens if asked else None
    answers = asked.answers if asked else 1
    if asked and asked.slo_s:
        slo_s = asked.slo_s
    if prediction is None:
        expected = q90 = min(NEUTRAL_TOKENS, max_tokens or NEUTRAL_TOKENS)
        prediction = unknown_length(max_tokens)
    else:
        if max_tokens is not None:
            prediction = cut_prediction(prediction, max_tokens)
        expected, q90 = prediction.expected_tokens, prediction.q90_tokens
    request = Request(next(request_numbers), prompt_tokens, arrival_s, slo_s, prediction)
    return Passage(Record(request), expected * answers, q90 * answers, beginnings)


def errand_of(arrival_s: float, slo_s: float) -> Passage:
    """The passage of a request that asks for no answer, such as a list of models."""
    request = Request(next(request_numbers), 1, arrival_s, slo_s, unknown_length(None))
    return Passage(Record(request), 0.0, 0.0)


def unknown_length(max_tokens: int | None) -> "LengthPrediction":
    """What stands for the prediction of an answer of which nothing is known."""
    longest = float(min(2 * NEUTRAL_TOKENS, max_tokens or 2 * NEUTRAL_TOKENS))
    return from_bins(np.ones(1), np.array([0.0, longest]))
