"""Nothing incomplete loads, resumes or merges: checksums of every file.

And how to continue after a deliberate change.
"""

import json
import shutil
from pathlib import Path

import pytest

import merge_lora
import train as command_line
from benchmarks import byte_flips
from chatglm import checksums, load_model, load_tokenizer
from chatglm.checksums import CHECKSUMS, read_checksums, write_checksums
from finetune.checkpoint import committed_checkpoints
from finetune.evaluation import predict


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    """A LoRA checkpoint in an output folder of its own."""
    folder = tmp_path / "out" / adapter.name
    shutil.copytree(adapter, folder)
    return folder


def flip(path: Path, place: int = -9):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a2_every_file_has_a_checksum(adapter):
    listed = read_checksums(adapter).keys()
    there = {p.relative_to(adapter).as_posix() for p in adapter.rglob("*") if p.is_file()}
    assert listed == there - {CHECKSUMS, "README.md"}
    assert {"manifest.json", "adapter_model.safetensors"} < listed and sum(
        name.startswith("trainer/") for name in listed
    ) >= 2


def test_a2_flipped_bytes_are_refused_or_without_effect(tmp_path, capsys):
    """Four methods in miniature, one flip of every kind; benchmarks/byte_flips.py does 200."""
    table = byte_flips.run(
        tmp_path, flips=40, seed=1, methods=("lora", "ptuning-v2", "all", "predictor")
    )
    assert sum(row.wrong for row in table.values()) == 0
    assert table["no program reads it"].without_effect > 0
    for kind in (
        "safetensors header",
        "tensor",
        "JSON key",
        "JSON number",
        "trainer shard",
        "manifest",
        "checksums",
    ):
        assert table[kind].flipped == table[kind].refused > 0, kind


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "tokenizer.model",
        "manifest.json",
        "train_config.json",
        CHECKSUMS,
    ],
)
def test_a2_load_refuses(copy, name, capsys):
    flip(copy / name)
    with pytest.raises(ValueError, match=f"{name}: changed since it was written") as refused:
        load_model(copy)
    assert "--renew" in str(refused.value) and "\n" not in str(refused.value)
    if not name.endswith("safetensors"):
        with pytest.raises(ValueError, match=name):
            load_tokenizer(copy)
    assert load_model(copy, verify="off") is not None or name == "tokenizer.model"


def test_a2_a_missing_file_is_named(copy):
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="generation_config.json: missing"):
        load_model(copy)


def test_a2_the_base_of_an_adapter_is_checked_too(copy, bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["glm2"], base)
    write_checksums(base)
    assert load_model(copy, base=base) is not None
    flip(base / "model.safetensors")
    with pytest.raises(ValueError, match="base/model.safetensors: changed"):
        load_model(copy, base=base)
    assert load_model(copy, base=base, verify="off") is not None


def test_a2_merge_refuses(copy, bases, tmp_path, capsys):
    flip(copy / "adapter_model.safetensors")
    words = [
        "--ori_model_dir",
        str(bases["glm2"]),
        "--model_dir",
        str(copy),
        "--save_dir",
        str(tmp_path / "merged"),
    ]
    assert merge_lora.main(words) == 1
    line = capsys.readouterr().err.strip()
    assert (
        "adapter_model.safetensors: changed" in line
        and "\n" not in line
        and not (tmp_path / "merged").exists()
    )
    assert merge_lora.main([*words, "--verify", "off"]) == 0


def test_a2_resume_refuses_and_names_the_checkpoint_before(flags, train, tmp_path, capsys):
    last = train(flags(tmp_path / "out", "--max_steps", 2, "--save_model_step", 1))
    first = committed_checkpoints(tmp_path / "out")[0]
    words = flags(
        tmp_path / "out",
        "--max_steps",
        2,
        "--save_model_step",
        1,
        "--resume_from_checkpoint",
        "auto",
    )
    for shard in (last / "trainer").rglob("*.pt"):
        before = shard.read_bytes()
        flip(shard, len(before) // 2)
        capsys.readouterr()
        assert command_line.main(words) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            f"{shard}: changed since it was written" in line
            and f"newest other checkpoint is {first}" in line
        )
        shard.write_bytes(before)
    assert command_line.main(words) == 0


def test_a2_old_checkpoints_are_checked_by_their_manifests(flags, train, tmp_path, capsys):
    folder = train(flags(tmp_path / "out", "--max_steps", 1))
    sums = {
        name: hashes["sha256"]
        for name, hashes in read_checksums(folder).items()
        if "/" not in name and name != "manifest.json"
    }
    (folder / CHECKSUMS).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": sums}))
    words = flags(tmp_path / "out", "--max_steps", 1, "--resume_from_checkpoint", "auto")
    assert command_line.main(words) == 0
    flip(folder / "adapter_model.safetensors")
    assert command_line.main(words) == 1
    assert "adapter_model.safetensors: changed" in capsys.readouterr().err


def test_a2_a_deliberate_change_goes_on(copy, capsys, monkeypatch):
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5}))
    with pytest.raises(ValueError, match="changed on purpose"):
        load_model(copy)
    monkeypatch.setenv(checksums.ENVIRONMENT, "off")
    assert load_model(copy) is not None
    monkeypatch.setenv(checksums.ENVIRONMENT, "sometimes")
    with pytest.raises(ValueError, match="GLM_FOUNDRY_VERIFY must be one of fast, full, off"):
        load_model(copy)
    monkeypatch.delenv(checksums.ENVIRONMENT)
    assert checksums.main([str(copy)]) == 1 and "generation_config.json" in capsys.readouterr().err
    assert checksums.main([str(copy), "--renew"]) == 0 and checksums.main([str(copy)]) == 0
    assert load_model(copy) is not None


def test_a2_folders_of_others_load_as_before(bases, tmp_path, capsys):
    assert not (bases["glm2"] / CHECKSUMS).exists() and load_model(bases["glm2"]) is not None
    assert (
        checksums.main([str(bases["glm2"])]) == 1
        and "nothing to compare with" in capsys.readouterr().err
    )


def test_a_run_folder_in_place_of_a_checkpoint_names_the_checkpoints(copy, bases, capsys):
    run = copy.parent
    (run / "best.json").write_text(json.dumps({"checkpoint": copy.name}))
    words = ["--model_path", str(run), "--prompt", "你好", "--device", "cpu"]
    assert predict.main(words) == 1
    assert (
        f"{run} is a run's folder; give one of its 1 checkpoints: {copy} (the last and the best)"
        in capsys.readouterr().err
    )
    assert merge_lora.main(["--ori_model_dir", str(bases["glm2"]), "--model_dir", str(run)]) == 1
    assert f"--model_dir: {run} is a run's folder" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_not_listed(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / f".{CHECKSUMS}.0123.tmp").touch()
    assert write_checksums(tmp_path) == 1
    assert set(json.loads((tmp_path / CHECKSUMS).read_text())["files"]) == {"a"}
