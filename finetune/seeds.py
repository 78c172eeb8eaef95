"""Several seeds of one run: mean and deviation of what they ended with. python -m finetune.seeds
OUTPUT_DIR reads OUTPUT_DIR/seed-*.
"""

import math
import re
import statistics
import sys
from collections.abc import Collection
from pathlib import Path

from chatglm.commands import Parser, run_command
from chatglm.runs import committed_checkpoints
from finetune.checkpoint import read_committed
from finetune.record import METRICS_FILE, read_run, read_steps


def final_metrics(output_dir: Path) -> dict[str, float]:
    """The last step and training loss of a run, and its last checkpoint's evaluation where it had
    one, as eval_loss and so on.

    Raises:
        ValueError: the folder holds no checkpoint, or its files lack these numbers.
    """
    folders = committed_checkpoints(output_dir)
    if not folders:
        raise ValueError(f"{output_dir} holds no checkpoint: did this run end?")
    manifest = read_committed(folders[-1])
    if missing := {"step", "metrics"} - manifest.keys():
        raise ValueError(f"{folders[-1]}: its manifest has no {min(missing)!r}")
    step = manifest["step"]
    values = {"step": step, "train_loss": train_loss(output_dir / METRICS_FILE, step)}
    for name, value in manifest["metrics"].items():
        values[f"eval_{name}"] = value
    for name, value in values.items():
        if value is None or not math.isfinite(value):
            raise ValueError(f"{output_dir}: {name} of step {step} is no finite number")
    return values


def train_loss(path: Path, step: int) -> float:
    """The training loss of a step in a metrics.jsonl; raises ValueError where it is not there."""
    found = None
    for line in read_steps(path):
        if line["step"] == step and "train_loss" in line:
            found = line
    if found is None:
        raise ValueError(f"{path}: no train_loss of step {step}, that of the last checkpoint")
    loss: float = found["train_loss"]
    return loss


def seeds_table(runs: dict[str, dict[str, float]], early: Collection[str] = ()) -> list[list[str]]:
    """Rows of text: a head, one run a row, mean, and sample deviation where there are two runs and
    more.

    Args:
        early: the runs that stopped early, each at a step of its own.
    Raises:
        ValueError: other runs ended at different steps, or any with different metrics.
    """
    first = next((name for name in runs if name not in early), next(iter(runs)))
    expected = runs[first]
    rows = [["run", *expected]]
    for name, values in runs.items():
        same_step = name in early or values["step"] == expected["step"]
        if values.keys() != expected.keys() or not same_step:
            raise ValueError(
                f"{name} ended at step {values['step']} with {', '.join(values)}; "
                f"{first} at step {expected['step']} with {', '.join(expected)}"
            )
        numbers = [f"{values[c]:.6f}" for c in expected if c != "step"]
        rows.append([name, str(values["step"]), *numbers])
    mean_row = ["mean"]
    deviation_row = ["deviation"]
    for column in expected:
        of_runs = [values[column] for values in runs.values()]
        mean_row.append(f"{statistics.mean(of_runs):.6f}")
        if len(runs) > 1:
            deviation_row.append(f"{statistics.stdev(of_runs):.6f}")
    return [*rows, mean_row, deviation_row] if len(runs) > 1 else [*rows, mean_row]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="finetune.seeds", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="the folder of the folders seed-N")
    folder = parser.parse_args(argv).output_dir
    return run_command(parser.prog, lambda: print_seeds(folder))


def print_seeds(folder: Path) -> None:
    """Print the table of the runs folder/seed-N; raises ValueError where there is none."""
    paths: dict[int, Path] = {}
    for path in folder.glob("seed-*"):
        if match := re.fullmatch(r"seed-(\d+)", path.name):
            paths[int(match.group(1))] = path
    if not paths:
        raise ValueError(f"{folder} holds no folder seed-N")
    runs: dict[str, dict[str, float]] = {}
    early: list[str] = []
    for seed in sorted(paths):
        runs[paths[seed].name] = final_metrics(paths[seed])
    for path in paths.values():
        if read_run(path).get("status") == "stopped early":
            early.append(path.name)
    rows = seeds_table(runs, early)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        padded = [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        print("  ".join(padded))


if __name__ == "__main__":
    sys.exit(main())
