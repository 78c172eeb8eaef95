"""The module that --task dpo trains: a model, its reference, and one of LOSSES."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.loss import token_log_probs
from finetune.preference.losses import Answers, PairLoss
from finetune.preference.reference import switched_off
from finetune.rows.batches import IGNORED

RAGGED = ("input_ids", "lengths", "shared", "keep", "targets")
DRIFT = "drift_"  # before the names of a batch's answers to other questions


class PreferenceLoss(nn.Module):
    """The module that DeepSpeed trains: a loss of LOSSES, summed over the groups of a batch."""

    def __init__(self, model: nn.Module, loss: PairLoss):
        super().__init__()
        self.model = model
        self.preference = loss

    def log_probs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """((sequences,) log-probabilities of the answers, (sequences,) tokens of each)."""
        found = token_log_probs(self.model, **{name: batch[name] for name in RAGGED})
        sums = [part.sum() for part in found.split(batch["counts"])]
        learnt = (batch["targets"] != IGNORED).split(batch["counts"])
        return torch.stack(sums), torch.stack([part.sum() for part in learnt])

    @torch.no_grad()
    def reference(self, batch: Mapping[str, Any]) -> Tensor:
        """(sequences,) of the model without what trains."""
        with switched_off(self.model):
            return self.log_probs(batch)[0]

    @torch.no_grad()
    def drift(self, batch: Mapping[str, Any]) -> Tensor:
        """max(0, mean of log(pi / r)) over answers to other questions; arXiv 2402.01306, sec. 4.

        A pass is its own estimate, on each rank.
        """
        other = {n.removeprefix(DRIFT): value for n, value in batch.items() if n.startswith(DRIFT)}
        ratio = self.log_probs(other)[0] - self.reference(other)
        return (ratio * other["real"]).sum().div(other["real"].sum().clamp(min=1)).clamp(min=0)

    def answers(self, batch: Mapping[str, Any]) -> Answers:
        """The answers of a batch of PreferenceTraining.collate."""
        groups = len(batch["real"])
        labelled = self.preference.labelled
        reference = batch.get("reference")
        drift = self.drift(batch) if labelled else None
        if reference is None and self.preference.has_reference:
            reference = self.reference(batch)
        policy, tokens = self.log_probs(batch)
        if reference is None:
            reference = torch.zeros_like(policy)
        shape = (groups, -1)
        liked = batch["liked"] if labelled else None
        return Answers(policy.view(shape), reference.view(shape), tokens.view(shape), liked, drift)

    def forward(self, scale: float = 1.0, *, found: str = "loss", **batch: Any) -> Tensor:
        """`scale` times the loss; or what `found` names, "sums" or "log_probs".

        All go through the module's call, at whose ends ZeRO-3 gives its gathered weights back.
        """
        if found == "sums":
            return self.sums(batch)
        if found == "log_probs":
            return self.log_probs(batch)[0]
        return scale * torch.sum(self.preference.losses(self.answers(batch)) * batch["real"])

    def sums(self, batch: Mapping[str, Any]) -> Tensor:
        """(6,): loss; rewards and number of better answers; of the others; pairs in order."""
        answers = self.answers(batch)
        rewards, real = self.preference.rewards(answers), batch["real"]
        if answers.liked is None:
            better, worse = real, real
            ordered = (rewards[:, 0] > rewards[:, 1]).float() * real
        else:
            better, worse = real * answers.liked, real * (1 - answers.liked)
            ordered = torch.zeros_like(real)
        columns = [self.preference.losses(answers) * real, rewards[:, 0] * better, better]
        columns += [rewards[:, -1] * worse, worse, ordered]
        return torch.stack(columns).sum(1)
