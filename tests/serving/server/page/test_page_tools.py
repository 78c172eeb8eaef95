"""The routes by which the page runs tools: over a real server, with a real sandbox."""

import base64
import threading

import httpx
import pytest

from serving.server.command import main
from serving.server.page.tools import AT_ONCE, PageTools
from serving.tools.flags import named_tools
from tests.serving.server.test_server_faults import running, wait_for

SLOW = '''
import time
from pathlib import Path
from serving.tools.registry import ToolRegistry

tools = ToolRegistry()

@tools.tool
def wait_for_file(path: str) -> str:
    """Wait until a file is there."""
    Path(path + ".begun").touch()
    while not Path(path).exists():
        time.sleep(0.02)
    return "it is there"
'''


@pytest.fixture(scope="module")
def server(tiny_folders, tmp_path_factory):
    file = tmp_path_factory.mktemp("tools") / "slow.py"
    file.write_text(SLOW)
    with running(tiny_folders["glm4"], "--tools", "samples", "--tools", file) as found:
        yield found


@pytest.fixture(scope="module")
def coding(tiny_folders, has_sandbox, tmp_path_factory):
    """A server with the interpreter and keys of two people."""
    from serving.server.keys import key_digest

    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"ann {key_digest(b'a')}\nbob {key_digest(b'b')}\n")
    with running(tiny_folders["glm4"], "--code_interpreter", "--api_keys", file) as found:
        yield found


def call(server, name, arguments, conversation="talk-1", **headers):
    body = {"conversation": conversation, "name": name, "arguments": arguments}
    url = f"{server.root}/page/api/tools/call"
    return httpx.post(url, json=body, headers=headers, timeout=60)


def test_a_call_has_its_result(server):
    reply = call(server, "calculator", '{"expression": "6 * 7"}')
    assert reply.status_code == 200
    assert reply.json() == {"text": "42", "images": [], "failed": False}
    names = [tool["function"]["name"] for tool in server.service.page_tools.descriptions()]
    assert names == ["weather", "calculator", "clock", "wait_for_file"]


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("nothing", "{}", "there is no tool 'nothing'"),
        ("python", '{"code": "1"}', "there is no tool 'python'"),
        ("calculator", "{broken", "the arguments are no JSON"),
        ("weather", '{"city": "Atlantis"}', "no city 'Atlantis'"),
        ("clock", '{"zone": 1}', "unknown argument zone"),
    ],
)
def test_a_wrong_call_is_a_result_that_the_model_reads(server, name, arguments, told):
    reply = call(server, name, arguments)
    assert reply.status_code == 200
    assert reply.json()["failed"] is True and told in reply.json()["text"]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"conversation": None}, "conversation must be text"),
        ({"conversation": "a/b"}, "1 to 64 letters, digits and -"),
        ({"conversation": ""}, "1 to 64 letters, digits and -"),
        ({"conversation": "a" * 65}, "at most 64 characters"),
        ({"name": 3}, "name must be text"),
        ({"arguments": {}}, "arguments must be text"),
        ({"arguments": "x" * 200_001}, "at most 200000 characters"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_a_wrong_body_is_refused(server, changes, told):
    body = {"conversation": "a", "name": "clock", "arguments": "{}"} | changes
    reply = httpx.post(f"{server.root}/page/api/tools/call", json=body)
    assert reply.status_code == 400 and told in reply.json()["error"]["message"]
    reply = httpx.post(f"{server.root}/page/api/tools/end", json={"conversation": "a/b"})
    assert reply.status_code == 400
    reply = httpx.post(f"{server.root}/page/api/tools/call", json=[1])
    assert reply.status_code == 400 and "must be a JSON object" in reply.text


def test_pages_of_other_sites_run_no_tools(server):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        reply = call(server, "clock", "{}", **{"Sec-Fetch-Site": site})
        assert reply.status_code == status
    text = httpx.post(f"{server.root}/page/api/tools/call", content="{}")
    assert text.status_code == 415  # else a form of another site could send it


def test_without_flags_there_are_no_routes(tiny_folders):
    with running(tiny_folders["glm2"]) as server:
        assert call(server, "clock", "{}").status_code == 405  # as of a file of the page
        assert server.service.page_tools is None and server.service.feedback is None


def test_so_many_calls_run_at_once(server, tmp_path):
    """One more is refused; when the others have ended there is room again."""
    replies = []

    def wait(path):
        replies.append(call(server, "wait_for_file", f'{{"path": "{path}"}}'))

    paths = [tmp_path / str(number) for number in range(AT_ONCE)]
    threads = [threading.Thread(target=wait, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for path in paths:
        wait_for(lambda path=path: path.with_name(f"{path.name}.begun").exists())
    busy = call(server, "clock", "{}")
    assert busy.status_code == 429 and int(busy.headers["Retry-After"]) > 0
    assert httpx.get(f"{server.root}/health").status_code == 200  # all else goes on
    for path in paths:
        path.touch()
    for thread in threads:
        thread.join(30)
    assert [reply.json()["text"] for reply in replies] == ["it is there"] * AT_ONCE
    wait_for(lambda: call(server, "clock", "{}").status_code == 200)


def test_a_call_that_takes_too_long_fails(server, tmp_path):
    tools = server.service.page_tools
    before, tools.call_s = tools.call_s, 0.3
    try:
        path = tmp_path / "never"
        reply = call(server, "wait_for_file", f'{{"path": "{path}"}}')
        assert reply.json() == {
            "text": "Error: wait_for_file took longer than 0.3 s",
            "images": [],
            "failed": True,
        }
        assert tools._running == 1  # its thread goes on, and is counted
        path.touch()
        wait_for(lambda: tools._running == 0)
    finally:
        tools.call_s = before


def run(server, code, key, conversation="talk"):
    from json import dumps

    headers = {"Authorization": f"Bearer {key}"}
    reply = call(server, "python", dumps({"code": code}), conversation, **headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_conversation_has_its_interpreter(coding):
    """Of a key and a name: nobody else's conversation has its variables."""
    assert run(coding, "x = 41", "a")["text"] == "(no output)"
    assert run(coding, "x + 1", "a")["text"] == "42"
    assert "NameError" in run(coding, "x", "b")["text"]
    assert "NameError" in run(coding, "x", "a", "other")["text"]
    url, headers = f"{coding.root}/page/api/tools/end", {"Authorization": "Bearer b"}
    assert httpx.post(url, json={"conversation": "talk"}, headers=headers).status_code == 200
    assert run(coding, "x + 1", "a")["text"] == "42"  # bob has ended his own
    headers["Authorization"] = "Bearer a"
    assert httpx.post(url, json={"conversation": "talk"}, headers=headers).status_code == 200
    assert "NameError" in run(coding, "x", "a")["text"]


def test_a_figure_is_an_image(coding):
    pytest.importorskip("matplotlib")
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    result = run(coding, code, "a", "figures")
    assert result["failed"] is False, result["text"]
    [image] = result["images"]
    assert base64.b64decode(image, validate=True).startswith(b"\x89PNG")


def test_the_routes_want_a_key(coding):
    assert call(coding, "python", '{"code": "1"}').status_code == 401
    assert httpx.post(f"{coding.root}/page/api/tools/end", json={}).status_code == 401


def test_a_running_conversation_is_not_ended_for_another(has_sandbox):
    """The pool ends the one that was used longest ago, of those that do not run."""
    tools = PageTools.open([], True)
    try:
        for name in "abcd":
            assert tools.run(name, "python", f'{{"code": "x = \'{name}\'"}}').text == "(no output)"
        slow = '{"code": "import time; time.sleep(3); x"}'
        ended = []
        busy = threading.Thread(target=lambda: ended.append(tools.run("a", "python", slow)))
        busy.start()
        wait_for(lambda: tools.pool._open["a"][0].is_busy)
        for name in "bcd":
            tools.run(name, "python", '{"code": "x"}')
        assert tools.run("e", "python", '{"code": "1 + 1"}').text == "2"
        assert busy.is_alive()
        busy.join(20)
        assert ended[0].text == "'a'"
        assert tools.run("a", "python", '{"code": "x"}').text == "'a'"
        assert list(tools.pool._open) == ["c", "d", "e", "a"]
    finally:
        tools.close()
    assert not tools.pool._open


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tools", "nowhere.py"], "--tools nowhere.py: nowhere.py: no Python file"),
        (["--tools", "{broken}"], "does not run: ZeroDivisionError"),
        (["--tools", "{same}"], "--tools samples: "),
        (["--tools", "{python}", "--code_interpreter"], "has a tool 'python' already"),
        (["--tools", "samples", "--model", "{glm2}"], "ChatGLM2-6B knows no tools here"),
        (["--feedback", "/nowhere/at/all.jsonl"], "/nowhere/at/all.jsonl"),
    ],
)
def test_errors_of_the_flags_are_one_line(tiny_folders, tmp_path, capsys, words, message):
    begin = "from serving.tools.registry import ToolRegistry\ntools = ToolRegistry()\n"
    function = '@tools.tool\ndef {}(code: str) -> str:\n    """Run."""\n    return code\n'
    files = {"broken": "1 / 0", "same": begin + function.format("clock")}
    files["python"] = begin + function.format("python")
    paths = {"glm2": tiny_folders["glm2"]}
    for name, text in files.items():
        paths[name] = tmp_path / f"{name}_tools.py"
        paths[name].write_text(text)
    given = [word.format(**paths) for word in words]
    if "same_tools" in given[-1]:
        given += ["--tools", "samples"]
    if "--model" not in given:
        given += ["--model", "nowhere"]
    capsys.readouterr()
    assert main(["--policy", "fcfs", "--port", "0", "--device", "cpu", *given]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("serving.server: error: ") and message in line


def test_no_sandbox_is_one_line_before_the_model_loads(monkeypatch, capsys):
    from serving.tools import interpreter

    monkeypatch.setattr(interpreter, "WAYS", ())  # a machine without any
    words = ["--policy", "fcfs", "--model", "nowhere", "--port", "0", "--code_interpreter"]
    assert main(words) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "--code_interpreter: the code interpreter cannot be locked in here" in line


def test_tools_are_named_once():
    assert len(named_tools(["samples", "samples"])) == 3
