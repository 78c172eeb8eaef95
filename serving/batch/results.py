"""What came of rows: kept on disk as it comes, and written in the order of the rows."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.files import KeptLines, utf8_json
from finetune.rows.sources import DELIMITERS
from serving.batch.inputs import BatchRow
from serving.endpoints.replies import AnswerRefused, ChatReply

OUTPUT_COLUMNS = ("prompt", "answer", "reference", "finish_reason", "output_tokens", "error")
Outcome = ChatReply | AnswerRefused


class KeptReplies(KeptLines):
    """Replies that are kept, each with its row's number and digest: rows may be added or changed.

    Refusals are not kept: they are asked again.
    """

    def found(self, rows: Sequence[BatchRow]) -> dict[int, ChatReply]:
        """{number: reply} of the rows that have one."""
        replies = {}
        for line in self.lines:
            number, digest, body, seconds = json.loads(line)
            is_asked = 0 <= number < len(rows) and rows[number].body is not None
            if is_asked and rows[number].digest() == digest:
                replies[number] = ChatReply(body, seconds)
        return replies

    def is_whole(self, line: str) -> bool:
        if not super().is_whole(line):
            return False
        kinds = list(map(type, json.loads(line)))
        return len(kinds) == 4 and kinds[:3] == [int, str, dict] and kinds[3] in (int, float)

    def add(self, number: int, row: BatchRow, reply: ChatReply) -> None:
        self.keep([number, row.digest(), reply.body, round(reply.seconds, 4)])


def output_text(rows: Sequence[BatchRow], outcomes: Mapping[int, Outcome], suffix: str) -> str:
    """The output file: JSON lines, or a table for .csv and .tsv.

    Args:
        outcomes: {number of a row: what came of it}; rows without one have a `refusal`.
    """
    entries = []
    for number, row in enumerate(rows):
        outcome = outcomes.get(number)
        if outcome is None:
            outcome = AnswerRefused(row.refusal or "no answer")
        entries.append(outcome)
    if suffix in DELIMITERS:
        return table_text(rows, entries, DELIMITERS[suffix])
    lines = []
    for row, outcome in zip(rows, entries):
        entry = own_entry(row, outcome) if row.custom_id is None else openai_entry(row, outcome)
        lines.append(utf8_json(entry) + "\n")
    return "".join(lines)


def own_entry(row: BatchRow, outcome: Outcome) -> dict[str, Any]:
    """As finetune.predict writes it, with how the answer ended, or with the error."""
    entry: dict[str, Any] = {"prompt": row.prompt, "answer": None}
    entry["reference"] = list(row.reference)
    if isinstance(outcome, AnswerRefused):
        return entry | {"error": placed_error(row, outcome)}
    entry["answer"] = outcome.text
    if "tool_calls" in outcome.message:
        entry["tool_calls"] = outcome.message["tool_calls"]
    entry |= {"finish_reason": outcome.finish_reason, "output_tokens": outcome.output_tokens}
    if outcome.predicted:
        entry["predicted_tokens"] = dict(outcome.predicted)
    return entry


def placed_error(row: BatchRow, refusal: AnswerRefused) -> str:
    """A refusal with its row's place."""
    text = str(refusal)
    return text if text.startswith(row.place) else f"{row.place}: {text}"


def openai_entry(row: BatchRow, outcome: Outcome) -> dict[str, Any]:
    """A line of OpenAI's batch output."""
    digest = row.digest()
    entry: dict[str, Any] = {"id": f"batch_req_{digest}", "custom_id": row.custom_id}
    if row.body is None:
        error = {"code": "invalid_request", "message": row.refusal}
        return entry | {"response": None, "error": error}
    status, body = 200, {}
    if isinstance(outcome, AnswerRefused):
        status, body = outcome.status, {"error": outcome.error()}
    else:
        body = outcome.body
    response = {"status_code": status, "request_id": str(body.get("id", digest)), "body": body}
    return entry | {"response": response, "error": None}


def table_text(rows: Sequence[BatchRow], outcomes: Sequence[Outcome], delimiter: str) -> str:
    """A table of OUTPUT_COLUMNS, after the input's own columns, or the ids of OpenAI's form."""
    names: dict[str, None] = {}
    for row in rows:
        if row.custom_id is not None:
            names["custom_id"] = None
        names |= dict.fromkeys(row.columns or {})
    own = [name for name in names if name not in OUTPUT_COLUMNS]
    text = io.StringIO()
    table = csv.DictWriter(text, [*own, *OUTPUT_COLUMNS], delimiter=delimiter, lineterminator="\n")
    table.writeheader()
    for row, outcome in zip(rows, outcomes):
        entry = own_entry(row, outcome)
        reference = entry["reference"]
        entry["reference"] = reference[0] if len(reference) == 1 else ""
        if len(reference) > 1:
            entry["reference"] = json.dumps(reference, ensure_ascii=False)
        line: dict[str, Any] = {}
        for name in own:
            line[name] = (row.columns or {}).get(name, "")
        if row.custom_id is not None:
            line["custom_id"] = row.custom_id
        for name in OUTPUT_COLUMNS:
            line[name] = entry.get(name)
        table.writerow(line)
    # Half a surrogate pair, which a row's JSON can hold, has no bytes in a table.
    return text.getvalue().encode("utf-8", "replace").decode("utf-8")
