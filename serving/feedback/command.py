"""Training rows from what people said of answers on a server's page (serving.server --feedback).

python -m serving.feedback FEEDBACK.jsonl --rows rows.jsonl --preferences pairs.jsonl

Rows are for train.py: a correction in place of the answer, or an answer with a thumb up. Pairs are
for preference training: a correction, or an answer with a thumb up, against the answer that was
corrected, or one to the same question with a thumb down. Without outputs, a count is printed.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.commands import Parser, run_command
from finetune.files import write_aside
from serving.feedback.rows import (
    LEARNT,
    Feedback,
    counted,
    latest_feedback,
    parse_feedback,
    preference_pairs,
    training_rows,
)

PROG = "serving.feedback"


@dataclass(frozen=True)
class FeedbackFlags:
    """The flags of the command; `build_parser` has their meaning."""

    files: list[Path]
    rows: Path | None
    preferences: Path | None
    only: str


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FEEDBACK.jsonl", help="of serving.server")
    add("--rows", type=Path, metavar="FILE", help="write training rows to this file")
    add("--preferences", type=Path, metavar="FILE", help="write preference pairs to this file")
    only = "answers that are learnt, or chosen [all]"
    add("--only", choices=tuple(LEARNT), default="all", help=only)
    return parser


def feedback_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are feedback; of others a line is printed on standard error.

    Raises:
        OSError: it cannot be read. ValueError: it is no text, or none of its lines is feedback.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text") from None
    lines, skipped = [], 0
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            line = json.loads(content)
            parse_feedback(line)
        except (ValueError, RecursionError) as error:
            skipped += 1
            reason = "no JSON" if isinstance(error, json.JSONDecodeError) else error
            print(f"{PROG}: {path}:{number} is skipped: {reason}", file=sys.stderr)
            continue
        lines.append(line)
    if skipped and not lines:
        raise ValueError(f"{path}: none of its {skipped} lines is feedback")
    return lines


def check_outputs(flags: FeedbackFlags) -> None:
    """Raises ValueError where an output is an input, or both are one file."""
    outputs = [path.resolve() for path in (flags.rows, flags.preferences) if path is not None]
    inputs = {path.resolve() for path in flags.files}
    for output in outputs:
        if output in inputs:
            raise ValueError(f"{output} is read, and cannot be written too")
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"--rows and --preferences are one file, {flags.rows}")


def write_rows(path: Path | None, rows: list[dict[str, Any]], what: str) -> bool:
    """Write an output, where it is wanted; False where there is nothing to write.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        return True
    if not rows:
        print(f"{PROG}: {path} is not written: there are no {what}", file=sys.stderr)
        return False
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_aside(path, text)
    print(f"{path}: {len(rows)} {what}")
    return True


def convert(flags: FeedbackFlags) -> int:
    """Write what is wanted; 1 where an output would be empty."""
    check_outputs(flags)
    lines: list[dict[str, Any]] = []
    for path in flags.files:
        lines += feedback_lines(path)
    said = latest_feedback(lines)
    print(f"{len(lines)} lines about {len(said)} answers: {counted(said)}")
    by_model: dict[str, list[Feedback]] = {}
    for feedback in said:
        by_model.setdefault(feedback.model, []).append(feedback)
    for model, of_model in by_model.items():
        print(f"  {model}: {counted(of_model)}")
    has_rows = write_rows(flags.rows, training_rows(said, flags.only), "training rows")
    pairs = preference_pairs(said, flags.only)
    has_pairs = write_rows(flags.preferences, pairs, "preference pairs")
    return 0 if has_rows and has_pairs else 1


def main(argv: list[str] | None = None) -> int:
    flags = FeedbackFlags(**vars(build_parser().parse_args(argv)))
    return run_command(PROG, lambda: convert(flags))


if __name__ == "__main__":
    sys.exit(main())
