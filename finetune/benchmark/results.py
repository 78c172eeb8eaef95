"""A task's results: metrics of its rows, means over groups, the file that a resume reads."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from chatglm.files import read_json, shorten
from finetune.benchmark.clue.answers import extraction_scores
from finetune.benchmark.questions import Doc, Question
from finetune.benchmark.tasks import BenchmarkTask, TaskGroup
from finetune.files import write_json

# What a task file's process_results may name: (row, [answer]) -> {metric: value}.
RESULT_FUNCTIONS: dict[str, Callable[[Doc, Sequence[str]], dict[str, float]]] = {
    "extraction_scores": extraction_scores
}


SIZES: dict[str, Callable[[str], int]] = {  # what a choice's score is divided by
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8")),
}


@dataclass(frozen=True)
class TaskResult:
    """What a task came to with a number of shots.

    Attributes:
        rows: how many were scored.
        metrics: {metric: mean over the rows}; errors: {metric: its standard error}.
        chance: accuracy of a guess among each row's choices; None for written answers.
        seconds: that it took.
        likelihoods: of each row's choices; answers: written ones.
    """

    task: str
    shots: int
    rows: int
    metrics: dict[str, float]
    errors: dict[str, float]
    chance: float | None
    seconds: float
    likelihoods: list[list[float]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def first_highest(values: Sequence[float]) -> int:
    """Number of the highest value; of equal ones the first."""
    return list(values).index(max(values))


def choice_metrics(question: Question, scores: Sequence[float]) -> dict[str, float]:
    """acc, acc_norm and acc_bytes of one row: whether the highest score is a right choice's, the
    scores as they are, or divided by the characters or UTF-8 bytes of each choice."""
    metrics = {}
    for name, size in SIZES.items():
        normalised = []
        for score, choice in zip(scores, question.choices):
            normalised.append(score / size(choice))
        is_right = first_highest(normalised) in question.gold
        metrics[name] = float(is_right)
    return metrics


def written_metrics(task: BenchmarkTask, question: Question, answer: str) -> dict[str, float]:
    return RESULT_FUNCTIONS[task.results](question.doc, [answer])


def check_references(task: BenchmarkTask, docs: Sequence[Doc]) -> None:
    """Raises ValueError for a row of a task of written answers that has none to compare with."""
    for doc in docs if task.output_type != "multiple_choice" else ():
        answers = doc.get("answers")
        texts = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        if not (answers and texts):
            raise ValueError(
                f"{task.name}: {task.results} wants a list of texts at answers; "
                f"got the row {shorten(dict(doc))}"
            )


def standard_error(values: Sequence[float]) -> float:
    """Of a mean; 0 for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def summarise(
    task: BenchmarkTask,
    shots: int,
    questions: Sequence[Question],
    *,
    likelihoods: list[list[float]],
    answers: list[str],
    seconds: float,
) -> TaskResult:
    """A task's result, of the likelihoods of its choices or of its written answers."""
    row_metrics: list[dict[str, float]] = []
    chances = []
    for i, question in enumerate(questions):
        if answers:
            row_metrics.append(written_metrics(task, question, answers[i]))
        else:
            row_metrics.append(choice_metrics(question, likelihoods[i]))
            chances.append(len(question.gold) / len(question.choices))
    metrics, errors = {}, {}
    for name in task.metrics:
        values = [row[name] for row in row_metrics]
        metrics[name] = fmean(values)
        errors[name] = standard_error(values)
    return TaskResult(
        task.name,
        shots,
        len(questions),
        metrics,
        errors,
        fmean(chances) if chances else None,
        seconds,
        likelihoods,
        answers,
    )


def result_key(values: Mapping[str, Any]) -> str:
    """16 digits of what a result depends on."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def result_file(folder: Path, task: str, shots: int) -> Path:
    return folder / f"{task}-{shots}shot.json"


def keep_result(folder: Path, result: TaskResult, key: str) -> None:
    """Write a result, for commands with the same `key`."""
    write_json(result_file(folder, result.task, result.shots), {"key": key} | asdict(result))


def kept_result(folder: Path, task: str, shots: int, key: str) -> TaskResult | None:
    """A result that a command with the same key has kept; None without one.

    Raises ValueError where the file is damaged.
    """
    path = result_file(folder, task, shots)
    if not path.is_file():
        return None
    values = read_json(path)
    if values.pop("key", None) != key:
        return None
    try:
        return TaskResult(**values)
    except TypeError:
        raise ValueError(f"{path}: not a result of finetune.benchmark; remove it") from None


def group_lines(
    groups: Sequence[TaskGroup],
    members: Callable[[TaskGroup], Sequence[str]],
    results: Sequence[TaskResult],
) -> list[list[str]]:
    """Lines of (group, shots, rows, metric, mean over all rows) of the groups' own metrics."""
    lines = []
    for group in groups:
        tasks = set(members(group))
        rows: Counter[tuple[int, str]] = Counter()  # by (shots, metric)
        totals: defaultdict[tuple[int, str], float] = defaultdict(float)
        for result in results:
            if result.task not in tasks:
                continue
            for metric in group.metrics:
                if metric in result.metrics:  # as the harness: of the tasks that have the metric
                    rows[result.shots, metric] += result.rows
                    totals[result.shots, metric] += result.metrics[metric] * result.rows
        for shots, metric in sorted(totals, key=lambda key: (key[0], group.metrics.index(key[1]))):
            count = rows[shots, metric]
            mean = totals[shots, metric] / count
            lines.append([group.name, str(shots), str(count), metric, f"{mean:.4f}"])
    return lines


def result_lines(results: Sequence[TaskResult]) -> list[list[str]]:
    """Lines of (task, shots, rows, metric, value, standard error, chance)."""
    lines = []
    for result in results:
        for metric, value in result.metrics.items():
            guessed = "" if result.chance is None else f"{result.chance:.4f}"
            where = [result.task, str(result.shots), str(result.rows), metric]
            lines.append([*where, f"{value:.4f}", f"{result.errors[metric]:.4f}", guessed])
    return lines
