"""The one loss: negative log likelihood summed over labelled tokens. Who divides, and by what, is the engine's business."""

import torch.nn.functional as F
from torch import Tensor, nn

from chatglm.kernels import OutputLayer
from finetune.data import IGNORED


def nll_sum(model: nn.Module, input_ids: Tensor, scale: float = 1.0, *, labels=None, lengths=None, shared=None, keep=None, targets=None) -> Tensor:
    """`scale` times the negative log likelihood summed over labelled tokens: a scalar, fp32.

    The output layer runs on positions whose next token is labelled and on no other, the last block of a ragged row likewise.

    Args:
        model: a ChatGLM with its output layer, bare or inside peft.
        input_ids: of a padded batch, (B, S), with labels (B, S), not shifted, IGNORED where no loss;
            or of a ragged row, (1, S), with the lengths of its sequences, `shared` as Packing has it, keep (N,), the places
            that predict, and targets (N,), what they predict.
        scale: what the loss is multiplied by on the way, at no cost; multiplying afterwards may take a pass over gradients.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if labels is None:
        positions = model.transformer.packed_positions(input_ids, lengths, shared)
        hidden = model.transformer(input_ids=input_ids, position_ids=positions, keep=keep, use_cache=False).last_hidden_state[0]
    else:
        hidden = model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        labelled = targets != IGNORED
        hidden, targets = hidden[:, :-1][labelled], targets[labelled]
    output_layer = model.get_output_embeddings()
    if isinstance(output_layer, OutputLayer):
        return output_layer(hidden, targets, scale)
    # An output layer that LoRA wraps knows no loss of its own.
    return scale * F.cross_entropy(output_layer(hidden).float(), targets, reduction="sum", ignore_index=IGNORED)


class LossModule(nn.Module):
    """What DeepSpeed trains: forward gives the loss, so its hooks see body and output layer in one call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, scale: float = 1.0, **batch) -> Tensor:
        return nll_sum(self.model, scale=scale, **batch)
