"""The configuration of a training run: a field is a flag, its text is the help.

Free of torch, so that `train.py --help` answers at once.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from chatglm.commands import Parser, describe
from chatglm.files import read_text, shorten
from finetune.aliases import renamed_arguments, renamed_values, tell_renamed
from finetune.demo_layout import demo_flags, has_demo_layout, split_demo_command
from finetune.evaluation.metrics import GROUPS
from finetune.flag_effects import TRAINING, Effect, refuse_without_effect
from finetune.flag_groups import PRECISIONS as PRECISIONS
from finetune.flag_groups import (
    AnswerFlags,
    DataFlags,
    EvalFlags,
    LoopFlags,
    MethodFlags,
    ModelFlags,
    OutputFlags,
    RowFlags,
    WeightFlags,
    check_not_negative,
    check_share,
)
from finetune.flags import LARGEST_COUNT, add_flag, fixed_flag, flag_type
from finetune.flags import parse_bool as parse_bool  # for the other commands' flags
from finetune.flags import parse_positive as parse_positive
from finetune.plain_yaml import parse_yaml
from finetune.rows.formats import COLUMN_NAMES
from finetune.start_adapter import add_adapter_flags

CONFIG_LIMIT = 2**16  # bytes of a --config
# The order of the flags in --help and in the files of a run; those of another task come last.
ORDER = """
task model_name_or_path mode prompt_style train_path eval_path data_format columns glm3_labels
replay_path replay_ratio streaming shuffle_buffer preprocessing_num_workers max_len max_src_len
is_skip on_bad_row prompt_text dataset_length train_type per_device_train_batch_size
gradient_accumulation_steps num_stages num_train_epochs max_steps learning_rate weight_decay
warmup_ratio batching share_prefix gradient_checkpointing gradient_checkpointing_layers
label_smoothing neftune_noise_alpha precision num_workers data_cache data_cache_gb seed ds_file
adapter lora_dim lora_alpha lora_dropout lora_module_name use_rslora use_dora init_lora_weights
loraplus_lr_ratio quantization_bit freeze_module_name freeze_ratio pre_seq_len prefix_projection
ptuning_version prefix_dropout output_dir overwrite_output_dir show_loss_step save_model_step
save_total_limit eval_step per_device_eval_batch_size eval_metrics eval_f1 eval_max_new_tokens
metric_for_best early_stopping_patience early_stopping_min_delta resume_from_checkpoint verify
report_to tensorboard estimate_memory local_rank
"""


@dataclass(frozen=True)
class RunConfig(ModelFlags, DataFlags, LoopFlags, MethodFlags, EvalFlags, OutputFlags):
    """The flags that the training loop reads, of any task. Steps are optimizer steps."""

    title: ClassVar[str]
    effects: ClassVar[dict[str, Effect]]

    @property
    def needs_model(self) -> bool:
        """Whether --model_name_or_path is required."""
        return True

    @property
    def has_evaluation(self) -> bool:
        """Whether a run evaluates."""
        return bool(self.eval_path)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """All metrics that an evaluation computes."""
        return ("loss",)

    @property
    def only_memory(self) -> bool:
        """Whether only the memory of the run is estimated."""
        return False

    @property
    def stages(self) -> int:
        """Ranks that hold one copy of the model together, each some of its layers."""
        return 1

    def check_groups(self) -> None:
        """Raises ValueError naming the first wrong flag of the groups."""
        self.check_fields()
        self.check_data()
        self.check_loop()
        self.check_method()
        self.check_paths()
        self.check_best_metric()
        self.check_early_stopping()
        self.check_loggers()

    def check_fields(self) -> None:
        """Raises ValueError for a value that is not one of the choices, or not positive."""
        for f in flags_of(type(self)):
            value = getattr(self, f.name)
            if value is None:
                continue
            choices = f.metadata["choices"]
            if choices and value not in choices:
                names = ", ".join(map(str, choices))
                raise ValueError(f"--{f.name} must be one of {names}; got {value!r}")
            if f.metadata["positive"] and value < 1:
                raise ValueError(f"--{f.name} must be at least 1; got {value}")
            if f.metadata["positive"] and value > LARGEST_COUNT:
                raise ValueError(
                    f"--{f.name} must be at most {LARGEST_COUNT}; got {str(value)[:20]}"
                )

    def check_paths(self) -> None:
        """Raises ValueError where the base model or the training rows are not given."""
        if self.needs_model and not self.model_name_or_path:
            raise ValueError("--model_name_or_path is required: the folder of the base model")
        if not (self.train_path or self.only_memory):
            raise ValueError(
                "--train_path is required: files of rows, "
                "e.g. JSON lines of {instruction, input, output}"
            )

    def check_best_metric(self) -> None:
        """Raises ValueError for a best metric that is not evaluated."""
        if self.metric_for_best not in self.evaluated:
            raise ValueError(
                f"--metric_for_best must be one of {', '.join(self.evaluated)}; "
                f"got {self.metric_for_best!r} (--eval_metrics, or --eval_f1, adds others)"
            )

    def fill_in(self, name: str, value: object) -> None:
        """Set a flag whose default depends on others, while the configuration is made."""
        object.__setattr__(self, name, value)

    def changed(self, *names: str) -> list[str]:
        """Those of the flags `names` that differ from their defaults."""
        fields = [f for f in flags_of(type(self)) if f.name in names]
        return [f.name for f in fields if getattr(self, f.name) != f.default]

    def to_dict(self) -> dict[str, Any]:
        """{flag: value} in the order of --help."""
        return {f.name: getattr(self, f.name) for f in flags_of(type(self))}

    def save(self, path: Path) -> None:
        """Write the flags as JSON."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def changed_since(self, saved: dict[str, Any], but: tuple[str, ...] = ()) -> list[str]:
        """ "--name: was A, is B" of each flag that shapes training and differs from a checkpoint's.

        Args:
            saved: the checkpoint's flags.
            but: names of flags that may differ.
        """
        changes = []
        for f in flags_of(type(self)):
            compared = f.metadata["shapes_training"] and f.name in saved and f.name not in but
            value = getattr(self, f.name)
            if compared and saved[f.name] != value:
                changes.append(f"--{f.name}: was {saved[f.name]!r}, is {value!r}")
        return changes


@dataclass(frozen=True)
class RowsConfig(RunConfig, RowFlags, WeightFlags):
    """The flags of a task that trains a language model on rows of text."""

    @property
    def column_names(self) -> tuple[str, ...]:
        """The names that --columns knows."""
        return COLUMN_NAMES

    def __post_init__(self) -> None:
        """Check all flags; raises ValueError naming the first that is wrong."""
        if self.max_src_len is None:
            half = max(1, self.max_len // 2)
            self.fill_in("max_src_len", 256 if self.max_len > 256 else half)
        self.check_groups()
        self.check_rows(self.column_names)
        self.check_lengths()
        self.check_quantization()
        self.check_task()

    def check_task(self) -> None:
        """Raises ValueError for a flag of this task alone that is wrong."""

    def check_lengths(self) -> None:
        """Raises ValueError where --streaming or --max_src_len does not fit other flags."""
        if self.streaming and (self.batching == "grouped" or self.dataset_length):
            raise ValueError(
                "--streaming takes no --batching grouped and no --dataset_length: "
                "rows come as they are read"
            )
        if self.max_src_len >= self.max_len:
            raise ValueError(
                f"--max_src_len ({self.max_src_len}) must be below --max_len ({self.max_len})"
            )

    def check_quantization(self) -> None:
        """Raises ValueError for quantised weights where LoRA starts from whole ones."""
        if self.quantization_bit and self.starts_from_weights:
            raise ValueError(
                f"--init_lora_weights {self.init_lora_weights} needs whole weights; "
                f"leave --quantization_bit out"
            )

    @property
    def starts_from_weights(self) -> bool:
        """Whether LoRA starts from the base's weights, which it changes."""
        return self.train_type == "lora" and self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def switches_off(self) -> bool:
        """Whether the model without what trains is what it was at first, as a reference is."""
        if self.train_type == "ptuning":
            return True
        return self.train_type == "lora" and not self.adapter and not self.starts_from_weights

    @property
    def only_memory(self) -> bool:
        return self.estimate_memory

    @property
    def sequences(self) -> int:
        """How many sequences of --max_len tokens a row is at most; for the estimate of memory."""
        return 1

    @property
    def label_share(self) -> float:
        """Labelled tokens, of all; for the estimate of memory."""
        return 0.25

    @property
    def scores(self) -> bool:
        """Whether the model ends in a value head; for the estimate of memory."""
        return False

    @property
    def copies(self) -> tuple[int, int]:
        """(frozen, trained) models beside the one that learns; for the estimate of memory."""
        return 0, 0

    @property
    def rollout_rows(self) -> int:
        """Answers that are sampled at once; for the estimate of memory."""
        return 0

    @property
    def scorer(self) -> str:
        """The folder of a model that scores answers, or ""; for the estimate of memory."""
        return ""


@dataclass(frozen=True)
class TrainConfig(RowsConfig, AnswerFlags):
    """All flags of train.py, validated. Lengths are in tokens, steps are optimizer steps."""

    title: ClassVar[str] = "Fine-tune ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and relatives"
    effects: ClassVar[dict[str, Effect]] = TRAINING

    num_stages: int = fixed_flag(
        1,
        "pipeline parallelism: number of stages, each a rank with some of the layers; "
        "--gradient_accumulation_steps is the number of micro-batches (lora, all; ZeRO 0 or 1)",
        positive=True,
    )
    label_smoothing: float = fixed_flag(
        0.0, "label smoothing: share of the target probability spread over the vocabulary"
    )
    neftune_noise_alpha: float = fixed_flag(
        0.0, "NEFTune: noise on the embeddings in training; usual values 5 to 15; 0: off"
    )

    def __post_init__(self) -> None:
        """Check all flags; raises ValueError naming the first that is wrong."""
        group = GROUPS.get(self.metric_for_best, ())
        if len(group) == 1:  # the name of a group of one metric, f1 or bleu
            self.fill_in("metric_for_best", group[0])
        super().__post_init__()

    def check_task(self) -> None:
        """Raises ValueError for shares and noises outside of their ranges."""
        check_share("label_smoothing", self.label_smoothing)
        check_not_negative("neftune_noise_alpha", self.neftune_noise_alpha)
        if self.num_stages > 1:
            self.check_stages()

    def check_stages(self) -> None:
        """Raises ValueError for what a model in stages does not train, or needs it whole."""
        if self.train_type not in ("lora", "all"):
            raise ValueError(
                f"--num_stages {self.num_stages} trains with --train_type lora or all; "
                f"got {self.train_type}"
            )
        whole = self.changed("quantization_bit", "neftune_noise_alpha", "eval_metrics", "eval_f1")
        if whole:
            raise ValueError(
                f"--num_stages {self.num_stages}: no rank has the whole model, which --{whole[0]} "
                f"needs; leave one of them out"
            )

    @property
    def stages(self) -> int:
        return self.num_stages

    @property
    def evaluated(self) -> tuple[str, ...]:
        """All metrics that an evaluation computes."""
        return ("loss", *self.answer_metrics)

    @property
    def has_noise(self) -> bool:
        """Whether dropout or NEFTune's noise acts."""
        return super().has_noise or bool(self.neftune_noise_alpha)


def changed_flags(config_class: type[RunConfig], given: dict[str, Any]) -> list[str]:
    """Those of the given flags whose values are not the defaults."""
    return [f.name for f in flags_of(config_class) if given.get(f.name, f.default) != f.default]


def flags_of(config_class: type[RunConfig]) -> list[dataclasses.Field[Any]]:
    """The fields of a configuration, in the order of --help."""
    names = ORDER.split()
    places = dict(zip(names, range(len(names))))
    return sorted(dataclasses.fields(config_class), key=lambda f: places.get(f.name, len(names)))


def build_parser(config_class: type[RunConfig] = TrainConfig) -> argparse.ArgumentParser:
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
    argv: list[str] | None = None,
    tasks: Mapping[str, Callable[[], type[RunConfig]]] = MappingProxyType({}),
) -> RunConfig:
    """The command line's flags, over those of --config, over the defaults.

    Wrong flags end the program with one line and exit code 2.

    Args:
        tasks: name of each --task besides fine-tuning -> function that imports its configuration.
    """
    try:
        argv, data_dir = split_demo_command(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        build_parser().error(str(error))
    task = asked_task(argv)
    config_class = TrainConfig if task not in tasks else tasks[task]()
    parser = build_parser(config_class)
    given = vars(parser.parse_args(with_our_names(parser, config_class, argv)))
    given.pop("deepspeed", None)
    if "deepspeed_config" in given:
        given["ds_file"] = given.pop("deepspeed_config")
    try:
        file = given.pop("config", None)
        given = (read_config_file(file, config_class, data_dir) if file else {}) | given
        given = add_adapter_flags(given)
        config = config_class(**(flags_of_launcher() | given))
        refuse_without_effect(config, changed_flags(config_class, given), config_class.effects)
        return config
    except (ValueError, OSError) as error:
        parser.error(describe(error))


def with_our_names(
    parser: argparse.ArgumentParser, config_class: type[RunConfig], argv: list[str] | None
) -> list[str]:
    """The command line with other projects' flags renamed; one without a counterpart ends it."""
    known = frozenset(f.name for f in flags_of(config_class))
    try:
        arguments, lines = renamed_arguments(sys.argv[1:] if argv is None else argv, known)
    except ValueError as error:
        parser.error(str(error))
    tell_renamed(lines)
    return arguments


def asked_task(argv: list[str] | None) -> str:
    """The --task of the command line, or of its --config; "" where neither has one."""
    first = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(argv)
    try:
        in_file = read_mapping(chosen.config).get("task") if chosen.config else None
    except (ValueError, OSError) as error:
        build_parser().error(describe(error))
    task = chosen.task or in_file
    return task if isinstance(task, str) else ""


def flags_of_launcher() -> dict[str, Any]:
    """--ds_file, where `accelerate launch` passes its DeepSpeed file in a variable."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return {"ds_file": file} if file else {}


def read_mapping(path: str) -> dict[str, Any]:
    """The content of a YAML or JSON file of flags.

    Raises:
        ValueError: no such file, too large, not YAML, or no mapping.
    """
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
        values = parse_yaml(text) or {}
    except ValueError as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"--config: {path} must hold a mapping of flags, got {type(values).__name__}"
        )
    return values


def our_values(path: str, known: frozenset[str], data_dir: str) -> dict[str, Any]:
    """The mapping of a file under this project's names; a line says which had others."""
    values = read_mapping(path)
    lines: list[str] = []
    try:
        if has_demo_layout(values):
            values, lines = demo_flags(values, data_dir)
        elif data_dir:
            raise ValueError("wanted data_config, training_args, peft_config of finetune_hf.py")
        values, more = renamed_values(values, known)
    except ValueError as error:
        raise ValueError(f"--config: {path}: {error}") from None
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"--config: {path}: unknown flag {shorten(unknown[0])}")
    tell_renamed(lines + more, "\n")
    return values


def read_config_file(
    path: str, config_class: type[RunConfig] = TrainConfig, data_dir: str = ""
) -> dict[str, Any]:
    """Flags from a YAML or JSON mapping, their types checked as on the command line.

    Args:
        data_dir: where the data files of a finetune_hf.py file are.
    """
    fields = {f.name: f for f in flags_of(config_class)}
    values = our_values(path, frozenset(fields), data_dir)
    checked: dict[str, Any] = {}
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
