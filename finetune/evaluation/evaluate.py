"""How good a tuned model is, by METRICS over its answers to held-out rows, or by a probe.

The probe compares a model before and after tuning on general prompts.

python -m finetune.evaluate --model_path output-glm2-lora/epoch-2-step-180 \\
    --test_path data/spo_test.json --metrics rouge,bleu,triple_f1
python -m finetune.evaluate --model_path output-glm2-lora/epoch-2-step-180 \\
    --probe data/probe.jsonl --metrics rouge
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chatglm.commands import Parser, run_command
from finetune.config import parse_positive
from finetune.evaluation.answering import KeptAnswers, answer_prompts
from finetune.evaluation.generation import generate_answers
from finetune.evaluation.inference import InferenceFlags, add_model_flags
from finetune.evaluation.metrics import (
    GROUPS,
    METRICS,
    check_packages,
    class_scores,
    overall_scores,
    parse_metrics,
    score_rows,
)
from finetune.evaluation.predict import RowReadingFlags, add_row_flags, reader_of
from finetune.files import write_json
from finetune.flag_effects import EVALUATING, check_given
from finetune.launched import single_start
from finetune.out_of_memory import explained, inference_advice
from finetune.record import print_columns
from finetune.rows.formats import Row
from finetune.rows.sources import read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer
    from finetune.rows.arrays import Dataset
    from finetune.rows.batches import Batch


@dataclass(frozen=True)
class AnswerEvaluationFlags(InferenceFlags, RowReadingFlags):
    """The flags of `python -m finetune.evaluate`."""

    test_path: str | None
    probe: str | None
    metrics: str | None
    predictions: str | None
    num_answers: int
    f1_denominator: str
    output: str | None


def evaluation_loss(
    loss_module: Any, data: "Dataset", batch_size: int, *, stages: int = 1, **layout: Any
) -> float:
    """Mean negative log likelihood of the labelled tokens over all rows, shared among the ranks.

    Args:
        loss_module: has total_loss, as finetune.loss.LossModule.
        stages: so many ranks hold one model together, and read the same rows.
        layout: collate's options.
    """
    from finetune.distributed import rank, sum_over_ranks, world_size
    from finetune.rows.batches import collate, count_labels

    copies = world_size() // stages
    per_pass = batch_size * copies
    by_length = data.row_lengths.argsort(kind="stable").tolist()
    count = 0.0

    def batches() -> Iterator["Batch"]:
        nonlocal count
        for start in range(0, len(by_length), per_pass):
            rows = by_length[start : start + per_pass][rank() % copies :: copies]
            # ZeRO-3 needs every rank in every pass: without a row it takes an empty place.
            batch = collate(data, rows or [-1], **layout)
            count += count_labels(batch)
            yield batch

    total = loss_module.total_loss(batches())
    # All stages have the same total and count, so that the mean counts each as often.
    total, count = sum_over_ranks(total, count)
    return total / count


def answers_of_ranks(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", rows: list[Row], **options: Any
) -> list[str]:
    """Greedy answers to rows; the ranks share the work and all get every answer.

    `options` are answers_by_batch's.
    """
    import torch.distributed as dist

    from finetune.distributed import rank, world_size

    # Every rank answers the same number of prompts, for ZeRO-3 gathers weights on all at once: the
    # last row is repeated to fill up.
    world = world_size()
    numbers = range(rank(), len(rows) + -len(rows) % world, world)
    prompts = [rows[min(i, len(rows) - 1)].prompt for i in numbers]
    answers = generate_answers(model, tokenizer, prompts, **options)
    if world == 1:
        return answers
    of_rank: list[Any] = [None] * world
    dist.all_gather_object(of_rank, answers)
    return [of_rank[i % world][i // world] for i in range(len(rows))]


def prediction_lines(
    rows: list[Row], answers: Sequence[str | list[str]], scores: dict[str, list[float]]
) -> str:
    """JSON lines of {prompt, answer, reference, scores}, in the order of the rows."""
    lines = []
    for i, (row, answer) in enumerate(zip(rows, answers)):
        entry = {
            "prompt": row.prompt,
            "answer": answer,
            "reference": list(row.answers),
            "scores": {name: round(values[i], 6) for name, values in scores.items()},
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def evaluate_rows(flags: AnswerEvaluationFlags) -> None:
    """Answer --test_path's rows, score the answers, print and write the results."""
    names = parse_metrics(flags.metrics or "triple_f1")
    check_packages(names)
    rows = read_questions(flags.test_path or "", "--test_path", reader_of(flags))
    answered = answer_questions(flags, rows)
    references = [row.answers for row in rows]
    scores = score_rows(names, answered.answers, references)
    written: list[str | list[str]] = []
    for answers in answered.answers:
        written.append(answers[0] if flags.num_answers == 1 else answers)
    if answered.kept:
        answered.kept.replace_by(prediction_lines(rows, written, scores))
    result: dict[str, Any] = {
        "rows": len(rows),
        "denominator": flags.f1_denominator,
        "seconds": answered.seconds,
        "metrics": overall_scores(scores, answered.answers, references),
    }
    if "macro_f1" in names:
        of_classes = class_scores(answered.answers, references)
        result["classes"] = {label: asdict(score) for label, score in of_classes.items()}
    if "triple_f1" in names:
        divisor = 50 if flags.f1_denominator == "50" else len(rows)
        result["f1"] = math.fsum(scores["triple_f1"]) / divisor
    print_scores(result, flags.num_answers)
    if flags.output:
        write_json(flags.output, result | {"answers": scored_answers(rows, written, scores)})


class Answered(NamedTuple):
    """--num_answers answers to each row, and the seconds that they took.

    kept: the answers on disk, with --predictions.
    """

    answers: list[list[str]]
    seconds: float
    kept: KeptAnswers | None


def answer_questions(flags: AnswerEvaluationFlags, rows: list[Row]) -> Answered:
    """The answers to rows; those that an interrupted command has kept are not generated again."""
    n = flags.num_answers
    prompts = []
    for row in rows:
        prompts += [row.prompt] * n
    file = Path(flags.predictions) if flags.predictions else None
    found = answer_prompts(flags, prompts, file)
    answers = [found.answers[start : start + n] for start in range(0, len(prompts), n)]
    return Answered(answers, found.seconds, found.kept)


def print_scores(result: dict[str, Any], num_answers: int) -> None:
    """Print the metrics, with macro_f1 those of each class, and the F1 of triples.

    Where that F1 is the only metric, there is no table.
    """
    rows, seconds, means = result["rows"], result["seconds"], result["metrics"]
    if list(means) != ["triple_f1"]:
        print_columns(["metric", "mean"], [[name, f"{value:.4f}"] for name, value in means.items()])
        if "classes" in result:
            print_classes(result["classes"])
        print(f"over {rows} rows, {num_answers} answer(s) each, {seconds:.1f} s")
    if "f1" in result:
        denominator = result["denominator"]
        f1 = f"F1 {result['f1']:.4f} over {rows} rows (denominator {denominator})"
        print(f"{f1}, {seconds:.1f} s")


def print_classes(classes: dict[str, dict[str, float]]) -> None:
    lines = []
    for label, score in classes.items():
        shares = [f"{score[name]:.4f}" for name in ("precision", "recall", "f1")]
        lines.append([label, f"{score['rows']}", *shares])
    print_columns(["class", "rows", "precision", "recall", "F1"], lines)


def scored_answers(
    rows: list[Row], answers: Sequence[str | list[str]], scores: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """{prompt, answer, gold, a score of each metric} of every row; triple_f1 is named f1."""
    entries = []
    for i, (row, answer) in enumerate(zip(rows, answers)):
        entry: dict[str, Any] = {"prompt": row.prompt, "answer": answer, "gold": row.answers[0]}
        for name, values in scores.items():
            entry["f1" if name == "triple_f1" else name] = values[i]
        entries.append(entry)
    return entries


def probe_rows(flags: AnswerEvaluationFlags) -> None:
    """Compare a tuned model with its base on --probe's rows, print and write the results."""
    from finetune.evaluation.probe import compare_with_base, forgetting_table

    names = parse_metrics(flags.metrics or "")
    check_packages(names)
    rows = read_questions(flags.probe or "", "--probe", reader_of(flags))
    result = compare_with_base(flags, rows, names)
    lines, sentence = forgetting_table(result)
    print_columns([f"{result['rows']} prompts", "before", "after", "change"], lines)
    print(sentence)
    if flags.output:
        write_json(flags.output, result)


def evaluate(flags: AnswerEvaluationFlags) -> None:
    """Raises ValueError, OSError; MemoryError that says what would make it fit."""
    with explained(
        lambda: inference_advice(flags.model_path, flags.batch_size, flags.quantization_bit)
    ):
        if flags.probe:
            probe_rows(flags)
        else:
            evaluate_rows(flags)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--test_path",
        help="files (a comma list, as --eval_path takes) of rows with the right answers "
        "(one or a list) as output",
    )
    what.add_argument(
        "--probe",
        help="rows of general prompts: their loss, and --metrics, before and after tuning "
        "(data/probe.jsonl)",
    )
    parser.add_argument(
        "--metrics",
        help=f"comma list of {', '.join((*METRICS, *GROUPS))} "
        "[triple_f1; with --probe the loss alone]",
    )
    parser.add_argument(
        "--predictions",
        help="JSON lines of every answer, written as they come; an interrupted run resumes",
    )
    parser.add_argument(
        "--num_answers",
        type=parse_positive,
        default=1,
        help="answers to each prompt, with --do_sample [1]",
    )
    add_row_flags(parser)
    parser.add_argument(
        "--f1_denominator",
        choices=("n", "50"),
        default="n",
        help="divide the summed F1 by the number of rows, or by ChatGLM-Finetuning's constant 50 "
        "[n]",
    )
    parser.add_argument("--output", help="JSON file of the scores and every answer")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(single_start(argv))
    check_given(parser, vars(args), EVALUATING)
    if args.num_answers > 1 and not args.do_sample:
        parser.error("--num_answers needs --do_sample: the likeliest answer is always the same")
    if args.probe and (args.predictions or args.num_answers > 1):
        parser.error(
            "--probe writes its answers to --output, and one for each prompt: "
            "no --predictions, no --num_answers"
        )
    flags = AnswerEvaluationFlags(**vars(args))
    return run_command(parser.prog, lambda: evaluate(flags))


if __name__ == "__main__":
    sys.exit(main())
