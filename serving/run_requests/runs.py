"""One run of a list: requests are submitted when they arrive, and what becomes of them is recorded.

Free of torch. What answers is an AnswerBackend: an engine of this process, or several replicas.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from predictor.prediction import LengthPrediction
from serving.engines.answers import Answer, Sampling, TextEngine
from serving.engines.runner import AnswerBackend, EngineRunner
from serving.request import Completion, Event, Policy, Record, Request
from serving.simulate.statistics import Collector

if TYPE_CHECKING:
    from serving.replicas.pool import ReplicaPool

POLL_S = 0.5  # how soon a failed backend is noticed
SETTLED = 10  # times POLL_S in which no event follows the end of the last answer
STOP_S = 30.0  # what the last step may take after Ctrl-C
WARM_TOKENS = 4

Predict = Callable[[list[str]], list[LengthPrediction]]
# Policy's name -> what answers by it, for one run.
OpenBackend = Callable[[str], AbstractContextManager[AnswerBackend]]


@dataclass(frozen=True)
class PreparedRequest:
    """A row of the list, ready to be submitted.

    Attributes:
        number: of its row in the list, from 0; the request's id.
        length: the prediction that its row brings along; None where there is a predictor.
    """

    number: int
    prompt: str
    prompt_ids: list[int]
    arrival_s: float
    slo_s: float
    sampling: Sampling
    length: LengthPrediction | None = None


@dataclass
class Admission:
    """Requests that were admitted together, at one time.

    Attributes:
        numbers: of their rows.
        made: answer tokens that each has got since, by number.
    """

    admitted_s: float
    numbers: list[int] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of its longest answer: what all of its rows take, padded."""
        return max(self.made.values(), default=0)

    @property
    def padded_tokens(self) -> int:
        """UELLM's padded output: rows times the longest answer."""
        return len(self.numbers) * self.longest


@dataclass(eq=False)
class RunRecord:
    """What happened in a run, from the events of the scheduler.

    Attributes:
        admissions: by their time; of a static policy they are its batches.
        completions: by number. refused: the reason, by number.
        predicted: expected answer tokens by number.
        predict_s: seconds that predictions took, all together.
        zero_s: when the run began, by the backend's clock; all times of events are by that clock.
        total_s: seconds of the whole run.
    """

    collector: Collector = field(default_factory=Collector)
    admissions: dict[float, Admission] = field(default_factory=dict)
    completions: dict[int, Completion] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    predicted: dict[int, float] = field(default_factory=dict)
    predict_s: float = 0.0
    zero_s: float = 0.0
    total_s: float = 0.0
    _running: dict[int, tuple[Admission, int]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, event: Event) -> None:
        """Record an event; the backend calls it in one thread."""
        with self._changed:
            self._take(event)
            self._changed.notify_all()

    def wait_for_more(self, seen: int, timeout_s: float) -> int:
        """How many requests have ended: more than `seen`, or what there are after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended() > seen, timeout_s)
            return self._ended()

    def _ended(self) -> int:
        return len(self.completions) + len(self.refused)

    def _take(self, event: Event) -> None:
        self.collector(event)
        what = event.what
        if event.kind == "refused":
            self.refused[event.id] = str(what)
        elif event.kind == "admitted":
            assert isinstance(what, Record)
            self._admit(event, what)
        elif event.kind == "preempted":
            assert isinstance(what, Record)
            self._leave(event.id, what.generated)
        elif event.kind == "finished":
            assert isinstance(what, Completion)
            self._leave(event.id, what.output_tokens)
            self.completions[event.id] = what

    def _admit(self, event: Event, record: Record) -> None:
        # By time, not by order: the events of several replicas come mixed.
        admission = self.admissions.setdefault(event.time_s, Admission(event.time_s))
        admission.numbers.append(event.id)
        self._running[event.id] = admission, record.generated

    def _leave(self, number: int, tokens: int) -> None:
        admission, before = self._running.pop(number)
        admission.made[number] = tokens - before

    def batches(self) -> list[Admission]:
        """The admissions in order of time."""
        return [self.admissions[time_s] for time_s in sorted(self.admissions)]


@contextmanager
def running_engine(
    engine: TextEngine, policy: Policy, on_error: Callable[[BaseException], None] | None = None
) -> Iterator[AnswerBackend]:
    """A backend of this process for one run; it ends with the block."""
    runner = EngineRunner(engine, policy, on_error=on_error)
    try:
        yield runner
    finally:
        runner.stop(STOP_S)


@contextmanager
def rescheduled_pool(pool: "ReplicaPool", policy: str) -> Iterator[AnswerBackend]:
    """Open replicas for one run under a policy."""
    while pool.count():  # the last events of the run before
        time.sleep(POLL_S)
    pool.use_policy(policy)
    yield pool


def warm_up(
    open_backend: OpenBackend, requests: Sequence[PreparedRequest], policy: str = "fcfs"
) -> None:
    """A few tokens of a few requests, so that the first policy does not pay for first calls."""
    first = []
    for request in requests[:4]:
        sampling = Sampling(WARM_TOKENS, ignore_stops=True)
        first.append(
            PreparedRequest(request.number, request.prompt, request.prompt_ids, 0.0, 60.0, sampling)
        )
    with open_backend(policy) as backend:
        run_list(backend, first, None, False)


def run_list(
    backend: AnswerBackend,
    requests: Sequence[PreparedRequest],
    predict: Predict | None,
    predicts: bool,
    on_answer: Callable[[], object] = lambda: None,
    starts_idle: bool = True,
) -> RunRecord:
    """Submit the requests when they arrive, and wait for all answers.

    Args:
        requests: by arrival.
        predict: a predictor, asked when requests arrive: its seconds count. None: rows bring
            their lengths along, at no cost.
        predicts: the policy reads predictions.
        on_answer: called after each answer that has ended.
        starts_idle: nothing is answered before backend.start, so that the policy sees at once all
            that arrives first. False: replicas that are open already answer as requests come.
    Raises:
        RuntimeError: the backend has failed.
    """
    record = RunRecord(zero_s=backend.clock.now_s())
    answers: list[Answer] = []
    started = not starts_idle
    if started:
        backend.start(record, lambda: None)
    while len(answers) < len(requests):
        now_s = backend.clock.now_s() - record.zero_s
        due = requests_due(requests, len(answers), now_s)
        if not due:
            check_alive(backend)
            left_s = requests[len(answers)].arrival_s - now_s
            time.sleep(min(max(left_s, 0.0), POLL_S))
            continue
        answers += submit_all(backend, due, predict, predicts, record)
        if not started:
            backend.start(record, lambda: None)
            started = True
    await_answers(backend, answers, record, on_answer)
    record.total_s = backend.clock.now_s() - record.zero_s
    return record


def await_answers(
    backend: AnswerBackend,
    answers: Sequence[Answer],
    record: RunRecord,
    on_answer: Callable[[], object],
) -> None:
    """Wait until the record has every answer's end. Raises RuntimeError as `run_list`."""
    seen = quiet = 0
    while seen < len(answers) and quiet < SETTLED:
        ended = record.wait_for_more(seen, POLL_S)
        for _ in range(ended - seen):
            on_answer()
        if ended == seen:
            check_alive(backend)
            # An answer that was lost with its replica has no event of its end.
            quiet += all(answer.reason is not None for answer in answers)
        seen = ended
    check_alive(backend)


def requests_due(
    requests: Sequence[PreparedRequest], place: int, now_s: float
) -> list[PreparedRequest]:
    """The requests from this place on that have arrived by now, in seconds from the start."""
    due = []
    for request in requests[place:]:
        if request.arrival_s > now_s:
            break
        due.append(request)
    return due


def check_alive(backend: AnswerBackend) -> None:
    """Raises RuntimeError where the backend has failed."""
    if backend.failure is not None:
        raise RuntimeError(backend.failure)


def submit_all(
    backend: AnswerBackend,
    due: Sequence[PreparedRequest],
    predict: Predict | None,
    predicts: bool,
    record: RunRecord,
) -> list[Answer]:
    """Predict, where the policy reads predictions, and submit; the answers in their order."""
    predictions: list[LengthPrediction | None] = [None] * len(due)
    if predicts and predict is None:
        predictions = [one.length for one in due]
    elif predicts and predict is not None:
        begin = time.perf_counter()
        predictions = list(predict([one.prompt for one in due]))
        record.predict_s += time.perf_counter() - begin
    answers = []
    for one, prediction in zip(due, predictions):
        if prediction is not None:
            record.predicted[one.number] = prediction.expected_tokens
        arrival_s = record.zero_s + one.arrival_s
        request = Request(one.number, len(one.prompt_ids), arrival_s, one.slo_s, prediction)
        answers.append(backend.submit(request, one.prompt_ids, one.sampling))
        backend.enqueue(request)
    return answers
