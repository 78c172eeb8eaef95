"""A conversation's turn with tools: ask, run the calls, tell the results, until there is an answer.

What is asked is a function of messages and tools in OpenAI's form, so that a server's URL, a model
in this process, a terminal and a page are all the same here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serving.tools.names import TOOL_NAME
from serving.tools.registry import ToolResult, failure, read_arguments
from serving.tools.schemas import ArgumentsRefused

ROUNDS = 8
CALLS = 16  # that are run of one answer
ChatMessages = Sequence[Mapping[str, Any]]


class AskModel(Protocol):
    """Asks a model, once."""

    def __call__(self, messages: ChatMessages, tools: list[dict[str, Any]]) -> Mapping[str, Any]:
        """OpenAI's assistant message: content, tool_calls. It may raise what it likes.

        Args:
            tools: empty where the model shall call none.
        """


class CallableTools(Protocol):
    """Tools as the loop needs them; a ToolRegistry is such."""

    def descriptions(self) -> list[dict[str, Any]]:
        """OpenAI's `tools`."""

    def call(self, name: Any, arguments: Any) -> ToolResult:
        """Run a model's call, whatever it wrote there."""


@dataclass(frozen=True)
class ToolStep:
    """A message that a conversation has more.

    Attributes:
        message: OpenAI's, of the assistant or a tool.
        call: what a tool's message answers: OpenAI's tool_call. result: with its images.
    """

    message: dict[str, Any]
    call: Mapping[str, Any] | None = None
    result: ToolResult | None = None


def run_tools(
    ask: AskModel, registry: CallableTools, messages: ChatMessages, rounds: int = ROUNDS
) -> Iterator[ToolStep]:
    """Answer the last message of a conversation, with tools.

    Yields:
        Each new message when it is there; the last is the assistant's answer. After `rounds`
        rounds of calls the model is asked without tools. A tool that fails is a result that says
        so; what `ask` raises is raised.
    """
    conversation = list(messages)
    for number in range(rounds + 1):
        tools = registry.descriptions() if number < rounds else []
        message = dict(ask(conversation, tools))
        message["role"] = "assistant"
        calls = message.get("tool_calls")
        calls = calls if isinstance(calls, list) else []
        if not tools or not calls:
            message.pop("tool_calls", None)
            message["content"] = message.get("content") or ""
            yield ToolStep(message)
            return
        message["tool_calls"] = [repeatable(call, i) for i, call in enumerate(calls)]
        conversation.append(message)
        yield ToolStep(message)
        for place, call in enumerate(calls):
            result = run_call(registry, call) if place < CALLS else too_many()
            shown = message["tool_calls"][place]
            answered = {"role": "tool", "tool_call_id": shown["id"], "content": result.text}
            conversation.append(answered)
            yield ToolStep(answered, shown, result)


def run_call(registry: CallableTools, call: Any) -> ToolResult:
    """The result of one of OpenAI's tool_calls."""
    function = part(call, "function")
    return registry.call(part(function, "name"), part(function, "arguments"))


def repeatable(call: Any, number: int) -> dict[str, Any]:
    """A call as a server takes it back: a name, and arguments that are an object.

    What the model wrote in their place is told by the call's result.
    """
    function = part(call, "function")
    name, arguments = part(function, "name"), part(function, "arguments")
    with_name = name if isinstance(name, str) and TOOL_NAME.fullmatch(name) else "unknown"
    try:
        values = read_arguments(arguments)
    except ArgumentsRefused:
        values = {}
    text = arguments if isinstance(arguments, str) and values else json.dumps(values)
    return {
        "id": str(part(call, "id") or f"call_{number}"),
        "type": "function",
        "function": {"name": with_name, "arguments": text},
    }


def part(value: Any, name: str) -> Any:
    """A member of what may be an object."""
    return value.get(name) if isinstance(value, Mapping) else None


def too_many() -> ToolResult:
    return failure(f"at most {CALLS} calls of an answer are run")
