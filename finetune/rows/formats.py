"""FORMATS: the layouts of training rows in JSON, and how each becomes a Row.

The format is found from a row's keys; columns of other names are mapped. Free of torch.
docs/data.md shows a row of each format.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from chatglm.conversations import Turn, check_turns, rounds_of, tool_call, with_tools
from chatglm.families import FAMILIES
from finetune.rows.fields import (
    ROLE_NAMES,
    SPEAKERS,
    answer_objects,
    answers_at,
    check_present,
    message_parts,
    role_of,
    score_of,
    shown_value,
    text_at,
    turn_objects,
    turns_after_history,
    without_missing,
)


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


def _instruction(row: dict, prompt_text: str) -> tuple[str, list[str]]:
    output = row["output"]
    if isinstance(output, int) and not isinstance(output, bool):
        raise ValueError(
            f'"output" must be text, got {output}: such lists of UELLM hold the answers\' lengths, '
            "not the answers"
        )
    return text_at(row, "instruction") + text_at(row, "input", ""), answers_at(row, "output")


def _alpaca(row: dict, prompt_text: str) -> tuple[str, list[str]] | list[Turn]:
    texts = (text_at(row, "instruction"), text_at(row, "input", ""))
    prompt = "\n".join(filter(None, texts))
    system = text_at(row, "system", "")
    return turns_after_history(row.get("history"), system, prompt, answers_at(row, "output"))


def _prompt(row: dict, prompt_text: str) -> tuple[str, list[str]] | list[Turn]:
    return turns_after_history(
        row.get("history"), "", text_at(row, "prompt"), answers_at(row, "response")
    )


HUMAN = "human_generated"  # the only data_type that RLHF's fine-tuning reads


def _scored(row: dict, prompt_text: str) -> tuple[str, list[str]] | list[Turn]:
    """RLHF (sunzeyeah): the answer of the highest score, the first of several such."""
    answers = answer_objects(row)
    kind = row.get("data_type", HUMAN)
    if kind != HUMAN:
        raise ValueError(f'"data_type" must be {HUMAN} or absent, got {shown_value(kind)}')
    best = max(answers, key=score_of)
    if not text_at(best, "answer"):
        raise ValueError(f"the answer of the highest score is empty: {shown_value(best)}")
    prompt = text_at(row, "prompt")
    if not prompt:
        raise ValueError("the prompt is empty")
    return turns_after_history(
        None, text_at(row, "system", ""), prompt + text_at(row, "prefix", ""), [best["answer"]]
    )


# What may stand beside the text of a document; with other keys --data_format document says so.
ABOUT_DOCUMENTS = frozenset(
    ("text", "id", "meta", "metadata", "source", "url", "title", "date", "timestamp")
)


def _is_document(row: dict) -> bool:
    return row.keys() <= ABOUT_DOCUMENTS


def _document(row: dict, prompt_text: str) -> tuple[str, list[str]]:
    text = text_at(row, "text")
    if not text.strip():
        raise ValueError('"text" is empty')
    return "", [text]


def _belle(row: dict, prompt_text: str) -> tuple[str, list[str]]:
    # Belle's converter writes a space after every input.
    return text_at(row, "input").rstrip(" "), answers_at(row, "target")


def _finish(turns: list[Turn], row: dict) -> list[Turn]:
    """The turns up to the last answer, with the row's system text and tools before them.

    Tools may be JSON in a string.
    """
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    if system := text_at(row, "system", ""):
        turns = [Turn("system", system), *turns]
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError(f'"tools" is not valid JSON: {shown_value(tools)}') from None
    if tools:
        _json_text(tools, "tools")
    return with_tools(turns, tools) if tools else turns


def _calls(text: object, loss: bool = True) -> list[Turn]:
    """ChatGLM3's calls of one or several {name, arguments}, which may be JSON text."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        raise ValueError(
            f"a function call must be JSON of name and arguments, got {shown_value(text)}"
        ) from None
    turns = []
    for call in calls if isinstance(calls, list) else [calls]:
        arguments = _call_arguments(call)
        name = call.get("name") if isinstance(call, dict) else None
        if not (isinstance(arguments, dict) and isinstance(name, str)):
            raise ValueError(f"a function call has a name and arguments, got {shown_value(call)}")
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
            f"a function call's arguments are not valid JSON: {shown_value(arguments)}"
        ) from None


def _json_text(value: object, key: str) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise ValueError(f'"{key}" must be text or JSON, got {shown_value(value)}') from None


def _sharegpt(row: dict, prompt_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, turn in enumerate(turn_objects(row, "conversations"), 1):
        role = role_of(turn, "from", SPEAKERS, number)
        if role == "call":
            turns += _calls(turn.get("value"))
        else:
            turns.append(Turn(role, text_at(turn, "value")))
    return _finish(turns, row)


def _chatglm3(row: dict, prompt_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for turn in turn_objects(row, "conversations"):
        loss = turn.get("loss", True)
        if not isinstance(loss, bool):
            raise ValueError(f'"loss" must be true or false, got {shown_value(loss)}')
        if turn.get("role") == "tool":
            parameters = turn.get("parameters")
            if not isinstance(parameters, dict):
                raise ValueError(
                    f'"parameters" of a tool turn must be an object, got {shown_value(parameters)}'
                )
            text, name = python_call(parameters), text_at(turn, "name")
            turns.append(Turn("assistant", text, name, loss, call=parameters))
            turns.append(Turn("observation", _json_text(turn.get("observation"), "observation")))
        else:
            turns.append(Turn(text_at(turn, "role"), text_at(turn, "content"), loss=loss))
    return _finish(turns, row)


def _openai(row: dict, prompt_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, message in enumerate(turn_objects(row, "messages"), 1):
        role = role_of(message, "role", ROLE_NAMES, number)
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f'turn {number}: "weight" must be 0 or 1, got {shown_value(weight)}')
        loss = weight == 1
        text, calls = message_parts(message.get("content"))
        tool_calls = message.get("tool_calls") or []
        if not isinstance(tool_calls, list):
            raise ValueError(f'"tool_calls" must be a list, got {shown_value(tool_calls)}')
        for call in tool_calls:
            calls.append(call.get("function", call) if isinstance(call, dict) else call)
        if message.get("function_call"):
            calls.append(message["function_call"])
        if text or not calls:
            turns.append(Turn(role, text, loss=loss))
        if calls:
            turns += _calls(calls, loss)
    return _finish(turns, row)


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
        lambda row, prompt_text: (text_at(row, "question"), answers_at(row, "answer")),
    ),
    "text": Format(
        ("text", "answer"),
        lambda row, prompt_text: (prompt_text + text_at(row, "text"), answers_at(row, "answer")),
    ),
    "advertisegen": Format(
        ("content", "summary"),
        lambda row, prompt_text: (text_at(row, "content"), answers_at(row, "summary")),
    ),
    "belle": Format(("input", "target"), _belle),
    "context": Format(
        ("context", "target"),
        lambda row, prompt_text: (text_at(row, "context"), answers_at(row, "target")),
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
        turns = shown_value(row["conversations"])
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
        check_unicode(row)
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


def check_unicode(row: Row) -> None:
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
