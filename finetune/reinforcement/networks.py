"""The models of a task that learns from rewards: the policy, its reference and a critic."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.loss import ragged_part, token_log_probs
from finetune.preference.reference import switched_off
from finetune.preference.reward import RewardNetwork

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PolicyNetwork(nn.Module):
    """A policy and what stands beside it.

    Attributes:
        model: the policy, as its method prepared it.
        reference: frozen; None: there is none, or it is the policy without what trains.
        critic: gives values; None: the algorithm has none.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None, critic: RewardNetwork | None):
        super().__init__()
        self.model = model
        self.reference = reference
        self.critic = critic

    @property
    def config(self) -> "PretrainedConfig":
        model: Any = self.model  # torch types a submodule as Tensor | Module
        return model.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        model: Any = self.model
        model.gradient_checkpointing_enable(**options)
        if self.critic is not None:
            self.critic.gradient_checkpointing_enable(**options)

    def log_probs(self, batch: Mapping[str, Any], temperature: float) -> Tensor:
        """(N,) fp32 log-probabilities of a ragged row's targets, as they are sampled."""
        return token_log_probs(self.model, **ragged_part(batch), temperature=temperature)

    @torch.no_grad()
    def reference_log_probs(self, batch: Mapping[str, Any], temperature: float) -> Tensor:
        """As log_probs, of the model that the run started from."""
        rows = ragged_part(batch)
        if self.reference is not None:
            return token_log_probs(self.reference, **rows, temperature=temperature)
        with switched_off(self.model):
            return token_log_probs(self.model, **rows, temperature=temperature)

    def values(self, batch: Mapping[str, Any]) -> Tensor:
        """(N,) fp32: the critic's values before each target of a ragged row."""
        if self.critic is None:
            raise ValueError("the policy has no critic")
        rows = ragged_part(batch)
        del rows["targets"]
        return self.critic(**rows)


def sharing_copy(model: nn.Module) -> Any:
    """A copy of a model of adapters: frozen weights are shared, what trains is copied."""
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            shared[id(parameter)] = parameter
    for buffer in model.buffers():
        shared[id(buffer)] = buffer
    return copy.deepcopy(model, shared)


def make_critic(model: Any) -> RewardNetwork:
    """A critic on a copy of the policy: a linear layer without bias that starts at zero."""
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().requires_grad_(False)  # no gradient reaches it
    critic = RewardNetwork(model, model.config.hidden_size)
    nn.init.zeros_(critic.value_head.weight)
    return critic
