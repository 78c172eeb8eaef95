"""Annotations of a function's arguments as JSON Schema, and a model's values as those types.

Known are str, int, float, bool, Literal, lists, dicts by str, unions with None, dataclasses of
these, and Annotated with a text, which describes the argument.
"""

import dataclasses
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

JsonSchema = dict[str, Any]
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
SHOWN = 60  # characters of a wrong value that a message repeats


class ArgumentsRefused(ValueError):
    """A call's arguments are not what the tool takes; the message, of one line, is the model's."""


def schema_of(annotation: Any) -> JsonSchema:
    """The JSON Schema of a type. Raises TypeError where it has none here."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        described = [text for text in inside[1:] if isinstance(text, str)]
        schema = schema_of(inside[0])
        return schema | {"description": described[0]} if described else schema
    if annotation in PLAIN:
        return {"type": PLAIN[annotation]}
    if origin is Literal:
        return literal_schema(inside)
    if origin is list and len(inside) == 1:
        return {"type": "array", "items": schema_of(inside[0])}
    if origin is dict and len(inside) == 2 and inside[0] is str:
        return {"type": "object", "additionalProperties": schema_of(inside[1])}
    if is_union(origin) and (present := without_none(inside)) is not None:
        return {"anyOf": [schema_of(present), {"type": "null"}]}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return fields_schema(annotation)
    raise TypeError(f"no schema is known for the type {annotation!r}")


def literal_schema(values: Sequence[Any]) -> JsonSchema:
    """Of one of several texts, numbers or truth values of one type. Raises TypeError."""
    kinds = {type(value) for value in values}
    if len(kinds) != 1 or (kind := kinds.pop()) not in PLAIN:
        raise TypeError(f"Literal needs values of one plain type, got {list(values)!r}")
    return {"type": PLAIN[kind], "enum": list(values)}


def fields_schema(kind: type) -> JsonSchema:
    """Of a dataclass. Raises TypeError."""
    hints = get_type_hints(kind, include_extras=True)
    properties = {}
    required = []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        properties[field.name] = schema_of(hints[field.name])
        if is_required(field):
            required.append(field.name)
    return object_schema(properties, required)


def object_schema(properties: Mapping[str, JsonSchema], required: Sequence[str]) -> JsonSchema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def is_union(origin: Any) -> bool:
    return origin is Union or origin is types.UnionType


def without_none(inside: Sequence[Any]) -> Any:
    """T of T | None; None for other unions."""
    present = [kind for kind in inside if kind is not type(None)]
    return present[0] if len(present) == 1 and len(inside) == 2 else None


def typed_value(annotation: Any, value: Any, place: str) -> Any:
    """A JSON value as a type that `schema_of` takes.

    Args:
        place: what the value is called in messages.
    Raises:
        ArgumentsRefused: it has another type.
    """
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return typed_value(inside[0], value, place)
    if annotation in PLAIN:
        return typed_scalar(annotation, value, place)
    if origin is Literal:
        for known in inside:
            if type(known) is type(value) and known == value:
                return value
        raise refused(place, f"one of {', '.join(map(repr, inside))}", value)
    if origin is list:
        if not isinstance(value, list):
            raise refused(place, "a list", value)
        return [typed_value(inside[0], one, f"{place}[{i}]") for i, one in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise refused(place, "an object", value)
        return {name: typed_value(inside[1], one, f"{place}.{name}") for name, one in value.items()}
    if is_union(origin):
        return None if value is None else typed_value(without_none(inside), value, place)
    return typed_fields(annotation, value, place)


def typed_scalar(kind: type, value: Any, place: str) -> Any:
    """A text, number or truth value. A whole float is an int, an int is a float."""
    if type(value) is kind:
        return value
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is float and type(value) is int and abs(value) < sys.float_info.max:
        return float(value)
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    raise refused(place, names[kind], value)


def typed_fields(kind: Any, value: Any, place: str) -> Any:
    """A dataclass of a JSON object."""
    if not isinstance(value, dict):
        raise refused(place, "an object", value)
    hints = get_type_hints(kind, include_extras=True)
    taken = {}
    required = []
    for field in dataclasses.fields(kind):
        if field.init:
            taken[field.name] = hints[field.name]
            if is_required(field):
                required.append(field.name)
    try:
        return kind(**typed_arguments(taken, required, value, f"{place}."))
    except ArgumentsRefused:
        raise
    except (ValueError, TypeError) as error:  # of its __post_init__
        raise ArgumentsRefused(f"{place}: {error}") from None


def typed_arguments(
    hints: Mapping[str, Any], required: Sequence[str], values: Mapping[str, Any], place: str = ""
) -> dict[str, Any]:
    """{name: value} of named types.

    Raises:
        ArgumentsRefused: one is missing, unknown, or has another type.
    """
    for name in values:
        if name not in hints:
            known = ", ".join(hints) or "none"
            raise ArgumentsRefused(f"unknown argument {place}{shown(name)}; there are: {known}")
    for name in required:
        if name not in values:
            raise ArgumentsRefused(f"{place}{name} is missing")
    read = {}
    for name, value in values.items():
        read[name] = typed_value(hints[name], value, f"{place}{name}")
    return read


def refused(place: str, wanted: str, value: Any) -> ArgumentsRefused:
    return ArgumentsRefused(f"{place} must be {wanted}, got {shown(repr(value))}")


def shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
