"""METRICS: how good answers are, compared with one or several references. Free of torch.

Every score lies in [0, 1]. A row has a list of answers (several where they were sampled) and a list of references; what several
references mean is each metric's to say. Words are jieba's, without white space, so Chinese and English go through one door.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

NEAR_DUPLICATE = (
    0.7  # ROUGE-L above which two answers say the same (Self-Instruct, Wang et al. 2023)
)
INSTALL = 'pip install -e ".[eval]"'


@lru_cache(4096)
def words(text: str) -> tuple[str, ...]:
    return tuple(word for word in jieba_tokenizer().cut(text) if not word.isspace())


@cache
def jieba_tokenizer():
    import jieba

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    folder = Path("~/.cache/glm-foundry").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.tmp_dir = str(
        folder
    )  # its cache of the dictionary; by default a file in /tmp that anybody may have put there
    return tokenizer


class Words:
    """`words` as rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> tuple[str, ...]:
        return words(text)


@cache
def rouge_scorer(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Words())


def rouge(kind: str, answer: str, reference: str) -> float:
    """F measure of ROUGE-1, -2 or -L over words; two empty texts are alike."""
    if not (words(answer) or words(reference)):
        return 1.0
    return rouge_scorer(kind).score(reference, answer)[kind].fmeasure


def bleu4(answer: str, references: Sequence[str]) -> float:
    """BLEU-4 of one answer against all references, smoothed as ChatGLM's fine-tuning scripts have it (nltk's method 3)."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    said = list(words(answer))
    if not said:
        return float(any(not words(reference) for reference in references))
    return float(
        sentence_bleu(
            [list(words(r)) for r in references],
            said,
            smoothing_function=SmoothingFunction().method3,
        )
    )


def exact_match(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def triples(answer: str) -> set[str]:
    """Lines that are head_relation_tail, exactly three parts."""
    return {line for line in answer.split("\n") if len(line.split("_")) == 3}


def triple_f1(answer: str, gold: str) -> float:
    """F1 of one answer: predicted triples against the gold answer's lines, as sets."""
    predicted, wanted = triples(answer), set(gold.split("\n"))
    hits = len(predicted & wanted)
    if not hits:
        return 0.0
    precision, recall = hits / len(predicted), hits / len(wanted)
    return 2 * precision * recall / (precision + recall)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def best(
    score: Callable[[str, str], float], answers: Sequence[str], references: Sequence[str]
) -> float:
    """Each answer against the reference that it is nearest to; the mean over the answers."""
    return mean([max(score(answer, reference) for reference in references) for answer in answers])


def coverage(answers: Sequence[str], references: Sequence[str]) -> float:
    """Each reference against the answer that is nearest to it by ROUGE-L; the mean over the references."""
    return mean(
        [max(rouge("rougeL", answer, reference) for answer in answers) for reference in references]
    )


def diversity(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of a row's answers that repeat no earlier one of it: 1 for a single answer.

    With four questions a document this is the first line of ChatGLM-Finetuning's rubric for question generation, where each
    near-duplicate costs 0.25 points.
    """
    new = [
        all(rouge("rougeL", answer, before) <= NEAR_DUPLICATE for before in answers[:i])
        for i, answer in enumerate(answers)
    ]
    return mean(new)


@dataclass(frozen=True)
class Metric:
    """`score(answers, references)` of one row; `needs`: packages it imports when used."""

    score: Callable[[Sequence[str], Sequence[str]], float]
    needs: tuple[str, ...] = ()


ROUGE = ("rouge_score", "nltk", "jieba")
METRICS: dict[str, Metric] = {
    "rouge1": Metric(partial(best, partial(rouge, "rouge1")), ROUGE),
    "rouge2": Metric(partial(best, partial(rouge, "rouge2")), ROUGE),
    "rougeL": Metric(partial(best, partial(rouge, "rougeL")), ROUGE),
    "bleu4": Metric(
        lambda answers, references: mean([bleu4(answer, references) for answer in answers]),
        ("nltk", "jieba"),
    ),
    "exact_match": Metric(partial(best, exact_match)),
    "triple_f1": Metric(partial(best, triple_f1)),
    "coverage": Metric(coverage, ROUGE),
    "diversity": Metric(diversity, ROUGE),
}
GROUPS: dict[str, tuple[str, ...]] = {  # other spellings, and several at once
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "bleu": ("bleu4",),
    "f1": ("triple_f1",),
    "d2q": ("rougeL", "bleu4", "coverage", "diversity"),
}


def parse_metrics(text: str, flag: str = "--metrics") -> tuple[str, ...]:
    """ "rouge,exact_match" to names of METRICS, each once, in their order; raises ValueError for an unknown name."""
    found: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in METRICS and name not in GROUPS:
            raise ValueError(
                f"{flag}: no metric {name!r}; there are {', '.join((*METRICS, *GROUPS))}"
            )
        found += [each for each in GROUPS.get(name, (name,)) if each not in found]
    return tuple(found)


def check_packages(names: Sequence[str]):
    """Raises ValueError where a metric's packages are not installed."""
    for name in names:
        if missing := [package for package in METRICS[name].needs if find_spec(package) is None]:
            raise ValueError(
                f"the metric {name} needs {' and '.join(missing).replace('_', '-')}: {INSTALL}"
            )


def score_rows(
    names: Sequence[str], answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """The score of every row by every named metric."""
    return {
        name: [float(METRICS[name].score(a, r)) for a, r in zip(answers, references, strict=True)]
        for name in names
    }
