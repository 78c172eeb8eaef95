"""The prediction for one prompt: a distribution of its answer's length. numpy only.

Lengths are tokens of the served model, without its end token.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class LengthPrediction:
    """The distribution of one answer's length.

    Attributes:
        probabilities: (K,), sums to 1; mass k is spread evenly over the lengths from edges[k] to
            edges[k + 1].
        edges: (K + 1,) tokens, ascending, edges[0] = 0, edges[K] the longest possible answer.
        rank_score: the head's estimate of the expected log length; orders requests by length,
            higher is longer.
    """

    probabilities: np.ndarray
    edges: np.ndarray
    rank_score: float

    @cached_property
    def cumulative(self) -> np.ndarray:
        """(K + 1,): probability of an answer no longer than each edge."""
        total = np.concatenate([[0.0], np.cumsum(self.probabilities)])
        return total / total[-1]

    @cached_property
    def expected_tokens(self) -> float:
        """The mean of the distribution."""
        return float(self.probabilities @ (self.edges[:-1] + self.edges[1:])) / 2

    @cached_property
    def median_tokens(self) -> float:
        return self.quantile(0.5)

    @cached_property
    def q90_tokens(self) -> float:
        """Tokens that nine answers of ten stay within."""
        return self.quantile(0.9)

    def quantile(self, q: float) -> float:
        """Tokens that the answer stays within with probability q; 0.9: nine answers of ten.

        Raises:
            ValueError: q outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is wanted between 0 and 1; got {q}")
        total = self.cumulative
        k = min(max(int(total.searchsorted(q)), 1), len(total) - 1)
        # Rounding at the top must not select a bin without mass beyond all others.
        while k > 1 and total[k - 1] >= total[k]:
            k -= 1
        mass = total[k] - total[k - 1]
        share = min((q - total[k - 1]) / mass, 1.0) if mass > 0 else 0.0
        return float(self.edges[k - 1] + share * (self.edges[k] - self.edges[k - 1]))

    def probability_within(self, tokens: float) -> float:
        """Probability that the answer has at most `tokens` tokens."""
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

    def __repr__(self) -> str:
        return (
            f"LengthPrediction(expected {self.expected_tokens:.0f}, "
            f"median {self.median_tokens:.0f}, 90 % within {self.quantile(0.9):.0f} tokens)"
        )


def remaining(prediction: LengthPrediction, generated: float) -> LengthPrediction:
    """The distribution of the tokens still to come, after `generated` tokens without an end.

    P(L - g | L > g): mass below g is dropped, the rest is rescaled. For whole tokens
    remaining(remaining(p, a), b) equals remaining(p, a + b), and g plus the expected remainder
    never decreases as g grows. Where an answer has outlived all predicted mass, every length up to
    the limit is equally likely; at the limit, one token remains.

    Raises:
        ValueError: `generated` is negative.
    """
    if generated < 0:
        raise ValueError(f"tokens generated must not be below 0; got {generated}")
    if generated == 0:
        return prediction
    edges, mass = prediction.edges, prediction.probabilities
    if generated >= edges[-1]:
        return from_bins(np.ones(1), np.array([0.0, 1.0]))
    k = int(np.searchsorted(edges, generated, side="right")) - 1  # the bin of `generated`
    left = mass[k:].copy()
    left[0] *= (edges[k + 1] - generated) / (edges[k + 1] - edges[k])
    cut = np.concatenate([[0.0], edges[k + 1 :] - generated])
    total = left.sum()
    if total <= 0:
        left = np.diff(cut)
        total = left.sum()
    return from_bins(left / total, cut)


def from_bins(probabilities: np.ndarray, edges: np.ndarray) -> LengthPrediction:
    """A prediction whose rank score is the expected log length of its bins."""
    return LengthPrediction(probabilities, edges, float(probabilities @ log_middles(edges)))


def log_middles(edges: np.ndarray) -> np.ndarray:
    """(K,): log of each bin's middle, at least one token."""
    return np.log(np.maximum((edges[:-1] + edges[1:]) / 2, 1.0))


def bins_of_lengths(edges: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n,): the bin of each length; lengths beyond the last edge belong to the last bin."""
    return np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, len(edges) - 2)


def make_edges(bins: int, limit: int) -> np.ndarray:
    """(K + 1,): 0, then whole numbers spaced evenly in the logarithm up to `limit` tokens.

    K <= bins: numbers that coincide are given once.

    Raises:
        ValueError: fewer than 2 bins or a limit below 2.
    """
    if bins < 2 or limit < 2:
        raise ValueError(f"wanted at least 2 bins and a limit of 2 tokens; got {bins} and {limit}")
    spaced = np.round(np.geomspace(min(4, limit / 2), limit, bins))
    return np.concatenate([[0.0], np.unique(spaced)])
