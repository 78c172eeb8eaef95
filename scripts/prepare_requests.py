#!/usr/bin/env python3
"""Write objectives, and measured lengths, into a list of requests.

    python scripts/prepare_requests.py rows.json --output requests.json
    python scripts/collect_lengths.py --model_path DIR --prompts rows.json --output lengths.jsonl
    python scripts/prepare_requests.py rows.json --lengths lengths.jsonl --output requests.json

Every row keeps its keys and its place. "SLO" is drawn by place as UELLM's dataset/deal.py draws it,
whole seconds from 90 to 300, or is --slo_s; a row's own stays. With --lengths each row gets the
measured tokens of its prompt's answer as "length", which python -m serving.run_requests reads; of
several answers what UELLM takes, halfway between their mean and the longest.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, number, run_command, whole  # noqa: E402
from finetune.files import utf8_json, write_aside  # noqa: E402
from finetune.rows.fields import is_missing  # noqa: E402
from finetune.rows.formats import BadRow  # noqa: E402
from predictor.labels import Label, parse_prompt, read_examples  # noqa: E402
from serving.run_requests.listed import listed_row, read_request_items  # noqa: E402
from serving.simulate.uellm_published import dealt_objectives  # noqa: E402


@dataclass(frozen=True)
class PrepareFlags:
    """The flags of this command."""

    requests: str
    output: Path
    seed: int
    slo_s: float | None
    overwrite: bool
    lengths: str | None
    served_model: str | None
    length_key: str


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prepare_requests.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("requests", help='rows with an "instruction" or a "prompt": JSON, JSON lines, a table')
    written = "list to write: JSON, or JSON lines where it ends in .jsonl"
    add("--output", required=True, type=Path, metavar="FILE", help=written)
    add("--seed", type=whole(0), default=0, metavar="N", help="of drawn objectives [0]")
    seconds = "one objective for all rows (default: drawn)"
    add("--slo_s", type=number(0, above=True), metavar="S", help=seconds)
    replaced = "replace the SLO and the length that a row has"
    add("--overwrite", action="store_true", help=replaced)
    lengths = "what scripts/collect_lengths.py measured"
    add("--lengths", metavar="FILE", help=lengths)
    model = "with --lengths: whose answers count, where several models were measured"
    add("--served_model", metavar="NAME", help=model)
    key = 'with --lengths: the key to write; UELLM has the number in place of the "output" [length]'
    add("--length_key", choices=("length", "output"), default="length", help=key)
    return parser


def measured_lengths(path: str, served_model: str | None) -> dict[str, int]:
    """Tokens by prompt, as `label_of` of its answers.

    Raises:
        ValueError: there are none of the model, or those of several models.
    """
    examples, _ = read_examples(path, served_model="")
    models: list[str] = []
    for one in examples:
        models += map(attrgetter("served_model"), one.labels)
    models = sorted(set(models))
    if served_model is None and len(models) > 1:
        raise ValueError(f"{path}: lengths of {', '.join(models)}: name one by --served_model")
    if served_model is not None and served_model not in models:
        raise ValueError(f"--served_model {served_model}: {path} has lengths of {models}")
    found = {}
    for one in examples:
        labels = [label for label in one.labels if served_model in (None, label.served_model)]
        if labels:
            found[one.prompt] = label_of(labels)
    return found


def label_of(labels: Sequence[Label]) -> int:
    """One number for several answers: ceil(ceil(mean) / 2 + longest / 2), UELLM's; at least 1."""
    tokens = list(map(attrgetter("tokens"), labels))
    mean = math.ceil(sum(tokens) / len(tokens))
    return max(1, math.ceil(mean / 2 + max(tokens) / 2))


def with_objectives(
    rows: Sequence[dict[str, Any]], slo_s: float | None, seed: int, overwrite: bool
) -> list[dict[str, Any]]:
    """The rows with an SLO each; drawn by place, so that a row's own changes no other's."""
    dealt = dealt_objectives(len(rows), np.random.default_rng(seed)).tolist()
    prepared = []
    for row, drawn in zip(rows, dealt):
        seconds = drawn if slo_s is None else slo_s
        seconds = int(seconds) if seconds == int(seconds) else seconds
        has_one = not (is_missing(row.get("SLO")) and is_missing(row.get("slo_s")))
        if has_one and not overwrite:
            prepared.append(dict(row))
        else:
            changed = row | {"SLO": seconds}
            changed.pop("slo_s", None)
            prepared.append(changed)
    return prepared


def with_lengths(
    rows: Sequence[tuple[str, dict[str, Any]]], found: dict[str, int], flags: PrepareFlags
) -> list[dict[str, Any]]:
    """The rows with the length of their prompt's answer. Raises BadRow for one without."""
    prepared = []
    for place, row in rows:
        tokens = found.get(parse_prompt(row, place))
        if tokens is None:
            raise BadRow(f"{place}: its prompt is not among the measured of {flags.lengths}")
        lacks_one = flags.length_key == "output" or is_missing(row.get("length"))
        replaces = flags.overwrite or lacks_one
        prepared.append(row | {flags.length_key: tokens} if replaces else row)
    return prepared


def list_text(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """The rows as JSON lines, or as a list with a row on each line."""
    lines = list(map(utf8_json, rows))
    if path.suffix == ".jsonl":
        return "".join(f"{line}\n" for line in lines)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def prepare(flags: PrepareFlags) -> None:
    """Everything after the flags. Raises ValueError, OSError in one line."""
    placed = read_request_items(flags.requests)
    for place, item in placed:
        listed_row(item, place)  # raises for what is no request
    rows = list(map(itemgetter(1), placed))
    if flags.lengths is not None:
        found = measured_lengths(flags.lengths, flags.served_model)
        rows = with_lengths(placed, found, flags)
    rows = with_objectives(rows, flags.slo_s, flags.seed, flags.overwrite)
    write_aside(flags.output, list_text(rows, flags.output))
    print(f"{len(rows)} requests written to {flags.output}")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = PrepareFlags(**vars(parser.parse_args(argv)))
    if flags.lengths is None:
        for name in ("served_model", "length_key"):
            if getattr(flags, name) != parser.get_default(name):
                parser.error(f"--{name} needs --lengths")
    return run_command(parser.prog, lambda: prepare(flags))


if __name__ == "__main__":
    sys.exit(main())
