"""What a predictor says of one prompt: how long its answer will be, as a distribution. numpy only.

Lengths are tokens of the served model, without its end token.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class LengthPrediction:
    """The distribution of one answer's length.

    Attributes:
        probabilities: (K,), sums to 1; mass k is spread evenly over the lengths from edges[k] to edges[k + 1].
        edges: (K + 1,) tokens, ascending, edges[0] = 0, edges[K] the longest answer there can be.
        rank_score: the expected log of the length, by the head's own lights; orders requests by length, longer is higher.
    """

    probabilities: np.ndarray
    edges: np.ndarray
    rank_score: float

    @cached_property
    def cumulative(self) -> np.ndarray:
        """(K + 1,): probability of an answer no longer than each edge."""
        total = np.concatenate([[0.0], np.cumsum(self.probabilities)])
        return total / total[-1]

    @property
    def expected_tokens(self) -> float:
        """The mean: how much work there is."""
        return float(self.probabilities @ (self.edges[:-1] + self.edges[1:])) / 2

    @property
    def median_tokens(self) -> float:
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """Tokens that the answer stays within with probability q: at 0.9, nine answers of ten.

        Raises:
            ValueError: q outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is wanted between 0 and 1; got {q}")
        total = self.cumulative
        k = min(max(int(np.searchsorted(total, q)), 1), len(total) - 1)
        while (
            k > 1 and total[k - 1] >= total[k]
        ):  # rounding at the very top must not land beyond all mass
            k -= 1
        mass = total[k] - total[k - 1]
        share = min((q - total[k - 1]) / mass, 1.0) if mass > 0 else 0.0
        return float(self.edges[k - 1] + share * (self.edges[k] - self.edges[k - 1]))

    def probability_within(self, tokens: float) -> float:
        """Probability that the answer has at most so many tokens."""
        return float(np.interp(tokens, self.edges, self.cumulative))

    def to_dict(self) -> dict:
        return {
            "probabilities": self.probabilities.tolist(),
            "edges": self.edges.tolist(),
            "rank_score": self.rank_score,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "LengthPrediction":
        return cls(
            np.asarray(values["probabilities"], float),
            np.asarray(values["edges"], float),
            float(values["rank_score"]),
        )

    def __repr__(self):
        return f"LengthPrediction(expected {self.expected_tokens:.0f}, median {self.median_tokens:.0f}, 90 % within {self.quantile(0.9):.0f} tokens)"


def remaining(prediction: LengthPrediction, generated: float) -> LengthPrediction:
    """The distribution of what is left of an answer of which `generated` tokens are there and which has not ended.

    P(L - g | L > g): what the answer has outlived goes, the rest is scaled up. For whole tokens remaining(remaining(p, a), b) is
    remaining(p, a + b), and g plus what is left never gets shorter as g grows. Where an answer outlives all that was thought possible, every
    length up to the limit is as likely; at the limit, one token is left.

    Raises:
        ValueError: a negative count.
    """
    if generated < 0:
        raise ValueError(f"tokens generated must not be below 0; got {generated}")
    if generated == 0:
        return prediction
    edges, mass = prediction.edges, prediction.probabilities
    if generated >= edges[-1]:
        return from_bins(np.ones(1), np.array([0.0, 1.0]))
    k = int(np.searchsorted(edges, generated, side="right")) - 1  # generated lies in bin k
    left = mass[k:].copy()
    left[0] *= (edges[k + 1] - generated) / (edges[k + 1] - edges[k])
    cut = np.concatenate([[0.0], edges[k + 1 :] - generated])
    if (total := left.sum()) <= 0:
        left = np.diff(cut)
        total = left.sum()
    return from_bins(left / total, cut)


def from_bins(probabilities: np.ndarray, edges: np.ndarray) -> LengthPrediction:
    """A prediction that ranks by the expected log length of its own bins."""
    return LengthPrediction(probabilities, edges, float(probabilities @ log_middles(edges)))


def log_middles(edges: np.ndarray) -> np.ndarray:
    """(K,): log of each bin's middle, at least one token."""
    return np.log(np.maximum((edges[:-1] + edges[1:]) / 2, 1.0))


def class_of(edges: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n,): the class that each length falls into; what lies beyond the last edge falls into the last."""
    return np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, len(edges) - 2)


def make_edges(bins: int, limit: int) -> np.ndarray:
    """(K + 1,): 0, then whole numbers spaced evenly in the logarithm up to `limit` tokens; K <= bins where those would coincide.

    Raises:
        ValueError: fewer than 2 bins or a limit below 2.
    """
    if bins < 2 or limit < 2:
        raise ValueError(f"wanted at least 2 bins and a limit of 2 tokens; got {bins} and {limit}")
    return np.concatenate(
        [[0.0], np.unique(np.round(np.geomspace(min(4, limit / 2), limit, bins)))]
    )
