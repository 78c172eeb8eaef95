"""A real engine's seconds, as rows that serving.cost_model.fit fits a profile to: decode steps by rows and context, prompts by length."""

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from chatglm.families import FAMILIES
from serving.cost_model.fit import Row, errors, fit, held_out_errors, summary
from serving.cost_model.model import DATASHEET, CostModel, ModelShape, Profile
from serving.engines import make_engine
from serving.engines.answers import Sampling, TextEngine
from serving.request import FOREVER, Limits, Plan, Record, Request

STEPS = 12  # decode steps of one timing
PRIOR = 1e-4  # nearly none: every term of a single device's cost is measured, and a CPU is nowhere near its datasheet


def profile_engine(
    name: str,
    model,
    tokenizer,
    folder: str,
    limits: Limits,
    device,
    repetitions: int = 5,
    progress=lambda timings, total: timings,
) -> tuple[Profile, list[Row]]:
    """Measure the engine `name` on a loaded model, and fit a profile to it.

    Args:
        folder: the model's, kept in the rows. device: a Device or the name of one that the coefficients are relative to.
        progress: wraps the iterator of timings, for a progress bar.
    """
    shape = ModelShape.from_config(model.config.to_dict(), model.dtype.itemsize)
    engine = make_engine(name, model, limits, CostModel.of(shape, device), [])
    prompt_of, least = prompt_maker(tokenizer, model.get_input_embeddings().num_embeddings)
    longest, least = limits.max_tokens - STEPS - 4, max(16, least + 1)
    batches, prompts, contexts = (
        powers(1, limits.max_batch),
        powers(least, longest),
        powers(2 * least, int(longest / 1.5)),
    )
    timings = measure(
        engine,
        prompt_of,
        folder,
        shape.element_bytes,
        batches,
        contexts,
        prompts,
        repetitions,
        name == "static",
    )
    total = (len(batches) * len(contexts) + len(prompts)) * (repetitions + 1)
    rows = [row for row in progress(timings, total) if row is not None]
    start = replace(DATASHEET, name="engine", device=device)
    fitted, folds = fit(rows, start, PRIOR), random.Random(0).sample(range(len(rows)), len(rows))
    report = {
        "in_sample": summary(errors(rows, fitted)),
        "5_folds": summary(held_out_errors(rows, start, lambda i, row: folds[i] % 5, PRIOR)),
    }
    return replace(
        fitted,
        made={"from": f"{len(rows)} timings of the {name} engine on {folder}", "errors": report},
    ), rows


def spread(batch: int, context: int) -> list[int]:
    """Contexts of `batch` rows, evenly from half to one and a half of their mean."""
    return [max(round(context * (0.5 + (i + 0.5) / batch)), 1) for i in range(batch)]


def powers(least: int, most: int) -> list[int]:
    """least, twice that, ..., and most."""
    found = [least]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def prompt_maker(tokenizer, vocabulary: int) -> tuple[Callable[[int], list[int]], int]:
    """(so many tokens -> ids that the family's model can read: its own frame around random ones, tokens of the frame)."""
    family = FAMILIES[tokenizer.family]
    frame, draw = family.encode_prompt(tokenizer, "", 1 << 20).input_ids, random.Random(0)

    def prompt_of(tokens: int) -> list[int]:
        text = [draw.randrange(vocabulary // 2) for _ in range(tokens - len(frame))]
        return text + frame if family.name == "glm" else frame + text

    return prompt_of, len(frame)


def measure(
    engine: TextEngine,
    prompt_of: Callable[[int], list[int]],
    model: str,
    element_bytes: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    prompts: Sequence[int],
    repetitions: int = 3,
    together: bool = False,
) -> Iterator[Row | None]:
    """One row for each setting: the mean of its timings, which are taken in turns, so that a slow moment hits all alike.

    Args:
        prompt_of: ids of a prompt of so many tokens.
        model: what the rows say the model is: its folder.
        batches, contexts: decode steps are timed for every pair that fits the engine's limits, with rows of half to one and a half of the
            context: rows alike would lie side by side in one length class, as they never do in service. prompts: tokens of single prompts.
        together: the engine takes whole batches only (static).
    Yields:
        None after each timing, for a progress bar; then the rows.
    Raises:
        ValueError: none of the settings fits.
    """
    limits, ids = engine.limits, itertools.count()

    def admit(prompts: list[int], answer: int) -> tuple[list[Record], float]:
        """(records after their first tokens, seconds that took)."""
        records = []
        for prompt in prompts:
            request = Request(next(ids), prompt, 0.0, FOREVER)
            engine.submit(
                request, prompt_of(prompt), Sampling(max_new_tokens=answer, ignore_stops=True)
            )
            records.append(Record(request))
        plan = Plan(
            tuple(records),
            (),
            {r.request.id: r.request.prompt_tokens + answer + 1 for r in records},
            together=together,
            horizon_steps=1,
        )
        seconds = engine.step(plan).elapsed_s
        while answer > 1 and not all(map(engine.generated, records)):
            seconds += engine.step(Plan(horizon_steps=1)).elapsed_s
        return records, seconds

    def decode(batch: int, context: int) -> float:
        records, _ = admit(spread(batch, context), STEPS + 3)
        before = engine.generated(records[-1])
        seconds = (
            engine.step(Plan(horizon_steps=STEPS)).elapsed_s
            * STEPS
            / (engine.generated(records[-1]) - before)
        )
        for record in records:
            engine.cancel(record.request.id)
        engine.step(Plan())
        return seconds

    def prefill(tokens: int) -> float:
        return admit([tokens], 1)[1]

    settings = [
        (decode, (b, c))
        for b in batches
        for c in contexts
        if b <= limits.max_batch
        and max(spread(b, c)) + STEPS + 4 <= limits.max_tokens
        and b * (c + STEPS + 5) <= limits.kv_tokens
    ] + [(prefill, (n,)) for n in prompts if n + 2 <= limits.max_tokens]
    if not settings:
        raise ValueError(f"nothing to measure: no batch, context or prompt fits {limits}")
    seen: list[list[float]] = [[] for _ in settings]
    for turn in range(repetitions + 1):
        for (timed, setting), found in zip(settings, seen):
            seconds = timed(*setting)
            if turn:  # the first turn warms up
                found.append(seconds)
            yield None
    for (timed, setting), found in zip(settings, seen):
        seconds = statistics.fmean(found)
        if timed is decode:
            batch, context = setting
            yield Row(
                seconds,
                batch,
                STEPS,
                context_tokens=sum(spread(batch, context)) + batch,
                phase="decode",
                model=model,
                element_bytes=element_bytes,
            )
        else:
            yield Row(
                seconds,
                1,
                1,
                prompt_tokens=setting[0],
                phase="prefill",
                model=model,
                element_bytes=element_bytes,
            )
