"""Fits a Rereader to readings: networks in torch, weights of the pool and conformal maps in numpy.

The main function is `fit_rereader`. Weights and maps are fitted to readings of prompts that the
networks have not seen: FOLDS networks, each fitted to all folds of prompts but one. `kind` is one
of rereading.NETWORKS, "prompt" or "answer".
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
            is_held_out = fold == k
            networks, trained_epochs = fit_networks(
                readings.take_rows(~is_held_out), starts, settings
            )
            held_out = readings.take_rows(is_held_out)
            classes[is_held_out] = classes_of(networks, held_out, starts)
            for kind in NETWORKS:
                epochs[kind].append(trained_epochs[kind])
        return cls(classes, fold, starts, epochs, settings.grid)

    def posteriors(self, readings: Readings, priors: Priors, *, alone: bool = False) -> Posteriors:
        """(R,) posteriors with weights and maps fitted to the other folds' readings.

        Args:
            priors: of all readings, by predictors that had not seen their prompts.
            alone: each reading without any prior.
        """
        parts = []
        for k in np.unique(self.fold):
            others = np.flatnonzero(self.fold != k)
            decoder = fit_decoder(
                readings.take_rows(others),
                self.classes[others],
                priors.take_rows(others),
                self.starts,
                self.grid,
            )
            held_out = np.flatnonzero(self.fold == k)
            at, classes = readings.at[held_out], self.classes[held_out]
            if alone:
                part = decoder.posteriors(at, classes, None)
            else:
                answer = readings.answer[held_out]
                part = decoder.in_turn(answer, at, classes, priors.take_rows(held_out))
            parts.append((held_out, part))
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
    for kind, epochs_of_folds in unseen.epochs.items():
        epochs[kind] = max(1, round(float(np.median(epochs_of_folds))))
    networks, _ = fit_networks(readings, unseen.starts, settings, epochs)
    decoder = fit_decoder(readings, unseen.classes, priors, unseen.starts, settings.grid)
    return FittedRereader(networks, decoder, unseen)


def bucket_starts(at: np.ndarray) -> np.ndarray:
    """(B,): where buckets of at least MIN_BUCKET readings begin; the prompts' own is the first."""
    places, counts = np.unique(at, return_counts=True)
    starts = [0]
    in_bucket = MIN_BUCKET  # readings of the last bucket; the prompts' takes no others
    for place, count in zip(places.tolist(), counts.tolist()):
        if place == 0:
            continue
        from_here = int(counts[places >= place].sum())
        is_first_of_answers = len(starts) == 1
        enough_left = from_here >= MIN_BUCKET or is_first_of_answers
        if in_bucket >= MIN_BUCKET and enough_left:
            starts.append(place)
            in_bucket = 0
        in_bucket += count
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
    networks, trained_epochs = {}, {}
    for kind in NETWORKS:
        is_of_kind = readings.at == 0 if kind == "prompt" else readings.at > 0
        part = readings.take_rows(np.flatnonzero(is_of_kind))
        bucket = bucket_numbers(part.at, starts)
        wanted_epochs = epochs[kind] if epochs else None
        networks[kind], trained_epochs[kind] = fit_network(
            part, bucket, len(starts), settings, wanted_epochs
        )
    return networks, trained_epochs


def fit_network(
    readings: Readings,
    bucket: np.ndarray,
    buckets: int,
    settings: FitSettings,
    epochs: int | None,
) -> tuple[StateNetwork, int]:
    """(the mean of `state_seeds` networks' logits as one network, the mean of their epochs).

    The hidden units of all networks lie side by side in one; what is linear is averaged.
    """
    center = readings.vectors.mean(axis=0)
    spread = np.maximum(readings.vectors.std(axis=0), LEAST_SPREAD)
    z = np.clip((readings.vectors - center) / spread, -CLIP, CLIP)
    networks, trained_epochs = [], []
    for number in range(settings.state_seeds):
        seed = settings.seed + number
        matrices, count = fit_seed(z, readings, bucket, buckets, settings, seed, epochs)
        networks.append(matrices)
        trained_epochs.append(count)
    merged = {"center": center, "spread": spread}
    for name in ("weight", "bias"):
        merged[name] = np.concatenate([network[name] for network in networks])
    out = np.concatenate([network["out"] for network in networks], axis=1)
    merged["out"] = out / len(networks)
    for name in ("skip", "elapsed"):
        merged[name] = np.mean([network[name] for network in networks], axis=0)
    for name, values in merged.items():
        merged[name] = values.astype(np.float32)
    return StateNetwork(**merged), max(1, round(float(np.mean(trained_epochs))))


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

    rng = np.random.default_rng(seed)
    is_held_out = held_prompts(readings.prompt, 0.0 if epochs else settings.held_share, rng)
    training_rows = np.flatnonzero(~is_held_out)
    validation_rows = torch.from_numpy(np.flatnonzero(is_held_out))
    data = ReadingTensors.of(z, readings, bucket)
    torch.manual_seed(seed)
    model = TorchNetwork(z.shape[1], buckets, settings, readings.tokens - readings.at)
    optimizer = torch.optim.AdamW(model.groups(settings.state_decay), lr=LEARNING_RATE)
    best_loss, best_epoch, best_state = np.inf, 0, model.state_dict()
    for epoch in range(1, (epochs or EPOCHS) + 1):
        train_epoch(model, optimizer, data, torch.from_numpy(rng.permutation(training_rows)))
        if not len(validation_rows):
            best_epoch, best_state = epoch, model.state_dict()
            continue
        loss = validation_loss(model, data, validation_rows)
        if loss < best_loss:
            best_loss, best_epoch = loss, epoch
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= PATIENCE:
            break
    return {name: value.numpy().copy() for name, value in best_state.items()}, best_epoch


def validation_loss(model: "TorchNetwork", data: "ReadingTensors", rows: "Tensor") -> float:
    """The loss summed over the readings `rows`, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        return float(model.loss(data, rows))


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


def held_prompts(prompt: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """(R,) bool: the readings of a share of the prompts, at least one where share is above 0."""
    if not share:
        return np.zeros(len(prompt), bool)
    prompts = rng.permutation(np.unique(prompt))
    count = max(1, round(len(prompts) * share))
    return np.isin(prompt, prompts[:count])


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
    buckets: list[ElapsedBucket] = []
    for number, start in enumerate(starts.tolist()):
        if number == 1:  # the first bucket is the prompts' own; later ones go on from it
            prompt_decoder = RereadDecoder(grid, (buckets[0],))
            priors = prompt_decoder.later_priors(readings.answer, readings.at, classes, priors)
        rows = np.flatnonzero(bucket == number)
        part = readings.take_rows(rows)
        buckets.append(fit_bucket(part, classes[rows], priors.take_rows(rows), start, grid))
    return RereadDecoder(grid, tuple(buckets))


def fit_bucket(
    readings: Readings, classes: np.ndarray, priors: Priors, start: int, grid: LeftGrid
) -> ElapsedBucket:
    """The weight of the lowest CRPS, and the maps, of one bucket's readings (R,)."""
    at = readings.at.astype(float)
    edges, masses = grid.whole(classes, at)
    alone, _ = fit_map(Posteriors(edges, masses), readings, grid.cap)
    best_crps, best_weight, best_map = np.inf, 1.0, alone
    for weight in POOL_WEIGHTS:
        pooled = pool_logarithms(edges, masses, priors, np.full(len(at), weight), at)
        conformal, crps = fit_map(Posteriors(*pooled), readings, grid.cap)
        if crps < best_crps:
            best_crps, best_weight, best_map = crps, weight, conformal
    return ElapsedBucket(start, best_weight, best_map, alone)


def fit_map(posteriors: Posteriors, readings: Readings, cap: int) -> tuple[Conformal, float]:
    """(the conformal map of posteriors, their mean CRPS in tokens after it).

    Of no readings the map is the identity, and the CRPS infinite: a bucket may lie in one fold.
    """
    if not len(readings):
        return Conformal(), np.inf
    levels = levels_at(posteriors, readings.tokens)
    conformal = Conformal.fit(levels, readings.finished, readings.weights)
    calibrated = posteriors.calibrated(np.zeros(len(readings), int), [conformal])
    scores = capped_crps(calibrated, readings.tokens, cap)
    return conformal, float(np.average(scores, weights=readings.weights))
