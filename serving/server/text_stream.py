"""Text from the tokens of an answer as they come, up to a stop string. Free of torch."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from chatglm.families import Family

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

# ChatGLM-6B's answers have these in half or full width, depending on the next character.
WIDTH_AMBIGUOUS_MARKS = ",!:;?"
YEAR_TOKEN = "[[训练时间]]"
SPACE_LOOKBACK = 4  # characters; decoding may still remove a space among the last ones (" n't")
SPACES = " \u2581\u0120"  # as vocabularies write them
WINDOW_TOKENS = 24  # decoded anew for each token, at most
LAG_TOKENS = 8  # of them, after which the text before does not change


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


class GrowingText:
    """The decoded text of tokens as they come, in time that does not grow with the text.

    Only the last tokens are decoded anew, after a few before them whose text is left out: a
    SentencePiece decoder drops the space before a text's first word.

    Args:
        before: tokens that the text goes on with.
        exact: spaces before marks stay, which some tokenizers remove.
    """

    def __init__(
        self, tokenizer: "FamilyTokenizer", before: Sequence[int] = (), exact: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._cleaning = {"clean_up_tokenization_spaces": False} if exact else {}
        self._settled = ""  # the text before that of _ids
        self._context, self._ids = list(before), list[int]()
        self._skipped = self._context_length(self._context)

    def add(self, token: int) -> None:
        self._ids.append(token)

    def ends_with_space(self) -> bool:
        """Whether the last token is of spaces, which decoding may remove with those before it."""
        name = self._tokenizer.convert_ids_to_tokens(self._ids[-1:])
        return bool(name) and not str(name[0]).strip(SPACES)

    def text(self) -> str:
        """The text of all tokens."""
        whole = self._settled + self._decode(self._context + self._ids)[self._skipped :]
        if len(self._ids) >= WINDOW_TOKENS:
            self._settle(whole)
        return whole

    def _settle(self, whole: str) -> None:
        """Decode fewer tokens from here on, where that gives the same text."""
        window = self._context + self._ids
        context, ids = window[-2 * LAG_TOKENS : -LAG_TOKENS], window[-LAG_TOKENS:]
        skipped = self._context_length(context)
        tail = self._decode(context + ids)[skipped:]
        if whole.endswith(tail):
            self._settled = whole[: len(whole) - len(tail)]
            self._context, self._ids, self._skipped = context, ids, skipped

    def _context_length(self, context: list[int]) -> int:
        """Characters of a context's text, but for an incomplete last one."""
        return len(self._decode(context).rstrip("\ufffd")) if context else 0

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, **self._cleaning)
        assert isinstance(text, str)  # a list only for a batch
        return text


class TextStream:
    """An answer's text as its tokens come.

    The answer is the concatenation of what add() returns and what end() returns.

    Args:
        family: its answer_text makes an answer's decoded tokens into text.
        before: tokens that the answer goes on with, for the space that may come between.
        exact: as GrowingText's.
    Attributes:
        sent: the text so far.
        stopped: a stop string has come; the answer ends before it.
    """

    def __init__(
        self,
        tokenizer: "FamilyTokenizer",
        family: Family,
        stops: tuple[str, ...] = (),
        before: Sequence[int] = (),
        exact: bool = False,
    ) -> None:
        self._stops = stops
        self._marks = WIDTH_AMBIGUOUS_MARKS if family.name == "glm" else ""
        # ChatGLM3's first line is its message's header, blank but for tool calls, which stay text
        # here.
        self._process = family.answer_text
        self._hidden = set(map(tokenizer.get_command, family.role_tokens))
        self._tokens = GrowingText(tokenizer, before, exact)
        self.sent, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that is certain since this token, which must not be a stop id."""
        if token not in self._hidden:
            self._tokens.add(token)
        if self.stopped or self._tokens.ends_with_space():
            return ""
        text = self._tokens.text().rstrip("\ufffd")  # an incomplete character
        if (space := text.find(" ", max(len(text) - SPACE_LOOKBACK, 0))) >= 0:
            text = text[:space]
        text = self._process(text[: len(text) - longest_partial_match(text, (YEAR_TOKEN,))])
        if text and text[-1] in self._marks:
            text = text[:-1]
        return self._send(text, growing=True)

    def end(self) -> str:
        """The rest of the text."""
        return self._send(self._process(self._tokens.text()), growing=False)

    def _send(self, text: str, growing: bool) -> str:
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.stopped, text = True, text[: min(places)]
        elif growing:
            text = text[: len(text) - longest_partial_match(text, self._stops)]
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new
