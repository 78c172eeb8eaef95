"""Tiny models with tokenizers, and training in this process."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.causal_folders import make_causal_folder
from tests.finetune.runs import METHODS, ROOT, STOPS, TWO_RANKS, launch, make_rows, write_rows


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """{family: folder} of random models, 2 layers of 64, with tokenizers.

    Also "glm2-seed", "glm2-wide", and "qwen2", a model of transformers.
    """
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    folder = tmp_path_factory.mktemp("bases")
    rows = write_rows(folder / "rows.json", make_rows(60, seed=9))
    made = {}
    for family in ("glm", "glm2", "glm3", "glm4"):
        tokenizer = folder / f"tokenizer-{family}"
        # Few byte pairs: a prompt's beginning, which rows share, is then long enough to be shared.
        pieces = 300 if family == "glm4" else 420
        words = ["--input", rows, "--output_dir", tokenizer, "--vocab_size", pieces]
        assert make_tokenizer([*map(str, words), "--family", family]) == 0
        others = (
            {"glm2-seed": {"seed": 7}, "glm2-wide": {"hidden_size": 128}}
            if family == "glm2"
            else {}
        )
        for name, options in ({family: {}} | others).items():
            sizes = {"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128} | options
            made[name] = make_model(family, tokenizer, folder / name, **sizes)
    made["qwen2"] = make_causal_folder(folder / "qwen2", "qwen2")
    return made


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.json", make_rows(13))


@pytest.fixture(scope="session")
def ds_files(tmp_path_factory) -> dict[str, str]:
    """{name: path} of the ZeRO-3 files changed to partition every weight.

    By default ZeRO-3 leaves weights as small as the tests' whole.
    """
    folder = tmp_path_factory.mktemp("ds_configs")
    for file in (ROOT / "ds_configs").glob("ds_zero3*.json"):
        ds = json.loads(file.read_text())
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / file.name).write_text(json.dumps(ds))
    return {file.name: str(file) for file in folder.iterdir()}


@pytest.fixture(scope="session")
def flags(bases, rows_file, ds_files, tmp_path_factory):
    """The flags of a short run: flags(output_dir, "--more", ..., family="glm2", method="lora")."""

    cache = tmp_path_factory.mktemp("cache")

    def make(output_dir, *more, family="glm2", method="lora"):
        given = [
            "--model_name_or_path",
            bases[family],
            "--train_path",
            rows_file,
            "--output_dir",
            output_dir,
            "--max_len",
            96,
        ]
        given += [
            "--max_src_len",
            64,
            "--per_device_train_batch_size",
            4,
            "--learning_rate",
            "1e-2",
            "--warmup_ratio",
            0,
            "--data_cache",
            cache,
        ]
        return [ds_files.get(str(word), str(word)) for word in [*given, *METHODS[method], *more]]

    return make


@pytest.fixture(scope="session")
def train():
    """train(flags) -> the last checkpoint, in this process, also where a signal stopped it."""

    def run(words) -> Path:
        from finetune.config import parse_config
        from finetune.engine import train
        from finetune.stopping import StoppedBySignal

        try:
            return train(parse_config(words))
        except StoppedBySignal as stopped:
            return stopped.folder

    return run


@pytest.fixture(scope="session")
def adapter(flags, train, tmp_path_factory) -> Path:
    """A LoRA checkpoint of 4 steps that changes what the glm2 base says."""
    return train(flags(tmp_path_factory.mktemp("adapter") / "out", "--save_model_step", 2))


@pytest.fixture(scope="session")
def two_ranks(flags, rows_file, tmp_path_factory) -> list[list[str]]:
    """The flags of TWO_RANKS, and of three runs more, all trained on 2 ranks.

    The sixth, with dropout, ran its second half twice, the second time resumed from its middle;
    the seventh is the sixth without interruption; the eighth stops early.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    shared = ["--per_device_train_batch_size", 2, "--num_train_epochs", 2, "--ds_file"]
    cases = [
        flags(folder / str(n), *shared, z, family=f, method=m)
        for n, (_, f, m, z) in enumerate(TWO_RANKS)
    ]
    dropout = ["ds_zero3_offload.json", "--prefix_dropout", "0.3"]
    cases += [
        flags(folder / name, *shared, *dropout, method="ptuning-v2-mlp") for name in ("5", "6")
    ]
    answers = [
        "--eval_path",
        rows_file,
        "--eval_metrics",
        "exact_match,f1",
        "--eval_max_new_tokens",
        3,
    ]
    cases.append(
        flags(
            folder / "7",
            "--per_device_train_batch_size",
            2,
            "--ds_file",
            "ds_zero3_no_offload.json",
            *STOPS,
            *answers,
            method="all",
        )
    )
    resumed = [*cases[5], "--resume_from_checkpoint", str(folder / "5" / "epoch-1-step-4")]
    (folder / "cases.json").write_text(json.dumps([*cases[:4], *cases[5:], resumed]))
    launch("deepspeed", "tests/finetune/worker.py", folder / "cases.json")
    assert "2 rank(s)" in launch("torchrun", "train.py", *cases[4]).stdout
    return cases


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
