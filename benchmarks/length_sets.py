"""The data sets of LengthBench: prompts, the lengths of their runs, and a side to test on.

Every set is split by groups of near-duplicates (group_prompts): no tested prompt,
and nothing like one, is trained on, in the pairs that a student reads neither.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.rows import read_gzip
from finetune.rows.near_duplicates import group_prompts, normalise
from predictor.bench import ceiling_of_runs, runs_of_rows
from predictor.scores import kendall_tau

TEMPERATURES = ("t0.0", "t0.3", "t0.5", "t0.7")
FOLDS = {"vicuna": 1, "vicuna-18k": 10, "alpaca-eval": 5, "uellm": 5, "smollm2": 5}


@dataclass(frozen=True)
class Side:
    """N prompts and the lengths of each one's runs, the run that is scored first."""

    prompts: list[str]
    runs: list[list[int]]

    def median_runs(self) -> "Side":
        """Each prompt's median alone: the label of ProD-M (arXiv 2604.07931)."""
        return Side(self.prompts, [[round(float(np.median(runs)))] for runs in self.runs])

    def first_runs(self) -> "Side":
        """Each prompt's first run alone."""
        return Side(self.prompts, [runs[:1] for runs in self.runs])


@dataclass(frozen=True)
class LengthSet:
    """A split of a data set.

    Attributes:
        limit: longest answer in tokens.
        ceiling: tau-b of other runs with the run that is scored; None where there are none.
        others: training rows of other models' answers to the training prompts, which a predictor
            that can use them gets.
        was_cut: answers of `limit` tokens were cut there, which rows then say.
    """

    name: str
    served_model: str
    limit: int
    train: Side
    test: Side
    ceiling: float | None
    others: tuple[dict, ...] = ()
    was_cut: bool = False

    def rows(self, side: Side) -> list[dict]:
        """One row a run, as train.py reads them."""
        rows = []
        for prompt, lengths in zip(side.prompts, side.runs):
            for tokens in lengths:
                row = {"prompt": prompt, "output_tokens": tokens, "served_model": self.served_model}
                if self.was_cut and tokens == self.limit:
                    row["finished"] = False
                rows.append(row)
        return rows

    @property
    def longest(self) -> int:
        """What a predictor may say: more than `limit` where answers were cut there."""
        return 2 * self.limit if self.was_cut else self.limit


@dataclass(frozen=True)
class Places:
    """Folders of the data: the measured lengths, UELLM's runs, SmolLM2's own lengths."""

    lengths: Path
    uellm: Path
    smollm2: Path | None = None


def joined(row: dict) -> str:
    """The prompt of an Alpaca row."""
    return row["instruction"] + ("\n" + row["input"] if row["input"] else "")


def fold_of_text(text: str, folds: int) -> int:
    """The fold of a prompt, by a hash of its normalised text."""
    return int(hashlib.sha256(normalise(text).encode()).hexdigest(), 16) % folds


def split(
    prompts: list[str], runs: list[list[int]], is_tested: Callable[[int], bool]
) -> tuple[Side, Side]:
    """(train, test); a training prompt in a group with a tested one is left out.

    Args:
        is_tested: of a prompt's number.
    """
    groups = group_prompts(prompts).tolist()
    tested_groups = set()
    for number, group in enumerate(groups):
        if is_tested(number):
            tested_groups.add(group)
    train, test = Side([], []), Side([], [])
    for number, group in enumerate(groups):
        if is_tested(number):
            side = test
        elif group in tested_groups:
            continue
        else:
            side = train
        side.prompts.append(prompts[number])
        side.runs.append(runs[number])
    return train, test


def split_by_fold(
    prompts: list[str], runs: list[list[int]], fold: int, folds: int
) -> tuple[Side, Side]:
    """(train, test) where the test side is a fold of the groups' first prompts."""
    groups = group_prompts(prompts)
    of_group = {}
    for group in set(groups.tolist()):
        of_group[group] = fold_of_text(prompts[group], folds)
    return split(prompts, runs, lambda number: of_group[int(groups[number])] == fold)


def vicuna(places: Places, seed: int, folds: int | None = None) -> LengthSet:
    """Vicuna-7B's answers to 18,000 Alpaca prompts, four runs each, cap 512 tokens.

    The run at temperature 0 is scored. The split is the published one, 10,000 to train and 8,000 to
    test, or fold `seed` of `folds`.
    """
    rows = read_gzip(places.lengths / "vicuna_alpaca.jsonl.gz")
    prompts = list(map(joined, rows))
    runs = []
    for row in rows:
        runs.append([min(512, row["runs"][name]) for name in TEMPERATURES])
    if folds:
        train, test = split_by_fold(prompts, runs, seed, folds)
        name = "vicuna-18k"
    else:
        train, test = split(prompts, runs, lambda number: rows[number]["split"] == "val")
        name = "vicuna"
    return LengthSet(name, "vicuna-7b", 512, train, test, ceiling_of_runs(test.runs))


def vicuna_18k(places: Places, seed: int) -> LengthSet:
    """Nine tenths of all 18,000 to train, the tenth `seed` to test."""
    return vicuna(places, seed, FOLDS["vicuna-18k"])


def alpaca_eval(places: Places, seed: int) -> LengthSet:
    """ChatGLM2-6B's answers to 644 instructions; 46 other models answered them too.

    The ceiling is the others' mean log length, capped at 2,048 tokens.
    """
    lengths: dict[str, dict[str, int]] = {}
    for row in read_gzip(places.lengths / "alpaca_eval.jsonl.gz"):
        by_model = lengths.setdefault(row["instruction"], {})
        by_model[row["model"]] = row["output_tokens_chatglm2"]
    target = "chatglm2-6b"
    prompts = list(lengths)
    runs = [[lengths[prompt][target]] for prompt in prompts]
    train, test = split_by_fold(prompts, runs, seed, FOLDS["alpaca-eval"])
    others = []
    for prompt in train.prompts:
        for model, tokens in lengths[prompt].items():
            if model != target:
                others.append({"prompt": prompt, "output_tokens": tokens, "served_model": model})
    means = []
    for prompt in test.prompts:
        values = [n for model, n in lengths[prompt].items() if model != target]
        means.append(np.log1p(np.minimum(2048, values)).mean())
    own = np.array(test.runs, float)[:, 0]
    ceiling = kendall_tau(np.array(means), own)
    return LengthSet("alpaca-eval", target, 8192, train, test, ceiling, tuple(others))


def uellm(places: Places, seed: int) -> LengthSet:
    """Three recorded runs of 100 Chinese prompts; the model is not named."""
    prompts, runs = [], []
    with open(places.uellm / "length_runs.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            prompts.append(joined(row))
            runs.append([int(float(row[f"run_{number}"])) for number in (1, 2, 3)])
    train, test = split_by_fold(prompts, runs, seed, FOLDS["uellm"])
    return LengthSet("uellm", "uellm", 2048, train, test, ceiling_of_runs(test.runs))


def smollm2(places: Places, seed: int) -> LengthSet:
    """SmolLM2-135M-Instruct's answers (scripts/collect_lengths.py): lengths.jsonl of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = (places.smollm2 or Path()) / "lengths.jsonl"
    if places.smollm2 is None or not file.is_file():
        raise FileNotFoundError(f"no such file: {file}; --smollm2 names the folder of its lengths")
    rows = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            rows.append(json.loads(line))
    prompts, runs = runs_of_rows(rows)
    limit = max(max(lengths) for lengths in runs)
    train, test = split_by_fold(prompts, runs, seed, FOLDS["smollm2"])
    ceiling = ceiling_of_runs(test.runs)
    return LengthSet("smollm2", "smollm2", limit, train, test, ceiling, was_cut=True)


def unlike(prompts: Iterable[str], tested: list[str]) -> list[str]:
    """The prompts that share no group of near-duplicates with a tested one, in their order."""
    texts = list(prompts)
    groups = group_prompts([*tested, *texts]).tolist()
    known = set(groups[: len(tested)])
    kept = []
    for text, group in zip(texts, groups[len(tested) :]):
        if group not in known:
            kept.append(text)
    return kept


SETS = {
    "vicuna": vicuna,
    "vicuna-18k": vicuna_18k,
    "alpaca-eval": alpaca_eval,
    "uellm": uellm,
    "smollm2": smollm2,
}
