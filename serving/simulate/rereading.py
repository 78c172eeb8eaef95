"""Predictions as answers grow, made up at a stated quality: what re-reading would be worth.

For policies under simulated load, where no model runs whose hidden states could be read.
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from predictor.prediction import LengthPrediction, from_bins, make_edges


@dataclass(eq=False)
class SyntheticRereads:
    """Posteriors whose order agrees with the true tokens left at a wanted Kendall's tau.

    Of answers with more than g tokens, x = ln(tokens left) is taken as normal, mean m and deviation
    s those of the workload. What is read is x + e with normal e, correlated with x by
    r = sin(pi tau / 2) (Greiner's relation), and the posterior is the normal one given it:
    mean m + r^2 (read - m), deviation s sqrt(1 - r^2). e / s is one draw an answer, as the same
    states mislead a predictor again.

    Attributes:
        output_tokens: (n,) true lengths by request id.
        limit: the longest answer.
        tau: Kendall's, of what is read with the tokens left.
        every, seconds: as of engine.Rereads.
    """

    output_tokens: np.ndarray
    limit: int = 2048
    tau: float = 0.5
    every: int = 64
    seconds: float = 1e-4
    seed: int = 0
    noise: np.ndarray = field(init=False)
    moments: dict[int, tuple[float, float]] = field(default_factory=dict)
    cache: dict[tuple[int, int], LengthPrediction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Not the stream from which a workload of this seed was drawn.
        rng = np.random.default_rng([self.seed, 1])
        self.noise = rng.standard_normal(len(self.output_tokens))

    def __call__(self, request_id: int, generated: int) -> LengthPrediction | None:
        mean, deviation = self.moments_at(generated)
        correlation = math.sin(math.pi * self.tau / 2)
        left = math.log(max(self.output_tokens[request_id] - generated, 1))
        error = deviation * math.sqrt(1 / correlation**2 - 1)
        read = left + error * self.noise[request_id]
        centre = mean + correlation**2 * (read - mean)
        # Rounded, so that answers share predictions.
        place = round(centre / 0.05)
        if (generated, place) not in self.cache:
            spread = deviation * math.sqrt(1 - correlation**2)
            self.cache[generated, place] = self.posterior(generated, place * 0.05, spread)
        return self.cache[generated, place]

    def moments_at(self, generated: int) -> tuple[float, float]:
        """(mean, deviation) of ln(tokens left) of the answers with more than `generated` tokens."""
        if generated not in self.moments:
            left = self.output_tokens[self.output_tokens > generated] - generated
            logs = np.log(np.maximum(left, 1)) if len(left) else np.zeros(1)
            self.moments[generated] = (float(logs.mean()), max(float(logs.std()), 0.05))
        return self.moments[generated]

    def posterior(self, generated: int, centre: float, spread: float) -> LengthPrediction:
        """Of the whole length: `generated` and a log-normal number of tokens."""
        edges = make_edges(30, max(self.limit - generated, 2))
        normal = NormalDist(centre, spread)
        below = [0.0]
        for edge in np.log(edges[1:-1]):
            below.append(normal.cdf(float(edge)))
        mass = np.diff([*below, 1.0]) + 1e-9
        whole = np.concatenate([[0.0], generated + edges]) if generated else edges
        mass = np.concatenate([[0.0], mass]) if generated else mass
        return from_bins(mass / mass.sum(), whole)
