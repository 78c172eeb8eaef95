"""Several seeds of one run: mean and deviation of what they ended with. python -m finetune.seeds OUTPUT_DIR reads OUTPUT_DIR/seed-*."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from finetune.checkpoint import committed_checkpoints, read_manifest


def final_metrics(output_dir: Path) -> dict[str, float]:
    """The last training loss of a run, and its last checkpoint's evaluation where it had one, as eval_loss and so on.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    folders = committed_checkpoints(output_dir)
    if not folders:
        raise ValueError(f"{output_dir} holds no checkpoint: did this run end?")
    manifest = read_manifest(folders[-1])
    told = (json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line["train_loss"] for line in told if "train_loss" in line}
    return {"step": manifest["step"], "train_loss": losses[manifest["step"]]} | {f"eval_{k}": v for k, v in manifest["metrics"].items()}


def summary(runs: dict[str, dict[str, float]]) -> list[list[str]]:
    """Rows of text: a head, one run a row, mean, and sample deviation where there are two runs and more.

    Raises:
        ValueError: the runs ended at different steps or with different metrics.
    """
    first, names = next(iter(runs.items()))
    for name, found in runs.items():
        if found.keys() != names.keys() or found["step"] != names["step"]:
            raise ValueError(f"{name} ended at step {found['step']} with {', '.join(found)}; {first} at step {names['step']} with {', '.join(names)}")
    columns = [name for name in names if name != "step"]
    rows = [["run", *columns]] + [[name, *(f"{found[c]:.6f}" for c in columns)] for name, found in runs.items()]
    values = [[found[c] for found in runs.values()] for c in columns]
    rows.append(["mean", *(f"{statistics.mean(v):.6f}" for v in values)])
    if len(runs) > 1:
        rows.append(["deviation", *(f"{statistics.stdev(v):.6f}" for v in values)])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune.seeds", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="the folder of the folders seed-N")
    folder = parser.parse_args(argv).output_dir
    found = {int(match.group(1)): path for path in folder.glob("seed-*") if (match := re.fullmatch(r"seed-(\d+)", path.name))}
    try:
        if not found:
            raise ValueError(f"{folder} holds no folder seed-N")
        rows = summary({found[seed].name: final_metrics(found[seed]) for seed in sorted(found)})
    except (ValueError, OSError, KeyError) as error:
        print(f"finetune.seeds: error: {error}", file=sys.stderr)
        return 1
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("\n".join("  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
