"""Task files: what is read of them, what is refused, and the texts that they make of a row."""

import random

import pytest
import yaml

from finetune.benchmark.clue import answers
from finetune.benchmark.data import read_docs
from finetune.benchmark.encoding import Continuation
from finetune.benchmark.questions import TaskTexts, build_questions, choose_shots
from finetune.benchmark.results import (
    RESULT_FUNCTIONS,
    TaskResult,
    check_references,
    choice_metrics,
    group_lines,
)
from finetune.benchmark.tasks import CLUE, RESULTS, TaskGroup, TaskIndex, read_task
from tests.finetune.benchmark.miniature import exam_rows, prepared, write_lines, write_table

INDEX = TaskIndex.of_folders([CLUE])
NAMES = INDEX.expand(["clue", "clue_legacy"])
PLAIN = {
    "task": "exam",
    "dataset_path": "owner/exams",
    "dataset_name": "pumps",
    "validation_split": "val",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "description": "关于水泵的题。\n\n",
    "doc_to_text": "{{question.strip()}}\nA. {{A}}\n答案：",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def write_task(folder, **changes):
    values = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    folder.mkdir(exist_ok=True)
    file = folder / "exam.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return file


def test_the_groups():
    assert len(INDEX.expand(["clue"])) == 12 and len(NAMES) == len(INDEX.tasks) == 19
    assert set(RESULTS) == set(RESULT_FUNCTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("clue"))


@pytest.mark.parametrize("name", NAMES)
def test_a_question_of_each_task(name, folder):
    """A shot is the row's question with its right answer; all choices have the same shots."""
    task = INDEX.load(name)
    docs, pool = (read_docs(task, split, folder) for split in ("test", "train"))
    [plain] = build_questions(task, docs[:1], pool, 0)
    [asked] = build_questions(task, docs[:1], pool, 2)
    for before, after in zip(plain.contexts, asked.contexts, strict=True):
        assert after.endswith(before) and after != before
    shots = {after.removesuffix(before) for before, after in zip(plain.contexts, asked.contexts)}
    assert len(shots) == 1
    example = TaskTexts(task).shot(pool[0])
    assert shots.pop().startswith(example)
    if task.output_type == "multiple_choice":
        [own] = build_questions(task, pool[:1], pool, 0)
        right = own.gold[0]
        whole = own.contexts[right] + own.continuations[right]
        assert example == whole + task.fewshot_delimiter
        assert "{{" not in whole and len(set(own.continuations)) == len(own.continuations)


def test_words_of_some_tasks(folder):
    """By hand: the last row of the miniature."""
    found = {}
    for name in NAMES:
        task = INDEX.load(name)
        docs = read_docs(task, "test", folder)
        [found[name]] = build_questions(task, docs[-1:], [], 0)
    afqmc = found["clue_afqmc"]
    assert (
        afqmc.contexts[0] == "句子一：水泵漏油怎么办7\n句子二：油封多久换一次49\n上面两个句子语义"
    )
    assert afqmc.continuations == ("不同", "相同") and afqmc.gold == (1,)
    legacy = found["clue_legacy_afqmc"]
    assert legacy.contexts == ("", "") and legacy.continuations == (
        "下面两个句子语义不同:水泵漏油怎么办7。油封多久换一次49",
        "下面两个句子语义相同:水泵漏油怎么办7。油封多久换一次49",
    )
    assert found["clue_legacy_ocnli"].choices[0] == "水泵漏油怎么办7？Yes，油封多久换一次49"
    c3 = found["clue_legacy_c3"]
    text = "这台水泵在第7天漏油，师傅先检查了油封。\n男：好。"
    assert c3.choices[1] == f"问: 谁检查了油封7？\n答:司机7\n该答案来自对话: {text}"
    chid = found["clue_chid"]
    assert chid.contexts[0] == "文章：他7天里"
    assert chid.continuations[1] == "画蛇添足，终于修好了水泵。"
    assert len(found["clue_iflytek"].choices) == 119 and found["clue_iflytek"].gold == (99,)
    csl = found["clue_legacy_csl"]
    assert csl.choices[0].endswith("，关键词:水泵+油封7不是真实关键词")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"process_docs": "x"}, "the key process_docs is not read"),
        ({"doc_to_choice": None}, "multiple_choice wants doc_to_choice"),
        ({"doc_to_text": None}, "wanted the key doc_to_text"),
        ({"doc_to_text": 3}, "doc_to_text: got 3"),
        ({"output_type": "loglikelihood"}, "wanted multiple_choice, or generate_until with"),
        ({"metric_list": [{"metric": "mcc"}]}, "metric_list: wanted of acc, acc_norm, acc_bytes"),
        ({"fewshot_config": {"sampler": "last_n"}}, "wanted sampler default or first_n"),
        ({"dataset_kwargs": {"revision": "x"}}, "dataset_kwargs: wanted data_files"),
        ({"validation_split": None}, "wanted test_split or validation_split"),
        ({"doc_to_target": True}, "doc_to_target: got true"),
        ({"doc_to_choice": [1, 2]}, "doc_to_choice: wanted a list of texts, got"),
        ({"doc_to_choice": ["a", ""]}, "doc_to_choice: wanted a list of texts, got"),
        ({"task": "../exam"}, "task: wanted a name that a file can have, got"),
        ({"process_results": "x"}, "process_results of multiple_choice"),
        ({"metric_list": 3}, "metric_list: got 3"),
        ({"metric_list": [{"metric": "acc", "aggregation": "f1"}]}, "wanted the aggregation mean"),
        ({"include": ["exam.yaml"]}, "exam.yaml: includes itself"),
        ({"include": 3}, "include: wanted a list of names, got 3"),
        ({"output_type": "generate_until", "generation_kwargs": {"until": 5}}, "until: wanted"),
        (
            {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": -1}},
            "max_gen_toks: wanted a whole number above 0, got -1",
        ),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        read_task(write_task(tmp_path, **changes))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_functions_of_other_files_are_not_run(tmp_path):
    file = tmp_path / "exam.yaml"
    text = yaml.safe_dump(PLAIN | {"output_type": "generate_until"}, allow_unicode=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    file.write_text(text + "process_results: !function evil.scores\n", encoding="utf-8")
    with pytest.raises(ValueError, match="process_results of extraction_scores; got"):
        read_task(file)
    file.write_text("task: !!python/object/apply:os.system [true]\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_task(file)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: &a [x]\nb: [*a, *a]", "not valid YAML: the alias"),
        ("x: 2020-99-99", "not valid YAML: month must be"),
        ("[" * 3000, "not valid YAML: maximum recursion"),
        ("task: a\ntag: 3", "tag: wanted a list of names, got 3"),
        ("group: g\ntask: [g]", "the group g is a member of itself"),
        ("group: g\ntask: []\naggregate_metric_list: [{}]", "wanted a list of metrics"),
    ],
)
def test_files_that_are_none(text, words, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=words) as error:
        TaskIndex.of_folders([tmp_path]).expand(["g"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, row",
    [
        ({"doc_to_text": "{{1/0}}"}, {}),
        ({"doc_to_text": "{% macro f() %}{{f()}}{% endmacro %}{{f()}}"}, {}),
        ({"doc_to_choice": "{{c}}"}, {"c": "-" * 100_000 + "1"}),
        ({"doc_to_choice": "c"}, {"c": []}),
        *(({"doc_to_target": "label"}, {"label": label}) for label in (None, 1.5, {}, [[0]], -1)),
        *(({"doc_to_target": "{{label}}"}, {"label": label}) for label in ("²", "9" * 5000)),
    ],
)
def test_rows_that_do_not_fit_are_one_line(changes, row, tmp_path):
    """As a question, and as an example before another."""
    task = read_task(write_task(tmp_path / "t", **changes))
    good = {"question": "q", "A": "a", "answer": "A", "label": 0, "c": ["a"]}
    for docs, pool, shots in (([good | row], [], 0), ([good], [good | row], 1)):
        if shots and not isinstance(row.get("label", ""), (int, float)):
            continue  # the good row does not fit either, or a text may be an example's answer
        with pytest.raises(ValueError, match="exam.yaml: ") as error:
            build_questions(task, docs, pool, shots)
        assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_column_may_have_any_name(tmp_path):
    task = read_task(write_task(tmp_path / "t"))
    doc = {"question": "q", "A": "a", "answer": "B", "self": "x"}
    assert build_questions(task, [doc], [], 0)[0].gold == (1,)


@pytest.mark.parametrize("answers", [None, [], "abc", [1], 5])
def test_rows_without_references(answers):
    """Found before a model is asked."""
    task = INDEX.load("clue_cmrc")
    check_references(task, [{"answers": ["a"]}])
    with pytest.raises(ValueError, match="clue_cmrc: extraction_scores wants a list of texts"):
        check_references(task, [{"answers": ["a"]}, {"answers": answers}])


def test_a_group_of_tasks_with_other_metrics():
    """As the harness: the mean over those that have the metric."""
    group = TaskGroup("g", ("a", "b"), ("acc", "acc_norm"))
    results = []
    for name, rows, metrics in (("a", 4, {"acc": 1.0}), ("b", 4, {"acc": 0.0, "acc_norm": 0.5})):
        results.append(TaskResult(name, 0, rows, metrics, metrics, None, 1.0))
    lines = group_lines([group], lambda group: group.members, results)
    assert lines == [["g", "0", "8", "acc", "0.5000"], ["g", "0", "4", "acc_norm", "0.5000"]]


def test_an_answer_needs_a_token_before_it():
    pair = Continuation([1, 2, 3, 4, 5], 2)
    assert pair.cut(3, 0, 0) == Continuation([2, 3, 4, 5], 1)
    with pytest.raises(ValueError, match="--max_length 2: an answer alone needs 3 tokens"):
        pair.cut(2, 0, 0)


def test_includes_tags_and_groups(tmp_path):
    """Keys of the including file win; a tag is a group without metrics; groups hold groups."""
    values = {key: value for key, value in PLAIN.items() if key != "task"}
    (tmp_path / "base").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    for name in ("one", "two"):
        text = f"task: {name}\ninclude: base\ntag: both\ndescription: {name}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    inner = "group: inner\ntask: [both]\naggregate_metric_list:\n- {metric: acc}\n"
    (tmp_path / "inner.yaml").write_text(inner)
    (tmp_path / "outer.yaml").write_text("group: outer\ntask: [inner, one]\n")
    index = TaskIndex.of_folders([tmp_path])
    assert index.expand(["outer"]) == ["one", "two"]
    assert index.load("two").description == "two" and index.load("two").sampler == "first_n"
    groups = index.groups_of(["outer", "one"])
    assert [(group.name, group.metrics) for group in groups] == [
        ("outer", ()),
        ("inner", ("acc",)),
        ("both", ()),
    ]
    with pytest.raises(ValueError, match="--tasks: no task 'three'; there are both, inner, outer"):
        index.expand(["three"])


def test_places_of_a_hubs_data(tmp_path):
    """As C-Eval, CMMLU and a hub's clone lay it out; the folder of the data set comes first."""
    task = read_task(write_task(tmp_path / "tasks"))
    data = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="no rows of the split 'val' of owner/exams"):
        read_docs(task, "val", data)
    for place in ("pumps/val.jsonl", "val/pumps.csv", "val/pumps_val.csv", "exams/pumps/val.csv"):
        rows = exam_rows(len(place))
        write = write_lines if place.endswith("jsonl") else write_table
        write(data / place, rows)
        assert len(read_docs(task, "val", data)) == len(place)
    [first, *_] = build_questions(task, read_docs(task, "val", data), [], 0)
    assert first.contexts[0] == "关于水泵的题。\n\n第0题：水泵漏油先查什么？\nA. A0号答案\n答案："
    assert first.continuations[2] == " C" and first.gold == (0,)


def test_mmlus_own_tables(tmp_path):
    task = read_task(
        write_task(
            tmp_path / "tasks",
            dataset_path="cais/mmlu",
            doc_to_text="{{question}} {{choices[3]}}",
            doc_to_target="answer",
        )
    )
    rows = [{"q": "why", "a": "1", "b": "2", "c": "3", "d": "4", "answer": "C"}]
    file = write_table(tmp_path / "val" / "pumps_val.csv", rows, header=False)
    [doc] = read_docs(task, "val", tmp_path)
    assert doc == {"question": "why", "choices": ["1", "2", "3", "4"], "answer": 2}
    [question] = build_questions(task, [doc], [], 0)
    assert question.contexts[0].endswith("why 4") and question.gold == (2,)
    file.write_text('why,1,2,3,4,C\n"why,1\n')
    with pytest.raises(ValueError, match="pumps_val.csv:2: not valid CSV"):
        read_docs(task, "val", tmp_path)
    file.write_text("why,1,2,3,4,E\n")
    with pytest.raises(ValueError, match="pumps_val.csv:1: wanted question, four choices and"):
        read_docs(task, "val", tmp_path)


def test_shots(tmp_path):
    """Of a split apart, and of the scored split, where a row is no example of itself."""
    first = read_task(write_task(tmp_path / "a"))
    pool = exam_rows(5)
    drawn = random.Random(0)
    assert choose_shots(first, pool, pool[0], 2, drawn) == pool[:2]
    own = {"test_split": "val", "fewshot_split": "val", "validation_split": None}
    same = read_task(write_task(tmp_path / "b", **own))
    assert choose_shots(same, pool, pool[0], 2, drawn) == pool[1:3]
    with pytest.raises(ValueError, match="--shots 5, but its split val has 4 rows"):
        choose_shots(same, pool, pool[0], 5, drawn)
    drawing = read_task(write_task(tmp_path / "c", fewshot_config=None, **own))
    for _ in range(20):
        chosen = choose_shots(drawing, pool, pool[0], 4, drawn)
        assert sorted(row["id"] for row in chosen) == [1, 2, 3, 4]


def test_a_row_that_does_not_fit_its_template_is_named(tmp_path):
    task = read_task(write_task(tmp_path))
    with pytest.raises(ValueError, match="exam.yaml: the template .* does not fit the row"):
        build_questions(task, [{"question": "x"}], [], 0)
    with pytest.raises(ValueError, match="no choice is right in the row"):
        build_questions(task, [exam_rows(1)[0]], [], 0) and build_questions(
            read_task(write_task(tmp_path, doc_to_target="Z")), [exam_rows(1)[0]], [], 0
        )


def test_accuracies_by_hand(tmp_path):
    """-2, -3, -8 a choice of 1, 2 and 8 characters, the last of 24 bytes: per character and byte
    -2, -1.5, -1 and -2, -1.5, -1/3."""
    task = read_task(write_task(tmp_path, doc_to_choice=["a", "bb", "油" * 8]))
    [question] = build_questions(task, [exam_rows(3)[2]], [], 0)
    found = choice_metrics(question, [-2.0, -3.0, -8.0])
    assert found == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0}
    assert choice_metrics(question, [-2.0, -3.0, -2.0])["acc"] == 0.0  # of equals, the first


@pytest.mark.parametrize(
    "answer, reference, match, f1",
    [
        ("师傅", "师傅", 1, 1),
        ("一位师傅。", "师傅", 0, 4 / 6),
        ("师 傅", "师傅", 1, 1),
        ("Version 2.0", "version2.0", 0, 2 / 5),
        ("在1984年", "1984", 0, 2 / 4),
        ("师大傅", "师小傅", 0, 2 / 6),
        ("", "师傅", 0, 0),
    ],
)
def test_written_answers_by_hand(answer, reference, match, f1):
    """Characters of Chinese and runs of others; the longest common run, without gaps."""
    found = answers.extraction_scores({"answers": ["别的", reference]}, [answer])
    assert found["exact_match"] == match and found["f1"] == pytest.approx(f1)
