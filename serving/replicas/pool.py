"""Replicas of a model as processes: what gives them requests, and starts them again when they end.

A request goes to the replica with the fewest predicted outstanding tokens among those whose KV
memory holds its predicted q90 beside that of what they have. Where a replica ends, its requests go
to others, with the tokens that their answers have: nothing that a client has seen is made again,
and nothing is lost. A greedy answer goes on as if nothing had happened; a sampled one draws its
further tokens anew.
"""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from serving.engines.adapter_errors import UnknownAdapter
from serving.engines.answers import Answer, Sampling, check_ids, checked_prompt
from serving.engines.live import WallClock
from serving.engines.runner import AdapterStore, Listener, ReplicaState, StageState
from serving.replicas.messages import (
    AnswerUpdate,
    CancelAnswer,
    Channel,
    CopiedTokens,
    EndReplica,
    LoraResult,
    ReplicaFailed,
    ReplicaJob,
    ReplicaReady,
    SchedulerUpdate,
    SubmitAnswer,
    UsePolicy,
    UseVocabulary,
)
from serving.replicas.pooled_adapters import PooledAdapters
from serving.replicas.replica import ENDED, READY, STARTING, Flight, Replica, chosen_replica
from serving.request import Completion, Event, Record, Request

log = logging.getLogger(__name__)

STEADY_S = 60.0  # a replica that has served so long is started again without delay
MOST_FAILURES = 5  # starts in a row that fail, of every replica, before the pool gives up
MOST_MOVES = 3  # a request that has seen so many replicas end is ended: it may be the reason


class ReplicaPool:
    """An AnswerBackend of replicas in processes of their own.

    Args:
        jobs: one for each replica, of the same model.
        predicted_bytes: of the weights of each stage of a replica; empty where nothing was
            predicted.
    Attributes:
        limits: of all replicas together; max_tokens is that of each.
        requeued: requests that went to another replica because theirs had ended.
        lost: called when a replica has ended, with it and the reason.
    """

    def __init__(self, jobs: Sequence[ReplicaJob], predicted_bytes: Sequence[int] = ()) -> None:
        self.replicas = [Replica(job) for job in jobs]
        self.predicted_bytes = tuple(predicted_bytes)
        each = jobs[0].limits
        self.limits = replace(
            each,
            max_batch=each.max_batch * len(jobs),
            kv_tokens=each.kv_tokens * len(jobs),
        )
        self.adapters: AdapterStore | None = None
        self.clock = WallClock()
        for replica in self.replicas:
            replica.job = replace(replica.job, zero_s=self.clock.zero_s)
        self.failure: str | None = None
        self.requeued = 0
        self._stop_ids: frozenset[int] = frozenset()
        self._vocabulary = 0
        self._flights: dict[int, Flight] = {}
        self._lock = threading.RLock()  # of all state; held for moments
        self._observing = threading.Lock()  # events come from a thread of each replica
        self._changed = threading.Condition(self._lock)
        self._observer: Callable[[Event], None] = lambda event: None
        self._failed: Callable[[], None] = lambda: None
        self._pooled = PooledAdapters(self.ready_replicas)
        self._stopping = False

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stop_ids

    def open(self) -> list[ReplicaReady]:
        """Start every replica and wait until all have loaded the model; what they say.

        Raises:
            ValueError: one cannot: its own line.
        """
        for replica in self.replicas:
            self._start(replica)
        with self._changed:
            self._changed.wait_for(lambda: all(r.state != STARTING for r in self.replicas))
            found = [replica.ready for replica in self.replicas]
        said = [ready for ready in found if ready is not None]
        if len(said) < len(self.replicas):
            reasons = [r.reason for r in self.replicas if r.ready is None]
            self.stop(1.0)
            raise ValueError(reasons[0] or "a replica ended while it loaded the model")
        self._stop_ids, self._vocabulary = said[0].stop_ids, said[0].vocabulary
        if all(ready.takes_adapters for ready in said):
            self.adapters = self._pooled
        return said

    def start(self, observe: Callable[[Event], None], failed: Callable[[], None]) -> None:
        """As AnswerBackend.start; the replicas have been opened."""
        self._observer, self._failed = observe, failed

    def _observe(self, event: Event) -> None:
        with self._observing:
            self._observer(event)

    def ready_replicas(self) -> list[Replica]:
        with self._lock:
            return [replica for replica in self.replicas if replica.state == READY]

    def use_policy(self, name: str) -> None:
        """Schedule by another policy of POLICIES.

        Raises:
            RuntimeError: requests are being answered.
        """
        with self._lock:
            if self._flights:
                raise RuntimeError(f"{len(self._flights)} requests are being answered")
            for replica in self.replicas:
                replica.job = replace(replica.job, served=replace(replica.job.served, policy=name))
                replica.send(UsePolicy(name))

    # ---- requests

    def submit(
        self,
        request: Request,
        prompt_ids: Sequence[int],
        sampling: Sampling | None = None,
        listener: Listener | None = None,
    ) -> Answer:
        sampling = sampling or Sampling()
        prompt = checked_prompt(request, prompt_ids)
        if sampling.adapter is not None and sampling.adapter not in self._pooled.loaded:
            raise UnknownAdapter(f"no adapter {sampling.adapter!r} is loaded")
        check_ids(prompt, self._vocabulary)
        answer = Answer(request.id, prompt, sampling, listener)
        with self._lock:
            if request.id in self._flights:
                raise ValueError(f"request {request.id} is being answered already")
            self._flights[request.id] = Flight(request, answer, Record(request))
        return answer

    def enqueue(self, request: Request) -> None:
        with self._lock:
            if self._stopping or self.failure:
                self._flights.pop(request.id, None)
                raise RuntimeError(f"request {request.id} comes too late: the replicas have ended")
            flight = self._flights[request.id]
            flight.is_queued = True
            self._assign(flight)

    def forget(self, request_id: int) -> None:
        with self._lock:
            flight = self._flights.pop(request_id, None)
        if flight is not None:
            flight.answer.add(None, "refused")

    def cancel(self, request_id: int) -> None:
        with self._lock:
            flight = self._flights.get(request_id)
            if flight is None:
                return
            flight.answer.add(None, "cancelled")
            if flight.replica is not None:
                flight.replica.send(CancelAnswer(request_id))
            else:
                self._end(flight, "cancelled")

    def cancel_all(self) -> None:
        with self._lock:
            registered = list(self._flights)
        for request_id in registered:
            self.cancel(request_id)

    def count(self) -> int:
        return len(self._flights)

    def copied_tokens(self) -> int:
        return sum(replica.copied_tokens for replica in self.replicas)

    def state(self) -> str:
        return "ok" if self.ready_replicas() else "no replica is ready: they are being started"

    def replica_states(self) -> list[ReplicaState]:
        states = []
        for replica in self.replicas:
            job = replica.job
            state = ReplicaState(
                job.number,
                replica.state,
                job.placement.devices,
                job.limits.kv_tokens,
                replica.restarts,
                replica.finished,
                self._stages_of(replica),
            )
            states.append(state)
        return states

    def _stages_of(self, replica: Replica) -> tuple[StageState, ...]:
        """The stages of a replica, with what its process says of them when it has loaded."""
        ready = replica.ready
        reports = ready.reports if ready is not None else ()
        stages = []
        for number, spec in enumerate(replica.job.placement.stages):
            taken = reports[number].weight_bytes if number < len(reports) else None
            known = number < len(self.predicted_bytes)
            predicted = self.predicted_bytes[number] if known else None
            stages.append(StageState(spec.device, spec.start, spec.end, taken, predicted))
        return tuple(stages)

    def _assign(self, flight: Flight) -> None:
        """Give a request to a replica, if one is ready. With the lock."""
        replica = chosen_replica(self.replicas, flight)
        flight.replica = replica
        flight.answer.replica = None if replica is None else replica.job.number
        if replica is None:
            return
        replica.flights[flight.request.id] = flight
        answer, sampling = flight.answer, flight.answer.sampling
        source = None
        if (grammar := sampling.grammar) is not None:
            source = grammar.source
            if not replica.has_vocabulary:
                vocabulary = grammar.vocabulary
                replica.send(UseVocabulary(vocabulary.tokens, vocabulary.stop_ids))
                replica.has_vocabulary = True
            sampling = replace(sampling, grammar=None)
        request = replace(flight.request, generated=len(answer.tokens))
        replica.send(SubmitAnswer(request, answer.prompt, sampling, source, list(answer.tokens)))

    def _end(self, flight: Flight, reason: str) -> None:
        """Drop a request that no replica has; its answer ends for `reason`, if it has not ended."""
        with self._lock:
            known = self._flights.pop(flight.request.id, None)
        if known is None:
            return
        answer = flight.answer
        answer.add(None, reason)
        is_whole = answer.reason in ("stop", "length")  # its replica has ended before it said so
        now_s, request = self.clock.now_s(), flight.request
        record = flight.earlier or flight.record
        completion = Completion(
            request,
            record.first_admitted_s,
            record.first_token_s,
            now_s,
            len(answer.tokens),
            record.most_reserved_tokens,
            record.preemptions,
            record.overruns,
            cut=not is_whole,
        )
        kind = "finished" if is_whole or answer.reason == "cut" else "withdrawn"
        self._observe(Event(now_s, kind, request.id, completion))

    # ---- replicas

    def _start(self, replica: Replica) -> None:
        channel = replica.start()
        threading.Thread(
            target=self._read, args=(replica, channel), name=replica.name, daemon=True
        ).start()

    def _read(self, replica: Replica, channel: Channel) -> None:
        """The thread of a replica's messages, until it ends."""
        handlers: dict[type, Callable[[Replica, Any], None]] = {
            AnswerUpdate: self._add_token,
            SchedulerUpdate: self._take_event,
            ReplicaReady: self._become_ready,
            ReplicaFailed: self._note_failure,
            LoraResult: self._pooled.answered,
            CopiedTokens: self._note_copied,
        }
        try:
            while True:
                for message in channel.receive():
                    handlers[type(message)](replica, message)
        except EOFError:
            pass
        except Exception:  # a bug here must not leave its requests waiting forever
            log.exception("%s: its messages cannot be read", replica.name)
        channel.close()
        self._replica_ended(replica)

    def _add_token(self, replica: Replica, update: AnswerUpdate) -> None:
        flight = replica.flights.get(update.id)
        if flight is None:
            return
        answer = flight.answer
        if update.logprobs is not None:
            answer.logprobs.append(update.logprobs)
        if update.prompt_logprobs is not None:
            answer.prompt_logprobs = update.prompt_logprobs
        if update.embedding is not None:
            import torch

            answer.embedding = torch.from_numpy(update.embedding)
        answer.add(update.token, update.reason)

    def _take_event(self, replica: Replica, update: SchedulerUpdate) -> None:
        flight = replica.flights.get(update.id)
        if flight is None:
            return
        request, record = flight.request, flight.record
        what: object = record
        if update.kind == "refused":
            what = flight.answer.refusal = update.changed["reason"]
        elif update.kind in ("finished", "withdrawn"):
            what = Completion(request, **flight.follow(update.changed))
        else:
            for name, value in flight.follow(update.changed).items():
                setattr(record, name, value)
        if update.kind == "reread":
            flight.predicted_anew()
        if update.kind in ("finished", "withdrawn", "refused"):
            with self._lock:
                replica.flights.pop(update.id, None)
                self._flights.pop(update.id, None)
            replica.finished += update.kind == "finished"
            if update.kind == "refused":
                flight.answer.add(None, "refused")
        self._observe(Event(update.time_s, update.kind, update.id, what))

    def _note_copied(self, replica: Replica, message: CopiedTokens) -> None:
        replica.copied_tokens = message.tokens

    def _note_failure(self, replica: Replica, message: ReplicaFailed) -> None:
        replica.reason = message.reason

    def _become_ready(self, replica: Replica, message: ReplicaReady) -> None:
        self._pooled.restore(replica)
        with self._changed:
            replica.ready, replica.state = message, READY
            replica.ready_s = time.monotonic()
            replica.job = replace(replica.job, probe=None)  # not when it is started again
            for flight in self._flights.values():
                if flight.replica is None and flight.is_queued:
                    self._assign(flight)
            self._changed.notify_all()
        if replica.restarts:
            log.warning("%s is ready again, after %.1f s", replica.name, message.seconds)

    def _replica_ended(self, replica: Replica) -> None:
        """Give its requests away, and start it again."""
        assert replica.process is not None
        replica.kill()  # where its pipe has ended and it has not
        code = replica.process.wait()
        with self._changed:
            was_ready = replica.state == READY
            served_s = time.monotonic() - replica.ready_s
            replica.state = ENDED
            moved, replica.flights = list(replica.flights.values()), {}
            self._changed.notify_all()
            is_stopping = self._stopping
        self._pooled.left(replica)  # else a load would wait for it, and the process's end for that
        if is_stopping:
            return
        reason = replica.reason or f"it ended with exit code {code}"
        if was_ready:
            replica.failures = 0 if served_s > STEADY_S else replica.failures + 1
        else:
            replica.failures += 1
        if not was_ready and not replica.restarts:
            replica.reason = reason
            return  # `open` raises it
        log.warning("%s has ended: %s; %d request(s) go on", replica.name, reason, len(moved))
        for flight in moved:
            self._move(flight)
        self._start_again(replica, reason)

    def _move(self, flight: Flight) -> None:
        """Give a request whose replica has ended to another one."""
        answer, was_admitted = flight.answer, flight.record.admitted_s >= 0
        flight.leave_replica()
        if answer.reason is not None:  # its last event is all that was missing
            self._end(flight, answer.reason)
            return
        if flight.moves >= MOST_MOVES:
            log.error("request %s: %d replicas have ended with it", flight.request.id, flight.moves)
            self._end(flight, "failed")
            return
        if was_admitted:
            self._observe(Event(self.clock.now_s(), "preempted", flight.request.id, flight.record))
        with self._lock:
            self.requeued += 1
            self._assign(flight)

    def _start_again(self, replica: Replica, reason: str) -> None:
        replica.restarts += 1
        if all(other.failures >= MOST_FAILURES for other in self.replicas):
            self._give_up(reason)
            return
        wait_s = replica.next_wait_s()
        log.warning("%s is started again in %g s", replica.name, wait_s)
        timer = threading.Timer(wait_s, self._restart, [replica])
        timer.daemon = True
        timer.start()

    def _restart(self, replica: Replica) -> None:
        with self._lock:
            if not self._stopping:
                self._start(replica)

    def _give_up(self, reason: str) -> None:
        self.failure = f"every replica has failed {MOST_FAILURES} times in a row: {reason}"
        with self._lock:
            left = list(self._flights.values())
        for flight in left:
            self._end(flight, "failed")
        self._failed()

    def stop(self, timeout_s: float) -> bool:
        self.cancel_all()
        with self._lock:
            self._stopping = True
        until = time.monotonic() + timeout_s
        for replica in self.replicas:
            replica.send(EndReplica())
        in_time = True
        for replica in self.replicas:
            if replica.process is None:
                continue
            try:
                replica.process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                in_time = False
                replica.kill()
                replica.process.wait()
        return in_time
