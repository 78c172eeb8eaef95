"""Compiled grammars of a service's requests. Free of torch."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from serving.engines.constraints import Grammar, TokenVocabulary
from serving.server.vocabulary import token_bytes

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

KEPT_GRAMMARS = 64


class GrammarCompiler:
    """Compiles grammars over a tokenizer's vocabulary, one at a time in a thread of its own.

    The vocabulary is built for the first one.

    Args:
        stop_ids: returns the ids that end an answer.
    """

    def __init__(self, tokenizer: "FamilyTokenizer", stop_ids: Callable[[], Sequence[int]]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._vocabulary: TokenVocabulary | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    async def compiled(self, write: Callable[[], str]) -> Grammar:
        """The grammar that `write` gives the source of, both in the thread.

        Raises:
            ValueError: in one line, where it is no grammar or too complex.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self.compile(write()))

    def compile(self, source: str) -> Grammar:
        """A grammar; those used last are kept. For one thread."""
        if self._vocabulary is None:
            stop_ids = sorted(self._stop_ids())
            self._vocabulary = TokenVocabulary(token_bytes(self._tokenizer), stop_ids)
        grammar = self._kept.pop(source, None) or Grammar(source, self._vocabulary)
        self._kept[source] = grammar
        if len(self._kept) > KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        return grammar
