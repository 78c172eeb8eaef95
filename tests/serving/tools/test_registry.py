"""Tools as functions: their descriptions, what of a model's calls is refused, the samples."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.server.fields import CHAT_TABLE
from serving.tools.own_tools import load_tools
from serving.tools.registry import RESULT_CHARACTERS, ToolRegistry, ToolResult
from serving.tools.samples import SAMPLES, calculator, sample_registry
from serving.tools.schemas import ArgumentsRefused, schema_of, typed_value


@dataclass
class Place:
    """Where something is."""

    latitude: float
    longitude: float
    name: str = ""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self):
        if abs(self.latitude) > 90:
            raise ValueError("latitude is -90 to 90")


tools = ToolRegistry()


@tools.tool
def route(
    start: Place,
    by: Literal["car", "bicycle"],
    stops: list[Place] | None = None,
    speed: Annotated[float, "km/h"] = 50,
    most: Optional[int] = None,  # noqa: UP045
) -> str:
    """The way from a place.

    It is the shortest.

    Args:
        start: where it begins.
        by: what it is
            travelled with.
        speed (float): is said above.

    Returns:
        A text.
    """
    return f"{type(start).__name__} {start.latitude} {by} {len(stops or [])} {speed} {most}"


PLACE = {
    "type": "object",
    "properties": {
        "latitude": {"type": "number"},
        "longitude": {"type": "number"},
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["latitude", "longitude"],
    "additionalProperties": False,
}


def test_a_description_is_openais():
    [described] = tools.descriptions()
    assert described == {
        "type": "function",
        "function": {
            "name": "route",
            "description": "The way from a place. It is the shortest.",
            "parameters": {
                "type": "object",
                "properties": {
                    "start": {**PLACE, "description": "where it begins."},
                    "by": {
                        "type": "string",
                        "enum": ["car", "bicycle"],
                        "description": "what it is travelled with.",
                    },
                    "stops": {"anyOf": [{"type": "array", "items": PLACE}, {"type": "null"}]},
                    "speed": {"type": "number", "description": "km/h"},
                    "most": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
                "required": ["start", "by"],
                "additionalProperties": False,
            },
        },
    }


@pytest.mark.parametrize("registry", [tools, sample_registry()])
def test_the_server_takes_descriptions(registry):
    body = {"messages": [{"role": "user", "content": "?"}], "tools": registry.descriptions()}
    assert list(CHAT_TABLE.read(body)["tools"]) == registry.descriptions()


def test_a_call_is_dispatched_with_types():
    start = {"latitude": 1, "longitude": 2.5}
    arguments = {"start": start, "by": "car", "stops": [start], "most": 3.0}
    result = tools.call("route", json.dumps(arguments))
    assert result == ToolResult("Place 1.0 car 1 50 3")
    assert tools.call("route", arguments) == result


@pytest.mark.parametrize(
    "change, message",
    [
        ({"by": "train"}, "by must be one of 'car', 'bicycle', got 'train'"),
        ({"by": None}, "by must be one of 'car', 'bicycle', got None"),
        ({"start": 5}, "start must be an object, got 5"),
        ({"start": {"latitude": 1}}, "start.longitude is missing"),
        ({"start": {"latitude": 91, "longitude": 0}}, "start: latitude is -90 to 90"),
        ({"speed": "50"}, "speed must be a number, got '50'"),
        ({"speed": True}, "speed must be a number, got True"),
        ({"most": 2.5}, "most must be a whole number, got 2.5"),
        ({"most": True}, "most must be a whole number, got True"),
        ({"stops": {}}, "stops must be a list, got {}"),
        (
            {"stops": [{"latitude": 1, "longitude": "x"}]},
            "stops[0].longitude must be a number, got 'x'",
        ),
        ({"where": 1}, "unknown argument where; there are: start, by, stops, speed, most"),
        ({"speed": 10**400}, "speed must be a number, got 1000"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(change, message):
    arguments = {"start": {"latitude": 1, "longitude": 2}, "by": "car"} | change
    result = tools.call("route", json.dumps(arguments))
    assert result.failed and result.text.startswith(f"Error: route: {message}")
    assert "\n" not in result.text and len(result.text) < 200


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("rout", "{}", "there is no tool 'rout'; there are: route"),
        (None, "{}", "there is no tool 'None'"),
        (["route"], "{}", "there is no tool"),
        ("route", "{", "route: the arguments are no JSON: "),
        ("route", "[" * 99999, "route: the arguments are no JSON"),
        ("route", '{"speed": NaN}', "route: the arguments are no JSON: NaN"),
        ("route", "5", "route: the arguments must be an object, got 5"),
        ("route", ["a"], "route: the arguments must be an object"),
        ("route", "", "route: start is missing"),
        ("route", None, "route: start is missing"),
    ],
)
def test_wrong_calls_are_told(name, arguments, message):
    result = tools.call(name, arguments)
    assert result.failed and message in result.text


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(), st.lists))
def test_any_arguments_give_a_text(value):
    for arguments in (value, {"start": value, "by": value}, {"start": {"latitude": value}}):
        result = tools.call("route", arguments)
        assert result.failed and result.text.startswith("Error: ")


def test_what_a_function_raises_is_told():
    registry = ToolRegistry()

    @registry.tool(name="break-it")
    def broken(how: str) -> str:
        """Break."""
        raise {"exit": SystemExit, "error": OSError}[how]("two\nlines")

    assert broken.__name__ == "broken"
    assert registry.call("break-it", {"how": "exit"}).text == (
        "Error: break-it: SystemExit: two lines"
    )
    assert registry.call("break-it", {"how": "error"}).failed


@pytest.mark.parametrize(
    "value, text",
    [
        ({"度": 1.5}, '{"度": 1.5}'),
        (None, "null"),
        ([1, True], "[1, true]"),
        ({1, 2}, "{1, 2}"),
        ("a\ud800b", "a?b"),
        (ToolResult("x", (b"png",)), "x"),
        ("x" * 10**6, "x" * (RESULT_CHARACTERS - 12) + " [TRUNCATED]"),
    ],
)
def test_results_are_texts(value, text):
    registry = ToolRegistry()

    @registry.tool
    def give() -> object:
        """Give."""
        return value

    assert registry.call("give", {}).text == text


def no_docstring(a: int): ...


def no_type(a):
    """A."""


def many(*values: int):
    """A."""


def strange(a: complex):
    """A."""


def either(a: int | str):
    """A."""


def mixed(a: Literal["x", 1]):
    """A."""


@pytest.mark.parametrize(
    "function, message",
    [
        (no_docstring, "the tool no_docstring needs a docstring"),
        (no_type, "the argument a has no type"),
        (many, r"\*values: int cannot be given by its name"),
        (strange, "the tool strange: a: no schema is known for the type <class 'complex'>"),
        (either, "the tool either: a: no schema"),
        (mixed, "the tool mixed: a: Literal needs values of one plain type"),
    ],
)
def test_what_is_no_tool_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        ToolRegistry().tool(function)


def test_names_are_taken_once_and_as_openai_has_them():
    registry = sample_registry()
    with pytest.raises(ValueError, match="there is a tool 'clock' already"):
        registry.tool(name="clock")(SAMPLES["clock"])
    with pytest.raises(ValueError, match="the name of a tool must be"):
        registry.tool(name="a b")(SAMPLES["clock"])


def test_dicts_and_schemas_of_types():
    assert schema_of(dict[str, int])["additionalProperties"] == {"type": "integer"}
    assert typed_value(dict[str, int], {"a": 1}, "x") == {"a": 1}
    with pytest.raises(ArgumentsRefused, match="x.a must be a whole number"):
        typed_value(dict[str, int], {"a": "1"}, "x")
    with pytest.raises(TypeError):
        schema_of(dict[int, str])


# ---- the samples


@pytest.mark.parametrize(
    "expression, value",
    [
        ("1 + 2 * 3", "7"),
        ("(3 + 4) * 2 ** 5", "224"),
        ("-7 // 2 + 7 % 4", "-1"),
        ("sqrt(2) ** 2", "2.0000000000000004"),
        ("2 × 3 ÷ 4", "1.5"),
        ("max(1, 2, gcd(12, 18)) + round(pi, 2)", "9.14"),
        ("factorial(20)", "2432902008176640000"),
        ("2 ** -1", "0.5"),
    ],
)
def test_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "2 ** 10 ** 9",
        "10 ** 1000 * 10 ** 1000",
        "factorial(10 ** 6)",
        "factorial(-1)",
        "round(5, -10 ** 9)",
        "1 / 0",
        "(-8) ** 0.5",
        "1e308 * 10",
        "9.5 ** 1000",
        "sqrt(-1)",
        "min()",
        "sqrt(1, 2)",
        "__import__('os').system('true')",
        "(1).__class__",
        "[1]",
        "'a' * 9",
        "True + 1j",
        "pi(1)",
        "a",
        "x := 1",
        "lambda: 1",
        "1 if 2 else 3",
        "round(1.5, ndigits=1)",
        "max(*[1, 2])",
        "",
        "1 +",
        "(" * 400,
        "-" * 400 + "1",
        "1 + " * 200 + "1",
        "0" + "+1" * 600,
        "9" * 400 + " ** 99",
        "\x00",
        "1 << 9",
    ],
)
def test_calculator_refuses(expression):
    result = sample_registry().call("calculator", {"expression": expression})
    assert result.failed and "\n" not in result.text and len(result.text) < 200


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789.+-*/%() ,episqrtoundmax", max_size=40))
def test_calculator_ends(expression):
    assert sample_registry().call("calculator", {"expression": expression}).text


def test_weather():
    registry = sample_registry()
    told = json.loads(registry.call("weather", {"city": "北京市"}).text)
    assert told["city"] == "Beijing" and told["temperature"] == 21
    fahrenheit = registry.call("weather", {"city": " beijing", "unit": "fahrenheit"})
    assert json.loads(fahrenheit.text)["temperature"] == 70
    assert "there are beijing, shanghai" in registry.call("weather", {"city": "Paris"}).text


def test_clock():
    registry = sample_registry()
    told = json.loads(registry.call("clock", {"time_zone": "Asia/Shanghai"}).text)
    assert told["time"].endswith("+08:00") and told["weekday"].endswith("day")
    assert json.loads(registry.call("clock", "").text)["time"].endswith("+00:00")
    for wrong in ("Mars", "../../etc/passwd", "/etc/passwd", ""):
        assert "no time zone" in registry.call("clock", {"time_zone": wrong}).text


# ---- the user's own


OWN = '''
from __future__ import annotations
from dataclasses import dataclass
from serving.tools.registry import ToolRegistry
tools = ToolRegistry()

@dataclass
class Pair:
    a: int
    b: int

@tools.tool
def add(pair: Pair) -> int:
    """Add two numbers."""
    return pair.a + pair.b
'''


def test_tools_of_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert load_tools(str(file)).call("add", '{"pair": {"a": 1, "b": 2}}').text == "3"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "", "no Python file"),
        ("b.py", None, "no Python file"),
        ("c.py", "x = 1", "has no tools"),
        ("d.py", "1 / 0", "does not run: ZeroDivisionError: division by zero"),
        ("e.py", "(", "does not run: SyntaxError"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tools(str(file))
