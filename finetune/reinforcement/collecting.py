"""Prompts -> samples that can be learnt from: sampled, scored, with the models' statistics.

Every rank does so with a part of the prompts and gets the others' samples.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from finetune.distributed import on_each_rank, rank, world_size
from finetune.reinforcement.config import RolloutConfig
from finetune.reinforcement.experience import EVALUATION, Place, Sample
from finetune.reinforcement.minibatches import Minibatches
from finetune.reinforcement.prompts import Prompts
from finetune.reinforcement.rollout import Rollouts
from finetune.reinforcement.sampling import sampled_answers
from finetune.reinforcement.scoring import AnswerScoring
from finetune.reinforcement.statistics import add_statistics


@dataclass(frozen=True)
class SampleCollector:
    """What a rollout's samples are made with."""

    config: RolloutConfig
    rollouts: Rollouts
    scoring: AnswerScoring
    minibatches: Minibatches

    def collect(
        self, loss_module: Any, prompts: Prompts, places: list[Place], count: int
    ) -> dict[Place, list[Sample]]:
        """`count` samples of each prompt, of all ranks: a collective operation.

        Args:
            loss_module: a RolloutLoss.
        """
        was_training = loss_module.training
        loss_module.eval()
        rank_places = places[rank() :: world_size()]
        answers = sampled_answers(
            self.rollouts, loss_module.network, self.config, prompts, rank_places, count
        )
        groups = on_each_rank(lambda: self.scoring.samples(prompts, rank_places, answers))
        most = math.ceil(len(places) / world_size())
        size = self.prompts_of_a_pass(EVALUATION in prompts)
        add_statistics(loss_module, self.minibatches, prompts, groups, most=most, size=size)
        loss_module.train(was_training)
        return samples_of_ranks(groups)

    def prompts_of_a_pass(self, is_evaluation: bool) -> int:
        """The batch size of the models' statistics."""
        size = self.config.per_device_train_batch_size
        if is_evaluation:
            return self.config.per_device_eval_batch_size or size
        return size


def samples_of_ranks(groups: dict[Place, list[Sample]]) -> dict[Place, list[Sample]]:
    """The samples of all ranks, on each."""
    if world_size() == 1:
        return groups
    groups_of_ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(groups_of_ranks, groups)
    all_groups: dict[Place, list[Sample]] = {}
    for rank_groups in groups_of_ranks:
        all_groups.update(rank_groups)
    return all_groups
