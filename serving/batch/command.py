"""Answers to the rows of files, through the scheduler, in the order of the rows.

python -m serving.batch --model DIR|URL --input rows.jsonl --output answers.jsonl

Rows are what finetune.predict reads, with or without their answers; chats {"messages": [...]}; and
lines of OpenAI's batch files, whose answers get OpenAI's output form. A row may have temperature,
top_p, max_tokens, seed, ... and adapter, a name of --adapter, of its own. A row that cannot be
answered is a line with `error`, and the exit code is then 3. What is answered is kept beside the
output: the same command goes on where it was interrupted or killed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.commands import Parser, number, run_command, whole
from finetune.evaluation.predict import RowReadingFlags, add_row_flags, reader_of
from finetune.flag_effects import check_given
from serving.batch.inputs import BatchRow, RowDefaults, read_batch
from serving.batch.results import KeptReplies, Outcome, output_text, placed_error
from serving.endpoints.opening import (
    ENDPOINT_EFFECTS,
    HERE,
    EndpointFlags,
    add_endpoint_flags,
    open_endpoint,
)
from serving.endpoints.remote import is_url
from serving.endpoints.replies import AnswerRefused, ChatReply, NumberedRequest

SOME_FAILED = 3  # exit code
EFFECTS = ENDPOINT_EFFECTS | dict.fromkeys(("policy", "kv_tokens"), HERE)
BATCH_SETTINGS = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_tokens"}
BATCH_SETTINGS |= {"seed": "seed"}


@dataclass(frozen=True)
class BatchFlags(EndpointFlags, RowReadingFlags):
    """The flags of the command; `build_parser` has their meaning and defaults."""

    input: str
    output: str
    policy: str | None
    max_batch: int
    kv_tokens: int
    slo_s: float
    system: str | None
    temperature: float | None
    top_p: float | None
    max_new_tokens: int | None
    seed: int | None
    strict: bool

    @property
    def chosen_policy(self) -> str:
        return self.policy or ("sjf" if self.predictor else "fcfs")


def build_parser() -> argparse.ArgumentParser:
    from serving.policies.continuous import POLICIES

    parser = Parser(
        prog="serving.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|URL", help="a folder, or http://HOST:PORT/v1")
    add("--input", required=True, metavar="FILES", help="a comma list, as --train_path takes")
    kinds = "JSON lines, or a table where it ends in .csv or .tsv"
    add("--output", required=True, metavar="FILE", help=kinds)
    names = [name for name in POLICIES if "oracle" not in name]  # an oracle needs true lengths
    policy = "the scheduling policy [sjf with --predictor, else fcfs]"
    add("--policy", choices=names, help=policy)
    most = "batch size; at a server: requests sent at once [16]"
    add("--max_batch", type=whole(1), default=16, metavar="N", help=most)
    cache = "KV cache size in tokens: prompts and answers of all running requests [16384]"
    add("--kv_tokens", type=whole(2), default=16384, metavar="N", help=cache)
    due = "seconds to a whole answer, for policies with deadlines [30]"
    add("--slo_s", type=number(0, above=True), default=30.0, metavar="S", help=due)
    add("--system", metavar="TEXT", help="what the model is told first, of rows without their own")
    add("--temperature", type=number(0, 2), metavar="T", help="0: the likeliest token [0]")
    add("--top_p", type=number(0, 1), metavar="P", help="with a temperature [the family's]")
    longest = "longest answer, in tokens [as far as --max_tokens allows]"
    add("--max_new_tokens", type=whole(1), metavar="N", help=longest)
    seed = "of sampling; counts up with the rows [1234]"
    add("--seed", type=whole(0), default=1234, metavar="N", help=seed)
    add("--strict", action="store_true", help="the first row without an answer ends the command")
    add_row_flags(parser)
    add_endpoint_flags(parser)
    return parser


def defaults_of(flags: BatchFlags) -> RowDefaults:
    """What rows get that do not say otherwise."""
    settings: dict[str, Any] = {"temperature": 0.0}
    for flag, name in BATCH_SETTINGS.items():
        if (value := getattr(flags, flag)) is not None:
            settings[name] = value
    return RowDefaults(settings, flags.system)


def answer_rows(flags: BatchFlags) -> int:
    """Answer the input's rows; the exit code.

    Raises:
        ValueError, OSError: nothing can be answered, or a row with --strict.
        KeyboardInterrupt: saying what is kept.
    """
    rows = read_batch(flags.input, reader_of(flags), defaults_of(flags))
    if flags.strict:
        refuse_bad_rows(rows)
    kept = KeptReplies(Path(flags.output), dependencies_of(flags))
    outcomes: dict[int, Outcome] = dict(kept.found(rows))
    try:
        run_rows(flags, rows, kept, outcomes)
    except KeyboardInterrupt:
        answered = sum(isinstance(outcome, ChatReply) for outcome in outcomes.values())
        where = f"{answered} of {len(rows)} answers are kept in {kept.path}"
        raise KeyboardInterrupt(f"interrupted; {where}: the same command goes on") from None
    kept.replace_by(output_text(rows, outcomes, Path(flags.output).suffix))
    failed = sum(not isinstance(outcomes.get(place), ChatReply) for place in range(len(rows)))
    print(f"{len(rows) - failed} of {len(rows)} rows answered, written to {flags.output}")
    if failed:
        print(f'{failed} rows have no answer; their "error" says why', file=sys.stderr)
    return SOME_FAILED if failed else 0


def refuse_bad_rows(rows: list[BatchRow]) -> None:
    """Raises ValueError for the first row that is none."""
    for row in rows:
        if row.refusal:
            raise ValueError(row.refusal)


def run_rows(
    flags: BatchFlags, rows: list[BatchRow], kept: KeptReplies, outcomes: dict[int, Outcome]
) -> None:
    """Answer the rows without an outcome, and add theirs.

    Raises:
        EndpointDown: no more answers can be made. AnswerRefused: of a row, with --strict.
    """
    from tqdm import tqdm

    left = list(requests_left(rows, outcomes))
    if not left:
        return
    endpoint = open_endpoint(
        flags,
        policy=flags.chosen_policy,
        max_batch=flags.max_batch,
        kv_tokens=flags.kv_tokens,
        slo_s=flags.slo_s,
    )
    bar = tqdm(total=len(rows), initial=len(outcomes), unit="row", disable=None)
    try:
        for place, outcome in endpoint.replies(left):
            if isinstance(outcome, AnswerRefused):
                if flags.strict:
                    raise ValueError(placed_error(rows[place], outcome))
            else:
                kept.add(place, rows[place], outcome)
            outcomes[place] = outcome
            bar.update()
    finally:
        bar.close()
        endpoint.close()


def requests_left(rows: list[BatchRow], outcomes: dict[int, Outcome]) -> Iterator[NumberedRequest]:
    """The requests of the rows without an outcome."""
    for place, row in enumerate(rows):
        if row.body is not None and place not in outcomes:
            yield row.request(place)


def dependencies_of(flags: BatchFlags) -> dict[str, Any]:
    """What every answer depends on beside its row: the model's files and how they are loaded."""
    if is_url(flags.model):
        return {"model": flags.model, "model_name": flags.model_name}
    folders = {"model": flags.model}
    for text in flags.adapter:
        name, _, folder = text.partition("=")
        folders[f"adapter {name}"] = folder
    stamps = {name: file_stamps(Path(folder)) for name, folder in folders.items()}
    options = {}
    names = ("base_model", "mode", "prompt_style", "precision", "keep_quantized", "max_tokens")
    for name in (*names, "engine"):
        options[name] = getattr(flags, name)
    return {"files": stamps, "options": options}


def file_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """(name, size, time of change in ns) of a folder's weights; empty where it is none."""
    stamps = []
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".bin", ".pt"):
            stamps.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return stamps


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_given(parser, vars(args), EFFECTS)
    flags = BatchFlags(**vars(args))
    return run_command(parser.prog, lambda: answer_rows(flags))


if __name__ == "__main__":
    sys.exit(main())
