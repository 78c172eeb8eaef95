"""train.py --task grpo: Group Relative Policy Optimization, arXiv 2402.03300.

For each question q, G answers o_1 .. o_G are sampled from pi_old. The advantage of all tokens of
answer i is that of its reward r_i among the group's (section 4.1.2):

    A_i = (r_i - mean(r_1 .. r_G)) / (std(r_1 .. r_G) + 1e-4)

The loss is eq. 3 with the estimator of KL of eq. 4, rho = pi / pi_old and u = log(ref / pi):

    1/G sum_i 1/|o_i| sum_t ( -min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) + beta (e^u - u - 1) )

With `--unbiased_kl` (arXiv 2512.02556, section 3.1) the last term is multiplied by rho: its
gradient is then that of KL(pi || ref), also for answers of an older policy.

Variants: `--loss_norm token` and `--clip_range_high` are DAPO's (arXiv 2503.14476 eq. 8 and 10);
`--loss_norm constant` with `--advantage_scale none` is Dr. GRPO (arXiv 2503.20783 section 3.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from finetune.reinforcement.config import GrpoConfig
from finetune.reinforcement.experience import Experience, Sample, rewards_of
from finetune.reinforcement.policy_loss import clipped_losses
from finetune.reinforcement.rollout import MakeRollouts
from finetune.reinforcement.task import RolloutTask

LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class Grpo:
    """The advantages and the loss; the fields are the flags of the same names."""

    kl_coef: float
    unbiased_kl: bool
    clip_range: float
    clip_range_high: float | None
    advantage_scale: str
    loss_norm: str
    max_new_tokens: int
    columns: ClassVar[tuple[str, ...]] = ("advantages", "reference")
    has_critic: ClassVar[bool] = False

    def add_advantages(self, experience: Experience) -> None:
        """The same advantage for all tokens of an answer."""
        batch_deviation = deviation(list(experience.samples()))
        for samples in experience.groups.values():
            mean = rewards_of(samples).mean()
            scales = {"group": deviation(samples), "batch": batch_deviation, "none": 1.0}
            for sample in samples:
                advantage = (sample.reward - mean) / scales[self.advantage_scale]
                size = len(sample.tokens)
                sample.columns["advantages"] = np.full(size, advantage, np.float32)

    def weight(self, tokens: int) -> float:
        """As in Algorithm."""
        if self.loss_norm == "sequence":
            return 1 / tokens
        if self.loss_norm == "token":
            return 1.0
        return 1 / self.max_new_tokens

    def count(self, weights: Tensor, samples: float) -> float:
        """Tokens, or answers."""
        if self.loss_norm == "token":
            return float(weights.sum())
        return samples

    def policy_losses(self, log_probs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """As in Algorithm."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        losses = clipped_losses(log_probs, batch["old"], batch["advantages"], self.clip_range, high)
        if not self.kl_coef:
            return losses
        drift = batch["reference"] - log_probs
        kl = torch.exp(drift) - drift - 1
        if self.unbiased_kl:
            kl = kl * torch.exp(log_probs - batch["old"])
        return losses + self.kl_coef * kl

    def value_losses(self, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """None: GRPO has no critic."""
        raise NotImplementedError


def deviation(samples: list[Sample]) -> float:
    """The sample deviation of rewards, never 0."""
    return float(np.std(rewards_of(samples), ddof=1)) + LEAST_DEVIATION


class GrpoTraining(RolloutTask[GrpoConfig]):
    """A model learns which of its answers to a question are better than the others."""

    @property
    def algorithm(self) -> Grpo:
        config = self.config
        return Grpo(
            kl_coef=config.kl_coef,
            unbiased_kl=config.unbiased_kl,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            advantage_scale=config.advantage_scale,
            loss_norm=config.loss_norm,
            max_new_tokens=config.max_new_tokens,
        )


def train_grpo(config: GrpoConfig, make_rollouts: MakeRollouts) -> Path:
    """Train; returns the last checkpoint's folder. Raises: as finetune.engine.train_task."""
    from finetune.engine import train_task

    return train_task(config, lambda final: GrpoTraining(final, make_rollouts))
