"""scripts/prepare_clue.py: every form of download, and what is dropped or refused."""

import json

import pytest

from finetune.benchmark.questions import build_questions
from finetune.benchmark.tasks import CLUE, TaskIndex
from scripts import prepare_clue
from tests.conftest import shared_file
from tests.finetune.benchmark.miniature import (
    ROWS,
    prepared,
    sampled_rows,
    write_lines,
    write_sampled,
)

INDEX = TaskIndex.of_folders([CLUE])


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_one_file_a_task(tmp_path, capsys):
    """The first rows are examples and are not scored."""
    folder = prepared(tmp_path, shots=3)
    assert sorted(path.name for path in folder.iterdir()) == sorted(prepare_clue.PREPARED)
    for name in prepare_clue.PREPARED:
        train, test = (rows_of(folder / name / f"{split}.jsonl") for split in ("train", "test"))
        assert (len(train), len(test)) == (3, ROWS - 3)
        assert not [row for row in test if row in train]
    assert "afqmc: 3 examples, 5 rows" in capsys.readouterr().out


def test_rows_of_each_task(tmp_path):
    folder = prepared(tmp_path, shots=3)
    first = {name: rows_of(folder / name / "train.jsonl")[1] for name in prepare_clue.PREPARED}
    assert first["afqmc"] == {
        "sentence1": "水泵漏油怎么办1",
        "sentence2": "油封多久换一次7",
        "label": 1,
    }
    assert first["ocnli"]["label"] == 1 and first["csl"]["keywords"] == "水泵+油封1"
    assert first["wsc"] == {
        "marked": "水泵坏了，所以[它]停了1天。",
        "pronoun": "它",
        "noun": "水泵",
        "label": 1,
    }
    assert first["tnews"]["label"] == 1 and first["iflytek"]["label"] == 99
    for name, right in (("tnews", "文化"), ("iflytek", "银行")):
        four = first[name]["four"]
        assert len(set(four)) == 4 and four[first[name]["four_label"]] == right
    assert first["c3"]["context"].endswith("\n男：好。") and first["c3"]["label"] == 0
    assert first["cmrc"]["answers"] == ["师傅", "一位师傅"]
    assert (first["chid"]["before"], first["chid"]["after"]) == ("他1天里", "，终于修好了水泵。")
    assert first["eprstmt"]["label"] == 1
    assert prepare_clue.labels_of("csldcp")[first["csldcp"]["label"]] == "机械工程"


def test_training_rows(tmp_path):
    """A row is the text that is asked, and the right choice or written answer after it."""
    source, file = write_sampled(tmp_path / "in"), tmp_path / "rows.jsonl"
    prepare_clue.prepare(source, tmp_path / "out", 3, file)
    rows = rows_of(file)
    assert len(rows) == 3 * len(prepare_clue.PREPARED)
    by_task = dict(zip(prepare_clue.PREPARED, rows[1::3], strict=True))
    assert by_task["afqmc"] == {
        "instruction": "句子一：水泵漏油怎么办1\n句子二：油封多久换一次7\n上面两个句子语义",
        "output": "相同",
    }
    assert by_task["tnews"]["output"] == "文化" and by_task["cmrc"]["output"] == "师傅"
    assert by_task["chid"]["instruction"] == "文章：他1天里"
    assert by_task["chid"]["output"] == "画蛇添足，终于修好了水泵。"


def test_a_label_may_be_a_word_or_a_number(tmp_path):
    rows = [sampled_rows(i)["cluewsc"] | {"label": i % 2} for i in range(6)]
    write_lines(tmp_path / "cluewsc.jsonl", rows)
    prepare_clue.prepare(tmp_path, tmp_path / "out", 2)
    labels = [row["label"] for row in rows_of(tmp_path / "out" / "wsc" / "test.jsonl")]
    assert labels == [0, 1, 0, 1]


def test_a_bad_row_leaves_nothing_behind(tmp_path):
    """The other tasks are not written either."""
    source = write_sampled(tmp_path / "in")
    write_lines(source / "csldcp.jsonl", [{"content": "x", "label": "none"}] * 5)
    with pytest.raises(ValueError, match="csldcp.jsonl:1: not a row of this task"):
        prepare_clue.prepare(source, tmp_path / "out", 3, tmp_path / "rows.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_folders_as_clue_packs_them(tmp_path):
    """Nested C3 and CMRC, ChID with its answers in another file, OCNLI's rows without a label."""
    source = tmp_path / "clue"
    nli = sampled_rows(0)["ocnli"]
    write_lines(source / "ocnli_public" / "train.50k.json", [nli, nli | {"label": "-"}])
    write_lines(source / "ocnli_public" / "dev.json", [nli | {"label": "-"}, nli])
    c3 = [["甲", "乙"], [{"question": "谁？", "choice": ["丙", "丁"], "answer": "丁"}], "m-1"]
    for name in ("d-train", "m-train", "d-dev"):
        write_lines(source / "c3_public" / f"{name}.json", [[c3]])
    asked = {"question": "谁？", "answers": [{"text": "丁"}, {"text": "丁"}]}
    squad = {"data": [{"paragraphs": [{"context": "甲乙", "qas": [asked, asked]}]}]}
    for name in ("train", "dev"):
        write_lines(source / "cmrc2018_public" / f"{name}.json", [squad])
    texts = ["他#idiom01#地做，#idiom02#。", "没有空。"]
    blanks = {"content": texts, "candidates": ["画蛇添足", "守株待兔"]}
    for name in ("train", "dev"):
        file = write_lines(source / "chid" / f"{name}.json", [blanks])
        answers = {"#idiom01#": 1, "#idiom02#": 0}
        file.with_name(f"{name}_answer.json").write_text(json.dumps(answers))
    prepare_clue.prepare(source, tmp_path / "out", 16)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["c3", "chid", "cmrc", "ocnli"]
    assert len(rows_of(out / "ocnli" / "train.jsonl")) == 1
    assert len(rows_of(out / "c3" / "train.jsonl")) == 2
    assert rows_of(out / "c3" / "test.jsonl") == [
        {"context": "甲\n乙", "question": "谁？", "choices": ["丙", "丁"], "label": 1}
    ]
    assert (
        rows_of(out / "cmrc" / "test.jsonl")
        == [{"context": "甲乙", "question": "谁？", "answers": ["丁"]}] * 2
    )
    chid = rows_of(out / "chid" / "test.jsonl")
    assert [(row["before"], row["after"], row["label"]) for row in chid] == [
        ("他", "地做，画蛇添足。", 1),
        ("他守株待兔地做，", "。", 0),
    ]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("iflytek", {"label_des": "保险"}, "label 99 is 银行, not 保险"),
        ("eprstmt", {"label": "Neutral"}, "eprstmt.jsonl:1: not a row of this task"),
        ("cluewsc", {"text": "太短"}, "no '它' at 7"),
        ("cluewsc", {"label": "maybe"}, "not a row of this task: KeyError"),
        ("afqmc", {"label": 2}, "wanted a label from 0 to 1, got 2"),
        ("csl", {"keyword": "水泵"}, "wanted a list of texts, got '水泵'"),
        ("chid", {"answer": -1}, "wanted a label from 0 to 2, got -1"),
        ("iflytek", {"label": -1}, "wanted a label from 0 to 118, got -1"),
    ],
)
def test_a_row_that_is_another_tasks_is_named(tmp_path, name, change, words):
    write_lines(tmp_path / f"{name}.jsonl", [sampled_rows(0)[name] | change] * 9)
    with pytest.raises(ValueError, match=words):
        prepare_clue.prepare(tmp_path, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_refusals_are_one_line(tmp_path, capsys):
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert prepare_clue.main(words) == 1
    assert "no task's folder or file" in capsys.readouterr().err
    write_lines(tmp_path / "afqmc.jsonl", [sampled_rows(0)["afqmc"]] * 2)
    assert prepare_clue.main(words) == 1
    assert "wanted more than 16 rows, got 2" in capsys.readouterr().err


def test_the_real_rows(tmp_path):
    """Every one of CLUE's and FewCLUE's sampled rows fits its task file, with examples too."""
    prepare_clue.prepare(shared_file("data/clue"), tmp_path, 16)
    for name in INDEX.expand(["clue", "clue_legacy"]):
        task = INDEX.load(name)
        docs = rows_of(tmp_path / task.data_files["test"])
        pool = rows_of(tmp_path / task.data_files["train"])
        assert (len(docs), len(pool)) == (284, 16)
        questions = build_questions(task, docs[:40], pool, 1)
        shot = (
            questions[0]
            .contexts[0]
            .removesuffix(build_questions(task, docs[:1], pool, 0)[0].contexts[0])
        )
        for question in questions:
            assert question.contexts[0].startswith(shot) and len(shot) > 10
            assert len(question.gold) == (task.output_type == "multiple_choice")
