"""Small requests that would cost a server its memory, its time or its other answers."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from chatglm import load_tokenizer
from serving.server.chat import parse_body
from serving.server.completions import parse_completion
from serving.server.json_bodies import Utf8Json, parse_json
from serving.server.responses import parse_response
from serving.server.structured import (
    MOST_MULTIPLE,
    check_schema_size,
    digits_of_number,
    entry_of,
    fenced_call,
    grammar_form,
    indented_size,
)
from serving.server.text_encoder import TextEncoder
from serving.server.tools import (
    TAG_TOKENS,
    CallWatch,
    begins_as_call,
    json_call_of,
    tool_call_of,
    written_calls,
)
from tests.serving.gateway.engines import wait_until
from tests.serving.server.test_server_faults import JSON, ask, error_of, running

ASKED = {"role": "user", "content": "x"}
QUICK_S = 0.5  # of CPU, for what took many seconds


def tool_of(parameters) -> dict:
    return {"type": "function", "function": {"name": "a", "parameters": parameters}}


def nested(depth: int, leaf=1):
    value = leaf
    for _ in range(depth):
        value = {"a": value}
    return value


def cpu_s(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# ---- prompts with log probabilities


def test_prompts_are_not_given_more_log_probabilities_than_memory_holds(tiny_folders, monkeypatch):
    monkeypatch.setattr("serving.server.completions.MOST_PROMPT_LOGPROBS", 60)
    body = {"prompt": [[5] * 4, [6] * 6], "max_tokens": 0, "echo": True, "logprobs": 2}
    tokenizer = load_tokenizer(tiny_folders["glm2"])
    assert len(parse_completion(body | {"n": 2}).encoded(tokenizer, {})) == 2
    with pytest.raises(ValueError, match="logprobs 2 of 30 prompt tokens: 90 log .* at most 60;"):
        parse_completion(body | {"n": 3}).encoded(tokenizer, {})
    assert parse_completion(body | {"n": 3, "echo": False, "max_tokens": 1}).encoded(tokenizer, {})


# ---- JSON that comes and goes


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400 + ".0"])
def test_numbers_beyond_a_double_are_no_json(number):
    with pytest.raises(ValueError, match="not valid JSON: .* beyond the range"):
        parse_json(bytearray(f'{{"metadata": {{"a": [{number}]}}}}'.encode()))
    assert parse_json(bytearray(b"[1e308, -0.0, 1e-999]")) == [1e308, 0.0, 0.0]


def test_a_reply_holds_any_text():
    assert Utf8Json({"a": "你"}).body == '{"a":"你"}'.encode()
    assert json.loads(Utf8Json({"a": "\ud800你"}).body) == {"a": "\ud800你"}


def test_a_response_repeats_what_it_can():
    body = {"input": "x", "metadata": nested(60)}
    assert parse_response(body).echoed["metadata"] == nested(60)
    with pytest.raises(ValueError, match="metadata is nested deeper than 64"):
        parse_response({"input": "x", "metadata": nested(900)})


def test_what_json_cannot_say_is_no_server_error(tiny_folders, tmp_path):
    kept = tmp_path / "feedback.jsonl"
    with running(tiny_folders["glm2"], "--feedback", kept) as server:

        def post(path, text):
            return httpx.post(f"{server.root}{path}", content=text, headers=JSON, timeout=60)

        asked = '{"input": "x", "max_output_tokens": 2, "metadata": {"a": %s}}'
        reply = post("/v1/responses", asked % r'"\ud800"')
        assert reply.status_code == 200 and reply.json()["metadata"] == {"a": "\ud800"}
        error_of(post("/v1/responses", asked % "1e999"), 400)
        said = {"id": "1", "model": "m", "rating": "up", "report": {"a": "\ud800"}}
        said["messages"] = [ASKED | {"name": "\udc80"}, {"role": "assistant", "content": "y"}]
        assert post("/page/api/feedback", json.dumps(said)).status_code == 200
    [line] = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    assert line["report"] == {"a": "\ud800"}


# ---- prompts


def test_nested_tools_and_calls_are_refused():
    with pytest.raises(ValueError, match=r"tools\[0\] is nested deeper than 64 levels"):
        parse_body({"messages": [ASKED], "tools": [tool_of(nested(100))]})
    for arguments in (nested(100), json.dumps(nested(100))):
        call = {"function": {"name": "a", "arguments": arguments}}
        answered = {"role": "assistant", "tool_calls": [call]}
        with pytest.raises(ValueError, match=r"tool_calls\[0\].function.arguments is nested"):
            parse_body({"messages": [ASKED, answered, ASKED]})


def test_a_prompts_size_counts_how_tools_are_written():
    """GLM-4 is shown them over several lines: 2 MB deep down would become gigabytes of spaces."""
    wide = tool_of(nested(50, [1] * 2000))
    written = json.dumps(wide, indent=4)
    assert len(written) <= indented_size(wide) <= 1.1 * len(written)
    call = {"function": {"name": "a", "arguments": {"text": "y" * 500}}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}, ASKED]
    asked = parse_body({"messages": messages, "tools": [wide]})
    count, characters = asked.sizes()
    assert count == 3 and characters > len(written) + 500


def test_a_long_name_of_a_token_is_one_line():
    for name in ("1" * 5000, "12345678901", str(2**31)):
        with pytest.raises(ValueError, match="logit_bias must name tokens by ids"):
            parse_body({"messages": [ASKED], "logit_bias": {name: 1}})


# ---- grammars


def test_multiples_are_bounded():
    """llguidance takes some 400 bytes for each remainder: of 10^9 all memory there is."""
    assert [digits_of_number(n) for n in (0, 7, 200_000, 0.01, 12.5)] == [1, 7, 2, 1, 125]
    fine = {"properties": {"a": {"multipleOf": 0.01}, "multipleOf": {"multipleOf": 60}}}
    check_schema_size("x", fine)
    check_schema_size("x", {"multipleOf": MOST_MULTIPLE - 1})
    check_schema_size("x", {"multipleOf": True})  # llguidance's to refuse
    for costly in (
        {"multipleOf": 10**9 + 7},
        {"multipleOf": 123456.5},
        {"multipleOf": 10**400 + 1},
        {"items": [{"anyOf": [{"multipleOf": 499}, {"multipleOf": 503}]}]},
    ):
        with pytest.raises(ValueError, match="x: the least common multiple"):
            check_schema_size("x", costly)
        with pytest.raises(ValueError, match="g: the schema after %json: the least"):
            grammar_form("g", f'start: "a" %json\n{json.dumps(costly)}')
    with pytest.raises(ValueError, match="g: what follows %json must be a JSON schema"):
        grammar_form("g", 'start: %json {"type": ')


def test_empty_lines_of_a_grammar_cost_nothing():
    pytest.importorskip("llguidance")
    form = grammar_form("g", 'root ::= "a"' + "\n" * 20_000)
    found = []
    assert cpu_s(lambda: found.append(entry_of(form))) < QUICK_S
    assert 'start: "a"' in found[0]["lark_grammar"]
    for lark in ('  start : "a"', '%llguidance {}\nstart: "a"', '\n\nstart\n: "a"'):
        assert entry_of(grammar_form("g", lark)) == {"lark_grammar": lark}


def test_required_names_must_be_a_list():
    shape = SimpleNamespace(space="", header="")
    function = tool_of({"properties": {"a": {}}, "required": 5})["function"]
    with pytest.raises(ValueError, match=r"tools\[0\].function.parameters.required must be a list"):
        fenced_call(shape, 0, function, [], [])


# ---- calls that models write


@pytest.mark.parametrize("text", ["<tool_call>" + " " * 5000 + "x", "<tool_call>" * 5000])
def test_unclosed_calls_cost_nothing(text):
    assert cpu_s(lambda: written_calls(text, [tool_of({})])) < QUICK_S
    assert written_calls(text, [tool_of({})]) == (text, [])


def test_calls_between_tags():
    call = '<tool_call>\n {"name": "a", "arguments": {}} \n</tool_call>'
    text, calls = written_calls(
        f"1{call}2<tool_call>no</tool_call>3{call}<tool_call>", [tool_of({})]
    )
    assert text == "12<tool_call>no</tool_call>3<tool_call>" and len(calls) == 2


@pytest.mark.parametrize("name", ['["a"]', '{"a": 1}', "null", "1"])
def test_a_name_that_is_no_text_is_no_call(name):
    assert json_call_of(f'{{"name": {name}, "arguments": {{}}}}', {"a"}) is None


def test_arguments_that_json_does_not_have_are_no_call():
    for arguments in ({(1, 2): 3}, {"a": float("inf")}, {"a": nested(100_000)}):
        assert tool_call_of("a", arguments) is None
    found = tool_call_of("a", {"a": {1}})
    assert found["function"]["arguments"] == '{"a": "{1}"}'


@pytest.mark.parametrize(
    "text",
    [
        "a long answer { with <tool marks> " * 20,
        "  \n {" + '"name": 1' * 20,
        "first a text " * 9 + "<tool_call>{} and more",
        "x<tool_cal",
    ],
)
def test_an_answer_is_watched_by_its_last_tokens(text):
    sizes = []

    def decode(ids, skip_special_tokens):
        sizes.append(len(ids))
        return "".join(map(chr, ids))

    tokenizer = SimpleNamespace(family="causal", decode=decode)
    ids, watch, found = list(map(ord, text)), CallWatch(tokenizer), []
    for count in range(len(ids) + 1):
        found.append(watch.may_be_call(ids[:count]))
    assert max(sizes) <= TAG_TOKENS + 1
    wanted = [begins_as_call(tokenizer, ids[:count]) for count in range(len(ids) + 1)]
    assert found == wanted


# ---- who leaves


def post_bytes(path: str, body: str) -> bytes:
    """A whole request, for a socket."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()


def test_who_leaves_before_the_engine_has_it_makes_room(tiny_folders):
    """Grammars are compiled one after another, which may take a while."""
    waiting = []

    async def never(write):
        waiting.append(write)
        await asyncio.Event().wait()

    def prepare(service):
        service.grammars.compiled = never

    body = json.dumps({"messages": [ASKED], "guided_regex": "a"})
    with running(tiny_folders["glm2"], prepare=prepare) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(post_bytes("/v1/chat/completions", body))
            wait_until(lambda: waiting, 60)
            assert server.service._preparing == 1
        wait_until(lambda: server.service._preparing == 0, 60)
        assert ask(server).status_code == 200


# ---- embeddings


class HeldEncoder(TextEncoder):
    """Encodes once it may."""

    def __init__(self):
        self.name = "enc"
        self.began, self.may_end = 0, threading.Event()
        self._thread, self._waiting = ThreadPoolExecutor(1), 0

    def encode(self, texts):
        self.began += 1
        assert self.may_end.wait(60)
        return [np.ones(2)], 1


def test_embeddings_hold_up_no_chat(tiny_folders):
    encoder, most = HeldEncoder(), 40  # more than the event loop's own threads

    def prepare(service):
        service.text_encoder, service.max_queue = encoder, most

    with running(tiny_folders["glm2"], prepare=prepare) as server, ThreadPoolExecutor(50) as pool:

        def embed(_=None):
            return httpx.post(f"{server.root}/v1/embeddings", json={"input": "x"}, timeout=90)

        try:
            replies = pool.map(embed, range(most + 1))
            wait_until(lambda: encoder._waiting == most + 1, 60)
            assert ask(server).status_code == 200
            reply = embed()
            assert "40 requests for embeddings wait already" in error_of(reply, 429)
            assert reply.headers["Retry-After"]
        finally:
            encoder.may_end.set()
        assert {reply.status_code for reply in replies} == {200}


def test_embeddings_of_who_has_left_are_not_made(tiny_folders):
    encoder = HeldEncoder()

    def prepare(service):
        service.text_encoder = encoder

    message = post_bytes("/v1/embeddings", '{"input": "x"}')
    with running(tiny_folders["glm2"], prepare=prepare) as server:
        try:
            with socket.create_connection(("127.0.0.1", server.port)) as first:
                first.sendall(message)
                wait_until(lambda: encoder.began == 1, 60)
                with socket.create_connection(("127.0.0.1", server.port)) as second:
                    second.sendall(message)
                    wait_until(lambda: encoder._waiting == 2, 60)
                wait_until(lambda: encoder._waiting == 1, 60)
                encoder.may_end.set()
                assert first.recv(4096).startswith(b"HTTP/1.1 200")
        finally:
            encoder.may_end.set()
    assert encoder.began == 1
