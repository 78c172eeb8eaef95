"""Measurements -> the cost model's profile, by robust least squares on relative errors; the command line of serving.cost_model.

A file of measurements is CSV with a header. Columns (others are ignored):
    seconds, batch_size, output_tokens (of the padded batch)    needed
    gpus (1), placement (even), prompt_tokens (35), model (chatglm2-6b: a published name or a folder), element_bytes (2: of a weight)
    phase: "" a process's first batch, "batch" a later one, "prefill" prompt_tokens in all, "decode" output_tokens steps from context_tokens

Placements: "" and "even", "single", "alternate" (even layers on the second device), "14,14" layers device by device, and the names in
the measured runs, where "lr" and "helr" are one device under a device map and "he" is "alternate".
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from serving.cost_model.devices import MOST_DEVICES
from serving.cost_model.model import COEFFICIENTS, CostModel, ModelShape, Profile, even_stages

PROMPT_TOKENS = 35  # of the measured batches: the longest ran to 2,048 tokens with 2,013 new ones
HUBER = 0.03  # relative errors beyond it count linearly: some runs were slowed by what else the machine did
PRIOR = 0.01  # a coefficient one spread off its start costs as much as one row off by this
# How far from its start a coefficient may be believed to lie; only counts where rows do not tell.
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


@dataclass(frozen=True)
class Row:
    """One measurement. `group`: what may be held out together with it (its experiment)."""

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


def read_rows(path: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of a file that can be used, and a line for each that lacks a time or a length.

    Raises:
        ValueError: no such file, a needed column or every row is missing, or a value is no number of the right kind.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if lost := [
                c
                for c in ("seconds", "batch_size", "output_tokens")
                if c not in (reader.fieldnames or [])
            ]:
                raise ValueError(
                    f"{path}: column {lost[0]!r} is missing; needed are seconds, batch_size, output_tokens"
                )
            given = [
                (
                    reader.line_num,
                    {
                        k: (v or "").strip()
                        for k, v in r.items()
                        if isinstance(k, str) and not isinstance(v, list)
                    },
                )
                for r in reader
            ]
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None
    rows, left_out = [], []
    for line, values in given:
        phase = values.get("phase", "")
        needed = ("seconds", "batch_size") + (
            ("prompt_tokens",) if phase == "prefill" else ("output_tokens",)
        )
        if lost := [c for c in needed if not values.get(c)]:
            left_out.append(f"{path}, line {line}: left out, no {lost[0]}")
            continue
        rows.append(_row(f"{path}, line {line}", values))
    if not rows:
        raise ValueError(f"{path} holds no row with a time and a length")
    return rows, left_out


def _row(where: str, values: dict) -> Row:
    def number(column: str, default: float, least: float, integer: bool = True, most: float = 1e9):
        text = values.get(column) or default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (
            math.isfinite(value) and least <= value <= most and (not integer or value == int(value))
        ):
            kind = f"a whole number from {least:g} to {most:g}" if integer else "a number above 0"
            raise ValueError(f"{where}: {column} must be {kind}, got {text!r}")
        return int(value) if integer else value

    row = Row(
        seconds=number("seconds", 0, 1e-12, integer=False),
        batch=number("batch_size", 1, 1),
        output_tokens=number("output_tokens", 1, 1),
        gpus=number("gpus", 1, 1, most=MOST_DEVICES),
        placement=values.get("placement", ""),
        prompt_tokens=number("prompt_tokens", PROMPT_TOKENS, 1),
        context_tokens=number("context_tokens", 0, 0),
        phase=values.get("phase", ""),
        model=values.get("model") or "chatglm2-6b",
        element_bytes=number("element_bytes", 2, 1, most=8),
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
def shape_of(model: str, element_bytes: int) -> ModelShape:
    return ModelShape.from_config(model, element_bytes)


def named_stages(
    placement: str, gpus: int, layers: int
) -> tuple[tuple[tuple[int, int], ...], bool | None]:
    """(stages, whether a device map is in force; None: where several devices are) of a placement's name in a file or flag."""
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
            f"placement must be even, single, alternate, lr, he, helr or layers such as 14,14, got {placement!r}"
        )
    stages = tuple((i, int(c)) for i, c in enumerate(counts))
    if sum(n for _, n in stages) != layers or len(stages) > gpus:
        raise ValueError(
            f"placement {placement!r} must give the model's {layers} layers to at most gpus = {gpus} devices"
        )
    return tuple(s for s in stages if s[1]), None


def row_seconds(row: Row, profile: Profile) -> float:
    """What the cost model expects of a row."""
    shape = shape_of(row.model, row.element_bytes)
    stages, mapped = named_stages(row.placement, row.gpus, shape.layers)
    model = CostModel(
        shape,
        profile.cluster(max(row.gpus, 1 + max(d for d, _ in stages))),
        stages,
        profile,
        mapped,
    )
    if row.phase == "prefill":
        return model.prefill_s(row.prompt_tokens, row.batch)
    if row.phase == "decode":
        return model.decode_s(row.batch, row.context_tokens, row.output_tokens)
    warm = model.equal_batch_s(row.batch, row.prompt_tokens, row.output_tokens)
    return warm + (model.startup_s if row.phase == "" else 0.0)


def errors(rows: Sequence[Row], profile: Profile) -> np.ndarray:
    """Predicted over measured, less 1."""
    return np.array([row_seconds(row, profile) / row.seconds - 1 for row in rows])


def fit(rows: Sequence[Row], start: Profile, prior: float = PRIOR) -> Profile:
    """The profile that minimises Huber's loss of relative errors, with coefficients of at least 0.

    Seconds are linear in the coefficients but for the larger of weights and products, so columns are differences at the current
    coefficients, and a few rounds settle both that choice and Huber's weights (iteratively reweighted least squares). What the
    rows do not tell apart stays near `start` (SPREADS, PRIOR).
    """
    measured = np.array([row.seconds for row in rows])
    spreads = np.array([SPREADS[name] for name in COEFFICIENTS])
    begin = now = np.array([getattr(start, name) for name in COEFFICIENTS], float)
    columns = None
    for rounds in range(40):
        if rounds % 10 == 0:
            columns = _columns(
                rows, replace(start, **dict(zip(COEFFICIENTS, now.tolist()))), spreads
            )
            predicted = np.array(
                [
                    row_seconds(row, replace(start, **dict(zip(COEFFICIENTS, now.tolist()))))
                    for row in rows
                ]
            )
            fixed = (
                predicted - columns @ now
            )  # of link latencies and transfers, which no coefficient scales
        off = np.abs((columns @ now + fixed) / measured - 1)
        weights = np.sqrt(HUBER / np.maximum(off, HUBER))
        left = np.vstack([columns * (weights / measured)[:, None], np.diag(prior / spreads)])
        right = np.concatenate([weights * (1 - fixed / measured), prior / spreads * begin])
        now = _least_squares(left, right, spreads)
    return replace(start, **{name: float(f"{value:.6g}") for name, value in zip(COEFFICIENTS, now)})


def vague(rows: Sequence[Row], profile: Profile) -> list[str]:
    """Coefficients of which the rows leave more than half of the prior's spread: other values would fit them nearly as well."""
    spreads = np.array([SPREADS[name] for name in COEFFICIENTS])
    scaled = (
        _columns(rows, profile, spreads)
        / np.array([row.seconds for row in rows])[:, None]
        * spreads
        / PRIOR
    )
    left = np.sqrt(
        np.diag(np.linalg.inv(scaled.T @ scaled * (PRIOR / HUBER) ** 2 + np.eye(len(spreads))))
    )
    return [name for name, share in zip(COEFFICIENTS, left) if share > 0.5]


def _columns(rows: Sequence[Row], profile: Profile, spreads: np.ndarray) -> np.ndarray:
    at = np.array([row_seconds(row, profile) for row in rows])
    found = []
    for name, spread in zip(COEFFICIENTS, spreads):
        moved = replace(profile, **{name: getattr(profile, name) + 1e-4 * spread})
        found.append((np.array([row_seconds(row, moved) for row in rows]) - at) / (1e-4 * spread))
    return np.array(found).T


def _least_squares(left: np.ndarray, right: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """argmin |left x - right|, x >= 0, with variables in units of `scale`."""
    from scipy.optimize import nnls

    return nnls(left * scale, right)[0] * scale


def held_out_errors(
    rows: Sequence[Row],
    start: Profile,
    group_of: Callable[[int, Row], object],
    prior: float = PRIOR,
) -> np.ndarray:
    """Each row's error under the profile fitted without the rows of its group."""
    groups = [group_of(i, row) for i, row in enumerate(rows)]
    found = np.zeros(len(rows))
    for group in sorted(set(groups), key=str):
        out = [i for i, g in enumerate(groups) if g == group]
        profile = fit([row for row, g in zip(rows, groups) if g != group], start, prior)
        found[out] = errors([rows[i] for i in out], profile)
    return found


def summary(found: np.ndarray) -> dict:
    size = np.abs(found)
    return {
        "rows": len(size),
        "median_abs_error": round(float(np.median(size)), 6),
        "p90_abs_error": round(float(np.quantile(size, 0.9)), 6),
    }


def report(rows: Sequence[Row], start: Profile) -> dict:
    """In sample, 5 folds, and with each experiment, number of devices, and query or batch size left out whole."""
    shuffled = np.random.default_rng(0).permutation(len(rows)) % 5
    found = {"in_sample": summary(errors(rows, fit(rows, start)))}
    ways = {
        "5_folds": lambda i, row: shuffled[i],
        "without_its_experiment": lambda i, row: row.experiment,
        "without_its_number_of_gpus": lambda i, row: row.gpus,
        "without_its_query_or_batch": lambda i, row: (
            row.query or (row.experiment, row.batch, row.placement)
        ),
    }
    for name, way in ways.items():
        if len({way(i, row) for i, row in enumerate(rows)}) > 1:
            found[name] = summary(held_out_errors(rows, start, way))
    return found
