"""Answers made by the continuous engine, also with their hidden states, for collect_lengths.py."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from serving.engines import Inbox, Sampling, WallClock
from serving.engines.answers import Answer
from serving.policies.continuous import Fcfs
from serving.request import FOREVER, Event, Limits, Request
from serving.scheduler import run_scheduler
from serving.simulate.engine import LinearCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer
    from serving.engines.state_tap import StateReading, StateTap

PREFILL_TOKENS = 512  # prompt tokens of a pass, at most


class CollectedAnswer(NamedTuple):
    """An answer to the prompt `number`.

    Attributes:
        ids: without the end token.
        finished: the end token came.
        readings: the states at its start and every so many tokens; none without a tap.
    """

    number: int
    ids: list[int]
    finished: bool
    readings: "list[StateReading]"


def continuous_answers(
    model: "PreTrainedModel",
    tap: "StateTap | None",
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    tokenizer: "FamilyTokenizer",
    batch_size: int,
) -> Iterator[CollectedAnswer]:
    """The answers as they end; `batch_size` are made at once, begun in the order of the prompts.

    Args:
        tap: reads the states.
    Raises:
        ValueError: the continuous engine cannot run the model, or it has no such layers.
        RuntimeError: an answer failed.
    """
    from chatglm.loading import stop_ids
    from serving.engines.continuous_engine import ContinuousEngine

    longest = 2  # what Limits wants at least
    for prompt, sampling in zip(prompts, samplings):
        longest = max(longest, len(prompt) + (sampling.max_new_tokens or 0) + 1)
    # Room for all: nothing is preempted.
    limits = Limits(batch_size, 2 * batch_size * longest, longest, PREFILL_TOKENS)
    cost = LinearCost()  # the policy does not read it
    engine = ContinuousEngine(model, limits, cost, stop_ids(tokenizer), tap=tap)
    clock = WallClock()
    inbox = Inbox(clock, engine)
    answers: dict[int, Answer] = {}
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings)):
        request = Request(number, len(prompt), 0.0, FOREVER)
        answers[number] = engine.submit(request, prompt, sampling)
        inbox.put(request)
    inbox.close()
    events = run_scheduler(Fcfs(), engine, clock, inbox)
    return ended_answers(events, tap, answers)


def ended_answers(
    events: Iterator[Event], tap: "StateTap | None", answers: dict[int, Answer]
) -> Iterator[CollectedAnswer]:
    """The answers whose end is among the events; their number is the request's id."""
    readings: dict[int, list[StateReading]] = {}
    for event in events:
        for reading in tap.take() if tap else ():
            readings.setdefault(reading.request_id, []).append(reading)
        if event.kind == "finished":
            yield finished_answer(answers.pop(event.id), readings.pop(event.id, []))


def finished_answer(answer: Answer, readings: "list[StateReading]") -> CollectedAnswer:
    """An ended answer without its end token, and the readings before its end."""
    finished = answer.reason == "stop"
    if not finished and answer.reason != "length":
        raise RuntimeError(f"the answer to prompt {answer.id} ended: {answer.reason}")
    ids = answer.tokens[:-1] if finished else answer.tokens
    within = [reading for reading in readings if reading.at == 0 or reading.at < len(ids)]
    return CollectedAnswer(answer.id, ids, finished, within)
