"""A backbone and its head as one module that the training loop trains."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from predictor.backbones import config_of
from predictor.scorers import HEAD_FILE, TransformerBackbone

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from predictor.heads import Head

# Divides a new head's weights and multiplies its inputs: Adam's steps move its outputs this much
# more, so that it learns faster than the backbone.
HEAD_GAIN = 20.0


class LengthNetwork(nn.Module):
    """Prompts -> backbone vectors -> one linear layer -> head outputs.

    With several served models, a linear layer per model (`apart`) is added to the shared one.

    Attributes:
        backbone: one of BACKBONES; `model` is the module it computes vectors with.
    """

    def __init__(
        self,
        backbone: TransformerBackbone,
        model: nn.Module,
        hidden_size: int,
        width: int,
        models: int,
        bias: Tensor,
    ):
        """models: number of served models; bias: (width,) initial value of the head's bias."""
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
    def config(self) -> "PretrainedConfig":
        return config_of(self.model)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        model: Any = self.model  # torch types a model's methods as Tensor | Module
        model.gradient_checkpointing_enable(**options)

    def forward(self, batch: dict, prompt: Tensor, served: Tensor) -> Tensor:
        """(M, width) head outputs in fp32 for M labels.

        Args:
            batch: what the backbone's `collate` returns for the batch's prompts.
            prompt: (M,) row of each label's prompt in the batch.
            served: (M,) number of each label's served model.
        """
        vectors = HEAD_GAIN * self.backbone.vectors(self.model, batch).to(self.head.weight.dtype)
        outputs = self.head(vectors)[prompt]
        if self.apart:
            weight = self.apart(served).view(len(served), -1, vectors.shape[1])
            outputs = outputs + (weight @ vectors[prompt, :, None])[:, :, 0]
        return outputs.float()


class LengthLoss(nn.Module):
    """The module that DeepSpeed trains: the head's loss, summed over the labels of a batch."""

    def __init__(self, network: LengthNetwork, head: "Head"):
        super().__init__()
        self.network, self.length_head = network, head

    def forward(
        self,
        scale: float = 1.0,
        *,
        tokens: Tensor,
        finished: Tensor,
        weights: Tensor,
        served: Tensor,
        prompt: Tensor,
        **batch: Any,
    ) -> Tensor:
        """scale * loss of M labels.

        tokens, finished, weights: (M,); prompt, served: as in LengthNetwork.forward.
        """
        outputs = self.network(batch, prompt, served)
        return scale * self.length_head.loss(outputs, tokens, finished, weights, served)


def save_head(state: dict[str, Tensor], target_model: int, folder: Path) -> None:
    """Write head.safetensors from a LengthNetwork's state, in fp32.

    It holds weight (width, hidden_size) and bias (width,) of the predicted model, number
    `target_model`. With several served models also `all` (models + 1, width, hidden_size): the
    weights of the shared layer and then of every served model.
    """
    from safetensors.torch import save_file

    weight = HEAD_GAIN * state["head.weight"].float()
    tensors = {"weight": weight, "bias": state["head.bias"].float()}
    if "apart.weight" in state:
        apart = HEAD_GAIN * state["apart.weight"].float().view(-1, *weight.shape)
        tensors |= {
            "weight": weight + apart[target_model],
            "all": torch.cat([weight[None], weight + apart]),
        }
    for name, tensor in tensors.items():
        tensors[name] = tensor.contiguous()
    save_file(tensors, Path(folder) / HEAD_FILE, {"format": "pt"})
