"""The predicted work of each replica, as the process that routes requests to them knows it.

Requests begin and end in one thread, Ray's router chooses in another, so every method takes a lock.
"""

import threading
from collections.abc import Sequence
from typing import Any

from serving.gateway.upstreams import InFlightRequest, Upstream, chosen_upstream


class Ledger:
    """Which replica has which requests.

    Attributes:
        kv_tokens: of each replica's KV cache; None where nobody knows.
    """

    def __init__(self, kv_tokens: int | None = None) -> None:
        self.kv_tokens = kv_tokens
        self._lock = threading.Lock()
        self._replicas: dict[str, Upstream] = {}
        self._in_flight: dict[int, InFlightRequest] = {}

    def open(self, inflight: InFlightRequest) -> int:
        """Take a request in; its number, for the other methods."""
        number = inflight.record.request.id
        with self._lock:
            self._in_flight[number] = inflight
        return number

    def close(self, number: int) -> None:
        """A request has ended, however."""
        with self._lock:
            inflight = self._in_flight.pop(number, None)
            if inflight is not None:
                inflight.leave()

    def ranked(self, number: int, names: Sequence[str]) -> list[str]:
        """The replicas for a request, best first; it counts as the first one's from now on.

        By `serving.gateway.upstreams.chosen_upstream`: the fewest predicted outstanding tokens
        among those with KV memory for its q90. Replicas that are not named have gone.
        """
        with self._lock:
            replicas = self._set_replicas(names)
            inflight = self._in_flight.get(number)
            if inflight is None:  # its client has left
                return list(names)
            inflight.leave()
            ranked: list[str] = []
            best = chosen_upstream(replicas, inflight)
            while best is not None:
                ranked.append(best.base)
                replicas.remove(best)
                best = chosen_upstream(replicas, inflight)
            if ranked:
                self._enter(inflight, ranked[0])
            return ranked

    def enter(self, number: int, name: str) -> None:
        """A replica has accepted a request: the first of its ranking, or a later one."""
        with self._lock:
            inflight = self._in_flight.get(number)
            if inflight is None or (
                inflight.upstream is not None and inflight.upstream.base == name
            ):
                return
            inflight.leave()
            self._set_replicas([*self._replicas, name])
            self._enter(inflight, name)

    def progress(self, number: int, tokens: int) -> None:
        """A request's answer has grown."""
        with self._lock:
            inflight = self._in_flight.get(number)
            if inflight is not None:
                inflight.progress(tokens)

    def fail(self, number: int) -> bool:
        """A replica has not answered a request; whether another one might.

        The replica is taken again only where no other is left.
        """
        with self._lock:
            inflight = self._in_flight.get(number)
            if inflight is None:
                return False
            if inflight.upstream is not None:
                inflight.upstream.failures += 1
                inflight.failed.add(inflight.upstream.base)
                inflight.leave()
            return any(name not in inflight.failed for name in self._replicas)

    def status(self) -> list[dict[str, Any]]:
        """Each replica's requests and predicted work, by name."""
        rows = []
        with self._lock:
            for name, replica in sorted(self._replicas.items()):
                row = {
                    "replica": name,
                    "requests": replica.running,
                    "outstanding_tokens": round(replica.outstanding_tokens),
                    "kv_taken": round(replica.kv_taken),
                    "served": replica.served,
                    "failures": replica.failures,
                }
                rows.append(row)
        return rows

    def _set_replicas(self, names: Sequence[str]) -> list[Upstream]:
        """The replicas of these names, new ones among them; the others are forgotten."""
        for gone in self._replicas.keys() - set(names):
            del self._replicas[gone]
        for name in names:
            if name not in self._replicas:
                self._replicas[name] = Upstream(name, up=True, kv_tokens=self.kv_tokens)
        return [self._replicas[name] for name in names]

    def _enter(self, inflight: InFlightRequest, name: str) -> None:
        replica = self._replicas[name]
        inflight.enter(replica)
        replica.served += 1


_ledger = Ledger()


def process_ledger() -> Ledger:
    """The one of this process: Ray makes the router, which finds its ledger here alone."""
    return _ledger
