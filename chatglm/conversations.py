"""Conversations of several turns, with roles and tools, as training rows of each family.

Pure functions: text to ids with labels.

ChatGLM3 has roles, so a conversation is one row. ChatGLM2 has rounds of text: one row too, with the
end token as the *label* of the token after an answer, because its chats have no end token between
rounds. ChatGLM-6B's context is bidirectional and a row has one [gMASK]: each answer is a row, after
the rounds before it. GLM-10B and Pangu-alpha answer one prompt.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .causal_prompts import end_before_next, template_messages, written_answer
from .families import FAMILIES, Family
from .histories import ROLES, message_text
from .prompts import (
    TextTokenizer,
    glm3_message,
    glm4_message,
    glm4_system,
    glm_chat_prompt,
    truncate_prompt,
)

IGNORED = -100
# Whether the role token <|assistant|> of an answer is a label: in the first it is, in the demo not.
GLM3_LABELS = ("chatglm_finetuning", "chatglm3_demo")
# The roles that may come before each role; None: the chat may begin with it.
ALLOWED_BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "assistant", "observation"),
    "observation": ("assistant", "observation"),
}


class Turn(NamedTuple):
    """One message; `metadata` is an assistant's header line: the name of the tool that it calls.

    Of a tool call, `content` is ChatGLM3's text and `call` the parameters, where they are known.
    """

    role: str
    content: str
    metadata: str = ""
    loss: bool = True  # of an assistant; the others never carry any
    tools: Any = None  # of a system: anything JSON
    call: dict[str, Any] | None = None


class EncodedTurns(NamedTuple):
    """A training row: each label is the id itself, IGNORED, or the end token after an answer."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def carries_loss(turn: Turn) -> bool:
    """Whether the turn carries loss."""
    return turn.role == "assistant" and turn.loss


def tool_call(parameters: dict[str, Any]) -> str:
    """The text of a ChatGLM3 tool call, as `prompts.parse_tool_call` reads it back.

    A parameter named like a keyword (from, class) is written as ChatGLM3's demo writes it, and is
    not read back.
    Raises ValueError for a parameter whose name is no Python name.
    """
    if bad := next((name for name in parameters if not name.isidentifier()), None):
        raise ValueError(f"a tool's parameter must have a Python name, got {bad!r}")
    arguments = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return f"```python\ntool_call({arguments})\n```"


def with_tools(turns: list[Turn], tools: Any) -> list[Turn]:
    """The turns with their tools (anything JSON) in the system turn, where a chat has them.

    ChatGLM3's demo puts a second system turn before the row's own one; its chats have one.
    """
    has_system = bool(turns) and turns[0].role == "system"
    system = turns[0] if has_system else Turn("system", "")
    return [system._replace(tools=tools), *(turns[1:] if has_system else turns)]


def shown_text(turn: Turn) -> str:
    """What a ChatGLM model is shown of a turn: a system's tools stand below its text."""
    if turn.tools is None:
        return turn.content
    message = {"role": turn.role, "content": turn.content or None, "tools": turn.tools}
    return message_text(message) or ""


def check_turns(turns: list[Turn]) -> None:
    """Raises ValueError where the order of roles is not a chat's, or no answer carries loss."""
    before: str | None = None
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES:
            raise ValueError(f"turn {number}: role is one of {', '.join(ROLES)}, got {turn.role!r}")
        if before not in ALLOWED_BEFORE[turn.role]:
            raise ValueError(f"turn {number}: {turn.role} cannot follow {before or 'nothing'}")
        before = turn.role
    if not any(map(carries_loss, turns)):
        raise ValueError("no answer that carries loss")


def rounds_of(turns: list[Turn]) -> list[tuple[str, str, bool]]:
    """(question, answer, carries loss) rounds for the families without roles.

    A system's text stands before the first question.

    Raises ValueError for a tool call or an observation.
    """
    if any(turn.metadata or turn.role == "observation" for turn in turns):
        raise ValueError("tool calls and observations need ChatGLM3 or GLM-4")
    rounds: list[tuple[str, str, bool]] = []
    system = ""
    before = ""  # the role of the turn before
    for turn in turns:
        if turn.role == "system":
            system = shown_text(turn) + "\n"
        elif turn.role == "user":
            rounds.append((system + turn.content, "", False))
            system = ""
        else:
            question, answer, _ = rounds[-1]
            text = f"{answer}\n{turn.content}" if before == "assistant" else turn.content
            rounds[-1] = (question, text, turn.loss)
        before = turn.role
    return rounds


def _cut(ids: list[int], labels: list[int], max_len: int) -> EncodedTurns:
    return EncodedTurns(ids[:max_len], labels[:max_len], len(ids) > max_len)


def _glm(
    tokenizer: TextTokenizer, turns: list[Turn], max_len: int, max_src_len: int, role_labels: bool
) -> list[EncodedTurns]:
    """One row an answer; the oldest rounds are dropped until its prompt fits max_src_len."""
    rounds = rounds_of(turns)
    rows = []
    for last, (query, answer, loss) in enumerate(rounds):
        if not loss:
            continue
        for first in range(last + 1):
            history = [(question, said) for question, said, _ in rounds[first:last]]
            text = glm_chat_prompt(query, history, rounds=True)
            source = tokenizer.encode_text(text)
            if len(source) <= max_src_len:
                break
        source, cut = truncate_prompt(source, max_src_len, tail=3)
        room = max_len - len(source) - 3
        if room < 1:
            raise ValueError(
                f"max_len={max_len} leaves no room for an answer after max_src_len={max_src_len}"
            )
        target = tokenizer.encode_text(answer)
        learnt = [tokenizer.get_command("<sop>"), *target[:room], tokenizer.get_command("<eop>")]
        ids = source + [tokenizer.get_command("[gMASK]")] + learnt
        labels = [IGNORED] * (len(source) + 1) + learnt
        truncated = cut or first > 0 or len(target) > room
        rows.append(EncodedTurns(ids, labels, truncated))
    return rows


def _glm2(
    tokenizer: TextTokenizer, turns: list[Turn], max_len: int, max_src_len: int, role_labels: bool
) -> list[EncodedTurns]:
    """One row, cut at max_len."""
    end = tokenizer.get_command("</s>")
    # SentencePiece begins every text with a space. An answer's is learnt, as in rows of one round;
    # the later rounds of a chat have none.
    space = tokenizer.encode_text("\n")[:-1]
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    labels = [IGNORED, IGNORED]
    follows = IGNORED  # the label of what comes after an answer
    for number, (query, answer, loss) in enumerate(rounds_of(turns), 1):
        before = "" if number == 1 else "\n\n"
        source = tokenizer.encode_text(f"{before}[Round {number}]\n\n问：{query}\n\n答：")
        if number > 1 and source[: len(space)] == space:
            source = source[len(space) :]
        target = tokenizer.encode_text(answer)
        ids += source + target
        labels += [follows] + [IGNORED] * (len(source) - 1)
        labels += target if loss else [IGNORED] * len(target)
        follows = end if loss else IGNORED
    return [_cut([*ids, end], [*labels, follows], max_len)]


def _glm3(
    tokenizer: TextTokenizer, turns: list[Turn], max_len: int, max_src_len: int, role_labels: bool
) -> list[EncodedTurns]:
    """One row, truncated to max_len.

    Labels are an answer's header and text, and the first token after it, which ends it.
    """
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    labels = [IGNORED, IGNORED]
    follows = False  # whether the turn before carries loss: the next token ends it
    for turn in turns:
        message = glm3_message(tokenizer, turn.role, turn.metadata, shown_text(turn))
        first = follows or (role_labels and carries_loss(turn))
        labels.append(message[0] if first else IGNORED)
        labels += message[1:] if carries_loss(turn) else [IGNORED] * (len(message) - 1)
        ids += message
        follows = carries_loss(turn)
    end = tokenizer.get_command("</s>")
    return [_cut([*ids, end], [*labels, end if follows else IGNORED], max_len)]


def _glm4(
    tokenizer: TextTokenizer, turns: list[Turn], max_len: int, max_src_len: int, role_labels: bool
) -> list[EncodedTurns]:
    """One row, truncated to max_len.

    Labels are an answer's header line and text, and the role token after it, which ends it; the
    last one is <|user|>. Source: finetune.py of zai-org/GLM-4.
    """
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    labels = [IGNORED, IGNORED]
    follows = False  # whether the turn before carries loss: the next token ends it
    for turn in turns:
        if turn.role == "system":
            message = glm4_system(tokenizer, turn.content, turn.tools)
        else:
            text = turn.content if turn.call is None else json.dumps(turn.call, ensure_ascii=False)
            message = glm4_message(tokenizer, turn.role, turn.metadata, text)
        if not message:  # nothing was said
            continue
        labels.append(message[0] if follows else IGNORED)
        labels += message[1:] if carries_loss(turn) else [IGNORED] * (len(message) - 1)
        ids += message
        follows = carries_loss(turn)
    end = tokenizer.get_command("<|user|>")
    return [_cut([*ids, end], [*labels, end if follows else IGNORED], max_len)]


def _single(
    family: str, tokenizer: Any, turns: list[Turn], max_len: int, max_src_len: int, _: bool
) -> list[EncodedTurns]:
    """The one round of a model that answers one prompt. Raises ValueError for several rounds."""
    rounds = rounds_of(turns)
    made = FAMILIES[family]
    if len(rounds) > 1:
        raise ValueError(
            f"{made.title} answers one prompt: got a conversation of {len(rounds)} rounds"
        )
    query, answer, _loss = rounds[0]
    row = made.encode_example(tokenizer, query, answer, max_len, max_src_len)
    return [EncodedTurns(row.input_ids, row.labels, row.truncated)]


def _causal(
    tokenizer: Any, turns: list[Turn], max_len: int, max_src_len: int, role_labels: bool
) -> list[EncodedTurns]:
    """By the model's chat template, one row where it only adds to what it wrote before.

    A template that writes earlier answers otherwise than the last one (Qwen3's leaves their
    thoughts out) gives a row an answer. Labels are what it writes of an answer, and its end.
    """
    rows: list[EncodedTurns] = []
    ids: list[int] = []
    labels: list[int] = []
    messages, tools = template_messages(tokenizer, [turn_message(turn) for turn in turns])
    skipped = len(turns) - len(messages)  # a system turn that has tools alone
    for number, turn in enumerate(turns):
        if not carries_loss(turn):
            continue
        prompt = tokenizer.encode_messages(messages[: number - skipped], tools)
        count = number - skipped + 1
        learnt = written_answer(tokenizer, messages[:count], tools, prompt, turn.call)
        learnt[-1] = end_before_next(tokenizer, messages[: count + 1], tools, prompt + learnt)
        if ids and prompt[: len(ids)] != ids:
            rows.append(_cut(ids, labels, max_len))
            ids, labels = [], []
        labels = labels + [IGNORED] * (len(prompt) - len(ids)) + learnt
        ids = prompt + learnt
    return [*rows, _cut(ids, labels, max_len)]


def turn_message(turn: Turn) -> dict[str, Any]:
    """A turn as a message of a history."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.metadata:
        message["metadata"] = turn.metadata
    for key, value in (("tools", turn.tools), ("call", turn.call)):
        if value is not None:
            message[key] = value
    return message


# (tokenizer, turns, max_len, max_src_len, role_labels) -> rows, by the family's name.
# `turns` pass check_turns. role_labels: the token <|assistant|> is a label too (GLM3_LABELS).
# Raises ValueError for turns that the family cannot express.
CONVERSATIONS: dict[str, Callable[..., list[EncodedTurns]]] = {
    "glm": _glm,
    "glm2": _glm2,
    "glm3": _glm3,
    "glm4": _glm4,
    "glm_base": partial(_single, "glm_base"),
    "pangu": partial(_single, "pangu"),
    "causal": _causal,
}


def encode_conversation(
    family: Family,
    tokenizer: Any,
    turns: list[Turn],
    max_len: int,
    max_src_len: int,
    role_labels: bool,
) -> list[EncodedTurns]:
    """The training rows of a conversation; the arguments are those of CONVERSATIONS.

    Raises:
        ValueError: the family cannot express the turns.
    """
    if not family.raw:
        encode = CONVERSATIONS[family.name]
        return encode(tokenizer, turns, max_len, max_src_len, role_labels)
    rounds = rounds_of(turns)
    if len(rounds) > 1:
        raise ValueError("prompt_style raw: a text to go on with has one answer, got several turns")
    query, answer, _ = rounds[0]
    row = family.encode_example(tokenizer, query, answer, max_len, max_src_len)
    return [EncodedTurns(row.input_ids, row.labels, row.truncated)]
