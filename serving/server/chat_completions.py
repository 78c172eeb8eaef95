"""The responses of /v1/chat/completions. Free of torch."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request as Http

from serving.server.access import ApiError
from serving.server.chat import ChatRequest
from serving.server.choices import (
    DONE,
    Choice,
    Choices,
    event,
    response_head,
)
from serving.server.service import AnswerGroup, Service


class ChatResponse:
    """The response to a chat request. Its answers are cancelled when its client disconnects."""

    def __init__(
        self, service: Service, asked: ChatRequest, group: AnswerGroup, http: Http
    ) -> None:
        self.service, self.asked = service, asked
        self.choices = Choices(service, asked, group, http)
        self.head = response_head("chatcmpl", service, asked.model)

    async def complete(self) -> dict[str, Any]:
        texts = await self.choices.texts()
        return self.head | {
            "object": "chat.completion",
            "choices": [self.whole(choice, texts[choice.place]) for choice in self.choices.all],
            "usage": self.choices.usage(),
            "glm_foundry": self.choices.report(),
        }

    def whole(self, choice: Choice, text: str) -> dict[str, Any]:
        """OpenAI's choice of an ended answer."""
        beside, calls = choice.tool_calls()
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["content"] = beside or None
            message |= self.calls_field(calls)
        return {
            "index": choice.place,
            "message": message,
            "finish_reason": self.calls_reason() if calls else choice.finish_reason(),
            "logprobs": self.logprobs(choice),
        }

    def calls_field(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """The calls of a message, as the client's version of the API has them."""
        if self.asked.gives_function_call:
            return {"function_call": calls[0]["function"]}
        return {"tool_calls": calls}

    def calls_reason(self) -> str:
        return "function_call" if self.asked.gives_function_call else "tool_calls"

    def logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """OpenAI's logprobs of the tokens that it has not given yet; None where not asked for."""
        if not self.asked.logprobs:
            return None
        entries = []
        for token, found in choice.next_logprobs():
            alternatives = [self.logprob_entry(*other) for other in found.top]
            entry = self.logprob_entry(token, found.chosen)
            entries.append(entry | {"top_logprobs": alternatives})
        return {"content": entries, "refusal": None}

    def logprob_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """OpenAI's object of one token."""
        text = self.service.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(str(text).encode())}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events.

        Of each answer the role, pieces of text and the finish reason; with the last of these
        `glm_foundry`; then the usage where the client asks for it, and [DONE].
        """
        held = [""] * len(self.choices.all)  # text that may turn out to be a call of a tool
        left = len(self.choices.all)
        async with aclosing(self.choices.pieces()) as pieces:
            for choice in self.choices.all:
                yield self.chunk(choice, {"role": "assistant", "content": ""})
            async for choice, new in pieces:
                held[choice.place] += new
                if not choice.ended:
                    if new and not choice.may_be_call():
                        yield self.chunk(choice, {"content": held[choice.place]})
                        held[choice.place] = ""
                    continue
                left -= 1
                try:
                    choice.check_ended()
                except ApiError as error:
                    yield event(error.body())
                    return
                for last in self.last_chunks(choice, held[choice.place], is_last=not left):
                    yield last
        if self.choices.disconnected:
            return
        if self.asked.include_usage:
            body = {"object": "chat.completion.chunk", "choices": []}
            yield event(self.head | body | {"usage": self.choices.usage()})
        yield DONE

    def last_chunks(self, choice: Choice, held: str, is_last: bool) -> list[str]:
        """The events that end an answer; `held`: its text that has not been sent."""
        chunks = []
        beside, calls = choice.tool_calls()
        if calls:
            numbered = [{"index": number} | call for number, call in enumerate(calls)]
            delta: dict[str, Any] = {}
            if beside and choice.stream.sent == held:  # else it has been sent
                delta["content"] = beside
            if self.asked.gives_function_call:
                numbered = calls
            chunks.append(self.chunk(choice, delta | self.calls_field(numbered)))
        elif held:
            chunks.append(self.chunk(choice, {"content": held}))
        reason = self.calls_reason() if calls else choice.finish_reason()
        more = {"glm_foundry": self.choices.report()} if is_last else {}
        return [*chunks, self.chunk(choice, {}, reason, **more)]

    def chunk(
        self, choice: Choice, delta: dict[str, Any], reason: str | None = None, **more: Any
    ) -> str:
        entry = {"index": choice.place, "delta": delta, "finish_reason": reason}
        logprobs = self.logprobs(choice)
        entry["logprobs"] = logprobs if logprobs and logprobs["content"] else None
        body = self.head | {"object": "chat.completion.chunk", "choices": [entry]}
        if self.asked.include_usage:
            body["usage"] = None
        return event(body | more)
