"""What a stage of a pipeline is loaded from, and what it reports. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelLoading:
    """What a model is loaded from: `load_ready`'s arguments."""

    path: str
    mode: str | None = None
    base: str | None = None
    precision: str = "auto"
    keep_quantized: bool = False
    verify: str | None = None


@dataclass(frozen=True)
class StageReport:
    """A stage as it is.

    Attributes:
        device: as torch names it. threads: of its process.
        start, end: its first layer, and the one after its last.
        weight_bytes: of its parameters. kv_bytes: of its keys and values now.
        resident_bytes: of its process, where the device is a CPU; None elsewhere.
        seconds: of computing its passes so far, without waiting. passes: how many.
    """

    device: str
    threads: int
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    resident_bytes: int | None
    seconds: float
    passes: int
