"""Prompts and training rows by a model's own chat template: the family `causal`.

What the template writes between a question and its answer, and after the answer, is found by
rendering; nothing here knows a model's control tokens. Pure functions, free of torch.
"""

from typing import Any, Protocol

from .histories import Answer, History, Message, history_messages
from .prompts import Layout, TextTokenizer

END = "end of an answer"  # the name by which the tokenizer's get_command knows the id


class TemplateTokenizer(TextTokenizer, Protocol):
    """What the functions below need of a tokenizer."""

    @property
    def answer_header(self) -> list[int]:
        """Ids that the template writes between the prompt for an answer and the answer."""

    @property
    def tool_role(self) -> str:
        """The template's role of a tool's result."""

    def encode_messages(
        self, messages: list[Message], tools: Any = None, *, prompts_answer: bool = True
    ) -> list[int]:
        """Ids of messages by the template."""

    def decode_text(self, ids: list[int]) -> str:
        """The text of ids."""


def causal_layout(tokenizer: Any, prompt: str, max_src_len: int) -> Layout:
    """The template's prompt of one question; a long question loses its end.

    Raises ValueError where max_src_len cannot hold the template's own tokens.
    """
    template: TemplateTokenizer = tokenizer
    ids, cut = causal_question(template, prompt, max_src_len)
    prefix = ids + template.answer_header
    # What the template writes before an answer is a label: in a chat the model writes it.
    return Layout(prefix, n_masked=len(ids), reserved=len(prefix) + 1, truncated=cut)


def causal_question(
    tokenizer: TemplateTokenizer, prompt: str, max_src_len: int
) -> tuple[list[int], bool]:
    """At most `max_src_len` ids of a prompt, and whether it was cut."""
    ids = tokenizer.encode_messages([{"role": "user", "content": prompt}])
    if len(ids) <= max_src_len:
        return ids, False
    text = tokenizer.encode_text(prompt)
    kept = len(text)
    while len(ids) > max_src_len:
        kept -= len(ids) - max_src_len
        if kept < 0:
            own = len(tokenizer.encode_messages([{"role": "user", "content": ""}]))
            raise ValueError(
                f"max_src_len={max_src_len} cannot hold the {own} tokens of the chat template"
            )
        shorter = tokenizer.decode_text(text[:kept]).rstrip("\ufffd")  # half of a character
        ids = tokenizer.encode_messages([{"role": "user", "content": shorter}])
    return ids, True


def causal_chat(
    tokenizer: Any, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    """Ids of a chat by the template, up to the answer. Raises ValueError as the template does."""
    template: TemplateTokenizer = tokenizer
    messages = [*history_messages(history), {"role": role, "content": query}]
    given, tools = template_messages(messages, template.tool_role)
    return template.encode_messages(given, tools)


def template_messages(messages: list[Message], tool_role: str) -> tuple[list[Message], Any]:
    """(messages, tools) as templates take them: tools are no part of the system's message."""
    given: list[Message] = []
    tools = None
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "system" and message.get("tools") is not None:
            tools = message["tools"]
            if not content:
                continue
        entry: Message = {"role": role, "content": content}
        if role == "observation":
            entry["role"] = tool_role
        if metadata := message.get("metadata"):
            entry["metadata"] = metadata
        if (call := message.get("call")) is not None:
            function = {"name": metadata, "arguments": call}
            entry["tool_calls"] = [{"type": "function", "function": function}]
            entry["content"] = ""
        given.append(entry)
    return given, tools


def causal_response(
    text: str | list[str], history: History | None = None
) -> tuple[Answer, list[Message]]:
    """(answer, history with it). Calls of tools stay text."""
    answer = "".join(text).strip()
    return answer, [*history_messages(history), {"role": "assistant", "content": answer}]
