"""METRICS: how good answers are, compared with one or several references. Free of torch.

Every score lies in [0, 1]. A row has a list of answers (several where they were sampled) and a list
of references; each metric defines what several references mean. Words are jieba's, without white
space, for Chinese and English alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING

from chatglm.words import jieba_tokenizer

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# ROUGE-L above which two answers say the same (Self-Instruct, Wang et al. 2023).
NEAR_DUPLICATE = 0.7
INSTALL = 'pip install -e ".[eval]"'


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
    """`score(answers, references)` of one row; `needs`: the packages that it imports."""

    score: Callable[[Sequence[str], Sequence[str]], float]
    needs: tuple[str, ...] = ()


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


def score_rows(
    names: Sequence[str], answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """{metric: the score of every row}. Raises ValueError for another number of references."""
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} rows of answers, {len(references)} of references")
    scores: dict[str, list[float]] = {}
    for name in names:
        of_rows = map(METRICS[name].score, answers, references)
        scores[name] = list(map(float, of_rows))
    return scores
