"""Calls of tools over the chat API: of requests into prompts, of answers into OpenAI's tool_calls.

ChatGLM3 and GLM-4 write a call as a message whose header line is the tool's name. Free of torch.
"""

import json
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chatglm.families import Family, family_of
from chatglm.prompts import split_at

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


CALL_FORMS = {"glm3": "fenced", "glm4": "json"}  # keys of serving.server.structured.CALL_RULES


def decoded(tokenizer: "FamilyTokenizer", ids: Sequence[int]) -> str:
    """The text of ids, without control tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def check_tools(family: Family) -> None:
    """Raises ValueError where the family's messages have no place for tools."""
    if not family.role_tokens:
        raise ValueError(f"tools: {family.title} knows no tools here; ChatGLM3 and GLM-4 do")


def begins_as_call(tokenizer: "FamilyTokenizer", ids: Sequence[int]) -> bool | None:
    """Whether the first line of an answer's last message names a tool; None while it is written."""
    last = split_at(list(ids), tokenizer.get_command("<|assistant|>"))[-1]
    text = decoded(tokenizer, last)
    header, newline, _ = text.partition("\n")
    return bool(header.strip()) if newline else None


def parsed_answer(
    tokenizer: "FamilyTokenizer", ids: Sequence[int], tools: Sequence[Any]
) -> tuple[str, list[dict[str, Any]]]:
    """(text, OpenAI's tool_calls) of an answer's ids, its end tokens left out.

    What names no tool of the request, or whose arguments are none, stays text.
    """
    family = family_of(tokenizer)
    names = {tool["function"]["name"] for tool in tools}
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in split_at(list(ids), tokenizer.get_command("<|assistant|>")):
        written = decoded(tokenizer, part)
        history = [{"role": "system", "content": "", "tools": list(tools)}]
        answer, _ = family.process_response([written], history)
        if isinstance(answer, dict) and answer.get("name") in names and "parameters" in answer:
            calls.append(tool_call_of(answer["name"], answer["parameters"]))
        else:
            texts.append(family.answer_text(written))
    return "\n".join(filter(None, texts)), calls


def tool_call_of(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One of OpenAI's tool_calls."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False, default=str)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
