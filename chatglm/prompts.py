"""Prompts, training rows, chats and answers of each family: text to token ids and back.

Pure functions, free of torch; `families.FAMILIES` names those of each family.
"""

import ast
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Protocol

from .glm4 import ASSISTANT_NAME, tools_text
from .histories import (
    ROLES,
    Answer,
    History,
    Message,
    history_messages,
    history_rounds,
    message_text,
)

_TRAINING_TIME = "[[训练时间]]"
_TRAINING_YEAR = "2023年"


class TextTokenizer(Protocol):
    """What the layouts below need of a tokenizer."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, never a control token's."""

    def get_command(self, token: str) -> int:
        """The id of a control token."""


class EncodedPrompt(NamedTuple):
    """Ids the model sees before it writes; `truncated` is true where the prompt was cut."""

    input_ids: list[int]
    truncated: bool


class Example(NamedTuple):
    """One training row: the first `n_masked` labels are -100, the others are `input_ids`.

    `truncated` is true where the prompt or the answer was cut (the rows that a skip rule drops).
    """

    input_ids: list[int]
    n_masked: int
    truncated: bool

    @property
    def labels(self) -> list[int]:
        return [-100] * self.n_masked + self.input_ids[self.n_masked :]


# ---- token layouts ----


class Layout(NamedTuple):
    """Ids of one prompt, before an answer.

    `prefix` is what the model sees, `n_masked` how many of its ids carry no loss, `reserved` how
    many of max_len's tokens an answer's text may not use.
    """

    prefix: list[int]
    n_masked: int
    reserved: int
    truncated: bool


def truncate_prompt(ids: list[int], limit: int, tail: int) -> tuple[list[int], bool]:
    """Truncate ids to `limit`, but keep the last `tail`: "答：" and newlines ask for the answer.

    Returns the ids and whether they were truncated. Raises ValueError where limit < tail.
    """
    if limit < tail:
        raise ValueError(f"max_src_len={limit} cannot hold the {tail} closing tokens of a prompt")
    if len(ids) <= limit:
        return ids, False
    return ids[: limit - tail] + ids[len(ids) - tail :], True


def glm_text(query: str) -> str:
    return f"[Round 1]\n问：{query}\n答："


def glm_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> Layout:
    source, cut = truncate_prompt(tokenizer.encode_text(glm_text(prompt)), max_src_len, tail=3)
    prefix = source + [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    # <sop> itself is a label, as in the original's data set
    return Layout(prefix, n_masked=len(source) + 1, reserved=len(source) + 3, truncated=cut)


def glm2_text(query: str) -> str:
    return f"[Round 1]\n\n问：{query}\n\n答："


def glm2_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> Layout:
    source, cut = truncate_prompt(tokenizer.encode_text(glm2_text(prompt)), max_src_len, tail=4)
    prefix = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")] + source
    return Layout(prefix, n_masked=len(prefix), reserved=len(source) + 3, truncated=cut)


def glm3_text(query: str) -> str:
    return query


def glm3_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> Layout:
    # header and text are encoded apart, so each brings SentencePiece's own leading "▁"
    newline = tokenizer.encode_text("\n")
    source = [tokenizer.get_command("<|user|>")] + newline
    if max_src_len < len(source):
        raise ValueError(
            f"max_src_len={max_src_len} cannot hold the {len(source)} tokens of the user header"
        )
    source += tokenizer.encode_text(prompt)
    cut = len(source) > max_src_len
    source = source[:max_src_len]
    header = [tokenizer.get_command("<|assistant|>")] + newline
    prefix = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")] + source + header
    # <|assistant|> and its newline are labels here; the original reserves 6 tokens, not the 3 that
    # it needs
    reserved = len(source) + 6 + len(header)
    return Layout(prefix, n_masked=2 + len(source), reserved=reserved, truncated=cut)


def glm4_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> Layout:
    source = glm4_message(tokenizer, "user", "", prompt)
    header = 1 + len(tokenizer.encode_text("\n"))
    if max_src_len < header:
        raise ValueError(
            f"max_src_len={max_src_len} cannot hold the {header} tokens of the user header"
        )
    cut = len(source) > max_src_len
    source = source[:max_src_len]
    start = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    prefix = start + source + [tokenizer.get_command("<|assistant|>")]
    # The newline that ends the answer's header line is a label: in a chat the model writes it.
    newline = tokenizer.encode_text("\n")
    reserved = len(prefix) + len(newline) + 1
    return Layout(prefix + newline, n_masked=len(prefix), reserved=reserved, truncated=cut)


# of GLM-10B: a few words, a sentence, a text of any length
BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")


_BLANK = re.compile(r"(\[[sg]?MASK\])")


def pieces_of(prompt: str, answer: str) -> list[str]:
    """What fills each blank of a prompt: the answer, or a line of it for each of several blanks.

    Raises ValueError where several blanks have another number of lines.
    """
    blanks = len(_BLANK.findall(prompt))
    if blanks < 2:
        return [answer]
    lines = answer.split("\n")
    if len(lines) != blanks:
        raise ValueError(
            f"a prompt of {blanks} blanks needs an answer of as many lines, got {len(lines)}"
        )
    return lines


def blank_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Ids of a text in which the names of BLANKS are blanks to be filled."""
    ids: list[int] = []
    for number, part in enumerate(_BLANK.split(text)):
        if number % 2:
            ids.append(tokenizer.get_command(part))
        elif part:
            ids += tokenizer.encode_text(part)
    return ids


def truncate_around(ids: list[int], limit: int, kept: list[int]) -> list[int]:
    """At most `limit` of ids, the first ones, but all of those at the places `kept`.

    Raises ValueError where these are more.
    """
    if len(ids) <= limit:
        return ids
    if limit < len(kept):
        raise ValueError(f"max_src_len={limit} cannot hold the {len(kept)} blanks of a prompt")
    places = [place for place in range(len(ids)) if place not in kept][: limit - len(kept)]
    return [ids[place] for place in sorted([*places, *kept])]


def glm_base_context(
    tokenizer: TextTokenizer, text: str, limit: int | None
) -> tuple[list[int], bool]:
    """([CLS], a text whose blanks are to be filled, <|endoftext|>; whether it was truncated).

    A text without a blank is gone on with: a [gMASK] follows it.

    Args:
        limit: most tokens of the text; None for no limit.
    """
    blanks = [tokenizer.get_command(name) for name in BLANKS]
    ids = blank_ids(tokenizer, text)
    kept = [place for place, token in enumerate(ids) if token in blanks]
    short = ids if limit is None else truncate_around(ids, limit, kept)
    asked = [] if kept else [tokenizer.get_command("[gMASK]")]
    end = tokenizer.get_command("<|endoftext|>")
    return [tokenizer.get_command("[CLS]"), *short, *asked, end], len(short) < len(ids)


def glm_base_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> Layout:
    context, cut = glm_base_context(tokenizer, prompt, max_src_len)
    prefix = [*context, tokenizer.get_command("<|startofpiece|>")]
    return Layout(prefix, len(prefix), reserved=len(prefix) + 1, truncated=cut)


def pangu_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> Layout:
    text = tokenizer.encode_text(prompt)
    source = [tokenizer.get_command("<s>"), *text[:max_src_len], tokenizer.get_command("<sep>")]
    return Layout(source, len(source), reserved=len(source) + 1, truncated=len(text) > max_src_len)


LayoutFunction = Callable[[TextTokenizer, str, int], Layout]  # (tokenizer, prompt, max_src_len)


def encode_prompt(
    layout: LayoutFunction, tokenizer: TextTokenizer, prompt: str, max_src_len: int
) -> EncodedPrompt:
    """Ids before the answer's text, as `encode_example` lays them out with the same `max_src_len`.

    Raises ValueError where max_src_len cannot hold the family's fixed part of the prompt.
    """
    parts = layout(tokenizer, prompt, max_src_len)
    return EncodedPrompt(parts.prefix, parts.truncated)


def encode_example(
    layout: LayoutFunction,
    end_token: str,
    tokenizer: TextTokenizer,
    prompt: str,
    answer: str,
    max_len: int,
    max_src_len: int,
) -> Example:
    """One training row of at most `max_len` ids; the end token is kept however long the answer is.

    Raises ValueError where the limits leave no token for the answer.
    """
    parts = layout(tokenizer, prompt, max_src_len)
    room = max_len - parts.reserved
    if room < 1:
        raise ValueError(
            f"max_len={max_len} leaves no room for an answer after a prompt of "
            f"{len(parts.prefix)} tokens (max_src_len={max_src_len}); raise max_len to at least "
            f"{parts.reserved + 1} or lower max_src_len"
        )
    target = tokenizer.encode_text(answer)
    input_ids = parts.prefix + target[:room] + [tokenizer.get_command(end_token)]
    return Example(input_ids, parts.n_masked, parts.truncated or len(target) > room)


def glm_base_example(
    tokenizer: TextTokenizer, prompt: str, answer: str, max_len: int, max_src_len: int
) -> Example:
    """As encode_example; a piece for each of several blanks, of which all but the first begin with
    a label <|startofpiece|>.

    Raises ValueError as encode_example and pieces_of.
    """
    end = "<|endofpiece|>"
    pieces = pieces_of(prompt, answer)
    made = encode_example(glm_base_layout, end, tokenizer, prompt, pieces[0], max_len, max_src_len)
    ids, truncated = made.input_ids, made.truncated
    for piece in pieces[1:]:
        target = tokenizer.encode_text(piece)
        room = max_len - len(ids) - 2
        if room < 1:
            return Example(ids, made.n_masked, True)
        start, stop = tokenizer.get_command("<|startofpiece|>"), tokenizer.get_command(end)
        ids = [*ids, start, *target[:room], stop]
        truncated = truncated or len(target) > room
    return Example(ids, made.n_masked, truncated)


# ---- chats ----


def glm_chat_prompt(query: str, history: History | None = None, rounds: bool = False) -> str:
    """ChatGLM-6B's chat text: the bare query without history, rounds counted from 0 with it.

    With `rounds` as models are tuned here: always rounds, counted from 1.
    """
    history, query = history_rounds(history, query, "ChatGLM-6B")
    if not (history or rounds):
        return query
    first = int(rounds)
    turns = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history, first))
    return f"{turns}[Round {len(history) + first}]\n问：{query}\n答："


def glm2_build_prompt(query: str, history: History | None = None) -> str:
    """ChatGLM2-6B's chat text: rounds counted from 1, also without history."""
    history, query = history_rounds(history, query, "ChatGLM2-6B")
    rounds = "".join(
        f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, 1)
    )
    return f"{rounds}[Round {len(history) + 1}]\n\n问：{query}\n\n答："


def glm3_message(tokenizer: TextTokenizer, role: str, metadata: str, content: str) -> list[int]:
    """Ids of one ChatGLM3 message: role token, header line, content.

    Raises ValueError for an unknown role.
    """
    if role not in ROLES:
        raise ValueError(f"role is one of {', '.join(ROLES)}, got {role!r}")
    header = tokenizer.encode_text(f"{metadata}\n")
    return [tokenizer.get_command(f"<|{role}|>")] + header + tokenizer.encode_text(content)


def glm4_message(tokenizer: TextTokenizer, role: str, metadata: str, content: str) -> list[int]:
    """Ids of one GLM-4 message, as the base release encodes it: header line and content apart.

    A message without content has no ids at all. Raises ValueError for an unknown role.
    """
    return glm3_message(tokenizer, role, metadata, content) if content else []


def check_user_role(role: str) -> None:
    if role != "user":
        raise ValueError(f"only ChatGLM3 and GLM-4 have roles, got role={role!r}")


def glm_chat(
    tokenizer: TextTokenizer,
    query: str,
    history: History | None = None,
    role: str = "user",
    rounds: bool = False,
) -> list[int]:
    check_user_role(role)
    ids = tokenizer.encode_text(glm_chat_prompt(query, history, rounds))
    return ids + [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]


def glm2_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    check_user_role(role)
    ids = tokenizer.encode_text(glm2_build_prompt(query, history))
    return [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")] + ids


def glm3_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    for message in history_messages(history):
        if (content := message_text(message)) is not None:
            ids += glm3_message(tokenizer, message["role"], message.get("metadata") or "", content)
    # no newline after the last role: the model writes its own header line
    return ids + glm3_message(tokenizer, role, "", query) + [tokenizer.get_command("<|assistant|>")]


def glm4_system(
    tokenizer: TextTokenizer, content: str | None, tools: list[Any] | None
) -> list[int]:
    """Ids of a system message: one message of the tools, if any, and one of the text, if any."""
    ids = []
    if tools is not None:
        name = getattr(tokenizer, "assistant_name", ASSISTANT_NAME)
        ids += glm4_message(tokenizer, "system", "", tools_text(tools, name))
    return ids + glm4_message(tokenizer, "system", "", content or "")


def glm4_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    for message in history_messages(history):
        content = message.get("content")
        if message["role"] == "system":
            ids += glm4_system(tokenizer, content, message.get("tools"))
        else:
            metadata = message.get("metadata") or ""
            ids += glm4_message(tokenizer, message["role"], metadata, content or "")
    ids += glm4_message(tokenizer, role, "", query)
    return ids + [tokenizer.get_command("<|assistant|>")]


def single_prompt(title: str, query: str, history: History | None = None) -> str:
    """The text of a prompt for a model that answers one prompt; a system's text stands before it.

    Args:
        title: the family's, for errors.
    Raises:
        ValueError: the history has rounds.
    """
    rounds, query = history_rounds(history, query, title)
    if rounds:
        raise ValueError(f"{title} answers one prompt: it knows no history of a chat")
    return query


def glm_base_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    check_user_role(role)
    text = single_prompt("GLM-10B", query, history)
    if (blanks := len(_BLANK.findall(text))) > 1:
        raise ValueError(
            f"GLM-10B fills one blank of a request, got {blanks}: "
            "python -m finetune.predict fills several"
        )
    context, _ = glm_base_context(tokenizer, text, None)
    return [*context, tokenizer.get_command("<|startofpiece|>")]


def pangu_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    check_user_role(role)
    ids = tokenizer.encode_text(single_prompt("Pangu-alpha", query, history))
    return [tokenizer.get_command("<s>"), *ids, tokenizer.get_command("<sep>")]


# ---- answers ----

_FULL_WIDTH = dict(zip(",!:;?", "，！：；？"))
_MARK_BESIDE_CHINESE = re.compile(r"[,!:;?](?:(?<=[\u4e00-\u9fff].)|(?=[\u4e00-\u9fff]))")


def glm_response(text: str) -> str:
    """Strip, fill in the training year, make punctuation beside Chinese characters full-width."""
    return _MARK_BESIDE_CHINESE.sub(lambda mark: _FULL_WIDTH[mark[0]], glm2_response(text))


def glm2_response(text: str) -> str:
    """Strip and fill in the training year."""
    return text.strip().replace(_TRAINING_TIME, _TRAINING_YEAR)


def parse_tool_call(code: str) -> dict[str, Any]:
    """Keywords of a `tool_call(name=value, ...)` text, read as JSON or literals, never executed.

    Raises ValueError where the text is anything but one such call.
    """
    try:
        source = code.strip()
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "tool_call":
            raise ValueError("not a call of tool_call")
        if call.args:
            raise ValueError("arguments must be distinct keywords")
        parameters: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in parameters:
                raise ValueError("arguments must be distinct keywords")
            written = ast.get_source_segment(source, keyword.value) or ""
            parameters[keyword.arg] = read_value(written, keyword.value)
        return parameters
    # deep nesting makes the parser run out of stack or memory before it finds a syntax error
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"wanted tool_call(name=literal, ...), got {code[:200]!r}: {error}"
        ) from None


def read_value(written: str, tree: ast.expr) -> Any:
    """A value of a call: JSON, as constrained answers write it, or else a Python literal.

    Raises ValueError, TypeError or RecursionError where it is neither.
    """
    try:
        return json.loads(written, parse_constant=refuse_constant)
    except ValueError:
        return ast.literal_eval(tree)


def refuse_constant(name: str) -> NoReturn:
    """Raises ValueError: NaN and the infinities, which Python's JSON takes, are no JSON."""
    raise ValueError(f"{name} is no JSON number")


def parse_fenced_call(body: str) -> dict[str, Any]:
    """Parameters of ChatGLM3's tool call, which stands between a fence's two lines."""
    lines = body.strip().split("\n")
    return parse_tool_call("\n".join(lines[1:-1]))


def parse_json_call(body: str) -> dict[str, Any]:
    """Parameters of GLM-4's tool call, a JSON object. Raises ValueError for anything else."""
    try:
        parameters = json.loads(body)
    except RecursionError:
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"wanted a JSON object of parameters, got {body[:200]!r}")
    return parameters


def messages_response(
    parse_call: Callable[[str], dict[str, Any]],
    text: str | list[str],
    history: History | None = None,
) -> tuple[Answer, list[Message]]:
    """Split an answer into its messages; `history` is copied, not changed.

    Args:
        text: of the answer, <|assistant|> between its messages; or those messages.
        parse_call: the parameters of a tool call's text; raises ValueError for other text.
    Returns:
        (content, new history). Content is the last message's text, but
        {name, parameters} for a tool call, where the history opens with a system message that has
        tools;
        {name, content} for other metadata (code interpreter), and for what should be a tool call
        but is none that `parse_call` reads.
    """
    history = history_messages(history)
    has_tools = bool(history) and history[0]["role"] == "system" and "tools" in history[0]
    content: Answer = ""
    for response in text.split("<|assistant|>") if isinstance(text, str) else text:
        metadata, newline, body = response.partition("\n")
        if not newline:
            metadata, body = "", response
        if not metadata.strip():
            body = body.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": body})
            content = body.replace(_TRAINING_TIME, _TRAINING_YEAR)
            continue
        history.append({"role": "assistant", "metadata": metadata, "content": body})
        content = {"name": metadata.strip(), "content": body}
        if has_tools:
            with suppress(ValueError):
                content = {"name": metadata.strip(), "parameters": parse_call(body)}
    return content, history


def split_at(ids: list[int], separator: int) -> list[list[int]]:
    """The parts of ids between those that equal `separator`."""
    parts: list[list[int]] = [[]]
    for index in ids:
        if index == separator:
            parts.append([])
        else:
            parts[-1].append(index)
    return parts
