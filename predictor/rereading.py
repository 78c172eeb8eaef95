"""Predicts an answer's length again while it is generated, from the served model's hidden states.

The main class is `Rereader`, at the end: an engine calls `Rereader.read` once for the prompts and
answers of a pass. It has two steps: a network turns hidden states into a distribution of the tokens
that are left (StateNetwork), and a RereadDecoder turns that into a calibrated distribution of the
whole length, pooled with the prompt's prediction, the prior.

numpy only. `train.py --task predictor --backbone states` writes the folder.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from chatglm.checksums import check_folder_files, is_top
from chatglm.files import read_json
from predictor.calibration import Conformal
from predictor.decoder import read_card
from predictor.heads import softmax
from predictor.hidden_states import POOLINGS, pool_states
from predictor.prediction import LengthPrediction, bins_of_lengths, log_middles
from predictor.runtime import DamagedFile, check_files, check_tokenizer

WEIGHTS_FILE = "rereader.safetensors"
NETWORKS = ("prompt", "answer")  # of readings at 0, and later
CLIP = 6.0  # standard deviations; some features have rare values that are far larger
TAIL_BINS = 4  # beyond the cap
# Nothing was seen beyond the cap: P(L > x | L > cap) = (x / cap)^-2, as the heaviest tail that
# calibration.Tail allows, up to the limit.
TAIL_INDEX = 2.0
TINY = 1e-30  # a density that counts as none


@dataclass(frozen=True)
class StateNetwork:
    """States (N, D) -> classes of what is left (N, K); z are the standardised, clipped states.

    logits = out relu(weight z + bias) + skip z + elapsed[bucket]

    Attributes:
        center, spread: (D,) of the training rows.
        weight, bias: (U, D), (U,); out: (K, U); skip: (K, D).
        elapsed: (B, K): what the tokens written so far add, by bucket.
    """

    center: np.ndarray
    spread: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    out: np.ndarray
    skip: np.ndarray
    elapsed: np.ndarray

    def __call__(self, vectors: np.ndarray, bucket: np.ndarray) -> np.ndarray:
        """(N, K) probabilities of vectors (N, D) float32 in buckets (N,)."""
        z = vectors - self.center
        z *= self.scale
        np.fmin(z, CLIP, out=z)  # a value that is no number becomes the bound
        np.fmax(z, -CLIP, out=z)
        product = z @ self.first
        classes = len(self.skip)
        logits = product[:, :classes] + self.elapsed[bucket]
        if len(self.bias):
            logits += np.maximum(product[:, classes:] + self.bias, 0) @ self.out.T
        return softmax(logits.astype(np.float64))

    @cached_property
    def scale(self) -> np.ndarray:
        """(D,): 1 / spread."""
        return 1 / self.spread

    @cached_property
    def first(self) -> np.ndarray:
        """(D, K + U): skip and weight as one matrix."""
        return np.ascontiguousarray(np.concatenate([self.skip, self.weight]).T)


@dataclass(frozen=True)
class ElapsedBucket:
    """Readings from `start` tokens to the next bucket's.

    Attributes:
        weight: of the states beside the prior, from 0 to 1; see `pool_logarithms`.
        pooled, alone: conformal maps of posteriors with a prior, and without.
    """

    start: int
    weight: float
    pooled: Conformal
    alone: Conformal


@dataclass(frozen=True)
class LeftGrid:
    """From classes of what is left to bins of the whole length.

    Attributes:
        edges: (K,) tokens left, ascending from 0 to `cap`: K - 1 classes; one more is beyond.
        cap: most tokens of the answers that were seen.
        limit: longest possible answer in tokens, `cap` or more.
    """

    edges: np.ndarray
    cap: int
    limit: int

    def whole(self, classes: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(edges (N, A + 1), masses (N, A)) over whole lengths from `at` on.

        Classes count what is left up to the cap; what lies beyond it follows the tail. An answer
        that is beyond the cap has all its mass there.

        Args:
            classes: (N, K); at: (N,) tokens written.
        """
        left_below_cap = np.maximum(self.cap - at, 0.0)[:, None]
        cdf = cumulative_masses(classes[:, :-1])  # of the tokens left, at `self.edges`
        # The probability of an end within the cap, interpolated between two edges.
        k = bins_of_lengths(self.edges, left_below_cap)
        low, high = self.edges[k], self.edges[k + 1]
        share = np.clip((left_below_cap - low) / (high - low), 0, 1)
        cdf_at_cap = (1 - share) * take(cdf, k) + share * take(cdf, k + 1)
        cdf = np.minimum(cdf, cdf_at_cap)
        masses = cdf[:, 1:] - cdf[:, :-1]
        edges = at[:, None] + np.minimum(self.edges, left_below_cap)
        tail_edges, tail_masses = self.tail(at)
        beyond_cap = (1 - cdf_at_cap) * tail_masses
        edges = np.concatenate([edges, tail_edges[:, 1:]], axis=1)
        return edges, np.concatenate([masses, beyond_cap], axis=1)

    def tail(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(edges (N, TAIL_BINS + 1), masses (N, TAIL_BINS)) of lengths beyond cap and `at` (N,).

        The edges are spaced evenly in the logarithm, the masses sum to 1; see TAIL_INDEX.
        """
        start = np.maximum(self.cap, at)[:, None].astype(float)
        end = np.maximum(self.limit, start + 1)
        steps = np.arange(TAIL_BINS + 1) / TAIL_BINS
        edges = start * (end / start) ** steps
        survival = (edges / start) ** -TAIL_INDEX
        survival[:, -1] = 0
        return edges, survival[:, :-1] - survival[:, 1:]


@dataclass(frozen=True)
class Priors:
    """Predictions of N prompts over the same edges.

    Attributes:
        edges: (M + 1,); masses: (N, M).
    """

    edges: np.ndarray
    masses: np.ndarray

    @classmethod
    def of(cls, predictions: Sequence[LengthPrediction]) -> "Priors":
        """Predictions that share their edges."""
        masses = [prediction.probabilities for prediction in predictions]
        return cls(predictions[0].edges, np.array(masses))

    def take_rows(self, chosen: np.ndarray) -> "Priors":
        """Those of some prompts: numbers, or (N,) bool."""
        return Priors(self.edges, self.masses[chosen])


def rows_by_edges(
    priors: Sequence[LengthPrediction | None],
) -> list[tuple[list[int], Priors | None]]:
    """(rows, their priors) for each array of edges that priors have; None where there is none."""
    without_prior: list[int] = []
    rows_of: dict[bytes, list[int]] = defaultdict(list)
    priors_of: dict[bytes, list[LengthPrediction]] = defaultdict(list)
    for row, prior in enumerate(priors):
        if prior is None:
            without_prior.append(row)
            continue
        key = prior.edges.tobytes()
        rows_of[key].append(row)
        priors_of[key].append(prior)
    groups: list[tuple[list[int], Priors | None]] = []
    if without_prior:
        groups.append((without_prior, None))
    for key, rows in rows_of.items():
        groups.append((rows, Priors.of(priors_of[key])))
    return groups


def pool_logarithms(
    edges: np.ndarray,
    masses: np.ndarray,
    priors: "Priors",
    weight: np.ndarray,
    at: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(edges (N, C + 1), masses (N, C)) of the logarithmic pool of two distributions, from `at` on.

    density(x) ~ states(x)^weight prior(x | x > at)^(1 - weight), over the cells between the edges
    of both (Genest and Zidek 1986, "Combining probability distributions"). With weight 0 it is the
    prior conditioned on survival, with weight 1 the states alone. Cells may have no width.

    Args:
        edges, masses: (N, A + 1), (N, A), what `LeftGrid.whole` returns.
        priors: of N prompts; weight, at: (N,).
    """
    prior_edges = np.broadcast_to(priors.edges, (len(at), len(priors.edges)))
    prior_density = density_of(prior_edges, priors.masses)
    state_density = density_of(edges, masses)
    # The edges of both, ascending; the prior's edges before `at` become `at`.
    unsorted = np.concatenate([edges, np.maximum(prior_edges, at[:, None])], axis=1)
    order = unsorted.argsort(axis=1, kind="stable")
    merged = take(unsorted, order)
    # In which cell of the states, and of the prior, each cell between two merged edges lies.
    is_prior = order >= edges.shape[1]
    prior_edges_passed = np.cumsum(is_prior, axis=1)[:, :-1]
    state_cell = np.arange(prior_edges_passed.shape[1]) - prior_edges_passed
    prior_cell = np.maximum(prior_edges_passed - 1, 0)
    log_density = weight[:, None] * np.log(take(state_density, state_cell))
    log_density += (1 - weight[:, None]) * np.log(take(prior_density, prior_cell))
    log_density -= log_density.max(axis=1, keepdims=True)
    pooled = np.exp(log_density) * (merged[:, 1:] - merged[:, :-1])
    return merged, pooled / pooled.sum(axis=1, keepdims=True)


def take(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(N, m): the values of rows (N, A) in columns (N, m)."""
    width = rows.shape[1]
    return rows.ravel().take(columns + width * np.arange(len(rows))[:, None])


def cumulative_masses(masses: np.ndarray) -> np.ndarray:
    """(N, C + 1): sums of the masses (N, C) before each edge, from 0."""
    rows, cells = masses.shape
    sums = np.zeros((rows, cells + 1))
    np.cumsum(masses, axis=1, out=sums[:, 1:])
    return sums


def density_of(edges: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """(N, A + 1): density after each edge, at least TINY; none after the last."""
    width = edges[:, 1:] - edges[:, :-1]
    density = np.full(edges.shape, TINY)
    np.divide(masses, width, out=density[:, :-1], where=width > 0)
    return np.maximum(density, TINY)


@dataclass(frozen=True)
class Posteriors:
    """N distributions of whole lengths, in arrays of which some cells have no width.

    Attributes:
        edges: (N, C + 1), the first is `at`; masses: (N, C), each row sums to 1.
    """

    edges: np.ndarray
    masses: np.ndarray

    def calibrated(self, bucket: np.ndarray, maps: Sequence[Conformal]) -> "Posteriors":
        """Each row through the map of its bucket (N,)."""
        cdf = cumulative_masses(self.masses)
        cdf[:, -1] = 1
        for number in np.unique(bucket).tolist():
            rows = bucket == number
            raw, calibrated = maps[number].knots
            cdf[rows] = np.interp(cdf[rows], raw, calibrated)
        return Posteriors(self.edges, cdf[:, 1:] - cdf[:, :-1])

    def predictions(self) -> list[LengthPrediction]:
        """One for each row, without the cells of no width."""
        ranks = (self.masses * log_middles(self.edges.T).T).sum(axis=1).tolist()
        # A first cell from 0 to `at`, and a mass for each edge; the last edge's is not read.
        zeros = np.zeros((len(self.edges), 1))
        edges = np.concatenate([zeros, self.edges], axis=1)
        masses = np.concatenate([zeros, self.masses, zeros], axis=1)
        keep = np.ones(edges.shape, bool)
        np.greater(edges[:, 1:], edges[:, :-1], out=keep[:, :-1])
        # All rows end to end: one selection for the whole array, then a slice for each row.
        kept_edges, kept_masses = edges[keep], masses[keep]
        ends = np.cumsum(keep.sum(axis=1)).tolist()
        predictions = []
        start = 0
        for end, rank in zip(ends, ranks):
            row_edges, row_masses = kept_edges[start:end], kept_masses[start : end - 1]
            predictions.append(LengthPrediction(row_masses, row_edges, rank))
            start = end
        return predictions


def joined_posteriors(parts: Sequence[tuple[np.ndarray, Posteriors]]) -> Posteriors:
    """(N,) posteriors of parts, each with the numbers of its rows (n,), which together are 0 to N.

    Narrower parts get cells of no width at their end.
    """
    count = sum(len(rows) for rows, _ in parts)
    width = max(part.edges.shape[1] for _, part in parts)
    edges = np.zeros((count, width))
    masses = np.zeros((count, width - 1))
    for rows, part in parts:
        part_width = part.edges.shape[1]
        edges[rows, :part_width] = part.edges
        edges[rows, part_width:] = part.edges[:, -1:]
        masses[rows, : part_width - 1] = part.masses
    return Posteriors(edges, masses)


@dataclass(frozen=True)
class RereadDecoder:
    """From classes of what is left to calibrated posteriors of whole lengths."""

    grid: LeftGrid
    buckets: tuple[ElapsedBucket, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """(B,) where the buckets begin."""
        return np.array([bucket.start for bucket in self.buckets])

    def bucket_of(self, at: np.ndarray) -> np.ndarray:
        """(N,) number of the bucket of each reading."""
        return np.searchsorted(self.starts, at, side="right") - 1

    def posteriors(self, at: np.ndarray, classes: np.ndarray, priors: Priors | None) -> Posteriors:
        """Of N readings: classes (N, K), pooled with the priors where there are any, calibrated."""
        bucket = self.bucket_of(at)
        edges, masses = self.grid.whole(classes, at)
        if priors is None:
            maps = [b.alone for b in self.buckets]
            return Posteriors(edges, masses).calibrated(bucket, maps)
        weights = np.array([b.weight for b in self.buckets])
        edges, masses = pool_logarithms(edges, masses, priors, weights[bucket], at)
        maps = [b.pooled for b in self.buckets]
        return Posteriors(edges, masses).calibrated(bucket, maps)

    def later_priors(
        self, answer: np.ndarray, at: np.ndarray, classes: np.ndarray, priors: Priors
    ) -> Priors:
        """(N,) what readings are pooled with after the prompt: their answer's posterior at 0.

        An answer that was not read at 0 keeps its prompt's prediction.

        Args:
            answer: (N,) ascending; at: (N,) ascending within an answer.
            priors: the prompts' predictions.
        """
        first_reading = np.searchsorted(answer, answer)  # of the same answer
        was_read_at_0 = at[first_reading] == 0
        prompt_bucket = self.buckets[0]
        zeros = np.zeros(len(at))
        edges, masses = self.grid.whole(classes[first_reading], zeros)
        weight = np.where(was_read_at_0, prompt_bucket.weight, 0.0)
        edges, masses = pool_logarithms(edges, masses, priors, weight, zeros)
        pooled = Posteriors(edges, masses).calibrated(zeros.astype(int), [prompt_bucket.pooled])
        return Priors(edges[0], np.where(was_read_at_0[:, None], pooled.masses, masses))

    def in_turn(
        self, answer: np.ndarray, at: np.ndarray, classes: np.ndarray, priors: Priors
    ) -> "Posteriors":
        """Of N readings, as an engine gets them: `posteriors` with the priors of each place.

        Args: as of `later_priors`.
        """
        prompts, later = np.flatnonzero(at == 0), np.flatnonzero(at > 0)
        later_priors = self.later_priors(answer, at, classes, priors)
        parts = []
        for rows, rows_priors in ((prompts, priors), (later, later_priors)):
            part = self.posteriors(at[rows], classes[rows], rows_priors.take_rows(rows))
            parts.append((rows, part))
        return joined_posteriors(parts)

    def to_dict(self) -> dict:
        """What `from_dict` reads, as JSON takes it."""
        return {
            "edges": self.grid.edges.tolist(),
            "cap": self.grid.cap,
            "limit": self.grid.limit,
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }

    @classmethod
    def from_dict(cls, values: dict) -> "RereadDecoder":
        """Raises KeyError, TypeError or ValueError for a dict that `to_dict` did not write."""
        edges = np.asarray(values["edges"], np.float64)
        grid = LeftGrid(edges, int(values["cap"]), int(values["limit"]))
        ascends = edges.ndim == 1 and (np.diff(edges) > 0).all()
        if not ascends or edges[0] != 0 or edges[-1] != grid.cap:
            raise ValueError("the edges do not ascend from 0 to the cap")
        if grid.limit < grid.cap:
            raise ValueError(f"the limit {grid.limit} is below the cap {grid.cap}")
        buckets = tuple(map(read_bucket, values["buckets"]))
        starts = [bucket.start for bucket in buckets]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"the buckets begin at {starts}")
        return cls(grid, buckets)


def read_bucket(values: dict) -> ElapsedBucket:
    """A bucket of a card. Raises KeyError, TypeError or ValueError where it is damaged."""
    maps = []
    for name in ("pooled", "alone"):
        knots = np.array([values[name]["raw"], values[name]["calibrated"]], float)
        if knots.ndim != 2 or not (np.diff(knots, axis=1) >= 0).all():
            raise ValueError(f"{name}: no ascending knots")
        if (knots[:, 0] != 0).any() or (knots[:, -1] != 1).any():
            raise ValueError(f"{name}: knots do not reach from 0 to 1")
        raw, calibrated = knots.tolist()
        maps.append(Conformal(tuple(raw), tuple(calibrated)))
    if not 0 <= values["weight"] <= 1:
        raise ValueError(f"weight {values['weight']} is outside 0 to 1")
    pooled, alone = maps
    return ElapsedBucket(int(values["start"]), float(values["weight"]), pooled, alone)


class Rereader:
    """Posteriors of answers' lengths from the served model's states, at 0 and while they grow.

    Attributes:
        layers: blocks whose output is read, from 1; every: tokens between two readings.
        hidden_size: features of a block's output.
        weighs_entropy: of prompts it reads means weighted by the next token's entropy.
        weights: fingerprint of the model whose states it learnt from; None where it is not known.
        card: the content of predictor.json.
    """

    def __init__(
        self,
        networks: dict[str, StateNetwork],
        decoder: RereadDecoder,
        card: dict,
    ) -> None:
        self.networks, self.decoder, self.card = networks, decoder, card
        backbone = card["backbone"]
        self.layers: tuple[int, ...] = tuple(backbone["layers"])
        self.every: int = backbone["every"]
        self.hidden_size: int = backbone["hidden_size"]
        self.pooling: str = backbone["pooling"]
        self.weighs_entropy: bool = self.pooling == "entropy"
        self.weights: str | None = backbone.get("weights")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, served_model: str | Path | None = None
    ) -> "Rereader":
        """The rereader of a folder that training or predictor.export wrote.

        Args:
            served_model: folder of the model that will be served: its hidden size and tokenizer
                must be those of the states.
        Raises:
            FileNotFoundError: there is no predictor.
            ValueError: it is damaged, of another backbone, or of another model.
        """
        folder = Path(folder)
        check_folder_files(folder, wanted=is_top)
        card = read_card(folder)
        try:
            if card["backbone"]["name"] != "states":
                raise DamagedFile(
                    f"{folder}: wanted a predictor of --backbone states, "
                    f"got {card['backbone']['name']}"
                )
            check_files(folder, card.get("export", {}).get("files", {}))
            rereader = cls(load_networks(folder), RereadDecoder.from_dict(card["rereading"]), card)
            rereader.check_shapes()
        except DamagedFile:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{folder}: a damaged predictor ({type(error).__name__}: {error})"
            ) from None
        if served_model:
            rereader.check_served(folder, Path(served_model))
        return rereader

    def read(
        self,
        at: np.ndarray,
        last: np.ndarray,
        mean: np.ndarray,
        priors: Sequence[LengthPrediction | None],
    ) -> list[LengthPrediction]:
        """Posteriors of whole lengths, for N prompts and answers together.

        Args:
            at: (N,) tokens of each answer that are there; 0 is a prompt after its prefill.
            last: (N, L, H) outputs of the layers at the last token read.
            mean: (N, L, H) their means over the prompt's tokens (at 0), else over the answer's; for
                pooling "entropy" those of a prompt are weighted by the next token's entropy.
            priors: (N,) at 0 the prompts' predictions, later the answers' posteriors at 0 or, where
                they were not read at 0, still the prompts' predictions; None where there is none.
        Raises:
            ValueError: arrays of other shapes.
        """
        at = np.asarray(at)
        shape = (len(at), len(self.layers), self.hidden_size)
        for name, states in (("last", last), ("mean", mean)):
            if np.shape(states) != shape:
                raise ValueError(f"{name} must be {shape}, got {np.shape(states)}")
        if len(priors) != len(at):
            raise ValueError(f"wanted {len(at)} priors, got {len(priors)}")
        if not len(at):
            return []
        vectors = pool_states(np.asarray(last), np.asarray(mean), self.pooling)
        classes = self.classes(at, vectors)
        predictions: list = [None] * len(at)
        for rows, rows_priors in rows_by_edges(priors):
            posteriors = self.decoder.posteriors(at[rows], classes[rows], rows_priors)
            for row, prediction in zip(rows, posteriors.predictions()):
                predictions[row] = prediction
        return predictions

    def classes(self, at: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """(N, K) probabilities of what is left, of pooled states (N, D)."""
        bucket, is_prompt = self.decoder.bucket_of(at), at == 0
        if not is_prompt.any():
            return self.networks["answer"](vectors, bucket)
        if is_prompt.all():
            return self.networks["prompt"](vectors, bucket)
        classes = np.empty((len(at), len(self.decoder.grid.edges)))
        for name, rows in (("prompt", is_prompt), ("answer", ~is_prompt)):
            classes[rows] = self.networks[name](vectors[rows], bucket[rows])
        return classes

    def check_shapes(self) -> None:
        """Raises ValueError where matrices, bins and buckets do not fit one another."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r}")
        width = self.hidden_size * len(self.layers)
        if self.pooling not in ("last", "mean"):  # the others join two vectors
            width *= 2
        classes, units = len(self.decoder.grid.edges), len(self.networks["prompt"].bias)
        shapes = {
            "center": (width,),
            "spread": (width,),
            "weight": (units, width),
            "bias": (units,),
            "out": (classes, units),
            "skip": (classes, width),
            "elapsed": (len(self.decoder.buckets), classes),
        }
        for kind, network in self.networks.items():
            for name, wanted in shapes.items():
                shape = getattr(network, name).shape
                if shape != wanted:
                    raise ValueError(f"{WEIGHTS_FILE}: {kind}.{name} is {shape}, wanted {wanted}")

    def check_served(self, folder: Path, served_model: Path) -> None:
        """Raises ValueError where a served model cannot be the one whose states were learnt."""
        check_tokenizer(folder, self.card["served_model"], served_model)
        file = served_model / "config.json"
        size = read_json(file).get("hidden_size") if file.is_file() else None
        if size and size != self.hidden_size:
            raise ValueError(
                f"{folder} reads states of {self.hidden_size} features, {served_model} has {size}"
            )


def save_networks(networks: dict[str, StateNetwork], folder: Path) -> None:
    """Write the matrices of a rereader; its card has the rest."""
    from safetensors.numpy import save_file

    tensors = {}
    for kind, network in networks.items():
        for field in fields(network):
            values = getattr(network, field.name)
            tensors[f"{kind}.{field.name}"] = np.ascontiguousarray(values, np.float32)
    save_file(tensors, Path(folder) / WEIGHTS_FILE)


def load_networks(folder: Path) -> dict[str, StateNetwork]:
    """The networks of a folder. Raises ValueError naming the file where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = Path(folder) / WEIGHTS_FILE
    networks = {}
    try:
        tensors = load_file(file)
        for kind in NETWORKS:
            values = {}
            for field in fields(StateNetwork):
                values[field.name] = tensors[f"{kind}.{field.name}"]
            networks[kind] = StateNetwork(**values)
    except (OSError, SafetensorError, KeyError) as error:
        raise DamagedFile(f"{file}: cannot be read ({error})") from None
    return networks
