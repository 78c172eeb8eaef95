"""Out of memory in one line: what is needed by the estimate, what there is, and what would make it fit."""

import errno
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

GIB = 2**30
# What torch, CUDA's libraries and C++ say where memory runs out and no type says so.
SAID = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """An error that says that memory ran out: of Python, of torch on a CPU or a GPU, or of the system."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(words in str(error).lower() for words in SAID)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """What runs out of memory inside raises MemoryError with `advice()`; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(advice()) from None


def memory_there() -> tuple[str, float]:
    """("GPU" or "CPU", bytes that this process may have there): the whole GPU, else the machine's RAM or the process's limit."""
    import torch

    if torch.cuda.is_available():
        return "GPU", torch.cuda.mem_get_info()[1]
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "CPU", min([ram, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


def training_advice(config: "TrainConfig", there: tuple[str, float] | None = None) -> str:
    """For a run of train.py that ran out of memory. `there`: as `memory_there` gives it."""
    from finetune.distributed import resolve_precision, world_size
    from finetune.memory.command import cheapest_change, make_run
    from finetune.memory.formula import estimate

    where, size = there or memory_there()
    has = f"this {where} has {size / GIB:.1f} GB"
    smaller = "--gradient_checkpointing True, a lower --per_device_train_batch_size or a lower --max_len takes less"
    try:
        if config.task != "finetune":
            raise ValueError("the formula is of fine-tuning")
        config = replace(config, precision=resolve_precision(config.precision))
        run = replace(make_run(config, gpus=world_size()), cpu=where == "CPU")
        needed = estimate(run).needed
    except (ValueError, OSError):  # --use_dora, say
        return f"{has}; {smaller.replace('--max_len', '--max_src_len') if config.task != 'finetune' else smaller}"
    needs = f"the run needs about {needed / GIB:.1f} GB by the estimate of finetune.memory, {has}"
    if needed <= size:
        return f"{needs}: other programs, or the data, hold the rest; {smaller}"
    return f"{needs}; what would make it fit: {cheapest_change(run, size)}"


def inference_advice(args: argparse.Namespace) -> str:
    """For a command with the flags of finetune.predict.add_model_flags."""
    where, size = memory_there()
    bits = "" if args.quantization_bit == 4 else ", --quantization_bit 4"
    return (
        f"{args.model_path} with {args.batch_size} prompts at a time needs more than the {size / GIB:.1f} GB of this {where}: "
        f"give a lower --batch_size, --max_src_len or --max_new_tokens{bits}, or another --device"
    )
