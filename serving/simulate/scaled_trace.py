"""A recorded trace, many times over itself: requests for many replicas at the recorded rhythm."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.policies.lengths import expected_tokens, quantile_tokens
from serving.request import CostEstimator, Request
from serving.simulate.routers import Demand
from serving.simulate.workload import TRACES, PredictorModel, SloRule, Workload, read_trace

DEFAULT_SLO = SloRule()
BLOCK_TOKENS = 512  # of the blocks that Mooncake's traces name


@dataclass(frozen=True, eq=False)
class ScaledTrace:
    """Copies of a trace, each from a random moment on, merged by arrival.

    Gaps between the requests of one copy, and so of a conversation's turns, stay as recorded, but
    for the one factor that sets the rate.

    Attributes:
        workload: the requests.
        row, copy: (n,) int, of each request: which row of the trace, of which copy.
        blocks: of each row of the trace, the names of its prompt's blocks.
        shared: blocks below this name, such as a system's prompt, are the same in all copies.
    """

    workload: Workload
    row: np.ndarray
    copy: np.ndarray
    blocks: tuple[tuple[int, ...], ...]
    shared: int = 1
    block_tokens: int = BLOCK_TOKENS

    def demands(self) -> Iterator[tuple[Request, Demand]]:
        """The requests by arrival, and each as a router looks at it."""
        predictions = self.workload.predictions
        expected = [expected_tokens(prediction) for prediction in predictions]
        q90 = [quantile_tokens(prediction, 0.9) for prediction in predictions]
        names = 1 + max(max(blocks, default=0) for blocks in self.blocks)
        which = self.workload.prediction
        assert which is not None
        for request in self.workload.requests():
            k = int(which[request.id])
            blocks = self._blocks(request.id, names)
            length = request.output_tokens
            yield request, Demand(request.prompt_tokens, expected[k], q90[k], length, blocks)

    def _blocks(self, number: int, names: int) -> tuple[int, ...]:
        """The request's blocks, with names of its copy's own."""
        ahead = int(self.copy[number]) * names
        blocks = []
        for block in self.blocks[self.row[number]]:
            blocks.append(block if block < self.shared else block + ahead)
        return tuple(blocks)


def scale_trace(
    name: str,
    count: int,
    rate: float,
    cost: CostEstimator,
    *,
    seed: int = 0,
    slo: SloRule = DEFAULT_SLO,
    predictor: PredictorModel | None = None,
    predict_s: float = 1e-3,
    traces: str | Path = "../shared/data/traces",
    max_tokens: int = 32_768,
) -> ScaledTrace:
    """So many requests of a recorded trace at a mean rate, in requests a second.

    Args:
        max_tokens: longer requests are left out.
    Raises:
        FileNotFoundError, ValueError: as read_trace; or no request is so short.
    """
    rng = np.random.default_rng(seed)
    times, prompts, outputs, blocks = read_trace(name, traces)
    rows = np.flatnonzero(prompts + outputs < max_tokens)
    if not len(rows):
        raise ValueError(f"no request of {name} has less than {max_tokens} tokens")
    copies = -(-count // len(rows))
    period = float(times[-1]) * (1 + 1 / len(times))
    begins = rng.random(copies) * period
    arrivals = ((times[rows][None, :] + begins[:, None]) % period).ravel()
    order = np.argsort(arrivals, kind="stable")[:count]
    row, copy = rows[order % len(rows)], order // len(rows)
    prompts, outputs = prompts[row], outputs[row]
    slo_s = slo(prompts, outputs, cost, rng)
    index, predictions = (predictor or PredictorModel.normal(0.8)).predict(outputs, rng)
    workload = Workload(arrivals[order], prompts, outputs, slo_s, index, predictions, predict_s)
    return ScaledTrace(workload.at_rate(rate), row, copy, blocks)


def has_blocks(name: str) -> bool:
    """Whether a trace names the beginnings that its prompts share."""
    return TRACES[name].endswith(".jsonl")
