"""The flags of a training run in groups: each a frozen dataclass with the checks of its own fields.

A program's configuration (config.py, predictor/config.py) inherits the groups that it needs. Free
of torch.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from chatglm.checksums import LEVELS
from chatglm.conversations import GLM3_LABELS
from chatglm.families import FAMILIES
from chatglm.raw_prompts import PROMPT_STYLES
from finetune.evaluation.metrics import parse_metrics
from finetune.files import CACHE_GB
from finetune.flags import fixed_flag, flag, parse_checkpointing
from finetune.methods import METHODS
from finetune.record import LOGGERS
from finetune.rows.formats import FORMATS, parse_columns

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LORA_STARTS = re.compile(r"default|gaussian|orthogonal|olora|pissa|pissa_niter_\d+")
CHECKPOINTED_LAYERS = re.compile(r"[1-9]\d*|\d+-\d+")


def check_share(name: str, value: float) -> None:
    """Raises ValueError for a share or a dropout outside of [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"--{name} must be in [0, 1); got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError for a number that is below 0, infinite or not a number."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"--{name} must be a number not below 0; got {value}")


# The names of train.TASKS.
TASK_NAMES = ("finetune", "pretrain", "reward", "dpo", "grpo", "ppo", "predictor")


def task_flag(name: str) -> Any:
    """The field --task of the configuration of that task."""
    return fixed_flag(
        name,
        "what is trained: answers to questions (finetune), whole texts (pretrain), a model that "
        "scores answers (reward), a preference for the better of two answers (dpo), the rewards "
        "of sampled answers (grpo; ppo with a critic), or a predictor of the length of answers; "
        "--task NAME --help shows that one's flags",
        choices=TASK_NAMES,
    )


@dataclass(frozen=True)
class ModelFlags:
    """What is trained, and from which folder."""

    task: str = task_flag("finetune")
    model_name_or_path: str = fixed_flag("", "folder of the base model (required)")
    mode: str | None = fixed_flag(
        None, "model family; found in the folder when not given", choices=tuple(FAMILIES)
    )
    prompt_style: str | None = fixed_flag(
        None,
        "chat: the family's prompts; raw: the text alone, as base models go on with it "
        "[as the folder was trained, else chat]",
        choices=PROMPT_STYLES,
    )


@dataclass(frozen=True)
class DataFlags:
    """Which rows are read, of any task. Lengths are in tokens."""

    train_path: str = fixed_flag(
        "",
        "training rows (required): comma list of files (.json, .jsonl, .csv, .tsv, .parquet, .gz), "
        "folders, patterns, hf://NAME or ms://NAME; FILE:0.3 reads 0.3 of its rows an epoch",
    )
    eval_path: str = flag(
        "", "evaluation rows; gives loss (and F1) during training and a best checkpoint"
    )
    # None only until the configuration fills in the default.
    max_src_len: int = fixed_flag(
        None,
        "longest prompt in tokens [256, or half of a --max_len that is not above 256]",
        positive=True,
    )
    on_bad_row: str = fixed_flag(
        "error", "what to do with a malformed row", choices=("error", "skip")
    )
    dataset_length: int | None = fixed_flag(
        None, "use only the first N rows of each entry of --train_path", positive=True
    )
    data_cache: str = flag(
        "~/.cache/glm-foundry",
        "folder of tokenised rows, keyed by content and settings; '' for none",
    )
    data_cache_gb: float = flag(
        CACHE_GB, "largest size of --data_cache in GB; the least recently used files are deleted"
    )

    def check_data(self) -> None:
        """Raises ValueError where the cache has no room."""
        if not self.data_cache_gb > 0:
            raise ValueError(f"--data_cache_gb must be above 0; got {self.data_cache_gb}")


@dataclass(frozen=True)
class RowFlags:
    """How rows of questions and answers are read and encoded. Lengths are in tokens."""

    data_format: str = fixed_flag(
        "auto",
        "format of the rows; auto: detected row by row from the keys",
        choices=("auto", *FORMATS),
    )
    columns: str = fixed_flag(
        "", 'maps our field names to your columns: "prompt=question,response=answer"'
    )
    glm3_labels: str = fixed_flag(
        GLM3_LABELS[0],
        "ChatGLM3: loss on an answer's role token, as in ChatGLM-Finetuning, "
        "or not, as in ChatGLM3's demo",
        choices=GLM3_LABELS,
    )
    replay_path: str = fixed_flag("", "general rows mixed in against forgetting")
    replay_ratio: float = fixed_flag(
        0.1, "share of each epoch's rows that are drawn from --replay_path"
    )
    streaming: bool = fixed_flag(
        False, "read, shuffle and tokenise JSON lines during training, for files larger than memory"
    )
    shuffle_buffer: int = fixed_flag(
        10_000, "streaming: size of the shuffle buffer, in rows", positive=True
    )
    preprocessing_num_workers: int = flag(1, "number of tokenising processes", positive=True)
    max_len: int = fixed_flag(1024, "longest row in tokens, prompt and answer", positive=True)
    is_skip: bool = fixed_flag(
        False, "drop (and count) rows that are too long instead of truncating them"
    )
    prompt_text: str = fixed_flag("", "instruction put before rows of the old form {text, answer}")

    def check_rows(self, names: tuple[str, ...]) -> None:
        """Raises ValueError for wrong --columns, or a --replay_ratio outside of (0, 1).

        Args:
            names: those that --columns knows.
        """
        parse_columns(self.columns, names)
        if not 0 < self.replay_ratio < 1:
            raise ValueError(f"--replay_ratio must be between 0 and 1; got {self.replay_ratio}")


@dataclass(frozen=True)
class LoopFlags:
    """Optimizer steps: their rows, rates, arithmetic and seed."""

    per_device_train_batch_size: int = fixed_flag(
        16, "micro-batch size: rows per device and forward pass", positive=True
    )
    gradient_accumulation_steps: int = fixed_flag(
        1, "micro-batches per optimizer step", positive=True
    )
    num_train_epochs: int = fixed_flag(1, "number of epochs", positive=True)
    max_steps: int | None = fixed_flag(None, "stop after N optimizer steps", positive=True)
    learning_rate: float = fixed_flag(1e-3, "peak learning rate")
    weight_decay: float = fixed_flag(0.1, "AdamW's decoupled weight decay")
    warmup_ratio: float = fixed_flag(0.1, "share of the steps used for warm-up")
    batching: str = fixed_flag(
        "ragged",
        "ragged: the rows of a micro-batch packed end to end, no padding; padded: the usual way; "
        "grouped: padded, rows of similar length together",
        choices=("ragged", "padded", "grouped"),
    )
    share_prefix: bool = fixed_flag(
        True,
        "ragged: compute a prefix that all rows of a micro-batch share only once, "
        "where no dropout acts (ChatGLM2, ChatGLM3, GLM-4)",
    )
    gradient_checkpointing: str = flag(
        "False",
        "recompute activations in the backward pass: less memory, slower; selective: all but the "
        "results of matrix products and attention",
        choices=("False", "True", "selective"),
        parse=parse_checkpointing,
        bare="True",
    )
    gradient_checkpointing_layers: str = flag(
        "",
        "checkpoint only these layers: N, the first N; a-b, layers a to b (from 0) [all]",
    )
    precision: str = fixed_flag(
        "auto",
        "arithmetic; overrides the DeepSpeed file's (auto: bf16, else fp16 on GPUs, fp32 on CPU)",
        choices=PRECISIONS,
    )
    num_workers: int = flag(
        1,
        "threads that prepare the batches of the next steps; 0: none",
    )
    seed: int = fixed_flag(1234, "seed of data order, dropout and new weights")
    ds_file: str = fixed_flag(
        "ds_zero2.json", "DeepSpeed configuration; a bare name is looked up in ds_configs/ too"
    )
    local_rank: int = flag(-1, "set by the launcher")

    def check_loop(self) -> None:
        """Raises ValueError for a number outside of its range, or layers that are none."""
        check_share("warmup_ratio", self.warmup_ratio)
        check_not_negative("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)
        for name, value in {"num_workers": self.num_workers, "seed": self.seed}.items():
            if value < 0:
                raise ValueError(f"--{name} must not be below 0; got {value}")
        layers = self.gradient_checkpointing_layers
        if layers and not CHECKPOINTED_LAYERS.fullmatch(layers):
            raise ValueError(
                f"--gradient_checkpointing_layers must be N or a-b, such as 8 or 4-11; "
                f"got {layers!r}"
            )


@dataclass(frozen=True)
class MethodFlags:
    """Which parameters are trained, and each method's knobs."""

    train_type: str = fixed_flag("lora", "fine-tuning method", choices=tuple(METHODS))
    lora_dim: int = fixed_flag(8, "LoRA rank", positive=True)
    lora_alpha: int = fixed_flag(
        30, "LoRA scale: the update is multiplied by alpha / rank", positive=True
    )
    lora_dropout: float = fixed_flag(0.1, "dropout on LoRA's input")
    lora_module_name: str = fixed_flag(
        "query_key_value", "comma list of modules with LoRA, or all-linear"
    )
    use_rslora: bool = fixed_flag(False, "LoRA: scale by alpha / sqrt(rank), for high ranks")
    use_dora: bool = fixed_flag(
        False, "LoRA: weight magnitudes trained apart from directions (not on ZeRO-3)"
    )
    init_lora_weights: str = fixed_flag(
        "default",
        "initialisation of LoRA: default (B zero), gaussian, orthogonal, olora, pissa, or "
        "pissa_niter_N (fast SVD with N iterations)",
    )
    loraplus_lr_ratio: float = fixed_flag(
        1.0, "LoRA+: B's learning rate is this times A's (the paper: about 16)"
    )
    freeze_module_name: str = fixed_flag(
        "layers.27.", "comma list; parameters whose names contain one of these are trained"
    )
    freeze_ratio: float = fixed_flag(
        0.0,
        "freeze: share of the layers, from the first on, that stays frozen; all else trains; "
        "replaces --freeze_module_name",
    )
    pre_seq_len: int = fixed_flag(16, "P-Tuning: number of virtual tokens", positive=True)
    prefix_projection: bool = fixed_flag(
        True,
        "P-Tuning v2: prefix through an MLP. Without --ptuning_version: True means v2, False v1",
    )
    ptuning_version: str | None = fixed_flag(
        None,
        "v2: keys and values in every layer; v1: vectors before the first embedding",
        choices=("v1", "v2"),
    )
    prefix_dropout: float = fixed_flag(0.1, "P-Tuning v2: dropout on the prefix in training")

    def check_method(self) -> None:
        """Raises ValueError for flags of methods that are wrong or do not fit each other."""
        check_share("lora_dropout", self.lora_dropout)
        check_share("prefix_dropout", self.prefix_dropout)
        check_share("freeze_ratio", self.freeze_ratio)
        if not LORA_STARTS.fullmatch(self.init_lora_weights):
            raise ValueError(
                f"--init_lora_weights must be default, gaussian, orthogonal, olora, pissa or "
                f"pissa_niter_N; got {self.init_lora_weights!r}"
            )
        if not 0 < self.loraplus_lr_ratio < math.inf:
            raise ValueError(f"--loraplus_lr_ratio must be above 0; got {self.loraplus_lr_ratio}")
        if self.init_lora_weights == "orthogonal" and self.lora_dim % 2:
            raise ValueError(
                f"--init_lora_weights orthogonal needs an even --lora_dim; got {self.lora_dim}"
            )

    @property
    def has_noise(self) -> bool:
        """Whether dropout acts: the rows of a pass then share no prefix (finetune.row_task)."""
        if self.train_type == "lora":
            return bool(self.lora_dropout)
        if self.train_type == "ptuning" and self.resolved_ptuning_version == "v2":
            return bool(self.prefix_dropout)
        return False

    @property
    def resolved_ptuning_version(self) -> str:
        """--ptuning_version, else v2 with --prefix_projection and v1 without.

        That rule is in the READMEs of ChatGLM-Finetuning.
        """
        return self.ptuning_version or ("v2" if self.prefix_projection else "v1")


@dataclass(frozen=True)
class EvalFlags:
    """When a run evaluates, which checkpoint is the best, and when it stops early."""

    eval_step: int | None = flag(
        None, "evaluate every N steps, and at the end of each epoch", positive=True
    )
    per_device_eval_batch_size: int | None = flag(
        None, "rows per device in evaluation (default: as in training)", positive=True
    )
    metric_for_best: str = flag(
        "loss", "what makes a checkpoint the best: loss or one of --eval_metrics"
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after N evaluations in a row without improvement of --metric_for_best",
        positive=True,
    )
    early_stopping_min_delta: float = flag(
        0.0, "least improvement that counts for --early_stopping_patience"
    )

    def check_early_stopping(self) -> None:
        """Raises ValueError for a delta below 0."""
        check_not_negative("early_stopping_min_delta", self.early_stopping_min_delta)


@dataclass(frozen=True)
class WeightFlags:
    """What the weights start from and are kept in, and whether only their memory is estimated."""

    adapter: str | None = fixed_flag(
        None,
        "a LoRA adapter of the base model to train on, this toolkit's or another's; rank, alpha "
        "and modules are its own",
    )
    quantization_bit: int | None = fixed_flag(
        None,
        "QLoRA: frozen linear layers in 4 (nf4) or 8 (int8) bits; needs bitsandbytes; "
        "lora, ptuning",
        choices=(4, 8),
    )
    estimate_memory: bool = flag(
        False, "print the memory this run needs, by part, and stop: no weights, no GPU"
    )


@dataclass(frozen=True)
class AnswerFlags:
    """Evaluation of written answers."""

    eval_metrics: str = flag(
        "",
        "also generate answers to the evaluation rows and score them: comma list of rouge, bleu, "
        "exact_match, accuracy, macro_f1, triple_f1, d2q or single metrics (docs/evaluation.md)",
    )
    eval_f1: bool = flag(False, "the old spelling of --eval_metrics triple_f1")
    eval_max_new_tokens: int = flag(
        315, "longest answer generated for --eval_metrics, in tokens", positive=True
    )

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """The metrics of written answers that an evaluation computes."""
        names = f"{self.eval_metrics},f1" if self.eval_f1 else self.eval_metrics
        return parse_metrics(names, "--eval_metrics")


@dataclass(frozen=True)
class OutputFlags:
    """What a run writes, and what it resumes from."""

    output_dir: str | None = flag(None, "where checkpoints go (default: output-MODE-TRAIN_TYPE)")
    overwrite_output_dir: bool = flag(
        False, "replace the checkpoints of an earlier run in --output_dir"
    )
    show_loss_step: int = flag(10, "log the loss every N steps", positive=True)
    save_model_step: int | None = flag(
        None, "save every N steps, and at the end of each epoch", positive=True
    )
    save_total_limit: int | None = flag(
        None, "keep only the newest N checkpoints, and the best one", positive=True
    )
    resume_from_checkpoint: str | None = flag(
        None, "'auto' for the newest checkpoint in --output_dir, or its path"
    )
    verify: str | None = flag(
        None,
        "compare a checkpoint's files with its checksums.json: full (SHA-256), fast (XXH3) or off "
        "(resuming: full; loading: fast; or what GLM_FOUNDRY_VERIFY says)",
        choices=LEVELS,
    )
    report_to: str = flag(
        "tensorboard",
        "comma list of loggers: tensorboard, wandb, swanlab; '' for none",
    )
    tensorboard: str | None = flag(None, "TensorBoard folder (default: OUTPUT_DIR/runs)")

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names in --report_to, each once."""
        names = [name.strip() for name in self.report_to.split(",")]
        return tuple(dict.fromkeys(name for name in names if name))

    def check_loggers(self) -> None:
        """Raises ValueError for an unknown name in --report_to."""
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(
                f"--report_to: wanted some of {', '.join(LOGGERS)}; got {unknown[0]!r}"
            )
