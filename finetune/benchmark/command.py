"""Benchmarks of a model by tasks of lm-evaluation-harness: CLUE, and the harness's own.

python -m finetune.benchmark --model_path MODEL --tasks clue --data clue --shots 0,1,5 \\
    --output scores
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import Parser, run_command
from chatglm.families import FAMILIES
from chatglm.hub import resolve_folder
from chatglm.runs import check_not_run
from finetune.benchmark.data import read_docs
from finetune.benchmark.pictures import scores_picture
from finetune.benchmark.questions import Doc, Question, build_questions
from finetune.benchmark.results import (
    TaskResult,
    check_references,
    first_highest,
    group_lines,
    keep_result,
    kept_result,
    result_key,
    result_lines,
    summarise,
)
from finetune.benchmark.tasks import CLUE, BenchmarkTask, TaskIndex
from finetune.config import PRECISIONS, parse_positive
from finetune.evaluation.generation import model_fingerprint
from finetune.evaluation.inference import load_ready
from finetune.files import check_folder_to_write, write_aside, write_json
from finetune.record import print_columns

if TYPE_CHECKING:
    from finetune.benchmark.scoring import ChoiceScorer

CEVAL = "ceval/ceval-exam"  # whose answers to the split "test" are at its authors'
HEADS = ["task", "shots", "rows", "metric", "value", "error", "chance"]


@dataclass(frozen=True)
class BenchmarkFlags:
    """The flags of `python -m finetune.benchmark`."""

    model_path: str
    base_model: str | None
    mode: str | None
    device: str
    precision: str
    tasks: str
    include_path: str
    data: str
    shots: tuple[int, ...]
    limit: int | None
    batch_tokens: int
    max_length: int | None
    output: str | None
    submission: str | None


@dataclass(frozen=True)
class TaskRun:
    """A task with a number of shots, and its questions."""

    task: BenchmarkTask
    shots: int
    questions: list[Question]


def load_scorer(flags: BenchmarkFlags) -> "ChoiceScorer":
    """The model of the flags; raises as `load_ready`."""
    from chatglm import load_tokenizer
    from finetune.benchmark.scoring import ChoiceScorer

    check_not_run(flags.model_path, "--model_path")
    folder = resolve_folder(flags.model_path, weights=True)
    options: dict[str, Any] = {"mode": flags.mode, "base": flags.base_model}
    tokenizer = load_tokenizer(folder, prompt_style="raw", **options)
    model = load_ready(folder, device=flags.device, precision=flags.precision, **options)
    return ChoiceScorer(model, tokenizer, flags.batch_tokens, flags.max_length)


def task_index(flags: BenchmarkFlags) -> TaskIndex:
    """The tasks of this project, and those below --include_path."""
    folders = [CLUE]
    for name in flags.include_path.split(","):
        if name:
            folders.append(Path(name))
    return TaskIndex.of_folders(folders)


def task_names(flags: BenchmarkFlags) -> list[str]:
    """The names of tasks and groups in --tasks; raises ValueError where there are none."""
    names = []
    for name in flags.tasks.split(","):
        if name.strip():
            names.append(name.strip())
    if not names:
        raise ValueError("--tasks: wanted names of tasks or groups")
    return names


def questions_of(task: BenchmarkTask, shots: int, flags: BenchmarkFlags) -> TaskRun:
    """The questions of a task; raises ValueError, FileNotFoundError for its rows."""
    folder = Path(flags.data)
    split = "test" if flags.submission else task.evaluated_split
    docs = read_docs(task, split, folder)[: flags.limit]
    pool: Sequence[Doc] = read_docs(task, task.shots_split, folder) if shots else []
    check_references(task, docs)
    answered = not flags.submission
    return TaskRun(task, shots, build_questions(task, docs, pool, shots, answered))


def run_key(run: TaskRun, scorer: "ChoiceScorer", model: str) -> str:
    """What a task's result depends on."""
    task = asdict(run.task)
    del task["file"]
    values = {
        "model": model,
        "task": task,
        "questions": [asdict(question) for question in run.questions],
        "max_length": scorer.max_length,
    }
    return result_key(values)


def score_run(run: TaskRun, scorer: "ChoiceScorer") -> TaskResult:
    """A task's result; a bar on stderr shows how far it is."""
    from tqdm import tqdm

    task, questions = run.task, run.questions
    likelihoods: list[list[float]] = []
    answers: list[str] = []
    begun = time.perf_counter()
    with tqdm(total=len(questions), desc=f"{task.name}, {run.shots} shots", unit="row") as bar:
        if task.output_type == "multiple_choice":
            likelihoods = scorer.scores(questions, bar.update)
        else:
            answers = scorer.answers(questions, task.until, task.max_gen_toks, bar.update)
    seconds = time.perf_counter() - begun
    return summarise(
        task, run.shots, questions, likelihoods=likelihoods, answers=answers, seconds=seconds
    )


def run_tasks(flags: BenchmarkFlags) -> None:
    """Score all tasks, print the table, write and draw --output.

    Raises:
        ValueError, FileNotFoundError: of the model, the tasks or their rows.
    """
    index = task_index(flags)
    names = task_names(flags)
    tasks = [index.load(name) for name in index.expand(names)]
    folder = Path(flags.output) if flags.output else None
    if folder:
        check_folder_to_write(folder, "--output")
    runs = []
    for shots in flags.shots:
        for task in tasks:
            runs.append(questions_of(task, shots, flags))
    scorer = load_scorer(flags)
    model = model_fingerprint(scorer.model)
    results = []
    for run in runs:
        key = run_key(run, scorer, model)
        result = kept_result(folder, run.task.name, run.shots, key) if folder else None
        if result is None:
            result = score_run(run, scorer)
            if folder:
                keep_result(folder, result, key)
        results.append(result)
    print_columns(HEADS, result_lines(results))
    groups = index.groups_of(names)
    totals = group_lines(groups, lambda group: index.expand(group.members), results)
    if totals:
        print_columns(["group", "shots", "rows", "metric", "value"], totals)
    if folder:
        write_results(folder, flags, results, totals)


def write_results(
    folder: Path, flags: BenchmarkFlags, results: list[TaskResult], totals: list[list[str]]
) -> None:
    """results.json and scores.png of all tasks."""
    summaries = []
    for result in results:
        summary = asdict(result)
        del summary["likelihoods"], summary["answers"]
        summaries.append(summary)
    content = {"flags": asdict(flags), "results": summaries, "groups": totals}
    write_json(folder / "results.json", content)
    write_aside(folder / "scores.png", scores_picture(results, Path(flags.model_path).name))
    print(f"{folder}: results.json, scores.png, and a file of each task's rows")


def write_submission(flags: BenchmarkFlags) -> None:
    """--submission: the letters of C-Eval's test rows, as its authors' site takes them.

    Raises:
        ValueError: a task is none of C-Eval's, or a row has no id.
        FileNotFoundError: there are no rows of the split "test".
    """
    index = task_index(flags)
    runs = []
    for name in index.expand(task_names(flags)):
        task = index.load(name)
        if task.dataset_path != CEVAL or task.output_type != "multiple_choice":
            raise ValueError(f"--submission is of tasks on {CEVAL}, such as ceval-valid: {name}")
        runs.append(questions_of(task, flags.shots[0], flags))
    scorer = load_scorer(flags)
    check_folder_to_write(Path(str(flags.submission)).parent, "--submission")
    letters: dict[str, dict[str, str]] = {}
    for run in runs:
        scores_of_rows = scorer.scores(run.questions, lambda count: None)
        answers = {}
        for question, scores in zip(run.questions, scores_of_rows):
            if "id" not in question.doc:
                raise ValueError(f"{run.task.name}: a row of the split test has no id")
            answers[str(question.doc["id"])] = question.choices[first_highest(scores)]
        letters[run.task.dataset_name] = answers
        print(f"{run.task.dataset_name}: {len(answers)} answers")
    write_json(str(flags.submission), letters)


def parse_shots(text: str) -> tuple[int, ...]:
    """ "0,1,5" -> (0, 1, 5), each once."""
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or len(part) > 6:
            raise argparse.ArgumentTypeError(f"wanted numbers such as 0,1,5; got {text!r}")
        numbers.append(int(part))
    return tuple(dict.fromkeys(numbers))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model_path", "--model", required=True, help="a model, adapter or prefix folder"
    )
    parser.add_argument(
        "--base_model", help="base of an adapter or prefix folder (default: the one it names)"
    )
    parser.add_argument(
        "--mode", choices=tuple(FAMILIES), help="family (default: found in the folder)"
    )
    parser.add_argument("--device", default="0", help='GPU number, "cpu" or a torch device [0]')
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the weights [auto]"
    )
    parser.add_argument(
        "--tasks",
        default="clue",
        help="comma list of tasks and groups: clue, clue_legacy, ... [clue]",
    )
    parser.add_argument(
        "--include_path",
        default="",
        help="comma list of folders with more task files, such as lm_eval/tasks/ceval",
    )
    parser.add_argument("--data", required=True, help="folder of the tasks' rows")
    parser.add_argument(
        "--shots", type=parse_shots, default=(0,), help="examples before a row: 0,1,5 [0]"
    )
    parser.add_argument(
        "--limit", type=parse_positive, help="rows of each task, the first ones [all]"
    )
    parser.add_argument(
        "--batch_tokens", type=parse_positive, default=4096, help="tokens of a pass [4096]"
    )
    parser.add_argument(
        "--max_length", type=parse_positive, help="longest input in tokens [the model's limit]"
    )
    parser.add_argument(
        "--output",
        help="folder of results, rows and a picture; tasks that it holds already are not scored "
        "again",
    )
    parser.add_argument(
        "--submission",
        help="JSON file of C-Eval's answers to its split test, in place of scores",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = BenchmarkFlags(**vars(parser.parse_args(argv)))
    if flags.submission and (flags.output or len(flags.shots) > 1):
        parser.error("--submission takes one number of --shots, and no --output")
    run = write_submission if flags.submission else run_tasks
    return run_command(parser.prog, lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
