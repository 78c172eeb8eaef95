"""The LoRA adapters of every replica of a pool."""

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.engines.adapter_errors import AdapterExists, UnknownAdapter
from serving.replicas.messages import LoadLora, LoraResult, UnloadLora
from serving.replicas.replica import Replica

log = logging.getLogger(__name__)

LORA_S = 600.0  # for a replica to load an adapter
ERRORS: dict[str, type[Exception]] = {
    "AdapterExists": AdapterExists,
    "UnknownAdapter": UnknownAdapter,
    "FileNotFoundError": FileNotFoundError,
}


@dataclass
class AdapterCall:
    """A load or an unload, and the replicas' answers to it by their numbers."""

    waits_for: set[int]
    done: threading.Event = field(default_factory=threading.Event)
    errors: list[tuple[str, str]] = field(default_factory=list)


class PooledAdapters:
    """Loads and unloads adapters in all replicas.

    Args:
        ready_replicas: returns those that are ready.
    Attributes:
        loaded: {name: folder}.
    """

    def __init__(self, ready_replicas: Callable[[], list[Replica]]) -> None:
        self._ready_replicas = ready_replicas
        self._numbers = itertools.count(1)
        self._calls: dict[int, AdapterCall] = {}
        self._lock = threading.Lock()
        self.loaded: dict[str, str] = {}

    def load(self, name: str, folder: str | Path) -> None:
        """Load it in every replica, or in none.

        Raises:
            AdapterExists: the name is taken.
            FileNotFoundError, ValueError: it cannot be loaded.
        """
        if name in self.loaded:
            raise AdapterExists(f"an adapter {name!r} is loaded already; unload it first")
        found, asked = str(folder), self._processes()
        errors = self._call(lambda number: LoadLora(number, name, found))
        if errors:
            self._call(lambda number: UnloadLora(number, name))
            kind, text = errors[0]
            raise ERRORS.get(kind, ValueError)(text)
        self.loaded[name] = found
        for process, replica in self._processes().items():
            if process not in asked:  # it became ready meanwhile
                replica.send(LoadLora(0, name, found))

    def _processes(self) -> dict[tuple[int, int], Replica]:
        """The replicas that are ready, each by its number and which of its processes it is."""
        found = {}
        for replica in self._ready_replicas():
            found[replica.job.number, replica.restarts] = replica
        return found

    def unload(self, name: str) -> None:
        """Take no new requests for it. Raises UnknownAdapter."""
        if self.loaded.pop(name, None) is None:
            raise UnknownAdapter(f"no adapter {name!r} is loaded")
        self._call(lambda number: UnloadLora(number, name))

    def restore(self, replica: Replica) -> None:
        """Load all adapters in a replica that has started again."""
        for name, folder in list(self.loaded.items()):  # others are loaded meanwhile
            replica.send(LoadLora(0, name, folder))

    def answered(self, replica: Replica, result: LoraResult) -> None:
        with self._lock:
            call = self._calls.get(result.number)
        if call is None:
            if result.error is not None and result.number == 0:
                log.warning("%s: an adapter is not loaded: %s", replica.name, result.error[1])
            return
        if result.error is not None:
            call.errors.append(result.error)
        self._leave(call, replica)

    def left(self, replica: Replica) -> None:
        """A replica has ended: its answers do not come."""
        with self._lock:
            calls = list(self._calls.values())
        for call in calls:
            self._leave(call, replica)

    def _leave(self, call: AdapterCall, replica: Replica) -> None:
        with self._lock:
            call.waits_for.discard(replica.job.number)
            if not call.waits_for:
                call.done.set()

    def _call(self, message: Callable[[int], Any]) -> list[tuple[str, str]]:
        """Send a message to every replica that is ready; the errors of those that fail."""
        number = next(self._numbers)
        with self._lock:  # a replica that ends now says so to a call that is known
            ready = self._ready_replicas()
            if not ready:
                return [("ValueError", "no replica is ready; try again later")]
            call = AdapterCall({replica.job.number for replica in ready})
            self._calls[number] = call
        for replica in ready:
            replica.send(message(number))
        in_time = call.done.wait(LORA_S)
        with self._lock:
            del self._calls[number]
        if not in_time:
            return [("ValueError", f"a replica has not answered within {LORA_S:g} s")]
        return call.errors
