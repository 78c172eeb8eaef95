"""kill -9 at random moments of a training run; the resumed run must repeat the losses bit for bit.

    python benchmarks/kill9.py [--kills 10] [--seed 1] [--json FILE]

A run with a save every 2 steps is killed, resumed with `--resume_from_checkpoint auto`, killed
again, and so on; the last committed checkpoint must load each time. At the end every step's loss is
compared, bit for bit, with an uninterrupted run's.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QUIET: dict[str, Any] = {
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.DEVNULL,
    "cwd": ROOT,
}


def losses(folder: Path) -> dict[int, float]:
    """{step: loss}; a killed process may leave half a line at the end."""
    found = {}
    for line in (
        (folder / "metrics.jsonl").read_text().splitlines()
        if (folder / "metrics.jsonl").is_file()
        else ()
    ):
        if line.endswith("}"):
            values = json.loads(line)
            found[values["step"]] = values["train_loss"]
    return found


def train_words(model: Path, steps: int) -> list[str]:
    """A training that saves every 2 steps."""
    return [
        sys.executable,
        "train.py",
        *("--model_name_or_path", str(model), "--train_path", "data/spo_train.json"),
        *("--dataset_length", "64", "--max_steps", str(steps), "--num_train_epochs", "100"),
        *("--per_device_train_batch_size", "8", "--max_len", "160", "--max_src_len", "120"),
        *("--save_model_step", "2", "--save_total_limit", "3"),
    ]


def last_step(out: Path) -> int:
    return max(losses(out), default=0)


def wait_for_moment(
    run: subprocess.Popen, out: Path, target: int | None, draw: random.Random
) -> None:
    """Wait for a save under way, or, with `target`, for that step and a random moment."""
    while run.poll() is None:
        saving = any(out.glob(".epoch-*")) if out.is_dir() else False
        if (target is None and saving) or (target is not None and last_step(out) >= target):
            time.sleep(draw.random() * (0.02 if target is None else 0.1))
            break
        time.sleep(0.001)


def kill_once(resume: list[str], out: Path, kill: int, draw: random.Random) -> dict:
    """Resume the run and kill it; a line of the table."""
    target = last_step(out) + draw.randint(1, 3) if kill % 2 else None
    run = subprocess.Popen(resume, **QUIET, start_new_session=True)
    wait_for_moment(run, out, target, draw)
    caught = any(out.glob(".epoch-*"))
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    committed = [0]
    for manifest in out.glob("epoch-*-step-*/manifest.json"):
        committed.append(int(manifest.parent.name.rsplit("-", 1)[1]))
    return {
        "kill": kill + 1,
        "in_save": caught,
        "last_loss_step": last_step(out),
        "last_committed_step": max(committed),
    }


def print_table(rows: list[dict]) -> None:
    print("| kill | inside a save | last step told | last committed step |\n|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['kill']} | {'yes' if r['in_save'] else 'no'} "
            f"| {r['last_loss_step']} | {r['last_committed_step']} |"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of the run that is killed [40]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    draw = random.Random(args.seed)
    from benchmarks.method_matrix import make_models

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, ["glm2"])
        command = train_words(folder / "glm2", args.steps)
        subprocess.run([*command, "--output_dir", str(folder / "whole")], check=True, **QUIET)
        whole = losses(folder / "whole")
        out = folder / "killed"
        resume = [*command, "--output_dir", str(out), "--resume_from_checkpoint", "auto"]
        rows = []
        in_save = 0
        for kill in range(args.kills):
            rows.append(kill_once(resume, out, kill, draw))
            in_save += rows[-1]["in_save"]
        subprocess.run(resume, check=True, **QUIET)
        finished = losses(out)
    different = [step for step in whole if finished.get(step) != whole[step]]
    print_table(rows)
    same = len(whole) - len(different)
    print(
        f"\n{args.kills} kills ({in_save} inside a save); {same} of "
        f"{len(whole)} losses bit-identical to the uninterrupted run"
    )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"kills": rows, "steps": len(whole), "different": different}, indent=2)
            + "\n"
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
