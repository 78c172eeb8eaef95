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
        prompt_numbers = {prompt: i for i, prompt in enumerate(prompts)}
        prompt: list[int] = []
        tokens: list[int] = []
        finished: list[bool] = []
        for place, item, source in read_label_items([path]):
            line_number = place.rpartition(":")[2]
            if not line_number.isdigit():
                raise ValueError(f"{path}: states belong to lines of JSON, this is a list")
            while len(prompt) < int(line_number) - 1:  # blank lines count
                prompt.append(-1)
                tokens.append(0)
                finished.append(False)
            if isinstance(item, Exception):
                raise item
            example = parse_example(item, place, default_model, None, source)
            label = example.labels[0]
            if label.served_model == served_model:
                prompt.append(prompt_numbers.get(example.prompt, -1))
            else:
                prompt.append(-1)
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
        ValueError: a reading of a line or a place that is not there, or an answer over the cap.
    """
    check_lines(states, lines, file)
    is_of_model = lines.prompt[states.answer] >= 0
    answer, at = states.answer[is_of_model], states.at[is_of_model].astype(np.int64)
    prompt = lines.prompt[answer]
    tokens, finished = lines.tokens[answer], lines.finished[answer]
    check_places(states.cap, answer, at, tokens, file)
    # The readings of a prompt at one place share the weight 1.
    prompt_and_place = prompt * (states.cap + 1) + at
    _, group, counts = np.unique(prompt_and_place, return_inverse=True, return_counts=True)
    weights = 1 / counts[group]
    vectors = states.vectors(pooling, layers)[is_of_model]
    return Readings(prompt, answer, at, tokens, finished, weights, vectors)


def check_lines(states: HiddenStates, lines: AnswerLines, file: str | Path) -> None:
    """Raises ValueError where there are states of lines that the file does not have."""
    if len(states) and len(lines) <= states.answer.max():
        raise ValueError(
            f"{file}: there are states of line {states.answer.max() + 1}, and {len(lines)} lines: "
            "they are of two collections"
        )


def check_places(
    cap: int, answer: np.ndarray, at: np.ndarray, tokens: np.ndarray, file: str | Path
) -> None:
    """Raises ValueError for a reading after its answer's end, or an answer over the cap.

    Args:
        answer, at, tokens: (R,), as of `Readings`.
    """
    is_after_end = (at > 0) & (at >= tokens)
    wrong = np.flatnonzero(is_after_end | (tokens > cap))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"{file}:{answer[i] + 1}: an answer of {tokens[i]:.0f} tokens has states after "
            f"{at[i]} tokens and a cap of {cap}: lengths and states are of two collections"
        )
