"""What an answer's text must be: response_format, vLLM's fields, and calls of tools, as grammars.

Free of torch, of HTTP and of llguidance, whose JSON of grammars the functions below write.
"""

import json
import keyword
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from chatglm.files import shorten

JSON_CHARACTERS = 65536  # of a schema, or a grammar
JSON_DEPTH = 64
INDENT = 4  # spaces of a level, where a prompt shows tools over several lines
# llguidance counts remainders in a state each, some 400 bytes and 10 microseconds: multipleOf 10^9
# would take all memory. Several of a schema multiply: their least common multiple is bounded.
MOST_MULTIPLE = 10_000
REGEX_CHARACTERS = 4096
CHOICES = 1024
# What may stand between JSON's tokens: without a bound, a model can write spaces forever.
JSON_WHITESPACE = r"[ ]?|\n[ ]{0,40}"
CALL_WHITESPACE = "[ ]?"
ANY_OBJECT = {"type": "object"}
# Forced text may be any of its tokens' sequences: the model's own tokenization is among them.
NO_FORCING = '%llguidance {"no_forcing": true}'
# What a grammar in Lark has; as llguidance's own check, which takes quadratic time on empty lines.
LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)
JSON_IN_LARK = re.compile(r"%json\s*(?=\{)")


@dataclass(frozen=True)
class Form:
    """The form of an answer's text, as an entry of llguidance's grammars, in JSON."""

    grammar: str


def json_form(name: str, schema: Any) -> Form:
    """Of JSON by a schema. Raises ValueError where it is none, too large or too deep."""
    return Form(json.dumps({"json_schema": guided_schema(name, schema, JSON_WHITESPACE)}))


def guided_schema(name: str, schema: Any, whitespace: str) -> dict[str, Any]:
    """A schema with what llguidance needs to know beside it.

    Raises:
        ValueError: it is no schema, too large or too deep.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise ValueError(f"{name} must be a JSON schema: an object, got {shorten(schema)}")
    check_schema_size(name, schema)
    options = {"whitespace_pattern": whitespace, "coerce_one_of": True}
    return {**schema, "x-guidance": options}


def check_schema_size(name: str, schema: Any) -> None:
    """Raises ValueError where a schema is too large, nested too deep, or too costly to compile."""
    check_nesting(name, schema)
    size = len(json.dumps(schema))
    if size > JSON_CHARACTERS:
        raise ValueError(f"{name} must have at most {JSON_CHARACTERS} characters, got {size}")
    check_multiples(name, schema)


def nesting_levels(value: Any) -> Iterator[list[Any]]:
    """The values of JSON by how deep they are nested: the whole first."""
    level = [value]
    while level:
        yield level
        deeper: list[Any] = []
        for inside in level:
            if isinstance(inside, dict):
                deeper += inside.values()
            elif isinstance(inside, list):
                deeper += inside
        level = deeper


def check_nesting(name: str, value: Any) -> None:
    """Raises ValueError where JSON is nested too deep."""
    for depth, _ in enumerate(nesting_levels(value), 1):
        if depth > JSON_DEPTH:
            raise ValueError(f"{name} is nested deeper than {JSON_DEPTH} levels")


def indented_size(value: Any) -> int:
    """Characters of JSON that is written over several lines: much more than on one, if deep."""
    size = len(json.dumps(value, ensure_ascii=False))
    for depth, level in enumerate(nesting_levels(value)):
        ends = sum(isinstance(inside, (dict, list)) for inside in level)
        size += (INDENT * depth + 1) * (len(level) + ends)  # an end has a line of its own
    return size


def check_multiples(name: str, schema: Any) -> None:
    """Raises ValueError where its multipleOf together need too many states of an automaton."""
    together = 1
    for level in nesting_levels(schema):
        for inside in level:
            multiple = inside.get("multipleOf") if isinstance(inside, dict) else None
            if isinstance(multiple, (int, float)) and not isinstance(multiple, bool):
                together = math.lcm(together, digits_of_number(multiple))
            if together > MOST_MULTIPLE:
                raise ValueError(
                    f"{name}: the least common multiple of the digits of its multipleOf must be "
                    f"at most {MOST_MULTIPLE}, got one that goes beyond with {shorten(multiple)}"
                )


def digits_of_number(number: float) -> int:
    """The digits of a number without its sign, its point and zeros at the end; 1 for 0."""
    digits = "".join(map(str, Decimal(repr(number)).as_tuple().digits))
    return int(digits.rstrip("0") or "1")


def regex_form(name: str, pattern: Any) -> Form:
    """Of a text that a regular expression matches as a whole."""
    check_text(name, pattern, REGEX_CHARACTERS)
    return Form(json.dumps({"regex": pattern}))


def grammar_form(name: str, grammar: Any) -> Form:
    """Of a text by a grammar in llguidance's form of Lark, or llama.cpp's GBNF."""
    check_text(name, grammar, JSON_CHARACTERS)
    for found in JSON_IN_LARK.finditer(grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError):
            raise ValueError(f"{name}: what follows %json must be a JSON schema") from None
        check_schema_size(f"{name}: the schema after %json", schema)
    return Form(json.dumps({"grammar": grammar}))


def choice_form(name: str, choices: Any) -> Form:
    """Of one of several texts."""
    if not isinstance(choices, list) or not 0 < len(choices) <= CHOICES:
        raise ValueError(
            f"{name} must be a list of 1 to {CHOICES} texts, got {counted_or_shown(choices)}"
        )
    for number, choice in enumerate(choices):
        check_text(f"{name}[{number}]", choice, REGEX_CHARACTERS)
    alternatives = " | ".join(map(lark_text, choices))
    return Form(json.dumps({"lark_grammar": f"start: {alternatives}"}))


def check_text(name: str, text: Any, longest: int) -> None:
    """Raises ValueError where it is no text, empty, too long, or no Unicode."""
    if not isinstance(text, str) or not 0 < len(text) <= longest:
        got = len(text) if isinstance(text, str) else shorten(text)
        raise ValueError(f"{name} must be a text of 1 to {longest} characters, got {got}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character") from None


def counted_or_shown(value: Any) -> str:
    """What came instead of a list of some length, as an error says it."""
    return str(len(value)) if isinstance(value, list) else shorten(value)


def lark_text(text: str) -> str:
    """A text as a literal of Lark, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


# ---- fields of requests

GUIDED = {  # vLLM's older fields -> what reads them
    "guided_json": json_form,
    "guided_regex": regex_form,
    "guided_choice": choice_form,
    "guided_grammar": grammar_form,
}
STRUCTURED = {name.removeprefix("guided_"): read for name, read in GUIDED.items()}
FORM_FIELDS = ("response_format", "structured_outputs", *GUIDED)
NULLABLE_TEXT = {"type": ["string", "null"]}
SCHEMA_OBJECT = {"type": "object", "description": "A JSON schema."}


@dataclass(frozen=True)
class ResponseFormat:
    """OpenAI's response_format."""

    text: str

    def read(self, name: str, value: Any) -> Form | None:
        """The form; None for any text."""
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return json_form(name, ANY_OBJECT)
        if kind != "json_schema":
            kinds = '"text", "json_object" or "json_schema"'
            raise ValueError(f"{name} must be an object of the type {kinds}, got {shorten(value)}")
        inside = value.get("json_schema")
        if not isinstance(inside, dict):
            raise ValueError(
                f"{name}.json_schema must be an object with a name and a schema, "
                f"got {shorten(inside)}"
            )
        return json_form(f"{name}.json_schema.schema", inside.get("schema", ANY_OBJECT))

    def schema(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"type": "object", "required": ["type"]}
        plain["properties"] = {"type": {"enum": ["text", "json_object"]}}
        inside = {
            "name": NULLABLE_TEXT,
            "description": NULLABLE_TEXT,
            "schema": SCHEMA_OBJECT,
            "strict": {"type": ["boolean", "null"], "description": "No difference is made."},
        }
        by_schema: dict[str, Any] = {"type": "object", "required": ["type", "json_schema"]}
        by_schema["properties"] = {
            "type": {"const": "json_schema"},
            "json_schema": {"type": "object", "properties": inside},
        }
        return {"anyOf": [plain, by_schema, {"type": "null"}], "description": self.text}


def schema_of_guided(kind: str) -> dict[str, Any]:
    """JSON Schema of a field of vLLM: json, regex, choice or grammar."""
    text = {"type": "string", "minLength": 1, "maxLength": REGEX_CHARACTERS}
    if kind == "json":
        return {"anyOf": [SCHEMA_OBJECT, {"type": "string"}]}
    if kind == "choice":
        return {"type": "array", "items": text, "minItems": 1, "maxItems": CHOICES}
    return text if kind == "regex" else text | {"maxLength": JSON_CHARACTERS}


@dataclass(frozen=True)
class Guided:
    """One of vLLM's guided_json, guided_regex, guided_choice, guided_grammar."""

    kind: str
    text: str

    def read(self, name: str, value: Any) -> Form:
        if self.kind == "json" and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError(
                    f"{name} must be a JSON schema, or its text, got {shorten(value)}"
                ) from None
        return STRUCTURED[self.kind](name, value)

    def schema(self) -> dict[str, Any]:
        kinds = [schema_of_guided(self.kind), {"type": "null"}]
        return {"anyOf": kinds, "description": self.text}


@dataclass(frozen=True)
class StructuredOutputs:
    """vLLM's structured_outputs: exactly one kind."""

    text: str

    def read(self, name: str, value: Any) -> Form:
        given = []
        for kind, inside in value.items() if isinstance(value, dict) else ():
            if inside is not None and inside is not False:
                given.append(kind)
        if given == ["json_object"]:
            return json_form(name, ANY_OBJECT)
        if len(given) != 1 or given[0] not in STRUCTURED:
            kinds = ", ".join([*STRUCTURED, "json_object"])
            raise ValueError(
                f"{name} must be an object with exactly one of {kinds}, got {shorten(value)}"
            )
        return Guided(given[0], "").read(f"{name}.{given[0]}", value[given[0]])

    def schema(self) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [{"type": "null"}]
        for kind in STRUCTURED:
            inside = {kind: schema_of_guided(kind)}
            kinds.append({"type": "object", "required": [kind], "properties": inside})
        flag = {"json_object": {"const": True}}
        kinds.append({"type": "object", "required": ["json_object"], "properties": flag})
        return {"anyOf": kinds, "description": self.text}


def single_form(fields_read: dict[str, Any]) -> Form | None:
    """Take the form out of the fields of a request.

    Raises:
        ValueError: there are several.
    """
    given = []
    for name in FORM_FIELDS:
        form = fields_read.pop(name, None)
        if form is not None:
            given.append((name, form))
    if len(given) > 1:
        names = ", ".join(name for name, _ in given)
        raise ValueError(f"an answer has one form, got {names}")
    return given[0][1] if given else None


# ---- grammars of whole answers


@dataclass(frozen=True)
class AnswerShape:
    """How a family writes an answer.

    Attributes:
        header: what it writes before the text.
        optional_space: a space may stand before the first word of the header and of the text,
            which decoding leaves out: SentencePiece's vocabularies.
        calls: how calls of tools are written: a key of CALL_RULES; None where they are not.
    """

    header: str = ""
    optional_space: bool = False
    calls: str | None = None

    @property
    def space(self) -> str:
        return '" "? ' if self.optional_space else ""


def answer_grammar(shape: AnswerShape, form: Form | None, tools: Sequence[dict[str, Any]]) -> str:
    """llguidance's JSON of an answer's grammar: a text of a form, or a call of one of the tools.

    Raises:
        ValueError: in one line, where a schema is out of bounds or a call cannot be written.
    """
    alternatives: list[str] = []
    rules: list[str] = []
    parts: list[dict[str, Any]] = []
    if form is not None:
        header = f"{shape.space}{lark_text(shape.header)} " if shape.header else ""
        alternatives.append(f"{header}{shape.space}@body")
        parts.append({"name": "body", **entry_of(form)})
    for number, tool in enumerate(tools):
        assert shape.calls is not None  # families without calls are refused before
        write = CALL_RULES[shape.calls]
        alternatives.append(write(shape, number, tool["function"], rules, parts))
    start = "\n".join([NO_FORCING, f"start: {' | '.join(alternatives)}", *rules])
    return json.dumps({"grammars": [{"lark_grammar": start}, *parts]})


def entry_of(form: Form) -> dict[str, Any]:
    """An entry of llguidance's grammars."""
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import gbnf_to_lark

    entry = json.loads(form.grammar)
    if "regex" in entry:
        # \d, \w and \s are Unicode's, as in Python.
        return {"lark_grammar": f"start: /{regex_to_lark(entry['regex'], '')}/"}
    if "grammar" in entry:
        if LARK.search(entry["grammar"]):
            return {"lark_grammar": entry["grammar"]}
        try:
            return {"lark_grammar": gbnf_to_lark(entry["grammar"])}
        except Exception as error:  # the converter raises what it likes
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"the grammar is neither Lark nor GBNF: {why}") from None
    return dict(entry)


def parameters_of(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: those it names, unless it allows others."""
    parameters = function.get("parameters") or {}
    return {"type": "object", "additionalProperties": False, **parameters}


def add_arguments(number: int, function: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Add the part arguments{number}: a tool's arguments as JSON."""
    name = f"tools[{number}].function.parameters"
    schema = guided_schema(name, parameters_of(function), CALL_WHITESPACE)
    parts.append({"name": f"arguments{number}", "json_schema": schema})


def json_call(
    shape: AnswerShape,
    number: int,
    function: dict[str, Any],
    rules: list[str],
    parts: list[dict[str, Any]],
) -> str:
    """GLM-4's call: the name, a newline, the arguments as JSON."""
    add_arguments(number, function, parts)
    header = lark_text(f"{function['name']}\n")
    return f"{shape.space}{header} {shape.space}@arguments{number}"


def fenced_call(
    shape: AnswerShape,
    number: int,
    function: dict[str, Any],
    rules: list[str],
    parts: list[dict[str, Any]],
) -> str:
    """ChatGLM3's call: the name, then tool_call(name=value, ...) in a fence; values are JSON.

    Optional arguments may be left out; all stand in the schema's order.
    """
    place = f"tools[{number}].function.parameters"
    parameters = parameters_of(function)
    check_schema_size(place, parameters)
    properties = parameters.get("properties") or {}
    if not isinstance(properties, dict):
        raise ValueError(f"{place}.properties must be an object, got {shorten(properties)}")
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    required = parameters.get("required") or []
    if not isinstance(required, list):
        raise ValueError(f"{place}.required must be a list of names, got {shorten(required)}")
    entries = list(properties.items())
    for position, (name, schema) in enumerate(entries):
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{place}: ChatGLM3 writes arguments by Python names, got {name!r}")
        if not isinstance(schema, (dict, bool)):
            raise ValueError(
                f"{place}.properties.{name} must be a JSON schema: an object, got {shorten(schema)}"
            )
        inside = {**shared, **schema} if isinstance(schema, dict) else schema
        guided = guided_schema(f"{place}.properties.{name}", inside, CALL_WHITESPACE)
        parts.append({"name": f"value{number}_{position}", "json_schema": guided})
        for state, comma in (("first", ""), ("later", ", ")):
            written = f"{lark_text(f'{comma}{name}=')} @value{number}_{position}"
            with_it = f"{written} later{number}_{position + 1}"
            without = "" if name in required else f" | {state}{number}_{position + 1}"
            rules.append(f"{state}{number}_{position}: {with_it}{without}")
    for state in ("first", "later"):
        rules.append(f'{state}{number}_{len(entries)}: ""')
    header = lark_text(f"{function['name']}\n")
    opening = lark_text("```python\ntool_call(")
    closing = lark_text(")\n```")
    return f"{shape.space}{header} {shape.space}{opening} first{number}_0 {closing}"


def object_call(
    shape: AnswerShape,
    number: int,
    function: dict[str, Any],
    rules: list[str],
    parts: list[dict[str, Any]],
    key: str,
    opening: str = "",
    closing: str = "",
) -> str:
    """Other models' call: a JSON object with the name, and the arguments under `key`."""
    add_arguments(number, function, parts)
    header = f"{lark_text(shape.header)} " if shape.header else ""
    begin = lark_text(f'{opening}{{"name": "{function["name"]}", "{key}": ')
    return f"{header}{shape.space}{begin} @arguments{number} {lark_text('}' + closing)}"


CALL_RULES: dict[str, Callable[..., str]] = {
    "json": json_call,
    "fenced": fenced_call,
    "tagged": partial(
        object_call, key="arguments", opening="<tool_call>\n", closing="\n</tool_call>"
    ),
    "named": partial(object_call, key="parameters"),
}
