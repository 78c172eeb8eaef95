"""A replica: a process with a model, its engine and its scheduler, that a front process gives work.

    python -m serving.replicas.process

The command is the pool's (serving.replicas.pool). Its standard input is a socket of the front; the
first message is a ReplicaJob.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from chatglm.commands import describe
from serving.deployment.placement import Need
from serving.engines import Answer, Sampling, TextEngine, WallClock
from serving.engines.answers import vocabulary_of
from serving.engines.constraints import Grammar, TokenVocabulary
from serving.engines.pipeline import open_pipeline
from serving.engines.runner import EngineRunner
from serving.engines.stage_reports import StageReport
from serving.policies.continuous import POLICIES
from serving.replicas.measuring import StageTiming, time_batch
from serving.replicas.messages import (
    AnswerUpdate,
    CancelAnswer,
    Channel,
    CopiedTokens,
    EndReplica,
    LoadLora,
    LoraResult,
    ReplicaFailed,
    ReplicaJob,
    ReplicaReady,
    SchedulerUpdate,
    SubmitAnswer,
    UnloadLora,
    UsePolicy,
    UseVocabulary,
    slim_event,
)
from serving.request import Event

log = logging.getLogger(__name__)

LAST_WORDS_S = 5.0  # for the reason of a failure to be written
KEPT_GRAMMARS = 64
PROBES = 2  # timings of a probe, after one that warms up
IDLE_S = 10.0  # for an engine with nothing to do to end its step


def load_engine(job: ReplicaJob) -> TextEngine:
    """The engine of a job on its devices; of a pipeline the other stages are processes too.

    Raises:
        ValueError, OSError, MemoryError: what does not fit, or is missing.
    """
    served, stages = job.served, job.placement.stages
    if len(stages) == 1:
        [stage] = stages
        return served.load_engine(job.limits, stage.device, stage.threads, job.cost)
    if served.engine != "continuous":
        raise ValueError(f"--engine {served.engine} cannot run a pipeline; continuous can")
    return open_pipeline(
        served.loading,
        job.placement,
        job.limits,
        job.cost,
        prefix_cache_tokens=served.prefix_cache_tokens,
    )


class ReplicaWorker:
    """Carries out a front's messages on a loaded engine.

    Attributes:
        runner: the policy and the engine, in a thread of their own.
    """

    def __init__(self, channel: Channel, job: ReplicaJob, engine: TextEngine) -> None:
        self.channel = channel
        self.engine = engine
        self.clock = WallClock()
        self.clock.zero_s = job.zero_s
        self.runner = EngineRunner(engine, POLICIES[job.served.policy], self.clock, self._lost)
        self._vocabulary: TokenVocabulary | None = None
        self._grammars: dict[str, Grammar] = {}
        self._copied_tokens = 0

    def serve(self) -> None:
        """Until the front says so, or has gone."""
        self.runner.start(self._observe, lambda: None)
        handlers: dict[type, Callable[[Any], None]] = {
            SubmitAnswer: self._submit,
            CancelAnswer: lambda message: self.runner.cancel(message.id),
            LoadLora: self._load_adapter,
            UnloadLora: self._unload_adapter,
            UseVocabulary: self._use_vocabulary,
            UsePolicy: self._use_policy,
        }
        while True:
            for message in self.channel.receive():
                if isinstance(message, EndReplica):
                    return
                handlers[type(message)](message)

    def _submit(self, message: SubmitAnswer) -> None:
        request = message.request
        try:
            sampling = message.sampling
            if message.grammar is not None:
                sampling = replace(sampling, grammar=self._grammar(message.grammar))
            listener = partial(self._token_made, sampling)
            answer = self.runner.submit(request, message.prompt, sampling, listener)
            answer.tokens += message.made
            self.runner.enqueue(request)
        except (ValueError, RuntimeError) as error:
            reason = {"reason": describe(error)}
            now_s = self.runner.clock.now_s()
            self.channel.send(SchedulerUpdate(now_s, "refused", request.id, reason))

    def _token_made(self, sampling: Sampling, answer: Answer, token: int | None) -> None:
        """The listener of an answer, in the engine's thread."""
        logprobs = None
        if sampling.logprobs is not None and token is not None and answer.logprobs:
            logprobs = answer.logprobs[-1]
        prompt_logprobs, embedding = None, None
        if answer.reason is not None:
            prompt_logprobs = answer.prompt_logprobs or None
            if answer.embedding is not None:
                embedding = answer.embedding.cpu().numpy()
        update = AnswerUpdate(answer.id, token, answer.reason, logprobs, prompt_logprobs, embedding)
        self.channel.send(update)

    def _observe(self, event: Event) -> None:
        self.channel.send(slim_event(event))
        copied = self.runner.copied_tokens()
        if copied != self._copied_tokens:
            self._copied_tokens = copied
            self.channel.send(CopiedTokens(copied))

    def _grammar(self, source: str) -> Grammar:
        """A compiled grammar; those that were used last are kept."""
        found = self._grammars.pop(source, None)
        if found is None:
            assert self._vocabulary is not None  # sent before the first grammar
            found = Grammar(source, self._vocabulary)
        self._grammars[source] = found
        if len(self._grammars) > KEPT_GRAMMARS:
            del self._grammars[next(iter(self._grammars))]
        return found

    def _use_policy(self, message: UsePolicy) -> None:
        self.runner.stop(IDLE_S)
        self.runner = EngineRunner(self.engine, POLICIES[message.name], self.clock, self._lost)
        self.runner.start(self._observe, lambda: None)

    def _use_vocabulary(self, message: UseVocabulary) -> None:
        self._vocabulary = TokenVocabulary(message.tokens, message.stop_ids)

    def _load_adapter(self, message: LoadLora) -> None:
        adapters = self.runner.adapters
        assert adapters is not None
        self._reply(message.number, lambda: adapters.load(message.name, message.folder))

    def _unload_adapter(self, message: UnloadLora) -> None:
        adapters = self.runner.adapters
        assert adapters is not None
        self._reply(message.number, lambda: adapters.unload(message.name))

    def _reply(self, number: int, work: Callable[[], None]) -> None:
        error = None
        try:
            work()
        except Exception as raised:
            error = (type(raised).__name__, describe(raised))
        self.channel.send(LoraResult(number, error))

    def _lost(self, error: BaseException) -> None:
        """The engine has failed: the process ends at once, and the front gives its work away."""
        what = f"the engine has failed: {type(error).__name__}: {describe(error)}"
        self.channel.send(ReplicaFailed(what))
        self.channel.flush(LAST_WORDS_S)
        os._exit(1)


def taken_by(
    engine: TextEngine, probe: Need | None
) -> tuple[tuple[StageReport, ...], tuple[StageTiming, ...] | None]:
    """What the stages of an engine hold, and what they take for a batch."""
    make_reports: Callable[[], list[StageReport]] | None = getattr(engine, "stage_reports", None)
    if make_reports is None:
        return (), None
    if probe is None:
        return tuple(make_reports()), None
    timing = time_batch(engine, probe, PROBES)
    reports = []
    for report, kv_bytes in zip(make_reports(), timing.kv_bytes):
        reports.append(replace(report, kv_bytes=kv_bytes))
    return tuple(reports), timing.stages


def run_replica(connection: Connection) -> int:
    """Load, serve, end; the exit code."""
    channel = Channel(connection)
    try:
        job: ReplicaJob = channel.receive()[0]
        begin = time.perf_counter()
        engine = load_engine(job)
        loaded_s = time.perf_counter() - begin
    except EOFError:
        return 0
    except Exception as error:  # whatever it is, the front has to say it
        if not isinstance(error, (ValueError, OSError, ImportError)):  # the user's errors
            log.exception("replica %s cannot be loaded", os.getpid())
        channel.send(ReplicaFailed(describe(error)))
        channel.flush(LAST_WORDS_S)
        return 1
    worker = ReplicaWorker(channel, job, engine)
    reports, timings = taken_by(engine, job.probe)
    ready = ReplicaReady(
        worker.runner.stop_ids,
        vocabulary_of(engine.model),
        worker.runner.adapters is not None,
        getattr(engine.model.config, "chat_prompt", None),
        loaded_s,
        reports,
        timings,
    )
    channel.send(ready)
    with suppress(EOFError):  # the front has ended, however it did
        worker.serve()
    return 0


def take_standard_input() -> Connection:
    """The socket that is this process's standard input, which nothing else reads then."""
    connection = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the front drains
        signal.signal(number, signal.SIG_IGN)
    code = run_replica(take_standard_input())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the engine's thread may be within a step


if __name__ == "__main__":
    main()
