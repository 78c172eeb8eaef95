"""What the experiments share: their flags, the predictor's errors, and tables in Markdown."""

from dataclasses import dataclass, field

import numpy as np

from serving.simulate.workload import PredictorModel

LONGEST = 2048
PREDICT_S = 7.7e-3  # the encoder, p50 (docs/results.md)
# Residuals of the log length, 21 quantiles, cross-validated: the encoder of
# `python benchmarks/predictor.py` with a regression head on ChatGLM2-6B's answers to 644
# instructions (tau 0.46). --predictor DIR takes those of another exported predictor.
RESIDUALS = (
    -2.85,
    -1.09,
    -0.75,
    -0.51,
    -0.39,
    -0.26,
    -0.15,
    -0.11,
    -0.04,
    0.01,
    0.06,
    0.11,
    0.17,
    0.2,
    0.26,
    0.31,
    0.37,
    0.46,
    0.6,
    0.79,
    3.54,
)

# A cell is text, a number, or (mean, half the width of its confidence interval).
Cell = str | float | tuple[float, float] | None
TableRow = dict[str, Cell]


@dataclass(frozen=True)
class ExperimentFlags:
    """The flags of `python -m serving.simulate` that experiments read.

    Attributes:
        requests: of each run of the fair setting.
        predictor: an exported predictor's folder; None for RESIDUALS.
        uellm_data: folder of UELLM's recorded lengths; None for uellm_lengths' own choice.
        traces: folder of the recorded traces.
    """

    seeds: int = 5
    requests: int = 2000
    predictor: str | None = None
    uellm_data: str | None = None
    traces: str = "../shared/data/traces"

    def predictor_model(self) -> PredictorModel:
        """Predictions with the residuals of --predictor, else with RESIDUALS."""
        if self.predictor:
            return PredictorModel.from_card(self.predictor, LONGEST)
        return PredictorModel(np.array(RESIDUALS), LONGEST)


@dataclass
class PrintedTables:
    """Tables by title, printed as they are added."""

    tables: dict[str, list[TableRow]] = field(default_factory=dict)

    def add(self, title: str, rows: list[TableRow]) -> None:
        print_markdown(title, rows)
        self.tables[title] = rows


def print_markdown(title: str, rows: list[TableRow]) -> None:
    """Print rows of equal keys as a Markdown table under its title."""
    print(f"\n{title}\n", flush=True)
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = [format_cell(row[name]) for name in names]
        print("| " + " | ".join(cells) + " |")


def format_cell(value: Cell) -> str:
    """A number to 3 digits, from 1,000 on without decimals; "mean ± half width" for a pair."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, tuple):
        mean, half = value
        return format_cell(mean) + (f" ± {format_cell(half)}" if np.isfinite(half) and half else "")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def mean_of(row: TableRow, name: str) -> float:
    """The mean of a cell that holds (mean, half width).

    Raises:
        TypeError: the cell holds something else.
    """
    value = row[name]
    if not isinstance(value, tuple):
        raise TypeError(f"column {name!r}: wanted (mean, half width), got {value!r}")
    return value[0]
