"""The three ChatGLM generations: their prompts, answers and chats, and how to tell them apart.

Free of torch and transformers, so that `FAMILIES` can feed `choices=` without a slow import.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .files import read_json
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


@dataclass(frozen=True)
class Family:
    """One generation of ChatGLM: names, defaults and text/id layouts.

    chat_defaults: generate()'s options in a chat where the caller gives none; `max_length` counts
        the prompt
    prompt_text(query) -> str: a training prompt's text (glm3: the query itself; its role and
        newline are ids)
    encode_prompt(tokenizer, prompt, max_src_len) -> EncodedPrompt
    encode_example(tokenizer, prompt, answer, max_len, max_src_len) -> Example
    encode_chat(tokenizer, query, history=None, role="user") -> list[int]: ids of a chat up to the
        answer
    chat_prompt(query, history=None) -> str: text of a chat; None for glm3, whose roles have no
        text form
    process_response(text) -> str; glm3: process_response(text, history) -> (content, new history)

    History is [(query, answer), ...] or message dicts (role, content; glm3: metadata, tools);
    ValueError for any other form. Lengths are in tokens.
    """

    name: str
    title: str
    layers_prefix: str
    tokenizer_file: str
    end_token: str
    stop_tokens: tuple[str, ...]
    chat_defaults: dict[str, Any]
    prompt_text: Callable[[str], str]
    encode_prompt: Callable[[Any, str, int], EncodedPrompt]
    encode_example: Callable[[Any, str, str, int, int], Example]
    encode_chat: Callable[..., list[int]]
    chat_prompt: Callable[..., str] | None
    process_response: Callable[..., Any]


# ---- token layouts ----


class _Layout(NamedTuple):
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


def _glm_text(query: str) -> str:
    return f"[Round 1]\n问：{query}\n答："


def _glm_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> _Layout:
    source, cut = truncate_prompt(tokenizer.encode_text(_glm_text(prompt)), max_src_len, tail=3)
    prefix = source + [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    # <sop> itself is a label, as in the original's data set
    return _Layout(prefix, n_masked=len(source) + 1, reserved=len(source) + 3, truncated=cut)


def _glm2_text(query: str) -> str:
    return f"[Round 1]\n\n问：{query}\n\n答："


def _glm2_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> _Layout:
    source, cut = truncate_prompt(tokenizer.encode_text(_glm2_text(prompt)), max_src_len, tail=4)
    prefix = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")] + source
    return _Layout(prefix, n_masked=len(prefix), reserved=len(source) + 3, truncated=cut)


def _glm3_text(query: str) -> str:
    return query


def _glm3_layout(tokenizer: TextTokenizer, prompt: str, max_src_len: int) -> _Layout:
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
    return _Layout(prefix, n_masked=2 + len(source), reserved=reserved, truncated=cut)


LayoutFunction = Callable[[TextTokenizer, str, int], _Layout]  # (tokenizer, prompt, max_src_len)


def _encode_prompt(
    layout: LayoutFunction, tokenizer: TextTokenizer, prompt: str, max_src_len: int
) -> EncodedPrompt:
    """Ids before the answer's text, as `encode_example` lays them out with the same `max_src_len`.

    Raises ValueError where max_src_len cannot hold the family's fixed part of the prompt.
    """
    parts = layout(tokenizer, prompt, max_src_len)
    return EncodedPrompt(parts.prefix, parts.truncated)


def _encode_example(
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


def _check_user_role(role: str) -> None:
    if role != "user":
        raise ValueError(f"only ChatGLM3 has roles, got role={role!r}")


def _glm_chat(
    tokenizer: TextTokenizer,
    query: str,
    history: History | None = None,
    role: str = "user",
    rounds: bool = False,
) -> list[int]:
    _check_user_role(role)
    ids = tokenizer.encode_text(glm_chat_prompt(query, history, rounds))
    return ids + [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]


def _glm2_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    _check_user_role(role)
    ids = tokenizer.encode_text(glm2_build_prompt(query, history))
    return [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")] + ids


def _glm3_chat(
    tokenizer: TextTokenizer, query: str, history: History | None = None, role: str = "user"
) -> list[int]:
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    for message in history_messages(history):
        if (content := message_text(message)) is not None:
            ids += glm3_message(tokenizer, message["role"], message.get("metadata") or "", content)
    # no newline after the last role: the model writes its own header line
    return ids + glm3_message(tokenizer, role, "", query) + [tokenizer.get_command("<|assistant|>")]


# ---- answers ----

_PUNCTUATION = [(",", "，"), ("!", "！"), (":", "："), (";", "；"), ("?", "？")]


def _glm_response(text: str) -> str:
    """Strip, fill in the training year, make punctuation beside Chinese characters full-width."""
    text = _glm2_response(text)
    for half, full in _PUNCTUATION:
        mark = re.escape(half)
        text = re.sub(rf"(?<=[\u4e00-\u9fff]){mark}|{mark}(?=[\u4e00-\u9fff])", full, text)
    return text


def _glm2_response(text: str) -> str:
    """Strip and fill in the training year."""
    return text.strip().replace(_TRAINING_TIME, _TRAINING_YEAR)


def parse_tool_call(code: str) -> dict[str, Any]:
    """Keywords of a `tool_call(name=literal, ...)` text, read as literals and never executed.

    Raises ValueError where the text is anything but one such call.
    """
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "tool_call":
            raise ValueError("not a call of tool_call")
        if call.args:
            raise ValueError("arguments must be distinct keywords")
        parameters: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in parameters:
                raise ValueError("arguments must be distinct keywords")
            parameters[keyword.arg] = ast.literal_eval(keyword.value)
        return parameters
    # deep nesting makes the parser run out of stack or memory before it finds a syntax error
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"wanted tool_call(name=literal, ...), got {code[:200]!r}: {error}"
        ) from None


def _glm3_response(text: str, history: History | None = None) -> tuple[Answer, list[Message]]:
    """Split an answer into its messages; `history` is copied, not changed.

    Returns (content, new history). Content is the last message's text, but
        {name, parameters} for a tool call, where the history opens with a system message that has
        tools;
        {name, content} for other metadata (code interpreter), and for what should be a tool call
        but is no plain `tool_call(k=literal, ...)` in a fence.
    """
    history = history_messages(history)
    has_tools = bool(history) and history[0]["role"] == "system" and "tools" in history[0]
    content: Answer = ""
    for response in text.split("<|assistant|>"):
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
            lines = body.strip().split("\n")
            code = "\n".join(lines[1:-1])  # without the first and last line, the fence's
            with suppress(ValueError):
                content = {"name": metadata.strip(), "parameters": parse_tool_call(code)}
    return content, history


# ---- which family is in a folder ----


class _Evidence(NamedTuple):
    """What one sign in a folder says: the model belongs to one of `families`."""

    families: frozenset[str]
    strong: bool  # strong evidence may contradict what a user asks for; names only help to guess
    sentence: str  # for an error


def _sign(sentence: str, *families: str, strong: bool = True) -> _Evidence:
    return _Evidence(frozenset(families), strong, sentence)


_NAME_PATTERNS = [(r"glm[-_]?3", "glm3"), (r"glm[-_]?2", "glm2"), (r"chatglm[-_]?6b", "glm")]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _evidence(
    folder: str | Path,
    base: str | Path | None = None,
    config: dict[str, Any] | None = None,
    follow: bool = True,
) -> Iterator[_Evidence]:
    """What a folder (or a model's name) says about its family, the strongest first.

    Code is read as text only.

    The base model of an adapter or prefix, which `base` may name, counts too, but not the base of
    a base: two folders may name each other.
    """
    path = Path(folder)
    config = _read_json(path / "config.json") if config is None else config
    tokenizer = _read_json(path / "tokenizer_config.json")
    adapter = _read_json(path / "adapter_config.json")

    for file, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        family = values.get("glm_family")
        if isinstance(family, str) and family in FAMILIES:
            yield _sign(f'{file} says "glm_family": "{family}"', family)

    yield from _architecture_evidence(path, config)
    yield from _tokenizer_evidence(path, tokenizer)

    base = base or adapter.get("base_model_name_or_path")
    if follow and isinstance(base, (str, Path)) and base:
        for evidence in _evidence(base, follow=False):
            sentence = f"the adapter's base model: {evidence.sentence}"
            yield evidence._replace(sentence=sentence)

    yield from _name_evidence(path, config, tokenizer)
    # The two families read this field differently; these are the published values.
    if (ratio := config.get("rope_ratio")) in (16, 50, 500):
        family = "glm2" if ratio == 16 else "glm3"
        yield _sign(f"config.json has rope_ratio {ratio}", family, strong=False)


def _name_evidence(
    path: Path, config: dict[str, Any], tokenizer: dict[str, Any]
) -> Iterator[_Evidence]:
    """What the names of the model say."""
    names = (
        config.get("_name_or_path"),
        tokenizer.get("name_or_path"),
        Path(path.absolute()).name,
    )
    for name in names:
        family = _named_family(name) if isinstance(name, str) else None
        if family:
            yield _sign(f"it is named {name}", family, strong=False)


def _architecture_evidence(path: Path, config: dict[str, Any]) -> Iterator[_Evidence]:
    """What the keys of config.json and ChatGLM-6B's tokenizer file say."""
    if (path / "ice_text.model").is_file():
        yield _sign("the folder holds ice_text.model, ChatGLM-6B's tokenizer", "glm")
    for key in ("position_encoding_2d", "inner_hidden_size"):
        if key in config:
            yield _sign(f"config.json has {key}, which only ChatGLM-6B has", "glm")
    for key in ("multi_query_group_num", "padded_vocab_size"):
        if key in config:
            sentence = f"config.json has {key}, which ChatGLM2-6B and ChatGLM3-6B have"
            yield _sign(sentence, "glm2", "glm3")


def _tokenizer_evidence(path: Path, tokenizer: dict[str, Any]) -> Iterator[_Evidence]:
    """What a folder's tokenizer files say; `tokenizer` is its tokenizer_config.json."""
    keys = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    added = [tokenizer.get(key) for key in keys] + [_read_json(path / "added_tokens.json")]
    template = [tokenizer.get("chat_template"), _read_text(path / "chat_template.jinja")]
    code = _read_text(path / "tokenization_chatglm.py")
    texts = {
        "the added tokens": json.dumps(added, ensure_ascii=False),
        "the chat template": json.dumps(template, ensure_ascii=False),
        "tokenization_chatglm.py": code,
    }
    for where, text in texts.items():
        if "<|user|>" in text:
            yield _sign(f"<|user|>, a role token of ChatGLM3-6B, is in {where}", "glm3")
    if "ice_text.model" in code:
        yield _sign("tokenization_chatglm.py reads ice_text.model, ChatGLM-6B's tokenizer", "glm")
    elif code and "<|user|>" not in code:
        yield _sign("tokenization_chatglm.py has no role tokens, so it is ChatGLM2-6B's", "glm2")


def _named_family(name: str) -> str | None:
    """The family that a model's name contains."""
    for pattern, family in _NAME_PATTERNS:
        if re.search(pattern, name.lower()):
            return family
    return None


def infer_family(
    folder: str | Path, base: str | Path | None = None, config: dict[str, Any] | None = None
) -> str | None:
    """The family ("glm", "glm2", "glm3") of a checkpoint, tokenizer or adapter folder.

    None where its files cannot tell: ChatGLM2 and ChatGLM3 share their config format. Never runs
    code found in the folder.

    Args:
        base: the base model of an adapter or prefix folder; by default the one that it names.
        config: used in place of the folder's config.json.
    """
    possible = frozenset(FAMILIES)
    strong_first = sorted(_evidence(folder, base, config), key=lambda evidence: not evidence.strong)
    for evidence in strong_first:
        possible = possible & evidence.families or possible
    return next(iter(possible)) if len(possible) == 1 else None


def contradicts(folder: str | Path, family: str, base: str | Path | None = None) -> str | None:
    """The sentence of evidence that `family` is wrong for `folder`; None without evidence."""
    for evidence in _evidence(folder, base):
        if evidence.strong and family not in evidence.families:
            return evidence.sentence
    return None


# ---- the families ----

FAMILIES: dict[str, Family] = {
    "glm": Family(
        name="glm",
        title="ChatGLM-6B",
        layers_prefix="transformer.layers.",
        tokenizer_file="ice_text.model",
        end_token="<eop>",
        stop_tokens=("<eop>",),
        chat_defaults={
            "max_length": 2048,
            "num_beams": 1,
            "do_sample": True,
            "top_p": 0.7,
            "temperature": 0.95,
        },
        prompt_text=_glm_text,
        encode_prompt=partial(_encode_prompt, _glm_layout),
        encode_example=partial(_encode_example, _glm_layout, "<eop>"),
        encode_chat=_glm_chat,
        chat_prompt=glm_chat_prompt,
        process_response=_glm_response,
    ),
    "glm2": Family(
        name="glm2",
        title="ChatGLM2-6B",
        layers_prefix="transformer.encoder.layers.",
        tokenizer_file="tokenizer.model",
        end_token="</s>",
        stop_tokens=("</s>",),
        chat_defaults={
            "max_length": 8192,
            "num_beams": 1,
            "do_sample": True,
            "top_p": 0.8,
            "temperature": 0.8,
        },
        prompt_text=_glm2_text,
        encode_prompt=partial(_encode_prompt, _glm2_layout),
        encode_example=partial(_encode_example, _glm2_layout, "</s>"),
        encode_chat=_glm2_chat,
        chat_prompt=glm2_build_prompt,
        process_response=_glm2_response,
    ),
    "glm3": Family(
        name="glm3",
        title="ChatGLM3-6B",
        layers_prefix="transformer.encoder.layers.",
        tokenizer_file="tokenizer.model",
        end_token="</s>",
        stop_tokens=("</s>", "<|user|>", "<|observation|>"),
        chat_defaults={
            "max_length": 8192,
            "num_beams": 1,
            "do_sample": True,
            "top_p": 0.8,
            "temperature": 0.8,
        },
        prompt_text=_glm3_text,
        encode_prompt=partial(_encode_prompt, _glm3_layout),
        encode_example=partial(_encode_example, _glm3_layout, "</s>"),
        encode_chat=_glm3_chat,
        chat_prompt=None,
        process_response=_glm3_response,
    ),
}
