"""The lengths of running answers, predicted anew from their hidden states."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from typing import Protocol

import numpy as np

from predictor.prediction import LengthPrediction
from serving.engines.pass_plans import Sequence
from serving.engines.state_tap import StateReading, StateTap


class StateRereader(Protocol):
    """What predicts a length from states; as predictor.rereading.Rereader.

    Attributes:
        layers: numbers of the blocks whose outputs it reads, from 1.
        every: answer tokens between two readings.
        hidden_size: of the states.
        weighs_entropy: the means over prompts are StateReading.entropy.
    """

    layers: tuple[int, ...]
    every: int
    hidden_size: int
    weighs_entropy: bool

    def read(
        self,
        at: np.ndarray,
        last: np.ndarray,
        mean: np.ndarray,
        priors: Listed[LengthPrediction | None],
    ) -> list[LengthPrediction]:
        """Predictions of N whole lengths.

        Args:
            at: (N,), answer tokens made. last, mean: (N, L, hidden_size), as StateReading's.
            priors: what was predicted before: at arrival, later at the prompt's end.
        """


class StepRereads:
    """The readings of an engine's steps, and what a rereader makes of them.

    Attributes:
        tap: collects them.
        count: readings so far that became predictions.
        seconds: that the rereader took for them.
    Raises:
        ValueError: the rereader is of states of another size.
    """

    def __init__(self, rereader: StateRereader, hidden_size: int):
        if rereader.hidden_size != hidden_size:
            raise ValueError(
                f"the rereader reads states of {rereader.hidden_size} numbers, the model's have "
                f"{hidden_size}: it was trained for another model"
            )
        self.rereader = rereader
        self.tap = StateTap(rereader.layers, rereader.every, rereader.weighs_entropy)
        self.count = 0
        self.seconds = 0.0

    def read(self, rows: Mapping[int, Sequence]) -> tuple[tuple[int, LengthPrediction], ...]:
        """The newest prediction of each row that was read since the last call, as one batch.

        A reading without a mean (StateTap) gives none.

        Args:
            rows: by request id, those that still run.
        """
        newest: dict[int, StateReading] = {}
        for reading in self.tap.take():
            if reading.request_id in rows and reading.mean is not None:
                newest[reading.request_id] = reading
        if not newest:
            return ()
        begin = time.perf_counter()
        readings = list(newest.values())
        predictions = self.rereader.read(
            np.array([reading.at for reading in readings]),
            np.stack([reading.last for reading in readings]),
            np.stack(list(map(self._mean, readings))),
            [prior_of(rows[request_id]) for request_id in newest],
        )
        for reading, prediction in zip(readings, predictions):
            if reading.at == 0:
                rows[reading.request_id].answer.after_prompt = prediction
        self.count += len(readings)
        self.seconds += time.perf_counter() - begin
        return tuple(zip(newest, predictions))

    def _mean(self, reading: StateReading) -> np.ndarray:
        """The mean that the rereader was trained on."""
        mean = reading.entropy if self.rereader.weighs_entropy else reading.mean
        assert mean is not None  # as `read` chooses readings
        return mean


def prior_of(row: Sequence) -> LengthPrediction | None:
    """What a reading is pooled with: the answer's posterior at the end of its prompt, before that
    what was predicted at its arrival. None where nothing was predicted then.
    """
    if row.prior is None or row.answer.after_prompt is None:
        return row.prior
    return row.answer.after_prompt
