"""Which DeepSpeed file and flags fit a card at the least cost. Free of torch."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from finetune.ds_file import fill_sizes, read_ds_file
from finetune.memory.cards import GIB
from finetune.memory.formula import Estimate, estimate
from finetune.memory.run import Run, Zero
from finetune.memory.search import largest, make_zero

# --gradient_checkpointing -> seconds of a step against False: the forward pass once more is a third
# of forward and backward; "selective" keeps the matrix products and repeats the rest.
RECOMPUTING = {"False": 1.0, "selective": 1.1, "True": 4 / 3}


@dataclass(frozen=True)
class ZeroChoice:
    """A shipped DeepSpeed file, as it is or with changes.

    Attributes:
        title: in tables.
        changes: keys of zero_optimization that are set, beside the file's.
        slower: seconds of a step against ZeRO-2, as RLHF (sunzeyeah) published them for 350M
            parameters on 3 V100 by PCIe (2.10, 2.65, 6.75, 29 and 34 s); between faster cards, and
            with more tokens a step, the differences are smaller, their order is the same.
        ranks: the fewest GPUs on which it saves anything.
    """

    title: str
    file: str
    slower: float
    changes: tuple[tuple[str, Any], ...] = ()
    ranks: int = 1

    def section(self) -> dict[str, Any]:
        """Its zero_optimization."""
        return read_ds_file(self.file)[1]["zero_optimization"] | dict(self.changes)

    def zero(self, hidden: int) -> Zero:
        """What the estimate takes, for a model of this width."""
        return make_zero(fill_sizes(self.section(), hidden))

    def content(self) -> str:
        """The JSON of its DeepSpeed file."""
        ds = read_ds_file(self.file)[1] | {"zero_optimization": self.section()}
        return json.dumps(ds, indent=2) + "\n"


LIVE = (("stage3_max_live_parameters", 10**8), ("stage3_max_reuse_distance", 10**8))
OPTIMIZER = ("offload_optimizer", {"device": "cpu"})
# From the fastest to the slowest.
CHOICES = (
    ZeroChoice("ZeRO-2", "ds_zero2.json", 1.0),
    ZeroChoice("ZeRO-2 offload", "ds_zero2_offload.json", 1.26),
    ZeroChoice("ZeRO-3", "ds_zero3_no_offload.json", 3.2, ranks=2),
    ZeroChoice("ZeRO-3 live 1e8", "ds_zero3_no_offload.json", 3.3, LIVE, ranks=2),
    ZeroChoice(
        "ZeRO-3 live 1e8, optimizer offload",
        "ds_zero3_no_offload.json",
        13.8,
        (*LIVE, OPTIMIZER),
        ranks=2,
    ),
    ZeroChoice("ZeRO-3 offload", "ds_zero3_offload.json", 16.2),
    ZeroChoice("ZeRO-3 offload, live 1e8", "ds_zero3_offload.json", 16.7, LIVE),
)


@dataclass(frozen=True)
class Suggestion:
    """A way to train that fits.

    Attributes:
        run: the run, with its rows a pass and passes a step.
        recomputing: --gradient_checkpointing.
    """

    choice: ZeroChoice
    recomputing: str
    run: Run

    @property
    def cost(self) -> float:
        """Seconds of a step, about, against ZeRO-2 without checkpointing."""
        return self.choice.slower * RECOMPUTING[self.recomputing]

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(self.run)

    @property
    def host_bytes(self) -> float:
        """Of all processes of the machine."""
        return sum(self.estimate.host.values())

    def flags(self, ds_file: str = "") -> str:
        """train.py's flags; `ds_file`: the file's path where it is not a shipped one."""
        return (
            f"--ds_file {ds_file or self.choice.file} "
            f"--gradient_checkpointing {self.recomputing} "
            f"--per_device_train_batch_size {self.run.batch} "
            f"--gradient_accumulation_steps {self.run.accumulation}"
        )

    def needs(self, card: float) -> str:
        """What it needs of a card of so many bytes, and of the host, in words."""
        text = f"{self.estimate.needed / GIB:.1f} of {card / GIB:.1f} GB a GPU"
        return f"{text}, {self.host_bytes / GIB:.0f} GB of host RAM"


def suggestions(run: Run, card: float, host: float | None = None) -> list[Suggestion]:
    """All ways that fit, those of the least cost first; of equal ones, the more rows a pass.

    Args:
        run: its `zero` is not read; its checkpointing is the least, its rows a step stay.
        card, host: bytes of a GPU, and of the machine's RAM (None: any).
    """
    asked = "False" if not run.checkpointing else "selective" if run.selective else "True"
    levels = list(RECOMPUTING)[list(RECOMPUTING).index(asked) :]
    found = []
    for choice, recomputing in product(CHOICES, levels):
        if run.gpus < choice.ranks:
            continue
        fitting = with_rows(with_choice(run, choice, recomputing), run, card)
        if fitting is None:
            continue
        suggestion = Suggestion(choice, recomputing, fitting)
        if host is None or suggestion.host_bytes <= host:
            found.append(suggestion)
    return sorted(found, key=lambda each: (each.cost, -each.run.batch))


def with_rows(changed: Run, asked: Run, card: float) -> Run | None:
    """`changed` with the rows a step of `asked`, in as few passes as fit; None where none fits."""
    if estimate(changed).needed <= card:
        return changed
    rows = asked.batch * asked.accumulation
    # Several passes keep the gradients between them.
    batch = min(asked.batch, largest(replace(changed, accumulation=2), "batch", card))
    if not batch:
        return None
    while rows % batch:
        batch -= 1
    return replace(changed, batch=batch, accumulation=rows // batch)


def with_choice(run: Run, choice: ZeroChoice, recomputing: str) -> Run:
    """The run with a DeepSpeed file and a --gradient_checkpointing, all rows at their longest."""
    return replace(
        run,
        zero=choice.zero(run.shape.hidden),
        checkpointing=recomputing != "False",
        selective=recomputing == "selective",
        real_tokens=None,
    )


def longest_that_fits(run: Run, card: float) -> tuple[int, str]:
    """(the longest rows that fit one at a time, 0 for none; by which choice and recomputing)."""
    best = (0, "")
    for choice in CHOICES:
        if run.gpus < choice.ranks:
            continue
        one = replace(with_choice(run, choice, "True"), batch=1, accumulation=1)
        best = max(best, (largest(one, "length", card, step=8), choice.title))
    return best
