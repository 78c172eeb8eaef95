"""The memory of each epoch: the trace itself, in run.json, in TensorBoard and in the report."""

import mmap

from finetune import memory_trace, report
from finetune.memory_trace import MemoryTrace, host_memory_gb
from finetune.record import read_run


def use_memory(size: int) -> None:
    """Touch so many bytes, and give them back to the system."""
    with mmap.mmap(-1, size) as block:
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1


def test_each_epoch_has_its_own_peak():
    trace = MemoryTrace()
    trace.begin(1)
    use_memory(300 << 20)
    first = trace.end(1, 4)
    trace.begin(5)
    second = trace.end(2, 8)
    assert (first.first_step, first.last_step, second.first_step) == (1, 4, 5)
    assert first.host_peak_gb - first.host_begin_gb > 0.3
    assert second.host_peak_gb < first.host_peak_gb - 0.25  # the first epoch's is forgotten
    assert trace.peak_gb >= first.host_peak_gb  # but not by the run
    assert first.rank_peaks_gb == (first.peak_gb,)
    assert first.text.startswith("epoch 1 memory: ") and f"{first.peak_gb:.2f}" in first.text


def test_a_system_that_resets_no_peak_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_trace, "CLEAR", tmp_path / "none")
    trace = MemoryTrace()
    use_memory(100 << 20)
    trace.begin(1)
    assert trace.end(1, 1).host_peak_gb >= trace.host_begin_gb + 0.05
    monkeypatch.setattr(memory_trace, "STATUS", tmp_path / "none")
    assert host_memory_gb("VmRSS") > 0.01


def test_a_run_records_it(flags, train, tmp_path, capsys):
    """Also where a resume begins in the middle of an epoch."""
    out = tmp_path / "out"
    words = flags(out, "--num_train_epochs", 2, "--save_model_step", 3)
    last = train(words)
    epochs = read_run(out)["memory"]
    steps = int(last.name.rpartition("-")[2])
    spans = [(each["epoch"], each["first_step"], each["last_step"]) for each in epochs]
    assert spans == [(1, 1, steps // 2), (2, steps // 2 + 1, steps)]
    for each in epochs:
        assert 0 < each["begin_gb"] <= each["peak_gb"] == each["rank_peaks_gb"][0] < 64
        assert each["host_begin_gb"] <= each["host_peak_gb"]
    capsys.readouterr()
    assert report.main([str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(table) if "memory at its start" in line)
    assert table[head + 1].split()[:3] == ["out", "1", f"1-{steps // 2}"]
    assert f"{epochs[1]['peak_gb']:.2f}" in table[head + 2]

    train([*words, "--resume_from_checkpoint", str(out / "epoch-2-step-6")])
    spans = [(each["first_step"], each["last_step"]) for each in read_run(out)["memory"]]
    assert spans == [(1, 4), (7, 8)] and steps == 8
