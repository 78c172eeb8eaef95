"""What the models say of sampled tokens: columns of samples, computed when they were sampled."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune.distributed import on_device
from finetune.reinforcement.experience import Place, Sample
from finetune.reinforcement.minibatches import Minibatches
from finetune.reinforcement.prompts import Prompts


def add_statistics(
    loss_module: Any,
    minibatches: Minibatches,
    prompts: Prompts,
    groups: Mapping[Place, list[Sample]],
    *,
    most: int,
    size: int,
) -> None:
    """Add the columns of RolloutLoss.statistics to the samples of this rank.

    Args:
        most: prompts of the rank that has most; every rank runs as many passes.
        size: prompts of a pass.
    """
    places = list(groups)
    device = next(loss_module.parameters()).device
    filler = (next(iter(prompts)), -1)  # a rank that has no prompt left runs the pass too
    for start in range(0, most, size):
        pass_places = places[start : start + size] or [filler]
        rows = [(prompts[number], row) for number, row in pass_places]
        samples = [groups.get(place, []) for place in pass_places]
        batch = on_device(minibatches.batch(rows, samples), device)
        statistics = loss_module(output="statistics", **batch).cpu().numpy()
        split_columns(statistics, loss_module.statistics_names, samples)


def split_columns(statistics: np.ndarray, names: list[str], groups: list[list[Sample]]) -> None:
    """Give each sample its part of (columns, N), which has all answers end to end."""
    start = 0
    for samples in groups:
        for sample in samples:
            end = start + len(sample.tokens)
            for name, column in zip(names, statistics):
                sample.columns[name] = column[start:end].copy()
            start = end
