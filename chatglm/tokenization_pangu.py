"""Pangu-alpha's tokenizer: jieba's words as the text of a SentencePiece model."""

import re
from functools import cached_property
from typing import Any

from .families import FAMILIES
from .prompts import single_prompt
from .tokenization_base import ChatGLMTokenizer, without_surrogates
from .words import jieba_tokenizer

SPACE, NEWLINE = "\u2582", "\u2583"  # what stands for them inside of words
WRITTEN = str.maketrans({" ": SPACE, "\n": NEWLINE})


def joined_words(text: str) -> tuple[str, list[int]]:
    """A text as SentencePiece is given it: its words with a space between them.

    Returns:
        (that text, of each of its characters, and of its end, the place of the character in
        `text`; of a space between words that of the next word).
    """
    parts: list[str] = []
    origins: list[int] = []
    start = 0
    for word in jieba_tokenizer().cut(text):
        if start:
            origins.append(start)
        parts.append(word.translate(WRITTEN))
        origins += range(start, start + len(word))
        start += len(word)
    return " ".join(parts), [*origins, start]


class PanguTokenizer(ChatGLMTokenizer):
    """Pangu-alpha: `<s> A <eot>`; a pair is `<s> A <sep> B <eot>`.

    Text is split into jieba's words first; a control token is one id wherever one is put or, with
    `encode_special_tokens`, read from trusted text: it is set apart before jieba sees the text, so
    jieba needs no words or patterns of its own for it. In plain text the name of a control token
    is spelled out.
    """

    family = "pangu"
    vocab_files_names = {"vocab_file": FAMILIES["pangu"].tokenizer_file}
    _not_saved = ()
    _controls = ("<unk>", "<s>", "</s>", "<pad>", "<sep>", "<eot>")
    _readable = _controls

    def __init__(self, vocab_file: str, **kwargs: Any):
        named = {"bos": "<s>", "eos": "<eot>", "sep": "<sep>", "pad": "<pad>", "unk": "<unk>"}
        for name, token in named.items():
            kwargs.setdefault(f"{name}_token", token)
        super().__init__(vocab_file, **kwargs)

    def _control_ids(self) -> dict[str, int]:
        for name in ("<s>", "<sep>", "<eot>", "<pad>"):
            if not self._has_piece(name):
                raise ValueError(f"{self.vocab_file} has no piece {name}: not Pangu's vocabulary")
        names = [name for name in self._controls if self._has_piece(name)]
        return {name: self.sp_model.piece_to_id(name) for name in names}

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size()

    def _name(self, index: int) -> str:
        return self.sp_model.id_to_piece(index) if 0 <= index < self.vocab_size else ""

    _convert_id_to_token = _name

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    @cached_property
    def _spelled(self) -> dict[int, list[int]]:
        """Id of each control token -> ids of the pieces that spell its name."""
        spelled = {}
        for name, index in self._commands.items():
            ids: list[int] = []
            for char in name:
                ids += [i for i in self.sp_model.encode(char) if i not in self._marks]
            spelled[index] = ids
        return spelled

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Ids of control tokens, and of the mark of a space between words."""
        return frozenset([*self._commands.values(), self.sp_model.piece_to_id("\u2581")])

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens are added, control tokens in it are spelled out."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        written, origins = joined_words(without_surrogates(text))
        encoded = self.sp_model.encode(written, return_type="offset_mapping")
        unknown = self.sp_model.unk_id()
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for piece, (start, end) in zip(encoded["ids"], encoded["offsets"]):
            # <unk> is what an unknown character is, and no sign of a name that was typed
            typed = piece in self._commands.values() and piece != unknown
            spelled = self._spelled[piece] if typed else [piece]
            ids += spelled
            offsets += [(origins[start], origins[end])] * len(spelled)
        return ids, offsets

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`<s> A <eot>`, or `<s> A <sep> B <eot>` for a pair."""
        end = [self._commands["<eot>"]]
        ids = [self._commands["<s>"], *token_ids_0]
        if token_ids_1 is not None:
            ids += [self._commands["<sep>"], *token_ids_1]
        return ids + end

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Text of a prompt; raises ValueError for a history, which the model does not know."""
        return single_prompt(FAMILIES[self.family].title, query, history)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        shown = [token for token in tokens if token]
        text = re.sub(" ", "", self.sp_model.decode_pieces(shown))
        return text.replace(SPACE, " ").replace(NEWLINE, "\n")
