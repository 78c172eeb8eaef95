"""A conversation: its messages, how answers are sampled, and its file. Free of torch and of HTTP.

A file is one JSON object {"messages": [...]}: a row that train.py reads. With calls of tools it has
"tools" too, which the model was shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatglm.files import read_json
from finetune.files import utf8_json, write_aside

MessageDicts = list[dict[str, Any]]
ROLES_READ = ("system", "user", "assistant", "tool")
ALIASES = {"max_new_tokens": "max_tokens", "topp": "top_p", "max_completion_tokens": "max_tokens"}


@dataclass
class Conversation:
    """Messages as OpenAI's chat API has them.

    Attributes:
        messages: a system's first, where there is one.
        settings: fields of a request: temperature, top_p, max_tokens, ...
        model: the name that requests carry; None for the endpoint's own.
        answered: answers so far, the discarded ones included.
        tools: OpenAI's objects of the tools that calls may name.
    """

    messages: MessageDicts = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    answered: int = 0
    tools: MessageDicts = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The request for the next answer.

        A seed counts up from one answer to the next, so that a repeated question may get another.
        """
        body: dict[str, Any] = {"messages": list(self.messages)} | self.settings
        if isinstance(body.get("seed"), int):
            body["seed"] += self.answered
        if self.model is not None:
            body["model"] = self.model
        return body

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def set_system(self, text: str) -> None:
        """Replace the system's message; none where the text is empty."""
        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def clear(self) -> None:
        """Forget all messages but the system's."""
        system = self.system
        self.messages.clear()
        if system is not None:
            self.set_system(system)

    def add_question(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def take_back(self) -> str | None:
        """Remove the last question and what followed it; the question, or None without one."""
        for place in reversed(range(len(self.messages))):
            message = self.messages[place]
            if message["role"] == "user":
                del self.messages[place:]
                return str(message["content"])
        return None

    def drop_oldest(self) -> bool:
        """Forget the first question and its answer; whether there was a round before the last."""
        asked = []
        for place, message in enumerate(self.messages):
            if message["role"] == "user":
                asked.append(place)
        if len(asked) < 2:
            return False
        del self.messages[asked[0] : asked[1]]
        return True

    def save(self, path: Path) -> None:
        """Write the messages. Raises OSError."""
        row: dict[str, Any] = {"messages": self.messages}
        if self.tools and any(message.get("tool_calls") for message in self.messages):
            row["tools"] = self.tools
        write_aside(path, utf8_json(row, indent=1) + "\n")

    def load(self, path: Path) -> None:
        """Take a file's messages in place of these. Raises ValueError, OSError."""
        content = read_json(path, object)
        self.messages = checked_messages(content, str(path))
        if isinstance(content, dict) and not self.tools:
            self.tools = object_list(content.get("tools"))


def object_list(value: Any) -> MessageDicts:
    """A list of objects; empty where it is none."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return []
    return value


def checked_messages(content: Any, place: str) -> MessageDicts:
    """The messages of {"messages": [...]}, or of a list of them.

    Raises:
        ValueError: in one line, where they are none.
    """
    found = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise ValueError(f'{place}: wanted {{"messages": [...]}} or a list of messages')
    messages: MessageDicts = []
    for number, message in enumerate(found):
        is_message = isinstance(message, dict) and message.get("role") in ROLES_READ
        calls = is_message and message["role"] == "assistant" and "tool_calls" in message
        if not is_message or not (isinstance(message.get("content"), str) or calls):
            roles = ", ".join(ROLES_READ)
            raise ValueError(
                f"{place}: message {number} must have a role of {roles} and a text as its content"
            )
        messages.append(dict(message))
    return messages


def parse_setting(words: Sequence[str]) -> tuple[str, Any]:
    """(name, value) of "temperature 0.7" or "temperature=0.7"; None where no value is given.

    A value is JSON where it can be read as that, else text.
    """
    name, _, value = " ".join(words).replace("=", " ", 1).partition(" ")
    name = ALIASES.get(name.lstrip("-"), name.lstrip("-"))
    value = value.strip()
    if not value:
        return name, None
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def shown_settings(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    pairs = [f"{name} {json.dumps(value)}" for name, value in settings.items()]
    return ", ".join(pairs) or "as the model has them"
