"""Feedback -> rows that train.py reads, and preference pairs."""

import json

import pytest

import train
from chatglm import load_tokenizer
from chatglm.families import FAMILIES
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import parse_row, refused_by
from serving.feedback.command import main
from serving.feedback.rows import latest_feedback, preference_pairs, training_rows
from tests.conftest import shared_file
from tests.serving.server.test_tools import CALLED, RESULT

HELLO = {"role": "user", "content": "你好"}
WEATHER = {"role": "user", "content": "天气？"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def said(text):
    return {"role": "assistant", "content": text}


def line(id, *messages, rating=None, correction=None, **more):
    fields = {"id": id, "time": 0.0, "model": "m", "messages": list(messages), "key": None}
    return fields | {"rating": rating, "correction": correction, "report": None} | more


LINES = [
    line("1", HELLO, said("好"), rating="down"),
    line("2", HELLO, said("您好"), rating="up"),
    line("3", HELLO, said("喂"), rating="down", correction="您好"),
    line("4", HELLO, said("好"), HELLO, said("又见面了"), rating="up", model="n"),
    line("5", WEATHER, CALLED, RESULT, said("晴"), rating="up", tools=[TOOL]),
    line("6", WEATHER, CALLED, RESULT, said("雨"), rating="down", tools=[TOOL]),
    line("7", WEATHER, CALLED, RESULT, said("雪"), correction="晴天", tools=[TOOL]),
    line("8", HELLO, said("走开"), rating="up"),
    line("8", HELLO, said("走开")),  # withdrawn
]


def test_rows():
    rows = training_rows(latest_feedback(LINES))
    texts = [row["messages"][-1]["content"] for row in rows]
    assert texts == ["您好", "又见面了", "晴", "晴天"]  # the corrected third is the second again
    assert rows[0] == {"messages": [HELLO, said("您好")]}
    assert rows[1]["messages"] == [HELLO, said("好") | {"weight": 0}, HELLO, said("又见面了")]
    assert rows[2] == {"messages": [WEATHER, CALLED, RESULT, said("晴")], "tools": [TOOL]}
    assert rows[3]["messages"][1] == CALLED | {"weight": 0}
    only = [len(training_rows(latest_feedback(LINES), which)) for which in ("up", "corrections")]
    assert only == [3, 2]


def test_the_last_of_an_id_counts():
    first = line("1", HELLO, said("a"), rating="up", time=5.0)
    later = line("1", HELLO, said("a"), rating="down", time=6.0)
    for lines in ([first, later], [later, first]):  # of two files
        assert [feedback.kind for feedback in latest_feedback(lines)] == ["down"]
    other_key = [first, later | {"key": "ann"}]
    assert [feedback.kind for feedback in latest_feedback(other_key)] == ["up", "down"]


def test_pairs():
    pairs = preference_pairs(latest_feedback(LINES))
    shown = [(pair["chosen"]["value"], pair["rejected"]["value"]) for pair in pairs]
    assert shown == [
        ("您好", "喂"),
        ("您好", "好"),
        ("晴", "雨"),
        ("晴", "雪"),
        ("晴天", "雨"),
        ("晴天", "雪"),
    ]
    assert pairs[0]["conversations"] == [{"from": "human", "value": "你好"}]
    called = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "x"}}'}
    asked = {"from": "human", "value": "天气？"}
    observed = {"from": "observation", "value": "sunny"}
    assert pairs[2]["conversations"] == [asked, called, observed]
    assert json.loads(pairs[2]["tools"]) == [TOOL]
    corrected = preference_pairs(latest_feedback(LINES), "corrections")
    assert [pair["chosen"]["value"] for pair in corrected] == ["晴天", "晴天"]
    both = [line("1", HELLO, said("a"), rating="up"), line("2", HELLO, said("a"), rating="down")]
    assert preference_pairs(latest_feedback(both)) == []


def test_pairs_have_the_form_of_published_ones():
    text = shared_file("data/preference/dpo_en_demo.jsonl").read_text(encoding="utf-8")
    published = json.loads(text.splitlines()[0])
    ours = preference_pairs(latest_feedback(LINES))[0]
    assert ours.keys() == published.keys()
    assert ours["chosen"].keys() == published["chosen"].keys()
    assert ours["conversations"][0].keys() == published["conversations"][0].keys()


def test_only_the_rated_answer_is_learnt(tiny_folders):
    """By the reader and the encoder of train.py."""
    rows = training_rows(latest_feedback(LINES))
    for family in ("glm3", "glm4"):
        tokenizer = load_tokenizer(tiny_folders[family])
        read = [parse_row(row, f"row:{i}") for i, row in enumerate(rows)]
        data = encode_rows(read, tokenizer, FAMILIES[family], max_len=600, max_src_len=300)
        learnt = []
        for number in range(4):
            labels = data.labels(number)
            if labels is None:
                labels = [-100] * data.n_masked(number) + data.ids(number).tolist()[
                    data.n_masked(number) :
                ]
            kept = [label for label in labels if label >= 0]
            learnt.append(tokenizer.decode(kept, skip_special_tokens=True))
        assert "又见面了" in learnt[1] and "好" not in learnt[1].replace("又见面了", "")
        assert "weather" in learnt[2] and "晴" in learnt[2]
        assert "weather" not in learnt[3] and "晴天" in learnt[3]
    told = refused_by(parse_row(rows[2], "row:2"), "glm2")
    assert told == "row:2: tool calls and observations need ChatGLM3 or GLM-4"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
    return path


def test_the_command_and_a_training_run(tiny_folders, tmp_path, capsys):
    """What a page's users said trains a model: the file goes through train.py as it is."""
    file = write_lines(tmp_path / "feedback.jsonl", LINES[:7])
    more = write_lines(tmp_path / "more.jsonl", LINES[7:])
    rows, pairs = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    words = [file, more, "--rows", rows, "--preferences", pairs]
    assert main([*map(str, words)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "9 lines about 8 answers: 3 up, 2 down, 2 corrected, 1 withdrawn",
        "  m: 2 up, 2 down, 2 corrected, 1 withdrawn",
        "  n: 1 up",
        f"{rows}: 4 training rows",
        f"{pairs}: 6 preference pairs",
    ]
    assert len(pairs.read_text(encoding="utf-8").splitlines()) == 6
    run = ["--train_path", rows, "--model_name_or_path", tiny_folders["glm3"], "--mode", "glm3"]
    run += ["--train_type", "lora", "--max_len", 400, "--max_src_len", 200]
    run += ["--output_dir", tmp_path / "out", "--num_train_epochs", 1]
    assert train.main([str(word) for word in run]) in (0, None)
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_lines_that_are_no_feedback_are_skipped(tmp_path, capsys):
    file = tmp_path / "feedback.jsonl"
    bad = ['{"id": "cut', "[]", '{"id": "1", "messages": []}']
    bad.append(json.dumps(line("2", HELLO, said("a"), rating="fine")))
    bad.append(json.dumps(line("3", HELLO, CALLED | {"tool_calls": [{}]}, said("a"))))
    file.write_text("\n".join([*bad, json.dumps(LINES[0])]), encoding="utf-8")
    assert main([str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 lines about 1 answers: 1 down\n")
    assert len(err.splitlines()) == 5 and f"{file}:1 is skipped: no JSON" in err
    file.write_text("\n".join(bad), encoding="utf-8")
    assert main([str(file)]) == 1
    assert "none of its 5 lines is feedback" in capsys.readouterr().err.splitlines()[-1]


def test_errors(tmp_path, capsys):
    file = write_lines(tmp_path / "feedback.jsonl", LINES[:1])
    rows = tmp_path / "rows.jsonl"
    for words, message in (
        ([tmp_path / "none.jsonl"], "none.jsonl: No such file"),
        ([file, "--rows", file], "is read, and cannot be written too"),
        ([file, "--rows", rows, "--preferences", rows], "are one file"),
        ([file, "--rows", rows], "is not written: there are no training rows"),
    ):
        assert main([*map(str, words)]) == 1
        [told] = capsys.readouterr().err.splitlines()
        assert told.startswith("serving.feedback: ") and message in told
    assert not rows.exists()


def test_without_outputs_it_counts(tmp_path, capsys):
    file = write_lines(tmp_path / "feedback.jsonl", [])
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == "0 lines about 0 answers: none\n"


@pytest.mark.parametrize("weight", [2, -1, True, "0"])
def test_weights_are_0_or_1(weight):
    row = {"messages": [HELLO, said("a") | {"weight": weight}]}
    with pytest.raises(ValueError, match='turn 2: "weight" must be 0 or 1'):
        parse_row(row, "row:1")
