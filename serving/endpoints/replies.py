"""The protocol of what answers chats, and how an ended answer is described.

Requests and replies are OpenAI's objects of /v1/chat/completions. Free of torch and of HTTP.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class AnswerRefused(ValueError):
    """One request gets no answer; others may.

    Attributes:
        status: as HTTP has it. code: as OpenAI's errors have it.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": str(self), "type": kind, "param": None, "code": self.code}


class EndpointDown(OSError):
    """No request gets an answer at the moment."""


class ChatReply(NamedTuple):
    """An ended answer.

    Attributes:
        body: OpenAI's chat.completion; with `glm_foundry` where the endpoint knows more.
        seconds: from the request to its end.
    """

    body: dict[str, Any]
    seconds: float

    @property
    def choice(self) -> dict[str, Any]:
        """The first of OpenAI's choices; empty where a server's reply is of another kind."""
        choices = self.body.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        return first if isinstance(first, dict) else {}

    @property
    def message(self) -> dict[str, Any]:
        """OpenAI's assistant message."""
        message = self.choice.get("message")
        return message if isinstance(message, dict) else {}

    @property
    def text(self) -> str:
        """Of a chat's message, or of a completion."""
        text = self.message.get("content") or self.choice.get("text")
        return text if isinstance(text, str) else ""

    @property
    def finish_reason(self) -> str:
        """OpenAI's; "cancelled" where it was stopped from here."""
        return str(self.choice.get("finish_reason") or "unknown")

    @property
    def output_tokens(self) -> int | None:
        usage = self.body.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return tokens if isinstance(tokens, int) else None

    @property
    def predicted(self) -> Mapping[str, float]:
        """expected, median and q90 of the predicted length in tokens; empty without a prediction.

        None of them is trusted to be there: a server may send anything.
        """
        found = self.body.get("glm_foundry")
        numbers = found.get("predicted_tokens") if isinstance(found, dict) else None
        known = {}
        for name in ("expected", "median", "q90"):
            value = numbers.get(name) if isinstance(numbers, dict) else None
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                known[name] = float(value)
        return known


CHAT_PATH = "/chat/completions"


class NumberedRequest(NamedTuple):
    """One request of many: its number, and its body for a path below the API's address."""

    number: int
    body: Mapping[str, Any]
    path: str = CHAT_PATH


class AnswerStream(Protocol):
    """One answer while it is made. Iterating yields pieces of its text, cut between characters."""

    def __iter__(self) -> Iterator[str]:
        """Raises AnswerRefused, EndpointDown."""

    def stop(self) -> None:
        """End it. From any thread, and from a signal's handler."""

    def reply(self) -> ChatReply:
        """After the last piece: what came of it."""


class Endpoint(Protocol):
    """What answers chats.

    Attributes:
        name: of the model that answers where a request names none.
    """

    name: str

    def models(self) -> list[str]:
        """Names that a request's `model` may have, the model itself first."""

    def load_adapter(self, name: str, folder: str) -> None:
        """Let requests name a LoRA adapter. Raises ValueError, OSError."""

    def check_setting(self, name: str, value: Any) -> None:
        """Raises ValueError where no request may have this field with this value."""

    def check_tools(self) -> None:
        """Raises ValueError where the model is known to take no tools."""

    def ask(self, body: Mapping[str, Any]) -> AnswerStream:
        """Begin to answer a chat. Raises AnswerRefused, EndpointDown."""

    def replies(
        self, requests: Iterable[NumberedRequest]
    ) -> Iterator[tuple[int, ChatReply | AnswerRefused]]:
        """(number, what came of it) of many requests, each when it has ended.

        Raises:
            EndpointDown: the rest gets no answer.
        """

    def close(self) -> None:
        """End every answer."""


def completion_body(
    model: str,
    message: Mapping[str, Any],
    finish_reason: str,
    usage: Mapping[str, int],
    **more: Any,
) -> dict[str, Any]:
    """OpenAI's chat.completion of one choice, with more fields.

    Args:
        more: id and created among them.
    """
    choice = {"index": 0, "message": dict(message), "finish_reason": finish_reason}
    head = {"object": "chat.completion", "model": model}
    return head | {"choices": [choice], "usage": dict(usage)} | more


def usage_of(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the user's last message; empty without one."""
    for message in reversed(messages):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return str(message["content"])
    return ""
