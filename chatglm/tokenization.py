"""Tokenizers of the three ChatGLM families: SentencePiece with transformers' interface.

One rule holds in every family: text never becomes a control token. Control ids are put in by
position (prompt templates, `build_inputs_with_special_tokens`), and `[gMASK]` or `<|user|>` typed
by a user becomes ordinary pieces. `encode_special_tokens=True` lifts the rule for trusted text, as
the originals do.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from .configuration import ChatGLM1Config, ChatGLM2Config, ChatGLMConfig
from .families import (
    FAMILIES,
    contradicts,
    glm2_build_prompt,
    glm3_message,
    glm_chat_prompt,
    infer_family,
)
from .files import is_lfs_pointer, pointer_error
from .folders import check_json_files, reading, without_marks
from .histories import ROLES, History

# The originals' class name, so that a saved folder loads elsewhere too.
_TOKENIZER_CLASS = "ChatGLMTokenizer"
_SAVED_BY_LIBRARY = (
    "added_tokens_decoder",
    "backend",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",
)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """What the three families share; `from_pretrained` returns the subclass of the folder's family.

    `encode_special_tokens` (also a keyword of every call) makes control tokens written in text
    become their ids. It is a choice of the caller: it is neither saved nor read from a folder.

    Raises FileNotFoundError where the folder has no SentencePiece model, ValueError where that file
    is not one or where the folder belongs to another family.
    """

    family: str = ""  # a key of FAMILIES, in the subclasses
    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    # Control tokens that a caller may ask to be read from text, and whether they absorb the spaces
    # around them.
    _readable: tuple[str, ...] = ()
    _readable_strips = False

    def __init__(self, vocab_file: str, encode_special_tokens: bool = False, **kwargs: Any):
        if not self.family:
            raise TypeError(
                "ChatGLMTokenizer is the shared base: use from_pretrained or one of its subclasses"
            )
        if encode_special_tokens and not self._readable:
            raise ValueError(
                f"{FAMILIES[self.family].title}'s tokenizer never reads control tokens from text"
            )
        if not vocab_file or not Path(vocab_file).is_file():
            raise FileNotFoundError(
                f"no SentencePiece model {FAMILIES[self.family].tokenizer_file} at {vocab_file}"
            )
        if is_lfs_pointer(vocab_file):
            raise pointer_error(vocab_file)
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(str(vocab_file))
        except RuntimeError as error:
            raise ValueError(
                f"{vocab_file} is not a SentencePiece model, or damaged: {error}"
            ) from None
        self.vocab_file = str(vocab_file)
        self.encode_special_tokens = encode_special_tokens
        self._commands = self._control_ids()
        kwargs["glm_family"] = self.family
        added = kwargs.pop("added_tokens_decoder", None) or {}
        super().__init__(**kwargs)
        for index, token in added.items():
            if self._convert_token_to_id(str(token)) != int(index):
                raise ValueError(
                    f"added token {str(token)!r} ({index}) is not in "
                    f"{self.__class__.__name__}'s vocabulary"
                )

    # ---- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *inputs: Any,
        family: str | None = None,
        **kwargs: Any,
    ) -> "ChatGLMTokenizer":
        """Tokenizer of a folder or hub name; `family` decides where the files leave it open.

        Code in the folder is never run, whatever its auto_map says.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        if cls is ChatGLMTokenizer:
            family = family or infer_family(folder)
            if family not in TOKENIZERS:
                raise ValueError(
                    f"cannot tell from {folder} which of {', '.join(TOKENIZERS)} it is; "
                    f"pass family=..., got {family!r}"
                )
            return TOKENIZERS[family].from_pretrained(folder, *inputs, **kwargs)
        if evidence := contradicts(folder, cls.family):
            raise ValueError(f"{folder} is not a {FAMILIES[cls.family].title} folder: {evidence}")
        place = Path(folder, kwargs.get("subfolder") or "")
        if place.is_dir() and "vocab_file" not in kwargs:
            # not left to the library, which prefers any file named tokenizer.model
            kwargs["vocab_file"] = str(cls._find_vocab_file(place))
        # Only the caller may set it, not a folder's files.
        kwargs.setdefault("encode_special_tokens", False)
        kwargs.pop("trust_remote_code", None)
        if not place.is_dir():
            return super().from_pretrained(folder, *inputs, **kwargs)
        check_json_files(place)
        kwargs.pop("subfolder", None)
        with reading(place), without_marks(place) as readable:
            tokenizer = super().from_pretrained(str(readable), *inputs, **kwargs)
        tokenizer.name_or_path = str(folder)
        return tokenizer

    @classmethod
    def _find_vocab_file(cls, folder: Path) -> Path:
        """The SentencePiece model in a folder. Raises FileNotFoundError, OSError."""
        family = FAMILIES[cls.family]
        wanted = folder / family.tokenizer_file
        if not wanted.is_file():
            raise FileNotFoundError(
                f"{folder} has no {wanted.name}, {family.title}'s SentencePiece model"
            )
        open(wanted, "rb").close()  # raises what the disk says; the library would hide it
        return wanted

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write the model and tokenizer_config.json; returns paths.

        The config has the originals' class name and "glm_family".
        """
        files = super().save_pretrained(save_directory, *args, **kwargs)
        prefix = kwargs.get("filename_prefix")
        name = "tokenizer_config.json"
        path = Path(save_directory, f"{prefix}-{name}" if prefix else name)
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in (*_SAVED_BY_LIBRARY, *self._not_saved, "encode_special_tokens"):
            config.pop(key, None)
        config.update(tokenizer_class=_TOKENIZER_CLASS, glm_family=self.family)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        return files

    # The originals of ChatGLM2/3 have these as read-only properties and fail on a config that sets
    # them.
    _not_saved: tuple[str, ...] = ("bos_token", "eos_token", "pad_token", "unk_token")

    def save_vocabulary(
        self, save_directory: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the SentencePiece model into `save_directory`; returns its path."""
        name = FAMILIES[self.family].tokenizer_file
        target = Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        source = Path(self.vocab_file)
        if not source.is_file():  # the folder that this tokenizer was loaded from is gone
            target.write_bytes(self.sp_model.serialized_model_proto())
        elif not target.exists() or not target.samefile(source):
            shutil.copyfile(source, target)
        return (str(target),)

    # ---- vocabulary

    def _control_ids(self) -> dict[str, int]:
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.vocab_size

    def get_command(self, token: str) -> int:
        """Id of a control token by its name. Raises KeyError where the family has no such token."""
        if token not in self._commands:
            raise KeyError(
                f"{self.family} has no control token {token!r}; it has {', '.join(self._commands)}"
            )
        return self._commands[token]

    def get_vocab(self) -> dict[str, int]:
        """{token: id}, 65,000 items (glm: 130,000), built on each call: encoding needs none."""
        return {self._name(index): index for index in range(self.vocab_size)}

    def _name(self, index: int) -> str:
        """A token's own name, control tokens included."""
        raise NotImplementedError

    def _convert_token_to_id_with_added_voc(self, token: str | None) -> int | None:
        return None if token is None else self._convert_token_to_id(token)

    def _add_tokens(self, new_tokens: Iterable[Any], special_tokens: bool = False) -> int:
        # Nothing enters the library's trie, which would split the tokens out of user text, and
        # nothing enters the vocabulary: a checkpoint's spare rows have no names here.
        for token in map(str, new_tokens):
            if token and token not in self._commands and not self._has_piece(token):
                raise ValueError(
                    f"{token!r} is not in the vocabulary, and ChatGLM's vocabulary is fixed"
                )
        return 0

    def _has_piece(self, token: str) -> bool:
        return self.sp_model.id_to_piece(self.sp_model.piece_to_id(token)) == token

    # ---- text to ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens are added and none can be typed."""
        return self._sp_encode(text)

    def _sp_encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can carry and UTF-8 cannot
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.sp_model.encode(text)

    def _ids(self, text: str, encode_special_tokens: bool) -> list[int]:
        if not encode_special_tokens:
            return self.encode_text(text)
        if not self._readable:
            raise ValueError(
                f"{FAMILIES[self.family].title}'s tokenizer never reads control tokens from text"
            )
        return self._trusted_ids(text)

    def _trusted_ids(self, text: str) -> list[int]:
        """Ids of text in which the control tokens `_readable` count as such."""
        # text, token, text, token, ..., text
        parts = re.split(f"({'|'.join(map(re.escape, self._readable))})", text)
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._convert_token_to_id(part))
                continue
            if self._readable_strips:
                part = part.lstrip() if i > 0 else part
                part = part.rstrip() if i + 1 < len(parts) else part
            ids += self._trusted_text_ids(part) if part else []
        return ids

    def _trusted_text_ids(self, text: str) -> list[int]:
        return self.encode_text(text)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Names of the pieces of `text`; takes `encode_special_tokens` like a call.

        As in transformers' own Python tokenizers, `pair` and `add_special_tokens` have no effect.
        """
        special = kwargs.get("encode_special_tokens", self.encode_special_tokens)
        split = kwargs.get("split_special_tokens", False)
        return [self._name(index) for index in self._ids(text, special and not split)]

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Not for these models: a template renders text, and text never becomes control tokens."""
        raise NotImplementedError(
            f"chat prompts of {FAMILIES[self.family].title} are built from ids: "
            f"use FAMILIES[{self.family!r}].encode_chat"
        )

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each added special token, 0 for a token of the sequences."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        # -1 stands for text, which no added id equals
        second = None if token_ids_1 is None else [-1] * len(token_ids_1)
        built = self.build_inputs_with_special_tokens([-1] * len(token_ids_0), second)
        return [int(index != -1) for index in built]

    # ---- ids to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(list(tokens))


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
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return self._sp_encode(text)

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


class GLM2Tokenizer(ChatGLMTokenizer):
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
        first = self.sp_model.get_piece_size()
        for name in self._controls:
            # names go before pieces, so such a piece of text would turn into a control id
            if self._has_piece(name):
                raise ValueError(
                    f"{self.vocab_file} has an ordinary piece {name!r}: "
                    f"not {self.family}'s vocabulary"
                )
        ids = {name: first + i for i, name in enumerate(self._controls)}
        sp = self.sp_model
        return ids | {"<unk>": sp.unk_id(), "<s>": sp.bos_id(), "</s>": sp.eos_id()}

    @property
    def vocab_size(self) -> int:
        """SentencePiece pieces and the control tokens after them."""
        return self.sp_model.get_piece_size() + len(self._controls)

    def _name(self, index: int) -> str:
        first = self.sp_model.get_piece_size()
        return self.sp_model.id_to_piece(index) if index < first else self._controls[index - first]

    def _convert_id_to_token(self, index: int) -> str:
        # Control tokens have no text; ids beyond the vocabulary come from a checkpoint's padding
        # rows.
        hidden = index in (self.sp_model.unk_id(), self.sp_model.bos_id(), self.sp_model.eos_id())
        hidden = hidden or not 0 <= index < self.sp_model.get_piece_size()
        return "" if hidden else self.sp_model.id_to_piece(index)

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._commands:
            return self._commands[token]
        return self.sp_model.piece_to_id(token)

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

    def _pad(
        self,
        encoded_inputs: dict[str, list[int]] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        length = len(encoded_inputs["input_ids"])
        positions = encoded_inputs.pop("position_ids", None) or list(range(length))
        padded = super()._pad(
            encoded_inputs,
            max_length,
            padding_strategy,
            pad_to_multiple_of,
            padding_side,
            return_attention_mask,
        )
        padding = [0] * (len(padded["input_ids"]) - length)
        on_left = (padding_side or self.padding_side) == "left"
        padded["position_ids"] = padding + positions if on_left else positions + padding
        return padded


class GLM3Tokenizer(GLM2Tokenizer):
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

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Ids of one message: role token, `metadata` and newline, text.

        Raises ValueError for an unknown role.
        """
        return glm3_message(self, role, metadata, message)

    def build_chat_input(
        self,
        query: str,
        history: History | None = None,
        role: str = "user",
        return_tensors: str | None = "pt",
    ) -> BatchEncoding:
        """A batch of one chat, [1, S]: history, the query in its role, then `<|assistant|>`."""
        ids = FAMILIES[self.family].encode_chat(self, query, history, role)
        return self.pad({"input_ids": [ids]}, return_tensors=return_tensors)

    def build_prompt(self, query: str, history: History | None = None) -> str:
        raise NotImplementedError("ChatGLM3's roles have no text form: use build_chat_input")


TOKENIZERS: dict[str, type[ChatGLMTokenizer]] = {
    "glm": GLMTokenizer,
    "glm2": GLM2Tokenizer,
    "glm3": GLM3Tokenizer,
}

for _config in (ChatGLMConfig, ChatGLM1Config, ChatGLM2Config):
    AutoTokenizer.register(_config, ChatGLMTokenizer, exist_ok=True)
