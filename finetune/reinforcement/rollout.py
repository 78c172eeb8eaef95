"""What the loop asks of whatever writes its answers. Free of torch.

train.py passes an implementation that stands above this package (serving.rollouts); a test passes
a list.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class RolloutRequest(NamedTuple):
    """One answer to write.

    Attributes:
        prompt: token ids.
        question: the last question as text, for predictions of the answer's length.
        group: equal for answers to one prompt, also in later rollouts.
        seed: of this answer's sampling: its tokens depend on nothing else.
        max_new_tokens: the answer is truncated after so many.
    """

    prompt: list[int]
    question: str
    group: str
    seed: int
    max_new_tokens: int


class RolloutAnswer(NamedTuple):
    """Token ids, the end token included, and whether one came."""

    tokens: list[int]
    finished: bool


class RolloutSampling(NamedTuple):
    """How all answers are sampled; top_k 0: among all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Rollouts(Protocol):
    """Writes answers with the weights as they are."""

    def check(self, model: Any) -> None:
        """Raises ValueError: it cannot run such a model, whose weights may be partitioned."""

    def answers(
        self, model: Any, requests: Sequence[RolloutRequest], sampling: RolloutSampling
    ) -> list[RolloutAnswer]:
        """The answers, in the order of the requests.

        Raises:
            ValueError: it cannot run such a model, or its output was not finite.
        """

    def learn(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Take note of {group: tokens of its answers}; the same on every rank."""

    def state(self) -> dict[str, Any]:
        """What it has learnt, as JSON; a checkpoint keeps it."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of a checkpoint."""


class RolloutSetup(NamedTuple):
    """What an implementation is made of.

    Attributes:
        stop_ids: token ids that end an answer.
        max_batch: answers that are written at once.
        length_predictor: a predictor's folder, or "".
        model_path: the model whose answers it predicts.
    """

    stop_ids: Sequence[int]
    max_batch: int
    length_predictor: str
    model_path: str


MakeRollouts = Callable[[RolloutSetup], Rollouts]
