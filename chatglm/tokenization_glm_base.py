"""The tokenizer of GLM-350M-chinese and GLM-10B-chinese: SentencePiece, and tokens after it."""

from typing import Any

from .families import FAMILIES
from .prompts import BLANKS, single_prompt, split_at
from .tokenization_base import PiecesThenControls


class GLMBaseTokenizer(PiecesThenControls):
    """GLM-10B: `[CLS] A <|endoftext|>`; a pair is `[CLS] A [SEP] B <|endoftext|>`.

    In a prompt, the names [MASK], [sMASK] and [gMASK] are blanks (prompts.glm_base_layout); all
    other text never becomes a control token, unless `encode_special_tokens` reads it.
    """

    family = "glm_base"
    vocab_files_names = {"vocab_file": FAMILIES["glm_base"].tokenizer_file}
    _not_saved = ()
    _controls = (
        *("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]"),
        *("<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
    )
    _readable = _controls

    def __init__(self, vocab_file: str, **kwargs: Any):
        named = {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "cls": "[CLS]", "sep": "[SEP]"}
        named |= {"mask": "[MASK]", "unk": "<unk>"}
        for name, token in named.items():
            kwargs.setdefault(f"{name}_token", token)
        kwargs.setdefault("truncation_side", "left")
        super().__init__(vocab_file, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        return self._name(index)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[CLS] A <|endoftext|>`, or `[CLS] A [SEP] B <|endoftext|>` for a pair."""
        ids = [self._commands["[CLS]"], *token_ids_0]
        if token_ids_1 is not None:
            ids += [self._commands["[SEP]"], *token_ids_1]
        return [*ids, self._commands["<|endoftext|>"]]

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Text of a prompt; raises ValueError for a history, which the model does not know."""
        return single_prompt(FAMILIES[self.family].title, query, history)

    def count_pieces(self, prompt: list[int]) -> int:
        blanks = [self._commands[name] for name in BLANKS]
        return max(1, sum([token in blanks for token in prompt]))

    def join_pieces(self, pieces: list[list[int]]) -> list[int]:
        between = [self._commands["<|endofpiece|>"], self._commands["<|startofpiece|>"]]
        joined = list(pieces[0])
        for piece in pieces[1:]:
            joined += [*between, *piece]
        return joined

    def split_pieces(self, ids: list[int]) -> list[list[int]]:
        parts = split_at(ids, self._commands["<|endofpiece|>"])
        sop = self._commands["<|startofpiece|>"]
        return [
            part[1:] if number and part[:1] == [sop] else part for number, part in enumerate(parts)
        ]
