"""Prompts of base models: the model goes on with a text, without roles or rounds.

Pure functions, free of torch; `families.family_of` gives them to a tokenizer of the style "raw".
"""

from typing import Any, NamedTuple

from .causal_prompts import END
from .histories import History, turns_of
from .prompts import Layout, TextTokenizer

PROMPT_STYLES = ("chat", "raw")


class RawTokens(NamedTuple):
    """Control tokens around a text: before it, and between it and what the model writes."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    last_is_learnt: bool = False  # the last of `after` is a label, as in ChatGLM-6B's chats


RAW_TOKENS = {
    "glm": RawTokens(after=("[gMASK]", "<sop>"), last_is_learnt=True),
    "glm2": RawTokens(before=("[gMASK]", "sop")),
    "glm3": RawTokens(before=("[gMASK]", "sop")),
    "glm4": RawTokens(before=("[gMASK]", "<sop>")),
    "glm_base": RawTokens(("[CLS]",), ("[gMASK]", "<|endoftext|>", "<|startofpiece|>")),
    "pangu": RawTokens(before=("<s>",)),
}
RAW_END = {
    "glm": "<eop>",
    "glm2": "</s>",
    "glm3": "</s>",
    "glm4": "<|endoftext|>",
    "glm_base": "<|endofpiece|>",
    "pangu": "<eot>",
}


def raw_ids(
    tokens: RawTokens | None, tokenizer: Any, text: list[int]
) -> tuple[list[int], list[int]]:
    """(ids before and of the text, ids after it). `tokens`: None for the tokenizer's own start."""
    if tokens is None:
        ids = [*tokenizer.raw_start, *text]
        return ids or [tokenizer.get_command(END)], []  # a model needs a first token
    before = [tokenizer.get_command(token) for token in tokens.before]
    return before + text, [tokenizer.get_command(token) for token in tokens.after]


def raw_layout(
    tokens: RawTokens | None, tokenizer: TextTokenizer, prompt: str, max_src_len: int
) -> Layout:
    """A text to go on with; of a long one the end is kept, at most `max_src_len` tokens."""
    text = tokenizer.encode_text(prompt)
    source, after = raw_ids(tokens, tokenizer, text[max(0, len(text) - max_src_len) :])
    prefix = source + after
    n_masked = len(prefix) - bool(tokens and tokens.last_is_learnt)
    return Layout(prefix, n_masked, len(prefix) + 1, truncated=len(text) > max_src_len)


def raw_chat(
    tokens: RawTokens | None,
    tokenizer: TextTokenizer,
    query: str,
    history: History | None = None,
    role: str = "user",
    rounds: bool = False,
) -> list[int]:
    """Ids of a text to go on with.

    Raises:
        ValueError: there is a history or a role, which a text has not.
    """
    if turns_of(history) or role != "user":
        raise ValueError("prompt_style raw: a text to go on with has no earlier turns and no roles")
    source, after = raw_ids(tokens, tokenizer, tokenizer.encode_text(query))
    return source + after


def raw_text(text: str) -> str:
    """The text itself."""
    return text
