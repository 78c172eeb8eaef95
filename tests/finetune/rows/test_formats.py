"""Every format: detected by its keys, read from samples and real files; only answers carry loss."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.format_table import learnt_answers, load_tokenizers, wanted_answers
from benchmarks.format_table import main as print_table
from chatglm import load_tokenizer
from chatglm.conversations import IGNORED, Turn
from chatglm.families import CHATGLM_FAMILIES, FAMILIES, RAW_FAMILIES
from finetune.rows.arrays import EncodedRow, dataset_of, join_datasets
from finetune.rows.batches import collate
from finetune.rows.encoding import RowEncoder
from finetune.rows.formats import (
    FORMATS,
    BadRow,
    Row,
    find_format,
    parse_columns,
    parse_row,
    refused_by,
    single_questions,
)
from finetune.rows.sources import RowReader, read_file_items, read_rows
from tests.conftest import shared_file
from tests.finetune.runs import ROOT, make_rows, metrics, rows_of, write_rows

SAMPLES = ROOT / "data" / "formats"


def sample(name: str) -> list[Row]:
    return read_rows(SAMPLES / f"{name}.jsonl")[0]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The real ChatGLM2 tokenizer, as ChatGLM3's too; ChatGLM-6B's layout on a stand-in."""
    shared_file("data/chatglm2-tokenizer/tokenizer.model")
    return load_tokenizers(shared_file("golden").parent, tmp_path_factory.mktemp("glm3"))


def check_labels(family, tokenizer, row):
    """The labelled ids are the answers', each encoded by itself, whatever stands around them."""
    encoder = RowEncoder(tokenizer, FAMILIES[family], 100_000, 90_000)
    wanted = [
        [i for text in texts for i in tokenizer.encode_text(text)]
        for texts in wanted_answers(family, row)
    ]
    assert learnt_answers(family, tokenizer, encoder.encode(row)) == wanted, row.place


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_contract(tokenizers, name, family):
    """Every format has a sample; its rows are detected as it, the same when named.

    Only their answers carry loss.
    """
    items = list(read_file_items(SAMPLES / f"{name}.jsonl"))
    assert len(items) == 3 and {find_format(item) for _, item in items} == {name}
    rows = sample(name)
    assert rows == read_rows(SAMPLES / f"{name}.jsonl", reader=RowReader(data_format=name))[0]
    for row in rows:
        if refused_by(row, family):
            assert family != "glm3" and any(turn.metadata for turn in row.turns)
            with pytest.raises(ValueError, match="need ChatGLM3"):
                RowEncoder(tokenizers[family], FAMILIES[family], 4000, 3000).encode(row)
        else:
            check_labels(family, tokenizers[family], row)
    for key in FORMATS[name].keys:
        broken = {k: v for k, v in items[0][1].items() if k != key}
        with pytest.raises(BadRow, match=r"f:1: no key"):
            parse_row(broken, "f:1", data_format=name)
        with pytest.raises(BadRow, match=r"^f:1: "):
            parse_row(items[0][1] | {key: 3}, "f:1")


def test_what_the_samples_say():
    """Hand-written: prompts and turns of every format's rows."""
    pump, seal = (
        ("水泵漏油怎么办？", "先检查油封，老化的油封要更换。"),
        ("油封多久换一次？", "一般六万公里检查一次，渗油就换。"),
    )
    assert [(r.prompt, r.answers[0], r.turns) for r in sample("belle")][:2] == [
        (*pump, ()),
        (*seal, ()),
    ]  # no space at the end
    assert [r.prompt for r in sample("context")][0] == f"Instruction: {pump[0]}\nAnswer: "
    assert sample("instruction")[0].prompt == "抽取部件：水泵漏油。" and sample("instruction")[
        1
    ].answers == ("",)
    assert sample("alpaca")[0].turns == (
        Turn("system", "你是一位修车师傅。"),
        Turn("user", pump[0]),
        Turn("assistant", pump[1]),
    )
    history = (Turn("user", pump[0]), Turn("assistant", pump[1], loss=False))
    assert sample("alpaca")[1].turns == (
        *history,
        Turn("user", seal[0] + "\n车是柴油车。"),
        Turn("assistant", seal[1]),
    )
    assert sample("prompt")[0].turns == () and sample("prompt")[1].turns == (
        *history,
        Turn("user", seal[0]),
        Turn("assistant", seal[1]),
    )
    talk = (
        Turn("user", pump[0]),
        Turn("assistant", pump[1]),
        Turn("user", seal[0]),
        Turn("assistant", seal[1]),
    )
    assert sample("sharegpt")[0].turns == talk and sample("openai")[0].turns == sample("chatglm3")[
        0
    ].turns == (Turn("system", "你是一位修车师傅。"), *talk)
    assert [turn.role for turn in sample("sharegpt")[1].turns] == [
        "system",
        "user",
        "assistant",
    ]  # thanks that nobody answers are left out
    assert [turn.loss for turn in sample("chatglm3")[1].turns] == [True, False, True, True]
    # the three ways to write a tool call are one
    tools = json.loads((SAMPLES / "chatglm3.jsonl").read_text().splitlines()[2])["tools"]
    call = [
        Turn(
            "assistant",
            "```python\ntool_call(city='青岛')\n```",
            "get_weather",
            call={"city": "青岛"},
        ),
        Turn("observation", '{"weather": "小雨", "temperature": 12}'),
        Turn("assistant", "青岛现在小雨，十二度，出门请带伞。"),
    ]
    system, asked = (
        Turn("system", "", tools=tools),
        Turn("user", "青岛天气怎么样？"),
    )
    assert sample("sharegpt")[2].turns == (system, asked, *call)
    assert (
        sample("openai")[2].turns[1:] == (asked, *call)
        and sample("openai")[2].turns[0].tools[0]["type"] == "function"
    )
    assert sample("chatglm3")[2].turns == (system, asked, Turn("assistant", "我来查一下。"), *call)


REAL = {  # file -> (rows, rows with several turns, format)
    "advertisegen.jsonl": (500, 0, "advertisegen"),
    "chatglm2_history_format.jsonl": (3, 2, "prompt"),
    "chatglm6b_data_sample.jsonl": (100, 0, "prompt"),
    "d2q_0.json": (3143, 0, "instruction"),
    "d2q_1.json": (20, 0, "instruction"),
    "spo_0.json": (1441, 0, "instruction"),
    "spo_1.json": (50, 0, "instruction"),
    "glaive_toolcall_en.jsonl": (300, 299, "sharegpt"),
    "glaive_toolcall_zh.jsonl": (300, 299, "sharegpt"),
    "reason_tool_use_50.jsonl": (50, 50, "openai"),
    "sharegpt_zh_multiturn.jsonl": (500, 309, "sharegpt"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(tokenizers, name):
    """All rows are read.

    In a random sample, each family's labels are exactly the answers, empty or not.
    """
    count, several, form = REAL[name]
    file = shared_file(f"data/finetune/{name}")
    rows, bad = read_rows(file)
    assert (len(rows), bad, sum(bool(row.turns) for row in rows)) == (count, 0, several)
    assert {find_format(item) for _, item in read_file_items(file)} == {form}
    drawn = (
        random.Random(0).sample(rows, min(12, count))
        + [row for row in rows if row.answers == ("",)][:3]
    )
    for row in drawn:
        for family in CHATGLM_FAMILIES:
            if not refused_by(row, family):
                check_labels(family, tokenizers[family], row.with_first_answer())


BAD = [
    ({"conversations": []}, "must be a list"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, '"from" is one of'),
    ({"conversations": [{"from": "human", "value": None}]}, '"value" must be text, got null'),
    ({"conversations": [{"from": "human", "value": "x"}]}, "no answer that carries loss"),
    (
        {
            "conversations": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "loss": False},
            ]
        },
        "no answer that carries loss",
    ),
    (
        {
            "conversations": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "loss": 1},
            ]
        },
        '"loss" must be true or false',
    ),
    (
        {
            "conversations": [
                {"role": "user", "content": "x"},
                {"role": "tool", "name": "f", "parameters": [1], "observation": ""},
            ]
        },
        '"parameters" of a tool turn',
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "function_call", "value": "f()"},
            ]
        },
        "must be JSON of name and arguments",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "function_call", "value": "[1]"},
            ]
        },
        "has a name and arguments",
    ),
    (
        {
            "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
            "tools": "[{",
        },
        '"tools" is not valid JSON',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
        "is text, reasoning or a tool_call",
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
        "no answer",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "user", "content": "y"},
                {"role": "assistant", "content": "z"},
            ]
        },
        "turn 2: user cannot follow user",
    ),
    ({"prompt": "x", "response": "y", "history": [["a"]]}, '"history" must be'),
    ({"prompt": "", "response": "y"}, "the prompt is empty"),
    ({"title": "x"}, 'no format has these keys: title; wanted "messages"'),
    ({"prompt": "x"}, 'no key "response"; a row with "prompt" has prompt, response'),
    ({"prompt": "x", "response": "y", "history": [["\ud800", "b"]]}, "half a surrogate pair"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 'turn 1: "role" is one of'),
    ({"conversations": [{"from": ["x"]}]}, 'turn 1: "from" is one of'),
    (
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
        'got {"type": ["text"]',
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": 5}]},
        '"tool_calls" must be a list, got 5',
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": True}]},
        '"tool_calls" must be a list, got true',
    ),
    (
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "tools": {1, 2},
        },
        '"tools" must be text or JSON, got',
    ),
    (
        {
            "conversations": [
                {"role": "user", "content": "x"},
                {"role": "tool", "name": "f", "parameters": {}, "observation": b"x"},
            ]
        },
        '"observation" must be text or',
    ),
    ({"prompt": "x", "answers": []}, '"answers" must be a list of {answer, score}, got []'),
    ({"prompt": "x", "answers": ["y"]}, '"answers" must be a list of {answer, score}'),
    ({"prompt": "x", "answers": [{"answer": "y", "score": "1"}]}, '"score" must be a number'),
    ({"prompt": "x", "answers": [{"score": 1}]}, '"answer" must be text, got null'),
    ({"prompt": "x", "answers": [{"answer": "", "score": 1}]}, "highest score is empty"),
    ({"prompt": "", "answers": [{"answer": "y"}], "prefix": "答："}, "the prompt is empty"),
    ({"prompt": "x", "answers": [{"answer": "y"}], "data_type": "gpt"}, "human_generated"),
    ({"text": " "}, '"text" is empty'),
    ({"text": "x", "answer": None}, '"answer" must be text, got null'),
    ({"text": "x", "label": 1}, 'no key "answer"'),
    ({"instruction": "x", "output": 120}, "hold the answers' lengths"),
    ({"input": {("a", "b"): 1}, "target": "x"}, "\"input\" must be text, got {('a', 'b')"),
]


@pytest.mark.parametrize("item, said", BAD, ids=[said[:30] for _, said in BAD])
def test_bad_rows_say_what_is_wrong(item, said):
    with pytest.raises(BadRow) as error:
        parse_row(item, "f:7")
    assert (
        str(error.value).startswith("f:7: ")
        and said in str(error.value)
        and "\n" not in str(error.value)
    )


def test_literals_are_json_values(tmp_path):
    """Belle's Python literals: what JSON has not is a bad row of one line, and can be skipped."""
    file = tmp_path / "rows.json"
    lines = ["{'input': 'a ', 'target': 'b'}"] + [
        f"{{'input': {value}, 'target': 'x'}}"
        for value in ("{('a', 'b'): 1}", "{1, 2}", "b'x'", "...")
    ]
    file.write_text(
        "\n".join(
            [
                *lines,
                "{'messages': [{'role': 'user', 'content': 'q'}, "
                "{'role': 'assistant', 'content': 'a'}], 'tools': {1}}",
            ]
        )
    )
    assert read_rows(file, on_bad_row="skip") == ([Row("a", ("b",), f"{file}:1")], 5)
    with pytest.raises(BadRow, match=r"^[^\n]*:2: not valid JSON: [^\n]*$"):
        read_rows(file)


def test_columns(tmp_path):
    columns = parse_columns("prompt=question, response=answer text,history=before")
    file = write_rows(
        tmp_path / "rows.json",
        [{"question": "q", "answer text": "a", "instruction": "not read"}, {"question": "q2"}],
    )
    reader = RowReader(columns=columns)
    with pytest.raises(BadRow) as error:
        read_rows(file, reader=reader)
    assert str(error.value) == (
        f'{file}:2: no column "answer text" (--columns response=answer text); the row has question'
    )
    rows, bad = read_rows(file, reader=reader, on_bad_row="skip")
    assert rows == [Row("q", ("a",), f"{file}:1")] and bad == 1
    for text in ("prompt", "prompt=", "=x", "nobody=x", "prompt=a,prompt=b"):
        with pytest.raises(ValueError, match=r"--columns wants NAME=COLUMN"):
            parse_columns(text)


def test_several_answers_in_a_batch():
    """Holes and replaced labels are in both layouts what the row says."""
    row = EncodedRow([1, 2, 3, 4, 5, 6, 7], 2, False, [IGNORED, IGNORED, 3, 99, IGNORED, 6, 7])
    plain = EncodedRow([8, 9, 10], 1, False)
    data = join_datasets([dataset_of([("a", plain)]), dataset_of([("b", row), ("c", plain)])])
    assert rows_of(data) == [
        ("a", [8, 9, 10], 1, None),
        ("b", row.input_ids, 2, row.labels),
        ("c", [8, 9, 10], 1, None),
    ]
    made = collate(data, [1, 0, -1])
    keep, targets = made["keep"].tolist(), made["targets"].tolist()
    assert [(k, t) for k, t in zip(keep, targets) if t != IGNORED] == [
        (1, 3),
        (2, 99),
        (4, 6),
        (5, 7),
        (6, 9),
        (7, 10),
    ]
    padded = collate(data, [1, 0, -1], ragged=False)
    assert padded["labels"].tolist() == [
        row.labels,
        [IGNORED, 9, 10] + [IGNORED] * 4,
        [IGNORED] * 7,
    ]


def test_training_on_conversations(flags, train, tmp_path, bases):
    """Losses are a plain loop's over the row's own labels."""
    import torch

    from chatglm import load_model

    words = flags(
        tmp_path / "out",
        "--train_path",
        SAMPLES / "sharegpt.jsonl",
        "--max_len",
        400,
        "--max_src_len",
        300,
        "--on_bad_row",
        "skip",
        "--max_steps",
        1,
    )
    train(words)
    tokenizer, model = load_tokenizer(bases["glm2"]), load_model(bases["glm2"], dtype=torch.float32)
    total = count = 0.0
    for row in sample("sharegpt")[:2]:
        (made,) = RowEncoder(tokenizer, FAMILIES["glm2"], 400, 300).encode(row)
        labels = torch.tensor(
            made.labels or [IGNORED] * made.n_masked + made.input_ids[made.n_masked :]
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([made.input_ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != IGNORED).sum())
    assert metrics(tmp_path / "out") == pytest.approx([total / count], rel=1e-5)


def test_the_best_of_scored_answers():
    answers = [row.answers for row in sample("scored")]
    assert answers[0] == ("先检查油封，老化的油封要更换。",)
    assert answers[1] == ("一般六万公里检查一次，渗油就换。",)  # the first of equal scores
    assert sample("scored")[1].prompt == "问题：油封多久换一次？答："
    row = {"prompt": "x", "answers": [{"answer": "y"}], "system": "s"}
    assert parse_row(row, "f:1").turns[0] == Turn("system", "s")


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_a_long_document_becomes_pieces(tokenizers, family):
    """All of the text is learnt once, in order, with one end token after the last piece."""
    tokenizer = tokenizers[family]
    text = "水泵漏油时，先检查油封。" * 5
    pieces = RowEncoder(tokenizer, FAMILIES[family], 16, 8).encode(Row("", (text,), "f:1"))
    assert len(pieces) > 1 and max(len(piece.input_ids) for piece in pieces) == 16
    start = 2  # two control tokens, of which ChatGLM-6B's <sop> is a label
    learnt = sum((piece.input_ids[start:] for piece in pieces), [])
    assert learnt[:-1] == tokenizer.encode_text(text)
    assert learnt[-1] == tokenizer.get_command(RAW_FAMILIES[family].end_token)
    assert {piece.n_masked for piece in pieces} == {start - (family == "glm")}
    with pytest.raises(ValueError, match="leaves no room for text"):
        RowEncoder(tokenizer, FAMILIES[family], 2, 1).encode(Row("", (text,), "f:1"))


def test_a_document_asks_nothing():
    with pytest.raises(ValueError, match="f:1: --test_path asks questions"):
        single_questions([Row("", ("text",), "f:1")], "--test_path")


def test_samples_are_our_own():
    """No row of the samples is in the public files."""
    ours = [line for file in SAMPLES.iterdir() for line in file.read_text().splitlines()]
    for name in REAL:
        theirs = Path(shared_file(f"data/finetune/{name}")).read_text()
        assert not any(line in theirs for line in ours)


def test_make_rows_are_instruction_rows():
    assert {find_format(row) for row in make_rows(2)} == {"instruction"}


def test_the_table_of_formats(tmp_path, monkeypatch, capsys):
    """Over the samples alone: every answer of every family that can say it is learnt exactly."""
    import benchmarks.format_table as table

    shared = tmp_path / "shared"
    (shared / "data" / "finetune").mkdir(parents=True)
    monkeypatch.setattr(
        table, "load_tokenizers", lambda *_: load_tokenizers(shared_file("golden").parent, tmp_path)
    )
    assert print_table(["--shared", str(shared), "--output", str(tmp_path / "table.json")]) == 0
    lines = json.loads((tmp_path / "table.json").read_text())
    assert [line["format"] for line in lines] == list(FORMATS) and len(
        capsys.readouterr().out.splitlines()
    ) == 4 + len(lines)
    for line in lines:
        for name in CHATGLM_FAMILIES:
            cell = line[name]
            assert cell["exact"] == cell["answers"] >= cell["encoded"] > 0
            assert cell["encoded"] == 3 - (
                not FAMILIES[name].roles and line["format"] in ("openai", "sharegpt", "chatglm3")
            )


def test_the_guide_shows_every_format():
    """docs/data.md has a row of each, under its name."""
    import re

    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\*\*(\w+)\*\*:.*?```json\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)
    assert {name for name, _ in shown} == FORMATS.keys() and len(shown) == len(FORMATS)
    for name, row in shown:
        read = parse_row(json.loads(row), "docs/data.md:1")
        assert find_format(json.loads(row)) == name
        assert bool(read.prompt) != read.is_document and read.is_document == (name == "document")


def test_names_of_parameters_are_pythons_for_chatglm3_alone():
    turns = [
        {"role": "user", "content": "x"},
        {"role": "tool", "name": "f", "parameters": {"a-b": 1}, "observation": ""},
        {"role": "assistant", "content": "y"},
    ]
    row = parse_row({"conversations": turns}, "f:1")
    assert refused_by(row, "glm4") is None and refused_by(row, "causal") is None
    assert "Python name, got 'a-b'" in refused_by(row, "glm3")
