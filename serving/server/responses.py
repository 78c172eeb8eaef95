"""/v1/responses: OpenAI's newer form of a chat, asked and answered as a chat completion.

Nothing is stored: a conversation is given whole in `input`. Free of torch.
"""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as Http

from serving.server.access import ApiError
from serving.server.chat import ChatRequest, parse_body
from serving.server.choices import Choices, response_head
from serving.server.fields import MOST, REFUSED, SAMPLING, FieldTable, Number, Text
from serving.server.response_fields import (
    InputItems,
    ResponseChoice,
    ResponseTools,
    TextFormat,
)
from serving.server.service import AnswerGroup, Service
from serving.server.structured import check_nesting

LEFT_OUT = ("n", "best_of", "max_length", "stream_options")
RESPONSES_TABLE = FieldTable(
    {
        "input": InputItems("A text, or the messages, calls of tools and their outputs so far."),
        "instructions": Text("The system's message.", longest=MOST),
        **{name: field for name, field in SAMPLING.items() if name not in LEFT_OUT},
        "max_output_tokens": Number(int, 1, MOST, "Tokens of the answer, at most."),
        "tools": ResponseTools("Functions that the answer may call; of models that know tools."),
        "tool_choice": ResponseChoice("auto, none, required, or the tool that is called."),
        "text": TextFormat("format: the form of the answer's text."),
    },
    {name: neutral for name, neutral in REFUSED.items() if name != "truncation"}
    | {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "include": ([],),
        "prompt": (),
        "reasoning": ({},),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "max_tool_calls": (),
        "messages": (),
    },
    "input",
)


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest(ChatRequest):
    """A body of /v1/responses, as the chat that it asks for.

    Attributes:
        echoed: fields of the body that the response repeats.
    """

    echoed: dict[str, Any] = field(default_factory=dict)


def parse_response(body: Any) -> ResponsesRequest:
    """The request in a body's JSON.

    Raises:
        ValueError: in one line, where a field is refused.
    """
    read = RESPONSES_TABLE.read(body)
    chat_body = {name: body[name] for name in SAMPLING if name in read}
    messages = read["input"]
    if "instructions" in read:
        messages = [{"role": "system", "content": read["instructions"]}, *messages]
    chat_body["messages"] = messages
    if "max_output_tokens" in read:
        chat_body["max_tokens"] = read["max_output_tokens"]
    for name in ("tools", "tool_choice"):
        if name in read:
            chat_body[name] = read[name]
    chat_body["response_format"] = read.get("text")
    chat_body["parallel_tool_calls"] = body.get("parallel_tool_calls")
    asked = parse_body(chat_body)
    echoed = {
        "instructions": read.get("instructions"),
        "max_output_tokens": read.get("max_output_tokens"),
        "temperature": read.get("temperature"),
        "top_p": read.get("top_p"),
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "metadata": body.get("metadata") or {},
    }
    for name, value in echoed.items():
        check_nesting(name, value)
    options = vars(asked) | {"unknown_fields": RESPONSES_TABLE.unknown(body)}
    return ResponsesRequest(**options, echoed=echoed)


class ResponsesResponse:
    """The response to a request of /v1/responses."""

    def __init__(
        self, service: Service, asked: ResponsesRequest, group: AnswerGroup, http: Http
    ) -> None:
        self.service, self.asked = service, asked
        self.choices = Choices(service, asked, group, http)
        head = response_head("resp", service, asked.model)
        self.head = {
            "id": head["id"].replace("-", "_"),
            "object": "response",
            "created_at": head["created"],
            "model": head["model"],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **asked.echoed,
        }
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self.numbered = 0  # events so far

    def body(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """OpenAI's response object."""
        fields = {"status": status, "error": None, "output": output}
        # At the end, where a gateway looks for them.
        return self.head | fields | {"incomplete_details": None, "usage": None} | more

    def ended(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The response object of an ended answer."""
        is_whole = self.choices.all[0].finish_reason() == "stop"
        details = None if is_whole else {"reason": "max_output_tokens"}
        usage = self.choices.usage()
        return self.body(
            "completed" if is_whole else "incomplete",
            output,
            incomplete_details=details,
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            glm_foundry=self.choices.report(),
        )

    def message(self, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The output item of the answer's text."""
        return {
            "id": self.message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": parts,
        }

    async def complete(self) -> dict[str, Any]:
        texts = await self.choices.texts()
        beside, calls = self.choices.all[0].tool_calls()
        text = beside if calls else texts[0]
        output = []
        if text or not calls:
            output.append(self.message("completed", [text_part(text)]))
        return self.ended(output + [call_item(call) for call in calls])

    async def events(self) -> AsyncIterator[str]:
        """OpenAI's events of a response: created, its items with their deltas, completed."""
        for kind in ("created", "in_progress"):
            yield self.event(f"response.{kind}", response=self.body("in_progress", []))
        held = ""  # text that may turn out to be a call of a tool
        begun, [choice] = False, self.choices.all
        async with aclosing(self.choices.pieces()) as pieces:
            async for _, new in pieces:
                held += new
                if not choice.ended and held and not choice.may_be_call():
                    for line in self.text_events(held, begun):
                        yield line
                    held, begun = "", True
        if self.choices.disconnected:
            return
        try:
            choice.check_ended()
        except ApiError as error:
            failure = {"code": "server_error", "message": error.message}
            failed = self.body("failed", [], error=failure)
            yield self.event("response.failed", response=failed)
            return
        beside, calls = choice.tool_calls()
        text = choice.stream.sent
        if calls:
            held = "" if begun else beside
            text = text[: len(text) - len(held)] if begun else beside
        if held or not (begun or calls):
            for line in self.text_events(held, begun):
                yield line
            begun = True
        output = []
        if begun:
            output.append(self.message("completed", [text_part(text)]))
            for line in self.text_end(text, output[0]):
                yield line
        for call in calls:
            item = call_item(call)
            for line in self.call_events(item, len(output)):
                yield line
            output.append(item)
        ended = self.ended(output)
        yield self.event(f"response.{ended['status']}", response=ended)

    def text_events(self, delta: str, begun: bool) -> list[str]:
        """The events of a piece of text; not `begun`: those that begin its item before."""
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        lines = []
        if not begun:
            item = self.message("in_progress", [])
            lines.append(self.event("response.output_item.added", output_index=0, item=item))
            part = self.event("response.content_part.added", **place, part=text_part(""))
            lines.append(part)
        if delta:
            text = self.event("response.output_text.delta", **place, delta=delta, logprobs=[])
            lines.append(text)
        return lines

    def text_end(self, text: str, item: dict[str, Any]) -> list[str]:
        """The events that end the text's item."""
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        return [
            self.event("response.output_text.done", **place, text=text, logprobs=[]),
            self.event("response.content_part.done", **place, part=text_part(text)),
            self.event("response.output_item.done", output_index=0, item=item),
        ]

    def call_events(self, item: dict[str, Any], index: int) -> list[str]:
        """The events of a call, which comes whole."""
        place = {"item_id": item["id"], "output_index": index}
        arguments = item["arguments"]
        begun = item | {"status": "in_progress", "arguments": ""}
        kind = "response.function_call_arguments"
        return [
            self.event("response.output_item.added", output_index=index, item=begun),
            self.event(f"{kind}.delta", **place, delta=arguments),
            self.event(f"{kind}.done", **place, name=item["name"], arguments=arguments),
            self.event("response.output_item.done", output_index=index, item=item),
        ]

    def event(self, kind: str, **fields: Any) -> str:
        body = {"type": kind, "sequence_number": self.numbered, **fields}
        self.numbered += 1
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n"


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(call: dict[str, Any]) -> dict[str, Any]:
    """The output item of one of chat completions' tool_calls."""
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
    }
