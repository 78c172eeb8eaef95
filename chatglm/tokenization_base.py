"""Tokenizers of the ChatGLM families, with transformers' interface.

One rule holds in every family: text never becomes a control token. Control ids are put in by
position (prompt templates, `build_inputs_with_special_tokens`), and `[gMASK]` or `<|user|>` typed
by a user becomes ordinary pieces. `encode_special_tokens=True` lifts the rule for trusted text, as
the originals do.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from .chat_template import TEMPLATES, ChatText, render_conversation
from .evidence import contradicts, infer_family
from .families import FAMILIES, OWN_FAMILIES, family_of
from .family_tokenizer import FamilyTokenizer, checked_style
from .files import is_lfs_pointer, pointer_error, shorten
from .folders import check_json_files, reading, without_marks
from .histories import History
from .prompts import glm3_message

# The originals' class name, so that a saved folder loads elsewhere too.
_TOKENIZER_CLASS = "ChatGLMTokenizer"
_SAVED_BY_LIBRARY = (
    "added_tokens_decoder",
    "backend",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",
)


class ChatGLMTokenizer(FamilyTokenizer, PreTrainedTokenizer):
    """What the families share; `from_pretrained` returns the subclass of the folder's family.

    `encode_special_tokens` (also a keyword of every call) makes control tokens written in text
    become their ids. It is a choice of the caller: it is neither saved nor read from a folder.

    Raises FileNotFoundError where the folder has no vocabulary file, ValueError where that file is
    damaged or of another kind or where the folder belongs to another family.
    """

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
                f"no vocabulary file {FAMILIES[self.family].tokenizer_file} at {vocab_file}"
            )
        if is_lfs_pointer(vocab_file):
            raise pointer_error(vocab_file)
        self.vocab_file = str(vocab_file)
        self._read_vocabulary()
        self.encode_special_tokens = encode_special_tokens
        self._commands = self._control_ids()
        kwargs["glm_family"] = self.family
        added = kwargs.pop("added_tokens_decoder", None) or {}
        super().__init__(**kwargs)
        if not isinstance(self.model_max_length, (int, float)):
            raise ValueError(
                f"model_max_length must be a number, got {shorten(self.model_max_length)}"
            )
        self.prompt_style = checked_style(kwargs.get("prompt_style"))
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
            if family not in OWN_FAMILIES:
                raise ValueError(
                    f"cannot tell from {folder} which of {', '.join(OWN_FAMILIES)} it is; "
                    f"pass family=..., got {family!r}"
                )
            return class_of_family(family).from_pretrained(folder, *inputs, **kwargs)
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
        """The vocabulary file in a folder. Raises FileNotFoundError, OSError."""
        family = FAMILIES[cls.family]
        wanted = folder / family.tokenizer_file
        if not wanted.is_file():
            raise FileNotFoundError(f"{folder} has no {wanted.name}, {family.title}'s vocabulary")
        open(wanted, "rb").close()  # raises what the disk says; the library would hide it
        return wanted

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write the model and tokenizer_config.json; returns paths.

        The config has the originals' class name and "glm_family". chat_template.jinja is for other
        programs: the folder's own, else one of plain messages (`chat_template.TEMPLATES`).
        """
        own = self.chat_template
        self.chat_template = own or TEMPLATES[self.family]
        try:
            files = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.chat_template = own
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
        """Copy the vocabulary file into `save_directory`; returns its path."""
        name = FAMILIES[self.family].tokenizer_file
        target = Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        source = Path(self.vocab_file)
        if not source.is_file():  # the folder that this tokenizer was loaded from is gone
            target.write_bytes(self._vocabulary_bytes())
        elif not target.exists() or not target.samefile(source):
            shutil.copyfile(source, target)
        return (str(target),)

    # ---- vocabulary

    def _read_vocabulary(self) -> None:
        """Read `vocab_file`. Raises ValueError where it is damaged or of another kind."""
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(self.vocab_file)
        except RuntimeError as error:
            raise ValueError(
                f"{self.vocab_file} is not a SentencePiece model, or damaged: {error}"
            ) from None

    def _vocabulary_bytes(self) -> bytes:
        """The content of a vocabulary file that says the same as the one that was read."""
        return self.sp_model.serialized_model_proto()

    def _control_ids(self) -> dict[str, int]:
        raise NotImplementedError

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer in the tokenizer's family."""
        return [self.get_command(token) for token in FAMILIES[self.family].stop_tokens]

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def control_tokens(self) -> dict[str, int]:
        """{control token: its id}."""
        return dict(self._commands)

    def get_command(self, token: str) -> int:
        """Id of a control token by its name. Raises KeyError where the family has no such token."""
        if token not in self._commands:
            raise KeyError(
                f"{self.family} has no control token {token!r}; it has {', '.join(self._commands)}"
            )
        return self._commands[token]

    def get_vocab(self) -> dict[str, int]:
        """{token: id}, 65,000 items (glm: 130,000), built on each call: encoding needs none."""
        return {self._name(index): index for index in range(len(self))}

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
        return self._vocabulary_ids(without_surrogates(text))

    def _vocabulary_ids(self, text: str) -> list[int]:
        return self.sp_model.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids of `encode_text`, first character and the one after the last of each id's text)."""
        encoded = self.sp_model.encode(without_surrogates(text), return_type="offset_mapping")
        return encoded["ids"], encoded["offsets"]

    def __call__(
        self, text: Any = None, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        """transformers' call; `return_offsets_mapping` works as with its fast tokenizers.

        offset_mapping has the characters (first, last + 1) of each token, (0, 0) for control tokens
        and padding.

        Raises:
            ValueError: offsets are asked for of pairs, words, or text with control tokens.
        """
        if not return_offsets_mapping:
            return super().__call__(text, *args, **kwargs)
        given = ("text_pair", "is_split_into_words", "encode_special_tokens", "text_target")
        if args or any(kwargs.get(name) for name in given) or self.encode_special_tokens:
            raise ValueError("return_offsets_mapping takes one text, or a list of texts, alone")
        tensors = kwargs.pop("return_tensors", None)
        texts = [text] if isinstance(text, str) else text
        unpadded = super().__call__(texts, **kwargs | {"padding": False})["input_ids"]
        batch = super().__call__(texts, **kwargs)
        on_left = (kwargs.get("padding_side") or self.padding_side) == "left"
        batch["offset_mapping"] = []
        for one, row, padded in zip(texts, unpadded, batch["input_ids"]):
            spans = self._row_offsets(one, len(row), kwargs.get("add_special_tokens", True))
            padding = [(0, 0)] * (len(padded) - len(spans))
            batch["offset_mapping"].append(padding + spans if on_left else spans + padding)
        if isinstance(text, str) and tensors is None:
            batch = BatchEncoding({name: value[0] for name, value in batch.items()})
        return batch.convert_to_tensors(tensors)

    def _row_offsets(self, text: str, length: int, has_special: bool) -> list[tuple[int, int]]:
        """The offsets of a row's `length` tokens, its special ones included."""
        offsets = self.encode_with_offsets(text)[1]
        special = len(self.build_inputs_with_special_tokens([])) if has_special else 0
        count = length - special
        on_left = self.truncation_side == "left"
        kept = offsets[len(offsets) - count :] if on_left else offsets[:count]
        if not has_special:
            return kept
        rest = iter(kept)
        # -1 stands for text, which no added id equals
        built = self.build_inputs_with_special_tokens([-1] * len(kept))
        return [next(rest) if index == -1 else (0, 0) for index in built]

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

    def _encode_plus(  # type: ignore[override]  # the library's, by name
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> BatchEncoding:
        if isinstance(text, ChatText) and text_pair is None:
            text, add_special_tokens = list(text.ids), False
        return super()._encode_plus(text, text_pair, add_special_tokens, **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Names of the pieces of `text`; takes `encode_special_tokens` like a call.

        As in transformers' own Python tokenizers, `pair` and `add_special_tokens` have no effect.
        """
        if isinstance(text, ChatText):
            return [self._name(index) for index in text.ids]
        special = kwargs.get("encode_special_tokens", self.encode_special_tokens)
        split = kwargs.get("split_special_tokens", False)
        return [self._name(index) for index in self._ids(text, special and not split)]

    def apply_chat_template(  # type: ignore[override]  # the library's names, fewer of them
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        end_answer: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A conversation of messages, or a batch of them, as a batch of ids, ids alone or text.

        The prompt is the family's own, whatever template the folder has: ids are put together
        message by message, so text in a message never becomes a control token. A text returned is a
        `ChatText`, which this tokenizer encodes as those ids.

        Args:
            conversation: [{"role": ..., "content": ...}, ...], or a list of those.
            tools: ChatGLM3 and GLM-4: JSON schemas, or Python functions.
            return_dict: a BatchEncoding; else ids alone.
            return_assistant_tokens_mask: also assistant_masks, 1 for each id that the assistant
                writes: ChatGLM3's and GLM-4's answers from their header line on, of the others the
                last answer.
            end_answer: the family's end token follows a last answer, for training; a chat's own
                history has none there.
        Raises:
            ValueError: a message has another form, or an option is not for these models.
        """
        if self.prompt_style == "raw":
            raise ValueError("prompt_style raw: the model goes on with a text, without a template")
        self._check_template_options(documents=documents, chat_template=chat_template)
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize and return_dict")
        if continue_final_message and add_generation_prompt:
            raise ValueError("give continue_final_message or add_generation_prompt, not both")
        first = (
            conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        )
        is_batch = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        rows = []
        for messages in conversation if is_batch else [conversation]:
            rows.append(
                render_conversation(self, messages, tools, add_generation_prompt, end_answer)
            )
        if not tokenize:
            texts = [row.as_text() for row in rows]
            return texts if is_batch else texts[0]
        limit = max_length if truncation else None
        batch = self.pad(
            {"input_ids": [row.ids[:limit] for row in rows]},
            padding=padding,
            max_length=max_length,
            padding_side=kwargs.get("padding_side"),
            return_tensors=return_tensors,
        )
        if return_assistant_tokens_mask:
            side = kwargs.get("padding_side") or self.padding_side
            masks = [row.assistant[:limit] for row in rows]
            batch["assistant_masks"] = padded_masks(masks, batch["input_ids"], side)
            batch.convert_to_tensors(return_tensors)
        if not is_batch and return_tensors is None:
            batch = BatchEncoding({name: value[0] for name, value in batch.items()})
        return batch if return_dict else batch["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The Jinja template that other programs are shown: one given, the folder's, the family's.

        Here it renders nothing: see `apply_chat_template`.
        """
        own = self.chat_template
        return chat_template or (own if isinstance(own, str) else TEMPLATES[self.family])

    def _check_template_options(self, **options: Any) -> None:
        """Raises ValueError where an option that these models have no use for is given.

        Programs that ask for the chat template may pass it on.
        """
        for name, value in options.items():
            if value is not None and value != self.get_chat_template():
                title = FAMILIES[self.family].title
                raise ValueError(f"{name}: {title}'s prompts are built from ids, without templates")

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


def padded_masks(masks: list[list[int]], rows: Any, side: str) -> list[list[int]]:
    """Masks of rows with 0 where the rows were padded."""
    padded = []
    for mask, row in zip(masks, rows):
        padding = [0] * (len(row) - len(mask))
        padded.append(padding + mask if side == "left" else mask + padding)
    return padded


def class_of_family(family: str) -> type[ChatGLMTokenizer]:
    """The subclass for a family."""
    classes = [ChatGLMTokenizer]
    while classes:
        found = classes.pop()
        if found.family == family:
            return found
        classes += found.__subclasses__()
    raise ValueError(f"family must be one of {', '.join(OWN_FAMILIES)}; got {family!r}")


def without_surrogates(text: str) -> str:
    """The text, its lone surrogates replaced: JSON can carry them and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class RoleMessages(ChatGLMTokenizer):
    """What the tokenizers of families with roles have in common: chats as ids."""

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
        ids = family_of(self).encode_chat(self, query, history, role)
        return self.pad({"input_ids": [ids]}, return_tensors=return_tensors)

    def build_prompt(self, query: str, history: History | None = None) -> str:
        title = FAMILIES[self.family].title
        raise NotImplementedError(f"{title}'s roles have no text form: use build_chat_input")


class PiecesThenControls(ChatGLMTokenizer):
    """Vocabularies whose control tokens, `_controls`, follow the SentencePiece model's pieces."""

    _controls: tuple[str, ...]

    def _control_ids(self) -> dict[str, int]:
        first = self.sp_model.get_piece_size()
        for name in self._controls:
            # names go before pieces, so such a piece of text would turn into a control id
            if self._has_piece(name):
                raise ValueError(
                    f"{self.vocab_file} has an ordinary piece {name!r}: "
                    f"not {FAMILIES[self.family].title}'s vocabulary"
                )
        return {name: first + i for i, name in enumerate(self._controls)}

    @property
    def vocab_size(self) -> int:
        """SentencePiece pieces and the control tokens after them."""
        return self.sp_model.get_piece_size() + len(self._controls)

    def _name(self, index: int) -> str:
        first = self.sp_model.get_piece_size()
        if not 0 <= index < self.vocab_size:
            return ""  # of a checkpoint's padding rows
        return self.sp_model.id_to_piece(index) if index < first else self._controls[index - first]

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._commands:
            return self._commands[token]
        return self.sp_model.piece_to_id(token)
