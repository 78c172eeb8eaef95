"""A loaded model as a partner in the terminal. Free of torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

CONVERSATION = "serving.chat.loaded"  # stands above this package, and is imported when asked for


def converse(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", options: dict[str, Any]
) -> None:
    """Talk with a model at the terminal, until the person leaves; as python -m serving.chat.

    Args:
        options: generate()'s, with max_src_len and seed.
    """
    importlib.import_module(CONVERSATION).converse_loaded(model, tokenizer, options)
