"""FORMATS: the layouts of training rows in JSON, and how each becomes a Row.

The format is found from a row's keys; columns of other names are mapped. Free of torch.
docs/data.md shows a row of each format.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatglm.conversations import Turn, check_turns, rounds_of, tool_call, with_tools
from chatglm.families import FAMILIES


@dataclass(frozen=True)
class Row:
    """One question and its answer(s); `place` is "file:line" for messages.

    A conversation has `turns` too; its last question and answer are then prompt and answers.
    A text without a question, all of which is learnt, has the prompt "" and is its one answer.
    """

    prompt: str
    answers: tuple[str, ...]
    place: str
    turns: tuple[Turn, ...] = ()

    @property
    def is_document(self) -> bool:
        """Whether it is a text without a question."""
        return not self.prompt and not self.turns

    def content(self) -> tuple[Any, ...]:
        """All that is read of the row, without its place."""
        return self.prompt, self.answers, self.turns

    def with_first_answer(self) -> "Row":
        return replace(self, answers=self.answers[:1])


class BadRow(ValueError):
    """A row that no format reads; the message says where it is, what was wanted and what it has."""


@dataclass(frozen=True)
class Format:
    """One layout. A row is of this format where it has all `keys` and `also` holds.

    Attributes:
        read: (row, prompt_text) -> (prompt, answers) or a list of turns; raises ValueError.
    """

    keys: tuple[str, ...]
    read: Callable[[dict, str], tuple[str, list[str]] | list[Turn]]
    optional: tuple[str, ...] = ()
    also: Callable[[dict], bool] = lambda row: True


def _shown(value: object) -> str:
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


def _text(row: dict, key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, got {_shown(value)}')
    return value


def _answers(row: dict, key: str) -> list[str]:
    """The answers at a key: one text, or a list of several right ones (test files)."""
    value = row[key]
    if isinstance(value, list) and value and all_texts(value):
        return value
    return [_text(row, key)]


def all_texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def all_objects(values: Sequence[object]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _is_question_and_answer(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all_texts(value)


def _after(
    history: object, system: str, prompt: str, answers: list[str]
) -> tuple[str, list[str]] | list[Turn]:
    """[[question, answer], ...] and a last question as turns; (prompt, answers) where there is
    neither a history nor a system text."""
    if not (isinstance(history, list) and all(map(_is_question_and_answer, history))):
        raise ValueError(f'"history" must be a list of [question, answer], got {_shown(history)}')
    if not (history or system):
        return prompt, answers
    if len(answers) > 1:
        raise ValueError("a row with a history or a system text has one answer")
    turns = [Turn("system", system)] if system else []
    # As in ChatGLM's tutorials, answers of the history are context: only the last one is learnt.
    for question, answer in history:
        turns += [Turn("user", question), Turn("assistant", answer, loss=False)]
    return [*turns, Turn("user", prompt), Turn("assistant", answers[0])]


def _instruction(row: dict, prompt_text: str) -> tuple[str, list[str]]:
    output = row["output"]
    if isinstance(output, int) and not isinstance(output, bool):
        raise ValueError(
            f'"output" must be text, got {output}: such lists of UELLM hold the answers\' lengths, '
            "not the answers"
        )
    return _text(row, "instruction") + _text(row, "input", ""), _answers(row, "output")


def _alpaca(row: dict, prompt_text: str) -> tuple[str, list[str]] | list[Turn]:
    texts = (_text(row, "instruction"), _text(row, "input", ""))
    prompt = "\n".join(filter(None, texts))
    system = _text(row, "system", "")
    return _after(row.get("history") or [], system, prompt, _answers(row, "output"))


def _prompt(row: dict, prompt_text: str) -> tuple[str, list[str]] | list[Turn]:
    return _after(row.get("history") or [], "", _text(row, "prompt"), _answers(row, "response"))


HUMAN = "human_generated"  # the only data_type that RLHF's fine-tuning reads


def _scored(row: dict, prompt_text: str) -> tuple[str, list[str]] | list[Turn]:
    """RLHF (sunzeyeah): the answer of the highest score, the first of several such."""
    answers = row["answers"]
    if not (isinstance(answers, list) and answers and all_objects(answers)):
        raise ValueError(f'"answers" must be a list of {{answer, score}}, got {_shown(answers)}')
    kind = row.get("data_type", HUMAN)
    if kind != HUMAN:
        raise ValueError(f'"data_type" must be {HUMAN} or absent, got {_shown(kind)}')
    best = max(answers, key=_score)
    if not _text(best, "answer"):
        raise ValueError(f"the answer of the highest score is empty: {_shown(best)}")
    prompt = _text(row, "prompt")
    if not prompt:
        raise ValueError("the prompt is empty")
    return _after([], _text(row, "system", ""), prompt + _text(row, "prefix", ""), [best["answer"]])


def _score(answer: dict) -> float:
    """The score of one of several answers; 0 where it has none."""
    score = answer.get("score", 0)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or is_missing(score):
        raise ValueError(f'"score" must be a number, got {_shown(score)}')
    return score


# What may stand beside the text of a document; with other keys --data_format document says so.
ABOUT_DOCUMENTS = frozenset(
    ("text", "id", "meta", "metadata", "source", "url", "title", "date", "timestamp")
)


def _is_document(row: dict) -> bool:
    return row.keys() <= ABOUT_DOCUMENTS


def _document(row: dict, prompt_text: str) -> tuple[str, list[str]]:
    text = _text(row, "text")
    if not text.strip():
        raise ValueError('"text" is empty')
    return "", [text]


def _belle(row: dict, prompt_text: str) -> tuple[str, list[str]]:
    # Belle's converter writes a space after every input.
    return _text(row, "input").rstrip(" "), _answers(row, "target")


def _list_of(row: dict, key: str) -> list[dict]:
    turns = row[key]
    if not (isinstance(turns, list) and turns and all_objects(turns)):
        raise ValueError(f'"{key}" must be a list of turns, got {_shown(turns)}')
    return [without_missing(turn) for turn in turns]


def _finish(turns: list[Turn], row: dict) -> list[Turn]:
    """The turns up to the last answer, with the row's system text and tools before them.

    Tools may be JSON in a string.
    """
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


def _calls(text: object, loss: bool = True) -> list[Turn]:
    """ChatGLM3's calls of one or several {name, arguments}, which may be JSON text."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        raise ValueError(
            f"a function call must be JSON of name and arguments, got {_shown(text)}"
        ) from None
    turns = []
    for call in calls if isinstance(calls, list) else [calls]:
        arguments = _call_arguments(call)
        name = call.get("name") if isinstance(call, dict) else None
        if not (isinstance(arguments, dict) and isinstance(name, str)):
            raise ValueError(f"a function call has a name and arguments, got {_shown(call)}")
        turns.append(Turn("assistant", python_call(arguments), name, loss, call=arguments))
    return turns


def python_call(arguments: dict) -> str:
    """ChatGLM3's text of a call; "" where a name is no Python name, which `refused_by` tells."""
    try:
        return tool_call(arguments)
    except ValueError:
        return ""


def _call_arguments(call: object) -> object:
    """The arguments of a function call, parsed where they are JSON text; None where it has none."""
    if not isinstance(call, dict):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        raise ValueError(
            f"a function call's arguments are not valid JSON: {_shown(arguments)}"
        ) from None


def _json_text(value: object, key: str) -> str:
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


def _sharegpt(row: dict, prompt_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, turn in enumerate(_list_of(row, "conversations"), 1):
        role = _role(turn, "from", SPEAKERS, number)
        if role == "call":
            turns += _calls(turn.get("value"))
        else:
            turns.append(Turn(role, _text(turn, "value")))
    return _finish(turns, row)


def _chatglm3(row: dict, prompt_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for turn in _list_of(row, "conversations"):
        loss = turn.get("loss", True)
        if not isinstance(loss, bool):
            raise ValueError(f'"loss" must be true or false, got {_shown(loss)}')
        if turn.get("role") == "tool":
            parameters = turn.get("parameters")
            if not isinstance(parameters, dict):
                raise ValueError(
                    f'"parameters" of a tool turn must be an object, got {_shown(parameters)}'
                )
            text, name = python_call(parameters), _text(turn, "name")
            turns.append(Turn("assistant", text, name, loss, call=parameters))
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


def _openai(row: dict, prompt_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, message in enumerate(_list_of(row, "messages"), 1):
        role = _role(message, "role", ROLE_NAMES, number)
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f'turn {number}: "weight" must be 0 or 1, got {_shown(weight)}')
        loss = weight == 1
        text, calls = _parts(message.get("content"))
        tool_calls = message.get("tool_calls") or []
        if not isinstance(tool_calls, list):
            raise ValueError(f'"tool_calls" must be a list, got {_shown(tool_calls)}')
        for call in tool_calls:
            calls.append(call.get("function", call) if isinstance(call, dict) else call)
        if message.get("function_call"):
            calls.append(message["function_call"])
        if text or not calls:
            turns.append(Turn(role, text, loss=loss))
        if calls:
            turns += _calls(calls, loss)
    return _finish(turns, row)


def _parts(content: object) -> tuple[str, list]:
    """(text, tool calls) of a message's content: text, null, or a list of parts.

    Parts of reasoning are left out.
    """
    if content is None or isinstance(content, str):
        return content or "", []
    if not (isinstance(content, list) and all_objects(content)):
        raise ValueError(f'"content" must be text or a list of parts, got {_shown(content)}')
    texts, calls = [], []
    for part in content:
        kind = part.get("type")
        value = part.get("value", part.get(kind) if isinstance(kind, str) else None)
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "tool_call":
            if isinstance(value, list):
                calls += value
            else:
                calls.append(json.loads(value) if isinstance(value, str) else value)
        elif kind != "reasoning":
            raise ValueError(
                f'a part of "content" is text, reasoning or a tool_call, got {_shown(part)}'
            )
    return "\n".join(texts), calls


def _first_turn_has(key: str) -> Callable[[dict], bool]:
    """Whether the first turn of a row's conversation has a key."""

    def check(row: dict) -> bool:
        turns = row["conversations"]
        if not isinstance(turns, list) or not turns:
            return False
        return isinstance(turns[0], dict) and key in turns[0]

    return check


# A row has the first format that fits its keys.
FORMATS: dict[str, Format] = {
    "openai": Format(("messages",), _openai, ("tools",)),
    "sharegpt": Format(("conversations",), _sharegpt, ("system", "tools"), _first_turn_has("from")),
    "chatglm3": Format(("conversations",), _chatglm3, ("tools",), _first_turn_has("role")),
    "prompt": Format(("prompt", "response"), _prompt, ("history",)),
    "scored": Format(("prompt", "answers"), _scored, ("prefix", "system", "data_type")),
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
    "document": Format(("text",), _document, also=_is_document),
}
COLUMNS_REMEDY = (
    "; columns of other names are read with --columns, such as prompt=title,response=body"
)
_REQUIRED: list[str] = []
_OPTIONAL: list[str] = []
_COLUMNS: list[str] = []
for _form in FORMATS.values():
    _REQUIRED += _form.keys
    _OPTIONAL += _form.optional
    _COLUMNS += _form.keys + _form.optional
REQUIRED_NAMES = tuple(dict.fromkeys(_REQUIRED))
OPTIONAL_NAMES = tuple(dict.fromkeys(_OPTIONAL))
COLUMN_NAMES = tuple(dict.fromkeys(_COLUMNS))


def find_format(row: dict, remedy: str = "") -> str:
    """The name of a row's format; a key whose value is missing does not count.

    Raises:
        ValueError: names the keys that are missing, followed by `remedy`.
    """
    given = row
    row = without_missing(row)
    for name, form in FORMATS.items():
        if row.keys() >= set(form.keys) and form.also(row):
            if name == "document":  # not a row of {text, answer} whose answer is missing
                check_present(given, "answer")
            return name
    if "conversations" in row:
        turns = _shown(row["conversations"])
        raise ValueError(
            f'"conversations" must be a list of {{from, value}} or {{role, content}}, got {turns}'
        )
    near = max(FORMATS.values(), key=lambda form: len(row.keys() & set(form.keys)))
    present: list[str] = []
    missing: list[str] = []
    for key in near.keys:
        (present if key in row else missing).append(key)
    if present and missing:
        check_present(given, missing[0])
        raise ValueError(
            f'no key "{missing[0]}"; a row with "{present[0]}" has {", ".join(near.keys)}{remedy}'
        )
    key_lists = []
    for form in FORMATS.values():
        key_lists.append('"' + '", "'.join(form.keys) + '"')
    wanted = " or ".join(dict.fromkeys(key_lists))
    keys = ", ".join(map(str, row))[:200] or "none"
    raise ValueError(f"no format has these keys: {keys}; wanted {wanted}{remedy}")


def check_present(row: dict, key: str) -> None:
    """Raises ValueError where a row has a key that a format needs, but its value is missing."""
    if key in row:
        raise ValueError(f'"{key}" must be text, got {_shown(row[key])}')


def parse_columns(text: str, known: tuple[str, ...] = COLUMN_NAMES) -> dict[str, str]:
    """ "prompt=question,response=answer" -> {"prompt": "question", "response": "answer"}.

    The keys are this project's names, some of `known`; the values are the file's columns. Raises
    ValueError.
    """
    columns: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        name, equals, column = map(str.strip, pair.partition("="))
        if not (equals and column) or name not in known or name in columns:
            names = ", ".join(known)
            raise ValueError(
                f"--columns wants NAME=COLUMN,... with each NAME once, of {names}; got {pair!r}"
            )
        columns[name] = column
    return columns


def parse_row(
    item: object,
    place: str,
    prompt_text: str = "",
    data_format: str = "auto",
    columns: dict[str, str] | None = None,
) -> Row:
    """The Row of a JSON value.

    An empty answer is allowed: the model learns to end at once (spo_0.json has such rows).

    Args:
        place: "file:line", for messages.
        prompt_text: stands before the text of {text, answer}.
        data_format: a name of FORMATS, or "auto": found from the keys.
        columns: this project's names -> the file's columns; other columns are not read. None: the
            caller has no --columns.
    Raises:
        BadRow: its message says what was wanted, what the value is, and where.
    """
    try:
        row = _read_row(item, place, prompt_text, data_format, columns)
        _check_unicode(row)
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{place}: half a surrogate pair in the text: {error.object[error.start]!a}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place}: {error}") from None
    return row


def _read_row(
    item: object,
    place: str,
    prompt_text: str,
    data_format: str,
    columns: dict[str, str] | None,
) -> Row:
    """As `parse_row`, but raises ValueError without the place."""
    if not isinstance(item, dict):
        raise ValueError(f"wanted an object, got {type(item).__name__}")
    if columns:
        item = rename(item, columns)
    remedy = COLUMNS_REMEDY if columns == {} else ""
    form = FORMATS[find_format(item, remedy) if data_format == "auto" else data_format]
    given = item
    item = without_missing(given)
    if missing := [key for key in form.keys if key not in item]:
        check_present(given, missing[0])
        raise ValueError(
            f'no key "{missing[0]}"; --data_format {data_format} has {", ".join(form.keys)}'
        )
    content = form.read(item, prompt_text)
    if isinstance(content, list):
        row = from_turns(content, place)
    else:
        prompt, answers = content
        row = Row(prompt, tuple(answers), place)
    if not row.prompt and form is not FORMATS["document"]:
        raise ValueError("the prompt is empty")
    return row


def _check_unicode(row: Row) -> None:
    """Raises UnicodeEncodeError for text that UTF-8 cannot hold."""
    texts = [row.prompt, *row.answers]
    for turn in row.turns:
        texts += [turn.content, turn.metadata]
    "".join(texts).encode()


def rename(item: dict, columns: dict[str, str]) -> dict:
    """A row with the columns that --columns names, under this project's names.

    Raises:
        ValueError: the row does not have a column that a format needs.
    """
    for name, column in columns.items():
        is_needed = name in REQUIRED_NAMES or name not in OPTIONAL_NAMES
        if column not in item and is_needed:
            present = ", ".join(map(str, item))[:200] or "none"
            raise ValueError(
                f'no column "{column}" (--columns {name}={column}); the row has {present}'
            )
    return {name: item[column] for name, column in columns.items() if column in item}


def from_turns(turns: list[Turn], place: str) -> Row:
    """The Row of a conversation; one of a single question and answer has no `turns`."""
    check_turns(turns)
    prompt = [turn.content for turn in turns if turn.role == "user"][-1]
    answer = turns[-1].content
    is_plain = [turn.role for turn in turns] == ["user", "assistant"] and not turns[1].metadata
    return Row(prompt, (answer,), place, () if is_plain else tuple(turns))


def refused_by(row: Row, family_name: str) -> str | None:
    """Why a family has no layout for a row; None where it has one."""
    if not row.turns:
        return None
    try:
        if not FAMILIES[family_name].roles:
            rounds_of(list(row.turns))
        if family_name == "glm3":
            for turn in row.turns:
                tool_call(turn.call or {})
    except ValueError as error:
        return f"{row.place}: {error}"
    return None


def single_questions(rows: list[Row], flag: str) -> list[Row]:
    """The same rows, for a caller that asks only their prompts.

    Raises:
        ValueError: a row is a conversation, whose history would be lost, or has no question.
    """
    for row in rows:
        if row.is_document:
            raise ValueError(f"{row.place}: {flag} asks questions, this row is a text without one")
        if row.turns:
            raise ValueError(
                f"{row.place}: {flag} asks single questions, this row is a conversation"
            )
    return rows
