"""The devices of this machine that flags name: GPUs, or processes that share the CPU's cores.

A CPU process of T threads is the device "cpu@T". Free of torch but for the number of GPUs.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serving.cost_model.devices import DEVICES, GIB, LINKS, MIB, Cluster, Device, Link
from serving.cost_model.model import Profile
from serving.replicas.probe import ProbeResult

CPU_RESERVED = GIB // 2  # what a process with torch holds beside weights and KV
MEMORY_GRAIN = 256 * MIB  # free memory is rounded down to it, so that like devices are equal
LINK_GRAIN = 0.2  # links that differ less than this share are taken as equal
NAME = re.compile(r"(cuda):(\d+)|(cpu)(?:@(\d+))?")


@dataclass(frozen=True)
class LocalDevice:
    """A device by its name: a GPU's number, or a CPU process's threads."""

    kind: str
    number: int = 0
    threads: int | None = None

    @property
    def name(self) -> str:
        return f"cuda:{self.number}" if self.kind == "cuda" else f"cpu@{self.threads}"

    @property
    def torch_name(self) -> str:
        return self.name if self.kind == "cuda" else "cpu"


def count_gpus() -> int:
    """GPUs that torch sees; none of their memory is taken."""
    import torch

    return torch.cuda.device_count()


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(meminfo: str | Path = "/proc/meminfo") -> int:
    """Bytes that new processes can have without swapping."""
    path = Path(meminfo)
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def parse_devices(text: str, gpus: int, cores: int) -> list[LocalDevice]:
    """The devices of --devices.

    Raises:
        ValueError: a name is not one, a device is not there or comes twice, or GPUs and CPU
            processes are mixed.
    """
    devices: list[LocalDevice] = []
    for part in text.split(","):
        device = parse_device(part.strip(), gpus, cores)
        if device.kind == "cuda" and device in devices:
            raise ValueError(f"--devices: {device.name} comes twice")
        devices.append(device)
    if len({device.kind for device in devices}) > 1:
        raise ValueError(
            f"--devices must be all GPUs or all CPU processes, which compute in different "
            f"precisions; got {text!r}"
        )
    return devices


def parse_device(name: str, gpus: int, cores: int) -> LocalDevice:
    """One of --devices; raises ValueError."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f'--devices: wanted names such as "cuda:0" or "cpu@2", got {name!r}')
    if match[1]:
        number = int(match[2])
        if number >= gpus:
            there = f"only cuda:0 to cuda:{gpus - 1}" if gpus else "there are none"
            raise ValueError(f"--devices: there is no GPU {name} here, {there}")
        return LocalDevice("cuda", number)
    threads = int(match[4] or cores)
    if not 1 <= threads <= cores:
        raise ValueError(f"--devices: {name} must have from 1 to {cores} threads, the cores here")
    return LocalDevice("cpu", threads=threads)


def first_devices(count: int | None, gpus: int, cores: int) -> list[LocalDevice]:
    """The first `count` GPUs, or so many CPU processes that share the cores; None: all, or one.

    Raises:
        ValueError: there are fewer GPUs.
    """
    if not gpus:
        processes = count or 1
        return [LocalDevice("cpu", threads=max(1, cores // processes))] * processes
    if count and count > gpus:
        raise ValueError(f"--num_gpus {count}: there are {gpus} GPU(s) here")
    return [LocalDevice("cuda", i) for i in range(count or gpus)]


def device_of(
    local: LocalDevice, devices: Sequence[LocalDevice], probed: ProbeResult, speed: Device | None
) -> Device:
    """A local device with its free memory, and the nominal speed of `speed`, else of its kind."""
    if local.kind == "cpu":
        share = free_memory() // len(devices)
        start = speed if speed and speed.kind == "cpu" else DEVICES["CPU"]
        return replace(
            start,
            name=local.name,
            memory_bytes=round_down(share, MEMORY_GRAIN),
            reserved_bytes=min(CPU_RESERVED, share // 4),
            threads=local.threads,
            torch_name="cpu",
        )
    title = probed.titles[local.name]
    start = speed if speed and speed.kind == "cuda" else similar_device(title)
    return replace(
        start,
        name=title,
        memory_bytes=round_down(probed.free_bytes[local.name], MEMORY_GRAIN),
        reserved_bytes=GIB,
        torch_name=local.torch_name,
    )


def round_down(size: int, grain: int) -> int:
    return max(grain, size // grain * grain)


def similar_device(title: str) -> Device:
    """The entry of DEVICES that a GPU's name contains, else the A100's speeds."""
    plain = title.replace(" ", "")
    for name, device in DEVICES.items():
        parts = name.removeprefix("RTX").split("-")
        if device.kind == "cuda" and all(part.removesuffix("G") in plain for part in parts):
            return device
    return DEVICES["A100-80G"]


def scaled_by_threads(device: Device, threads_of_speed: int) -> Device:
    """A CPU process whose speeds are those of a process of `threads_of_speed`."""
    share = (device.threads or threads_of_speed) / threads_of_speed
    return replace(
        device,
        bandwidth_bytes_s=device.bandwidth_bytes_s * share,
        flops_s=device.flops_s * share,
    )


def joined(devices: Sequence[Device], names: Sequence[LocalDevice], probed: ProbeResult) -> Cluster:
    """The devices with the links that were measured; like ones are made equal."""
    known: list[Link] = []
    links: list[tuple[Link | None, ...]] = []
    for i, source in enumerate(names):
        row: list[Link | None] = []
        for j, target in enumerate(names):
            key = f"{source.name}>{target.name}" if source.kind == "cuda" else "cpu"
            row.append(None if i == j else alike(measured_link(probed, key), known))
        links.append(tuple(row))
    return Cluster(tuple(devices), tuple(links))


def measured_link(probed: ProbeResult, key: str) -> Link:
    return Link(*probed.links[key]) if key in probed.links else LINKS["pcie4"]


def alike(link: Link, known: list[Link]) -> Link:
    """The known link that differs by less than LINK_GRAIN; else the link, which is known then."""
    for other in known:
        near_rate = abs(link.bandwidth_bytes_s / other.bandwidth_bytes_s - 1) < LINK_GRAIN
        near_latency = abs(link.latency_s - other.latency_s) < LINK_GRAIN * other.latency_s + 5e-6
        if near_rate and near_latency:
            return other
    known.append(link)
    return link


def profile_cores(profile: Profile, cores: int) -> int:
    """Threads at which a profile of a CPU was measured: those that it names, else all cores."""
    if isinstance(profile.device, dict):
        return int(profile.device.get("threads") or cores)
    return cores
