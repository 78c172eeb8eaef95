"""Constrained decoding: the tokens that a grammar allows next, by the library llguidance.

Free of torch and llguidance at import.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ERROR_CHARACTERS = 300
EXCLUDED = "every token that the grammar allows is excluded otherwise"


class TokenVocabulary:
    """What llguidance knows of a model's tokens. Building takes about a second at 150,000.

    Args:
        tokens: the bytes of each id; None where an id has no text: it is never allowed.
        stop_ids: ids that end an answer: allowed where a grammar may end, and nowhere else.
    Attributes:
        tokens, stop_ids: as given.
    Raises:
        ValueError: there is no stop id, so no answer could end; or llguidance is not installed.
    """

    def __init__(self, tokens: Sequence[bytes | None], stop_ids: Sequence[int]) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise ValueError(
                "constrained answers need the package llguidance: pip install -e '.[serve]'"
            ) from None
        if not stop_ids:
            raise ValueError("constrained answers need a stop id, which ends them")
        self.tokens, self.stop_ids = tokens, stop_ids
        size = max(len(tokens), max(stop_ids) + 1)
        texts = [*tokens, *[None] * (size - len(tokens))]
        listed = TokenList(texts, sorted(stop_ids))
        self.llguidance = LLTokenizer(TokenizerWrapper(listed), eos_token=sorted(stop_ids))


class TokenList:
    """A vocabulary in the form that llguidance takes: the attributes' names are its own."""

    bos_token_id = None

    def __init__(self, texts: Sequence[bytes | None], stop_ids: Sequence[int]) -> None:
        special = set(stop_ids)
        for index, text in enumerate(texts):
            if not text:
                special.add(index)
        self.tokens = [b"" if i in special else text for i, text in enumerate(texts)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = stop_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of forced text, which Grammar's sources never ask for (no_forcing)."""
        return []


class Grammar:
    """A compiled grammar over a vocabulary. It does not change: answers share it.

    Args:
        source: llguidance's JSON of grammars.
    Attributes:
        source, vocabulary: as given.
    Raises:
        ValueError: in one line, llguidance's reason: it is no grammar, or is too complex.
    """

    def __init__(self, source: str, vocabulary: TokenVocabulary) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self.source, self.vocabulary = source, vocabulary
        limits = LLParserLimits(verbose_errors=False)
        self._start = LLMatcher(vocabulary.llguidance, source, log_level=0, limits=limits)
        if self._start.is_error():
            raise ValueError(f"the grammar is refused: {short_reason(self._start.get_error())}")

    def matcher(self) -> "Matcher":
        return Matcher(self._start.deep_copy())


class Matcher:
    """A grammar's state in one answer.

    Attributes:
        consumed: so many tokens of the answer it has read.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self.consumed = 0

    def accept(self, token: int) -> None:
        """Raises RuntimeError where the grammar does not allow the token."""
        self._state.consume_token(token)
        self.consumed += 1
        self._check()

    def follow(self, tokens: Sequence[int]) -> None:
        """Read those of an answer's tokens that have not been read."""
        while self.consumed < len(tokens):
            self.accept(tokens[self.consumed])

    def _check(self) -> None:
        if self._state.is_error():
            raise RuntimeError(f"the grammar failed: {short_reason(self._state.get_error())}")

    def allowed(self) -> Any:
        """Whether each id may come next: numpy bool, of the vocabulary and some padding."""
        import numpy as np

        mask = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(mask, bitorder="little").view(np.bool_)

    def best(self, logits: "Tensor") -> int:
        """The likeliest allowed token by logits (V,).

        Raises:
            RuntimeError: the logits of all allowed ones are -inf.
        """
        import torch

        allowed = self.allowed()
        token = int(logits.max(0).indices)
        if token >= len(allowed) or not allowed[token]:
            ids = torch.from_numpy(allowed[: len(logits)].nonzero()[0]).to(logits.device)
            if not len(ids):
                raise RuntimeError("the grammar allows no token of the model's")
            token = int(ids[logits[ids].max(0).indices])
        if not bool(logits[token] > -torch.inf):
            raise RuntimeError(EXCLUDED)
        return token

    def masked(self, logits: "Tensor") -> "Tensor":
        """A copy of logits (V,) in which tokens that are not allowed are -inf.

        Raises:
            RuntimeError: all are.
        """
        import torch

        allowed = torch.from_numpy(self.allowed()[: len(logits)]).to(logits.device)
        masked = torch.full_like(logits, -torch.inf)
        known = len(allowed)
        masked[:known] = torch.where(allowed, logits[:known], -torch.inf)
        if not bool(masked.max() > -torch.inf):
            raise RuntimeError(EXCLUDED)
        return masked


def short_reason(error: str) -> str:
    """llguidance's reason in one line, without the state that may follow it."""
    return " ".join(error.partition("<state>")[0].split())[:ERROR_CHARACTERS]
