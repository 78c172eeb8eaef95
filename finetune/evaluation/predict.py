"""Answers of a tuned model, to one prompt, to a file in batches, or line by line.

Prompts are encoded as in training.

python -m finetune.predict --model_path output-glm2-lora/epoch-2-step-180 --prompt TEXT
"""

import argparse
import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import Parser, run_command
from finetune.conversing import converse
from finetune.evaluation.answering import answer_prompts, load_placed
from finetune.evaluation.generation import generate_answers
from finetune.evaluation.inference import (
    InferenceFlags,
    add_model_flags,
    load_ready,
    loading_options,
    prepare_inference,
)
from finetune.flag_effects import PREDICTING, check_given
from finetune.launched import single_start
from finetune.out_of_memory import explained, inference_advice
from finetune.rows.formats import FORMATS, Row, parse_columns
from finetune.rows.sources import DELIMITERS, RowReader, parse_sources, read_items, read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

OUR_COLUMNS = ("prompt", "answer", "reference")


@dataclass(frozen=True)
class RowReadingFlags:
    """The flags of `add_row_flags`."""

    prompt_text: str
    data_format: str
    columns: str


@dataclass(frozen=True)
class PredictionFlags(InferenceFlags, RowReadingFlags):
    """The flags of `python -m finetune.predict`."""

    prompt: str | None
    file: str | None
    interactive: bool
    output: str | None


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how rows of a file are read; `reader_of` takes them."""
    parser.add_argument(
        "--prompt_text",
        default="",
        help="instruction put before rows of the old form {text, answer}",
    )
    parser.add_argument(
        "--data_format",
        choices=("auto", *FORMATS),
        default="auto",
        help="format of the rows [auto: detected from the keys]",
    )
    parser.add_argument(
        "--columns",
        default="",
        help='maps our field names to your columns: "prompt=question,response=answer"',
    )


def reader_of(flags: RowReadingFlags) -> RowReader:
    """The reader that the flags describe; raises ValueError."""
    return RowReader(flags.prompt_text, flags.data_format, parse_columns(flags.columns))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="answer this prompt (instruction and input together)")
    what.add_argument(
        "--file",
        help="answer every row of these files (a comma list, as --train_path takes), "
        "each a single question",
    )
    what.add_argument(
        "--interactive",
        action="store_true",
        help="a conversation, as python -m serving.chat has it; of a pipe, each line by itself",
    )
    parser.add_argument(
        "--output",
        help="with --file: JSON lines of {prompt, answer, reference}, or a table of them in "
        ".csv or .tsv; an interrupted command goes on [standard output]",
    )
    add_row_flags(parser)
    return parser


def answer_with_advice(flags: PredictionFlags) -> int:
    """Raises ValueError, OSError; MemoryError that says what would make it fit."""
    with explained(
        lambda: inference_advice(flags.model_path, flags.batch_size, flags.quantization_bit)
    ):
        return answer(flags)


def answer(flags: PredictionFlags) -> int:
    """Answer what the flags ask for: a file's rows, lines of the standard input, or a prompt."""
    if flags.file:
        answer_file(flags, flags.file)
        return 0
    setup = prepare_inference(flags)
    tokenizer = setup.tokenizer
    if flags.is_placed:
        model = load_placed(flags, setup)
    else:
        model = load_ready(setup.folder, device=flags.device, **loading_options(flags))
    options = setup.options | {"batch_size": 1, "max_src_len": setup.max_src_len}
    # The seed is set at each batch: random numbers drawn while loading, such as an adapter's
    # initial weights, change no answer.
    options["seed"] = flags.seed
    if flags.interactive and sys.stdin.isatty():
        converse(model, tokenizer, options)
    elif flags.interactive:
        answer_lines(model, tokenizer, options)
    else:
        print(generate_answers(model, tokenizer, [flags.prompt or ""], **options)[0])
    return 0


def answer_file(flags: PredictionFlags, file: str) -> None:
    """Answer the rows of --file, and write them to --output or the standard output."""
    rows = read_questions(file, "--file", reader_of(flags))
    output = Path(flags.output) if flags.output else None
    answered = answer_prompts(flags, [row.prompt for row in rows], output)
    if output and output.suffix in DELIMITERS:
        text = answer_table(rows, answered.answers, own_columns(file), DELIMITERS[output.suffix])
    else:
        text = answer_json(rows, answered.answers)
    if answered.kept:
        answered.kept.replace_by(text)
        print(f"{len(rows)} answers written to {output}")
    else:
        sys.stdout.write(text)


def answer_json(rows: list[Row], answers: list[str]) -> str:
    """JSON lines of {prompt, answer, reference}."""
    lines = []
    for row, text in zip(rows, answers):
        entry = {"prompt": row.prompt, "answer": text, "reference": list(row.answers)}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def own_columns(file: str) -> list[dict[str, str]]:
    """{column: text} of every row of --file; empty where a row is more than columns of text.

    Columns of the names that the output has anyway are left out.
    """
    tables: list[dict[str, str]] = []
    for source in parse_sources(file, "--file", weights=False):
        if not source.files:
            return []
        for _, item in read_items(source):
            if not isinstance(item, dict) or not all(isinstance(v, str) for v in item.values()):
                return []
            tables.append({key: v for key, v in item.items() if key not in OUR_COLUMNS})
    return tables


def answer_table(
    rows: list[Row], answers: list[str], own: list[dict[str, str]], delimiter: str
) -> str:
    """A table of prompt, answer and reference, after the input's own columns.

    Args:
        own: {column: text} of each row; left out where it is not of as many rows.
    """
    own = own if len(own) == len(rows) else [{} for _ in rows]
    names: dict[str, None] = {}
    for columns in own:
        names |= dict.fromkeys(columns)
    text = io.StringIO()
    table = csv.DictWriter(text, [*names, *OUR_COLUMNS], delimiter=delimiter, lineterminator="\n")
    table.writeheader()
    for row, answer, columns in zip(rows, answers, own):
        reference = row.answers[0] if row.answers else ""
        if len(row.answers) > 1:
            reference = json.dumps(list(row.answers), ensure_ascii=False)
        table.writerow(columns | dict(zip(OUR_COLUMNS, (row.prompt, answer, reference))))
    return text.getvalue()


def answer_lines(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", options: dict[str, Any]
) -> None:
    """Answer the standard input line by line, until its end or Ctrl-C."""
    seed = options["seed"]
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            break
        if line.strip():
            ask = options | {"seed": seed}
            print(generate_answers(model, tokenizer, [line], **ask)[0], flush=True)
            seed += 1  # so that the same question may get another answer


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(single_start(argv))
    check_given(parser, vars(args), PREDICTING)
    if not (args.prompt or args.file or args.interactive):
        parser.error("say what to answer: --prompt TEXT, --file FILE or --interactive")
    flags = PredictionFlags(**vars(args))
    return run_command(parser.prog, lambda: answer_with_advice(flags))


if __name__ == "__main__":
    sys.exit(main())
