"""What every family's tokenizer has beside transformers' interface."""

from transformers import PreTrainedTokenizerBase

from .files import shorten
from .raw_prompts import PROMPT_STYLES


class FamilyTokenizer(PreTrainedTokenizerBase):
    """The base of the tokenizers that `load_tokenizer` returns.

    Attributes:
        family: a key of FAMILIES.
        prompt_style: "chat", the family's prompts; or "raw", where the model goes on with the text
            that it is given. Saved with the tokenizer, so that every command follows the training.
    """

    family: str = ""
    prompt_style: str = "chat"

    @property
    def answer_header_text(self) -> str:
        """What a chat template writes between a prompt and its answer; "" for the others."""
        return ""

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        raise NotImplementedError

    def count_pieces(self, prompt: list[int]) -> int:
        """How many answers a prompt's ids ask for: one, or one for each of GLM-10B's blanks."""
        return 1

    def join_pieces(self, pieces: list[list[int]]) -> list[int]:
        """Ids of several answers as the model reads them before the next one."""
        raise NotImplementedError

    def split_pieces(self, ids: list[int]) -> list[list[int]]:
        """The answers in what `join_pieces` has made."""
        return [ids]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens are added and none can be typed."""
        raise NotImplementedError

    def get_command(self, token: str) -> int:
        """Id of a control token by its name. Raises KeyError where the family has no such token."""
        raise NotImplementedError


def checked_style(value: object) -> str:
    """A prompt style; "chat" for None. Raises ValueError for another word."""
    if value is None:
        return PROMPT_STYLES[0]
    if value not in PROMPT_STYLES:
        raise ValueError(
            f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, got {shorten(value)}"
        )
    return str(value)
