"""LOSSES: what --task dpo minimises, one formula each.

In the formulas x is a question, y an answer, w the better one of a pair and l the worse; pi is the
model, r the reference; h = log(pi(w|x) / r(w|x)) - log(pi(l|x) / r(l|x)).
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """Pairs of answers: each (B, 2), the better one first; labelled answers: (B, 1).

    Attributes:
        policy: log pi(y|x), summed over the answer's tokens.
        reference: log r(y|x); zeros where the loss has no reference.
        tokens: the number of tokens of each answer.
        liked: (B,) 1 for an answer that is liked, 0 for another (labelled answers).
        drift: scalar, the estimate of KL(pi || r) (kto).
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    liked: Tensor | None = None
    drift: Tensor | None = None

    @property
    def difference(self) -> Tensor:
        """(B,) h of pairs."""
        ratio = self.policy - self.reference
        return ratio[:, 0] - ratio[:, 1]


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs that needs a reference."""

    beta: float
    has_reference: ClassVar[bool] = True
    labelled: ClassVar[bool] = False

    def losses(self, answers: Answers) -> Tensor:
        """(B,) the loss of each group."""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> Tensor:
        """(B, 2) beta log(pi / r), without a gradient (arXiv 2305.18290, section 4)."""
        return self.beta * (answers.policy - answers.reference).detach()


@dataclass(frozen=True)
class Sigmoid(PairLoss):
    """-log sigmoid(beta h). DPO, arXiv 2305.18290 eq. 7."""

    def losses(self, answers: Answers) -> Tensor:
        return -F.logsigmoid(self.beta * answers.difference)


@dataclass(frozen=True)
class Ipo(PairLoss):
    """(h - 1 / (2 beta))^2, h of mean log-probabilities. IPO, arXiv 2310.12036 eq. 17.

    The mean over an answer's tokens, not their sum, as the authors' code in TRL has it: the target
    1 / (2 beta) is then the same for short and long answers.
    """

    def losses(self, answers: Answers) -> Tensor:
        ratio = (answers.policy - answers.reference) / answers.tokens
        return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge(PairLoss):
    """max(0, 1 - beta h). SLiC-HF's calibration, arXiv 2305.10425 eq. 1, normalised by r as in
    arXiv 2309.06657 section 3.2.
    """

    def losses(self, answers: Answers) -> Tensor:
        return torch.relu(1 - self.beta * answers.difference)


@dataclass(frozen=True)
class Kto(PairLoss):
    """w_d (1 - sigmoid(beta (log(pi / r) - z))) of a liked answer, w_u (1 - sigmoid(beta (z -
    log(pi / r)))) of another. KTO, arXiv 2402.01306 eq. 7.

    z is `drift`, max(0, mean of log(pi / r)) over answers to other questions, without a gradient.
    """

    desirable_weight: float
    undesirable_weight: float
    labelled: ClassVar[bool] = True

    def losses(self, answers: Answers) -> Tensor:
        if answers.liked is None or answers.drift is None:
            raise ValueError("labelled answers have labels and a drift")
        ratio = (answers.policy - answers.reference)[:, 0] - answers.drift
        sign = 2 * answers.liked - 1
        weight = torch.where(answers.liked > 0, self.desirable_weight, self.undesirable_weight)
        return weight * (1 - torch.sigmoid(self.beta * sign * ratio))


@dataclass(frozen=True)
class Orpo(PairLoss):
    """-log p(w) - beta log sigmoid(log odds(w) - log odds(l)), odds(p) = p / (1 - p), p the
    geometric mean of an answer's token probabilities. ORPO, arXiv 2403.07691 eq. 3, 4, 6, 7.
    """

    has_reference: ClassVar[bool] = False

    def losses(self, answers: Answers) -> Tensor:
        mean = answers.policy / answers.tokens
        odds = mean - torch.log1p(-torch.exp(mean).clamp(max=1 - 1e-7))
        return -mean[:, 0] - self.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])

    def rewards(self, answers: Answers) -> Tensor:
        """(B, 2) beta times the mean log-probability, without a gradient."""
        return self.beta * (answers.policy / answers.tokens).detach()


def make_loss(config: Any) -> PairLoss:
    """The loss of --loss_type, with the configuration's fields of the same names."""
    loss = LOSSES[config.loss_type]
    return loss(**{f.name: getattr(config, f.name) for f in fields(loss)})


LOSSES: dict[str, type[PairLoss]] = {
    "sigmoid": Sigmoid,
    "ipo": Ipo,
    "hinge": Hinge,
    "kto": Kto,
    "orpo": Orpo,
}
