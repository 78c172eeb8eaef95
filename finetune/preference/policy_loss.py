"""The module that --task dpo trains: a model, its reference, and one of LOSSES."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.loss import ragged_part, token_log_probs
from finetune.preference.losses import Answers, PairLoss
from finetune.preference.reference import switched_off
from finetune.rows.batches import IGNORED

DRIFT = "drift_"  # before the names of a batch's answers to other questions


class PreferenceLoss(nn.Module):
    """The module that DeepSpeed trains: a loss of LOSSES, summed over the groups of a batch."""

    def __init__(self, model: nn.Module, loss: PairLoss):
        super().__init__()
        self.model = model
        self.preference = loss

    def log_probs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """((sequences,) log-probabilities of the answers, (sequences,) tokens of each)."""
        token_values = token_log_probs(self.model, **ragged_part(batch))
        is_answer = batch["targets"] != IGNORED
        sums = [values.sum() for values in token_values.split(batch["counts"])]
        tokens = [part.sum() for part in is_answer.split(batch["counts"])]
        return torch.stack(sums), torch.stack(tokens)

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
        mismatched = {}
        for name, value in batch.items():
            if name.startswith(DRIFT):
                mismatched[name.removeprefix(DRIFT)] = value
        log_probs, _ = self.log_probs(mismatched)
        log_ratio = log_probs - self.reference(mismatched)
        real = mismatched["real"]
        mean = (log_ratio * real).sum() / real.sum().clamp(min=1)
        return mean.clamp(min=0)

    def answers(self, batch: Mapping[str, Any]) -> Answers:
        """The answers of a batch of PreferenceTraining.collate."""
        drift = liked = None
        if self.preference.labelled:
            drift = self.drift(batch)
            liked = batch["liked"]
        reference = batch.get("reference")
        if reference is None and self.preference.has_reference:
            reference = self.reference(batch)
        policy, tokens = self.log_probs(batch)
        if reference is None:
            reference = torch.zeros_like(policy)
        shape = (len(batch["real"]), -1)  # (groups, answers of a group)
        return Answers(policy.view(shape), reference.view(shape), tokens.view(shape), liked, drift)

    def forward(self, scale: float = 1.0, *, output: str = "loss", **batch: Any) -> Tensor:
        """`scale` times the loss; or what `output` names, "sums" or "log_probs".

        All go through the module's call, at whose ends ZeRO-3 gives its gathered weights back.
        """
        if output == "sums":
            return self.sums(batch)
        if output == "log_probs":
            return self.log_probs(batch)[0]
        losses = self.preference.losses(self.answers(batch))
        return scale * torch.sum(losses * batch["real"])

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
        columns = [
            self.preference.losses(answers) * real,
            rewards[:, 0] * better,
            better,
            rewards[:, -1] * worse,
            worse,
            ordered,
        ]
        return torch.stack(columns).sum(1)
