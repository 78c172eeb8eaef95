"""Flags of other ChatGLM projects: what each is called here, or why it has no counterpart.

Free of torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.flags import parse_bool

V01 = "ChatGLM-Finetuning v0.1"
MULTI_GPU = "Chatglm_lora_multi-gpu"
THUDM = "THUDM's ptuning scripts"
TRAINER = "the transformers Trainer"
RLHF = "RLHF (sunzeyeah)"


@dataclass(frozen=True)
class OldFlag:
    """A flag of another project.

    Attributes:
        source: the project it comes from.
        ours: the name of the flag of train.py with the same meaning, "" where there is none.
        value: for a switch: what it gives to `ours`.
        reason: why there is no flag of the same meaning, and what to do.
    """

    source: str
    ours: str = ""
    value: str = ""
    reason: str = ""


def renamed_arguments(argv: Sequence[str], known: frozenset[str]) -> tuple[list[str], list[str]]:
    """Arguments with other projects' flags under their names here, and a line for each.

    Args:
        known: the program's own flags, which stay as they are.

    Raises:
        ValueError: a flag without a counterpart, or a switch with a value that is not a boolean.
    """
    arguments: list[str] = []
    lines: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--") and name == "deepspeed":
            file = text or value_after(rest)
            arguments += ["--ds_file", file] if file else [word]
            lines += ["--deepspeed FILE is --ds_file FILE here"] if file else []
        elif word.startswith("--") and name in OLD_FLAGS and name not in known:
            old = counterpart(name, known)
            shown = f"{old.ours} {old.value}".strip()
            lines.append(f"--{name} is --{shown} here")
            if not old.value:
                arguments.append(f"--{old.ours}{equals}{text}")
            elif switched_on(name, text or value_after(rest)):
                arguments += [f"--{old.ours}", old.value]
        else:
            arguments.append(word)
    return arguments, lines


def renamed_values(
    values: dict[str, Any], known: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """As `renamed_arguments`, for the flags of a --config file.

    Raises:
        ValueError: as there, or two names of one flag are in the file.
    """
    renamed: dict[str, Any] = {}
    lines: list[str] = []
    for name, value in values.items():
        ours = name
        if name == "deepspeed" and isinstance(value, str):
            ours = "ds_file"
        elif isinstance(name, str) and name in OLD_FLAGS and name not in known:
            old = counterpart(name, known)
            ours = old.ours
            if old.value and not switched_on(name, str(value)):
                continue
            value = old.value or value
        if ours != name:
            lines.append(f"{name} is {ours} here")
            if ours in values:
                raise ValueError(f"{name} is {ours} here, which the file has too")
        if ours in renamed:
            raise ValueError(f"{name} is {ours} here, which the file has twice")
        renamed[ours] = value
    return renamed, lines


def counterpart(name: str, known: frozenset[str]) -> OldFlag:
    """The entry of a flag that has a counterpart among the known ones.

    Raises:
        ValueError: it has none; the reason is in the message.
    """
    old = OLD_FLAGS[name]
    if not old.ours:
        raise ValueError(f"--{name} of {old.source} has no counterpart: {old.reason}")
    if old.ours not in known:
        raise ValueError(
            f"--{name} of {old.source}: here it is --{old.ours}, which this --task does not have"
        )
    return old


def value_after(rest: list[str]) -> str:
    """Take the next argument, where it is a value; else ""."""
    return rest.pop(0) if rest and not rest[0].startswith("-") else ""


def switched_on(name: str, text: str) -> bool:
    """Whether a switch is on, given bare or with a boolean."""
    try:
        return parse_bool(text or "True")
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--{name}: {error}") from None


def tell_renamed(lines: Sequence[str], between: str = "; ") -> None:
    """Write the lines to stderr, as one or with another text between, on the first rank alone."""
    if lines and os.environ.get("RANK", "0") == "0":
        print(between.join(lines), file=sys.stderr)


# In the order of the projects. A name that several share stands with the first.
OLD_FLAGS: dict[str, OldFlag] = {
    "model_dir": OldFlag(V01, "model_name_or_path"),
    "train_batch_size": OldFlag(V01, "per_device_train_batch_size"),
    "log_steps": OldFlag(V01, "show_loss_step"),
    "lora_r": OldFlag(V01, "lora_dim"),
    "dataset_path": OldFlag(
        MULTI_GPU, reason="it names a folder of token ids; --train_path takes the rows themselves"
    ),
    "lora_rank": OldFlag(MULTI_GPU, "lora_dim"),
    "model_path": OldFlag(
        MULTI_GPU, reason="the base is --model_name_or_path, what is written --output_dir"
    ),
    "is_resume": OldFlag(
        MULTI_GPU,
        reason="--resume_from_checkpoint auto goes on with a run, --adapter FOLDER with its LoRA",
    ),
    "resume_path": OldFlag(
        MULTI_GPU,
        reason="its chatglm-lora.pt becomes a folder by python -m chatglm.convert_adapter, which "
        "--adapter takes",
    ),
    "train_file": OldFlag(THUDM, "train_path"),
    "validation_file": OldFlag(THUDM, "eval_path"),
    "max_source_length": OldFlag(THUDM, "max_src_len"),
    "max_target_length": OldFlag(
        THUDM, reason="--max_len is the longest row here, prompt and answer together"
    ),
    "max_seq_length": OldFlag(THUDM, "max_len"),
    "max_train_samples": OldFlag(THUDM, "dataset_length"),
    "prompt_column": OldFlag(THUDM, reason="--columns names the columns of rows here"),
    "response_column": OldFlag(THUDM, reason="--columns names the columns of rows here"),
    "history_column": OldFlag(THUDM, reason="--columns names the columns of rows here"),
    "source_prefix": OldFlag(THUDM, reason="write it into the rows"),
    "train_format": OldFlag(THUDM, reason="rows of several turns are found by their keys"),
    "ptuning_checkpoint": OldFlag(
        THUDM, reason="--resume_from_checkpoint takes a checkpoint of this project"
    ),
    "overwrite_cache": OldFlag(
        THUDM, reason="--data_cache is found by the content of its files; it is never stale"
    ),
    "predict_with_generate": OldFlag(
        THUDM, reason="--eval_metrics says which metrics of written answers to compute"
    ),
    "per_gpu_train_batch_size": OldFlag(TRAINER, "per_device_train_batch_size"),
    "logging_steps": OldFlag(TRAINER, "show_loss_step"),
    "logging_dir": OldFlag(TRAINER, "tensorboard"),
    "save_steps": OldFlag(TRAINER, "save_model_step"),
    "eval_steps": OldFlag(TRAINER, "eval_step"),
    "dataloader_num_workers": OldFlag(TRAINER, "num_workers"),
    "fp16": OldFlag(TRAINER, "precision", "fp16"),
    "bf16": OldFlag(TRAINER, "precision", "bf16"),
    "save_strategy": OldFlag(
        TRAINER, reason="an epoch's end always saves; --save_model_step N saves in between"
    ),
    "evaluation_strategy": OldFlag(
        TRAINER, reason="an epoch's end always evaluates; --eval_step N evaluates in between"
    ),
    "eval_strategy": OldFlag(
        TRAINER, reason="an epoch's end always evaluates; --eval_step N evaluates in between"
    ),
    "metric_for_best_model": OldFlag(
        TRAINER, reason="--metric_for_best takes loss or one of --eval_metrics"
    ),
    "lr_scheduler_type": OldFlag(
        TRAINER, reason="the schedule is a linear warm-up, then a linear decay"
    ),
    "warmup_steps": OldFlag(TRAINER, reason="--warmup_ratio is a share of the run's steps"),
    "do_train": OldFlag(TRAINER, reason="train.py always trains; leave it out"),
    "do_eval": OldFlag(TRAINER, reason="--eval_path FILE evaluates"),
    "do_predict": OldFlag(TRAINER, reason="python -m finetune.predict answers a file"),
    "remove_unused_columns": OldFlag(TRAINER, reason="leave it out"),
    "optim": OldFlag(TRAINER, reason="the optimizer is AdamW"),
    "num_epochs": OldFlag(RLHF, "num_train_epochs"),
    "max_length": OldFlag(RLHF, "max_len"),
    "train_filename": OldFlag(RLHF, reason="--train_path takes the path of the rows"),
    "eval_filename": OldFlag(RLHF, reason="--eval_path takes the path of the rows"),
    "data_dir": OldFlag(RLHF, reason="--train_path and --eval_path take paths of rows"),
    "eval_batch_size": OldFlag(RLHF, "per_device_eval_batch_size"),
    "tokenizer_path": OldFlag(RLHF, reason="the tokenizer is the one of --model_name_or_path"),
    "bits": OldFlag(RLHF, reason="--quantization_bit 4 or 8; --precision for the rest"),
    "device_map": OldFlag(RLHF, reason="the launcher gives each process its GPU"),
    "low_cpu_mem_usage": OldFlag(RLHF, reason="weights are always read file by file"),
    "lora_train_bias": OldFlag(
        RLHF, reason="biases are not trained with LoRA; none was its default"
    ),
    "eval_accumulation_steps": OldFlag(RLHF, reason="logits are not kept in an evaluation"),
    "do_pred": OldFlag(
        RLHF,
        reason="python -m finetune.predict answers a file, python -m finetune.score scores answers",
    ),
    "test_filename": OldFlag(RLHF, reason="python -m finetune.predict answers a file"),
    "output_filename": OldFlag(RLHF, reason="python -m finetune.predict answers a file"),
    "checkpoint": OldFlag(
        RLHF,
        reason="--resume_from_checkpoint FOLDER goes on with a run, --adapter FOLDER with its LoRA",
    ),
    "concat_samples": OldFlag(RLHF, reason="rows are always put end to end; see --batching"),
    "data_types": OldFlag(RLHF, reason="--data_format auto finds the format of each row"),
    "max_grad_norm": OldFlag(TRAINER, reason="gradient_clipping of --ds_file is the largest norm"),
    "max_length_generation": OldFlag(RLHF, "eval_max_new_tokens"),
    "do_sample": OldFlag(
        RLHF,
        reason="answers in training are greedy, but of --task grpo and ppo always sampled; "
        "finetune.evaluate samples",
    ),
    "num_return_sequences": OldFlag(
        RLHF,
        reason="answers in training are greedy; finetune.evaluate samples; --num_generations of "
        "--task grpo and ppo are the answers to a prompt",
    ),
    "top_k": OldFlag(RLHF, reason="answers in training are greedy; finetune.evaluate samples"),
    "top_p": OldFlag(RLHF, reason="answers in training are greedy; finetune.evaluate samples"),
    "temperature": OldFlag(
        RLHF, reason="answers in training are greedy; finetune.evaluate samples"
    ),
    "repetition_penalty": OldFlag(RLHF, reason="answers in training are written without a penalty"),
    "reference_model_name_or_path": OldFlag(
        RLHF, reason="the reference of --task dpo is the model that the run starts from"
    ),
    "beta": OldFlag(RLHF, reason="--task dpo has it; of --task grpo it is --kl_coef"),
    "max_length_prompt": OldFlag(RLHF, "max_src_len"),
    "sft_model_path": OldFlag(RLHF, "model_name_or_path"),
    "reward_model_path": OldFlag(
        RLHF, reason="--reward_model takes a checkpoint of --task reward, which names its base"
    ),
    "reward_checkpoint": OldFlag(RLHF, "reward_model"),
    "pretrain_filename": OldFlag(RLHF, reason="--pretrain_path takes the path of the rows"),
    "actor_learning_rate": OldFlag(RLHF, "learning_rate"),
    "actor_weight_decay": OldFlag(RLHF, "weight_decay"),
    "actor_lora_rank": OldFlag(RLHF, "lora_dim"),
    "actor_lora_alpha": OldFlag(RLHF, "lora_alpha"),
    "actor_gradient_checkpointing": OldFlag(RLHF, "gradient_checkpointing"),
    "max_gen_length": OldFlag(RLHF, "max_new_tokens"),
    "ppo_epochs": OldFlag(RLHF, "rollout_epochs"),
    "ppo_batch_numbers": OldFlag(RLHF, "rollout_steps"),
    "kl_coefficient": OldFlag(RLHF, "kl_coef"),
    "clip_reward_value": OldFlag(RLHF, "reward_clip"),
    "lambda_": OldFlag(RLHF, "gae_lambda"),
    **dict.fromkeys(
        ("critic_learning_rate", "critic_weight_decay", "critic_lora_rank", "critic_lora_alpha"),
        OldFlag(RLHF, reason="the critic trains as the policy does; --vf_coef weighs its loss"),
    ),
    "critic_gradient_checkpointing": OldFlag(
        RLHF, reason="--gradient_checkpointing is of policy and critic"
    ),
    "ppo_train_batch_size": OldFlag(
        RLHF,
        reason="--per_device_train_batch_size prompts make a pass, --rollout_steps steps a rollout",
    ),
    "enable_joint_optimization": OldFlag(RLHF, reason="--task ppo always trains its critic"),
    "enable_ema": OldFlag(RLHF, reason="--ema_decay 0.992 keeps the average"),
    **dict.fromkeys(
        ("actor_zero_stage", "critic_zero_stage", "offload"),
        OldFlag(RLHF, reason="--ds_file has the ZeRO stage and what is offloaded"),
    ),
    "offload_reference_model": OldFlag(
        RLHF, reason="adapters need no second model; --ds_file offloads all weights"
    ),
    **dict.fromkeys(
        ("disable_actor_dropout", "disable_critic_dropout"),
        OldFlag(RLHF, reason="--lora_dropout and --prefix_dropout are 0 in --task ppo"),
    ),
    **dict.fromkeys(
        (
            "enable_hybrid_engine",
            "inference_tp_size",
            "tp_gather_partition_size",
            "unpin_actor_parameters",
            "release_inference_cache",
        ),
        OldFlag(
            RLHF, reason="answers are written by the continuous engine, --rollout_batch at once"
        ),
    ),
}
