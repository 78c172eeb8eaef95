"""Peak memory of a training run by part: a physical formula over what finetune/memory_shapes.py counts.

Peak = what stays (weights, optimizer, buffers) + the greater of two phases, the forward pass with its activations and logits (F) and
the step with its gradients and temporaries (S); both times what the allocator cannot hand out again. Three constants are fitted, on
the 27 A40 rows in finetune/memory_seeds.py; all else is counted. Free of torch. Bytes, unless a name says otherwise.
"""

from dataclasses import dataclass, field
from functools import cached_property

from finetune.memory_shapes import Shape, product_bytes_per_token, saved_bytes_per_token, working_bytes_per_token
from finetune.methods import METHODS

GIB, MIB = 2**30, 2**20
MODES = ("ours", "plain")
LOGITS_BYTES, CACHED_BYTES = 64 * MIB, MIB  # chatglm.kernels': of the logits at a time, and of their fp32 copy on a CPU


@dataclass(frozen=True)
class Constants:
    """What no count gives; `--compare_seeds --fit` finds them again."""

    # The CUDA context with every kernel of torch, cuBLAS's and NCCL's workspaces: 0.4 to 2 GiB by driver and version.
    context_gib: float = 1.5
    # Allocated blocks that are larger than asked, or too small for what comes next: 0 to 0.2 of all.
    reserve: float = 0.13
    # Share of the smaller phase (F or S) that the other's freed blocks cannot serve: blocks come back in other sizes. 0 to 1.
    unshared: float = 0.8


@dataclass(frozen=True)
class Zero:
    """A DeepSpeed file's zero_optimization, as far as memory goes; sizes in elements, DeepSpeed's own defaults."""

    stage: int = 2
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: float = 5e8
    prefetch: float = 5e7
    live: float = 1e9
    overlap: bool | None = None  # DeepSpeed: on for stage 3
    obeyed: bool = False  # says more than how ranks talk, so train.py keeps to its stage on one rank too (ds_file.stage_for)

    @property
    def overlaps(self) -> bool:
        return self.stage == 3 if self.overlap is None else self.overlap


@dataclass(frozen=True)
class Run:
    """A training run: what an estimate depends on. Lengths in tokens. `zero` None: plain torch, one process."""

    shape: Shape
    train_type: str = "lora"
    mode: str = "ours"
    batch: int = 16
    length: int = 1024
    checkpointing: bool = False
    selective: bool = False  # checkpointing that keeps the results of matrix products and of attention
    precision: str = "bf16"
    gpus: int = 1
    zero: Zero | None = field(default_factory=Zero)
    accumulation: int = 1
    lora_dim: int = 8
    lora_modules: tuple[str, ...] = ("query_key_value",)
    lora_dropout: float = 0.1
    freeze_names: tuple[str, ...] = ("layers.27.",)
    pre_seq_len: int = 16
    projection: bool = True
    version: str = "v2"
    label_share: float = 0.25  # of the real tokens; ours computes logits there only
    real_tokens: int | None = None  # of a step on one device; all rows at the longest when not given
    code: str | None = None  # of the model (memory_shapes.CODES): the original's for plain, packed for ours
    cpu: bool = False  # no CUDA context and no caching allocator

    def __post_init__(self):
        for name in ("batch", "length", "gpus", "accumulation", "lora_dim", "pre_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.label_share <= 1:
            raise ValueError(f"--label_share must be above 0 and at most 1, got {self.label_share}")
        if self.real_tokens is not None and not 1 <= self.real_tokens <= self.batch * self.length:
            raise ValueError(f"--real_tokens must be from 1 to batch x length = {self.batch * self.length}, got {self.real_tokens}")

    @property
    def ours(self) -> bool:
        return self.mode == "ours"

    @property
    def adapters(self) -> bool:
        return METHODS[self.train_type].saves != "model"

    @property
    def spared(self) -> bool:
        """On one rank, as train.py has it (ds_file.stage_for): no partitions, buckets or flattened gradients."""
        zero = self.zero
        alone = self.ours and self.gpus == 1 and not self.adapters and self.precision != "fp16"
        return bool(alone and zero and zero.stage < 3 and not (zero.obeyed or zero.offload_optimizer or zero.offload_param))

    @cached_property
    def trained(self) -> dict[str, int]:
        """{name: elements} of what is trained; raises ValueError where a name matches nothing."""
        shape = self.shape
        if self.train_type == "lora":
            return shape.lora(self.lora_dim, self.lora_modules)
        if self.train_type == "ptuning":
            return shape.prefix(self.pre_seq_len, self.projection, self.version)
        if self.train_type == "all":
            return shape.parameters
        lost = [part for part in self.freeze_names if not any(part in name for name in shape.parameters)]
        if lost or not self.freeze_names:
            raise ValueError(f"--freeze_module_name: {', '.join(map(repr, lost)) or 'an empty list'} matches no parameter of {shape.layers} layers")
        return {name: size for name, size in shape.parameters.items() if any(part in name for part in self.freeze_names)}

    @property
    def tokens(self) -> int:
        """Token positions of one forward pass: padded rows in `plain`, real tokens in `ours`."""
        return (self.real_tokens if self.ours else None) or self.batch * self.length


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, summing to `total`; `cache` of them the allocator gives back when the card is full."""

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


def activations(run: Run) -> tuple[float, float, float]:
    """(kept through the forward pass, one layer's work in backward, logits and loss)."""
    shape, e = run.shape, 4 if run.precision == "fp32" else 2
    code = run.code or (("packed-cpu" if run.cpu else "packed") if run.ours else "original")
    virtual = run.pre_seq_len if run.train_type == "ptuning" else 0
    tokens = run.tokens + (virtual * run.batch if run.version == "v1" else 0)
    keys = run.length + virtual
    full = not run.adapters
    lora = tuple(n.rsplit(".", 1)[-1] for n in shape.linears) if run.lora_modules == ("all",) else run.lora_modules
    # Of the adapters' arithmetic. Ours is in the model's dtype (finetune/lora.py), but for ZeRO-3, which peft's own fp32 serves.
    peft = not run.ours or (run.zero is not None and run.zero.stage == 3)
    wide = 4 if run.precision == "fp32" or (run.ours and peft and run.precision == "bf16") else e
    saved = saved_bytes_per_token(
        shape, code, keys=keys, element=e, trained=full, lora=lora if run.train_type == "lora" else (), lora_rank=run.lora_dim,
        lora_element=wide, lora_dropout=run.lora_dropout > 0, mask_element=e if run.cpu else 1,
    )  # fmt: skip
    layer = last = tokens * sum(saved.values())
    if run.ours:  # the last layer's queries, MLP and output run on labelled positions only; its first norm, queries and keys everywhere
        first = saved["norms"] / 2 + e * (shape.query + 2 * shape.kv)
        if full:
            first += e * shape.hidden
        elif run.train_type == "lora" and "query_key_value" in lora:
            first += (wide + (e if run.cpu else 1) if run.lora_dropout else wide) * shape.hidden + wide * run.lora_dim
        # The labelled queries are copied out.
        last = tokens * first + run.label_share * (layer - tokens * first + tokens * e * shape.query)
    work = tokens * working_bytes_per_token(shape, code, keys=keys, element=e)
    layers = shape.layers
    if run.train_type == "freeze" and (run.ours or not run.checkpointing):
        # The graph begins at the first trained weight; but the seeds, to checkpoint, let it begin at the embeddings.
        blocks = [shape.layer_of(name) for name in run.trained]
        if None not in blocks:
            layers -= min(blocks)
        elif all("layernorm" in name or "head" in name or "output_layer" in name for name in run.trained):
            layers = 0
    if run.checkpointing:
        kept = e * shape.hidden * tokens * layers
        if run.selective:
            targets = lora if run.train_type == "lora" else ()
            kept += tokens * layers * product_bytes_per_token(shape, element=e, lora=targets, lora_rank=run.lora_dim, lora_element=wide)
        work += layer if layers > 1 else last
    else:
        kept = layer * (layers - 1) + last if layers else 0.0
        if run.ours and layers > 1:  # when the last layer but one works, what the last one kept is gone
            work = max(run.label_share * work, work - last)
    if run.ours and layers == shape.layers:
        if run.adapters and run.version != "v1" and not run.checkpointing:
            kept -= tokens * saved["norms"] / 2  # the first norm stands before the first trained weight
        if shape.glm1:
            kept += tokens * keys  # bool visibility, once for all layers
    if run.ours:
        labelled, vocab = run.label_share * tokens, shape.vocab
        # A piece of the logits, their gradient formed in it, in fp32: a cache's worth on a CPU. The labelled rows before and after
        # the final norm and their gradient. The output layer's own gradient, made in the forward pass.
        rows = min(max(1, LOGITS_BYTES // (e * vocab)), labelled)
        scratch = min(max(1, CACHED_BYTES // (4 * vocab)), rows) if run.cpu else rows
        head = rows * vocab * e + (scratch * vocab * 4 if e < 4 else 0) + 3 * labelled * shape.hidden * e
        if run.train_type == "all" or any(".output_layer." in name or "lm_head" in name for name in run.trained):
            head += e * vocab * shape.hidden
    else:
        # log-softmax, its gradient and the logits' gradient in fp32; the returned logits, which live to the step's end
        head = run.batch * run.length * shape.vocab * (12 + e)
    return kept, work, head


def estimate(run: Run, constants: Constants | None = None) -> Estimate:
    """Peak memory of one GPU (or process) by part, and of the host."""
    constants = constants or Constants()
    shape, zero, n = run.shape, run.zero, run.gpus
    e = 4 if run.precision == "fp32" else 2
    if run.spared and e == 4:
        zero = None  # what remains is torch's optimizer
    sizes = run.trained
    count, largest = sum(sizes.values()), max(sizes.values())
    wide = 4 if e == 4 or (run.ours and run.adapters and run.precision == "bf16") else e  # of a trained weight
    grad = 4 if wide == 4 or (run.ours and run.precision == "bf16") else e  # ours sums bf16's gradients in fp32
    stage = zero.stage if zero else 0
    share = n if stage >= 1 else 1
    offload = bool(zero and zero.offload_optimizer)
    base = shape.total + (count if run.adapters else 0)

    weights = e * (base - count) + wide * count
    masters = 0 if not zero or (stage == 0 and wide == 4) else 4
    adam = 8 if zero else 2 * wide
    optimizer = (masters + adam) * count / share
    gradients = grad * count / (share if stage >= 2 else 1)
    piece = min(largest, count / share)
    # Gradients flattened and made fp32 for the step, or DeepSpeed's norm of the largest in fp64; never both.
    # Without DeepSpeed torch's AdamW, which ours asks to be fused.
    step = max((grad + (4 if grad < 4 else 0)) * count / share, 8 * piece) if zero else 0 if run.ours else wide * largest
    whole = grad * largest  # a gradient before it is partitioned
    if run.ours and not zero and not (shape.tied and run.train_type == "all"):
        whole = 0.0  # autograd hands its tensor over; a tied one waits for the other's
    buffers = cache = 0.0
    if zero and run.spared:
        step, whole = 0.0, (e + grad) * largest  # BF16_Optimizer: a gradient and its fp32 copy, added to the sum there is
    elif stage in (1, 2):
        buffers = zero.reduce_bucket * (wide if run.adapters else e) * (2 if zero.overlaps else 1)
        if n > 1:
            # Reduced in a copy that joins the slices of several ranks: a bucket's, or those of a weight too large for it
            # (collected until they exceed a bucket). One rank's single slice needs no copy.
            bucket = zero.reduce_bucket
            whole += grad * max(min(count, bucket), min(largest, bucket + count / n) if largest > bucket else 0)
    if stage == 3:
        weights = 0.0 if zero.offload_param else weights / n
        biggest = max(shape.parameters.values())
        gathered = e * max(biggest, min(shape.total, zero.live))
        buffers = zero.reduce_bucket * (wide if run.adapters else e) + gathered
        if largest > zero.reduce_bucket or (shape.tied and run.train_type == "all"):
            whole *= 2  # a tied output layer's gradient waits for the embedding's; then their sum is reduced from a copy
        # fp32 gradients of a sub-group (1e9 elements) for the step, or in backward of one weight; the norm by pieces of 2.5e8.
        step = max(0 if offload else 4 * min(count / n, 1e9), (grad + 4) * largest / n, 8 * min(250e6, largest / n))
        if zero.overlaps:
            # Gathers and reductions on streams of their own: the host runs ahead of the device, and a block is used again only
            # when the other stream has passed it. In the end every weight and gradient has had a block (PyTorch's FSDP
            # limits its gathers for this reason).
            cache = max(0.0, e * shape.total - gathered) + max(0.0, e * count - whole)
    if offload:
        optimizer, gradients = 0.0, 0.0
        step = 8 * piece if stage < 3 else step
    kept, work, head = activations(run)
    if run.ours and run.train_type == "lora" and wide > e and stage < 3:
        kept += e * count  # the adapters in the model's dtype

    # Gradients stay through the next forward pass only where several passes make one step; BF16_Optimizer's sums always do.
    waiting = gradients if run.accumulation > 1 or (zero and run.spared) else 0.0
    forward = kept + max(head, work)
    backward = (gradients - waiting) + whole + step
    unshared = 0.0 if run.cpu else constants.unshared
    parts = {
        "weights": weights, "gradients": gradients + whole, "optimizer": optimizer, "optimizer step": step,
        "activations": kept + max(0.0, work - head), "logits and loss": head, "ZeRO buffers": buffers,
        "reused between phases": -(1 - unshared) * min(forward, backward),
    }  # fmt: skip
    if not run.cpu:
        parts["allocator reserve"] = constants.reserve * sum(parts.values())
        parts["CUDA context"] = constants.context_gib * GIB
        parts["ZeRO-3 gather cache"] = cache
    return Estimate({k: v for k, v in parts.items() if v or k in ("weights", "gradients", "optimizer", "activations")}, host_memory(run, count), cache)


# Of a process with torch and DeepSpeed, pinned staging included: G.3's host RAM grows by 5.1 GB with each GPU.
PROCESS_HOST = 5.0e9


def host_memory(run: Run, count: int) -> dict[str, float]:
    """Of all processes of one machine."""
    zero, e = run.zero, 4 if run.precision == "fp32" else 2
    if run.cpu:
        return {}
    parts = {"processes": PROCESS_HOST * run.gpus, "loading": float(e * run.shape.total)}
    if zero and zero.offload_optimizer:
        parts["offloaded optimizer"] = 18.0 * count  # masters, Adam's two, fp32 gradients; half-precision ones pinned
    if zero and zero.stage == 3 and zero.offload_param:
        parts["offloaded weights"] = 2.0 * e * run.shape.total  # partitions, and the pinned buffers they pass through
    return parts
