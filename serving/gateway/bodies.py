"""Bodies of requests: their fields, and fields added to them without touching the other bytes.

`parse_request_body` reads a body, `RequestBody.with_fields` writes the one that an upstream gets.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHITESPACE = " \t\n\r"
SPACES = re.compile(f"[{WHITESPACE}]*")
# Reading millions of values, or of members of the whole, would hold up all other requests.
MOST_VALUES, MOST_MEMBERS = 2**20, 1024
MOST_ANSWERS = 128  # that are counted as load: an engine refuses more
MOST_LIMIT = 2**31 - 1  # tokens of an answer, likewise
PREFIX_CHARACTERS = 512  # from one prefix of a long message to the next
MOST_PROMPT_PREFIXES = 256  # of a prompt
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Member:
    """One member of a JSON object: its value, and the places of its name and value in the text."""

    value: Any
    name_start: int
    start: int
    end: int

    def span_with_comma(self, text: str) -> tuple[int, int]:
        """(start, end) of name and value, with the comma that parts them from a neighbour."""
        after = _after_space(text, self.end)
        if text[after] == ",":
            return self.name_start, after + 1
        start = len(text[: self.name_start].rstrip(WHITESPACE))
        if text[start - 1] == ",":
            start -= 1
        return start, self.end


@dataclass(frozen=True)
class RequestBody:
    """What the gateway reads of a request's body.

    Attributes:
        text: the JSON.
        members: of the object; of equal names the last.
        prompt: the text for the length predictor; None where there is none, as for token ids.
        max_tokens: of the answer; None where the request sets no limit.
        answers: how many are asked for.
        slo_s: seconds within which the whole answer is wanted; None without the field.
    """

    text: str
    members: Mapping[str, Member]
    prompt: str | None
    max_tokens: int | None
    answers: int
    slo_s: float | None

    def with_fields(self, fields: Mapping[str, Any], without: str | None = None) -> str:
        """The JSON with these fields in front, or merged into objects that are there.

        Fields that the client has given stay; all other bytes stay as they are. The field `without`
        is taken out.
        """
        new_fields: dict[str, Any] = {}
        edits: list[tuple[int, int, str]] = []  # (start, end, what takes the place of that text)
        for name, value in fields.items():
            member = self.members.get(name)
            if member is None:
                new_fields[name] = value
            elif isinstance(value, Mapping) and isinstance(member.value, dict):
                replacement = json.dumps(merged(member.value, value))
                edits.append((member.start, member.end, replacement))
        members_left = len(self.members)
        if without is not None and without in self.members:
            start, end = self.members[without].span_with_comma(self.text)
            edits.append((start, end, ""))
            members_left -= 1
        text = self.text
        for start, end, replacement in sorted(edits, reverse=True):  # the last first: none moves
            text = text[:start] + replacement + text[end:]
        if not new_fields:
            return text
        inserted = json.dumps(new_fields, separators=(",", ":"))[1:-1]  # without the braces
        if members_left:
            inserted += ","
        after_brace = text.index("{") + 1
        return text[:after_brace] + inserted + text[after_brace:]


def merged(given: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the members of `added` that it lacks, in its objects too."""
    whole = dict(given)
    for name, value in added.items():
        if name not in whole:
            whole[name] = value
        elif isinstance(value, Mapping) and isinstance(whole[name], dict):
            whole[name] = merged(whole[name], value)
    return whole


def parse_request_body(body: bytes) -> RequestBody | None:
    """The fields of a body; None where it is no JSON object, which the engine will say itself.

    None too where it may hold more than MOST_VALUES values, by its commas.
    """
    if body.count(b",") >= MOST_VALUES:
        return None
    try:
        text = body.decode()
        members = object_members(text)
    except (ValueError, RecursionError):
        return None
    values = {name: member.value for name, member in members.items()}
    count = values.get("n")
    answers = 1
    if isinstance(count, int) and count > 1:
        answers = min(count, MOST_ANSWERS)
    return RequestBody(
        text=text,
        members=members,
        prompt=text_to_predict(values),
        max_tokens=least_limit(values),
        answers=answers,
        slo_s=positive_seconds(values.get("slo_s")),
    )


def positive_seconds(value: Any) -> float | None:
    """A number above 0 as a float; None where a field is none."""
    if not isinstance(value, (int, float)):
        return None
    try:
        seconds = float(value)
    except OverflowError:  # a whole number beyond a float's range
        return None
    return seconds if 0 < seconds < math.inf else None


def object_members(text: str) -> dict[str, Member]:
    """The members of the object that a JSON text is, with the places of their values.

    Raises:
        ValueError: it is no object, or no JSON, or has more than MOST_MEMBERS.
    """
    members: dict[str, Member] = {}
    place = _after_space(text, 0)
    if text[place : place + 1] != "{":
        raise ValueError("no JSON object")
    place = _after_space(text, place + 1)
    if text[place : place + 1] == "}":
        return members
    for _ in range(MOST_MEMBERS):
        name_start = place
        name, place = _decoder.raw_decode(text, name_start)
        place = _after_space(text, place)
        if not isinstance(name, str) or text[place : place + 1] != ":":
            raise ValueError("no JSON object")
        start = _after_space(text, place + 1)
        value, place = _decoder.raw_decode(text, start)
        members[name] = Member(value, name_start, start, place)
        place = _after_space(text, place)
        if text[place : place + 1] == "}":
            break
        if text[place : place + 1] != ",":
            raise ValueError("no JSON object")
        place = _after_space(text, place + 1)
    else:
        raise ValueError("too many members")
    if text[place + 1 :].strip(WHITESPACE):
        raise ValueError("no JSON object")
    return members


def _after_space(text: str, place: int) -> int:
    found = SPACES.match(text, place)
    assert found is not None  # it matches nothing too
    return found.end()


def least_limit(values: Mapping[str, Any]) -> int | None:
    """The tokens after which an answer is cut, by OpenAI's fields and Ollama's."""
    candidates = []
    options = values.get("options")
    if isinstance(options, dict):
        candidates.append(options.get("num_predict"))
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        candidates.append(values.get(name))
    limits = []
    for limit in candidates:
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            limits.append(min(limit, MOST_LIMIT))
    return min(limits, default=None)


def text_to_predict(values: Mapping[str, Any]) -> str | None:
    """The system's text and the last question, as serving.server gives them to its predictor.

    Of completions, which have no roles, the prompt; None where a request has no text.
    """
    messages = values.get("messages")
    if isinstance(messages, list):
        return chat_text(messages)
    items = values.get("input")  # of /v1/responses: a text, or messages
    if isinstance(items, list):
        return chat_text(items, values.get("instructions"))
    prompt = values.get("prompt") if items is None else items
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        return None
    system = values.get("instructions") or values.get("system")
    if isinstance(system, str) and system:
        return f"{system}\n\n{prompt}"
    return prompt


def prompt_prefix_hashes(parsed: RequestBody) -> tuple[int, ...]:
    """Hashes of a prompt's prefixes, of growing length: prompts that share one begin alike.

    One after each message, of any role, and within a message every PREFIX_CHARACTERS.
    """
    values = {name: member.value for name, member in parsed.members.items()}
    texts = []
    for name in ("instructions", "system", "prompt"):
        if isinstance(values.get(name), str):
            texts.append(values[name])
    messages = values.get("messages") or values.get("input")
    if isinstance(messages, str):
        texts.append(messages)
    elif isinstance(messages, list):
        for message in messages:
            if isinstance(message, dict):
                texts.append(f"{message.get('role')}\n{content_text(message.get('content'))}")
    hashes: list[int] = []
    previous = 0
    for text in texts:
        for start in range(0, len(text), PREFIX_CHARACTERS):
            block = text[start : start + PREFIX_CHARACTERS]
            previous = hash((previous, block))
            hashes.append(previous)
    return tuple(hashes[:MOST_PROMPT_PREFIXES])


def chat_text(messages: Sequence[Any], instructions: Any = None) -> str | None:
    """The texts of the system, and of the user's last message."""
    texts = [instructions] if isinstance(instructions, str) else []
    question: str | None = None
    for message in messages:
        if not isinstance(message, dict):
            return None
        role = message.get("role")
        if role in ("system", "developer"):
            texts.append(content_text(message.get("content")))
        elif role == "user":
            question = content_text(message.get("content"))
    if question is not None:
        texts.append(question)
    return "\n\n".join(texts) if texts else None


def content_text(content: Any) -> str:
    """A message's text: its content, or that of its parts of text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = []
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "\n".join(texts)
