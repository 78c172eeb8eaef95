"""Tools over the chat API: prompts, calls, results, streams; families without."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest

from chatglm import load_tokenizer
from serving.server.chat import encode_messages, parse_body
from serving.server.tools import begins_as_call, call_form, parsed_answer
from tests.causal_folders import make_causal_folder

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED = {"role": "user", "content": "天气"}
CALL = {"name": "weather", "arguments": '{"city": "x"}'}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}


@pytest.fixture(params=["glm3", "glm4"])
def tokenizer(request, tiny_folders):
    return load_tokenizer(tiny_folders[request.param])


def request_of(*messages, **fields):
    return parse_body({"messages": list(messages)} | fields)


def test_the_prompt_is_the_templates(tokenizer):
    asked = request_of(ASKED, CALLED, RESULT, tools=[WEATHER])
    ids = encode_messages(tokenizer, asked.messages, asked.tools)
    wanted = tokenizer.apply_chat_template(
        [ASKED, CALLED, RESULT], tools=[WEATHER], add_generation_prompt=True
    )["input_ids"]
    assert ids == wanted
    hidden = request_of(ASKED, tools=[WEATHER], tool_choice="none")
    plain = request_of(ASKED)
    assert encode_messages(tokenizer, hidden.messages, hidden.tools) == encode_messages(
        tokenizer, plain.messages
    )


def test_messages_are_taken_in_any_order(tokenizer):
    """As by the originals' own servers: two questions in a row, a system's text amid a chat."""
    first, second = ({"role": "user", "content": text} for text in ("你好", "hello world"))
    system = {"role": "system", "content": "a b"}

    def ids(*messages):
        return encode_messages(tokenizer, request_of(*messages).messages)

    start, answer = ids(first)[:2], ids(first)[-1:]
    middle = [ids(first)[2:-1], ids(second)[2:-1], ids(system, first)[2 : -len(ids(first)[2:])]]
    assert all(middle)
    assert ids(first, second, system, first) == sum([start, *middle, middle[0], answer], [])


def ids_of(tokenizer, *parts):
    """Ids of an answer's messages, the role token between them."""
    ids = []
    for part in parts:
        ids += [tokenizer.get_command("<|assistant|>"), *tokenizer.encode_text(part)]
    return ids[1:]


def call_text(tokenizer, arguments):
    if tokenizer.family == "glm4":
        return f"weather\n{json.dumps(arguments)}"
    given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    return f"weather\n```python\ntool_call({given})\n```"


def test_answers_are_read(tokenizer):
    call = call_text(tokenizer, {"city": "x"})
    text, calls = parsed_answer(tokenizer, ids_of(tokenizer, call), [WEATHER])
    assert text == "" and calls[0]["function"]["name"] == "weather"
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "x"}
    text, calls = parsed_answer(tokenizer, ids_of(tokenizer, "\nhello", call), [WEATHER])
    assert text == "hello" and len(calls) == 1
    for other in ("\nhello", call.replace("weather", "other"), "weather\nno call"):
        text, calls = parsed_answer(tokenizer, ids_of(tokenizer, other), [WEATHER])
        assert not calls and text
    assert begins_as_call(tokenizer, ids_of(tokenizer, call)) is True
    assert begins_as_call(tokenizer, ids_of(tokenizer, "\nhello")) is False
    assert begins_as_call(tokenizer, ids_of(tokenizer, "hello")) is None
    assert begins_as_call(tokenizer, ids_of(tokenizer, "\nhello", call)) is True


PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}


@pytest.mark.parametrize("header", ["interpreter", "python"])
@pytest.mark.parametrize("written", ["x = 1\nx + 1", "```python\nx = 1\nx + 1\n```"])
def test_code_below_an_interpreters_name_is_a_call(tokenizer, header, written):
    """As ChatGLM3 and GLM-4 call their code interpreters."""
    ids = ids_of(tokenizer, f"{header}\n{written}")
    text, calls = parsed_answer(tokenizer, ids, [WEATHER, PYTHON])
    assert text == "" and calls[0]["function"]["name"] == "python"
    assert json.loads(calls[0]["function"]["arguments"]) == {"code": "x = 1\nx + 1"}
    text, calls = parsed_answer(tokenizer, ids, [WEATHER])
    assert text and not calls


async def reply_of(tokenizer, ids, stream=True, **fields):
    """What a client gets for an answer of these ids: the reply, or the lines of its stream."""
    from serving.server.chat_completions import ChatResponse
    from serving.server.service import AnswerGroup

    tokens = asyncio.Queue()
    for token in [*ids, tokenizer.stop_ids[0], None]:
        tokens.put_nowait((0, token))
    answer = SimpleNamespace(id=0, reason="stop", tokens=ids, prompt=[], logprobs=[])
    active = SimpleNamespace(answer=answer, request=SimpleNamespace(prompt_tokens=3))
    group = AnswerGroup([active], tokens)
    service = SimpleNamespace(
        tokenizer=tokenizer,
        backend=SimpleNamespace(stop_ids=frozenset(tokenizer.stop_ids)),
        name="m",
        report=lambda _: {},
        length=lambda _: len(ids),
        cancel=lambda _: None,
        release=lambda _: None,
        draining=False,
    )

    async def receive():
        await asyncio.sleep(60)

    asked = request_of(ASKED, stream=stream, **fields)
    response = ChatResponse(service, asked, group, SimpleNamespace(receive=receive))
    if not stream:
        return await response.complete()
    return [line async for line in response.events()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("old", [False, True], ids=["tools", "functions"])
def test_a_reply_has_the_calls(tokenizer, stream, old):
    fields = {"functions": [WEATHER["function"]]} if old else {"tools": [WEATHER]}
    ids = ids_of(tokenizer, call_text(tokenizer, {"city": "x"}))
    found = asyncio.run(reply_of(tokenizer, ids, stream, **fields))
    if stream:
        chunks = [json.loads(line.removeprefix("data: ")) for line in found if "{" in line]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert not any(delta.get("content") for delta in deltas)
        message = next(d for d in deltas if "tool_calls" in d or "function_call" in d)
        reason = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1]
    else:
        message, reason = found["choices"][0]["message"], found["choices"][0]["finish_reason"]
        assert message["content"] is None
    function = message["function_call"] if old else message["tool_calls"][0]["function"]
    assert function == {"name": "weather", "arguments": '{"city": "x"}'}
    assert reason == ("function_call" if old else "tool_calls")


def test_text_streams_and_a_call_after_it_does_not(tokenizer):
    call = call_text(tokenizer, {"city": "x"})
    found = asyncio.run(reply_of(tokenizer, ids_of(tokenizer, "\nhello", call), tools=[WEATHER]))
    chunks = [json.loads(line.removeprefix("data: ")) for line in found if "{" in line]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "hello"
    assert sum("tool_calls" in delta for delta in deltas) == 1


def test_families_without_tools(tiny_folders):
    tokenizer = load_tokenizer(tiny_folders["glm2"])
    for asked in (request_of(ASKED, tools=[WEATHER]), request_of(ASKED, CALLED, RESULT)):
        with pytest.raises(ValueError, match="ChatGLM2-6B knows no tools here"):
            encode_messages(tokenizer, asked.messages, asked.tools)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"tools": [3]}, r"tools\[0\] must be an object of type function"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            r"\[0\].name must be",
        ),
        ({"tools": [WEATHER] * 129}, "at most 128 tools"),
        ({"tool_choice": "required"}, "a call is required, and there are no tools"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{}]}, RESULT]}, "a function"),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "function_call": {"name": "f", "arguments": "["}},
                    RESULT,
                ]
            },
            "arguments must be a JSON object",
        ),
    ],
)
def test_odd_tools_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        parse_body({"messages": [ASKED]} | fields)


LLAMA31 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and loop.last %}{{ tools | tojson }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'{"name": "\' + c.function.name + \'", "parameters": \' }}'
    "{{ c.function.arguments | tojson }}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def test_other_models_calls(tmp_path):
    written = '{"name": "weather", "%s": {"city": "x"}}'
    qwen = load_tokenizer(make_causal_folder(tmp_path / "qwen", "qwen2"))
    llama = load_tokenizer(make_causal_folder(tmp_path / "llama", "llama", LLAMA31))
    plain = load_tokenizer(make_causal_folder(tmp_path / "plain", "llama"))
    assert (call_form(qwen), call_form(llama), call_form(plain)) == ("tagged", "named", None)
    tagged = f"<tool_call>\n{written % 'arguments'}\n</tool_call>"
    for tokenizer, text, beside, count in (
        (qwen, tagged, "", 1),
        (qwen, f"I look.\n{tagged}\n{tagged}", "I look.", 2),
        (qwen, tagged.replace("weather", "other"), tagged.replace("weather", "other"), 0),
        (qwen, "no call", "no call", 0),
        (llama, written % "parameters", "", 1),
        (llama, "{not json", "{not json", 0),
    ):
        found, calls = parsed_answer(tokenizer, tokenizer.encode_text(text), [WEATHER])
        assert found == beside and len(calls) == count
        for call in calls:
            assert json.loads(call["function"]["arguments"]) == {"city": "x"}
        assert begins_as_call(tokenizer, tokenizer.encode_text(text)) is ("no call" not in text)
        asked = request_of(ASKED, CALLED, RESULT, tools=[WEATHER])
        prompt = tokenizer.decode(encode_messages(tokenizer, asked.messages, asked.tools))
        assert "of a city" in prompt and '"city": "x"' in prompt and "sunny" in prompt
    asked = request_of(ASKED, tools=[WEATHER])
    with pytest.raises(ValueError, match="writes no calls in a form that is read here"):
        encode_messages(plain, asked.messages, asked.tools)


def test_tools_through_http(tiny_folders):
    """The whole way, an answer that is text."""
    from tests.serving.server.test_server_faults import running

    with running(tiny_folders["glm4"], "--served_model_name", "m", endless=False) as server:
        body = {"model": "m", "messages": [ASKED], "tools": [WEATHER], "max_tokens": 6}
        reply = httpx.post(f"{server.root}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("role", ["function", "observation"])
def test_other_names_of_a_results_role(tokenizer, role):
    """openai 0.28 says function, ChatGLM3's own clients observation."""
    prompts = []
    for name in ("tool", role):
        result = {"role": name, "name": "weather", "content": "sunny"}
        asked = request_of(ASKED, result, tools=[WEATHER])
        prompts.append(encode_messages(tokenizer, asked.messages, asked.tools))
    assert prompts[0] == prompts[1]
