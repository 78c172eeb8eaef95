"""Requests' bodies: what they ask, and fields added to them without touching the other bytes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHITESPACE = " \t\n\r"
BEGINNING_CHARACTERS = 512  # from one beginning of a long message to the next
MOST_BEGINNINGS = 256  # of a prompt
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Member:
    """One member of a JSON object: its value, and the places of its name and value in the text."""

    value: Any
    name_start: int
    start: int
    end: int

    def place_in(self, text: str) -> tuple[int, int]:
        """From its name to its end, with the comma that parts it from its neighbour."""
        after = _after_space(text, self.end)
        if text[after] == ",":
            return self.name_start, after + 1
        before = len(text[: self.name_start].rstrip(WHITESPACE))
        return before - (text[before - 1] == ","), self.end


@dataclass(frozen=True)
class AskedAnswer:
    """What a body asks for.

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
        text, fresh = self.text, dict[str, Any]()
        edits: list[tuple[int, int, str]] = []
        for name, value in fields.items():
            member = self.members.get(name)
            if member is None:
                fresh[name] = value
            elif isinstance(value, Mapping) and isinstance(member.value, dict):
                edits.append((member.start, member.end, json.dumps(merged(member.value, value))))
        left = len(self.members)
        if without is not None and without in self.members:
            edits.append((*self.members[without].place_in(text), ""))
            left -= 1
        for start, end, replacement in sorted(edits, reverse=True):
            text = text[:start] + replacement + text[end:]
        if not fresh:
            return text
        brace = text.index("{") + 1
        comma = "," if left else ""
        return text[:brace] + json.dumps(fresh, separators=(",", ":"))[1:-1] + comma + text[brace:]


def merged(given: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the members of `added` that it lacks, in its objects too."""
    whole = dict(given)
    for name, value in added.items():
        if name not in whole:
            whole[name] = value
        elif isinstance(value, Mapping) and isinstance(whole[name], dict):
            whole[name] = merged(whole[name], value)
    return whole


def asked_answer(body: bytes) -> AskedAnswer | None:
    """What a body asks; None where it is no JSON object, which the engine will say itself."""
    try:
        text = body.decode()
        members = object_members(text)
    except (ValueError, RecursionError):
        return None
    values = {name: member.value for name, member in members.items()}
    count = values.get("n")
    slo_s = values.get("slo_s")
    return AskedAnswer(
        text,
        members,
        text_to_predict(values),
        least_limit(values),
        count if isinstance(count, int) and count > 1 else 1,
        float(slo_s) if isinstance(slo_s, (int, float)) and slo_s > 0 else None,
    )


def object_members(text: str) -> dict[str, Member]:
    """The members of the object that a JSON text is, with the places of their values.

    Raises:
        ValueError: it is no object, or no JSON.
    """
    members: dict[str, Member] = {}
    place = _after_space(text, 0)
    if text[place : place + 1] != "{":
        raise ValueError("no JSON object")
    place = _after_space(text, place + 1)
    if text[place : place + 1] == "}":
        return members
    while True:
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
    if text[place + 1 :].strip(WHITESPACE):
        raise ValueError("no JSON object")
    return members


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in WHITESPACE:
        place += 1
    return place


def least_limit(values: Mapping[str, Any]) -> int | None:
    """The tokens after which an answer is cut, by OpenAI's fields and Ollama's."""
    options = values.get("options")
    given = [options.get("num_predict")] if isinstance(options, dict) else []
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        given.append(values.get(name))
    limits = []
    for limit in given:
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            limits.append(limit)
    return min(limits, default=None)


def text_to_predict(values: Mapping[str, Any]) -> str | None:
    """The system's text and the last question, as serving.server gives them to its predictor.

    Of completions, which have no roles, the prompt; None where a request has no text.
    """
    if isinstance(messages := values.get("messages"), list):
        return chat_text(messages)
    if isinstance(asked := values.get("input"), list):
        return chat_text(asked, values.get("instructions"))
    system = values.get("instructions") or values.get("system")
    prompt = values.get("prompt") if asked is None else asked
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        return None
    return f"{system}\n\n{prompt}" if isinstance(system, str) and system else prompt


def prompt_beginnings(asked: AskedAnswer) -> tuple[int, ...]:
    """Names of a prompt's beginnings, of growing length: prompts that share one begin alike.

    One after each message, whoever wrote it, and within a message every BEGINNING_CHARACTERS.
    """
    values = {name: member.value for name, member in asked.members.items()}
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
    names: list[int] = []
    last = 0
    for text in texts:
        for start in range(0, len(text), BEGINNING_CHARACTERS):
            last = hash((last, text[start : start + BEGINNING_CHARACTERS]))
            names.append(last)
    return tuple(names[:MOST_BEGINNINGS])


def chat_text(messages: Sequence[Any], instructions: Any = None) -> str | None:
    """The texts of the system, and of the user's last message."""
    system = [instructions] if isinstance(instructions, str) else []
    asked: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        role = message.get("role")
        if role in ("system", "developer"):
            system.append(content_text(message.get("content")))
        elif role == "user":
            asked.append(content_text(message.get("content")))
    return "\n\n".join([*system, *asked[-1:]]) if asked or system else None


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
