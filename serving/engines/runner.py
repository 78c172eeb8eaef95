"""A policy and an engine in a thread of their own: what makes answers, here or in other processes.

Free of torch at import.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.engines.answers import Answer, Sampling, TextEngine
from serving.engines.live import Inbox, WallClock
from serving.engines.stage_reports import StageReport
from serving.request import Event, Limits, Policy, Request
from serving.scheduler import run_scheduler

log = logging.getLogger(__name__)

Listener = Callable[[Answer, int | None], None]
LONGEST_FAILURE = 200  # characters


class AdapterStore(Protocol):
    """Loads LoRA adapters; as serving.engines.adapters.AdapterSet."""

    def load(self, name: str, folder: str | Path) -> None: ...
    def unload(self, name: str) -> None: ...


@dataclass(frozen=True)
class StageState:
    """The layers that one device holds.

    Attributes:
        device: as torch names it.
        start, end: the first layer, and the one after the last.
        weight_bytes: of its parameters; None where that is not known.
        predicted_bytes: what the placement expected of them; None where nothing was.
    """

    device: str
    start: int
    end: int
    weight_bytes: int | None = None
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class ReplicaState:
    """One copy of the model.

    Attributes:
        state: "starting", "ready" or "ended".
        devices: as --devices has them.
        kv_limit: KV tokens that it has.
        restarts: its starts after the first.
        finished: answers that have finished in it.
        stages: in the order of their layers.
    """

    number: int
    state: str
    devices: str
    kv_limit: int
    restarts: int
    finished: int
    stages: tuple[StageState, ...]


class AnswerBackend(Protocol):
    """What makes answers. All but start may be called from any thread.

    Attributes:
        limits: of all answers under way.
        adapters: None where it takes none.
        clock: of all times.
        failure: why no more answers can be made; None as long as they can.
        requeued: requests that went to another replica because theirs had ended.
    """

    limits: Limits
    adapters: AdapterStore | None
    clock: WallClock
    failure: str | None
    requeued: int

    @property
    def stop_ids(self) -> frozenset[int]: ...

    def start(self, observe: Callable[[Event], None], failed: Callable[[], None]) -> None:
        """Begin to answer.

        Args:
            observe: gets every event, in one thread.
            failed: called once where there is a `failure`; every answer has ended then.
        """

    def submit(
        self,
        request: Request,
        prompt_ids: Sequence[int],
        sampling: Sampling | None = None,
        listener: Listener | None = None,
    ) -> Answer:
        """Register a request's text, before `enqueue`; as TextEngine.submit."""

    def enqueue(self, request: Request) -> None:
        """Let a submitted request be answered. Raises RuntimeError where it is too late."""

    def forget(self, request_id: int) -> None:
        """Drop a request that was submitted and not enqueued."""

    def cancel(self, request_id: int) -> None:
        """End an answer, running or waiting."""

    def cancel_all(self) -> None: ...

    def count(self) -> int:
        """Answers registered: waiting, running, and cancelled ones that have not left yet."""

    def copied_tokens(self) -> int:
        """Prompt tokens copied from common prefixes instead of computed."""

    def state(self) -> str:
        """What a health check says: "ok", or why no answer can be made at the moment."""

    def replica_states(self) -> list[ReplicaState]:
        """Every copy of the model, in the order of their numbers. Costs microseconds."""

    def stop(self, timeout_s: float) -> bool:
        """End every answer and take no more; whether all has ended within the time."""


class EngineRunner:
    """An AnswerBackend of an engine in this process.

    Args:
        clock: of all times; a new one by default.
        on_error: called in the engine's thread with what ended it, before any answer ends.
        closes_engine: with stop(); False where the engine is used again.
    """

    def __init__(
        self,
        engine: TextEngine,
        policy: Policy,
        clock: WallClock | None = None,
        on_error: Callable[[BaseException], None] | None = None,
        closes_engine: bool = False,
    ) -> None:
        self.engine, self.policy = engine, policy
        self._closes_engine = closes_engine
        self.limits = engine.limits
        self.adapters: AdapterStore | None = engine.adapters
        self.clock = clock or WallClock()
        self.inbox = Inbox(self.clock, engine)
        self.failure: str | None = None
        self.requeued = 0
        self._on_error = on_error
        self._finished = 0
        self._stages: tuple[StageState, ...] | None = None
        self._thread: threading.Thread | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.engine.stop_ids

    def start(self, observe: Callable[[Event], None], failed: Callable[[], None]) -> None:
        self._thread = threading.Thread(
            target=self._serve, args=(observe, failed), name="engine", daemon=True
        )
        self._thread.start()

    def submit(
        self,
        request: Request,
        prompt_ids: Sequence[int],
        sampling: Sampling | None = None,
        listener: Listener | None = None,
    ) -> Answer:
        answer = self.engine.submit(request, prompt_ids, sampling, listener)
        answer.replica = 0
        return answer

    def enqueue(self, request: Request) -> None:
        try:
            self.inbox.put(request)
        except RuntimeError:  # it was shut in between
            self.engine.forget(request.id)
            raise

    def forget(self, request_id: int) -> None:
        self.engine.forget(request_id)

    def cancel(self, request_id: int) -> None:
        self.engine.cancel(request_id)
        self.inbox.withdraw(request_id)

    def cancel_all(self) -> None:
        for request_id in self.engine.cancel_all():
            self.inbox.withdraw(request_id)

    def count(self) -> int:
        return self.engine.count()

    def copied_tokens(self) -> int:
        return self.engine.copied_tokens()

    def state(self) -> str:
        return "ok"

    def replica_states(self) -> list[ReplicaState]:
        if self._stages is None:
            self._stages = stages_of_engine(self.engine)
        devices = "+".join(stage.device for stage in self._stages)
        state = "ready" if self.failure is None else "ended"
        kv_limit = self.limits.kv_tokens
        return [ReplicaState(0, state, devices, kv_limit, 0, self._finished, self._stages)]

    def stop(self, timeout_s: float) -> bool:
        self.inbox.close()
        self.cancel_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        if self._closes_engine:
            self.engine.close()
        return True

    def _serve(self, observe: Callable[[Event], None], failed: Callable[[], None]) -> None:
        try:
            for event in run_scheduler(self.policy, self.engine, self.clock, self.inbox, observe):
                if event.kind in ("refused", "withdrawn"):
                    self.engine.forget(event.id)
                elif event.kind == "finished":
                    self._finished += 1
        except BaseException as error:  # out of memory, a bug: every client must get a response
            log.exception("the engine has failed")
            if self._on_error is not None:
                self._on_error(error)
            what = " ".join(str(error).split())[:LONGEST_FAILURE]
            self.failure = f"the engine has failed: {type(error).__name__}: {what}"
            # First, so that later requests are refused and the engine knows all earlier ones.
            self.inbox.close()
            self.engine.end_all("failed")
            failed()


def stages_of_engine(engine: TextEngine) -> tuple[StageState, ...]:
    """Where an engine's layers are, as it says itself; one stage where it says nothing."""
    reports: Callable[[], list[StageReport]] | None = getattr(engine, "stage_reports", None)
    if reports is None:
        layers = int(getattr(engine.model.config, "num_hidden_layers", 0))
        return (StageState(str(engine.model.device), 0, layers),)
    stages = []
    for report in reports():
        stages.append(StageState(report.device, report.start, report.end, report.weight_bytes))
    return tuple(stages)
