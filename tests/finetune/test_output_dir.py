"""One run at a time in an output folder; disks that fill up; signals."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train as command_line
from chatglm import load_model
from chatglm.saving import locked_folder
from finetune.checkpoint import committed_checkpoints
from finetune.files import (
    LastingStream,
    LineFile,
    check_file_to_write,
    write_aside,
    writing,
    written_folder,
)
from finetune.record import read_run
from tests.finetune.runs import ROOT, child_env, fill_disk, metrics
from tests.finetune.test_checkpoint import stop_after


def test_t1_a_second_run_in_a_folder_is_refused(flags, train, holder, tmp_path, capsys):
    out = tmp_path / "out"
    train(flags(out, "--max_steps", 1))
    first = holder(out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for more in (["--resume_from_checkpoint", "auto"], ["--overwrite_output_dir"]):
        capsys.readouterr()
        assert command_line.main(flags(out, "--max_steps", 1, *more)) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(
            f"train.py: error: --output_dir {out} is in use by another run (process {first.pid} on "
        )
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    first.kill()  # as kill -9: nothing of it cleans up
    first.wait()
    assert (out / ".lock").exists() and train(
        flags(out, "--max_steps", 1, "--overwrite_output_dir")
    )
    assert not (out / ".lock").exists()


def test_t1_a_run_that_is_refused_leaves_no_folder(flags, tmp_path):
    (tmp_path / "rows.jsonl").write_text("not a row\n")
    words = flags(tmp_path / "a" / "out")
    words[words.index("--train_path") + 1] = str(tmp_path / "rows.jsonl")
    assert command_line.main(words) == 1 and not (tmp_path / "a").exists()


def test_t1_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with locked_folder(tmp_path / "out", "--output_dir"):
        assert (tmp_path / "out").is_dir()
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_two_that_write_one_folder(holder, tmp_path):
    """The second is refused, and leaves what the first has written alone."""
    aside = tmp_path / ".set.tmp"
    aside.mkdir()
    (aside / "half").touch()
    first = holder(tmp_path / ".set.writing")
    said = f"the folder {tmp_path / 'set'} is in use by another run"
    with pytest.raises(ValueError, match=said), written_folder(tmp_path / "set"):
        pass
    assert (aside / "half").exists()
    first.kill()
    first.wait()
    with written_folder(tmp_path / "set") as folder:
        assert not (folder / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


WRITER = """\
import sys; from pathlib import Path; from finetune.files import write_aside
for _ in range(60): write_aside(Path(sys.argv[1]), sys.argv[2] * 400_000)"""


def test_two_that_write_one_file(tmp_path):
    """Each of two processes at once writes it whole; the last one's content stays."""
    path = tmp_path / "run.json"
    children = []
    for letter in "ab":
        words = [sys.executable, "-c", WRITER, str(path), letter]
        children.append(subprocess.Popen(words, cwd=ROOT, env=child_env()))
    assert [child.wait(60) for child in children] == [0, 0]
    content = path.read_text()
    assert content == content[0] * 400_000
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    old, new = tmp_path / ".a.json.1.tmp", tmp_path / ".a.json.2.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    write_aside(tmp_path / "a.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.2.tmp", "a.json"]


def test_the_lock_of_a_folder_whose_owner_ends_just_now(tmp_path, monkeypatch):
    """It has removed the guard between the second one's mkdir and its open."""
    real, opened = os.open, []

    def removed_once(path, *rest):
        if not opened:
            opened.append(path)
            Path(path).parent.rmdir()
        return real(path, *rest)

    monkeypatch.setattr(os, "open", removed_once)
    with locked_folder(tmp_path / "guard", "--output"):
        assert (tmp_path / "guard" / ".lock").exists()


@pytest.mark.parametrize(
    "error, named",
    [
        (OSError(28, "No space left on device", "/in/a", None, "{out}/a"), True),  # of a copy
        (OSError(28, "No space left on device"), True),
        (OSError(2, "No such file or directory", "/in/a"), False),
        (OSError("/in/a: its base model is not there"), False),  # a library's
    ],
)
def test_errors_of_writing_are_told_from_those_of_reading(tmp_path, error, named):
    if error.filename2:
        error.filename2 = error.filename2.format(out=tmp_path)
    with pytest.raises(OSError) as raised, writing(tmp_path):
        raise error
    assert (raised.value is not error) == named
    assert not named or raised.value.filename == str(tmp_path)


def test_a_link_stays_one_when_its_folder_is_written(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to("set")
    with written_folder(tmp_path / "link") as aside:
        (aside / "new").touch()
    assert (tmp_path / "set" / "new").exists() and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "set"]


def test_files_that_cannot_be_written_are_found_before_the_work(tmp_path):
    check_file_to_write(tmp_path / "new" / "a.json", "--json")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--json .*/file is read, and cannot be written too"):
        check_file_to_write(tmp_path / "file", "--json", [tmp_path / "none", tmp_path / "file"])
    for path in (tmp_path, tmp_path / "file" / "a.json", Path("/proc/x/a.json")):
        with pytest.raises(ValueError, match="--json /"):
            check_file_to_write(path, "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_read_meanwhile_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, written_folder(tmp_path / "new" / "set"):
        (tmp_path / "rows.jsonl").read_bytes()
    assert error.value.filename == str(tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


# ---- full disks


def at_steps(monkeypatch, acts: dict):
    """Do acts[n]() when the batch of step n is made."""
    from finetune import task

    collate, seen = task.collate, []

    def counting(*args, **options):
        seen.append(1)
        acts.get(len(seen), lambda: None)()
        return collate(*args, **options)

    monkeypatch.setattr(task, "collate", counting)


LONG = [
    "--num_train_epochs",
    3,
    "--num_workers",
    0,
    "--show_loss_step",
    1,
]  # 12 steps, a save every 4


def test_t2_a_full_disk_ends_no_run(flags, train, small_disk, monkeypatch, capsys):
    """It is full from step 3 to step 10: no step is lost, and each file is spoken of once."""
    out = small_disk / "out"
    at_steps(monkeypatch, {3: lambda: fill_disk(small_disk), 10: (small_disk / "filler").unlink})
    last = train(flags(out, *LONG))
    said = capsys.readouterr().out
    assert (
        said.count(
            f"WARNING: {out}/run.json cannot be written (No space left on device); training goes on"
        )
        == 1
    )
    assert said.count(f"{out}/run.json can be written again") == 1
    assert (
        "WARNING: no checkpoint of step 4" in said
        and "WARNING: no checkpoint of step 8" in said
        and "GB are free" in said
    )
    assert [p.name for p in committed_checkpoints(out)] == ["epoch-3-step-12"] and load_model(
        last
    ) is not None
    assert (
        len(metrics(out)) == 12
        and len(read_run(out)["steps"]) == 12
        and read_run(out)["status"] == "finished"
    )


def test_t2_how_a_run_ended_is_true_on_a_full_disk(flags, train, small_disk, monkeypatch, capsys):
    """No room for the last checkpoint: an error; the one before stays.

    Run.json is whole, "failed".
    """
    out = small_disk / "out"
    at_steps(monkeypatch, {6: lambda: fill_disk(small_disk)})
    with pytest.raises(OSError, match="a checkpoint takes about"):
        train(flags(out, *LONG))
    run = read_run(out)
    assert (
        run["status"] == "failed"
        and json.loads((out / "run.json").read_text())["status"] == "failed"
    )
    assert [line["step"] for line in run["steps"]][:5] == [1, 2, 3, 4, 5]
    assert [p.name for p in out.glob("*epoch-*")] == ["epoch-1-step-4"] and load_model(
        out / "epoch-1-step-4"
    ) is not None


def test_t2_a_disk_that_fills_up_inside_a_save(flags, train, small_disk, monkeypatch, capsys):
    """Past the check: what was begun goes away, and the next save tries again."""
    from finetune import checkpoint

    out, count, real = small_disk / "out", [], checkpoint.gathered_state

    def filling(*args, **options):
        count.append(1)
        if len(count) == 1:
            fill_disk(small_disk)
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "gathered_state", filling)
    monkeypatch.setattr(checkpoint, "check_disk", lambda *_: None)
    at_steps(monkeypatch, {6: (small_disk / "filler").unlink})
    train(flags(out, *LONG))
    assert "WARNING: no checkpoint of step 4" in capsys.readouterr().out
    assert sorted(p.name for p in out.glob("*epoch-*")) == ["epoch-2-step-8", "epoch-3-step-12"]


def test_t2_lines_wait_for_room(tmp_path):
    stream = LastingStream(
        io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)
    )
    assert stream.write("a line\n") == 7
    stream.flush()
    file = LineFile(tmp_path / "lines")
    kept, file.handle = file.handle, os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space"):
        file.add("one")
    os.close(file.handle)
    file.handle = kept
    file.add("two")
    file.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_t2_a_failing_logger_ends_no_run(flags, train, tmp_path, monkeypatch, capsys):
    from finetune.record import TensorBoard

    def broken(self, step, values):
        raise ConnectionError("no network")

    monkeypatch.setattr(TensorBoard, "add", broken)
    train(flags(tmp_path / "out", "--max_steps", 2))
    assert (
        capsys.readouterr().out.count("--report_to tensorboard cannot be written (no network)") == 1
    )


# ---- signals


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_t7_a_signal_saves_and_says_so_by_its_exit_code(flags, tmp_path, monkeypatch, number, code):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    at_steps(monkeypatch, {3: lambda: os.kill(os.getpid(), number)})
    words = flags(tmp_path / "out", *LONG)
    assert command_line.main(words) == code
    assert [p.name for p in committed_checkpoints(tmp_path / "out")][-1].endswith(
        "-step-3"
    ) and read_run(tmp_path / "out")["status"] == "stopped by signal"
    assert {n: signal.getsignal(n) for n in before} == before


def test_t7_a_signal_at_the_last_step_is_no_interruption(flags, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2)
    assert command_line.main(flags(tmp_path / "out", "--max_steps", 2, "--num_workers", 0)) == 0
    assert read_run(tmp_path / "out")["status"] == "finished"


def test_t7_nohup_stays(flags, train, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_steps(monkeypatch, {1: lambda: os.kill(os.getpid(), signal.SIGHUP)})
        train(flags(tmp_path / "out", "--max_steps", 2, "--num_workers", 0))
        assert (
            read_run(tmp_path / "out")["status"] == "finished"
            and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        )
    finally:
        signal.signal(signal.SIGHUP, before)
