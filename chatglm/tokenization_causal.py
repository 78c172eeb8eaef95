"""The tokenizer of other causal language models: their own vocabulary and chat template."""

import json
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .causal_prompts import END
from .family_tokenizer import FamilyTokenizer, checked_style
from .files import read_json
from .folders import check_json_files, reading, without_marks
from .histories import Message
from .tokenization_base import without_surrogates

# One character stands for each control token that a message spells, while the template is rendered.
PRIVATE = range(0xF0000, 0xFFFFE)
PROBE = "\U000f0000"
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # of a text, not of a message
SAVED_CLASS = "PreTrainedTokenizerFast"  # what a saved folder names: any program has it


class CausalTokenizer(FamilyTokenizer, PreTrainedTokenizerFast):
    """tokenizer.json and the chat template of a folder, under the interface of the families.

    Control tokens come from the template alone: those that a message spells become ordinary text.
    A folder without a chat template is a base model, whose prompts are raw text.

    Raises ValueError where a file is damaged, FileNotFoundError where there is no tokenizer.json.
    """

    family = "causal"
    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask"]

    # No __init__: with one, transformers would build a tokenizer of its own from the vocabulary.

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any
    ) -> "CausalTokenizer":
        """The tokenizer of a folder; code in it is never run."""
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json, its tokenizer")
        check_json_files(folder)
        kwargs.pop("trust_remote_code", None)
        kwargs.setdefault("stop_ids", stored_stop_ids(folder))
        with reading(folder), without_marks(folder) as readable:
            tokenizer = super().from_pretrained(str(readable), *inputs, **kwargs)
        assert isinstance(tokenizer, CausalTokenizer)
        tokenizer.name_or_path = str(folder)
        tokenizer.vocab_file = str(folder / "tokenizer.json")
        if not tokenizer.stop_ids:
            raise ValueError(f"{folder} names no eos_token, so nothing would end an answer")
        if tokenizer.pad_token is None:
            end = tokenizer.convert_ids_to_tokens(tokenizer.stop_ids[0])
            tokenizer.pad_token = tokenizer.eos_token or str(end)
        style = tokenizer.init_kwargs.get("prompt_style")
        own = "chat" if tokenizer.chat_template else "raw"
        tokenizer.prompt_style = checked_style(style or own)
        return tokenizer

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat template; returns paths."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, "tokenizer_config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"tokenizer_class": SAVED_CLASS, "glm_family": self.family}
        config["stop_ids"] = self.stop_ids
        for key in ("vocab_file", "backend", "is_local", "local_files_only"):
            config.pop(key, None)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        return files

    # ---- control tokens

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: those of the folder's files, and the tokenizer's eos_token."""
        ids = list(self.init_kwargs.get("stop_ids") or [])
        own = self.eos_token_id
        return ids if own is None or own in ids else [*ids, own]

    def get_command(self, token: str) -> int:
        """Id of a control token by its name; END is what ends an answer in the template."""
        if token == END:
            return self.answer_end
        index = self.convert_tokens_to_ids(token)
        if not isinstance(index, int) or index == self.unk_token_id:
            raise KeyError(f"the tokenizer of {self.name_or_path} has no token {token!r}")
        return index

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        """Control tokens, the longest first, and the private characters."""
        tokens = {str(token) for token in self.added_tokens_decoder.values() if token.special}
        longest_first = sorted(tokens, key=len, reverse=True)
        private = f"[{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}]"
        return re.compile("|".join([*map(re.escape, longest_first), private]))

    @cached_property
    def _readers(self) -> tuple[Tokenizer, Tokenizer]:
        """(one that reads control tokens from text, one that does not), with no state of calls."""
        whole, plain = (Tokenizer.from_str(self.backend_tokenizer.to_str()) for _ in range(2))
        for reader in (whole, plain):
            reader.no_padding()
            reader.no_truncation()
        whole.encode_special_tokens, plain.encode_special_tokens = False, True
        return whole, plain

    # ---- text to ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens are added and none can be typed."""
        clean = without_surrogates(text)
        return list(self._readers[1].encode(clean, add_special_tokens=False).ids)

    @property
    def raw_start(self) -> list[int]:
        """Ids before raw text: the tokenizer's beginning of a text, where it has one.

        GLM's has two control tokens, [gMASK] and <sop>.
        """
        ids = list(self._readers[0].encode("", add_special_tokens=True).ids)
        start = ids[:1] if ids[:1] == [self.bos_token_id] else []
        for index in ids[len(start) :]:
            if index in self.stop_ids:
                break
            start.append(index)
        return start

    def decode_text(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(self.decode(ids, clean_up_tokenization_spaces=False))

    def encode_messages(
        self, messages: list[Message], tools: Any = None, *, prompts_answer: bool = True
    ) -> list[int]:
        """Ids of messages by the chat template, which transformers renders in Jinja's sandbox.

        Args:
            tools: JSON schemas of functions.
            prompts_answer: the prompt for an answer follows the messages.
        Raises:
            ValueError: the folder has no chat template, or it refuses the messages.
        """
        marks: dict[str, str] = {}
        hidden = self._hide(messages, marks)
        shown = self._hide(tools, marks) or None
        text = self._render(hidden, shown, prompts_answer=prompts_answer)
        whole = self._readers[0]
        texts = {mark: spelled for spelled, mark in marks.items()}
        ids: list[int] = []
        for part in re.split(f"([{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}])", text):
            if part in texts:
                ids += self.encode_text(texts[part])
            elif part:
                ids += whole.encode(part, add_special_tokens=False).ids
        return ids

    def _hide(self, value: Any, marks: dict[str, str]) -> Any:
        """The value with a private character for every control token in its texts.

        Args:
            marks: {control token as spelled: its character}; new ones are added.
        """
        if isinstance(value, str):
            clean = without_surrogates(value)
            return self._control_pattern.sub(lambda found: mark_of(found[0], marks), clean)
        if isinstance(value, dict):
            hidden = {}
            for key, item in value.items():
                hidden[self._hide(key, marks)] = self._hide(item, marks)
            return hidden
        if isinstance(value, (list, tuple)):
            return [self._hide(item, marks) for item in value]
        return value

    # ---- what the template writes

    @cached_property
    def _around_answer(self) -> tuple[str, list[int], int]:
        """(text between the prompt for an answer and the answer, its ids, id that ends it).

        The ids are empty unless the text is blank and stays apart from the answer's tokens.
        """
        before = self._probed_start()
        answer: Message = {"role": "assistant", "content": PROBE}
        prompt = self._render(before, prompts_answer=True)
        once = self._render([*before, answer], prompts_answer=False)
        header = ""
        if once.startswith(prompt) and PROBE in once:
            header = once[len(prompt) : once.index(PROBE)]
        again = self._render([*before, answer, before[-1]], prompts_answer=True)
        whole = self._readers[0]
        after = whole.encode(again.partition(PROBE)[2], add_special_tokens=False).ids
        end = next((i for i in after if i in self.stop_ids), self.stop_ids[0])
        ids = list(whole.encode(header, add_special_tokens=False).ids)
        plain = [{"role": "assistant", "content": "a"}]
        said = self.encode_messages([*before, *plain], prompts_answer=False)
        start = len(self.encode_messages(before))
        is_apart = said[start:][: len(ids) + 1] == [*ids, *self.encode_text("a")][: len(ids) + 1]
        return header, ids if is_apart and not header.strip() else [], end

    def _probed_start(self) -> list[Message]:
        """Messages up to a question that the template takes: some want a system's first."""
        question: Message = {"role": "user", "content": "a"}
        system: Message = {"role": "system", "content": "a"}
        try:
            self._render([question], prompts_answer=True)
        except ValueError:
            return [system, question]
        return [question]

    def _render(self, messages: list[Message], tools: Any = None, *, prompts_answer: bool) -> str:
        """The template's text. Raises ValueError where it refuses the messages."""
        try:
            return str(
                self.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompts_answer
                )
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"the chat template of {self.name_or_path} refuses the messages: "
                f"{' '.join(str(error).split())}"
            ) from None

    @property
    def answer_header(self) -> list[int]:
        """Ids of the blank text that the template writes between a prompt and its answer."""
        return self._around_answer[1] if self.chat_template else []

    @property
    def answer_header_text(self) -> str:
        """What the template writes between a prompt and its answer, such as Qwen3's no thoughts."""
        return self._around_answer[0] if self.chat_template else ""

    @property
    def answer_end(self) -> int:
        """The id that ends an answer: the first that the template writes after one; of raw text,
        the end of a text.
        """
        if self.chat_template and self.prompt_style == "chat":
            return self._around_answer[2]
        ends = [self.convert_tokens_to_ids(token) for token in TEXT_ENDS]
        return next((index for index in ends if index in self.stop_ids), self.stop_ids[0])

    @property
    def tool_role(self) -> str:
        """The template's role of a tool's result."""
        return "observation" if "observation" in str(self.chat_template) else "tool"

    @cached_property
    def renders_calls(self) -> bool:
        """Whether the template writes an assistant's `tool_calls`."""
        function = {"name": "f", "arguments": {"a": PROBE}}
        call: Message = {"role": "assistant", "content": ""}
        call["tool_calls"] = [{"type": "function", "function": function}]
        with suppress(ValueError):
            return PROBE in self._render([*self._probed_start(), call], prompts_answer=False)
        return False

    @cached_property
    def place_of_tools(self) -> str | None:
        """Where the template reads tools: "argument", the "system" message, or None."""
        function = {"name": PROBE, "description": "", "parameters": {}}
        tool = {"type": "function", "function": function}
        question = self._probed_start()[-1]
        system: Message = {"role": "system", "content": "a"}
        for start in ([question], [system, question]):
            with suppress(ValueError):
                if PROBE in self._render(start, [tool], prompts_answer=True):
                    return "argument"
        with suppress(ValueError):
            shown = self._render([system | {"tools": [tool]}, question], prompts_answer=True)
            return "system" if PROBE in shown else None
        return None


def mark_of(spelled: str, marks: dict[str, str]) -> str:
    """The private character of a control token, a new one where it has none."""
    return marks.setdefault(spelled, chr(PRIVATE[len(marks)]))


def stored_stop_ids(folder: Path) -> list[int] | None:
    """The ids that end an answer by a folder's files; None where they name none."""
    sources = (
        ("tokenizer_config.json", "stop_ids"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
    )
    for name, key in sources:
        path = folder / name
        value = read_json(path).get(key) if path.is_file() else None
        ids = [value] if isinstance(value, int) else value
        if isinstance(ids, list) and ids and all(isinstance(index, int) for index in ids):
            return ids
    return None
