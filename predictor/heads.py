"""HEADS: what a predictor estimates (classes, a number, an order), its loss and its decoding.

A head reads a backbone's vectors through one linear layer of `width` outputs. Losses are torch
(imported when called), sums over labels; decoding is numpy, so that a predictor serves without
torch where its backbone does.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from predictor.calibration import ScoreScale, fit_temperature
from predictor.prediction import bins_of_lengths, log_middles, make_edges

if TYPE_CHECKING:
    from torch import Tensor

MOST_COMPARED, LIST_LABELS = 2048, 256  # labels; see Ranking

# Outputs (N, width) -> (probabilities (N, K), rank scores (N,)).
Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Head(Protocol):
    """An entry of HEADS."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def length_limit(self) -> int:
        """The longest possible answer in tokens."""

    @property
    def width(self) -> int:
        """Outputs for each prompt."""

    @property
    def edges(self) -> np.ndarray:
        """(K + 1,) tokens, ascending from 0 to length_limit: the classes of its distributions."""

    def loss(
        self,
        outputs: "Tensor",
        tokens: "Tensor",
        finished: "Tensor",
        weights: "Tensor",
        owners: "Tensor",
    ) -> "Tensor":
        """The loss summed over M labels.

        outputs: (M, width); tokens, finished, weights: (M,); owners: (M,) number of each label's
        served model.
        """

    def starting_bias(self, tokens: np.ndarray) -> np.ndarray:
        """(width,): the outputs to start training from, given the lengths of the training rows."""

    def fit(
        self, outputs: np.ndarray, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray
    ) -> dict:
        """Decoding settings from outputs (n, width) and n labels of prompts unseen by the model."""

    def reader(self, settings: dict, edges: np.ndarray) -> Reader:
        """A function from outputs to probabilities over `edges` and rank scores."""


class HeadConfig(Protocol):
    """Flags that make a head: `head` and the fields of its class."""

    @property
    def head(self) -> str:
        """A key of HEADS."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, K) -> (N, K), rows sum to 1."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def at_least_float32(outputs: "Tensor") -> "Tensor":
    """A tensor in float32 or wider: half precision is widened, float64 stays (for L-BFGS)."""
    return outputs if outputs.dtype.itemsize > 4 else outputs.float()


@dataclass(frozen=True)
class ClassHead:
    """What heads over length classes share: softmax, temperature, rank score from the classes."""

    length_limit: int

    @property
    def edges(self) -> np.ndarray:
        """(width + 1,) tokens, ascending from 0 to length_limit."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        return len(self.edges) - 1

    def fit(
        self, outputs: np.ndarray, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray
    ) -> dict:
        """{"temperature"}: that of least log loss; see Head.fit."""
        first = bins_of_lengths(self.edges, tokens)
        classes = np.arange(self.width)[None]
        beyond = classes >= first[:, None]  # a cut answer is at least that long
        mask = np.where(finished[:, None], classes == first[:, None], beyond)

        def loss(logits: np.ndarray) -> float:
            likelihood = (softmax(logits) * mask).sum(axis=1)
            return -(weights * np.log(np.maximum(likelihood, 1e-12))).sum()

        return {"temperature": fit_temperature(outputs, loss)}

    def reader(self, settings: dict, edges: np.ndarray) -> Reader:
        """(N, width) outputs -> (probabilities over `edges` (N, K), rank scores (N,))."""

        def read(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            classes = softmax(outputs / settings["temperature"])
            return rebin(classes, self.edges, edges), classes @ log_middles(self.edges)

        return read

    def starting_bias(self, tokens: np.ndarray) -> np.ndarray:
        """(width,): the classes' log frequencies, so that training begins at a constant's loss."""
        counts = np.bincount(bins_of_lengths(self.edges, tokens), minlength=self.width) + 0.5
        return np.log(counts / counts.sum())


@dataclass(frozen=True)
class Distribution(ClassHead):
    """Log-spaced classes with soft labels: a length also counts, in part, for nearby classes.

    Loss: cross-entropy with the soft label + crps_weight * sum over edges of (F - F_soft)^2, the
    ranked probability score (Epstein 1969), which uses the order of the bins. A cut answer is
    censored, as in survival analysis: it counts as -log P(L > tokens).
    """

    num_bins: int
    label_width: float
    crps_weight: float

    @cached_property
    def edges(self) -> np.ndarray:
        return make_edges(self.num_bins, self.length_limit)

    def loss(
        self,
        outputs: "Tensor",
        tokens: "Tensor",
        finished: "Tensor",
        weights: "Tensor",
        owners: "Tensor",
    ) -> "Tensor":
        """The loss summed over M labels; see Head.loss."""
        import torch

        edges = torch.as_tensor(self.edges, dtype=torch.float32, device=outputs.device)
        log_p = at_least_float32(outputs).log_softmax(dim=1)
        # The soft label's cumulative distribution: a normal in log length, label_width bins wide.
        inner = torch.log1p(edges[1:-1])
        sigma = 1.0
        if len(inner) > 1:
            bin_width = float((inner[-1] - inner[0]) / max(1, len(inner) - 1))
            sigma = max(self.label_width, 1e-3) * bin_width
        target = torch.special.ndtr((inner[None] - torch.log1p(tokens.float())[:, None]) / sigma)
        zeros, ones = torch.zeros_like(target[:, :1]), torch.ones_like(target[:, :1])
        target = torch.cat([zeros, target, ones], dim=1)
        soft = target.diff(dim=1)
        cross_entropy = -(soft * log_p).sum(dim=1)
        total = log_p.exp().cumsum(dim=1)[:, :-1]
        ordinal = ((total - target[:, 1:-1]) ** 2).sum(dim=1)
        # Of a cut answer: the soft label's share of each class beyond the cut; all of the last.
        beyond = target[:, 1:].clamp_min(1e-6)
        survived = -torch.logsumexp(log_p + beyond.log(), dim=1)
        below = ((edges[None, 1:-1] <= tokens[:, None]) * total**2).sum(dim=1)
        plain = cross_entropy + self.crps_weight * ordinal
        cut = survived + self.crps_weight * below
        return (weights * torch.where(finished, plain, cut)).sum()


@dataclass(frozen=True)
class Bucket(ClassHead):
    """Equal classes, as in S3 (arXiv 2306.06000: ten up to the limit) and UELLM.

    Loss: cross-entropy.
    """

    num_buckets: int

    @cached_property
    def edges(self) -> np.ndarray:
        return np.linspace(0, self.length_limit, self.num_buckets + 1)

    def loss(
        self,
        outputs: "Tensor",
        tokens: "Tensor",
        finished: "Tensor",
        weights: "Tensor",
        owners: "Tensor",
    ) -> "Tensor":
        """The loss summed over M labels; see Head.loss."""
        import torch

        edges = torch.as_tensor(self.edges, dtype=torch.float32, device=outputs.device)
        log_p = at_least_float32(outputs).log_softmax(dim=1)
        first = (torch.searchsorted(edges, tokens.float(), right=True) - 1).clamp(0, self.width - 1)
        classes = torch.arange(self.width, device=outputs.device)
        mask = torch.where(finished[:, None], classes == first[:, None], classes >= first[:, None])
        return -(weights * log_p.masked_fill(~mask, -1e9).logsumexp(dim=1)).sum()


@dataclass(frozen=True)
class ScoreHead:
    """What heads with one output share: the distribution is the score's location and a residual.

    The residual is distributed as those of labels with similar scores (ScoreScale).
    """

    length_limit: int
    num_bins: int
    width: ClassVar[int] = 1

    @cached_property
    def edges(self) -> np.ndarray:
        return make_edges(self.num_bins, self.length_limit)

    def fit(
        self, outputs: np.ndarray, tokens: np.ndarray, finished: np.ndarray, weights: np.ndarray
    ) -> dict:
        """The fields of a ScoreScale: location of scores in log length, and residuals."""
        scale = ScoreScale.fit(outputs[:, 0], tokens, finished, weights)
        return {f.name: getattr(scale, f.name) for f in fields(scale)}

    def reader(self, settings: dict, edges: np.ndarray) -> Reader:
        """(N, 1) outputs -> (probabilities over `edges` (N, K), rank scores (N,))."""
        scale = ScoreScale(**settings)
        read = scale.reader(edges)
        return lambda outputs: (read(outputs[:, 0]), scale.location(outputs[:, 0]))


@dataclass(frozen=True)
class Regression(ScoreHead):
    """Log length.

    Loss: squared error of log(1 + L); 0 for a cut answer estimated beyond its cut.
    """

    def loss(
        self,
        outputs: "Tensor",
        tokens: "Tensor",
        finished: "Tensor",
        weights: "Tensor",
        owners: "Tensor",
    ) -> "Tensor":
        """The loss summed over M labels; see Head.loss."""
        import torch

        error = at_least_float32(outputs[:, 0]) - torch.log1p(tokens.float())
        return (weights * torch.where(finished, error, error.clamp_max(0)) ** 2).sum()

    def starting_bias(self, tokens: np.ndarray) -> np.ndarray:
        """(1,): the mean log length."""
        return np.array([np.log1p(tokens).mean()])


@dataclass(frozen=True)
class Ranking(ScoreHead):
    """Order only.

    Loss "pairwise": -log sigmoid(s_i - s_j) over all pairs of a forward pass with L_i > L_j
    (RankNet, Burges et al. 2005). Loss "listmle": the negative log likelihood of the pass's order
    (Xia et al. 2008), as vllm-ltr trains. Only labels of the same served model are compared. A cut
    answer is known to be longer only than those that ended before its cut. Of more than
    MOST_COMPARED labels, as a frozen backbone's head has them at once, lists of LIST_LABELS are
    compared, each taken from all of them: memory grows with the square of a list.
    """

    ranking_loss: str

    def loss(
        self,
        outputs: "Tensor",
        tokens: "Tensor",
        finished: "Tensor",
        weights: "Tensor",
        owners: "Tensor",
    ) -> "Tensor":
        """The loss summed over M labels; see Head.loss."""
        if len(tokens) <= MOST_COMPARED:
            return self.list_loss(outputs, tokens, finished, weights, owners)
        lists = -(-len(tokens) // LIST_LABELS)
        total = outputs.new_zeros(())
        for first in range(lists):
            part = slice(first, None, lists)
            total = total + self.list_loss(
                outputs[part], tokens[part], finished[part], weights[part], owners[part]
            )
        return total

    def list_loss(
        self,
        outputs: "Tensor",
        tokens: "Tensor",
        finished: "Tensor",
        weights: "Tensor",
        owners: "Tensor",
    ) -> "Tensor":
        """The loss of one list, in which every label is compared with every other."""
        import torch

        scores = at_least_float32(outputs[:, 0])
        same_model = owners[:, None] == owners[None]
        longer = (tokens[:, None] > tokens[None]) & same_model & finished[None]
        if self.ranking_loss == "pairwise":
            loss = -torch.nn.functional.logsigmoid(scores[:, None] - scores[None]) * longer
            return (weights * loss.sum(dim=1) / longer.sum(dim=1).clamp_min(1)).sum()
        # The longest first: each score against all that come after it in the order.
        after = longer | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        rivals = scores.expand(len(scores), -1).masked_fill(~after, -1e9).logsumexp(dim=1)
        return (weights * (rivals - scores)).sum()

    def starting_bias(self, tokens: np.ndarray) -> np.ndarray:
        """(1,): zero."""
        return np.zeros(1)


def rebin(probabilities: np.ndarray, source_edges: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(N, k) masses over `source_edges` -> (N, K) over `edges`; mass is even inside a class."""
    if len(source_edges) == len(edges) and np.array_equal(source_edges, edges):
        return probabilities
    zeros = np.zeros((len(probabilities), 1))
    total = np.concatenate([zeros, np.cumsum(probabilities, axis=1)], axis=1)
    k = bins_of_lengths(source_edges, edges)
    share = np.clip((edges - source_edges[k]) / (source_edges[k + 1] - source_edges[k]), 0, 1)
    return np.diff(total[:, k] + share * (total[:, k + 1] - total[:, k]), axis=1)


def make_head(config: HeadConfig) -> Head:
    """The head of `config.head`, with its fields from the flags of the same names."""
    head = HEADS[config.head]
    return head(**{f.name: getattr(config, f.name) for f in fields(head)})


HEADS = {
    "distribution": Distribution,
    "bucket": Bucket,
    "regression": Regression,
    "ranking": Ranking,
}
