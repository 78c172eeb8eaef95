"""The largest run that fits a card; a DeepSpeed file as the estimate takes it. Free of torch."""

from dataclasses import replace
from typing import Any, Literal

from finetune.ds_file import BETWEEN_RANKS
from finetune.memory.formula import estimate
from finetune.memory.run import Run, Zero

LIMIT = 2**20  # the search for a batch or a length stops here


def largest(run: Run, name: Literal["batch", "length"], card: float, step: int = 1) -> int:
    """The largest "batch" or "length" that fits the card, all rows at their longest.

    In multiples of `step`; 0 where none fits.
    """

    def fits(units: int) -> bool:
        if name == "batch":
            changed = replace(run, real_tokens=None, batch=units * step)
        else:
            changed = replace(run, real_tokens=None, length=units * step)
        return estimate(changed).needed <= card

    low, high = 0, 1
    while high * step < LIMIT and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low * step


def make_zero(section: dict[str, Any]) -> Zero:
    """The Zero of a zero_optimization section; "auto" is DeepSpeed's choice."""
    given = {key: value for key, value in section.items() if value != "auto"}

    def offloads(key: str) -> bool:
        return (given.get(key) or {}).get("device", "none") not in ("none", "auto")

    keys = {"reduce_bucket": "reduce_bucket_size", "live": "stage3_max_live_parameters"}
    sizes = {name: float(given[key]) for name, key in keys.items() if given.get(key) is not None}
    return Zero(
        stage=int(given.get("stage", 0)),
        offload_optimizer=offloads("offload_optimizer"),
        offload_param=offloads("offload_param"),
        overlap=given.get("overlap_comm"),
        obeyed=not given.keys() <= BETWEEN_RANKS,
        **sizes,
    )
