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
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


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
    curves: dict[str, list[tuple[int, float]]] = {}
    speeds = []
    for line in (folder / "out" / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        if "tokens_per_second" in found:
            speeds.append(found["tokens_per_second"])
        for metric in SHOWN.get(name, OF_PAIRS):
            if f"eval_{metric}" in found:
                value = (found["step"], found[f"eval_{metric}"])
                curves.setdefault(metric, []).append(value)
    return {
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": median(speeds),
        "curves": curves,
    }


def print_table(figures: dict[str, Any]) -> None:
    print("| run | steps | seconds | tokens/s | metric: first evaluation -> last |")
    print("|---|---|---|---|---|")
    for name, found in figures.items():
        words = []
        for metric, curve in found["curves"].items():
            words.append(f"{metric} {curve[0][1]:.3f} -> {curve[-1][1]:.3f}")
        print(
            f"| {name} | {found['steps']} | {found['seconds']:.0f} | "
            f"{found['tokens_per_second']:.0f} | {', '.join(words)} |"
        )


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


Curve = list[tuple[int, float]]


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a new folder for models and runs")
    parser.add_argument("--runs", default=",".join(RUNS), help="comma list [all]")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run [60]")
    parser.add_argument("--picture", type=Path, help=".png, .svg or .pdf of the curves")
    parser.add_argument("--json", type=Path, help="the figures")
    args = parser.parse_args(argv)
    names = args.runs.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--runs: wanted some of {', '.join(RUNS)}; got {unknown[0]!r}")
    args.work.mkdir(parents=True)
    base = make_base(args.work)
    figures = {name: train_run(name, base, args.work, args.steps) for name in names}
    print_table(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.picture:
        draw(figures, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
