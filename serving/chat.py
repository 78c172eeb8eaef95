"""Chats as OpenAI's clients write them, for the ChatGLM families: bodies to requests, messages to prompts, tokens to text. Free of torch."""

import math
from dataclasses import dataclass

from chatglm.families import FAMILIES

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NOT_HERE = {  # what is refused, unless it says what happens anyhow
    "n": (1,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
}  # fmt: skip
STOPS = 4  # stop strings, as OpenAI has it
MARKS = ",!:;?"  # whose width ChatGLM-6B's answers settle by the character that follows
YEAR = "[[训练时间]]"
CLEANED = 4  # characters within which decoding may yet remove a space (" n't")
DECODED = 256  # tokens; a longer answer is decoded less often than at every token


@dataclass(frozen=True)
class ChatRequest:
    """A body of /v1/chat/completions, checked. Attributes that are None were not said.

    Attributes:
        messages: (role, text), role one of system, user, assistant; the last is the user's.
        stop: texts that end the answer and are no part of it.
    """

    messages: tuple[tuple[str, str], ...]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    slo_s: float | None = None


def parse_body(body) -> ChatRequest:
    """Raises ValueError, in one line, where a field is not what it should be or is not supported; unknown fields are ignored."""
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object, got {type(body).__name__}")
    for name, harmless in NOT_HERE.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise ValueError(f"{name} is not supported here")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ValueError("stream_options must be an object")
    return ChatRequest(
        messages=parse_messages(body.get("messages")),
        model=checked(body, "model", str, "text"),
        max_tokens=number(body, "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens", int, 1),
        temperature=number(body, "temperature", float, 0, 2),
        top_p=number(body, "top_p", float, 0, 1, above=True),
        seed=number(body, "seed", int, -(2**63), 2**63 - 1),
        stop=parse_stop(body.get("stop")),
        stream=bool(checked(body, "stream", bool, "true or false")),
        include_usage=bool(checked(options, "include_usage", bool, "true or false")),
        slo_s=number(body, "slo_s", float, 0, 1e9, above=True),
    )


def checked(body: dict, name: str, kind: type, wanted: str):
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise ValueError(f"{name} must be {wanted}")
    return value


def number(body: dict, name: str, kind: type, least: float, most: float = math.inf, above: bool = False):
    """The field as int or float, or None; `above`: `least` itself is too little."""
    value = body.get(name)
    if value is None:
        return None
    fits = type(value) in ((int,) if kind is int else (int, float)) and least <= value <= most and not (above and value == least)
    if not fits:
        bounds = f"{'above' if above else 'at least'} {least}" + (f" and at most {most:g}" if most < math.inf else "")
        raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number {bounds}")
    return kind(value)


def parse_stop(stop) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop must be a text or at most {STOPS} texts, none of them empty")
    return tuple(stops)


def parse_messages(messages) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"messages[{i}] must be an object with a role of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if content is None and message["role"] == "assistant":
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"messages[{i}].content must be text")
        found.append((ROLES[message["role"]], content))
    if found[-1][0] != "user":
        raise ValueError("the last message must be the user's")
    return tuple(found)


def encode_messages(tokenizer, messages: tuple[tuple[str, str], ...], **as_tuned) -> list[int]:
    """The family's chat prompt. ChatGLM3 takes messages as they are; the others know no system: its text opens the first question.

    Args:
        as_tuned: options of the family's encode_chat.
    Raises:
        ValueError: for ChatGLM-6B and ChatGLM2-6B, messages of user and assistant that do not take turns.
    """
    family = FAMILIES[tokenizer.family]
    if family.name == "glm3":
        history = [{"role": role, "content": text} for role, text in messages[:-1]]
        return family.encode_chat(tokenizer, messages[-1][1], history, **as_tuned)
    system = [text for role, text in messages if role == "system"]
    turns = [(role, text) for role, text in messages if role != "system"]
    if any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns)):
        raise ValueError(f"messages of user and assistant must take turns, the user first: {family.title} knows only rounds")
    texts = [text for _, text in turns]
    texts[0] = "\n\n".join([*system, texts[0]])
    return family.encode_chat(tokenizer, texts[-1], list(zip(texts[:-1:2], texts[1::2])), **as_tuned)


def prompt_of(messages: tuple[tuple[str, str], ...]) -> str:
    """What a length predictor is asked: the last question, after the system's text; earlier rounds are left out."""
    return "\n\n".join([*(text for role, text in messages if role == "system"), messages[-1][1]])


def held(text: str, whole: tuple[str, ...]) -> int:
    """How long the longest ending of `text` is that begins, but is not, one of `whole`."""
    return max((n for w in whole for n in range(1, len(w)) if text.endswith(w[:n])), default=0)


class TextStream:
    """An answer's text as its tokens come: what add() returns is never taken back, and with what end() returns it is the answer.

    Attributes:
        sent: the text so far.
        stopped: a stop string has come; the answer ends before it.
    """

    def __init__(self, tokenizer, stops: tuple[str, ...] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        family = FAMILIES[tokenizer.family]
        self._marks = MARKS if family.name == "glm" else ""
        # ChatGLM3's first line is its message's header, blank but for tool calls, which stay text here.
        self._process = FAMILIES["glm2" if family.name == "glm3" else family.name].process_response
        roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>") if family.name == "glm3" else ()
        self._hidden = {tokenizer.get_command(role) for role in roles}
        self._ids: list[int] = []
        self._next = 1
        self.sent, self.stopped = "", False

    def add(self, token: int) -> str:
        """New text that this token made certain; it must not be a stop id."""
        if token not in self._hidden:
            self._ids.append(token)
        if self.stopped or len(self._ids) < self._next:
            return ""
        self._next = len(self._ids) + 1 + len(self._ids) // DECODED
        text = self._decode().rstrip("\ufffd")  # half of a character
        if (space := text.find(" ", max(len(text) - CLEANED, 0))) >= 0:
            text = text[:space]
        text = self._process(text[: len(text) - held(text, (YEAR,))])
        if text and text[-1] in self._marks:
            text = text[:-1]
        return self._send(text, growing=True)

    def end(self) -> str:
        """The rest of the text."""
        return self._send(self._process(self._decode()), growing=False)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _send(self, text: str, growing: bool) -> str:
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.stopped, text = True, text[: min(places)]
        elif growing:
            text = text[: len(text) - held(text, self._stops)]
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new
