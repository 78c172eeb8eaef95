"""One table of when a flag has an effect, one rule that refuses it otherwise, for all programs."""

import argparse

import pytest

from chatglm.families import FAMILIES
from finetune.config import TrainConfig, flags_of, parse_config
from finetune.evaluation import evaluate, predict
from finetune.flag_effects import ESTIMATING, EVALUATING, PLACING, PREDICTING
from finetune.memory import command as memory
from predictor.config import PredictorConfig

NEEDED = ["--model_name_or_path", "m", "--train_path", "t"]
# Flags that change every run, whatever the others say.
GLOBAL = {
    "adapter",  # finetune.start_adapter refuses it beside another --train_type
    "verify",
    "task",
    "model_name_or_path",
    "mode",
    "prompt_style",
    "train_path",
    "eval_path",
    "data_format",
    "columns",
    "replay_path",
    "streaming",
    "max_len",
    "max_src_len",
    "is_skip",
    "on_bad_row",
    "dataset_length",
    "train_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_stages",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "warmup_ratio",
    "batching",
    "gradient_checkpointing",
    "label_smoothing",
    "neftune_noise_alpha",
    "precision",
    "num_workers",
    "seed",
    "ds_file",
    "output_dir",
    "show_loss_step",
    "save_model_step",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "estimate_memory",
    "local_rank",
}
GLOBAL_PREDICTOR = {
    "backbone",
    "head",
    "reuse_prefill",
    "served_model",
    "other_models_weight",
    "length_limit",
    "near_duplicates",
}
# A value of a flag with which it has no effect beside `without`, and has one beside `beside`.
EVAL = "--eval_path e"
PTUNING, V1 = "--train_type ptuning", "--train_type ptuning --ptuning_version v1"
CASES = {
    "glm3_labels": ("chatglm3_demo", "--mode glm2", "--mode glm3"),
    "prompt_text": ("x", "--data_format alpaca", "--data_format text"),
    "replay_ratio": ("0.2", "", "--replay_path r"),
    "shuffle_buffer": ("9", "", "--streaming"),
    "preprocessing_num_workers": ("2", "--streaming", ""),
    "data_cache": ("x", "--streaming", ""),
    "data_cache_gb": ("3", "--data_cache=", ""),
    "share_prefix": ("False", "--lora_dropout 0.1", "--lora_dropout 0"),
    "gradient_checkpointing_layers": ("1", "", "--gradient_checkpointing"),
    "lora_dim": ("4", "--train_type freeze", ""),
    "lora_alpha": ("4", "--train_type all", ""),
    "lora_dropout": ("0", PTUNING, ""),
    "lora_module_name": ("dense", PTUNING, ""),
    "use_rslora": ("True", PTUNING, ""),
    "use_dora": ("True", PTUNING, ""),
    "init_lora_weights": ("olora", PTUNING, ""),
    "loraplus_lr_ratio": ("4", PTUNING, ""),
    "quantization_bit": ("4", "--train_type all", PTUNING),
    "freeze_module_name": ("x", "", "--train_type freeze"),
    "freeze_ratio": ("0.5", "", "--train_type freeze"),
    "pre_seq_len": ("4", "", PTUNING),
    "prefix_projection": ("False", "", PTUNING),
    "ptuning_version": ("v1", "", PTUNING),
    "prefix_dropout": ("0", V1, PTUNING),
    "overwrite_output_dir": ("True", "--resume_from_checkpoint auto", ""),
    "eval_step": ("4", "", EVAL),
    "per_device_eval_batch_size": ("4", "", EVAL),
    "metric_for_best": ("exact_match", None, f"{EVAL} --eval_metrics exact_match"),
    "early_stopping_patience": ("4", "", EVAL),
    "early_stopping_min_delta": ("0.1", EVAL, f"{EVAL} --early_stopping_patience 1"),
    "eval_metrics": ("f1", "", EVAL),
    "eval_f1": ("True", "", EVAL),
    "eval_max_new_tokens": ("9", EVAL, f"{EVAL} --eval_f1"),
    "tensorboard": ("x", "--report_to=", ""),
}
ENCODER = "--backbone encoder --encoder_path e"
STATES = "--backbone states --states s"
PREDICTOR_CASES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_steps",
            "show_loss_step",
        ),
        ("3", "", ENCODER),
    ),
    **dict.fromkeys(
        (
            "save_model_step",
            "save_total_limit",
            "eval_step",
            "per_device_eval_batch_size",
            "num_workers",
        ),
        ("3", "", ENCODER),
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_ratio"), ("0.01", "", ENCODER)),
    "precision": ("fp32", "", ENCODER),
    "early_stopping_patience": ("3", "", ENCODER),
    "resume_from_checkpoint": ("auto", "", ENCODER),
    "report_to": ("wandb", "", ENCODER),
    "batching": ("grouped", "", ENCODER),
    "gradient_checkpointing": ("True", "", ENCODER),
    "ds_file": ("x", "", ENCODER),
    "metric_for_best": ("mae", "", ENCODER),
    "tensorboard": ("x", "", ENCODER),
    "calibration_share": ("0.2", "", ENCODER),
    "share_prefix": ("False", ENCODER, "--backbone chatglm --lora_dropout 0"),
    "data_cache": ("x", ENCODER, ""),
    "data_cache_gb": ("3", ENCODER, ""),
    "encoder_path": ("e", "--backbone chatglm", ""),
    "encoder_language": ("en", "", "--encoder_path e"),
    "encoder_layers": ("1", "", ENCODER),
    "student_dims": ("3", "", "--encoder_path e"),
    "hash_bits": ("9", ENCODER, ""),
    "student_ridge": ("1", ENCODER, ""),
    "head_ridge": ("1", ENCODER, ""),
    "landmarks": ("9", ENCODER, ""),
    **dict.fromkeys(("num_bins", "label_width", "crps_weight"), ("9", "--head bucket", "")),
    "eval_path": ("e", STATES, ""),
    "states": ("s", "", "--backbone states"),
    "state_layers": ("3", "", STATES),
    "state_pooling": ("last", "", STATES),
    **dict.fromkeys(("state_units", "state_seeds"), ("3", "", STATES)),
    **dict.fromkeys(("state_decay", "state_dropout"), ("0.2", "", STATES)),
    "num_buckets": ("9", "", "--head bucket"),
    "ranking_loss": ("listmle", "", "--head ranking"),
}


def parse(words: str, task="finetune"):
    return parse_config(
        [*NEEDED, "--task", task, *words.split()], {"predictor": lambda: PredictorConfig}
    )


def refused(capsys, words: str, task="finetune") -> str:
    with pytest.raises(SystemExit) as stop:
        parse(words, task)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_t10_every_flag_is_in_the_table_or_global():
    names = {f.name for f in flags_of(TrainConfig)}
    assert (
        names == GLOBAL | TrainConfig.effects.keys()
        and not GLOBAL & TrainConfig.effects.keys()
        and CASES.keys() == TrainConfig.effects.keys()
    )
    names = {f.name for f in flags_of(PredictorConfig)}
    table = PredictorConfig.effects.keys() & names
    assert names - table <= GLOBAL | GLOBAL_PREDICTOR and not GLOBAL_PREDICTOR & table
    assert table == names & (CASES.keys() | PREDICTOR_CASES.keys())


@pytest.mark.parametrize("name", CASES)
def test_t10_train(capsys, name):
    value, without, beside = CASES[name]
    if without is not None:
        assert f"--{name} needs " in refused(capsys, f"{without} --{name} {value}")
    assert getattr(parse(f"{beside} --{name} {value}"), name) != getattr(parse(beside), name)


@pytest.mark.parametrize("name", PREDICTOR_CASES)
def test_t10_predictor(capsys, name):
    value, without, beside = PREDICTOR_CASES[name]
    assert f"--{name} needs " in refused(capsys, f"{without} --{name} {value}", "predictor")
    assert getattr(parse(f"{beside} --{name} {value}", "predictor"), name) is not None


@pytest.mark.parametrize("mode", FAMILIES)
def test_share_prefix_is_of_families_that_share(capsys, mode):
    words = f"--share_prefix False --lora_dropout 0 --mode {mode}"
    if FAMILIES[mode].shares_beginning:
        assert parse(words).share_prefix is False
    else:
        assert "--share_prefix needs " in refused(capsys, words)


def test_t10_a_flag_at_its_default_changes_nothing():
    """So a file with every flag, such as a checkpoint's train_config.json, can be given."""
    parse("--train_type freeze --lora_dim 8 --replay_ratio 0.1 --eval_max_new_tokens 315")


def test_t10_a_saved_configuration_can_be_given(tmp_path):
    parse("--train_type freeze").save(tmp_path / "train_config.json")
    assert parse(f"--config {tmp_path}/train_config.json").train_type == "freeze"


PREDICT, EVALUATE = "--model_path m --prompt x", "--model_path m --test_path t"


@pytest.mark.parametrize(
    "main, words, said",
    [
        *[
            (predict.main, f"{PREDICT} {words}", f"{words.split()[0]} needs --do_sample")
            for words in ("--top_p 0.1", "--temperature 2", "--seed 7")
        ],
        *[
            (predict.main, f"{PREDICT} {words}", f"{words.split()[0]} needs --file")
            for words in (
                "--batch_size 2",
                "--output o",
                "--prompt_text x",
                "--data_format text",
                "--columns prompt=a",
            )
        ],
        (
            predict.main,
            f"{PREDICT} --max_new_tokens 3 --max_length 9",
            "--max_length needs a run without --max_new_tokens",
        ),
        *[
            (evaluate.main, f"{EVALUATE} {words}", f"{words.split()[0]} needs --do_sample")
            for words in ("--top_p 0.1", "--temperature 2", "--seed 7")
        ],
        (evaluate.main, f"{EVALUATE} --max_new_tokens 3 --max_length 9", "--max_length needs"),
        (
            evaluate.main,
            f"{EVALUATE} --num_answers 2",
            "--num_answers needs --test_path and --do_sample",
        ),
        (
            evaluate.main,
            "--model_path m --probe p --predictions x",
            "--predictions needs --test_path",
        ),
        (
            evaluate.main,
            f"{EVALUATE} --metrics rouge --f1_denominator 50",
            "--f1_denominator needs",
        ),
        (memory.main, "--model chatglm2-6b --fit", "--fit needs --compare_seeds"),
        (memory.main, "--compare_seeds --gpu T4", "--gpu needs"),
        *[
            (memory.main, f"--table --{name} {value}", f"--{name} needs --model")
            for name, value in (
                ("mode", "plain"),
                ("gpus", 2),
                ("label_share", 0.5),
                ("real_tokens", 9),
                ("max_len", 9),
            )
        ],
        (memory.main, "--table --model chatglm2-6b", "--model needs a run without"),
        (memory.main, "--model chatglm2-6b --host_gb 9", "--host_gb needs --suggest"),
        (
            memory.main,
            "--model chatglm2-6b --train_type all --lora_dim 4",
            "--lora_dim needs --train_type lora; got all",
        ),
    ],
)
def test_t10_other_commands(capsys, main, words, said):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_t10_every_flag_of_the_other_commands():
    """Those of a model and of loading, and what says what to do, are global."""
    loading = {
        "help",
        "model_path",
        "base_model",
        "mode",
        "prompt_style",
        "device",
        "precision",
        "quantization_bit",
        "keep_quantized",
        "max_src_len",
        "max_new_tokens",
        "do_sample",
        "verify",
    }

    placing = {"num_gpus", "devices", "device_map"}

    def names(parser: argparse.ArgumentParser) -> set[str]:
        return vars(parser.parse_args(["--model_path", "m"])).keys() | {"help"}

    assert (
        names(predict.build_parser())
        == loading | placing | {"prompt", "file", "interactive"} | PREDICTING.keys()
    )
    found = vars(memory.build_parser().parse_args([])).keys()
    # --ds_file and --num_stages are there where they are given: flags of train.py.
    unseen = {"ds_file", "num_stages"}
    assert found == ESTIMATING.keys() - unseen | {"compare_seeds", "table", "guide"}
    rows = {
        "metrics",
        "batch_size",
        "prompt_text",
        "data_format",
        "columns",
        "output",
        "test_path",
        "probe",
    }
    assert not EVALUATING.keys() & ((loading | rows) - PLACING.keys())
