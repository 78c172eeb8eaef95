"""Answers and their score: a prompt, a file, a conversation; batches change nothing; F1 by hand."""

import io
import json
import runpy
import shutil

import pytest
import torch

from chatglm import load_model, load_tokenizer
from chatglm.families import FAMILIES
from chatglm.loading import resolve_mode
from finetune.evaluation import evaluate, predict
from finetune.evaluation.metrics import triple_f1, triples
from tests.finetune.runs import ROOT, command, make_rows, write_rows

ASK = ["--device", "cpu", "--max_new_tokens", "6"]


@pytest.mark.parametrize(
    "answer, gold, f1",
    [
        ("a_b_c", "a_b_c", 1),
        ("a_b_c\nd_e_f", "a_b_c", 2 / 3),
        ("a_b_c", "a_b_c\nd_e_f", 2 / 3),
        ("x_y_z", "a_b_c", 0),
        ("", "a_b_c", 0),
        ("a_b_c\na_b_c", "a_b_c\na_b_c", 1),  # sets
        ("a_b_c_d", "a_b_c_d", 0),  # four parts are no triple
        (
            "a_b_c\nnot a triple",
            "a_b_c\nnot a triple",
            2 / 3,
        ),  # gold counts lines, the answer counts triples: p 1, r 1/2
        ("a_b_c\nd_e_f\ng_h_i", "a_b_c\nd_e_f\nx_y_z\nu_v_w", 4 / 7),  # p 2/3, r 1/2
        (" a_b_c", "a_b_c", 0),  # a line is compared as it is
    ],
)
def test_f1_by_hand(answer, gold, f1):
    assert triple_f1(answer, gold) == pytest.approx(f1)


def test_triples_are_lines_of_three_parts():
    assert triples("a_b_c\n\n__\na_b") == {"a_b_c", "__"}


def plain_answer(folder, prompt: str, count: int) -> str:
    """Greedy decoding without cache, padding or generate()."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    family = FAMILIES[tokenizer.family]
    ids = family.encode_prompt(tokenizer, prompt, 64).input_ids
    start, stops = len(ids), [tokenizer.get_command(t) for t in family.stop_tokens]
    with torch.no_grad():
        while len(ids) < start + count:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                ids.pop()
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize(
    "family, method",
    [
        ("glm", "lora"),
        ("glm2", "ptuning-v2"),
        ("glm3", "ptuning-v1"),
        ("glm2", "freeze"),
        ("glm3", "all"),
        ("glm", "ptuning-v2-mlp"),
    ],
)
def test_batches_answer_as_single_prompts(flags, train, tmp_path, capsys, family, method):
    """Every kind of export answers; a file in batches is a plain greedy loop over its rows."""
    folder = train(flags(tmp_path / "out", "--num_train_epochs", 4, family=family, method=method))
    rows = make_rows(5, seed=5) + [{"text": "油封松动。", "answer": ["a_b_c", "d"]}]
    file, out = write_rows(tmp_path / "rows.json", rows), tmp_path / "deep" / "answers.json"
    words = ["--model_path", str(folder), *ASK]
    assert (
        predict.main(
            [
                *words,
                "--file",
                str(file),
                "--output",
                str(out),
                "--batch_size",
                "4",
                "--prompt_text",
                "抽取：",
            ]
        )
        == 0
    )
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["reference"] for a in answers] == [[r["output"]] for r in rows[:-1]] + [
        ["a_b_c", "d"]
    ]
    assert [a["answer"] for a in answers] == [
        plain_answer(folder, a["prompt"], 6) for a in answers
    ] and answers[-1]["prompt"] == "抽取：油封松动。"
    assert len({a["answer"] for a in answers} | {"x"}) > 1
    capsys.readouterr()
    assert predict.main([*words, "--prompt", answers[0]["prompt"]]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == answers[0]["answer"]


def test_file_to_standard_output_and_evaluate(adapter, tmp_path, capsys):
    file, words = (
        write_rows(tmp_path / "rows.json", make_rows(3)),
        ["--model_path", str(adapter), *ASK],
    )
    assert predict.main([*words, "--file", str(file)]) == 0
    answers = [
        json.loads(line)["answer"]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("{")
    ]
    gold = write_rows(
        tmp_path / "gold.json",
        [row | {"output": a or "x"} for row, a in zip(make_rows(3), answers)],
    )
    for denominator, over in (("n", 3), ("50", 50)):
        out = tmp_path / f"{denominator}.json"
        assert (
            evaluate.main(
                [
                    *words,
                    "--test_path",
                    str(gold),
                    "--f1_denominator",
                    denominator,
                    "--output",
                    str(out),
                ]
            )
            == 0
        )
        score = json.loads(out.read_text())
        wanted = sum(triple_f1(a["answer"], a["gold"]) for a in score["answers"]) / over
        assert (
            score["f1"] == pytest.approx(wanted)
            and score["rows"] == 3
            and [a["answer"] for a in score["answers"]] == answers
        )
        assert f"over 3 rows (denominator {denominator})" in capsys.readouterr().out


def test_interactive(adapter, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("水泵漏油。\n\n轮胎异响。\n"))
    assert predict.main(["--model_path", str(adapter), *ASK, "--interactive"]) == 0
    monkeypatch.undo()
    out = capsys.readouterr().out
    assert out == "".join(
        plain_answer(adapter, prompt, 6) + "\n" for prompt in ("水泵漏油。", "轮胎异响。")
    )


@pytest.mark.launch
def test_old_command(adapter, tmp_path, capsys, monkeypatch):
    """predict.py from any folder: standard input through a pipe.

    Without flags the built-in example.
    """
    done = command(
        ROOT / "predict.py",
        "--model_path",
        adapter,
        "--mode",
        "glm2",
        *ASK,
        "--interactive",
        cwd=tmp_path,
        input="水泵漏油。\n",
    )
    assert done.stdout == plain_answer(adapter, "水泵漏油。", 6) + "\n"
    monkeypatch.setattr(
        "sys.argv", ["predict.py", "--model_path", str(adapter), "--do_sample", "False", *ASK]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "predict.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and out.startswith("prompt: 你现在是一个信息抽取模型")
        and len(out.splitlines()) >= 2
    )


def test_sampling_follows_its_seed(adapter, capsys):
    said = []
    for seed in ("1", "1", "2"):
        predict.main(
            [
                "--model_path",
                str(adapter),
                *ASK,
                "--prompt",
                "水泵漏油。",
                "--do_sample",
                "True",
                "--temperature",
                "2",
                "--top_p",
                "1",
                "--seed",
                seed,
            ]
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def bare_adapter(adapter, folder):
    """An adapter as peft alone saves it: of a base with a hub's name, without a tokenizer."""
    folder.mkdir()
    shutil.copy(adapter / "adapter_model.safetensors", folder)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "THUDM/chatglm2-6b"
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a5_the_base_gives_tokenizer_and_family(adapter, bases, tmp_path, capsys):
    folder = bare_adapter(adapter, tmp_path / "bare")
    base, ask = (
        ["--base_model", str(bases["glm2"])],
        [*ASK, "--max_src_len", "64", "--prompt", "水泵漏油。"],
    )
    capsys.readouterr()
    assert predict.main(["--model_path", str(adapter), *ask]) == 0
    answer = capsys.readouterr().out
    assert predict.main(["--model_path", str(folder), *base, *ask]) == 0
    assert capsys.readouterr().out == answer
    assert (
        evaluate.main(
            [
                "--model_path",
                str(folder),
                *base,
                *ASK,
                "--test_path",
                str(write_rows(tmp_path / "t.json", make_rows(1))),
            ]
        )
        == 0
    )
    # the base that is given tells the family, not the one that is named
    assert resolve_mode(folder, base=bases["glm3"]) == "glm3"
    assert (
        predict.main(
            ["--model_path", str(folder), "--base_model", str(bases["glm"]), "--mode", "glm2", *ask]
        )
        == 1
    )
    assert "the adapter's base model" in capsys.readouterr().err


def test_a5_the_server_takes_the_bases_tokenizer(adapter, bases, tmp_path):
    from serving.server.flags import parse_flags
    from serving.server.starting import load_service

    folder = bare_adapter(adapter, tmp_path / "bare")
    words = [
        "--model",
        folder,
        "--base_model",
        bases["glm2"],
        "--device",
        "cpu",
        "--policy",
        "fcfs",
        "--max_tokens",
        64,
    ]
    service = load_service(parse_flags([*map(str, words)]))
    assert (
        service.tokenizer.name_or_path == str(bases["glm2"]) and service.tokenizer.family == "glm2"
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "wanted an object"),
        ('{"max_src_len": "64"}', "whole number above 0"),
        ("{}", "got null"),
    ],
)
def test_a7_a_train_config_that_says_no_length_is_one_line(
    adapter, tmp_path, capsys, content, said
):
    folder = shutil.copytree(
        adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("trainer")
    )
    (folder / "train_config.json").write_text(content)
    for name in ("manifest.json", "checksums.json"):
        (folder / name).unlink(missing_ok=True)
    capsys.readouterr()
    assert predict.main(["--model_path", str(folder), *ASK, "--prompt", "x"]) == 1
    err = capsys.readouterr().err
    assert f"{folder / 'train_config.json'}: " in err and said in err


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model_path {tmp}/none --prompt x", "none"),
        ("--model_path {adapter} --file {tmp}/none.json", "none.json"),
        ("--model_path {adapter} --file {tmp}/bad.json", "bad.json:2"),
        ("--model_path {adapter} --prompt x --mode glm", "does not fit"),
        ("--model_path {adapter} --prompt x --base_model {tmp}/none", "none"),
        ("--model_path {tmp} --prompt x", "{tmp}"),
        ("--model_path {adapter} --prompt x --device nowhere", "nowhere"),
        ("--model_path {adapter} --prompt x --max_length 3", "max_length"),
        ("--model_path {adapter} --prompt x --max_src_len 2", "max_src_len"),
        ("--model_path {adapter} --prompt x --base_model {wide}", "{wide}"),
    ],
)
def test_errors_are_one_line(adapter, bases, tmp_path, capsys, words, said):
    write_rows(tmp_path / "bad.json", [make_rows(1)[0], {"output": "x"}])
    names = {"tmp": tmp_path, "adapter": adapter, "wide": bases["glm2-wide"]}
    capsys.readouterr()
    assert predict.main(["--device", "cpu", *words.format(**names).split()]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert (
        not out
        and len(lines) == 1
        and lines[0] == err.splitlines()[-1]
        and said.format(**names) in lines[0]
    )


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--prompt a --file b",
        "--do_sample maybe --prompt a",
        "--batch_size 0 --prompt a",
        "--max_new_tokens -1 --prompt a",
    ],
)
def test_wrong_flags(adapter, capsys, words):
    with pytest.raises(SystemExit) as stop:
        predict.main(["--model_path", str(adapter), *words.split()])
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_t12_an_adapter_and_its_merged_folder_sample_alike(adapter, bases, tmp_path, capsys):
    """The seed is set per batch: what loading draws, more for an adapter, changes no answer."""
    import merge_lora

    merged = tmp_path / "merged"
    assert (
        merge_lora.main(
            [
                "--ori_model_dir",
                str(bases["glm2"]),
                "--model_dir",
                str(adapter),
                "--save_dir",
                str(merged),
            ]
        )
        == 0
    )
    answers = []
    for folder in (adapter, merged):
        capsys.readouterr()
        words = [
            "--model_path",
            str(folder),
            "--prompt",
            "水泵",
            "--do_sample",
            "--seed",
            "7",
            "--max_new_tokens",
            "12",
            "--temperature",
            "2",
        ]
        assert predict.main([*words, "--top_p", "1"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_newcomers_an_adapter_loads_without_a_warning(adapter, recwarn):
    load_model(str(adapter))
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]
