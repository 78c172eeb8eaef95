"""python -m finetune.benchmark: its table, picture and files, what is scored again, refusals."""

import json

import pytest

from finetune.benchmark import command
from finetune.benchmark.scoring import ChoiceScorer
from finetune.benchmark.tasks import CLUE, TaskIndex
from tests.finetune.benchmark.miniature import exam_rows, prepared, write_table

EXAM = """
task: {name}
include: exam_base
dataset_name: {subject}
description: "关于{subject}的单项选择题。\\n\\n"
"""
EXAM_BASE = """
dataset_path: ceval/ceval-exam
validation_split: val
fewshot_split: dev
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{question.strip()}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案："
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{['A', 'B', 'C', 'D'].index(answer)}}"
metric_list: [{metric: acc, aggregation: mean}]
"""
EXAM_GROUP = """
group: exams
task: [exam_one, exam_two]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def words(tiny_folders, tmp_path_factory):
    data = prepared(tmp_path_factory.mktemp("clue"))
    model = str(tiny_folders["glm3"])
    return ["--model", model, "--data", str(data), "--device", "cpu", "--limit", "2"]


def table_of(text):
    return [line.split() for line in text.splitlines()]


def test_clue(words, tmp_path, capsys, monkeypatch):
    """A table and a picture of twelve tasks; a task that was scored is not scored again."""
    out, scores = tmp_path / "out", ChoiceScorer.scores
    words = [*words, "--tasks", "clue", "--output", str(out)]
    begun = []

    def stop_in_the_third(self, questions, report):
        begun.append(questions)
        if len(begun) == 3:
            raise OSError("the disk went away")
        return scores(self, questions, report)

    monkeypatch.setattr(ChoiceScorer, "scores", stop_in_the_third)
    assert command.main(words) == 1 and not (out / "results.json").exists()
    capsys.readouterr()
    assert command.main(words) == 0
    assert len(begun) == 3 + 9  # of eleven tasks of choices, two were kept
    table = table_of(capsys.readouterr().out)
    assert table[0] == ["task", "shots", "rows", "metric", "value", "error", "chance"]
    wanted = TaskIndex.of_folders([CLUE]).expand(["clue"])
    assert [line[0] for line in table[1::2]][:12] == wanted and len(wanted) == 12
    assert table[1][1:4] == ["0", "2", "acc"] and table[11][-1] == "0.0084"
    written = json.loads((out / "results.json").read_text())["results"]
    assert len(written) == 12 and written[7]["chance"] is None
    kept = json.loads((out / "clue_iflytek-0shot.json").read_text())
    assert [len(row) for row in kept["likelihoods"]] == [119, 119]
    assert (out / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_scored_again(words, tmp_path, capsys):
    """Other rows, another length of inputs or damaged files; not another batch."""
    out = tmp_path / "out"
    words = [*words, "--tasks", "clue_afqmc", "--output", str(out)]
    assert command.main([*words, "--shots", "0,1"]) == 0
    times = {file.name: file.stat().st_mtime_ns for file in out.glob("clue_*")}
    assert sorted(times) == ["clue_afqmc-0shot.json", "clue_afqmc-1shot.json"]

    def changed(*more):
        assert command.main([*words, *more]) == 0
        return (out / "clue_afqmc-0shot.json").stat().st_mtime_ns != times["clue_afqmc-0shot.json"]

    assert not changed("--batch_tokens", "64")
    assert changed("--max_length", "30")
    file = out / "clue_afqmc-0shot.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({"key": values["key"], "what": 1}))
    assert command.main([*words, "--max_length", "30"]) == 1
    assert "not a result of finetune.benchmark; remove it" in capsys.readouterr().err


def test_weights_that_give_no_numbers(words, monkeypatch, tmp_path, capsys):
    """No accuracy of a guess: an error, and nothing is written."""
    load = command.load_ready

    def damaged(*args, **options):
        model = load(*args, **options)
        next(model.parameters()).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(command, "load_ready", damaged)
    out = tmp_path / "out"
    assert command.main([*words, "--tasks", "clue_afqmc", "--output", str(out)]) == 1
    assert "row 1: the model's log-likelihoods are no numbers" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    """Task files as the harness has C-Eval's, and rows as its authors pack them."""
    folder = tmp_path_factory.mktemp("exams")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "exam_base").write_text(EXAM_BASE, encoding="utf-8")
    (folder / "tasks" / "exams.yaml").write_text(EXAM_GROUP, encoding="utf-8")
    for number, subject in enumerate(("one", "two"), 2):
        text = EXAM.format(name=f"exam_{subject}", subject=subject)
        (folder / "tasks" / f"{subject}.yaml").write_text(text, encoding="utf-8")
        for split, count in (("dev", 5), ("val", 2 * number), ("test", 3)):
            rows = exam_rows(count)
            if split == "test":
                rows = [{key: row[key] for key in ("id", "question", *"ABCD")} for row in rows]
            write_table(folder / "data" / split / f"{subject}_{split}.csv", rows)
    return folder


def exam_words(words, exams):
    paths = ["--include_path", str(exams / "tasks"), "--data", str(exams / "data")]
    return [*words[:2], "--device", "cpu", "--tasks", "exams", *paths]


def test_a_group_weighs_rows(words, exams, capsys):
    assert command.main([*exam_words(words, exams), "--shots", "5"]) == 0
    table = table_of(capsys.readouterr().out)
    rows = {line[0]: (int(line[2]), float(line[4])) for line in (table[1], table[2], table[4])}
    assert [rows[name][0] for name in ("exam_one", "exam_two", "exams")] == [4, 6, 10]
    mean = (4 * rows["exam_one"][1] + 6 * rows["exam_two"][1]) / 10
    assert rows["exams"][1] == pytest.approx(mean, abs=1e-4)


def test_a_submission(words, exams, tmp_path, capsys):
    """{subject: {id: letter}} of the split without answers."""
    file = tmp_path / "submission.json"
    assert command.main([*exam_words(words, exams), "--submission", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found) == ["one", "two"] and list(found["one"]) == ["0", "1", "2"]
    assert set(found["two"].values()) <= set("ABCD")
    assert command.main([*words, "--submission", str(file)]) == 1
    assert "--submission is of tasks on ceval/ceval-exam" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tasks", "clue_x"], "--tasks: no task 'clue_x'; there are clue, clue_legacy, clue_afq"),
        (["--shots", "4"], "clue_afqmc: --shots 4, but its split train has 3 rows"),
        (["--shots", "few"], "wanted numbers such as 0,1,5; got 'few'"),
        (["--data", "/nowhere"], "clue_afqmc: no rows of the split 'test': looked for afqmc/test"),
        (["--include_path", "/nowhere"], "--include_path: no such folder: /nowhere"),
        (["--submission", "x", "--output", "y"], "--submission takes one number of --shots"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--tasks", " , "], "--tasks: wanted names of tasks or groups"),
        (["--shots", "²"], "wanted numbers such as 0,1,5; got '²'"),
        (["--output", "/proc/x"], "--output /proc/x cannot be written: No such file"),
        (["--output", __file__], f"--output {__file__} cannot be written: File exists"),
    ],
)
def test_refusals_in_one_line(words, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    try:
        code = command.main([*words, "--tasks", "clue_afqmc", *more])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code and message in error and not out.exists()
    assert "Traceback" not in error
