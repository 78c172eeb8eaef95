"""python -m serving.cost_model: predict with a profile, evaluate one against measurements, fit a new one."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from finetune.commands import Parser, run_command, whole
from finetune.files import write_json
from serving.cost_model.devices import MOST_DEVICES
from serving.cost_model.fit import (
    PROMPT_TOKENS,
    Row,
    errors,
    fit,
    read_rows,
    report,
    row_seconds,
    summary,
    vague,
)
from serving.cost_model.model import read_profile


def run_predict(args) -> None:
    """Prints the seconds, and of what."""
    profile = read_profile(args.profile)
    row = Row(
        1.0,
        args.batch,
        args.output_tokens,
        args.gpus,
        args.placement,
        args.prompt_tokens,
        phase="batch" if args.warm else "",
        model=args.model,
    )
    seconds = row_seconds(row, profile)
    start = "" if args.warm else ", start-up included"
    what = f"{args.batch} x ({args.prompt_tokens} + {args.output_tokens}) tokens of {args.model} on {args.gpus} x {profile.device_name}"
    print(f"{seconds:.4f} s: {what}, {args.placement}{start}")


def run_evaluate(args) -> None:
    rows, left_out = read_rows(args.rows)
    print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    found = summary(errors(rows, read_profile(args.profile)))
    print(
        f"{found['rows']} rows: median {100 * found['median_abs_error']:.2f} %, P90 {100 * found['p90_abs_error']:.2f} % absolute relative error"
    )
    if args.json:
        write_json(args.json, found)


def run_fit(args) -> None:
    rows, left_out = read_rows(args.rows)
    print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    start = read_profile(args.start)
    start = replace(
        start,
        name=Path(args.output).stem,
        device=args.device or start.device,
        link=args.link or start.link,
    )
    found = report(rows, start)
    chosen = "".join(
        f" --{name} {value}"
        for name in ("start", "device", "link")
        if (value := getattr(args, name))
    )
    profile = fit(rows, start)
    made = {
        "command": f"python -m serving.cost_model fit --rows {Path(args.rows).name} --output {Path(args.output).name}{chosen}",
        "from": args.about or Path(args.rows).name,
        "errors": found,
        "not_told_apart_by_the_rows": vague(rows, profile),
    }
    replace(profile, made=made).save(args.output)
    for name, figures in found.items():
        print(
            f"{name:28} {figures['rows']:4} rows   median {100 * figures['median_abs_error']:5.2f} %   P90 {100 * figures['p90_abs_error']:5.2f} %"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.cost_model", description="seconds of serving, from a calibrated profile"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("predict", help="seconds of one batch, run to its longest answer")
    verb.add_argument(
        "--gpus", type=whole(1, MOST_DEVICES), default=1, help="number of the profile's devices"
    )
    verb.add_argument("--batch", type=whole(), default=1, help="sequences in the batch")
    verb.add_argument(
        "--output-tokens", type=whole(), required=True, help="new tokens of the longest answer"
    )
    verb.add_argument(
        "--prompt-tokens",
        type=whole(),
        default=PROMPT_TOKENS,
        help=f"of the longest prompt (default {PROMPT_TOKENS})",
    )
    verb.add_argument(
        "--placement",
        default="even",
        help="even, single, alternate, lr, he, helr, or layers by device: 14,14",
    )
    verb.add_argument(
        "--model", default="chatglm2-6b", help="a published name or a folder with a config.json"
    )
    verb.add_argument(
        "--warm", action="store_true", help="not the first batch of its process: without start-up"
    )
    verb.set_defaults(run=run_predict)
    evaluate = verbs.add_parser("evaluate", help="a profile against measured rows")
    evaluate.add_argument("--json", help="file for {rows, median_abs_error, p90_abs_error}")
    evaluate.set_defaults(run=run_evaluate)
    fitting = verbs.add_parser(
        "fit", help="measured rows -> a profile, with its errors on rows left out of the fit"
    )
    fitting.add_argument("--output", required=True, help="profile to write, .json")
    fitting.add_argument(
        "--start", default="datasheet", help="profile that decides what the rows do not"
    )
    fitting.add_argument(
        "--device", help="the rows' device: a name of serving/cost_model/devices.py or a .json file"
    )
    fitting.add_argument("--link", help="the link between the rows' devices, by name")
    fitting.add_argument("--about", help="where the rows are from, kept in the profile")
    fitting.set_defaults(run=run_fit)
    for with_rows in (evaluate, fitting):
        with_rows.add_argument(
            "--rows",
            required=True,
            help="CSV file of measurements (columns: serving/cost_model/fit.py)",
        )
    for with_profile in (verb, evaluate):
        with_profile.add_argument(
            "--profile",
            default="rtx3090",
            help="a name in serving/cost_model/profiles, datasheet, or a .json file",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: args.run(args))
