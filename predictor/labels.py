"""What a predictor learns from: prompts with measured answer lengths, and which prompts may not be split apart.

Lengths are tokens of the served model, without its end token. numpy only, but for what finetune.rows.batches brings.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from finetune.rows.formats import BadRow, is_missing, parse_row
from finetune.rows.sources import read_json_items
from predictor.features import BASE, finalise

log = logging.getLogger(__name__)

OPTIONAL = ("finished", "served_model", "source")  # null in them says nothing
LONGEST = 10_000_000  # tokens; a longer answer is a mistake of whoever counted
WANTED = "wanted prompt (or instruction, input) and output_tokens, or a prompt and its answer"
SHINGLE = 5  # characters
HASHES = 64  # minima kept of a text
CHECKPOINT = re.compile(r"epoch-\d+-step-\d+")  # of a run
BUCKET = 256  # leaders in one bucket
VERIFIED = 8  # candidates of a text whose shingles are compared


@dataclass(frozen=True)
class Label:
    """One answer's length. Not `finished`: the generation cap cut it, its true length is at least `tokens`."""

    tokens: int
    served_model: str
    finished: bool = True


@dataclass(frozen=True)
class Example:
    """A prompt and the lengths of all answers there are to it; `place` is its first row's "file:line" for messages."""

    prompt: str
    labels: tuple[Label, ...]
    source: str
    place: str


def read_examples(
    paths: str | Path | list,
    *,
    served_model: str,
    count: Callable[[str], int] | None = None,
    on_bad_row="error",
    limit: int | None = None,
) -> tuple[list[Example], int]:
    """The examples of JSON-lines files (also .gz) or JSON lists, by first appearance, and the number of bad rows skipped.

    A row is measured ({prompt} or {instruction, input}, with output_tokens and perhaps finished) or an answer
    ({instruction, input, output}, {text, answer} or {prompt, response}; a list of answers is as many). Either may have
    served_model and source. Other keys are ignored. Rows of the same prompt are one example.

    Args:
        served_model: whose answers the rows are that do not say.
        count: tokens of an answer, as `make_counter` gives; not needed for measured rows.
        limit: read so many good rows, of all files together.
    Raises:
        BadRow: the first bad row, with on_bad_row "error"; or no good row at all.
    """
    found: dict[str, Example] = {}
    rows = bad = 0
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    for path in map(Path, paths):
        for place, item in read_json_items(path):
            if rows == limit:
                break
            try:
                if isinstance(item, BadRow):
                    raise item
                made = parse_example(item, place, served_model, count, path.name)
            except BadRow:
                if on_bad_row == "error":
                    raise
                bad += 1
                continue
            rows += 1
            earlier = found.get(made.prompt)
            found[made.prompt] = (
                replace(earlier, labels=earlier.labels + made.labels) if earlier else made
            )
    if not found:
        raise BadRow(
            f"{', '.join(map(str, paths))}: no rows" + (f" ({bad} bad ones skipped)" if bad else "")
        )
    return list(found.values()), bad


def parse_prompt(item, place: str) -> str:
    """The prompt of a row: "prompt", or "instruction" and "input", or "text". Raises BadRow, also where it is blank."""
    if not isinstance(item, dict):
        raise BadRow(f"{place}: wanted an object, got {type(item).__name__}")
    key = next((key for key in ("prompt", "instruction", "text") if key in item), None)
    if key is None:
        raise BadRow(f'{place}: no key "prompt"; {WANTED}')
    parts = {key: item[key]}
    if key == "instruction" and not is_missing(item.get("input")):
        parts["input"] = item["input"]
    for name, value in parts.items():
        checked(value, str, name, "text", place)
    prompt = parse_row({"text": "".join(parts.values()), "answer": ""}, place).prompt
    if not prompt.strip():
        raise BadRow(f"{place}: the prompt is empty")
    return prompt


def parse_example(
    item, place: str, served_model: str, count: Callable[[str], int] | None, source: str
) -> Example:
    """A JSON value to the Example of its row alone; raises BadRow saying what was wanted, what came, and where."""
    prompt = parse_prompt(item, place)
    absent = {key for key in OPTIONAL if is_missing(item.get(key))}
    item = {key: value for key, value in item.items() if key not in absent}
    served_model = checked(
        item.get("served_model", served_model), str, "served_model", "text", place
    )
    finished = checked(item.get("finished", True), bool, "finished", "true or false", place)
    source = checked(item.get("source", source), str, "source", "text", place)
    if "output_tokens" in item:
        tokens = [
            checked(
                item["output_tokens"],
                int,
                "output_tokens",
                f"a whole number from 0 to {LONGEST:,}",
                place,
            )
        ]
    else:
        keys = {"prompt": "response", "instruction": "output", "text": "answer"}
        key = keys[next(key for key in keys if key in item)]
        if key not in item:
            raise BadRow(f'{place}: no "output_tokens" and no "{key}"; {WANTED}')
        if count is None:
            raise BadRow(
                f'{place}: no "output_tokens"; counting the answer wants the served model\'s tokenizer'
            )
        answers = parse_row({"instruction": prompt, "output": item[key]}, place).answers
        tokens = [count(answer) for answer in answers]
    for n in tokens:
        if not 0 <= n <= LONGEST:
            raise BadRow(
                f'{place}: "output_tokens" must be a whole number from 0 to {LONGEST:,}, got {n}'
            )
    return Example(prompt, tuple(Label(n, served_model, finished) for n in tokens), source, place)


def checked(value, kind: type, key: str, wanted: str, place: str):
    """The value, if it is of the kind (a bool is no number); raises BadRow otherwise."""
    if type(value) is not kind:
        raise BadRow(
            f'{place}: "{key}" must be {wanted}, got {json.dumps(value, ensure_ascii=True)[:60]}'
        )
    return value


def served_name(folder: str | Path) -> str:
    """The name of a folder's model in rows of lengths, logs and the API: of a checkpoint with its run's, "lora/epoch-5-step-400"."""
    path = Path(folder).resolve()
    return (
        f"{path.parent.name}/{path.name}"
        if CHECKPOINT.fullmatch(path.name) and path.parent.name
        else path.name
    )


def name_warning(predicted: str, folder: str | Path) -> str | None:
    """A line for the log where a predictor was made for a model of another name than the one in the folder; None where not."""
    served = served_name(folder)
    if predicted == served:
        return None
    return f"the predictor was made for {predicted!r}, the model served is {served!r} ({folder}): its predictions hold if that is the same model"


def make_counter(tokenizer) -> Callable[[str], int]:
    """count(answer) -> its tokens, as encode_example trains on them, less the end token."""
    return lambda answer: len(tokenizer.encode_text(answer))


def language(prompt: str) -> str:
    """ "zh" where more than a tenth of the characters are Chinese, else "en"."""
    chinese = sum("\u3400" <= c <= "\u9fff" for c in prompt)
    return "zh" if chinese > 0.1 * len(prompt) else "en"


def normalise(prompt: str) -> str:
    """What of a prompt's text tells prompts apart: NFKC, no case, one space for a run of anything but word characters."""
    return re.sub(
        r"\W+", " ", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    ).strip()


def group_prompts(prompts: list[str], *, threshold: float = 0.8) -> np.ndarray:
    """(N,): for each prompt the index of its group's first; prompts of a group belong on one side of a split.

    Prompts of the same normalised text share a group. So do near-duplicates: Jaccard similarity of the texts' sets of
    character 5-grams at least `threshold`, found by MinHash (Broder 1997, "On the resemblance and containment of
    documents") in bands and verified on the sets. A text is compared with its group's leader alone, the smallest text of
    it, so that groups do not chain, and texts are taken in the order of the alphabet, so that the groups do not depend on
    the prompts' order.

    A task with one long instruction and short inputs would be one group: where more than a quarter of at least 20 texts
    share one, a warning is logged and only prompts of the same normalised text do.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1; got {threshold}")
    texts, of_prompt = np.unique(
        np.array([normalise(prompt) for prompt in prompts], object), return_inverse=True
    )
    leaders = lead(list(texts), threshold) if len(texts) > 1 else np.zeros(len(texts), int)
    largest = np.bincount(leaders).max(initial=0)
    if len(texts) >= 20 and largest > len(texts) / 4:
        log.warning(
            "%d of %d prompts are much alike, as with one instruction; only the same are grouped",
            largest,
            len(texts),
        )
        leaders = np.arange(len(texts))
    _, first, group = np.unique(leaders[of_prompt], return_index=True, return_inverse=True)
    return first[group]


def lead(texts: list[str], threshold: float) -> np.ndarray:
    """(T,): the number of each text's leader, its own where it is one; distinct texts, a leader comes first.

    Of a bucket's leaders the first 256 count, and of a text's candidates the 8 that look most alike are verified: more
    are a template's, and without these bounds its texts would all be compared with one another.
    """
    shingles, starts = shingle_hashes(texts)
    signatures = np.empty((len(texts), HASHES), np.uint32)
    for k in range(
        HASHES
    ):  # the upper half of a product with an odd number hashes well enough (multiply-shift)
        factor, shift = mix(np.array([2 * k, 2 * k + 1], np.uint64))
        hashed = (shingles * (factor | np.uint64(1)) + shift) >> np.uint64(32)
        signatures[:, k] = np.minimum.reduceat(hashed.astype(np.uint32), starts)
    # the longest bands that let fewer than 1 of 1000 pairs at the threshold slip through
    rows = max(r for r in (1, 2, 4, 8, 16) if r == 1 or (1 - threshold**r) ** (HASHES // r) < 1e-3)
    keys = np.zeros((len(texts), HASHES // rows), np.uint64)
    for column in range(rows):
        keys = mix(keys + signatures[:, column::rows])
    keys = mix(
        keys + np.arange(HASHES // rows, dtype=np.uint64)
    ).tolist()  # a band's keys are its own
    ends = [*starts[1:].tolist(), len(shingles)]

    @cache
    def shingle_set(i):
        return frozenset(shingles[starts[i] : ends[i]].tolist())

    leaders = np.arange(len(texts))
    buckets = defaultdict(list)
    for i, own in enumerate(keys):
        likely = []
        if candidates := sorted({j for key in own for j in buckets.get(key, ())}):
            alike = (signatures[candidates] == signatures[i]).sum(1)
            order = np.argsort(-alike, kind="stable")[:VERIFIED]
            likely = [
                candidates[k] for k in order if alike[k] >= (threshold - 0.2) * HASHES
            ]  # 0.2: four standard errors
        for j in likely:
            common = len(shingle_set(i) & shingle_set(j))
            if common >= threshold * (len(shingle_set(i)) + len(shingle_set(j)) - common):
                leaders[i] = j
                break
        else:
            for key in own:
                if len(buckets[key]) < BUCKET:
                    buckets[key].append(i)
    return leaders


def shingle_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all texts' 5-grams end to end, (T,) where each text's begin); a shorter text is one shingle."""
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(
        np.uint64
    )
    windows = len(codes) - SHINGLE + 1
    hashes = np.zeros(windows, np.uint64)
    for k in range(SHINGLE):
        hashes = mix(hashes + codes[k : windows + k])
    counts = np.array([len(text) - SHINGLE + 1 for text in padded])
    # windows that reach into the next text are left out
    inside = np.arange(counts.sum()) + np.repeat((SHINGLE - 1) * np.arange(len(texts)), counts)
    return hashes[inside], np.cumsum(counts) - counts


def mix(values: np.ndarray) -> np.ndarray:
    """A step of splitmix64 (Steele et al. 2014): also 0 becomes a hash."""
    return finalise(values + np.uint64(BASE))


def split(
    groups: np.ndarray, prompts: list[str], shares: dict[str, float], *, salt: str = ""
) -> dict[str, np.ndarray]:
    """{side: indices (n,) of its prompts, ascending}: all of a group on one side, chosen by a hash of its smallest text.

    A prompt without near-duplicates lands on the same side in any data set. Shares are of groups; what they leave of 1
    goes to the first name.

    Raises:
        ValueError: shares that are no shares, or a side that comes out empty.
    """
    if not shares or min(shares.values()) < 0 or not sum(shares.values()) <= 1 + 1e-9:
        raise ValueError(f"shares must be from 0 to 1, 1 in all at most; got {shares}")
    smallest: dict[int, str] = {}
    for group, text in zip(groups.tolist(), map(normalise, prompts)):
        smallest[group] = min(text, smallest.get(group, text))
    names = list(shares)
    # the first name takes what is above all others, so what the others have does not depend on its share
    bounds = np.cumsum([shares[name] for name in names[1:]] + [np.inf])
    side = {}
    for group, text in smallest.items():
        digest = hashlib.sha256(f"{salt}\n{text}".encode("utf-8", "surrogatepass")).digest()
        side[group] = int(
            np.searchsorted(bounds, int.from_bytes(digest[:8], "big") / 2**64, side="right")
        )
    chosen = (np.array([side[group] for group in groups.tolist()], int) + 1) % len(names)
    parts = {name: np.flatnonzero(chosen == n) for n, name in enumerate(names)}
    if empty := [name for name in names if not len(parts[name])]:
        sizes = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise ValueError(
            f"{len(prompts)} prompts in {len(side)} groups leave nothing for {empty[0]} of {shares} ({sizes})"
        )
    return parts


def data_hash(examples: list[Example]) -> str:
    """sha256 over prompts and labels, whatever their order; where they came from does not count."""
    rows = [
        [e.prompt, sorted([x.served_model, x.tokens, x.finished] for x in e.labels)]
        for e in examples
    ]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
