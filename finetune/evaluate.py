"""How good a tuned model is: loss on held-out rows, and the F1 of extracted triples.

python -m finetune.evaluate --model_path output-glm2-lora/epoch-2-step-180 --test_path data/spo_test.json
"""

import argparse
import sys
import time

from finetune.data import Dataset, Row, collate, count_labels, read_rows
from finetune.files import write_json
from finetune.predict import add_model_flags, generate_answers, load_for_inference


def triples(answer: str) -> set[str]:
    """Lines that are head_relation_tail, exactly three parts."""
    return {line for line in answer.split("\n") if len(line.split("_")) == 3}


def triple_f1(answer: str, gold: str) -> float:
    """F1 of one answer: predicted triples against the gold answer's lines, as sets."""
    predicted, wanted = triples(answer), set(gold.split("\n"))
    hits = len(predicted & wanted)
    if not hits:
        return 0.0
    precision, recall = hits / len(predicted), hits / len(wanted)
    return 2 * precision * recall / (precision + recall)


def mean_f1(answers: list[str], golds: list[str], denominator: int | None = None) -> float:
    """Sum of the answers' F1 over their number; over 50 whatever their number, as ChatGLM-Finetuning has it, if asked."""
    return sum(map(triple_f1, answers, golds)) / (denominator or len(golds))


def evaluation_loss(loss_module, data: Dataset, batch_size: int, **layout) -> float:
    """Mean negative log likelihood of the labelled tokens over all rows, shared among the ranks; `layout` is collate's."""
    import torch

    from finetune.distributed import on_device, rank, sum_over_ranks, world_size

    per_pass = batch_size * world_size()
    total = count = 0.0
    by_length = sorted(range(len(data)), key=lambda i: len(data.input_ids[i]))
    device = next(loss_module.parameters()).device
    for start in range(0, len(by_length), per_pass):
        mine = by_length[start : start + per_pass][rank() :: world_size()]
        batch = collate(data, mine or [-1], **layout)  # ZeRO-3: every rank runs every pass
        with torch.no_grad():
            total += float(loss_module(**on_device(batch, device)))
        count += count_labels(batch)
    total, count = sum_over_ranks(total, count)
    return total / count


def generation_f1(model, tokenizer, rows: list[Row], *, batch_size: int, max_src_len: int, max_new_tokens: int, synced: bool) -> float:
    """Mean triple F1 of greedy answers to rows, shared among the ranks."""
    from finetune.distributed import rank, sum_over_ranks, world_size

    # Every rank generates as often as the others: ZeRO-3 gathers weights in step.
    mine = [i for i in range(rank(), len(rows) + -len(rows) % world_size(), world_size())]
    answers = generate_answers(
        model, tokenizer, [rows[min(i, len(rows) - 1)].prompt for i in mine], batch_size=batch_size,
        max_src_len=max_src_len, max_new_tokens=max_new_tokens, synced=synced,
    )  # fmt: skip
    score = sum(triple_f1(a, rows[i].answers[0]) for i, a in zip(mine, answers) if i < len(rows))
    return sum_over_ranks(score)[0] / len(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--test_path", required=True, help="rows with the gold triples as output")
    parser.add_argument("--prompt_text", default="", help="instruction put before rows of the old form {text, answer}")
    parser.add_argument(
        "--f1_denominator", choices=("n", "50"), default="n",
        help="divide the summed F1 by the number of rows, or by ChatGLM-Finetuning's constant 50 [n]",
    )  # fmt: skip
    parser.add_argument("--output", help="JSON file of the score and every answer")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.test_path, prompt_text=args.prompt_text)[0]
        model, tokenizer, max_src_len, options = load_for_inference(args)
        started = time.perf_counter()
        answers = generate_answers(
            model, tokenizer, [row.prompt for row in rows], batch_size=args.batch_size, max_src_len=max_src_len,
            progress=True, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        golds = [row.answers[0] for row in rows]
        score = mean_f1(answers, golds, 50 if args.f1_denominator == "50" else None)
        print(f"F1 {score:.4f} over {len(rows)} rows (denominator {args.f1_denominator}), {seconds:.1f} s")
        if args.output:
            scored = [
                {"prompt": row.prompt, "answer": answer, "gold": gold, "f1": triple_f1(answer, gold)}
                for row, answer, gold in zip(rows, answers, golds)
            ]
            result = {"f1": score, "rows": len(rows), "denominator": args.f1_denominator, "seconds": seconds, "answers": scored}
            write_json(args.output, result)
    except (ValueError, OSError) as error:
        print(f"finetune.evaluate: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
