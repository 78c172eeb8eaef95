"""A flag as a field of a frozen dataclass: its default, its help, how its text becomes a value.

Free of torch.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Any


def parse_bool(text: str | bool) -> bool:
    """True/False/yes/no/1/0 in any case. argparse's `type=bool` would read "False" as True."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"wanted True or False, got {text!r}")


LARGEST_COUNT = 10**12  # of a flag: products of such numbers are floats still


def parse_positive(text: str) -> int:
    """A whole number from 1 to LARGEST_COUNT."""
    value = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= value <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text[:40]!r}")
    return value


def parse_checkpointing(text: str | bool) -> str:
    """ "True", "False" (in parse_bool's spellings) or "selective"."""
    return text if text == "selective" else str(parse_bool(text))


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[object, ...] | None = None,
    positive: bool = False,
    shapes_training: bool = False,
    parse: Callable[[str], object] | None = None,
    bare: str | None = None,
) -> Any:
    """A dataclass field with the flag's help.

    Args:
        choices: the values that are allowed.
        positive: the value must be at least 1.
        shapes_training: a resumed run must have the same value.
        parse: converts text to a value, where the field's type does not say how.
        bare: the value of the flag given without one.
    """
    meta = {
        "help": help,
        "choices": choices,
        "positive": positive,
        "shapes_training": shapes_training,
        "parse": parse,
        "bare": bare,
    }
    return field(default=default, metadata=meta)


def fixed_flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that a resumed run may not change."""
    return flag(default, help, shapes_training=True, **options)


def flag_type(f: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """What converts a flag's text to the type of its field."""
    parse: Callable[[str], Any] | None = f.metadata["parse"]
    if parse:
        return parse
    name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    converters: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": float,
        "bool": parse_bool,
    }
    return converters[name.split(" | ")[0]]


def add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field[Any]) -> None:
    """Add a field as a flag, which is not in the namespace where it is not given."""
    names = [f"--{f.name}"]
    if f.name == "local_rank":
        names.append("--local-rank")
    shown = "" if f.default in (None, "") else f" [{f.default}]"
    options: dict[str, Any] = {
        "help": (f.metadata["help"] + shown).replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    if f.type in (bool, "bool"):
        options |= {"nargs": "?", "const": True, "metavar": "True|False"}
    elif f.metadata["choices"]:
        options["choices"] = f.metadata["choices"]
    elif isinstance(f.type, str):
        options["metavar"] = f.type.split(" | ")[0].upper()
    else:
        options["metavar"] = f.name.upper()
    if f.metadata["bare"] is not None:
        options |= {"nargs": "?", "const": f.metadata["bare"]}
    parser.add_argument(*names, type=flag_type(f), **options)
