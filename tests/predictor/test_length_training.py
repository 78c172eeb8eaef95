"""train.py --task predictor: every head and backbone learns; bad flags give one line.

Ranks and interruptions change nothing.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import train as command_line
from finetune.checkpoint import read_manifest
from predictor import LengthPredictor
from predictor import export as exporting
from predictor.scores import kendall_tau
from tests.finetune.runs import launch, metrics
from tests.predictor.conftest import HEADS, make_rows, write_rows

PROMPTS = ["hello 0 world", "user 1 a", "b 2", "c 3 hello hello"]
CASES = [  # backbone, family, head, --train_type with its knobs
    ("encoder", "", "distribution", ["all", "--learning_rate", "2e-3"]),
    (
        "encoder",
        "",
        "ranking",
        [
            "freeze",
            "--freeze_module_name",
            "layer.1.",
            "--encoder_layers",
            "1,2",
            "--learning_rate",
            "3e-3",
            "--num_train_epochs",
            "8",
        ],
    ),
    (
        "encoder",
        "",
        "regression",
        ["lora", "--lora_module_name", "query,value", "--learning_rate", "2e-3"],
    ),
    (
        "encoder",
        "",
        "bucket",
        ["all", "--learning_rate", "2e-3", "--precision", "bf16", "--batching", "grouped"],
    ),
    ("chatglm", "glm", "regression", ["lora", "--learning_rate", "1e-2"]),
    (
        "chatglm",
        "glm2",
        "ranking",
        ["lora", "--ranking_loss", "listmle", "--learning_rate", "1e-2"],
    ),
    (
        "chatglm",
        "glm3",
        "distribution",
        ["ptuning", "--pre_seq_len", "4", "--prefix_dropout", "0", "--learning_rate", "1e-2"],
    ),
    (
        "chatglm",
        "glm2",
        "bucket",
        [
            "ptuning",
            "--pre_seq_len",
            "4",
            "--prefix_projection",
            "False",
            "--learning_rate",
            "3e-2",
        ],
    ),
    (
        "chatglm",
        "glm2",
        "regression",
        ["freeze", "--freeze_module_name", "layers.2.", "--learning_rate", "2e-3"],
    ),
    ("chatglm", "glm", "distribution", ["all", "--learning_rate", "2e-3"]),
]


@pytest.mark.parametrize(
    "backbone, family, head, method",
    CASES,
    ids=lambda value: value[0] if isinstance(value, list) else value or "-",
)
def test_learns(flags, train, tmp_path, backbone, family, head, method):
    """The loss falls; the saved folder predicts what the trained network does on unseen prompts."""
    words = flags(
        tmp_path / "out",
        backbone,
        "--head",
        head,
        *HEADS[head],
        "--num_train_epochs",
        3,
        "--train_type",
        *method,
        family=family or "glm2",
    )
    last = train(words)
    losses = metrics(tmp_path / "out")
    third = len(losses) // 3
    assert np.mean(losses[-third:]) < 0.97 * np.mean(losses[:third])
    found = read_manifest(last)["metrics"]
    assert set(found) >= {"loss", "tau", "mae", "coverage_90"} and all(
        map(np.isfinite, found.values())
    )
    card = json.loads((last / "predictor.json").read_text())
    assert card["metrics"]["calibration"]["tau"] == found["tau"] and card["head"]["name"] == head
    for made in LengthPredictor.from_pretrained(last).predict(PROMPTS):
        assert made.edges[-1] == 1024 and abs(made.probabilities.sum() - 1) < 1e-9


def tau(folder: Path) -> float:
    """Kendall's tau of the ranks of prompts that nobody has seen."""
    rows = make_rows(60, seed=77)
    ranks = [
        p.rank_score
        for p in LengthPredictor.from_pretrained(folder).predict([row["prompt"] for row in rows])
    ]
    return kendall_tau(np.array(ranks), np.array([row["output_tokens"] for row in rows]))


def test_what_is_learnt_is_right(trained_encoder):
    assert tau(trained_encoder) > 0.5


def test_lexical_with_and_without_a_teacher(flags, train, lexical, trained_encoder, tmp_path):
    taught = train(
        flags(
            tmp_path / "taught", "lexical", "--encoder_path", trained_encoder, "--student_dims", 8
        )
    )
    for folder in (lexical, taught):
        assert not (folder / "model.safetensors").exists() and tau(folder) > 0.6


@pytest.mark.parametrize("head", HEADS)
def test_every_head_on_a_frozen_backbone(flags, train, tmp_path, head):
    assert tau(train(flags(tmp_path / "out", "lexical", "--head", head, *HEADS[head]))) > (
        0.3 if head == "bucket" else 0.6
    )  # equal classes are too wide


@pytest.mark.parametrize("family", ["glm", "glm3"])
def test_reuse_prefill(flags, train, tiny_folders, tmp_path, family):
    """The head reads the served model's states.

    Exported without a model, it predicts the same for prompts and for vectors.
    """
    folder = train(
        flags(
            tmp_path / "out",
            "chatglm",
            "--reuse_prefill",
            "True",
            "--head",
            "regression",
            family=family,
        )
    )
    exported = tmp_path / "exported"
    assert exporting.main(["--checkpoint", str(folder), "--output", str(exported)]) == 0
    assert {p.name for p in exported.iterdir()} == {
        "kernel.safetensors",
        "predictor.json",
        "checksums.json",
    }
    predictor = LengthPredictor.from_pretrained(exported)
    vectors = predictor.score.vectors(PROMPTS)
    assert vectors.shape[0] == len(PROMPTS)
    for a, b in zip(predictor.predict(PROMPTS), predictor.predict_vectors(vectors)):
        assert np.abs(a.cumulative - b.cumulative).max() < 1e-9
    with pytest.raises(ValueError, match=r"vectors must be \(N, "):
        predictor.predict_vectors(vectors[:, :-1])
    nowhere = LengthPredictor.from_pretrained(exported, base_model=str(tmp_path / "nowhere"))
    assert len(nowhere.predict_vectors(vectors)) == len(PROMPTS)  # the served model has run already
    with pytest.raises(FileNotFoundError, match="give base_model=FOLDER"):
        nowhere.predict(PROMPTS)


@pytest.mark.parametrize(
    "more",
    [
        ["--train_type", "lora", "--lora_dropout", "0.3"],
        ["--train_type", "ptuning", "--pre_seq_len", "4"],
    ],
    ids=lambda m: m[1],
)
def test_stop_and_resume_is_bit_identical(flags, train, tmp_path, monkeypatch, more):
    from predictor.training import LengthTraining

    more = [*more, "--num_train_epochs", 2, "--num_workers", 0]
    last = train(flags(tmp_path / "a", "chatglm", *more))
    collate, seen = LengthTraining.collate, []

    def counting(*args):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return collate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LengthTraining, "collate", counting)
        stopped = train(flags(tmp_path / "b", "chatglm", *more))
    assert (
        0 < len(metrics(tmp_path / "b")) < len(metrics(tmp_path / "a"))
        and (stopped / "predictor.json").is_file()
    )
    again = train(flags(tmp_path / "b", "chatglm", *more, "--resume_from_checkpoint", "auto"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and again.name == last.name
    for file in [*last.glob("*.safetensors"), last / "predictor.json"]:
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.slow
def test_two_ranks(flags, train, tmp_path):
    """DeepSpeed's launcher, ZeRO-2 and --train_type lora: the losses are one rank's.

    The export predicts what the checkpoint does.
    """
    shared = [
        "--train_type",
        "lora",
        "--lora_dropout",
        "0",
        "--head",
        "distribution",
        "--max_steps",
        "4",
        "--ds_file",
        "ds_zero2.json",
    ]
    words = flags(tmp_path / "two", "chatglm", *shared, "--per_device_train_batch_size", 8)
    assert "2 rank(s)" in launch("deepspeed", "train.py", *words).stdout
    one = train(flags(tmp_path / "one", "chatglm", *shared))
    assert np.allclose(metrics(tmp_path / "two"), metrics(tmp_path / "one"), rtol=1e-4)
    two = tmp_path / "two" / one.name
    assert read_manifest(two)["world_size"] == 2
    assert exporting.main(["--checkpoint", str(two), "--output", str(tmp_path / "exported")]) == 0
    made = [
        LengthPredictor.from_pretrained(folder).predict(PROMPTS)
        for folder in (two, tmp_path / "exported", one)
    ]
    for a, b, c in zip(*made):
        assert np.array_equal(a.probabilities, b.probabilities)
        assert (
            np.abs(a.cumulative - c.cumulative).max() < 0.05
        )  # Adam turns rounding of a gradient near 0 into a step


def refused(capsys, words, code: int) -> str:
    """What the command line says: one line, under an exit code."""
    capsys.readouterr()
    try:
        found = command_line.main([str(word) for word in words])
    except SystemExit as stopped:
        found = stopped.code
    said = capsys.readouterr().err.strip().splitlines()
    assert found == code and "error: " in said[-1], said
    assert code == 2 or len(said) == 1
    return said[-1]


@pytest.mark.parametrize(
    "backbone, more, said",
    [
        (
            "lexical",
            ["--train_type", "lora"],
            "--backbone lexical has no weights for --train_type lora",
        ),
        ("lexical", ["--head", "guess"], "--head"),
        ("lexical", ["--num_bins", 1], "--num_bins must be from 2 to 10,000; got 1"),
        ("lexical", ["--calibration_share", 0], "--calibration_share must be above 0"),
        ("lexical", ["--near_duplicates", 0], "--near_duplicates"),
        (
            "lexical",
            ["--other_models_weight", 1],
            "--other_models_weight must be in [0, 1); got 1.0",
        ),
        ("lexical", ["--length_limit", 1], "--length_limit"),
        ("lexical", ["--label_width", "nan"], "--label_width"),
        ("lexical", ["--student_dims", -1], "--student_dims"),
        ("lexical", ["--reuse_prefill", "True"], "--reuse_prefill needs --backbone chatglm"),
        ("lexical", ["--train_path", ""], "--train_path is required"),
        ("chatglm", ["--model_name_or_path", ""], "--model_name_or_path is required"),
        ("encoder", ["--encoder_path", ""], "--encoder_path"),
        ("encoder", ["--train_type", "ptuning"], "--train_type ptuning is for ChatGLM"),
        ("encoder", ["--encoder_layers", "0,x"], "--encoder_layers"),
        ("chatglm", ["--reuse_prefill", "True", "--train_type", "lora"], "--reuse_prefill needs"),
        ("lexical", ["--nonsense", 1], "--nonsense"),
        (
            "lexical",
            ["--early_stopping_patience", 2],
            "--early_stopping_patience needs a backbone that is trained",
        ),
        ("lexical", ["--report_to", "wandb"], "--report_to needs"),
        ("lexical", ["--resume_from_checkpoint", "auto"], "--resume_from_checkpoint needs"),
        ("encoder", ["--train_type", "none", "--report_to="], "--report_to needs"),
        ("encoder", ["--use_dora"], "--use_dora needs --train_type lora; got all"),
        ("lexical", ["--hash_bits", 40], "--hash_bits must be from 8 to 24; got 40"),
    ],
)
def test_bad_flags_are_one_line(flags, capsys, tmp_path, backbone, more, said):
    assert said in refused(capsys, flags(tmp_path / "out", backbone, *more), 2)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_one_line(flags, lexical, trained_encoder, encoder, capsys, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", make_rows(6))
    for backbone, more, said in (
        ("lexical", ["--train_path", tmp_path / "nowhere.jsonl"], "nowhere.jsonl"),
        ("lexical", ["--served_model", "gpt"], "no row is of it"),
        ("lexical", ["--train_path", few], "at least 10 are needed"),
        ("encoder", ["--encoder_path", tmp_path], "its tokenizer cannot be read"),
        ("encoder", ["--encoder_layers", 9], "9 is none of the encoder's 3 layers"),
        ("encoder", ["--max_src_len", 200], "reads at most 128 tokens"),
        ("lexical", ["--output_dir", lexical], "--overwrite_output_dir"),
        ("lexical", ["--output_dir", tmp_path], "holds other things than a predictor"),
    ):
        assert said in refused(capsys, flags(tmp_path / "out", backbone, *more), 1)
    assert not (tmp_path / "out").exists()


def test_a_part_that_an_encoder_has_not_is_one_line(flags, capsys, tmp_path):
    assert "'layers.27.' matches no parameter" in refused(
        capsys, flags(tmp_path / "out", "encoder", "--train_type", "freeze"), 1
    )


def test_rows_of_two_models_and_test_rows(flags, train, tmp_path):
    """--eval_path decides the best checkpoint.

    Other models' rows and truncated answers are used.
    """
    rows = (
        make_rows(100)
        + make_rows(100, served_model="other", seed=1)
        + make_rows(30, seed=2, finished=False)
    )
    path = write_rows(tmp_path / "rows.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", make_rows(40, seed=3))
    words = flags(
        tmp_path / "out",
        "encoder",
        "--train_path",
        path,
        "--eval_path",
        test,
        "--metric_for_best",
        "tau",
        "--learning_rate",
        "2e-3",
        "--num_train_epochs",
        2,
    )
    last: Path = train(words)
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["metric"] == "tau" and best["value"] == max(metrics(tmp_path / "out", "eval_tau"))
    card = json.loads((last / "predictor.json").read_text())
    assert (
        card["training_data"]["served_models"] == ["other", "tiny"]
        and card["served_model"]["name"] == "tiny"
    )
