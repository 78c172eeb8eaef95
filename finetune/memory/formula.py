"""Peak memory of a training run: a sum of named parts, each a function of the run.

Peak = what stays (weights, optimizer, buffers) + the larger of two phases, the forward pass
(activations and logits) and the step (gradients and temporaries); both times what the allocator
cannot reuse. Three constants are fitted, on the 27 A40 rows in finetune/memory/published.py; all
else is counted. docs/results.md (Memory) has one run's parts side by side.

Every part is bytes on one GPU (or of one process). In the formulas N is the number of trained
elements and L that of the largest trained parameter; e, w and g are the bytes of an activation, of
a trained weight and of a gradient (Run.element, weight_element, gradient_element). DeepSpeed's
terms are those of ZeRO (Rajbhandari et al., 2020), sizes those of its code. Free of torch.
"""

from dataclasses import dataclass, replace

from finetune.memory.activations import activations, backward_work, logits_and_loss
from finetune.memory.cards import GIB
from finetune.memory.run import Run

# Elements that DeepSpeed's ZeRO-3 steps at a time (sub_group_size), and takes a norm of.
SUB_GROUP, NORM_PIECE = 1e9, 250e6
# Of a process with torch and DeepSpeed, pinned staging included: the published host RAM grows by
# 5.1 GB with each GPU.
PROCESS_HOST = 5.0e9
ALWAYS_SHOWN = ("weights", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Constants:
    """Fitted constants, for what cannot be counted; `--compare_seeds --fit` fits them again.

    Attributes:
        context_gib: the CUDA context with every kernel of torch, cuBLAS's and NCCL's workspaces:
            0.4 to 2 GiB by driver and version.
        reserve: allocated blocks that are larger than asked, or too small for what comes next: 0 to
            0.2 of all.
        unshared: share of the smaller phase that the other's freed blocks cannot serve, for blocks
            come back in other sizes: 0 to 1.
    """

    context_gib: float = 1.5
    reserve: float = 0.13
    unshared: float = 0.8


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, summing to `total`.

    Attributes:
        host: bytes of all processes on the host.
        cache: of the total, what the allocator gives back when the card is full.
    """

    parts: dict[str, float]
    host: dict[str, float]
    cache: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """What must fit the card."""
        return self.total - self.cache

    def reading(self, card: float) -> float:
        """What nvidia-smi shows on a card of that many bytes."""
        return max(self.needed, min(self.total, card))


def estimate(run: Run, constants: Constants | None = None) -> Estimate:
    """Peak memory of one GPU (or process) by part, and of the host; of a pipeline's stages that of
    the one that needs most.

    Raises:
        ValueError: the run trains what the model does not have.
    """
    constants = constants or Constants()
    if run.stages > 1:
        return largest_stage(run, constants)
    parts = counted_parts(run)
    parts["reused between phases"] = -reused(run, parts, constants)
    if not run.cpu:
        parts["allocator reserve"] = constants.reserve * sum(parts.values())
        parts["CUDA context"] = constants.context_gib * GIB
        parts["ZeRO-3 gather cache"] = gather_cache(run)
    shown = {name: size for name, size in parts.items() if size or name in ALWAYS_SHOWN}
    return Estimate(shown, host_memory(run), gather_cache(run))


def largest_stage(run: Run, constants: Constants) -> Estimate:
    """The estimate of the pipeline's stage that needs most, with the host's of the whole run."""
    first, *others = run.of_stages()
    largest = estimate(first, constants)
    for one in others:
        estimated = estimate(one, constants)
        if estimated.needed > largest.needed:
            largest = estimated
    return replace(largest, host=host_memory(run))


def counted_parts(run: Run) -> dict[str, float]:
    """{part: bytes} of all that is counted, as if nothing were freed."""
    logits = logits_and_loss(run)
    return {
        "weights": weights(run),
        "gradients": gradients(run) + passing_gradient(run),
        "optimizer": optimizer_states(run),
        "optimizer step": step_temporaries(run),
        "activations": held_activations(run) + max(0.0, backward_work(run) - logits),
        "logits and loss": logits,
        "reward model": run.element * run.scorer.total if run.scorer else 0.0,
        "rollout": max(0.0, rollout_cache(run) - held_activations(run) - logits),
        "ZeRO buffers": zero_buffers(run),
        "between stages": between_stages(run),
    }


def reused(run: Run, parts: dict[str, float], constants: Constants) -> float:
    """Bytes of the smaller of the two phases that the larger one's blocks serve: (1 - unshared) of
    it, all on a CPU."""
    staying = waiting_gradients(run)
    forward = held_activations(run) + max(logits_and_loss(run), backward_work(run))
    step = (gradients(run) - staying) + passing_gradient(run) + parts["optimizer step"]
    unshared = 0.0 if run.cpu else constants.unshared
    return (1 - unshared) * min(forward, step)


def held_activations(run: Run) -> float:
    """Bytes of what the forward passes of the model and of a critic keep for backward."""
    return run.passes * (1 + run.trained_copies) * activations(run)


def between_stages(run: Run) -> float:
    """Bytes of the hidden states that a pipeline's stage has received, e x hidden x positions: two
    copies of each pass held, one in which they come, and one for their gradient.
    """
    if run.shape.is_first and run.shape.is_last:
        return 0.0
    received = 0 if run.shape.is_first else 2 * run.passes + 1
    return float((received + 1) * run.element * run.shape.hidden * run.positions)


def rollout_cache(run: Run) -> float:
    """Bytes of the keys and values of the answers that are sampled at once, 2 e a layer, head and
    token. They are gone before the activations come.
    """
    shape = run.shape
    token = 2 * run.element * shape.layers * shape.kv_heads * shape.head_dim
    return float(token * run.rollout_rows * run.length)


# ---- weights, gradients, optimizer


def weights(run: Run) -> float:
    """Bytes of all weights: e of a frozen one, w of a trained one; a rank's part under ZeRO-3, none
    where it is offloaded."""
    frozen = run.weight_count - run.trained_count
    whole = run.element * frozen + run.weight_element * run.trained_count
    if run.stage < 3:
        return whole
    return 0.0 if run.zero_settings.offload_param else whole / run.gpus


def gradients(run: Run) -> float:
    """Bytes of the gradients that are there when backward ends: g N, a rank's part from ZeRO-2 on;
    0 where the optimizer is offloaded, which takes them as they come."""
    if run.offloads_optimizer:
        return 0.0
    return run.gradient_element * run.trained_count / run.gradient_ranks


def waiting_gradients(run: Run) -> float:
    """Bytes of the gradients that stay through the next forward pass: all, where several passes
    make one step, and BF16_Optimizer's sums always."""
    return gradients(run) if run.accumulation > 1 or run.bf16_optimizer else 0.0


def passing_gradient(run: Run) -> float:
    """Bytes of one weight's whole gradient, on its way into the sum or to the ranks: g L.

    BF16_Optimizer: (e + g) L, the gradient and its fp32 copy. Torch's optimizer in ours: 0, for
    autograd hands its tensor over; a tied weight's waits for the other's.
    """
    whole = run.gradient_element * run.largest_trained
    if run.bf16_optimizer:
        return (run.element + run.gradient_element) * run.largest_trained
    if run.deepspeed is None:
        return 0.0 if run.ours and not run.trains_tied else whole
    if run.stage == 3:
        return whole * (2 if reduces_copy(run) else 1)
    return whole + reduce_copies(run)


def reduces_copy(run: Run) -> bool:
    """ZeRO-3 reduces a copy of the largest gradient: one too large for a bucket, or a tied output
    layer's, which waits for the embedding's until their sum is reduced."""
    return run.largest_trained > run.zero_settings.reduce_bucket or run.trains_tied


def reduce_copies(run: Run) -> float:
    """Bytes of the copy in which ZeRO-1 and 2 reduce gradients on several ranks.

    It joins the slices of several ranks: a bucket's, g min(N, bucket), or those of a weight too
    large for it, which are collected until they exceed a bucket: g min(L, bucket + N / ranks). One
    rank's single slice needs no copy.
    """
    if run.stage == 0 or run.gpus == 1:
        return 0
    count, largest, bucket = run.trained_count, run.largest_trained, run.zero_settings.reduce_bucket
    outgrown = min(largest, bucket + count / run.gpus) if largest > bucket else 0
    return run.gradient_element * max(min(count, bucket), outgrown)


def optimizer_states(run: Run) -> float:
    """Bytes of Adam's two states and of fp32 masters: 2 w N with torch's optimizer; (8 + 4) N with
    DeepSpeed, a rank's part from ZeRO-1 on; 0 where they are offloaded.

    Stage 0 keeps no masters of fp32 weights.
    """
    if run.offloads_optimizer:
        return 0.0
    if run.deepspeed is None:
        return 2 * run.weight_element * run.trained_count / run.optimizer_ranks
    masters = 0 if run.stage == 0 and run.weight_element == 4 else 4
    return (masters + 8) * run.trained_count / run.optimizer_ranks


def step_temporaries(run: Run) -> float:
    """Bytes that the optimizer's step takes and gives back.

    Torch's AdamW: w L, 0 in ours, which asks for the fused one. BF16_Optimizer: 0. ZeRO: the larger
    of the gradients, flattened and made fp32, and of the norm of the largest in fp64, 8 L; never
    both. Offloaded, the norm alone.
    """
    if run.bf16_optimizer:
        return 0.0
    if run.deepspeed is None:
        return 0 if run.ours else run.weight_element * run.largest_trained
    if run.stage == 3:
        return stage3_temporaries(run)
    count = run.trained_count / run.optimizer_ranks
    norm = 8 * min(run.largest_trained, count)
    if run.offloads_optimizer:
        return norm
    widened = 4 if run.gradient_element < 4 else 0
    return max((run.gradient_element + widened) * run.trained_count / run.optimizer_ranks, norm)


def stage3_temporaries(run: Run) -> float:
    """Bytes of ZeRO-3's step: the largest of the fp32 gradients of a sub-group, 4 min(N / ranks,
    1e9), not offloaded; of one weight's in backward, (g + 4) L / ranks; of the norm in fp64, by
    pieces of 2.5e8, 8 L / ranks."""
    grouped = 4 * min(run.trained_count / run.gpus, SUB_GROUP)
    return max(
        0 if run.offloads_optimizer else grouped,
        (run.gradient_element + 4) * run.largest_trained / run.gpus,
        8 * min(NORM_PIECE, run.largest_trained / run.gpus),
    )


# ---- ZeRO's buffers


def zero_buffers(run: Run) -> float:
    """Bytes of ZeRO's communication buffers: from stage 1 on a bucket of gradients, two where they
    overlap with backward; in stage 3 one, and the gathered weights."""
    if run.stage == 0 or run.bf16_optimizer:
        return 0.0
    element = run.weight_element if run.adapters else run.element
    bucket = run.zero_settings.reduce_bucket * element
    if run.stage == 3:
        return bucket + gathered_weights(run)
    return bucket * (2 if run.zero_settings.overlaps else 1)


def gathered_weights(run: Run) -> float:
    """Bytes of the weights that ZeRO-3 has gathered at once: e x max_live_parameters, at least the
    largest parameter and at most all."""
    live = min(run.shape.total, run.zero_settings.live)
    return run.element * max(max(run.shape.parameters.values()), live)


def gather_cache(run: Run) -> float:
    """Bytes of blocks that ZeRO-3's overlapping streams leave behind: e of every weight beyond the
    gathered ones, and e of every gradient beyond the passing one.

    Gathers and reductions run on streams of their own: the host runs ahead of the device, and a
    block is used again only when the other stream has passed it. In the end every weight and
    gradient has had a block (PyTorch's FSDP limits its gathers for this reason).
    """
    if run.stage != 3 or not run.zero_settings.overlaps:
        return 0.0
    weights_left = run.element * run.shape.total - gathered_weights(run)
    gradients_left = run.element * run.trained_count - passing_gradient(run)
    return max(0.0, weights_left) + max(0.0, gradients_left)


# ---- the host


def host_memory(run: Run) -> dict[str, float]:
    """{part: bytes} of all processes of one machine; empty on a CPU.

    Offloaded: 18 N of masters, Adam's two, fp32 gradients and pinned half-precision ones; ZeRO-3's
    weights twice, as partitions and in the pinned buffers that they pass through.
    """
    zero = run.zero
    if run.cpu:
        return {}
    model = float(run.element * run.shape.total)
    parts = {"processes": PROCESS_HOST * run.gpus, "loading": model}
    if zero and zero.offload_optimizer:
        parts["offloaded optimizer"] = 18.0 * run.trained_count
    if zero and zero.stage == 3 and zero.offload_param:
        parts["offloaded weights"] = 2.0 * model
    return parts
