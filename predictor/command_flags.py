"""Flags that several commands of the predictor share. Free of torch."""

import argparse


def add_predictor_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that load a predictor."""
    parser.add_argument("--predictor", required=True, metavar="DIR", help="folder of the predictor")
    parser.add_argument(
        "--base_model",
        metavar="DIR",
        help="of a ChatGLM backbone whose folder holds an adapter alone "
        "(default: the one it names)",
    )
    parser.add_argument("--device", default="cpu", help="torch device of a transformer in it [cpu]")


def add_bad_row_flag(parser: argparse.ArgumentParser, default: str, help: str) -> None:
    """Add --on_bad_row, error or skip."""
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default=default, help=help)


def add_yes_no(parser: argparse.ArgumentParser, name: str, default: bool | None, help: str) -> None:
    """Add a flag that takes True or False; given without a value, it means True."""
    from finetune.config import parse_bool

    parser.add_argument(
        name,
        type=parse_bool,
        nargs="?",
        const=True,
        default=default,
        metavar="True|False",
        help=help,
    )
