"""The one loss: negative log likelihood summed over labelled tokens. Who divides, and by what, is the engine's business."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatglm.kernels import OutputLayer
from finetune.rows.batches import IGNORED


def nll_sum(
    model: nn.Module,
    input_ids: Tensor,
    scale: float = 1.0,
    *,
    labels: Tensor | None = None,
    lengths: list[int] | None = None,
    shared: int | None = None,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """`scale` times the negative log likelihood summed over labelled tokens: a scalar, fp32.

    The output layer runs on positions whose next token is labelled and on no other, the last block of a ragged row likewise.

    Args:
        model: a ChatGLM with its output layer, bare or inside peft.
        input_ids: of a padded batch, (B, S), with labels (B, S), not shifted, IGNORED where no loss;
            or of a ragged row, (1, S), with the lengths of its sequences, `shared` as Packing has it, keep (N,), the places
            that predict, and targets (N,), what they predict.
        scale: what the loss is multiplied by on the way, at no cost; multiplying afterwards may take a pass over gradients.
        smoothing: share of the wanted probability that is spread evenly over all words (arXiv 1512.00567 section 7).
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if labels is None:
        positions = model.transformer.packed_positions(input_ids, lengths, shared)
        hidden = model.transformer(
            input_ids=input_ids, position_ids=positions, keep=keep, use_cache=False
        ).last_hidden_state[0]
    else:
        hidden = model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        labelled = targets != IGNORED
        hidden, targets = hidden[:, :-1][labelled], targets[labelled]
    output_layer = model.get_output_embeddings()
    if isinstance(output_layer, OutputLayer):
        return output_layer(hidden, targets, scale, smoothing)
    # An output layer that LoRA wraps knows no loss of its own.
    return scale * F.cross_entropy(
        output_layer(hidden).float(),
        targets,
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )


def sequence_lengths(
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    lengths: list[int] | None = None,
    keep: Tensor | None = None,
    **_,
) -> Tensor:
    """Of each token of a batch as nll_sum takes it, how many tokens of its sequence predict or lead to what does: (B, S), or (B, 1)."""
    if labels is not None:  # the last token of a row is labelled; what follows is padding
        places = torch.arange(labels.shape[1], device=labels.device)
        return ((labels != IGNORED) * places).amax(1, keepdim=True).clamp(min=1)
    counts = torch.tensor(lengths, device=input_ids.device)
    own = counts.clone()
    own[-1] = keep[-1] + 1 - counts[:-1].sum()  # without what fills the row up
    return own.repeat_interleave(counts, output_size=input_ids.shape[1])[None]


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float, batch: dict) -> Iterator[None]:
    """NEFTune (arXiv 2310.05914): inside, embeddings get uniform noise of at most alpha / sqrt(length of the sequence * width)."""
    if not alpha:
        yield
        return

    def add_noise(module, args, embeds):
        bound = alpha / (sequence_lengths(**batch)[..., None] * embeds.shape[-1]).sqrt()
        return embeds + (torch.rand_like(embeds, dtype=torch.float32) * 2 - 1).mul_(bound).to(
            embeds.dtype
        )

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


class LossModule(nn.Module):
    """What DeepSpeed trains: forward gives the loss, so its hooks see body and output layer in one call.

    Smoothing and noise (see nll_sum, noisy_embeddings) act in training alone; the noise comes from torch's generator.
    """

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0, noise_alpha: float = 0.0):
        super().__init__()
        self.model, self.smoothing, self.noise_alpha = model, smoothing, noise_alpha

    def forward(self, scale: float = 1.0, **batch) -> Tensor:
        if not self.training:
            return nll_sum(self.model, scale=scale, **batch)
        with noisy_embeddings(self.model, self.noise_alpha, batch):
            return nll_sum(self.model, scale=scale, smoothing=self.smoothing, **batch)
