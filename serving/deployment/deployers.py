"""Which device gets which layers, and what that costs: the deployers.

    placement = DEPLOYERS["helr"].place(model, cluster, Need(kv_tokens_q90=20_000, batch=8), read_profile("rtx3090"))
    AutoModelForCausalLM.from_pretrained(folder, device_map=placement.to_device_map())
    python -m serving.deployment --model chatglm2-6b --device RTX3090 --gpus 4 --deployer helr       (prints all of it)

Every deployer is deterministic, gives each layer to one device, and breaks no device's memory with the KV at the predicted q90; where it
finds no such placement it raises Infeasible (a ValueError). Free of torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from serving.cost_model.devices import Cluster
from serving.cost_model.model import CostModel, ModelShape, Profile
from serving.deployment.placement import (
    Infeasible,
    Need,
    Pieces,
    Placement,
    infeasible,
    layers_that_fit,
    make_placement,
)

TABLE_BYTES = 2 * 2**30  # no search keeps a larger table
TIE = 1e-6  # of a latency: decides between placements of equally many devices at weight 1


def profile_of(cost: "Profile | CostModel") -> Profile:
    return getattr(cost, "profile", cost)


def objective(latency_s, devices: int, scale_s: float, weight: float):
    """(1 - w) latency + w devices scale: LR at w = 0, HE at w = 1, where latency only breaks ties."""
    weight = min(weight, 1 - TIE)
    return (1 - weight) * latency_s + weight * scale_s * devices


def check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"efficiency_weight must lie in [0, 1], got {weight!r}")


@dataclass(frozen=True)
class Single:
    """The device that holds the whole model and answers soonest: argmin latency(d) over d with need(model) <= memory(d)."""

    def place(self, model: ModelShape, cluster: Cluster, need: Need, cost: Profile) -> Placement:
        pieces = Pieces(model, cluster, need, profile_of(cost))
        fitting = [d for d in range(len(cluster.devices)) if pieces.room([d])[0] >= model.layers]
        if not fitting:
            raise infeasible(model, cluster, need, "single: no device holds the model")
        best = min(fitting, key=lambda d: (pieces.seconds([d], [model.layers]), d))
        return make_placement(
            pieces, [(best, model.layers)], profile_of(cost), len(cluster.devices), "single"
        )


@dataclass(frozen=True)
class Even:
    """Every device in turn, ceil((layers + ends_as_layers) / devices) each, as ChatGLM's own rule and accelerate's "balanced" do.

    The first device holds the ends and so many layers fewer: 28 layers are 13, 15 | 8, 10, 10 | 6, 8, 8, 6. Where a device has no room
    for its share, those after it take more; where they cannot, those before it.
    """

    ends_as_layers: int = 2

    def place(self, model: ModelShape, cluster: Cluster, need: Need, cost: Profile) -> Placement:
        pieces = Pieces(model, cluster, need, profile_of(cost))
        count = len(cluster.devices)
        quota = math.ceil((model.layers + self.ends_as_layers) / count)
        # Shares may leave the last devices empty; the chain then ends sooner, and its end holds the output layer.
        for used in range(count, 0, -1):
            room = np.maximum(pieces.room(range(used)), 0)
            if room.sum() < model.layers or (room == 0).any():
                continue
            layers, left = [], model.layers
            for i in range(used):
                share = max(1, quota - self.ends_as_layers) if i == 0 else quota
                share = max(min(share, left), left - int(room[i + 1 :].sum()))
                layers.append(min(share, int(room[i])))
                left -= layers[-1]
            if left == 0 and layers[-1]:
                return make_placement(
                    pieces, list(enumerate(layers)), profile_of(cost), used, "even"
                )
        raise infeasible(
            model, cluster, need, "even: no share of the first devices, in order, holds the model"
        )


@dataclass(frozen=True)
class Helr:
    """After UELLM's HELR (arXiv 2409.14961): dynamic programming over devices x layers for least latency under each one's memory.

    The recurrence is this project's (the paper's repository ships hand-written maps). With U the devices used, e the last of them and m layers placed,

        f(U + e, e, m) = min over d in U, k <= room(e) of  f(U, d, m - k) + hop(d, e) + k (layer(e) + cache(e -> first))

    for each first device, closed by the output layer and the hop back; minimised is `objective`. Exact for chains: layers are alike, so
    that a stage's cost is linear in k and the minimum over k is a sliding window. Devices that nothing tells apart form groups, of
    which only the number used counts: U is a vector of counts, and 64 devices in 4 groups are 17^4 of them instead of 2^64.

    efficiency_weight: 0 is LR, lowest latency; 1 is HE, fewest devices (each device then works the largest share of the time).
    """

    efficiency_weight: float = 0.5
    name: str = "helr"

    def __post_init__(self):
        check_weight(self.efficiency_weight)

    def place(self, model: ModelShape, cluster: Cluster, need: Need, cost: Profile) -> Placement:
        pieces = Pieces(model, cluster, need, profile_of(cost))
        search = ChainSearch(pieces, self.efficiency_weight)
        best = min(
            (search.run(first) for first in range(len(search.groups))), key=lambda found: found[0]
        )
        if not math.isfinite(best[0]):
            raise infeasible(
                model, cluster, need, f"{self.name}: no chain of devices holds the model"
            )
        unused = [list(group) for group in search.groups]
        stages = [(unused[group].pop(0), layers) for group, layers in best[1]]
        return make_placement(pieces, stages, profile_of(cost), search.steps, self.name)


class ChainSearch:
    """Helr's table for one need: `run(first group)` -> (objective, [(group, layers), ...]).

    Kept level by level (devices used), and of a level only what may still beat a chain already known (`_rest` is a bound).
    """

    def __init__(self, pieces: Pieces, weight: float):
        self.layers, self.pieces, self.steps = pieces.model.layers, pieces, 0
        self.groups = pieces.cluster.groups
        weight = min(weight, 1 - TIE)
        self.latency_weight, self.device_price = 1 - weight, weight * pieces.scale
        self.sizes = np.array([len(group) for group in self.groups])
        if math.prod(int(n) + 1 for n in self.sizes) >= 2**62:
            raise ValueError(
                f"{len(self.groups)} groups of identical devices are more than this search can count; give fewer kinds"
            )
        self.strides = np.concatenate([[1], np.cumprod(self.sizes + 1)[:-1]])
        # One device stands for its group; its like is the other one of a hop inside the group.
        chosen, like = [g[0] for g in self.groups], [g[-1] for g in self.groups]
        self.layer, self.output = pieces.layer[chosen], pieces.output[chosen]
        self.hop, self.cache = pieces.hop[np.ix_(chosen, like)], pieces.cache[np.ix_(chosen, like)]
        ends = ((True, True), (True, False), (False, False), (False, True))
        devices = [pieces.cluster.devices[d] for d in chosen]
        room = [
            [layers_that_fit(pieces.model, d, pieces.need, *end) for d in devices] for end in ends
        ]
        self.room_alone, self.room_first, self.room_middle, self.room_last = np.array(room)
        self.reachable = ~np.eye(len(chosen), dtype=bool) | (self.sizes > 1)
        self.bound = math.inf  # some chain costs this; nothing dearer is followed

    def run(self, first: int) -> tuple[float, list[tuple[int, int]]]:
        """The best chain that starts in a group; (inf, []) where none fits, or none is better than another group's."""
        total, w, tied, kinds = (
            self.layers,
            self.latency_weight,
            self.pieces.model.tied,
            len(self.groups),
        )
        self.steps += total
        head = self.output[first] if tied else 0.0
        placed = np.arange(total)
        rows = np.full(
            (1, kinds, total), np.inf
        )  # (devices used, last one's group, layers placed, not yet all)
        room = min(int(self.room_first[first]), total - 1)
        rows[0, first, 1 : room + 1] = (
            w * (placed[1 : room + 1] * self.layer[first] + head) + self.device_price
        )
        states = self.strides[first : first + 1]
        best, end, levels, kept_bytes = math.inf, None, [], 0
        if self.room_alone[first] >= total:
            alone = total * self.layer[first] + self.output[first] + self.pieces.fixed
            best, end = w * alone + self.device_price, (0, first, 0, 0)
        per_layer = w * (self.layer + self.cache[first])
        close = w * (
            self.hop[:, first]
            + (0.0 if tied else self.output)
            + self.pieces.split
            + self.pieces.fixed
        )
        self.bound = min(
            self.bound,
            best,
            *(self._filled(order, per_layer, close, head) for order in self._orders(first)),
        )
        while len(states):
            counts = states[:, None] // self.strides % (self.sizes + 1)
            worth = (
                rows.min(1) + self._rest(counts, per_layer, close) <= self.bound * (1 + 1e-9)
            ).any(1)
            states, rows, counts = states[worth], rows[worth], counts[worth]
            levels.append((states, rows))
            self.steps += rows.size
            kept_bytes += rows.nbytes
            if kept_bytes > TABLE_BYTES:
                raise ValueError(
                    f"{kinds} groups of identical devices need a table of over {TABLE_BYTES:,} bytes; give fewer kinds of devices and links"
                )
            found = []
            for e in range(kinds):
                free = counts[:, e] < self.sizes[e]
                if not free.any() or self.room_middle[e] < 1:
                    continue
                before = (rows[free] + (w * self.hop[:, e] + self.device_price)[:, None]).min(
                    1
                ) - per_layer[e] * placed
                found.append(
                    (
                        e,
                        states[free] + self.strides[e],
                        window_min(before, int(self.room_middle[e])) + per_layer[e] * placed,
                    )
                )
                if (last := min(int(self.room_last[e]), total)) >= 1:
                    ends = before[:, total - last :]
                    at = np.unravel_index(np.argmin(ends), ends.shape)
                    value = ends[at] + per_layer[e] * total + close[e]
                    if value < best:
                        best, end = (
                            float(value),
                            (int(states[free][at[0]]), e, int(at[1]) + total - last, len(levels)),
                        )
            self.bound = min(self.bound, best)
            states = np.unique(np.concatenate([to for _, to, _ in found])) if found else states[:0]
            rows = np.full((len(states), kinds, total), np.inf)
            for e, to, values in found:
                rows[np.searchsorted(states, to), e] = values
        return best, self._walk(levels, first, end, per_layer) if end else []

    def _walk(
        self, levels: list, first: int, end: tuple[int, int, int, int], per_layer: np.ndarray
    ) -> list[tuple[int, int]]:
        """Back from the last stage: which stage before it gave each minimum."""
        state, e, placed, depth = end
        found = [(e, self.layers - placed)]

        def arrivals(
            state: int, depth: int, e: int
        ) -> np.ndarray:  # (last group, layers placed) and the hop from it to e
            states, rows = levels[depth - 1]
            return (
                rows[np.searchsorted(states, state)] + self.latency_weight * self.hop[:, e][:, None]
            )

        while state:
            # `state` are the devices before stage e, `placed` their layers; which of them was last?
            group = int(np.argmin(arrivals(state, depth, e)[:, placed]))
            state, depth = state - int(self.strides[group]), depth - 1
            if not state:
                return [(first, placed), *reversed(found)]
            low = max(0, placed - int(self.room_middle[group]))
            options = arrivals(state, depth, group)[:, low:placed].min(0) + per_layer[group] * (
                placed - np.arange(low, placed)
            )
            before = low + int(np.argmin(options))
            found.append((group, placed - before))
            e, placed = group, before
        return found  # one device alone

    def _rest(self, counts: np.ndarray, per_layer: np.ndarray, close: np.ndarray) -> np.ndarray:
        """(devices used, layers placed): no completion costs less. The rest go, in fractions, where a layer with its part of entering is cheapest."""
        ways = (
            self.latency_weight * np.where(self.reachable, self.hop, np.inf).min(0)
            + self.device_price
        )
        ways = np.where(np.isfinite(ways), ways, self.device_price)
        dear = per_layer + ways / np.maximum(self.room_middle, 1)
        left = np.tile(self.layers - np.arange(self.layers, dtype=float), (len(counts), 1))
        cost = np.full_like(left, close.min())
        for e in np.argsort(dear, kind="stable"):
            free = (self.sizes[e] - counts[:, e]) * max(0, int(self.room_middle[e]))
            taken = np.minimum(left, free[:, None])
            cost += taken * dear[e]
            left -= taken
        return np.where(left > 0, np.inf, cost)

    def _orders(self, first: int) -> list[tuple[int, ...]]:
        """Orders of the groups, to start from a good chain: all of few, else one of each kind of thrift."""
        others = [g for g in range(len(self.groups)) if g != first]
        if len(others) <= 3:
            return [(first, *order) for order in permutations(others)]
        return [
            (first, *sorted(others, key=lambda g: (key[g], g)))
            for key in (self.layer, -self.room_middle, self.hop[first])
        ]

    def _filled(
        self, order: tuple[int, ...], per_layer: np.ndarray, close: np.ndarray, head: float
    ) -> float:
        """What a chain costs that fills the groups in this order, device by device; inf where its last device has no room for the end."""
        first, left, value, at = order[0], self.layers, self.latency_weight * head, None
        for e in order:
            for _ in range(int(self.sizes[e])):
                if at is None and self.room_first[first] < 1:
                    return math.inf
                room = int(self.room_first[e] if at is None else self.room_middle[e])
                if room < 1:
                    break
                value += self.device_price
                value += min(room, left) * (
                    self.latency_weight * self.layer[e] if at is None else per_layer[e]
                )
                value += 0.0 if at is None else self.latency_weight * self.hop[at, e]
                if left <= room:
                    return (
                        float(value + close[e])
                        if at is not None and left <= self.room_last[e]
                        else math.inf
                    )
                left, at = left - room, e
        return math.inf


def window_min(values: np.ndarray, width: int) -> np.ndarray:
    """out[..., m] = min of values[..., m - width : m], inf where that is empty; by doubling."""
    found = np.full_like(values, np.inf)
    found[:, 1:] = values[:, :-1]
    done, width = 1, min(width, values.shape[1])
    while done < width:
        step = min(done, width - done)
        np.minimum(found[:, step:], found[:, :-step].copy(), out=found[:, step:])
        done += step
    return found


@dataclass(frozen=True)
class Exhaustive:
    """Every order of every choice of devices, every division of the layers: what Helr must equal. For small cases."""

    efficiency_weight: float = 0.5
    max_plans: int = 2_000_000

    def __post_init__(self):
        check_weight(self.efficiency_weight)

    def place(self, model: ModelShape, cluster: Cluster, need: Need, cost: Profile) -> Placement:
        pieces = Pieces(model, cluster, need, profile_of(cost))
        n = len(cluster.devices)
        plans = sum(math.perm(n, k) * math.comb(model.layers - 1, k - 1) for k in range(1, n + 1))
        if plans > self.max_plans:
            raise ValueError(
                f"exhaustive: {plans:,} plans, more than max_plans = {self.max_plans:,}; use helr"
            )
        best, chosen = math.inf, None
        for k in range(1, min(n, model.layers) + 1):
            layers = np.array(list(compositions(model.layers, k)))
            for devices in permutations(range(n), k):
                values = objective(
                    pieces.seconds(devices, layers), k, pieces.scale, self.efficiency_weight
                )
                values = np.where((layers <= pieces.room(devices)).all(1), values, np.inf)
                if values.min() < best:
                    best, chosen = values.min(), list(zip(devices, layers[np.argmin(values)]))
        if chosen is None:
            raise infeasible(
                model, cluster, need, "exhaustive: no chain of devices holds the model"
            )
        return make_placement(pieces, chosen, profile_of(cost), plans, "exhaustive")


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ways to write `total` as an ordered sum of `parts` whole numbers of at least 1."""
    for cuts in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, total)))


@dataclass(frozen=True)
class Morphling:
    """Morphling (SoCC 2021): a regression meta-learned over other services is adapted to this one by few stress tests.

    A configuration is an order of devices, a number of them, and a way to divide the layers; wanted is the most requests a second and
    device. Over `meta_tasks` made-up services (the need and the model's depth varied) a linear regression of log(requests/s/device) on
    a configuration's features is fitted each; their mean and covariance are the prior N(w0, S0), of which every stress test makes a
    posterior. The next test is where mean + `curiosity` standard deviations is highest. The paper adapts a small network by MAML; for
    a linear model with a Gaussian prior that adaptation is this closed form. A stress test is one call of the cost model; `search_steps`
    counts them, those out of memory included. The paper tests about 30 of 720 configurations. Tests go on where none has fitted yet.
    """

    stress_tests: int = 30
    meta_tasks: int = 8
    curiosity: float = 1.0
    noise: float = 0.05
    seed: int = 0

    def place(self, model: ModelShape, cluster: Cluster, need: Need, cost: Profile) -> Placement:
        profile = profile_of(cost)
        pieces = Pieces(model, cluster, need, profile)
        plans = configurations(pieces)
        features = np.array([self.features(pieces, plan) for plan in plans])
        weights, spread = self.meta_learn(model, cluster, need, profile, plans, features)
        precision = np.linalg.inv(spread)
        pull = precision @ weights
        best, tested, scores = None, np.zeros(len(plans), bool), np.full(len(plans), -np.inf)
        while not tested.all() and (best is None or tested.sum() < self.stress_tests):
            spread = np.linalg.inv(precision)
            reach = np.sqrt(np.einsum("ij,jk,ik->i", features, spread, features))
            at = int(
                np.argmax(
                    np.where(tested, -np.inf, features @ (spread @ pull) + self.curiosity * reach)
                )
            )
            tested[at] = True
            try:
                placement = make_placement(pieces, plans[at], profile, 0, "morphling")
                score = math.log(need.batch / placement.expected_latency_s / len(plans[at]))
            except Infeasible:
                placement, score = (
                    None,
                    float(features[at] @ weights) - 2.0,
                )  # out of memory: far below what was expected
            precision = precision + np.outer(features[at], features[at]) / self.noise**2
            pull = pull + features[at] * score / self.noise**2
            if placement and score > scores.max():
                best = at
            scores[at] = score if placement else -np.inf
        if best is None:
            raise infeasible(
                model,
                cluster,
                need,
                f"morphling: none of {len(plans)} configurations holds the model",
            )
        return make_placement(pieces, plans[best], profile, int(tested.sum()), "morphling")

    def meta_learn(
        self, model, cluster, need, profile, plans, features
    ) -> tuple[np.ndarray, np.ndarray]:
        """(mean, covariance) of the regressions over made-up services."""
        rng = np.random.default_rng(self.seed)
        ridge = 1e-3 * np.eye(features.shape[1])
        found = []
        for _ in range(self.meta_tasks):
            factor = 2.0 ** rng.uniform(-2, 2, 3)
            other = Need(
                need.kv_tokens_q90,
                *(
                    max(1, round(f * x))
                    for f, x in zip(factor, (need.batch, need.prompt_tokens, need.output_tokens))
                ),
            )
            pieces = Pieces(model, cluster, other, profile)
            seconds = np.array(
                [pieces.seconds([d for d, _ in plan], [n for _, n in plan]) for plan in plans]
            )
            scores = np.log(other.batch / seconds / [len(plan) for plan in plans])
            found.append(np.linalg.solve(features.T @ features + ridge, features.T @ scores))
        found = np.array(found)
        return found.mean(0), np.cov(found.T) + 1e-2 * np.eye(features.shape[1])

    def features(self, pieces: Pieces, plan: list[tuple[int, int]]) -> np.ndarray:
        devices, layers = zip(*plan)
        usable = np.array(
            [pieces.cluster.devices[d].usable_bytes for d in range(len(pieces.layer))]
        )
        speed = pieces.layer.min() / pieces.layer[list(devices)]
        share = np.array(layers) / pieces.model.layers
        k = len(plan)
        return np.array(
            [
                1.0,
                math.log(k),
                1 / k,
                share @ (1 / speed),
                speed[0],
                usable[list(devices)].sum() / usable.sum(),
                share.max(),
            ]
        )


def configurations(pieces: Pieces) -> list[list[tuple[int, int]]]:
    """Morphling's search space: orders of devices x number used x ways to divide the layers; each plan once."""
    n, total = len(pieces.layer), pieces.model.layers
    usable = np.array([d.usable_bytes for d in pieces.cluster.devices])
    orders = [
        list(range(n)),
        list(np.argsort(pieces.layer, kind="stable")),
        list(np.argsort(-usable, kind="stable")),
    ]
    found: dict[tuple, None] = {}
    for order in orders:
        for k in range(1, min(n, total) + 1):
            devices = [int(d) for d in order[:k]]
            for shares in (
                np.ones(k),
                1 / pieces.layer[devices],
                usable[devices].astype(float),
                None,
            ):
                layers = (
                    fill(pieces.room(devices), total) if shares is None else divide(total, shares)
                )
                if layers is not None:
                    found[tuple(zip(devices, layers))] = None
    return [list(plan) for plan in found]


def divide(total: int, shares: np.ndarray) -> list[int]:
    """Whole layers, at least 1 each, as near to the shares as they can be (largest remainder)."""
    rest = total - len(shares)
    exact = (
        shares / shares.sum() * rest
        if shares.sum() > 0
        else np.full(len(shares), rest / len(shares))
    )
    layers = np.floor(exact).astype(int)
    layers[np.argsort(layers - exact, kind="stable")[: rest - layers.sum()]] += 1
    return [int(n) + 1 for n in layers]


def fill(room: np.ndarray, total: int) -> list[int] | None:
    """Each device full before the next, at least 1 each; None where they cannot hold them all."""
    if (room < 1).any() or room.sum() < total:
        return None
    layers, left = [], total
    for i in range(len(room)):
        layers.append(min(int(room[i]), left - (len(room) - 1 - i)))
        left -= layers[-1]
    return layers if left == 0 else None


DEPLOYERS = {
    "even": Even(),
    "single": Single(),
    "he": Helr(1.0, "he"),  # he and lr are helr's two ends
    "lr": Helr(0.0, "lr"),
    "helr": Helr(),
    "morphling": Morphling(),
    "exhaustive": Exhaustive(),
}
