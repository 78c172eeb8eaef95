"""Predictions that a request can do without: none may fail, delay or change more than its hint."""

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
SAID_EVERY_S = 60.0  # a line of the log for each outcome
MOST_PENDING = 16  # predictions that wait for a slow predictor; more are not begun


class Predicted(NamedTuple):
    """A prediction, or why there is none: one of OUTCOMES."""

    outcome: str
    prediction: "LengthPrediction | None" = None


class GuardedPredictor:
    """A predictor in a thread of its own, with a limit of time.

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
        self._said_s: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="predictor")

    async def predict(self, text: str | None) -> Predicted:
        """A prediction, or its lack with the outcome; raises nothing of the predictor's."""
        found = await self._predict(text)
        self.outcomes[found.outcome] += 1
        if found.outcome not in (MADE, NO_TEXT, MISSING):  # the last is said at start
            self._say(found.outcome)
        return found

    async def _predict(self, text: str | None) -> Predicted:
        predictor = self.predictor
        if predictor is None:
            return Predicted(MISSING)
        if text is None:
            return Predicted(NO_TEXT)
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) >= MOST_PENDING:
            self.reason = f"{len(self._pending)} predictions wait"
            return Predicted(SLOW)
        future = self._pool.submit(predictor.predict, text)
        self._pending.append(future)
        try:
            async with asyncio.timeout(self.limit_s):
                predictions = await asyncio.wrap_future(future)
            [prediction] = predictions
            if is_sound(prediction):
                return Predicted(MADE, prediction)
            self.reason = "lengths that are not finite, or below 0"
            return Predicted(WRONG)
        except TimeoutError:
            self.reason = f"over {self.limit_s * 1000:g} ms"
            return Predicted(SLOW)
        except Exception as error:  # whatever it is, the request goes on without a prediction
            self.reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Predicted(FAILED)

    def _say(self, outcome: str) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s.get(outcome, -math.inf) < SAID_EVERY_S:
            return
        self._said_s[outcome] = now_s
        count, why = self.outcomes[outcome], f" ({self.reason})" if self.reason else ""
        log.warning("requests are forwarded without a prediction: %s%s, %d", outcome, why, count)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def is_sound(prediction: "LengthPrediction") -> bool:
    """Whether a prediction's lengths are finite and in order."""
    expected, q90 = prediction.expected_tokens, prediction.quantile(0.9)
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
