"""The one loss: negative log likelihood summed over labelled tokens. Who divides, and by what, is the engine's business."""

import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data import IGNORED


def count_labels(labels: Tensor) -> int:
    """Tokens that carry loss: labels (B, S) but for the first column, which nothing predicts."""
    return int((labels[:, 1:] != IGNORED).sum())


def nll_sum(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Scalar fp32. The output layer runs on positions whose next token is labelled, and on no other.

    Args:
        model: a ChatGLM with its output layer, bare or inside peft.
        input_ids, labels: (B, S), labels not shifted, IGNORED where no loss.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][labelled])
    return F.cross_entropy(logits.float(), targets[labelled], reduction="sum")


class LossModule(nn.Module):
    """What DeepSpeed trains: forward gives the loss, so its hooks see body and output layer in one call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return nll_sum(self.model, input_ids, labels)
