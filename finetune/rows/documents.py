"""Texts without a question, to go on training a model on: every token of the text is a label.

Free of torch.
"""

from typing import TYPE_CHECKING

from chatglm.families import RAW_FAMILIES
from chatglm.raw_prompts import RAW_TOKENS, raw_ids
from finetune.rows.arrays import EncodedRow

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


def encode_document(
    tokenizer: "FamilyTokenizer", family: str, text: str, max_len: int
) -> list[EncodedRow]:
    """A text as rows of at most `max_len` tokens each.

    A row has a family's tokens before a text to go on with, as prompt_style raw has them, then its
    piece of the text; the last row ends with the end token of such texts.

    Raises:
        ValueError: `max_len` has no room for a token of text.
    """
    tokens = RAW_TOKENS.get(family)
    source, after = raw_ids(tokens, tokenizer, [])
    prefix = source + after
    # A row's first token is never learnt; without a token before the text, a row begins with the
    # last one of the row before.
    overlap = 0 if prefix else 1
    room = max_len - len(prefix) - overlap
    if room < 1:
        raise ValueError(
            f"max_len={max_len} leaves no room for text after {len(prefix)} control tokens"
        )
    end = tokenizer.get_command(RAW_FAMILIES[family].end_token)
    ids = [*tokenizer.encode_text(text), end]
    n_masked = len(prefix) + overlap - bool(tokens and tokens.last_is_learnt)
    rows = []
    for start in range(0, len(ids) - overlap, room):
        piece = ids[start : start + overlap + room]
        rows.append(EncodedRow(prefix + piece, n_masked, False))
    return rows
