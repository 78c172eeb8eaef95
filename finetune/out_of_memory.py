"""One-line errors of memory: what is needed, what there is, and what would make it fit."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.config import RunConfig

GIB = 2**30
# Messages of torch, CUDA's libraries and C++ for errors of memory without a type of their own.
MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by an error of Python, of torch on CPU or GPU, or of the system."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(message in str(error).lower() for message in MESSAGES)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """A context in which errors of memory become MemoryError with the text `advice()`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(advice()) from None


def memory_there() -> tuple[str, float]:
    """("GPU" or "CPU", bytes that this process may use there).

    The whole GPU; without one, the machine's RAM or the process's limit.
    """
    import torch

    if torch.cuda.is_available():
        return "GPU", torch.cuda.mem_get_info()[1]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            size = min(size, limit)
    return "CPU", size


def training_advice(config: "RunConfig", there: tuple[str, float] | None = None) -> str:
    """The advice for a run of train.py that ran out of memory. `there`: as memory_there()."""
    from finetune.config import RowsConfig
    from finetune.distributed import resolve_precision, world_size
    from finetune.memory.command import cheapest_change, make_run
    from finetune.memory.formula import estimate

    where, size = there or memory_there()
    has = f"this {where} has {size / GIB:.1f} GB"
    smaller = (
        "--gradient_checkpointing True, a lower --per_device_train_batch_size "
        "or a lower --max_len takes less"
    )
    if not isinstance(config, RowsConfig):  # the formula covers fine-tuning only
        return f"{has}; {smaller.replace('--max_len', '--max_src_len')}"
    try:
        config = replace(config, precision=resolve_precision(config.precision))
        run = replace(make_run(config, gpus=world_size()), cpu=where == "CPU")
        needed = estimate(run).needed
    except (ValueError, OSError):  # flags that the formula does not cover, such as --use_dora
        return f"{has}; {smaller}"
    needs = f"the run needs about {needed / GIB:.1f} GB by the estimate of finetune.memory, {has}"
    if needed <= size:
        return f"{needs}: other programs, or the data, hold the rest; {smaller}"
    more = "; python -m finetune.memory --suggest has more ways"
    return f"{needs}; what would make it fit: {cheapest_change(run, size)}{more}"


def inference_advice(model_path: str, batch_size: int, quantization_bit: int | None) -> str:
    """The advice for a command that answers `batch_size` prompts at a time."""
    where, size = memory_there()
    bits = "" if quantization_bit == 4 else ", --quantization_bit 4"
    return (
        f"{model_path} with {batch_size} prompts at a time needs more than the "
        f"{size / GIB:.1f} GB of this {where}: give a lower --batch_size, --max_src_len or "
        f"--max_new_tokens{bits}, or another --device"
    )
