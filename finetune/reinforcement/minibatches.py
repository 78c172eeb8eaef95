"""Samples -> the tensors of a pass: the arguments of RolloutLoss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.reinforcement.experience import Sample
from finetune.reinforcement.policy_loss import Algorithm
from finetune.reinforcement.prompts import PromptRows
from finetune.rows.batches import BatchLayout, lay_end_to_end


@dataclass(frozen=True)
class Minibatches:
    """How the samples of a pass are laid out, and which of their columns the loss reads."""

    algorithm: Algorithm
    layout: BatchLayout

    def batch(
        self, rows: Sequence[tuple[PromptRows, int]], groups: Sequence[list[Sample]]
    ) -> dict[str, Any]:
        """The samples `groups` of the prompts `rows`: each a sequence of one ragged row.

        Where there is no answer, a prompt without targets keeps the ranks in step.

        Returns:
            As lay_end_to_end; "samples", their number; and (N,) fp32 over the places that predict:
            "weights" of the losses, and the columns that all samples have.
        """
        ids: list[np.ndarray] = []
        masked: list[int] = []  # of each sequence, the prompt's tokens, which carry no loss
        all_samples: list[Sample] = []
        for (data, row), samples in zip(rows, groups):
            prompt = data.prompt(row) if samples else []
            for sample in samples:
                ids.append(np.concatenate([prompt, sample.tokens]))
                masked.append(len(prompt))
                all_samples.append(sample)
        if not all_samples:
            data, _ = rows[0]
            shortest = data.prompt(int(data.row_lengths.argmin()))
            ids, masked = [np.array(shortest)], [len(shortest)]
        layout = self.layout
        batch: dict[str, Any] = dict(
            lay_end_to_end(ids, masked, layout["share"], layout["multiple"])
        )
        batch["samples"] = len(all_samples)
        weights = []
        for sample in all_samples:
            size = len(sample.tokens)
            weights.append(np.full(size, self.algorithm.weight(size), np.float32))
        places = len(batch["keep"])
        batch["weights"] = laid_out(weights, places)
        for name in ("old", *self.algorithm.columns):
            if all(name in sample.columns for sample in all_samples):
                columns = [sample.columns[name] for sample in all_samples]
                batch[name] = laid_out(columns, places)
        return batch


def laid_out(parts: Sequence[np.ndarray], places: int) -> Tensor:
    """(places,) fp32: the parts end to end, then zeros."""
    row = np.zeros(places, np.float32)
    if parts:
        values = np.concatenate(parts)
        row[: len(values)] = values
    return torch.from_numpy(row)
