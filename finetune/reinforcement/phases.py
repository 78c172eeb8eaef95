"""Which prompts a step reads, by the numbers alone. Free of torch.

`--rollout_steps` steps make a phase with `--rollout_epochs` passes over its answers: at its first
step the prompts of all its steps are answered by the weights of that moment. Prompts of a step are
counted without these repetitions: with two steps and two passes, the steps 0, 1, 2, 3, 4, 5 read
the prompts 0, 1, 0, 1, 2, 3.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """The order of a run's phases; the fields are the flags of the same names."""

    rollout_steps: int
    rollout_epochs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of a phase."""
        return self.rollout_steps * self.rollout_epochs

    def phase_of(self, step: int) -> tuple[int, int]:
        """(the phase of a step, its number within the phase), all from 0."""
        return divmod(step, self.steps)

    def prompts_number(self, step: int) -> int:
        """Which prompts a step reads."""
        phase, within = self.phase_of(step)
        return phase * self.rollout_steps + within % self.rollout_steps

    def prompts_numbers(self, phase: int) -> range:
        """The prompts that are answered at a phase's first step."""
        first = phase * self.rollout_steps
        return range(first, first + self.rollout_steps)

    def rows_per_epoch(self, prompts: int, step_rows: int) -> int:
        """What an epoch over `prompts` prompts reads, `step_rows` a step."""
        if self.rollout_epochs == 1:
            return prompts
        return self.rollout_epochs * math.ceil(prompts / step_rows) * step_rows
