"""Turns with tools: of scripted models, and of a real server that is asked over HTTP."""

import json
from typing import Literal

import openai
import pytest

from serving.tools.interpreter import InterpreterRefused, PythonInterpreter
from serving.tools.loop import CALLS, run_tools
from serving.tools.python_tool import python_tool
from serving.tools.registry import ToolRegistry
from serving.tools.samples import sample_registry
from tests.serving.server.test_server_faults import running

QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]


def call_of(name, arguments, id="1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


class Scripted:
    """Answers with given messages, one an ask, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, messages, tools):
        self.asked.append(([dict(message) for message in messages], tools))
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def calling(*calls, **more):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def test_results_go_back_until_there_is_an_answer():
    call = call_of("calculator", '{"expression": "6 * 7"}')
    answer = {"role": "assistant", "content": "It is 42."}
    model = Scripted(calling(call), answer)
    steps = list(run_tools(model, sample_registry(), QUESTION))
    assert [step.message["role"] for step in steps] == ["assistant", "tool", "assistant"]
    assert steps[1].message == {"role": "tool", "tool_call_id": "1", "content": "42"}
    assert steps[1].call == call and steps[1].result.text == "42"
    assert steps[2].message == answer
    assert model.asked[1][0] == [*QUESTION, calling(call), steps[1].message]
    assert [tool["function"]["name"] for tool in model.asked[0][1]] == [
        "weather",
        "calculator",
        "clock",
    ]
    assert QUESTION == [{"role": "user", "content": "What is 6 * 7?"}]


def test_steps_come_when_they_are_there():
    model = Scripted(calling(call_of("clock", "{}")), {"content": "x"})
    steps = run_tools(model, sample_registry(), QUESTION)
    next(steps)
    assert len(model.asked) == 1
    next(steps)
    assert len(model.asked) == 1
    next(steps)
    assert len(model.asked) == 2


@pytest.mark.parametrize(
    "call, told, name, arguments",
    [
        (call_of("nothing", "{}"), "there is no tool 'nothing'", "nothing", "{}"),
        (call_of("a b", "{}"), "there is no tool 'a b'", "unknown", "{}"),
        (call_of("clock", "{broken"), "the arguments are no JSON", "clock", "{}"),
        (call_of("clock", "[1]"), "the arguments must be an object", "clock", "{}"),
        (call_of("clock", {"zone": 1}), "unknown argument zone", "clock", '{"zone": 1}'),
        ({"function": None}, "there is no tool 'None'", "unknown", "{}"),
        ("clock", "there is no tool 'None'", "unknown", "{}"),
        (None, "there is no tool 'None'", "unknown", "{}"),
    ],
)
def test_a_wrong_call_goes_on(call, told, name, arguments):
    """What goes back to a server is a call that it takes, whatever the model wrote."""
    model = Scripted(calling(call), {"content": "sorry"})
    steps = list(run_tools(model, sample_registry(), QUESTION))
    assert steps[-1].message["content"] == "sorry"
    assert steps[1].result.failed and told in steps[1].message["content"]
    [back] = model.asked[1][0][1]["tool_calls"]
    assert back["function"] == {"name": name, "arguments": arguments}
    assert back["id"] == steps[1].message["tool_call_id"]


def test_a_model_that_only_calls_is_asked_without_tools():
    forever = calling(call_of("clock", "{}"), content="again")
    model = Scripted(forever)
    steps = list(run_tools(model, sample_registry(), QUESTION, rounds=3))
    assert len(model.asked) == 4
    assert [bool(tools) for _, tools in model.asked] == [True, True, True, False]
    assert steps[-1].message == {"role": "assistant", "content": "again"}


def test_calls_of_an_answer_are_bounded():
    many = [call_of("clock", "{}", str(number)) for number in range(CALLS + 2)]
    steps = list(run_tools(Scripted(calling(*many), {"content": ""}), sample_registry(), QUESTION))
    results = [step.result for step in steps if step.result is not None]
    assert len(results) == CALLS + 2
    assert [result.failed for result in results] == [False] * CALLS + [True] * 2


def test_without_tools_there_is_an_answer():
    steps = list(run_tools(Scripted({"content": None}), ToolRegistry(), QUESTION))
    assert [step.message for step in steps] == [{"role": "assistant", "content": ""}]


def test_what_asking_raises_is_raised():
    def down(messages, tools):
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        list(run_tools(down, sample_registry(), QUESTION))


def test_a_conversation_with_the_interpreter_survives_its_end():
    registry = ToolRegistry()
    with PythonInterpreter() as python:
        try:
            registry.add(python_tool(python))
        except InterpreterRefused as error:
            pytest.skip(str(error))
        codes = ["x = 41", "x + 1", "import os; os._exit(1)", "x", "2"]
        answers = [calling(call_of("python", json.dumps({"code": code}))) for code in codes]
        steps = list(run_tools(Scripted(*answers, {"content": "done"}), registry, QUESTION))
    texts = [step.message["content"] for step in steps if step.result is not None]
    assert texts[0] == "(no output)" and texts[1] == "42"
    assert "variables and files are lost" in texts[2]
    assert "NameError" in texts[3] and texts[4] == "2"
    assert steps[-1].message["content"] == "done"


@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_over_a_servers_url(family, tiny_folders):
    """A random model, whose first answer must be a call: its results are read by the server."""
    registry = ToolRegistry()

    @registry.tool
    def paint(color: Literal["red", "绿"], thick: bool = False) -> dict[str, str]:
        """Paint something."""
        return {"painted": color}

    with running(
        tiny_folders[family], "--served_model_name", "m", "--max_tokens", "1024", endless=False
    ) as server:
        client = openai.OpenAI(base_url=f"{server.root}/v1", api_key="-", max_retries=0)

        def ask(messages, tools):
            options = {"tools": tools, "tool_choice": "required"} if tools else {}
            reply = client.chat.completions.create(
                model="m", messages=messages, max_tokens=60, temperature=1.0, seed=3, **options
            )
            return reply.choices[0].message.model_dump(exclude_none=True)

        steps = list(run_tools(ask, registry, QUESTION, rounds=1))
    results = [step for step in steps if step.result is not None]
    assert results and steps[-1].message["role"] == "assistant"
    for step in results:
        color = json.loads(step.call["function"]["arguments"])["color"]
        assert json.loads(step.message["content"]) == {"painted": color}
