"""The data types that all of serving shares, and which part of it writes each of their fields.

Times are in seconds, lengths in tokens of the served model.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks. Made by whatever receives it (server, workload) and never changed.

    Attributes:
        arrival_s: when it arrives; every latency counts from here.
        slo_s: the latency objective: the whole answer is due so many seconds after its arrival.
        prediction: of its answer's length; None for policies that use none.
        output_tokens: the true length. Only an engine, and a policy that is declared an oracle, may
            read it.
        predict_s: how long its prediction takes: a scheduler sees the request that much after its
            arrival.
        priority: requests of a lower one leave the queue first, whatever the policy; what runs is
            not preempted for them.
        generated: answer tokens that were made before it came here, by a replica that has ended.
        cached_tokens: of its prompt, tokens whose KV is there already; a simulated engine alone
            reads it, a real one looks for itself.
    """

    id: int
    prompt_tokens: int
    arrival_s: float
    slo_s: float
    prediction: "LengthPrediction | None" = None
    output_tokens: int = 1
    predict_s: float = 0.0
    priority: int = 0
    generated: int = 0
    cached_tokens: int = 0

    @property
    def deadline_s(self) -> float:
        return self.arrival_s + self.slo_s


@dataclass(frozen=True)
class Limits:
    """What an engine can hold; no plan may exceed it.

    Attributes:
        max_batch: sequences at once.
        kv_tokens: the KV cache, over all sequences.
        max_tokens: prompt and answer of one sequence; longer answers are truncated. At most
            kv_tokens, so that any one sequence fits.
        prefill_tokens: prompt tokens computed between two decode steps (chunked prefill), unless a
            plan sets another number.
    """

    max_batch: int = 64
    kv_tokens: int = 100_000
    max_tokens: int = 32_768
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        smallest = min(self.max_batch, self.max_tokens, self.prefill_tokens)
        if smallest < 1 or self.max_tokens > self.kv_tokens:
            raise ValueError(
                "wanted max_batch, prefill_tokens >= 1 and 1 <= max_tokens <= kv_tokens; "
                f"got {self}"
            )

    def max_answer_tokens(self, request: Request, stop_tokens: int | None = None) -> int:
        """Answer tokens after which an answer is truncated."""
        most = self.max_tokens - request.prompt_tokens
        return most if stop_tokens is None else min(most, stop_tokens)

    def refusal(self, request: Request) -> str | None:
        """Why this request can never be served; None where it can."""
        if request.prompt_tokens < self.max_tokens:
            return None
        return (
            f"request {request.id}: a prompt of {request.prompt_tokens} tokens leaves no room "
            f"for an answer within {self.max_tokens} tokens"
        )


@dataclass(slots=True, eq=False)
class Record:
    """What the scheduler keeps of a request; the scheduler writes it, policies and engines read it.

    Attributes:
        length: answer tokens that the policy expects; computed once, at arrival.
        prediction: of the whole answer's length, by what is known now: the request's, until an
            engine that re-reads answers (StepResult.reread) gives a newer one.
        key, until_s: place in the queue among those of its priority, and the time until which that
            key holds.
        generated: answer tokens when it last stopped running (preemption discards the KV
            cache, not the text).
        base_tokens: KV tokens at its last admission: prompt, earlier answer, and in a static batch
            the padding before them.
        reserved_tokens: KV tokens reserved for it; 0 while it waits.
        overruns: how often the answer outgrew its reservation.
    """

    request: Request
    length: float = 1.0
    prediction: "LengthPrediction | None" = None
    key: float = 0.0
    until_s: float = FOREVER
    version: int = 0
    waiting: bool = True
    generated: int = 0
    base_tokens: int = 0
    reserved_tokens: int = 0
    most_reserved_tokens: int = 0
    admitted_s: float = -1.0
    first_admitted_s: float = -1.0
    first_token_s: float = -1.0
    preemptions: int = 0
    overruns: int = 0

    def __post_init__(self) -> None:
        if self.prediction is None:
            self.prediction = self.request.prediction

    @property
    def context_tokens(self) -> int:
        """Tokens that a prefill must compute before it can continue."""
        return self.request.prompt_tokens + self.generated


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that start together, leave together and are padded to one shape.

    Static policies make batches; `Static` turns the first one into a plan.

    Attributes:
        reserve_tokens: KV tokens of each row, its padding included; as many as records.
        stop_tokens: answers are truncated after so many tokens (the released UELLM does so); None
            never truncates them.
    """

    records: tuple[Record, ...]
    reserve_tokens: tuple[int, ...]
    stop_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at: the scheduler's own structures, not a copy. Read it, keep nothing.

    Attributes:
        waiting: iterates in the order of priorities, then the policy's keys, at O(log n) an
            element; len(). Of those of the lowest priority there is: .oldest() is the record that
            arrived first, .most_urgent() are all, in no order, .backlog() is their work.
        running: records by request id.
        overran: running records whose answers fill their reservation: the plan must reserve more
            for them or preempt them.
        kv_free_tokens: not reserved.
        generated: answer tokens of a running record so far, those before a preemption included.
        computed: of a running record's context_tokens, how many are computed.
        pace_s: recent seconds between two tokens of a running answer; 0 before there are any.
    """

    now_s: float
    waiting: "Waiting"
    running: Mapping[int, Record]
    overran: tuple[Record, ...]
    kv_free_tokens: int
    limits: Limits
    generated: Callable[[Record], int]
    computed: Callable[[Record], int]
    pace_s: float = 0.0


class Backlog(NamedTuple):
    """The work of waiting requests.

    Attributes:
        requests: their number.
        context_tokens: prompts, and answers that a preemption discarded.
        answer_tokens: of whole answers, as the policy expects them (Record.length).
    """

    requests: int
    context_tokens: int
    answer_tokens: float


class Waiting(Protocol):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Record]: ...
    def oldest(self) -> Record: ...
    def most_urgent(self) -> Collection[Record]: ...
    def backlog(self) -> Backlog: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do until the next event: preempt, then reserve, then admit.

    Made by a policy, carried out by the scheduler and its engine.

    Attributes:
        reserve_tokens: KV tokens by request id, of all that are admitted and of running ones that
            get more. They hold the whole prompt and an answer's token, but where horizon_steps is
            1: then what the one step computes of the prompt.
        prefill_tokens: prompt tokens between two decode steps; None for the limit's.
        together: admit as a static batch: padded to the longest prompt, leaving when the last row
            ends. Only onto an empty engine.
        stop_tokens: with together: answers are truncated after so many tokens.
        horizon_steps: plan again after so many decode steps, whatever happens.
        wake_s: plan again at this time, whatever happens.
        wake_on_arrival: plan again when a request arrives.
    """

    admit: tuple[Record, ...] = ()
    preempt: tuple[Record, ...] = ()
    reserve_tokens: Mapping[int, int] = field(default_factory=dict)
    prefill_tokens: int | None = None
    together: bool = False
    stop_tokens: int | None = None
    horizon_steps: int | None = None
    wake_s: float = FOREVER
    wake_on_arrival: bool = True

    @property
    def longest_context_tokens(self) -> int:
        """Of the admitted records; 0 where there are none."""
        return max((record.context_tokens for record in self.admit), default=0)


class StepResult(NamedTuple):
    """What an engine did in one step.

    Attributes:
        elapsed_s: seconds it took.
        emitted_tokens: answer tokens made.
        started: (request id, seconds from the step's start) of each first token.
        finished: (request id, tokens of the answer, whether it was truncated) of each answer that
            finished, at the step's end.
        overran: request ids of the rows that fill their reservation, at the step's end.
        reread: (request id, the newer prediction of its whole length) of the answers whose hidden
            states were read in the step, each at most once.
    """

    elapsed_s: float
    emitted_tokens: int = 0
    started: tuple[tuple[int, float], ...] = ()
    finished: tuple[tuple[int, int, bool], ...] = ()
    overran: tuple[int, ...] = ()
    reread: "tuple[tuple[int, LengthPrediction], ...]" = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer; made by the scheduler.

    Attributes:
        admitted_s: when it first left the queue.
        reserved_tokens: the most KV tokens reserved for it.
        cut: it was truncated at a limit and did not reach its own end.
    """

    request: Request
    admitted_s: float
    first_token_s: float
    finish_s: float
    output_tokens: int
    reserved_tokens: int
    preemptions: int
    overruns: int
    cut: bool

    @property
    def latency_s(self) -> float:
        return self.finish_s - self.request.arrival_s

    @property
    def in_time(self) -> bool:
        """A whole answer, within its objective."""
        return not self.cut and self.finish_s <= self.request.deadline_s


class Event(NamedTuple):
    """One line of a run's log.

    Attributes:
        kind: arrived, refused, withdrawn (while it waited), admitted, preempted, overran, grew (a
            plan reserves more for it while it runs), reread (its length is predicted anew), started
            or finished; turn after each step, where it is asked for.
        what: the record; for refused the reason, for withdrawn and finished the completion.
    """

    time_s: float
    kind: str
    id: int
    what: object


class CostEstimator(Protocol):
    """Seconds and bytes of one placed model; serving.cost_model has the calibrated one.

    Tokens are sums over the batch, and prefill_s(0) is 0. decode_s is the closed form of steps in
    which every sequence's context grows by one token a step. chunk_s is what `tokens` of a prompt,
    after `start` others of it, add to a pass with `rows` tokens in it; it is prefill_s(tokens)
    where they are its first and only ones.
    """

    @property
    def kv_capacity_tokens(self) -> int: ...
    def prefill_s(self, tokens: int, batch: int = 1) -> float: ...
    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float: ...
    def decode_step_s(self, batch: int, context_tokens: int) -> float: ...
    def decode_s(self, batch: int, context_tokens: int, steps: int) -> float: ...


class Moment(NamedTuple):
    """What a policy may look at when it places a request in the queue.

    Attributes:
        pace_s: as View's.
        cost, limits: the engine's.
    """

    now_s: float
    pace_s: float
    cost: CostEstimator
    limits: Limits


class Policy(Protocol):
    """A frozen dataclass that decides by its fields, the view and the cost model; writes nothing.

    Attributes:
        predicts: it reads predictions, so the time to make them is charged.
    """

    @property
    def predicts(self) -> bool: ...

    def length(self, request: Request) -> float:
        """Answer tokens to expect."""

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        """(key, until_s): smaller keys are served first.

        Computed again once until_s has passed; the key may only have grown by then.
        """

    def __call__(self, view: View, cost: CostEstimator) -> Plan: ...


class Engine(Protocol):
    """Runs sequences: the simulated one, or one of the real ones."""

    limits: Limits
    cost: CostEstimator

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """Carry out the plan, then decode.

        Ends when an answer finishes, a reservation is full, or budget_s seconds have passed.
        """

    def generated(self, record: Record) -> int: ...
    def computed(self, record: Record) -> int: ...


class Arrivals(Protocol):
    """Where requests come from: a recorded list (scheduler.Replay) or a live inbox.

    Attributes:
        closed: no request arrives any more.
    """

    @property
    def closed(self) -> bool: ...

    def next_s(self) -> float:
        """When the next request can be seen, or when to ask again; FOREVER where none comes."""

    def due(self, now_s: float) -> list[Request]:
        """The requests that can be seen by now, each returned once."""

    def withdrawn(self) -> Sequence[int]:
        """Ids of requests that were cancelled since the last call."""


class Clock(Protocol):
    def now_s(self) -> float: ...
    def advance(self, seconds: float) -> None: ...
    def wait_until(self, time_s: float) -> None: ...
