"""Activations of a training run: what its forward pass keeps, and what backward works with.

Bytes on one GPU (or of one process). Layers are counted by finetune/memory/layers.py, a token at a
time; here they are multiplied by the run's positions and layers. Free of torch.
"""

from finetune.memory.cards import MIB
from finetune.memory.layers import (
    kept_bytes_per_token,
    keys_side_kept,
    norms_kept,
    products_kept,
    working_bytes_per_token,
)
from finetune.memory.run import Run

# chatglm.kernels': of the logits at a time, and of their fp32 copy on a CPU.
LOGITS_BYTES, CACHED_BYTES = 64 * MIB, MIB


def activations(run: Run) -> float:
    """Bytes that the forward pass keeps for backward: layers, masks, copies of adapters."""
    layers = checkpoints_kept(run) if run.checkpointing else layers_kept(run)
    return layers + visibility_kept(run) + adapter_copies(run)


def layers_in_graph(run: Run) -> int:
    """The number of layers that backward passes through.

    The graph begins at the first trained weight; but plain checkpointing lets it begin at the
    embeddings.
    """
    layers = run.shape.layers
    if run.train_type != "freeze" or (run.checkpointing and not run.ours):
        return layers
    numbers = list(map(run.shape.layer_of, run.trained))
    inside = [number for number in numbers if number is not None]
    if len(inside) == len(numbers):
        return layers - min(inside)
    return 0 if all(map(stands_after_layers, run.trained)) else layers


def stands_after_layers(name: str) -> bool:
    """A parameter's name is a norm's or the output layer's."""
    return any(part in name for part in ("layernorm", "head", "output_layer"))


def layer_kept(run: Run) -> int:
    """Bytes that one layer keeps: positions x bytes per token."""
    return run.positions * sum(kept_bytes_per_token(run.layer).values())


def last_layer_kept(run: Run) -> float:
    """Bytes that the last layer keeps: as the others in plain.

    In ours its queries, MLP and output run on labelled positions only: positions x (what is kept at
    every position) + label share x (the rest, and the labelled queries, which are copied out).
    """
    whole = layer_kept(run)
    if not (run.ours and run.shape.is_last):
        return whole
    everywhere = run.positions * keys_side_kept(run.layer)
    queries = run.positions * run.element * run.shape.query
    return everywhere + run.label_share * (whole - everywhere + queries)


def layers_kept(run: Run) -> float:
    """Bytes that all layers keep without checkpointing: (layers - 1) x a layer + the last one."""
    layers = layers_in_graph(run)
    if layers == 0:
        return 0.0
    return layer_kept(run) * (layers - 1) + last_layer_kept(run) - first_norm_kept(run)


def first_norm_kept(run: Run) -> float:
    """Bytes of the first layer's first norm, which keeps nothing in ours under LoRA and P-Tuning
    v2: it stands before the first trained weight."""
    if run.ours and run.adapters and run.version != "v1" and run.shape.is_first:
        return run.positions * norms_kept(run.layer) / 2
    return 0


def checkpoints_kept(run: Run) -> int:
    """Bytes that checkpointing keeps: every layer's input, e x hidden x positions.

    Selective checkpointing also keeps matrix products and attention's results.
    """
    layers = layers_in_graph(run)
    kept = run.element * run.shape.hidden * run.positions * layers
    if run.selective:
        kept += run.positions * layers * products_kept(run.layer)
    return kept


def visibility_kept(run: Run) -> int:
    """Bytes of ChatGLM-6B's bool mask in ours, positions x keys, once for all layers."""
    whole = run.ours and layers_in_graph(run) == run.shape.layers
    return run.positions * run.layer.keys if whole and run.shape.infills else 0


def adapter_copies(run: Run) -> int:
    """Bytes of LoRA's adapters in the model's dtype, where they are fp32 beside a bf16 model."""
    copied = run.weight_element > run.element and run.train_type == "lora" and run.stage < 3
    return run.element * run.trained_count if copied else 0


def backward_work(run: Run) -> float:
    """Bytes that backward needs inside one layer, beyond what the forward pass has kept.

    The gradients that are alive at once; with checkpointing also what the layer keeps, which is
    computed again.
    """
    work = run.positions * working_bytes_per_token(run.layer)
    layers = layers_in_graph(run)
    if run.checkpointing:
        return work + (layer_kept(run) if layers > 1 else last_layer_kept(run))
    if run.ours and layers > 1:
        # The last layer works on labelled positions; when the one before it works, what the last
        # one kept is gone.
        return max(run.label_share * work, work - last_layer_kept(run))
    return work


def logits_and_loss(run: Run) -> float:
    """Bytes of the logits, the loss and their gradients.

    plain: batch x length x vocabulary x (12 + e): log-softmax, its gradient and the logits'
    gradient in fp32; the returned logits, which live to the step's end.
    ours: one piece of the logits at a time (chatglm/kernels.py), the labelled rows, and the output
    layer's own gradient, which is made in the forward pass.
    0 of a pipeline's stages before the last.
    """
    if not run.shape.is_last:
        return 0.0
    if not run.ours:
        return run.batch * run.length * run.shape.vocab * (12 + run.element)
    return logits_piece(run) + labelled_rows(run) + output_gradient(run)


def logits_piece(run: Run) -> float:
    """Bytes of a piece of the logits, in which their gradient is formed: rows x vocabulary x e, and
    an fp32 copy of half-precision ones, of a cache's worth of rows on a CPU."""
    vocab, e = run.shape.vocab, run.element
    rows = min(max(1, LOGITS_BYTES // (e * vocab)), run.label_share * run.positions)
    copied = min(max(1, CACHED_BYTES // (4 * vocab)), rows) if run.cpu else rows
    return rows * vocab * e + (copied * vocab * 4 if e < 4 else 0)


def labelled_rows(run: Run) -> float:
    """Bytes of the labelled rows before and after the final norm, and of their gradient:
    3 x labelled x hidden x e."""
    return 3 * (run.label_share * run.positions) * run.shape.hidden * run.element


def output_gradient(run: Run) -> int:
    """Bytes of the output layer's gradient, e x vocabulary x hidden, where it is trained."""
    return run.element * run.shape.vocab * run.shape.hidden if run.trains_output else 0
