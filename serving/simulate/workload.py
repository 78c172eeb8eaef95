"""Requests over time: when they come, how long they are, what is predicted of them, and by when an answer is wanted.

Columns first (numpy), requests one by one when they are due: a million of them need 50 MB, not a million objects.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from chatglm.files import is_lfs_pointer, pointer_error
from predictor.prediction import LengthPrediction, from_bins, make_edges
from serving.request import CostModel, Request

TRACES = {
    "azure_conv": "AzureLLMInferenceTrace_conv.csv.gz",
    "azure_code": "AzureLLMInferenceTrace_code.csv.gz",
    "mooncake": "mooncake_conversation_trace.jsonl.gz",
    "mooncake_synthetic": "mooncake_synthetic_trace.jsonl.gz",
}
WORKLOADS = ("poisson", "gamma", *TRACES)


@dataclass(frozen=True, eq=False)
class Workload:
    """n requests by arrival. Columns of equal length; predictions index `predictions`.

    Attributes:
        arrival_s, slo_s: (n,) float. prompt_tokens, output_tokens: (n,) int.
        prediction: (n,) int, which of `predictions`; None for none.
        predict_s: what one prediction takes.
    """

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    slo_s: np.ndarray
    prediction: np.ndarray | None = None
    predictions: tuple[LengthPrediction, ...] = ()
    predict_s: float = 0.0

    def __len__(self) -> int:
        return len(self.arrival_s)

    def requests(self, predicts: bool = True) -> Iterator[Request]:
        """One by one, by arrival; without predictions and their cost for policies that need none."""
        predicted = predicts and self.prediction is not None
        for start in range(0, len(self), 4096):
            part = slice(start, start + 4096)
            which = (
                self.prediction[part].tolist() if predicted else [None] * len(self.arrival_s[part])
            )
            columns = (self.prompt_tokens, self.arrival_s, self.slo_s, self.output_tokens)
            for i, (prompt, arrival, slo, output, k) in enumerate(
                zip(*(c[part].tolist() for c in columns), which), start
            ):
                known = None if k is None else self.predictions[k]
                yield Request(
                    i, prompt, arrival, slo, known, output, self.predict_s if predicted else 0.0
                )

    def part(self, mask: np.ndarray) -> "Workload":
        """The requests of a mask or index; predictions stay shared."""
        which = None if self.prediction is None else self.prediction[mask]
        columns = {
            name: getattr(self, name)[mask]
            for name in ("arrival_s", "prompt_tokens", "output_tokens", "slo_s")
        }
        return replace(self, **columns, prediction=which)

    def at_rate(self, requests_per_s: float) -> "Workload":
        """The same requests, their gaps stretched to this mean rate."""
        span = float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) > 1 else 1.0
        scale = (len(self) - 1) / (requests_per_s * span) if span > 0 and len(self) > 1 else 1.0
        return replace(self, arrival_s=(self.arrival_s - self.arrival_s[0]) * scale)


# ---- when requests come


def poisson_arrivals(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(count,) seconds, exponential gaps of mean 1 / rate."""
    return np.cumsum(rng.exponential(1 / rate, count))


def gamma_arrivals(
    count: int, rate: float, rng: np.random.Generator, variation: float = 3.0
) -> np.ndarray:
    """(count,) seconds, gamma gaps of mean 1 / rate and this coefficient of variation: above 1 they come in bursts."""
    shape = 1 / variation**2
    return np.cumsum(rng.gamma(shape, 1 / (rate * shape), count))


# ---- how long they are


def lognormal_lengths(
    count: int, rng: np.random.Generator, median: float, sigma: float, most: int
) -> np.ndarray:
    return np.clip(np.round(median * np.exp(sigma * rng.standard_normal(count))), 1, most).astype(
        np.int64
    )


def read_trace(name: str, folder: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds from the first, prompt tokens, answer tokens) of a recorded trace, by arrival; empty answers count as one token.

    Raises:
        FileNotFoundError: the trace is not in the folder.
        ValueError: the file is not a trace.
    """
    path = Path(folder) / TRACES[name]
    if not path.is_file():
        raise FileNotFoundError(f"no such trace: {path}; --traces names the folder it is in")
    if is_lfs_pointer(path):
        raise pointer_error(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = list(parse_trace(file, path.name))
    except (
        EOFError,
        zlib.error,
        csv.Error,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path}: not a recorded trace: {' '.join(str(error).split())[:100]}"
        ) from None
    if not rows:
        raise ValueError(f"{path}: no requests in it")
    times, prompts, outputs = (np.array(column) for column in zip(*sorted(rows)))
    return times - times[0], np.maximum(prompts, 1), np.maximum(outputs, 1)


def parse_trace(file, name: str) -> Iterator[tuple[float, int, int]]:
    """(seconds, prompt tokens, answer tokens) of each row; raises what parsing raises where one is something else."""
    if name.endswith(".csv.gz"):
        lines = csv.reader(file)
        next(lines, None)  # the heading
        for time, prompt, output in lines:
            yield datetime.fromisoformat(time[:26]).timestamp(), int(prompt), int(output)
        return
    for row in map(json.loads, file):
        yield float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])


def repeated(
    count: int,
    times: np.ndarray,
    prompts: np.ndarray,
    outputs: np.ndarray,
    rng: np.random.Generator,
):
    """`count` requests: the trace from a random place on, around its end as often as needed."""
    n = len(times)
    where = int(rng.integers(n)) + np.arange(count)
    period = times[-1] + times[-1] / max(n - 1, 1)
    return times[where % n] + where // n * period, prompts[where % n], outputs[where % n]


# ---- what is wanted and predicted


@dataclass(frozen=True)
class SloRule:
    """By when an answer is wanted: slo_s = max(floor_s, scale x class x latency of a request alone on the engine).

    A stated rule in place of the random objectives of UELLM's data. Alone: prefill_s(prompt) + decode_s(1, prompt + 1, output - 1).

    Attributes:
        length: "typical": the output is the workload's mean, as a user who waits for an answer has no patience by its length;
            "own": the request's own, the same patience in proportion for all; but then the objective tells a policy the true length.
        classes: factors given out at random, equally often: not everyone is in the same hurry.
    """

    scale: float = 5.0
    floor_s: float = 1.0
    length: str = "typical"
    classes: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self):
        finite = math.isfinite(self.scale) and math.isfinite(self.floor_s)
        if (
            self.length not in ("typical", "own")
            or not finite
            or self.scale <= 0
            or self.floor_s < 0
        ):
            raise ValueError(
                f"wanted length typical or own, a scale above 0 and a floor of at least 0 s; got {self}"
            )

    def __call__(
        self, prompts: np.ndarray, outputs: np.ndarray, cost: CostModel, rng: np.random.Generator
    ) -> np.ndarray:
        """(n,) seconds. The cost model is asked at 200 prompt lengths and interpolated, so that a million take no time."""
        base = cost.decode_step_s(1, 0)
        slope = (cost.decode_step_s(1, 10_000) - base) / 10_000
        grid = np.unique(np.geomspace(1, max(int(prompts.max()), 2), 200).astype(np.int64))
        prefill = np.interp(prompts, grid, [cost.prefill_s(int(p)) for p in grid])
        steps = np.maximum(
            (outputs if self.length == "own" else np.full(len(outputs), outputs.mean())) - 1, 0
        )
        alone = prefill + steps * (base + slope * (prompts + 1 + (steps - 1) / 2))
        return np.maximum(self.floor_s, self.scale * rng.choice(self.classes, len(prompts)) * alone)


@dataclass(frozen=True, eq=False)
class PredictorModel:
    """Predictions as a calibrated predictor would make them: residuals, log(true length / predicted centre), ascending, (R,).

    A request's residual is drawn from the table, its centre is log(truth) - residual, and its prediction the whole table around that
    centre: so the truth's quantile in its prediction is uniform, and the errors are the real predictor's. Centres are rounded to
    `step`, so that requests share prediction objects.

    Attributes:
        limit: the longest answer there can be.
    """

    residuals: np.ndarray
    limit: int = 2048
    bins: int = 40
    step: float = 0.02

    def __post_init__(self):
        if self.limit < 2:
            raise ValueError(f"the longest answer must be at least 2 tokens, got {self.limit}")

    @classmethod
    def from_card(cls, path: str | Path, limit: int | None = None) -> "PredictorModel":
        """The residuals of an exported predictor (its folder or predictor.json).

        Raises:
            ValueError: the card keeps none, or they are no residuals.
        """
        from predictor.decoder import read_card

        folder = Path(path)
        card = read_card(folder.parent if folder.is_file() else folder)
        if not card.get("residuals"):
            raise ValueError(
                f"{path}: its card keeps no residuals; make it anew with train.py or predictor.update, or give --predictor_sigma"
            )
        try:
            residuals, limit = (
                np.asarray(card["residuals"], float),
                limit or int(card["served_model"]["length_limit"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            residuals = np.array([np.nan])
        if (
            residuals.ndim != 1
            or not (np.abs(residuals) < 100).all()
            or (np.diff(residuals) < 0).any()
        ):
            raise ValueError(
                f"{path}: its card's residuals are no ascending list of numbers; make it anew with train.py or predictor.update"
            )
        return cls(residuals, limit)

    @classmethod
    def normal(cls, sigma: float, limit: int = 2048) -> "PredictorModel":
        """Errors with this standard deviation of the log length; an exported predictor's is 0.7 to 1, a perfect one's 0."""
        from statistics import NormalDist

        if not 0 <= sigma <= 10:
            raise ValueError(
                f"--predictor_sigma: wanted a standard deviation of the log length from 0 to 10, got {sigma}"
            )
        return cls(
            np.array(
                [NormalDist(0, max(sigma, 1e-3)).inv_cdf((i + 0.5) / 199) for i in range(199)]
            ),
            limit,
        )

    def predict(
        self, outputs: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[LengthPrediction, ...]]:
        """(index of each request's prediction (n,), the predictions)."""
        drawn = np.interp(
            rng.random(len(outputs)), np.linspace(0, 1, len(self.residuals)), self.residuals
        )
        centres = np.round((np.log(outputs) - drawn) / self.step).astype(np.int64)
        which, index = np.unique(centres, return_inverse=True)
        return index, tuple(self.around(float(c) * self.step) for c in which)

    def around(self, centre: float) -> LengthPrediction:
        """The table around a centre, as a histogram over the lengths up to the limit; what lies beyond counts as the limit."""
        edges = make_edges(self.bins, self.limit)
        inner = np.interp(
            np.log(edges[1:-1]), centre + self.residuals, np.linspace(0, 1, len(self.residuals))
        )
        mass = np.diff(np.concatenate([[0.0], inner, [1.0]])) + 1e-9
        return from_bins(mass / mass.sum(), edges)


def make_workload(
    name: str,
    count: int,
    rate: float,
    cost: CostModel,
    *,
    seed: int = 0,
    slo: SloRule = SloRule(),
    predictor: PredictorModel | None = None,
    predict_s: float = 1e-3,
    traces: str | Path = "../shared/data/traces",
    max_tokens: int | None = None,
) -> Workload:
    """One of WORKLOADS at a mean rate, in requests a second.

    Args:
        name: poisson and gamma draw log-normal lengths (median prompt 200, answer 100, at most 2,048); a trace brings its own.
        max_tokens: requests longer than this are dropped from a trace before it is repeated (they could not be served).
    Raises:
        ValueError: another name, no requests, or a rate of 0 or less.
    """
    if name not in WORKLOADS or count < 1 or not 0 < rate < math.inf:
        raise ValueError(
            f"wanted a workload of {WORKLOADS}, at least 1 request and a rate above 0; got {name}, {count}, {rate}"
        )
    rng = np.random.default_rng(seed)
    if name in TRACES:
        times, prompts, outputs = read_trace(name, traces)
        if max_tokens:
            kept = prompts + outputs < max_tokens
            if not kept.any():
                raise ValueError(f"--max_tokens {max_tokens}: no request of {name} is so short")
            times, prompts, outputs = times[kept], prompts[kept], outputs[kept]
        arrivals, prompts, outputs = repeated(count, times, prompts, outputs, rng)
    else:
        prompts, outputs = (
            lognormal_lengths(count, rng, 200, 1.0, 2048),
            lognormal_lengths(count, rng, 100, 1.0, 2048),
        )
        arrivals = (poisson_arrivals if name == "poisson" else gamma_arrivals)(count, rate, rng)
    slo_s = slo(prompts, outputs, cost, rng)
    index, predictions = (predictor or PredictorModel.normal(0.8)).predict(outputs, rng)
    made = Workload(arrivals, prompts, outputs, slo_s, index, predictions, predict_s)
    return made.at_rate(rate) if name in TRACES else made
