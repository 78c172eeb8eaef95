"""Decodes a head's outputs to calibrated predictions; reads and writes predictor.json. numpy only.

predictor.json, the card, holds the decoder beside a model.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from chatglm.families import TOKENIZER_FILES
from chatglm.files import read_json
from chatglm.saving import is_free
from finetune.files import sha256, write_json
from predictor.calibration import Conformal, Tail, kaplan_meier, levels_of
from predictor.heads import HEADS, Head, Reader
from predictor.prediction import LengthPrediction

CARD = "predictor.json"
FORMAT = "glm-foundry length predictor"
FORMAT_VERSION = 1
FOLDS = 5
RESIDUALS = 199


@dataclass(frozen=True)
class Decoder:
    """A head, its settings fitted to prompts unseen by the model, and the conformal map after it.

    Attributes:
        residuals: RESIDUALS equally likely values of log(length / predicted median), of labels that
            the settings were not fitted to; a simulator draws a predictor's errors from them.
        tail: bound on mass beyond the longest answer seen; None for no bound.
    """

    head: Head
    settings: dict
    conformal: Conformal
    edges: np.ndarray
    residuals: tuple[float, ...] = ()
    tail: Tail | None = None

    @classmethod
    def fit(
        cls,
        head: Head,
        outputs: np.ndarray,
        tokens: np.ndarray,
        finished: np.ndarray,
        weights: np.ndarray,
        prompts: np.ndarray,
    ) -> "Decoder":
        """Fit head settings, conformal map and tail to n labels of unseen prompts.

        Settings are fitted FOLDS times, each to all folds but one, so that the levels that the
        conformal map learns from are of unseen prompts too.

        Args:
            outputs: (n, width) of the head.
            tokens, finished, weights: (n,); weights sum to 1 over each prompt.
            prompts: (n,) number of each label's prompt; a prompt's labels share a fold.
        """
        edges = head_edges(head)
        fold = np.unique(prompts, return_inverse=True)[1] % FOLDS
        raw = cross_fit_masses(head, edges, outputs, tokens, finished, weights, fold)
        conformal = Conformal.fit(levels_of(raw, edges, tokens), finished, weights)
        errors = residuals_of(conformal.apply(raw), edges, tokens, finished, weights)
        return cls(
            head,
            head.fit(outputs, tokens, finished, weights),
            conformal,
            edges,
            errors,
            Tail.fit(tokens, finished, weights),
        )

    @cached_property
    def read(self) -> Reader:
        """The head's reader with the fitted settings."""
        return self.head.reader(self.settings, self.edges)

    def decode(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, width) -> calibrated probabilities (N, K) over `edges`, rank scores (N,)."""
        probabilities, ranks = self.read(np.asarray(outputs, np.float64))
        return self.calibrated(probabilities), ranks

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """(N, K) masses as the head reads them -> calibrated ones, within the tail's bound."""
        probabilities = self.conformal.apply(raw)
        return self.tail.apply(probabilities, self.edges) if self.tail else probabilities

    def decode_with_levels(
        self, outputs: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(probabilities (N, K), rank scores (N,), levels (N,)).

        The levels are the calibrated cumulative probabilities of the lengths `tokens`, exact at the
        conformal map's knots.
        """
        raw, ranks = self.read(np.asarray(outputs, np.float64))
        levels = np.interp(levels_of(raw, self.edges, tokens), *self.conformal.knots)
        return self.calibrated(raw), ranks, levels

    def predictions(self, outputs: np.ndarray) -> list[LengthPrediction]:
        probabilities, ranks = self.decode(outputs)
        predictions = []
        for masses, rank in zip(probabilities, ranks):
            predictions.append(LengthPrediction(masses, self.edges, float(rank)))
        return predictions

    def to_dict(self) -> dict:
        return {
            "head": {"name": name_of_head(self.head), **asdict(self.head)},
            "settings": self.settings,
            "conformal": asdict(self.conformal),
            "edges": self.edges.tolist(),
            "residuals": self.residuals,
            "tail": self.tail and asdict(self.tail),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Decoder":
        """Raises KeyError, TypeError or ValueError for a dict that `to_dict` did not write."""
        knobs = dict(values["head"])
        head = HEADS[knobs.pop("name")](**knobs)
        conformal = Conformal(
            tuple(values["conformal"]["raw"]), tuple(values["conformal"]["calibrated"])
        )
        tail = Tail(**values["tail"]) if values.get("tail") else None
        return cls(
            head,
            values["settings"],
            conformal,
            np.asarray(values["edges"], np.float64),
            tuple(values.get("residuals", ())),
            tail,
        )


def cross_fit_masses(
    head: Head,
    edges: np.ndarray,
    outputs: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    weights: np.ndarray,
    fold: np.ndarray,
) -> np.ndarray:
    """(n, K) masses over `edges` of n labels, read with settings fitted to all other folds.

    Args:
        outputs, tokens, finished, weights: as `Decoder.fit` takes them; fold: (n,) of each label.
    """
    masses = np.empty((len(tokens), len(edges) - 1))
    for k in range(FOLDS):
        held = fold == k
        if not held.any():
            continue
        rest = np.ones(len(held), bool) if held.all() else ~held
        settings = head.fit(outputs[rest], tokens[rest], finished[rest], weights[rest])
        masses[held] = head.reader(settings, edges)(outputs[held])[0]
    return masses


def decode_cross_fitted(
    head: Head,
    outputs: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    weights: np.ndarray,
    prompts: np.ndarray,
    fold: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Decoder.decode_with_levels` gives of n labels, by decoders fitted to all other folds.

    Where no answer of the other folds has finished, lengths cannot be fitted to them: then by one
    that is fitted to all.

    Args: as `Decoder.fit` takes them; fold: (n,) of each label.
    """
    probabilities = np.zeros((len(tokens), len(head_edges(head)) - 1))
    ranks, levels = np.zeros((2, len(tokens)))
    for k in np.unique(fold):
        held = fold == k
        rest = ~held if finished[~held].any() else np.ones(len(held), bool)
        decoder = Decoder.fit(
            head, outputs[rest], tokens[rest], finished[rest], weights[rest], prompts[rest]
        )
        probabilities[held], ranks[held], levels[held] = decoder.decode_with_levels(
            outputs[held], tokens[held]
        )
    return probabilities, ranks, levels


def name_of_head(head: Head) -> str:
    """The key of HEADS of a head's class. Raises ValueError where there is none."""
    for name, kind in HEADS.items():
        if isinstance(head, kind):
            return name
    raise ValueError(f"{type(head).__name__} is none of HEADS")


def residuals_of(
    probabilities: np.ndarray,
    edges: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    weights: np.ndarray,
) -> tuple[float, ...]:
    """RESIDUALS quantiles of log(length / median of its prediction), ascending.

    Cut answers are censored; () where all were cut.
    """
    if not finished.any():
        return ()
    medians = np.empty(len(probabilities))
    for i, masses in enumerate(probabilities):
        medians[i] = LengthPrediction(masses, edges, 0.0).median_tokens
    errors = np.log(np.maximum(tokens, 1) / np.maximum(medians, 1))
    values, share = kaplan_meier(errors, finished, weights)
    levels = (np.arange(RESIDUALS) + 0.5) / RESIDUALS
    return tuple(np.round(np.interp(levels, share, values), 4).tolist())


def fold_of(groups: np.ndarray) -> np.ndarray:
    """(N,) fold of every prompt, 0 to FOLDS - 1, the same for all of a group; drawn with seed 0."""
    _, number = np.unique(groups, return_inverse=True)
    return (np.random.default_rng(0).permutation(number.max() + 1) % FOLDS)[number]


def check_folds(fold: np.ndarray, prompts: str) -> None:
    """Raises ValueError where all prompts are in one fold (N,), so that none has other folds."""
    if len(np.unique(fold)) < 2:
        raise ValueError(
            f"{prompts} are near-duplicates of one another: all are in one fold, and nothing is "
            "left to learn from that has not seen them"
        )


def head_edges(head: Head) -> np.ndarray:
    """(K + 1,): the bins of a head's predictions: its classes, halved until they are 20 or more."""
    edges = head.edges
    while len(edges) < 21:
        edges = np.sort(np.concatenate([edges, (edges[:-1] + edges[1:]) / 2]))
    return edges


def write_card(folder: Path, card: dict) -> None:
    """Write predictor.json, whole or not at all."""
    card = {"format": FORMAT, "format_version": FORMAT_VERSION} | card
    write_json(Path(folder) / CARD, card)


def read_card(folder: str | Path) -> dict:
    """What `write_card` wrote.

    Raises:
        FileNotFoundError: no card there.
        ValueError: it is unreadable, or of a newer format.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no length predictor: there is no {CARD}")
    card = read_json(path)
    try:
        if card["format"] != FORMAT:
            raise KeyError
        version = int(card["format_version"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(f"{path}: not the card of a length predictor") from None
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}"
        )
    return card


def check_holds_predictor(output: Path, flag: str) -> None:
    """Raises ValueError where a folder or file is there that is no predictor's."""
    if not is_free(output) and not (output / CARD).is_file():
        raise ValueError(
            f"{flag} {output} holds other things than a predictor; name another folder"
        )


def backbone_name(card: dict, folder: str | Path) -> str:
    """The name of a card's backbone. Raises ValueError, which names `folder`, without one."""
    try:
        name = card["backbone"]["name"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str):
        raise ValueError(f"{Path(folder) / CARD}: damaged (it names no backbone)")
    return name


def tokenizer_hash(folder: str | Path) -> str:
    """sha256 of the tokenizer's model file of a served model's folder.

    The file is the first of TOKENIZER_FILES that is there.

    Raises:
        FileNotFoundError: the folder has none of them.
    """
    for name in TOKENIZER_FILES:
        file = Path(folder) / name
        if file.is_file():
            return sha256(file)
    raise FileNotFoundError(f"{folder}: no tokenizer, none of {', '.join(TOKENIZER_FILES)}")
