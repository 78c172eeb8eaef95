"""The families' tokenizers: SentencePiece for ChatGLM, byte pairs for GLM-4."""

import functools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import AutoTokenizer, BatchEncoding
from transformers.utils import PaddingStrategy

from .configuration import (
    ChatGLM1Config,
    ChatGLM2Config,
    ChatGLMConfig,
    GLMBaseConfig,
    PanguConfig,
)
from .families import FAMILIES
from .folders import OWN_TYPES
from .histories import ROLES
from .prompts import glm2_build_prompt, glm_chat_prompt
from .remote_code import holds_chatglm
from .tokenization_base import (
    ChatGLMTokenizer,
    PiecesThenControls,
    RoleMessages,
    without_surrogates,
)
from .tokenization_glm4 import GLM4Tokenizer
from .tokenization_glm_base import GLMBaseTokenizer
from .tokenization_pangu import PanguTokenizer

__all__ = [
    "TOKENIZERS",
    "ChatGLMTokenizer",
    "GLM2Tokenizer",
    "GLM3Tokenizer",
    "GLM4Tokenizer",
    "GLMBaseTokenizer",
    "GLMTokenizer",
    "PanguTokenizer",
]


WHITESPACE_NAMES = {"\n": "<n>", "\t": "<|tab|>"}


def whitespace_pieces(text: str) -> tuple[str, list[int]]:
    """A text with ChatGLM-6B's pieces for its whitespace, and where its characters come from.

    Returns:
        (the text as SentencePiece is given it, of each of its characters, and of its end, the place
        of the character in `text`).
    """
    parts: list[str] = []
    origins: list[int] = []
    for found in re.finditer(r"\n|\t| {2,80}|[^\n\t ]+| ", text):
        run, start = found[0], found.start()
        name = WHITESPACE_NAMES.get(run)
        if name is None and run.startswith("  "):
            name = f"<|blank_{len(run)}|>"
        if name is None:
            origins += range(start, start + len(run))
            parts.append(run)
        else:
            origins += [start] * len(name)
            parts.append(name)
    return "".join(parts), [*origins, len(text)]


class GLMTokenizer(ChatGLMTokenizer):
    """ChatGLM-6B: text, then `[gMASK] <sop>`; a pair is `A [gMASK] <sop> B <eop>`.

    A call returns attention_mask [B, 1, S, S], True = MASKED, and position_ids [B, 2, S] (position,
    block position), as numpy rows or stacked tensors. Every SentencePiece id is shifted by
    `num_image_tokens` (20000 in early releases, 0 in later ones). With `encode_special_tokens` a
    control piece in text keeps its id.
    """

    family = "glm"
    vocab_files_names = {"vocab_file": FAMILIES["glm"].tokenizer_file}
    _not_saved = ()
    _controls = (
        *("<unk>", "<s>", "</s>", "<pad>"),
        *("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>"),
        *("<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
    )
    # The original reads any control piece through SentencePiece; these five also split the text
    # around them.
    _readable = ("<sop>", "<eop>", "<unk>", "<pad>", "[MASK]")
    _readable_strips = True

    def __init__(self, vocab_file: str, num_image_tokens: int = 20000, **kwargs: Any):
        self.num_image_tokens = num_image_tokens
        named = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "pad": "<pad>", "unk": "<unk>"}
        for name, token in named.items():
            kwargs.setdefault(f"{name}_token", token)
        special = {"end_token": "</s>", "gmask_token": "[gMASK]"}
        special |= kwargs.pop("model_specific_special_tokens", None) or {}
        super().__init__(
            vocab_file,
            num_image_tokens=num_image_tokens,
            model_specific_special_tokens=special,
            **kwargs,
        )
        # A folder may name other pieces as its special tokens.
        for token in self.all_special_tokens:
            self._commands[token] = self._convert_token_to_id(token)

    def _control_ids(self) -> dict[str, int]:
        names = [name for name in self._controls if self._has_piece(name)]
        return {name: self._convert_token_to_id(name) for name in names}

    @cached_property
    def _control_pieces(self) -> dict[int, list[int]]:
        """SentencePiece id of each control piece -> ids of ordinary pieces that spell it.

        The pieces are one per character, or the character's bytes where it has no piece of its own.
        """
        spelled = {}
        for name, index in self._commands.items():
            pieces = []
            for char in name:
                if self._has_piece(char):
                    pieces.append(char)
                else:
                    pieces += [f"<0x{byte:02X}>" for byte in char.encode()]
            ids = [self.sp_model.piece_to_id(piece) for piece in pieces]
            spelled[index - self.num_image_tokens] = ids
        return spelled

    @cached_property
    def _whitespace(self) -> dict[str, str]:
        """Whitespace piece -> its text."""
        return {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in range(2, 81)}

    @property
    def vocab_size(self) -> int:
        """Image tokens and SentencePiece pieces together."""
        return self.num_image_tokens + self.sp_model.get_piece_size()

    def _name(self, index: int) -> str:
        if 0 <= index < self.num_image_tokens:
            return f"<image_{index}>"
        if 0 <= index < self.vocab_size:
            return self.sp_model.id_to_piece(index - self.num_image_tokens)
        return ""

    _convert_id_to_token = _name

    def _convert_token_to_id(self, token: str) -> int:
        image = re.fullmatch(r"<image_(\d+)>", token)
        if image and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        return self.sp_model.piece_to_id(token) + self.num_image_tokens

    def _pieces(self, text: str) -> list[int]:
        return self._vocabulary_ids(without_surrogates(whitespace_pieces(text)[0]))

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens are added, control pieces in it are spelled out."""
        pieces = self._pieces(text)
        # Checked on ids, after SentencePiece has normalised the text: full-width "［gMASK］" can be
        # one too.
        if self._control_pieces.keys().isdisjoint(pieces):
            return [piece + self.num_image_tokens for piece in pieces]
        ids: list[int] = []
        for piece in pieces:
            ids += self._control_pieces.get(piece, [piece])
        return [index + self.num_image_tokens for index in ids]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        written, origins = whitespace_pieces(text)
        encoded = self.sp_model.encode(without_surrogates(written), return_type="offset_mapping")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for piece, (start, end) in zip(encoded["ids"], encoded["offsets"]):
            spelled = self._control_pieces.get(piece, [piece])
            ids += [index + self.num_image_tokens for index in spelled]
            offsets += [(origins[start], origins[end])] * len(spelled)
        return ids, offsets

    def _trusted_text_ids(self, text: str) -> list[int]:
        return [piece + self.num_image_tokens for piece in self._pieces(text)]

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """Ids of a text or pair. Unlike a call it builds no mask, whose cost is length squared."""
        return super().encode(*args, **({"return_attention_mask": False} | kwargs))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>` for a pair."""
        ids = token_ids_0 + [self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.eos_token_id]

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Text of a chat prompt: the bare query without history."""
        return glm_chat_prompt(query, history)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces([self._whitespace.get(token, token) for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden = {self.pad_token_id}
        if skip_special_tokens:
            hidden |= set(self._commands.values())
        shown = [i for i in ids if i not in hidden]
        return super()._decode(shown, False, clean_up_tokenization_spaces, **kwargs)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> BatchEncoding:
        """As the library's; masks and positions are rebuilt from the padded ids."""
        rows: Any  # transformers' types do not say that a batch may hold tensors
        if isinstance(encoded_inputs, Mapping):
            rows = _without_masks(encoded_inputs)
        else:
            rows = [_without_masks(row) for row in encoded_inputs]
        return super().pad(rows, *args, **kwargs)

    def _pad(
        self,
        encoded_inputs: dict[str, list[int]] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        padded = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, False
        )
        ids = padded["input_ids"]
        span = self._span(ids)
        if return_attention_mask is not False:
            padded["attention_mask"] = self._prefix_mask(len(ids), *span)
        padded["position_ids"] = self._positions(ids, *span)
        return padded

    def _span(self, ids: list[int]) -> tuple[int, int, int]:
        """Start and stop (exclusive) of a padded row, and where <sop> is (stop without one)."""
        pad = self.pad_token_id
        start, stop = 0, len(ids)
        while start < stop and ids[start] == pad:
            start += 1
        while stop > start and ids[stop - 1] == pad:
            stop -= 1
        sop = self.bos_token_id
        return start, stop, ids.index(sop, start, stop) if sop in ids else stop

    @staticmethod
    def _prefix_mask(size: int, start: int, stop: int, sop: int) -> np.ndarray:
        """[1, S, S], True = masked.

        Tokens before <sop> see one another, later ones what precedes them; padding sees nothing
        and is seen by nothing.
        """
        visible = np.tri(stop - start, dtype=bool)
        visible[:, : sop - start] = True
        masked = np.ones((1, size, size), dtype=bool)
        masked[0, start:stop, start:stop] = ~visible
        return masked

    def _positions(self, ids: list[int], start: int, stop: int, sop: int) -> np.ndarray:
        """[2, S] positions and block positions.

        From <sop> on the position stays at the mask token's, the block position counts from 1.
        """
        positions = np.zeros((2, len(ids)), dtype=np.int64)
        positions[0, start:stop] = np.arange(stop - start)
        marker = self.mask_token_id if self.mask_token_id in ids else self.gmask_token_id
        if marker in ids:
            positions[0, sop:stop] = ids.index(marker) - start
        positions[1, sop:stop] = np.arange(1, stop - sop + 1)
        return positions


def _without_masks(encoded: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an encoding that do not depend on its padding."""
    rebuilt = ("attention_mask", "position_ids")
    return {key: value for key, value in encoded.items() if key not in rebuilt}


class GLM2Tokenizer(PiecesThenControls):
    """ChatGLM2-6B: `[gMASK] sop`, then text; a pair is `[gMASK] sop A B </s>`.

    A call returns attention_mask [B, S] (1 = real token) and position_ids [B, S] (0 on padding).
    """

    family = "glm2"
    vocab_files_names = {"vocab_file": FAMILIES["glm2"].tokenizer_file}
    _controls: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def __init__(self, vocab_file: str, clean_up_tokenization_spaces: bool = True, **kwargs: Any):
        for name, token in {"eos": "</s>", "pad": "<unk>", "unk": "<unk>"}.items():
            kwargs.setdefault(f"{name}_token", token)
        super().__init__(
            vocab_file, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs
        )

    def _control_ids(self) -> dict[str, int]:
        sp = self.sp_model
        bounds = {"<unk>": sp.unk_id(), "<s>": sp.bos_id(), "</s>": sp.eos_id()}
        return super()._control_ids() | bounds

    def _convert_id_to_token(self, index: int) -> str:
        # Control tokens have no text; ids beyond the vocabulary come from a checkpoint's padding
        # rows.
        hidden = index in self._textless or not 0 <= index < self.sp_model.get_piece_size()
        return "" if hidden else self.sp_model.id_to_piece(index)

    @cached_property
    def _textless(self) -> frozenset[int]:
        """Pieces that are no text. Kept: a server decodes for every token."""
        pieces = self.sp_model
        return frozenset([pieces.unk_id(), pieces.bos_id(), pieces.eos_id()])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return super().convert_tokens_to_string([token for token in tokens if token])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>` for a pair."""
        ids = [self._commands["[gMASK]"], self._commands["sop"]] + token_ids_0
        return ids if token_ids_1 is None else ids + token_ids_1 + [self._commands["</s>"]]

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Text of a chat prompt, `[Round 1]` also without history."""
        return glm2_build_prompt(query, history)


class GLM3Tokenizer(RoleMessages, GLM2Tokenizer):
    """ChatGLM3-6B: ChatGLM2's vocabulary and layout, and role tokens.

    `build_single_message` writes role tokens, plain text never becomes one. As in the original,
    decoding writes control tokens out by name, also with skip_special_tokens.
    """

    family = "glm3"
    _roles = tuple(f"<|{role}|>" for role in ROLES)
    _controls = GLM2Tokenizer._controls + _roles
    _readable = _roles

    def __init__(self, vocab_file: str, clean_up_tokenization_spaces: bool = False, **kwargs: Any):
        super().__init__(vocab_file, clean_up_tokenization_spaces, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        if self.sp_model.get_piece_size() <= index < self.vocab_size:
            return self._name(index)
        return super()._convert_id_to_token(index)


TOKENIZERS: dict[str, type[ChatGLMTokenizer]] = {
    "glm": GLMTokenizer,
    "glm2": GLM2Tokenizer,
    "glm3": GLM3Tokenizer,
    "glm4": GLM4Tokenizer,
    "glm_base": GLMBaseTokenizer,
    "pangu": PanguTokenizer,
}

for _config in (ChatGLMConfig, ChatGLM1Config, ChatGLM2Config, GLMBaseConfig, PanguConfig):
    AutoTokenizer.register(_config, ChatGLMTokenizer, exist_ok=True)


def open_auto_tokenizer() -> None:
    """Let AutoTokenizer.from_pretrained give ChatGLMTokenizer for every ChatGLM, once.

    To be registered is not enough: with trust_remote_code=True AutoTokenizer prefers the code in
    the folder.
    """
    original = AutoTokenizer.__dict__["from_pretrained"].__func__
    if getattr(original, "gives_chatglm", False):
        return

    @functools.wraps(original)
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any
    ) -> Any:
        source, config = pretrained_model_name_or_path, kwargs.get("config")
        if config:  # another program's class for ChatGLM too, such as vLLM's
            is_ours = getattr(config, "model_type", None) in OWN_TYPES
        else:
            is_ours = holds_chatglm(source, **kwargs)
        if not is_ours:
            return original(cls, source, *inputs, **kwargs)
        for name in ("config", "trust_remote_code", "code_revision", "use_fast", "tokenizer_type"):
            kwargs.pop(name, None)
        return ChatGLMTokenizer.from_pretrained(source, *inputs, **kwargs)

    from_pretrained.gives_chatglm = True  # type: ignore[attr-defined]
    auto_class: Any = AutoTokenizer  # its type does not say that a method may be replaced
    auto_class.from_pretrained = classmethod(from_pretrained)


open_auto_tokenizer()
