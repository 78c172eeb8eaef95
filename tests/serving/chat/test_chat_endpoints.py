"""What answers: a model in this process and a server give the same; commands of a session."""

import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chatglm import load_model
from serving.chat.command import ChatFlags, build_parser
from serving.chat.conversation import Conversation, checked_messages, parse_setting
from serving.chat.screen import CONTROLS, Screen
from serving.chat.session import ChatSession, summary_line
from serving.endpoints.remote import RemoteServer, api_base, joined_pairs
from serving.endpoints.replies import AnswerRefused, ChatReply, EndpointDown, NumberedRequest
from serving.tools.samples import sample_registry
from tests.predictor import synthetic
from tests.serving.chat_models import Greedy, endless_copy, opened, said
from tests.serving.lora_folders import write_adapter
from tests.serving.server.test_server_faults import running, wait_for

SHORT = {"temperature": 0, "max_tokens": 6}


def chat_flags(argv) -> ChatFlags:
    return ChatFlags(**vars(build_parser().parse_args(argv)))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    return synthetic.train(folder, synthetic.make_rows(200, seed=1), landmarks=40)


@pytest.fixture(scope="module")
def adapter(tiny_folders, tmp_path_factory):
    model = load_model(tiny_folders["glm2"])
    folder = tmp_path_factory.mktemp("adapters") / "a"
    return write_adapter(folder, model, 3, ("query_key_value", "dense"))


@pytest.fixture(scope="module")
def local(tiny_folders, predictor, adapter):
    words = ("--device", "cpu", "--max_tokens", 300, "--predictor", predictor)
    model = opened(chat_flags, tiny_folders["glm2"], *words, "--adapter", f"a={adapter}")
    yield model
    model.close()


@pytest.fixture(scope="module")
def server(tiny_folders, predictor, adapter):
    words = ("--predictor", predictor, "--adapter", f"a={adapter}", "--max_tokens", 300)
    with running(tiny_folders["glm2"], *words, endless=False) as found:
        yield found


@pytest.fixture
def remote(server):
    endpoint = RemoteServer(server.root)
    yield endpoint
    endpoint.close()


def whole(endpoint, messages, **settings) -> ChatReply:
    stream = endpoint.ask({"messages": messages} | settings)
    text = "".join(stream)
    reply = stream.reply()
    assert reply.text == text
    return reply


def test_a_model_and_its_server_answer_alike(local, remote, server, tiny_folders):
    messages = said("你好", "a", "hello world")
    here, there = (whole(endpoint, messages, **SHORT) for endpoint in (local, remote))
    wanted = Greedy(tiny_folders["glm2"]).answer(messages, 6)
    assert here.text == there.text == wanted
    assert here.body["usage"] == there.body["usage"]
    assert here.predicted == there.predicted and set(here.predicted) == {
        "expected",
        "median",
        "q90",
    }
    assert here.finish_reason == there.finish_reason
    expected = f"predicted {here.predicted['expected']:.0f} (90 %: at most"
    assert expected in summary_line(here, 1.0)
    assert remote.models() == [server.service.name, "a"] and local.models()[1:] == ["a"]
    by_adapter = [whole(e, messages, model="a", **SHORT).text for e in (local, remote)]
    assert by_adapter[0] == by_adapter[1] != wanted


def test_the_prompt_is_the_servers(local):
    messages = [{"role": "system", "content": "a"}, *said("你好", "b", "世界")]
    stream = local.ask({"messages": messages} | SHORT)
    list(stream)
    assert stream.answer.prompt == Greedy(local.tokenizer.name_or_path).prompt(messages)


def test_refusals_are_one_line(local, remote):
    for endpoint in (local, remote):
        for body in ({"temperature": 9}, {"model": "other"}, {"messages": []}):
            with pytest.raises(AnswerRefused) as refusal:
                list(endpoint.ask({"messages": said("a")} | body))
            assert "\n" not in str(refusal.value)
        with pytest.raises(AnswerRefused, match="leaves no room for an answer within 300"):
            list(endpoint.ask({"messages": said("好" * 500)}))
        assert whole(endpoint, said("a"), **SHORT).text  # it goes on


def test_a_stop_string_ends_an_answer(local, tiny_folders):
    text = Greedy(tiny_folders["glm2"]).answer(said("你好"), 20)
    stop = text[3:5]
    reply = whole(local, said("你好"), temperature=0, max_tokens=20, stop=stop)
    assert reply.text == text[: text.index(stop)] and reply.finish_reason == "stop"
    wait_for(lambda: local.backend.count() == 0)


@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_with_tools_a_model_and_its_server_answer_alike(tiny_folders, family):
    """Texts, and calls whose own text is held back; a call that is stopped leaves none."""
    folder = tiny_folders[family]
    here = opened(chat_flags, folder, "--device", "cpu", "--max_tokens", 1024)
    clock = sample_registry().descriptions()[2:]
    body = {"messages": said("你好"), "tools": clock, "temperature": 0}
    body["max_tokens"] = 60
    with running(folder, endless=False) as found:
        there = RemoteServer(found.root)
        for choice in ("auto", "required"):
            replies = []
            for endpoint in (here, there):
                stream = endpoint.ask(body | {"tool_choice": choice})
                text = "".join(stream)
                replies.append(stream.reply())
                assert replies[-1].text == text
            first, second = replies
            assert first.text == second.text and first.finish_reason == second.finish_reason
            functions = []
            for reply in replies:
                calls = reply.message.get("tool_calls", [])
                functions.append([call["function"] for call in calls])
            assert functions[0] == functions[1]
            assert bool(functions[0]) == (choice == "required"), (first.body, second.body)
        there.close()
    stream = here.ask(body | {"tool_choice": "required"})
    stream.stop()
    assert list(stream) == [] and stream.reply().finish_reason == "cancelled"
    assert stream.reply().message == {"role": "assistant", "content": ""}
    here.close()


def test_a_stopped_answer_is_cancelled(tiny_folders, tmp_path):
    folder = endless_copy(tiny_folders["glm2"], tmp_path / "endless")
    with running(folder, endless=False) as found:
        model = opened(chat_flags, folder, "--device", "cpu", "--max_tokens", 1000)
        there = RemoteServer(found.root)
        backends = {model: model.backend, there: found.service.backend}
        for endpoint, backend in backends.items():
            stream = endpoint.ask({"messages": said("你好"), "temperature": 0})
            pieces = []
            for piece in stream:
                pieces.append(piece)
                if len(pieces) == 3:
                    stream.stop()
            assert stream.reply().finish_reason == "cancelled"
            assert stream.reply().text == "".join(pieces)
            wait_for(lambda backend=backend: backend.count() == 0)
            endpoint.close()


def session_of(endpoint, *lines) -> tuple[Conversation, str]:
    """The conversation after some lines, and what was written."""
    out = io.StringIO()
    screen = Screen(io.StringIO("".join(f"{line}\n" for line in lines)), out)
    conversation = Conversation(settings=dict(SHORT))
    ChatSession(endpoint, screen, conversation).run()
    return conversation, out.getvalue()


def test_commands(local, capsys):
    talk, out = session_of(local, "/set temperature=0.5", "/set top_p 0.9", "/set top_p")
    assert talk.settings == SHORT | {"temperature": 0.5} and not out
    talk, _ = session_of(local, "/set temperature 9", "/set nothing 1", "/wrong", "/retry", "/drop")
    assert talk.settings == SHORT and not talk.messages
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert "temperature must be a number" in errors[0] and "no setting 'nothing'" in errors[1]
    assert "no command /wrong" in errors[2]
    talk, _ = session_of(local, "你好", "/adapter a", "/retry")
    assert talk.model == "a" and len(talk.messages) == 2
    by_a = whole(local, said("你好"), model="a", **SHORT).text
    assert talk.messages[1]["content"] == by_a
    talk, out = session_of(local, "a", "b", "/drop", "//c")
    assert [m["content"] for m in talk.messages[::2]] == ["b", "/c"]
    answers = [m["content"] for m in talk.messages[1::2]]
    assert out.endswith("".join(f"{answer}\n" for answer in answers))


def test_an_adapter_is_loaded_while_talking(local, adapter, capsys):
    talk, _ = session_of(
        local, f"/adapter late={adapter}", "你好", "/model nobody", "/adapter x=no"
    )
    assert talk.model == "late" and talk.messages[1]["content"]
    first, second = capsys.readouterr().err.splitlines()
    assert "no model 'nobody'" in first and "no" in second


def test_a_failed_answer_takes_its_question_back(local, capsys):
    talk, _ = session_of(local, "你好", "好" * 500, "/edit " + "好" * 500)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[0]["content"] == "你好"
    assert capsys.readouterr().err.count("leaves no room") == 2


def test_a_seed_counts_up(local):
    talk, _ = session_of(local, "/set temperature 1.5", "/set seed 3", "你好", "/retry", "/retry")
    again, _ = session_of(local, "/set temperature 1.5", "/set seed 5", "你好")
    assert talk.messages == again.messages and talk.answered == 3


def test_files_of_messages(tmp_path):
    talk = Conversation(said("你好", "b"))
    talk.set_system("s")
    talk.save(tmp_path / "talk.json")
    other = Conversation()
    other.load(tmp_path / "talk.json")
    assert other.messages == talk.messages and other.system == "s"
    assert checked_messages(said("a"), "x") == said("a")
    for bad in ("[", '{"a": 1}', '[{"role": "robot", "content": "a"}]', '[{"role": "user"}]'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match="bad.json"):
            other.load(tmp_path / "bad.json")
    assert other.messages == talk.messages


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("temperature 0.7", ("temperature", 0.7)),
        ("temperature=0.7", ("temperature", 0.7)),
        ("max_new_tokens 5", ("max_tokens", 5)),
        ("stop 问：", ("stop", "问：")),
        ('stop ["a", "b"]', ("stop", ["a", "b"])),
        ("seed", ("seed", None)),
    ],
)
def test_settings(text, parsed):
    assert parse_setting(text.split()) == parsed


def test_controls_do_not_reach_the_terminal():
    text = "a\x1b]0;title\x07b\x9b31mc\u202ed\te\n世界"
    assert text.translate(CONTROLS) == "a�]0;title�b�31mc�d\te\n世界"


@pytest.mark.parametrize(
    "url, base",
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("http://h/x/v1/chat/completions", "http://h/x/v1"),
    ],
)
def test_addresses(url, base):
    assert api_base(url) == base


# ---- other servers


class OtherServer(BaseHTTPRequestHandler):
    """Answers with the lines of its class, as servers of other projects write them."""

    lines: list[str] = []
    kind = "text/event-stream"

    def do_GET(self):
        self.reply("application/json", json.dumps({"data": [{"id": "other"}]}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(self.kind, "".join(f"{line}\n\n" for line in self.lines))

    def reply(self, kind, text):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def other(request):
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = RemoteServer(f"http://127.0.0.1:{server.server_port}")
    yield endpoint
    endpoint.close()
    server.shutdown()
    server.server_close()


def chunk(text, **more) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}} | more]})


def test_halves_of_a_character_are_joined(other):
    """A chunk may end within a pair of UTF-16 halves."""
    OtherServer.lines = [
        ": ping",
        chunk("a\ud83d"),
        chunk("\ude00好"),
        chunk("", finish_reason="stop"),
    ]
    OtherServer.kind = "text/event-stream"
    stream = other.ask({"messages": said("a")})
    assert list(stream) == ["a", "😀好"]
    assert stream.reply().finish_reason == "stop" and stream.reply().output_tokens is None
    assert stream.reply().predicted == {}
    assert summary_line(stream.reply(), 1.0) == "[1.0 s]"
    assert joined_pairs("a\ud83d") == "a�"


def test_a_server_that_does_not_stream(other):
    body = {"choices": [{"message": {"content": "好"}, "finish_reason": "stop"}]}
    OtherServer.lines, OtherServer.kind = [json.dumps(body)], "application/json"
    assert whole(other, said("a")).text == "好"


def test_streams_that_break_off(other):
    OtherServer.kind = "text/event-stream"
    OtherServer.lines = [chunk("a")]
    with pytest.raises(EndpointDown, match="broke off"):
        list(other.ask({"messages": said("a")}))
    OtherServer.lines = [chunk("a"), 'data: {"error": {"message": "no\\nmore", "code": "x"}}']
    with pytest.raises(AnswerRefused, match="no more"):
        list(other.ask({"messages": said("a")}))
    OtherServer.lines = ["data: {"]
    with pytest.raises(AnswerRefused, match="no JSON"):
        list(other.ask({"messages": said("a")}))


def test_what_cannot_be_sent_is_refused_alone(other):
    """No answer is waited for, and a batch goes on."""
    OtherServer.lines = [json.dumps({"choices": [{"message": {"content": "好"}}], "usage": []})]
    OtherServer.kind = "application/json"
    rows = [said("a\ud800"), said("a")]
    for wrong in ({"messages": rows[0]}, {"messages": rows[1], "temperature": math.nan}):
        with pytest.raises(AnswerRefused, match="the request cannot be sent: "):
            other.ask(wrong)
    requests = [NumberedRequest(number, {"messages": row}) for number, row in enumerate(rows)]
    found = dict(other.replies(requests))
    assert isinstance(found[0], AnswerRefused) and found[1].text == "好"
    assert found[1].output_tokens is None


def test_chunks_of_other_kinds_end_the_answer(other):
    OtherServer.kind = "text/event-stream"
    OtherServer.lines = ["data: " + json.dumps({"choices": [{"delta": {"tool_calls": 5}}]})]
    with pytest.raises(EndpointDown, match="not iterable"):
        list(other.ask({"messages": said("a")}))


def test_calls_of_tools_come_in_parts(other):
    first = {"index": 0, "id": "c", "function": {"name": "clock", "arguments": '{"a"'}}
    second = {"index": 0, "function": {"arguments": ": 1}"}}
    lines = []
    for part in (first, second):
        lines.append("data: " + json.dumps({"choices": [{"delta": {"tool_calls": [part]}}]}))
    OtherServer.lines = [*lines, chunk("", finish_reason="tool_calls")]
    OtherServer.kind = "text/event-stream"
    message = whole(other, said("a")).message
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": '{"a": 1}'} and call["id"] == "c"
    assert message["content"] is None
