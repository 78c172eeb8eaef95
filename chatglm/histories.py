"""Histories of a chat in both forms: (query, answer) pairs, and messages with roles. Pure.

What was not said is None: the answer of a round that waits for one, the content of a message.
"""

import json
from collections.abc import Iterable
from typing import Any, TypeAlias

from .files import shorten

ROLES = ("system", "user", "assistant", "observation")
TOOL_PREAMBLE = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)
Message: TypeAlias = dict[str, Any]  # role, content; ChatGLM3: metadata, tools
History: TypeAlias = list[Any]  # a caller's, of either form; the functions below check it
Answer: TypeAlias = str | dict[str, Any]  # ChatGLM3's tool calls and code are dicts
FORMS = '[(query, answer), ...] or [{"role": ..., "content": ...}, ...]'


def history_messages(history: Iterable[Any] | None) -> list[Message]:
    """New messages (role, content, perhaps metadata and tools) of a history in either form.

    Raises:
        ValueError: it has neither form.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns_of(history)):
        if isinstance(turn, dict):
            check_message(turn, f"history[{number}]")
            messages.append(dict(turn))
            continue
        pair = check_pair(turn, f"history[{number}]")
        for role, text in zip(("user", "assistant"), pair):
            if text is not None:
                messages.append({"role": role, "content": text})
    return messages


def turns_of(history: Iterable[Any] | None) -> list[Any]:
    """The turns of a history. Raises ValueError where it is no sequence of turns."""
    if isinstance(history, (str, bytes, dict)) or not isinstance(history, (Iterable, type(None))):
        raise ValueError(f"history must be {FORMS}, got {shorten(history)}")
    return list(history or [])


def check_message(turn: Message, place: str) -> None:
    """Raises ValueError where a turn is no message."""
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{place}: role is one of {', '.join(ROLES)}, got {shorten(role)}")
    if not isinstance(content, (str, type(None))):
        raise ValueError(f"{place}: content must be text, got {shorten(content)}")
    if not isinstance(turn.get("metadata"), (str, type(None))):
        raise ValueError(f"{place}: metadata must be text, got {shorten(turn['metadata'])}")
    if not isinstance(turn.get("tools"), (list, dict, type(None))):
        raise ValueError(f"{place}: tools must be a list, got {shorten(turn['tools'])}")


def check_pair(turn: object, place: str) -> tuple[str | None, str | None]:
    """The query and answer of a turn. Raises ValueError where it is no pair."""
    pair = tuple(turn) if isinstance(turn, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(text, (str, type(None))) for text in pair):
        raise ValueError(f"{place}: history must be {FORMS}, got {shorten(turn)}")
    return pair


def message_text(message: Message) -> str | None:
    """What ChatGLM3 is shown of a message, its tools below its text; None where it says nothing."""
    content = message.get("content")
    if message["role"] == "system" and message.get("tools") is not None:
        tools = json.dumps(message["tools"], indent=4, ensure_ascii=False)
        return f"{TOOL_PREAMBLE if content is None else content}\n{tools}"
    return content


def refuse_tools(message: Message, place: str, title: str) -> None:
    """Raises ValueError where a message holds tools, their results or a call of one."""
    if message["role"] == "observation" or message.get("metadata") or message.get("tools"):
        raise ValueError(f"{place}: {title} knows no tools; ChatGLM3 and GLM-4 do")


def history_rounds(
    history: Iterable[Any] | None, query: str, title: str
) -> tuple[list[tuple[str, str]], str]:
    """((question, answer) rounds, query) for a family without roles.

    A system's text stands before the next question.

    Args:
        title: the family's, for errors.
    Raises:
        ValueError: the history has neither form, or holds tools, which only ChatGLM3 knows.
    """
    rounds: list[tuple[str, str]] = []
    system = ""
    for number, turn in enumerate(turns_of(history)):
        if not isinstance(turn, dict):
            question, answer = (text or "" for text in check_pair(turn, f"history[{number}]"))
            rounds.append((system + question, answer))
            system = ""
            continue
        check_message(turn, f"history[{number}]")
        refuse_tools(turn, f"history[{number}]", title)
        role, content = turn["role"], turn.get("content")
        if role == "system":
            system += f"{content}\n" if content else ""
        elif role == "user":
            rounds.append((system + (content or ""), ""))
            system = ""
        elif not rounds:
            rounds.append(("", content or ""))
        else:
            question, said = rounds[-1]
            rounds[-1] = (question, "\n".join(filter(None, (said, content))))
    return rounds, system + query


def new_round(history: History, query: str, answer: str) -> History:
    """What a round adds to a history, in the form of what it holds; pairs where it is empty."""
    if history and isinstance(history[-1], dict):
        return [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    return [(query, answer)]
