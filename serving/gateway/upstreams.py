"""The servers behind the gateway, their load by predicted tokens, and which one is chosen."""

import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from serving.gateway.kinds import UNKNOWN_FACTS, Facts
from serving.request import Record

# Of a prompt's token among outstanding ones: many are computed in one pass.
PROMPT_TOKEN_WEIGHT = 0.1
MOST_PREFIXES = 65536


@dataclass(eq=False)
class Upstream:
    """One server.

    Attributes:
        base: its address, without a path's slash at the end.
        facts: what it said of itself.
        up: it answers. why: where it does not, in one line.
        kv_tokens: of its KV cache; None where nobody knows.
        limit: requests that it gets at once; None for any number.
        running: requests that it has.
        outstanding_tokens: predicted tokens that it still has to make, parts of prompts with them.
        kv_taken: tokens of its requests' prompts and of their answers' predicted q90.
    """

    base: str
    facts: Facts = UNKNOWN_FACTS
    up: bool = False
    why: str = "not asked yet"
    kv_tokens: int | None = None
    limit: int | None = None
    running: int = 0
    outstanding_tokens: float = 0.0
    kv_taken: float = 0.0
    served: int = 0
    failures: int = 0

    @property
    def has_place(self) -> bool:
        return self.up and (self.limit is None or self.running < self.limit)

    def has_kv(self, tokens: float) -> bool:
        return self.kv_tokens is None or self.kv_taken + tokens <= self.kv_tokens


@dataclass(eq=False)
class InFlightRequest:
    """A request in the gateway, waiting or at an upstream, and the load that it puts there.

    Attributes:
        record: as a policy looks at it.
        tokens: expected length of all answers that it asks for. q90: of that length.
        prefix_hashes: of its prompt's prefixes, of growing length, for the affinity to where they
            were computed.
        upstream: that has it; None while it waits.
        left: of its outstanding tokens. made: tokens of its answer so far.
        first_s: when its answer began, of the dispatcher's clock; below 0 before.
        is_predicted: its length is.
        reason: why its answer ended, "stop" by itself; None where its client has left before.
        failed: the addresses of the upstreams that have failed it.
    """

    record: Record
    tokens: float
    q90: float
    prefix_hashes: tuple[int, ...] = ()
    upstream: Upstream | None = None
    left: float = 0.0
    made: int = 0
    first_s: float = -1.0
    is_predicted: bool = False
    reason: str | None = None
    failed: set[str] = field(default_factory=set)

    @property
    def kv_tokens(self) -> float:
        return self.record.request.prompt_tokens + self.q90

    def enter(self, upstream: Upstream) -> None:
        """Count it as the upstream's."""
        self.upstream = upstream
        prompt_work = PROMPT_TOKEN_WEIGHT * self.record.request.prompt_tokens
        self.left = prompt_work + max(self.tokens, 1.0)
        upstream.running += 1
        upstream.outstanding_tokens += self.left
        upstream.kv_taken += self.kv_tokens

    def progress(self, tokens: int) -> None:
        """Note that its answer has grown."""
        self.made += tokens
        done = min(float(tokens), self.left - 1.0)  # a running answer has a token left at least
        if done > 0 and self.upstream is not None:
            self.left -= done
            self.upstream.outstanding_tokens -= done

    def leave(self) -> None:
        """Count it no longer."""
        upstream, self.upstream = self.upstream, None
        if upstream is None:
            return
        upstream.running -= 1
        upstream.outstanding_tokens -= self.left
        upstream.kv_taken -= self.kv_tokens
        if not upstream.running:  # no rounding stays behind
            upstream.outstanding_tokens = upstream.kv_taken = 0.0


class PrefixUpstreams:
    """Which upstream last computed each prefix of prompts; the oldest are forgotten.

    Args:
        slack_tokens: an upstream is preferred for its prefix while it has at most so many more
            outstanding tokens than the least loaded one.
    """

    def __init__(self, slack_tokens: float) -> None:
        self.slack_tokens = slack_tokens
        self._upstreams: OrderedDict[int, str] = OrderedDict()

    def note(self, inflight: InFlightRequest, upstream: Upstream) -> None:
        for prefix_hash in inflight.prefix_hashes:
            self._upstreams[prefix_hash] = upstream.base
            self._upstreams.move_to_end(prefix_hash)
        while len(self._upstreams) > MOST_PREFIXES:
            self._upstreams.popitem(last=False)

    def upstream_of(self, inflight: InFlightRequest) -> str | None:
        """The address of the upstream of the longest prefix that is known."""
        for prefix_hash in reversed(inflight.prefix_hashes):
            if prefix_hash in self._upstreams:
                return self._upstreams[prefix_hash]
        return None


def chosen_upstream(
    upstreams: Sequence[Upstream],
    inflight: InFlightRequest,
    prefixes: PrefixUpstreams | None = None,
) -> Upstream | None:
    """The upstream that a request goes to; None where none has a place for it.

    The fewest predicted outstanding tokens among those whose KV memory has room for its q90, among
    all where none has; of equals the one that has served least. One that has failed it is taken
    only where no other is left.
    """
    free = [upstream for upstream in upstreams if upstream.has_place]
    not_failed = [upstream for upstream in free if upstream.base not in inflight.failed]
    candidates = not_failed or free
    with_kv = [upstream for upstream in candidates if upstream.has_kv(inflight.kv_tokens)]
    least_loaded = min(with_kv or candidates, key=load_of, default=None)
    if least_loaded is None or prefixes is None:
        return least_loaded
    prefix_base = prefixes.upstream_of(inflight)
    for upstream in with_kv:
        if upstream.base == prefix_base:
            extra_load = upstream.outstanding_tokens - least_loaded.outstanding_tokens
            return upstream if extra_load <= prefixes.slack_tokens else least_loaded
    return least_loaded


def load_of(upstream: Upstream) -> tuple[float, int]:
    return upstream.outstanding_tokens, upstream.served


def any_up(upstreams: Collection[Upstream]) -> bool:
    return any(upstream.up for upstream in upstreams)


request_numbers = itertools.count()
