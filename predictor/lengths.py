"""The rows a predictor is trained on, split and laid out as arrays."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chatglm.files import read_json, shorten
from finetune.rows.formats import BadRow
from predictor.config import PredictorConfig
from predictor.decoder import tokenizer_hash
from predictor.labels import (
    LONGEST,
    Example,
    data_hash,
    group_prompts,
    make_counter,
    read_examples,
    served_name,
    split,
)

DEFAULT_LIMIT = 8192  # tokens; ChatGLM2-6B's context
SIDES = {"train": "train", "calibration": "calibrate"}  # what is done with their rows


@dataclass(frozen=True)
class Lengths:
    """Prompts and their labels: those of prompt i are starts[i] to starts[i + 1] of the (M,) arrays.

    Lengths of other served models stand for the predicted one's: log(1 + L) moved and scaled to that model's mean and deviation
    (`Scale`), so that any head learns from them as they are.

    Attributes:
        tokens: float64; finished: bool; served: int64, number of the served model; weights: float64, 1 in all for each prompt.
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
        examples: list[Example],
        served_models: list[str],
        own: int,
        other_weight: float,
        scale: "Scale",
    ) -> "Lengths":
        """`other_weight`: share of a prompt's weight that lengths of other models than `own` have, where it has both."""
        counts = [len(e.labels) for e in examples]
        labels = [label for e in examples for label in e.labels]
        number = {name: i for i, name in enumerate(served_models)}
        served = np.array([number[label.served_model] for label in labels], np.int64)
        prompt = np.repeat(np.arange(len(examples)), counts)
        mine = served == own
        of_own = np.bincount(prompt, mine, minlength=len(examples))[prompt]
        of_others = np.repeat(counts, counts) - of_own
        share = np.where(
            mine,
            np.where(of_others > 0, 1 - other_weight, 1.0),
            np.where(of_own > 0, other_weight, 1.0),
        )
        return cls(
            [e.prompt for e in examples],
            [e.place for e in examples],
            np.concatenate([[0], np.cumsum(counts)]),
            scale.apply(np.array([label.tokens for label in labels], float), served),
            np.array([label.finished for label in labels], bool),
            served,
            share / np.where(mine, of_own, of_others),
            scale.limit,
        )

    @property
    def prompt_of(self) -> np.ndarray:
        """(M,): the prompt of each label."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def of_model(self, model: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(prompt numbers, tokens, finished, weights: 1 in all for each prompt), (m,), of one served model's labels."""
        chosen = self.served == model
        prompt = self.prompt_of[chosen]
        weights = 1 / np.bincount(prompt, minlength=len(self))[prompt]
        return prompt, self.tokens[chosen], self.finished[chosen], weights

    def mean_scores(self) -> np.ndarray:
        """(N,): the weighted mean of log(1 + L) over each prompt's labels, standardised over prompts."""
        prompt = self.prompt_of
        mean = np.bincount(
            prompt, self.weights * np.log1p(self.tokens), minlength=len(self)
        ) / np.bincount(prompt, self.weights, minlength=len(self))
        return (mean - mean.mean()) / max(mean.std(), 1e-6)

    def condensed(self, own: int, other_weight: float) -> "Labels":
        """The labels a small head learns from: the served model's own, and for each prompt one that stands for all other models'.

        That is their mean log length, moved and stretched to the own ones' mean and deviation: a mean of many has lost most of its
        noise. Answers of others that were cut count at their cut.
        """
        prompt, tokens, finished, weights = self.of_model(own)
        others = self.served != own
        others &= np.isin(self.prompt_of, prompt)
        if not others.any() or not other_weight:
            return Labels(prompt, tokens, finished, weights)
        owner, logs = self.prompt_of[others], np.log1p(self.tokens[others])
        counts = np.bincount(owner, minlength=len(self))
        those = np.flatnonzero(counts)
        mean = (np.bincount(owner, logs, minlength=len(self))[those]) / counts[those]
        mine = np.log1p(tokens)
        stretched = np.average(mine, weights=weights) + (mean - mean.mean()) * (
            mine.std() / max(mean.std(), 1e-6)
        )
        both = np.isin(prompt, those)
        return Labels(
            np.concatenate([prompt, those]),
            np.concatenate([tokens, np.clip(np.expm1(stretched), 0, self.limit)]),
            np.concatenate([finished, np.ones(len(those), bool)]),
            np.concatenate(
                [weights * np.where(both, 1 - other_weight, 1.0), np.full(len(those), other_weight)]
            ),
        )


@dataclass(frozen=True)
class Labels:
    """(M,) arrays: the prompt, tokens, finished and weight of each label."""

    prompt: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Scale:
    """mean, deviation: (models,) of log(1 + L) of each served model; own: the predicted one's number."""

    mean: np.ndarray
    deviation: np.ndarray
    own: int
    limit: int

    @classmethod
    def fit(
        cls, examples: list[Example], served_models: list[str], own: int, limit: int
    ) -> "Scale":
        """From training rows; a model with fewer than 20 lengths shares the deviation of all."""
        logs = {name: [] for name in served_models}
        for e in examples:
            for label in e.labels:
                logs[label.served_model].append(np.log1p(min(label.tokens, limit)))
        every = np.concatenate([np.array(x) - np.mean(x) for x in logs.values() if x])
        mean = np.array([np.mean(logs[name]) if logs[name] else 0.0 for name in served_models])
        deviation = np.array(
            [np.std(logs[name]) if len(logs[name]) >= 20 else every.std() for name in served_models]
        )
        return cls(mean, np.maximum(deviation, 0.01), own, limit)

    def apply(self, tokens: np.ndarray, served: np.ndarray) -> np.ndarray:
        """(M,) lengths in the predicted model's manner of speaking; its own come back as they are."""
        z = (np.log1p(np.minimum(tokens, self.limit)) - self.mean[served]) / self.deviation[served]
        return np.where(
            served == self.own,
            tokens,
            np.clip(np.expm1(self.mean[self.own] + self.deviation[self.own] * z), 0, self.limit),
        )


@dataclass(frozen=True)
class LengthRows:
    """Training, calibration and perhaps test rows; own: number in served_models of the one that is predicted.

    `config` is the run's, with names and limits filled in; groups: (training prompts,) which of them are near-duplicates.
    """

    config: PredictorConfig
    train: Lengths
    calibration: Lengths | None
    groups: np.ndarray
    test: Lengths | None
    served_models: list[str]
    own: int
    hash: str
    bad: int

    def summary(self) -> str:
        sides = [side for side in (self.train, self.calibration) if side]
        labels = sum(len(side.tokens) for side in sides)
        cut = sum(int((~side.finished).sum()) for side in sides)
        words = [f"{len(self.train)} prompts to train on"]
        words += [f"{len(self.calibration)} to calibrate"] if self.calibration else []
        words += [f"{len(self.test)} to test"] if self.test else []
        words += [
            f"{labels} lengths of {len(self.served_models)} served model(s), predicted: {self.served_models[self.own]}"
        ]
        words += [f"{cut} answers cut by their cap"] if cut else []
        words += [f"{self.bad} bad rows skipped"] if self.bad else []
        longest = int(max(side.of_model(self.own)[1].max() for side in sides))
        if 2 * longest < self.config.length_limit:
            words += [
                f"longest answer {longest} tokens: beyond it, up to the limit of {self.config.length_limit}, lengths are extrapolated"
            ]
        return ", ".join(words)

    def card(self) -> dict:
        calibration = len(self.calibration) if self.calibration else 0
        return {
            "sha256": self.hash,
            "prompts": len(self.train) + calibration,
            "calibration_prompts": calibration,
            "median_tokens": float(np.median(self.train.of_model(self.own)[1])),
            "served_models": self.served_models,
        }


def load_lengths(config: PredictorConfig, tokenizer, *, calibration: bool = True) -> LengthRows:
    """Read and split the rows of a run. `tokenizer`: the served model's, or None where rows bring their lengths.

    Without `calibration`, all rows are to train on.

    Raises:
        ValueError: rows that do not fit, or too few of the served model's.
    """
    name = config.served_model or (
        served_name(config.model_name_or_path) if config.model_name_or_path else ""
    )
    count = make_counter(tokenizer) if tokenizer else None
    paths = [path.strip() for path in config.train_path.split(",")]
    examples, bad = read_examples(
        paths,
        served_model=name,
        count=count,
        on_bad_row=config.on_bad_row,
        limit=config.dataset_length,
    )
    served_models = sorted({label.served_model for e in examples for label in e.labels})
    if not config.served_model and len(served_models) == 1:
        name = served_models[0]
    test = read_tests(config, name, count)
    if name not in served_models:
        raise BadRow(
            f"--served_model {name!r}: no row is of it; "
            f"{config.train_path} has {', '.join(served_models[:8])}"
        )
    own = served_models.index(name)
    limit = config.length_limit or context_length(config)
    config = replace(config, served_model=name, length_limit=limit)
    examples, groups = leave_out_tests(config, examples, test)
    parts = split_sides(config, examples, groups, calibration=calibration)
    sides = {side: [examples[i] for i in chosen.tolist()] for side, chosen in parts.items()}
    scale = Scale.fit(sides["train"], served_models, own, limit)
    arrays = {}
    for side, chosen in sides.items():
        weight = config.other_models_weight
        arrays[side] = Lengths.of(chosen, served_models, own, weight, scale)
    for side, lengths in arrays.items():
        check_enough(lengths, own, f"{name!r} to {SIDES[side]} on")
    return LengthRows(
        config,
        arrays["train"],
        arrays.get("calibration"),
        groups[parts["train"]],
        lengths_to_test(test, served_models, own, scale),
        served_models,
        own,
        data_hash(examples),
        bad,
    )


def read_tests(
    config: PredictorConfig, name: str, count: Callable[[str], int] | None
) -> list[Example]:
    """The rows of --eval_path; `name`: the model of those that name none."""
    path, on_bad_row = config.eval_path, config.on_bad_row
    if not path:
        return []
    return read_examples(path, served_model=name, count=count, on_bad_row=on_bad_row)[0]


def leave_out_tests(
    config: PredictorConfig, examples: list[Example], test: list[Example]
) -> tuple[list[Example], np.ndarray]:
    """(the rows to train on, (rows,) their groups of near-duplicates): what is tested is not
    trained on, nor its like.

    Raises:
        BadRow: none is left.
    """
    prompts = [e.prompt for e in [*examples, *test]]
    groups = group_prompts(prompts, threshold=config.near_duplicates)
    groups, tested = groups[: len(examples)], set(groups[len(examples) :].tolist())
    kept = [i for i, group in enumerate(groups.tolist()) if group not in tested]
    if not kept:
        raise BadRow(
            f"--eval_path {config.eval_path} has every prompt of {config.train_path}: "
            "no rows are left to train on"
        )
    return [examples[i] for i in kept], groups[kept]


def split_sides(
    config: PredictorConfig, examples: list[Example], groups: np.ndarray, *, calibration: bool
) -> dict[str, np.ndarray]:
    """{side: numbers of its rows}: "train", and with `calibration` also "calibration"."""
    if not calibration:
        return {"train": np.arange(len(examples))}
    share = config.calibration_share
    shares = {"train": 1 - share, "calibration": share}
    return split(groups, [e.prompt for e in examples], shares)


def check_enough(lengths: Lengths, own: int, purpose: str):
    """Raises BadRow where fewer than two labels are of the predicted model."""
    count = len(lengths.of_model(own)[0])
    if count < 2:
        raise BadRow(f"too few rows of {purpose}: {count}")


def lengths_to_test(
    test: list[Example], served_models: list[str], own: int, scale: Scale
) -> Lengths | None:
    """The test rows of the predicted model, with their labels of all models that are trained on."""
    of_own = [
        e for e in test if any(label.served_model == served_models[own] for label in e.labels)
    ]
    if not of_own:
        return None
    known = []
    for example in of_own:
        labels = tuple(label for label in example.labels if label.served_model in served_models)
        known.append(replace(example, labels=labels))
    return Lengths.of(known, served_models, own, 0.0, scale)


def context_length(config: PredictorConfig) -> int:
    """The longest text of the served model, from its config.json."""
    file = Path(config.model_name_or_path or ".") / "config.json"
    if not (config.model_name_or_path and file.is_file()):
        return DEFAULT_LIMIT
    values = read_json(file)
    for name in ("seq_length", "max_sequence_length"):
        if length := values.get(name):
            if type(length) is not int or not 2 <= length <= LONGEST:
                raise ValueError(
                    f"{file}: {name} must be a whole number from 2 to {LONGEST:,}, got {shorten(length)}; or give --length_limit"
                )
            return length
    return DEFAULT_LIMIT


def served_card(config: PredictorConfig, rows: LengthRows) -> dict:
    """Name and tokenizer of the served model, as a predictor's card has them."""
    return {
        "name": rows.config.served_model,
        "tokenizer_sha256": tokenizer_hash(config.model_name_or_path)
        if config.model_name_or_path
        else None,
        "length_limit": rows.config.length_limit,
    }
