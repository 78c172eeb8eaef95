"""Answers of a form: real servers on random models, whose answers only the grammar makes valid."""

import json
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.causal_folders import make_causal_folder
from tests.serving.server.test_server_faults import running

FAMILIES = ["glm", "glm2", "glm3", "glm4", "qwen2"]
ASK = [{"role": "user", "content": "你好"}]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=4)
    age: int = Field(ge=0, le=99)
    kind: Literal["a , b", "北京,c"]


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 4},
            "days": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
            "exact": {"type": "boolean"},
        },
        "required": ["city", "exact"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
TOOLS += [{"type": "function", "function": {"name": "time"}}]


@pytest.fixture(scope="module", params=FAMILIES)
def client(request, tiny_folders, tmp_path_factory):
    folder = tiny_folders.get(request.param)
    if folder is None:
        folder = make_causal_folder(tmp_path_factory.mktemp("causal"), request.param)
    with running(
        folder,
        *("--served_model_name", "m", "--max_tokens", "2048", "--kv_tokens", "8192"),
        endless=False,
    ) as server:
        found = openai.OpenAI(base_url=f"{server.root}/v1", api_key="-", max_retries=0)
        found.family, found.root = request.param, server.root
        yield found


def ask(client, **fields):
    options = {"model": "m", "messages": ASK, "max_tokens": 300, "temperature": 1.0, "seed": 3}
    return client.chat.completions.create(**options | fields)


def test_pydantic_parses_what_a_random_model_writes(client):
    for seed in range(3):
        reply = client.chat.completions.parse(
            model="m", messages=ASK, response_format=Person, temperature=1.5, seed=seed
        )
        assert isinstance(reply.choices[0].message.parsed, Person)
        assert reply.choices[0].finish_reason == "stop"


def test_json_objects_streams_and_answers_that_are_cut(client):
    form = {"type": "json_object"}
    reply = ask(client, response_format=form, max_tokens=6, logprobs=True)
    [choice] = reply.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.finish_reason == "length"
        with pytest.raises(ValueError):
            json.loads(choice.message.content)
    schema = {"name": "p", "schema": Person.model_json_schema()}
    form = {"type": "json_schema", "json_schema": schema}
    whole = [c.message.content for c in ask(client, response_format=form, n=2).choices]
    pieces = ["", ""]
    for chunk in ask(client, response_format=form, n=2, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == whole
    assert all(Person.model_validate_json(text) for text in whole)


@pytest.mark.parametrize(
    "fields, accepts",
    [
        ({"guided_choice": ["yes", "no , it", "是,不"]}, ["yes", "no , it", "是,不"].__contains__),
        ({"guided_regex": "[a-c]{2}/x"}, lambda text: len(text) == 4 and text[2:] == "/x"),
        ({"guided_json": json.dumps({"const": [1, 2]})}, lambda text: json.loads(text) == [1, 2]),
        ({"guided_grammar": 'start: "a" | "b"'}, "ab".__contains__),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "ab".__contains__),
    ],
    ids=["choice", "regex", "json", "lark", "gbnf"],
)
def test_fields_of_vllm(client, fields, accepts):
    for seed in range(3):
        reply = ask(client, extra_body=fields, seed=seed)
        assert accepts(reply.choices[0].message.content), reply
        assert reply.choices[0].finish_reason == "stop"


def arguments_of(call):
    arguments = json.loads(call.arguments)
    assert {"city", "exact"} <= arguments.keys() <= {"city", "days", "exact"}
    assert isinstance(arguments["exact"], bool) and len(arguments["city"]) <= 4
    return arguments


def test_forced_calls(client):
    named = {"type": "function", "function": {"name": "weather"}}
    if client.family in ("glm", "glm2"):
        with pytest.raises(openai.BadRequestError, match="knows no tools here"):
            ask(client, tools=TOOLS, tool_choice=named)
        return
    for seed in range(2):
        reply = ask(client, tools=TOOLS, tool_choice=named, seed=seed).choices[0]
        [call] = reply.message.tool_calls
        assert call.function.name == "weather" and reply.finish_reason == "tool_calls"
        arguments_of(call.function)
        reply = ask(client, tools=TOOLS, tool_choice="required", seed=seed).choices[0]
        assert [c.function.name in ("weather", "time") for c in reply.message.tool_calls] == [True]
    names = [tool["function"]["name"] for tool in TOOLS]
    allowed = {"mode": "required", "tools": [named]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    reply = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert reply.message.tool_calls[0].function.name == names[0]
    old = ask(client, functions=[WEATHER], function_call={"name": "weather"}).choices[0]
    arguments_of(old.message.function_call)
    chunks = list(ask(client, tools=TOOLS, tool_choice=named, stream=True))
    calls = [chunk.choices[0].delta.tool_calls for chunk in chunks]
    [[call]] = [found for found in calls if found]
    arguments_of(call.function)
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_call_or_a_text_of_the_form(client):
    if client.family in ("glm", "glm2"):
        return
    schema = {"name": "p", "schema": Person.model_json_schema()}
    form = {"type": "json_schema", "json_schema": schema}
    for seed in range(4):
        reply = ask(client, tools=TOOLS, response_format=form, seed=seed, temperature=2.0)
        message = reply.choices[0].message
        if not message.tool_calls:
            assert Person.model_validate_json(message.content)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"response_format": {"type": "xml"}}, "must be an object of the type"),
        ({"guided_json": {"type": "object", "propertyNames": {}}}, "propertyNames"),
        ({"guided_json": {"type": "strin"}}, "Invalid type: strin"),
        ({"guided_json": False}, "Unimplemented keys"),
        ({"guided_json": {"$ref": "http://x.org/y"}}, "does not fetch"),
        ({"guided_json": json.loads('{"items":' * 80 + "{}" + "}" * 80)}, "deeper than 64"),
        ({"guided_json": {"enum": ["x" * 70000]}}, "at most 65536 characters"),
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_grammar": "start: ("}, ""),
        ({"guided_choice": []}, "1 to 1024 texts"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "one form"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "exactly one of"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "any"}, 'must be "none", "auto", "required"'),
        ({"tools": TOOLS, "tool_choice": {"name": "x"}}, "not among the tools"),
        (
            {
                "messages": [*ASK, {"role": "assistant", "content": "{"}],
                "response_format": {"type": "json_object"},
            },
            "need a new answer",
        ),
    ],
)
def test_what_is_no_form_is_refused_in_one_line(client, fields, said):
    if client.family != "glm4":
        return
    body = {"model": "m", "messages": ASK} | fields
    reply = httpx.post(f"{client.root}/v1/chat/completions", json=body, timeout=20)
    message = reply.json()["error"]["message"]
    assert reply.status_code == 400 and said in message and "\n" not in message


def test_responses_have_forms_and_forced_calls_too(client):
    reply = client.responses.parse(model="m", input="你好", text_format=Person, temperature=1.0)
    assert isinstance(reply.output_parsed, Person)
    if client.family in ("glm", "glm2"):
        return
    tool = {"type": "function", "strict": True, **WEATHER}
    reply = client.responses.create(
        model="m", input="你好", tools=[tool], tool_choice="required", temperature=1.0
    )
    [call] = reply.output
    assert call.type == "function_call" and call.name == "weather"
    arguments_of(call)
