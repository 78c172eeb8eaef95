"""Requests over time: arrivals, lengths, predictions and latency objectives.

Kept as columns (numpy), and made into requests one by one when they are due: a million of them need
50 MB, not a million objects.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chatglm.files import is_lfs_pointer, pointer_error
from predictor.prediction import LengthPrediction, from_bins, make_edges
from serving.request import CostEstimator, Request

TRACES = {  # files, plain or packed with gzip (.gz)
    "azure_conv": "AzureLLMInferenceTrace_conv.csv",
    "azure_code": "AzureLLMInferenceTrace_code.csv",
    "mooncake": "mooncake_conversation_trace.jsonl",
    "mooncake_synthetic": "mooncake_synthetic_trace.jsonl",
}
WORKLOADS = ("poisson", "gamma", *TRACES)


@dataclass(frozen=True, eq=False)
class Workload:
    """n requests by arrival. Columns of equal length; predictions index `predictions`.

    Attributes:
        arrival_s, slo_s: (n,) float.
        prompt_tokens, output_tokens: (n,) int.
        prediction: (n,) int, which of `predictions`; None for none.
        predict_s: seconds that one prediction takes.
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
        """One by one, by arrival.

        Without predictions and their cost for policies that use none.
        """
        predicted = predicts and self.prediction is not None
        predict_s = self.predict_s if predicted else 0.0
        columns = (self.prompt_tokens, self.arrival_s, self.slo_s, self.output_tokens)
        for start in range(0, len(self), 4096):
            part = slice(start, start + 4096)
            lists = [column[part].tolist() for column in columns]
            which: list[int | None] = [None] * len(lists[0])
            if predicts and self.prediction is not None:
                which = self.prediction[part].tolist()
            rows = zip(*lists, which)
            for i, (prompt, arrival, slo, output, k) in enumerate(rows, start):
                prediction = None if k is None else self.predictions[k]
                yield Request(i, prompt, arrival, slo, prediction, output, predict_s)

    def part(self, mask: np.ndarray) -> "Workload":
        """The requests of a mask or index; predictions stay shared."""
        which = None if self.prediction is None else self.prediction[mask]
        return replace(
            self,
            arrival_s=self.arrival_s[mask],
            prompt_tokens=self.prompt_tokens[mask],
            output_tokens=self.output_tokens[mask],
            slo_s=self.slo_s[mask],
            prediction=which,
        )

    def at_rate(self, requests_per_s: float) -> "Workload":
        """The same requests, their gaps scaled to this mean rate."""
        scale, gaps = 1.0, len(self) - 1
        if gaps > 0:
            span = float(self.arrival_s[-1] - self.arrival_s[0])
            if span > 0:
                scale = gaps / (requests_per_s * span)
        return replace(self, arrival_s=(self.arrival_s - self.arrival_s[0]) * scale)


# ---- arrivals


def poisson_arrivals(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(count,) seconds, exponential gaps of mean 1 / rate."""
    return np.cumsum(rng.exponential(1 / rate, count))


def gamma_arrivals(
    count: int, rate: float, rng: np.random.Generator, variation: float = 3.0
) -> np.ndarray:
    """(count,) seconds, gamma gaps of mean 1 / rate and this coefficient of variation.

    Above 1 requests come in bursts.
    """
    shape = 1 / variation**2
    return np.cumsum(rng.gamma(shape, 1 / (rate * shape), count))


# ---- lengths


def lognormal_lengths(
    count: int, rng: np.random.Generator, median: float, sigma: float, most: int
) -> np.ndarray:
    """(count,) tokens from 1 to `most`."""
    lengths = np.round(median * np.exp(sigma * rng.standard_normal(count)))
    return np.clip(lengths, 1, most).astype(np.int64)


class Trace(NamedTuple):
    """The requests of a recorded trace, by arrival.

    Attributes:
        times: (n,) seconds from the first.
        prompts, outputs: (n,) tokens; empty ones count as one.
        blocks: of each request, the names of its prompt's blocks; () where the trace has none.
    """

    times: np.ndarray
    prompts: np.ndarray
    outputs: np.ndarray
    blocks: tuple[tuple[int, ...], ...]


def read_trace(name: str, folder: str | Path) -> Trace:
    """A recorded trace from its file in the folder.

    Raises:
        FileNotFoundError: the trace is not in the folder.
        ValueError: the file is not a trace.
    """
    path = trace_file(name, folder)
    if is_lfs_pointer(path):
        raise pointer_error(path)
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            rows = list(parse_trace(file, TRACES[name]))
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
        cause = " ".join(str(error).split())[:100]
        raise ValueError(f"{path}: not a recorded trace: {cause}") from None
    if not rows:
        raise ValueError(f"{path}: no requests in it")
    *columns, blocks = zip(*sorted(rows))
    times, prompts, outputs = map(np.array, columns)
    return Trace(times - times[0], np.maximum(prompts, 1), np.maximum(outputs, 1), blocks)


def trace_file(name: str, folder: str | Path) -> Path:
    """A trace's file, plain or packed. Raises FileNotFoundError."""
    plain = Path(folder) / TRACES[name]
    for path in (plain, plain.with_name(f"{plain.name}.gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no such trace: {plain}[.gz]; --traces names the folder it is in")


def parse_trace(
    file: Iterable[str], name: str
) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
    """(seconds, prompt tokens, answer tokens, the prompt's blocks) of each row.

    Raises what the parsers raise where a row is something else.
    """
    if name.endswith(".csv"):
        lines = csv.reader(file)
        next(lines, None)  # the heading
        for time, prompt, output in lines:
            yield datetime.fromisoformat(time[:26]).timestamp(), int(prompt), int(output), ()
        return
    for row in map(json.loads, file):
        lengths = int(row["input_length"]), int(row["output_length"])
        yield float(row["timestamp"]) / 1000, *lengths, tuple(row.get("hash_ids", ()))


def repeat_trace(
    count: int,
    times: np.ndarray,
    prompts: np.ndarray,
    outputs: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(times, prompts, outputs) of `count` requests of a trace, from a random place on.

    Continues from its start as often as needed.
    """
    n = len(times)
    where = int(rng.integers(n)) + np.arange(count)
    period = times[-1] + times[-1] / max(n - 1, 1)
    return times[where % n] + where // n * period, prompts[where % n], outputs[where % n]


# ---- objectives and predictions


@dataclass(frozen=True)
class SloRule:
    """Latency objectives: slo_s = max(floor_s, scale x class x latency of the request alone).

    A stated rule in place of the random objectives of UELLM's data. Alone, on an idle engine:
    prefill_s(prompt) + decode_s(1, prompt + 1, output - 1).

    Attributes:
        length: "typical": the output is the workload's mean, as users who wait for an answer do not
            know its length; "own": the request's own, so that the objective is proportional for
            all; but then it reveals the true length to a policy.
        classes: factors given out at random, equally often: users differ in how long they wait.
    """

    scale: float = 5.0
    floor_s: float = 1.0
    length: str = "typical"
    classes: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        finite = math.isfinite(self.scale) and math.isfinite(self.floor_s)
        in_range = finite and self.scale > 0 and self.floor_s >= 0
        if self.length not in ("typical", "own") or not in_range:
            raise ValueError(
                "wanted length typical or own, a scale above 0 and a floor of at least 0 s; "
                f"got {self}"
            )

    def __call__(
        self,
        prompts: np.ndarray,
        outputs: np.ndarray,
        cost: CostEstimator,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(n,) seconds.

        The cost model is evaluated at 200 prompt lengths and interpolated, so that a million
        requests take no time.
        """
        base = cost.decode_step_s(1, 0)
        slope = (cost.decode_step_s(1, 10_000) - base) / 10_000
        grid = np.unique(np.geomspace(1, max(int(prompts.max()), 2), 200).astype(np.int64))
        prefill = np.interp(prompts, grid, [cost.prefill_s(int(p)) for p in grid])
        answers = outputs if self.length == "own" else np.full(len(outputs), outputs.mean())
        steps = np.maximum(answers - 1, 0)
        alone = prefill + steps * (base + slope * (prompts + 1 + (steps - 1) / 2))
        return np.maximum(self.floor_s, self.scale * rng.choice(self.classes, len(prompts)) * alone)


@dataclass(frozen=True, eq=False)
class PredictorModel:
    """Predictions as a calibrated predictor makes them, from a table of residuals.

    A request's residual is drawn from the table, its centre is log(truth) - residual, and its
    prediction is the whole table around that centre. So the truth's quantile in its prediction is
    uniform, and the errors are the real predictor's. Centres are rounded to `step`, so that
    requests share prediction objects.

    Attributes:
        residuals: (R,) log(true length / predicted centre), ascending.
        limit: the longest answer there can be, in tokens.
        bins: of a prediction's histogram.
    """

    residuals: np.ndarray
    limit: int = 2048
    bins: int = 40
    step: float = 0.02

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise ValueError(f"the longest answer must be at least 2 tokens, got {self.limit}")

    @classmethod
    def from_card(cls, path: str | Path, limit: int | None = None) -> "PredictorModel":
        """The residuals of an exported predictor (its folder or predictor.json).

        Raises:
            ValueError: the card has no residuals, or they are not an ascending list of numbers.
        """
        from predictor.decoder import read_card

        folder = Path(path)
        card = read_card(folder.parent if folder.is_file() else folder)
        if not card.get("residuals"):
            raise ValueError(
                f"{path}: its card has no residuals; train it again with train.py or "
                "predictor.update, or give --predictor_sigma"
            )
        try:
            residuals = np.asarray(card["residuals"], float)
            longest = limit or int(card["served_model"]["length_limit"])
        except (KeyError, TypeError, ValueError, OverflowError):
            residuals, longest = np.array([np.nan]), 0
        in_range = residuals.ndim == 1 and (np.abs(residuals) < 100).all()
        if not in_range or (np.diff(residuals) < 0).any():
            raise ValueError(
                f"{path}: its card's residuals are no ascending list of numbers; "
                "train it again with train.py or predictor.update"
            )
        return cls(residuals, longest)

    @classmethod
    def normal(cls, sigma: float, limit: int = 2048) -> "PredictorModel":
        """Normal errors with this standard deviation of the log length.

        An exported predictor's is 0.7 to 1, a perfect one's 0.
        """
        from statistics import NormalDist

        if not 0 <= sigma <= 10:
            raise ValueError(
                "--predictor_sigma: wanted a standard deviation of the log length from 0 to 10, "
                f"got {sigma}"
            )
        errors = NormalDist(0, max(sigma, 1e-3))
        quantiles = (np.arange(199) + 0.5) / 199
        return cls(np.array(list(map(errors.inv_cdf, quantiles.tolist()))), limit)

    def predict(
        self, outputs: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[LengthPrediction, ...]]:
        """(index of each request's prediction (n,), the predictions)."""
        quantiles = np.linspace(0, 1, len(self.residuals))
        drawn = np.interp(rng.random(len(outputs)), quantiles, self.residuals)
        centres = np.round((np.log(outputs) - drawn) / self.step).astype(np.int64)
        which, index = np.unique(centres, return_inverse=True)
        return index, tuple(map(self.around, (which * self.step).tolist()))

    def around(self, centre: float) -> LengthPrediction:
        """The table around a centre, as a histogram over the lengths up to the limit.

        What lies beyond counts as the limit.
        """
        edges = make_edges(self.bins, self.limit)
        quantiles = np.linspace(0, 1, len(self.residuals))
        inner = np.interp(np.log(edges[1:-1]), centre + self.residuals, quantiles)
        mass = np.diff(np.concatenate([[0.0], inner, [1.0]])) + 1e-9
        return from_bins(mass / mass.sum(), edges)


def make_workload(
    name: str,
    count: int,
    rate: float,
    cost: CostEstimator,
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
        name: poisson and gamma draw log-normal lengths (median prompt 200, answer 100, at most
            2,048); a trace has its own.
        max_tokens: requests longer than this are dropped from a trace before it is repeated (they
            could not be served).
    Raises:
        ValueError: another name, no requests, or a rate of 0 or less.
    """
    if name not in WORKLOADS or count < 1 or not 0 < rate < math.inf:
        raise ValueError(
            f"wanted a workload of {WORKLOADS}, at least 1 request and a rate above 0; "
            f"got {name}, {count}, {rate}"
        )
    rng = np.random.default_rng(seed)
    if name in TRACES:
        times, prompts, outputs, _ = read_trace(name, traces)
        if max_tokens:
            fits = prompts + outputs < max_tokens
            if not fits.any():
                raise ValueError(f"--max_tokens {max_tokens}: no request of {name} is so short")
            times, prompts, outputs = times[fits], prompts[fits], outputs[fits]
        arrivals, prompts, outputs = repeat_trace(count, times, prompts, outputs, rng)
    else:
        prompts = lognormal_lengths(count, rng, 200, 1.0, 2048)
        outputs = lognormal_lengths(count, rng, 100, 1.0, 2048)
        make_arrivals = poisson_arrivals if name == "poisson" else gamma_arrivals
        arrivals = make_arrivals(count, rate, rng)
    slo_s = slo(prompts, outputs, cost, rng)
    index, predictions = (predictor or PredictorModel.normal(0.8)).predict(outputs, rng)
    made = Workload(arrivals, prompts, outputs, slo_s, index, predictions, predict_s)
    return made.at_rate(rate) if name in TRACES else made
