"""Tools that a model may call: Python functions, described by their annotations and docstrings.

    tools = ToolRegistry()

    @tools.tool
    def weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
        \"\"\"The weather of a city today.

        Args:
            city: its name in English.
        \"\"\"

`tools.descriptions()` is OpenAI's `tools`; `tools.call(name, arguments)` runs a call. Whatever a
model writes there, the result is a text that it can read.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints, overload

from chatglm.prompts import refuse_constant
from serving.tools.names import check_tool_name
from serving.tools.schemas import (
    ArgumentsRefused,
    JsonSchema,
    object_schema,
    schema_of,
    shown,
    typed_arguments,
)

RESULT_CHARACTERS = 16_000  # of a result that a model is shown
CUT = " [TRUNCATED]"
ARGUMENT_LINE = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")
SECTION_LINE = re.compile(r"[A-Z]\w*:")
ToolFunction = Callable[..., Any]


@dataclass(frozen=True)
class ToolResult:
    """What a call gave.

    Attributes:
        text: as the model reads it. images: PNG files for the reader.
        failed: the text says why there is no result.
    """

    text: str
    images: tuple[bytes, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        types: of its arguments, by name. required: those without a default.
        descriptions: of its arguments, where its docstring has them.
    """

    name: str
    description: str
    function: ToolFunction
    types: Mapping[str, Any]
    required: tuple[str, ...]
    descriptions: Mapping[str, str]

    def parameters(self) -> JsonSchema:
        properties = {}
        for name, kind in self.types.items():
            properties[name] = schema_of(kind)
            if name in self.descriptions:
                properties[name].setdefault("description", self.descriptions[name])
        return object_schema(properties, self.required)

    def described(self) -> dict[str, Any]:
        """OpenAI's object of a tool."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters(),
        }
        return {"type": "function", "function": function}

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Check the arguments and run the function. An exception of it is a failed result."""
        try:
            values = typed_arguments(self.types, self.required, arguments)
        except ArgumentsRefused as error:
            return failure(f"{self.name}: {error}")
        try:
            return as_result(self.function(**values))
        except (Exception, SystemExit) as error:
            message = " ".join(str(error).split())
            return failure(f"{self.name}: {type(error).__name__}: {message}".rstrip(": "))


class ToolRegistry:
    """Tools by name."""

    def __init__(self) -> None:
        self._tools: dict[str, Tool] = {}

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    @overload
    def tool(self, function: ToolFunction) -> ToolFunction: ...

    @overload
    def tool(self, *, name: str) -> Callable[[ToolFunction], ToolFunction]: ...

    def tool(self, function: ToolFunction | None = None, *, name: str | None = None) -> Any:
        """Decorator: register a function, which stays as it is. Raises ValueError as `add`."""

        def register(function: ToolFunction) -> ToolFunction:
            self.add(tool_of(function, name))
            return function

        return register if function is None else register(function)

    def add(self, *tools: Tool) -> None:
        """Raises ValueError where a name is taken."""
        for tool in tools:
            if tool.name in self._tools:
                raise ValueError(f"there is a tool {tool.name!r} already")
            self._tools[tool.name] = tool

    def descriptions(self) -> list[dict[str, Any]]:
        """OpenAI's `tools`."""
        return [tool.described() for tool in self]

    def call(self, name: Any, arguments: Any) -> ToolResult:
        """Run a model's call.

        Args:
            name, arguments: of OpenAI's `function`; arguments are JSON's text, or an object.
        """
        if not isinstance(name, str) or name not in self._tools:
            known = ", ".join(self._tools) or "none"
            return failure(f"there is no tool {shown(str(name))!r}; there are: {known}")
        try:
            values = read_arguments(arguments)
        except ArgumentsRefused as error:
            return failure(f"{name}: {error}")
        return self._tools[name].call(values)


def tool_of(function: ToolFunction, name: str | None = None) -> Tool:
    """The tool that a function is.

    Raises:
        ValueError: it has no docstring, or an argument without a type that JSON has.
    """
    called = name or function.__name__
    check_tool_name("the name of a tool", called)
    description, descriptions = read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise ValueError(f"the tool {called} needs a docstring: it is what the model is told")
    hints = get_type_hints(function, include_extras=True)
    types = {}
    required = []
    for argument in inspect.signature(function).parameters.values():
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
            raise ValueError(f"the tool {called}: {argument} cannot be given by its name")
        if argument.name not in hints:
            raise ValueError(f"the tool {called}: the argument {argument.name} has no type")
        try:
            schema_of(hints[argument.name])
        except TypeError as error:
            raise ValueError(f"the tool {called}: {argument.name}: {error}") from None
        types[argument.name] = hints[argument.name]
        if argument.default is argument.empty:
            required.append(argument.name)
    return Tool(called, description, function, types, tuple(required), descriptions)


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section of a docstring, and {argument: text} of "Args:"."""
    description: list[str] = []
    descriptions: dict[str, str] = {}
    section = None
    last = ""
    for line in text.splitlines():
        words = line.strip()
        if SECTION_LINE.fullmatch(words) and line == words:
            section = words
        elif section is None:
            description.append(words)
        elif section == "Args:" and (found := ARGUMENT_LINE.fullmatch(words)):
            last = found[1]
            descriptions[last] = found[2]
        elif section == "Args:" and last and words:
            descriptions[last] += f" {words}"
    return " ".join(" ".join(description).split()), descriptions


def read_arguments(arguments: Any) -> dict[str, Any]:
    """The object of a call's arguments. Raises ArgumentsRefused."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}", parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise ArgumentsRefused(f"the arguments are no JSON: {reason}") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise ArgumentsRefused(f"the arguments must be an object, got {shown(repr(arguments))}")
    return arguments


def as_result(value: Any) -> ToolResult:
    """What a function returned as a result: texts as they are, anything else as JSON or str."""
    if isinstance(value, ToolResult):
        text, images, failed = value.text, value.images, value.failed
    else:
        images, failed = (), False
        text = value if isinstance(value, str) else json_text(value)
    if len(text) > RESULT_CHARACTERS:
        text = text[: RESULT_CHARACTERS - len(CUT)] + CUT
    return ToolResult(without_halves(text), images, failed)


def json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def without_halves(text: str) -> str:
    """A text without halves of surrogate pairs, which no tokenizer can encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def failure(reason: str) -> ToolResult:
    """A result that says why there is none."""
    return as_result(ToolResult(f"Error: {reason}", failed=True))
