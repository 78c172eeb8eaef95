"""Whatever kills a run, the last committed checkpoint loads.

The repeated steps equal the uninterrupted run's, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train as command_line
from chatglm import load_model
from chatglm.checksums import write_checksums
from finetune.checkpoint import committed_checkpoints, find_resume, gathered_state, read_manifest
from tests.finetune.runs import ROOT, child_env, metrics, write_rows

KEPT = ("train_loss", "learning_rate", "grad_norm")
TWELVE_STEPS = ["--num_train_epochs", 3, "--show_loss_step", 1000]  # 12 steps
LONG = [*TWELVE_STEPS, "--lora_dropout", "0.3"]


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, and the files stay as they were."""


def lines(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def same_losses(a: Path, b: Path) -> bool:
    return all(metrics(a, key) == metrics(b, key) for key in KEPT) and [
        r["step"] for r in lines(a)
    ] == [r["step"] for r in lines(b)]


@pytest.fixture(scope="module")
def whole(flags, train, tmp_path_factory) -> Path:
    """The output folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(flags(out, *LONG))
    return out


def stop_after(monkeypatch, step: int):
    """Send this process a SIGTERM while it computes `step`."""
    from finetune import task

    collate, seen = task.collate, []

    def counting(*args, **options):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return collate(*args, **options)

    monkeypatch.setattr(task, "collate", counting)


@pytest.mark.parametrize(
    "method, ds_file, more",
    [
        ("lora", "ds_zero2.json", LONG),
        ("ptuning-v2-mlp", "ds_zero3_offload.json", [*TWELVE_STEPS, "--prefix_dropout", "0.2"]),
        ("all", "ds_zero3_no_offload.json", [*TWELVE_STEPS, "--precision", "bf16"]),
        ("all", "ds_zero2.json", TWELVE_STEPS),
        pytest.param(
            "all",
            "ds_zero2.json",
            [*TWELVE_STEPS, "--precision", "bf16", "--gradient_accumulation_steps", 2],
            marks=pytest.mark.slow,
        ),
        ("freeze", "ds_zero2_offload.json", [*TWELVE_STEPS, "--gradient_accumulation_steps", 2]),
    ],
)
def test_stop_and_resume_is_bit_identical(
    flags, train, tmp_path, monkeypatch, capsys, method, ds_file, more
):
    shared = [*more, "--ds_file", ds_file]
    last = train(flags(tmp_path / "a", *shared, method=method))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        stopped = train(flags(tmp_path / "b", *shared, method=method))
    steps = len(metrics(tmp_path / "b"))
    assert 0 < steps < len(metrics(tmp_path / "a")) and stopped.name.endswith(f"-step-{steps}")
    assert "stopped by signal after step" in capsys.readouterr().out
    again = train(flags(tmp_path / "b", *shared, "--resume_from_checkpoint", "auto", method=method))
    assert f"resumed from {stopped}" in capsys.readouterr().out
    assert same_losses(tmp_path / "a", tmp_path / "b") and again.name == last.name
    for file in last.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
    # once more, with nothing left to do
    assert (
        train(flags(tmp_path / "b", *shared, "--resume_from_checkpoint", "auto", method=method))
        == again
    )


PLACES = ["mkdir", "shards", "export", "config", "flush", "rename", "after_rename", "prune"]


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_every_point_of_a_save(flags, train, tmp_path, monkeypatch, whole, place):
    """The second save dies at `place`.

    The resumed run ends as an uninterrupted one, without leftovers.
    """
    from finetune import checkpoint, row_task

    words = flags(tmp_path / "out", *LONG, "--save_total_limit", 1)
    count = []

    def dying(real, before=True, at=2):
        def call(*args, **kwargs):
            count.append(1)
            if len(count) >= at:
                if not before:
                    real(*args, **kwargs)
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if place == "mkdir":
            patch.setattr(checkpoint, "gathered_state", dying(checkpoint.gathered_state))
        elif place == "shards":
            import deepspeed

            patch.setattr(
                deepspeed.DeepSpeedEngine,
                "save_checkpoint",
                dying(deepspeed.DeepSpeedEngine.save_checkpoint),
            )
        elif place == "config":
            patch.setattr(checkpoint, "write_checksums", dying(checkpoint.write_checksums))
        elif place in ("export", "flush"):
            module, name = {
                "export": (row_task, "export_model"),
                "flush": (checkpoint, "flush_tree"),
            }[place]
            patch.setattr(module, name, dying(getattr(module, name), before=place == "export"))
        elif place == "prune":
            patch.setattr(
                checkpoint.shutil,
                "rmtree",
                lambda path, **k: None if k else dying(None, at=1)(path),
            )
        else:
            real = os.replace

            def replace(source, target):
                if str(target).endswith("-step-8"):
                    if place == "after_rename":
                        real(source, target)
                    raise Killed
                real(source, target)

            patch.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(Killed):
            train(words)
    committed = committed_checkpoints(tmp_path / "out")
    assert committed and all(load_model(folder) is not None for folder in committed[-1:])
    train([*words, "--resume_from_checkpoint", "auto"])
    assert same_losses(tmp_path / "out", whole)
    assert [p.name for p in (tmp_path / "out").glob("*epoch-*")] == ["epoch-3-step-12"]


@pytest.mark.launch
@pytest.mark.parametrize(
    "moment", ["inside_a_save", pytest.param("at_random", marks=pytest.mark.slow)]
)
def test_kill_9(flags, train, tmp_path, whole, moment):
    """A real process and a real SIGKILL."""
    words = flags(tmp_path / "out", *LONG, "--save_model_step", 1, "--save_total_limit", 2)
    child = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait = random.Random().uniform(0, 0.25)
    try:
        while child.poll() is None:
            time.sleep(0.0005 if (tmp_path / "out" / "metrics.jsonl").is_file() else 0.05)
            committed = committed_checkpoints(tmp_path / "out")
            if committed and moment == "at_random":
                time.sleep(wait)
                break
            if committed and any((tmp_path / "out").glob(".epoch-*/trainer")):
                break
    finally:
        child.kill()
        child.wait()
    newest = committed_checkpoints(tmp_path / "out")[-1]
    litter = [p.name for p in (tmp_path / "out").glob(".epoch-*")]
    print(f"waited {wait:.3f} s, newest {newest.name}, litter {litter}")
    train([*words, "--resume_from_checkpoint", "auto"])
    assert same_losses(tmp_path / "out", whole)
    assert (
        not list((tmp_path / "out").glob(".epoch-*"))
        and len(committed_checkpoints(tmp_path / "out")) == 2
    )


def test_auto_with_nothing_there_starts_anew(flags, train, tmp_path, capsys):
    (tmp_path / "out" / "epoch-9-step-99").mkdir(parents=True)  # without a manifest: no checkpoint
    (tmp_path / "out" / ".epoch-1-step-1.tmp").mkdir()
    train(flags(tmp_path / "out", "--resume_from_checkpoint", "auto", "--max_steps", 1))
    assert (
        "starting anew" in capsys.readouterr().out
        and not (tmp_path / "out" / ".epoch-1-step-1.tmp").exists()
    )


@pytest.mark.parametrize(
    "words",
    [
        "--learning_rate 0.5",
        "--lora_dim 4",
        "--seed 7",
        "--num_train_epochs 9",
        "--per_device_train_batch_size 2",
        "--gradient_accumulation_steps 2",
        "--precision bf16",
        "--max_len 90",
        "--weight_decay 0",
        "--train_type all",
        "--ds_file ds_zero3_no_offload.json",
        "--max_steps 40",
    ],
)
def test_changed_flags_are_refused_by_name(flags, whole, capsys, words):
    if "--train_type" in words:
        words += " --lora_dropout 0.1"  # without effect there, but at its default
    assert (
        command_line.main(flags(whole, *LONG, "--resume_from_checkpoint", "auto", *words.split()))
        == 1
    )
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: ") and f"{words.split()[0]}: was " in line


def test_flags_that_do_not_matter_may_change(flags, whole, train):
    assert (
        train(flags(whole, *LONG, "--resume_from_checkpoint", "auto", "--save_total_limit", 5)).name
        == "epoch-3-step-12"
    )


def test_changed_data_is_refused(flags, whole, tmp_path, capsys, rows_file):
    """The same path with other rows is another run."""
    before = rows_file.read_text()
    try:
        write_rows(rows_file, [json.loads(line) for line in before.splitlines()][:-2])
        assert (
            command_line.main(
                flags(whole, *LONG, "--resume_from_checkpoint", str(whole / "epoch-1-step-4"))
            )
            == 1
        )
        assert "train_path" in capsys.readouterr().err
    finally:
        rows_file.write_text(before)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda m: m | {"world_size": 3},
            "3 ranks in steps of 12 rows, this run has 1 and steps of 4: "
            "go on with --gradient_accumulation_steps 3",
        ),
        (lambda m: m | {"format_version": 99}, "format version 99"),
        (lambda m: m | {"zero_stage": 3}, "ZeRO-3 state, this run is on ZeRO-2"),
        (lambda m: [], "not a checkpoint manifest"),
        (lambda m: m | {"base_model": {"fingerprint": "0"}}, "another base model"),
    ],
)
def test_other_manifests_are_refused(flags, train, tmp_path, capsys, change, said):
    folder = train(flags(tmp_path / "out", "--max_steps", 1))
    (folder / "manifest.json").write_text(json.dumps(change(read_manifest(folder))))
    write_checksums(folder)
    capsys.readouterr()
    assert (
        command_line.main(
            flags(tmp_path / "out", "--max_steps", 1, "--resume_from_checkpoint", "auto")
        )
        == 1
    )
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("damage", ["torn", "gone", "pickle"])
def test_damaged_shards_are_one_line(flags, train, tmp_path, capsys, damage):
    """Also a shard with code in it, which must not run."""
    folder = train(flags(tmp_path / "out", "--max_steps", 1))
    shard = next(folder.rglob("*optim_states.pt"))
    if damage == "torn":
        shard.write_bytes(shard.read_bytes()[:300])
    elif damage == "gone":
        shard.unlink()
    else:
        state = torch.load(shard, weights_only=False)
        torch.save(state | {"x": Bomb(str(tmp_path / "ran"))}, shard)
    capsys.readouterr()
    for verify in ([], ["--verify", "off"]):
        code = command_line.main(
            flags(tmp_path / "out", "--max_steps", 1, "--resume_from_checkpoint", "auto", *verify)
        )
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "ran").exists()
        assert code == 1 and line.startswith("train.py: error: ") and "trainer" in line


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_t3_later_checkpoints_are_set_aside_on_an_explicit_resume(
    flags, train, tmp_path, rows_file, capsys
):
    """Their weights and metrics are another run's; best.json names one by this run's eval rows."""
    out = tmp_path / "out"
    words = flags(out, *LONG, "--lora_dropout", 0, "--report_to", "")
    train([*words, "--eval_path", str(rows_file)])
    best = json.loads((out / "best.json").read_text())
    assert [p.name for p in committed_checkpoints(out)] == [
        "epoch-1-step-4",
        "epoch-2-step-8",
        "epoch-3-step-12",
    ]
    first = out / "epoch-1-step-4"
    other = write_rows(
        tmp_path / "other.jsonl", [{"instruction": "你好", "input": "", "output": "水泵"}]
    )
    capsys.readouterr()
    train([*words, "--resume_from_checkpoint", str(first), "--eval_path", str(other)])
    assert (
        f"2 checkpoints of later steps are set aside: they lie in {out / 'set-aside-1'}"
        in capsys.readouterr().out
    )
    assert sorted(p.name for p in (out / "set-aside-1").glob("epoch-*")) == [
        "epoch-2-step-8",
        "epoch-3-step-12",
    ]
    assert [p.name for p in committed_checkpoints(out)] == [
        "epoch-1-step-4",
        "epoch-2-step-8",
        "epoch-3-step-12",
    ]
    now = json.loads((out / "best.json").read_text())
    manifests = [read_manifest(p) for p in committed_checkpoints(out)]
    assert manifests[0]["eval_data"] != manifests[1]["eval_data"] == manifests[2]["eval_data"]
    assert (
        now["value"] == min(m["metrics"]["loss"] for m in manifests[1:]) != best["value"]
        and now["checkpoint"] != first.name
    )
    run = json.loads((out / "run.json").read_text())
    assert run["best"]["value"] == now["value"]
    # with the first evaluation rows again, the first checkpoint counts, and the newest is resumed
    assert (
        train([*words, "--resume_from_checkpoint", str(first), "--eval_path", str(rows_file)]).name
        == "epoch-3-step-12"
    )
    assert (
        json.loads((out / "best.json").read_text()) == best
        and (out / "set-aside-2" / "epoch-3-step-12").is_dir()
    )
    train([*words, "--overwrite_output_dir", "--max_steps", "1"])
    assert not list(out.glob("set-aside-*"))


def test_t5_paths_are_compared_by_content(
    flags, train, tmp_path, bases, rows_file, ds_files, capsys
):
    """Base, rows and DeepSpeed file may move to other paths.

    Other content at one path is refused.
    """
    out = tmp_path / "out"
    shared = ["--max_steps", 2, "--save_model_step", 1]
    train(flags(out, *shared, "--ds_file", ROOT / "ds_configs" / "ds_zero2.json"))
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copytree(bases["glm2"], moved / "glm2")
    shutil.copy(rows_file, moved / "rows.json")
    shutil.copy(ROOT / "ds_configs" / "ds_zero2.json", moved / "ds.json")
    there = {
        "--model_name_or_path": moved / "glm2",
        "--train_path": moved / "rows.json",
        "--ds_file": moved / "ds.json",
    }

    def words(**changes) -> list[str]:
        given = flags(
            out,
            *shared,
            "--resume_from_checkpoint",
            out / "epoch-1-step-1",
            "--ds_file",
            "ds_zero2.json",
        )
        for name, path in (there | changes).items():
            given[given.index(name) + 1] = str(path)
        return given

    assert train(words()).name == "epoch-1-step-2"
    for name, path, said in (
        ("--model_name_or_path", bases["glm2-seed"], "--model_name_or_path: was "),
        ("--train_path", f"{moved}/rows.json:0.5", "--train_path: was "),
    ):
        capsys.readouterr()
        assert command_line.main(words(**{name: path})) == 1
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
    train(flags(tmp_path / "b", *shared, "--ds_file", moved / "ds.json"))
    ds = json.loads((moved / "ds.json").read_text())
    again = flags(
        tmp_path / "b", *shared, "--ds_file", moved / "ds.json", "--resume_from_checkpoint", "auto"
    )
    (moved / "ds.json").write_text(json.dumps(ds))  # other white space
    assert command_line.main(again) == 0
    (moved / "ds.json").write_text(json.dumps(ds | {"gradient_clipping": 0.5}))
    capsys.readouterr()
    assert command_line.main(again) == 1 and "ds.json has changed since" in capsys.readouterr().err


def test_training_longer_names_the_way(flags, whole, capsys):
    assert (
        command_line.main(
            flags(whole, *LONG, "--resume_from_checkpoint", "auto", "--num_train_epochs", 9)
        )
        == 1
    )
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "cannot be made longer; train on from its result instead" in line
        and f"--adapter {whole}" in line
    )


def test_find_resume(tmp_path):
    assert (
        find_resume("auto", tmp_path / "nothing") is None and committed_checkpoints(tmp_path) == []
    )
    for step in (9, 10, 100):
        (tmp_path / f"epoch-1-step-{step}" / "trainer").mkdir(parents=True)
        (tmp_path / f"epoch-1-step-{step}" / "manifest.json").touch()
    assert find_resume("auto", tmp_path).name == "epoch-1-step-100"  # by number, not by letter
    assert find_resume(str(tmp_path / "epoch-1-step-9"), "elsewhere").name == "epoch-1-step-9"
    (tmp_path / "epoch-1-step-9" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="epoch-1-step-9 is not a complete checkpoint"):
        find_resume(str(tmp_path / "epoch-1-step-9"), tmp_path)


def test_empty_tensors_are_never_exported():
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="weight is empty"):
        gathered_state(model, trainable_only=False)


def test_an_earlier_run_is_not_mixed_with(flags, train, tmp_path, capsys):
    """A second run into the same folder is refused, and replaces the first where it is told to."""
    train(flags(tmp_path / "out", "--max_steps", 2, "--save_model_step", 1))
    assert [p.name for p in committed_checkpoints(tmp_path / "out")] == [
        "epoch-1-step-1",
        "epoch-1-step-2",
    ]
    assert command_line.main(flags(tmp_path / "out", "--max_steps", 1)) == 1
    assert "--resume_from_checkpoint auto" in capsys.readouterr().err
    train(flags(tmp_path / "out", "--max_steps", 1, "--overwrite_output_dir"))
    assert [p.name for p in committed_checkpoints(tmp_path / "out")] == ["epoch-1-step-1"]
    assert [line["step"] for line in lines(tmp_path / "out")] == [1]


@pytest.mark.parametrize("ds_file", ["ds_zero2.json", "ds_zero3_no_offload.json"])
def test_ptuning_goes_on_from_a_prefix_folder(flags, train, tmp_path, ds_file):
    """A saved prefix is the next run's start, also under ZeRO-3.

    No other method may silently drop it.
    """
    first = train(flags(tmp_path / "a", "--max_steps", 2, method="ptuning-v2"))
    words = flags(
        tmp_path / "b",
        "--max_steps",
        1,
        "--learning_rate",
        0,
        "--weight_decay",
        0,
        "--ds_file",
        ds_file,
        method="ptuning-v2",
    )
    words[words.index("--model_name_or_path") + 1] = str(first)
    second = train(words)
    key = "transformer.prefix_encoder.embedding.weight"
    assert torch.equal(
        load_file(first / "model.safetensors")[key], load_file(second / "model.safetensors")[key]
    )
    words = flags(tmp_path / "c")
    words[words.index("--model_name_or_path") + 1] = str(first)
    assert command_line.main(words) == 1 and not (tmp_path / "c").exists()
