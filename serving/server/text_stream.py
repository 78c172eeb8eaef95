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
DECODE_EVERY = 256  # tokens; the text is decoded one token less often for each so many


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


class TextStream:
    """An answer's text as its tokens come.

    The answer is the concatenation of what add() returns and what end() returns.

    Args:
        family: its answer_text makes an answer's decoded tokens into text.
        before: tokens that the answer goes on with, for the space that may come between.
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
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._marks = WIDTH_AMBIGUOUS_MARKS if family.name == "glm" else ""
        # ChatGLM3's first line is its message's header, blank but for tool calls, which stay text
        # here.
        self._process = family.answer_text
        self._hidden = set(map(tokenizer.get_command, family.role_tokens))
        self._before, self._ids = list(before), list[int]()
        self._skipped = len(self._text(self._before).rstrip("\ufffd")) if before else 0
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
        return self._text(self._before + self._ids)[self._skipped :]

    def _text(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
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
