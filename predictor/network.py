"""A backbone and its head as one module that the training loop trains."""

from pathlib import Path

import torch
from torch import Tensor, nn

from predictor.scorers import HEAD_FILE

HEAD_GAIN = 20.0  # a new head must learn faster than the backbone it stands on: Adam moves its weights by so much more


class LengthNetwork(nn.Module):
    """Prompts -> vectors -> one linear layer -> what the head wants; what served models do differently is a layer of each's own.

    `backbone` is one of BACKBONES, `model` the module it computes vectors with; `models` is the number of served models.
    """

    def __init__(
        self, backbone, model: nn.Module, hidden_size: int, width: int, models: int, bias: Tensor
    ):
        super().__init__()
        self.backbone, self.model = backbone, model
        self.head = nn.Linear(hidden_size, width)
        self.apart = nn.Embedding(models, width * hidden_size) if models > 1 else None
        with torch.no_grad():
            # Zero weights would let no gradient into the backbone at the first step.
            nn.init.normal_(self.head.weight, std=0.02 / HEAD_GAIN)
            self.head.bias.copy_(bias)
            if self.apart:
                self.apart.weight.zero_()

    @property
    def config(self):
        return self.model.config

    def gradient_checkpointing_enable(self, **options):
        self.model.gradient_checkpointing_enable(**options)

    def forward(self, batch: dict, prompt: Tensor, served: Tensor) -> Tensor:
        """(M, width) in fp32, of M labels: prompt (M,) are their rows in the batch, served (M,) the numbers of their served models."""
        vectors = HEAD_GAIN * self.backbone.vectors(self.model, batch).to(self.head.weight.dtype)
        outputs = self.head(vectors)[prompt]
        if self.apart:
            weight = self.apart(served).view(len(served), -1, vectors.shape[1])
            outputs = outputs + (weight @ vectors[prompt, :, None])[:, :, 0]
        return outputs.float()


class LengthLoss(nn.Module):
    """What DeepSpeed trains: the head's loss, summed over the labels of a batch."""

    def __init__(self, network: LengthNetwork, head):
        super().__init__()
        self.network, self.length_head = network, head

    def forward(
        self, scale: float = 1.0, *, tokens, finished, weights, served, prompt, **batch
    ) -> Tensor:
        """tokens, finished, weights: (M,) of the labels; prompt, served as LengthNetwork takes them."""
        outputs = self.network(batch, prompt, served)
        return scale * self.length_head.loss(outputs, tokens, finished, weights, served)


def save_head(state: dict[str, Tensor], own: int, folder: Path):
    """head.safetensors from a LengthNetwork's state, in fp32: weight (width, hidden_size) and bias (width,) of the predicted served
    model; the layers of all served models, the shared one first, as all (models + 1, width, hidden_size), where there are several.
    """
    from safetensors.torch import save_file

    weight = HEAD_GAIN * state["head.weight"].float()
    tensors = {"weight": weight, "bias": state["head.bias"].float()}
    if "apart.weight" in state:
        apart = HEAD_GAIN * state["apart.weight"].float().view(-1, *weight.shape)
        tensors |= {"weight": weight + apart[own], "all": torch.cat([weight[None], weight + apart])}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(folder) / HEAD_FILE,
        {"format": "pt"},
    )
