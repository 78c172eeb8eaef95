"""When a flag has an effect: a table per program, and the rule that refuses a flag without one.

Free of torch.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from chatglm.families import FAMILIES


@dataclass(frozen=True)
class Effect:
    """The condition under which a flag has an effect.

    Attributes:
        needs: the condition in words; {c} is the configuration.
        holds: whether a configuration meets it.
    """

    needs: str
    holds: Callable[[Any], bool]


def refuse_without_effect(config: object, given: Iterable[str], effects: dict[str, Effect]) -> None:
    """Raises ValueError for the first of the given flags that has no effect beside the others.

    A flag that `effects` does not name always has one.
    """
    for name in given:
        effect = effects.get(name)
        if effect and not effect.holds(config):
            raise ValueError(
                f"--{name} needs {effect.needs.format(c=config)}: it has no effect otherwise"
            )


# Families whose rows share no beginning.
UNSHARED = tuple(name for name, family in FAMILIES.items() if not family.shares_beginning)
LORA = Effect("--train_type lora; got {c.train_type}", lambda c: c.train_type == "lora")
PTUNING = Effect("--train_type ptuning; got {c.train_type}", lambda c: c.train_type == "ptuning")
EVALUATION = Effect("--eval_path", lambda c: c.has_evaluation)
EVAL_PATH = Effect("--eval_path", lambda c: bool(c.eval_path))
WHOLE_ROWS = Effect("a run without --streaming", lambda c: not c.streaming)

# Of train.py. A flag that is not here has an effect in every run.
TRAINING: dict[str, Effect] = {
    "glm3_labels": Effect("--mode glm3, or none; got {c.mode}", lambda c: c.mode in (None, "glm3")),
    "prompt_text": Effect(
        "--data_format text or auto; got {c.data_format}",
        lambda c: c.data_format in ("auto", "text"),
    ),
    "replay_ratio": Effect("--replay_path", lambda c: bool(c.replay_path)),
    "shuffle_buffer": Effect("--streaming", lambda c: c.streaming),
    "preprocessing_num_workers": WHOLE_ROWS,
    "data_cache": WHOLE_ROWS,
    "data_cache_gb": Effect(
        "--data_cache and a run without --streaming",
        lambda c: bool(c.data_cache) and not c.streaming,
    ),
    "share_prefix": Effect(
        f"--batching ragged, a --mode other than {', '.join(UNSHARED)}, and neither dropout nor "
        "--neftune_noise_alpha",
        lambda c: c.batching == "ragged" and c.mode not in UNSHARED and not c.has_noise,
    ),
    "gradient_checkpointing_layers": Effect(
        "--gradient_checkpointing True or selective", lambda c: c.gradient_checkpointing != "False"
    ),
    **dict.fromkeys(("lora_dim", "lora_alpha", "lora_dropout", "lora_module_name"), LORA),
    **dict.fromkeys(("use_rslora", "use_dora", "loraplus_lr_ratio"), LORA),
    "init_lora_weights": Effect(
        "--train_type lora without --adapter; got {c.train_type}",
        lambda c: c.train_type == "lora" and not getattr(c, "adapter", None),
    ),
    "quantization_bit": Effect(
        "frozen weights, --train_type lora or ptuning; got {c.train_type}",
        lambda c: c.train_type in ("lora", "ptuning"),
    ),
    "freeze_module_name": Effect(
        "--train_type freeze without --freeze_ratio; got {c.train_type}",
        lambda c: c.train_type == "freeze" and not c.freeze_ratio,
    ),
    "freeze_ratio": Effect(
        "--train_type freeze; got {c.train_type}", lambda c: c.train_type == "freeze"
    ),
    **dict.fromkeys(("pre_seq_len", "prefix_projection", "ptuning_version"), PTUNING),
    "prefix_dropout": Effect(
        "--train_type ptuning of version v2",
        lambda c: c.train_type == "ptuning" and c.resolved_ptuning_version == "v2",
    ),
    "overwrite_output_dir": Effect(
        "a run without --resume_from_checkpoint", lambda c: not c.resume_from_checkpoint
    ),
    **dict.fromkeys(("eval_step", "per_device_eval_batch_size", "metric_for_best"), EVALUATION),
    "early_stopping_patience": EVALUATION,
    "early_stopping_min_delta": Effect(
        "--early_stopping_patience", lambda c: bool(c.early_stopping_patience)
    ),
    **dict.fromkeys(("eval_metrics", "eval_f1"), EVAL_PATH),
    "eval_max_new_tokens": Effect("--eval_metrics", lambda c: bool(c.answer_metrics)),
    "tensorboard": Effect("--report_to tensorboard", lambda c: "tensorboard" in c.loggers),
}

SAMPLING = Effect("--do_sample", lambda c: bool(c.do_sample))
FILE = Effect("--file", lambda c: bool(c.file))
TEST_PATH = Effect("--test_path", lambda c: bool(c.test_path))


def is_placed(c: Any) -> bool:
    """Whether flags ask for a placement; as PlacementFlags.is_placed, of any configuration."""
    return bool(c.deployer or c.num_gpus or c.devices or c.device_map)


PLACED = Effect("--deployer, --num_gpus, --devices or --device_map", is_placed)

# Of every program with finetune.placing's flags.
PLACING: dict[str, Effect] = {
    "device": Effect(
        "a run without --deployer, --num_gpus, --devices and --device_map",
        lambda c: not is_placed(c),
    ),
    "deployer": Effect("a run without --device_map", lambda c: not c.device_map),
    **dict.fromkeys(("cluster", "profile"), PLACED),
    "measure": Effect("--deployer morphling", lambda c: c.deployer == "morphling"),
    "measure_s": Effect("--measure", lambda c: c.measure),
}

# Of finetune.predict.
PREDICTING: dict[str, Effect] = {
    **PLACING,
    **dict.fromkeys(("top_p", "temperature", "seed"), SAMPLING),
    "max_length": Effect("a run without --max_new_tokens", lambda c: not c.max_new_tokens),
    **dict.fromkeys(("batch_size", "output", "prompt_text", "data_format", "columns"), FILE),
    "predictor": FILE,
}

# Of finetune.evaluate.
EVALUATING: dict[str, Effect] = {
    **PLACING,
    **dict.fromkeys(("top_p", "temperature", "seed"), SAMPLING),
    "max_length": PREDICTING["max_length"],
    "num_answers": Effect(
        "--test_path and --do_sample", lambda c: bool(c.test_path and c.do_sample)
    ),
    **dict.fromkeys(("predictions", "predictor"), TEST_PATH),
    # --probe compares two models, one after the other, on one device.
    **dict.fromkeys(("num_gpus", "devices", "device_map"), TEST_PATH),
    "deployer": Effect(
        "--test_path, and a run without --device_map",
        lambda c: bool(c.test_path and not c.device_map),
    ),
    "f1_denominator": Effect(
        "--test_path and --metrics triple_f1",
        lambda c: bool(c.test_path) and (not c.metrics or "f1" in c.metrics),
    ),
}

FITTED = Effect("--compare_seeds", lambda c: bool(c.compare_seeds))
ONE_RUN = Effect(
    "--model, without --compare_seeds, --table or --guide",
    lambda c: bool(c.model and not (c.compare_seeds or c.table or c.guide)),
)
DESCRIBED = Effect(
    "--model, without --suggest, --compare_seeds, --table or --guide",
    lambda c: bool(c.model and not (c.suggest or c.compare_seeds or c.table or c.guide)),
)
SUGGESTED = Effect("--suggest", lambda c: bool(c.suggest))

# Of finetune.memory, beside those of TRAINING.
ESTIMATING: dict[str, Effect] = {
    "fit": FITTED,
    "gpu": Effect(
        "--model or --table, without --compare_seeds or --guide",
        lambda c: not (c.compare_seeds or c.guide),
    ),
    **dict.fromkeys(("gpus", "label_share", "suggest"), ONE_RUN),
    **dict.fromkeys(("mode", "real_tokens", "ds_file", "num_stages"), DESCRIBED),
    **dict.fromkeys(("host_gb", "write"), SUGGESTED),
    "json": Effect("a run without --guide", lambda c: not c.guide),
    "model": Effect(
        "a run without --compare_seeds, --table or --guide",
        lambda c: not (c.compare_seeds or c.table or c.guide),
    ),
}


def check_given(
    parser: argparse.ArgumentParser, values: dict[str, Any], effects: dict[str, Effect]
) -> None:
    """Call `parser.error` for a flag that is not at its default and has no effect.

    Args:
        values: {flag: value} as parsed.
    """
    given = [name for name, value in values.items() if value != parser.get_default(name)]
    try:
        refuse_without_effect(SimpleNamespace(**values), given, effects)
    except ValueError as error:
        parser.error(str(error))
