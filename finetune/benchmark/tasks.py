"""Tasks of lm-evaluation-harness: the part of its YAML files that is read here. Free of torch.

A TaskIndex lists the tasks and groups of folders; `read_task` makes a BenchmarkTask of a file.
The same files run in the harness: `lm_eval --include_path FOLDER`. A key or value that is not read
is refused, so no task is scored otherwise than the harness would.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from chatglm.files import read_text, shorten
from finetune.plain_yaml import PlainLoader, parse_yaml

CLUE = Path(__file__).resolve().parent / "clue"  # the task files that come with this project
SAMPLERS = ("default", "first_n")
SUFFIXES = (".yaml", ".yml")
# Of the harness's keys: those that say nothing about scores.
IGNORED_KEYS = {"metadata", "tag", "task_alias", "group_alias", "include", "repeats"}
KINDS: dict[str, type | tuple[type, ...]] = {  # of the keys that are read
    "task": str,
    "dataset_path": str,
    "dataset_name": str,
    "dataset_kwargs": dict,
    "training_split": str,
    "validation_split": str,
    "test_split": str,
    "fewshot_split": str,
    "fewshot_config": dict,
    "output_type": str,
    "doc_to_text": str,
    "doc_to_target": (str, int),
    "doc_to_choice": (str, list),
    "description": str,
    "target_delimiter": str,
    "fewshot_delimiter": str,
    "num_fewshot": int,
    "metric_list": list,
    "generation_kwargs": dict,
    "process_results": object,
}
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")
Files: TypeAlias = dict[str, Any]


class FunctionName(str):
    """What a file writes as `!function module.name`. It is a name here; nothing is imported."""


class TaskLoader(PlainLoader):
    """YAML of plain values, and names of functions."""


def function_name(loader: yaml.SafeLoader, node: yaml.Node) -> FunctionName:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "!function wants a name")
    return FunctionName(loader.construct_scalar(node))


TaskLoader.add_constructor("!function", function_name)


@dataclass(frozen=True)
class BenchmarkTask:
    """A task, as its file says.

    Attributes:
        dataset_path, dataset_name: of a hub's data set; dataset_path "json" or "csv" for files.
        data_files: {split: file below the data folder}, of a task whose data are files.
        splits: {"training", "validation", "test", "fewshot": name of the split}, those given.
        sampler: "first_n" takes the first shots, "default" draws them for each row.
        output_type: "multiple_choice" or "generate_until".
        metrics: names, in the file's order.
        results: the function that scores a written answer; "" for a choice.
    """

    name: str
    file: Path
    dataset_path: str
    dataset_name: str
    data_files: dict[str, str]
    splits: dict[str, str]
    sampler: str
    output_type: str
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[str] | None
    metrics: tuple[str, ...]
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    num_fewshot: int = 0
    until: tuple[str, ...] = ()
    max_gen_toks: int = 256
    results: str = ""

    @property
    def evaluated_split(self) -> str:
        return self.splits.get("test") or self.splits["validation"]

    @property
    def shots_split(self) -> str:
        """Where examples come from, by the harness's rule."""
        for name in ("fewshot", "training", "validation", "test"):
            if self.splits.get(name):
                return self.splits[name]
        raise ValueError(f"{self.file}: no split")

    @property
    def leaves_itself_out(self) -> bool:
        """Whether a row is no example of itself."""
        return self.splits.get("fewshot") == self.splits.get("test")


@dataclass(frozen=True)
class TaskGroup:
    """Tasks under one name; `metrics`: those whose mean over all rows is the group's."""

    name: str
    members: tuple[str, ...]
    metrics: tuple[str, ...] = ()


@dataclass
class TaskIndex:
    """The tasks and groups that files define, by name."""

    tasks: dict[str, Path] = field(default_factory=dict)
    groups: dict[str, TaskGroup] = field(default_factory=dict)

    @classmethod
    def of_folders(cls, folders: Iterable[Path]) -> "TaskIndex":
        """Of all YAML files below folders; a later folder's names win.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a file is no YAML.
        """
        index = cls()
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"--include_path: no such folder: {folder}")
            tagged: dict[str, list[str]] = {}
            for file in sorted(folder.rglob("*")):
                if file.suffix in SUFFIXES and file.is_file():
                    index.add(file, tagged)
            for tag, names in tagged.items():
                index.groups.setdefault(tag, TaskGroup(tag, tuple(names)))
        return index

    def add(self, file: Path, tagged: dict[str, list[str]]) -> None:
        """Enter what a file defines; of its tags those that it names itself."""
        values = read_yaml(file)
        if "group" in values:
            group = read_group(file, values)
            self.groups[group.name] = group
            return
        name = values.get("task")
        if not isinstance(name, str):
            return
        self.tasks[name] = file
        for tag in names_at(file, values, "tag"):
            tagged.setdefault(tag, []).append(name)

    def expand(self, names: Sequence[str], outer: tuple[str, ...] = ()) -> list[str]:
        """The tasks that names of tasks and groups mean, each once.

        Args:
            outer: the groups that the names are members of; there a name may be a task's alone.

        Raises ValueError for a name that is neither.
        """
        tasks: list[str] = []
        for name in names:
            if name in self.groups and name not in outer:
                members = self.expand(self.groups[name].members, (*outer, name))
            elif name in self.tasks:
                members = [name]
            elif name in outer:
                raise ValueError(f"--tasks: the group {name} is a member of itself")
            else:
                known = ", ".join([*sorted(self.groups), *sorted(self.tasks)])
                raise ValueError(f"--tasks: no task {name!r}; there are {known:.400}")
            for member in members:
                if member not in tasks:
                    tasks.append(member)
        return tasks

    def groups_of(self, names: Sequence[str], outer: tuple[str, ...] = ()) -> list[TaskGroup]:
        """The groups that names mean, and those inside of them, the outer one first."""
        groups: list[TaskGroup] = []
        for name in names:
            if name in self.groups and name not in outer:
                group = self.groups[name]
                groups += [group, *self.groups_of(group.members, (*outer, name))]
        return groups

    def load(self, name: str) -> BenchmarkTask:
        return read_task(self.tasks[name])


def read_yaml(file: Path, including: tuple[Path, ...] = ()) -> Files:
    """A file's mapping, with those of the files that it includes below it.

    Raises:
        ValueError: it is no YAML, or no mapping, or it includes itself.
        FileNotFoundError: an included file is not there.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    if file.resolve() in including:
        raise ValueError(f"{file}: includes itself")
    text = read_text(file)
    try:
        values = parse_yaml(text, TaskLoader)
    except ValueError as error:
        raise ValueError(f"{file}: not valid YAML: {error!s:.200}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: wanted keys and values, got {shorten(values)}")
    merged: Files = {}
    for name in names_at(file, values, "include"):
        merged.update(read_yaml(file.parent / name, (*including, file.resolve())))
    merged.update(values)
    return merged


def names_at(file: Path, values: Files, key: str) -> list[str]:
    """The names at a key, a text or a list of them; raises ValueError for anything else."""
    found = values.get(key) or []
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: {key}: wanted a list of names, got {shorten(found)}")
    return names


def metrics_at(file: Path, values: Files, key: str) -> list[dict[str, Any]]:
    """The metrics at a key, each an object; raises ValueError where one is not a mean of rows."""
    found = values.get(key) or []
    metrics: list[dict[str, Any]] = []
    for metric in found if isinstance(found, list) else [found]:
        entry = {"metric": metric} if isinstance(metric, str) else metric
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            raise ValueError(f"{file}: {key}: wanted a list of metrics, got {shorten(found)}")
        if entry.get("aggregation", "mean") != "mean":
            raise unread(file, f"{key}: wanted the aggregation mean, got {shorten(metric)}")
        metrics.append(entry)
    return metrics


def read_group(file: Path, values: Files) -> TaskGroup:
    """Raises ValueError where a member is no name, or a metric is not weighted by rows."""
    metrics = []
    for metric in metrics_at(file, values, "aggregate_metric_list"):
        if not metric.get("weight_by_size", True):
            raise ValueError(f"{file}: aggregate_metric_list: wanted means weighted by size")
        metrics.append(metric["metric"])
    members = names_at(file, values, "task")
    return TaskGroup(str(values["group"]), tuple(members), tuple(metrics))


def read_task(file: Path) -> BenchmarkTask:
    """The task of a file.

    Raises:
        ValueError: a key or value that is not read here; the harness may know it.
    """
    values = read_yaml(file)
    check_keys(file, values)
    fewshot = values.get("fewshot_config") or {}
    sampler = fewshot.get("sampler", "default")
    if set(fewshot) - {"sampler"} or sampler not in SAMPLERS:
        wanted = " or ".join(SAMPLERS)
        raise unread(file, f"fewshot_config: wanted sampler {wanted}, got {shorten(fewshot)}")
    dataset = values.get("dataset_kwargs") or {}
    if set(dataset) - {"data_files"}:
        raise unread(file, f"dataset_kwargs: wanted data_files, got {shorten(dataset)}")
    splits = {}
    for name in ("training", "validation", "test", "fewshot"):
        if values.get(f"{name}_split"):
            splits[name] = values[f"{name}_split"]
    if "test" not in splits and "validation" not in splits:
        raise unread(file, "wanted test_split or validation_split")
    metrics = []
    for metric in metrics_at(file, values, "metric_list"):
        metrics.append(metric["metric"])
    optional = {}
    for name in ("description", "target_delimiter", "fewshot_delimiter", "num_fewshot"):
        if name in values:
            optional[name] = values[name]
    task = BenchmarkTask(
        name=values["task"],
        file=file,
        dataset_path=values["dataset_path"],
        dataset_name=values.get("dataset_name", ""),
        data_files=data_files(file, dataset),
        splits=splits,
        sampler=sampler,
        output_type=values.get("output_type", "generate_until"),
        doc_to_text=values["doc_to_text"],
        doc_to_target=values["doc_to_target"],
        doc_to_choice=values.get("doc_to_choice"),
        metrics=tuple(metrics),
        **optional,
        **written_options(file, values),
    )
    check_metrics(task)
    return task


def unread(file: Path, message: str) -> ValueError:
    """An error that says what to do instead."""
    return ValueError(f"{file}: {message}; python -m chatglm lm_eval may read it")


def check_keys(file: Path, values: Files) -> None:
    """Raises ValueError for a key that is missing, not read or of another type."""
    for key in ("task", "dataset_path", "doc_to_text", "doc_to_target"):
        if key not in values:
            raise unread(file, f"wanted the key {key}")
    for key, value in values.items():
        if key in IGNORED_KEYS:
            continue
        kind = KINDS.get(key)
        if kind is None:
            raise unread(file, f"the key {key} is not read")
        is_misplaced_function = isinstance(value, FunctionName) and key != "process_results"
        is_of_kind = isinstance(value, kind) and not isinstance(value, bool)
        if is_misplaced_function or not is_of_kind:
            raise unread(file, f"{key}: got {shorten(value)}")
    name = values["task"]
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"{file}: task: wanted a name that a file can have, got {shorten(name)}")


def data_files(file: Path, dataset: Files) -> dict[str, str]:
    """{split: path}; raises ValueError for other forms of data_files."""
    files = dataset.get("data_files") or {}
    if isinstance(files, str):
        files = {"train": files}  # as the library datasets names it
    if not isinstance(files, dict) or not all(isinstance(path, str) for path in files.values()):
        raise unread(file, f"data_files: wanted a file for each split, got {shorten(files)}")
    return files


def written_options(file: Path, values: Files) -> dict[str, Any]:
    """The fields of a task whose answers are written; raises ValueError for sampling."""
    results = values.get("process_results")
    if values.get("output_type", "generate_until") == "multiple_choice":
        if results is not None:
            raise unread(file, f"process_results of multiple_choice: got {shorten(results)}")
        return {}
    options = dict(values.get("generation_kwargs") or {})
    until = names_at(file, options, "until")
    options.pop("until", None)
    max_gen_toks = options.pop("max_gen_toks", 256)
    is_sampled = options.pop("do_sample", False)
    if is_sampled or options:
        raise unread(file, f"generation_kwargs: wanted greedy answers, got {shorten(options)}")
    if type(max_gen_toks) is not int or max_gen_toks < 1:
        got = shorten(max_gen_toks)
        raise unread(file, f"max_gen_toks: wanted a whole number above 0, got {got}")
    until = [text for text in until if text]
    name = results.rpartition(".")[2] if isinstance(results, FunctionName) else ""
    return {"until": tuple(until), "max_gen_toks": max_gen_toks, "results": name}


def check_choices(file: Path, found: object) -> list[str]:
    """`found`; raises ValueError where it is no list of texts, each with something to score."""
    choices = found if isinstance(found, list) else []
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise ValueError(f"{file}: doc_to_choice: wanted a list of texts, got {shorten(found)}")
    return choices


def check_metrics(task: BenchmarkTask) -> None:
    """Raises ValueError where a task's answers or metrics are none that are computed here."""
    if task.output_type == "multiple_choice":
        known: Sequence[str] = CHOICE_METRICS
        if task.doc_to_choice is None:
            raise unread(task.file, "multiple_choice wants doc_to_choice")
        if isinstance(task.doc_to_choice, list):
            check_choices(task.file, task.doc_to_choice)
    elif task.output_type == "generate_until" and task.results in RESULTS:
        known = RESULTS[task.results]
    else:
        got = f"{task.output_type} {task.results}".strip()
        wanted = "multiple_choice, or generate_until with process_results of"
        raise unread(task.file, f"wanted {wanted} {', '.join(RESULTS)}; got {got}")
    if not task.metrics or set(task.metrics) - set(known):
        got = shorten(list(task.metrics))
        raise unread(task.file, f"metric_list: wanted of {', '.join(known)}; got {got}")


RESULTS = {"extraction_scores": ("exact_match", "f1")}  # functions of clue/answers.py
