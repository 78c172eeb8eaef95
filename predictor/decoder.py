"""From a head's outputs to calibrated predictions, and the card that keeps them with a model. numpy only."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from chatglm.files import read_json
from finetune.files import sha256, write_json
from predictor.calibration import Conformal, Tail, kaplan_meier, levels_of
from predictor.heads import HEADS
from predictor.prediction import LengthPrediction

CARD = "predictor.json"
FORMAT = "glm-foundry length predictor"
FORMAT_VERSION = 1
FOLDS = 5
RESIDUALS = 199


@dataclass(frozen=True)
class Decoder:
    """A head, its settings fitted to prompts that the model has not seen, and the conformal map after it.

    Attributes:
        residuals: RESIDUALS equally likely values of log(length / predicted median), of labels that settings were not fitted to; what a
            simulator makes a predictor's errors of.
        tail: how far mass beyond the longest answer seen may lie; None for as the head has it.
    """

    head: object
    settings: dict
    conformal: Conformal
    edges: np.ndarray
    residuals: tuple[float, ...] = ()
    tail: Tail | None = None

    @classmethod
    def fit(
        cls,
        head,
        outputs: np.ndarray,
        tokens: np.ndarray,
        finished: np.ndarray,
        weights: np.ndarray,
        prompts: np.ndarray,
    ) -> "Decoder":
        """From n labels of unseen prompts.

        Args:
            outputs: (n, width) of the head; tokens, finished, weights (1 in all for each prompt): (n,).
            prompts: (n,) the prompt's number: labels of a prompt stay in one of the folds in which settings are fitted to
                the rest, so that the levels the conformal map learns from are of unseen prompts too.
        """
        edges = head_edges(head)
        raw = np.empty((len(tokens), len(edges) - 1))
        fold = np.unique(prompts, return_inverse=True)[1] % FOLDS
        for k in range(FOLDS):
            held = fold == k
            rest = ~held if held.any() and not held.all() else np.ones(len(held), bool)
            if held.any():
                settings = head.fit(outputs[rest], tokens[rest], finished[rest], weights[rest])
                raw[held] = head.reader(settings, edges)(outputs[held])[0]
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
    def read(self):
        return self.head.reader(self.settings, self.edges)

    def decode(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, width) -> calibrated probabilities (N, K) over `edges`, rank scores (N,)."""
        probabilities, ranks = self.read(np.asarray(outputs, np.float64))
        return self.calibrated(probabilities), ranks

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """(N, K) masses as the head reads them -> those of predictions."""
        found = self.conformal.apply(raw)
        return self.tail.apply(found, self.edges) if self.tail else found

    def judge(
        self, outputs: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(probabilities (N, K), rank scores (N,), levels (N,) of the lengths `tokens` in them, exact at the conformal map's knots)."""
        raw, ranks = self.read(np.asarray(outputs, np.float64))
        return (
            self.calibrated(raw),
            ranks,
            np.interp(levels_of(raw, self.edges, tokens), *self.conformal.knots),
        )

    def predictions(self, outputs: np.ndarray) -> list[LengthPrediction]:
        probabilities, ranks = self.decode(outputs)
        return [LengthPrediction(p, self.edges, float(r)) for p, r in zip(probabilities, ranks)]

    def to_dict(self) -> dict:
        name = next(name for name, kind in HEADS.items() if isinstance(self.head, kind))
        return {
            "head": {"name": name, **asdict(self.head)},
            "settings": self.settings,
            "conformal": asdict(self.conformal),
            "edges": self.edges.tolist(),
            "residuals": self.residuals,
            "tail": self.tail and asdict(self.tail),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Decoder":
        """Raises KeyError, TypeError, ValueError for what `to_dict` did not write."""
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


def residuals_of(
    probabilities: np.ndarray,
    edges: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    weights: np.ndarray,
) -> tuple[float, ...]:
    """RESIDUALS quantiles of log(length / median of its prediction), ascending; cut answers count as longer than that. () if all were cut."""
    if not finished.any():
        return ()
    medians = np.array([LengthPrediction(p, edges, 0.0).median_tokens for p in probabilities])
    values, share = kaplan_meier(
        np.log(np.maximum(tokens, 1) / np.maximum(medians, 1)), finished, weights
    )
    return tuple(
        np.round(np.interp((np.arange(RESIDUALS) + 0.5) / RESIDUALS, share, values), 4).tolist()
    )


def fold_of(groups: np.ndarray) -> np.ndarray:
    """(N,) fold of every prompt, 0 to FOLDS - 1: groups whole, shuffled by a fixed draw."""
    _, number = np.unique(groups, return_inverse=True)
    return (np.random.default_rng(0).permutation(number.max() + 1) % FOLDS)[number]


def head_edges(head) -> np.ndarray:
    """The bins that predictions of a head come in: its own, cut finer where they are few and wide."""
    edges = head.edges
    while len(edges) < 21:
        edges = np.sort(np.concatenate([edges, (edges[:-1] + edges[1:]) / 2]))
    return edges


def write_card(folder: Path, card: dict):
    """predictor.json, whole or not at all."""
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


def tokenizer_hash(folder: str | Path) -> str:
    """sha256 over the tokenizer's model file (tokenizer.model, ice_text.model or tokenizer.json) of a served model's folder.

    Raises:
        FileNotFoundError: it has none.
    """
    for name in ("tokenizer.model", "ice_text.model", "tokenizer.json"):
        file = Path(folder) / name
        if file.is_file():
            return sha256(file)
    raise FileNotFoundError(f"{folder}: no tokenizer.model, ice_text.model or tokenizer.json")
