"""Memory of each epoch: what is held when it begins and ends, and the most in between."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.distributed import device, rank, sum_over_ranks, world_size

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what resets the peak of a process, proc(5)


@dataclass(frozen=True)
class EpochMemory:
    """One epoch's memory of rank 0, in GB (1e9 bytes).

    Attributes:
        epoch: from 1.
        first_step, last_step: the optimizer steps that were traced: a resumed epoch's begin later.
        begin_gb, end_gb, peak_gb: of the GPU's tensors; without a GPU of the process.
        host_begin_gb, host_end_gb, host_peak_gb: of the process (resident set).
        rank_peaks_gb: peak_gb of every rank.
    """

    epoch: int
    first_step: int
    last_step: int
    begin_gb: float
    end_gb: float
    peak_gb: float
    host_begin_gb: float
    host_end_gb: float
    host_peak_gb: float
    rank_peaks_gb: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As run.json has it."""
        return asdict(self) | {"rank_peaks_gb": list(self.rank_peaks_gb)}

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"epoch {self.epoch} memory: {self.begin_gb:.2f} GB at its start, "
            f"peak {max(self.rank_peaks_gb):.2f}, {self.end_gb:.2f} at its end; "
            f"process peak {self.host_peak_gb:.2f} GB"
        )


def host_memory_gb(name: str) -> float:
    """A value of this process: "VmRSS", resident now, or "VmHWM", its peak since the last reset.

    Where /proc does not say, both are the peak since the process began.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def reset_host_peak() -> None:
    """Begin a new peak of this process; where the system refuses, the earlier one stays."""
    with suppress(OSError):
        handle = os.open(CLEAR, os.O_WRONLY)
        try:
            os.write(handle, RESET_PEAK.encode())
        finally:
            os.close(handle)


class MemoryTrace:
    """Traces the epochs of a run, one after the other. Reading costs microseconds a step.

    Attributes:
        peak_gb: the most memory since the run began: of the GPU, without one of the process.
    """

    def __init__(self) -> None:
        self.has_gpu = torch.cuda.is_available()
        self.peak_gb = 0.0
        self.first_step = 0
        self.begin_gb = self.host_begin_gb = 0.0

    def begin(self, first_step: int) -> None:
        """An epoch begins, at least for this process, with step `first_step`."""
        self.see()
        self.first_step = first_step
        if self.has_gpu:
            torch.cuda.reset_peak_memory_stats(device())
        reset_host_peak()
        self.host_begin_gb = host_memory_gb("VmRSS")
        self.begin_gb = self.held_gb()

    def held_gb(self) -> float:
        """What is held now."""
        if self.has_gpu:
            return torch.cuda.memory_allocated(device()) / 1e9
        return host_memory_gb("VmRSS")

    def epoch_peak_gb(self) -> float:
        """The most since the epoch began."""
        if self.has_gpu:
            return torch.cuda.max_memory_allocated(device()) / 1e9
        return host_memory_gb("VmHWM")

    def see(self) -> float:
        """`peak_gb`, with what has been used until now."""
        self.peak_gb = max(self.peak_gb, self.epoch_peak_gb())
        return self.peak_gb

    def end(self, epoch: int, last_step: int) -> EpochMemory:
        """What the epoch took. All ranks call it."""
        peak = self.epoch_peak_gb()
        self.see()
        return EpochMemory(
            epoch,
            self.first_step,
            last_step,
            self.begin_gb,
            self.held_gb(),
            peak,
            self.host_begin_gb,
            host_memory_gb("VmRSS"),
            host_memory_gb("VmHWM"),
            tuple(value_of_ranks(peak)),
        )


def value_of_ranks(value: float) -> Sequence[float]:
    """The value of each rank, on all ranks."""
    own = [0.0] * world_size()
    own[rank()] = value
    return sum_over_ranks(*own)
