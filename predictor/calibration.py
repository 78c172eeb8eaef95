"""From what a model puts out to probabilities that hold: temperature, score to distribution, conformal levels. numpy only."""

from dataclasses import dataclass

import numpy as np

KNOTS = 201  # a calibration map keeps at most so many points
RESIDUALS = 101


@dataclass(frozen=True)
class Conformal:
    """A monotone map of cumulative probabilities, after which quantiles cover what they say.

    Split conformal on the probability integral transform (Chernozhukov, Wuethrich and Zhu 2021, "Distributional conformal
    prediction"): where u_i = F_i(L_i) are what the model gave the lengths of n prompts it has not seen, the k-th smallest u
    becomes k / (n + 1), so quantile(q) covers a new answer with probability at least q, whatever the model.

    Attributes:
        raw, calibrated: (M,) ascending, from 0 to 1.
    """

    raw: tuple[float, ...] = (0.0, 1.0)
    calibrated: tuple[float, ...] = (0.0, 1.0)

    @classmethod
    def fit(cls, levels: np.ndarray, finished: np.ndarray, weights: np.ndarray) -> "Conformal":
        """levels (n,) in [0, 1]; answers that were cut count as longer than that; weights (n,), 1 in all for each prompt."""
        raw, share = kaplan_meier(np.clip(levels, 0, 1), finished, weights, never=1.0)
        if len(raw) > KNOTS:
            chosen = np.unique(np.round(np.linspace(0, len(raw) - 1, KNOTS)).astype(int))
            raw, share = raw[chosen], share[chosen]
        inside = (raw > 0) & (raw < 1)
        raw, share = np.r_[0.0, raw[inside], 1.0], np.r_[0.0, share[inside], 1.0]
        return cls(tuple(raw.tolist()), tuple(share.tolist()))

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, K) bin masses to calibrated ones."""
        total = np.cumsum(probabilities, axis=1)
        total = np.concatenate([np.zeros((len(total), 1)), total / total[:, -1:]], axis=1)
        return np.diff(np.interp(total, self.raw, self.calibrated), axis=1)


def levels_of(probabilities: np.ndarray, edges: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(N,): the cumulative probability that each prediction (N, K) gives to what came, (N,) tokens."""
    total = np.concatenate([np.zeros((len(probabilities), 1)), np.cumsum(probabilities, axis=1)], axis=1)
    total /= total[:, -1:]
    k = np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, len(edges) - 2)
    share = np.clip((tokens - edges[k]) / (edges[k + 1] - edges[k]), 0, 1)
    rows = np.arange(len(tokens))
    return total[rows, k] + share * (total[rows, k + 1] - total[rows, k])


@dataclass(frozen=True)
class ScoreScale:
    """From a score to a distribution: log(1 + L) = intercept + slope * score + residual, the residual's spread changing with the score.

    Attributes:
        spread_at, spread: (M,) location -> standard deviation of the residual there.
        residuals: (R,) evenly spaced quantiles of the standardised residual.
    """

    intercept: float
    slope: float
    spread_at: tuple[float, ...]
    spread: tuple[float, ...]
    residuals: tuple[float, ...]

    @classmethod
    def fit(cls, scores: np.ndarray, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray) -> "ScoreScale":
        """scores, tokens, finished, weights: (n,), of prompts that the scoring model has not seen.

        What was cut is filled up with what is expected beyond the cut (Buckley and James 1979).
        """
        y, w = np.log1p(tokens), weights
        filled = y
        for _ in range(1 if finished.all() else 4):
            mean_s, mean_y = np.average(scores, weights=w), np.average(filled, weights=w)
            variance = np.average((scores - mean_s) ** 2, weights=w)
            slope = float(np.average((scores - mean_s) * (filled - mean_y), weights=w) / variance) if variance > 0 else 0.0
            slope = max(slope, 1e-6)  # a higher score means longer, or all but nothing
            location = mean_y + slope * (scores - mean_s)
            residual = filled - location
            whole = float(np.sqrt(np.average(residual**2, weights=w))) or 1e-3
            parts = np.array_split(np.argsort(location), max(1, min(8, len(y) // 100)))
            # Shrunk to the whole's spread as if 50 prompts more had it.
            spread = [np.sqrt((w[p] @ residual[p] ** 2 + 50 * whole**2) / (w[p].sum() + 50)) for p in parts]
            at = [float(np.average(location[p], weights=w[p])) for p in parts]
            at = np.maximum.accumulate(np.array(at) + 1e-9 * np.arange(len(at)))
            scale = np.interp(location, at, spread)
            values, share = kaplan_meier((y - location) / scale, finished, w)
            steps = np.diff(share, prepend=0.0)
            beyond = np.cumsum((values * steps)[::-1])[::-1], np.cumsum(steps[::-1])[::-1]
            place = np.minimum(np.searchsorted(values, (y - location) / scale, side="right"), len(values) - 1)
            filled = np.where(finished, y, np.maximum(y, location + scale * beyond[0][place] / np.maximum(beyond[1][place], 1e-12)))
        middle = share - steps / 2
        residuals = np.interp((np.arange(RESIDUALS) + 0.5) / RESIDUALS, middle / share[-1], values)
        return cls(float(mean_y - slope * mean_s), slope, tuple(at.tolist()), tuple(map(float, spread)), tuple(residuals.tolist()))

    def location(self, scores: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * scores

    def probabilities(self, scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """(N,) scores -> (N, K) bin masses: the residuals, each blurred by a logistic kernel, at every score's place."""
        location = self.location(scores)
        spread = np.interp(location, self.spread_at, self.spread)
        z = (np.log1p(edges[None, 1:-1]) - location[:, None]) / spread[:, None]
        residuals = np.asarray(self.residuals)
        blur = 0.6 * len(residuals) ** -0.2  # a tenth or two of a standard deviation
        # The kernel-smoothed distribution of the residual is one function: tabulated once, looked up for every edge.
        grid = np.linspace(residuals[0] - 8 * blur, residuals[-1] + 8 * blur, 512)
        table = (1 / (1 + np.exp(-np.clip((grid[:, None] - residuals) / (blur / 1.8), -40, 40)))).mean(axis=1)
        total = np.interp(z, grid, table, left=0.0, right=1.0)
        total = np.concatenate([np.zeros((len(z), 1)), total, np.ones((len(z), 1))], axis=1)
        return np.diff(total, axis=1)


def kaplan_meier(values: np.ndarray, finished: np.ndarray, weights: np.ndarray, never: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values (m,) ascending, share of the weight at or below each): the product-limit estimate (Kaplan and Meier 1958).

    Values that are not `finished` are only known to be larger. `never`: weight of what is larger than all.
    """
    distinct, place = np.unique(values, return_inverse=True)
    ended = np.bincount(place, weights * finished, minlength=len(distinct))
    leaving = np.bincount(place, weights, minlength=len(distinct))
    at_risk = np.cumsum(leaving[::-1])[::-1] + never
    share = 1 - np.cumprod(1 - ended / at_risk)
    if not ended.any():  # all were cut: nothing is known beyond
        ended, share = leaving, np.cumsum(leaving) / (leaving.sum() + never)
    return distinct[ended > 0], share[ended > 0]


def fit_temperature(logits: np.ndarray, loss) -> float:
    """The temperature, of 61 between 1/4 and 4, at which `loss(logits / t)` is lowest; 1 wins ties.

    Args:
        logits: (N, K) of prompts that the model has not seen.
        loss: (N, K) logits -> float.
    """
    candidates = sorted(np.geomspace(0.25, 4, 61), key=lambda t: abs(np.log(t)))
    return float(min(candidates, key=lambda t: loss(logits / t)))
