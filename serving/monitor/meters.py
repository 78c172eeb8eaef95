"""What reads the load and the memory: NVIDIA's GPUs by NVML, or Linux's CPU cores by /proc."""

import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

MIB = 2**20
PROC = Path("/proc")
CUDA_DRIVER = PROC / "driver/nvidia/version"
SMI_FIELDS = "utilization.gpu,memory.used"


class Meter(Protocol):
    """Reads devices of one kind.

    Attributes:
        names: of the devices, as the columns name them: GPU1, GPU2, ... or CPU1, ...
    """

    @property
    def names(self) -> list[str]: ...

    def read(self) -> tuple[list[float], float]:
        """(percent of load of each device, MiB used of all devices together).

        A load that a device does not tell is nan.
        """


class NvmlMeter:
    """GPUs by NVML (the package nvidia-ml-py). Raises ImportError, OSError where there is none."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None
        self.names = [f"GPU{i + 1}" for i in range(count)]

    def read(self) -> tuple[list[float], float]:
        nvml = self._nvml
        loads = []
        used_bytes = 0
        for handle in self._handles:
            try:
                load = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            except nvml.NVMLError:  # a GPU in slices (MIG) has no load of its own
                load = math.nan
            loads.append(load)
            used_bytes += int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return loads, used_bytes / MIB


class SmiMeter:
    """GPUs by the driver's program nvidia-smi, where nvidia-ml-py is not installed.

    Raises OSError where it fails.
    """

    def __init__(self, program: str = "nvidia-smi") -> None:
        self._command = [program, f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
        loads, _ = self.read()
        self.names = [f"GPU{i + 1}" for i in range(len(loads))]

    def read(self) -> tuple[list[float], float]:
        done = subprocess.run(self._command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()
            raise OSError(f"nvidia-smi: {said[-1] if said else f'exit code {done.returncode}'}")
        loads = []
        used = 0.0
        for line in done.stdout.splitlines():
            load, _, memory = line.partition(",")
            loads.append(number_or_nan(load))
            mib = number_or_nan(memory)
            used += 0.0 if math.isnan(mib) else mib
        return loads, used


def number_or_nan(text: str) -> float:
    """The number of a cell; nan for "[N/A]" and its like."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class CpuMeter:
    """The CPU cores by /proc/stat, and the memory in use by /proc/meminfo.

    A core's load is its share of busy time since the reading before, or since the meter was made.
    In use is what programs hold: all memory less what is available (the files' cache is available).

    Raises OSError where /proc is not Linux's.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._before = self._times()
        self.names = [f"CPU{i + 1}" for i in range(len(self._before))]

    def read(self) -> tuple[list[float], float]:
        now = self._times()
        loads = []
        for (busy, total), (busy_before, total_before) in zip(now, self._before):
            passed = total - total_before
            loads.append(100 * (busy - busy_before) / passed if passed > 0 else 0.0)
        self._before = now
        return loads, self._used_mib()

    def _times(self) -> list[tuple[int, int]]:
        """(busy, all) ticks of each core since the machine's start."""
        times = []
        for line in (self._proc / "stat").read_text("utf-8").splitlines():
            name, *fields = line.split()
            if not name.startswith("cpu") or name == "cpu":
                continue
            # user nice system idle iowait irq softirq steal; guest time is in user already
            ticks = list(map(int, fields[:8]))
            times.append((sum(ticks) - ticks[3] - ticks[4], sum(ticks)))
        if not times:
            raise OSError(f"{self._proc / 'stat'}: no CPU in it")
        return times

    def _used_mib(self) -> float:
        kib: dict[str, int] = {}
        for line in (self._proc / "meminfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            kib[name] = int(value.split()[0])
        return (kib["MemTotal"] - kib["MemAvailable"]) / 1024


def choose_meter(kind: str) -> Meter:
    """The meter of --device: gpu, cpu, or auto for GPUs where there are any.

    Raises:
        ValueError: there is none of this kind; the message says what is missing.
    """
    if kind == "cpu" or (kind == "auto" and not gpus_are_there()):
        try:
            return CpuMeter()
        except (OSError, KeyError):
            raise ValueError("no GPU is found, and no Linux /proc to read CPU load from") from None
    try:
        meter: Meter = gpu_meter()
    except OSError as error:
        raise ValueError(f"no GPU can be read ({error}); --device cpu records the CPU") from None
    if not meter.names:
        raise ValueError("no GPU is found; --device cpu records the CPU")
    return meter


def gpus_are_there() -> bool:
    """Whether NVIDIA's driver is loaded, or its program is there (WSL has no /proc entry)."""
    return CUDA_DRIVER.is_file() or shutil.which("nvidia-smi") is not None


def gpu_meter() -> Meter:
    """NVML where its package is installed, else nvidia-smi. Raises OSError."""
    try:
        return NvmlMeter()
    except ImportError:
        if shutil.which("nvidia-smi") is None:
            raise OSError("neither nvidia-ml-py nor nvidia-smi is installed") from None
        return SmiMeter()


def column_names(meter: Meter) -> Sequence[str]:
    """UELLM's header, with as many load columns as there are devices."""
    loads = [f"{name} Load" for name in meter.names]
    return ["Time", *loads, "Total Memory Change"]
