"""The configuration of a training run: a field is a flag, its text is the help.

Free of torch, so that `train.py --help` answers at once.
"""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from chatglm.checksums import LEVELS
from chatglm.commands import Parser, describe
from chatglm.conversations import GLM3_LABELS
from chatglm.families import FAMILIES
from chatglm.files import read_text, shorten
from finetune.evaluation.metrics import GROUPS, parse_metrics
from finetune.files import CACHE_GB
from finetune.flag_effects import TRAINING, Effect, refuse_without_effect
from finetune.methods import METHODS
from finetune.record import LOGGERS
from finetune.rows.formats import FORMATS, parse_columns

CONFIG_LIMIT = 2**16  # bytes of a --config
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LORA_STARTS = re.compile(r"default|gaussian|orthogonal|olora|pissa|pissa_niter_\d+")
CHECKPOINTED_LAYERS = re.compile(r"[1-9]\d*|\d+-\d+")


def parse_bool(text: str | bool) -> bool:
    """True/False/yes/no/1/0 in any case. argparse's `type=bool` would read "False" as True."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"wanted True or False, got {text!r}")


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text!r}")
    return int(text)


def parse_checkpointing(text: str | bool) -> str:
    """ "True", "False" (in parse_bool's spellings) or "selective"."""
    return text if text == "selective" else str(parse_bool(text))


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    positive: bool = False,
    shapes_training: bool = False,
    parse: Callable[[str], object] | None = None,
    bare: str | None = None,
) -> Any:
    """A dataclass field with the flag's help.

    Args:
        choices: the values that are allowed.
        positive: the value must be at least 1.
        shapes_training: a resumed run must have the same value.
        parse: converts text to a value, where the field's type does not say how.
        bare: the value of the flag given without one.
    """
    meta = {
        "help": help,
        "choices": choices,
        "positive": positive,
        "shapes_training": shapes_training,
        "parse": parse,
        "bare": bare,
    }
    return field(default=default, metadata=meta)


def keep(default: Any, help: str, **kwargs) -> Any:
    """A dataclass field that a resumed run may not change."""
    return flag(default, help, shapes_training=True, **kwargs)


@dataclass(frozen=True)
class TrainConfig:
    """All flags of train.py, validated. Lengths are in tokens, steps are optimizer steps."""

    title: ClassVar[str] = "Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B"
    effects: ClassVar[dict[str, Effect]] = TRAINING
    # Fields that mean nothing to a task: it has no flags for them.
    unused: ClassVar[tuple[str, ...]] = ()

    task: str = keep(
        "finetune",
        "what is trained: the model, or a predictor of the length of its answers; "
        "--task predictor --help shows that one's flags",
        choices=("finetune", "predictor"),
    )
    # model
    model_name_or_path: str = keep("", "folder of the base model (required)")
    mode: str | None = keep(
        None, "model family; found in the folder when not given, else glm2", choices=tuple(FAMILIES)
    )
    # data
    train_path: str = keep(
        "",
        "training rows (required): comma list of files (.json, .jsonl, .csv, .parquet, .gz), "
        "folders, patterns, hf://NAME or ms://NAME; FILE:0.3 reads 0.3 of its rows an epoch",
    )
    eval_path: str = flag(
        "", "evaluation rows; gives loss (and F1) during training and a best checkpoint"
    )
    data_format: str = keep(
        "auto",
        "what the rows look like; auto: found from each row's keys",
        choices=("auto", *FORMATS),
    )
    columns: str = keep("", 'our names for the rows\' columns: "prompt=question,response=answer"')
    glm3_labels: str = keep(
        GLM3_LABELS[0],
        "ChatGLM3: the role token of an answer carries loss, as in ChatGLM-Finetuning, "
        "or does not, as in ChatGLM3's demo",
        choices=GLM3_LABELS,
    )
    replay_path: str = keep("", "rows of what the model should not forget, mixed in")
    replay_ratio: float = keep(0.1, "share of each epoch's rows that are drawn from --replay_path")
    streaming: bool = keep(
        False, "read, shuffle and encode JSON lines on the way, for files larger than memory"
    )
    shuffle_buffer: int = keep(10_000, "streaming: rows that are shuffled together", positive=True)
    preprocessing_num_workers: int = flag(1, "processes that tokenise", positive=True)
    max_len: int = keep(1024, "longest row in tokens, prompt and answer", positive=True)
    max_src_len: int | None = keep(
        None,
        "longest prompt in tokens [256, or half of a --max_len that is not above 256]",
        positive=True,
    )
    is_skip: bool = keep(False, "drop (and count) rows that would be cut, instead of cutting them")
    on_bad_row: str = keep("error", "what to do with a malformed row", choices=("error", "skip"))
    prompt_text: str = keep("", "instruction put before rows of the old form {text, answer}")
    dataset_length: int | None = keep(
        None, "use only the first N rows of each entry of --train_path", positive=True
    )
    # training
    train_type: str = keep("lora", "fine-tuning method", choices=tuple(METHODS))
    per_device_train_batch_size: int = keep(16, "rows per device and forward pass", positive=True)
    gradient_accumulation_steps: int = keep(1, "forward passes per optimizer step", positive=True)
    num_train_epochs: int = keep(1, "passes over the training rows", positive=True)
    max_steps: int | None = keep(None, "stop after so many optimizer steps", positive=True)
    learning_rate: float = keep(1e-3, "highest learning rate")
    weight_decay: float = keep(0.1, "AdamW's decoupled weight decay")
    warmup_ratio: float = keep(0.1, "share of the steps that warms the learning rate up")
    batching: str = keep(
        "ragged",
        "ragged: a pass's rows end to end, no padding; padded: side by side; "
        "grouped: padded, rows of like length together",
        choices=("ragged", "padded", "grouped"),
    )
    share_prefix: bool = keep(
        True,
        "ragged: compute a beginning that a pass's rows have in common once, "
        "where no dropout acts (not glm)",
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
        "recompute in so many layers only: N, the first N; a-b, from layer a to b (from 0) [all]",
    )
    label_smoothing: float = keep(
        0.0, "share of the wanted probability spread over all words, in training"
    )
    neftune_noise_alpha: float = keep(
        0.0, "NEFTune: noise on the embeddings in training; 5 to 15 are usual, 0 is none"
    )
    precision: str = keep(
        "auto",
        "arithmetic; overrides the DeepSpeed file's (auto: bf16, else fp16 on GPUs, fp32 on CPU)",
        choices=PRECISIONS,
    )
    num_workers: int = flag(
        1,
        "threads, each laying out the rows of one of the next steps while this one computes; "
        "0: none",
    )
    data_cache: str = flag(
        "~/.cache/glm-foundry",
        "folder of tokenised rows, keyed by content and settings; '' for none",
    )
    data_cache_gb: float = flag(
        CACHE_GB, "GB that --data_cache may take; what was not used for the longest time is deleted"
    )
    seed: int = keep(1234, "seed of data order, dropout and new weights")
    ds_file: str = keep(
        "ds_zero2.json", "DeepSpeed configuration; a bare name is looked up in ds_configs/ too"
    )
    # methods
    lora_dim: int = keep(8, "LoRA rank", positive=True)
    lora_alpha: int = keep(
        30, "LoRA scale: the update is multiplied by alpha / rank", positive=True
    )
    lora_dropout: float = keep(0.1, "dropout on LoRA's input")
    lora_module_name: str = keep(
        "query_key_value", "comma list of modules that get LoRA, or all-linear"
    )
    use_rslora: bool = keep(False, "LoRA: scale by alpha / sqrt(rank), for high ranks")
    use_dora: bool = keep(
        False, "LoRA: weight magnitudes trained apart from directions (not on ZeRO-3)"
    )
    init_lora_weights: str = keep(
        "default",
        "LoRA's start: default (B zero), gaussian, orthogonal, olora, pissa, or pissa_niter_N, the "
        "fast SVD of N iterations",
    )
    loraplus_lr_ratio: float = keep(
        1.0, "LoRA+: B's learning rate is this times A's (the paper: about 16)"
    )
    quantization_bit: int | None = keep(
        None,
        "QLoRA: frozen linear layers in 4 (nf4) or 8 (int8) bits; needs bitsandbytes; "
        "lora, ptuning",
        choices=(4, 8),
    )
    freeze_module_name: str = keep(
        "layers.27.", "comma list of parts of the parameter names that stay trainable"
    )
    pre_seq_len: int = keep(16, "P-Tuning: number of virtual tokens", positive=True)
    prefix_projection: bool = keep(
        True,
        "P-Tuning v2: prefix through an MLP. Without --ptuning_version: True means v2, False v1",
    )
    ptuning_version: str | None = keep(
        None,
        "v2: keys and values in every layer; v1: vectors before the first embedding",
        choices=("v1", "v2"),
    )
    prefix_dropout: float = keep(0.1, "P-Tuning v2: dropout on the prefix in training")
    # output
    output_dir: str | None = flag(None, "where checkpoints go (default: output-MODE-TRAIN_TYPE)")
    overwrite_output_dir: bool = flag(
        False, "replace the checkpoints of an earlier run in --output_dir"
    )
    show_loss_step: int = flag(10, "write the loss every so many steps", positive=True)
    save_model_step: int | None = flag(
        None, "save every so many steps; an epoch's end always saves", positive=True
    )
    save_total_limit: int | None = flag(
        None, "keep only the newest N checkpoints, and the best one", positive=True
    )
    eval_step: int | None = flag(
        None, "evaluate every so many steps; an epoch's end always does", positive=True
    )
    per_device_eval_batch_size: int | None = flag(
        None, "rows per device in evaluation (default: as in training)", positive=True
    )
    eval_metrics: str = flag(
        "",
        "answer the evaluation rows too and score the answers: comma list of rouge, bleu, "
        "exact_match, triple_f1, d2q or single metrics (docs/evaluation.md)",
    )
    eval_f1: bool = flag(False, "the old spelling of --eval_metrics triple_f1")
    eval_max_new_tokens: int = flag(315, "longest answer written for --eval_metrics", positive=True)
    metric_for_best: str = flag(
        "loss", "what makes a checkpoint the best: loss or one of --eval_metrics"
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after so many evaluations in a row without a better --metric_for_best",
        positive=True,
    )
    early_stopping_min_delta: float = flag(
        0.0, "what an evaluation must be better by to count as better for --early_stopping_patience"
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
        "comma list of where measurements also go: tensorboard, wandb, swanlab; '' for none",
    )
    tensorboard: str | None = flag(None, "TensorBoard folder (default: OUTPUT_DIR/runs)")
    # launch
    estimate_memory: bool = flag(
        False, "print the memory this run needs, by part, and stop: no weights, no GPU"
    )
    local_rank: int = flag(-1, "set by the launcher")

    def __post_init__(self):
        """Check all flags; raises ValueError naming the first that is wrong."""
        self.check_fields()
        self.check_shares()
        self.set_max_src_len()
        self.check_numbers()
        self.check_method()
        self.check_paths()
        self.check_rows()
        self.set_metric_for_best()
        self.check_evaluation()
        self.check_loggers()

    def check_fields(self) -> None:
        """Raises ValueError for a value that is not one of the choices, or not positive."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            choices = f.metadata["choices"]
            if choices and value not in choices:
                names = ", ".join(map(str, choices))
                raise ValueError(f"--{f.name} must be one of {names}; got {value!r}")
            if f.metadata["positive"] and value < 1:
                raise ValueError(f"--{f.name} must be at least 1; got {value}")

    def check_shares(self) -> None:
        """Raises ValueError for a share or a dropout outside of [0, 1)."""
        for name in ("lora_dropout", "prefix_dropout", "warmup_ratio", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1); got {getattr(self, name)}")

    def set_max_src_len(self) -> None:
        """Fill in the default of --max_src_len, which depends on --max_len."""
        if self.max_src_len is None:
            default = 256 if self.max_len > 256 else max(1, self.max_len // 2)
            object.__setattr__(self, "max_src_len", default)

    def check_numbers(self) -> None:
        """Raises ValueError for a number outside of its range."""
        if not self.data_cache_gb > 0:
            raise ValueError(f"--data_cache_gb must be above 0; got {self.data_cache_gb}")
        for name in ("learning_rate", "weight_decay", "neftune_noise_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name} must be a number not below 0; got {value}")
        if self.num_workers < 0:
            raise ValueError(f"--num_workers must not be below 0; got {self.num_workers}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be below 0; got {self.seed}")

    def check_paths(self) -> None:
        """Raises ValueError where the base model or the training rows are not given."""
        if self.needs_model and not self.model_name_or_path:
            raise ValueError("--model_name_or_path is required: the folder of the base model")
        if not (self.train_path or self.estimate_memory):
            raise ValueError(
                "--train_path is required: files of rows, "
                "e.g. JSON lines of {instruction, input, output}"
            )

    def check_rows(self) -> None:
        """Raises ValueError for flags of rows that do not fit one another."""
        parse_columns(self.columns)
        if not 0 < self.replay_ratio < 1:
            raise ValueError(f"--replay_ratio must be between 0 and 1; got {self.replay_ratio}")
        if self.streaming and (self.batching == "grouped" or self.dataset_length):
            raise ValueError(
                "--streaming takes no --batching grouped and no --dataset_length: "
                "rows come as they are read"
            )
        if self.max_src_len >= self.max_len:
            raise ValueError(
                f"--max_src_len ({self.max_src_len}) must be below --max_len ({self.max_len})"
            )

    def set_metric_for_best(self) -> None:
        """Replace the name of a group of one metric (f1, bleu) by that metric's name."""
        group = GROUPS.get(self.metric_for_best, ())
        if len(group) == 1:
            object.__setattr__(self, "metric_for_best", group[0])

    def check_evaluation(self) -> None:
        """Raises ValueError for a best metric that is not evaluated, or a delta below 0."""
        if self.metric_for_best not in self.evaluated:
            raise ValueError(
                f"--metric_for_best must be one of {', '.join(self.evaluated)}; "
                f"got {self.metric_for_best!r} (--eval_metrics, or --eval_f1, adds others)"
            )
        delta = self.early_stopping_min_delta
        if not (math.isfinite(delta) and delta >= 0):
            raise ValueError(
                f"--early_stopping_min_delta must be a number not below 0; got {delta}"
            )

    def check_loggers(self) -> None:
        """Raises ValueError for an unknown name in --report_to."""
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(
                f"--report_to: wanted some of {', '.join(LOGGERS)}; got {unknown[0]!r}"
            )

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """The metrics of written answers that an evaluation computes."""
        names = f"{self.eval_metrics},f1" if self.eval_f1 else self.eval_metrics
        return parse_metrics(names, "--eval_metrics")

    @property
    def evaluated(self) -> tuple[str, ...]:
        """All metrics that an evaluation computes."""
        return ("loss", *self.answer_metrics)

    @property
    def has_evaluation(self) -> bool:
        return bool(self.eval_path)

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names in --report_to, each once."""
        names = [name.strip() for name in self.report_to.split(",")]
        return tuple(dict.fromkeys(name for name in names if name))

    def check_method(self) -> None:
        """Raises ValueError for flags of methods and recomputation that do not fit each other."""
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
        needs_whole_weights = self.train_type == "lora" and self.init_lora_weights.startswith(
            ("pissa", "olora")
        )
        if self.quantization_bit and needs_whole_weights:
            raise ValueError(
                f"--init_lora_weights {self.init_lora_weights} needs whole weights; "
                f"leave --quantization_bit out"
            )
        layers = self.gradient_checkpointing_layers
        if layers and not CHECKPOINTED_LAYERS.fullmatch(layers):
            raise ValueError(
                f"--gradient_checkpointing_layers must be N or a-b, such as 8 or 4-11; "
                f"got {layers!r}"
            )

    @property
    def needs_model(self) -> bool:
        return True

    @property
    def resolved_ptuning_version(self) -> str:
        """--ptuning_version, else v2 with --prefix_projection and v1 without.

        That rule is in the READMEs of ChatGLM-Finetuning.
        """
        return self.ptuning_version or ("v2" if self.prefix_projection else "v1")

    def changed(self, *names: str) -> list[str]:
        """Those of the flags `names` that differ from their defaults."""
        fields = [f for f in dataclasses.fields(self) if f.name in names]
        return [f.name for f in fields if getattr(self, f.name) != f.default]

    def save(self, path: Path) -> None:
        """Write the flags as JSON."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n")

    def changed_since(self, saved: dict, but: tuple[str, ...] = ()) -> list[str]:
        """ "--name: was A, is B" of each flag that shapes training and differs from a checkpoint's.

        Args:
            saved: the checkpoint's flags.
            but: names of flags that may differ.
        """
        changes = []
        for f in dataclasses.fields(self):
            compared = f.metadata["shapes_training"] and f.name in saved and f.name not in but
            value = getattr(self, f.name)
            if compared and saved[f.name] != value:
                changes.append(f"--{f.name}: was {saved[f.name]!r}, is {value!r}")
        return changes


def flag_type(f: dataclasses.Field) -> Callable[[str], Any]:
    """What converts a flag's text to the type of its field."""
    if f.metadata["parse"]:
        return f.metadata["parse"]
    name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    converters = {"str": str, "int": int, "float": float, "bool": parse_bool}
    return converters[name.split(" | ")[0]]


def add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field) -> None:
    """Add a field as a flag, which is not in the namespace where it is not given."""
    names = [f"--{f.name}"]
    if f.name == "local_rank":
        names.append("--local-rank")
    shown = "" if f.default in (None, "") else f" [{f.default}]"
    options = {
        "help": (f.metadata["help"] + shown).replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    if f.type in (bool, "bool"):
        options |= {"nargs": "?", "const": True, "metavar": "True|False"}
    elif f.metadata["choices"]:
        options["choices"] = f.metadata["choices"]
    elif isinstance(f.type, str):
        options["metavar"] = f.type.split(" | ")[0].upper()
    else:
        options["metavar"] = f.name.upper()
    if f.metadata["bare"] is not None:
        options |= {"nargs": "?", "const": f.metadata["bare"]}
    parser.add_argument(*names, type=flag_type(f), **options)


def changed_flags(config_class: type[TrainConfig], given: dict) -> list[str]:
    """Those of the given flags whose values are not the defaults."""
    return [f.name for f in flags_of(config_class) if given.get(f.name, f.default) != f.default]


def flags_of(config_class: type[TrainConfig]) -> list[dataclasses.Field]:
    """The fields of a configuration that are flags of its task."""
    return [f for f in dataclasses.fields(config_class) if f.name not in config_class.unused]


def build_parser(config_class: type[TrainConfig] = TrainConfig) -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description=f"{config_class.title}: deepspeed train.py ..., torchrun ... train.py ... "
        "or python train.py ...",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of flags; the command line wins"
    )
    for f in flags_of(config_class):
        add_flag(parser, f)
    launcher = parser.add_argument_group(
        "DeepSpeed's own flags, accepted as its launcher passes them"
    )
    launcher.add_argument(
        "--deepspeed", action="store_true", default=argparse.SUPPRESS, help="no effect: always on"
    )
    launcher.add_argument(
        "--deepspeed_config", default=argparse.SUPPRESS, metavar="FILE", help="same as --ds_file"
    )
    return parser


def parse_config(
    argv: list[str] | None = None, tasks: dict[str, Callable[[], type[TrainConfig]]] | None = None
) -> TrainConfig:
    """The command line's flags, over those of --config, over the defaults.

    Wrong flags end the program with one line and exit code 2.

    Args:
        tasks: name of each --task besides fine-tuning -> function that imports its configuration.
    """
    first = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(argv)
    try:
        in_file = read_mapping(chosen.config).get("task") if chosen.config else None
    except (ValueError, OSError) as error:
        build_parser().error(describe(error))
    task = chosen.task or in_file
    is_other = tasks and isinstance(task, str) and task in tasks
    config_class = tasks[task]() if is_other else TrainConfig
    parser = build_parser(config_class)
    given = vars(parser.parse_args(argv))
    given.pop("deepspeed", None)
    if "deepspeed_config" in given:
        given["ds_file"] = given.pop("deepspeed_config")
    try:
        file = given.pop("config", None)
        # `accelerate launch` passes its DeepSpeed file in this variable.
        accelerate_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        from_launcher = {"ds_file": accelerate_file} if accelerate_file else {}
        given = (read_config_file(file, config_class) if file else {}) | given
        config = config_class(**(from_launcher | given))
        refuse_without_effect(config, changed_flags(config_class, given), config_class.effects)
        return config
    except (ValueError, OSError) as error:
        parser.error(describe(error))


def read_mapping(path: str) -> dict:
    """The content of a YAML or JSON file of flags.

    Raises:
        ValueError: no such file, too large, not YAML, or no mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses aliases of collections: nested, a few lines of them make billions of values."""

        def compose_node(self, parent, index):
            alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
            if alias and isinstance(self.anchors.get(alias.anchor), yaml.CollectionNode):
                raise yaml.YAMLError(f"the alias *{alias.anchor} stands for more than one value")
            return super().compose_node(parent, index)

    if not Path(path).is_file():
        raise ValueError(f"--config: no such file: {path}")
    if (size := Path(path).stat().st_size) > CONFIG_LIMIT:
        raise ValueError(
            f"--config: {path}: wanted a file of flags, of at most {CONFIG_LIMIT:,} bytes; "
            f"it has {size:,}"
        )
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"--config: {error}") from None
    try:
        values = Loader(text).get_single_data() or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--config: {path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"--config: {path} must hold a mapping of flags, got {type(values).__name__}"
        )
    return values


def read_config_file(path: str, config_class: type[TrainConfig] = TrainConfig) -> dict:
    """Flags from a YAML or JSON mapping, their types checked as on the command line."""
    values = read_mapping(path)
    fields = {f.name: f for f in flags_of(config_class)}
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(f"--config: {path}: unknown flag {shorten(unknown[0])}")
    checked = {}
    for name, value in values.items():
        try:
            if value is None and fields[name].default is None:
                checked[name] = None
            elif isinstance(value, (str, int, float)):
                checked[name] = flag_type(fields[name])(str(value))  # as typed on the command line
            else:
                raise TypeError
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise ValueError(
                f"--config: {path}: {name} has the wrong type: {shorten(value)}"
            ) from None
    return checked
