"""The layout of ChatGLM3's finetune_demo (finetune_hf.py): its command line and its YAML file.

Both become flags of train.py. Free of torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatglm.files import shorten

SECTIONS = ("data_config", "training_args", "peft_config")
USAGE = "train.py DATA_DIR MODEL CONFIG.yaml [yes]"
# Of Seq2SeqTrainingArguments, where the file does not have the key.
DEFAULTS = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "weight_decay": 0.0,
    "warmup_ratio": 0.0,
}
# Keys without a flag here: the values that change nothing, and what holds instead.
HARMLESS: dict[str, tuple[tuple[object, ...], str]] = {
    "save_strategy": (("steps", "epoch"), "an epoch's end always saves; --save_model_step N"),
    "evaluation_strategy": (("steps", "epoch"), "an epoch's end always evaluates; --eval_step N"),
    "eval_strategy": (("steps", "epoch"), "an epoch's end always evaluates; --eval_step N"),
    "logging_strategy": (("steps",), "--show_loss_step N writes the loss"),
    "remove_unused_columns": ((True, False), "columns that no format has are not read"),
    "log_level": (("info", "warning", "error", "passive"), "messages are the same at every level"),
    "use_cpu": ((False,), "the CPU is used where no GPU is seen"),
    "predict_with_generate": ((True, False), "--eval_metrics rouge,bleu scores written answers"),
}
NO_ANSWERS = "--eval_max_new_tokens N beside --eval_metrics limits written answers"


def split_demo_command(argv: Sequence[str]) -> tuple[list[str], str]:
    """(arguments as flags, DATA_DIR) of "DATA_DIR MODEL CONFIG.yaml [yes]", else (argv, "").

    Flags may come before (a launcher's --local_rank=N) and after.

    Raises:
        ValueError: the fourth word is not yes or no.
    """
    start = 0
    while start < len(argv) and argv[start].startswith(("--local_rank=", "--local-rank=")):
        start += 1
    words = list(argv[start : start + 3])
    is_file = len(words) == 3 and words[2].endswith((".yaml", ".yml"))
    if not is_file or any(word.startswith("-") for word in words):
        return list(argv), ""
    data_dir, model, file = words
    rest = list(argv[start + 3 :])
    flags = [*argv[:start], "--model_name_or_path", model, "--config", file]
    if rest and not rest[0].startswith("-"):
        answer = rest.pop(0)
        if answer.lower() not in ("yes", "no"):
            raise ValueError(
                f"{USAGE}: wanted yes or no, got {shorten(answer)}; for one checkpoint, "
                "--resume_from_checkpoint FOLDER"
            )
        if answer.lower() == "yes":
            flags += ["--resume_from_checkpoint", "auto"]
    return flags + rest, data_dir


def has_demo_layout(values: dict[str, Any]) -> bool:
    return any(name in values for name in SECTIONS)


def demo_flags(values: dict[str, Any], data_dir: str) -> tuple[dict[str, Any], list[str]]:
    """({flag: value}, a line for each key that has another name or none) of a file.

    Keys of training_args keep their names: `aliases.renamed_values` knows them.

    Args:
        data_dir: the folder of the files of data_config, "" for the current one.
    Raises:
        ValueError: a key without a counterpart; the message names what to use.
    """
    flags: dict[str, Any] = {}
    lines: list[str] = []
    for name, read in (("data_config", _data), ("training_args", _training)):
        read(dict(_section(values, name)), data_dir, flags, lines)
    _method(_section(values, "peft_config"), flags, lines)
    _lengths(values, flags, lines)
    for name in values:
        if name not in (*SECTIONS, "max_input_length", "max_output_length"):
            flags[name] = values[name]  # a flag beside the sections, or an unknown one
    return flags, lines


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{name} must be a mapping, got {shorten(section)}")
    return section


def _refuse(section: str, rest: dict[str, Any], wanted: str) -> None:
    """Raises ValueError for the first key that is left."""
    for key, value in rest.items():
        raise ValueError(f"{section}.{key}: {shorten(value)} has no counterpart; {wanted}")


def _data(section: dict[str, Any], data_dir: str, flags: dict[str, Any], lines: list[str]) -> None:
    for key, ours in (("train_file", "train_path"), ("val_file", "eval_path")):
        file = section.pop(key, None)
        if file is not None:
            if not isinstance(file, str):
                raise ValueError(f"data_config.{key} must be a file, got {shorten(file)}")
            flags[ours] = str(Path(data_dir, file))
            lines.append(f"data_config.{key} is --{ours} {flags[ours]}")
    workers = section.pop("num_proc", None)
    if workers is not None:
        if isinstance(workers, bool) or not isinstance(workers, int):
            raise ValueError(f"data_config.num_proc must be a number, got {shorten(workers)}")
        flags["preprocessing_num_workers"] = min(int(workers), os.cpu_count() or 1)
        lines.append(
            f"data_config.num_proc is --preprocessing_num_workers "
            f"{flags['preprocessing_num_workers']}"
        )
    if section.pop("test_file", None) is not None:
        lines.append("data_config.test_file is not read: python -m finetune.evaluate")
    _refuse("data_config", section, "it has train_file, val_file, test_file and num_proc")


def _training(
    section: dict[str, Any], data_dir: str, flags: dict[str, Any], lines: list[str]
) -> None:
    for key, (allowed, instead) in HARMLESS.items():
        if key in section:
            value = section.pop(key)
            if value not in allowed:
                raise ValueError(
                    f"training_args.{key}: {shorten(value)} has no counterpart: {instead}"
                )
            lines.append(f"training_args.{key} has no effect: {instead}")
    generation = section.pop("generation_config", None)
    if generation is not None:
        if not isinstance(generation, dict) or generation.keys() - {"max_new_tokens"}:
            raise ValueError(
                f"training_args.generation_config: {shorten(generation)} has no counterpart: "
                f"answers are greedy; {NO_ANSWERS}"
            )
        lines.append(f"training_args.generation_config has no effect: {NO_ANSWERS}")
    absent = {key: value for key, value in DEFAULTS.items() if key not in section}
    if section.get("max_steps", 0) == -1:
        section.pop("max_steps")
    if "max_steps" in section:
        # There, the steps alone say how long a run is; an epoch has one step or more.
        absent.pop("num_train_epochs", None)
        section["num_train_epochs"] = section["max_steps"]
        lines.append("training_args.max_steps decides alone: --num_train_epochs is as many")
    for key, value in absent.items():
        lines.append(f"training_args has no {key}: --{key} {value}, transformers' default")
    if isinstance(workers := section.get("dataloader_num_workers"), int):
        section["dataloader_num_workers"] = min(workers, os.cpu_count() or 1)
    flags |= section | absent


def _method(section: dict[str, Any], flags: dict[str, Any], lines: list[str]) -> None:
    given = dict(section)
    kind = given.pop("peft_type", None)
    given.pop("task_type", None)
    if kind is None:
        chosen: dict[str, Any] = {"train_type": "all"}
    elif kind == "LORA":
        chosen = {"train_type": "lora", "lora_dim": given.pop("r", 8)}
        chosen["lora_alpha"] = given.pop("lora_alpha", 8)
        chosen["lora_dropout"] = given.pop("lora_dropout", 0.0)
        modules = given.pop("target_modules", None)
        if modules:
            names = modules if isinstance(modules, list) else [modules]
            chosen["lora_module_name"] = ",".join(map(str, names))
    elif kind == "PREFIX_TUNING":
        chosen = {"train_type": "ptuning", "ptuning_version": "v2"}
        chosen["pre_seq_len"] = given.pop("num_virtual_tokens", 16)
        chosen["prefix_projection"] = given.pop("prefix_projection", False)
    else:
        raise ValueError(
            f"peft_config.peft_type: wanted LORA or PREFIX_TUNING, got {shorten(kind)}: "
            "--train_type names the methods"
        )
    _refuse("peft_config", given, "--train_type, --lora_... and --pre_seq_len set the method")
    words = []
    for name, value in chosen.items():
        words.append(f"--{name} {value}")
    lines.append("peft_config is " + " ".join(words))
    flags |= chosen


def _lengths(values: dict[str, Any], flags: dict[str, Any], lines: list[str]) -> None:
    lengths = []
    for name in ("max_input_length", "max_output_length"):
        length = values.get(name)
        if length is None:
            continue
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {shorten(length)}")
        lengths.append(length)
    if len(lengths) == 1:
        raise ValueError("max_input_length and max_output_length go together")
    if lengths:
        flags["max_src_len"] = lengths[0]
        flags["max_len"] = sum(lengths) + 1
        lines.append(
            f"max_input_length and max_output_length are --max_src_len {flags['max_src_len']} "
            f"--max_len {flags['max_len']}"
        )
