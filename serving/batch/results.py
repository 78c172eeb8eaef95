"""What came of rows: kept on disk as it comes, and written in the order of the rows."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from finetune.files import write_aside
from serving.batch.inputs import BatchRow
from serving.endpoints.replies import AnswerRefused, ChatReply

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # of tables, by the output's suffix
OUTPUT_COLUMNS = ("prompt", "answer", "reference", "finish_reason", "output_tokens", "error")
Outcome = ChatReply | AnswerRefused


class KeptReplies:
    """Replies on disk, beside the file that they are for, so that a killed command resumes.

    The first line says what all of them depend on; where that has changed, they are discarded. A
    reply is found again by its row's number and digest, so rows may be added or changed. Refusals
    are not kept: they are asked again.
    """

    def __init__(self, final: Path, depends_on: Mapping[str, Any]) -> None:
        self.final = final
        self.path = final.with_name(f".{final.name}.partial")
        header = json.dumps(depends_on, ensure_ascii=False, sort_keys=True)
        lines: list[str] = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        # What follows the last line's end was not written whole.
        self._lines = [header, *(lines[1:-1] if lines[:1] == [header] else [])]
        self._file: TextIO | None = None  # a command that fails before a reply leaves no file

    def found(self, rows: Sequence[BatchRow]) -> dict[int, ChatReply]:
        """{number: reply} of the rows that have one."""
        replies = {}
        for line in self._lines[1:]:
            number, digest, body, seconds = json.loads(line)
            is_asked = number < len(rows) and rows[number].body is not None
            if is_asked and rows[number].digest() == digest:
                replies[number] = ChatReply(body, seconds)
        return replies

    def add(self, number: int, row: BatchRow, reply: ChatReply) -> None:
        if self._file is None:
            write_aside(self.path, "".join(line + "\n" for line in self._lines))
            self._file = open(self.path, "a", encoding="utf-8")
        entry = [number, row.digest(), reply.body, round(reply.seconds, 4)]
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def replace_by(self, text: str) -> None:
        """Write the final file, then remove the kept replies."""
        write_aside(self.final, text)
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)


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
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
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
    return text.getvalue()
