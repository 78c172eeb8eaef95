"""Calibration: temperature, score to distribution, conformal levels, tail. numpy only."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from predictor.prediction import bins_of_lengths

MAX_KNOTS = 201  # most points of a conformal map
MAX_POINTS = 1024  # most labels in a ScoreScale
KERNEL_BANDWIDTH = 0.4  # standard deviations of the score: bandwidth of the kernel over scores
GRID = 256  # points at which a residual's distribution is tabulated
MIN_KERNEL_WEIGHT = 0.003  # kernel weight of a label at any distance
MAX_DEVIATIONS = 2.5  # standard deviations at which scores are clipped
MASS_FLOOR = 1e-6  # mass spread over all bins
MAX_CENSORED_SHARE = 0.1  # share of the labels
# Bounds of a tail's index: at 2 an answer beyond the tail's start is twice as long on average;
# below 2, the limit decides the mean.
MIN_TAIL_INDEX = 2.0
MAX_TAIL_INDEX = 20.0


@dataclass(frozen=True)
class Conformal:
    """A monotone map of cumulative probabilities, after which quantiles have nominal coverage.

    Split conformal on the probability integral transform (Chernozhukov, Wuethrich and Zhu 2021,
    "Distributional conformal prediction"): with u_i = F_i(L_i) the levels of the lengths of n
    unseen prompts, the k-th smallest u maps to k / (n + 1), so that quantile(q) covers a new answer
    with probability at least q for any model. This holds up to q = n / (n + 1), without ties among
    the levels, and up to the width of a bin, inside which calibrated mass is spread evenly.

    Attributes:
        raw, calibrated: (M,) ascending, from 0 to 1.
    """

    raw: tuple[float, ...] = (0.0, 1.0)
    calibrated: tuple[float, ...] = (0.0, 1.0)

    @classmethod
    def fit(cls, levels: np.ndarray, finished: np.ndarray, weights: np.ndarray) -> "Conformal":
        """The map of n labels.

        Args:
            levels: (n,) in [0, 1]; answers that were cut are censored at their level.
            finished: (n,); weights: (n,), summing to 1 over each prompt.
        """
        if not finished.any():
            return cls()  # lengths cannot be estimated from cut answers alone
        raw, share = kaplan_meier(np.clip(levels, 0, 1), finished, weights, never=1.0)
        if len(raw) > MAX_KNOTS:
            chosen = np.unique(np.round(np.linspace(0, len(raw) - 1, MAX_KNOTS)).astype(int))
            raw, share = raw[chosen], share[chosen]
        inside = (raw > 0) & (raw < 1)
        raw, share = np.r_[0.0, raw[inside], 1.0], np.r_[0.0, share[inside], 1.0]
        return cls(tuple(raw.tolist()), tuple(share.tolist()))

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, K) bin masses to calibrated ones."""
        calibrated = np.interp(cumulative(probabilities), *self.knots)
        return calibrated[:, 1:] - calibrated[:, :-1]

    @cached_property
    def knots(self) -> tuple[np.ndarray, np.ndarray]:
        """raw and calibrated as arrays."""
        return np.array(self.raw), np.array(self.calibrated)


@dataclass(frozen=True)
class Tail:
    """A bound on mass beyond the longest answer seen: P(L > x | L > start) <= (x / start)^-index.

    The conformal map decides how much mass lies beyond `start`. The data do not say where it lies,
    and a head without examples there may spread it up to the limit, so that the mean is the
    limit's and not the answers'. The index is the maximum-likelihood estimate of a Pareto tail
    (Hill 1975, "A simple general approach to inference about the tail of a distribution") from the
    longest quarter of the answers; those that were cut are censored.

    Attributes:
        start: tokens of the longest answer seen, cut or not.
    """

    start: float
    index: float

    def __post_init__(self):
        if not (1 <= self.start < np.inf and MIN_TAIL_INDEX <= self.index <= MAX_TAIL_INDEX):
            raise ValueError(f"no tail: {self}")

    @classmethod
    def fit(cls, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray) -> "Tail | None":
        """The tail of n labels: tokens, finished, weights (n,).

        None where more than MAX_CENSORED_SHARE were cut: quantiles then lie beyond what was seen.
        """
        if weights[~finished].sum() > MAX_CENSORED_SHARE * weights.sum():
            return None
        order = np.argsort(tokens, kind="stable")
        share = np.cumsum(weights[order]) / weights.sum()
        threshold = max(float(tokens[order][np.searchsorted(share, 0.75)]), 1.0)
        above = tokens > threshold
        excess = float(weights[above] @ np.log(tokens[above] / threshold))
        ended = float(weights[above & finished].sum())
        index = ended / excess if excess > 0 else MIN_TAIL_INDEX
        return cls(
            max(float(tokens.max()), 1.0), float(np.clip(index, MIN_TAIL_INDEX, MAX_TAIL_INDEX))
        )

    def apply(self, probabilities: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """(N, K) masses over `edges`, those of bins wholly beyond `start` held within the bound."""
        first = int(np.searchsorted(edges, self.start))
        if first >= len(edges) - 2:
            return probabilities
        # Probability of more than edges first, first + 1, ... tokens.
        longer = np.cumsum(probabilities[:, : first - 1 : -1], axis=1)[:, ::-1]
        bound = longer[:, :1] * (edges[first:-1] / edges[first]) ** -self.index
        drawn = np.concatenate([np.minimum(longer, bound), np.zeros((len(longer), 1))], axis=1)
        return np.concatenate([probabilities[:, :first], drawn[:, :-1] - drawn[:, 1:]], axis=1)


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """(N, K) bin masses -> (N, K + 1) cumulative probabilities at the edges, from 0 to 1.

    MASS_FLOOR of the mass is spread over all bins: an overconfident model would otherwise give many
    lengths the level 1, which no map of levels can distinguish.
    """
    total = np.zeros((len(probabilities), probabilities.shape[1] + 1))
    np.cumsum(probabilities, axis=1, out=total[:, 1:])
    total *= (1 - MASS_FLOOR) / total[:, -1:]
    total += np.linspace(0, MASS_FLOOR, total.shape[1])
    total[:, -1] = 1
    return total


def levels_of(probabilities: np.ndarray, edges: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(N,): the cumulative probability of the lengths `tokens` (N,) under N predictions (N, K)."""
    total = cumulative(probabilities)
    k = bins_of_lengths(edges, tokens)
    share = np.clip((tokens - edges[k]) / (edges[k + 1] - edges[k]), 0, 1)
    rows = np.arange(len(tokens))
    return total[rows, k] + share * (total[rows, k + 1] - total[rows, k])


@dataclass(frozen=True)
class ScoreScale:
    """Maps a score to a distribution: log(1 + L) = intercept + slope * score + residual.

    The residual is distributed as those of labels with similar scores, a kernel estimate of the
    conditional distribution (Hall, Wolff and Yao 1999): its location, width and skew may change
    with the score.

    Attributes:
        center, spread: mean and standard deviation of the scores.
        scores, residuals, weights: (P,) standardised scores, residuals in log(1 + L) and weights
            of calibration labels.
    """

    center: float
    spread: float
    intercept: float
    slope: float
    scores: tuple[float, ...]
    residuals: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def fit(
        cls, scores: np.ndarray, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray
    ) -> "ScoreScale":
        """scores, tokens, finished, weights: (n,) of prompts unseen by the scoring model."""
        center = float(np.average(scores, weights=weights))
        spread = float(np.sqrt(np.average((scores - center) ** 2, weights=weights))) or 1.0
        z = (scores - center) / spread
        logs = np.log1p(tokens)
        given = weights
        for _ in range(1 if finished.all() else 4):
            mean = np.average(logs, weights=weights)
            middle = np.average(z, weights=weights)
            covariance = np.average((z - middle) * (logs - mean), weights=weights)
            variance = max(1e-12, np.average((z - middle) ** 2, weights=weights))
            # A higher score never means shorter.
            slope = max(float(covariance / variance), 1e-6)
            intercept = float(mean - slope * middle)
            if not finished.all():
                weights = redistribute(z, logs - intercept - slope * z, finished, given)
        chosen = np.flatnonzero(weights > 0)
        if len(chosen) > MAX_POINTS:  # a systematic sample in the order of scores
            places = np.linspace(0, len(chosen) - 1, MAX_POINTS).astype(int)
            chosen = chosen[np.argsort(z[chosen], kind="stable")][places]
        residuals = logs - intercept - slope * z
        columns = []
        for column in (z, residuals, weights):
            columns.append(tuple(np.round(column[chosen], 6).tolist()))
        return cls(center, spread, intercept - slope * center / spread, slope / spread, *columns)

    def location(self, scores: np.ndarray) -> np.ndarray:
        """(N,): the estimate of log(1 + L) without a residual."""
        return self.intercept + self.slope * scores

    def reader(self, edges: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function: scores (N,) -> bin masses (N, K) over `edges`."""
        points = np.array(self.scores)
        residuals = np.array(self.residuals)
        weights = np.array(self.weights)
        mean = np.average(residuals, weights=weights)
        deviation = max(float(np.sqrt(np.average((residuals - mean) ** 2, weights=weights))), 0.02)
        smoothing = 0.33 * deviation * len(residuals) ** -0.2
        # Each label's smoothed step, tabulated on a grid over the residuals: the distribution at a
        # score is a weighted mean of the steps of labels near it.
        low = residuals.min() - 12 * smoothing
        step = (np.ptp(residuals) + 24 * smoothing) / (GRID - 1)
        grid = low + step * np.arange(GRID)[None]
        steps = 1 / (1 + np.exp(-np.clip((grid - residuals[:, None]) / smoothing, -40, 40)))
        logs = np.log1p(edges[1:-1])

        def read(scores: np.ndarray) -> np.ndarray:
            z = np.clip((scores - self.center) / self.spread, -MAX_DEVIATIONS, MAX_DEVIATIONS)
            kernel_weights = (
                np.exp(((z[:, None] - points) / KERNEL_BANDWIDTH) ** 2 / -2) + MIN_KERNEL_WEIGHT
            ) * weights
            curve = (kernel_weights @ steps) / kernel_weights.sum(axis=1, keepdims=True)
            at = np.clip((logs - self.location(scores)[:, None] - low) / step, 0, GRID - 1.001)
            left = at.astype(int)
            share = at - left
            rows = np.arange(len(z))[:, None]
            total = np.zeros((len(z), len(edges)))
            total[:, 1:-1] = (1 - share) * curve[rows, left] + share * curve[rows, left + 1]
            total[:, -1] = 1
            return np.maximum(total[:, 1:] - total[:, :-1], 0)

        return read


def redistribute(
    scores: np.ndarray, residuals: np.ndarray, finished: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(n,): weights after each cut answer's weight is moved to larger residuals of similar score.

    Redistribution to the right (Efron 1967); a cut answer with no larger residual counts as
    finished at its cut.
    """
    # Among equals the cut ones come last: they pass their weight to larger ones only.
    order = np.lexsort((~finished, residuals))
    s = scores[order]
    w = weights[order].astype(float)
    done = finished[order]
    for i in np.flatnonzero(~done):
        kernel_weights = w[i + 1 :] * np.exp(((s[i + 1 :] - s[i]) / KERNEL_BANDWIDTH) ** 2 / -2)
        total = kernel_weights.sum()
        if done[i + 1 :].any() and total > 0:
            w[i + 1 :] += w[i] * kernel_weights / total
            w[i] = 0
    redistributed = np.empty(len(w))
    redistributed[order] = w
    return redistributed


def kaplan_meier(
    values: np.ndarray, finished: np.ndarray, weights: np.ndarray, never: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values (m,) ascending, share of the weight at or below each).

    The product-limit estimate (Kaplan and Meier 1958). Values that are not `finished` are censored:
    the true one is larger.

    Args:
        never: weight of an event beyond all values.
    """
    distinct, place = np.unique(values, return_inverse=True)
    ended = np.bincount(place, weights * finished, minlength=len(distinct))
    leaving = np.bincount(place, weights, minlength=len(distinct))
    at_risk = np.cumsum(leaving[::-1])[::-1] + never
    share = 1 - np.cumprod(1 - ended / at_risk)
    return distinct[ended > 0], share[ended > 0]


def fit_temperature(logits: np.ndarray, loss: Callable[[np.ndarray], float]) -> float:
    """The temperature, of 61 between 1/4 and 4, at which `loss(logits / t)` is lowest; 1 wins ties.

    Args:
        logits: (N, K) of prompts unseen by the model.
        loss: (N, K) logits -> float.
    """
    candidates = sorted(np.geomspace(0.25, 4, 61), key=lambda t: abs(np.log(t)))
    return float(min(candidates, key=lambda t: loss(logits / t)))
