"""ChatGLM in lm-evaluation-harness, which then writes the family's control tokens around a text.

The harness's own class gives ChatGLM2, ChatGLM3 and GLM-4 no [gMASK] sop, puts ChatGLM-6B's
[gMASK] <sop> behind the answer that it scores, and reads a chat template's control tokens as text.
`--model hf` becomes ChatGLMHarness for these models; this module is imported right after
lm_eval.models.huggingface.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from .configuration import ChatGLMConfig
from .families import FAMILIES
from .prompts import glm3_message
from .raw_prompts import RAW_TOKENS, raw_ids
from .remote_code import holds_chatglm
from .tokenization_base import ChatGLMTokenizer

# (the texts, ids of the context, ids of the answer that is scored)
Request: TypeAlias = tuple[Any, list[int], list[int]]
START = -1  # stands for the control tokens before the first window of a text


class ChatGLMHarness(HFLM):
    """HFLM for ChatGLM: scores and answers of plain texts, and of chats with a chat template.

    A plain text is laid out as `prompt_style` raw does: [gMASK] sop before it, or for ChatGLM-6B
    [gMASK] <sop> between it and what is scored. The answer to a chat begins after its header.
    """

    tokenizer: ChatGLMTokenizer

    def __init__(self, *args: Any, **kwargs: Any):
        self.chats: dict[str, list[int]] = {}  # a rendered chat -> its ids
        super().__init__(*args, **kwargs)
        self.before, self.after = self.around([])

    def around(self, text: list[int]) -> tuple[list[int], list[int]]:
        """Ids up to the end of a text, and the control tokens after it."""
        return raw_ids(RAW_TOKENS[self.tokenizer.family], self.tokenizer, text)

    def context_ids(self, context: str) -> list[int]:
        """Ids of a text to go on with, or of a chat that `apply_chat_template` rendered."""
        if context in self.chats:
            return self.chats[context]
        ids, after = self.around(self.tokenizer.encode_text(context))
        return ids + after

    def cut(self, context: list[int], room: int) -> list[int]:
        """A context of at most `room` tokens: what is too much of its text's beginning is left out.

        Raises:
            ValueError: there is no room for its control tokens.
        """
        extra = max(0, len(context) - room)
        start = len(self.before)
        if extra > len(context) - start - len(self.after):
            raise ValueError(
                f"max_length {self.max_length} has no room for a text's control tokens"
            )
        return context[:start] + context[start + extra :]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        encode = self.tokenizer.encode_text
        spaces = len(context) - len(context.rstrip())
        if context in self.chats or self.after:
            # An answer of its own, before which SentencePiece writes a space itself.
            return self.context_ids(context), encode(continuation.lstrip(" ") or continuation)
        text = context[: len(context) - spaces]
        source = encode(text)
        whole = encode(context + continuation)
        return self.around(source)[0], whole[len(source) :]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(sum of the answer's log-probabilities, whether it is the greedy one) of each request."""
        encoded = []
        for request in requests:
            encoded.append((request.args, *self._encode_pair(*request.args)))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text; a long one's windows have control tokens each."""
        room = self.max_length - len(self.before) - len(self.after)
        pieces: list[Request] = []
        owners = []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode_text(request.args[0])
            for window in get_rolling_token_windows(ids, START, room, context_len=1):
                seen, scored = make_disjoint_window(window)
                source, after = self.around([index for index in seen if index != START])
                pieces.append((None, source + after, scored))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)
        for number, (score, _) in zip(owners, found):
            totals[number] += score
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitting = []
        for texts, context, scored in requests:
            room = self.max_length + 1 - len(scored)  # the last scored token is no input
            fitting.append((texts, self.cut(context, room), scored))
        return super()._loglikelihood_tokens(fitting, *args, **kwargs)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.after and not (inps == self.after[-1]).any():
            # The harness tries a batch size with rows of ones, in which no answer begins.
            inps = torch.cat(
                [inps[:, : -len(self.after)], inps.new_tensor([self.after] * len(inps))], 1
            )
        return super()._model_call(inps, *args, **kwargs)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(ids, 2-D mask) of the contexts of a batch, both (B, S)."""
        rows = [self.context_ids(string) for string in strings]
        rows = [self.cut(row, left_truncate_len or len(row)) for row in rows]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        return ids, mask

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        kwargs.setdefault("eos_token_id", self.tokenizer.stop_ids)
        return super()._model_generate(context, max_length, stop, **kwargs)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of ids; of the end token alone its name.

        The harness stops at that text, and the families' end tokens have none.
        """
        if tokens == self.eot_token_id:
            return self.tokenizer.eos_token
        return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text, which the other methods know by its ids."""
        tokenizer = self.tokenizer
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        text = tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(chat_history, return_dict=False, **options)
        if add_generation_prompt and FAMILIES[tokenizer.family].roles:
            ids = ids + glm3_message(tokenizer, "assistant", "", "")[1:]
        self.chats[text] = ids
        return text


def is_chatglm(pretrained: Any) -> bool:
    """Whether HFLM's argument, a name or a model, is a ChatGLM."""
    if isinstance(pretrained, str):
        return holds_chatglm(pretrained)
    return isinstance(getattr(pretrained, "config", None), ChatGLMConfig)


def open_harness() -> None:
    """Let HFLM(...) give a ChatGLMHarness for every ChatGLM."""

    def create(cls: type, *args: Any, **kwargs: Any) -> Any:
        pretrained = args[0] if args else kwargs.get("pretrained")
        return object.__new__(ChatGLMHarness if cls is HFLM and is_chatglm(pretrained) else cls)

    HFLM.__new__ = staticmethod(create)


open_harness()
