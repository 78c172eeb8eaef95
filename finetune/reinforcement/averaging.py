"""The moving average of a policy's trained weights, an exponential one over optimizer steps."""

from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.checkpoint import gathered_state

AVERAGE_FILE = "average.safetensors"


class WeightAverage:
    """average <- decay average + (1 - decay) weights after each step; kept in fp32 on rank 0.

    Attributes:
        steps: optimizer steps that it has seen; -1 before its start. The same on every rank.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.steps = -1
        self.weights: dict[str, Tensor] = {}

    def update(self, policy: nn.Module, steps: int) -> None:
        """Take in the weights after `steps` steps, once; those after none are its start. A
        collective operation.
        """
        if steps <= self.steps:
            return
        for name, weight in gathered_state(policy, trainable_only=True).items():
            copied = weight.to(torch.float32, copy=True)
            if name in self.weights:
                self.weights[name].lerp_(copied, 1 - self.decay)
            else:
                self.weights[name] = copied
        self.steps = steps

    def state_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A policy's state with the averages in place of what trains, in its dtypes."""
        averaged = dict(state)
        for name, weight in self.weights.items():
            averaged[name] = weight.to(state[name].dtype)
        return averaged

    def save(self, folder: Path) -> None:
        """Write it in full precision."""
        from safetensors.torch import save_file

        save_file(self.weights, folder / AVERAGE_FILE, {"steps": str(self.steps)})

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote.

        Raises:
            ValueError: it is not there, or not whole.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / AVERAGE_FILE
        try:
            with safe_open(path, "pt") as file:
                self.steps = int((file.metadata() or {})["steps"])
                self.weights = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the average of a checkpoint ({error})") from None
