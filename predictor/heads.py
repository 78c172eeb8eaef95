"""HEADS: what a predictor is asked for (classes, a number, an order), its loss, and how its output becomes a distribution.

A head sees vectors through one linear layer of `width` outputs. Losses are torch's (imported when called), sums over labels; decoding
is numpy's, so that a predictor serves without torch where its backbone does.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import numpy as np

from predictor.calibration import ScoreScale, fit_temperature
from predictor.prediction import class_of, log_middles, make_edges


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, K) -> (N, K), rows sum to 1."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def wide(outputs):
    """A tensor in at least float32: losses of half precision are taken in full, and of float64 as they come, for L-BFGS's sake."""
    return outputs if outputs.dtype.itemsize > 4 else outputs.float()


@dataclass(frozen=True)
class ClassHead:
    """What heads over length classes share: softmax, temperature, a rank score from the classes themselves."""

    length_limit: int

    @property
    def width(self) -> int:
        return len(self.edges) - 1

    def fit(
        self, outputs: np.ndarray, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray
    ) -> dict:
        """Decoding settings from outputs (n, width) for prompts that the model has not seen: the temperature of least log loss."""
        first = class_of(self.edges, tokens)
        beyond = np.arange(self.width)[None] >= first[:, None]  # a cut answer is at least that long
        mask = np.where(finished[:, None], np.arange(self.width)[None] == first[:, None], beyond)

        def loss(logits):
            return -(
                weights * np.log(np.maximum((softmax(logits) * mask).sum(axis=1), 1e-12))
            ).sum()

        return {"temperature": fit_temperature(outputs, loss)}

    def reader(self, settings: dict, edges: np.ndarray):
        """(N, width) outputs -> (probabilities over `edges` (N, K), rank scores (N,))."""

        def read(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            own = softmax(outputs / settings["temperature"])
            return spread(own, self.edges, edges), own @ log_middles(self.edges)

        return read

    def starting_bias(self, tokens: np.ndarray) -> np.ndarray:
        """(width,): the classes' frequencies, so that training begins at the constant's loss."""
        counts = np.bincount(class_of(self.edges, tokens), minlength=self.width) + 0.5
        return np.log(counts / counts.sum())


@dataclass(frozen=True)
class Distribution(ClassHead):
    """Log-spaced classes with soft labels: a length speaks for its neighbours too, the less the further in log length.

    Loss: cross-entropy with the soft label + crps_weight * sum over edges of (F - F_soft)^2, the ranked probability score
    (Epstein 1969), which knows that bins are ordered. A cut answer counts as -log P(L > tokens): censored, as in survival analysis.
    """

    num_bins: int
    label_width: float
    crps_weight: float

    @cached_property
    def edges(self) -> np.ndarray:
        return make_edges(self.num_bins, self.length_limit)

    def loss(self, outputs, tokens, finished, weights, owners):
        """The summed loss: outputs (M, width), tokens, finished, weights (M,) of M labels; owners are for ranking."""
        import torch

        edges = torch.as_tensor(self.edges, dtype=torch.float32, device=outputs.device)
        log_p = wide(outputs).log_softmax(dim=1)
        # The soft label's cumulative distribution: a normal in log length, label_width times as wide as a bin.
        inner = torch.log1p(edges[1:-1])
        sigma = (
            max(self.label_width, 1e-3) * float((inner[-1] - inner[0]) / max(1, len(inner) - 1))
            if len(inner) > 1
            else 1.0
        )
        target = torch.special.ndtr((inner[None] - torch.log1p(tokens.float())[:, None]) / sigma)
        target = torch.cat(
            [torch.zeros_like(target[:, :1]), target, torch.ones_like(target[:, :1])], dim=1
        )
        soft = target.diff(dim=1)
        cross_entropy = -(soft * log_p).sum(dim=1)
        total = log_p.exp().cumsum(dim=1)[:, :-1]
        ordinal = ((total - target[:, 1:-1]) ** 2).sum(dim=1)
        # Of a cut answer: how much of each class lies beyond it, by the soft label; of the last one all.
        beyond = target[:, 1:].clamp_min(1e-6)
        survived = -torch.logsumexp(log_p + beyond.log(), dim=1)
        below = ((edges[None, 1:-1] <= tokens[:, None]) * total**2).sum(dim=1)
        plain, cut = cross_entropy + self.crps_weight * ordinal, survived + self.crps_weight * below
        return (weights * torch.where(finished, plain, cut)).sum()


@dataclass(frozen=True)
class Bucket(ClassHead):
    """Equal classes, as S3 (arXiv 2306.06000: ten up to the limit) and UELLM have them. Loss: cross-entropy."""

    num_buckets: int

    @cached_property
    def edges(self) -> np.ndarray:
        return np.linspace(0, self.length_limit, self.num_buckets + 1)

    def loss(self, outputs, tokens, finished, weights, owners):
        import torch

        edges = torch.as_tensor(self.edges, dtype=torch.float32, device=outputs.device)
        log_p = wide(outputs).log_softmax(dim=1)
        first = (torch.searchsorted(edges, tokens.float(), right=True) - 1).clamp(0, self.width - 1)
        classes = torch.arange(self.width, device=outputs.device)
        mask = torch.where(finished[:, None], classes == first[:, None], classes >= first[:, None])
        return -(weights * log_p.masked_fill(~mask, -1e9).logsumexp(dim=1)).sum()


@dataclass(frozen=True)
class ScoreHead:
    """What heads with one output share: the distribution is the score's place and what the residuals looked like there."""

    length_limit: int
    num_bins: int
    width: ClassVar[int] = 1

    @cached_property
    def edges(self) -> np.ndarray:
        return make_edges(self.num_bins, self.length_limit)

    def fit(self, outputs, tokens, finished, weights) -> dict:
        """As ClassHead's: where scores lie in log length, and how far off they are."""
        scale = ScoreScale.fit(outputs[:, 0], tokens, finished, weights)
        return {f.name: getattr(scale, f.name) for f in fields(scale)}

    def reader(self, settings: dict, edges: np.ndarray):
        """As ClassHead's."""
        scale = ScoreScale(**settings)
        read = scale.reader(edges)
        return lambda outputs: (read(outputs[:, 0]), scale.location(outputs[:, 0]))


@dataclass(frozen=True)
class Regression(ScoreHead):
    """Log length. Loss: squared error of log(1 + L), nothing where an answer was cut and the guess lies beyond."""

    def loss(self, outputs, tokens, finished, weights, owners):
        import torch

        error = wide(outputs[:, 0]) - torch.log1p(tokens.float())
        return (weights * torch.where(finished, error, error.clamp_max(0)) ** 2).sum()

    def starting_bias(self, tokens):
        return np.array([np.log1p(tokens).mean()])


@dataclass(frozen=True)
class Ranking(ScoreHead):
    """Order only. Loss: "pairwise", -log sigmoid(s_i - s_j) over all pairs of a pass with L_i > L_j (RankNet, Burges et al. 2005),
    or "listmle", the likelihood of the pass's order (Xia et al. 2008), as vllm-ltr trains. Labels of one served model are compared
    with one another only. A cut answer is known to be longer only than those that ended before its cap.
    """

    ranking_loss: str

    def loss(self, outputs, tokens, finished, weights, owners):
        """owners: (M,) number of the served model of each label."""
        import torch

        scores = wide(outputs[:, 0])
        longer = (
            (tokens[:, None] > tokens[None]) & (owners[:, None] == owners[None]) & finished[None]
        )
        if self.ranking_loss == "pairwise":
            loss = -torch.nn.functional.logsigmoid(scores[:, None] - scores[None]) * longer
            return (weights * loss.sum(dim=1) / longer.sum(dim=1).clamp_min(1)).sum()
        # The longest first: each place's score against all that come after it.
        after = longer | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        return (
            weights
            * (scores.expand(len(scores), -1).masked_fill(~after, -1e9).logsumexp(dim=1) - scores)
        ).sum()

    def starting_bias(self, tokens):
        return np.zeros(1)


def spread(probabilities: np.ndarray, own: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(N, k) masses over `own` edges -> (N, K) masses over `edges`, mass lying evenly inside a class."""
    if len(own) == len(edges) and np.array_equal(own, edges):
        return probabilities
    total = np.concatenate(
        [np.zeros((len(probabilities), 1)), np.cumsum(probabilities, axis=1)], axis=1
    )
    k = class_of(own, edges)
    share = np.clip((edges - own[k]) / (own[k + 1] - own[k]), 0, 1)
    return np.diff(total[:, k] + share * (total[:, k + 1] - total[:, k]), axis=1)


def make_head(config):
    """The head of `config.head`, its knobs taken from the fields of the same names."""
    head = HEADS[config.head]
    return head(**{f.name: getattr(config, f.name) for f in fields(head)})


HEADS = {
    "distribution": Distribution,
    "bucket": Bucket,
    "regression": Regression,
    "ranking": Ranking,
}
