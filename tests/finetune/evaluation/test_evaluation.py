"""python -m finetune.evaluate: tables of metrics, resumed answers, a probe around tuning."""

import argparse
import json
import math

import pytest
import torch

from chatglm import load_model, load_tokenizer
from chatglm.families import FAMILIES
from finetune.evaluation import answering, evaluate, predict
from finetune.evaluation.metrics import class_scores
from finetune.evaluation.probe import base_of
from tests.finetune.runs import make_rows, write_rows

ASK = ["--device", "cpu", "--max_new_tokens", "6"]


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.json", make_rows(5))


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_metrics_predictions_and_their_table(adapter, rows, tmp_path, capsys):
    """References that are the model's own answers are met exactly, a list of them too."""
    words, file = ["--model_path", str(adapter), *ASK], tmp_path / "deep" / "answers.jsonl"
    assert (
        evaluate.main(
            [
                *words,
                "--test_path",
                str(rows),
                "--metrics",
                "exact_match,f1",
                "--predictions",
                str(file),
            ]
        )
        == 0
    )
    found = lines_of(file)
    assert [line["reference"] for line in found] == [[row["output"]] for row in make_rows(5)]
    assert set(found[0]) == {"prompt", "answer", "reference", "scores"} and set(
        found[0]["scores"]
    ) == {"exact_match", "triple_f1"}
    assert sorted(p.name for p in file.parent.iterdir()) == [file.name]
    capsys.readouterr()
    gold = [
        row | {"output": [line["answer"], "x"] if i else "x"}
        for i, (row, line) in enumerate(zip(make_rows(5), found))
    ]
    out = tmp_path / "out.json"
    assert (
        evaluate.main(
            [
                *words,
                "--test_path",
                str(write_rows(tmp_path / "gold.json", gold)),
                "--metrics",
                "exact_match",
                "--output",
                str(out),
            ]
        )
        == 0
    )
    table = capsys.readouterr().out.splitlines()
    assert (
        table[0].split() == ["metric", "mean"]
        and table[1].split() == ["exact_match", "0.8000"]
        and table[2].startswith("over 5 rows")
    )
    assert json.loads(out.read_text())["metrics"] == {
        "exact_match": 0.8
    } and "f1" not in json.loads(out.read_text())


def test_classes(adapter, rows, tmp_path, capsys):
    """Two of five rows have the model's answers as labels, the others a class it never names."""
    words = ["--model_path", str(adapter), *ASK]
    file, out = tmp_path / "answers.jsonl", tmp_path / "out.json"
    assert evaluate.main([*words, "--test_path", str(rows), "--predictions", str(file)]) == 0
    answers = [line["answer"] for line in lines_of(file)]
    labels = [f"{answer}。" for answer in answers[:2]] + ["别类"] * 3
    gold = []
    for row, label in zip(make_rows(5), labels):
        gold.append(row | {"output": label})
    words += ["--test_path", str(write_rows(tmp_path / "gold.json", gold))]
    capsys.readouterr()
    assert evaluate.main([*words, "--metrics", "accuracy,macro_f1", "--output", str(out)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    classes = class_scores([[answer] for answer in answers], [[label] for label in labels])
    macro = sum(score.f1 for score in classes.values()) / len(classes)
    assert table[1:3] == [["accuracy", "0.4000"], ["macro_f1", f"{macro:.4f}"]]
    assert table[3] == ["class", "rows", "precision", "recall", "F1"]
    assert ["别类", "3", "0.0000", "0.0000", "0.0000"] in table
    assert json.loads(out.read_text())["classes"]["别类"]["rows"] == 3 and 0 < macro < 1


@pytest.mark.parametrize(
    "sample", [[], ["--do_sample", "True", "--num_answers", "2", "--temperature", "2"]]
)
def test_an_interrupted_command_goes_on(adapter, rows, tmp_path, capsys, monkeypatch, sample):
    """Finished answers are not generated again, a half-written line is; the result is the same.

    The same as an uninterrupted command's, sampled or greedy.
    """
    words = [
        "--model_path",
        str(adapter),
        *ASK,
        "--test_path",
        str(rows),
        "--metrics",
        "exact_match",
        "--batch_size",
        "2",
        *sample,
    ]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert evaluate.main([*words, "--predictions", str(whole)]) == 0
    add, batches = evaluate.KeptAnswers.add, []

    def stop_after_two(self, batch):
        add(self, batch)
        batches.append(batch)
        if len(batches) == 2:
            self.file.write('[7, "to')
            self.file.flush()
            raise OSError("the disk went away")

    monkeypatch.setattr(evaluate.KeptAnswers, "add", stop_after_two)
    assert evaluate.main([*words, "--predictions", str(cut)]) == 1 and not cut.exists()
    assert evaluate.main([*words, "--predictions", str(cut)]) == 0
    assert sorted(i for batch in batches for i in batch) == list(range(10 if sample else 5))
    assert cut.read_bytes() == whole.read_bytes() and "4 of" in capsys.readouterr().out


def test_kept_answers_of_another_command_are_not_used(adapter, rows, tmp_path, monkeypatch):
    words = [
        "--model_path",
        str(adapter),
        *ASK,
        "--test_path",
        str(rows),
        "--metrics",
        "exact_match",
    ]
    file = tmp_path / "answers.jsonl"
    kept = evaluate.KeptAnswers(file, {"another": "command"})
    kept.add({i: "wrong" for i in range(5)})
    kept.file.close()
    assert evaluate.main([*words, "--predictions", str(file)]) == 0
    assert all(line["answer"] != "wrong" for line in lines_of(file))


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "bf16"},
        {"quantization_bit": 4},
        {"keep_quantized": True},
        {"mode": "glm3"},
        {"prompt_style": "raw"},
    ],
)
def test_kept_answers_depend_on_how_the_model_is_loaded(tmp_path, changed):
    args = {
        "model_path": str(tmp_path),
        "base_model": None,
        "mode": None,
        "prompt_style": None,
        "precision": "fp32",
        "quantization_bit": None,
        "keep_quantized": False,
    }
    depends = [
        answering.dependencies(argparse.Namespace(**args | more), ["x"], {})
        for more in ({}, {}, changed)
    ]
    assert depends[0] == depends[1] != depends[2]


def test_several_files_and_columns(adapter, tmp_path):
    """Rows of other column names, of two files in their order."""
    files = [
        write_rows(
            tmp_path / f"{i}.json",
            [{"q": row["input"], "a": row["output"]} for row in make_rows(3)[i : i + 2]],
        )
        for i in range(2)
    ]
    more, out = (
        ["--columns", "prompt=q,response=a", "--data_format", "prompt"],
        tmp_path / "out.json",
    )
    wanted = [make_rows(3)[i]["input"] for i in (0, 1, 1, 2)]
    words = ["--model_path", str(adapter), *ASK, *more, "--output", str(out)]
    assert (
        evaluate.main([*words, "--test_path", f"{files[0]},{files[1]}", "--metrics", "exact_match"])
        == 0
    )
    assert [row["prompt"] for row in json.loads(out.read_text())["answers"]] == wanted
    assert predict.main([*words, "--file", f"{files[0]},{files[1]}"]) == 0
    assert [line["prompt"] for line in lines_of(out)] == wanted


def test_conversations_are_refused(adapter, rows, tmp_path, capsys):
    """Each row is asked alone, so one with a history has no place here."""
    talk = write_rows(
        tmp_path / "talk.json",
        [
            {"prompt": "q", "response": "a"},
            {"prompt": "q", "response": "a", "history": [["b", "c"]]},
        ],
    )
    for main, flag in (
        (evaluate.main, "--test_path"),
        (evaluate.main, "--probe"),
        (predict.main, "--file"),
    ):
        assert main(["--model_path", str(adapter), *ASK, flag, str(talk)]) == 1
        assert (
            capsys.readouterr()
            .err.splitlines()[-1]
            .endswith(f"{talk}:2: {flag} asks single questions, this row is a conversation")
        )
        assert main(["--model_path", str(adapter), *ASK, flag, f"{rows}:2"]) == 1
        assert f"{flag} takes no weights" in capsys.readouterr().err.splitlines()[-1]


def test_a_probe_of_rows_that_are_cut(adapter, tmp_path, capsys):
    """A truncated row keeps its loss at its own index.

    Limits without room for an answer are refused.
    """
    plain = make_rows(2)
    out, words = (
        tmp_path / "out.json",
        ["--model_path", str(adapter), "--device", "cpu", "--max_length", "64", "--probe"],
    )
    cut = plain[0] | {"output": plain[0]["output"] * 40}
    assert (
        evaluate.main(
            [*words, str(write_rows(tmp_path / "cut.json", [cut, plain[1]])), "--output", str(out)]
        )
        == 0
    )
    answers = json.loads(out.read_text())["answers"]
    assert len(answers) == 2 and answers[1]["loss_before"] == pytest.approx(
        loss_of(base_of(adapter, None), plain[1:]), rel=1e-5
    )
    capsys.readouterr()
    file = write_rows(tmp_path / "long.json", [plain[0], plain[1] | {"input": "水泵漏油" * 60}])
    assert evaluate.main([*words, str(file), "--max_src_len", "63"]) == 1
    assert "leaves no room for an answer" in capsys.readouterr().err.splitlines()[-1]


def test_several_answers_to_a_document(adapter, rows, tmp_path):
    pytest.importorskip("rouge_score")
    out = tmp_path / "out.json"
    words = [
        "--model_path",
        str(adapter),
        *ASK,
        "--test_path",
        str(rows),
        "--metrics",
        "d2q",
        "--output",
        str(out),
    ]
    assert (
        evaluate.main(
            [
                *words,
                "--do_sample",
                "True",
                "--temperature",
                "3",
                "--top_p",
                "1",
                "--num_answers",
                "3",
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert set(result["metrics"]) == {"rougeL", "bleu4", "coverage", "diversity"} and all(
        len(row["answer"]) == 3 for row in result["answers"]
    )
    assert result["metrics"]["diversity"] > 1 / 3


def loss_of(folder, rows: list[dict]) -> float:
    """Loss per token of the answers, one row at a time by transformers' own labels."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    family, total, count = FAMILIES[tokenizer.family], 0.0, 0
    for row in rows:
        example = family.encode_example(
            tokenizer, row["instruction"] + row["input"], row["output"], 2048, 1024
        )
        labelled = sum(label != -100 for label in example.labels)
        with torch.no_grad():
            total += labelled * float(
                model(
                    input_ids=torch.tensor([example.input_ids]),
                    labels=torch.tensor([example.labels]),
                ).loss
            )
        count += labelled
    return total / count


def test_probe_before_and_after(adapter, bases, rows, tmp_path, capsys):
    """The adapter names its base; the losses are those of both models.

    Training on the rows lowers them.
    """
    out = tmp_path / "probe.json"
    assert (
        evaluate.main(
            [
                "--model_path",
                str(adapter),
                *ASK,
                "--probe",
                str(rows),
                "--metrics",
                "triple_f1",
                "--output",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert result["base_model"] == str(bases["glm2"].resolve()) and result["rows"] == 5
    before, after = (result[side]["loss per token"] for side in ("before", "after"))
    assert before == pytest.approx(loss_of(bases["glm2"], make_rows(5)), rel=1e-5)
    assert after == pytest.approx(loss_of(adapter, make_rows(5)), rel=1e-5) and after < before
    assert set(result["answers"][0]) == {
        "prompt",
        "reference",
        "loss_before",
        "loss_after",
        "answer_before",
        "answer_after",
    }
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["5", "prompts", "before", "after", "change"]
    assert (
        table[1].split()[-1] == f"{after - before:+.4f}"
        and table[2].split()[0] == "triple_f1"
        and table[3].startswith("0 of 5 rows have a higher loss")
    )


@pytest.mark.parametrize("family, method", [("glm", "freeze"), ("glm3", "ptuning-v2")])
def test_a_checkpoint_of_any_method_knows_its_base(
    flags, train, bases, rows, tmp_path, family, method
):
    folder = train(flags(tmp_path / "out", "--max_steps", 1, family=family, method=method))
    assert base_of(folder, None) == bases[family].resolve()
    out = tmp_path / "probe.json"
    assert (
        evaluate.main(
            [
                "--model_path",
                str(folder),
                "--device",
                "cpu",
                "--probe",
                str(rows),
                "--output",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert (
        all(math.isfinite(result[side]["loss per token"]) for side in ("before", "after"))
        and "answer_before" not in result["answers"][0]
    )


@pytest.mark.parametrize(
    "words, said",
    [
        ("--test_path {rows} --metrics meteor", "no metric 'meteor'"),
        ("--probe {rows} --model_path {base}", "--base_model: {base} does not say"),
        ("--probe {rows} --base_model {tmp}/none", "{tmp}/none, which is not there"),
        ("--probe {tmp}/none.json", "none.json"),
    ],
)
def test_errors_are_one_line(adapter, bases, rows, tmp_path, capsys, words, said):
    names = {"rows": rows, "base": bases["glm2"], "tmp": tmp_path}
    assert (
        evaluate.main(
            ["--model_path", str(adapter), "--device", "cpu", *words.format(**names).split()]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert [said.format(**names) in line for line in err.splitlines() if "error: " in line] == [
        True
    ]


@pytest.mark.parametrize(
    "words",
    ["", "--test_path a --probe b", "--test_path a --num_answers 2", "--probe a --predictions b"],
)
def test_wrong_flags(adapter, capsys, words):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model_path", str(adapter), *words.split()])
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]
