"""Training data from files as they are published.

    python -m finetune.prepare rows --input belle.json,belle_1M.json --output belle.jsonl
    python -m finetune.prepare corpus couplets --input couplet/train --output couplets.jsonl
    python -m finetune.prepare tokenise --model_name_or_path chatglm2-6b --train_path rows.jsonl \\
        --output rows-glm2
    python -m finetune.prepare lengths --model_name_or_path chatglm2-6b --train_path rows.jsonl
    python -m finetune.prepare fetch chatglm_finetuning --output .

docs/data.md (Preparation) says what each does.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chatglm.commands import Parser, number, run_command
from finetune.config import TrainConfig, add_flag
from finetune.files import check_file_to_write, write_aside, write_json
from finetune.prepare.corpora import CORPORA
from finetune.prepare.fetch import BASE_URL, SETS, fetch_files
from finetune.prepare.rewrite import (
    COMPARED,
    DUPLICATES,
    LAYOUTS,
    Selection,
    Written,
    read_all,
    rewrite,
    written_row,
)
from finetune.rows.formats import COLUMN_NAMES, FORMATS, BadRow, parse_columns
from finetune.rows.sources import RowReader, Source, parse_sources

# train.py's flags that say how rows are read and encoded.
TOKEN_FLAGS = (
    "model_name_or_path",
    "mode",
    "prompt_style",
    "train_path",
    "max_len",
    "max_src_len",
    "glm3_labels",
    "prompt_text",
    "data_format",
    "columns",
    "on_bad_row",
    "preprocessing_num_workers",
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    add_rows_flags(verbs.add_parser("rows", help="rows of any format in one file, no duplicates"))
    corpus = verbs.add_parser("corpus", help="a corpus of RLHF as prompts with graded answers")
    add_corpus_flags(corpus)
    tokenising = verbs.add_parser("tokenise", help="rows as token ids on disk")
    add_token_flags(tokenising)
    tokenising.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    tokenising.set_defaults(run=run_tokenise)
    lengths = verbs.add_parser("lengths", help="how long rows are in tokens")
    add_token_flags(lengths)
    lengths.set_defaults(run=run_lengths)
    for with_picture in (tokenising, lengths):
        with_picture.add_argument("--picture", type=Path, metavar="FILE", help="PNG of the lengths")
        with_picture.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    add_fetch_flags(verbs.add_parser("fetch", help="public files that are not shipped"))
    return parser


def add_jsonl_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--held_out", type=Path, metavar="FILE", help="JSON lines of a part that is held out"
    )
    parser.add_argument(
        "--held_out_share",
        type=number(0, 0.9),
        default=0.02,
        help="of the rows, by a hash of their prompts [0.02]",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of all that is drawn [1234]")


def add_rows_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", required=True, metavar="PATHS", help="as --train_path of train.py"
    )
    add_jsonl_flags(parser)
    parser.add_argument(
        "--to", choices=tuple(LAYOUTS), default="as_is", help="layout of the rows [as_is]"
    )
    parser.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        default="exact",
        help="left out: rows of the same text, also near ones (MinHash), or none (keep) [exact]",
    )
    parser.add_argument(
        "--compare", choices=COMPARED, default="row", help="what of a row is compared [row]"
    )
    parser.add_argument(
        "--threshold",
        type=number(0, 1, above=True),
        default=0.8,
        help="similarity of near duplicates: Jaccard of character 5-grams [0.8]",
    )
    parser.add_argument("--prompt_text", default="", help="before the text of {text, answer}")
    parser.add_argument("--data_format", choices=("auto", *FORMATS), default="auto")
    parser.add_argument("--columns", default="", help="as train.py's: prompt=title,response=body")
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error")
    parser.set_defaults(run=run_merge)


def add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    texts = [f"{name}: {corpus.text}" for name, corpus in CORPORA.items()]
    parser.add_argument("name", choices=tuple(CORPORA), help="; ".join(texts))
    parser.add_argument("--input", type=Path, required=True, metavar="PATH", help="file or folder")
    add_jsonl_flags(parser)
    parser.set_defaults(run=run_corpus)


def add_token_flags(parser: argparse.ArgumentParser) -> None:
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name in TOKEN_FLAGS:
        add_flag(parser, fields[name])


def add_fetch_flags(parser: argparse.ArgumentParser) -> None:
    texts = [f"{name}: {files.text}, of {files.repository}" for name, files in SETS.items()]
    parser.add_argument("name", choices=tuple(SETS), help="; ".join(texts))
    parser.add_argument(
        "--output", type=Path, default=Path("."), metavar="FOLDER", help="parent of data/ [.]"
    )
    parser.add_argument(
        "--base_url", default=BASE_URL, help=f"before OWNER/NAME/HEAD/PATH [{BASE_URL}]"
    )
    parser.set_defaults(run=run_fetch)


# ---- the commands


def check_jsonl_outputs(args: argparse.Namespace, sources: list[Source]) -> None:
    """Raises ValueError where an output is an input, or there are flags without effect."""
    outputs = [args.output]
    if args.held_out:
        outputs.append(args.held_out)
    inputs: set[Path] = set()
    for source in sources:
        inputs.update(path.resolve() for path in source.files)
    for path in outputs:
        if path.resolve() in inputs:
            raise ValueError(f"{path} is read: name another file to write")
        if path.suffix != ".jsonl":
            raise ValueError(f"wanted a name that ends in .jsonl, got {path}")
    if args.held_out and args.held_out.resolve() == args.output.resolve():
        raise ValueError("--output and --held_out name the same file")
    if args.held_out_share != 0.02 and not args.held_out:
        raise ValueError("--held_out_share needs --held_out: it has no effect otherwise")
    if args.held_out and not args.held_out_share:
        raise ValueError("--held_out needs a --held_out_share above 0")


def run_merge(args: argparse.Namespace) -> None:
    """Merge rows of any format."""
    if args.threshold != 0.8 and args.duplicates != "near":
        raise ValueError("--threshold needs --duplicates near: it has no effect otherwise")
    sources = parse_sources(args.input, "--input", weights=False)
    check_jsonl_outputs(args, sources)
    columns = parse_columns(args.columns, COLUMN_NAMES)
    reader = RowReader(args.prompt_text, args.data_format, columns)
    selection = Selection(
        duplicates=args.duplicates,
        compare=args.compare,
        threshold=args.threshold,
        share=args.held_out_share if args.held_out else 0.0,
        seed=args.seed,
    )

    def read(title: str) -> Iterator[Written | BadRow]:
        return read_all(sources, reader, args.on_bad_row, args.to, title)

    print(rewrite(read, selection, args.output, args.held_out).text)


def run_corpus(args: argparse.Namespace) -> None:
    """Write a corpus with graded answers."""
    if not args.input.exists():
        raise FileNotFoundError(f"--input: no such file: {args.input}")
    check_jsonl_outputs(
        args, parse_sources(str(args.input), "--input", weights=False, documents="file")
    )
    corpus = CORPORA[args.name]
    rows = list(tqdm(corpus.read(args.input), desc="reading", unit="row", disable=None, delay=1))
    selection = Selection(share=args.held_out_share if args.held_out else 0.0, seed=args.seed)

    reader = RowReader(data_format="scored")

    def read(title: str) -> Iterator[Written | BadRow]:
        bar = tqdm(corpus.make(rows, args.seed), desc=title, unit="row", disable=None, delay=1)
        for value in bar:
            yield written_row(value, reader.row(value, args.name), "as_is")

    counts = rewrite(read, selection, args.output, args.held_out)
    print(f"{len(rows)} rows of {args.name}: {counts.text}")


def token_config(args: argparse.Namespace) -> TrainConfig:
    """The flags as train.py's. Those that are not given have no attribute (add_flag).

    Raises ValueError where the figures cannot be written.
    """
    for name in ("json", "picture"):
        path = getattr(args, name)
        if path:
            check_file_to_write(path, f"--{name}")
    values = {name: value for name, value in vars(args).items() if name in TOKEN_FLAGS}
    return TrainConfig(**values)


def run_tokenise(args: argparse.Namespace) -> None:
    """Write a data set of token ids."""
    from finetune.prepare.lengths import lengths_text
    from finetune.prepare.tokenise import Tokenising, check_replaceable, write_tokenised

    config = token_config(args)
    check_replaceable(args.output)
    card, lengths = write_tokenised(Tokenising(config), args.output)
    figures = lengths.figures(config.max_len)
    skipped = f", {card['bad']} bad ones skipped" if card["bad"] else ""
    print(f"{args.output}: {card['rows']} rows, {card['truncated']} cut{skipped}")
    print(lengths_text(figures, config.max_len, config.max_src_len))
    keep_figures(args, figures, lengths, config)


def run_lengths(args: argparse.Namespace) -> None:
    """Print how long rows are."""
    from finetune.prepare.lengths import LengthMeter, lengths_text
    from finetune.prepare.tokenise import Tokenising

    config = token_config(args)
    meter = LengthMeter()
    for _, row in Tokenising(config, whole=True).rows():
        meter.add(row)
    figures = meter.lengths.figures(config.max_len)
    print(lengths_text(figures, config.max_len, config.max_src_len))
    keep_figures(args, figures, meter.lengths, config)


def keep_figures(
    args: argparse.Namespace, figures: dict[str, Any], lengths: Any, config: TrainConfig
) -> None:
    """Write --json and --picture."""
    from finetune.prepare.lengths import lengths_picture

    if args.json:
        write_json(args.json, figures)
    if args.picture:
        write_aside(args.picture, lengths_picture(lengths, config.max_len))


def run_fetch(args: argparse.Namespace) -> None:
    """Download public files."""
    for line in fetch_files(SETS[args.name], args.output, args.base_url):
        print(line)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_command("finetune.prepare", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
