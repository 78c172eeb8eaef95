"""A row of somebody's JSON to a Row: FORMATS, found from a row's keys, and a map for columns of other names.

Free of torch. docs/data.md shows a row of each format.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from chatglm.conversations import Turn, check_turns, rounds_of, tool_call, with_tools


@dataclass(frozen=True)
class Row:
    """One question and its answer(s); `place` is "file:line" for messages.

    A row that is more than that has `turns`, and its last question and answer as prompt and answers.
    """

    prompt: str
    answers: tuple[str, ...]
    place: str
    turns: tuple[Turn, ...] = ()

    def with_first_answer(self) -> "Row":
        return replace(self, answers=self.answers[:1])


class BadRow(ValueError):
    """A row that no format reads; the message says where it is, what was wanted and what came."""


@dataclass(frozen=True)
class Format:
    """read(row, prompt_text) -> (prompt, answers) or a list of turns. It raises ValueError; a wrong type at a key is said by `_text`.

    A row is of this format where it has all `keys` and `also` holds.
    """

    keys: tuple[str, ...]
    read: Callable[[dict, str], tuple[str, list[str]] | list[Turn]]
    optional: tuple[str, ...] = ()
    also: Callable[[dict], bool] = lambda row: True


def _shown(value) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:60]
    except TypeError:  # a key that JSON has not
        return repr(value)[:60]


def is_missing(value) -> bool:
    """Null, or the NaN that stands for it in tables."""
    return value is None or (isinstance(value, float) and value != value)


def without_missing(row: dict) -> dict:
    """A row without the keys whose value is missing: tables give every row every key."""
    return {key: value for key, value in row.items() if not is_missing(value)}


def _text(row: dict, key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, got {_shown(value)}')
    return value


def _answers(row: dict, key: str) -> list[str]:
    """Text, or a list of texts where there are several good answers (test files)."""
    value = row[key]
    if isinstance(value, list) and value and all(isinstance(x, str) for x in value):
        return value
    return [_text(row, key)]


def _after(history, system: str, prompt: str, answers: list[str]):
    """[[question, answer], ...] and a last question as turns, or (prompt, answers) where nothing goes before them."""
    if not (
        isinstance(history, list)
        and all(
            isinstance(p, (list, tuple)) and len(p) == 2 and all(isinstance(x, str) for x in p)
            for p in history
        )
    ):
        raise ValueError(f'"history" must be a list of [question, answer], got {_shown(history)}')
    if not (history or system):
        return prompt, answers
    if len(answers) > 1:
        raise ValueError("a row with a history or a system text has one answer")
    # As ChatGLM's tutorials read such rows: the history is what was said, the last answer is what is learnt.
    turns = [t for q, a in history for t in (Turn("user", q), Turn("assistant", a, loss=False))]
    return (
        [Turn("system", system)] * bool(system)
        + turns
        + [Turn("user", prompt), Turn("assistant", answers[0])]
    )


def _instruction(row, prompt_text):
    return _text(row, "instruction") + _text(row, "input", ""), _answers(row, "output")


def _alpaca(row, prompt_text):
    prompt = "\n".join(filter(None, (_text(row, "instruction"), _text(row, "input", ""))))
    return _after(
        row.get("history") or [], _text(row, "system", ""), prompt, _answers(row, "output")
    )


def _prompt(row, prompt_text):
    return _after(row.get("history") or [], "", _text(row, "prompt"), _answers(row, "response"))


def _belle(row, prompt_text):
    # Its converter writes a space after every input.
    return _text(row, "input").rstrip(" "), _answers(row, "target")


def _list_of(row: dict, key: str) -> list[dict]:
    turns = row[key]
    if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
        raise ValueError(f'"{key}" must be a list of turns, got {_shown(turns)}')
    return [without_missing(turn) for turn in turns]


def _finish(turns: list[Turn], row: dict) -> list[Turn]:
    """The turns up to the last answer, with the row's own system text and tools. Tools may be JSON in a string."""
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    if system := _text(row, "system", ""):
        turns = [Turn("system", system), *turns]
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError(f'"tools" is not valid JSON: {_shown(tools)}') from None
    if tools:
        _json_text(tools, "tools")
    return with_tools(turns, tools) if tools else turns


def _calls(text: str | list | dict, loss: bool = True) -> list[Turn]:
    """One or several {name, arguments}, perhaps as JSON text, as ChatGLM3's calls."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        raise ValueError(
            f"a function call must be JSON of name and arguments, got {_shown(text)}"
        ) from None
    turns = []
    for call in found if isinstance(found, list) else [found]:
        arguments = (
            call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        )
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise ValueError(
                    f"a function call's arguments are not valid JSON: {_shown(arguments)}"
                ) from None
        if not (isinstance(arguments, dict) and isinstance(call.get("name"), str)):
            raise ValueError(f"a function call has a name and arguments, got {_shown(call)}")
        turns.append(Turn("assistant", tool_call(arguments), call["name"], loss))
    return turns


def _json_text(value, key: str) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise ValueError(f'"{key}" must be text or JSON, got {_shown(value)}') from None


def _role(turn: dict, key: str, names: dict[str, str], number: int) -> str:
    value = turn.get(key)
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f'turn {number}: "{key}" is one of {", ".join(names)}, got {_shown(value)}'
        )
    return names[value]


SPEAKERS = {
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


def _sharegpt(row, prompt_text):
    turns: list[Turn] = []
    for number, turn in enumerate(_list_of(row, "conversations"), 1):
        role = _role(turn, "from", SPEAKERS, number)
        turns += _calls(turn.get("value")) if role == "call" else [Turn(role, _text(turn, "value"))]
    return _finish(turns, row)


def _chatglm3(row, prompt_text):
    turns: list[Turn] = []
    for turn in _list_of(row, "conversations"):
        loss = turn.get("loss", True)
        if not isinstance(loss, bool):
            raise ValueError(f'"loss" must be true or false, got {_shown(loss)}')
        if turn.get("role") == "tool":
            if not isinstance(turn.get("parameters"), dict):
                raise ValueError(
                    f'"parameters" of a tool turn must be an object, got {_shown(turn.get("parameters"))}'
                )
            turns.append(
                Turn("assistant", tool_call(turn["parameters"]), _text(turn, "name"), loss)
            )
            turns.append(Turn("observation", _json_text(turn.get("observation"), "observation")))
        else:
            turns.append(Turn(_text(turn, "role"), _text(turn, "content"), loss=loss))
    return _finish(turns, row)


ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "observation",
    "function": "observation",
}


def _openai(row, prompt_text):
    turns: list[Turn] = []
    for number, message in enumerate(_list_of(row, "messages"), 1):
        role = _role(message, "role", ROLE_NAMES, number)
        text, calls = _parts(message.get("content"))
        asked = message.get("tool_calls") or []
        if not isinstance(asked, list):
            raise ValueError(f'"tool_calls" must be a list, got {_shown(asked)}')
        calls += [call.get("function", call) if isinstance(call, dict) else call for call in asked]
        calls += [message["function_call"]] if message.get("function_call") else []
        if text or not calls:
            turns.append(Turn(role, text))
        if calls:
            turns += _calls(calls)
    return _finish(turns, row)


def _parts(content) -> tuple[str, list]:
    """(text, tool calls) of a message's content: text, nothing, or a list of parts. Reasoning is no part of what is said."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        raise ValueError(f'"content" must be text or a list of parts, got {_shown(content)}')
    texts, calls = [], []
    for part in content:
        kind = part.get("type")
        value = part.get("value", part.get(kind) if isinstance(kind, str) else None)
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "tool_call":
            calls += (
                value
                if isinstance(value, list)
                else [json.loads(value) if isinstance(value, str) else value]
            )
        elif kind != "reasoning":
            raise ValueError(
                f'a part of "content" is text, reasoning or a tool_call, got {_shown(part)}'
            )
    return "\n".join(texts), calls


def _speaks(key: str) -> Callable[[dict], bool]:
    def check(row):
        turns = row["conversations"]
        return (
            isinstance(turns, list)
            and bool(turns)
            and isinstance(turns[0], dict)
            and key in turns[0]
        )

    return check


# The first that fits a row's keys is its format.
FORMATS: dict[str, Format] = {
    "openai": Format(("messages",), _openai, ("tools",)),
    "sharegpt": Format(("conversations",), _sharegpt, ("system", "tools"), _speaks("from")),
    "chatglm3": Format(("conversations",), _chatglm3, ("tools",), _speaks("role")),
    "prompt": Format(("prompt", "response"), _prompt, ("history",)),
    "alpaca": Format(
        ("instruction", "output"),
        _alpaca,
        ("input", "system", "history"),
        lambda row: "history" in row or "system" in row,
    ),
    "instruction": Format(("instruction", "output"), _instruction, ("input",)),
    "question": Format(
        ("question", "answer"),
        lambda row, prompt_text: (_text(row, "question"), _answers(row, "answer")),
    ),
    "text": Format(
        ("text", "answer"),
        lambda row, prompt_text: (prompt_text + _text(row, "text"), _answers(row, "answer")),
    ),
    "advertisegen": Format(
        ("content", "summary"),
        lambda row, prompt_text: (_text(row, "content"), _answers(row, "summary")),
    ),
    "belle": Format(("input", "target"), _belle),
    "context": Format(
        ("context", "target"),
        lambda row, prompt_text: (_text(row, "context"), _answers(row, "target")),
    ),
}
COLUMNS_REMEDY = (
    "; columns of other names are read with --columns, such as prompt=title,response=body"
)
COLUMN_NAMES = tuple(dict.fromkeys(name for f in FORMATS.values() for name in f.keys + f.optional))


def find_format(row: dict, remedy: str = "") -> str:
    """The format of a row; a key without a value is no key.

    Raises ValueError naming the keys that are missing, followed by `remedy`.
    """
    given, row = row, without_missing(row)
    for name, form in FORMATS.items():
        if all(key in row for key in form.keys) and form.also(row):
            return name
    if "conversations" in row:
        raise ValueError(
            f'"conversations" must be a list of {{from, value}} or {{role, content}}, got {_shown(row["conversations"])}'
        )
    near = max(FORMATS.values(), key=lambda form: sum(key in row for key in form.keys))
    if (
        missing := [key for key in near.keys if key not in row]
        if any(key in row for key in near.keys)
        else []
    ):
        check_present(given, missing[0])
        raise ValueError(
            f'no key "{missing[0]}"; a row with "{next(k for k in near.keys if k in row)}" has {", ".join(near.keys)}{remedy}'
        )
    wanted = " or ".join(
        dict.fromkeys(", ".join(f'"{key}"' for key in form.keys) for form in FORMATS.values())
    )
    raise ValueError(
        f"no format has these keys: {', '.join(map(str, row))[:200] or 'none'}; wanted {wanted}{remedy}"
    )


def check_present(row: dict, key: str):
    """Raises ValueError where a key that a format needs has no value."""
    if key in row:
        raise ValueError(f'"{key}" must be text, got {_shown(row[key])}')


def parse_columns(text: str) -> dict[str, str]:
    """ "prompt=question,response=answer" -> {"prompt": "question", "response": "answer"}: our name, the file's column."""
    columns: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not (equals and column) or name not in COLUMN_NAMES or name in columns:
            raise ValueError(
                f"--columns wants NAME=COLUMN,... with each NAME once, of {', '.join(COLUMN_NAMES)}; got {pair!r}"
            )
        columns[name] = column
    return columns


def parse_row(
    item,
    place: str,
    prompt_text: str = "",
    data_format: str = "auto",
    columns: dict[str, str] | None = None,
) -> Row:
    """A JSON value to a Row.

    An empty answer is one: "nothing", and the end token is learnt (spo_0.json has such rows).

    Args:
        prompt_text: stands before the text of {text, answer}.
        data_format: a name of FORMATS, or "auto": found from the keys.
        columns: our names -> the file's; other columns are not read. None: the caller has no --columns.
    Raises:
        BadRow: saying what was wanted, what came, and where.
    """
    try:
        if not isinstance(item, dict):
            raise ValueError(f"wanted an object, got {type(item).__name__}")
        if columns:
            item = rename(item, columns)
        remedy = COLUMNS_REMEDY if columns == {} else ""
        form = FORMATS[find_format(item, remedy) if data_format == "auto" else data_format]
        given, item = item, without_missing(item)
        if missing := [key for key in form.keys if key not in item]:
            check_present(given, missing[0])
            raise ValueError(
                f'no key "{missing[0]}"; --data_format {data_format} has {", ".join(form.keys)}'
            )
        made = form.read(item, prompt_text)
        row = (
            from_turns(made, place)
            if isinstance(made, list)
            else Row(made[0], tuple(made[1]), place)
        )
        if not row.prompt:
            raise ValueError("the prompt is empty")
        "".join(
            [
                row.prompt,
                *row.answers,
                *(text for turn in row.turns for text in (turn.content, turn.metadata)),
            ]
        ).encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{place}: half a surrogate pair in the text: {error.object[error.start]!a}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place}: {error}") from None
    return row


def rename(item: dict, columns: dict[str, str]) -> dict:
    """The named columns under our names. Raises ValueError naming a column that a format needs and the row has not."""
    optional = {name for form in FORMATS.values() for name in form.optional} - {
        name for form in FORMATS.values() for name in form.keys
    }
    for name, column in columns.items():
        if column not in item and name not in optional:
            raise ValueError(
                f'no column "{column}" (--columns {name}={column}); the row has {", ".join(map(str, item))[:200] or "none"}'
            )
    return {name: item[column] for name, column in columns.items() if column in item}


def from_turns(turns: list[Turn], place: str) -> Row:
    """A conversation as a Row: a single question and answer is a plain one."""
    check_turns(turns)
    prompt = [turn.content for turn in turns if turn.role == "user"][-1]
    answer = turns[-1].content
    plain = [turn.role for turn in turns] == ["user", "assistant"] and not turns[1].metadata
    return Row(prompt, (answer,), place, () if plain else tuple(turns))


def refused_by(row: Row, family_name: str) -> str | None:
    """Why a family cannot say a row, or None."""
    if row.turns and family_name != "glm3":
        try:
            rounds_of(list(row.turns))
        except ValueError as error:
            return f"{row.place}: {error}"
    return None


def single_questions(rows: list[Row], flag: str) -> list[Row]:
    """The rows, for who asks each its prompt alone. Raises ValueError at a conversation, whose history would be lost."""
    if talk := next((row for row in rows if row.turns), None):
        raise ValueError(f"{talk.place}: {flag} asks single questions, this row is a conversation")
    return rows
