"""Readings to learn from: hidden states of answers joined with their lengths. numpy only."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from predictor.hidden_states import HiddenStates
from predictor.labels import parse_example, read_label_items


@dataclass(frozen=True)
class AnswerLines:
    """The lines of a lengths file, (M,) arrays.

    Attributes:
        prompt: number of the line's prompt, -1 where it is not of the predicted model.
        tokens: float64; finished: bool.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray

    @classmethod
    def read(
        cls, path: str | Path, prompts: list[str], served_model: str, default_model: str
    ) -> "AnswerLines":
        """The answers of one served model to these prompts, by line.

        Args:
            default_model: the model of lines that name none.
        Raises:
            BadRow: a line that is no row, or a file that is not JSON lines.
        """
        number = {prompt: i for i, prompt in enumerate(prompts)}
        prompt: list[int] = []
        tokens: list[int] = []
        finished: list[bool] = []
        for place, item, source in read_label_items([path]):
            line = int(place.rpartition(":")[2]) if place.rpartition(":")[2].isdigit() else 0
            if not line:
                raise ValueError(f"{path}: states belong to lines of JSON, this is a list")
            while len(prompt) < line - 1:  # blank lines count
                prompt.append(-1)
                tokens.append(0)
                finished.append(False)
            if isinstance(item, Exception):
                raise item
            example = parse_example(item, place, default_model, None, source)
            label = example.labels[0]
            is_known = label.served_model == served_model
            prompt.append(number.get(example.prompt, -1) if is_known else -1)
            tokens.append(label.tokens)
            finished.append(label.finished)
        return cls(np.array(prompt, np.int64), np.array(tokens, float), np.array(finished, bool))

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Readings:
    """R readings to learn from, sorted by answer and place.

    Attributes:
        prompt: (R,) number of the prompt; answer: (R,) line of the answer.
        at: (R,) tokens that were there; tokens: (R,) of the whole answer, at most the cap.
        finished: (R,) whether it ended by itself.
        weights: (R,); those of a prompt's answers sum to 1 at each place.
        vectors: (R, D) float32, pooled states.
    """

    prompt: np.ndarray
    answer: np.ndarray
    at: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray
    weights: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def take_rows(self, chosen: np.ndarray) -> "Readings":
        """Some of the readings: numbers, or (R,) bool."""
        parts = {}
        for name in self.__dataclass_fields__:
            parts[name] = getattr(self, name)[chosen]
        return Readings(**parts)


def join_readings(
    states: HiddenStates,
    lines: AnswerLines,
    pooling: str,
    layers: tuple[int, ...],
    file: str | Path,
) -> Readings:
    """The states of the predicted model's answers, with their lengths.

    Args:
        pooling, layers: as `HiddenStates.vectors` takes them.
        file: of the lengths, for messages.
    Raises:
        ValueError: a reading of a place that its answer does not have, or an answer over the cap.
    """
    chosen = lines.prompt[states.answer] >= 0
    answer, at = states.answer[chosen], states.at[chosen].astype(np.int64)
    prompt = lines.prompt[answer]
    tokens, finished = lines.tokens[answer], lines.finished[answer]
    wrong = ((at > 0) & (at >= tokens)) | (tokens > states.cap)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{file}:{answer[i] + 1}: an answer of {tokens[i]:.0f} tokens has states after "
            f"{at[i]} tokens and a cap of {states.cap}: lengths and states are of two collections"
        )
    _, number, counts = np.unique(
        prompt * (states.cap + 1) + at, return_inverse=True, return_counts=True
    )
    vectors = states.vectors(pooling, layers)[chosen]
    return Readings(prompt, answer, at, tokens, finished, 1 / counts[number], vectors)
