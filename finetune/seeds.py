"""Several seeds of one run: mean and deviation of what they ended with. python -m finetune.seeds
OUTPUT_DIR reads OUTPUT_DIR/seed-*.
"""

import math
import re
import statistics
import sys
from pathlib import Path

from chatglm.commands import Parser, run_command
from finetune.checkpoint import committed_checkpoints, read_manifest
from finetune.record import METRICS_FILE, read_run, read_steps


def final_metrics(output_dir: Path) -> dict[str, float]:
    """The last step and training loss of a run, and its last checkpoint's evaluation where it had
    one, as eval_loss and so on.

    Raises:
        ValueError: the folder holds no checkpoint, or its files do not tell these numbers.
    """
    folders = committed_checkpoints(output_dir)
    if not folders:
        raise ValueError(f"{output_dir} holds no checkpoint: did this run end?")
    manifest, path = read_manifest(folders[-1]), output_dir / METRICS_FILE
    if missing := {"step", "metrics"} - manifest.keys():
        raise ValueError(f"{folders[-1]}: its manifest has no {min(missing)!r}")
    losses = {line["step"]: line["train_loss"] for line in read_steps(path) if "train_loss" in line}
    if manifest["step"] not in losses:
        raise ValueError(
            f"{path}: no train_loss of step {manifest['step']}, that of the last checkpoint"
        )
    found = {"step": manifest["step"], "train_loss": losses[manifest["step"]]} | {
        f"eval_{k}": v for k, v in manifest["metrics"].items()
    }
    if unfit := [
        name for name, value in found.items() if value is None or not math.isfinite(value)
    ]:
        raise ValueError(f"{output_dir}: {unfit[0]} of step {found['step']} is no finite number")
    return found


def summary(runs: dict[str, dict[str, float]], early: set[str] = frozenset()) -> list[list[str]]:
    """Rows of text: a head, one run a row, mean, and sample deviation where there are two runs and
    more.

    Args:
        early: the runs that stopped early, each at a step of its own.
    Raises:
        ValueError: other runs ended at different steps, or any with different metrics.
    """
    first = next((name for name in runs if name not in early), next(iter(runs)))
    names = runs[first]
    for name, found in runs.items():
        if found.keys() != names.keys() or name not in early and found["step"] != names["step"]:
            raise ValueError(
                f"{name} ended at step {found['step']} with {', '.join(found)}; "
                f"{first} at step {names['step']} with {', '.join(names)}"
            )
    rows = [["run", *names]] + [
        [name, str(found["step"]), *(f"{found[c]:.6f}" for c in names if c != "step")]
        for name, found in runs.items()
    ]
    values = [[found[c] for found in runs.values()] for c in names]
    rows.append(["mean", *(f"{statistics.mean(v):.6f}" for v in values)])
    if len(runs) > 1:
        rows.append(["deviation", *(f"{statistics.stdev(v):.6f}" for v in values)])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="finetune.seeds", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="the folder of the folders seed-N")
    folder = parser.parse_args(argv).output_dir
    return run_command(parser.prog, lambda: run(folder))


def run(folder: Path) -> None:
    found = {
        int(match.group(1)): path
        for path in folder.glob("seed-*")
        if (match := re.fullmatch(r"seed-(\d+)", path.name))
    }
    if not found:
        raise ValueError(f"{folder} holds no folder seed-N")
    runs = {found[seed].name: final_metrics(found[seed]) for seed in sorted(found)}
    rows = summary(
        runs,
        {path.name for path in found.values() if read_run(path).get("status") == "stopped early"},
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(
        "\n".join(
            "  ".join(
                cell.ljust(width) if not i else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        )
    )


if __name__ == "__main__":
    sys.exit(main())
