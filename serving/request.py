"""The nouns of serving, and who owns each of their fields. Times are seconds, lengths tokens of the served model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from predictor.prediction import LengthPrediction

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. Made by whoever received it (server, workload); nobody changes it.

    Attributes:
        arrival_s: when it came; every latency counts from here.
        slo_s: within how many seconds of its arrival the whole answer is wanted.
        prediction: of its answer's length; None for policies that ask for none.
        output_tokens: the true length. Only an engine, and a policy that says it is an oracle, may read it.
        predict_s: how long its prediction took: a scheduler sees the request that much after its arrival.
    """

    id: int
    prompt_tokens: int
    arrival_s: float
    slo_s: float
    prediction: LengthPrediction | None = None
    output_tokens: int = 1
    predict_s: float = 0.0

    @property
    def deadline_s(self) -> float:
        return self.arrival_s + self.slo_s


@dataclass(frozen=True)
class Limits:
    """What an engine can hold; never broken by a plan.

    Attributes:
        max_batch: sequences at once.
        kv_tokens: the KV cache, over all sequences.
        max_tokens: prompt and answer of one sequence; answers are cut off there. At most kv_tokens, so that any one sequence fits.
        prefill_tokens: prompt tokens computed between two decode steps (chunked prefill), unless a plan says otherwise.
    """

    max_batch: int = 64
    kv_tokens: int = 100_000
    max_tokens: int = 32_768
    prefill_tokens: int = 2048

    def __post_init__(self):
        if (
            min(self.max_batch, self.max_tokens, self.prefill_tokens) < 1
            or self.max_tokens > self.kv_tokens
        ):
            raise ValueError(
                f"wanted max_batch, prefill_tokens >= 1 and 1 <= max_tokens <= kv_tokens; got {self}"
            )

    def most_tokens(self, request: Request, stop_tokens: int | None = None) -> int:
        """Answer tokens after which an answer is cut."""
        most = self.max_tokens - request.prompt_tokens
        return most if stop_tokens is None else min(most, stop_tokens)

    def refusal(self, request: Request) -> str | None:
        """Why this request can never be served; None where it can."""
        if request.prompt_tokens < self.max_tokens:
            return None
        return f"request {request.id}: a prompt of {request.prompt_tokens} tokens leaves no room for an answer within {self.max_tokens} tokens"


@dataclass(slots=True, eq=False)
class Record:
    """The scheduler's memory of a request it has taken. The scheduler writes it, policies and engines read it.

    Attributes:
        length: answer tokens that the policy counts on, asked of it once, at arrival.
        key, until_s: place in the queue, and until when that key holds.
        generated: answer tokens kept when it last stopped running (preemption throws the KV cache away, not the text).
        base_tokens: KV tokens at its last admission: prompt, kept answer, and in a static batch the padding before them.
        reserved_tokens: KV tokens held for it; 0 while it waits.
        overruns: how often the answer outgrew what was reserved for it.
    """

    request: Request
    length: float = 1.0
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

    @property
    def context_tokens(self) -> int:
        """What a prefill must compute to go on with it."""
        return self.request.prompt_tokens + self.generated


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that start together, leave together and are padded to one shape; a static policy's word for a plan.

    Attributes:
        reserve_tokens: KV tokens of each row, its padding included; as many as records.
        stop_tokens: answers are cut off here (the released UELLM does so); None leaves them whole.
    """

    records: tuple[Record, ...]
    reserve_tokens: tuple[int, ...]
    stop_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at. A window on the scheduler's own structures, not a copy: read it, keep nothing of it.

    Attributes:
        waiting: iterates in the order of the policy's keys, at O(log n) an element; .oldest() came first; .everyone() is all of them
            in no order; len().
        running: records by request id.
        overran: running records whose answers fill what was reserved: the plan must give them more or preempt them.
        kv_free_tokens: not reserved.
        generated: answer tokens that a running record has by now, those kept from before included.
        pace_s: seconds between two tokens of a running answer, as of late; 0 before there were any.
    """

    now_s: float
    waiting: "Waiting"
    running: Mapping[int, Record]
    overran: tuple[Record, ...]
    kv_free_tokens: int
    limits: Limits
    generated: Callable[[Record], int]
    pace_s: float = 0.0


class Waiting(Protocol):
    def __len__(self) -> int: ...
    def __iter__(self): ...
    def oldest(self) -> Record: ...
    def everyone(self): ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do until the next event. Made by a policy, carried out by the scheduler and its engine: preempt, then reserve, then admit.

    Attributes:
        reserve_tokens: KV tokens by request id, of everyone admitted and of running ones that get more.
        prefill_tokens: prompt tokens between two decode steps; None for the limit's.
        together: admit as a static batch: padded to the longest prompt, leaving when the last row ends. Only onto an empty engine.
        stop_tokens: with together: answers are cut off here.
        horizon_steps: look again after so many decode steps, whatever happens.
        wake_s: look again at this time, whatever happens.
        wake_on_arrival: look again when a request arrives.
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


class StepResult(NamedTuple):
    """What an engine did: seconds it took, answer tokens made, (id, seconds from the step's start) of first tokens, (id, tokens of
    the answer, cut off before its end?) of answers finished, ids of those that fill their reservation; the last two at its end."""

    elapsed_s: float
    emitted_tokens: int = 0
    started: tuple = ()
    finished: tuple = ()
    overran: tuple = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer that is there; made by the scheduler.

    Attributes:
        admitted_s: when it first left the queue.
        reserved_tokens: the most KV tokens held for it.
        cut: it stopped at a limit, not at its own end.
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
    """One line of a run's log: kind is arrived, refused, withdrawn (while it waited), admitted,
    preempted, overran, started or finished; `what` is the record, or for refused the reason and for
    withdrawn and finished the completion."""

    time_s: float
    kind: str
    id: int
    what: object


class CostModel(Protocol):
    """Seconds and bytes of one placed model; serving.cost_model has the calibrated one. Tokens are sums over the batch, prefill_s(0)
    is 0, and decode_s is the closed form of steps in which every sequence's context grows by one token a step. chunk_s: what `tokens` of a
    prompt, after `start` others of it, add to a pass with `rows` tokens in it; prefill_s(tokens) where they are its first and only ones."""

    kv_capacity_tokens: int

    def prefill_s(self, tokens: int, batch: int = 1) -> float: ...
    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float: ...
    def decode_step_s(self, batch: int, context_tokens: int) -> float: ...
    def decode_s(self, batch: int, context_tokens: int, steps: int) -> float: ...


class Policy(Protocol):
    """A frozen dataclass, pure: its knobs, the view and the cost model decide; it writes nothing.

    Attributes:
        predicts: it reads predictions, so their making is charged.
    """

    predicts: bool

    def length(self, request: Request) -> float:
        """Answer tokens to count on."""

    def order(
        self, record: Record, now_s: float, pace_s: float, cost: CostModel
    ) -> tuple[float, float]:
        """(key, until_s): smaller keys first; asked again once until_s has passed, when the key may only have grown."""

    def __call__(self, view: View, cost: CostModel) -> Plan: ...


class Engine(Protocol):
    """Runs sequences: the simulated one, or one of the real ones."""

    limits: Limits
    cost: CostModel

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """Carry out the plan, then decode until an answer ends, a reservation is full, or budget_s seconds have gone by."""

    def generated(self, record: Record) -> int: ...


class Clock(Protocol):
    def now_s(self) -> float: ...
    def advance(self, seconds: float) -> None: ...
    def wait_until(self, time_s: float) -> None: ...
