"""train.py --task ppo: Proximal Policy Optimization for language models, arXiv 1707.06347.

An answer of n tokens is an episode: token t is the action, the text before it the state, V_t the
critic's value of that state. With a sequence reward R (arXiv 2203.02155 eq. 2) and the drift from
the start, k_t = log(pi_old / ref) of token t,

    r_t = -kl_coef k_t + (R if t = n else 0)

GAE (arXiv 1506.02438 eq. 16), backwards from the last token, V after it being 0:

    d_t = r_t + gamma V_(t+1) - V_t,   A_t = d_t + gamma lambda A_(t+1),   returns_t = A_t + V_t

The advantages of a rollout are whitened. Losses, means over tokens, rho = pi / pi_old:

    -min(rho A, clip(rho, 1 - eps, 1 + eps) A)                                    (eq. 7)
    vf_coef / 2 max((V - returns)^2, (clip(V, V_old - eps_v, V_old + eps_v) - returns)^2)

As "The N Implementation Details of RLHF with PPO" (Huang et al., 2023) has it: the critic is a
network of its own whose head starts at zero, the reward is the last token's, the temperature is in
the log-probabilities. PPO-ptx adds `--pretrain_coef` times the loss of other rows (2203.02155).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from finetune.distributed import sum_over_ranks
from finetune.epochs import EpochRows, StepBatches
from finetune.reinforcement.beside import load_pretraining, pretrain_batches
from finetune.reinforcement.config import PpoConfig
from finetune.reinforcement.experience import Experience, Sample, rewards_of
from finetune.reinforcement.policy_loss import PRETRAIN, clipped_losses
from finetune.reinforcement.rollout import MakeRollouts
from finetune.reinforcement.task import RolloutTask
from finetune.rows.arrays import Dataset
from finetune.rows.batches import count_labels
from finetune.rows.sources import join_hashes


def token_rewards(sample: Sample, reward: float, kl_coef: float) -> np.ndarray:
    """(n,) fp64: -kl_coef log(pi_old / ref) of each token; `reward` at the last."""
    rewards = -kl_coef * sample.divergence().astype(np.float64)
    rewards[-1] += reward
    return rewards


def advantages_of(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """(n,) fp64: GAE of an episode's rewards and values, arXiv 1506.02438 eq. 16."""
    advantages = np.zeros(len(rewards))
    next_advantage = next_value = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * lam * next_advantage
        next_advantage, next_value = advantages[t], values[t]
    return advantages


def whitened(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The parts with mean 0 and deviation 1 over all of them."""
    whole = np.concatenate(parts)
    mean, scale = whole.mean(), np.sqrt(whole.var() + 1e-8)
    return [(part - mean) / scale for part in parts]


@dataclass(frozen=True)
class Ppo:
    """The advantages and the losses; the fields are the flags of the same names."""

    kl_coef: float
    clip_range: float
    clip_range_high: float | None
    clip_range_value: float
    vf_coef: float
    gamma: float
    gae_lambda: float
    whiten_rewards: bool
    columns: ClassVar[tuple[str, ...]] = ("advantages", "values", "returns")
    has_critic: ClassVar[bool] = True

    def add_advantages(self, experience: Experience) -> None:
        """GAE by answer, whitened over the rollout; the returns are not."""
        samples = list(experience.samples())
        sequence_rewards = rewards_of(samples)
        if self.whiten_rewards:  # around their mean: equal ones stay as they are
            [white] = whitened([sequence_rewards])
            sequence_rewards = sequence_rewards.mean() + white
        advantages_of_samples = []
        for sample, reward in zip(samples, sequence_rewards):
            rewards = token_rewards(sample, float(reward), self.kl_coef)
            values = sample.columns["values"].astype(np.float64)
            advantages = advantages_of(rewards, values, self.gamma, self.gae_lambda)
            sample.columns["returns"] = (advantages + values).astype(np.float32)
            advantages_of_samples.append(advantages)
        for sample, advantages in zip(samples, whitened(advantages_of_samples)):
            sample.columns["advantages"] = advantages.astype(np.float32)

    def weight(self, tokens: int) -> float:
        """As in Algorithm: a mean over tokens."""
        return 1.0

    def count(self, weights: Tensor, samples: float) -> float:
        """Tokens."""
        return float(weights.sum())

    def policy_losses(self, log_probs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """As in Algorithm."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return clipped_losses(log_probs, batch["old"], batch["advantages"], self.clip_range, high)

    def value_losses(self, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """As in Algorithm."""
        old, returns = batch["values"], batch["returns"]
        clipped = old + (values - old).clamp(-self.clip_range_value, self.clip_range_value)
        squares = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        return self.vf_coef / 2 * squares


class PpoTraining(RolloutTask[PpoConfig]):
    """A model learns from the rewards of its answers, by a critic's judgement of each token."""

    def __init__(self, config: PpoConfig, make_rollouts: MakeRollouts):
        super().__init__(config, make_rollouts)
        self.pretraining: EpochRows[Dataset] | None = None
        self.pretrain_hash = ""

    @property
    def algorithm(self) -> Ppo:
        config = self.config
        return Ppo(
            kl_coef=config.kl_coef,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            clip_range_value=config.clip_range_value,
            vf_coef=config.vf_coef,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            whiten_rewards=config.whiten_rewards,
        )

    # ---- PPO-ptx

    def load_rows(self) -> None:
        """As RolloutTask's, and the rows of --pretrain_path."""
        super().load_rows()
        if self.config.pretrain_path:
            self.pretraining, self.pretrain_hash = load_pretraining(self, self.config)

    def data_hash(self) -> str:
        """As RowTask's, of the rows of --pretrain_path too."""
        hashes = [super().data_hash(), self.pretrain_hash]
        return join_hashes([text for text in hashes if text])

    def step_batches(self, loss_module: Any, collated: StepBatches, step: int) -> StepBatches:
        """As RolloutTask's; each pass also has rows of --pretrain_path."""
        answered = super().step_batches(loss_module, collated, step)
        if self.pretraining is None:
            return answered
        pretraining = pretrain_batches(
            self.pretraining, step, self.step_rows, self.config, self.layout
        )
        answer_tokens, pretrain_tokens = sum_over_ranks(
            sum(self.count_labels(batch) for batch in answered.batches),
            sum(count_labels(rows) for rows in pretraining),
        )
        # The loop divides by the tokens of answers.
        scale = self.config.pretrain_coef * answer_tokens / pretrain_tokens
        batches: list[Mapping[str, Any]] = []
        for batch, rows in zip(answered.batches, pretraining):
            joined = dict(batch)
            for name, value in rows.items():
                joined[PRETRAIN + name] = value
            joined[PRETRAIN + "scale"] = scale
            batches.append(joined)
        return replace(answered, batches=batches)


def train_ppo(config: PpoConfig, make_rollouts: MakeRollouts) -> Path:
    """Train; returns the last checkpoint's folder. Raises: as finetune.engine.train_task."""
    from finetune.engine import train_task

    return train_task(config, lambda final: PpoTraining(final, make_rollouts))
