"""REWARDS: functions that score an answer, by name. Free of torch.

`--rewards exact_match,length:0.2` is a weighted sum of them; "model" is the reward model of
--reward_model. All metrics of finetune.evaluation.metrics that compare one answer with its
references are there under their names.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.evaluation.metrics import METRICS

MODEL = "model"  # the reward model, which is no function of this file


@dataclass(frozen=True)
class RewardKnobs:
    """What functions of REWARDS read besides the answer.

    Attributes:
        length: tokens of an answer, for "length".
        pattern: a regular expression, for "pattern".
    """

    length: int = 0
    pattern: str = ""


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer as a function of REWARDS sees it.

    Attributes:
        tokens: of the answer, without its end token.
        references: the row's own answers; empty texts are left out.
    """

    text: str
    tokens: int
    references: tuple[str, ...]


RewardFunction = Callable[[ScoredAnswer, RewardKnobs], float]


def near_length(answer: ScoredAnswer, knobs: RewardKnobs) -> float:
    """1 at --reward_length tokens, falling to 0 at none and at twice as many."""
    return max(0.0, 1 - abs(answer.tokens - knobs.length) / knobs.length)


def has_pattern(answer: ScoredAnswer, knobs: RewardKnobs) -> float:
    """1 where --reward_pattern matches anywhere in the answer."""
    return float(re.search(knobs.pattern, answer.text) is not None)


def pattern_share(answer: ScoredAnswer, knobs: RewardKnobs) -> float:
    """The share of the answer's characters that are in matches of --reward_pattern."""
    matched = sum(len(match.group()) for match in re.finditer(knobs.pattern, answer.text))
    return matched / max(len(answer.text), 1)


def has_reference(answer: ScoredAnswer, knobs: RewardKnobs) -> float:
    """1 where one of the row's answers is a part of the answer."""
    return float(any(reference in answer.text for reference in answer.references))


def metric_reward(name: str) -> RewardFunction:
    """A metric of finetune.evaluation.metrics as a reward; 0 for a row without answers."""

    def score(answer: ScoredAnswer, knobs: RewardKnobs) -> float:
        references = answer.references
        return float(METRICS[name].score([answer.text], references)) if references else 0.0

    return score


def parse_rewards(text: str) -> dict[str, float]:
    """ "exact_match,length:0.2" -> {"exact_match": 1.0, "length": 0.2}.

    Raises:
        ValueError: a name that is not there or comes twice, or a weight that is no number.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        if not item.strip():
            continue
        name, colon, number = item.strip().partition(":")
        if name not in (MODEL, *REWARDS) or name in weights:
            known = ", ".join((MODEL, *REWARDS))
            raise ValueError(f"--rewards: wanted names of {known}, each once; got {name!r}")
        try:
            weights[name] = float(number) if colon else 1.0
        except ValueError:
            raise ValueError(f"--rewards: {name} wants a number after :, got {number!r}") from None
        if not abs(weights[name]) < float("inf"):
            raise ValueError(f"--rewards: {name} wants a finite weight, got {number!r}")
    return weights


def function_reward(
    answer: ScoredAnswer, weights: dict[str, float], knobs: RewardKnobs
) -> dict[str, float]:
    """{name: reward without its weight} of the functions among `weights`.

    Raises:
        ValueError: a function failed, or returned no number.
    """
    parts: dict[str, float] = {}
    for name in weights:
        if name == MODEL:
            continue
        try:
            parts[name] = float(REWARDS[name](answer, knobs))
        except Exception as error:  # a function may do anything
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"--rewards {name} failed on {answer.text!r:.60}: {cause}") from error
    return parts


def reference_rewards(weights: dict[str, float]) -> Sequence[str]:
    """The names of rewards that compare with a row's own answers."""
    return [name for name in weights if name in METRICS or name == "contains"]


def metric_packages(weights: dict[str, float]) -> Sequence[str]:
    """The names of metrics among the rewards, whose packages must be there."""
    return [name for name in weights if name in METRICS]


REWARDS: dict[str, RewardFunction] = {
    "length": near_length,
    "pattern": has_pattern,
    "pattern_share": pattern_share,
    "contains": has_reference,
    "exact_match": metric_reward("exact_match"),
    "rougeL": metric_reward("rougeL"),
    "bleu4": metric_reward("bleu4"),
    "triple_f1": metric_reward("triple_f1"),
}
