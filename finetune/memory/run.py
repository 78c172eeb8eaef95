"""A training run, as far as its memory goes: what an estimate depends on. Free of torch."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from finetune.flags import LARGEST_COUNT
from finetune.memory.layers import Code, Layer
from finetune.memory.shapes import ModelShape, short_name
from finetune.methods import METHODS


@dataclass(frozen=True)
class Zero:
    """A DeepSpeed file's zero_optimization, as far as memory goes; defaults are DeepSpeed's own.

    Attributes:
        reduce_bucket, live: reduce_bucket_size and stage3_max_live_parameters, in elements.
        overlap: overlap_comm; None for DeepSpeed's choice, which is on for stage 3.
        obeyed: the file sets more than communication between ranks, so train.py keeps its stage on
            one rank too (stage_for).
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: float = 5e8
    live: float = 1e9
    overlap: bool | None = None
    obeyed: bool = False

    @property
    def overlaps(self) -> bool:
        return self.stage == 3 if self.overlap is None else self.overlap


@dataclass(frozen=True)
class Run:
    """A training run. Lengths in tokens.

    Attributes:
        mode: "ours" is this project's loop: packed rows, logits at labelled tokens alone. "plain"
            is the published runs': padded rows, full logits.
        selective: checkpointing that keeps the results of matrix products and of attention.
        zero: None for plain torch, one process.
        sequences: of at most `length` tokens that a row of the batch is: 2 of a pair of answers.
        label_share: labelled tokens, of the real ones; "ours" computes logits there only.
        real_tokens: of a step on one device; None for all rows at the longest.
        code: of the model; None for the original's in "plain" and for packed rows' in "ours".
        cpu: no CUDA context and no caching allocator.
        frozen_copies, trained_copies: models beside the trained one, a reference and a critic; of
            adapters they share the frozen weights.
        rollout_rows: sequences whose keys and values are held at once while answers are sampled.
        scorer: the model that scores answers.
        scores: it ends in a value head, so its output layer is frozen unless it is the embedding.
        stages: GPUs that hold one model together, as a pipeline.
        passes: forward passes whose activations are held at a time.
    """

    shape: ModelShape
    train_type: str = "lora"
    mode: Literal["ours", "plain"] = "ours"
    batch: int = 16
    length: int = 1024
    checkpointing: bool = False
    selective: bool = False
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
    sequences: int = 1
    label_share: float = 0.25
    real_tokens: int | None = None
    code: Code | None = None
    cpu: bool = False
    frozen_copies: int = 0
    trained_copies: int = 0
    rollout_rows: int = 0
    scorer: ModelShape | None = None
    scores: bool = False
    stages: int = 1
    passes: int = 1

    def __post_init__(self):
        counts = ("batch", "sequences", "length", "gpus", "accumulation", "lora_dim", "pre_seq_len")
        for name in counts:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value > LARGEST_COUNT:
                raise ValueError(f"{name} must be at most {LARGEST_COUNT}, got {str(value)[:20]}")
        if self.gpus % self.stages:
            raise ValueError(
                f"--num_stages {self.stages} needs a multiple of {self.stages} GPUs, "
                f"got {self.gpus}"
            )
        if not 0 < self.label_share <= 1:
            raise ValueError(f"--label_share must be above 0 and at most 1, got {self.label_share}")
        most = self.batch * self.sequences * self.length
        if self.real_tokens is not None and not 1 <= self.real_tokens <= most:
            raise ValueError(
                f"--real_tokens must be from 1 to batch x length = {most}, got {self.real_tokens}"
            )

    # ---- what is trained

    @property
    def ours(self) -> bool:
        return self.mode == "ours"

    @property
    def adapters(self) -> bool:
        """Whether the model is frozen, and what is trained stands beside it."""
        return METHODS[self.train_type].saves != "model"

    @cached_property
    def trained(self) -> dict[str, int]:
        """{name: elements} of what is trained; raises ValueError where a name matches nothing."""
        if not self.scores:
            return self.named
        return {name: count for name, count in self.named.items() if not self.is_output(name)}

    def is_output(self, name: str) -> bool:
        """Whether a weight is the output layer's alone."""
        return not self.shape.tied and (".output_layer." in name or "lm_head" in name)

    @cached_property
    def named(self) -> dict[str, int]:
        """{name: elements} of what the method trains."""
        shape = self.shape
        if self.train_type == "lora":
            return shape.lora(self.lora_dim, self.lora_modules)
        if self.train_type == "ptuning":
            return shape.prefix(self.pre_seq_len, self.projection, self.version)
        if self.train_type == "all":
            return shape.parameters
        if self.train_type == "freeze":
            return matching(shape, self.freeze_names)
        raise ValueError(f"--estimate_memory does not know --train_type {self.train_type}")

    @cached_property
    def trained_count(self) -> int:
        """Elements of all that is trained, a critic's among them, which has no output layer."""
        output = sum([n for name, n in self.trained.items() if self.is_output(name)])
        return self.own_trained + self.trained_copies * (self.own_trained - output)

    @property
    def own_trained(self) -> int:
        """Elements that train of one model."""
        return sum(self.trained.values())

    @property
    def weight_count(self) -> int:
        """Elements of all weights: copies of adapters share their base."""
        copies = self.frozen_copies + self.trained_copies
        if self.adapters:
            return self.shape.total + self.own_trained * (1 + copies)
        return self.shape.total * (1 + copies)

    @cached_property
    def largest_trained(self) -> int:
        """Elements of the largest parameter that is trained."""
        return max(self.trained.values(), default=0)

    @property
    def trains_tied(self) -> bool:
        """Whether one weight is trained as both the embedding and the output layer."""
        return self.shape.tied and self.train_type == "all"

    @property
    def trains_output(self) -> bool:
        """Whether the output layer is trained."""
        if self.trains_tied:
            return True
        return any(".output_layer." in name or "lm_head" in name for name in self.trained)

    def of_stages(self) -> list["Run"]:
        """What one GPU of each stage runs.

        Of P stages the one of number s (from 0) holds P - s micro batches (arXiv 2104.04473
        section 2.2), but not more than a step has.

        Raises:
            ValueError: the model has fewer layers than stages.
        """
        runs = []
        for stage, shape in enumerate(self.shape.stages(self.stages)):
            passes = min(self.accumulation, self.stages - stage)
            gpus = self.gpus // self.stages
            runs.append(replace(self, shape=shape, gpus=gpus, stages=1, passes=passes))
        return runs

    # ---- precision, in bytes

    @property
    def element(self) -> int:
        """Bytes of an activation, and of a frozen weight."""
        return 4 if self.precision == "fp32" else 2

    @property
    def weight_element(self) -> int:
        """Bytes of a trained weight: ours keeps adapters in fp32 beside a model in bf16."""
        widened = self.ours and self.adapters and self.precision == "bf16"
        return 4 if widened else self.element

    @property
    def gradient_element(self) -> int:
        """Bytes of a gradient: its weight's, but ours sums bf16's in fp32."""
        return 4 if self.ours and self.precision == "bf16" else self.weight_element

    @property
    def lora_element(self) -> int:
        """Bytes of LoRA's arithmetic: the model's dtype (finetune/lora.py); in ours under ZeRO-3,
        where peft's own linear runs, the adapters'."""
        peft = self.zero is not None and self.zero.stage == 3
        return self.weight_element if self.ours and peft else self.element

    # ---- DeepSpeed

    @property
    def zero_dropped(self) -> bool:
        """Whether train.py leaves ZeRO out, on one rank (stage_for): then there are no partitions,
        buckets or flattened gradients."""
        zero = self.zero
        if zero is None or zero.stage == 3 or zero.obeyed:
            return False
        if zero.offload_optimizer or zero.offload_param:
            return False
        alone = self.ours and self.gpus == 1
        return alone and not self.adapters and self.precision != "fp16"

    @property
    def deepspeed(self) -> Zero | None:
        """DeepSpeed's settings; None where torch's optimizer runs alone: in fp32 without ZeRO."""
        return None if self.zero_dropped and self.precision == "fp32" else self.zero

    @property
    def zero_settings(self) -> Zero:
        """`deepspeed`. Raises ValueError without DeepSpeed."""
        if self.deepspeed is None:
            raise ValueError("torch's optimizer runs alone: there are no ZeRO settings")
        return self.deepspeed

    @property
    def bf16_optimizer(self) -> bool:
        """Whether DeepSpeed's BF16_Optimizer runs: bf16 without ZeRO."""
        return self.zero_dropped and self.deepspeed is not None

    @property
    def stage(self) -> int:
        """ZeRO's stage; 0 without DeepSpeed."""
        return self.deepspeed.stage if self.deepspeed else 0

    @property
    def offloads_optimizer(self) -> bool:
        return self.deepspeed is not None and self.deepspeed.offload_optimizer

    @property
    def optimizer_ranks(self) -> int:
        """Ranks among which the optimizer's states are split: from ZeRO-1 on."""
        return self.gpus if self.stage >= 1 else 1

    @property
    def gradient_ranks(self) -> int:
        """Ranks among which gradients are split: from ZeRO-2 on."""
        return self.gpus if self.stage >= 2 else 1

    # ---- tokens

    @property
    def tokens(self) -> int:
        """Token positions of one forward pass: padded rows in `plain`, real tokens in `ours`."""
        whole = self.batch * self.sequences * self.length
        return (self.real_tokens if self.ours else None) or whole

    @property
    def virtual_tokens(self) -> int:
        """P-Tuning's tokens of a row."""
        return self.pre_seq_len if self.train_type == "ptuning" else 0

    @property
    def positions(self) -> int:
        """Positions that layers compute: the tokens, and P-Tuning v1's, which are embeddings."""
        rows = self.batch * self.sequences
        embedded = self.virtual_tokens * rows if self.version == "v1" else 0
        return self.tokens + embedded

    @cached_property
    def layer(self) -> Layer:
        """A layer of the model, as this run computes it."""
        modules = self.shape.split_qkv(self.lora_modules)
        if modules == ("all",):
            modules = tuple(short_name(name) for name in self.shape.linears)
        packed: Code = "packed-cpu" if self.cpu else "packed"
        return Layer(
            self.shape,
            self.code or (packed if self.ours else "original"),
            keys=self.length + self.virtual_tokens,
            element=self.element,
            trained=not self.adapters,
            lora=modules if self.train_type == "lora" else (),
            lora_rank=self.lora_dim,
            lora_element=self.lora_element,
            lora_dropout=self.lora_dropout > 0,
            mask_element=self.element if self.cpu else 1,
        )


def matching(shape: ModelShape, names: tuple[str, ...]) -> dict[str, int]:
    """{name: elements} of the parameters whose names contain one of `names`.

    Raises:
        ValueError: there are no names, or one is in no parameter's.
    """
    parameters = shape.parameters
    unmatched = [part for part in names if not any(part in name for name in parameters)]
    if unmatched or not names:
        listed = ", ".join(map(repr, unmatched)) or "an empty list"
        raise ValueError(
            f"--freeze_module_name: {listed} matches no parameter of {shape.layers} layers"
        )
    matches = {}
    for name, size in parameters.items():
        if any(part in name for part in names):
            matches[name] = size
    return matches
