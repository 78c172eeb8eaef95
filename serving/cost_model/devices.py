"""What a model can be served on: devices, the links between them, clusters of both.

Figures are the vendors' (dense half-precision products with fp32 accumulation); how much of them a
program reaches is in a profile (serving/cost_model/model.py). Other devices come from a JSON file
of the same fields:

    {"devices": [{"name": "RTX4090", "memory_bytes": 25757220864,
                  "bandwidth_bytes_s": 1.008e12, "flops_s": 1.65e14}],
     "links": [[null, {"bandwidth_bytes_s": 2.4e10, "latency_s": 1e-5}], ...]}

or with "link", one for all pairs, instead of "links". A device may have "kind", "threads" (of a
process on a CPU) and "torch_name" ("cuda:2") too.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chatglm.files import read_json

MIB, GIB = 2**20, 2**30
MAX_DEVICES = 1024  # of a cluster, whose links are a matrix


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU.

    Attributes:
        memory_bytes: all it has.
        bandwidth_bytes_s: of its own memory.
        flops_s: half-precision operations; a multiplication and an addition count as two.
        reserved_bytes: of the memory, what holds neither weights nor KV (context, workspace,
            fragments).
        kind: "cuda" or "cpu".
        threads: of a process on a CPU; None: as many as torch takes.
        torch_name: by which torch knows it here, such as "cuda:2"; not compared, so that equal
            devices stay interchangeable.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_s: float
    flops_s: float
    reserved_bytes: int = GIB
    kind: str = "cuda"
    threads: int | None = None
    torch_name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"device: name must be text, got {self.name!r}")
        if not isinstance(self.torch_name, str | None):
            raise ValueError(
                f"device {self.name!r}: torch_name must be text, got {self.torch_name!r}"
            )
        for figure in ("memory_bytes", "bandwidth_bytes_s", "flops_s"):
            value = getattr(self, figure)
            if not _is_number(value) or not value > 0:
                raise ValueError(
                    f"device {self.name!r}: {figure} must be a number above 0, got {value!r}"
                )
        threads = self.threads
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(
                f"device {self.name!r}: threads must be a whole number above 0, got {threads!r}"
            )
        reserved = self.reserved_bytes
        if not _is_number(reserved) or not reserved >= 0:
            raise ValueError(
                f"device {self.name!r}: reserved_bytes must be at least 0, got {reserved!r}"
            )
        if self.kind not in ("cuda", "cpu"):
            raise ValueError(
                f"device {self.name!r}: kind must be 'cuda' or 'cpu', got {self.kind!r}"
            )

    @property
    def usable_bytes(self) -> int:
        return max(0, self.memory_bytes - self.reserved_bytes)

    @property
    def label(self) -> str:
        """As a reader knows it: torch's name before its own, or its own alone."""
        if self.torch_name in (None, "cpu", self.name):
            return self.name
        return f"{self.torch_name} {self.name}"


@dataclass(frozen=True)
class Link:
    """From one device to another, one direction."""

    bandwidth_bytes_s: float
    latency_s: float

    def __post_init__(self) -> None:
        bandwidth_fits = _is_number(self.bandwidth_bytes_s) and self.bandwidth_bytes_s > 0
        latency_fits = _is_number(self.latency_s) and self.latency_s >= 0
        if not (bandwidth_fits and latency_fits):
            raise ValueError(
                f"a link needs bandwidth_bytes_s above 0 and latency_s of at least 0, got {self}"
            )


@dataclass(frozen=True)
class Cluster:
    """Devices and the matrix of links, links[i][j] from i to j; the diagonal is never read."""

    devices: tuple[Device, ...]
    links: tuple[tuple[Link | None, ...], ...]

    def __post_init__(self) -> None:
        n = len(self.devices)
        if not 0 < n <= MAX_DEVICES:
            raise ValueError(f"a cluster needs from 1 to {MAX_DEVICES} devices, got {n}")
        if list(map(len, self.links)) != [n] * n:
            raise ValueError(f"links must be a matrix of {n} x {n}, a row for each device")
        for i, row in enumerate(self.links):
            for j, link in enumerate(row):
                if i != j and not isinstance(link, Link):
                    raise ValueError(f"links: there is none from device {i} to device {j}")

    @classmethod
    def uniform(
        cls,
        device: Device | str | Sequence[Device | str],
        count: int | None = None,
        link: "Link | str" = "pcie4",
    ) -> "Cluster":
        """`count` equal devices, or the listed ones, with the same link between any two."""
        if count is not None and not 0 < count <= MAX_DEVICES:
            raise ValueError(f"a cluster needs from 1 to {MAX_DEVICES} devices, got {count}")
        if isinstance(device, Device | str):
            listed = [device] * (1 if count is None else count)
        else:
            listed = list(device)
        link = find_link(link) if isinstance(link, str) else link
        devices = tuple(find_device(d) if isinstance(d, str) else d for d in listed)
        links: list[tuple[Link | None, ...]] = []
        for i in range(len(devices)):
            row: list[Link | None] = [link] * len(devices)
            row[i] = None
            links.append(tuple(row))
        return cls(devices, tuple(links))

    def link_between(self, source: int, target: int) -> Link:
        """The link from one device to another. Raises ValueError for a device and itself."""
        link = self.links[source][target]
        if link is None:
            raise ValueError(f"there is no link from device {source} to device {target}")
        return link

    @cached_property
    def groups(self) -> list[list[int]]:
        """Indices of devices that are interchangeable, in order.

        The devices of a group are equal, with equal links inside the group and to all others.
        """
        groups: list[list[int]] = []
        for i in range(len(self.devices)):
            for group in groups:
                if self._belongs_to_group(i, group):
                    group.append(i)
                    break
            else:
                groups.append([i])
        return groups

    def _belongs_to_group(self, i: int, group: list[int]) -> bool:
        # A device like the first is like the others too: all but their mutual links are the same.
        first = group[0]
        if not self._are_interchangeable(i, first):
            return False
        return len(group) == 1 or self.links[i][first] == self.links[first][group[1]]

    def _are_interchangeable(self, i: int, j: int) -> bool:
        """Equal devices, with equal links to each other and to all others."""
        links = self.links
        if self.devices[i] != self.devices[j] or links[i][j] != links[j][i]:
            return False
        others = [k for k in range(len(self.devices)) if k not in (i, j)]
        return all(links[i][k] == links[j][k] and links[k][i] == links[k][j] for k in others)

    @classmethod
    def from_json(cls, path: str | Path) -> "Cluster":
        """Devices by name or in full, and "links" or one "link" (see the module's docstring).

        Raises ValueError with the file's name.
        """
        given = read_json(path)
        try:
            devices = tuple(map(_device_from_json, given["devices"]))
            if "links" not in given:
                link = given.get("link", "pcie4")
                return cls.uniform(devices, link=link if isinstance(link, str) else Link(**link))
            links = tuple(tuple(map(_link_from_json, row)) for row in given["links"])
            return cls(devices, links)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a cluster: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it, devices and links in full."""
        links: list[list[dict[str, float] | None]] = []
        for i, row in enumerate(self.links):
            written = [None if link is None else asdict(link) for link in row]
            written[i] = None
            links.append(written)
        return {"devices": list(map(asdict, self.devices)), "links": links}


def _device_from_json(given: str | dict[str, Any]) -> Device:
    return find_device(given) if isinstance(given, str) else Device(**given)


def _link_from_json(given: dict[str, Any] | None) -> Link | None:
    return None if given is None else Link(**given)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and abs(value) < 1e18
    )


def read_device(path: str | Path, **changes: Any) -> Device:
    """One device from its own JSON file, with `changes` of its fields."""
    given = read_json(path)
    known = sorted(f.name for f in fields(Device))
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{path}: unknown field {unknown[0]!r} of a device; known are {', '.join(known)}"
        )
    try:
        return replace(Device(**given), **changes)
    except TypeError as error:
        raise ValueError(f"{path}: not a device: {error}") from None


def find_link(name: str) -> Link:
    """A link of LINKS. Raises ValueError for another name."""
    if name not in LINKS:
        raise ValueError(f"no link {name!r}; known are {', '.join(LINKS)}")
    return LINKS[name]


def find_device(name: str) -> Device:
    """A device of DEVICES, or of a JSON file. Raises ValueError for another name."""
    if name in DEVICES:
        return DEVICES[name]
    if name.endswith(".json"):
        return read_device(name)
    raise ValueError(f"no device {name!r}; known are {', '.join(DEVICES)}, or a .json file")


# Memory as nvidia-smi reports it. The products of the 3090 and A40 are those with fp32
# accumulation, which frameworks use.
DEVICES: dict[str, Device] = {
    "RTX3090": Device("RTX3090", 24576 * MIB, 936e9, 71e12),
    "A40": Device("A40", 46068 * MIB, 696e9, 149.7e12),
    "A100-40G": Device("A100-40G", 40960 * MIB, 1555e9, 312e12),
    "A100-80G": Device("A100-80G", 81920 * MIB, 2039e9, 312e12),
    "H100": Device("H100", 81559 * MIB, 3350e9, 989e12),
    # Two cores with AVX-512 and AMX, bf16, by measured products and bandwidth; other CPUs need a
    # file of their own.
    "CPU": Device("CPU", 16 * GIB, 20e9, 1.6e12, reserved_bytes=2 * GIB, kind="cpu"),
}
LINKS: dict[str, Link] = {
    "pcie3": Link(12e9, 10e-6),
    "pcie4": Link(24e9, 10e-6),
    "nvlink3": Link(300e9, 5e-6),
    "nvlink4": Link(450e9, 5e-6),
    "ethernet-25g": Link(3e9, 50e-6),
}
