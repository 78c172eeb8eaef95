"""python -m serving.cost_model: predict with a profile, evaluate it on measurements, fit one."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from chatglm.commands import Parser, run_command, whole
from finetune.files import write_json
from serving.cost_model.devices import MAX_DEVICES
from serving.cost_model.fit import (
    PROMPT_TOKENS,
    Measurement,
    fit_profile,
    read_measurements,
    relative_errors,
    row_seconds,
    summarize_errors,
    summarize_fits,
    undetermined_coefficients,
)
from serving.cost_model.model import read_profile


def run_predict(
    *,
    profile: str,
    gpus: int,
    batch: int,
    output_tokens: int,
    prompt_tokens: int,
    placement: str,
    model: str,
    warm: bool,
) -> None:
    """Print the seconds of one batch."""
    fitted = read_profile(profile)
    row = Measurement(
        1.0,
        batch,
        output_tokens,
        gpus,
        placement,
        prompt_tokens,
        phase="batch" if warm else "",
        model=model,
    )
    seconds = row_seconds(row, fitted)
    start = "" if warm else ", start-up included"
    tokens = f"{batch} x ({prompt_tokens} + {output_tokens}) tokens"
    where = f"{gpus} x {fitted.device_name}"
    print(f"{seconds:.4f} s: {tokens} of {model} on {where}, {placement}{start}")


def load_measurements(path: str) -> list[Measurement]:
    """The rows of a file; prints a line for each that is left out."""
    rows, skipped = read_measurements(path)
    for line in skipped:
        print(line, file=sys.stderr)
    return rows


def run_evaluate(*, rows: str, profile: str, json: str | None) -> None:
    """Print the errors of a profile on measured rows."""
    measured = load_measurements(rows)
    figures = summarize_errors(relative_errors(measured, read_profile(profile)))
    print(
        f"{figures['rows']} rows: median {100 * figures['median_abs_error']:.2f} %, "
        f"P90 {100 * figures['p90_abs_error']:.2f} % absolute relative error"
    )
    if json:
        write_json(json, figures)


def run_fit(
    *,
    rows: str,
    output: str,
    start: str,
    device: str | None,
    link: str | None,
    about: str | None,
) -> None:
    """Write the profile that measured rows give, and print its errors."""
    measured = load_measurements(rows)
    prior = read_profile(start)
    prior = replace(
        prior,
        name=Path(output).stem,
        device=device or prior.device,
        link=link or prior.link,
    )
    summaries = summarize_fits(measured, prior)
    profile = fit_profile(measured, prior)
    made = {
        "command": fit_command(rows, output, start=start, device=device, link=link),
        "from": about or Path(rows).name,
        "errors": summaries,
        "not_told_apart_by_the_rows": undetermined_coefficients(measured, profile),
    }
    replace(profile, made=made).save(output)
    for name, figures in summaries.items():
        median, p90 = 100 * figures["median_abs_error"], 100 * figures["p90_abs_error"]
        print(f"{name:28} {figures['rows']:4} rows   median {median:5.2f} %   P90 {p90:5.2f} %")


def fit_command(rows: str, output: str, **flags: str | None) -> str:
    """The command that a profile records, with its files' names alone and the flags given."""
    rows, output = Path(rows).name, Path(output).name
    command = f"python -m serving.cost_model fit --rows {rows} --output {output}"
    for name, value in flags.items():
        if value:
            command += f" --{name} {value}"
    return command


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.cost_model", description="seconds of serving, from a calibrated profile"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    predict = verbs.add_parser("predict", help="seconds of one batch, run to its longest answer")
    add_predict_flags(predict)
    evaluate = verbs.add_parser("evaluate", help="a profile against measured rows")
    evaluate.add_argument("--json", help="file for {rows, median_abs_error, p90_abs_error}")
    evaluate.set_defaults(run=run_evaluate)
    fitting = verbs.add_parser(
        "fit", help="measured rows -> a profile, with its errors on rows left out of the fit"
    )
    add_fit_flags(fitting)
    for with_rows in (evaluate, fitting):
        with_rows.add_argument(
            "--rows",
            required=True,
            help="CSV file of measurements (columns: serving/cost_model/fit.py)",
        )
    for with_profile in (predict, evaluate):
        with_profile.add_argument(
            "--profile",
            default="rtx3090",
            help="a name in serving/cost_model/profiles, datasheet, or a .json file",
        )
    return parser


def add_predict_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpus", type=whole(1, MAX_DEVICES), default=1, help="number of the profile's devices")
    add("--batch", type=whole(), default=1, help="sequences in the batch")
    add("--output-tokens", type=whole(), required=True, help="new tokens of the longest answer")
    add(
        "--prompt-tokens",
        type=whole(),
        default=PROMPT_TOKENS,
        help=f"of the longest prompt (default {PROMPT_TOKENS})",
    )
    add(
        "--placement",
        default="even",
        help="even, single, alternate, lr, he, helr, or layers by device: 14,14",
    )
    add("--model", default="chatglm2-6b", help="a published name or a folder with a config.json")
    add("--warm", action="store_true", help="not the first batch of its process: without start-up")
    parser.set_defaults(run=run_predict)


def add_fit_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", required=True, help="profile to write, .json")
    add("--start", default="datasheet", help="profile that decides what the rows do not")
    add(
        "--device", help="the rows' device: a name of serving/cost_model/devices.py or a .json file"
    )
    add("--link", help="the link between the rows' devices, by name")
    add("--about", help="where the rows are from, stored in the profile")
    parser.set_defaults(run=run_fit)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    run = flags.pop("run")
    del flags["verb"]
    return run_command(parser.prog, lambda: run(**flags))
