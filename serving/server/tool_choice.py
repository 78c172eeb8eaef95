"""tool_choice: whether an answer may, must or must not call tools, and which. Free of HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chatglm.files import shorten

WORDS = ("none", "auto", "required")
NAMED_TOOL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string", "maxLength": 64}},
        },
    },
}


@dataclass(frozen=True)
class ToolSelection:
    """Which tools an answer may call.

    Attributes:
        mode: a word of WORDS.
        names: of the tools; empty for all.
    """

    mode: str = "auto"
    names: tuple[str, ...] = ()

    def shown(self, tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
        """The tools that the model is shown.

        Raises:
            ValueError: there are none to call, or none of a name.
        """
        if self.mode == "none":
            return ()
        known = [tool["function"]["name"] for tool in tools]
        for name in self.names:
            if name not in known:
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
        if self.mode == "required" and not tools:
            raise ValueError("tool_choice: a call is required, and there are no tools")
        return tuple(t for t in tools if not self.names or t["function"]["name"] in self.names)


@dataclass(frozen=True)
class ToolChoice:
    """OpenAI's tool_choice, and function_call of openai 0.28."""

    text: str

    def read(self, name: str, value: Any) -> ToolSelection:
        if isinstance(value, str) and value in WORDS:
            return ToolSelection(value)
        if isinstance(value, dict):
            if value.get("type") == "allowed_tools":
                return allowed_tools(name, value.get("allowed_tools"))
            if (tool := tool_name(value)) is not None:
                return ToolSelection("required", (tool,))
        words = ", ".join(f'"{word}"' for word in WORDS)
        raise ValueError(
            f"{name} must be {words}, or an object that names a function, got {shorten(value)}"
        )

    def schema(self) -> dict[str, Any]:
        several: dict[str, Any] = {"type": "object", "required": ["mode", "tools"]}
        several["properties"] = {
            "mode": {"enum": ["auto", "required"]},
            "tools": {"type": "array", "items": NAMED_TOOL, "minItems": 1},
        }
        allowed: dict[str, Any] = {"type": "object", "required": ["type", "allowed_tools"]}
        allowed["properties"] = {"type": {"const": "allowed_tools"}, "allowed_tools": several}
        words = {"enum": [*WORDS, None]}
        return {"anyOf": [words, NAMED_TOOL, allowed], "description": self.text}


def tool_name(value: Any) -> str | None:
    """The function that an object names: {"function": {"name"}}, or {"name"} of openai 0.28."""
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        return None
    named = value.get("function", value)
    name = named.get("name") if isinstance(named, dict) else None
    return name if isinstance(name, str) else None


def allowed_tools(place: str, value: Any) -> ToolSelection:
    """Raises ValueError where it is not {"mode", "tools"}."""
    given = value if isinstance(value, dict) else {}
    tools = given.get("tools")
    names = [tool_name(tool) for tool in tools] if isinstance(tools, list) else []
    known = [name for name in names if name is not None]
    if given.get("mode") not in ("auto", "required") or not known or len(known) != len(names):
        raise ValueError(
            f'{place}.allowed_tools must be an object with the mode "auto" or "required", and '
            f"tools that name functions, got {shorten(value)}"
        )
    return ToolSelection(given["mode"], tuple(known))
