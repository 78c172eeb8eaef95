"""Scores any length predictor by the columns of LengthBench (benchmarks/length_bench.py).

    from predictor.bench import score_predictor
    figures = score_predictor(predict, rows)

`predict` is any callable from prompts to lengths, quantiles or LengthPrediction objects. Lengths
are tokens of the served model. An answer that was cut counts with the tokens it was served with.
numpy only; tau needs scipy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from predictor.labels import parse_example
from predictor.prediction import LengthPrediction
from predictor.scores import PINBALL_LEVELS, kendall_tau, pinball

Predict = Callable[[list[str]], Any]

CHUNK = 256  # prompts of one call where nothing is timed
REPEATS = 3  # calls of one prompt, the fastest of which counts
WARM_CALLS = 20  # calls that are not timed


@dataclass(frozen=True)
class LengthEstimates:
    """What a predictor says of N prompts.

    Attributes:
        rank: (N,), higher is longer.
        mean: (N,) expected tokens; None where the predictor has no mean.
        quantiles: {level in (0, 1): (N,) tokens}.
    """

    rank: np.ndarray
    mean: np.ndarray | None
    quantiles: dict[float, np.ndarray]

    def capped(self, cap: int) -> "LengthEstimates":
        """These, with no length above `cap`."""
        quantiles = {level: np.minimum(values, cap) for level, values in self.quantiles.items()}
        mean = None if self.mean is None else np.minimum(self.mean, cap)
        return LengthEstimates(self.rank, mean, quantiles)


def score_predictor(
    predict: Predict,
    rows: Sequence[Mapping[str, Any]],
    *,
    ceiling: float | None = None,
    cap: int | None = None,
    timed: int = 200,
) -> dict[str, float | None]:
    """The columns of LengthBench for one predictor; None where it does not say what one needs.

    tau: Kendall's tau-b with the first run. ceiling: tau-b of the median of a prompt's other runs
    with the first one, share: tau over it. mae: of the median, in tokens. pinball: mean over
    PINBALL_LEVELS, in tokens. coverage_90: share of answers within q90. under_mean, under_90,
    under_975: share of answers longer than that many reserved tokens. reserved_mean, reserved_90,
    reserved_975: mean tokens reserved. p50_ms, p99_ms: of calls with one prompt; start Python with
    OMP_NUM_THREADS=1 for one thread. tau_per_us: tau over the median call's microseconds.

    Args:
        predict: prompts -> one of: N lengths; {level: N tokens}, with "mean" and "rank" beside the
            levels if there are any; N LengthPrediction.
        rows: {"prompt", "output_tokens"} each, as scripts/collect_lengths.py writes them; rows of
            the same prompt are runs of it, in order.
        ceiling: to use in place of that of the rows.
        cap: tokens after which answers are cut: predictions of more count as so many.
        timed: prompts that are timed; 0 for none.
    Raises:
        ValueError: rows without a prompt or a length, fewer than two prompts, or a prediction of
            another shape; naming what was wanted and what came.
    """
    prompts, runs = runs_of_rows(rows)
    tokens = np.array([lengths[0] for lengths in runs], float)
    estimates = estimate_all(predict, prompts)
    if cap is not None:
        estimates = estimates.capped(cap)
    figures = figures_of_estimates(estimates, tokens)
    figures["ceiling"] = ceiling_of_runs(runs) if ceiling is None else ceiling
    figures["share"] = share_of_ceiling(figures["tau"], figures["ceiling"])
    figures["p50_ms"] = figures["p99_ms"] = figures["tau_per_us"] = None
    if timed:
        milliseconds = time_single_prompts(predict, prompts[:timed])
        median = float(np.median(milliseconds))
        figures["p50_ms"] = median
        figures["p99_ms"] = float(np.quantile(milliseconds, 0.99))
        figures["tau_per_us"] = (figures["tau"] or 0.0) / max(1e3 * median, 1e-9)
    return figures


def runs_of_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[int]]]:
    """(N prompts, the lengths of each one's runs), in the order in which they come.

    Raises:
        ValueError: naming the row that has no prompt or no length; fewer than two prompts.
    """
    runs: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        example = parse_example(dict(row), f"rows[{number}]", "", None, "")
        lengths = runs.setdefault(example.prompt, [])
        for label in example.labels:
            lengths.append(label.tokens)
    if len(runs) < 2:
        raise ValueError(f"wanted rows of at least 2 prompts, got {len(runs)}")
    return list(runs), list(runs.values())


def estimate_all(predict: Predict, prompts: list[str]) -> LengthEstimates:
    """The estimates for all prompts, asked CHUNK at a time."""
    parts = []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        parts.append(read_estimates(predict(chunk), len(chunk)))
    rank = np.concatenate([part.rank for part in parts])
    means = [part.mean for part in parts if part.mean is not None]
    mean = np.concatenate(means) if len(means) == len(parts) else None
    quantiles = {}
    for level in parts[0].quantiles:
        quantiles[level] = np.concatenate([part.quantiles[level] for part in parts])
    return LengthEstimates(rank, mean, quantiles)


def read_estimates(answer: Any, count: int) -> LengthEstimates:
    """The estimates in what a predictor returned for `count` prompts.

    Raises:
        ValueError: neither lengths, quantiles nor LengthPrediction, or not as many as prompts.
    """
    if isinstance(answer, Mapping):
        return read_quantiles(answer, count)
    if len(answer) and isinstance(answer[0], LengthPrediction):
        return read_predictions(answer, count)
    lengths = checked_numbers(answer, count, "lengths")
    return LengthEstimates(lengths, lengths, {0.5: lengths})


def read_quantiles(answer: Mapping[Any, Any], count: int) -> LengthEstimates:
    """The estimates in {level: tokens, "mean": tokens, "rank": scores}."""
    quantiles: dict[float, np.ndarray] = {}
    for key, values in answer.items():
        if key in ("mean", "rank"):
            continue
        if not isinstance(key, (int, float)) or not 0 < key < 1:
            raise ValueError(
                f'wanted quantile levels between 0 and 1, "mean" or "rank" as keys, got {key!r}'
            )
        quantiles[float(key)] = checked_numbers(values, count, f"the quantile {key}")
    mean = checked_numbers(answer["mean"], count, "the mean") if "mean" in answer else None
    if "rank" in answer:
        rank = checked_numbers(answer["rank"], count, "the rank")
    elif 0.5 in quantiles:
        rank = quantiles[0.5]
    elif mean is not None:
        rank = mean
    else:
        raise ValueError('wanted one of "rank", 0.5 and "mean" among the keys: none orders prompts')
    return LengthEstimates(rank, mean, quantiles)


def read_predictions(answer: Sequence[LengthPrediction], count: int) -> LengthEstimates:
    """The estimates of LengthPrediction objects."""
    rank = checked_numbers([p.rank_score for p in answer], count, "predictions")
    quantiles = {}
    for level in PINBALL_LEVELS:
        quantiles[level] = np.array([p.quantile(level) for p in answer])
    return LengthEstimates(rank, np.array([p.expected_tokens for p in answer]), quantiles)


def checked_numbers(values: Any, count: int, what: str) -> np.ndarray:
    """(count,) finite numbers. Raises ValueError naming what is not."""
    try:
        numbers = np.asarray(values, float)
    except (TypeError, ValueError):
        raise ValueError(f"wanted {count} numbers as {what}, got {type(values).__name__}") from None
    if numbers.shape != (count,):
        raise ValueError(f"wanted {count} numbers as {what}, got the shape {numbers.shape}")
    unknown = numbers[~np.isfinite(numbers)]
    if len(unknown):
        raise ValueError(f"wanted finite numbers as {what}, got {unknown[0]}")
    return numbers


def figures_of_estimates(estimates: LengthEstimates, tokens: np.ndarray) -> dict[str, float | None]:
    """The columns that need no clock and no second run; see score_predictor.

    Args:
        tokens: (N,) true lengths.
    """
    quantiles, mean = estimates.quantiles, estimates.mean
    point = quantiles.get(0.5, mean)
    losses = []
    for level in PINBALL_LEVELS:
        if level in quantiles:
            losses.append(pinball(quantiles[level], tokens, level))
    has_all_levels = len(losses) == len(PINBALL_LEVELS)
    figures: dict[str, float | None] = {
        "tau": kendall_tau(estimates.rank, tokens),
        "mae": None if point is None else float(np.abs(point - tokens).mean()),
        "pinball": float(np.mean(losses)) if has_all_levels else None,
        "coverage_90": None,
    }
    if 0.9 in quantiles:
        figures["coverage_90"] = float((tokens <= quantiles[0.9]).mean())
    reservations = {"mean": mean, "90": quantiles.get(0.9), "975": quantiles.get(0.975)}
    for name, reserved in reservations.items():
        figures[f"under_{name}"] = figures[f"reserved_{name}"] = None
        if reserved is not None:
            figures[f"under_{name}"] = float((tokens > reserved).mean())
            figures[f"reserved_{name}"] = float(reserved.mean())
    return figures


def ceiling_of_runs(runs: Sequence[Sequence[float]]) -> float | None:
    """Kendall's tau-b of the median of a prompt's other runs with its first one.

    Prompts with one run are left out; None where fewer than two have more.
    """
    first, others = [], []
    for lengths in runs:
        if len(lengths) > 1:
            first.append(lengths[0])
            others.append(np.median(lengths[1:]))
    if len(first) < 2:
        return None
    return kendall_tau(np.array(others, float), np.array(first, float))


def share_of_ceiling(tau: float | None, ceiling: float | None) -> float | None:
    """tau as a share of a ceiling; None without one."""
    if not ceiling or tau is None:
        return None
    return tau / ceiling


def time_single_prompts(predict: Predict, prompts: Sequence[str]) -> np.ndarray:
    """(N,) milliseconds of a call with each prompt alone.

    A prompt is asked REPEATS times, not in a row, and its fastest call counts: other work on the
    machine makes a call slower and never faster.
    """
    for prompt in (list(prompts) * WARM_CALLS)[:WARM_CALLS]:
        predict([prompt])
    seconds = np.full((REPEATS, len(prompts)), np.inf)
    for repeat in range(REPEATS):
        for number, prompt in enumerate(prompts):
            started = time.perf_counter()
            predict([prompt])
            seconds[repeat, number] = time.perf_counter() - started
    return 1e3 * seconds.min(axis=0)
