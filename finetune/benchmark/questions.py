"""Rows of a task -> the texts that a model scores, as lm-evaluation-harness builds them. No torch.

The main function is `build_questions`, at the end. Names are the harness's: a doc is a row, its
target the right answer, shots are rows with answers before it. Templates are Jinja's, rendered in
its sandbox; lists in their texts are read as literals.
"""

import ast
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from chatglm.files import shorten
from finetune.benchmark.tasks import BenchmarkTask, check_choices

SEED = 1234  # of drawn shots, as the harness's
Doc: TypeAlias = Mapping[str, Any]  # a row of a data set


@dataclass(frozen=True)
class Question:
    """What a model is asked of one row.

    Attributes:
        contexts, continuations: of each choice, the text before it and what is scored; of a written
            answer one context and no continuation.
        choices: their own texts, whose lengths acc_norm and acc_bytes divide by.
        gold: numbers of the right choices; empty where the row does not say.
    """

    doc: Doc
    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()


@lru_cache
def sandbox() -> SandboxedEnvironment:
    """Jinja as the harness sets it, in the sandbox."""
    return SandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )


@lru_cache(256)
def compiled(template: str) -> Template:
    return sandbox().from_string(template)


def is_number(text: str) -> bool:
    """Whether a text is the number of a choice."""
    return text.isdecimal() and len(text) < 10


def literal(text: str) -> object:
    """The value of a Python literal; None where the text is none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


@dataclass(frozen=True)
class TaskTexts:
    """The texts of a task's rows.

    The methods raise ValueError where a template and a row do not fit, with both named.
    """

    task: BenchmarkTask

    def render(self, template: str, doc: Doc) -> Any:
        """The column of that name, else the template's text."""
        if template in doc:
            return doc[template]
        try:
            return compiled(template).render(doc)
        except Exception as error:  # whatever its expressions raise
            row = shorten(dict(doc))
            raise ValueError(
                f"{self.task.file}: the template {template!r:.80} does not fit the row {row}: "
                f"{error!s:.200}"
            ) from None

    def text(self, doc: Doc) -> str | int:
        """doc_to_text; an int says which choice is right where the choices are contexts."""
        text = self.render(self.task.doc_to_text, doc)
        if isinstance(text, int):
            return text
        if not isinstance(text, str):
            return str(text)
        has_choices = self.task.doc_to_choice is not None
        return int(text) if has_choices and is_number(text) else text

    def target(self, doc: Doc) -> str | int | list[Any]:
        """doc_to_target: a text, the number of a choice, or several of either."""
        template = self.task.doc_to_target
        if isinstance(template, int):
            return template
        target = self.render(template, doc)
        if not isinstance(target, str) or template in doc:
            return target
        if is_number(target) and self.task.doc_to_choice is not None:
            return int(target)
        if len(target) >= 2 and target[0] == "[" and target[-1] == "]":
            found = literal(target)
            return found if isinstance(found, list) else target
        return target

    def choices(self, doc: Doc) -> list[str]:
        """doc_to_choice."""
        template = self.task.doc_to_choice
        if isinstance(template, list):
            return template
        assert template is not None
        rendered = self.render(template, doc)
        choices = literal(rendered) if isinstance(rendered, str) else rendered
        return check_choices(self.task.file, rendered if choices is None else choices)

    def number_of(self, answer: object, choices: list[str], doc: Doc) -> int:
        """The number of the choice that a row calls right; raises ValueError for none of them."""
        number = answer
        if isinstance(answer, str):
            number = choices.index(answer) if answer in choices else -1
        if isinstance(answer, float) and answer.is_integer():  # of a table with empty cells
            number = int(answer)
        if not isinstance(number, int) or not 0 <= number < len(choices):
            row = shorten(dict(doc))
            raise ValueError(f"{self.task.file}: no choice is right in the row {row}")
        return int(number)

    def description(self, doc: Doc) -> str:
        return str(self.render(self.task.description, doc)) if self.task.description else ""

    def shot(self, doc: Doc) -> str:
        """A row with its answer, as an example before a question."""
        task = self.task
        text, answer = self.text(doc), self.target(doc)
        choices = self.choices(doc) if task.doc_to_choice is not None else []
        if isinstance(text, int):  # the choices are contexts, and the target follows the right one
            question = choices[self.number_of(text, choices, doc)]
        else:
            question = text
            if choices and isinstance(answer, (int, float)):
                answer = choices[self.number_of(answer, choices, doc)]
        if isinstance(answer, list) and answer:
            answer = answer[0]
        if not isinstance(answer, str):
            raise ValueError(f"{task.file}: an example's answer is no text: {answer!r:.80}")
        if not answer:
            return question
        return f"{question}{task.target_delimiter}{answer}{task.fewshot_delimiter}"

    def question(self, doc: Doc, before: str, answered: bool = True) -> Question:
        """A row after the text `before`; not `answered` where it does not say what is right."""
        task = self.task
        text = self.text(doc)
        if task.output_type != "multiple_choice":
            return Question(doc, (before + str(text),))
        choices = self.choices(doc)
        gold: Any = []
        if isinstance(text, int):  # the choices are contexts, and the target follows each
            contexts = [before + choice for choice in choices]
            continuations = [f"{task.target_delimiter}{self.target(doc)}"] * len(choices)
            gold = text
        else:
            contexts = [before + text] * len(choices)
            continuations = [task.target_delimiter + choice for choice in choices]
            if answered:
                gold = self.target(doc)
        answers = gold if isinstance(gold, list) else [gold]
        if answered and not answers:
            answers = [None]  # which is none of the choices
        right = [self.number_of(answer, choices, doc) for answer in answers]
        return Question(doc, tuple(contexts), tuple(continuations), tuple(choices), tuple(right))


def choose_shots(
    task: BenchmarkTask, pool: Sequence[Doc], doc: Doc, count: int, rng: random.Random
) -> list[Doc]:
    """The rows that are examples before `doc`, as the harness's samplers choose them.

    Raises ValueError where the pool has too few.
    """
    if not count:
        return []
    others = [row for row in pool if row != doc] if task.leaves_itself_out else list(pool)
    if count > len(others):
        raise ValueError(
            f"{task.name}: --shots {count}, but its split {task.shots_split} has {len(others)} rows"
        )
    if task.sampler == "first_n":
        return others[:count]
    if not task.leaves_itself_out:
        return rng.sample(list(pool), count)
    # The harness draws one more, in case `doc` is among them; equal rows may leave too few.
    sampled = rng.sample(list(pool), count + 1)
    shots = [row for row in sampled if row != doc][:count]
    if len(shots) < count:
        return rng.sample(others, count)
    return shots


def build_questions(
    task: BenchmarkTask,
    docs: Sequence[Doc],
    pool: Sequence[Doc],
    shots: int,
    answered: bool = True,
) -> list[Question]:
    """The questions of a task's rows, each after its description and `shots` rows of the pool.

    Args:
        answered: False where the rows do not say what is right.

    Raises:
        ValueError: a template does not fit a row, or there are too few shots.
    """
    texts = TaskTexts(task)
    rng = random.Random(SEED)
    questions = []
    for doc in docs:
        before = texts.description(doc)
        for shot in choose_shots(task, pool, doc, shots, rng):
            before += texts.shot(shot)
        questions.append(texts.question(doc, before, answered))
    return questions
