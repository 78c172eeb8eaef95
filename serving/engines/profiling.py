"""Timings of a real engine, as rows that serving.cost_model.fit fits a profile to.

Decode steps are timed by rows and context, prefills by prompt length, and what lies between two
steps under load.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

from chatglm.families import family_of
from serving.cost_model.devices import Device
from serving.cost_model.fit import (
    PROMPT_TOKENS,
    Measurement,
    fit_profile,
    held_out_errors,
    relative_errors,
    summarize_errors,
)
from serving.cost_model.model import DATASHEET, CostModel, ModelSizes, Profile
from serving.engines import make_engine
from serving.engines.answers import Sampling, TextEngine, vocabulary_of
from serving.engines.live import WallClock
from serving.request import FOREVER, Limits, Plan, Policy, Record, Request, StepResult
from serving.scheduler import Replay, run_scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

STEPS = 12  # decode steps of one timing
# Nearly no prior: every term of a single device's cost is measured, and a CPU is nowhere near its
# datasheet.
PRIOR = 1e-4
FOLDS = 5
# Between steps: so many answers for each row of the engine, of 2 to so many tokens.
LOAD_ANSWERS, LOAD_TOKENS = 4, 24

Progress = Callable[[Iterator[Measurement | None], int], Iterator[Measurement | None]]


def no_progress(timings: Iterator[Measurement | None], total: int) -> Iterator[Measurement | None]:
    return timings


def profile_engine(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    folder: str,
    limits: Limits,
    device: Device | str,
    policy: Policy,
    repetitions: int = 5,
    progress: Progress = no_progress,
) -> tuple[Profile, list[Measurement]]:
    """Measure the engine `name` on a loaded model, and fit a profile to it.

    Args:
        folder: the model's, which the rows name.
        device: the Device, or its name, that the profile's coefficients are relative to.
        policy: whose plans are timed, of an engine `name`.
        progress: wraps the iterator of timings, given their number, for a progress bar.
    """
    shape = ModelSizes.from_config(model.config.to_dict(), model.dtype.itemsize)
    engine = make_engine(name, model, limits, CostModel.of(shape, device), [])
    prompt_of, frame = prompt_maker(tokenizer, vocabulary_of(model))
    least = max(16, frame + 1)
    longest = limits.max_tokens - STEPS - 4
    batches = powers(1, limits.max_batch)
    contexts = powers(2 * least, int(longest / 1.5))
    prompts = powers(least, longest)
    timings = measure_engine(
        engine,
        prompt_of,
        folder,
        shape.element_bytes,
        batches,
        contexts,
        prompts,
        repetitions,
        together=name == "static",
    )
    total = (len(batches) * len(contexts) + len(prompts)) * (repetitions + 1)
    rows = [row for row in progress(timings, total) if row is not None]
    described = device if isinstance(device, str) else asdict(device)
    start = replace(DATASHEET, name="engine", device=described)
    fitted = fit_profile(rows, start, PRIOR)
    folds = random.Random(0).sample(range(len(rows)), len(rows))
    held_out = held_out_errors(rows, start, lambda i, row: folds[i] % FOLDS, PRIOR)
    report = {
        "in_sample": summarize_errors(relative_errors(rows, fitted)),
        "5_folds": summarize_errors(held_out),
    }
    source = f"{len(rows)} timings of the {name} engine on {folder}"
    plan_s = measure_plan_s(engine, policy, prompt_of, least)
    return replace(fitted, plan_s=plan_s, made={"from": source, "errors": report}), rows


class TimedSteps:
    """An engine as run_scheduler drives it, with the number and the time of its steps."""

    def __init__(self, engine: TextEngine):
        self._engine, self.limits, self.cost = engine, engine.limits, engine.cost
        self.generated, self.computed = engine.generated, engine.computed
        self.count, self.seconds = 0, 0.0

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        result = self._engine.step(plan, budget_s)
        self.count += 1
        self.seconds += result.elapsed_s
        return result


def measure_plan_s(
    engine: TextEngine, policy: Policy, prompt_of: Callable[[int], list[int]], prompt_tokens: int
) -> float:
    """Seconds from the end of a step to the next one's begin, while all rows are taken."""
    draw = random.Random(0)
    longest = min(LOAD_TOKENS, engine.limits.max_tokens - prompt_tokens - 1)
    requests = []
    for number in range(LOAD_ANSWERS * engine.limits.max_batch):
        requests.append(Request(number, prompt_tokens, 0.0, FOREVER))
        sampling = Sampling(max_new_tokens=draw.randint(2, max(longest, 2)), ignore_stops=True)
        engine.submit(requests[-1], prompt_of(prompt_tokens), sampling)
    timed = TimedSteps(engine)
    began_s = time.perf_counter()
    for _ in run_scheduler(policy, timed, WallClock(), Replay(requests)):
        pass
    return (time.perf_counter() - began_s - timed.seconds) / timed.count


def spread_contexts(batch: int, context: int) -> list[int]:
    """Contexts of `batch` rows, evenly from half to one and a half of their mean."""
    return [max(round(context * (0.5 + (i + 0.5) / batch)), 1) for i in range(batch)]


def powers(least: int, most: int) -> list[int]:
    """least, twice that, ..., and most."""
    values = [least]
    while values[-1] < most:
        values.append(min(2 * values[-1], most))
    return values


def prompt_maker(
    tokenizer: "FamilyTokenizer", vocabulary: int
) -> tuple[Callable[[int], list[int]], int]:
    """(function from a length in tokens to ids of such a prompt, tokens of the prompt's frame).

    A prompt is random ids in the family's frame, without which its model cannot read it.
    """
    if tokenizer.family is None:
        raise ValueError("the tokenizer names no model family, whose prompts it should make")
    family = family_of(tokenizer)
    frame = family.encode_prompt(tokenizer, "", 1 << 20).input_ids
    draw = random.Random(0)

    def prompt_of(tokens: int) -> list[int]:
        text = [draw.randrange(vocabulary // 2) for _ in range(tokens - len(frame))]
        return text + frame if family.infills else frame + text

    return prompt_of, len(frame)


class TimingSetting(NamedTuple):
    """What is timed.

    Decode steps of `batch` rows with a mean context of `tokens`, or the prefill of `batch` prompts
    of `tokens` each.
    """

    phase: str
    batch: int
    tokens: int

    def fits(self, limits: Limits) -> bool:
        if self.phase == "prefill":
            fits_in_all = self.batch * (self.tokens + 2) <= limits.kv_tokens
            return fits_in_all and self.tokens + 2 <= limits.max_tokens
        return (
            self.batch <= limits.max_batch
            and max(spread_contexts(self.batch, self.tokens)) + STEPS + 4 <= limits.max_tokens
            and self.batch * (self.tokens + STEPS + 5) <= limits.kv_tokens
        )

    def measurement(self, seconds: float, model: str, element_bytes: int) -> Measurement:
        if self.phase == "prefill":
            batch, output_tokens, context_tokens = self.batch, 1, 0
            prompt_tokens = self.batch * self.tokens
        else:
            batch, output_tokens, prompt_tokens = self.batch, STEPS, PROMPT_TOKENS
            context_tokens = sum(spread_contexts(batch, self.tokens)) + batch
        return Measurement(
            seconds,
            batch,
            output_tokens,
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
            phase=self.phase,
            model=model,
            element_bytes=element_bytes,
        )


def fitting_settings(
    batches: Sequence[int], contexts: Sequence[int], prompts: Sequence[int], limits: Limits
) -> list[TimingSetting]:
    """Every pair of batch and context, then every prompt, that the limits allow."""
    settings: list[TimingSetting] = []
    for batch, context in itertools.product(batches, contexts):
        settings.append(TimingSetting("decode", batch, context))
    for tokens in prompts:
        settings.append(TimingSetting("prefill", 1, tokens))
    return [setting for setting in settings if setting.fits(limits)]


class Stopwatch:
    """Times an engine; `together`: it takes whole batches only (static)."""

    def __init__(
        self, engine: TextEngine, prompt_of: Callable[[int], list[int]], together: bool = False
    ):
        self.engine = engine
        self.prompt_of = prompt_of
        self.together = together
        self._ids = itertools.count()

    def seconds(self, setting: TimingSetting) -> float:
        if setting.phase == "prefill":
            return self._admit([setting.tokens] * setting.batch, 1)[1]
        return self._decode(setting.batch, setting.tokens)

    def _admit(self, prompts: list[int], answer_tokens: int) -> tuple[list[Record], float]:
        """(records that have their first tokens, seconds until then)."""
        engine = self.engine
        sampling = Sampling(max_new_tokens=answer_tokens, ignore_stops=True)
        records = []
        reserve_tokens = {}
        for prompt in prompts:
            request = Request(next(self._ids), prompt, 0.0, FOREVER)
            engine.submit(request, self.prompt_of(prompt), sampling)
            records.append(Record(request))
            reserve_tokens[request.id] = prompt + answer_tokens + 1
        plan = Plan(tuple(records), (), reserve_tokens, together=self.together, horizon_steps=1)
        seconds = engine.step(plan).elapsed_s
        while answer_tokens > 1 and not all(map(engine.generated, records)):
            seconds += engine.step(Plan(horizon_steps=1)).elapsed_s
        return records, seconds

    def _decode(self, batch: int, context: int) -> float:
        """Seconds of STEPS decode steps."""
        engine = self.engine
        records, _ = self._admit(spread_contexts(batch, context), STEPS + 3)
        before = engine.generated(records[-1])
        elapsed_s = engine.step(Plan(horizon_steps=STEPS)).elapsed_s
        steps = engine.generated(records[-1]) - before
        for record in records:
            engine.cancel(record.request.id)
        engine.step(Plan())
        return elapsed_s * STEPS / steps


def measure_engine(
    engine: TextEngine,
    prompt_of: Callable[[int], list[int]],
    model: str,
    element_bytes: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    prompts: Sequence[int],
    repetitions: int = 3,
    together: bool = False,
) -> Iterator[Measurement | None]:
    """One row for each setting: the mean of its timings.

    The settings are timed in turns, so that other load on the machine affects all alike.

    Args:
        prompt_of: ids of a prompt of so many tokens.
        model: its folder, which the rows name.
        batches, contexts: decode steps are timed for every pair that fits the engine's limits. The
            rows have half to one and a half of the context: equal rows would lie side by side in
            one length class, as they never do in service.
        prompts: tokens of single prompts.
        together: the engine takes whole batches only (static).
    Yields:
        None after each timing, for a progress bar; then the rows.
    Raises:
        ValueError: none of the settings fits.
    """
    settings = fitting_settings(batches, contexts, prompts, engine.limits)
    if not settings:
        raise ValueError(f"nothing to measure: no batch, context or prompt fits {engine.limits}")
    stopwatch = Stopwatch(engine, prompt_of, together)
    timings: list[list[float]] = [[] for _ in settings]
    for turn in range(repetitions + 1):
        for i, setting in enumerate(settings):
            seconds = stopwatch.seconds(setting)
            if turn:  # the first turn warms up
                timings[i].append(seconds)
            yield None
    for setting, seconds_of_turns in zip(settings, timings):
        yield setting.measurement(statistics.fmean(seconds_of_turns), model, element_bytes)
