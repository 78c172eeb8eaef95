"""PPO-ptx: rows of questions and answers that are learnt beside the sampled ones."""

import math
from typing import Any

from finetune.distributed import rank, say, world_size
from finetune.epochs import EpochRows
from finetune.reinforcement.config import PpoConfig
from finetune.row_task import describe_rows
from finetune.rows.arrays import Dataset, join_datasets
from finetune.rows.batches import Batch, BatchLayout, collate, step_rows
from finetune.rows.encoding import Preparation, RowEncoder, choose_rows
from finetune.rows.sources import RowReader, join_hashes


def load_pretraining(task: Any, config: PpoConfig) -> tuple[EpochRows[Dataset], str]:
    """(the rows of --pretrain_path, as --task finetune reads them; a hash of their files).

    Args:
        task: a RolloutTask, whose tokenizer and cache they use.
    """
    encoder = RowEncoder(
        task.tokenizer, task.family, config.max_len, config.max_src_len, config.glm3_labels
    )
    preparation = Preparation(RowReader(family=task.family.name), encoder, config.on_bad_row)
    sources = task.sources_of("pretrain_path")
    datasets, hashes = [], []
    for source in sources:
        rows, source_hashes = task.read_source(source, preparation)
        datasets.append(choose_rows(rows, encoder, config.is_skip))
        say(describe_rows(datasets[-1], "pretrain", rows.facts["bad"]))
        hashes += source_hashes
    draws: tuple[tuple[int, int], ...] = ()
    if any(source.weight != 1 for source in sources):
        draws = task.draws_of(sources, datasets, len(sources))
    rows_beside = EpochRows(join_datasets(datasets), config.seed, draws=draws)
    return rows_beside, join_hashes(hashes)


def pretrain_batches(
    rows: EpochRows[Dataset], step: int, step_size: int, config: PpoConfig, layout: BatchLayout
) -> list[Batch]:
    """One batch a pass, together `step_size` rows over the passes of all ranks."""
    epoch, place = divmod(step, math.ceil(rows.count() / step_size))
    data, order, place = rows.of_step(epoch, place, step_size)
    passes = step_rows(
        order,
        place,
        data.row_lengths,
        micro=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=rank(),
        world=world_size(),
    )
    return [collate(data, chosen, **layout) for chosen in passes]
