"""A replica as its front sees it: its process, what it answers, and which one a request goes to.

Free of torch.
"""

import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

from chatglm.commands import child_environment
from serving.engines.answers import Answer
from serving.replicas.messages import Channel, ReplicaJob, ReplicaReady
from serving.request import Limits, Record, Request

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before a replica that has ended is started again
PROMPT_WEIGHT = 0.1  # of a prompt's token among outstanding ones: many are computed in one pass
UNPREDICTED_TOKENS = 256.0  # expected of an answer without a prediction
STARTING, READY, ENDED = "starting", "ready", "ended"


@dataclass(eq=False)
class Flight:
    """A request that is being answered.

    Attributes:
        replica: that answers it; None while it waits for one.
        record: as the scheduler's, as of the last event.
        moves: replicas that have ended with it.
        is_queued: it may be given to a replica.
        earlier: its record where the last replica ended with it.
    """

    request: Request
    answer: Answer
    record: Record
    replica: "Replica | None" = None
    moves: int = 0
    is_queued: bool = False
    earlier: Record | None = None

    # Read for each request that is routed: of all that are being answered.
    @cached_property
    def expected_tokens(self) -> float:
        """Predicted of its answer, by its newest prediction."""
        prediction = self.record.prediction
        return self._bounded(None if prediction is None else prediction.expected_tokens)

    @cached_property
    def q90_tokens(self) -> float:
        """Predicted of its answer, within which it stays with probability 0.9."""
        prediction = self.record.prediction
        return self._bounded(None if prediction is None else prediction.quantile(0.9))

    def predicted_anew(self) -> None:
        """Its record has a newer prediction."""
        for name in ("expected_tokens", "q90_tokens"):
            self.__dict__.pop(name, None)

    def _bounded(self, predicted: float | None) -> float:
        tokens = UNPREDICTED_TOKENS if predicted is None else predicted
        most = self.answer.sampling.max_new_tokens
        return tokens if most is None else min(tokens, most)

    def leave_replica(self) -> None:
        """Its replica has ended; what its next one tells counts on from here."""
        self.replica = None
        self.moves += 1
        self.earlier, self.record = self.record, Record(self.request)
        self.predicted_anew()

    def follow(self, changed: dict[str, Any]) -> dict[str, Any]:
        """What an event says of it, with what happened in replicas that have ended."""
        if (before := self.earlier) is None:
            return changed
        told = dict(changed)
        for name in ("first_admitted_s", "first_token_s"):
            if name in told and getattr(before, name) >= 0:
                told[name] = getattr(before, name)
        if "finish_s" in told and before.first_admitted_s >= 0:
            told["admitted_s"] = before.first_admitted_s  # a completion's is the first
        told["overruns"] += before.overruns
        told["preemptions"] += before.preemptions + (before.first_admitted_s >= 0)
        return told

    def outstanding_tokens(self) -> float:
        """Predicted tokens that are still to be made, a part of the prompt's with them."""
        made = len(self.answer.tokens)
        prompt = 0 if made else self.request.prompt_tokens
        return PROMPT_WEIGHT * prompt + max(self.expected_tokens - made, 1.0)

    def kv_tokens(self, limits: Limits) -> float:
        """Of its prompt and its answer's predicted q90."""
        longest = limits.max_answer_tokens(self.request)
        answer = min(max(self.q90_tokens, len(self.answer.tokens)), longest)
        return self.request.prompt_tokens + answer


class Replica:
    """A replica's process, from the front's side.

    Attributes:
        state: STARTING, READY or ENDED.
        flights: what it answers, by request id.
        has_vocabulary: whether grammars can be compiled there.
        ready: what it said when it had loaded.
        ready_s: when it had loaded the model, of time.monotonic.
        failures: starts in a row that have failed. restarts: all after the first.
        finished: answers that have finished in it.
    """

    def __init__(self, job: ReplicaJob) -> None:
        self.job = job
        self.state = ENDED
        self.flights: dict[int, Flight] = {}
        self.has_vocabulary = False
        self.ready: ReplicaReady | None = None
        self.failures = self.restarts = 0
        self.copied_tokens = self.finished = 0
        self.ready_s = 0.0
        self.reason = ""
        self.channel: Channel | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"replica {self.job.number} ({self.job.placement.devices})"

    def start(self) -> Channel:
        """Start its process; it is ready when it says so."""
        ours, theirs = socket.socketpair()
        environment = child_environment(self.job.placement.stages[0].threads)
        command = [sys.executable, "-m", "serving.replicas.process"]
        with theirs:
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)
        self.state, self.has_vocabulary, self.ready, self.reason = STARTING, False, None, ""
        self.channel = Channel(Connection(ours.detach()))
        self.channel.send(self.job)
        return self.channel

    def send(self, message: Any) -> None:
        if self.channel is not None:
            self.channel.send(message)

    def outstanding_tokens(self) -> float:
        return sum(flight.outstanding_tokens() for flight in self.flights.values())

    def kv_free_tokens(self) -> float:
        """Of its KV memory, what the predicted q90 of its requests leaves."""
        limits = self.job.limits
        taken = sum(flight.kv_tokens(limits) for flight in self.flights.values())
        return limits.kv_tokens - taken

    def next_wait_s(self) -> float:
        """Seconds to wait before it is started again: twice as long after each failed start."""
        if not self.failures:
            return 0.0
        return min(FIRST_WAIT_S * 2 ** (self.failures - 1), LONGEST_WAIT_S)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()


def chosen_replica(replicas: Sequence[Replica], flight: Flight) -> Replica | None:
    """The replica that a request goes to; None where none is ready.

    The fewest predicted outstanding tokens among those whose KV memory has room for its q90, among
    all where none has.
    """
    ready = [replica for replica in replicas if replica.state == READY]
    roomy = []
    for replica in ready:
        if flight.kv_tokens(replica.job.limits) <= replica.kv_free_tokens():
            roomy.append(replica)
    return min(roomy or ready, key=Replica.outstanding_tokens, default=None)
