"""A backbone and its head as one module that the training loop trains."""

from pathlib import Path

import torch
from torch import Tensor, nn

from predictor.scorers import HEAD_FILE


class LengthNetwork(nn.Module):
    """Prompts -> vectors -> one linear layer -> what the head wants.

    `backbone` is one of BACKBONES, `model` the module it computes vectors with.
    """

    def __init__(self, backbone, model: nn.Module, hidden_size: int, width: int, bias: Tensor):
        super().__init__()
        self.backbone, self.model = backbone, model
        self.head = nn.Linear(hidden_size, width)
        with torch.no_grad():
            # Zero weights would let no gradient into the backbone at the first step.
            nn.init.normal_(self.head.weight, std=0.02)
            self.head.bias.copy_(bias)

    @property
    def config(self):
        return self.model.config

    def gradient_checkpointing_enable(self, **options):
        self.model.gradient_checkpointing_enable(**options)

    def forward(self, batch: dict) -> Tensor:
        """(B, width) in fp32."""
        vectors = self.backbone.vectors(self.model, batch)
        return self.head(vectors.to(self.head.weight.dtype)).float()


class LengthLoss(nn.Module):
    """What DeepSpeed trains: the head's loss, summed over the labels of a batch."""

    def __init__(self, network: LengthNetwork, head):
        super().__init__()
        self.network, self.length_head = network, head

    def forward(self, scale: float = 1.0, *, tokens, finished, weights, served, prompt, **batch) -> Tensor:
        """tokens, finished, weights, served (number of the served model), prompt (row of the batch): (M,) of the labels."""
        outputs = self.network(batch)[prompt]
        return scale * self.length_head.loss(outputs, tokens, finished, weights, served)


def save_head(state: dict[str, Tensor], folder: Path):
    """head.safetensors: weight (width, hidden_size) and bias (width,) in fp32, from a LengthNetwork's state."""
    from safetensors.torch import save_file

    save_file({name: state[f"head.{name}"].float().contiguous() for name in ("weight", "bias")}, Path(folder) / HEAD_FILE, {"format": "pt"})
