"""GLM-4's tokenizer: byte pairs, and control tokens with the ids after them."""

from typing import Any

from .byte_pairs import byte_name, byte_pair_encoder, ranks_file, read_ranks
from .families import FAMILIES
from .glm4 import ASSISTANT_NAME
from .histories import ROLES
from .tokenization_base import RoleMessages, without_surrogates

LONG_RELEASE = "名为 GLM-4 的"  # in the chat template of glm-4-9b-chat-1m


class GLM4Tokenizer(RoleMessages):
    """GLM-4-9B and CodeGeeX4: `[gMASK] <sop>`, then text.

    A pair is `[gMASK] <sop> A B <|endoftext|>`.

    A call returns attention_mask [B, S] (1 = real token) and position_ids [B, S] (0 on padding).
    Decoding writes spaces around control tokens, as the original does; an id that is no token (a
    spare row of the embedding table) has no text, where the original repeats the text before it.

    Attributes:
        assistant_name: what a prompt with tools calls the assistant; the folder's chat template
            tells.
    """

    family = "glm4"
    vocab_files_names = {"vocab_file": FAMILIES["glm4"].tokenizer_file}
    _controls = (
        "<|endoftext|>",
        *("[MASK]", "[gMASK]", "[sMASK]"),
        *("<sop>", "<eop>"),
        *(f"<|{role}|>" for role in ROLES),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    )
    _readable = _controls

    def __init__(self, vocab_file: str, clean_up_tokenization_spaces: bool = False, **kwargs: Any):
        for name in ("eos", "pad"):
            kwargs.setdefault(f"{name}_token", "<|endoftext|>")
        template = str(kwargs.get("chat_template") or "")
        self.assistant_name = "GLM-4" if LONG_RELEASE in template else ASSISTANT_NAME
        super().__init__(
            vocab_file, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs
        )

    def _read_vocabulary(self) -> None:
        self._ranks = read_ranks(self.vocab_file)
        self._encoder = byte_pair_encoder(self._ranks)
        self._tokens = list(self._ranks)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._encoder.encode(without_surrogates(text), add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def _vocabulary_bytes(self) -> bytes:
        return ranks_file(self._ranks)

    def _control_ids(self) -> dict[str, int]:
        return {name: len(self._tokens) + i for i, name in enumerate(self._controls)}

    @property
    def vocab_size(self) -> int:
        """Byte pairs alone, as in the original; `len` counts the control tokens too."""
        return len(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens) + len(self._controls)

    def _name(self, index: int) -> str:
        """A token's bytes as byte-level vocabularies write them; a control token's own name."""
        if 0 <= index < len(self._tokens):
            return byte_name(self._tokens[index])
        control = index - len(self._tokens)
        return self._controls[control] if 0 <= control < len(self._controls) else ""

    _convert_id_to_token = _name

    def _convert_token_to_id(self, token: str) -> int | None:
        if token in self._commands:
            return self._commands[token]
        return self._encoder.token_to_id(token)

    def _has_piece(self, token: str) -> bool:
        return self._encoder.token_to_id(token) is not None

    def _vocabulary_ids(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] <sop> A`, or `[gMASK] <sop> A B <|endoftext|>` for a pair."""
        ids = [self._commands["[gMASK]"], self._commands["<sop>"]] + token_ids_0
        if token_ids_1 is None:
            return ids
        return ids + token_ids_1 + [self._commands["<|endoftext|>"]]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens by name; control tokens have spaces around them."""
        parts: list[str] = []
        plain: list[str] = []
        for token in tokens:
            if token in self._commands:
                parts += [self._plain_text(plain), token]
                plain = []
            elif token:
                plain.append(token)
        parts.append(self._plain_text(plain))
        return " ".join(part for part in parts if part)

    def _plain_text(self, names: list[str]) -> str:
        return self._encoder.decoder.decode(names) if names else ""

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            ids = [index for index in ids if index < len(self._tokens)]
        return super()._decode(
            ids, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs
        )
