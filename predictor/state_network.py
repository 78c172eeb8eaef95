"""The network of a Rereader in torch, as it is trained; `StateNetwork` is the same in numpy."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from predictor.heads import Distribution
from predictor.readings import Readings


class NetworkSettings(Protocol):
    """What of `FitSettings` the network needs."""

    @property
    def head(self) -> Distribution:
        """Classes of what is left, and their loss."""

    @property
    def state_units(self) -> int:
        """Hidden units; 0 for a linear network."""

    @property
    def state_dropout(self) -> float:
        """Share of the states and of the hidden units that a step does not see."""


@dataclass(frozen=True)
class ReadingTensors:
    """Readings in torch: z (R, D), bucket, left, finished, weights (R,)."""

    z: Tensor
    bucket: Tensor
    left: Tensor
    finished: Tensor
    weights: Tensor

    @classmethod
    def of(cls, z: np.ndarray, readings: Readings, bucket: np.ndarray) -> "ReadingTensors":
        """z: (R, D) standardised states of the readings; bucket: (R,)."""
        return cls(
            torch.from_numpy(z.astype(np.float32)),
            torch.from_numpy(bucket),
            torch.from_numpy(readings.tokens - readings.at),
            torch.from_numpy(readings.finished),
            torch.from_numpy(readings.weights.astype(np.float32)),
        )


class TorchNetwork(nn.Module):
    """logits = out relu(weight z + bias) + skip z + elapsed[bucket]; see StateNetwork."""

    def __init__(
        self,
        size: int,
        buckets: int,
        settings: NetworkSettings,
        left: np.ndarray,
    ):
        """size: D; left: (R,) tokens left of readings: `elapsed` starts at their frequencies."""
        super().__init__()
        units, classes = settings.state_units, settings.head.width
        self.length_head, self.dropout = settings.head, settings.state_dropout
        self.weight = nn.Parameter(torch.randn(units, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(units))
        self.out = nn.Parameter(torch.zeros(classes, units))
        self.skip = nn.Parameter(torch.zeros(classes, size))
        start = torch.tensor(settings.head.starting_bias(left), dtype=torch.float32)
        self.elapsed = nn.Parameter(start.repeat(buckets, 1))

    def groups(self, decay: float) -> list[dict]:
        """Parameters for the optimizer: matrices of states and units decay, the rest does not."""
        return [
            {"params": [self.weight, self.out, self.skip], "weight_decay": decay},
            {"params": [self.bias, self.elapsed], "weight_decay": 0.0},
        ]

    def forward(self, z: Tensor, bucket: Tensor) -> Tensor:
        """(N, K) logits of z (N, D) in buckets (N,)."""
        z = nn.functional.dropout(z, self.dropout, self.training)
        hidden = torch.relu(z @ self.weight.T + self.bias)
        hidden = nn.functional.dropout(hidden, self.dropout, self.training)
        return hidden @ self.out.T + z @ self.skip.T + self.elapsed[bucket]

    def loss(self, data: ReadingTensors, rows: Tensor) -> Tensor:
        """The head's loss, summed over the readings `rows`."""
        return self.length_head.loss(
            self(data.z[rows], data.bucket[rows]),
            data.left[rows],
            data.finished[rows],
            data.weights[rows],
            torch.zeros(len(rows), dtype=torch.long),
        )
