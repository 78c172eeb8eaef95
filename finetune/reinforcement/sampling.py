"""Prompts -> sampled answers, by whatever implements Rollouts."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.distributed import on_each_rank, whole_weights
from finetune.reinforcement.config import RolloutConfig
from finetune.reinforcement.experience import Place, Sample
from finetune.reinforcement.prompts import Prompts
from finetune.reinforcement.rollout import (
    RolloutAnswer,
    RolloutRequest,
    Rollouts,
    RolloutSampling,
)


def sampled_answers(
    rollouts: Rollouts,
    network: Any,
    config: RolloutConfig,
    prompts: Prompts,
    places: Sequence[Place],
    count: int,
) -> list[RolloutAnswer]:
    """`count` answers of a PolicyNetwork to each of this rank's prompts, one after the other.

    A collective operation, also without prompts: ZeRO-3 gathers the policy's weights.
    """
    requests = answer_requests(config, prompts, places, count)
    sampling = RolloutSampling(config.temperature, config.top_p, config.top_k)

    def answers() -> list[RolloutAnswer]:
        return rollouts.answers(network.model, requests, sampling) if requests else []

    with whole_weights(network.model):
        return on_each_rank(answers)


def answer_requests(
    config: RolloutConfig, prompts: Prompts, places: Sequence[Place], count: int
) -> list[RolloutRequest]:
    """`count` requests for each prompt, each with its own seed."""
    requests = []
    for number, row in places:
        data = prompts[number]
        ids, question, key = data.prompt(row), data.question(row).prompt, data.key(row)
        for sample in range(count):
            request = RolloutRequest(
                prompt=ids,
                question=question,
                group=key,
                seed=answer_seed(config.seed, number, data.content(row), sample),
                max_new_tokens=min(config.max_new_tokens, config.max_len - len(ids)),
            )
            requests.append(request)
    return requests


def answer_seed(seed: int, number: int, content: bytes, sample: int) -> int:
    """The seed of an answer: of the run's, the prompts' number, the row and the sample."""
    digest = hashlib.sha256(f"{seed} {number} {sample} ".encode() + content).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def lengths_of(prompts: Prompts, groups: Mapping[Place, list[Sample]]) -> dict[str, list[int]]:
    """{key of a prompt: tokens of its answers}, for Rollouts.learn."""
    lengths: dict[str, list[int]] = {}
    for (number, row), samples in sorted(groups.items()):
        prompt_lengths = lengths.setdefault(prompts[number].key(row), [])
        for sample in samples:
            prompt_lengths.append(len(sample.tokens))
    return lengths
