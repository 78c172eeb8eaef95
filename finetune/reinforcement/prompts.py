"""Prompts to answer: rows with or without answers -> ids of the prompts, and the rows themselves.

They lie in the arrays of encoded rows, so that they are read, mixed, streamed and kept as rows of
every other task: each prompt is a group of two, its ids and the UTF-8 bytes of its row as JSON.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from chatglm.conversations import Turn, encode_conversation
from finetune.preference.formats import (
    DISLIKED,
    Preference,
    PreferenceReader,
    preference_format,
)
from finetune.rows.arrays import Dataset, EncodedRow, RowArrays, chosen_rows
from finetune.rows.encoding import RowEncoder, count_ignored
from finetune.rows.fields import ROLE_NAMES, SPEAKERS, all_objects, without_missing
from finetune.rows.formats import FORMATS, BadRow, Row, rename
from finetune.rows.groups import RowGroups, join_groups
from finetune.rows.sources import RowReader

ANSWER_KEYS = ("response", "output", "target", "answer")
LAST_TURN_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
# The roles of turns that an answer follows: questions, results of tools.
ASKING = tuple(
    name for name, role in (SPEAKERS | ROLE_NAMES).items() if role in ("user", "observation")
)
PLACEHOLDER = "。"  # an answer that is encoded after a conversation and cut off again


@dataclass(frozen=True)
class PromptReader(RowReader):
    """Rows of any format, also without their answers; of a preference the better one is kept."""

    def row(self, item: object, place: str) -> Row:
        """As RowReader's; raises BadRow also for a text without a question."""
        if not isinstance(item, dict):
            return question_row(RowReader.row(self, item, place), place)
        if self.columns:
            try:
                item = rename(item, self.columns)
            except ValueError as error:
                raise BadRow(f"{place}: {error}") from None
        item = without_missing(item)
        if self.data_format == "auto" and is_preference(item):
            return better_answer(BetterReader(family=self.family).row(item, place))
        # Columns are renamed already. None and {} stay: they say whether --columns may help.
        reader = replace(self, columns=None) if self.columns else self
        return question_row(RowReader.row(reader, with_answer(item), place), place)


def question_row(row: Row, place: str) -> Row:
    """The row itself; raises BadRow for a text without a question."""
    if row.is_document:
        raise BadRow(f"{place}: wanted a question to answer, this row is a text without one")
    return row


class BetterReader(PreferenceReader):
    """Preferences of which one answer is read, so that none need be comparable."""

    def check(self, row: Preference) -> None:
        """Nothing."""


def is_preference(item: dict[str, Any]) -> bool:
    """Whether a row has answers that are compared or labelled; scored ones are in FORMATS too."""
    try:
        name = preference_format(item)
    except ValueError:
        return False
    if name == "labelled_messages":
        is_label = isinstance(item["label"], bool)
        has_answer = with_answer(item) is item
        return is_label and has_answer  # else a conversation that has a "label" by chance
    return name != "scored_answers"


def better_answer(row: Preference) -> Row:
    """The question with the answer of the highest score; an empty one where none is liked."""
    best = max(row.scores)
    answered = row.with_answer(row.scores.index(best))
    is_single = len(row.scores) == 1
    if is_single and best <= DISLIKED:
        return with_reply(answered, "")
    return answered


def with_answer(item: dict[str, Any]) -> dict[str, Any]:
    """A row with an empty answer where only that is missing; `item` itself where nothing is."""
    prompt = item.get("prompt")
    if isinstance(prompt, list) and prompt and all_objects(prompt):  # TRL's, without an answer
        item = item | {"messages": prompt}
    for key, (usual_role_key, usual_text_key) in LAST_TURN_KEYS.items():
        turns = item.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1]
            role_key = usual_role_key if usual_role_key in last else "role"
            text_key = usual_text_key if usual_text_key in last else "content"
            if last.get(role_key) in ASKING:
                answer = {role_key: "assistant", text_key: ""}
                return item | {key: [*turns, answer]}
    forms = [form for form in FORMATS.values() if len(form.keys) > 1]
    for form in forms:
        if item.keys() >= set(form.keys):
            return item
    for form in forms:
        missing = [name for name in form.keys if name not in item]
        if len(missing) == 1 and missing[0] in ANSWER_KEYS:
            better = item.get("chosen")
            answer_text = better if isinstance(better, str) else ""
            return item | {missing[0]: answer_text}
    return item


@dataclass(frozen=True)
class RolloutEncoder(RowEncoder):
    """Rows to the ids that a model answers, and their content; as the model is asked in serving.

    Attributes:
        max_new_tokens: a conversation with less room for its answer counts as cut.
    """

    max_new_tokens: int = 1

    def check(self, row: Row) -> None:
        """As RowEncoder's, but a row may have several answers: they are references."""
        super().check(replace(row, answers=("",)))

    def encode(self, row: Row) -> list[EncodedRow]:
        """The prompt's ids and the row's content.

        All ids of both are masked where the prompt fills max_len: then neither counts. Else none.
        """
        self.check(row)
        ids, cut = self.prompt_ids(row)
        text = json.dumps([row.prompt, row.answers, row.turns], ensure_ascii=False)
        content = list(text.encode())
        if len(ids) >= self.max_len:
            return [EncodedRow(ids, len(ids), True), EncodedRow(content, len(content), True)]
        return [EncodedRow(ids, 0, cut), EncodedRow(content, 0, cut)]

    def prompt_ids(self, row: Row) -> tuple[list[int], bool]:
        """(ids, whether the prompt was cut)."""
        if not row.turns:
            encoded = self.family.encode_prompt(self.tokenizer, row.prompt, self.max_src_len)
            return list(encoded.input_ids), encoded.truncated
        turns = [turn._replace(loss=False) for turn in row.turns[:-1]]
        turns.append(Turn("assistant", PLACEHOLDER))
        # Without a limit: cut at its end a conversation would lose the question.
        ids, labels, cut = encode_conversation(
            self.family, self.tokenizer, turns, sys.maxsize, self.max_src_len, False
        )[-1]
        # ChatGLM-6B's <sop> before an answer is a label.
        ids = ids[: count_ignored(labels) + (self.family.name == "glm")]
        return ids, cut or self.max_len - len(ids) < self.max_new_tokens

    def settings(self) -> list[Any]:
        """As RowEncoder's."""
        return [*super().settings(), "prompts", self.max_new_tokens]


class PromptRows(RowGroups):
    """Prompts, each with its row; a row's length is its prompt's."""

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """(prompts,) int64, tokens of each prompt."""
        return self.data.row_lengths[::2].astype(np.int64)

    def prompt(self, row: int) -> list[int]:
        """The ids of a prompt."""
        return self.data.ids(2 * row).tolist()

    def question(self, row: int) -> Row:
        """The row that a prompt was made of."""
        prompt, answers, turn_fields = json.loads(self.content(row))
        turns = tuple(Turn(*fields) for fields in turn_fields)
        return Row(prompt, tuple(answers), self.place(row), turns)

    def content(self, row: int) -> bytes:
        """The row as JSON."""
        return self.data.ids(2 * row + 1).astype(np.uint8).tobytes()

    def key(self, row: int) -> str:
        """A name for a prompt by its content: equal prompts of different answers have one."""
        return hashlib.sha256(self.data.ids(2 * row).tobytes()).hexdigest()[:16]


Prompts = Mapping[int, PromptRows]  # those of several steps, each by its number


def prompt_rows(data: Dataset) -> PromptRows:
    """Encoded prompts as rows of the loop."""
    return PromptRows(data, np.arange(0, len(data) + 1, 2, dtype=np.int64))


def choose_prompts(rows: RowArrays, is_skip: bool) -> PromptRows:
    """The prompts of a source, without those that were cut where `is_skip` says so.

    Raises:
        ValueError: none is left.
    """
    data = chosen_rows(rows, is_skip)
    if not len(data):
        raise ValueError(
            f"all {rows.facts['good']} prompts are longer than --max_src_len, or fill --max_len"
        )
    halved = replace(data, truncated=data.truncated // 2, skipped=data.skipped // 2)
    return prompt_rows(halved)


def join_prompts(parts: Sequence[PromptRows]) -> PromptRows:
    """Several as one, in this order."""
    return prompt_rows(join_groups(parts).data)


def with_reply(row: Row, answer: str) -> Row:
    """The row of a question and a sampled answer, the only one that carries loss."""
    turns: tuple[Turn, ...] = ()
    if row.turns:
        earlier = tuple(turn._replace(loss=False) for turn in row.turns[:-1])
        turns = (*earlier, Turn("assistant", answer))
    return replace(row, answers=(answer,), turns=turns)
