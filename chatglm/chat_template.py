"""Conversations of messages as ids and text, for `apply_chat_template`; Jinja for other programs.

Ids are put together message by message, so text never becomes a control token. The Jinja templates
render text, in which other programs cannot tell the two apart.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .conversations import tool_call
from .families import FAMILIES
from .glm4 import ASSISTANT_NAME, tools_text
from .histories import Message, check_message, history_rounds, message_text, turns_of
from .prompts import (
    BLANKS,
    blank_ids,
    glm3_message,
    glm4_message,
    glm4_system,
    glm_base_chat,
)

# [gMASK] and <sop> in one text would be GLM-4's sign (evidence.py).
GLM_TEMPLATE = """\
{%- set ns = namespace(round=0, system='') -%}
{%- set rounds = messages | selectattr('role', 'equalto', 'user') | list | length > 1 -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- set ns.system = ns.system + m.content + '\\n' -%}
{%- elif m.role == 'user' -%}
{%- if ns.round -%}{{- '\\n' -}}{%- endif -%}
{%- if rounds -%}{{- '[Round ' ~ ns.round ~ ']\\n问：' -}}{%- endif -%}
{{- ns.system + m.content -}}
{%- if rounds and (not loop.last or add_generation_prompt) -%}{{- '\\n答：' -}}{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{- '[gMASK]' ~ '<sop>' -}}
{%- elif loop.index0 == messages | length - 2 -%}{{- '[gMASK]' ~ '<sop>' -}}{%- endif -%}
{%- set ns.round = ns.round + 1 -%}{%- set ns.system = '' -%}
{%- else -%}{{- m.content -}}{%- endif -%}
{%- endfor -%}
"""
GLM2_TEMPLATE = """\
{{- '[gMASK]sop' -}}
{%- set ns = namespace(round=0, system='') -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- set ns.system = ns.system + m.content + '\\n' -%}
{%- elif m.role == 'user' -%}
{%- if ns.round -%}{{- '\\n\\n' -}}{%- endif -%}
{%- set ns.round = ns.round + 1 -%}
{{- '[Round ' ~ ns.round ~ ']\\n\\n问：' ~ ns.system ~ m.content -}}{%- set ns.system = '' -%}
{%- if not loop.last or add_generation_prompt -%}{{- '\\n\\n答：' -}}{%- endif -%}
{%- else -%}{{- m.content -}}{%- endif -%}
{%- endfor -%}
"""
ROLES_TEMPLATE = """\
{{- 'START' -}}
{%- for m in messages -%}
{{- '<|' ~ m.role ~ '|>' ~ (m.metadata or '') ~ '\\nSPACE' ~ m.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
PANGU_TEMPLATE = """\
{{- '<s>' -}}
{%- for m in messages -%}
{{- m.content -}}
{%- if m.role == 'system' -%}{{- '\\n' -}}
{%- elif m.role == 'user' and (not loop.last or add_generation_prompt) -%}{{- '<sep>' -}}
{%- endif -%}
{%- endfor -%}
"""
GLM_BASE_TEMPLATE = """\
{{- '[CLS]' -}}
{%- for m in messages -%}
{{- m.content -}}
{%- if m.role == 'system' -%}{{- '\\n' -}}
{%- elif m.role == 'user' and (not loop.last or add_generation_prompt) -%}
{%- if 'MASK]' not in m.content -%}{{- '[gMASK]' -}}{%- endif -%}
{{- '<|endoftext|><|startofpiece|>' -}}{%- endif -%}
{%- endfor -%}
"""
# By family. glm3's space is what SentencePiece writes before a text of its own.
TEMPLATES = {
    "glm": GLM_TEMPLATE,
    "glm2": GLM2_TEMPLATE,
    "glm3": ROLES_TEMPLATE.replace("START", "[gMASK]sop").replace("SPACE", " "),
    "glm4": ROLES_TEMPLATE.replace("START", "[gMASK]<sop>").replace("SPACE", ""),
    "glm_base": GLM_BASE_TEMPLATE,
    "pangu": PANGU_TEMPLATE,
}


class ChatText(str):
    """A conversation as text, which a tokenizer here reads as the `ids` that it was rendered from.

    A program that renders a chat and then encodes the text, as vLLM does, gets the chat's ids so:
    the control tokens among them, but none that was typed. A text cut of it is plain text.
    """

    ids: list[int]


class Rendered(NamedTuple):
    """A conversation: its text, its ids, and 1 for each id that the assistant writes."""

    text: str
    ids: list[int]
    assistant: list[int]

    def as_text(self) -> ChatText:
        text = ChatText(self.text)
        text.ids = self.ids
        return text


def read_messages(conversation: Any, tools: list[Any] | None, family: str) -> list[Message]:
    """Checked messages; `tools` stand in the first, which is a system's.

    Role "tool" is read as "observation"; content may be OpenAI's list of text parts.

    Raises:
        ValueError: a message has another form, there is none, or the family knows no tools.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns_of(getattr(conversation, "messages", conversation))):
        place = f"messages[{number}]"
        if not isinstance(turn, dict):
            raise ValueError(f'{place}: wanted {{"role": ..., "content": ...}}, got {turn!r:.60}')
        message = {key: value for key, value in turn.items() if value is not None}
        if message.get("role") == "tool":
            message["role"] = "observation"
        message["content"] = text_content(message.get("content", ""), place)
        check_message(message, place)
        calls = called_tools(message.pop("tool_calls", None), family, place)
        if message["content"] or not calls:
            messages.append(message)
        messages += calls
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if tools and not FAMILIES[family].roles:
        title = FAMILIES[family].title
        raise ValueError(f"tools: {title} knows no tools; ChatGLM3 and GLM-4 do")
    if tools:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = [as_schema(tool) for tool in tools]
    return messages


def called_tools(calls: Any, family: str, place: str) -> list[Message]:
    """An assistant's messages for OpenAI's `tool_calls`: a name as metadata, the call as content.

    Raises:
        ValueError: a call has another form, or the family knows no tools.
    """
    if not calls:
        return []
    if not FAMILIES[family].roles:
        raise ValueError(f"{place}: {FAMILIES[family].title} knows no tools; ChatGLM3 and GLM-4 do")
    messages: list[Message] = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError(
                f'{place}: a call is {{"function": {{"name": ..., "arguments": {{...}}}}}}, '
                f"got {call!r:.80}"
            )
        as_json = family == "glm4"
        text = json.dumps(arguments, ensure_ascii=False) if as_json else tool_call(arguments)
        messages.append({"role": "assistant", "metadata": name, "content": text})
    return messages


def text_content(content: Any, place: str) -> Any:
    """Text of a list of OpenAI's text parts; other content unchanged. Raises ValueError."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{place}: content must be text, got a part {part!r:.60}")
        texts.append(part["text"])
    return "".join(texts)


def as_schema(tool: Any) -> Any:
    """A tool; of a Python function, its JSON schema."""
    if not callable(tool):
        return tool
    from transformers.utils import get_json_schema

    return get_json_schema(tool)


def system_text(message: Message) -> str:
    """What ChatGLM3 is shown of a message, its tools below its text."""
    content = message["content"] or None
    return message_text({**message, "content": content}) or ""


def render_glm3(tokenizer: Any, messages: list[Message], prompt: bool) -> Rendered:
    """ChatGLM3's messages: role token, header line, text."""
    parts = [("[gMASK]sop", [tokenizer.get_command(name) for name in ("[gMASK]", "sop")], False)]
    for message in messages:
        role, metadata, content = message["role"], message.get("metadata", ""), system_text(message)
        ids = glm3_message(tokenizer, role, metadata, content)
        parts.append((f"<|{role}|>{metadata}\n {content}", ids, role == "assistant"))
    return joined_messages(tokenizer, parts, prompt)


def render_glm4(tokenizer: Any, messages: list[Message], prompt: bool) -> Rendered:
    """GLM-4's messages: role token, header line, text; an empty one has no ids."""
    parts = [
        ("[gMASK]<sop>", [tokenizer.get_command(name) for name in ("[gMASK]", "<sop>")], False)
    ]
    for message in messages:
        role, metadata, content = message["role"], message.get("metadata", ""), message["content"]
        texts = [content]
        if role == "system":
            tools = message.get("tools")
            ids = glm4_system(tokenizer, content, tools)
            if tools is not None:
                name = getattr(tokenizer, "assistant_name", ASSISTANT_NAME)
                texts.insert(0, tools_text(tools, name))
        else:
            ids = glm4_message(tokenizer, role, metadata, content)
        text = "".join(f"<|{role}|>{metadata}\n{said}" for said in texts if said)
        parts.append((text, ids, role == "assistant"))
    return joined_messages(tokenizer, parts, prompt)


def joined_messages(
    tokenizer: Any, parts: list[tuple[str, list[int], bool]], prompt: bool
) -> Rendered:
    """Messages (text, ids, whether the assistant's) end to end, `<|assistant|>` if a prompt.

    The assistant writes all of its message but the role token.
    """
    text, ids, assistant = "", [], []
    for said, piece, is_answer in parts:
        text += said
        ids += piece
        assistant += [0, *[int(is_answer)] * (len(piece) - 1)] if piece else []
    if prompt:
        text += "<|assistant|>"
        ids.append(tokenizer.get_command("<|assistant|>"))
        assistant.append(0)
    return Rendered(text, ids, assistant)


def last_round(messages: list[Message], family: str) -> tuple[str, str, str]:
    """(text up to the last answer, what of its end asks for one, that answer) without roles."""
    title = FAMILIES[family].title
    rounds, pending = history_rounds(messages, "", title)
    if pending or not rounds:
        rounds.append((pending, ""))
    write = FAMILIES[family].chat_prompt
    assert write is not None  # families without roles have it
    prompt = write(rounds[-1][0], rounds[:-1])
    end = "\n\n答：" if family == "glm2" else "\n答："
    end = end if prompt.endswith(end) else ""
    return prompt, end, rounds[-1][1]


def render_glm2(tokenizer: Any, messages: list[Message], prompt: bool) -> Rendered:
    """ChatGLM2's rounds as one text; the assistant writes the last answer."""
    text, end, answer = last_round(messages, "glm2")
    if not answer and not prompt:
        text = text.removesuffix(end)
    ids = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    ids += tokenizer.encode_text(text)
    said = tokenizer.encode_text(answer) if answer else []
    return Rendered(f"[gMASK]sop{text}{answer}", ids + said, [0] * len(ids) + [1] * len(said))


def render_glm(tokenizer: Any, messages: list[Message], prompt: bool) -> Rendered:
    """ChatGLM-6B's context, [gMASK] <sop>, the last answer, which the assistant writes."""
    text, end, answer = last_round(messages, "glm")
    start, marks = [], ""
    if answer or prompt:
        start = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
        marks = "[gMASK]<sop>"
    else:
        text = text.removesuffix(end)
    ids = tokenizer.encode_text(text) + start
    said = tokenizer.encode_text(answer) if answer else []
    return Rendered(f"{text}{marks}{answer}", ids + said, [0] * len(ids) + [1] * len(said))


def render_glm_base(tokenizer: Any, messages: list[Message], prompt: bool) -> Rendered:
    """`[CLS]`, the one prompt with its blanks, `<|endoftext|> <|startofpiece|>`, the answer."""
    text, _, answer = last_round(messages, "glm_base")
    start, marks = [tokenizer.get_command("[CLS]")], ""
    if answer or prompt:
        ids = glm_base_chat(tokenizer, text)
        marks = "<|endoftext|><|startofpiece|>"
        marks = marks if any(blank in text for blank in BLANKS) else f"[gMASK]{marks}"
    else:
        ids = [*start, *blank_ids(tokenizer, text)]
    said = tokenizer.encode_text(answer) if answer else []
    text = f"[CLS]{text}{marks}{answer}"
    return Rendered(text, ids + said, [0] * len(ids) + [1] * len(said))


def render_pangu(tokenizer: Any, messages: list[Message], prompt: bool) -> Rendered:
    """`<s>`, the one prompt, `<sep>`, the answer, which the assistant writes."""
    text, _, answer = last_round(messages, "pangu")
    ids = [tokenizer.get_command("<s>"), *tokenizer.encode_text(text)]
    text = f"<s>{text}"
    if answer or prompt:
        ids.append(tokenizer.get_command("<sep>"))
        text += "<sep>"
    said = tokenizer.encode_text(answer) if answer else []
    return Rendered(text + answer, ids + said, [0] * len(ids) + [1] * len(said))


# (tokenizer, messages, whether an answer is asked for) -> Rendered, by family.
RENDERERS: dict[str, Callable[[Any, list[Message], bool], Rendered]] = {
    "glm": render_glm,
    "glm2": render_glm2,
    "glm3": render_glm3,
    "glm4": render_glm4,
    "glm_base": render_glm_base,
    "pangu": render_pangu,
}


def render_conversation(
    tokenizer: Any,
    conversation: Any,
    tools: list[Any] | None,
    prompt: bool,
    end_answer: bool = False,
) -> Rendered:
    """A conversation of messages; with `prompt` up to where an answer begins.

    With `end_answer` the family's end token follows a last answer, as in fine-tuning.

    Raises ValueError as `read_messages`, and where an answer is asked for after an answer in a
    family without roles.
    """
    family = FAMILIES[tokenizer.family]
    messages = read_messages(conversation, tools, family.name)
    is_answered = messages[-1]["role"] == "assistant"
    if prompt and not family.roles and is_answered:
        raise ValueError("add_generation_prompt needs a question after the last answer")
    rendered = RENDERERS[family.name](tokenizer, messages, prompt)
    if not (end_answer and is_answered) or prompt:
        return rendered
    return Rendered(
        rendered.text + family.end_token,
        [*rendered.ids, tokenizer.get_command(family.end_token)],
        [*rendered.assistant, 1],
    )
