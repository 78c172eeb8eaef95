"""Flags: ChatGLM-Finetuning's, row by row; spellings, YAML files, and one-line errors."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from finetune.config import TrainConfig, parse_config
from finetune.flags import parse_bool
from tests.finetune.runs import ROOT, child_env

NEEDED = ["--model_name_or_path", "m", "--train_path", "t"]
BESIDE = {  # what some flags need to have an effect
    "freeze_module_name": ["--train_type", "freeze"],
    "pre_seq_len": ["--train_type", "ptuning"],
    "prefix_projection": ["--train_type", "ptuning"],
    "share_prefix": ["--lora_dropout", "0"],
}
# ChatGLM-Finetuning's train.py: flag, its default, a value as typed, the value meant
OLD_FLAGS = [
    ("max_len", 1024, "77", 77),
    ("max_src_len", 256, "66", 66),
    ("per_device_train_batch_size", 16, "2", 2),
    ("learning_rate", 1e-3, "1e-4", 1e-4),
    ("weight_decay", 0.1, "0.01", 0.01),
    ("num_train_epochs", 1, "2", 2),
    ("gradient_accumulation_steps", 1, "4", 4),
    ("warmup_ratio", 0.1, "0.2", 0.2),
    ("output_dir", None, "o", "o"),
    ("mode", "glm2", "glm3", "glm3"),
    ("train_type", "lora", "ptuning", "ptuning"),
    ("seed", 1234, "5", 5),
    ("local_rank", -1, "1", 1),
    ("show_loss_step", 10, "3", 3),
    ("save_model_step", None, "100", 100),
    ("ds_file", "ds_zero2.json", "x.json", "x.json"),
    ("lora_dim", 8, "16", 16),
    ("lora_alpha", 30, "64", 64),
    ("lora_dropout", 0.1, "0.05", 0.05),
    ("lora_module_name", "query_key_value", "a,b", "a,b"),
    ("freeze_module_name", "layers.27.", "layers.27.,layers.26.", "layers.27.,layers.26."),
    ("pre_seq_len", 16, "8", 8),
    ("prefix_projection", True, "False", False),
    ("is_skip", False, None, True),
    ("gradient_checkpointing", "False", None, "True"),
]


def refuse(capsys, *argv) -> str:
    """The one line that a refused command line ends with."""
    with pytest.raises(SystemExit) as stop:
        parse_config(list(argv), {"another": TrainConfig})
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: ")
    return lines[0]


@pytest.mark.parametrize(
    "name, default, typed, meant", OLD_FLAGS, ids=[row[0] for row in OLD_FLAGS]
)
def test_old_flag(name, default, typed, meant):
    found = getattr(parse_config(NEEDED), name)
    # --mode: the default is to look, and glm2 where the folder does not tell
    assert found == (None if name == "mode" else default)
    config = parse_config(
        [*NEEDED, *BESIDE.get(name, []), "--max_src_len", "64", f"--{name}"]
        + ([typed] if typed else [])
    )
    assert getattr(config, name) == meant and type(getattr(config, name)) is type(meant)


def test_launchers_own_flags():
    config = parse_config(
        [*NEEDED, "--local-rank=3", "--deepspeed", "--deepspeed_config", "ds.json"]
    )
    assert (config.local_rank, config.ds_file) == (3, "ds.json")


@pytest.mark.parametrize(
    "text, value",
    [
        *[(t, True) for t in ("True", "true", "TRUE", "yes", "1", "on")],
        *[(t, False) for t in ("False", "false", "FALSE", "no", "0", "off", "Off")],
    ],
)
def test_booleans(text, value):
    for f in dataclasses.fields(TrainConfig):
        if f.type in (bool, "bool") and f.name != "eval_f1":
            assert (
                getattr(
                    parse_config([*NEEDED, *BESIDE.get(f.name, []), f"--{f.name}", text]), f.name
                )
                is value
            )
            assert (
                getattr(
                    parse_config([*NEEDED, *BESIDE.get(f.name, []), f"--{f.name}={text}"]), f.name
                )
                is value
            )
    assert parse_bool(value) is value


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("true", "True"),
        ("yes", "True"),
        ("1", "True"),
        ("FALSE", "False"),
        ("0", "False"),
        ("selective", "selective"),
    ],
)
def test_gradient_checkpointing_is_spelt_as_a_boolean_too(tmp_path, typed, meant):
    assert (
        parse_config([*NEEDED, "--gradient_checkpointing", typed]).gradient_checkpointing == meant
    )
    (tmp_path / "c.yaml").write_text(f"gradient_checkpointing: {typed}\n")
    assert (
        parse_config([*NEEDED, "--config", str(tmp_path / "c.yaml")]).gradient_checkpointing
        == meant
    )


@pytest.mark.parametrize(
    "projection, version, resolved",
    [
        (None, None, "v2"),
        ("True", None, "v2"),
        ("False", None, "v1"),
        ("False", "v2", "v2"),
        ("True", "v1", "v1"),
    ],
)
def test_ptuning_version(projection, version, resolved):
    words = ["--train_type", "ptuning"] + (
        ["--prefix_projection", projection] if projection else []
    )
    words += ["--ptuning_version", version] if version else []
    assert parse_config([*NEEDED, *words]).resolved_ptuning_version == resolved


def test_metrics_of_an_evaluation():
    config = parse_config(
        [
            *NEEDED,
            "--eval_path",
            "e",
            "--eval_metrics",
            "rouge,triple_f1",
            "--eval_f1",
            "--metric_for_best",
            "f1",
        ]
    )
    assert (
        config.evaluated == ("loss", "rouge1", "rouge2", "rougeL", "triple_f1")
        and config.metric_for_best == "triple_f1"
    )


@pytest.mark.parametrize(
    "words, said",
    [
        ("--train_type qlora", "qlora"),
        ("--mode glm5", "glm5"),
        ("--precision int8", "int8"),
        ("--prefix_projection maybe", "maybe"),
        ("--max_len many", "--max_len"),
        ("--lora_dim 0", "--lora_dim must be at least 1; got 0"),
        ("--lora_dropout 1", "--lora_dropout"),
        ("--lora_dropout nan", "--lora_dropout"),
        ("--learning_rate -1", "--learning_rate"),
        ("--learning_rate nan", "--learning_rate"),
        ("--weight_decay inf", "--weight_decay"),
        ("--warmup_ratio 1.5", "--warmup_ratio"),
        ("--max_src_len 1024", "--max_len (1024)"),
        ("--eval_f1 True", "--eval_path"),
        ("--metric_for_best f1", "--eval_f1"),
        ("--no_such_flag 1", "--no_such_flag"),
        ("--learn 1", "--learn"),
        ("--model_name_or_path=", "--model_name_or_path is required"),
        ("--train_path=", "--train_path is required"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--save_total_limit 0", "--save_total_limit"),
        ("--max_steps -3", "--max_steps"),
        ("--seed -1", "--seed"),
        ("--batching sorted", "sorted"),
        ("--gradient_checkpointing maybe", "maybe"),
        ("--num_workers -1", "--num_workers"),
        ("--eval_metrics meteor", "meteor"),
        ("--eval_metrics rouge", "--eval_metrics needs --eval_path"),
        ("--eval_path e --metric_for_best rougeL", "must be one of loss; got 'rougeL'"),
        ("--early_stopping_patience 2", "--eval_path"),
        ("--eval_path e --early_stopping_patience 0", "--early_stopping_patience"),
        ("--early_stopping_min_delta nan", "min_delta"),
        (
            "--early_stopping_min_delta 0.1",
            "--early_stopping_min_delta needs --early_stopping_patience",
        ),
        ("--train_type all --use_dora", "--use_dora needs --train_type lora; got all"),
        ("--train_type freeze --use_rslora", "--use_rslora needs"),
        ("--train_type ptuning --loraplus_lr_ratio 16", "--loraplus_lr_ratio needs"),
        ("--train_type all --init_lora_weights pissa", "--init_lora_weights needs"),
        (
            "--streaming --preprocessing_num_workers 2",
            "--preprocessing_num_workers needs a run without --streaming",
        ),
        ("--report_to tensorbord", "wanted some of tensorboard, wandb, swanlab; got 'tensorbord'"),
    ],
)
def test_refused_flags(capsys, words, said):
    assert said in refuse(capsys, *NEEDED, *words.split())


def test_flags_that_change_nothing_may_be_given():
    for words in (
        "--early_stopping_min_delta 0",
        "--train_type all --loraplus_lr_ratio 1",
        "--train_type all --use_dora False --init_lora_weights default",
        "--streaming --preprocessing_num_workers 1",
        "--eval_path e --early_stopping_patience 1 --early_stopping_min_delta 0.1",
    ):
        parse_config([*NEEDED, *words.split()])


def test_config_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "learning_rate: 1e-4\nis_skip: yes\nshare_prefix: 'False'\nmax_steps: 7\n"
        "lora_dim: 4\nmode:\nlora_dropout: 0\n"
    )
    config = parse_config([*NEEDED, "--config", str(file), "--lora_dim", "2"])
    assert (
        config.learning_rate,
        config.is_skip,
        config.share_prefix,
        config.max_steps,
        config.lora_dim,
    ) == (1e-4, True, False, 7, 2)
    assert config.mode is None and isinstance(config.lora_dropout, float)
    (tmp_path / "c.json").write_text(json.dumps({"max_len": 55, "max_src_len": 44}))
    assert parse_config([*NEEDED, "--config", str(tmp_path / "c.json")]).max_len == 55
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse_config([*NEEDED, "--config", str(tmp_path / "empty.yaml")]) == parse_config(NEEDED)


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rat: 1", "learning_rat"),
        ("learning_rate: fast", "learning_rate"),
        ("- 1\n- 2", "mapping"),
        ("a: [", "not valid YAML"),
        ("is_skip: 2", "is_skip"),
        ("is_skip: [1]", "is_skip"),
        ("max_len: 3000.7", "wrong type"),
        ("max_len: true", "wrong type"),
        ("learning_rate: null", "learning_rate"),
        ("train_type: null", "train_type"),
        ("lora_module_name: [a, b]", "lora_module_name"),
        ("learning_rate: true", "learning_rate"),
        ("train_type: qlora", "qlora"),
        ("1: 2\nx: 3", "unknown flag"),
        ("max_len: -1", "max_len"),
        ("task: [a]", 'task has the wrong type: ["a"]'),
        ("task: {a: 1}", "task has the wrong type"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"\xff\xfe\xff", "c.yaml"),
    ],
)
def test_refused_config_file(tmp_path, capsys, text, said):
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refuse(capsys, *NEEDED, "--config", str(file))
    assert said in line
    assert "c.yaml" in line or said in ("qlora", "max_len")


def test_help_is_quick_and_free_of_torch():
    words = (
        "import sys, train\n"
        "try: train.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'deepspeed', 'peft', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", words],
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for f in dataclasses.fields(TrainConfig):
        assert f"--{f.name}" in done.stdout and f.metadata["help"]

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "train.py", "--help"],
            cwd=ROOT,
            env=child_env(),
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1.5


def test_changed_flags_are_named():
    old = dataclasses.asdict(parse_config(NEEDED))
    new = parse_config(
        [
            *NEEDED,
            "--learning_rate",
            "0.5",
            "--show_loss_step",
            "1",
            "--output_dir",
            "x",
            "--save_total_limit",
            "2",
        ]
    )
    assert new.changed_since(old) == ["--learning_rate: was 0.001, is 0.5"]


def test_t9_hostile_yaml_is_refused_quickly(tmp_path, capsys):
    """An alias bomb, deep nesting, a value of 1 MB: a short line each.

    One alias of a scalar is read.
    """
    file, lines = tmp_path / "c.yaml", ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi")
    ]
    merged = [
        "a: &a {x: 1}",
        *(
            f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}"
            for before, name in zip("abcdefgh", "bcdefghi")
        ),
    ]
    for text in (
        "\n".join(lines),
        "\n".join(merged),
        "max_len: &a [*a]",
        "[" * 60_000,
        f"max_len: {'9' * 10**4}",
        f"max_len: [{'1, ' * 9000}]",
        f"{'x' * 10**4}: 1",
        " " * 10**6,
        "max_len: 2020-99-99",
    ):
        file.write_text(text)
        started = time.perf_counter()
        line = refuse(capsys, *NEEDED, "--config", str(file))
        assert "c.yaml" in line and len(line) < 700 and time.perf_counter() - started < 20
    file.write_text("save_model_step: &steps 7\nmax_steps: *steps\n")
    assert parse_config([*NEEDED, "--config", str(file)]).max_steps == 7


@pytest.mark.parametrize("given, follows", [(None, 256), (257, 256), (256, 128), (160, 80), (2, 1)])
def test_newcomers_prompt_limit_follows(given, follows):
    assert (
        parse_config([*NEEDED, *(["--max_len", str(given)] if given else [])]).max_src_len
        == follows
    )


def test_newcomers_flag_errors_are_one_line(capsys):
    for words in (["--max_len", "x"], ["--max_src_len", "2000"], ["--no_such"], ["--max_len", "1"]):
        with pytest.raises(SystemExit):
            parse_config([*NEEDED, *words])
        assert len(capsys.readouterr().err.splitlines()) == 1
