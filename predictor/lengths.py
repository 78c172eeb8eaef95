"""The rows a predictor is trained on, split and laid out as arrays."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatglm.files import read_json, shorten
from finetune.rows.formats import BadRow
from finetune.rows.near_duplicates import group_prompts
from finetune.rows.sources import split_names
from predictor.config import PredictorConfig
from predictor.decoder import tokenizer_hash
from predictor.labels import (
    MAX_TOKENS,
    LabelledPrompt,
    data_hash,
    make_counter,
    read_examples,
    served_name,
    split_groups,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LIMIT = 8192  # tokens; ChatGLM2-6B's context
SIDES = {"train": "train", "calibration": "calibrate"}  # what their rows are for, in messages


@dataclass(frozen=True)
class LengthArrays:
    """Prompts and their labels: those of prompt i are starts[i] to starts[i + 1] of (M,) arrays.

    Lengths of other served models are mapped to the predicted model's: log(1 + L) shifted and
    scaled to that model's mean and deviation (`LengthScale`), so that any head can learn from them.

    Attributes:
        tokens: float64; finished: bool.
        served: int64, number of the served model.
        weights: float64, summing to 1 over each prompt.
    """

    prompts: list[str]
    places: list[str]
    starts: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray
    served: np.ndarray
    weights: np.ndarray
    limit: int

    def __len__(self):
        return len(self.prompts)

    @classmethod
    def of(
        cls,
        examples: list[LabelledPrompt],
        served_models: list[str],
        target_model: int,
        other_weight: float,
        scale: "LengthScale",
    ) -> "LengthArrays":
        """The labels of examples.

        Args:
            target_model: number in `served_models` of the predicted model.
            other_weight: share of a prompt's weight that lengths of other models have, where it has
                lengths of both.
        """
        starts, models, tokens, finished = [0], [], [], []
        for example in examples:
            for label in example.labels:
                models.append(label.served_model)
                tokens.append(label.tokens)
                finished.append(label.finished)
            starts.append(len(tokens))
        served = np.array(list(map(served_models.index, models)), np.int64)
        return cls(
            [example.prompt for example in examples],
            [example.place for example in examples],
            np.array(starts),
            scale.apply(np.array(tokens, float), served),
            np.array(finished, bool),
            served,
            label_weights(np.diff(starts), served == target_model, other_weight),
            scale.limit,
        )

    @property
    def prompt_of(self) -> np.ndarray:
        """(M,): the prompt of each label."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def of_model(self, model: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(prompt numbers, tokens, finished, weights), (m,), of one served model's labels.

        Weights sum to 1 over each prompt.
        """
        chosen = self.served == model
        prompt = self.prompt_of[chosen]
        weights = 1 / np.bincount(prompt, minlength=len(self))[prompt]
        return prompt, self.tokens[chosen], self.finished[chosen], weights

    def mean_scores(self) -> np.ndarray:
        """(N,): the weighted mean of log(1 + L) of each prompt's labels, standardised."""
        prompt = self.prompt_of
        total = np.bincount(prompt, self.weights * np.log1p(self.tokens), minlength=len(self))
        mean = total / np.bincount(prompt, self.weights, minlength=len(self))
        return (mean - mean.mean()) / max(mean.std(), 1e-6)

    def condense(self, target_model: int, other_weight: float) -> "LabelArrays":
        """The labels a small head learns from: the target model's, and one a prompt for all others.

        That one is the mean log length of other models' answers, shifted and scaled to the mean
        and deviation of the target model's: a mean of many has less noise than one answer. Other
        models' cut answers count at their cut.
        """
        prompt, tokens, finished, weights = self.of_model(target_model)
        others = self.served != target_model
        others &= np.isin(self.prompt_of, prompt)
        if not others.any() or not other_weight:
            return LabelArrays(prompt, tokens, finished, weights)
        owner, logs = self.prompt_of[others], np.log1p(self.tokens[others])
        counts = np.bincount(owner, minlength=len(self))
        other_prompts = np.flatnonzero(counts)
        mean = (
            (np.bincount(owner, logs, minlength=len(self))[other_prompts]) / counts[other_prompts]
        )
        target_logs = np.log1p(tokens)
        scale = target_logs.std() / max(mean.std(), 1e-6)
        scaled = np.average(target_logs, weights=weights) + (mean - mean.mean()) * scale
        has_both = np.isin(prompt, other_prompts)
        target_weights = weights * np.where(has_both, 1 - other_weight, 1.0)
        return LabelArrays(
            np.concatenate([prompt, other_prompts]),
            np.concatenate([tokens, np.clip(np.expm1(scaled), 0, self.limit)]),
            np.concatenate([finished, np.ones(len(other_prompts), bool)]),
            np.concatenate([target_weights, np.full(len(other_prompts), other_weight)]),
        )


def label_weights(counts: np.ndarray, is_target: np.ndarray, other_weight: float) -> np.ndarray:
    """(M,) weights of labels, summing to 1 over each prompt.

    Args:
        counts: (N,) labels of each prompt.
        is_target: (M,) whether a label is of the predicted model.
        other_weight: share of a prompt's weight that other labels have, where it has both kinds.
    """
    prompt = np.repeat(np.arange(len(counts)), counts)
    of_target = np.bincount(prompt, is_target, minlength=len(counts))[prompt]
    of_others = np.repeat(counts, counts) - of_target
    share = np.where(
        is_target,
        np.where(of_others > 0, 1 - other_weight, 1.0),
        np.where(of_target > 0, other_weight, 1.0),
    )
    return share / np.where(is_target, of_target, of_others)


@dataclass(frozen=True)
class LabelArrays:
    """(M,) arrays: the prompt, tokens, finished and weight of each label."""

    prompt: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class LengthScale:
    """Maps lengths of other served models to the predicted one's.

    Attributes:
        mean, deviation: (models,) of log(1 + L) of each served model.
        target_model: the predicted model's number.
        limit: longest answer in tokens.
    """

    mean: np.ndarray
    deviation: np.ndarray
    target_model: int
    limit: int

    @classmethod
    def fit(
        cls, examples: list[LabelledPrompt], served_models: list[str], target_model: int, limit: int
    ) -> "LengthScale":
        """From training rows; a model with fewer than 20 lengths has the deviation of all."""
        logs: dict[str, list[float]] = defaultdict(list)
        for example in examples:
            for label in example.labels:
                logs[label.served_model].append(np.log1p(min(label.tokens, limit)))
        mean, deviation = np.zeros(len(served_models)), np.full(len(served_models), np.nan)
        differences = []
        for i, name in enumerate(served_models):
            if logs[name]:
                mean[i] = np.mean(logs[name])
                differences.append(np.array(logs[name]) - mean[i])
            if len(logs[name]) >= 20:
                deviation[i] = np.std(logs[name])
        deviation[np.isnan(deviation)] = np.concatenate(differences).std()
        return cls(mean, np.maximum(deviation, 0.01), target_model, limit)

    def apply(self, tokens: np.ndarray, served: np.ndarray) -> np.ndarray:
        """(M,) lengths on the predicted model's scale; its lengths are unchanged."""
        z = (np.log1p(np.minimum(tokens, self.limit)) - self.mean[served]) / self.deviation[served]
        scaled = np.expm1(self.mean[self.target_model] + self.deviation[self.target_model] * z)
        return np.where(served == self.target_model, tokens, np.clip(scaled, 0, self.limit))


@dataclass(frozen=True)
class LengthRows:
    """Training, calibration and perhaps test rows.

    Attributes:
        config: the run's, with names and limits filled in.
        groups: (training prompts,) number of each one's group of near-duplicates.
        target_model: number in served_models of the predicted model.
        hash: of the rows; bad: number of bad rows skipped.
    """

    config: PredictorConfig
    train: LengthArrays
    calibration: LengthArrays | None
    groups: np.ndarray
    test: LengthArrays | None
    served_models: list[str]
    target_model: int
    hash: str
    bad: int

    def summary(self) -> str:
        """One line for the log."""
        labels = cut = longest = 0
        for side in (self.train, self.calibration):
            if side:
                labels += len(side.tokens)
                cut += int((~side.finished).sum())
                longest = max(longest, int(side.of_model(self.target_model)[1].max()))
        words = [f"{len(self.train)} prompts to train on"]
        if self.calibration:
            words.append(f"{len(self.calibration)} to calibrate")
        if self.test:
            words.append(f"{len(self.test)} to test")
        words.append(
            f"{labels} lengths of {len(self.served_models)} served model(s), "
            f"predicted: {self.served_models[self.target_model]}"
        )
        if cut:
            words.append(f"{cut} answers cut by their cap")
        if self.bad:
            words.append(f"{self.bad} bad rows skipped")
        limit = self.train.limit
        if 2 * longest < limit:
            words.append(
                f"longest answer {longest} tokens: beyond it, up to the limit of "
                f"{limit}, lengths are extrapolated"
            )
        return ", ".join(words)

    def card(self) -> dict:
        """The training data as a predictor's card has it."""
        calibration = len(self.calibration) if self.calibration else 0
        return {
            "sha256": self.hash,
            "prompts": len(self.train) + calibration,
            "calibration_prompts": calibration,
            "median_tokens": float(np.median(self.train.of_model(self.target_model)[1])),
            "served_models": self.served_models,
        }


def load_lengths(
    config: PredictorConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    calibration: bool = True,
) -> LengthRows:
    """Read and split the rows of a run.

    Args:
        tokenizer: the served model's; None where rows bring their lengths.
        calibration: whether to set calibration rows aside; else all rows are for training.
    Raises:
        ValueError: rows that do not fit, or too few of the served model's.
    """
    name = config.served_model
    if not name and config.model_name_or_path:
        name = served_name(config.model_name_or_path)
    count = make_counter(tokenizer) if tokenizer else None
    examples, bad = read_examples(
        split_names(config.train_path, "--train_path"),
        served_model=name,
        count=count,
        on_bad_row=config.on_bad_row,
        limit=config.dataset_length,
    )
    served_models = served_models_of(examples)
    if not config.served_model and len(served_models) == 1:
        name = served_models[0]
    test = read_test_examples(config, name, count)
    if name not in served_models:
        raise BadRow(
            f"--served_model {name!r}: no row is of it; "
            f"{config.train_path} has {', '.join(served_models[:8])}"
        )
    limit = config.length_limit or context_length(config)
    config = replace(config, served_model=name, length_limit=limit)
    return make_length_rows(
        config, examples, test, served_models, limit, bad, calibration=calibration
    )


def make_length_rows(
    config: PredictorConfig,
    examples: list[LabelledPrompt],
    test: list[LabelledPrompt],
    served_models: list[str],
    limit: int,
    bad: int,
    *,
    calibration: bool,
) -> LengthRows:
    """The rows of a run as arrays, split into sides.

    Args:
        config: the run's, with names and limits filled in.
        limit: longest answer in tokens; bad: number of bad rows skipped.
    Raises:
        BadRow: too few rows of the served model's for a side.
    """
    target_model = served_models.index(config.served_model)
    examples, groups = exclude_test_groups(config, examples, test)
    parts = split_sides(config, examples, groups, calibration=calibration)
    sides = {}
    for side, chosen in parts.items():
        sides[side] = [examples[i] for i in chosen.tolist()]
    scale = LengthScale.fit(sides["train"], served_models, target_model, limit)
    arrays = {}
    for side, rows in sides.items():
        arrays[side] = LengthArrays.of(
            rows, served_models, target_model, config.other_models_weight, scale
        )
    for side, lengths in arrays.items():
        check_label_count(lengths, target_model, f"{config.served_model!r} to {SIDES[side]} on")
    return LengthRows(
        config,
        arrays["train"],
        arrays.get("calibration"),
        groups[parts["train"]],
        target_test_rows(test, served_models, target_model, scale),
        served_models,
        target_model,
        data_hash(examples),
        bad,
    )


def served_models_of(examples: list[LabelledPrompt]) -> list[str]:
    """The names of the served models of examples, sorted."""
    names: set[str] = set()
    for example in examples:
        names.update(label.served_model for label in example.labels)
    return sorted(names)


def read_test_examples(
    config: PredictorConfig, name: str, count: Callable[[str], int] | None
) -> list[LabelledPrompt]:
    """The rows of --eval_path; `name`: the model of rows that name none."""
    path, on_bad_row = config.eval_path, config.on_bad_row
    if not path:
        return []
    paths = split_names(path, "--eval_path")
    return read_examples(paths, served_model=name, count=count, on_bad_row=on_bad_row)[0]


def exclude_test_groups(
    config: PredictorConfig, examples: list[LabelledPrompt], test: list[LabelledPrompt]
) -> tuple[list[LabelledPrompt], np.ndarray]:
    """(the rows to train on, (rows,) their groups of near-duplicates).

    Rows whose prompts are in a group with a test row are left out.

    Raises:
        BadRow: none is left.
    """
    prompts = [e.prompt for e in [*examples, *test]]
    groups = group_prompts(prompts, threshold=config.near_duplicates)
    groups, tested = groups[: len(examples)], set(groups[len(examples) :].tolist())
    remaining = [i for i, group in enumerate(groups.tolist()) if group not in tested]
    if not remaining:
        raise BadRow(
            f"--eval_path {config.eval_path} has every prompt of {config.train_path}: "
            "no rows are left to train on"
        )
    return [examples[i] for i in remaining], groups[remaining]


def split_sides(
    config: PredictorConfig,
    examples: list[LabelledPrompt],
    groups: np.ndarray,
    *,
    calibration: bool,
) -> dict[str, np.ndarray]:
    """{side: numbers of its rows}: "train", and with `calibration` also "calibration"."""
    if not calibration:
        return {"train": np.arange(len(examples))}
    share = config.calibration_share
    shares = {"train": 1 - share, "calibration": share}
    return split_groups(groups, [e.prompt for e in examples], shares)


def check_label_count(lengths: LengthArrays, target_model: int, purpose: str) -> None:
    """Raises BadRow where fewer than two labels are of the predicted model, or all were cut."""
    finished = lengths.of_model(target_model)[2]
    if len(finished) < 2:
        raise BadRow(f"too few rows of {purpose}: {len(finished)}")
    if not finished.any():
        raise BadRow(
            f"none of the {len(finished)} answers of {purpose} finished: "
            "their lengths are not known"
        )


def target_test_rows(
    test: list[LabelledPrompt], served_models: list[str], target_model: int, scale: LengthScale
) -> LengthArrays | None:
    """The test rows of the predicted model, with their labels of all models that are trained on."""
    name = served_models[target_model]
    of_target = []
    for example in test:
        if name in served_models_of([example]):
            of_target.append(example)
    if not of_target:
        return None
    known = []
    for example in of_target:
        labels = tuple(label for label in example.labels if label.served_model in served_models)
        known.append(replace(example, labels=labels))
    return LengthArrays.of(known, served_models, target_model, 0.0, scale)


def context_length(config: PredictorConfig) -> int:
    """The longest text of the served model, from its config.json."""
    file = Path(config.model_name_or_path or ".") / "config.json"
    if not (config.model_name_or_path and file.is_file()):
        return DEFAULT_LIMIT
    values = read_json(file)
    for name in ("seq_length", "max_sequence_length"):
        length = values.get(name)
        if not length:
            continue
        if type(length) is not int or not 2 <= length <= MAX_TOKENS:
            raise ValueError(
                f"{file}: {name} must be a whole number from 2 to {MAX_TOKENS:,}, "
                f"got {shorten(length)}; or give --length_limit"
            )
        return length
    return DEFAULT_LIMIT


def served_card(config: PredictorConfig, rows: LengthRows) -> dict:
    """Name and tokenizer of the served model, as a predictor's card has them."""
    folder = config.model_name_or_path
    return {
        "name": rows.config.served_model,
        "tokenizer_sha256": tokenizer_hash(folder) if folder else None,
        "length_limit": rows.config.length_limit,
    }
