# ruff: noqa: E402
"""What --task grpo and --task ppo learn on a toy of this machine's size: reward and divergence.

    python benchmarks/reinforcement.py --work output-reinforcement \\
        --picture docs/img/reinforcement.png --json reinforcement.json

A random ChatGLM2 of two layers first learns to answer, with advice or without, by chance; then a
reward model learns from pairs which is better. From there each algorithm trains an adapter, by a
rule (1 where the answer has a word of advice) and by the reward model. Rewards are of unseen
prompts; --steps and --base_steps are for a run in miniature.
"""

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.preferences import (
    ADVICE,
    HELD_OUT,
    LORA,
    ROWS,
    Curve,
    curves_of,
    draw_curves,
    make_advice,
    make_base,
    parse_runs,
    print_runs,
    runs_parser,
    write_figures,
)
from benchmarks.rows import read_lines, write_rows

SHARED = ["--max_len", 64, "--per_device_train_batch_size", 16, "--data_cache="]
SHARED += ["--show_loss_step", 1000, "--save_model_step", 100_000]
RULE = ["--rewards", "pattern", "--reward_pattern", "|".join(ADVICE)]
KNOBS = {
    "grpo": ["--num_generations", 8, "--learning_rate", "2e-3", "--kl_coef", "0.1"],
    "ppo": ["--num_generations", 4, "--learning_rate", "3e-3", "--kl_coef", "0.1"],
}
RUNS = ("grpo-rule", "grpo-model", "ppo-rule", "ppo-model")
METRICS = ("reward", "kl", "answer_tokens")


def train(words: list[Any]) -> None:
    """Run train.py in this process; raises ValueError where it fails."""
    import train as command_line

    if code := command_line.main(list(map(str, words))):
        raise ValueError(f"train.py ended with exit code {code}: {words}")


def both_answers(count: int, seed: int) -> list[dict]:
    """Questions with the better answer, and with the worse one."""
    rows = []
    for row in make_advice(count, seed):
        for name in ("chosen", "rejected"):
            rows.append({"prompt": row["prompt"], "response": row[name]})
    return rows


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of an output folder."""
    return max(folder.glob("epoch-*-step-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def make_models(work: Path, steps: int) -> tuple[Path, Path]:
    """(a model that answers with and without advice, a reward model that knows the better)."""
    answers = write_rows(work / "answers.jsonl", both_answers(ROWS, 0))
    pairs = write_rows(work / "pairs.jsonl", make_advice(ROWS, 0))
    shared = [*SHARED, "--max_steps", steps, "--num_train_epochs", 1000, "--learning_rate", "5e-3"]
    words = ["--task", "finetune", "--train_type", "all", "--train_path", answers]
    words += ["--model_name_or_path", make_base(work), "--output_dir", work / "sft", *shared]
    train(words)
    model = last_checkpoint(work / "sft")
    words = ["--task", "reward", *LORA, "--train_path", pairs, "--model_name_or_path", model]
    train([*words, "--output_dir", work / "reward", *shared])
    return model, last_checkpoint(work / "reward")


def run_one(name: str, models: tuple[Path, Path], work: Path, steps: int) -> dict[str, Any]:
    """{seconds, rollout_seconds, curves: {metric: [(step, value)]}} of one run."""
    task, reward = name.split("-")
    model, scorer = models
    folder = work / name
    folder.mkdir()
    rows = write_rows(folder / "train.jsonl", make_advice(ROWS, 2))
    held_out = write_rows(folder / "eval.jsonl", make_advice(HELD_OUT, 1))
    rewards = RULE if reward == "rule" else ["--reward_model", scorer]
    words = ["--task", task, *LORA, *KNOBS[task], *rewards, *SHARED, "--max_src_len", 40]
    words += ["--train_path", rows, "--eval_path", held_out, "--model_name_or_path", model]
    words += ["--output_dir", folder / "out", "--max_steps", steps, "--num_train_epochs", 1000]
    words += ["--eval_step", max(1, steps // 10), "--rollout_batch", 64, "--warmup_ratio", 0]
    started = time.process_time()
    train(words)
    seconds = time.process_time() - started
    lines = read_lines(folder / "out" / "metrics.jsonl")
    rollouts = sum(line.get("rollout_seconds", 0.0) for line in lines)
    curves = curves_of(lines, METRICS)
    return {"steps": steps, "seconds": seconds, "rollout_seconds": rollouts, "curves": curves}


PANELS = {  # title -> (metric, ending of the runs that it shows)
    "reward: share of answers with advice": ("reward", "-rule"),
    "reward: score of the reward model": ("reward", "-model"),
    "KL from the start, by the rule": ("kl", "-rule"),
    "KL from the start, by the reward model": ("kl", "-model"),
}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw PANELS; raises ValueError where matplotlib is not installed."""
    panels: dict[str, dict[str, Curve]] = {}
    for title, (metric, ending) in PANELS.items():
        panels[title] = {}
        for name, found in figures.items():
            if name.endswith(ending) and metric in found["curves"]:
                panels[title][name.removesuffix(ending)] = found["curves"][metric]
    draw_curves(panels, path)


def main(argv: list[str] | None = None) -> int:
    parser = runs_parser(__doc__, RUNS)
    parser.add_argument("--base_steps", type=int, default=120, help="of the models before [120]")
    args = parse_runs(parser, argv, RUNS)
    models = make_models(args.work, args.base_steps)
    figures = {name: run_one(name, models, args.work, args.steps) for name in args.runs}
    print_runs(figures, {"CPU seconds": "seconds"})
    write_figures(args, figures, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
