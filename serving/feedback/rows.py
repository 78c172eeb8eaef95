"""What people said of answers -> rows that train.py reads, and preference pairs. Pure.

A line of feedback is as serving.server.page.feedback writes it: id, time, model, messages (the last
is the answer), rating, correction, report, key, and "tools" where the messages have calls of them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serving.chat.conversation import MessageDicts, checked_messages, object_list

VERDICTS = ("up", "down", "corrected", "withdrawn")
# --only -> the kinds of feedback whose answers are learnt.
LEARNT = {"corrections": ("corrected",), "up": ("up",), "all": ("up", "corrected")}
ROW_FIELDS = ("role", "content", "tool_calls", "tool_call_id")
SPEAKER_OF = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True)
class Feedback:
    """What one person said of one answer.

    Attributes:
        prompt: the messages before the answer.
        kind: of VERDICTS.
        tools: OpenAI's objects of the tools that the model was shown, where it called some.
    """

    model: str
    prompt: MessageDicts
    answer: str
    kind: str
    correction: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def best(self) -> str | None:
        """The answer that this person would have; None where none is known."""
        if self.kind == "corrected":
            return self.correction
        return self.answer if self.kind == "up" else None

    @property
    def worse(self) -> str | None:
        """The answer that this person would not have."""
        return self.answer if self.kind in ("down", "corrected") else None


def parse_feedback(line: Any) -> Feedback:
    """Raises ValueError, in one line, where it is no feedback."""
    if not isinstance(line, dict) or not isinstance(line.get("id"), str):
        raise ValueError("wanted an object with an id")
    if not isinstance(line.get("messages"), list):
        raise ValueError('wanted "messages", a list')
    messages = checked_messages(line["messages"], "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("messages must end with the assistant's answer")
    answer = messages[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("the answer has no text")
    spoken(messages)  # its calls have names and arguments
    rating, correction = line.get("rating"), line.get("correction")
    if rating not in ("up", "down", None):
        raise ValueError(f'rating must be "up", "down" or null, got {rating!r}'[:100])
    if correction is not None and not (isinstance(correction, str) and correction.strip()):
        raise ValueError("correction must be a text, or null")
    kind = "corrected" if correction is not None else rating or "withdrawn"
    tools = tuple(object_list(line.get("tools")))
    return Feedback(str(line.get("model")), messages[:-1], answer, kind, correction, tools)


def latest_feedback(lines: Iterable[Mapping[str, Any]]) -> list[Feedback]:
    """The last of each id and key, by its time. Every line has passed `parse_feedback`."""
    latest: dict[tuple[Any, str], tuple[float, Feedback]] = {}
    for line in lines:
        name = (line.get("key"), line["id"])
        time_s = line.get("time")
        time_s = float(time_s) if isinstance(time_s, (int, float)) else 0.0
        before = latest.get(name)
        if before is None or time_s >= before[0]:
            latest.pop(name, None)  # its place is that of its last line
            latest[name] = (time_s, parse_feedback(line))
    return [feedback for _, feedback in latest.values()]


def training_rows(said: Iterable[Feedback], only: str = "all") -> list[dict[str, Any]]:
    """{"messages": [...]} of the answers that people would have, each once.

    Earlier answers of a conversation are context alone (weight 0): nobody rated them here. Calls of
    tools before an answer that was corrected are context too.
    """
    rows: dict[str, dict[str, Any]] = {}
    for feedback in said:
        if feedback.kind not in LEARNT[only] or feedback.best is None:
            continue
        asked = last_user(feedback.prompt)
        messages = []
        for place, message in enumerate(feedback.prompt):
            row = {name: message[name] for name in ROW_FIELDS if name in message}
            if row["role"] == "assistant" and (place < asked or feedback.kind == "corrected"):
                row["weight"] = 0
            messages.append(row)
        messages.append({"role": "assistant", "content": feedback.best})
        row = {"messages": messages}
        if feedback.tools:
            row["tools"] = list(feedback.tools)
        rows.setdefault(json.dumps(messages, sort_keys=True), row)
    return list(rows.values())


def last_user(messages: MessageDicts) -> int:
    """The place of the last question; 0 without one."""
    for place in reversed(range(len(messages))):
        if messages[place]["role"] == "user":
            return place
    return 0


def preference_pairs(said: Iterable[Feedback], only: str = "all") -> list[dict[str, Any]]:
    """{"conversations", "chosen", "rejected"} as LLaMA-Factory has them (sharegpt).

    Of one prompt, each answer that somebody would have stands against each that somebody would not
    have. One that is both makes no pair.
    """
    good: dict[str, dict[str, Feedback]] = {}
    bad: dict[str, set[str]] = {}
    for feedback in said:
        prompt = json.dumps(feedback.prompt, sort_keys=True)
        if feedback.best is not None:
            good.setdefault(prompt, {}).setdefault(feedback.best, feedback)
        if feedback.worse is not None:
            bad.setdefault(prompt, set()).add(feedback.worse)
    pairs = []
    for prompt, chosen in good.items():
        rejected = bad.get(prompt, set())
        for best, feedback in chosen.items():
            if best in rejected or feedback.kind not in LEARNT[only]:
                continue
            for worse in sorted(rejected - chosen.keys()):
                pairs.append(pair_of(feedback, best, worse))
    return pairs


def pair_of(feedback: Feedback, best: str, worse: str) -> dict[str, Any]:
    row: dict[str, Any] = {"conversations": spoken(feedback.prompt)}
    row["chosen"] = {"from": "gpt", "value": best}
    row["rejected"] = {"from": "gpt", "value": worse}
    if feedback.tools:
        row["tools"] = json.dumps(feedback.tools, ensure_ascii=False)
    return row


def spoken(messages: MessageDicts) -> list[dict[str, str]]:
    """Messages as sharegpt's turns; several calls of one message are one turn. Raises ValueError."""
    turns = []
    for message in messages:
        text = message.get("content")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise ValueError("tool_calls must be a list")
        if text or not calls:
            turns.append({"from": SPEAKER_OF[message["role"]], "value": text or ""})
        functions = []
        for call in calls:
            functions.append(called_function(call))
        if functions:
            value = functions[0] if len(functions) == 1 else functions
            called = json.dumps(value, ensure_ascii=False)
            turns.append({"from": "function_call", "value": called})
    return turns


def called_function(call: Any) -> dict[str, Any]:
    """{"name", "arguments"} of one of OpenAI's tool_calls; arguments as an object.

    Raises:
        ValueError: it is none.
    """
    function = call.get("function") if isinstance(call, dict) else None
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise ValueError("a call of a tool must have a function with a name and arguments")
    return {"name": function["name"], "arguments": arguments}


def counted(said: Iterable[Feedback]) -> str:
    """How many of each kind there are: "3 up, 1 down"."""
    counts = dict.fromkeys(VERDICTS, 0)
    for feedback in said:
        counts[feedback.kind] += 1
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    return ", ".join(parts) or "none"
