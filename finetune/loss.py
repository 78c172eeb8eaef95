"""The loss: negative log likelihood summed over labelled tokens. The engine divides it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatglm.kernels import OutputLayer
from chatglm.packing import packed_states
from finetune.distributed import on_device
from finetune.rows.batches import IGNORED


def nll_sum(
    model: nn.Module,
    input_ids: Tensor,
    scale: float = 1.0,
    *,
    labels: Tensor | None = None,
    lengths: list[int] | None = None,
    shared: list[int] | None = None,
    keep: Tensor | None = None,
    targets: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """`scale` times the negative log likelihood summed over labelled tokens: a scalar, fp32.

    The output layer, and the last block of a ragged row, run only on positions whose next token is
    labelled.

    Args:
        model: a ChatGLM or another causal model with its output layer, bare or inside peft.
        input_ids: (B, S) of a padded batch, or (1, S) of a ragged row.
        scale: factor of the loss. Multiplying afterwards may take a pass over the gradients.
        labels: (B, S) of a padded batch, not shifted, IGNORED where there is no loss.
        lengths: of a ragged row's sequences.
        shared: of a ragged row, as in Packing.
        keep: (N,) of a ragged row: the positions that predict.
        targets: (N,) of a ragged row: the tokens that they predict.
        smoothing: share of the wanted probability that is spread evenly over all words (arXiv
            1512.00567 section 7).
    """
    inner = without_peft(model)
    if labels is None:
        hidden = ragged_states(model, input_ids, lengths, shared, keep)
    else:
        body = inner.base_model
        hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden, targets = labelled_states(hidden, labels)
    if targets is None:
        raise ValueError("a ragged row needs its targets")
    return nll_of_states(inner.get_output_embeddings(), hidden, targets, scale, smoothing)


def labelled_states(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H) states that predict a labelled token, (N,) tokens; of (B, S, H), labels (B, S)."""
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    return hidden[:, :-1][labelled], targets[labelled]


def nll_of_states(
    output_layer: nn.Module, hidden: Tensor, targets: Tensor, scale: float, smoothing: float
) -> Tensor:
    """As nll_sum, from the last hidden states (N, H) that predict the tokens targets (N,)."""
    if isinstance(output_layer, OutputLayer):
        return output_layer(hidden, targets, scale, smoothing)
    # An output layer that LoRA wraps does not compute the loss.
    return scale * F.cross_entropy(
        output_layer(hidden).float(),
        targets,
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )


def ragged_states(
    model: nn.Module,
    input_ids: Tensor,
    lengths: list[int] | None,
    shared: list[int] | None,
    keep: Tensor | None,
) -> Tensor:
    """(N, H) last hidden states at `keep` of a ragged row; the arguments are nll_sum's."""
    if lengths is None or shared is None or keep is None:
        raise ValueError("a ragged row needs its lengths, shared and keep")
    return packed_states(without_peft(model), input_ids, lengths, shared, keep)


def ragged_part(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of token_log_probs in a batch that has others too."""
    names = ("input_ids", "lengths", "shared", "keep", "targets")
    return {name: batch[name] for name in names}


def token_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    *,
    lengths: list[int],
    shared: list[int],
    keep: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """(N,) fp32: the log-probability of each target of a ragged row; 0 where it is IGNORED.

    The arguments are nll_sum's; logits are divided by `temperature`.
    """
    hidden = ragged_states(model, input_ids, lengths, shared, keep)
    if temperature != 1:  # an output layer without bias is linear: so no logits are copied
        hidden = hidden / temperature
    output_layer = without_peft(model).get_output_embeddings()
    if isinstance(output_layer, OutputLayer):
        return output_layer(hidden, targets, log_probs=True)
    log_probs = torch.log_softmax(output_layer(hidden).float(), dim=-1)
    found = log_probs.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(targets == IGNORED, 0.0)


def without_peft(model: nn.Module) -> Any:
    """The model of transformers inside of a peft model, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if base else model


def sequence_lengths(
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    lengths: list[int] | None = None,
    keep: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(B, 1) or (1, S): the length without padding of each token's sequence.

    The arguments are a batch of nll_sum. A length counts the tokens that predict and those before
    them.
    """
    if labels is not None:  # the last token of a row is labelled; padding follows
        places = torch.arange(labels.shape[1], device=labels.device)
        return ((labels != IGNORED) * places).amax(1, keepdim=True).clamp(min=1)
    if keep is None:
        raise ValueError("a ragged row needs its keep")
    counts = torch.tensor(lengths, device=input_ids.device)
    unpadded = counts.clone()
    unpadded[-1] = keep[-1] + 1 - counts[:-1].sum()  # the last sequence includes the padding
    return unpadded.repeat_interleave(counts, output_size=input_ids.shape[1])[None]


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float, batch: Mapping[str, Any]) -> Iterator[None]:
    """NEFTune (arXiv 2310.05914): a context in which embeddings get uniform noise.

    Its amplitude is alpha / sqrt(length of the sequence * width).
    """
    if not alpha:
        yield
        return

    def add_noise(module: nn.Module, args: Any, embeds: Tensor) -> Tensor:
        bound = alpha / (sequence_lengths(**batch)[..., None] * embeds.shape[-1]).sqrt()
        noise = (torch.rand_like(embeds, dtype=torch.float32) * 2 - 1).mul_(bound)
        return embeds + noise.to(embeds.dtype)

    hook = without_peft(model).get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


class LossModule(nn.Module):
    """The module that DeepSpeed trains; its forward returns the loss.

    So DeepSpeed's hooks cover body and output layer in one call. Smoothing and noise (see nll_sum,
    noisy_embeddings) act in training only; the noise comes from torch's generator.
    """

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0, noise_alpha: float = 0.0):
        super().__init__()
        self.model = model
        self.smoothing = smoothing
        self.noise_alpha = noise_alpha

    @torch.no_grad()
    def total_loss(self, batches: Iterable[Mapping[str, Any]]) -> float:
        """The loss without scale, summed over collated batches."""
        device = next(self.parameters()).device
        total = 0.0
        for batch in batches:
            total += float(self(**on_device(batch, device)))
        return total

    def forward(self, scale: float = 1.0, **batch: Any) -> Tensor:
        if not self.training:
            return nll_sum(self.model, scale=scale, **batch)
        with noisy_embeddings(self.model, self.noise_alpha, batch):
            return nll_sum(self.model, scale=scale, smoothing=self.smoothing, **batch)
