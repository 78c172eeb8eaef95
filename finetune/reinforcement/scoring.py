"""Sampled answers -> samples with their rewards, by functions and a reward model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.evaluation.generation import decoded_text
from finetune.preference.scorer import RewardScorer
from finetune.reinforcement.config import RolloutConfig
from finetune.reinforcement.experience import Place, Sample
from finetune.reinforcement.prompts import Prompts, with_reply
from finetune.reinforcement.rewards import MODEL, ScoredAnswer, function_reward
from finetune.reinforcement.rollout import RolloutAnswer
from finetune.rows.formats import Row

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

LARGEST_REWARD = 1e30  # its square, and sums of many, are finite in fp64


@dataclass(frozen=True)
class AnswerScoring:
    """What gives answers their rewards.

    Attributes:
        scorer: the reward model; None: --rewards has none.
    """

    config: RolloutConfig
    tokenizer: "FamilyTokenizer"
    scorer: RewardScorer | None

    def samples(
        self, prompts: Prompts, places: Sequence[Place], answers: Sequence[RolloutAnswer]
    ) -> dict[Place, list[Sample]]:
        """The answers to each prompt, which come in the order of `places`, as samples.

        Raises:
            ValueError: a reward that failed or is not finite; names the prompt's row.
        """
        answers_per_prompt = len(answers) // max(len(places), 1)
        answer_places: list[Place] = []
        for place in places:
            answer_places += [place] * answers_per_prompt
        scored: list[ScoredAnswer] = []  # for functions
        rows: list[Row] = []  # the same with their questions, for the reward model
        for (number, row), answer in zip(answer_places, answers):
            question = prompts[number].question(row)
            scored.append(self.scored_answer(question, answer))
            rows.append(with_reply(question, scored[-1].text))
        model_scores = [0.0] * len(rows)
        if self.scorer is not None:
            model_scores = self.scorer.scores(rows)
        groups: dict[Place, list[Sample]] = {place: [] for place in places}
        for i, (place, answer) in enumerate(zip(answer_places, answers)):
            reward = self.reward(scored[i], model_scores[i], answer.finished, rows[i].place)
            tokens = np.array(answer.tokens, np.int32)
            groups[place].append(Sample(tokens, answer.finished, reward))
        return groups

    def scored_answer(self, question: Row, answer: RolloutAnswer) -> ScoredAnswer:
        """An answer's text and length, with the row's own answers."""
        ids = text_ids(answer.tokens, answer.finished)
        references = tuple(reference for reference in question.answers if reference)
        return ScoredAnswer(decoded_text(self.tokenizer, ids), len(ids), references)

    def reward(
        self, answer: ScoredAnswer, model_score: float, is_finished: bool, place: str
    ) -> float:
        """An answer's reward; raises ValueError with the place of its row where it has none."""
        config = self.config
        try:
            parts = function_reward(answer, config.reward_weights, config.reward_knobs)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        parts[MODEL] = model_score
        reward = self.total(parts, is_finished)
        # Clipping would hide a part that is infinite.
        if not (all(map(math.isfinite, parts.values())) and abs(reward) < LARGEST_REWARD):
            got = ", ".join(f"{name} {parts[name]:g}" for name in config.reward_weights)
            raise ValueError(
                f"{place}: wanted a finite reward of an answer, got {reward:g} of {got}"
            )
        return reward

    def total(self, parts: dict[str, float], is_finished: bool) -> float:
        """The weighted sum of an answer's rewards by name, clipped, less the penalty."""
        config = self.config
        reward = sum(weight * parts[name] for name, weight in config.reward_weights.items())
        if config.reward_clip is not None:
            reward = min(max(reward, -config.reward_clip), config.reward_clip)
        if not is_finished:
            reward -= config.missing_end_penalty
        return reward


def text_ids(tokens: list[int], is_finished: bool) -> list[int]:
    """An answer's ids without its end token."""
    return tokens[:-1] if is_finished else tokens
