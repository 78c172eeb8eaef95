"""Which of many replicas a request goes to, by what a gateway knows when it arrives.

ROUTERS, all that can be chosen by name, is at the foot.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

PROMPT_TOKEN_WEIGHT = 0.1  # of a prompt's token among outstanding ones, as serving.gateway has it
SLACK_TOKENS = 4096.0  # outstanding tokens more than the least that a prefix may cost


class Demand(NamedTuple):
    """A request as a gateway looks at it.

    Attributes:
        prompt_tokens: of its prompt. expected, q90: tokens of its answer, predicted.
        true_tokens: its answer's real length, for the oracle.
        blocks: names of its prompt's beginnings, of growing length; empty where nothing is shared.
    """

    prompt_tokens: int
    expected: float
    q90: float
    true_tokens: int
    blocks: tuple[int, ...] = ()

    def tokens(self, answer: float) -> float:
        """Outstanding tokens of it, as the gateway counts them, for an answer of this length."""
        return PROMPT_TOKEN_WEIGHT * self.prompt_tokens + max(answer, 1.0)


@dataclass(eq=False)
class Loads:
    """Of each replica, what it was given and has not finished: (replicas,) arrays.

    Attributes:
        requests: their number. tokens: outstanding ones by predictions, true_tokens by the truth.
        kv_tokens: of prompts and of answers' predicted q90. kv_limit: of a replica's memory.
    """

    requests: np.ndarray
    tokens: np.ndarray
    true_tokens: np.ndarray
    kv_tokens: np.ndarray
    kv_limit: int

    @classmethod
    def none(cls, replicas: int, kv_limit: int) -> "Loads":
        nothing = np.zeros((4, replicas))
        return cls(nothing[0], nothing[1], nothing[2], nothing[3], kv_limit)

    def count(self, replica: int, demand: Demand, sign: int) -> None:
        """Add the demand to a replica's load (sign 1), or take it away (-1)."""
        self.requests[replica] += sign
        self.tokens[replica] += sign * demand.tokens(demand.expected)
        self.true_tokens[replica] += sign * demand.tokens(demand.true_tokens)
        self.kv_tokens[replica] += sign * (demand.prompt_tokens + demand.q90)


class Router(Protocol):
    """Chooses replicas; may keep what it has chosen."""

    def choose(self, loads: Loads, demand: Demand) -> int: ...


@dataclass
class RoundRobin:
    """One after the other."""

    last: int = -1

    def choose(self, loads: Loads, demand: Demand) -> int:
        self.last = (self.last + 1) % len(loads.requests)
        return self.last


@dataclass(frozen=True)
class Least:
    """The least of one column of the loads.

    Attributes:
        by: the column. fits: only among replicas whose KV memory holds the request's q90, where
            there are any.
    """

    by: str
    fits: bool = False

    def choose(self, loads: Loads, demand: Demand) -> int:
        column = getattr(loads, self.by)
        least = int(column.argmin())
        if not self.fits or has_kv(loads, least, demand):
            return least
        room = loads.kv_tokens + (demand.prompt_tokens + demand.q90) <= loads.kv_limit
        return int(np.where(room, column, np.inf).argmin()) if room.any() else least


def has_kv(loads: Loads, replica: int, demand: Demand) -> bool:
    """Whether a replica's KV memory holds the request's q90 beside what it has."""
    taken = loads.kv_tokens[replica] + demand.prompt_tokens + demand.q90
    return bool(taken <= loads.kv_limit)


@dataclass
class TwoChoices:
    """The less loaded of two replicas drawn at random (Mitzenmacher, "The Power of Two Choices in
    Randomized Load Balancing", 2001)."""

    by: str
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def choose(self, loads: Loads, demand: Demand) -> int:
        column = getattr(loads, self.by)
        replicas = len(column)
        one, other = int(self.rng.random() * replicas), int(self.rng.random() * replicas)
        return one if column[one] <= column[other] else other


@dataclass
class PrefixAffinity:
    """Where the prompt's beginning was last computed, unless that replica has much more to do.

    Attributes:
        longest: by the longest beginning that was seen, as serving.gateway; else by the first block
            alone.
        slack_tokens: more outstanding tokens than the least loaded replica's.
    """

    longest: bool
    slack_tokens: float = SLACK_TOKENS
    places: dict[int, int] = field(default_factory=dict)
    least: Least = Least("tokens", fits=True)

    def choose(self, loads: Loads, demand: Demand) -> int:
        chosen = self.least.choose(loads, demand)
        blocks = demand.blocks if self.longest else demand.blocks[:1]
        for block in reversed(blocks):
            known = self.places.get(block)
            if known is None:
                continue
            behind = loads.tokens[known] - loads.tokens[chosen]
            if behind <= self.slack_tokens and has_kv(loads, known, demand):
                chosen = known
            break
        for block in blocks:
            self.places[block] = chosen
        return chosen


ROUTERS: dict[str, Callable[[], Router]] = {
    "round_robin": RoundRobin,
    "least_connections": lambda: Least("requests"),
    "two_choices": lambda: TwoChoices("requests"),
    "two_choices_work": lambda: TwoChoices("tokens"),
    "predicted_work": lambda: Least("tokens", fits=True),
    "true_work": lambda: Least("true_tokens", fits=True),
    "prefix_first": lambda: PrefixAffinity(longest=False),
    "prefix_longest": lambda: PrefixAffinity(longest=True),
}
