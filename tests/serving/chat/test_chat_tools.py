"""Tools in the terminal: calls shown, run, stopped and kept; images in files; from a pipe."""

import io
import json
import sys
import time
from pathlib import Path

import pytest

from chatglm import load_tokenizer
from chatglm.families import FAMILIES
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import parse_row
from serving.chat.command import main
from serving.chat.conversation import Conversation
from serving.chat.screen import Screen
from serving.chat.session import ChatSession
from serving.chat.tool_mode import LINE_CHARACTERS, ToolMode, shortened
from serving.endpoints.remote import RemoteServer
from serving.tools.flags import named_tools
from tests.finetune.runs import ROOT
from tests.serving.chat.scripted import called, scripted
from tests.serving.chat.terminal import CTRL_C, Terminal
from tests.serving.chat.test_chat_terminal import conversation
from tests.serving.server.test_server_faults import running

BEIJING = called("weather", {"city": "Beijing"}, "Let me look.")
SLOW = '''
import time
from pathlib import Path
from serving.tools.registry import ToolRegistry

tools = ToolRegistry()

@tools.tool
def dig(seconds: float) -> str:
    """Dig for some seconds."""
    Path(__file__).with_name("begun").touch()
    time.sleep(seconds)
    return "gold"
'''
FIGURES = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


@pytest.fixture
def slow_tools(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(SLOW)
    return file


def check_valid(messages):
    """Every call has its result right behind it, and a question or an answer follows these."""
    for place, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        results = messages[place + 1 : place + 1 + len(calls)]
        assert [r.get("tool_call_id") for r in results] == [call["id"] for call in calls]
        assert message["role"] != "tool" or messages[place - 1]["role"] in ("assistant", "tool")
    assert messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]


def roles(messages) -> list[str]:
    return [message["role"] for message in messages]


def test_a_session_with_tools(tmp_path):
    """The session of docs/chat.md."""
    answers = [BEIJING, "It is sunny, 21 degrees."]
    answers += [called("calculator", {"expression": "21 * 9 / 5 + "}), "70 F."]
    with scripted(*answers) as server:
        words = (server.url, "--tools", "samples")
        with Terminal("serving.chat", *words, NO_COLOR="1") as terminal:
            terminal.until("tools: weather, calculator, clock")
            terminal.until("> ")
            terminal.enter("How is the weather in Beijing?")
            shown = terminal.until("> ")
            wanted = [
                "Let me look.",
                '→ weather {"city": "Beijing"}',
                '← {"city": "Beijing", "temperature": 21, "unit": "celsius", "sky": "sunny", '
                '"humidity_percent": 30}',
                "It is sunny, 21 degrees.",
            ]
            assert shown.splitlines()[-6:-2] == wanted
            document = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
            assert "\n".join(wanted[1:3]) in document
            terminal.enter("In Fahrenheit?")
            shown = terminal.until("> ")
            assert '→ calculator {"expression": "21 * 9 / 5 + "}\n✗ calculator: ' in shown
            talk = conversation(terminal, tmp_path / "talk.json")
            check_valid(talk)
            round_of = ["user", "assistant", "tool", "assistant"]
            assert roles(talk) == round_of * 2
            assert talk[1]["content"] == "Let me look." and talk[3]["content"].endswith("degrees.")

            server.answers = ["Sorry."]
            terminal.enter("/retry")  # the whole round is asked anew
            terminal.until("Sorry.")
            terminal.until("> ")
            assert server.asked[-1]["messages"] == talk[:5]
            terminal.enter("/tools")
            listed = terminal.until("tools are on")
            assert "weather     The weather of a city today" in listed
            terminal.until("> ")
            terminal.enter("/tools off")
            terminal.until("tools are off")
            terminal.until("> ")
            terminal.enter("/edit And now?")
            terminal.until("Sorry.")
            terminal.until("> ")
            assert "tools" not in server.asked[-1] and "tools" in server.asked[0]
            terminal.enter("/tools maybe")
            terminal.until("wanted on or off")
            terminal.until("> ")
            terminal.enter("/drop")
            terminal.until("> ")
            assert roles(conversation(terminal, tmp_path / "last.json")) == ["user", "assistant"]
            terminal.enter("/quit")
            assert terminal.end() == 0


def test_a_saved_conversation_with_calls_is_a_training_row(tiny_folders, tmp_path):
    with scripted(BEIJING, "晴") as server:
        talk = session_of(server, "天气？", f"/save {tmp_path / 'talk.json'}")
    row = json.loads((tmp_path / "talk.json").read_text())
    assert [tool["function"]["name"] for tool in row["tools"]] == ["weather", "calculator", "clock"]
    for family in ("glm3", "glm4"):
        tokenizer = load_tokenizer(tiny_folders[family])
        rows = [parse_row(row, "talk.json")]
        data = encode_rows(rows, tokenizer, FAMILIES[family], max_len=3000, max_src_len=2000)
        text = tokenizer.decode(data.ids(0).tolist(), skip_special_tokens=True)
        assert "sunny" in text and "The value of an arithmetic" in text
    loaded = Conversation()
    loaded.load(tmp_path / "talk.json")
    assert loaded.messages == talk.messages and loaded.tools == row["tools"]
    loaded.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == row
    with scripted("Warm.") as server:  # and it goes on
        more = session_of(server, f"/load {tmp_path / 'talk.json'}", "And tomorrow?")
        assert server.asked[0]["messages"] == more.messages[:-1]
    check_valid(more.messages)


def session_of(server, *lines, settings=None) -> Conversation:
    """The conversation after some lines."""
    screen = Screen(io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO())
    talk = Conversation(settings=dict(settings or {}))
    endpoint = RemoteServer(server.url)
    mode = ToolMode(named_tools(["samples"]), screen)
    ChatSession(endpoint, screen, talk, mode).run()
    endpoint.close()
    return talk


def test_a_forced_call_is_forced_once():
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        with scripted(BEIJING, BEIJING, "Done.") as server:
            talk = session_of(server, "a", settings={"tool_choice": choice})
            choices = [body.get("tool_choice") for body in server.asked]
            assert choices == [choice, None, None]
            assert talk.messages[-1]["content"] == "Done."
    with scripted("No.") as server:
        session_of(server, "a", "/tools off", "b", settings={"tool_choice": "none"})
        assert [body.get("tool_choice") for body in server.asked] == ["none", None]


def test_a_model_that_only_calls_ends():
    with scripted(BEIJING) as server:
        talk = session_of(server, "a")
        assert len(server.asked) == 9 and "tools" not in server.asked[-1]
    check_valid(talk.messages)
    assert talk.messages[-1]["content"] == "Let me look."


def test_ctrl_c_stops_a_tool(slow_tools, tmp_path):
    call = called("dig", {"seconds": 600})
    call["calls"] += called("clock", {})["calls"]
    with scripted(call, "I go on.") as server:
        words = (server.url, "--tools", "samples", "--tools", slow_tools)
        with Terminal("serving.chat", *words, NO_COLOR="1") as terminal:
            for stop in (CTRL_C, "/stop\n"):
                terminal.until("> ")
                terminal.enter("Find gold.")
                terminal.until('→ dig {"seconds": 600}')
                while not (tmp_path / "begun").exists():
                    terminal._read(0.1)
                terminal.type(stop)
                terminal.until("✗ dig: stopped by the user")
                terminal.until("✗ not run: the user has stopped the answer")
                terminal.until("stopped]")
                (tmp_path / "begun").unlink()
                server.asked.clear()
            terminal.until("> ")
            server.answers = ["I go on."]
            terminal.enter("And now?")
            terminal.until("I go on.")
            terminal.until("> ")
            talk = conversation(terminal, tmp_path / "talk.json")
            check_valid(talk)
            assert roles(talk) == ["user", "assistant", "tool", "tool", "assistant"] * 2 + [
                "user",
                "assistant",
            ]
            assert talk[4] == {"role": "assistant", "content": ""}
            terminal.enter("/quit")
            assert terminal.end() == 0


def test_ctrl_c_between_calls_keeps_what_was_said(tmp_path):
    words = ("--tools", "samples")
    with (
        scripted(BEIJING, "x" * 2000) as server,
        Terminal("serving.chat", server.url, *words, NO_COLOR="1") as terminal,
    ):
        terminal.until("> ")
        server.piece_s = 0.02
        terminal.enter("a")
        terminal.until("xxx")
        terminal.type(CTRL_C)
        terminal.until("; stopped]")
        terminal.until("> ")
        talk = conversation(terminal, tmp_path / "talk.json")
        check_valid(talk)
        assert roles(talk) == ["user", "assistant", "tool", "assistant"]
        assert 3 <= talk[3]["content"].count("x") < 2000
        terminal.enter("/quit")
        assert terminal.end() == 0


def test_a_call_that_is_cut_by_a_stop_is_dropped():
    """Half of a call's arguments is no call."""
    with scripted(BEIJING) as server:
        endpoint = RemoteServer(server.url)
        screen = Screen(io.StringIO(), io.StringIO())
        mode = ToolMode(named_tools(["samples"]), screen)
        body = {"messages": [{"role": "user", "content": "a"}]}

        def ask(asked):
            stream = endpoint.ask(asked)
            list(stream)
            stream.stop()
            stream._gathered.finish_reason = None  # as before its last chunk
            return stream

        turn = mode.answering(ask)(body)
        turn.stop()
        assert list(turn) == [] and turn.reply().finish_reason == "cancelled"
        assert turn.reply().message == {"role": "assistant", "content": ""}
        turn = mode.answering(ask)(body)
        list(turn)
        assert turn.reply().message == {"role": "assistant", "content": "Let me look."}
        assert turn.reply().finish_reason == "cancelled" and len(body["messages"]) == 1
        endpoint.close()


def descendants(pid: int) -> set[int]:
    """The processes below one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found, left = set(), [pid]
    while left:
        below = children.get(left.pop(), [])
        found |= set(below)
        left += below
    return found


@pytest.mark.slow
def test_the_interpreter(has_sandbox, tmp_path):
    """Images become files, variables stay, /clear forgets them, and its process ends."""
    pytest.importorskip("matplotlib")
    codes = ["x = 41", FIGURES, "x + 1"]
    answers = [called("python", {"code": code}) for code in codes]
    images = tmp_path / "images"
    images.mkdir()
    (images / "image-1.png").write_bytes(b"mine")
    with scripted(*answers, "Done.") as server:
        words = (server.url, "--code_interpreter", "--images", images)
        # The interpreter's process is given a pipe, which forks of tests.warm are not.
        python = sys.executable
        with Terminal("serving.chat", *words, python=python, NO_COLOR="1") as terminal:
            terminal.until("tools: python")
            terminal.until("> ")
            terminal.enter("Draw.")
            terminal.until("← [Image]")
            terminal.until(f"image: {images}/image-2.png")
            terminal.until("← 42")
            terminal.until("> ")
            assert (images / "image-1.png").read_bytes() == b"mine"
            assert (images / "image-2.png").read_bytes().startswith(b"\x89PNG")
            server.answers = [called("python", {"code": "x"}), "Gone."]
            server.asked.clear()
            terminal.enter("/clear")
            terminal.until("> ")
            terminal.enter("x?")
            terminal.until("✗ Traceback")
            terminal.until("Gone.")
            terminal.until("> ")
            server.answers = [called("python", {"code": "import time; time.sleep(20)"})]
            server.asked.clear()
            terminal.enter("Sleep.")
            terminal.until("→ python")
            time.sleep(1.0)  # shown just before it begins; stopped in between, it is not run
            terminal.press(CTRL_C, "variables and files are lost")
            terminal.until("> ")
            server.answers = [called("python", {"code": "6 * 7"}), "Again."]
            server.asked.clear()
            terminal.enter("Go on.")
            terminal.until("← 42")
            terminal.until("> ")
            below = descendants(terminal.process.pid)
            assert len(below) >= 2  # python, and its interpreter
            terminal.enter("/quit")
            assert terminal.end() == 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in below)


@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_a_model_in_this_process(tiny_folders, tmp_path, family):
    """A random model whose first answer must be a call: its raw text is not shown."""
    words = ("--device", "cpu", "--max_new_tokens", 60, "--seed", 3, "--temperature", 1)
    words += ("--max_tokens", 4096)  # the tools alone are 2000 of such a tokenizer's
    folder = tiny_folders[family]
    with Terminal("serving.chat", folder, *words, "--tools", "samples", NO_COLOR="1") as terminal:
        terminal.until("> ")
        terminal.enter('/set tool_choice {"type":"function","function":{"name":"clock"}}')
        terminal.until("> ")
        terminal.enter("几点？")
        terminal.until("→ clock {", 120)
        terminal.until("> ", 120)
        talk = conversation(terminal, tmp_path / "talk.json")
        check_valid(talk)
        assert roles(talk)[:3] == ["user", "assistant", "tool"]
        assert "tool_call(" not in terminal.shown and "```" not in terminal.shown
        terminal.enter("/quit")
        assert terminal.end() == 0


def test_families_without_tools_are_refused(tiny_folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    assert main([str(tiny_folders["glm2"]), "--device", "cpu", "--tools", "samples"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("serving.chat: error: tools: ChatGLM2-6B knows no tools here")
    with running(tiny_folders["glm2"], endless=False) as server:
        monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
        capsys.readouterr()
        assert main([server.root, "--tools", "samples"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == ""  # after the line of the server
    assert "ChatGLM2-6B knows no tools here" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tools", "none.py"], "--tools none.py: none.py: no Python file"),
        (["--images", "x"], "--images needs --tools or --code_interpreter"),
    ],
)
def test_wrong_flags_are_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    try:
        code = main(["http://127.0.0.1:9", *words])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_from_a_pipe(monkeypatch, capsys):
    """The answers alone go to the standard output."""
    with scripted(BEIJING, "Sunny.", BEIJING, "Still sunny.") as server:
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
        assert main([server.url, "--tools", "samples"]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == ("Sunny.\nStill sunny.\n", "")
        assert [len(body["messages"]) for body in server.asked] == [1, 3, 1, 3]
        server.asked.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
        assert main([server.url, "--tools", "samples", "--history"]) == 0
        assert [len(body["messages"]) for body in server.asked] == [1, 3, 5, 7]
        assert capsys.readouterr().out == "Sunny.\nStill sunny.\n"


def test_images_of_a_pipe(has_sandbox, monkeypatch, capsys):
    """A new folder outside of this one, whose path is told beside the answers."""
    pytest.importorskip("matplotlib")
    codes = [called("python", {"code": FIGURES}), called("python", {"code": "plt"})]
    with scripted(codes[0], "Drawn.", codes[1], "Gone.") as server:
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
        assert main([server.url, "--code_interpreter"]) == 0
        out, err = capsys.readouterr()
        assert out == "Drawn.\nGone.\n"
        [line] = err.splitlines()
        path = Path(line.removeprefix("serving.chat: image: "))
        assert path.name == "image-1.png" and path.read_bytes().startswith(b"\x89PNG")
        assert path.parent != Path.cwd()
        path.unlink()
        path.parent.rmdir()
        told = server.asked[-1]["messages"][-1]["content"]
        assert "NameError" in told  # the second line has its own interpreter


def test_lines_are_short_and_harmless():
    assert shortened("a\n  b\x1b[2J") == "a b\x1b[2J"  # the screen takes these out
    assert len(shortened("好" * 500)) == LINE_CHARACTERS
