"""finetune.benchmark beside lm-evaluation-harness: the same texts, likelihoods, answers, metrics.

The harness runs in its own environment, as its users run it, on made-up rows of every task file
and of one subject each of its own C-Eval, CMMLU and MMLU tasks.
"""

import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import clue_speed
from benchmarks.client_env import environment_python
from chatglm import load_model, load_tokenizer
from finetune.benchmark.data import read_docs
from finetune.benchmark.questions import build_questions
from finetune.benchmark.scoring import ChoiceScorer
from finetune.benchmark.tasks import CLUE, TaskIndex
from tests.causal_folders import make_causal_folder
from tests.finetune.benchmark.miniature import exam_rows, prepared, write_lines, write_table

INDEX = TaskIndex.of_folders([CLUE])
NAMES = INDEX.expand(["clue", "clue_legacy"])
SHOTS = (0, 2)
KINDS = ("glm", "glm2", "glm3", "glm4", "llama", "qwen3")
# The harness's tasks: below its folder tasks, the group, and of a subject the rows and their
# split in the form that its authors give them.
EXAMS = {
    "ceval": ("ceval", "ceval-valid", "ceval-valid_accountant"),
    "cmmlu": ("cmmlu", "cmmlu", "cmmlu_agronomy"),
    "mmlu": ("mmlu/default", "mmlu", "mmlu_anatomy"),
}


def harness_tasks():
    """The folder of the harness's own task files."""
    code = "import importlib.util as u; print(u.find_spec('lm_eval').submodule_search_locations[0])"
    python = environment_python("lm_eval")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()) / "tasks"


def scorer_of(folder):
    tokenizer = load_tokenizer(folder, prompt_style="raw")
    return ChoiceScorer(load_model(folder, dtype=torch.float32).eval(), tokenizer, 2048)


def compare(scorer, harness, task, data, shots):
    """A task by both: texts and all; `harness` has the same task under the same name."""
    docs = read_docs(task, task.evaluated_split, data)
    pool = read_docs(task, task.shots_split, data)
    run = clue_speed.TaskRun(task, shots, build_questions(task, docs, pool, shots))
    found = clue_speed.compare(run, scorer, harness, None)
    assert [question.contexts[0] for question in run.questions] == found.theirs["contexts"]
    assert found.agrees, (task.name, shots, found.difference, found.theirs["metrics"])
    return found


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tiny_folders, tmp_path_factory):
    kind = request.param
    made = tiny_folders.get(kind)
    return kind, made or make_causal_folder(tmp_path_factory.mktemp(kind), kind)


@pytest.mark.slow
def test_clue(folder, tmp_path):
    kind, model = folder
    data, scorer = prepared(tmp_path), scorer_of(model)
    settings = {"chatglm": kind.startswith("glm"), "max_length": scorer.max_length}
    harness = clue_speed.Harness(model, data, **settings)
    rows = set()
    for name in NAMES:
        for shots in SHOTS:
            found = compare(scorer, harness, INDEX.load(name), data, shots)
            rows.add(found.result.rows)
    harness.close()
    assert rows == {5}


def exam_data(folder, kind):
    """(rows as authors pack them below `folder`, {split: file for the harness})."""
    files = {}
    evaluated, name = {"ceval": ("val", "accountant"), "cmmlu": ("test", "agronomy")}.get(
        kind, ("test", "anatomy")
    )
    for split, count in (("dev", 5), (evaluated, 7)):
        rows = exam_rows(count)
        if kind == "mmlu":
            table = [{key: row[key] for key in ("question", *"ABCD", "answer")} for row in rows]
            write_table(folder / split / f"{name}_{split}.csv", table, header=False)
            hub = []
            for row in rows:
                choices = [row[letter] for letter in "ABCD"]
                answer = "ABCD".index(row["answer"])
                hub.append({"question": row["question"], "choices": choices, "answer": answer})
            rows = hub
        elif kind == "cmmlu":
            renamed = {"question": "Question", "answer": "Answer"}
            rows = [{renamed.get(key, key): value for key, value in row.items()} for row in rows]
            write_table(folder / split / f"{name}.csv", rows)
        else:
            write_table(folder / split / f"{name}_{split}.csv", rows)
        files[split] = str(write_lines(folder / "lines" / f"{split}.jsonl", rows))
    return files


@pytest.mark.slow
def test_the_harness_own_exams(tiny_folders, tmp_path):
    """Its task files are read as they are; in the harness an including file names local rows."""
    tasks, model = harness_tasks(), tiny_folders["glm3"]
    overrides = tmp_path / "tasks"
    overrides.mkdir()
    for kind, (below, _, name) in EXAMS.items():
        values = {
            "include": str(tasks / below / f"{name}.yaml"),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": exam_data(tmp_path / kind, kind)},
        }
        (overrides / f"{kind}.yaml").write_text(yaml.safe_dump(values))
    scorer = scorer_of(model)
    settings = {"chatglm": True, "include_path": [str(overrides)]}
    harness = clue_speed.Harness(model, tmp_path, max_length=scorer.max_length, **settings)
    for kind, (below, group, name) in EXAMS.items():
        index = TaskIndex.of_folders([tasks / below])
        members = index.expand([group])
        assert name in members and len(members) == {"ceval": 52, "cmmlu": 67, "mmlu": 57}[kind]
        for member in members:
            assert index.load(member).metrics[0] == "acc"
        for shots in (0, 5):
            compare(scorer, harness, index.load(name), tmp_path / kind, shots)
    harness.close()
