"""What people say of answers on the server's page: checked, and appended to a file.

python -m serving.feedback makes training rows of the file. Free of torch and, until the route is
made, of HTTP.
"""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chatglm.files import shorten
from finetune.files import utf8_json
from serving.server.access import ApiError
from serving.server.fields import CHAT_TABLE, Text
from serving.server.monitor import LogFile
from serving.server.page.bodies import ReadBody, check_fields, key_of, read_page_body
from serving.server.page.tools import OffersTools

if TYPE_CHECKING:
    from fastapi import FastAPI

FEEDBACK_ROUTE = "/page/api/feedback"
FIELDS = ("id", "model", "messages", "rating", "correction", "report")
RATINGS = ("up", "down", None)
ID_CHARACTERS = 64
MODEL_CHARACTERS = 256
CORRECTION_CHARACTERS = 200_000
REPORT_CHARACTERS = 8_000
# Of a message; others are not kept.
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")


class FeedbackFile:
    """A file of JSON lines. Of several with one id, the last counts.

    Each line is appended in one write, so two servers may share the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises OSError where it cannot be opened."""
        self.path = path
        self._file = LogFile(path)
        self._lock = threading.Lock()

    def add(self, line: dict[str, Any]) -> None:
        """Append a line. Raises OSError where it cannot be written."""
        with self._lock:
            self._file.write(utf8_json(line))
            if self._file.lost_lines:
                raise OSError(f"{self.path} cannot be written")

    def close(self) -> None:
        self._file.close()


class KeepsFeedback(OffersTools, Protocol):
    """What of a Service the route takes."""

    feedback: FeedbackFile | None


def read_feedback(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line, but for time and key.

    Raises:
        ValueError: in one line, what is wrong with a field.
    """
    check_fields(body, *FIELDS)
    name = Text("", ID_CHARACTERS).read("id", body.get("id"))
    if not (name and name.isprintable()):
        raise ValueError(
            f"id must be 1 to {ID_CHARACTERS} printable characters, got {shorten(name)}"
        )
    rating, correction = body.get("rating"), body.get("correction")
    if rating not in RATINGS:
        raise ValueError(f'rating must be "up", "down" or null, got {shorten(rating)}')
    if correction is not None:
        correction = Text("", CORRECTION_CHARACTERS).read("correction", correction)
        if not correction.strip():
            raise ValueError("correction must have a text, or be null")
    return {
        "id": name,
        "model": Text("", MODEL_CHARACTERS).read("model", body.get("model")),
        "messages": rated_messages(body.get("messages")),
        "rating": rating,
        "correction": correction,
        "report": read_report(body.get("report")),
    }


def rated_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages that end with an answer. Raises ValueError."""
    CHAT_TABLE.fields["messages"].read("messages", messages)
    kept = []
    for message in messages:
        known = {name: message[name] for name in MESSAGE_FIELDS if name in message}
        kept.append(known)
    if kept[-1]["role"] != "assistant" or not isinstance(kept[-1].get("content"), str):
        raise ValueError("messages must end with the answer: the assistant's, with its text")
    return kept


def read_report(report: Any) -> dict[str, Any] | None:
    """The server's report of the answer, as the page had it. Raises ValueError."""
    if report is None:
        return None
    if not isinstance(report, dict) or len(json.dumps(report)) > REPORT_CHARACTERS:
        most = f"at most {REPORT_CHARACTERS} characters of JSON"
        raise ValueError(f"report must be null or an object of {most}, got {shorten(report)}")
    return report


def add_feedback_routes(app: "FastAPI", service: KeepsFeedback, read_body: ReadBody) -> None:
    """The page's route of feedback, where the server has --feedback.

    Args:
        read_body: the JSON of a request; raises ApiError or ValueError.
    """
    if service.feedback is None:
        return
    from fastapi import Request as HttpRequest

    file = service.feedback

    @app.post(FEEDBACK_ROUTE, include_in_schema=False)
    async def give_feedback(http: HttpRequest) -> dict[str, Any]:
        line = await read_page_body(http, read_body, read_feedback)
        line["time"] = round(time.time(), 3)
        line["key"] = key_of(http)
        if service.page_tools is not None and any("tool_calls" in m for m in line["messages"]):
            line["tools"] = service.page_tools.descriptions()  # which the model was shown
        try:
            await asyncio.to_thread(file.add, line)
        except OSError as error:
            raise ApiError(500, f"the feedback is not kept: {error}", "failed") from None
        return {"id": line["id"]}
