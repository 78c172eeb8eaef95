"""Rows of files as requests: questions and chats as train.py reads them, and OpenAI's batch form.

A row that is none of these keeps its place, with what is wrong with it. Free of torch and of HTTP.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chatglm.files import shorten
from finetune.files import utf8_json
from finetune.rows.fields import is_missing
from finetune.rows.formats import BadRow, Row
from finetune.rows.sources import DELIMITERS, RowReader, parse_sources, read_items
from serving.endpoints.replies import CHAT_PATH, NumberedRequest, last_question

# Fields of a request that a row may have beside its question.
ROW_SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "stop",
    "repetition_penalty",
    "slo_s",
    "priority",
    "adapter",
)
ANSWER_KEYS = ("response", "output", "answer")  # what a row to be answered may lack
PATHS = "/v1"  # what OpenAI's urls begin with


@dataclass(frozen=True)
class BatchRow:
    """A row of the input.

    Attributes:
        place: "file:line".
        body: of its request; None where `refusal` says why there is none.
        custom_id: of OpenAI's form; None for rows of other forms.
        path: of its request, below the API's address.
        prompt: the last question. reference: right answers that the row has.
        columns: of a table, as they are.
    """

    place: str
    body: dict[str, Any] | None = None
    refusal: str | None = None
    custom_id: str | None = None
    path: str = CHAT_PATH
    prompt: str = ""
    reference: tuple[str, ...] = ()
    columns: Mapping[str, str] | None = None

    def request(self, number: int) -> NumberedRequest:
        assert self.body is not None
        return NumberedRequest(number, self.body, self.path)

    def digest(self) -> str:
        """Of what is asked: an answer that was kept is of this row only with the same one."""
        asked = json.dumps([self.path, self.body], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class RowDefaults:
    """What rows get that do not say otherwise.

    Attributes:
        settings: fields of a request; a seed counts up with the rows.
        system: text that a chat begins with.
    """

    settings: Mapping[str, Any]
    system: str | None = None

    def applied(self, row: BatchRow, number: int) -> BatchRow:
        """The row with the defaults; those of OpenAI's form are sent as they are."""
        if row.body is None or row.custom_id is not None:
            return row
        settings = dict(self.settings)
        if isinstance(settings.get("seed"), int):
            settings["seed"] += number
        messages = list(row.body["messages"])
        if self.system and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return replace(row, body=settings | row.body | {"messages": messages})


def read_batch(text: str, reader: RowReader, defaults: RowDefaults) -> list[BatchRow]:
    """The rows of --input.

    Raises:
        ValueError, OSError: a file cannot be read as a whole, or there is no row.
    """
    rows: list[BatchRow] = []
    for place, item in items_of(text):
        rows.append(defaults.applied(batch_row(item, place, reader), len(rows)))
    if not rows:
        raise ValueError(f"--input {text}: no rows")
    return rows


def items_of(text: str) -> Iterator[tuple[str, object]]:
    """(place, value) of every row of the sources in `text`."""
    for source in parse_sources(text, "--input", weights=False):
        yield from read_items(source)


def batch_row(item: object, place: str, reader: RowReader) -> BatchRow:
    """A value as a row; what is wrong with it is its `refusal`."""
    if isinstance(item, BadRow):
        return BatchRow(place, refusal=str(item))
    if not isinstance(item, dict):
        return BatchRow(place, refusal=f"{place}: wanted an object, got {type(item).__name__}")
    if "custom_id" in item and "body" in item:
        return openai_row(item, place)
    columns = item if is_of_table(place) else None
    try:
        utf8_json(item)  # a Parquet file's rows may hold times and bytes
        values, settings = split_settings(item)
        row = chat_row(values, place, reader)
    except (ValueError, TypeError) as error:
        return BatchRow(place, refusal=str(error), columns=columns)
    assert row.body is not None
    return replace(row, body=settings | row.body, columns=columns)


def is_of_table(place: str) -> bool:
    """Whether a row's file is a table."""
    file = place.rpartition(":")[0].removesuffix(".gz")
    return file.endswith(tuple(DELIMITERS))


def openai_row(item: dict[str, Any], place: str) -> BatchRow:
    """A line {custom_id, method, url, body} of OpenAI's batch files."""
    custom_id, url, body = item["custom_id"], item.get("url"), item["body"]
    if not isinstance(custom_id, str):
        return BatchRow(place, refusal=f"{place}: custom_id must be text")
    row = BatchRow(place, custom_id=custom_id)
    if item.get("method", "POST") != "POST":
        return replace(row, refusal=f"{place}: method must be POST")
    if not isinstance(url, str) or not url.startswith(f"{PATHS}/"):
        return replace(row, refusal=f"{place}: url must be one like /v1/chat/completions")
    if not isinstance(body, dict):
        return replace(row, refusal=f"{place}: body must be an object")
    messages = body.get("messages")
    asked = ""
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        asked = last_question(messages)
    return replace(row, body=body, path=url.removeprefix(PATHS), prompt=asked)


def split_settings(item: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the row without them, the fields of a request) of a row.

    In a table, whose values are texts, they are read as JSON.
    """
    values: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in item.items():
        if key not in ROW_SETTINGS:
            values[key] = value
            continue
        if is_missing(value) or value == "":
            continue
        if isinstance(value, str) and key not in ("adapter", "stop"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError(f"{key}: wanted a number, got {shorten(value)}") from None
        settings["model" if key == "adapter" else key] = value
    return values, settings


def chat_row(values: dict[str, Any], place: str, reader: RowReader) -> BatchRow:
    """A chat {"messages": ...}, or a question of any form that train.py reads.

    Raises:
        ValueError: in one line, where it is none.
    """
    messages = values.get("messages")
    if isinstance(messages, list) and reader.data_format == "auto" and not reader.columns:
        return messages_row(values, messages, place)
    row = read_question(values, place, reader)
    if not row.turns:
        body = {"messages": [{"role": "user", "content": row.prompt}]}
        return BatchRow(place, body, prompt=row.prompt, reference=row.answers)
    turns = row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns
    asked: list[dict[str, Any]] = []
    for turn in turns:
        if turn.tools or turn.metadata:
            raise ValueError(f"{place}: tools and their calls are read in OpenAI's form alone")
        asked.append({"role": turn.role, "content": turn.content})
    return BatchRow(place, {"messages": asked}, prompt=row.prompt, reference=row.answers)


def messages_row(values: dict[str, Any], messages: list[Any], place: str) -> BatchRow:
    """A chat in OpenAI's form, with `tools` where it has them; a last answer is its reference."""
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{place}: messages must be a list of objects")
    reference: tuple[str, ...] = ()
    if messages[-1].get("role") == "assistant" and len(messages) > 1:
        reference = (str(messages[-1].get("content") or ""),)
        messages = messages[:-1]
    body: dict[str, Any] = {"messages": messages}
    if values.get("tools"):
        body["tools"] = values["tools"]
    return BatchRow(place, body, prompt=last_question(messages), reference=reference)


def read_question(values: dict[str, Any], place: str, reader: RowReader) -> Row:
    """A row that may lack its answer. Raises BadRow."""
    try:
        return reader.row(values, place)
    except BadRow as error:
        for key in ANSWER_KEYS:
            if key in values:
                continue
            try:
                return replace(reader.row(values | {key: ""}, place), answers=())
            except BadRow:
                continue
        raise error
