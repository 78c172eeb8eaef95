"""The user's list of requests: its rows, their objectives and their arrival times.

A row is an object as in UELLM's data sets (dataset/deal.py of its repository):
{"instruction", "input"?, "output"?, "SLO"?, "arrival"?, "length"?}; "prompt" may stand in place of
the first two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatglm.files import shorten
from finetune.rows.fields import is_missing
from finetune.rows.formats import BadRow
from finetune.rows.sources import good_items, read_file_items
from serving.simulate.uellm_published import dealt_objectives
from serving.simulate.workload import poisson_arrivals

MOST = 10**9  # seconds, and tokens


@dataclass(frozen=True)
class ListedRow:
    """One row of the list.

    Attributes:
        place: "file:line", for messages.
        prompt: instruction and input, with nothing between; or the row's "prompt".
        slo_s: seconds from its arrival to its whole answer; None where the row says none.
        arrival_s: seconds from the start; None where the row says none.
        length: expected tokens of its answer: the row's "length", else a whole number in "output",
            where UELLM's relabelled lists have it; None for neither.
    """

    place: str
    prompt: str
    slo_s: float | None = None
    arrival_s: float | None = None
    length: int | None = None


def read_request_list(path: str | Path) -> list[ListedRow]:
    """The requests of a file; raises as `read_request_items`."""
    return [listed_row(item, place) for place, item in read_request_items(path)]


def read_request_items(path: str | Path) -> list[tuple[str, dict]]:
    """(place, row) of a JSON list or of JSON lines (and whatever else fine-tuning reads).

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it has no rows, or one that is no object; the message has its place.
    """
    rows = []
    for place, item in good_items(read_file_items(path)):
        if not isinstance(item, dict):
            raise BadRow(f"{place}: wanted an object with an instruction, got {shorten(item)}")
        rows.append((place, item))
    if not rows:
        raise ValueError(f"{path}: no requests in it")
    return rows


def listed_row(item: dict, place: str) -> ListedRow:
    """The row of a JSON object. Raises BadRow."""
    texts = []
    for key in ("prompt", "instruction", "input"):
        text = item.get(key)
        if is_missing(text):
            text = ""
        if not isinstance(text, str):
            raise BadRow(f'{place}: "{key}" must be text, got {shorten(text)}')
        texts.append(text)
    prompt = "".join(texts)
    if not prompt:
        raise BadRow(f'{place}: wanted an "instruction", got the keys {shorten(list(item))}')
    slo_s = seconds_of(item, ("SLO", "slo_s"), place)
    if slo_s == 0:
        raise BadRow(f'{place}: "SLO" must be seconds above 0, got 0')
    arrival_s = seconds_of(item, ("arrival", "arrival_s"), place)
    return ListedRow(place, prompt, slo_s, arrival_s, length_of(item, place))


def seconds_of(item: dict, keys: Sequence[str], place: str) -> float | None:
    """The number of the first of these keys that the object has; None where it has none."""
    for key in keys:
        value = item.get(key)
        if is_missing(value):
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise BadRow(f'{place}: "{key}" must be seconds, a number, got {shorten(value)}')
        if not 0 <= value <= MOST:
            raise BadRow(f'{place}: "{key}" must be seconds, at least 0, got {shorten(value)}')
        return float(value)
    return None


def length_of(item: dict, place: str) -> int | None:
    """Tokens in "length", else a whole number in "output"; None for neither."""
    value = item.get("length")
    if is_missing(value):
        output = item.get("output")
        is_length = isinstance(output, int) and not isinstance(output, bool)
        value = output if is_length else None
        key = "output"
    else:
        key = "length"
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise BadRow(f'{place}: "{key}" must be tokens, a whole number, got {shorten(value)}')
    return value


def objectives(
    rows: Sequence[ListedRow], slo_s: float | None, factor: float, seed: int
) -> list[float]:
    """Seconds of each row: its own, else `slo_s`, else drawn as UELLM draws them; times `factor`.

    UELLM's lists hold whole seconds, from 90 to 300, chosen for ChatGLM2-6B on a GPU: `factor`
    brings them to the pace of another model or machine.
    """
    dealt = dealt_objectives(len(rows), np.random.default_rng(seed)).tolist()
    seconds = []
    for row, drawn in zip(rows, dealt):
        given = row.slo_s
        if given is None:
            given = drawn if slo_s is None else slo_s
        seconds.append(given * factor)
    return seconds


def arrival_times(
    rows: Sequence[ListedRow], rate: float | None, at_once: bool, seed: int
) -> list[float]:
    """Seconds from the start of each row: its own, else 0, as in UELLM's experiments.

    Args:
        rate: requests a second, drawn as a Poisson process in the list's order instead.
        at_once: all at 0 instead.
    """
    if rate is not None:
        times: list[float] = poisson_arrivals(
            len(rows), rate, np.random.default_rng([seed, 1])
        ).tolist()
        return times
    if at_once:
        return [0.0] * len(rows)
    return [row.arrival_s or 0.0 for row in rows]


def check_lengths(rows: Sequence[ListedRow], why: str) -> None:
    """Raises ValueError, which begins with `why`, where a row has no length."""
    for row in rows:
        if row.length is None:
            raise ValueError(
                f'{why} the tokens of its answer in every row, as "length" (or as "output", a '
                f"whole number); {row.place} has neither"
            )
