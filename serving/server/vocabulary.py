"""The bytes of a tokenizer's tokens, for grammars over them. Free of torch.

The bytes of an answer's tokens, together, are its decoded text, with a space before a first word
where SentencePiece's decoder drops it.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from chatglm.byte_pairs import byte_names

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE_PIECE = "\u2581"  # what SentencePiece writes for a space


def token_bytes(tokenizer: "FamilyTokenizer") -> list[bytes | None]:
    """The bytes of each id of a vocabulary; None where an id has no text: control tokens.

    Raises:
        ValueError: the tokenizer writes its text in a form that is not known here.
    """
    kind: Any = tokenizer  # the families' tokenizers have attributes of their own
    if tokenizer.family == "causal":
        return causal_bytes(kind)
    if tokenizer.family == "glm4":
        texts = byte_level_bytes([kind._name(index) for index in range(kind.vocab_size)])
        return texts + [None] * (len(tokenizer) - len(texts))
    return sentencepiece_bytes(kind)


def drops_first_space(tokenizer: "FamilyTokenizer") -> bool:
    """Whether decoding leaves out the space before a text's first word."""
    if tokenizer.family == "causal":
        backend: Any = tokenizer
        return not is_byte_level(json.loads(backend.backend_tokenizer.to_str()))
    return tokenizer.family != "glm4"


def byte_level_bytes(names: list[str]) -> list[bytes | None]:
    """Bytes of names that have a character for each byte; None for names with another one."""
    values = {name: value for value, name in byte_names().items()}
    found: list[bytes | None] = []
    for name in names:
        written = [values.get(character) for character in name]
        found.append(bytes(v for v in written if v is not None) if None not in written else None)
    return found


def piece_bytes(name: str) -> bytes:
    """Bytes of a SentencePiece piece."""
    if found := BYTE_PIECE.fullmatch(name):
        return bytes([int(found[1], 16)])
    return name.replace(SPACE_PIECE, " ").encode()


def sentencepiece_bytes(tokenizer: Any) -> list[bytes | None]:
    """Of a ChatGLM tokenizer before GLM-4."""
    hidden = set(tokenizer._commands.values()) | set(tokenizer.all_special_ids)
    model = tokenizer.sp_model
    first = getattr(tokenizer, "num_image_tokens", 0)
    whitespace = getattr(tokenizer, "_whitespace", {})
    found: list[bytes | None] = [None] * len(tokenizer)
    for piece in range(model.get_piece_size()):
        is_text = not (model.is_control(piece) or model.is_unknown(piece))
        if is_text and not model.is_unused(piece) and first + piece not in hidden:
            name = model.id_to_piece(piece)
            found[first + piece] = piece_bytes(whitespace.get(name, name))
    return found


def is_byte_level(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer.json's decoder reads a character for each byte.

    Raises:
        ValueError: nor is it SentencePiece's.
    """
    decoder = json.dumps(backend.get("decoder"))
    if '"ByteLevel"' in decoder:
        return True
    if '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
        return False
    raise ValueError(
        "constrained answers need a tokenizer of byte pairs or SentencePiece pieces; the decoder "
        f"of this one is {decoder[:100]}"
    )


def causal_bytes(tokenizer: Any) -> list[bytes | None]:
    """Of a tokenizer.json; added tokens that are not special are text as they are."""
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    found: list[bytes | None]
    if is_byte_level(json.loads(tokenizer.backend_tokenizer.to_str())):
        found = byte_level_bytes(names)
    else:
        found = [piece_bytes(name) for name in names]
    special = set(tokenizer.all_special_ids)
    for index, added in tokenizer.added_tokens_decoder.items():
        is_special = added.special or index in special
        found[index] = None if is_special else added.content.encode()
    return found
