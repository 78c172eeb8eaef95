"""Prompts and training rows by a model's own chat template: the family `causal`.

What the template writes between a question and its answer, and after the answer, is found by
rendering; nothing here knows a model's control tokens. Pure functions, free of torch.
"""

import json
from typing import Any, Protocol

from .histories import Answer, History, Message, history_messages
from .prompts import Example, Layout, TextTokenizer

END = "end of an answer"  # the name by which the tokenizer's get_command knows the id


class TemplateTokenizer(TextTokenizer, Protocol):
    """What the functions below need of a tokenizer."""

    @property
    def answer_header(self) -> list[int]:
        """Ids of the blank text that the template writes between a prompt and its answer."""

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""

    @property
    def tool_role(self) -> str:
        """The template's role of a tool's result."""

    @property
    def renders_calls(self) -> bool:
        """Whether the template writes an assistant's `tool_calls`."""

    @property
    def place_of_tools(self) -> str | None:
        """Where the template reads tools: "argument", the "system" message, or nowhere."""

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
    ids, _, cut = causal_question(template, prompt, max_src_len)
    prefix = ids + template.answer_header
    return Layout(prefix, n_masked=len(ids), reserved=len(prefix) + 1, truncated=cut)


def causal_example(
    tokenizer: Any, prompt: str, answer: str, max_len: int, max_src_len: int
) -> Example:
    """One training row of at most `max_len` ids: the prompt, and what the template makes of the
    answer, its end kept however long it is.

    What stands between prompt and answer is a label: in a chat the model writes it.

    Raises ValueError where the limits leave no token for the answer.
    """
    template: TemplateTokenizer = tokenizer
    ids, question, cut = causal_question(template, prompt, max_src_len)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    learnt = written_answer(template, messages, None, ids)
    room = max_len - len(ids) - len(template.answer_header) - 1
    if room < 1:
        raise ValueError(
            f"max_len={max_len} leaves no room for an answer after a prompt of {len(ids)} tokens "
            f"(max_src_len={max_src_len}); raise max_len to at least {max_len + 1 - room} or lower "
            "max_src_len"
        )
    kept = [*learnt[:-1][: max_len - len(ids) - 1], learnt[-1]]
    return Example(ids + kept, len(ids), cut or len(kept) < len(learnt))


def causal_question(
    tokenizer: TemplateTokenizer, prompt: str, max_src_len: int
) -> tuple[list[int], str, bool]:
    """(at most `max_src_len` ids of a prompt, the question in it, whether that was cut)."""
    ids = tokenizer.encode_messages([{"role": "user", "content": prompt}])
    if len(ids) <= max_src_len:
        return ids, prompt, False
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
    return ids, shorter, True


def written_answer(
    tokenizer: TemplateTokenizer,
    messages: list[Message],
    tools: Any,
    prompt: list[int],
    call: dict[str, Any] | None = None,
) -> list[int]:
    """What the model learns to write: the last of `messages` as the template writes it, its end.

    Args:
        prompt: ids of the messages before it, up to where the answer begins.
        call: the parameters of a call of a tool that the message is.
    Raises:
        ValueError: the template leaves a call out, or writes it elsewhere than after the prompt.
    """
    end = tokenizer.get_command(END)
    whole = tokenizer.encode_messages(messages, tools, prompts_answer=False)
    said = messages[-1]["content"]
    if whole[: len(prompt)] == prompt:
        written = whole[len(prompt) :]
        written = written[: written.index(end)] if end in written else written
        text = tokenizer.decode_text(written)
        if call is None and said.strip() in text:
            return [*written, end]
        if call is not None and all(shown in text for shown in values_of(call)):
            return [*written, end]
    if call is not None:
        raise ValueError("the chat template does not write a call of a tool after the prompt")
    return [*tokenizer.answer_header, *tokenizer.encode_text(said), end]


def end_before_next(
    tokenizer: TemplateTokenizer, messages: list[Message], tools: Any, ids: list[int]
) -> int:
    """The id that ends an answer by the message after it: GLM's call ends with <|observation|>.

    Args:
        messages: up to the one after the answer, where there is one.
        ids: up to the answer's end, which is returned where the template writes no other.
    """
    before = ids[:-1]
    whole = tokenizer.encode_messages(messages, tools, prompts_answer=False)
    if whole[: len(before)] == before and whole[len(before) : len(before) + 1]:
        following = whole[len(before)]
        return following if following in tokenizer.stop_ids else ids[-1]
    return ids[-1]


def values_of(call: dict[str, Any]) -> list[str]:
    """The names of a call's parameters, and the plain words among their values."""
    texts = list(call)
    for value in call.values():
        if isinstance(value, str) and value.isalnum():
            texts.append(value)
    return texts


def causal_chat(
    tokenizer: Any, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    """Ids of a chat by the template, up to the answer. Raises ValueError as the template does."""
    template: TemplateTokenizer = tokenizer
    messages = [*history_messages(history), {"role": role, "content": query}]
    given, tools = template_messages(template, messages)
    return template.encode_messages(given, tools)


def template_messages(
    tokenizer: TemplateTokenizer, messages: list[Message]
) -> tuple[list[Message], Any]:
    """(messages, tools) as the tokenizer's template takes them.

    Raises:
        ValueError: there are tools, and the template has no place for them.
    """
    given: list[Message] = []
    tools = None
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        entry: Message = {"role": role, "content": content}
        if role == "system" and message.get("tools") is not None:
            if tokenizer.place_of_tools is None:
                raise ValueError("the model's chat template has no place for tools")
            if tokenizer.place_of_tools == "system":
                entry["tools"] = message["tools"]
            else:
                tools = message["tools"]
                if not content:
                    continue
        if role == "observation":
            entry["role"] = tokenizer.tool_role
        if metadata := message.get("metadata"):
            entry["metadata"] = metadata
        if (call := message.get("call")) is not None:
            entry |= called(tokenizer, str(metadata), call)
        given.append(entry)
    return given, tools


def called(tokenizer: TemplateTokenizer, name: str, call: dict[str, Any]) -> Message:
    """What of a message is a call of a tool, where the template reads it."""
    if not tokenizer.renders_calls:
        return {"content": json.dumps(call, ensure_ascii=False)}
    function = {"name": name, "arguments": call}
    return {"content": "", "tool_calls": [{"type": "function", "function": function}]}


def causal_response(
    text: str | list[str], history: History | None = None
) -> tuple[Answer, list[Message]]:
    """(answer, history with it). Calls of tools stay text."""
    answer = "".join(text).strip()
    return answer, [*history_messages(history), {"role": "assistant", "content": answer}]
