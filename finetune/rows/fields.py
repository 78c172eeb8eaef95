"""Values of a JSON row by key, each read as what it must be: a text, a score, turns with roles.

What FORMATS and PREFERENCE_FORMATS have in common. All raise ValueError that says what was wanted
and what came, without the row's place, which the reader of the row adds. Free of torch.
"""

import json
from collections.abc import Sequence
from typing import Any

from chatglm.conversations import Turn

LARGEST_SCORE = 1e38  # scores are kept as fp32
# Names of roles -> roles of chatglm.conversations; "call" is a turn of tool calls.
SPEAKERS = {  # of {from, value}
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "function_call": "call",
    "observation": "observation",
    "tool": "observation",
    "function_response": "observation",
}
ROLE_NAMES = {  # of {role, content}
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "observation",
    "function": "observation",
}


def shown_value(value: object) -> str:
    """The beginning of a value, for error messages."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:60]
    except TypeError:  # a key that JSON does not have
        return repr(value)[:60]


def is_missing(value: object) -> bool:
    """Whether a value is null, or the NaN that stands for it in tables."""
    return value is None or (isinstance(value, float) and value != value)


def without_missing(row: dict) -> dict:
    """A row without the keys whose value is missing: in a table every row has every key."""
    return {key: value for key, value in row.items() if not is_missing(value)}


def check_present(row: dict, key: str) -> None:
    """Raises ValueError where a row has a key that a format needs, but its value is missing."""
    if key in row:
        raise ValueError(f'"{key}" must be text, got {shown_value(row[key])}')


def all_texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def all_objects(values: Sequence[object]) -> bool:
    return all(isinstance(value, dict) for value in values)


def text_at(row: dict, key: str, default: str | None = None) -> str:
    """The text at a key, or `default` where the row has no such key."""
    value = row.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, got {shown_value(value)}')
    return value


def answers_at(row: dict, key: str) -> list[str]:
    """The answers at a key: one text, or a list of several right ones (test files)."""
    value = row[key]
    if isinstance(value, list) and value and all_texts(value):
        return value
    return [text_at(row, key)]


def score_of(answer: dict) -> float:
    """The score of one of several answers; 0 where it has none."""
    score = answer.get("score", 0)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or is_missing(score):
        raise ValueError(f'"score" must be a number, got {shown_value(score)}')
    if abs(score) > LARGEST_SCORE:
        raise ValueError(
            f'"score" must be a number of at most {LARGEST_SCORE:g}, got {shown_value(score)}'
        )
    return score


def answer_objects(row: dict) -> list[dict]:
    """The {answer, score} at "answers", at least one."""
    answers = row["answers"]
    if not (isinstance(answers, list) and answers and all_objects(answers)):
        raise ValueError(
            f'"answers" must be a list of {{answer, score}}, got {shown_value(answers)}'
        )
    return answers


def turn_objects(row: dict, key: str) -> list[dict]:
    """The turns at a key, at least one, each without its missing values."""
    turns = row[key]
    if not (isinstance(turns, list) and turns and all_objects(turns)):
        raise ValueError(f'"{key}" must be a list of turns, got {shown_value(turns)}')
    return [without_missing(turn) for turn in turns]


def role_of(turn: dict, key: str, names: dict[str, str], number: int) -> str:
    """What `names` (SPEAKERS or ROLE_NAMES) calls the role at a key of turn `number` (from 1)."""
    value = turn.get(key)
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f'turn {number}: "{key}" is one of {", ".join(names)}, got {shown_value(value)}'
        )
    return names[value]


def message_parts(content: object) -> tuple[str, list]:
    """(text, tool calls) of a message's content: text, null, or a list of parts.

    Parts of reasoning are left out.
    """
    if content is None or isinstance(content, str):
        return content or "", []
    if not (isinstance(content, list) and all_objects(content)):
        raise ValueError(f'"content" must be text or a list of parts, got {shown_value(content)}')
    texts: list[str] = []
    calls: list[Any] = []
    for part in content:
        kind = part.get("type")
        value = part.get("value", part.get(kind) if isinstance(kind, str) else None)
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "tool_call":
            calls += value if isinstance(value, list) else [parsed_call(value)]
        elif kind != "reasoning":
            raise ValueError(
                f'a part of "content" is text, reasoning or a tool_call, got {shown_value(part)}'
            )
    return "\n".join(texts), calls


def parsed_call(value: object) -> object:
    """A tool call, which may be JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"a tool call must be JSON, got {shown_value(value)}") from None


def is_round(value: object) -> bool:
    """Whether a value is [question, answer]."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all_texts(value)


def turns_after_history(
    history: object, system: str, prompt: str, answers: list[str]
) -> tuple[str, list[str]] | list[Turn]:
    """[[question, answer], ...] and a last question as turns; (prompt, answers) where there is
    neither a history nor a system text.
    """
    history = history or []
    if not (isinstance(history, list) and all(map(is_round, history))):
        shown = shown_value(history)
        raise ValueError(f'"history" must be a list of [question, answer], got {shown}')
    if not (history or system):
        return prompt, answers
    if len(answers) > 1:
        raise ValueError("a row with a history or a system text has one answer")
    turns = [Turn("system", system)] if system else []
    # As in ChatGLM's tutorials, answers of the history are context: only the last one is learnt.
    for question, answer in history:
        turns += [Turn("user", question), Turn("assistant", answer, loss=False)]
    return [*turns, Turn("user", prompt), Turn("assistant", answers[0])]
