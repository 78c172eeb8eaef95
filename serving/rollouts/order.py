"""In which order the answers of a rollout are begun: the longest first, as far as can be guessed.

All answers wait at once and the rollout ends with the last: then the longest-first rule is the
classic one for a least makespan (Graham, 1969). Free of torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

NEWEST = 0.5  # weight of a rollout's mean length in what is remembered of a prompt


@dataclass
class LengthHistory:
    """Mean tokens of earlier answers by group, newer ones counting more."""

    means: dict[str, float] = field(default_factory=dict)

    def learn(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Take in the answers of a rollout."""
        for group, tokens in sorted(lengths.items()):
            mean = fmean(tokens)
            before = self.means.get(group, mean)
            self.means[group] = before + NEWEST * (mean - before)

    def state(self) -> dict[str, Any]:
        return {"means": self.means}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError where it is no `state()`."""
        means = state.get("means")
        if not isinstance(means, dict):
            raise ValueError(f"wanted the mean lengths of answers, got {means!r:.60}")
        for mean in means.values():
            if not (isinstance(mean, (int, float)) and 0 < mean < float("inf")):
                raise ValueError(f"wanted the mean length of a prompt's answers, got {mean!r:.60}")
        self.means = {str(group): float(mean) for group, mean in means.items()}


class GuessedOrder:
    """Which answer is begun next, from what is known of its group.

    A group's guess is the mean of its prior and of its answers so far; one that is being written
    counts with its tokens once it has outgrown the guess. A group of which nothing is known first
    begins one answer, so that its siblings have a guess.

    Args:
        groups: of each answer.
        priors: {group: tokens}, of those of which something is known.
    """

    def __init__(self, groups: Sequence[str], priors: Mapping[str, float]):
        self.waiting: dict[str, list[int]] = {}
        for number in reversed(range(len(groups))):
            self.waiting.setdefault(groups[number], []).append(number)
        self.place = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self.group_of = list(groups)
        self.priors = dict(priors)
        self.ended: dict[str, list[int]] = {}
        self.running: dict[str, dict[int, Sequence[int]]] = {}

    def __len__(self) -> int:
        """Answers that are not begun."""
        return sum(map(len, self.waiting.values()))

    def guess(self, group: str) -> float | None:
        """Tokens to expect of a group's next answer; None where nothing is known of it."""
        prior = self.priors.get(group)
        known = [float(tokens) for tokens in self.ended.get(group, ())]
        known += [] if prior is None else [prior]
        mean = fmean(known) if known else None
        written = [len(tokens) for tokens in self.running.get(group, {}).values()]
        longer = [float(tokens) for tokens in written if mean is None or tokens > mean]
        if not (known or longer):
            return None
        return fmean(known + longer)

    def key(self, group: str) -> tuple[int, float, int]:
        """Smaller keys are begun first."""
        guess = self.guess(group)
        if guess is None and group not in self.running:
            return 0, 0.0, self.place[group]  # its first answer tells of the others
        return 1, -(guess or 0.0), self.place[group]

    def begin(self) -> int:
        """The number of the next answer, which counts as being written from now on."""
        group = min(self.waiting, key=self.key)
        number = self.waiting[group].pop()
        if not self.waiting[group]:
            del self.waiting[group]
        self.running.setdefault(group, {})[number] = ()
        return number

    def watch(self, number: int, tokens: Sequence[int]) -> None:
        """Look at the tokens of an answer that is being written, which grow."""
        self.running[self.group_of[number]][number] = tokens

    def end(self, number: int, tokens: int) -> None:
        """An answer has ended with so many tokens."""
        group = self.group_of[number]
        self.running[group].pop(number, None)
        self.ended.setdefault(group, []).append(tokens)
