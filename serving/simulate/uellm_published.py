"""UELLM's runs (arXiv 2409.14961) repeated: each of its systems by its own rules.

ChatGLM2-6B on RTX 3090, its 100 Chinese instructions with three recorded answer lengths each
(length_runs.csv), all requests at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from predictor.prediction import LengthPrediction, from_bins
from serving.cost_model.model import CostModel, ModelSizes, read_profile
from serving.policies.lengths import expected_tokens
from serving.policies.static import BatchShape, Static
from serving.request import Batch, CostEstimator, Limits, Record, Request, View
from serving.simulate.compare import serve
from serving.simulate.engine import SimulatedEngine
from serving.simulate.experiment_common import LONGEST, TableRow
from serving.simulate.statistics import interval
from serving.simulate.uellm_lengths import RecordedAnswers
from serving.simulate.workload import Workload

LOADING_S = 7.0  # Morphling's second loading of the model


@dataclass(frozen=True)
class ChunkedBatching:
    """The batching of UELLM's scripts.

    Sorts, then cuts where a batch has `rows` rows or its predicted lengths sum to `most_tokens`.

    Attributes:
        sort: arrival; length (its S3: by predicted length); slo (its UELLM: by SLO + length_weight
            x predicted length).
        extra_tokens: prompt and answer of a batch end at its largest predicted length + this;
            None: at 2,048.
        longest_tokens: and no later.
    """

    sort: str = "arrival"
    rows: int = 10
    most_tokens: float = float("inf")
    extra_tokens: int | None = None
    longest_tokens: int = LONGEST
    length_weight: float = 0.5
    predicts: ClassVar[bool] = True

    def length(self, request: Request) -> float:
        return expected_tokens(request.prediction)

    def key(self, record: Record) -> tuple[float, float, int]:
        request = record.request
        first = {
            "arrival": 0.0,
            "length": record.length,
            "slo": request.slo_s + self.length_weight * record.length,
        }[self.sort]
        return first, request.arrival_s, request.id

    def __call__(self, view: View, cost: CostEstimator) -> list[Batch]:
        groups: list[list[Record]] = []
        total = 0.0
        for record in sorted(view.waiting.most_urgent(), key=self.key):
            full = not groups or len(groups[-1]) >= self.rows
            if full or total + record.length > self.most_tokens:
                groups.append([])
                total = 0.0
            groups[-1].append(record)
            total += record.length
        return [self.padded_batch(records, view.limits) for records in groups]

    def padded_batch(self, records: Sequence[Record], limits: Limits) -> Batch:
        """One batch of these records, stopped `extra_tokens` after its largest prediction."""
        shape, prompt = BatchShape(limits), max(record.context_tokens for record in records)
        for record in records:
            shape.try_add(record, LONGEST - prompt)
        if self.extra_tokens is None:
            return shape.batch(None)
        longest = max(record.length for record in records)
        end = min(round(longest) + self.extra_tokens, self.longest_tokens)
        return shape.batch(max(1, end - prompt))


@dataclass(frozen=True)
class PublishedSystem:
    """One of the paper's systems.

    Attributes:
        gpus: that its script loads the model on, by ChatGLM's even rule.
        logged: the start of its runs' paths.
        stress_gpus: Morphling serves half of the batches on so many first, then loads the model
            again.
    """

    policy: ChunkedBatching
    gpus: int
    logged: str
    stress_gpus: int = 0


PUBLISHED = {
    "UELLM-all": PublishedSystem(ChunkedBatching("slo", extra_tokens=50), 1, "UELM/UELM-all/"),
    "UELLM-batch": PublishedSystem(
        ChunkedBatching("slo", extra_tokens=500, longest_tokens=1024, length_weight=0.3),
        4,
        "UELM/UELM-batch/",
    ),
    "UELLM-deploy": PublishedSystem(ChunkedBatching(), 1, "UELM/UELM-deploy/"),
    "S3": PublishedSystem(ChunkedBatching("length", 20, 1024), 4, "UELM/S3/"),
    "Morphling": PublishedSystem(ChunkedBatching(), 1, "UELM/Morphing/", stress_gpus=2),
    "baseline": PublishedSystem(ChunkedBatching(), 1, "UELM/baseline/300/"),
}


def exact_prediction(tokens: int) -> LengthPrediction:
    """All mass within half a token of this length."""
    return from_bins(np.array([1e-9, 1.0]), np.array([0.0, tokens - 0.5, tokens + 0.5]))


def dealt_objectives(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) whole seconds, drawn by place as UELLM's dataset/deal.py draws them.

    The first 100 in five ranges of 20 places each, from 220 to 250 s down to 90 to 100 s; all
    others from 150 to 300 s.
    """
    ranges = [(220, 250), (180, 220), (150, 180), (100, 120), (90, 100)]
    ranges += [(150, 300)] * (count // 20)
    drawn = [rng.integers(low, high + 1, 20) for low, high in ranges]
    return np.concatenate(drawn)[:count].astype(float)


def published_workload(recorded: RecordedAnswers, count: int, seed: int) -> Workload:
    """The paper's requests, all at time 0.

    The predicted length is the reference answer's characters, as the repository's data has it; the
    true one is that of one of the three runs. Objectives are drawn as its dataset/deal.py draws
    them, by place in the file.
    """
    rng = np.random.default_rng(seed)
    which = np.arange(count) % len(recorded.prompts)
    slo_s = dealt_objectives(count, rng)
    lengths, index = np.unique(recorded.reference[which], return_inverse=True)
    predictions = tuple(map(exact_prediction, lengths.tolist()))
    answers = recorded.answers[which, rng.integers(0, 3, count)]
    return Workload(np.zeros(count), recorded.prompts[which], answers, slo_s, index, predictions)


def published_rows(recorded: RecordedAnswers, count: int, seeds: int) -> list[TableRow]:
    """One row a system: simulated figures, beside those of its logged runs of as many requests."""
    model, profile = ModelSizes.from_config("chatglm2-6b"), read_profile("rtx3090")
    rows = []
    for name, system in PUBLISHED.items():
        cost = CostModel.of(model, profile.cluster(system.gpus), profile)
        stress = None
        if system.stress_gpus:
            stress = CostModel.of(model, profile.cluster(system.stress_gpus), profile)
        simulated = []
        for seed in range(seeds):
            workload = published_workload(recorded, count, seed)
            simulated.append(run_published(system, workload, cost, stress))
        logged = []
        for run in recorded.logs:
            if run["path"].startswith(system.logged) and int(run["n_queries"]) == count:
                logged.append(logged_figures(run))
        rows.append(published_row(name, system.gpus, simulated, logged))
    return rows


def run_published(
    system: PublishedSystem, workload: Workload, cost: CostModel, stress: CostModel | None
) -> dict[str, float]:
    """Figures of one run by column; `stress` is what Morphling serves half of the batches on."""
    count, policy = len(workload), Static(system.policy)
    limits = Limits(64, cost.kv_capacity_tokens, LONGEST)
    _, collector, engines = serve(policy, workload, [SimulatedEngine(cost, limits)])
    finish_s = np.asarray(collector.columns["finish_s"])
    late = finish_s > np.asarray(collector.columns["slo_s"])
    seconds = finish_s.max()
    if stress is not None:  # reported in its time, not in its objectives
        half = workload.part(np.arange(count // 2))
        metrics, _, _ = serve(policy, half, [SimulatedEngine(stress, limits)])
        seconds += metrics["span_s"] + LOADING_S
    return {
        "time s": seconds,
        "mean latency s": finish_s.mean(),
        "late %": late.mean() * 100,
        "padded tokens/s": (engines[0].step_rows + count) / seconds,
        "useful tokens/s": np.asarray(collector.columns["output"]).sum() / seconds,
        "answers cut %": np.asarray(collector.columns["cut"]).mean() * 100,
    }


def logged_figures(run: dict[str, str]) -> dict[str, float]:
    """Figures of one logged run (measured.csv), by column."""
    seconds = float(run["time_s"])
    return {
        "time s": seconds,
        "late %": 100 * float(run["slo_default_rate"]),
        "padded tokens/s": float(run["padded_tokens"]) / seconds,
    }


def published_row(
    name: str, gpus: int, simulated: list[dict[str, float]], logged: list[dict[str, float]]
) -> TableRow:
    """Intervals over seeds; a logged column is None where no run was logged."""
    row: TableRow = {"system": name, "GPUs": gpus}
    for key in simulated[0]:
        row[key] = interval([figures[key] for figures in simulated])
        if key in ("time s", "late %", "padded tokens/s"):
            runs = [figures[key] for figures in logged]
            row[f"{key}, logged"] = interval(runs) if runs else None
    return row
