"""A request's predicted work, as the queue and the ledger of upstreams count it."""

from typing import TYPE_CHECKING

import numpy as np

from predictor.prediction import from_bins
from serving.gateway.bodies import RequestBody
from serving.gateway.kinds import NEUTRAL_TOKENS
from serving.gateway.predicting import cut_prediction
from serving.gateway.upstreams import InFlightRequest, request_numbers
from serving.request import Record, Request

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction


def in_flight_answer(
    parsed: RequestBody | None,
    prediction: "LengthPrediction | None",
    *,
    prompt_tokens: int,
    arrival_s: float,
    slo_s: float,
    prefix_hashes: tuple[int, ...] = (),
) -> InFlightRequest:
    """A request for answers; without a prediction it counts as NEUTRAL_TOKENS.

    Args:
        parsed: its body's fields; None where they cannot be read.
        slo_s: where the body says none.
    """
    max_tokens = parsed.max_tokens if parsed else None
    answers = parsed.answers if parsed else 1
    if parsed and parsed.slo_s:
        slo_s = parsed.slo_s
    if prediction is None:
        expected = q90 = min(NEUTRAL_TOKENS, max_tokens or NEUTRAL_TOKENS)
        prediction = unknown_length(max_tokens)
    else:
        if max_tokens is not None:
            prediction = cut_prediction(prediction, max_tokens)
        expected, q90 = prediction.expected_tokens, prediction.q90_tokens
    request = Request(next(request_numbers), prompt_tokens, arrival_s, slo_s, prediction)
    return InFlightRequest(Record(request), expected * answers, q90 * answers, prefix_hashes)


def in_flight_other(arrival_s: float, slo_s: float) -> InFlightRequest:
    """A request that asks for no answer, such as a list of models: it is no load."""
    request = Request(next(request_numbers), 1, arrival_s, slo_s, unknown_length(None))
    return InFlightRequest(Record(request), 0.0, 0.0)


def unknown_length(max_tokens: int | None) -> "LengthPrediction":
    """What stands for the prediction of an answer of which nothing is known."""
    longest = float(min(2 * NEUTRAL_TOKENS, max_tokens or 2 * NEUTRAL_TOKENS))
    return from_bins(np.ones(1), np.array([0.0, longest]))
