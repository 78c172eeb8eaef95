"""From what a model puts out to probabilities that hold: temperature, score to distribution, conformal levels. numpy only."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from predictor.prediction import class_of

KNOTS = 201  # a calibration map keeps at most so many points
POINTS = 1024  # labels that a ScoreScale keeps
NEAR = 0.4  # standard deviations of the score: how far a label speaks for other scores
GRID = 256  # points at which a residual's distribution is tabulated
ALL = 0.003  # weight that a label has everywhere
FURTHEST = 2.5  # standard deviations; scores beyond count as there
FLOOR = 1e-6
MOST_CUT = 0.1  # share of the labels
LEAST_INDEX, MOST_INDEX = (
    2.0,
    20.0,
)  # of a tail: at 2 an answer beyond its start is twice as long on average; below, the limit decides the mean


@dataclass(frozen=True)
class Conformal:
    """A monotone map of cumulative probabilities, after which quantiles cover what they say.

    Split conformal on the probability integral transform (Chernozhukov, Wuethrich and Zhu 2021, "Distributional conformal
    prediction"): where u_i = F_i(L_i) are what the model gave the lengths of n prompts it has not seen, the k-th smallest u
    becomes k / (n + 1), so quantile(q) covers a new answer with probability at least q, whatever the model: up to q = n / (n + 1),
    where no two levels are the same, and but for the width of a bin, inside which calibrated mass is spread evenly.

    Attributes:
        raw, calibrated: (M,) ascending, from 0 to 1.
    """

    raw: tuple[float, ...] = (0.0, 1.0)
    calibrated: tuple[float, ...] = (0.0, 1.0)

    @classmethod
    def fit(cls, levels: np.ndarray, finished: np.ndarray, weights: np.ndarray) -> "Conformal":
        """levels (n,) in [0, 1]; answers that were cut count as longer than that; weights (n,), 1 in all for each prompt."""
        if not finished.any():
            return cls()  # caps alone say nothing of lengths
        raw, share = kaplan_meier(np.clip(levels, 0, 1), finished, weights, never=1.0)
        if len(raw) > KNOTS:
            chosen = np.unique(np.round(np.linspace(0, len(raw) - 1, KNOTS)).astype(int))
            raw, share = raw[chosen], share[chosen]
        inside = (raw > 0) & (raw < 1)
        raw, share = np.r_[0.0, raw[inside], 1.0], np.r_[0.0, share[inside], 1.0]
        return cls(tuple(raw.tolist()), tuple(share.tolist()))

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, K) bin masses to calibrated ones."""
        found = np.interp(cumulative(probabilities), *self.knots)
        return found[:, 1:] - found[:, :-1]

    @cached_property
    def knots(self) -> tuple[np.ndarray, np.ndarray]:
        """raw and calibrated as arrays."""
        return np.array(self.raw), np.array(self.calibrated)


@dataclass(frozen=True)
class Tail:
    """How far beyond the longest answer seen mass may lie: P(L > x | L > start) <= (x / start)^-index.

    How much mass lies there is the conformal map's business and stays; where it lies no data say, and a head that has seen
    nothing there may spread it up to the limit, so that the mean is the limit's and not the answers'. The index is the
    maximum-likelihood estimate of a Pareto tail (Hill 1975, "A simple general approach to inference about the tail of a
    distribution") from the longest quarter of the answers, of which those that were cut count as longer than that.

    Attributes:
        start: tokens of the longest answer seen, cut or not.
    """

    start: float
    index: float

    def __post_init__(self):
        if not (1 <= self.start < np.inf and LEAST_INDEX <= self.index <= MOST_INDEX):
            raise ValueError(f"no tail: {self}")

    @classmethod
    def fit(cls, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray) -> "Tail | None":
        """tokens, finished, weights: (n,) of the labels. None where many were cut: quantiles then lie beyond what was seen."""
        if weights[~finished].sum() > MOST_CUT * weights.sum():
            return None
        order = np.argsort(tokens, kind="stable")
        share = np.cumsum(weights[order]) / weights.sum()
        threshold = max(float(tokens[order][np.searchsorted(share, 0.75)]), 1.0)
        above = tokens > threshold
        excess = float(weights[above] @ np.log(tokens[above] / threshold))
        ended = float(weights[above & finished].sum())
        index = ended / excess if excess > 0 else LEAST_INDEX
        return cls(max(float(tokens.max()), 1.0), float(np.clip(index, LEAST_INDEX, MOST_INDEX)))

    def apply(self, probabilities: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """(N, K) masses over `edges`, those of the bins wholly beyond `start` drawn in as far as the bound says."""
        first = int(np.searchsorted(edges, self.start))
        if first >= len(edges) - 2:
            return probabilities
        longer = np.cumsum(probabilities[:, : first - 1 : -1], axis=1)[
            :, ::-1
        ]  # than edges first, first + 1, ...
        bound = longer[:, :1] * (edges[first:-1] / edges[first]) ** -self.index
        drawn = np.concatenate([np.minimum(longer, bound), np.zeros((len(longer), 1))], axis=1)
        return np.concatenate([probabilities[:, :first], drawn[:, :-1] - drawn[:, 1:]], axis=1)


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """(N, K) bin masses -> (N, K + 1), 0 to 1 at the edges, with FLOOR of the mass spread over all bins: where a model that is too
    sure of itself would give many lengths the level 1, no map of levels could tell them apart."""
    total = np.zeros((len(probabilities), probabilities.shape[1] + 1))
    np.cumsum(probabilities, axis=1, out=total[:, 1:])
    total *= (1 - FLOOR) / total[:, -1:]
    total += np.linspace(0, FLOOR, total.shape[1])
    total[:, -1] = 1
    return total


def levels_of(probabilities: np.ndarray, edges: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(N,): the cumulative probability that each prediction (N, K) gives to what came, (N,) tokens."""
    total = cumulative(probabilities)
    k = class_of(edges, tokens)
    share = np.clip((tokens - edges[k]) / (edges[k + 1] - edges[k]), 0, 1)
    rows = np.arange(len(tokens))
    return total[rows, k] + share * (total[rows, k + 1] - total[rows, k])


@dataclass(frozen=True)
class ScoreScale:
    """From a score to a distribution: log(1 + L) = intercept + slope * score + a residual, distributed as those of like scores were, a
    kernel estimate of the conditional distribution (Hall, Wolff and Yao 1999). So it may bend, widen and lean as the score grows.

    Attributes:
        center, spread: of the scores.
        scores, residuals, weights: (P,) standardised score, residual in log(1 + L) and weight of calibration labels.
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
        """scores, tokens, finished, weights: (n,), of prompts that the scoring model has not seen."""
        center = float(np.average(scores, weights=weights))
        spread = float(np.sqrt(np.average((scores - center) ** 2, weights=weights))) or 1.0
        z, logs = (scores - center) / spread, np.log1p(tokens)
        given = weights
        for _ in range(1 if finished.all() else 4):
            mean, middle = np.average(logs, weights=weights), np.average(z, weights=weights)
            slope = float(
                np.average((z - middle) * (logs - mean), weights=weights)
                / max(1e-12, np.average((z - middle) ** 2, weights=weights))
            )
            slope = max(slope, 1e-6)  # a higher score means longer, or all but nothing
            intercept = float(mean - slope * middle)
            if not finished.all():
                weights = hand_on(z, logs - intercept - slope * z, finished, given)
        kept = np.flatnonzero(weights > 0)
        if len(kept) > POINTS:  # a fair sample: every so many-th in the order of scores
            kept = kept[np.argsort(z[kept], kind="stable")][
                np.linspace(0, len(kept) - 1, POINTS).astype(int)
            ]
        columns = (
            tuple(np.round(column[kept], 6).tolist())
            for column in (z, logs - intercept - slope * z, weights)
        )
        return cls(center, spread, intercept - slope * center / spread, slope / spread, *columns)

    def location(self, scores: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * scores

    def reader(self, edges: np.ndarray):
        """scores (N,) -> bin masses (N, K) over `edges`."""
        points, residuals, weights = (
            np.array(self.scores),
            np.array(self.residuals),
            np.array(self.weights),
        )
        mean = np.average(residuals, weights=weights)
        deviation = max(float(np.sqrt(np.average((residuals - mean) ** 2, weights=weights))), 0.02)
        blur = 0.33 * deviation * len(residuals) ** -0.2
        # Each label's smoothed step, tabulated over the residuals there are: a score's distribution is a mean of the steps near it.
        low, step = residuals.min() - 12 * blur, (np.ptp(residuals) + 24 * blur) / (GRID - 1)
        steps = 1 / (
            1
            + np.exp(
                -np.clip((low + step * np.arange(GRID)[None] - residuals[:, None]) / blur, -40, 40)
            )
        )
        logs = np.log1p(edges[1:-1])

        def read(scores: np.ndarray) -> np.ndarray:
            z = np.clip((scores - self.center) / self.spread, -FURTHEST, FURTHEST)
            near = (np.exp(((z[:, None] - points) / NEAR) ** 2 / -2) + ALL) * weights
            curve = (near @ steps) / near.sum(axis=1, keepdims=True)
            at = np.clip((logs - self.location(scores)[:, None] - low) / step, 0, GRID - 1.001)
            left = at.astype(int)
            share = at - left
            rows = np.arange(len(z))[:, None]
            total = np.zeros((len(z), len(edges)))
            total[:, 1:-1] = (1 - share) * curve[rows, left] + share * curve[rows, left + 1]
            total[:, -1] = 1
            return np.maximum(total[:, 1:] - total[:, :-1], 0)

        return read


def hand_on(
    scores: np.ndarray, residuals: np.ndarray, finished: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(n,): weights after every cut answer has handed its own on to larger residuals of like score (Efron 1967, "redistribution to
    the right"); where none is larger it counts as if it had ended at its cut."""
    weights = weights.astype(float).copy()
    order = np.lexsort(
        (~finished, residuals)
    )  # of equals the cut ones come last: they hand on to larger ones only
    s, w, done = scores[order], weights[order], finished[order]
    for i in np.flatnonzero(~done):
        near = w[i + 1 :] * np.exp(((s[i + 1 :] - s[i]) / NEAR) ** 2 / -2)
        if done[i + 1 :].any() and (total := near.sum()) > 0:
            w[i + 1 :] += w[i] * near / total
            w[i] = 0
    weights[order] = w
    return weights


def kaplan_meier(
    values: np.ndarray, finished: np.ndarray, weights: np.ndarray, never: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values (m,) ascending, share of the weight at or below each): the product-limit estimate (Kaplan and Meier 1958).

    Values that are not `finished` are only known to be larger. `never`: weight of what is larger than all.
    """
    distinct, place = np.unique(values, return_inverse=True)
    ended = np.bincount(place, weights * finished, minlength=len(distinct))
    leaving = np.bincount(place, weights, minlength=len(distinct))
    at_risk = np.cumsum(leaving[::-1])[::-1] + never
    share = 1 - np.cumprod(1 - ended / at_risk)
    return distinct[ended > 0], share[ended > 0]


def fit_temperature(logits: np.ndarray, loss) -> float:
    """The temperature, of 61 between 1/4 and 4, at which `loss(logits / t)` is lowest; 1 wins ties.

    Args:
        logits: (N, K) of prompts that the model has not seen.
        loss: (N, K) logits -> float.
    """
    candidates = sorted(np.geomspace(0.25, 4, 61), key=lambda t: abs(np.log(t)))
    return float(min(candidates, key=lambda t: loss(logits / t)))
