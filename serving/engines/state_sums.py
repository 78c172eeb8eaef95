"""The running sums of an answer's hidden states, which serving.engines.state_tap writes."""

from collections.abc import Mapping

import torch
from torch import Tensor


class StateSums:
    """Running sums of an answer's states, kept with the answer: a preemption does not lose them.

    What is computed again after a preemption is not added again.

    Attributes:
        seen: tokens of prompt and answer that were added or passed by.
        prompt, answer: (L, hidden_size) sums over their tokens, fp32.
        weighted, weight: sums over the prompt of entropy times state, and of entropy.
        has_prompt, has_answer: no token of theirs was passed by.
        marks: sums over the first n tokens of prompt and answer, for multiples n of the tap's
            `mark_every`: what a prompt that copies so many of them begins with.
    """

    def __init__(self, layers: int, hidden_size: int, device: torch.device):
        self.seen = 0
        self.prompt = torch.zeros(layers, hidden_size, device=device)
        self.answer = torch.zeros_like(self.prompt)
        self.weighted: Tensor | None = None
        self.weight = 0.0
        self.has_prompt = self.has_answer = True
        self.marks: dict[int, Tensor] = {}

    def adopt(self, count: int, marks: Mapping[int, Tensor], prompt_size: int) -> None:
        """Begin with `count` tokens that were copied from a sequence with these marks.

        Nothing happens where they are not all of the prompt, or where so many were seen.
        """
        if count <= self.seen or count > prompt_size or count not in marks:
            return
        self.seen = count
        self.prompt = marks[count].clone()
        self.marks = {tokens: total for tokens, total in marks.items() if tokens <= count}
