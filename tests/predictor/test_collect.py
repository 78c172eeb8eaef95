"""Lengths of a tiny model's answers: equal to predict's, resumed, refused where lines differ."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import TopPLogitsWarper

from chatglm import load_model, load_tokenizer
from finetune.evaluation import answering
from finetune.evaluation.generation import RowDraws, generate_answers
from finetune.placing import ReplicaSpec, StageSpec
from predictor.labels import name_warning, read_examples, served_name
from scripts.collect_lengths import main
from tests.warm import warm_python

WORDS = ["你好", "世界", "今天", "天气", "很", "好", "hello", "world", "a", "b", "c"]
PROMPTS = [" ".join((WORDS * 2)[n : n + 1 + n % 5]) for n in range(11)]
CAP = 12
SAMPLED = ["--do_sample", "--temperature", "0.9", "--top_p", "0.95", "--keep_answers"]


@pytest.fixture(scope="module")
def folder(tiny_folders, tmp_path_factory):
    """A model that ends some of its answers before the cap, greedy and sampled, and not others."""
    model = load_model(tiny_folders["glm2"], dtype=torch.float32)
    end = load_tokenizer(tiny_folders["glm2"]).get_command("</s>")
    with torch.no_grad():
        model.transformer.output_layer.weight[end] *= 1.5
    folder = tmp_path_factory.mktemp("made") / "served"
    model.save_pretrained(folder)
    load_tokenizer(tiny_folders["glm2"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": p} for p in PROMPTS[:6]] + [
        {"instruction": p[:1], "input": p[1:], "output": "x"} for p in PROMPTS[5:]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def collect(folder, prompts_file, tmp_path):
    """collect(*flags) -> (exit code, bytes of the output)."""

    def run(*more, output="lengths.jsonl", model=folder):
        words = [
            "--model_path",
            model,
            "--prompts",
            prompts_file,
            "--output",
            tmp_path / output,
            "--device",
            "cpu",
        ]
        code = main(
            [str(word) for word in [*words, "--max_new_tokens", CAP, "--batch_size", 4, *more]]
        )
        return code, (tmp_path / output).read_bytes() if (tmp_path / output).exists() else b""

    return run


def test_newcomer_6_a_checkpoint_is_named_with_its_run(collect, folder, tmp_path):
    """epoch-5-step-400 of two runs are two models.

    A name other than the served model's is reported.
    """
    checkpoint = tmp_path / "lora" / "epoch-5-step-400"
    shutil.copytree(folder, checkpoint)
    code, content = collect("--limit", 1, model=checkpoint)
    assert code == 0 and rows_of(content)[0]["served_model"] == "lora/epoch-5-step-400"
    assert (
        served_name(folder) == folder.name
        and name_warning("lora/epoch-5-step-400", checkpoint) is None
    )
    assert (
        "made for 'other/epoch-5-step-400', the model served is 'lora/epoch-5-step-400'"
        in name_warning("other/epoch-5-step-400", checkpoint)
    )


def rows_of(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def in_order(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (row["prompt"], row["sample"]))


def test_lengths_are_those_of_predict(collect, folder, tmp_path, capsys):
    code, content = collect("--keep_answers", "--served_model", "mine")
    rows = rows_of(content)
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    answers = generate_answers(
        model, tokenizer, [row["prompt"] for row in rows], batch_size=3, max_new_tokens=CAP
    )
    assert (
        code == 0
        and sorted(row["prompt"] for row in rows) == sorted({*PROMPTS})
        and [row["answer"] for row in rows] == answers
    )
    assert {row["finished"] for row in rows} == {True, False} and {
        row["output_tokens"] for row in rows if not row["finished"]
    } == {CAP}
    assert all(row["output_tokens"] < CAP for row in rows if row["finished"])
    assert {(row["sample"], row["served_model"], row["seed"]) for row in rows} == {
        (0, "mine", None)
    }
    cut = sum(not row["finished"] for row in rows)
    total = sum(row["output_tokens"] for row in rows)
    line = f"{len(rows)} answers of {total} tokens, {cut} cut at --max_new_tokens {CAP}"
    assert line in capsys.readouterr().out
    examples, _ = read_examples(tmp_path / "lengths.jsonl", served_model="x")
    assert [
        (e.prompt, e.labels[0].tokens, e.labels[0].finished, e.labels[0].served_model)
        for e in examples
    ] == [(row["prompt"], row["output_tokens"], row["finished"], "mine") for row in rows]


def test_finished_at_the_cap(collect):
    """An answer whose end token is the last that the cap allows is finished.

    One token less, not.
    """
    one = next(row for row in rows_of(collect()[1]) if row["finished"] and row["output_tokens"])
    n = one["output_tokens"]
    found = {}
    for cap in (n + 1, n):
        content = collect("--max_new_tokens", cap, output=f"{cap}.jsonl")[1]
        found[cap] = next(
            (r["output_tokens"], r["finished"])
            for r in rows_of(content)
            if r["prompt"] == one["prompt"]
        )
    assert found == {n + 1: (n, True), n: (n, False)}


@pytest.mark.parametrize("more", [[], [*SAMPLED, "--samples", "2"]], ids=["greedy", "sampled"])
def test_stopped_and_gone_on_with(collect, tmp_path, capsys, more):
    _, whole = collect(*more, output="whole.jsonl")
    lines = whole.splitlines(keepends=True)
    batch, torn = b"".join(lines[:4]), b"".join(lines[:6]) + lines[6][:-1]
    for start in (b"", batch, torn, lines[0][:7], whole):
        (tmp_path / "lengths.jsonl").write_bytes(start)
        capsys.readouterr()
        assert collect(*more) == (0, whole)
        there = start.count(b"\n")
        out = capsys.readouterr().out
        assert out.startswith(f"{len(lines) - there} answers of ") and (
            f"; {there} were there" in out
        ) == (there > 0)


def test_more_prompts_and_samples(collect):
    """A sample depends on seed, prompt and number: not on its batch, nor on what else is asked."""
    few = rows_of(collect(*SAMPLED, "--limit", 3)[1])
    rows = rows_of(collect(*SAMPLED, "--samples", 3, "--batch_size", 5)[1])
    assert rows[:3] == few and len(few) == 3
    assert len({(row["prompt"], row["sample"]) for row in rows}) == len(rows) == 3 * len({*PROMPTS})
    assert in_order(rows) == in_order(
        rows_of(collect(*SAMPLED, "--samples", 3, output="once.jsonl")[1])
    )
    other = rows_of(collect(*SAMPLED, "--samples", 3, "--seed", 5, output="other.jsonl")[1])
    said = [[row["answer"] for row in in_order(made)] for made in (rows, other)]
    assert sum(a != b for a, b in zip(*said)) > 20 and len({*said[0]}) > 20


def test_draws_follow_the_distribution():
    """20,000 rows of equal logits: frequencies are softmax at the temperature in the nucleus."""
    logits = torch.tensor([[2.0, 1.5, 0.0, -1.0, 0.7, -6.0]]).expand(20_000, -1)
    drawn = RowDraws(list(range(20_000)), 0.8, 0.9, "cpu")(None, logits).argmax(-1)
    wanted = TopPLogitsWarper(0.9)(None, logits[:1] / 0.8).softmax(-1)[0]
    assert (
        torch.allclose(torch.bincount(drawn, minlength=6) / 20_000, wanted, atol=0.012)
        and (wanted == 0).any()
    )


def test_adapter_folder(collect, folder, tmp_path):
    """A LoRA folder answers with its base, under its own name.

    It does not resume the base's lines.
    """
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(folder, dtype=torch.float32),
        LoraConfig(target_modules=["query_key_value"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    code, content = collect(model=tmp_path / "adapter")
    base = collect(output="base.jsonl")[1]
    assert code == 0 and {row["served_model"] for row in rows_of(content)} == {"adapter"}
    assert [row["output_tokens"] for row in rows_of(content)] != [
        row["output_tokens"] for row in rows_of(base)
    ]
    assert collect("--served_model", "served", model=tmp_path / "adapter", output="base.jsonl") == (
        1,
        base,
    )


@pytest.mark.parametrize(
    "more, said",
    [
        (["--max_new_tokens", "9"], "lengths.jsonl:1: made with max_new_tokens 12, now it is 9"),
        (["--max_src_len", "77"], "max_src_len 1024, now it is 77"),
        (["--served_model", "x"], "served_model 'served', now it is 'x'"),
        (["--do_sample"], "made with seed None, now it is 1234"),
        (["--prompt_style", "raw"], "made with prompt_style None, now it is 'raw'"),
        (["--model_path", "{glm3}"], "made with served_model"),
        (["--model_path", "{glm3}", "--served_model", "served"], "made with weights"),
    ],
)
def test_lines_of_other_settings_are_refused(collect, tiny_folders, capsys, more, said):
    _, content = collect("--limit", 2)
    capsys.readouterr()
    assert collect(*(word.format(**tiny_folders) for word in more)) == (1, content)
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("collect_lengths.py: error: --output ") and said in err[-1]


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "x", "output_tokens": 3}\n',
        b"text\n",
        b"text",
        b"[1]\n",
        b'{"prompt": "x"}\n{"prompt',
    ],
)
def test_a_file_of_somebody_else_is_left_alone(collect, tmp_path, capsys, content):
    (tmp_path / "lengths.jsonl").write_bytes(content)
    assert collect() == (1, content)
    assert "not a line of collect_lengths" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--prompts", "{tmp}/none"], "no such file"),
        (["--prompts", "{tmp}/bad"], "bad:1: no key"),
        (["--prompts", "{tmp}/empty"], "no rows"),
        (["--model_path", "{tmp}/none"], "no such model folder"),
        (["--max_src_len", "2"], "max_src_len"),
        (["--do_sample", "--temperature", "0"], "temperature"),
    ],
)
def test_errors_are_one_line(collect, tmp_path, capsys, more, said):
    (tmp_path / "bad").write_text('{"x": 1}\n')
    (tmp_path / "empty").write_text("")
    capsys.readouterr()
    code, content = collect(*(word.format(tmp=tmp_path) for word in more))
    assert (code, content) == (1, b"") and said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--samples", "2"], "the same answer 2 times"),
        (["--max_length", "9"], "say --max_new_tokens"),
        (["--limit", "0"], "a whole number from 1"),
    ],
)
def test_wrong_flags(collect, capsys, more, said):
    with pytest.raises(SystemExit) as stop:
        collect(*more)
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more", [[], [*SAMPLED, "--samples", "2"]], ids=["greedy", "sampled"])
def test_lines_of_two_replicas_are_those_of_one_process(collect, tmp_path, monkeypatch, more):
    """In any order; a stopped collection goes on, by more processes or fewer."""
    replicas = (ReplicaSpec((StageSpec("cpu", 0, 1, 1),)),) * 2
    plan = SimpleNamespace(replicas=replicas, stages=(), describe=lambda: "by hand")
    monkeypatch.setattr(answering, "plan_replicas", lambda *_, **__: plan)
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = rows_of(collect(*more, output="whole.jsonl")[1])
    # `collect` gives --device, of which a placement takes no notice where it is the default.
    placed = ["--device", "0", "--num_gpus", 2]
    code, content = collect(*more, *placed, output="placed.jsonl")
    assert code == 0 and in_order(rows_of(content)) == in_order(whole)
    lines = content.splitlines(keepends=True)
    (tmp_path / "lengths.jsonl").write_bytes(b"".join(lines[3:8]) + lines[0][:20])
    again = collect(*more, *placed)[1]
    assert again.startswith(b"".join(lines[3:8])) and in_order(rows_of(again)) == in_order(whole)
    (tmp_path / "lengths.jsonl").write_bytes(b"".join(lines[5:]))
    assert in_order(rows_of(collect(*more)[1])) == in_order(whole)
