"""How good a tuned model is: its answers to held-out rows by METRICS, or a probe of general prompts before and after tuning.

python -m finetune.evaluate --model_path output-glm2-lora/epoch-2-step-180 --test_path data/spo_test.json --metrics rouge,bleu,triple_f1
python -m finetune.evaluate --model_path output-glm2-lora/epoch-2-step-180 --probe data/probe.jsonl --metrics rouge
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finetune.arrays import Dataset
from finetune.config import parse_positive
from finetune.data import collate, count_labels
from finetune.files import write_aside, write_json
from finetune.flag_effects import EVALUATING, check_given
from finetune.formats import Row
from finetune.metrics import GROUPS, METRICS, check_packages, mean, parse_metrics, score_rows
from finetune.out_of_memory import explained, inference_advice
from finetune.predict import (
    add_model_flags,
    add_row_flags,
    answers_by_batch,
    generate_answers,
    load_for_inference,
    reader_of,
)
from finetune.record import print_table
from finetune.sources import read_questions


def evaluation_loss(loss_module, data: Dataset, batch_size: int, **layout) -> float:
    """Mean negative log likelihood of the labelled tokens over all rows, shared among the ranks; `layout` is collate's."""
    import torch

    from finetune.distributed import on_device, rank, sum_over_ranks, world_size

    per_pass = batch_size * world_size()
    total = count = 0.0
    by_length = data.row_lengths.argsort(kind="stable").tolist()
    device = next(loss_module.parameters()).device
    for start in range(0, len(by_length), per_pass):
        mine = by_length[start : start + per_pass][rank() :: world_size()]
        batch = collate(data, mine or [-1], **layout)  # ZeRO-3: every rank runs every pass
        with torch.no_grad():
            total += float(loss_module(**on_device(batch, device)))
        count += count_labels(batch)
    total, count = sum_over_ranks(total, count)
    return total / count


def answers_of_ranks(model, tokenizer, rows: list[Row], **options) -> list[str]:
    """Greedy answers to rows, shared among the ranks; all of them on every rank. `options` are answers_by_batch's."""
    import torch.distributed as dist

    from finetune.distributed import rank, world_size

    # Every rank generates as often as the others: ZeRO-3 gathers weights in step.
    world = world_size()
    mine = range(rank(), len(rows) + -len(rows) % world, world)
    answers = generate_answers(model, tokenizer, [rows[min(i, len(rows) - 1)].prompt for i in mine], **options)
    if world == 1:
        return answers
    of_rank: list = [None] * world
    dist.all_gather_object(of_rank, answers)
    return [of_rank[i % world][i // world] for i in range(len(rows))]


def prediction_lines(rows: list[Row], answers: Sequence[str | list[str]], scores: dict[str, list[float]]) -> str:
    """JSON lines of {prompt, answer, reference, scores}, in the order of the rows."""
    return "".join(
        json.dumps({
            "prompt": row.prompt, "answer": answer, "reference": list(row.answers),
            "scores": {name: round(values[i], 6) for name, values in scores.items()},
        }, ensure_ascii=False) + "\n"
        for i, (row, answer) in enumerate(zip(rows, answers))
    )  # fmt: skip


class KeptAnswers:
    """Answers on disk as they come, beside the file they are for, so that an interrupted evaluation goes on where it was.

    The first line says what the answers depend on; where that has changed, they are thrown away.
    """

    def __init__(self, final: Path, depends_on: dict):
        self.final, self.path = final, final.with_name(f".{final.name}.partial")
        head = json.dumps(depends_on, ensure_ascii=False, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        whole = lines[1:-1] if lines[:1] == [head] else []  # what follows the last line's end was torn
        self.found: dict[int, str] = dict(map(json.loads, whole))
        write_aside(self.path, "".join(line + "\n" for line in [head, *whole]))
        self.file = open(self.path, "a", encoding="utf-8")

    def add(self, batch: dict[int, str]):
        self.found |= batch
        self.file.write("".join(json.dumps([i, answer], ensure_ascii=False) + "\n" for i, answer in batch.items()))
        self.file.flush()

    def replace_by(self, text: str):
        """The final file stands, so the kept answers may go."""
        write_aside(self.final, text)
        self.file.close()
        self.path.unlink()


def dependencies(args, prompts: list[str], options: dict) -> dict:
    """What answers depend on: the model's files and how they are loaded, the prompts, and how they are asked."""
    weights = sorted(p for p in Path(args.model_path).iterdir() if p.suffix in (".safetensors", ".bin"))
    return {
        "model": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights], "base_model": args.base_model,
        "mode": args.mode, "precision": args.precision, "quantization_bit": args.quantization_bit,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(), "options": options,
    }  # fmt: skip


def evaluate_rows(args):
    """Answer --test_path's rows, score them, print and write what was asked for."""
    names = parse_metrics(args.metrics or "triple_f1")
    check_packages(names)
    rows, n = read_questions(args.test_path, "--test_path", reader_of(args)), args.num_answers
    model, tokenizer, max_src_len, options = load_for_inference(args)
    options |= {"batch_size": args.batch_size, "max_src_len": max_src_len, "seed": args.seed}
    prompts = [row.prompt for row in rows for _ in range(n)]
    kept = KeptAnswers(Path(args.predictions), dependencies(args, prompts, options)) if args.predictions else None
    found = dict(kept.found) if kept else {}
    if found:
        print(f"{len(found)} of {len(prompts)} answers are there from before", flush=True)
    started = time.perf_counter()
    for batch in answers_by_batch(model, tokenizer, prompts, progress=True, done=set(found), **options):
        found |= batch
        if kept:
            kept.add(batch)
    seconds = time.perf_counter() - started
    answers = [[found[i * n + j] for j in range(n)] for i in range(len(rows))]
    scores = score_rows(names, answers, [row.answers for row in rows])
    means = {name: mean(values) for name, values in scores.items()}
    shown = [answer[0] if n == 1 else answer for answer in answers]
    if kept:
        kept.replace_by(prediction_lines(rows, shown, scores))
    result: dict = {"rows": len(rows), "denominator": args.f1_denominator, "seconds": seconds, "metrics": means}
    if names != ("triple_f1",):
        print_table(["metric", "mean"], [[name, f"{value:.4f}"] for name, value in means.items()])
        print(f"over {len(rows)} rows, {n} answer(s) each, {seconds:.1f} s")
    if "triple_f1" in names:
        result["f1"] = math.fsum(scores["triple_f1"]) / (50 if args.f1_denominator == "50" else len(rows))
        print(f"F1 {result['f1']:.4f} over {len(rows)} rows (denominator {args.f1_denominator}), {seconds:.1f} s")
    if args.output:
        result["answers"] = [
            {"prompt": row.prompt, "answer": answer, "gold": row.answers[0]}
            | {"f1" if name == "triple_f1" else name: values[i] for name, values in scores.items()}
            for i, (row, answer) in enumerate(zip(rows, shown))
        ]
        write_json(args.output, result)


def probe_rows(args):
    """Compare a tuned model with its base on --probe's rows, print and write what was asked for."""
    from finetune.probe import compare, summary

    names = parse_metrics(args.metrics or "")
    check_packages(names)
    result = compare(args, read_questions(args.probe, "--probe", reader_of(args)), names)
    lines, sentence = summary(result)
    print_table([f"{result['rows']} prompts", "before", "after", "change"], lines)
    print(sentence)
    if args.output:
        write_json(args.output, result)


def evaluate(args):
    """Raises ValueError, OSError; MemoryError that says what would make it fit."""
    with explained(lambda: inference_advice(args)):
        (probe_rows if args.probe else evaluate_rows)(args)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--test_path", help="files (a comma list, as --eval_path takes) of rows with the right answers (one or a list) as output")
    what.add_argument("--probe", help="rows of general prompts: their loss, and --metrics, before and after tuning (data/probe.jsonl)")
    parser.add_argument("--metrics", help=f"comma list of {', '.join((*METRICS, *GROUPS))} [triple_f1; with --probe the loss alone]")
    parser.add_argument("--predictions", help="JSON lines of every answer; written as they come, and an interrupted command goes on")
    parser.add_argument("--num_answers", type=parse_positive, default=1, help="answers to each prompt, with --do_sample [1]")
    add_row_flags(parser)
    parser.add_argument(
        "--f1_denominator", choices=("n", "50"), default="n",
        help="divide the summed F1 by the number of rows, or by ChatGLM-Finetuning's constant 50 [n]",
    )  # fmt: skip
    parser.add_argument("--output", help="JSON file of the scores and every answer")
    args = parser.parse_args(argv)
    check_given(parser, args, EVALUATING)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        print(f"finetune.evaluate: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
