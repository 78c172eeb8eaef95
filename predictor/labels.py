"""The labels a predictor learns from: prompts with measured answer lengths, grouped and split.

Near-duplicate prompts form groups, which a split keeps whole. Lengths are tokens of the served
model, without its end token. numpy only, apart from what finetune.rows imports.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatglm.hub import model_short_name
from finetune.rows.fields import is_missing
from finetune.rows.formats import BadRow, parse_row
from finetune.rows.near_duplicates import normalise
from finetune.rows.sources import read_json_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Key of the prompt -> key of its answer, the first that a row has.
PROMPT_KEYS = {"prompt": "response", "instruction": "output", "text": "answer"}
OPTIONAL = ("finished", "served_model", "source")  # null in them counts as absent
MAX_TOKENS = 10_000_000  # tokens; a longer answer is a mistake in the data
EXPECTED_KEYS = (
    "wanted prompt (or instruction, input) and output_tokens, or a prompt and its answer"
)
CHINESE = re.compile("[\u3400-\u9fff]")
CHECKPOINT = re.compile(r"epoch-\d+-step-\d+")  # name of a run's checkpoint


@dataclass(frozen=True)
class Label:
    """One answer's length.

    Not `finished`: the generation cap cut the answer, whose true length is at least `tokens`.
    """

    tokens: int
    served_model: str
    finished: bool = True


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt and the lengths of its answers.

    `place` is "file:line" of its first row, for messages.
    """

    prompt: str
    labels: tuple[Label, ...]
    source: str
    place: str


def read_examples(
    paths: str | Path | Sequence[str | Path],
    *,
    served_model: str,
    count: Callable[[str], int] | None = None,
    on_bad_row: str = "error",
    limit: int | None = None,
) -> tuple[list[LabelledPrompt], int]:
    """(examples by first appearance, number of bad rows skipped) of JSON-lines files or JSON lists.

    Files may be .gz. A row is measured ({prompt} or {instruction, input}, with output_tokens and
    perhaps finished) or an answer ({instruction, input, output}, {text, answer} or {prompt,
    response}; a list of answers gives one label each). Either may have served_model and source;
    other keys are ignored. Rows of the same prompt are one example.

    Args:
        served_model: the model of rows that name none.
        count: tokens of an answer, as from `make_counter`; not needed for measured rows.
        limit: most good rows to read, of all files together.
    Raises:
        BadRow: the first bad row, with on_bad_row "error"; or there is no good row.
    """
    rows: list[LabelledPrompt] = []
    bad = 0
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    for place, item, source in read_label_items(paths):
        if len(rows) == limit:
            break
        try:
            if isinstance(item, BadRow):
                raise item
            rows.append(parse_example(item, place, served_model, count, source))
        except BadRow:
            if on_bad_row == "error":
                raise
            bad += 1
    if not rows:
        skipped = f" ({bad} bad ones skipped)" if bad else ""
        raise BadRow(f"{', '.join(map(str, paths))}: no rows{skipped}")
    return merge_by_prompt(rows), bad


def merge_by_prompt(rows: Iterable[LabelledPrompt]) -> list[LabelledPrompt]:
    """One example for each prompt, with the labels of all its rows; else as its first row."""
    first: dict[str, LabelledPrompt] = {}
    labels: dict[str, list[Label]] = defaultdict(list)
    for row in rows:
        first.setdefault(row.prompt, row)
        labels[row.prompt].extend(row.labels)
    examples = []
    for prompt, row in first.items():
        examples.append(replace(row, labels=tuple(labels[prompt])))
    return examples


def read_label_items(paths: Sequence[str | Path]) -> Iterator[tuple[str, Any, str]]:
    """(place, JSON value or BadRow, name of the file) of each item of the files, in order."""
    for path in map(Path, paths):
        for place, item in read_json_items(path):
            yield place, item, path.name


def first_key(item: dict, keys: Iterable[str]) -> str | None:
    """The first of `keys` that an item has."""
    for key in keys:
        if key in item:
            return key
    return None


def parse_prompt(item: Any, place: str) -> str:
    """The prompt of a row: "prompt", or "instruction" and "input", or "text".

    Raises:
        BadRow: there is none, or it is blank.
    """
    if not isinstance(item, dict):
        raise BadRow(f"{place}: wanted an object, got {type(item).__name__}")
    key = first_key(item, PROMPT_KEYS)
    if key is None:
        raise BadRow(f'{place}: no key "prompt"; {EXPECTED_KEYS}')
    parts = {key: item[key]}
    if key == "instruction" and not is_missing(item.get("input")):
        parts["input"] = item["input"]
    for name, value in parts.items():
        check_type(value, str, name, "text", place)
    prompt = parse_row({"text": "".join(parts.values()), "answer": ""}, place).prompt
    if not prompt.strip():
        raise BadRow(f"{place}: the prompt is empty")
    return prompt


def parse_example(
    item: Any, place: str, served_model: str, count: Callable[[str], int] | None, source: str
) -> LabelledPrompt:
    """The LabelledPrompt of one row.

    Args:
        item: a JSON value; place: its "file:line".
        served_model, source: of a row that names none.
        count: as in read_examples.
    Raises:
        BadRow: naming what was wanted, what came, and where.
    """
    prompt = parse_prompt(item, place)
    item = dict(item)
    for key in OPTIONAL:
        if key in item and is_missing(item[key]):
            del item[key]
    served_model = check_type(
        item.get("served_model", served_model), str, "served_model", "text", place
    )
    finished = check_type(item.get("finished", True), bool, "finished", "true or false", place)
    source = check_type(item.get("source", source), str, "source", "text", place)
    expected = f"a whole number from 0 to {MAX_TOKENS:,}"
    if "output_tokens" in item:
        tokens = [check_type(item["output_tokens"], int, "output_tokens", expected, place)]
    else:
        tokens = count_answer_tokens(item, prompt, place, count)
    labels = []
    for n in tokens:
        if not 0 <= n <= MAX_TOKENS:
            raise BadRow(f'{place}: "output_tokens" must be {expected}, got {n}')
        labels.append(Label(n, served_model, finished))
    return LabelledPrompt(prompt, tuple(labels), source, place)


def count_answer_tokens(
    item: dict, prompt: str, place: str, count: Callable[[str], int] | None
) -> list[int]:
    """Tokens of each answer in a row without output_tokens. Raises BadRow where it has none."""
    key = PROMPT_KEYS[first_key(item, PROMPT_KEYS) or "prompt"]
    if key not in item:
        raise BadRow(f'{place}: no "output_tokens" and no "{key}"; {EXPECTED_KEYS}')
    if count is None:
        raise BadRow(
            f'{place}: no "output_tokens"; counting the answer wants the served model\'s tokenizer'
        )
    answers = parse_row({"instruction": prompt, "output": item[key]}, place).answers
    return list(map(count, answers))


def check_type(value: Any, kind: type, key: str, expected: str, place: str) -> Any:
    """The value, if its type is exactly `kind` (a bool is no int); raises BadRow otherwise."""
    if type(value) is not kind:
        raise BadRow(
            f'{place}: "{key}" must be {expected}, got {json.dumps(value, ensure_ascii=True)[:60]}'
        )
    return value


def served_name(folder: str | Path) -> str:
    """The name of a folder's model in rows of lengths, logs and the API.

    A checkpoint is named with its run, "lora/epoch-5-step-400".
    """
    path = Path(folder).resolve()
    if CHECKPOINT.fullmatch(path.name) and path.parent.name:
        return f"{path.parent.name}/{path.name}"
    return model_short_name(path if path.is_dir() else folder)


def name_warning(predicted: str, folder: str | Path) -> str | None:
    """A line for the log where a predictor was made for another model's name than the folder's.

    None where the names agree.
    """
    served = served_name(folder)
    if predicted == served:
        return None
    return (
        f"the predictor was made for {predicted!r}, the model served is {served!r} ({folder}): "
        "its predictions hold if that is the same model"
    )


def make_counter(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], int]:
    """count(answer) -> its tokens as encode_example trains on them, without the end token."""
    return lambda answer: len(tokenizer.encode_text(answer))


def language(prompt: str) -> str:
    """ "zh" where more than a tenth of the characters are Chinese, else "en"."""
    chinese = len(CHINESE.findall(prompt))
    return "zh" if chinese > 0.1 * len(prompt) else "en"


def split_groups(
    groups: np.ndarray, prompts: list[str], shares: dict[str, float], *, salt: str = ""
) -> dict[str, np.ndarray]:
    """{side: indices (n,) of its prompts, ascending}.

    All of a group are on one side, chosen by a hash of its smallest text, so that a prompt without
    near-duplicates is on the same side in any data set. Shares are of groups; what they leave of 1
    goes to the first name.

    Raises:
        ValueError: shares outside 0 to 1 or above 1 in all, or a side without prompts.
    """
    if not shares or min(shares.values()) < 0 or not sum(shares.values()) <= 1 + 1e-9:
        raise ValueError(f"shares must be from 0 to 1, 1 in all at most; got {shares}")
    draws = group_draws(groups, prompts, salt)
    # The first name gets the hashes above all others' bounds, so that the others' prompts do not
    # depend on its share.
    bounds = np.cumsum([*list(shares.values())[1:], np.inf])
    group_hashes = np.array(list(map(draws.__getitem__, groups.tolist())), float)
    chosen = (np.searchsorted(bounds, group_hashes, side="right") + 1) % len(shares)
    parts = {name: np.flatnonzero(chosen == n) for n, name in enumerate(shares)}
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        sizes = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise ValueError(
            f"{len(prompts)} prompts in {len(draws)} groups leave nothing for {empty[0]} "
            f"of {shares} ({sizes})"
        )
    return parts


def group_draws(groups: np.ndarray, prompts: list[str], salt: str) -> dict[int, float]:
    """{group: a number in [0, 1) from a hash of its smallest normalised text}."""
    smallest: dict[int, str] = {}
    for group, text in zip(groups.tolist(), map(normalise, prompts)):
        smallest[group] = min(text, smallest.get(group, text))
    draws = {}
    for group, text in smallest.items():
        digest = hashlib.sha256(f"{salt}\n{text}".encode("utf-8", "surrogatepass")).digest()
        draws[group] = int.from_bytes(digest[:8], "big") / 2**64
    return draws


def data_hash(examples: list[LabelledPrompt]) -> str:
    """sha256 over prompts and labels, whatever their order; sources and places do not count."""
    rows = []
    for example in examples:
        labels = [[x.served_model, x.tokens, x.finished] for x in example.labels]
        rows.append([example.prompt, sorted(labels)])
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
