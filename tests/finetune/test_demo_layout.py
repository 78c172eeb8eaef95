"""finetune_hf.py's command line and YAML, and old names in a --config file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.aliases import renamed_values
from finetune.config import TrainConfig, flags_of, parse_config
from tests.finetune.runs import ROOT, metrics

OURS = frozenset(f.name for f in flags_of(TrainConfig))
LORA = """\
data_config: {train_file: train.json, val_file: dev.json, test_file: dev.json, num_proc: 1}
max_input_length: 256
max_output_length: 512
training_args:
  output_dir: ./output
  max_steps: 3000
  learning_rate: 3e-4
  per_device_train_batch_size: 4
  dataloader_num_workers: 2
  remove_unused_columns: false
  save_strategy: steps
  save_steps: 2000
  log_level: info
  logging_strategy: steps
  logging_steps: 10
  per_device_eval_batch_size: 16
  evaluation_strategy: steps
  eval_steps: 500
  predict_with_generate: true
  generation_config: {max_new_tokens: 512}
  use_cpu: false
peft_config: {peft_type: LORA, task_type: CAUSAL_LM, r: 32, lora_alpha: 16, lora_dropout: 0.2}
"""
PREFIX = "peft_config: {peft_type: PREFIX_TUNING, task_type: CAUSAL_LM, num_virtual_tokens: 128}\n"


def config_of(tmp_path: Path, text: str, *more: str) -> TrainConfig:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return parse_config(["--local_rank=0", "data", "model", str(file), *more])


def test_the_lora_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, LORA, "yes", "--seed", "3")
    assert (config.train_path, config.eval_path) == ("data/train.json", "data/dev.json")
    assert (config.model_name_or_path, config.output_dir) == ("model", "./output")
    assert (config.max_src_len, config.max_len) == (256, 769)
    assert (config.train_type, config.lora_dim, config.lora_alpha) == ("lora", 32, 16)
    assert (config.lora_dropout, config.learning_rate) == (0.2, 3e-4)
    assert (config.max_steps, config.num_train_epochs) == (3000, 3000)
    assert (config.save_model_step, config.eval_step, config.show_loss_step) == (2000, 500, 10)
    assert (config.weight_decay, config.warmup_ratio) == (0.0, 0.0)  # transformers' defaults
    assert (config.resume_from_checkpoint, config.seed, config.num_workers) == ("auto", 3, 2)
    said = capsys.readouterr().err.splitlines()
    assert "save_steps is save_model_step here" in said
    assert "data_config.train_file is --train_path data/train.json" in said


def test_a_run(tmp_path: Path, train: Callable[[list[str]], Path], bases: dict[str, Path]) -> None:
    """finetune_hf.py's words train on scored rows and plain texts, for as many steps as it says."""
    data = tmp_path / "data"
    data.mkdir()
    samples = ROOT / "data" / "formats"
    rows = (samples / "scored.jsonl").read_text() + (samples / "document.jsonl").read_text()
    (data / "train.json").write_text(rows)
    (data / "dev.json").write_text((samples / "document.jsonl").read_text())
    file = tmp_path / "c.yaml"
    file.write_text(
        "data_config: {train_file: train.json, val_file: dev.json}\n"
        "max_input_length: 16\nmax_output_length: 16\n"
        f"training_args: {{output_dir: {tmp_path / 'out'}, max_steps: 5, eval_steps: 3,\n"
        "  per_device_train_batch_size: 4, logging_steps: 1}\n"
        "peft_config: {peft_type: LORA, r: 4}\n"
    )
    last = train([str(data), str(bases["glm2"]), str(file)])
    losses = metrics(tmp_path / "out")
    assert len(losses) == 5 and all(0 < loss < 20 for loss in losses)
    assert last.name.endswith("step-5") and (last / "adapter_config.json").is_file()


def test_other_methods(tmp_path: Path) -> None:
    rest = "data_config: {train_file: a.json}\n"
    config = config_of(tmp_path, rest + PREFIX)
    assert (config.train_type, config.pre_seq_len) == ("ptuning", 128)
    assert (config.ptuning_version, config.prefix_projection) == ("v2", False)
    assert (config.learning_rate, config.num_train_epochs) == (5e-5, 3)
    full = rest + "training_args: {deepspeed: ds_zero3_offload.json, fp16: true}\n"
    config = config_of(tmp_path, full)
    assert (config.train_type, config.ds_file) == ("all", "ds_zero3_offload.json")
    assert config.precision == "fp16"


def test_the_command_line_wins(tmp_path: Path) -> None:
    assert config_of(tmp_path, LORA, "no", "--lora_dim", "4").lora_dim == 4


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rate: 1", "wanted data_config, training_args, peft_config"),
        ("data_config: [a]", "data_config must be a mapping"),
        ("data_config: {train_file: 3}", "data_config.train_file must be a file"),
        ("data_config: {train_file: a, num_proc: [1]}", "data_config.num_proc must be a number"),
        ("data_config: {combine: true}", "data_config.combine: true has no counterpart"),
        ("training_args: {save_strategy: no}", "--save_model_step N"),
        ("training_args: {lr_scheduler_type: cosine}", "a linear warm-up, then a linear decay"),
        ("training_args: {adam_epsilon: 1e-6}", 'unknown flag "adam_epsilon"'),
        ("training_args: {generation_config: {top_p: 1}}", "--eval_max_new_tokens"),
        ("peft_config: {peft_type: LOHA}", "--train_type names the methods"),
        ("peft_config: {peft_type: LORA, rank_pattern: 3}", "peft_config.rank_pattern"),
        ("peft_config: {}\nmax_input_length: 3", "go together"),
        ("peft_config: {}\nmax_input_length: x\nmax_output_length: 3", "whole number"),
    ],
)
def test_refused_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        config_of(tmp_path, text)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and "c.yaml" in error
    assert error.count("\n") == 1


def test_a_fourth_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_of(tmp_path, LORA, "500")
    assert "--resume_from_checkpoint FOLDER" in capsys.readouterr().err


def test_old_names_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model_dir: m\ntrain_path: t\nlora_r: 4\nfp16: true\ndeepspeed: a.json\n")
    config = parse_config(["--config", str(file)])
    assert (config.model_name_or_path, config.lora_dim) == ("m", 4)
    assert (config.precision, config.ds_file) == ("fp16", "a.json")
    assert "lora_r is lora_dim here" in capsys.readouterr().err.splitlines()
    file.write_text("optim: adamw_torch\n")
    with pytest.raises(SystemExit):
        parse_config(["--config", str(file)])
    error = capsys.readouterr().err
    assert "c.yaml: --optim of the transformers Trainer has no counterpart" in error


def test_two_names_of_a_flag_in_a_file() -> None:
    assert renamed_values({"fp16": False, "seed": 1}, OURS) == ({"seed": 1}, [])
    with pytest.raises(ValueError, match="lora_r is lora_dim here, which the file has too"):
        renamed_values({"lora_r": 4, "lora_dim": 8}, OURS)
    with pytest.raises(ValueError, match="lora_rank is lora_dim here, which the file has twice"):
        renamed_values({"lora_r": 4, "lora_rank": 8}, OURS)
