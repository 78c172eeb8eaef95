"""A conversation at a real terminal: history, stops, commands; and lines of a pipe."""

import io
import json
import re

import pytest

from serving.chat.command import main
from tests.causal_folders import make_causal_folder
from tests.finetune.runs import ROOT
from tests.serving.chat.terminal import CTRL_C, CTRL_D, Terminal
from tests.serving.chat_models import Greedy, endless_copy, said

CHAT = ("serving.chat", "--device", "cpu", "--temperature", "0")
COLOR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def endless(tiny_folders, tmp_path_factory):
    return endless_copy(tiny_folders["glm2"], tmp_path_factory.mktemp("endless") / "model")


def conversation(terminal, path) -> list[dict]:
    """The messages, by /save."""
    terminal.enter(f"/save {path}")
    terminal.until("saved in")
    terminal.until("> ")
    return json.loads(path.read_text())["messages"]


def test_a_session(tiny_folders, tmp_path):
    """The session of docs/chat.md, as far as a random model allows."""
    greedy, file = Greedy(tiny_folders["glm3"]), tmp_path / "talk.json"
    with Terminal(*CHAT, tiny_folders["glm3"], "--max_new_tokens", 10) as terminal:
        terminal.until(": /help lists the commands, /quit leaves")
        terminal.until("> ")
        terminal.enter("你好")
        terminal.until(" s; ")
        terminal.until("> ")
        terminal.enter("天气 很 \\")
        terminal.until("... ")
        terminal.enter("好")
        terminal.until("tokens/s")
        terminal.until("> ")
        first = conversation(terminal, file)
        assert [m["content"] for m in first[::2]] == ["你好", "天气 很 \n好"]
        # the second answer goes on from the first round
        assert first[1]["content"] == greedy.answer(first[:1], 10)
        assert first[3]["content"] == greedy.answer(first[:3], 10)
        assert first[3]["content"] != greedy.answer(first[2:3], 10)
        shown = COLOR.sub("", terminal.shown)
        assert "\x1b[1;32m> " in terminal.shown and "\x1b[2m[" in terminal.shown
        assert "[10 tokens; " in shown and "cut at the longest length" in shown

        terminal.enter('"""今天')
        terminal.until("... ")
        terminal.enter('世界"""')
        terminal.until("tokens/s")
        terminal.until("> ")
        terminal.enter("/system hello world")
        terminal.until("system: hello world")
        terminal.until("> ")
        terminal.enter("/retry")
        terminal.until("tokens/s")
        terminal.until("> ")
        third = conversation(terminal, file)
        assert third[0] == {"role": "system", "content": "hello world"}
        assert third[5]["content"] == "今天\n世界" and len(third) == 7
        assert third[6]["content"] == greedy.answer(third[:6], 10)

        terminal.enter("/clear")
        terminal.until("> ")
        assert conversation(terminal, tmp_path / "cleared.json") == third[:1]
        terminal.enter(f"/load {file}")
        terminal.until("7 messages")
        terminal.until("> ")
        terminal.enter("/edit 你好")
        terminal.until("tokens/s")
        terminal.until("> ")
        edited = conversation(terminal, file)
        assert edited[:5] == third[:5] and edited[5]["content"] == "你好"
        assert edited[6]["content"] == greedy.answer(edited[:6], 10)
        terminal.enter("/quit")
        assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(endless, tmp_path):
    words = (endless, "--max_tokens", 12000)
    with Terminal(*CHAT, *words, NO_COLOR="1") as terminal:
        terminal.until("> ")
        terminal.enter("你好")
        wait_for_text(terminal, 20)
        terminal.type(CTRL_C)
        terminal.until("; stopped]")
        terminal.until("> ")
        terminal.enter("/set max_tokens 3")
        terminal.until("> ")
        terminal.enter("hello")
        terminal.until("[3 tokens; ")
        terminal.until("> ")
        messages = conversation(terminal, tmp_path / "talk.json")
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2
        assert messages[1]["content"]
        answer = Greedy(endless).answer(messages[:3], 3)
        assert messages[3]["content"] == answer  # after what was said before the stop
        terminal.press(CTRL_C, "Ctrl-C again, or /quit, leaves")
        terminal.until("> ")
        assert terminal.end(CTRL_C) == 0
        assert not COLOR.search(terminal.shown)


def test_stop_is_typed_while_an_answer_is_written(endless):
    with Terminal(*CHAT, endless, "--max_tokens", 12000, NO_COLOR="1") as terminal:
        terminal.until("> ")
        terminal.enter("你好")
        wait_for_text(terminal, 20)
        terminal.enter("/set top_p 0.5")  # is read when the answer has ended
        terminal.enter("/stop")
        terminal.until("; stopped]")
        terminal.until("top_p 0.5")
        terminal.until("> ")
        terminal.enter("/stop")
        terminal.until("no answer is being made")
        terminal.until("> ")
        assert terminal.end(CTRL_D) == 0


def wait_for_text(terminal, characters: int):
    """Wait until an answer has so many characters more."""
    wanted = len(terminal.shown) + characters
    while len(terminal.shown) < wanted:
        assert terminal._read(0.2), terminal.shown


def test_a_second_ctrl_c_leaves_right_after_a_stopped_answer(endless):
    with Terminal(*CHAT, endless, "--max_tokens", 12000) as terminal:
        terminal.until("> ")
        terminal.enter("你好")
        wait_for_text(terminal, 10)
        terminal.type(CTRL_C)
        terminal.until("; stopped]")
        terminal.until("> ")
        assert terminal.end(CTRL_C) == 0
        assert "Traceback" not in terminal.shown


def test_predict_interactive_is_a_conversation_at_a_terminal(tiny_folders, tmp_path):
    greedy = Greedy(tiny_folders["glm2"])
    words = ("--model_path", tiny_folders["glm2"], "--device", "cpu", "--max_new_tokens", 8)
    with Terminal("finetune.predict", *words, "--interactive") as terminal:
        terminal.until("> ")
        for question in ("你好", "世界"):
            terminal.enter(question)
            terminal.until(" s")
            terminal.until("> ")
        messages = conversation(terminal, tmp_path / "talk.json")
        assert messages[3]["content"] == greedy.answer(messages[:3], 8)
        terminal.enter("/quit")
        assert terminal.end() == 0


def piped(monkeypatch, capsys, text, *words) -> tuple[int, str, str]:
    """(exit code, answers, errors) of lines in a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    capsys.readouterr()
    code = main([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("family", ["glm", "glm2", "glm4"])
def test_lines_of_a_pipe(tiny_folders, monkeypatch, capsys, family):
    """Each is a question of its own; with --history they are one conversation."""
    greedy = Greedy(tiny_folders[family])
    words = (tiny_folders[family], "--device", "cpu", "--temperature", 0, "--max_new_tokens", 6)
    lines = "你好\n\n/help\n"
    alone = [greedy.answer(said(text), 6) for text in ("你好", "/help")]
    code, out, _ = piped(monkeypatch, capsys, lines, *words)
    assert (code, out) == (0, f"{alone[0]}\n{alone[1]}\n")
    second = greedy.answer(said("你好", alone[0], "/help"), 6)
    code, out, _ = piped(monkeypatch, capsys, lines, *words, "--history")
    assert (code, out) == (0, f"{alone[0]}\n{second}\n")
    together = [{"role": "system", "content": "世界"}, *said("你好")]
    code, out, _ = piped(monkeypatch, capsys, "你好\n", *words, "--system", "世界")
    assert (code, out) == (0, f"{greedy.answer(together, 6)}\n")


def test_causal_models_answer_too(tmp_path, monkeypatch, capsys):
    folder = make_causal_folder(tmp_path, "llama")
    words = (folder, "--device", "cpu", "--temperature", 0, "--max_new_tokens", 5, "--history")
    code, out, _ = piped(monkeypatch, capsys, "你好\nhello\n", *words)
    greedy = Greedy(folder)
    first = greedy.answer(said("你好"), 5)
    second = greedy.answer(said("你好", first, "hello"), 5)
    assert (code, out) == (0, f"{first}\n{second}\n")


def test_a_long_line_of_a_pipe_does_not_end_the_others(tiny_folders, monkeypatch, capsys):
    words = (tiny_folders["glm2"], "--device", "cpu", "--temperature", 0, "--max_new_tokens", 4)
    text = f"{'好' * 300}\n你好\n"
    code, out, err = piped(monkeypatch, capsys, text, *words, "--max_tokens", 100)
    assert code == 1
    assert out == f"\n{Greedy(tiny_folders['glm2']).answer(said('你好'), 4)}\n"
    assert "serving.chat: error: the prompt has " in err and "(--max_tokens)" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "--api_key", "k"], "--api_key needs a server's URL"),
        (["http://127.0.0.1:9", "--adapter", "a=b"], "--adapter needs a model in this process"),
        (["http://127.0.0.1:9"], "http://127.0.0.1:9/v1: "),
        (["http://127.0.0.1:no/"], "http://127.0.0.1:no/"),
        (["{model}", "--device", "cpu", "--adapter", "a"], "--adapter must be NAME=DIR"),
        (["{model}", "--device", "cpu", "--load", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line(tiny_folders, capsys, monkeypatch, words, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    capsys.readouterr()
    try:
        code = main([word.format(model=tiny_folders["glm2"]) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2) and not out
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert message in line and line == err.splitlines()[-1]


def test_the_shown_session_is_the_documents():
    """docs/chat.md shows this command's lines."""
    text = ROOT / "docs" / "chat.md"
    if not text.exists():
        pytest.skip("docs/chat.md is not written yet")
    assert "/help lists the commands, /quit leaves" in text.read_text(encoding="utf-8")
