"""Deployers: which device gets which layers, and what that costs.

    need = Need(kv_tokens_q90=20_000, batch=8)
    placement = DEPLOYERS["helr"].place(model, cluster, need, read_profile("rtx3090"))
    AutoModelForCausalLM.from_pretrained(folder, device_map=placement.to_device_map())

    python -m serving.deployment --model chatglm2-6b --device RTX3090 --gpus 4 --deployer helr

prints all of a placement. Every deployer is deterministic, gives each layer to one device, and
keeps within each device's memory with the KV at the predicted q90; where it finds no such placement
it raises Infeasible (a ValueError). Free of torch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Protocol

import numpy as np

from serving.cost_model.devices import Cluster
from serving.cost_model.model import CostModel, ModelSizes, Profile
from serving.deployment.placement import (
    Infeasible,
    LatencyTerms,
    Need,
    Placement,
    infeasible,
    layers_that_fit,
    make_placement,
)

TABLE_BYTES = 2 * 2**30  # the largest table of a search
TIE = 1e-6  # of a latency: decides between placements of equally many devices at weight 1

Plan = list[tuple[int, int]]  # [(device, layers), ...]
# Of a level of ChainSearch: states (n,), each the devices used as one number, and costs
# (n, last device's group, layers placed, not yet all).
Level = tuple[np.ndarray, np.ndarray]


def profile_of(cost: Profile | CostModel) -> Profile:
    """The profile, also of a cost model."""
    return cost.profile if isinstance(cost, CostModel) else cost


def objective(latency_s: np.ndarray, devices: int, scale_s: float, weight: float) -> np.ndarray:
    """(1 - w) latency + w devices scale: LR at w = 0, HE at w = 1, where latency breaks ties."""
    weight = min(weight, 1 - TIE)
    return (1 - weight) * latency_s + weight * scale_s * devices


def check_weight(weight: float) -> None:
    """Raises ValueError outside [0, 1]."""
    if not 0 <= weight <= 1:
        raise ValueError(f"efficiency_weight must lie in [0, 1], got {weight!r}")


@dataclass(frozen=True)
class Single:
    """The device that holds the whole model and answers soonest.

    argmin latency(d) over d with need(model) <= memory(d).
    """

    def place(
        self, model: ModelSizes, cluster: Cluster, need: Need, cost: Profile | CostModel
    ) -> Placement:
        terms = LatencyTerms(model, cluster, need, profile_of(cost))
        fitting = []
        for device in range(len(cluster.devices)):
            if terms.layer_capacity([device])[0] >= model.layers:
                fitting.append(device)
        if not fitting:
            raise infeasible(model, cluster, need, "single: no device holds the model")
        best = min(fitting, key=lambda d: (terms.seconds([d], [model.layers]), d))
        return make_placement(
            terms, [(best, model.layers)], profile_of(cost), len(cluster.devices), "single"
        )


@dataclass(frozen=True)
class Even:
    """Every device in turn, ceil((layers + ends_as_layers) / devices) layers each.

    ChatGLM's own rule and accelerate's "balanced" do this. The first device holds the ends and so
    many layers fewer: 28 layers are 13, 15 | 8, 10, 10 | 6, 8, 8, 6. Where a device has no room for
    its share, those after it take more; where they cannot, those before it.
    """

    ends_as_layers: int = 2

    def place(
        self, model: ModelSizes, cluster: Cluster, need: Need, cost: Profile | CostModel
    ) -> Placement:
        terms = LatencyTerms(model, cluster, need, profile_of(cost))
        count = len(cluster.devices)
        quota = math.ceil((model.layers + self.ends_as_layers) / count)
        # Shares may leave the last devices empty; the chain then ends sooner, and its last device
        # holds the output layer.
        for used in range(count, 0, -1):
            room = np.maximum(terms.layer_capacity(range(used)), 0)
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
                    terms, list(enumerate(layers)), profile_of(cost), used, "even"
                )
        raise infeasible(
            model, cluster, need, "even: no share of the first devices, in order, holds the model"
        )


@dataclass(frozen=True)
class Helr:
    """UELLM's HELR (arXiv 2409.14961): least latency within each device's memory.

    Dynamic programming over devices x layers. The recurrence is this project's (the paper's
    repository ships hand-written maps). With U the devices used, e the last of them and m layers
    placed,

        f(U + e, e, m) = min over d in U, k <= room(e) of
            f(U, d, m - k) + hop(d, e) + k (layer(e) + cache(e -> first))

    for each first device, closed by the output layer and the hop back; `objective` is minimised.
    Exact for chains: layers are alike, so that a stage's cost is linear in k and the minimum over k
    is a sliding window. Interchangeable devices form groups, of which only the number used counts:
    U is a vector of counts, and 64 devices in 4 groups are 17^4 of them instead of 2^64.

    Attributes:
        efficiency_weight: 0 is LR, lowest latency; 1 is HE, fewest devices (each device then works
            the largest share of the time).
        name: the deployer's, in placements.
    """

    efficiency_weight: float = 0.5
    name: str = "helr"

    def __post_init__(self):
        check_weight(self.efficiency_weight)

    def place(
        self, model: ModelSizes, cluster: Cluster, need: Need, cost: Profile | CostModel
    ) -> Placement:
        terms = LatencyTerms(model, cluster, need, profile_of(cost))
        search = ChainSearch(terms, self.efficiency_weight)
        chains = list(map(search.run, range(len(search.groups))))
        value, chain = min(chains, key=lambda found: found[0])
        if not math.isfinite(value):
            raise infeasible(
                model, cluster, need, f"{self.name}: no chain of devices holds the model"
            )
        unused = list(map(list, search.groups))
        stages = [(unused[group].pop(0), layers) for group, layers in chain]
        return make_placement(terms, stages, profile_of(cost), search.steps, self.name)


class ChainSearch:
    """Helr's table for one need: `run(first group)` -> (objective, [(group, layers), ...]).

    Built level by level (devices used). A level contains only states that may still beat a known
    chain (`_lower_bound` bounds the remaining cost).
    """

    def __init__(self, terms: LatencyTerms, weight: float):
        self.layers, self.terms, self.steps = terms.model.layers, terms, 0
        self.groups = terms.cluster.groups
        weight = min(weight, 1 - TIE)
        self.latency_weight, self.device_price = 1 - weight, weight * terms.scale
        self.sizes = np.array(list(map(len, self.groups)))
        if math.prod((self.sizes + 1).tolist()) >= 2**62:
            raise ValueError(
                f"{len(self.groups)} groups of identical devices are more than this search can "
                "count; give fewer kinds"
            )
        self.strides = np.concatenate([[1], np.cumprod(self.sizes + 1)[:-1]])
        # One device represents its group; a hop inside the group goes to `hop_partner`.
        chosen, hop_partner = [], []
        for group in self.groups:
            chosen.append(group[0])
            hop_partner.append(group[-1])
        self.layer, self.output = terms.layer[chosen], terms.output[chosen]
        self.hop, self.cache = (
            terms.hop[np.ix_(chosen, hop_partner)],
            terms.cache[np.ix_(chosen, hop_partner)],
        )
        ends = ((True, True), (True, False), (False, False), (False, True))
        devices = [terms.cluster.devices[d] for d in chosen]
        room = []
        for end in ends:
            room.append([layers_that_fit(terms.model, d, terms.need, *end) for d in devices])
        self.room_alone, self.room_first, self.room_middle, self.room_last = np.array(room)
        self.reachable = ~np.eye(len(chosen), dtype=bool) | (self.sizes > 1)
        self.upper_bound = math.inf  # cost of a known chain; costlier ones are pruned

    def run(self, first: int) -> tuple[float, list[tuple[int, int]]]:
        """The best chain that starts in a group.

        (inf, []) where none fits, or none is better than another group's.
        """
        total, w, tied = self.layers, self.latency_weight, self.terms.model.tied
        self.steps += total
        head = self.output[first] if tied else 0.0
        per_layer = w * (self.layer + self.cache[first])
        output = 0.0 if tied else self.output
        close = w * (self.hop[:, first] + output + self.terms.split + self.terms.fixed)
        best, end = math.inf, None
        if self.room_alone[first] >= total:
            alone = total * self.layer[first] + self.output[first] + self.terms.fixed
            best, end = w * alone + self.device_price, (0, first, 0, 0)
        for order in self._group_orders(first):
            self.upper_bound = min(
                self.upper_bound, self._greedy_cost(order, per_layer, close, head)
            )
        self.upper_bound = min(self.upper_bound, best)

        levels: list[Level] = []
        table_bytes = 0
        states, rows = self._first_level(first, head)
        while len(states):
            counts = states[:, None] // self.strides % (self.sizes + 1)
            least = rows.min(1) + self._lower_bound(counts, per_layer, close)
            promising = (least <= self.upper_bound * (1 + 1e-9)).any(1)
            states, rows, counts = states[promising], rows[promising], counts[promising]
            levels.append((states, rows))
            self.steps += rows.size
            table_bytes += rows.nbytes
            if table_bytes > TABLE_BYTES:
                raise ValueError(
                    f"{len(self.groups)} groups of identical devices need a table of over "
                    f"{TABLE_BYTES:,} bytes; give fewer kinds of devices and links"
                )
            extended = []
            for e in range(len(self.groups)):
                free = counts[:, e] < self.sizes[e]
                if not free.any() or self.room_middle[e] < 1:
                    continue
                used = states[free]
                before = self._entry_costs(rows[free], e, per_layer)
                costs = self._middle_costs(before, e, per_layer)
                extended.append((e, used + self.strides[e], costs))
                value, at, placed = self._end_costs(before, e, per_layer, close)
                if value < best:
                    best, end = float(value), (int(used[at]), e, placed, len(levels))
            self.upper_bound = min(self.upper_bound, best)
            states, rows = self._next_level(extended, states[:0])
        return best, self._backtrack(levels, first, end, per_layer) if end else []

    def _first_level(self, first: int, head: float) -> Level:
        """One device, of the first group, with any number of layers but all."""
        total = self.layers
        placed = np.arange(total)
        rows = np.full((1, len(self.groups), total), np.inf)
        room = min(int(self.room_first[first]), total - 1)
        latency = placed[1 : room + 1] * self.layer[first] + head
        rows[0, first, 1 : room + 1] = self.latency_weight * latency + self.device_price
        return self.strides[first : first + 1], rows

    def _entry_costs(self, rows: np.ndarray, e: int, per_layer: np.ndarray) -> np.ndarray:
        """(states, layers placed) the least cost to enter a device of group e, less e's layers'.

        Subtracting per_layer[e] for every layer placed makes the minimum over k a window.
        """
        entering = self.latency_weight * self.hop[:, e] + self.device_price
        return (rows + entering[:, None]).min(1) - per_layer[e] * np.arange(self.layers)

    def _middle_costs(self, before: np.ndarray, e: int, per_layer: np.ndarray) -> np.ndarray:
        """(states, layers placed) the least cost with a middle stage on a device of group e."""
        window = window_min(before, int(self.room_middle[e]))
        return window + per_layer[e] * np.arange(self.layers)

    def _end_costs(
        self, before: np.ndarray, e: int, per_layer: np.ndarray, close: np.ndarray
    ) -> tuple[float, int, int]:
        """(cost, state's index, layers before e) of the best chain that ends on group e."""
        total = self.layers
        last = min(int(self.room_last[e]), total)
        if last < 1:
            return math.inf, 0, 0
        ends = before[:, total - last :]
        state, column = np.unravel_index(np.argmin(ends), ends.shape)
        value = ends[state, column] + per_layer[e] * total + close[e]
        return value, int(state), int(column) + total - last

    def _next_level(
        self, extended: list[tuple[int, np.ndarray, np.ndarray]], empty: np.ndarray
    ) -> Level:
        """The level of the states reached, from (last group, states, costs) of each group."""
        if extended:
            states = np.unique(np.concatenate([reached for _, reached, _ in extended]))
        else:
            states = empty
        rows = np.full((len(states), len(self.groups), self.layers), np.inf)
        for e, reached, values in extended:
            rows[np.searchsorted(states, reached), e] = values
        return states, rows

    def _backtrack(
        self, levels: list[Level], first: int, end: tuple[int, int, int, int], per_layer: np.ndarray
    ) -> list[tuple[int, int]]:
        """The best chain's stages, from its last: which stage before each gave its minimum."""
        state, e, placed, depth = end
        stages = [(e, self.layers - placed)]

        def entry_costs(state: int, depth: int, e: int) -> np.ndarray:
            """(last group, layers placed) costs with the hop from that group to e."""
            states, rows = levels[depth - 1]
            hop = self.latency_weight * self.hop[:, e]
            return rows[np.searchsorted(states, state)] + hop[:, None]

        while state:
            # `state` are the devices before stage e, `placed` their layers; the last of them is of
            # this group.
            group = int(np.argmin(entry_costs(state, depth, e)[:, placed]))
            state -= int(self.strides[group])
            depth -= 1
            if not state:
                return [(first, placed), *reversed(stages)]
            low = max(0, placed - int(self.room_middle[group]))
            options = entry_costs(state, depth, group)[:, low:placed].min(0)
            options = options + per_layer[group] * (placed - np.arange(low, placed))
            before = low + int(np.argmin(options))
            stages.append((group, placed - before))
            e, placed = group, before
        return stages  # one device alone

    def _lower_bound(
        self, counts: np.ndarray, per_layer: np.ndarray, close: np.ndarray
    ) -> np.ndarray:
        """(states, layers placed) a lower bound of the cost to complete each chain.

        The remaining layers are placed, in fractions, where a layer with its part of the entering
        cost is cheapest.
        """
        hops = np.where(self.reachable, self.hop, np.inf).min(0)
        entry_cost = self.latency_weight * hops + self.device_price
        entry_cost = np.where(np.isfinite(entry_cost), entry_cost, self.device_price)
        cost_per_layer = per_layer + entry_cost / np.maximum(self.room_middle, 1)
        left = np.tile(self.layers - np.arange(self.layers, dtype=float), (len(counts), 1))
        cost = np.full_like(left, close.min())
        for e in np.argsort(cost_per_layer, kind="stable"):
            free = (self.sizes[e] - counts[:, e]) * max(0, int(self.room_middle[e]))
            placed_here = np.minimum(left, free[:, None])
            cost += placed_here * cost_per_layer[e]
            left -= placed_here
        return np.where(left > 0, np.inf, cost)

    def _group_orders(self, first: int) -> list[tuple[int, ...]]:
        """Orders of the groups, to start from a good chain.

        All orders of few groups; of more, by speed, by room and by hop from the first.
        """
        others = list(range(len(self.groups)))
        others.remove(first)
        if len(others) <= 3:
            return [(first, *order) for order in permutations(others)]
        orders = []
        for key in (self.layer, -self.room_middle, self.hop[first]):
            orders.append((first, *sorted(others, key=lambda g: (key[g], g))))
        return orders

    def _greedy_cost(
        self, order: tuple[int, ...], per_layer: np.ndarray, close: np.ndarray, head: float
    ) -> float:
        """The cost of the chain that fills the groups in this order, device by device.

        inf where its last device has no room for the end.
        """
        first, left, value = order[0], self.layers, self.latency_weight * head
        previous = None  # the group of the device before
        for e in order:
            for _ in range(int(self.sizes[e])):
                is_first = previous is None
                if is_first and self.room_first[first] < 1:
                    return math.inf
                room = int(self.room_first[e] if is_first else self.room_middle[e])
                if room < 1:
                    break
                value += self.device_price
                layer = self.latency_weight * self.layer[e] if is_first else per_layer[e]
                value += min(room, left) * layer
                value += 0.0 if is_first else self.latency_weight * self.hop[previous, e]
                if left <= room:
                    fits = not is_first and left <= self.room_last[e]
                    return float(value + close[e]) if fits else math.inf
                left, previous = left - room, e
        return math.inf


def window_min(values: np.ndarray, width: int) -> np.ndarray:
    """out[..., m] = min of values[..., m - width : m], inf where that is empty; by doubling."""
    out = np.full_like(values, np.inf)
    out[:, 1:] = values[:, :-1]
    done, width = 1, min(width, values.shape[1])
    while done < width:
        step = min(done, width - done)
        np.minimum(out[:, step:], out[:, :-step].copy(), out=out[:, step:])
        done += step
    return out


@dataclass(frozen=True)
class Exhaustive:
    """Every order of every choice of devices, every division of the layers, for small cases.

    Helr must equal it.
    """

    efficiency_weight: float = 0.5
    max_plans: int = 2_000_000

    def __post_init__(self):
        check_weight(self.efficiency_weight)

    def place(
        self, model: ModelSizes, cluster: Cluster, need: Need, cost: Profile | CostModel
    ) -> Placement:
        terms = LatencyTerms(model, cluster, need, profile_of(cost))
        n = len(cluster.devices)
        plans = 0
        for k in range(1, n + 1):
            plans += math.perm(n, k) * math.comb(model.layers - 1, k - 1)
        if plans > self.max_plans:
            raise ValueError(
                f"exhaustive: {plans:,} plans, more than max_plans = {self.max_plans:,}; use helr"
            )
        best, chosen = math.inf, None
        for k in range(1, min(n, model.layers) + 1):
            layers = np.array(list(compositions(model.layers, k)))
            for devices in permutations(range(n), k):
                latency = terms.seconds(devices, layers)
                values = objective(latency, k, terms.scale, self.efficiency_weight)
                values = np.where((layers <= terms.layer_capacity(devices)).all(1), values, np.inf)
                if values.min() < best:
                    best, chosen = values.min(), list(zip(devices, layers[np.argmin(values)]))
        if chosen is None:
            raise infeasible(
                model, cluster, need, "exhaustive: no chain of devices holds the model"
            )
        return make_placement(terms, chosen, profile_of(cost), plans, "exhaustive")


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ways to write `total` as an ordered sum of `parts` whole numbers of at least 1."""
    for cuts in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, total)))


class StressBudgetSpent(Exception):
    """A stress test does not begin, because the budget of all tests is spent."""


def expected_requests_s(placement: Placement) -> float:
    """Requests a second of the need's batch, by the cost model."""
    return placement.need.batch / placement.expected_latency_s


@dataclass(frozen=True)
class Morphling:
    """Morphling (SoCC 2021): a meta-learned regression, adapted to a service by few stress tests.

    A configuration is an order of devices, a number of them, and a way to divide the layers; the
    most requests a second and device are wanted. Over `meta_tasks` synthetic services (the need's
    batch and lengths varied) a linear regression of log(requests/s/device) on a configuration's
    features is fitted each; their mean and covariance are the prior N(w0, S0), of which every
    stress test makes a posterior. The next test is where mean + `curiosity` standard deviations is
    highest. The paper adapts a small network by MAML; for a linear model with a Gaussian prior that
    adaptation is this closed form.

    A stress test is one call of the cost model, or of `stress_test`; `search_steps` counts them,
    those that run out of memory included. The paper tests about 30 of 720 configurations. Tests go
    on while none has fitted yet.

    Attributes:
        stress_test: requests/s of the need's batch at a placement, such as those of a real engine;
            it may raise StressBudgetSpent, which ends the search with the best that is known, and
            Infeasible for a placement that runs out of memory.
    """

    stress_tests: int = 30
    meta_tasks: int = 8
    curiosity: float = 1.0
    noise: float = 0.05
    seed: int = 0
    stress_test: Callable[[Placement], float] = expected_requests_s

    def place(
        self, model: ModelSizes, cluster: Cluster, need: Need, cost: Profile | CostModel
    ) -> Placement:
        profile = profile_of(cost)
        terms = LatencyTerms(model, cluster, need, profile)
        plans = configurations(terms)
        features = np.array([self.features(terms, plan) for plan in plans])
        weights, spread = self.meta_learn(model, cluster, need, profile, plans, features)
        precision = np.linalg.inv(spread)
        precision_mean = precision @ weights
        best, tested, scores = None, np.zeros(len(plans), bool), np.full(len(plans), -np.inf)
        while not tested.all() and (best is None or tested.sum() < self.stress_tests):
            spread = np.linalg.inv(precision)
            deviation = np.sqrt(np.einsum("ij,jk,ik->i", features, spread, features))
            upper_bound = features @ (spread @ precision_mean) + self.curiosity * deviation
            at = int(np.argmax(np.where(tested, -np.inf, upper_bound)))
            tested[at] = True
            try:
                placement = make_placement(terms, plans[at], profile, 0, "morphling")
                score = math.log(self.stress_test(placement) / len(plans[at]))
            except StressBudgetSpent:
                tested[at] = False
                break
            except Infeasible:
                # Out of memory: far below the prior's mean.
                placement = None
                score = float(features[at] @ weights) - 2.0
            precision = precision + np.outer(features[at], features[at]) / self.noise**2
            precision_mean = precision_mean + features[at] * score / self.noise**2
            if placement and score > scores.max():
                best = at
            scores[at] = score if placement else -np.inf
        if best is None:
            what = f"morphling: none of {len(plans)} configurations holds the model"
            raise infeasible(model, cluster, need, what)
        return make_placement(terms, plans[best], profile, int(tested.sum()), "morphling")

    def meta_learn(
        self,
        model: ModelSizes,
        cluster: Cluster,
        need: Need,
        profile: Profile,
        plans: list[Plan],
        features: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(mean, covariance) of the regressions over synthetic services; features (plans, F)."""
        rng = np.random.default_rng(self.seed)
        ridge = 1e-3 * np.eye(features.shape[1])
        fitted = []
        for _ in range(self.meta_tasks):
            factors = 2.0 ** rng.uniform(-2, 2, 3)
            sizes = (need.batch, need.prompt_tokens, need.output_tokens)
            varied = [max(1, round(f * size)) for f, size in zip(factors, sizes)]
            other = Need(need.kv_tokens_q90, *varied)
            terms = LatencyTerms(model, cluster, other, profile)
            seconds = np.array([terms.seconds(*zip(*plan)) for plan in plans])
            scores = np.log(other.batch / seconds / list(map(len, plans)))
            fitted.append(np.linalg.solve(features.T @ features + ridge, features.T @ scores))
        tasks = np.array(fitted)
        return tasks.mean(0), np.cov(tasks.T) + 1e-2 * np.eye(features.shape[1])

    def features(self, terms: LatencyTerms, plan: Plan) -> np.ndarray:
        """(F,) features of a configuration, all near 1."""
        devices, layers = zip(*plan)
        chosen = list(devices)
        usable = np.array([d.usable_bytes for d in terms.cluster.devices])
        speed = terms.layer.min() / terms.layer[chosen]
        share = np.array(layers) / terms.model.layers
        memory = usable[chosen].sum() / usable.sum()
        k = len(plan)
        return np.array(
            [1.0, math.log(k), 1 / k, share @ (1 / speed), speed[0], memory, share.max()]
        )


def configurations(terms: LatencyTerms) -> list[Plan]:
    """Morphling's search space: orders of devices x number used x ways to divide the layers.

    Each plan comes once.
    """
    n, total = len(terms.layer), terms.model.layers
    usable = np.array([d.usable_bytes for d in terms.cluster.devices])
    orders = [
        list(range(n)),
        list(np.argsort(terms.layer, kind="stable")),
        list(np.argsort(-usable, kind="stable")),
    ]
    plans: dict[tuple, None] = {}
    for order in orders:
        for k in range(1, min(n, total) + 1):
            devices = list(map(int, order[:k]))
            divisions = [
                divide_by_shares(total, np.ones(k)),
                divide_by_shares(total, 1 / terms.layer[devices]),
                divide_by_shares(total, usable[devices].astype(float)),
                fill_in_order(terms.layer_capacity(devices), total),
            ]
            for layers in divisions:
                if layers is not None:
                    plans[tuple(zip(devices, layers))] = None
    return list(map(list, plans))


def divide_by_shares(total: int, shares: np.ndarray) -> list[int]:
    """Whole layers, at least 1 each, as near to the shares as possible (largest remainder)."""
    rest = total - len(shares)
    if shares.sum() > 0:
        exact = shares / shares.sum() * rest
    else:
        exact = np.full(len(shares), rest / len(shares))
    layers = np.floor(exact).astype(int)
    layers[np.argsort(layers - exact, kind="stable")[: rest - layers.sum()]] += 1
    return (layers + 1).tolist()


def fill_in_order(room: np.ndarray, total: int) -> list[int] | None:
    """Layers that fill each device before the next, at least 1 each; None where they do not fit."""
    if (room < 1).any() or room.sum() < total:
        return None
    layers, left = [], total
    for i in range(len(room)):
        layers.append(min(int(room[i]), left - (len(room) - 1 - i)))
        left -= layers[-1]
    return layers if left == 0 else None


class Deployer(Protocol):
    """Chooses a placement for a model on a cluster."""

    def place(
        self, model: ModelSizes, cluster: Cluster, need: Need, cost: Profile | CostModel
    ) -> Placement:
        """Raises Infeasible where it finds none within each device's memory."""


DEPLOYERS: dict[str, Deployer] = {
    "even": Even(),
    "single": Single(),
    "he": Helr(1.0, "he"),  # he and lr are helr's two ends
    "lr": Helr(0.0, "lr"),
    "helr": Helr(),
    "morphling": Morphling(),
    "exhaustive": Exhaustive(),
}
