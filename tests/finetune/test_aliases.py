"""Other projects' flags: each is renamed or refused in one line that says what to do."""

import re

import pytest

from finetune.aliases import OLD_FLAGS, renamed_arguments
from finetune.config import TrainConfig, flags_of, parse_config
from finetune.reinforcement.config import GrpoConfig, PpoConfig

OURS = frozenset(f.name for f in flags_of(TrainConfig))
ALL = OURS | {f.name for config in (GrpoConfig, PpoConfig) for f in flags_of(config)}
RENAMED = [name for name, old in OLD_FLAGS.items() if old.ours]
REFUSED = [name for name, old in OLD_FLAGS.items() if not old.ours]


@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_flag_is_ours(name: str) -> None:
    old = OLD_FLAGS[name]
    assert old.ours in ALL and name not in OURS and not old.reason
    given = [f"--{name}"] if old.value else [f"--{name}", "7"]
    arguments, lines = renamed_arguments(given, ALL)
    assert arguments == [f"--{old.ours}", old.value or "7"]
    assert len(lines) == 1 and lines[0].startswith(f"--{name} is --{old.ours}")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_says_why(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    old = OLD_FLAGS[name]
    assert old.reason and name not in OURS
    assert set(re.findall(r"--(\w+)", old.reason)) <= ALL
    with pytest.raises(SystemExit) as stop:
        parse_config(["--model_name_or_path", "M", f"--{name}", "x"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"--{name} of {old.source} has no counterpart: {old.reason}" in error


def test_a_command_of_v01(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('{"text": "a", "answer": "b"}\n')
    words = f"--model_dir {tmp_path} --train_path {rows} --train_batch_size 2 --log_steps=5"
    config = parse_config([*words.split(), "--lora_r", "4", "--prompt_text", "p"])
    assert (config.model_name_or_path, config.per_device_train_batch_size) == (str(tmp_path), 2)
    assert (config.show_loss_step, config.lora_dim) == (5, 4)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--lora_r is --lora_dim here" in error


def test_deepspeed_with_a_file_is_ds_file() -> None:
    assert renamed_arguments(["--deepspeed", "a.json"], OURS)[0] == ["--ds_file", "a.json"]
    assert renamed_arguments(["--deepspeed=a.json"], OURS)[0] == ["--ds_file", "a.json"]
    alone = ["--deepspeed", "--seed", "1"]
    assert renamed_arguments(alone, OURS) == (alone, [])


def test_a_switch_that_is_off_changes_nothing() -> None:
    assert renamed_arguments(["--fp16", "False", "--seed", "1"], OURS)[0] == ["--seed", "1"]
    with pytest.raises(ValueError, match="--fp16: wanted True or False"):
        renamed_arguments(["--fp16", "O1"], OURS)


def test_a_flag_that_another_task_lacks() -> None:
    with pytest.raises(ValueError, match="here it is --lora_dim, which this --task does not have"):
        renamed_arguments(["--lora_r", "8"], OURS - {"lora_dim"})
