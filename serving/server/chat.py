"""Chats as OpenAI's clients write them, for the ChatGLM families.

Bodies to requests, messages to prompts, tokens to text. Free of torch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from chatglm.families import Family, family_of
from serving.server.fields import ignored, read_fields

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

MARKS = ",!:;?"  # whose width ChatGLM-6B's answers settle by the character that follows
YEAR = "[[训练时间]]"
CLEANED = 4  # characters within which decoding may yet remove a space (" n't")
DECODED = 256  # tokens; a longer answer is decoded less often than at every token


@dataclass(frozen=True)
class ChatRequest:
    """A body of /v1/chat/completions, checked. Attributes that are None were not said.

    Attributes:
        messages: (role, text), role one of system, user, assistant; the last is the user's.
        max_length: tokens of prompt and answer together.
        stop, stop_token_ids: texts and tokens that end the answer and are no part of it.
        ignored: names of fields that nothing here knows.
    """

    messages: tuple[tuple[str, str], ...]
    model: str | None = None
    max_tokens: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    do_sample: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    stream: bool = False
    include_usage: bool = False
    slo_s: float | None = None
    ignored: tuple[str, ...] = ()


def parse_body(body: Any) -> ChatRequest:
    """The request that a body's JSON says.

    Raises:
        ValueError: in one line, where a field is not what serving.server.fields wants or is not
            obeyed.
    """
    found = read_fields(body)
    if (most := found.pop("max_completion_tokens", None)) is not None:
        found["max_tokens"] = most
    found["include_usage"] = found.pop("stream_options", False)
    return ChatRequest(**found, ignored=ignored(body))


def encode_messages(
    tokenizer: "FamilyTokenizer", messages: tuple[tuple[str, str], ...], **as_tuned: Any
) -> list[int]:
    """The family's chat prompt.

    ChatGLM3 takes messages as they are. The others know no system role: the system's text opens
    the first question.

    Args:
        as_tuned: options of the family's encode_chat.
    Raises:
        ValueError: for ChatGLM-6B and ChatGLM2-6B, messages of user and assistant that do not
            take turns.
    """
    family = tokenizer_family(tokenizer)
    if family.roles:
        history = [{"role": role, "content": text} for role, text in messages[:-1]]
        return family.encode_chat(tokenizer, messages[-1][1], history, **as_tuned)
    system: list[str] = []
    texts: list[str] = []
    for role, text in messages:
        if role == "system":
            system.append(text)
            continue
        if role != ("user", "assistant")[len(texts) % 2]:
            raise ValueError(
                "messages of user and assistant must take turns, the user first: "
                f"{family.title} knows only rounds"
            )
        texts.append(text)
    texts[0] = "\n\n".join([*system, texts[0]])
    return family.encode_chat(
        tokenizer, texts[-1], list(zip(texts[:-1:2], texts[1::2])), **as_tuned
    )


def prompt_of(messages: tuple[tuple[str, str], ...]) -> str:
    """What a length predictor is asked: the last question, after the system's text.

    Earlier rounds are left out.
    """
    system = [text for role, text in messages if role == "system"]
    return "\n\n".join([*system, messages[-1][1]])


def unfinished_length(text: str, whole: tuple[str, ...]) -> int:
    """How long the longest ending of `text` is that begins, but is not, one of `whole`.

    One pass for each over as much of the text as it is long.
    """
    return max((ending(text, one) for one in whole), default=0)


def ending(text: str, one: str) -> int:
    borders, matched = borders_of(one), 0
    for character in text[max(len(text) - len(one) + 1, 0) :]:
        while matched and one[matched] != character:
            matched = borders[matched - 1]
        matched += one[matched] == character
    return matched


@lru_cache(64)
def borders_of(one: str) -> tuple[int, ...]:
    """Of each beginning of a text, the length of its longest proper ending that begins it too.

    Knuth, Morris and Pratt, 1977.
    """
    borders, length = [0], 0
    for character in one[1:]:
        while length and one[length] != character:
            length = borders[length - 1]
        length += one[length] == character
        borders.append(length)
    return tuple(borders)


def tokenizer_family(tokenizer: "FamilyTokenizer") -> Family:
    """The family of a loaded tokenizer, which always has one."""
    return family_of(tokenizer)


class TextStream:
    """An answer's text as its tokens come.

    What add() returns is never taken back; followed by what end() returns, it is the answer.

    Attributes:
        sent: the text so far.
        stopped: a stop string has come; the answer ends before it.
    """

    def __init__(self, tokenizer: "FamilyTokenizer", stops: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        family = tokenizer_family(tokenizer)
        self._marks = MARKS if family.name == "glm" else ""
        # ChatGLM3's first line is its message's header, blank but for tool calls, which stay text
        # here.
        self._process = family.answer_text
        self._hidden = set(map(tokenizer.get_command, family.role_tokens))
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
        text = self._process(text[: len(text) - unfinished_length(text, (YEAR,))])
        if text and text[-1] in self._marks:
            text = text[:-1]
        return self._send(text, growing=True)

    def end(self) -> str:
        """The rest of the text."""
        return self._send(self._process(self._decode()), growing=False)

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        assert isinstance(text, str)  # a list only for a batch
        return text

    def _send(self, text: str, growing: bool) -> str:
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.stopped, text = True, text[: min(places)]
        elif growing:
            text = text[: len(text) - unfinished_length(text, self._stops)]
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new
