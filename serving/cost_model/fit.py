"""Measurements -> the cost model's profile, by robust least squares on relative errors.

A file of measurements is CSV with a header. Columns (others are ignored):
    seconds, batch_size,
    output_tokens     of the padded batch; these three are needed
    gpus              default 1
    placement         default even
    prompt_tokens     default 35
    context_tokens    before a "decode"; default 0
    model             a published name or a folder; default chatglm2-6b
    element_bytes     of a weight; default 2
    phase             "" a process's first batch, "batch" a later one, "prefill" prompt_tokens in
                      all, "decode" output_tokens steps from context_tokens
    experiment, query what may be held out together

Placements: "" and "even", "single", "alternate" (even layers on the second device), "14,14" (layers
device by device), and the names in the measured runs, where "lr" and "helr" are one device under a
device map and "he" is "alternate".
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from serving.cost_model.devices import MAX_DEVICES
from serving.cost_model.model import COEFFICIENTS, CostModel, ModelSizes, Profile, even_stages

PROMPT_TOKENS = 35  # of the measured batches: the longest ran to 2,048 tokens with 2,013 new ones
HUBER = 0.03  # relative errors beyond it count linearly: other work on the machine slowed some runs
PRIOR = 0.01  # a coefficient one spread off its start costs as much as one row off by this
# How far from its start a coefficient may lie; matters only where the rows do not determine it.
SPREADS = {
    "weight_passes": 0.2,
    "compute_passes": 0.5,
    "kv_passes": 0.3,
    "attention_passes": 3.0,
    "layer_overhead_s": 2e-4,
    "mapped_overhead_s": 2e-4,
    "hop_overhead_s": 1e-3,
    "cache_link_passes": 4.0,
    "step_overhead_s": 1e-3,
    "sequence_overhead_s": 1e-3,
    "batch_overhead_s": 5e-3,
    "startup_s": 2.0,
    "startup_device_s": 1.0,
}
PHASES = ("", "batch", "prefill", "decode")
REQUIRED_COLUMNS = ("seconds", "batch_size", "output_tokens")


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        experiment, query: what it belongs to; `summarize_fits` holds those out together.
    """

    seconds: float
    batch: int
    output_tokens: int
    gpus: int = 1
    placement: str = ""
    prompt_tokens: int = PROMPT_TOKENS
    context_tokens: int = 0
    phase: str = ""
    model: str = "chatglm2-6b"
    element_bytes: int = 2
    experiment: str = ""
    query: str = ""


def read_measurements(path: str | Path) -> tuple[list[Measurement], list[str]]:
    """The rows of a file that can be used, and a line for each that lacks a time or a length.

    Raises:
        ValueError: no such file, a needed column or every row is missing, or a value is not a
            number of the right kind.
    """
    rows: list[Measurement] = []
    skipped: list[str] = []
    for line, values in _read_lines(path):
        needed = ["seconds", "batch_size"]
        needed.append("prompt_tokens" if values.get("phase", "") == "prefill" else "output_tokens")
        if missing := [column for column in needed if not values.get(column)]:
            skipped.append(f"{path}, line {line}: left out, no {missing[0]}")
            continue
        rows.append(_measurement(f"{path}, line {line}", values))
    if not rows:
        raise ValueError(f"{path} holds no row with a time and a length")
    return rows, skipped


def _read_lines(path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, stripped values by column) of each row of a CSV file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if missing := [column for column in REQUIRED_COLUMNS if column not in columns]:
                needed = ", ".join(REQUIRED_COLUMNS)
                raise ValueError(f"{path}: column {missing[0]!r} is missing; needed are {needed}")
            return [(reader.line_num, _stripped(row)) for row in reader]
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None


def _stripped(row: dict[str | Any, str | Any]) -> dict[str, str]:
    """Without the cells beyond the header, which csv keeps as a list."""
    values = {}
    for column, text in row.items():
        if isinstance(column, str) and not isinstance(text, list):
            values[column] = (text or "").strip()
    return values


def _number(
    where: str, values: dict[str, str], column: str, default: float, least: float, most: float
) -> float:
    """A cell's value; ValueError unless it is a number above 0 within the bounds."""
    value = _parse(values.get(column), default)
    if not (math.isfinite(value) and least <= value <= most):
        text = values.get(column) or default
        raise ValueError(f"{where}: {column} must be a number above 0, got {text!r}")
    return value


def _whole(
    where: str, values: dict[str, str], column: str, default: int, least: int, most: float = 1e9
) -> int:
    """A cell's value; ValueError unless it is a whole number within the bounds."""
    value = _parse(values.get(column), default)
    if not (math.isfinite(value) and least <= value <= most and value == int(value)):
        kind = f"a whole number from {least:g} to {most:g}"
        raise ValueError(f"{where}: {column} must be {kind}, got {values.get(column) or default!r}")
    return int(value)


def _parse(text: str | None, default: float) -> float:
    """The number in a cell, `default` for an empty one; nan for any other text."""
    try:
        return float(text or default)
    except ValueError:
        return math.nan


def _measurement(where: str, values: dict[str, str]) -> Measurement:
    row = Measurement(
        seconds=_number(where, values, "seconds", 0, 1e-12, 1e9),
        batch=_whole(where, values, "batch_size", 1, 1),
        output_tokens=_whole(where, values, "output_tokens", 1, 1),
        gpus=_whole(where, values, "gpus", 1, 1, most=MAX_DEVICES),
        placement=values.get("placement", ""),
        prompt_tokens=_whole(where, values, "prompt_tokens", PROMPT_TOKENS, 1),
        context_tokens=_whole(where, values, "context_tokens", 0, 0),
        phase=values.get("phase", ""),
        model=values.get("model") or "chatglm2-6b",
        element_bytes=_whole(where, values, "element_bytes", 2, 1, most=8),
        experiment=values.get("experiment", ""),
        query=values.get("query", ""),
    )
    if row.phase not in PHASES:
        raise ValueError(
            f"{where}: phase must be one of {', '.join(PHASES[1:])} or empty, got {row.phase!r}"
        )
    try:
        named_stages(row.placement, row.gpus, shape_of(row.model, row.element_bytes).layers)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return row


@lru_cache
def shape_of(model: str, element_bytes: int) -> ModelSizes:
    """ModelSizes.from_config, remembered."""
    return ModelSizes.from_config(model, element_bytes)


def named_stages(
    placement: str, gpus: int, layers: int
) -> tuple[tuple[tuple[int, int], ...], bool | None]:
    """(stages, whether a device map is in force) of a placement's name in a file or flag.

    The second is None where that follows from the number of devices.
    """
    if placement in ("", "even"):
        return even_stages(layers, gpus), None
    if placement in ("single", "lr", "helr"):
        return ((0, layers),), placement != "single"
    if placement in ("alternate", "he"):
        if gpus < 2:
            raise ValueError(
                f"placement {placement!r} alternates between 2 devices, gpus is {gpus}"
            )
        return tuple(((i + 1) % 2, 1) for i in range(layers)), True
    counts = placement.split(",")
    if not all(c.strip().isdecimal() for c in counts):
        raise ValueError(
            "placement must be even, single, alternate, lr, he, helr or layers such as 14,14, "
            f"got {placement!r}"
        )
    numbers = list(map(int, counts))
    if sum(numbers) != layers or len(numbers) > gpus:
        raise ValueError(
            f"placement {placement!r} must give the model's {layers} layers to at most "
            f"gpus = {gpus} devices"
        )
    return tuple((i, number) for i, number in enumerate(numbers) if number), None


def row_seconds(row: Measurement, profile: Profile) -> float:
    """Seconds that the cost model predicts for a row."""
    shape = shape_of(row.model, row.element_bytes)
    stages, mapped = named_stages(row.placement, row.gpus, shape.layers)
    last_device, _ = max(stages)
    count = max(row.gpus, 1 + last_device)
    model = CostModel(shape, profile.cluster(count), stages, profile, mapped)
    if row.phase == "prefill":
        return model.prefill_s(row.prompt_tokens, row.batch)
    if row.phase == "decode":
        return model.decode_s(row.batch, row.context_tokens, row.output_tokens)
    warm = model.equal_batch_s(row.batch, row.prompt_tokens, row.output_tokens)
    return warm + (model.startup_s if row.phase == "" else 0.0)


SecondsOf = Callable[[Measurement, Profile], float]


def relative_errors(rows: Sequence[Measurement], profile: Profile) -> np.ndarray:
    """(n,) relative errors: predicted over measured seconds, less 1."""
    errors: np.ndarray = _seconds(rows, profile) / _measured(rows) - 1
    return errors


def _seconds(
    rows: Sequence[Measurement], profile: Profile, seconds_of: SecondsOf = row_seconds
) -> np.ndarray:
    return np.array([seconds_of(row, profile) for row in rows])


def _measured(rows: Sequence[Measurement]) -> np.ndarray:
    return np.array([row.seconds for row in rows])


def fit_profile(
    rows: Sequence[Measurement],
    start: Profile,
    prior: float = PRIOR,
    seconds_of: SecondsOf = row_seconds,
) -> Profile:
    """The profile that minimises Huber's loss of relative errors, with coefficients of at least 0.

    Seconds are linear in the coefficients but for the larger of weights and products. So columns
    are differences at the current coefficients, and a few rounds converge on both that choice and
    Huber's weights (iteratively reweighted least squares). What the rows do not determine stays
    near `start` (SPREADS, PRIOR).
    """
    measured = _measured(rows)
    spreads = np.array(itemgetter(*COEFFICIENTS)(SPREADS))
    start_values = values = np.array(attrgetter(*COEFFICIENTS)(start), float)
    columns = None
    for rounds in range(40):
        if rounds % 10 == 0:
            current = with_coefficients(start, values.tolist())
            columns = _columns(rows, current, spreads, seconds_of)
            # Link latencies and transfers, which no coefficient scales.
            fixed = _seconds(rows, current, seconds_of) - columns @ values
        abs_errors = np.abs((columns @ values + fixed) / measured - 1)
        weights = np.sqrt(HUBER / np.maximum(abs_errors, HUBER))
        left = np.vstack([columns * (weights / measured)[:, None], np.diag(prior / spreads)])
        right = np.concatenate([weights * (1 - fixed / measured), prior / spreads * start_values])
        values = _least_squares(left, right, spreads)
    return with_coefficients(start, [float(f"{value:.6g}") for value in values])


def with_coefficients(profile: Profile, values: Sequence[float]) -> Profile:
    """The profile with other COEFFICIENTS, in their order."""
    changes: dict[str, Any] = dict(zip(COEFFICIENTS, values))
    return replace(profile, **changes)


def undetermined_coefficients(rows: Sequence[Measurement], profile: Profile) -> list[str]:
    """Coefficients that the rows do not determine: other values would fit them nearly as well.

    Those of which the rows leave more than half of the prior's spread.
    """
    spreads = np.array(itemgetter(*COEFFICIENTS)(SPREADS))
    columns = _columns(rows, profile, spreads) / _measured(rows)[:, None]
    scaled = columns * spreads / PRIOR
    precision = scaled.T @ scaled * (PRIOR / HUBER) ** 2 + np.eye(len(spreads))
    left = np.sqrt(np.diag(np.linalg.inv(precision)))
    return [name for name, share in zip(COEFFICIENTS, left) if share > 0.5]


def _columns(
    rows: Sequence[Measurement],
    profile: Profile,
    spreads: np.ndarray,
    seconds_of: SecondsOf = row_seconds,
) -> np.ndarray:
    """(rows, coefficients) derivatives of the rows' seconds, by differences."""
    before = _seconds(rows, profile, seconds_of)
    columns = []
    for name, spread in zip(COEFFICIENTS, spreads):
        step = 1e-4 * spread
        change: dict[str, Any] = {name: getattr(profile, name) + step}
        moved = replace(profile, **change)
        columns.append((_seconds(rows, moved, seconds_of) - before) / step)
    return np.array(columns).T


def _least_squares(left: np.ndarray, right: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """argmin |left x - right|, x >= 0, with variables in units of `scale`."""
    from scipy.optimize import nnls

    solution: np.ndarray = nnls(left * scale, right)[0] * scale
    return solution


def held_out_errors(
    rows: Sequence[Measurement],
    start: Profile,
    group_of: Callable[[int, Measurement], object],
    prior: float = PRIOR,
) -> np.ndarray:
    """(n,) each row's error under the profile that is fitted without the rows of its group."""
    members: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(group_of(i, row), []).append(i)
    held_out = np.zeros(len(rows))
    for group in members.values():
        others = sorted(set(range(len(rows))).difference(group))
        profile = fit_profile([rows[i] for i in others], start, prior)
        held_out[group] = relative_errors([rows[i] for i in group], profile)
    return held_out


def summarize_errors(errors: np.ndarray) -> dict[str, float]:
    """{rows, median_abs_error, p90_abs_error}."""
    size = np.abs(errors)
    return {
        "rows": len(size),
        "median_abs_error": round(float(np.median(size)), 6),
        "p90_abs_error": round(float(np.quantile(size, 0.9)), 6),
    }


def summarize_fits(rows: Sequence[Measurement], start: Profile) -> dict[str, dict[str, float]]:
    """{way of holding out: summary of errors} of fits.

    In sample, in 5 folds, and with each experiment, number of devices, and query or batch size left
    out as a whole.
    """
    shuffled = np.random.default_rng(0).permutation(len(rows)) % 5
    summaries = {"in_sample": summarize_errors(relative_errors(rows, fit_profile(rows, start)))}
    groupings: dict[str, Callable[[int, Measurement], object]] = {
        "5_folds": lambda i, row: shuffled[i],
        "without_its_experiment": lambda i, row: row.experiment,
        "without_its_number_of_gpus": lambda i, row: row.gpus,
        "without_its_query_or_batch": lambda i, row: (
            row.query or (row.experiment, row.batch, row.placement)
        ),
    }
    for name, group_of in groupings.items():
        if len(set(map(group_of, range(len(rows)), rows))) > 1:
            summaries[name] = summarize_errors(held_out_errors(rows, start, group_of))
    return summaries
