"""What a front process and its replicas send each other, over a pipe that only they have.

Messages are pickled: both ends are processes of the same command, and nothing else can write to
the pipe. Free of torch.
"""

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from finetune.placing import ReplicaSpec
from serving.deployment.placement import Need
from serving.engines.answers import Sampling, TokenLogprobs
from serving.engines.stage_reports import StageReport
from serving.replicas.measuring import StageTiming
from serving.replicas.served_model import ServedModel
from serving.request import Completion, CostEstimator, Event, Limits, Record, Request

# Of a Record, what a front's copy is kept up to date with.
RECORD_FIELDS = ("reserved_tokens", "admitted_s", "first_admitted_s", "first_token_s")
RECORD_COUNTS = ("preemptions", "overruns")
COMPLETION_FIELDS = tuple(field.name for field in fields(Completion) if field.name != "request")


# ---- from the front


@dataclass(frozen=True)
class ReplicaJob:
    """What a replica loads and how it serves.

    Attributes:
        number: of the replica, for its messages.
        cost: of the placement, for policies.
        probe: a batch to time when the model is loaded, for the comparison with the prediction;
            None times nothing.
        zero_s: of the front's WallClock, which the replica's times count from.
    """

    number: int
    served: ServedModel
    placement: ReplicaSpec
    limits: Limits
    cost: CostEstimator
    zero_s: float = 0.0
    probe: Need | None = None


class SubmitAnswer(NamedTuple):
    """A request to answer.

    Attributes:
        sampling: without its grammar, whose source is `grammar`.
        made: tokens that an ended replica has made of its answer.
    """

    request: Request
    prompt: list[int]
    sampling: Sampling
    grammar: str | None
    made: list[int]


class CancelAnswer(NamedTuple):
    id: int


class LoadLora(NamedTuple):
    """number: of the call, which its LoraResult repeats."""

    number: int
    name: str
    folder: str


class UnloadLora(NamedTuple):
    number: int
    name: str


class UseVocabulary(NamedTuple):
    """What the grammars of later requests are compiled over."""

    tokens: Sequence[bytes | None]
    stop_ids: Sequence[int]


class UsePolicy(NamedTuple):
    """Schedule by another policy from now on; nothing is being answered."""

    name: str


class EndReplica(NamedTuple):
    """End every answer and the process."""


# ---- from a replica


class ReplicaReady(NamedTuple):
    """The model is loaded.

    Attributes:
        vocabulary: a prompt's token ids are below.
        chat_prompt: of the model's configuration; None where it has none.
        seconds: that loading took.
        reports: of each stage; empty where the engine makes none.
        timings: of each stage, of the job's probe; None without one.
    """

    stop_ids: frozenset[int]
    vocabulary: int
    takes_adapters: bool
    chat_prompt: str | None
    seconds: float
    reports: tuple[StageReport, ...] = ()
    timings: tuple[StageTiming, ...] | None = None


class ReplicaFailed(NamedTuple):
    """Its last message: why it ends."""

    reason: str


class AnswerUpdate(NamedTuple):
    """What a step has added to an answer; token is None where it ends without one.

    Attributes:
        embedding: numpy (hidden_size,).
    """

    id: int
    token: int | None
    reason: str | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: Any = None


class SchedulerUpdate(NamedTuple):
    """An Event without the request, which the front has: what changed, by name."""

    time_s: float
    kind: str
    id: int
    changed: dict[str, Any]


class LoraResult(NamedTuple):
    """error: (name of the exception's class, its text), or None."""

    number: int
    error: tuple[str, str] | None


class CopiedTokens(NamedTuple):
    """Prompt tokens copied from common prefixes, since the replica began."""

    tokens: int


def slim_event(event: Event) -> SchedulerUpdate:
    """An event as it is sent."""
    what, changed = event.what, {}
    if isinstance(what, Record):
        changed = {name: getattr(what, name) for name in RECORD_FIELDS + RECORD_COUNTS}
        if event.kind == "reread":
            changed["prediction"] = what.prediction
    elif isinstance(what, Completion):
        changed = {name: getattr(what, name) for name in COMPLETION_FIELDS}
    elif isinstance(what, str):
        changed = {"reason": what}
    return SchedulerUpdate(event.time_s, event.kind, event.id, changed)


class Channel:
    """Messages to and from another process. send never waits: a thread writes.

    What is sent while an earlier batch is being written goes out as one batch.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._writing = False
        threading.Thread(target=self._write, name="channel", daemon=True).start()

    def send(self, message: Any) -> None:
        """Nothing happens where the other side has gone: receive says so."""
        with self._changed:
            if not self._closed:
                self._waiting.append(message)
                self._changed.notify_all()

    def receive(self) -> list[Any]:
        """The next batch of messages. Raises EOFError where there are no more."""
        try:
            batch: list[Any] = self._connection.recv()
        except OSError:  # reset, or closed in this process
            raise EOFError from None
        return batch

    def flush(self, timeout_s: float) -> None:
        """Wait until everything has been written."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not (self._waiting or self._writing), timeout_s
            )

    def close(self) -> None:
        """Neither send nor receive any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with suppress(OSError):
            self._connection.close()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = list(self._waiting)
                self._waiting.clear()
                self._writing = True
            try:
                self._connection.send(batch)
            except (OSError, ValueError):
                with self._changed:
                    self._closed = True
            with self._changed:
                self._writing = False
                self._changed.notify_all()
