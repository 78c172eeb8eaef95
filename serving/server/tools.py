"""Calls of tools over the chat API: of requests into prompts, of answers into OpenAI's tool_calls.

ChatGLM3 and GLM-4 write a call as a message whose header line is the tool's name, other models as
JSON. Free of torch.
"""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from chatglm.families import family_of
from chatglm.prompts import refuse_constant, split_at
from serving.server.text_stream import longest_partial_match

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


CALL_FORMS = {"glm3": "fenced", "glm4": "json"}  # keys of serving.server.structured.CALL_RULES
# What shows in a chat template how its model writes calls -> keys of CALL_RULES.
TEMPLATE_FORMS = {"<tool_call>": "tagged", '"parameters": ': "named"}
OPENING_TAG, CLOSING_TAG = "<tool_call>", "</tool_call>"
TAG_TOKENS = 2 * len(OPENING_TAG)  # that an opening tag may be spelled with
FENCED = re.compile(r"```(?:python)?\n(.*?)\n?```", re.DOTALL)


def decoded(tokenizer: "FamilyTokenizer", ids: Sequence[int]) -> str:
    """The text of ids, without control tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def call_form(tokenizer: "FamilyTokenizer") -> str | None:
    """How a tokenizer's model writes a call of a tool; None where it knows none."""
    if tokenizer.family != "causal":
        return CALL_FORMS.get(family_of(tokenizer).name)
    causal: Any = tokenizer
    template = str(causal.chat_template or "")
    if tokenizer.prompt_style == "raw" or causal.place_of_tools is None:
        return None
    for sign, form in TEMPLATE_FORMS.items():
        if sign in template:
            return form
    return None


def check_tools(tokenizer: "FamilyTokenizer") -> None:
    """Raises ValueError where the tokenizer's messages have no place for tools."""
    family = family_of(tokenizer)
    if family.role_tokens or call_form(tokenizer) is not None:
        return
    if family.name == "causal":
        raise ValueError(
            "tools: this model's chat template writes no calls in a form that is read here: "
            "<tool_call> (Qwen), or name and parameters (Llama 3.1)"
        )
    raise ValueError(f"tools: {family.title} knows no tools here; ChatGLM3 and GLM-4 do")


def begins_as_call(tokenizer: "FamilyTokenizer", ids: Sequence[int]) -> bool | None:
    """Whether the first line of an answer's last message names a tool; None while it is written.

    For other causal models: whether the answer is a call so far, or one begins at its end.
    """
    if tokenizer.family == "causal":
        return is_written_call(decoded(tokenizer, ids).strip())
    last = split_at(list(ids), tokenizer.get_command("<|assistant|>"))[-1]
    text = decoded(tokenizer, last)
    header, newline, _ = text.partition("\n")
    return bool(header.strip()) if newline else None


class CallWatch:
    """Whether an answer that is being written is a call of a tool so far.

    It is asked of each token: what was decided is kept, and only the last tokens are decoded.
    """

    def __init__(self, tokenizer: "FamilyTokenizer") -> None:
        self.tokenizer = tokenizer
        self._decided = (-1, False)  # (number of a message, whether it is a call of a tool)
        self._seen = 0  # tokens of the answer, where calls are JSON; whether it has text, or a call
        self._has_text = self._has_call = False

    def may_be_call(self, ids: Sequence[int]) -> bool:
        """True too where the first line of the answer's last message has not ended."""
        if self.tokenizer.family == "causal":
            return self._has_call or self._may_be_written_call(ids)
        message = list(ids).count(self.tokenizer.get_command("<|assistant|>"))
        if message != self._decided[0]:  # else its first line, which ended before, said it
            is_call = begins_as_call(self.tokenizer, ids)
            if is_call is None:
                return True
            self._decided = (message, is_call)
        return self._decided[1]

    def _may_be_written_call(self, ids: Sequence[int]) -> bool:
        """As is_written_call, of an answer that held no call before its new tokens."""
        recent = decoded(self.tokenizer, ids[max(self._seen - TAG_TOKENS, 0) :]).strip()
        self._seen = len(ids)
        begins = not self._has_text
        self._has_text = self._has_text or bool(recent)
        self._has_call = OPENING_TAG in recent or (begins and recent.startswith("{"))
        return self._has_call or not self._has_text or ends_in_tag(recent)


def parsed_answer(
    tokenizer: "FamilyTokenizer", ids: Sequence[int], tools: Sequence[Any]
) -> tuple[str, list[dict[str, Any]]]:
    """(text, OpenAI's tool_calls) of an answer's ids, its end tokens left out.

    What names no tool of the request, or whose arguments are none, stays text.
    """
    family = family_of(tokenizer)
    if tokenizer.family == "causal":
        return written_calls(decoded(tokenizer, ids), tools)
    names = {tool["function"]["name"] for tool in tools}
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in split_at(list(ids), tokenizer.get_command("<|assistant|>")):
        written = decoded(tokenizer, part)
        history = [{"role": "system", "content": "", "tools": list(tools)}]
        answer, _ = family.process_response([written], history)
        if isinstance(answer, dict) and answer.get("name") in names and "parameters" in answer:
            call = tool_call_of(answer["name"], answer["parameters"])
        else:
            call = code_call_of(answer, tools)
        if call is not None:
            calls.append(call)
        else:
            texts.append(family.answer_text(written))
    return "\n".join(filter(None, texts)), calls


def code_call_of(answer: Any, tools: Sequence[Any]) -> dict[str, Any] | None:
    """The call of a code interpreter, whose code stands below its name as it is.

    ChatGLM3 names it `interpreter` and puts the code in a fence; any tool that needs `code` and
    nothing else is taken for it. None where the answer is no such call, or there is no such tool.
    """
    if not isinstance(answer, dict) or "parameters" in answer:
        return None
    code = answer["content"].strip()
    if (fenced := FENCED.fullmatch(code)) is not None:
        code = fenced[1]
    for tool in tools:
        function = tool["function"]
        needed = (function.get("parameters") or {}).get("required")
        if needed == ["code"] and answer["name"] in ("interpreter", function["name"]):
            return tool_call_of(function["name"], {"code": code})
    return None


def is_written_call(text: str) -> bool:
    """Whether a text is a call of a tool, or a beginning of one at its end."""
    return not text or text.startswith("{") or OPENING_TAG in text or ends_in_tag(text)


def ends_in_tag(text: str) -> bool:
    """Whether a call's opening tag may be going on behind a text."""
    return longest_partial_match(text, (OPENING_TAG,)) > 0


def written_calls(text: str, tools: Sequence[Any]) -> tuple[str, list[dict[str, Any]]]:
    """As parsed_answer, of calls that are JSON: in tags, or the whole text."""
    names = {tool["function"]["name"] for tool in tools}
    calls: list[dict[str, Any]] = []
    rest: list[str] = []
    place = 0
    for start, written, end in tagged_parts(text):
        if (call := json_call_of(written, names)) is not None:
            rest.append(text[place:start])
            calls.append(call)
            place = end
    rest.append(text[place:])
    beside = "".join(rest).strip()
    if not calls and (call := json_call_of(beside, names)) is not None:
        return "", [call]
    return beside, calls


def tagged_parts(text: str) -> Iterator[tuple[int, str, int]]:
    """(start, text between the tags, end) of each pair of tags, in time linear in the text.

    A model can write thousands of spaces or opening tags, on which a pattern would backtrack.
    """
    end = 0
    while (start := text.find(OPENING_TAG, end)) >= 0:
        inside = start + len(OPENING_TAG)
        closing = text.find(CLOSING_TAG, inside)
        if closing < 0:
            return
        end = closing + len(CLOSING_TAG)
        yield start, text[inside:closing].strip(), end


def json_call_of(text: str, names: set[str]) -> dict[str, Any] | None:
    """The call in {"name", "arguments" or "parameters"}; None where it is none of `names`."""
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:  # a model may write a list there
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return tool_call_of(name, arguments) if isinstance(arguments, dict) else None


def tool_call_of(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """One of OpenAI's tool_calls; None where JSON has no such arguments.

    A Python literal of ChatGLM3's calls may have keys that are no texts, or infinite numbers.
    """
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return None
    function = {"name": name, "arguments": written}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
