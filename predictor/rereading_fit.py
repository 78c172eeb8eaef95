"""Fits a Rereader to readings: networks in torch, weights of the pool and conformal maps in numpy.

Weights and maps are fitted to readings of prompts that the networks have not seen: FOLDS networks,
each fitted to all folds of prompts but one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from predictor.calibration import Conformal
from predictor.heads import Distribution
from predictor.prediction import make_edges
from predictor.readings import Readings
from predictor.reread_scores import capped_crps, levels_at
from predictor.rereading import (
    CLIP,
    NETWORKS,
    ElapsedBucket,
    LeftGrid,
    Posteriors,
    Priors,
    RereadDecoder,
    StateNetwork,
    joined_posteriors,
    pool_logarithms,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from predictor.state_network import ReadingTensors, TorchNetwork

POOL_WEIGHTS = tuple(np.round(np.arange(0, 1.01, 0.1), 1).tolist())  # of the states
MIN_BUCKET = 100  # readings; places with fewer are in one bucket with their neighbours
BATCH = 256  # readings a step
EPOCHS = 60  # at most
LEARNING_RATE = 1e-3
PATIENCE = 6  # epochs without a lower loss on the readings held out
LEAST_SPREAD = 1e-4


@dataclass(frozen=True)
class TokensLeft(Distribution):
    """Classes of what is left: log-spaced up to `length_limit`, the cap, and one for more.

    Loss and soft labels are Distribution's.
    """

    @property
    def left_edges(self) -> np.ndarray:
        """(K,) from 0 to the cap."""
        return make_edges(self.num_bins, self.length_limit)

    @property
    def edges(self) -> np.ndarray:
        """(K + 1,): also where the last class ends, which no loss reads."""
        return np.append(self.left_edges, 2.0 * self.length_limit)


@dataclass(frozen=True)
class FitSettings:
    """How networks are trained. The flags of these names say what each is.

    Attributes:
        cap, limit: tokens; see LeftGrid.
        held_share: share of the prompts that decide when training stops.
    """

    cap: int
    limit: int
    num_bins: int = 32
    label_width: float = 1.0
    crps_weight: float = 1.0
    state_units: int = 64
    state_seeds: int = 2
    state_decay: float = 3.0
    state_dropout: float = 0.5
    held_share: float = 0.15
    seed: int = 0

    @property
    def head(self) -> TokensLeft:
        return TokensLeft(self.cap, self.num_bins, self.label_width, self.crps_weight)

    @property
    def grid(self) -> LeftGrid:
        return LeftGrid(self.head.left_edges, self.cap, self.limit)


@dataclass(frozen=True)
class FittedRereader:
    """What a Rereader is made of.

    Attributes:
        unseen: of the readings that it was fitted to.
    """

    networks: dict[str, StateNetwork]
    decoder: RereadDecoder
    unseen: "UnseenClasses"


@dataclass(frozen=True)
class UnseenClasses:
    """Classes of R readings, each by networks that had not seen its prompt.

    Attributes:
        classes: (R, K) over `grid`; fold: (R,) of each reading's prompt; starts: (B,) of the
            buckets.
        epochs: {kind: those that the networks of the folds trained}.
    """

    classes: np.ndarray
    fold: np.ndarray
    starts: np.ndarray
    epochs: dict[str, list[int]]
    grid: LeftGrid

    @classmethod
    def fit(cls, readings: Readings, fold: np.ndarray, settings: FitSettings) -> "UnseenClasses":
        """Fit FOLDS networks, each to all folds (R,) but one."""
        starts = bucket_starts(readings.at)
        classes = np.zeros((len(readings), len(settings.grid.edges)))
        epochs: dict[str, list[int]] = {kind: [] for kind in NETWORKS}
        for k in np.unique(fold):
            held = fold == k
            networks, lasted = fit_networks(readings.take_rows(~held), starts, settings)
            classes[held] = classes_of(networks, readings.take_rows(held), starts)
            for kind in NETWORKS:
                epochs[kind].append(lasted[kind])
        return cls(classes, fold, starts, epochs, settings.grid)

    def posteriors(self, readings: Readings, priors: Priors, *, alone: bool = False) -> Posteriors:
        """(R,) posteriors with weights and maps fitted to the other folds' readings.

        Args:
            priors: of all readings, by predictors that had not seen their prompts.
            alone: each reading without any prior.
        """
        parts = []
        for k in np.unique(self.fold):
            rest, held = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)
            decoder = fit_decoder(
                readings.take_rows(rest),
                self.classes[rest],
                priors.take_rows(rest),
                self.starts,
                self.grid,
            )
            answer, at, classes = readings.answer[held], readings.at[held], self.classes[held]
            if alone:
                part = decoder.posteriors(at, classes, None)
            else:
                part = decoder.in_turn(answer, at, classes, priors.take_rows(held))
            parts.append((held, part))
        return joined_posteriors(parts)


def fit_rereader(
    readings: Readings, priors: Priors, fold: np.ndarray, settings: FitSettings
) -> FittedRereader:
    """Fit networks, pool and maps.

    Args:
        priors: of all readings (R,), by predictors that had not seen their prompts.
        fold: (R,) fold of each reading's prompt.
    """
    unseen = UnseenClasses.fit(readings, fold, settings)
    epochs = {}
    for kind, lasted in unseen.epochs.items():
        epochs[kind] = max(1, round(float(np.median(lasted))))
    networks, _ = fit_networks(readings, unseen.starts, settings, epochs)
    decoder = fit_decoder(readings, unseen.classes, priors, unseen.starts, settings.grid)
    return FittedRereader(networks, decoder, unseen)


def bucket_starts(at: np.ndarray) -> np.ndarray:
    """(B,): where buckets of at least MIN_BUCKET readings begin; the prompts' own is the first."""
    places, counts = np.unique(at, return_counts=True)
    starts, filled = [0], MIN_BUCKET
    for place, count in zip(places.tolist(), counts.tolist()):
        if place == 0:
            continue
        after = int(counts[places >= place].sum())
        if filled >= MIN_BUCKET and (after >= MIN_BUCKET or len(starts) == 1):
            starts.append(place)
            filled = 0
        filled += count
    return np.array(starts)


def bucket_numbers(at: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(R,) number of each reading's bucket."""
    return np.searchsorted(starts, at, side="right") - 1


def classes_of(
    networks: dict[str, StateNetwork], readings: Readings, starts: np.ndarray
) -> np.ndarray:
    """(R, K) probabilities of what is left."""
    bucket, is_prompt = bucket_numbers(readings.at, starts), readings.at == 0
    classes = np.zeros((len(readings), len(networks["prompt"].skip)))
    for kind, rows in (("prompt", is_prompt), ("answer", ~is_prompt)):
        if rows.any():
            classes[rows] = networks[kind](readings.vectors[rows], bucket[rows])
    return classes


def fit_networks(
    readings: Readings,
    starts: np.ndarray,
    settings: FitSettings,
    epochs: dict[str, int] | None = None,
) -> tuple[dict[str, StateNetwork], dict[str, int]]:
    """({kind: network}, {kind: epochs it trained}).

    Args:
        epochs: how long to train; None to stop where the loss on prompts held out is lowest.
    """
    networks, lasted = {}, {}
    for kind in NETWORKS:
        rows = np.flatnonzero((readings.at == 0) == (kind == "prompt"))
        part = readings.take_rows(rows)
        long = epochs[kind] if epochs else None
        networks[kind], lasted[kind] = fit_network(
            part, bucket_numbers(part.at, starts), len(starts), settings, long
        )
    return networks, lasted


def fit_network(
    readings: Readings,
    bucket: np.ndarray,
    buckets: int,
    settings: FitSettings,
    epochs: int | None,
) -> tuple[StateNetwork, int]:
    """(the mean of `state_seeds` networks' logits as one network, epochs of each)."""
    center = readings.vectors.mean(axis=0)
    spread = np.maximum(readings.vectors.std(axis=0), LEAST_SPREAD)
    z = np.clip((readings.vectors - center) / spread, -CLIP, CLIP)
    parts, lasted = [], []
    for seed in range(settings.state_seeds):
        one, count = fit_seed(z, readings, bucket, buckets, settings, settings.seed + seed, epochs)
        parts.append(one)
        lasted.append(count)
    merged = {"center": center, "spread": spread}
    for name in ("weight", "bias"):
        merged[name] = np.concatenate([part[name] for part in parts])
    merged["out"] = np.concatenate([part["out"] for part in parts], axis=1) / len(parts)
    for name in ("skip", "elapsed"):
        merged[name] = np.mean([part[name] for part in parts], axis=0)
    for name, values in merged.items():
        merged[name] = values.astype(np.float32)
    return StateNetwork(**merged), max(1, round(float(np.mean(lasted))))


def fit_seed(
    z: np.ndarray,
    readings: Readings,
    bucket: np.ndarray,
    buckets: int,
    settings: FitSettings,
    seed: int,
    epochs: int | None,
) -> tuple[dict[str, np.ndarray], int]:
    """(a network's matrices, epochs it trained), by AdamW on standardised states z (R, D)."""
    import torch

    from predictor.state_network import ReadingTensors, TorchNetwork

    draw = np.random.default_rng(seed)
    held = held_prompts(readings.prompt, 0.0 if epochs else settings.held_share, draw)
    inside, outside = np.flatnonzero(~held), torch.from_numpy(np.flatnonzero(held))
    data = ReadingTensors.of(z, readings, bucket)
    torch.manual_seed(seed)
    model = TorchNetwork(z.shape[1], buckets, settings, readings.tokens - readings.at)
    optimizer = torch.optim.AdamW(model.groups(settings.state_decay), lr=LEARNING_RATE)
    best, best_epoch, kept = np.inf, 0, model.state_dict()
    for epoch in range(1, (epochs or EPOCHS) + 1):
        train_epoch(model, optimizer, data, torch.from_numpy(draw.permutation(inside)))
        if not len(outside):
            best_epoch, kept = epoch, model.state_dict()
            continue
        model.eval()
        with torch.no_grad():
            total = float(model.loss(data, outside))
        if total < best:
            best, best_epoch = total, epoch
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= PATIENCE:
            break
    return {name: value.numpy().copy() for name, value in kept.items()}, best_epoch


def train_epoch(
    model: "TorchNetwork", optimizer: "Optimizer", data: "ReadingTensors", order: "Tensor"
) -> None:
    """A step for every BATCH readings, in an order."""
    model.train()
    for rows in order.split(BATCH):
        loss = model.loss(data, rows) / data.weights[rows].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def held_prompts(prompt: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """(R,) bool: the readings of a share of the prompts, at least one where share is above 0."""
    if not share:
        return np.zeros(len(prompt), bool)
    prompts = draw.permutation(np.unique(prompt))
    return np.isin(prompt, prompts[: max(1, round(len(prompts) * share))])


def fit_decoder(
    readings: Readings,
    classes: np.ndarray,
    priors: Priors,
    starts: np.ndarray,
    grid: LeftGrid,
) -> RereadDecoder:
    """The buckets' weights and maps, from classes (R, K) and priors of prompts not seen.

    Readings are as `RereadDecoder.later_priors` takes them.
    """
    bucket = bucket_numbers(readings.at, starts)
    found: list[ElapsedBucket] = []
    for number, start in enumerate(starts.tolist()):
        if number == 1:  # the first bucket is the prompts' own
            decoder = RereadDecoder(grid, (found[0],))
            priors = decoder.later_priors(readings.answer, readings.at, classes, priors)
        rows = np.flatnonzero(bucket == number)
        part = readings.take_rows(rows)
        found.append(fit_bucket(part, classes[rows], priors.take_rows(rows), start, grid))
    return RereadDecoder(grid, tuple(found))


def fit_bucket(
    readings: Readings, classes: np.ndarray, priors: Priors, start: int, grid: LeftGrid
) -> ElapsedBucket:
    """The weight of the lowest CRPS, and the maps, of one bucket's readings (R,)."""
    at = readings.at.astype(float)
    edges, masses = grid.whole(classes, at)
    alone, _ = fit_map(Posteriors(edges, masses), readings, grid.cap)
    best: tuple[float, float, Conformal] = (np.inf, 1.0, alone)
    for weight in POOL_WEIGHTS:
        pooled = pool_logarithms(edges, masses, priors, np.full(len(at), weight), at)
        conformal, score = fit_map(Posteriors(*pooled), readings, grid.cap)
        best = min(best, (score, weight, conformal), key=lambda each: each[0])
    return ElapsedBucket(start, best[1], best[2], alone)


def fit_map(posteriors: Posteriors, readings: Readings, cap: int) -> tuple[Conformal, float]:
    """(the conformal map of posteriors, their mean CRPS in tokens after it)."""
    levels = levels_at(posteriors, readings.tokens)
    conformal = Conformal.fit(levels, readings.finished, readings.weights)
    calibrated = posteriors.calibrated(np.zeros(len(readings), int), [conformal])
    scores = capped_crps(calibrated, readings.tokens, cap)
    return conformal, float(np.average(scores, weights=readings.weights))
