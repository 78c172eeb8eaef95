"""The serving monitor's log: answered requests, with the predictions that they were served by.

numpy only, apart from what finetune.rows imports.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.rows.formats import BadRow
from finetune.rows.sources import read_json_items
from predictor.labels import LabelledPrompt, parse_example
from predictor.prediction import LengthPrediction


@dataclass(frozen=True)
class MonitorLog:
    """Rows of a monitor's log, the newest last, one LabelledPrompt each.

    Attributes:
        predictions: for each row the prediction that it was served by, or None.
        bad: number of bad rows skipped.
    """

    examples: list[LabelledPrompt]
    predictions: list[LengthPrediction | None]
    bad: int


def read_log(paths: list[str], served_model: str, on_bad_row: str = "skip") -> MonitorLog:
    """Read a monitor's log; rows that name no model are of `served_model`.

    Rows that an adapter answered are left out: their lengths are another model's.

    Raises:
        BadRow: the first bad row, with on_bad_row "error"; or no good row at all.
    """
    examples, predictions, bad = [], [], 0
    for path in map(Path, paths):
        for place, item in read_json_items(path):
            try:
                if isinstance(item, BadRow):
                    raise item
                if isinstance(item, dict) and item.get("adapter"):
                    continue
                example = parse_example(item, place, served_model, None, path.name)
                prediction = parse_prediction(item, place)
            except BadRow:
                if on_bad_row == "error":
                    raise
                bad += 1
                continue
            examples.append(example)
            predictions.append(prediction)
    if not examples:
        skipped = f" ({bad} bad ones skipped)" if bad else ""
        raise BadRow(f"--log {', '.join(paths)}: no rows{skipped}")
    return MonitorLog(examples, predictions, bad)


def parse_prediction(item: Any, place: str) -> LengthPrediction | None:
    """The "prediction" of a row of the log, None where it has none.

    Args:
        item: an object of JSON, as `parse_example` takes it.
    Raises:
        BadRow: the prediction is damaged.
    """
    if item.get("prediction") is None:
        return None
    try:
        prediction = LengthPrediction.from_dict(item["prediction"])
        if is_distribution(prediction):
            return prediction
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise BadRow(f'{place}: "prediction" is not what LengthPrediction.to_dict() gives')


def is_distribution(prediction: LengthPrediction) -> bool:
    """Whether the masses are finite, not negative and not all 0, over ascending edges."""
    mass, edges = prediction.probabilities, prediction.edges
    if mass.ndim != 1 or edges.shape != (len(mass) + 1,):
        return False
    if not np.isfinite(mass).all() or not np.isfinite(edges).all():
        return False
    return bool((mass >= 0).all() and mass.sum() > 0 and (np.diff(edges) > 0).all())


def newest_rows(log: MonitorLog, served_model: str, count: int) -> MonitorLog:
    """The log from the `count`-th last row of the served model on."""
    of_model = []
    for i, example in enumerate(log.examples):
        if example.labels[0].served_model == served_model:
            of_model.append(i)
    newest = of_model[-count:]
    first = newest[0] if newest else 0
    return replace(log, examples=log.examples[first:], predictions=log.predictions[first:])


def served_coverage(log: MonitorLog, served_model: str) -> dict | None:
    """Coverage of the predictions that requests were served by; None where the log has none."""
    rows = []
    for prediction, example in zip(log.predictions, log.examples):
        label = example.labels[0]
        if prediction is not None and label.served_model == served_model:
            rows.append((prediction, label))
    if not rows:
        return None
    coverage = {}
    for name, q in (("coverage_90", 0.9), ("coverage_975", 0.975)):
        within = []
        for prediction, label in rows:
            bound = prediction.quantile(q)
            within.append(label.tokens <= bound if label.finished else label.tokens < bound)
        coverage[name] = float(np.mean(within))
    return {"rows": len(rows)} | coverage
