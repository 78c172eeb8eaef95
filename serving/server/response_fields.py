"""Fields of /v1/responses that chat completions have not. Free of torch and of HTTP."""

from dataclasses import dataclass
from typing import Any

from chatglm.files import shorten
from serving.server.fields import (
    MESSAGES,
    ROLES,
    TOOLS,
    Schema,
    check_characters,
)
from serving.server.structured import counted_or_shown

PARTS = ("input_text", "output_text", "text")


@dataclass(frozen=True)
class InputItems:
    """A conversation, in the form of chat completions' messages."""

    text: str

    def read(self, name: str, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, str):
            return [{"role": "user", "content": check_characters(name, value)}]
        if not isinstance(value, list) or not 0 < len(value) <= MESSAGES:
            raise ValueError(
                f"{name} must be a text, or a list of 1 to {MESSAGES} items, "
                f"got {counted_or_shown(value)}"
            )
        messages: list[dict[str, Any]] = []
        for number, item in enumerate(value):
            message = self._message(f"{name}[{number}]", item)
            is_call = "tool_calls" in message
            if is_call and messages and messages[-1].get("tool_calls"):
                messages[-1]["tool_calls"] += message["tool_calls"]
            else:
                messages.append(message)
        return messages

    @staticmethod
    def _message(place: str, item: Any) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise ValueError(f"{place} must be an object, got {shorten(item)}")
        kind = item.get("type", "message")
        if kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls = [{"type": "function", "function": call}]
            return {"role": "assistant", "content": None, "tool_calls": calls}
        if kind == "function_call_output":
            return {"role": "tool", "content": content_of(f"{place}.output", item.get("output"))}
        if kind != "message":
            kinds = "message, function_call or function_call_output"
            raise ValueError(f"{place}.type must be {kinds}, got {shorten(kind)}")
        if not isinstance(item.get("role"), str) or item["role"] not in ROLES:
            got = shorten(item.get("role"))
            raise ValueError(f"{place} must have a role of {', '.join(ROLES)}, got {got}")
        content = content_of(f"{place}.content", item.get("content"))
        return {"role": item["role"], "content": content}

    def schema(self) -> Schema:
        part: Schema = {"type": "object", "required": ["type", "text"]}
        part["properties"] = {"type": {"enum": list(PARTS)}, "text": {"type": "string"}}
        content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
        message: Schema = {"type": "object", "required": ["role", "content"]}
        message["properties"] = {
            "type": {"const": "message"},
            "role": {"enum": list(ROLES)},
            "content": content,
        }
        call: Schema = {"type": "object", "required": ["type", "name", "arguments"]}
        call["properties"] = {
            "type": {"const": "function_call"},
            "call_id": {"type": "string"},
            "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
            "arguments": {"type": "string", "description": "A JSON object."},
        }
        output: Schema = {"type": "object", "required": ["type", "output"]}
        output["properties"] = {
            "type": {"const": "function_call_output"},
            "call_id": {"type": "string"},
            "output": content,
        }
        items = {"anyOf": [message, call, output]}
        several = {"type": "array", "items": items, "minItems": 1, "maxItems": MESSAGES}
        return {"anyOf": [{"type": "string"}, several], "description": self.text}


def content_of(place: str, content: Any) -> str:
    """The text of an item's content. Raises ValueError where it is none."""
    if isinstance(content, str):
        return check_characters(place, content)
    if not isinstance(content, list):
        raise ValueError(f"{place} must be text, got {shorten(content)}")
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in PARTS
        if not is_text or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{place} must be text, or parts of the types {', '.join(PARTS)}, "
                f"got {shorten(part)}"
            )
        texts.append(part["text"])
    return check_characters(place, "".join(texts))


@dataclass(frozen=True)
class ResponseTools:
    """Functions, each with its name beside its type."""

    text: str

    def read(self, name: str, value: Any) -> list[dict[str, Any]]:
        """In the form of chat completions, unchecked but for that."""
        if not isinstance(value, list) or len(value) > TOOLS:
            raise ValueError(
                f"{name} must be a list of at most {TOOLS} tools, got {counted_or_shown(value)}"
            )
        tools = []
        for number, tool in enumerate(value):
            if not isinstance(tool, dict) or tool.get("type") != "function":
                raise ValueError(
                    f"{name}[{number}] must be an object of type function, got {shorten(tool)}"
                )
            function = {key: inside for key, inside in tool.items() if key != "type"}
            tools.append({"type": "function", "function": function})
        return tools

    def schema(self) -> Schema:
        tool: Schema = {"type": "object", "required": ["type", "name"]}
        tool["properties"] = {
            "type": {"const": "function"},
            "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
            "description": {"type": ["string", "null"]},
            "parameters": {"type": ["object", "null"]},
            "strict": {"type": ["boolean", "null"]},
        }
        return {
            "type": ["array", "null"],
            "items": tool,
            "maxItems": TOOLS,
            "description": self.text,
        }


@dataclass(frozen=True)
class ResponseChoice:
    """tool_choice, in the form of chat completions, which names a function deeper."""

    text: str

    def read(self, name: str, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "function" and "name" in value:
            return {"type": "function", "function": {"name": value["name"]}}
        if not isinstance(value, str):
            raise ValueError(
                f"{name} must be a text, or an object of type function with a name, "
                f"got {shorten(value)}"
            )
        return value

    def schema(self) -> Schema:
        named: Schema = {"type": "object", "required": ["type", "name"]}
        named["properties"] = {"type": {"const": "function"}, "name": {"type": "string"}}
        words = {"enum": ["none", "auto", "required", None]}
        return {"anyOf": [words, named], "description": self.text}


@dataclass(frozen=True)
class TextFormat:
    """The form of the answer, as chat completions' response_format; None for plain text."""

    text: str

    def read(self, name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {shorten(value)}")
        text_format = value.get("format")
        if text_format is not None and not isinstance(text_format, dict):
            raise ValueError(f"{name}.format must be an object, got {shorten(text_format)}")
        if not text_format or text_format.get("type") != "json_schema":
            return text_format
        inside = {key: part for key, part in text_format.items() if key != "type"}
        return {"type": "json_schema", "json_schema": inside}

    def schema(self) -> Schema:
        kinds = {"enum": ["text", "json_object", "json_schema"]}
        inside: Schema = {"type": ["object", "null"], "required": ["type"]}
        inside["properties"] = {
            "type": kinds,
            "name": {"type": "string"},
            "schema": {"type": "object"},
            "strict": {"type": ["boolean", "null"]},
        }
        return {
            "type": ["object", "null"],
            "properties": {"format": inside},
            "description": self.text,
        }
