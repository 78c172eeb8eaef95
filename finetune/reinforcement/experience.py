"""The answers of a rollout with all that is learnt from them, and their file in a checkpoint."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

STATE_FILE = "rollouts.safetensors"

EVALUATION = -1  # in place of a step's number: the evaluation rows
Place = tuple[int, int]  # (number of the step's prompts, number of the prompt among its rows)


@dataclass
class Sample:
    """A sampled answer.

    Attributes:
        tokens: (n,) int32 ids, the end token included.
        finished: an end token came.
        reward: as --rewards weigh it, clipped and less the penalty.
        columns: {name: (n,) fp32} by token, as the model was when it answered: "old" its
            log-probabilities, "reference" the reference's, "values" the critic's, and what an
            algorithm adds ("advantages", "returns").
    """

    tokens: np.ndarray
    finished: bool
    reward: float
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def divergence(self) -> np.ndarray:
        """(n,) log(pi / reference) of its tokens: their sum estimates KL(pi || reference).

        Zeros without a reference.
        """
        old = self.columns["old"]
        if "reference" not in self.columns:
            return np.zeros_like(old)
        return old - self.columns["reference"]


@dataclass
class Experience:
    """The samples of one rollout: those of each prompt, of all ranks."""

    phase: int
    groups: dict[Place, list[Sample]]

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order of their prompts."""
        for place in sorted(self.groups):
            yield from self.groups[place]


def rewards_of(samples: Iterable[Sample]) -> np.ndarray:
    """(samples,) fp64."""
    return np.array([sample.reward for sample in samples], np.float64)


def summary_of(samples: Iterable[Sample]) -> dict[str, float]:
    """Mean reward, divergence and length of answers, and the share that ended."""
    rewards, divergences, lengths, ends = [], [], [], []
    for sample in samples:
        rewards.append(sample.reward)
        divergences.append(float(sample.divergence().sum(dtype=np.float64)))
        lengths.append(len(sample.tokens))
        ends.append(sample.finished)
    return {
        "reward": fmean(rewards),
        "kl": fmean(divergences),
        "answer_tokens": fmean(lengths),
        "finished": fmean(ends),
    }


def save_experience(path: Path, experience: Experience | None, state: Mapping[str, Any]) -> None:
    """Write a rollout that is not yet used up (or None), and a state as JSON."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {"places": np.zeros((0, 2), np.int64)}
    phase = None if experience is None else experience.phase
    # One entry: safetensors writes several in any order.
    header = {"rollouts": json.dumps({"phase": phase, "state": state}, sort_keys=True)}
    if experience is not None:
        tensors.update(experience_arrays(experience))
    save_file(tensors, path, header)


def experience_arrays(experience: Experience) -> dict[str, np.ndarray]:
    """The samples in the order of their prompts; what they have by token lies end to end."""
    places, lengths, finished = [], [], []
    for place in sorted(experience.groups):
        for sample in experience.groups[place]:
            places.append(place)
            lengths.append(len(sample.tokens))
            finished.append(sample.finished)
    samples = list(experience.samples())
    arrays: dict[str, np.ndarray] = {
        "places": np.array(places, np.int64),
        "lengths": np.array(lengths, np.int64),
        "finished": np.array(finished, np.uint8),
        "rewards": rewards_of(samples),
        "tokens": np.concatenate([sample.tokens for sample in samples]),
    }
    for name in samples[0].columns:
        arrays[f"column.{name}"] = np.concatenate([sample.columns[name] for sample in samples])
    return arrays


def load_experience(path: Path) -> tuple[Experience | None, dict[str, Any]]:
    """What save_experience wrote.

    Raises:
        ValueError: the file is not whole, or none of its kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["rollouts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        phase, state = header["phase"], header["state"]
        if not isinstance(state, dict):
            raise ValueError(f"wanted a state, got {state!r:.60}")
        if phase is None:
            return None, state
        check_arrays(tensors)
        return Experience(int(phase), read_groups(tensors)), state
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the rollouts of a checkpoint ({error})") from None


def check_arrays(tensors: dict[str, np.ndarray]) -> None:
    """Raises ValueError where arrays of save_experience do not fit together, KeyError where one
    is not there.
    """
    lengths = tensors["lengths"]
    count = len(lengths)
    if not count or lengths.min() < 1:
        raise ValueError("wanted answers of one token or more")
    tokens = int(lengths.sum())
    shapes: dict[str, tuple[int, ...]] = {
        "places": (count, 2),
        "lengths": (count,),
        "finished": (count,),
        "rewards": (count,),
        "tokens": (tokens,),
        "column.old": (tokens,),
    }
    for name in tensors:
        if name.startswith("column."):
            shapes[name] = (tokens,)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name}: wanted {shape}, got {tensors[name].shape}")


def read_groups(tensors: dict[str, np.ndarray]) -> dict[Place, list[Sample]]:
    """The samples by prompt, of the arrays of save_experience."""
    edges = np.cumsum(tensors["lengths"])[:-1]
    tokens_of_samples = np.split(tensors["tokens"], edges)
    columns_of_samples: list[dict[str, np.ndarray]] = [{} for _ in tokens_of_samples]
    for name, values in tensors.items():
        if name.startswith("column."):
            for columns, column in zip(columns_of_samples, np.split(values, edges)):
                columns[name.removeprefix("column.")] = column
    groups: dict[Place, list[Sample]] = {}
    for number, tokens in enumerate(tokens_of_samples):
        finished = bool(tensors["finished"][number])
        reward = float(tensors["rewards"][number])
        sample = Sample(tokens, finished, reward, columns_of_samples[number])
        step, row = tensors["places"][number].tolist()
        groups.setdefault((step, row), []).append(sample)
    return groups
