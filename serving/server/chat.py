"""OpenAI chat requests for the ChatGLM families.

Bodies to requests, messages to prompts, tokens to text. Free of torch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from chatglm.chat_template import called_tools
from chatglm.families import Family, family_of
from serving.server.fields import ChatMessage, read_fields, unknown_fields
from serving.server.tools import check_tools

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

# ChatGLM-6B's answers have these in half or full width, depending on the next character.
WIDTH_AMBIGUOUS_MARKS = ",!:;?"
YEAR_TOKEN = "[[训练时间]]"
SPACE_LOOKBACK = 4  # characters; decoding may still remove a space among the last ones (" n't")
DECODE_EVERY = 256  # tokens; the text is decoded one token less often for each so many


@dataclass(frozen=True)
class ChatRequest:
    """A body of /v1/chat/completions, checked. Attributes that are None were not given.

    Attributes:
        messages: the last is the user's, a tool's result, or the assistant's, which the answer
            goes on with.
        tools: what the model is shown of tools, as OpenAI's objects.
        gives_function_call: the client is of openai 0.28 and gets `function_call`.
        logit_bias: (token id, what is added to its logit).
        max_length: tokens of prompt and answer together.
        stop, stop_token_ids: texts and tokens that end the answer and are not part of it.
        unknown_fields: names of unknown fields.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...] = ()
    gives_function_call: bool = False
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
    logit_bias: tuple[tuple[int, float], ...] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    stream: bool = False
    include_usage: bool = False
    slo_s: float | None = None
    unknown_fields: tuple[str, ...] = ()


def parse_body(body: Any) -> ChatRequest:
    """The request in a body's JSON.

    Raises:
        ValueError: in one line, where serving.server.fields refuses a field.
    """
    fields_read = read_fields(body)
    if (max_tokens := fields_read.pop("max_completion_tokens", None)) is not None:
        fields_read["max_tokens"] = max_tokens
    fields_read["include_usage"] = fields_read.pop("stream_options", False)
    functions = fields_read.pop("functions", ())
    shows_tools = fields_read.pop("tool_choice", True)
    shows_functions = fields_read.pop("function_call", True)
    tools = fields_read.pop("tools", ()) or functions
    fields_read["tools"] = tools if shows_tools and shows_functions else ()
    fields_read["gives_function_call"] = bool(functions)
    return ChatRequest(**fields_read, unknown_fields=unknown_fields(body))


def encode_messages(
    tokenizer: "FamilyTokenizer",
    messages: tuple[ChatMessage, ...],
    tools: tuple[dict[str, Any], ...] = (),
    **prompt_options: Any,
) -> list[int]:
    """The family's chat prompt.

    ChatGLM3 and GLM-4 take messages as they are. The others have no system role: the system's
    text is put before the first question, and messages of one role in a row are joined. A last
    message of the assistant is the beginning of the answer.

    Args:
        tools: stand in the system's message.
        prompt_options: options of the family's encode_chat.
    Raises:
        ValueError: for ChatGLM-6B and ChatGLM2-6B, messages of which the assistant's are first;
            tools, their calls or results for a family that knows none.
    """
    family = tokenizer_family(tokenizer)
    if tools or any(message.calls or message.role == "observation" for message in messages):
        check_tools(family)
    if messages[-1].role == "assistant":
        asked = encode_messages(tokenizer, messages[:-1], tools, **prompt_options)
        return asked + answer_beginning(tokenizer, messages[-1].text)
    if family.roles:
        history = message_dicts(messages, tools, family)
        last = history.pop()
        return family.encode_chat(
            tokenizer, last["content"], history, last["role"], **prompt_options
        )
    system: list[str] = []
    texts: list[str] = []
    for role, text, _ in messages:
        if role == "system":
            system.append(text)
            continue
        if role == ("user", "assistant")[len(texts) % 2]:
            texts.append(text)
        elif texts:
            texts[-1] += f"\n{text}"
        else:
            raise ValueError(
                f"the first message must be the user's: {family.title} knows only rounds"
            )
    texts[0] = "\n\n".join([*system, texts[0]])
    return family.encode_chat(
        tokenizer, texts[-1], list(zip(texts[:-1:2], texts[1::2])), **prompt_options
    )


def answer_beginning(tokenizer: "FamilyTokenizer", text: str) -> list[int]:
    """Ids of an answer's beginning: what the family writes before it, then the text."""
    prompt = encode_messages(tokenizer, (ChatMessage("user", "a"),))
    family = tokenizer_family(tokenizer)
    trained = family.encode_prompt(tokenizer, "a", len(prompt) + 64).input_ids
    has_header = family.roles and trained[: len(prompt)] == prompt
    return [*(trained[len(prompt) :] if has_header else []), *tokenizer.encode_text(text)]


def message_dicts(
    messages: tuple[ChatMessage, ...], tools: tuple[dict[str, Any], ...], family: Family
) -> list[dict[str, Any]]:
    """Messages as a history of a family with roles."""
    history: list[dict[str, Any]] = []
    for role, text, calls in messages:
        if text or not calls:
            history.append({"role": role, "content": text})
        history += called_tools(list(calls), family.name, "messages")
    if tools:
        if history[0]["role"] != "system":
            history.insert(0, {"role": "system", "content": None})
        history[0]["tools"] = list(tools)
    return history


def prompt_of(messages: tuple[ChatMessage, ...]) -> str:
    """The prompt for the length predictor: the system's text and the last question.

    Earlier rounds are left out.
    """
    system = [text for role, text, _ in messages if role == "system"]
    asked = [text for role, text, _ in messages if role == "user"]
    return "\n\n".join([*system, asked[-1]])


def longest_partial_match(text: str, patterns: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `patterns`.

    Linear in the length of the patterns.
    """
    return max((partial_match_length(text, pattern) for pattern in patterns), default=0)


def partial_match_length(text: str, pattern: str) -> int:
    borders, matched = prefix_function(pattern), 0
    for character in text[max(len(text) - len(pattern) + 1, 0) :]:
        while matched and pattern[matched] != character:
            matched = borders[matched - 1]
        matched += pattern[matched] == character
    return matched


@lru_cache(64)
def prefix_function(pattern: str) -> tuple[int, ...]:
    """For each prefix of a pattern, the length of its longest proper suffix that is a prefix too.

    Knuth, Morris and Pratt, 1977.
    """
    borders, length = [0], 0
    for character in pattern[1:]:
        while length and pattern[length] != character:
            length = borders[length - 1]
        length += pattern[length] == character
        borders.append(length)
    return tuple(borders)


def tokenizer_family(tokenizer: "FamilyTokenizer") -> Family:
    """The family of a loaded tokenizer, which always has one."""
    return family_of(tokenizer)


class TextStream:
    """An answer's text as its tokens come.

    The answer is the concatenation of what add() returns and what end() returns.

    Attributes:
        sent: the text so far.
        stopped: a stop string has come; the answer ends before it.
    """

    def __init__(self, tokenizer: "FamilyTokenizer", stops: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        family = tokenizer_family(tokenizer)
        self._marks = WIDTH_AMBIGUOUS_MARKS if family.name == "glm" else ""
        # ChatGLM3's first line is its message's header, blank but for tool calls, which stay text
        # here.
        self._process = family.answer_text
        self._hidden = set(map(tokenizer.get_command, family.role_tokens))
        self._ids: list[int] = []
        self._next = 1
        self.sent, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that is certain since this token, which must not be a stop id."""
        if token not in self._hidden:
            self._ids.append(token)
        if self.stopped or len(self._ids) < self._next:
            return ""
        self._next = len(self._ids) + 1 + len(self._ids) // DECODE_EVERY
        text = self._decode().rstrip("\ufffd")  # an incomplete character
        if (space := text.find(" ", max(len(text) - SPACE_LOOKBACK, 0))) >= 0:
            text = text[:space]
        text = self._process(text[: len(text) - longest_partial_match(text, (YEAR_TOKEN,))])
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
            text = text[: len(text) - longest_partial_match(text, self._stops)]
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new
