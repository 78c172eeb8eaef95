"""PREFERENCE_FORMATS: the layouts of rows of answers that are compared.

`PreferenceReader.row` makes a Preference of a JSON value. Free of torch. docs/preferences.md shows
a row of each layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from chatglm.conversations import Turn, check_turns
from finetune.rows.fields import (
    ROLE_NAMES,
    SPEAKERS,
    answer_objects,
    check_present,
    message_parts,
    role_of,
    score_of,
    shown_value,
    text_at,
    turn_objects,
    turns_after_history,
    without_missing,
)
from finetune.rows.formats import (
    COLUMNS_REMEDY,
    BadRow,
    Row,
    check_unicode,
    refused_by,
    rename,
)
from finetune.rows.sources import RowReader

PAIRINGS = ("all", "adjacent")
LIKED, DISLIKED = 1.0, 0.0  # scores of answers that are labelled, not compared


@dataclass(frozen=True)
class Preference(Row):
    """A question and scored answers; a conversation's `turns` end with the question.

    Attributes:
        scores: of each answer, a better one's is higher.
    """

    scores: tuple[float, ...] = ()

    def content(self) -> tuple[Any, ...]:
        return *super().content(), self.scores

    def with_first_answer(self) -> "Preference":
        """The row itself: its answers are compared."""
        return self

    def with_answer(self, number: int) -> Row:
        """The row of the question and one answer, the only one that carries loss."""
        answer = self.answers[number]
        turns = (*self.turns, Turn("assistant", answer)) if self.turns else ()
        return Row(self.prompt, (answer,), self.place, turns)

    def pairs(self, pairing: str) -> list[tuple[int, int]]:
        """(better, worse) numbers of different answers of which neither is empty.

        Args:
            pairing: "all" that differ in score, or only those "adjacent" in the order of scores.
        """
        order = sorted(range(len(self.answers)), key=lambda number: -self.scores[number])
        pairs = []
        for place, better in enumerate(order):
            later = order[place + 1 :]
            if pairing == "adjacent":
                later = later[:1]
            for worse in later:
                if self.can_compare(better, worse):
                    pairs.append((better, worse))
        return pairs

    def can_compare(self, better: int, worse: int) -> bool:
        """Whether two answers differ in score and text, and neither is empty."""
        if not self.answers[better] or not self.answers[worse]:
            return False
        if self.answers[better] == self.answers[worse]:
            return False
        return self.scores[better] > self.scores[worse]

    def labelled(self) -> list[tuple[int, float]]:
        """(number, LIKED or DISLIKED) of the answers of the highest and of the lowest score.

        An answer without another to compare is LIKED where its score is above 0.
        """
        best, worst = max(self.scores), min(self.scores)
        labels = []
        for number, score in enumerate(self.scores):
            if not self.answers[number]:
                continue
            if best == worst:
                labels.append((number, LIKED if score > 0 else DISLIKED))
            elif score == best:
                labels.append((number, LIKED))
            elif score == worst:
                labels.append((number, DISLIKED))
        return labels


Question = tuple[str, tuple[Turn, ...]]  # a prompt; of a conversation also its turns


@dataclass(frozen=True)
class PreferenceFormat:
    """One layout: a row has all `keys`.

    Attributes:
        read: row -> (question, answers, scores); raises ValueError.
    """

    keys: tuple[str, ...]
    read: Callable[[dict], tuple[Question, list[str], list[float]]]
    optional: tuple[str, ...] = ()


def conversation_question(turns: list[Turn]) -> Question:
    """The question that a conversation ends with; raises ValueError where it ends otherwise."""
    if not turns or turns[-1].role not in ("user", "observation"):
        last = turns[-1].role if turns else "nothing"
        raise ValueError(f"the conversation must end with a question, got {last}")
    check_turns([*turns, Turn("assistant", "")])
    prompt = next(turn.content for turn in reversed(turns) if turn.role == "user")
    if not prompt:
        raise ValueError("the prompt is empty")
    if len(turns) == 1:
        return prompt, ()
    return prompt, tuple(turn._replace(loss=False) for turn in turns)


def question_after_history(row: dict, prompt: str) -> Question:
    """A prompt after the row's "history" and "system"."""
    if not prompt:
        raise ValueError("the prompt is empty")
    content = turns_after_history(row.get("history"), text_at(row, "system", ""), prompt, [""])
    if isinstance(content, list):
        return prompt, tuple(content[:-1])
    return prompt, ()


def read_message(message: dict, number: int) -> Turn:
    """The turn of {from, value} or {role, content}; raises ValueError, also for a tool call."""
    if "from" in message:
        role, text = role_of(message, "from", SPEAKERS, number), text_at(message, "value")
        has_calls = role == "call"
    else:
        role = role_of(message, "role", ROLE_NAMES, number)
        text, calls = message_parts(message.get("content"))
        has_calls = bool(calls or message.get("tool_calls"))
    if has_calls:
        raise ValueError(f"turn {number}: tool calls are not compared, got {shown_value(message)}")
    return Turn(role, text)


def turns_at(row: dict, key: str) -> list[Turn]:
    messages = enumerate(turn_objects(row, key), 1)
    turns = [read_message(message, number) for number, message in messages]
    system = text_at(row, "system", "")
    return [Turn("system", system), *turns] if system else turns


def one_answer(row: dict, key: str) -> str:
    """An answer: a text, a message, or a list of one message."""
    value = row[key]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return text_at({key: value}, key)
    turn = read_message(value, 1)
    if turn.role != "assistant":
        raise ValueError(f'"{key}" must be an answer, got {shown_value(value)}')
    return turn.content


def read_pair(row: dict, better: str, worse: str) -> tuple[list[str], list[float]]:
    """(answers, scores) of two answers; without "score_chosen" and "score_rejected" 1 and 0.

    Raises ValueError where the better one's score is not the higher one.
    """
    scores = [1.0, 0.0]
    for place, name in enumerate(("score_chosen", "score_rejected")):
        if name in row:
            scores[place] = score_of({"score": row[name]})
    if scores[0] <= scores[1]:
        raise ValueError(f'"{better}" must have the higher score, got {scores[0]} and {scores[1]}')
    return [one_answer(row, better), one_answer(row, worse)], scores


def _conversations(row: dict) -> tuple[Question, list[str], list[float]]:
    return conversation_question(turns_at(row, "conversations")), *read_pair(
        row, "chosen", "rejected"
    )


def _prompt_pair(row: dict) -> tuple[Question, list[str], list[float]]:
    if isinstance(row["prompt"], list):
        question = conversation_question(turns_at(row, "prompt"))
    else:
        question = question_after_history(row, text_at(row, "prompt"))
    return question, *read_pair(row, "chosen", "rejected")


def _instruction_pair(row: dict) -> tuple[Question, list[str], list[float]]:
    instruction, given = text_at(row, "instruction"), text_at(row, "input", "")
    prompt = f"{instruction}\n{given}" if instruction and given else instruction or given
    question = question_after_history(row, prompt)
    return question, *read_pair(row, "chosen", "rejected")


def _question_pair(row: dict) -> tuple[Question, list[str], list[float]]:
    question = question_after_history(row, text_at(row, "question"))
    return question, *read_pair(row, "response_chosen", "response_rejected")


def _whole_pair(row: dict) -> tuple[Question, list[str], list[float]]:
    """Two conversations that differ in their last answer."""
    chosen, rejected = turns_at(row, "chosen"), turns_at(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" must differ in their last answer alone')
    if (chosen[-1].role, rejected[-1].role) != ("assistant", "assistant"):
        raise ValueError('"chosen" and "rejected" must end with an answer')
    last_answers = {"chosen": chosen[-1].content, "rejected": rejected[-1].content}
    question = conversation_question(chosen[:-1])
    return question, *read_pair(row | last_answers, "chosen", "rejected")


def _scored_answers(row: dict) -> tuple[Question, list[str], list[float]]:
    """RLHF (sunzeyeah): the prefix follows the prompt."""
    answers = answer_objects(row)
    prompt = text_at(row, "prompt")
    question = question_after_history(row, prompt and prompt + text_at(row, "prefix", ""))
    texts = [text_at(answer, "answer") for answer in answers]
    return question, texts, [score_of(answer) for answer in answers]


def read_label(row: dict) -> float:
    """LIKED or DISLIKED."""
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(f'"label" must be true or false, got {shown_value(label)}')
    return LIKED if label else DISLIKED


def _labelled_messages(row: dict) -> tuple[Question, list[str], list[float]]:
    *turns, last = turns_at(row, "messages")
    if last.role != "assistant":
        raise ValueError(f'"messages" must end with an answer, got {last.role}')
    return conversation_question(turns), [last.content], [read_label(row)]


def _labelled_completion(row: dict) -> tuple[Question, list[str], list[float]]:
    if isinstance(row["prompt"], list):
        question = conversation_question(turns_at(row, "prompt"))
    else:
        question = question_after_history(row, text_at(row, "prompt"))
    return question, [one_answer(row, "completion")], [read_label(row)]


# Optional keys of several formats.
_TURNS = ("system", "history")
_SCORES = ("score_chosen", "score_rejected")
# A row has the first format that fits its keys.
PREFERENCE_FORMATS: dict[str, PreferenceFormat] = {
    "conversations": PreferenceFormat(
        ("conversations", "chosen", "rejected"), _conversations, ("system", *_SCORES)
    ),
    "prompt_pair": PreferenceFormat(
        ("prompt", "chosen", "rejected"), _prompt_pair, (*_TURNS, *_SCORES)
    ),
    "instruction_pair": PreferenceFormat(
        ("instruction", "chosen", "rejected"), _instruction_pair, ("input", *_TURNS, *_SCORES)
    ),
    "question_pair": PreferenceFormat(
        ("question", "response_chosen", "response_rejected"), _question_pair, _TURNS
    ),
    "scored_answers": PreferenceFormat(
        ("prompt", "answers"), _scored_answers, ("prefix", "system")
    ),
    "labelled_messages": PreferenceFormat(("messages", "label"), _labelled_messages, ("system",)),
    "labelled_completion": PreferenceFormat(
        ("prompt", "completion", "label"), _labelled_completion, _TURNS
    ),
    "whole_pair": PreferenceFormat(("chosen", "rejected"), _whole_pair, ("system", *_SCORES)),
}
_NAMES: list[str] = []
for _form in PREFERENCE_FORMATS.values():
    _NAMES += _form.keys + _form.optional
PREFERENCE_COLUMNS = tuple(dict.fromkeys(_NAMES))


def preference_format(row: dict, remedy: str = "") -> str:
    """The name of a row's format; raises ValueError, followed by `remedy`, where none has its keys.

    A key whose value is missing does not count.
    """
    for name, form in PREFERENCE_FORMATS.items():
        if row.keys() >= set(form.keys):
            return name
    key_lists = []
    for form in PREFERENCE_FORMATS.values():
        key_lists.append(", ".join(f'"{key}"' for key in form.keys))
    wanted = " or ".join(key_lists)
    keys = ", ".join(str(key) for key in row)[:200] or "none"
    raise ValueError(f"no format has these keys: {keys}; wanted {wanted}{remedy}")


@dataclass(frozen=True)
class PreferenceReader(RowReader):
    """Values as Preferences.

    Attributes:
        pairing: as Preference.pairs; "labelled": answers need no other to be compared with.
    """

    pairing: str = "all"

    def row(self, item: object, place: str) -> Preference:
        """Raises BadRow, also where no two answers can be compared."""
        if isinstance(item, BadRow):
            raise item
        try:
            row = replace(self.read(item), place=place)
            check_unicode(row)
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadRow(f"{place}: half a surrogate pair in the text: {half!a}") from None
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{place}: {error}") from None
        refusal = refused_by(row.with_answer(0), self.family) if self.family else None
        if refusal:
            raise BadRow(refusal)
        return row

    def read(self, item: object) -> Preference:
        """The row of a JSON value, without its place; raises ValueError."""
        if not isinstance(item, dict):
            raise ValueError(f"wanted an object, got {type(item).__name__}")
        renamed = rename(item, self.columns) if self.columns else item
        values = without_missing(renamed)
        name = self.data_format
        if name == "auto":
            remedy = COLUMNS_REMEDY if self.columns == {} else ""
            name = preference_format(values, remedy)
        form = PREFERENCE_FORMATS[name]
        for key in form.keys:
            if key not in values:
                check_present(renamed, key)
                raise ValueError(f'no key "{key}"; --data_format {name} has {", ".join(form.keys)}')
        (prompt, turns), answers, scores = form.read(values)
        row = Preference(prompt, tuple(answers), "", turns, tuple(scores))
        self.check(row)
        return row

    def check(self, row: Preference) -> None:
        """Raises ValueError where there is nothing to compare."""
        if self.pairing == "labelled":
            if not row.labelled():
                raise ValueError("the answer is empty")
        elif not row.pairs(self.pairing):
            scores = ", ".join(f"{score:g}" for score in row.scores)
            raise ValueError(
                f"wanted two different answers, one of a higher score; got {len(row.answers)} of "
                f"the scores {scores}"
            )
