"""Length predictions with a limit of time: a request goes on without one that fails or is late."""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction
    from predictor.runtime import LengthPredictor

log = logging.getLogger(__name__)

MADE, NO_TEXT, MISSING, SLOW, WRONG, FAILED = OUTCOMES = (
    "made",
    "no_text",
    "missing",
    "slow",
    "wrong",
    "failed",
)
WARN_EVERY_S = 60.0  # a line of the log for each outcome
# A prediction is made between two requests, without the cost of a thread, while the late ones took
# at most so long and the text is short; so a predictor that becomes slow delays the others once.
QUICK_S = 0.003
LATEST_SHARE = 0.2  # of a prediction in the mean
QUICK_CHARACTERS = 8192
MOST_PENDING = 16  # predictions that wait for a slow predictor; more are not begun


class Predicted(NamedTuple):
    """A prediction, or why there is none: one of OUTCOMES."""

    outcome: str
    prediction: "LengthPrediction | None" = None


class GuardedPredictor:
    """A predictor with a limit of time: in a thread of its own, but while it is quick.

    Attributes:
        predictor: that serves; None without one. May be replaced at any time.
        outcomes: how many predictions had each.
        reason: of the last failure, in one line.
    """

    def __init__(self, predictor: "LengthPredictor | None", limit_s: float) -> None:
        self.predictor, self.limit_s = predictor, limit_s
        self.outcomes: Counter[str] = Counter()
        self.reason = ""
        self._pending: deque[Future] = deque()
        self._timed: LengthPredictor | None = None
        self._mean_s = math.inf
        self._warned_s: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="predictor")

    async def predict(self, text: str | None) -> Predicted:
        """A prediction, or its lack with the outcome; raises nothing of the predictor's."""
        predicted = await self._predict(text)
        self.outcomes[predicted.outcome] += 1
        if predicted.outcome not in (MADE, NO_TEXT, MISSING):  # the last is logged at start
            self._warn(predicted.outcome)
        return predicted

    async def _predict(self, text: str | None) -> Predicted:
        predictor = self.predictor
        if predictor is None:
            return Predicted(MISSING)
        if text is None:
            return Predicted(NO_TEXT)
        try:
            predictions = await self._predictions(predictor, text)
            [prediction] = predictions
            if is_sound(prediction):
                return Predicted(MADE, prediction)
            self.reason = "lengths that are not finite, or below 0"
            return Predicted(WRONG)
        except TimeoutError as error:
            self.reason = str(error)
            return Predicted(SLOW)
        except Exception as error:  # whatever it is, the request goes on without a prediction
            self.reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Predicted(FAILED)

    async def _predictions(
        self, predictor: "LengthPredictor", text: str
    ) -> "list[LengthPrediction]":
        """At once where the latest predictions were quick, else in the thread.

        Raises:
            TimeoutError: over the limit, with the reason.
        """
        is_quick = predictor is self._timed and self._mean_s <= QUICK_S
        if is_quick and len(text) <= QUICK_CHARACTERS:
            began_s = time.perf_counter()
            predictions = predictor.predict(text)
            self._note_time(predictor, time.perf_counter() - began_s)
            return predictions
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) >= MOST_PENDING:
            raise TimeoutError(f"{len(self._pending)} predictions wait")
        future = self._pool.submit(timed_predictions, predictor, text)
        self._pending.append(future)
        try:
            predictions, seconds = await asyncio.wait_for(asyncio.wrap_future(future), self.limit_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"over {self.limit_s * 1000:g} ms") from None
        self._note_time(predictor, seconds)
        return predictions

    def _note_time(self, predictor: "LengthPredictor", seconds: float) -> None:
        """A predictor's running mean decides whether it is quick."""
        if predictor is not self._timed:
            self._timed, self._mean_s = predictor, seconds
        self._mean_s += LATEST_SHARE * (seconds - self._mean_s)

    def _warn(self, outcome: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s.get(outcome, -math.inf) < WARN_EVERY_S:
            return
        self._warned_s[outcome] = now_s
        count = self.outcomes[outcome]
        why = f" ({self.reason})" if self.reason else ""
        log.warning("requests are forwarded without a prediction: %s%s, %d", outcome, why, count)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def timed_predictions(
    predictor: "LengthPredictor", text: str
) -> "tuple[list[LengthPrediction], float]":
    """A text's predictions, and the seconds that they took."""
    began_s = time.perf_counter()
    return predictor.predict(text), time.perf_counter() - began_s


def is_sound(prediction: "LengthPrediction") -> bool:
    """Whether a prediction's lengths are finite and in order."""
    expected, q90 = prediction.expected_tokens, prediction.q90_tokens
    return math.isfinite(expected) and math.isfinite(q90) and expected >= 0 and q90 >= 0


def cut_prediction(prediction: "LengthPrediction", most: int) -> "LengthPrediction":
    """The prediction of an answer that is cut after `most` tokens."""
    import numpy as np

    from predictor.prediction import from_bins

    edges = prediction.edges
    if most >= edges[-1]:
        return prediction
    cut = np.append(edges[edges < most - 1], [max(most - 1.0, 0.0), float(most)])
    cut = np.unique(cut)
    total = np.interp(cut, edges, prediction.cumulative)
    total[-1] = 1.0
    return from_bins(np.diff(total), cut)
