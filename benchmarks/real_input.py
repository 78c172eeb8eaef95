"""A model of about 20M body parameters, pre-trained and LoRA-tuned from scratch on real data.

    python benchmarks/real_input.py --shared ../shared [--json FILE] [--figure FILE.png]
        [--pretrain_steps 300]

The tokenizer is the real ChatGLM2 one. Pre-training copies spans of the training texts (no
triples); LoRA then learns the triples of spo_0.json; F1 is measured on spo_1.json.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import read_lines, write_rows  # noqa: E402

SIZE = {"hidden_size": 512, "num_layers": 6, "heads": 8, "groups": 2, "ffn": 1720, "length": 2048}


QUICK = {"hidden_size": 64, "num_layers": 1, "heads": 2, "groups": 1, "ffn": 128}  # of --quick


def first_rows(path: Path, folder: Path) -> Path:
    """A file of the first 16 rows of another."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:16]
    (folder / path.name).write_text("".join(lines), encoding="utf-8")
    return folder / path.name


def copying_rows(texts: list[str], count: int, seed: int) -> list[dict]:
    """Rows of simpler tasks without triples: repeat a text, or its part after a quoted word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        text = draw.choice(texts)
        length = draw.randint(8, 60)
        start = draw.randint(0, max(0, len(text) - length))
        span = text[start : start + length]
        if draw.random() < 0.5 or len(span) < 8:
            rows.append({"instruction": "照抄：", "input": span, "output": span})
        else:
            cut = draw.randint(1, len(span) - 5)
            word = span[cut : cut + draw.randint(2, 4)]
            after = span[span.index(word) + len(word) :] or span
            rows.append(
                {"instruction": f"抄写“{word}”之后的部分：", "input": span, "output": after}
            )
    return rows


def run(*command: str) -> None:
    """Run a command of the project in its folder."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}")


def pretrain_model(work: Path, shared: Path, train: Path, steps: int, common: list[str]) -> None:
    """A random model, trained for `steps` on copying; lands in work/pretrain."""
    from scripts.prepare_small_model import make_model

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    base = make_model("glm2", shared / "data" / "chatglm2-tokenizer", work / "random", **SIZE)
    texts = [row["input"] for row in read_lines(train)]
    write_rows(work / "copy.json", copying_rows(texts, steps * 32, seed=1))
    run(
        "train.py",
        *("--model_name_or_path", str(base), "--train_path", str(work / "copy.json")),
        *("--train_type", "all", "--max_len", "160", "--max_src_len", "100"),
        *("--per_device_train_batch_size", "32", "--learning_rate", "6e-4"),
        *("--weight_decay", "0.01", "--max_steps", str(steps)),
        *("--output_dir", str(work / "pretrain")),
        *common,
    )


def metrics(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


def values_of(lines: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have it."""
    return [(line["step"], line[name]) for line in lines if name in line]


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("epoch-*-step-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))


def draw_curves(curves: dict[str, list[dict]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.4))
    for axis, (title, lines) in zip(axes, curves.items()):
        steps, losses = zip(*values_of(lines, "train_loss"))
        smooth, value = [], losses[0]
        for loss in losses:
            value = 0.9 * value + 0.1 * loss
            smooth.append(value)
        axis.plot(steps, losses, color="0.8", linewidth=0.8)
        axis.plot(steps, smooth, color="tab:blue", label="training loss")
        held_out = values_of(lines, "eval_loss")
        if held_out:
            axis.plot(*zip(*held_out), "o-", color="tab:orange", label="held-out loss (spo_1.json)")
        axis.set(title=title, xlabel="optimizer step", ylabel="loss per token")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shared",
        default="../shared",
        help="folder with data/chatglm2-tokenizer and data/finetune",
    )
    parser.add_argument("--work_dir", default="output/real_input")
    parser.add_argument("--pretrain_steps", type=int, default=300)
    parser.add_argument("--lora_epochs", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument(
        "--keep_pretrained",
        action="store_true",
        help="go on with the pre-trained model of an earlier run in --work_dir",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, 2 steps, 16 rows: that it runs, no figures worth keeping",
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--figure", metavar="FILE")
    return parser


def tune(model: Path, train: Path, test: Path, work: Path, epochs: int, common: list[str]) -> None:
    """LoRA on the triples, merged; lands in work/lora and work/merged."""
    run(
        "train.py",
        "--overwrite_output_dir",
        *("--model_name_or_path", str(model), "--output_dir", str(work / "lora")),
        *("--train_path", str(train), "--eval_path", str(test)),
        *("--train_type", "lora", "--lora_dim", "16", "--lora_alpha", "32"),
        *("--lora_module_name", "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"),
        *("--max_len", "512", "--max_src_len", "384", "--per_device_train_batch_size", "16"),
        *("--learning_rate", "2e-3", "--num_train_epochs", str(epochs)),
        *common,
    )
    adapter = last_checkpoint(work / "lora")
    shutil.rmtree(work / "merged", ignore_errors=True)
    folders = ("--model_dir", str(adapter), "--save_dir", str(work / "merged"))
    run("merge_lora.py", "--ori_model_dir", str(model), *folders)


def evaluate(model: Path, test: Path, output: Path) -> float:
    """F1 of the model's triples; the scores land in `output`."""
    run(
        *("-m", "finetune.evaluate", "--model_path", str(model), "--test_path", str(test)),
        *("--max_src_len", "384", "--max_new_tokens", "200", "--batch_size", "10"),
        *("--output", str(output)),
    )
    return json.loads(output.read_text())["f1"]


def median_speed(lines: list[dict]) -> float:
    """The upper median of tokens per second."""
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return speeds[len(speeds) // 2]


def shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map("{:.3f}".format, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def find_files(shared: Path) -> tuple[Path, Path]:
    """(training rows, test rows); leaves with one line where something is missing."""
    train = shared / "data" / "finetune" / "spo_0.json"
    test = shared / "data" / "finetune" / "spo_1.json"
    for needed in (train, test, shared / "data" / "chatglm2-tokenizer"):
        if not needed.exists():
            sys.exit(
                f"real_input.py: no such file: {needed}; "
                "--shared names the folder of the public data"
            )
    return train, test


def main() -> None:
    args = build_parser().parse_args()
    shared, work = Path(args.shared).resolve(), Path(args.work_dir).resolve()
    train, test = find_files(shared)
    if args.quick:
        SIZE.update(QUICK)
        args.pretrain_steps = 2
        shutil.rmtree(work, ignore_errors=True)
        rows = work.parent / f"{work.name}-rows"
        train, test = first_rows(train, rows), first_rows(test, rows)
    common = ["--mode", "glm2", "--show_loss_step", "25", "--precision", args.precision]
    if not args.keep_pretrained:
        pretrain_model(work, shared, train, args.pretrain_steps, common)
    model = last_checkpoint(work / "pretrain")
    f1_before = evaluate(model, test, work / "before.json")
    tune(model, train, test, work, args.lora_epochs, common)
    f1_after = evaluate(work / "merged", test, work / "after.json")
    pretraining, tuning = metrics(work / "pretrain"), metrics(work / "lora")
    result = {
        "body_parameters": 6 * (512 * 768 + 768 + 512 * 512 + 512 * 2 * 1720 + 1720 * 512 + 2 * 512)
        + 512,
        "precision": args.precision,
        "pretrain_steps": args.pretrain_steps,
        "pretrain_tokens_per_second": median_speed(pretraining),
        "lora_tokens_per_second": median_speed(tuning),
        "eval_loss": [loss for _, loss in values_of(tuning, "eval_loss")],
        "f1_before": f1_before,
        "f1_after": f1_after,
    }
    print("\n| figure | value |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {shown(value)} |")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.figure:
        draw_curves(
            {
                "pre-training: copying spans": pretraining,
                "LoRA: triples of spo_0.json": tuning,
            },
            args.figure,
        )


if __name__ == "__main__":
    main()
