"""The module that --task grpo and --task ppo train: networks, and an algorithm's loss."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from finetune.loss import nll_sum, ragged_part
from finetune.reinforcement.experience import Experience
from finetune.reinforcement.networks import PolicyNetwork

PRETRAIN = "pretrain_"  # before the names of a batch of --pretrain_path


class Algorithm(Protocol):
    """What is learnt from a rollout, and how; a frozen dataclass of its knobs.

    Attributes:
        columns: of a batch, by token, beside "old" and "weights".
        has_critic: it needs values.
    """

    columns: ClassVar[tuple[str, ...]]
    has_critic: ClassVar[bool]

    def add_advantages(self, experience: Experience) -> None:
        """Add the columns that are computed of all samples."""

    def weight(self, tokens: int) -> float:
        """The weight of each token's loss in an answer of so many."""

    def count(self, weights: Tensor, samples: float) -> float:
        """What a batch's loss is divided by; `samples` of it are no empty places."""

    def policy_losses(self, log_probs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(N,) of the log-probabilities (N,) of a batch's tokens."""

    def value_losses(self, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """(N,) of the critic's values (N,), with their weight in the loss."""


class RolloutLoss(nn.Module):
    """The module that DeepSpeed trains: an algorithm's loss, summed over a batch's tokens."""

    def __init__(
        self, network: PolicyNetwork, algorithm: Algorithm, temperature: float, has_reference: bool
    ):
        super().__init__()
        self.network = network
        self.algorithm = algorithm
        self.temperature = temperature
        self.has_reference = has_reference

    def forward(self, scale: float = 1.0, *, output: str = "loss", **batch: Any) -> Tensor:
        """`scale` times the loss, or where `output` is "statistics", those.

        Both go through the module's call, at whose ends ZeRO-3 gives its gathered weights back.
        """
        if output == "statistics":
            return self.statistics(batch)
        log_probs = self.network.log_probs(batch, self.temperature)
        losses = self.algorithm.policy_losses(log_probs, batch)
        if self.network.critic is not None:
            values = self.network.values(batch)
            losses = losses + self.algorithm.value_losses(values, batch)
        loss = scale * (losses * batch["weights"]).sum()
        pretrain_batch = {}
        for name, value in batch.items():
            if name.startswith(PRETRAIN):
                pretrain_batch[name.removeprefix(PRETRAIN)] = value
        if not pretrain_batch:
            return loss
        pretrain_scale = scale * pretrain_batch["scale"]
        rows = ragged_part(pretrain_batch)
        return loss + nll_sum(self.network.model, scale=pretrain_scale, **rows)

    @property
    def statistics_names(self) -> list[str]:
        """The columns of `statistics`."""
        names = ["old"]
        if self.has_reference:
            names.append("reference")
        if self.network.critic is not None:
            names.append("values")
        return names

    @torch.no_grad()
    def statistics(self, batch: Mapping[str, Any]) -> Tensor:
        """(columns, N) fp32 of a batch's tokens by the models as they are."""
        rows = [self.network.log_probs(batch, self.temperature)]
        if self.has_reference:
            rows.append(self.network.reference_log_probs(batch, self.temperature))
        if self.network.critic is not None:
            rows.append(self.network.values(batch))
        return torch.stack(rows)


def clipped_losses(
    log_probs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """(N,) -min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old. arXiv 1707.06347 eq. 7;
    another bound above: arXiv 2503.14476 eq. 10.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)
