"""The recorder of load and memory: its meters, its ends, its file, the whole command."""

import csv
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from serving.monitor.command import main
from serving.monitor.meters import CpuMeter, SmiMeter, choose_meter, gpus_are_there
from serving.monitor.recording import (
    WholeLineFile,
    draw_recording,
    read_recording,
    record_meter,
)
from serving.monitor.watched import WatchedProcess, process_start
from tests.finetune.runs import ROOT, child_env

BUSY = "import time; end = time.time() + {}\nwhile time.time() < end: pass\nraise SystemExit({})"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_proc(folder, busy, idle, available_kib=750_000):
    """/proc of two cores; the second is always idle."""
    lines = [f"cpu  {busy} 0 0 {idle + 900} 0 0 0 0 0 0"]
    lines += [f"cpu0 {busy} 0 0 {idle} 0 0 0 0 0 0", f"cpu1 0 0 0 {idle + busy} 0 0 0 0 0 0", "x 1"]
    (folder / "stat").write_text("\n".join(lines) + "\n")
    memory = f"MemTotal: 1000000 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n"
    (folder / "meminfo").write_text(memory)


def test_cpu_load_is_the_busy_share_between_two_readings(tmp_path):
    write_proc(tmp_path, busy=100, idle=100)
    meter = CpuMeter(tmp_path)
    assert meter.names == ["CPU1", "CPU2"]
    write_proc(tmp_path, busy=130, idle=110)
    loads, memory = meter.read()
    assert loads == [75.0, 0.0] and memory == pytest.approx(250_000 / 1024)
    assert meter.read()[0] == [0.0, 0.0]  # no tick has passed


def test_this_machine_is_read():
    meter = choose_meter("cpu")
    assert len(meter.names) == len(meter.read()[0]) >= 1
    end = time.time() + 0.3
    while time.time() < end:
        pass
    loads, memory = meter.read()
    assert max(loads) > 20 and memory > 50
    assert all(0 <= load <= 100 for load in loads)


def test_gpus_by_the_drivers_program(tmp_path):
    """A program that prints what nvidia-smi prints; a GPU in slices has no load."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '37, 1024'\necho '[N/A], 512'\n")
    program.chmod(0o755)
    meter = SmiMeter(str(program))
    loads, memory = meter.read()
    assert meter.names == ["GPU1", "GPU2"] and loads[0] == 37 and math.isnan(loads[1])
    assert memory == 1536
    output = tmp_path / "gpu.csv"
    assert record_meter(meter, output, 0.02, 0.1, lambda s: time.sleep(s), lambda: False) >= 2
    header, first, *_ = output.read_text().splitlines()
    assert header == "Time,GPU1 Load,GPU2 Load,Total Memory Change"  # UELLM's pref.py
    assert first.split(",")[1:] == ["37.0", "", "1536.0"]
    draw_recording(output, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    with pytest.raises(OSError, match="nvidia-smi: NVIDIA-SMI has failed"):
        meter.read()


@pytest.mark.skipif(gpus_are_there(), reason="there are GPUs")
def test_no_gpu_is_one_line(tmp_path, capsys):
    assert main(["--device", "gpu", "--output", str(tmp_path / "a.csv")]) == 1
    error = capsys.readouterr().err
    assert "neither nvidia-ml-py nor nvidia-smi is installed" in error
    assert "--device cpu" in error and error.count("\n") == 1


# ---- its ends


def test_seconds_in_miniature(tmp_path, capsys):
    output, picture = tmp_path / "new" / "load.csv", tmp_path / "load.png"
    words = ["--output", str(output), "--interval_s", "0.05", "--seconds", "0.42"]
    assert main([*words, "--picture", str(picture), "--device", "cpu"]) == 0
    rows = rows_of(output)
    assert 3 <= len(rows) <= 8 and f"{len(rows)} lines of CPU1" in capsys.readouterr().err
    times = [float(row["Time"]) for row in rows]
    assert times == sorted(times) and times[0] >= 0.05 and times[-1] <= 0.6
    assert list(rows[0])[0] == "Time" and list(rows[0])[-1] == "Total Memory Change"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_command_is_run_and_its_load_seen(tmp_path):
    output = tmp_path / "load.csv"
    words = ["--output", str(output), "--interval_s", "0.1", "--device", "cpu", "--"]
    assert main([*words, sys.executable, "-c", BUSY.format(0.8, 3)]) == 3
    rows = rows_of(output)
    assert len(rows) >= 4
    highest = [max(float(value) for name, value in row.items() if "Load" in name) for row in rows]
    assert max(highest) > 50


def test_it_ends_with_a_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BUSY.format(0.5, 0)])
    begin = time.monotonic()
    words = ["--output", str(tmp_path / "a.csv"), "--interval_s", "0.1", "--pid", str(process.pid)]
    assert main(words) == 0  # though its parent has not waited for it: a zombie has ended
    assert time.monotonic() - begin < 10 and process.wait() == 0
    with pytest.raises(ValueError, match="no such process runs"):
        WatchedProcess(process.pid)
    assert process_start(os.getpid()) is not None


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_whole_lines_and_the_picture(tmp_path, kind):
    output, picture = tmp_path / "load.csv", tmp_path / "load.png"
    words = ["--output", output, "--interval_s", "0.05", "--picture", picture, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.monitor", *map(str, words)], cwd=ROOT, env=child_env()
    )
    end = time.monotonic() + 60
    while not (output.is_file() and output.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(kind)
    assert process.wait(30) == 0 and picture.is_file()
    text = output.read_text()
    assert text.endswith("\n") and len({line.count(",") for line in text.splitlines()}) == 1


def test_a_slow_meter_leaves_lines_out(tmp_path):
    class Slow:
        """A meter whose readings take three intervals."""

        names = ["CPU1"]

        def read(self):
            time.sleep(0.15)
            return [1.0], 2.0

    lines = record_meter(
        Slow(), tmp_path / "a.csv", 0.05, 1.0, lambda s: time.sleep(s), lambda: False
    )
    assert 3 <= lines <= 7


# ---- its file


def test_a_full_disk_leaves_whole_lines():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    from pathlib import Path

    file = WholeLineFile(Path("/dev/full"))
    with pytest.raises(OSError, match="/dev/full|cannot be written") as raised:
        file.add(["Time"])
    assert raised.value.filename == "/dev/full"
    file.close()


def test_another_file_is_no_recording(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a recording"):
        read_recording(path)
    path.write_text("Time,CPU1 Load,Total Memory Change\n")
    with pytest.raises(ValueError, match="no lines were recorded"):
        draw_recording(path, tmp_path / "a.png")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--interval_s", "0"], "--interval_s: wanted a number from 0.01"),
        (["--pid", "99999999"], "--pid 99999999: no such process runs"),
        (["--pid", "1", "--", "true"], "exclude each other"),
        (["--"], "no command after --"),
        (["--", "no-such-program"], "-- no-such-program: no such program"),
        (["--picture", "a.bmp"], "wanted .png, .svg or .pdf"),
        (["--output", "/dev/null/a.csv", "--seconds", "0.1"], "/dev/null"),
    ],
)
def test_each_refusal_is_one_line(tmp_path, capsys, words, said):
    base = [] if "--output" in words else ["--output", str(tmp_path / "a.csv")]
    try:
        code = main([*base, "--device", "cpu", *words])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code and said in error and error.count("\n") == 1
