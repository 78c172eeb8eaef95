"""METRICS: how good answers are, compared with one or several references. Free of torch.

Every score lies in [0, 1]. A row has a list of answers (several where they were sampled) and a list
of references; each metric defines what several references mean. A metric of a whole set of rows is
the mean over the rows, or what its `over_rows` computes. Words are jieba's, without white space,
for Chinese and English alike.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

from chatglm.words import jieba_tokenizer

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# ROUGE-L above which two answers say the same (Self-Instruct, Wang et al. 2023).
NEAR_DUPLICATE = 0.7
INSTALL = 'pip install -e ".[eval]"'
# Around a label that is written as a sentence or in quotes. "-" is none of them: it may be a sign.
AROUND_LABELS = " \t\r\n.。!?,;:\"'“”‘’「」『』"
Texts: TypeAlias = Sequence[Sequence[str]]  # the answers, or the references, of every row


@lru_cache(4096)
def words(text: str) -> tuple[str, ...]:
    """The words of a text, without white space."""
    return tuple(word for word in jieba_tokenizer().cut(text) if not word.isspace())


class Words:
    """`words` with the interface that rouge-score expects of a tokenizer."""

    def tokenize(self, text: str) -> tuple[str, ...]:
        return words(text)


@cache
def rouge_scorer(kind: str) -> "RougeScorer":
    """rouge-score's scorer of one kind ("rouge1", "rouge2" or "rougeL") over `words`."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Words())


def rouge(kind: str, answer: str, reference: str) -> float:
    """F measure of ROUGE-1, -2 or -L over words; 1 for two empty texts."""
    if not (words(answer) or words(reference)):
        return 1.0
    return rouge_scorer(kind).score(reference, answer)[kind].fmeasure


def bleu4(answer: str, references: Sequence[str]) -> float:
    """BLEU-4 of one answer against all references.

    It is smoothed as in ChatGLM's fine-tuning scripts (nltk's method 3).
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    answer_words = list(words(answer))
    if not answer_words:
        return float(any(not words(reference) for reference in references))
    reference_words = list(map(list, map(words, references)))
    smoothing = SmoothingFunction().method3
    return float(sentence_bleu(reference_words, answer_words, smoothing_function=smoothing))


def exact_match(answer: str, reference: str) -> float:
    """1 where both texts are equal, white space at their ends aside; else 0."""
    return float(answer.strip() == reference.strip())


def label_of(text: str) -> str:
    """The class that a text names: its letter case, width (NFKC), and the punctuation around it
    say nothing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.strip(AROUND_LABELS)


def same_label(answer: str, reference: str) -> float:
    """1 where both texts name the same class, else 0."""
    return float(label_of(answer) == label_of(reference))


@dataclass(frozen=True)
class ClassScore:
    """Of one class: `rows`, the answers to rows of it; `precision`, the share of the answers naming
    it that are right; `recall`, the share of its rows' answers that name it; `f1` of the two."""

    rows: int
    precision: float
    recall: float
    f1: float


def class_scores(answers: Texts, references: Texts) -> dict[str, ClassScore]:
    """{class: its scores} of the references' classes, sorted by name.

    A row's class is the reference that its answer names, else its first reference. An answer that
    names no class counts as a miss of its row's class alone.
    """
    hits: Counter[str] = Counter()
    named: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for row_answers, row_references in zip(answers, references, strict=True):
        labels = [label_of(reference) for reference in row_references]
        for answer in map(label_of, row_answers):
            gold = answer if answer in labels else labels[0]
            named[answer] += 1
            wanted[gold] += 1
            hits[gold] += answer == gold
    scores = {}
    for label in sorted(wanted):
        precision = hits[label] / max(named[label], 1)
        recall = hits[label] / wanted[label]
        f1 = 2 * hits[label] / (named[label] + wanted[label])
        scores[label] = ClassScore(wanted[label], precision, recall, f1)
    return scores


def macro_f1(answers: Texts, references: Texts) -> float:
    """The mean F1 over the references' classes, each with the same weight.

    As scikit-learn's f1_score(..., average="macro", labels=the references' classes).
    """
    return fmean(score.f1 for score in class_scores(answers, references).values())


def triples(answer: str) -> set[str]:
    """The lines of the form head_relation_tail, with exactly three parts."""
    return {line for line in answer.split("\n") if len(line.split("_")) == 3}


def triple_f1(answer: str, gold: str) -> float:
    """F1 of one answer: predicted triples against the gold answer's lines, as sets."""
    predicted = triples(answer)
    wanted = set(gold.split("\n"))
    hits = len(predicted & wanted)
    if not hits:
        return 0.0
    precision = hits / len(predicted)
    recall = hits / len(wanted)
    return 2 * precision * recall / (precision + recall)


def best(
    score: Callable[[str, str], float], answers: Sequence[str], references: Sequence[str]
) -> float:
    """The mean over the answers of each one's highest score against a reference."""
    scores = []
    for answer in answers:
        scores.append(max(map(partial(score, answer), references)))
    return fmean(scores)


def coverage(answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean over the references of each one's highest ROUGE-L against an answer."""
    scores = []
    for reference in references:
        scores.append(max(rouge("rougeL", answer, reference) for answer in answers))
    return fmean(scores)


def diversity(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of a row's answers that repeat no earlier one of it: 1 for a single answer.

    With four questions a document this is the first line of ChatGLM-Finetuning's rubric for
    question generation, where each near-duplicate costs 0.25 points.
    """
    is_new = []
    for i, answer in enumerate(answers):
        nearest = max((rouge("rougeL", answer, earlier) for earlier in answers[:i]), default=0.0)
        is_new.append(nearest <= NEAR_DUPLICATE)
    return fmean(is_new)


@dataclass(frozen=True)
class Metric:
    """`score(answers, references)` of one row; `needs`: the packages that it imports.

    `over_rows(answers, references)` is the metric of a whole set; None: the mean of the scores.
    """

    score: Callable[[Sequence[str], Sequence[str]], float]
    needs: tuple[str, ...] = ()
    over_rows: Callable[[Texts, Texts], float] | None = None


ROUGE = ("rouge_score", "nltk", "jieba")
METRICS: dict[str, Metric] = {
    "rouge1": Metric(partial(best, partial(rouge, "rouge1")), ROUGE),
    "rouge2": Metric(partial(best, partial(rouge, "rouge2")), ROUGE),
    "rougeL": Metric(partial(best, partial(rouge, "rougeL")), ROUGE),
    "bleu4": Metric(
        lambda answers, references: fmean([bleu4(answer, references) for answer in answers]),
        ("nltk", "jieba"),
    ),
    "exact_match": Metric(partial(best, exact_match)),
    "accuracy": Metric(partial(best, same_label)),
    "macro_f1": Metric(partial(best, same_label), over_rows=macro_f1),
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
    """ "rouge,exact_match" -> names of METRICS, each once, in the order given.

    Raises:
        ValueError: a name is neither in METRICS nor in GROUPS.
    """
    names: list[str] = []
    for part in text.split(","):
        name = part.strip()
        if not name:
            continue
        if name not in METRICS and name not in GROUPS:
            raise ValueError(
                f"{flag}: no metric {name!r}; there are {', '.join((*METRICS, *GROUPS))}"
            )
        names += [metric for metric in GROUPS.get(name, (name,)) if metric not in names]
    return tuple(names)


def check_packages(names: Sequence[str]) -> None:
    """Raises ValueError where a metric's packages are not installed."""
    for name in names:
        missing = [package for package in METRICS[name].needs if find_spec(package) is None]
        if missing:
            packages = " and ".join(missing).replace("_", "-")
            raise ValueError(f"the metric {name} needs {packages}: {INSTALL}")


def score_rows(names: Sequence[str], answers: Texts, references: Texts) -> dict[str, list[float]]:
    """{metric: the score of every row}. Raises ValueError for another number of references."""
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} rows of answers, {len(references)} of references")
    scores: dict[str, list[float]] = {}
    for name in names:
        of_rows = map(METRICS[name].score, answers, references)
        scores[name] = list(map(float, of_rows))
    return scores


def overall_scores(
    scores: dict[str, list[float]], answers: Texts, references: Texts
) -> dict[str, float]:
    """{metric: its value over all rows}; `scores` are score_rows' of the same rows."""
    overall = {}
    for name, values in scores.items():
        over_rows = METRICS[name].over_rows
        overall[name] = over_rows(answers, references) if over_rows else fmean(values)
    return overall
