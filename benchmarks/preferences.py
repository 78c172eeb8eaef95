"""What --task pretrain, reward and dpo learn on toys of this machine's size, and how fast.

    python benchmarks/preferences.py --work output-preferences \\
        --picture docs/img/preferences.png --json preferences.json

A random ChatGLM2 of two layers; texts of phrases at random, and questions of which the better
answer has advice and the worse one has none. Metrics are of rows that no run has trained on. The
picture has accuracy, margins and rewards over the steps; --steps is for a run in miniature.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cells import print_table  # noqa: E402
from benchmarks.rows import read_lines, write_rows  # noqa: E402

PARTS = ("水泵", "油封", "火花塞", "节气门", "滤网", "发动机", "轮胎", "灯泡")
STATES = ("漏油", "抖动", "异响", "积碳", "松动", "不亮", "过热")
ADVICE = ("先检查油封", "更换滤网", "清洗节气门", "到店检修", "紧固轮胎")
NO_ADVICE = ("不用管", "继续开", "不知道", "没关系", "自己想")
ROWS, HELD_OUT = 400, 60
LORA = ["--train_type", "lora", "--lora_module_name", "all-linear", "--lora_dropout", "0"]
SHARED = ["--max_len", "96", "--per_device_train_batch_size", "16", "--warmup_ratio", "0"]
SHARED += ["--learning_rate", "5e-3", "--show_loss_step", "1000", "--data_cache="]
RUNS = {  # name -> flags
    "pretrain": ["--task", "pretrain", "--train_type", "all"],
    "finetune": ["--task", "finetune", *LORA],
    "pretrain-lora": ["--task", "pretrain", *LORA],
    "reward": ["--task", "reward", *LORA],
    **{
        name: ["--task", "dpo", "--loss_type", name, *LORA]
        for name in ("sigmoid", "ipo", "hinge", "kto", "orpo")
    },
}
SHOWN = {  # metrics of each run that are printed and drawn
    "pretrain": ("bits_per_byte",),
    "finetune": ("loss",),
    "pretrain-lora": ("bits_per_byte",),
    "reward": ("accuracy", "margin"),
    "kto": ("margin", "chosen_reward", "rejected_reward"),
}
OF_PAIRS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


def make_texts(count: int, seed: int = 0) -> list[dict]:
    """Texts of 4 to 16 phrases at random: 56 equally likely ones, 0.41 bits a byte."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        parts = [draw.choice(PARTS) + draw.choice(STATES) for _ in range(draw.randint(4, 16))]
        rows.append({"text": "。".join(parts) + "。"})
    return rows


def make_advice(count: int, seed: int = 0) -> list[dict]:
    """Pairs: the better answer has advice, the worse one has none."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        answers = []
        for words in (ADVICE, NO_ADVICE):
            parts = [draw.choice(words), draw.choice(PARTS)]
            draw.shuffle(parts)
            answers.append("，".join(parts) + "。")
        question = f"{draw.choice(PARTS)}{draw.choice(STATES)}，怎么办？"
        rows.append({"prompt": question, "chosen": answers[0], "rejected": answers[1]})
    return rows


def make_answers(count: int, seed: int = 0) -> list[dict]:
    """The better answers alone, as rows of fine-tuning."""
    return [
        {"prompt": row["prompt"], "response": row["chosen"]} for row in make_advice(count, seed)
    ]


def rows_for(task: str) -> Callable[[int, int], list[dict]]:
    """What makes the rows of a task."""
    return {"pretrain": make_texts, "finetune": make_answers}.get(task, make_advice)


def make_base(work: Path) -> Path:
    """The folder of the random model."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    texts = write_rows(work / "texts.jsonl", make_answers(200, 9))
    words = ["--input", texts, "--output_dir", work / "tokenizer", "--vocab_size", 420]
    if make_tokenizer([*map(str, words), "--family", "glm2"]):
        raise ValueError("the tokenizer could not be made")
    sizes = {"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128}
    return make_model("glm2", work / "tokenizer", work / "base", **sizes)


def train_run(name: str, base: Path, work: Path, steps: int) -> dict[str, Any]:
    """{steps, seconds, tokens_per_second, curves: {metric: [(step, value)]}} of one run."""
    import train

    flags = RUNS[name]
    make_rows = rows_for(flags[1])
    folder = work / name
    folder.mkdir(parents=True)
    rows = write_rows(folder / "train.jsonl", make_rows(ROWS, 0))
    held_out = write_rows(folder / "eval.jsonl", make_rows(HELD_OUT, 1))
    words = [*flags, *SHARED, "--train_path", rows, "--eval_path", held_out]
    words += ["--model_name_or_path", base, "--output_dir", folder / "out", "--max_steps", steps]
    words += ["--num_train_epochs", 100, "--eval_step", max(1, steps // 12)]
    started = time.perf_counter()
    if code := train.main(list(map(str, words))):
        raise ValueError(f"{name}: train.py ended with exit code {code}")
    seconds = time.perf_counter() - started
    lines = read_lines(folder / "out" / "metrics.jsonl")
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": median(speeds),
        "curves": curves_of(lines, SHOWN.get(name, OF_PAIRS)),
    }


Curve = list[tuple[int, float]]


def curves_of(lines: list[dict[str, Any]], metrics: Iterable[str]) -> dict[str, Curve]:
    """{metric: its points by step} of the evaluations of a run's record."""
    curves: dict[str, Curve] = {}
    for metric in metrics:
        for line in lines:
            if f"eval_{metric}" in line:
                curves.setdefault(metric, []).append((line["step"], line[f"eval_{metric}"]))
    return curves


def print_runs(figures: dict[str, Any], shown: dict[str, str]) -> None:
    """A line for each run; `shown`: column -> figure."""
    lines = []
    for name, found in figures.items():
        line = [name, str(found["steps"]), *(f"{found[figure]:.0f}" for figure in shown.values())]
        words = []
        for metric, curve in found["curves"].items():
            words.append(f"{metric} {curve[0][1]:.3f} -> {curve[-1][1]:.3f}")
        lines.append([*line, ", ".join(words)])
    print_table(["run", "steps", *shown, "metric: first evaluation -> last"], lines)


PANELS = {  # title -> (run, metric) of each line
    "pre-training: bits a byte": (
        ("pretrain", "bits_per_byte"),
        ("pretrain-lora", "bits_per_byte"),
    ),
    "accuracy": (("reward", "accuracy"), ("sigmoid", "accuracy"), ("orpo", "accuracy")),
    "margin of rewards": tuple((name, "margin") for name in ("sigmoid", "ipo", "hinge", "kto")),
    "rewards": (
        ("sigmoid", "chosen_reward"),
        ("sigmoid", "rejected_reward"),
        ("kto", "chosen_reward"),
        ("kto", "rejected_reward"),
    ),
}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw PANELS; raises ValueError where matplotlib is not installed."""
    panels: dict[str, dict[str, Curve]] = {}
    for title, lines in PANELS.items():
        panels[title] = {}
        for name, metric in lines:
            curve = figures.get(name, {}).get("curves", {}).get(metric)
            if curve:
                label = f"{name} {metric.replace('_reward', '')}" if title == "rewards" else name
                panels[title][label] = curve
    draw_curves(panels, path)


def draw_curves(panels: dict[str, dict[str, Curve]], path: Path) -> None:
    """Draw up to four panels, {title: {label: points by step}}; ValueError without matplotlib."""
    from predictor.pictures import new_figure, save_figure

    figure = new_figure()
    figure.set_size_inches(10, 6.5)
    for panel, (title, curves) in zip(figure.subplots(2, 2).flat, panels.items()):
        for label, curve in curves.items():
            panel.plot(*zip(*curve), label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    save_figure(figure, path)


def runs_parser(description: str, runs: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a new folder for models and runs")
    parser.add_argument("--runs", default=",".join(runs), help="comma list [all]")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run [60]")
    parser.add_argument("--picture", type=Path, help=".png, .svg or .pdf of the curves")
    parser.add_argument("--json", type=Path, help="the figures")
    return parser


def parse_runs(
    parser: argparse.ArgumentParser, argv: list[str] | None, runs: Collection[str]
) -> argparse.Namespace:
    """The flags, `runs` as a list; makes the folder --work."""
    args = parser.parse_args(argv)
    args.runs = args.runs.split(",")
    if unknown := [name for name in args.runs if name not in runs]:
        parser.error(f"--runs: wanted some of {', '.join(runs)}; got {unknown[0]!r}")
    args.work.mkdir(parents=True)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_runs(runs_parser(__doc__, RUNS), argv, RUNS)
    base = make_base(args.work)
    figures = {name: train_run(name, base, args.work, args.steps) for name in args.runs}
    print_runs(figures, {"seconds": "seconds", "tokens/s": "tokens_per_second"})
    write_figures(args, figures, draw)
    return 0


def write_figures(
    args: argparse.Namespace,
    figures: dict[str, Any],
    draw_figures: Callable[[dict[str, Any], Path], None],
) -> None:
    """--json and --picture."""
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.picture:
        draw_figures(figures, args.picture)


if __name__ == "__main__":
    sys.exit(main())
