"""The calls of real clients, each by its name: what programs that are written for OpenAI's API do.

    python benchmarks/client_calls.py --base_url http://127.0.0.1:8000/v1 --model m

runs them against a server and prints a line a call, or with --json writes a list of objects:
client, call, result and detail.
It imports nothing of this project, so that it also runs where only the clients are installed;
clients that are not installed are left out. Results: ok; refused (the server's message); wrong
(what was expected and what came).
"""

import argparse
import asyncio
import importlib.util
import json
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

TEXT = "list river lamp"
ASKED = {"role": "user", "content": TEXT}
IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS},
}
TIME = {"type": "function", "function": {"name": "time", "description": "now"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS, "strict": True}}
FLAT_TOOL = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome", "warm": true}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


@dataclass(frozen=True)
class Target:
    """A served model and the clients' objects for it."""

    base_url: str
    model: str
    api_key: str = "-"
    options: dict = field(default_factory=lambda: {"temperature": 0, "max_tokens": 8})

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")

    @property
    def address(self) -> dict:
        return {"base_url": self.base_url, "api_key": self.api_key, "max_retries": 0}

    @cached_property
    def openai(self) -> Any:
        import openai

        return openai.OpenAI(**self.address, timeout=120)

    def async_openai(self) -> Any:
        import openai

        return openai.AsyncOpenAI(**self.address, timeout=120)

    def chat(self, *messages: dict, **fields: Any) -> Any:
        """openai's chat.completions.create; of ASKED, greedy and of 8 tokens, unless told."""
        merged = self.options | fields
        if "max_completion_tokens" in fields:
            del merged["max_tokens"]
        return self.openai.chat.completions.create(
            model=self.model, messages=list(messages) or [ASKED], **merged
        )

    def text(self, *messages: dict, **fields: Any) -> str:
        """The checked text of a chat's only answer."""
        reply = self.chat(*messages, **fields)
        check(reply.object == "chat.completion", f"object {reply.object!r}")
        check(len(reply.choices) == 1, f"{len(reply.choices)} choices")
        [choice] = reply.choices
        check(choice.finish_reason in ("stop", "length"), f"finish {choice.finish_reason!r}")
        usage = reply.usage
        total = usage.prompt_tokens + usage.completion_tokens
        check(usage.total_tokens == total, f"usage {usage}")
        check(isinstance(choice.message.content, str), f"content {choice.message.content!r}")
        return choice.message.content

    def langchain(self, **fields: Any) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model=self.model, **self.address, **(self.options | fields))

    def litellm(self, provider: str = "openai") -> dict:
        return {
            "model": f"{provider}/{self.model}",
            "api_base": self.base_url,
            "api_key": self.api_key,
            "num_retries": 0,
        }


Call = Callable[[Target], Any]
CALLS: dict[str, dict[str, Call]] = {}  # client -> name of a call -> what does and checks it
NOT_OFFERED = frozenset(  # calls that this server refuses by design
    [
        "chat: image part",
        "moderations",
        "completions: suffix",
        "completions: best_of",
        "embeddings: dimensions",
        "chat: audio modality",
        "files",
        "images",
    ]
)


def call(client: str, name: str) -> Callable[[Call], Call]:
    """Enter a function into CALLS."""

    def enter(function: Call) -> Call:
        calls = CALLS.setdefault(client, {})
        assert name not in calls, name
        calls[name] = function
        return function

    return enter


class Wrong(Exception):
    """A reply that is not what the client's API promises."""


def check(holds: Any, found: object = "") -> None:
    """Raises Wrong."""
    if not holds:
        raise Wrong(str(found)[:300])


def check_weather(values: dict) -> None:
    good = set(values) == {"city", "warm"} and values["city"] in ("Paris", "Rome")
    check(good and isinstance(values["warm"], bool), values)


def check_refused(error: Exception, status: int) -> None:
    """The error is OpenAI's error object with this status."""
    check(getattr(error, "status_code", None) == status, repr(error))
    body = getattr(error, "body", None)
    check(isinstance(body, dict) and "message" in body and "type" in body, body)


def weather_model() -> type:
    """A pydantic class of the weather, as the helpers of the clients take it."""
    from pydantic import BaseModel

    class Weather(BaseModel):
        """The weather of a city."""

        city: Literal["Paris", "Rome"]
        warm: bool

    return Weather


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls: clients keep connections that belong to the loop they began in."""
    return asyncio.new_event_loop()


def run_async(work: Coroutine) -> Any:
    return event_loop().run_until_complete(work)


def raw(target: Target, path: str, body: bytes | None, method: str, **headers: str) -> Any:
    """(status, headers, body) of a request without a client."""
    request = urllib.request.Request(target.root + path, body, method=method)
    for name, value in ({"content-type": "application/json"} | headers).items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


# ---- openai: chat


@call("openai", "chat")
def chat(t: Target) -> None:
    t.text()


@call("openai", "chat: 8 at once (async)")
def chat_async(t: Target) -> None:
    async def ask_all() -> list:
        async with t.async_openai() as client:
            asked = []
            for number in range(8):
                message = {"role": "user", "content": f"{TEXT} {number}"}
                asked.append(
                    client.chat.completions.create(
                        model=t.model, messages=[message], max_tokens=4 + number
                    )
                )
            return await asyncio.gather(*asked)

    for number, reply in enumerate(run_async(ask_all())):
        check(reply.usage.completion_tokens <= 4 + number, reply.usage)


@call("openai", "chat: stream")
def chat_stream(t: Target) -> None:
    wanted = t.text()
    pieces = []
    for chunk in t.chat(stream=True):
        pieces.append(chunk.choices[0].delta.content or "")
    check("".join(pieces) == wanted, f"stream {pieces}, reply {wanted!r}")
    check(chunk.choices[0].finish_reason in ("stop", "length"), chunk)


@call("openai", "chat: stream (async)")
def chat_stream_async(t: Target) -> None:
    async def ask() -> list:
        async with t.async_openai() as client:
            stream = await client.chat.completions.create(
                model=t.model, messages=[ASKED], stream=True, **t.options
            )
            return [chunk async for chunk in stream]

    chunks = run_async(ask())
    check(chunks[0].choices[0].delta.role == "assistant", chunks[0])


@call("openai", "chat: stream with usage")
def chat_stream_usage(t: Target) -> None:
    chunks = list(t.chat(stream=True, stream_options={"include_usage": True}))
    check(chunks[-1].usage and not chunks[-1].choices, chunks[-1])
    check(all(chunk.usage is None for chunk in chunks[:-1]), "usage before the last chunk")


def stop_within(text: str) -> str:
    """Two characters of a text that are not its beginning."""
    for place in range(1, len(text) - 1):
        if text.find(text[place : place + 2]) == place:
            return text[place : place + 2]
    raise AssertionError(f"the model's answer has no text to stop at: {text!r}")


@call("openai", "chat: .stream() helper")
def chat_stream_helper(t: Target) -> None:
    # The helper raises an error where an answer ends with "length", so that this one must not.
    options = t.options | {"stop": stop_within(t.text())}
    with t.openai.chat.completions.stream(model=t.model, messages=[ASKED], **options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    check("content.delta" in kinds and "content.done" in kinds, kinds)
    check(final.choices[0].message.content == t.text(**options), final)


@call("openai", "chat: raw response")
def chat_raw(t: Target) -> None:
    reply = t.openai.chat.completions.with_raw_response.create(
        model=t.model, messages=[ASKED], **t.options
    )
    check(reply.headers["content-type"].startswith("application/json"), reply.headers)
    check(reply.parse().choices, "no choices")


@call("openai", "chat: streaming response")
def chat_streaming_response(t: Target) -> None:
    with t.openai.chat.completions.with_streaming_response.create(
        model=t.model, messages=[ASKED], stream=True, **t.options
    ) as reply:
        lines = [line for line in reply.iter_lines() if line]
    check(lines[-1] == "data: [DONE]", lines[-1])


@call("openai", "chat: stream closed early")
def chat_early_close(t: Target) -> None:
    stream = t.chat(stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    t.text()


@call("openai", "chat: system")
def chat_system(t: Target) -> None:
    t.text({"role": "system", "content": "Be short."}, ASKED)


@call("openai", "chat: developer")
def chat_developer(t: Target) -> None:
    t.text({"role": "developer", "content": "Be short."}, ASKED)


@call("openai", "chat: history")
def chat_history(t: Target) -> None:
    t.text(ASKED, {"role": "assistant", "content": "lamp"}, {"role": "user", "content": "and"})


@call("openai", "chat: text parts")
def chat_parts(t: Target) -> None:
    part = {"type": "text", "text": TEXT}
    check(t.text({"role": "user", "content": [part]}) == t.text(), "another answer")


@call("openai", "chat: name of a message")
def chat_name(t: Target) -> None:
    t.text(ASKED | {"name": "ann"})


@call("openai", "chat: image part")
def chat_image(t: Target) -> None:
    parts = [{"type": "text", "text": TEXT}, {"type": "image_url", "image_url": {"url": IMAGE}}]
    t.text({"role": "user", "content": parts})


@call("openai", "chat: audio modality")
def chat_audio(t: Target) -> None:
    t.text(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})


@call("openai", "chat: stop, a text")
def chat_stop(t: Target) -> None:
    text = t.text(max_tokens=16)
    mark = text[1:3] or "x"
    check(mark not in t.text(max_tokens=16, stop=mark), "the stop text is in the answer")


@call("openai", "chat: stop, four texts")
def chat_stops(t: Target) -> None:
    t.text(stop=["a", "b", "\n", "c d"])


@call("openai", "chat: seed")
def chat_seed(t: Target) -> None:
    answers = {t.text(temperature=1, seed=7, max_tokens=12) for _ in range(2)}
    check(len(answers) == 1, answers)


@call("openai", "chat: temperature")
def chat_temperature(t: Target) -> None:
    t.text(temperature=1.5)


@call("openai", "chat: top_p")
def chat_top_p(t: Target) -> None:
    t.text(temperature=1, top_p=0.5)


@call("openai", "chat: top_p 0")
def chat_top_p_0(t: Target) -> None:
    check(t.text(temperature=1, top_p=0) == t.text(), "not the likeliest tokens")


@call("openai", "chat: max_completion_tokens")
def chat_max_completion_tokens(t: Target) -> None:
    reply = t.chat(max_completion_tokens=3)
    check(reply.usage.completion_tokens <= 3, reply.usage)


@call("openai", "chat: seed 1.0 and max_tokens 4.0")
def chat_floats(t: Target) -> None:
    t.text(seed=1.0, max_tokens=4.0)


@call("openai", "chat: unknown fields")
def chat_unknown(t: Target) -> None:
    t.text(extra_body={"not_a_field": 3})


@call("openai", "chat: user, metadata, store, service_tier")
def chat_metadata(t: Target) -> None:
    t.text(user="ann", metadata={"a": "b"}, store=False, service_tier="auto")


@call("openai", "chat: safety_identifier, prompt_cache_key, reasoning_effort, verbosity")
def chat_new_fields(t: Target) -> None:
    given = {"safety_identifier": "x", "prompt_cache_key": "y"}
    t.text(**given, reasoning_effort="low", verbosity="low")


@call("openai", "chat: extra_body top_k, min_p, repetition_penalty")
def chat_extra_body(t: Target) -> None:
    t.text(temperature=1, extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1})


@call("openai", "chat: extra_headers, extra_query, timeout")
def chat_extras(t: Target) -> None:
    t.text(extra_headers={"x-a": "b"}, extra_query={"c": "d"}, timeout=60)


@call("openai", "chat: n 2")
def chat_n(t: Target) -> None:
    reply = t.chat(n=2, temperature=1, seed=3)
    check([choice.index for choice in reply.choices] == [0, 1], reply.choices)


@call("openai", "chat: n 2, stream")
def chat_n_stream(t: Target) -> None:
    ends = []
    options = {"include_usage": True}
    for chunk in t.chat(n=2, temperature=1, seed=3, stream=True, stream_options=options):
        for choice in chunk.choices:
            if choice.finish_reason:
                ends.append(choice.index)
    check(sorted(ends) == [0, 1], ends)
    check(chunk.usage is not None, chunk)


@call("openai", "chat: logprobs")
def chat_logprobs(t: Target) -> None:
    [choice] = t.chat(logprobs=True).choices
    check(choice.logprobs.content[0].logprob <= 0, choice.logprobs)


@call("openai", "chat: top_logprobs")
def chat_top_logprobs(t: Target) -> None:
    [choice] = t.chat(logprobs=True, top_logprobs=3).choices
    check(all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content), choice.logprobs)


@call("openai", "chat: logprobs, stream")
def chat_logprobs_stream(t: Target) -> None:
    count = 0
    chunks = list(t.chat(logprobs=True, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        if chunk.choices[0].logprobs:
            count += len(chunk.choices[0].logprobs.content)
    check(count == chunks[-1].usage.completion_tokens, (count, chunks[-1].usage))


@call("openai", "chat: logit_bias")
def chat_logit_bias(t: Target) -> None:
    t.text(logit_bias={"100": -100, "101": 5})


@call("openai", "chat: presence_penalty")
def chat_presence_penalty(t: Target) -> None:
    t.text(presence_penalty=1.5)


@call("openai", "chat: frequency_penalty")
def chat_frequency_penalty(t: Target) -> None:
    t.text(frequency_penalty=-1.5)


@call("openai", "chat: last message from the assistant")
def chat_last_assistant(t: Target) -> None:
    t.text(ASKED, {"role": "assistant", "content": "lamp"})


@call("openai", "chat: last message from system")
def chat_last_system(t: Target) -> None:
    t.text(ASKED, {"role": "system", "content": "Be short."})


@call("openai", "chat: two messages of the user in a row")
def chat_two_user(t: Target) -> None:
    t.text(ASKED, ASKED)


@call("openai", "chat: a prediction")
def chat_prediction(t: Target) -> None:
    t.text(prediction={"type": "content", "content": "lamp"})


# ---- openai: structured outputs and tools


@call("openai", "response_format: text")
def format_text(t: Target) -> None:
    t.text(response_format={"type": "text"})


@call("openai", "response_format: json_object")
def format_json(t: Target) -> None:
    message = {"role": "user", "content": "The weather as JSON"}
    reply = t.chat(message, response_format={"type": "json_object"}, max_tokens=60)
    [choice] = reply.choices
    check(choice.message.content.lstrip().startswith("{"), choice)
    if choice.finish_reason == "stop":
        check(isinstance(json.loads(choice.message.content), dict), choice)


@call("openai", "response_format: json_schema")
def format_schema(t: Target) -> None:
    check_weather(json.loads(t.text(response_format=SCHEMA, max_tokens=100)))


@call("openai", "response_format: json_schema, sampled stream")
def format_schema_stream(t: Target) -> None:
    pieces = []
    for chunk in t.chat(response_format=SCHEMA, max_tokens=100, temperature=1, stream=True):
        pieces.append(chunk.choices[0].delta.content or "")
    check_weather(json.loads("".join(pieces)))


@call("openai", "chat: .parse()")
def chat_parse(t: Target) -> None:
    reply = t.openai.chat.completions.parse(
        model=t.model,
        messages=[ASKED],
        response_format=weather_model(),
        **t.options | {"max_tokens": 100},
    )
    check_weather(reply.choices[0].message.parsed.model_dump())


@call("openai", "chat: .stream() helper with response_format")
def chat_stream_parse(t: Target) -> None:
    with t.openai.chat.completions.stream(
        model=t.model,
        messages=[ASKED],
        response_format=weather_model(),
        **t.options | {"max_tokens": 100},
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    check_weather(final.choices[0].message.parsed.model_dump())


def check_call(choice: Any, reason: str = "tool_calls") -> None:
    """A choice is a call of `weather`; a named one ends with stop, as OpenAI has it."""
    check(choice.finish_reason in (reason, "stop"), choice)
    [made] = choice.message.tool_calls
    check(made.id and made.type == "function" and made.function.name == "weather", made)
    check_weather(json.loads(made.function.arguments))


@call("openai", "tools: auto")
def tools_auto(t: Target) -> None:
    [choice] = t.chat(tools=[WEATHER]).choices
    check(choice.finish_reason in ("stop", "length", "tool_calls"), choice)


@call("openai", "tools: tool_choice none")
def tools_none(t: Target) -> None:
    t.text(tools=[WEATHER], tool_choice="none")


@call("openai", "tools: tool_choice required")
def tools_required(t: Target) -> None:
    check_call(t.chat(tools=[WEATHER], tool_choice="required", max_tokens=100).choices[0])


@call("openai", "tools: tool_choice by name")
def tools_named(t: Target) -> None:
    tools = [TIME, WEATHER]
    check_call(t.chat(tools=tools, tool_choice=NAMED, max_tokens=100).choices[0])


@call("openai", "tools: tool_choice allowed_tools")
def tools_allowed(t: Target) -> None:
    allowed = {"mode": "required", "tools": [NAMED]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    check_call(t.chat(tools=[TIME, WEATHER], tool_choice=choice, max_tokens=100).choices[0])


@call("openai", "tools: required, stream")
def tools_stream(t: Target) -> None:
    name, arguments, reasons = "", "", []
    fields = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 100}
    for chunk in t.chat(stream=True, **fields):
        [choice] = chunk.choices
        for part in choice.delta.tool_calls or []:
            check(part.index == 0, part)
            name += part.function.name or ""
            arguments += part.function.arguments or ""
        reasons.append(choice.finish_reason)
    check(name == "weather" and reasons[-1] in ("tool_calls", "stop"), (name, reasons))
    check_weather(json.loads(arguments))


@call("openai", "tools: results of a call")
def tools_results(t: Target) -> None:
    reply = t.chat(ASKED, CALLED, RESULT, tools=[WEATHER])
    check(reply.choices, reply)


@call("openai", "tools: parallel_tool_calls false")
def tools_parallel(t: Target) -> None:
    t.chat(tools=[WEATHER], parallel_tool_calls=False)


@call("openai", "tools: strict, .parse() with pydantic_function_tool")
def tools_parse(t: Target) -> None:
    import openai

    reply = t.openai.chat.completions.parse(
        model=t.model,
        messages=[ASKED],
        tools=[openai.pydantic_function_tool(weather_model(), name="weather")],
        tool_choice="required",
        **t.options | {"max_tokens": 100},
    )
    [made] = reply.choices[0].message.tool_calls
    check_weather(made.function.parsed_arguments.model_dump())


@call("openai", "functions: auto")
def functions_auto(t: Target) -> None:
    t.chat(functions=[WEATHER["function"]])


@call("openai", "functions: function_call by name")
def functions_named(t: Target) -> None:
    fields = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}
    [choice] = t.chat(**fields, max_tokens=100).choices
    check(choice.message.function_call.name == "weather", choice)
    check_weather(json.loads(choice.message.function_call.arguments))


# ---- openai: the other paths


@call("openai", "models: list and retrieve")
def models(t: Target) -> None:
    names = [model.id for model in t.openai.models.list()]
    check(names == [t.model], names)
    check(t.openai.models.retrieve(t.model).id == t.model)


def complete(t: Target, prompt: Any, **fields: Any) -> Any:
    return t.openai.completions.create(model=t.model, prompt=prompt, **t.options | fields)


@call("openai", "completions")
def completions(t: Target) -> None:
    reply = complete(t, TEXT)
    check(reply.object == "text_completion" and len(reply.choices) == 1, reply)
    check(reply.usage.completion_tokens <= 8, reply.usage)


@call("openai", "completions: several prompts")
def completions_several(t: Target) -> None:
    reply = complete(t, [TEXT, "a b c"])
    check([choice.index for choice in reply.choices] == [0, 1], reply)
    check(reply.choices[0].text == complete(t, TEXT).choices[0].text, "another answer")


@call("openai", "completions: token ids")
def completions_ids(t: Target) -> None:
    check(len(complete(t, [65, 66, 67]).choices) == 1)


@call("openai", "completions: several lists of token ids")
def completions_ids_several(t: Target) -> None:
    check(len(complete(t, [[65, 66, 67], [68, 69]]).choices) == 2)


@call("openai", "completions: stream")
def completions_stream(t: Target) -> None:
    pieces = [chunk.choices[0].text for chunk in complete(t, TEXT, stream=True)]
    check("".join(pieces) == complete(t, TEXT).choices[0].text, pieces)


@call("openai", "completions: stream with usage")
def completions_stream_usage(t: Target) -> None:
    chunks = list(complete(t, TEXT, stream=True, stream_options={"include_usage": True}))
    check(chunks[-1].usage and not chunks[-1].choices, chunks[-1])


@call("openai", "completions: echo")
def completions_echo(t: Target) -> None:
    text = complete(t, TEXT, echo=True).choices[0].text
    check(text.startswith(TEXT), text)


@call("openai", "completions: logprobs")
def completions_logprobs(t: Target) -> None:
    reply = complete(t, TEXT, logprobs=2)
    found = reply.choices[0].logprobs
    count = reply.usage.completion_tokens
    check(len(found.tokens) == len(found.token_logprobs) == count, found)
    check(all(len(top) >= 2 for top in found.top_logprobs), found)


@call("openai", "completions: echo, logprobs and no answer")
def completions_score(t: Target) -> None:
    reply = complete(t, [65, 66, 67], echo=True, logprobs=1, max_tokens=0)
    found = reply.choices[0].logprobs
    check(len(found.token_logprobs) == 3 and found.token_logprobs[0] is None, found)


@call("openai", "completions: n 2")
def completions_n(t: Target) -> None:
    check(len(complete(t, TEXT, n=2, temperature=1).choices) == 2)


@call("openai", "completions: best_of")
def completions_best_of(t: Target) -> None:
    check(len(complete(t, TEXT, n=1, best_of=2, temperature=1).choices) == 1)


@call("openai", "completions: stop, seed, penalties, logit_bias, user")
def completions_options(t: Target) -> None:
    fields = {"stop": ["\n"], "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    complete(t, TEXT, **fields, logit_bias={"100": -100}, user="ann", top_p=0.9)


@call("openai", "completions: suffix")
def completions_suffix(t: Target) -> None:
    complete(t, TEXT, suffix="the end")


@call("openai", "completions: async")
def completions_async(t: Target) -> None:
    async def ask() -> Any:
        async with t.async_openai() as client:
            return await client.completions.create(model=t.model, prompt=TEXT, max_tokens=4)

    check(run_async(ask()).choices)


def embedded(t: Target, value: Any, **fields: Any) -> list:
    reply = t.openai.embeddings.create(model=t.model, input=value, **fields)
    check(reply.object == "list" and reply.usage.total_tokens > 0, reply.usage)
    check([entry.index for entry in reply.data] == list(range(len(reply.data))))
    return [entry.embedding for entry in reply.data]


@call("openai", "embeddings (base64, as the client asks)")
def embeddings(t: Target) -> None:
    [vector] = embedded(t, TEXT)
    check(abs(math.hypot(*vector) - 1) < 1e-3, math.hypot(*vector))


@call("openai", "embeddings: encoding_format float")
def embeddings_float(t: Target) -> None:
    [vector] = embedded(t, TEXT, encoding_format="float")
    [other] = embedded(t, TEXT)
    check(math.dist(vector, other) < 1e-4, math.dist(vector, other))


@call("openai", "embeddings: several texts")
def embeddings_several(t: Target) -> None:
    first, _ = embedded(t, [TEXT, "a b c"])
    [alone] = embedded(t, TEXT)
    check(math.dist(first, alone) < 1e-3, math.dist(first, alone))


@call("openai", "embeddings: token ids")
def embeddings_ids(t: Target) -> None:
    check(len(embedded(t, [65, 66, 67])) == 1)


@call("openai", "embeddings: several lists of token ids")
def embeddings_ids_several(t: Target) -> None:
    check(len(embedded(t, [[65, 66], [67]])) == 2)


@call("openai", "embeddings: dimensions")
def embeddings_dimensions(t: Target) -> None:
    [vector] = embedded(t, TEXT, dimensions=8)
    check(len(vector) == 8, len(vector))


def respond(t: Target, value: Any = TEXT, **fields: Any) -> Any:
    options = {"temperature": 0, "max_output_tokens": 16}
    return t.openai.responses.create(model=t.model, input=value, **options | fields)


@call("openai", "responses")
def responses(t: Target) -> None:
    reply = respond(t)
    check(reply.object == "response" and reply.status in ("completed", "incomplete"), reply.status)
    check(isinstance(reply.output_text, str) and reply.usage.output_tokens <= 16, reply.usage)


@call("openai", "responses: instructions and messages")
def responses_messages(t: Target) -> None:
    parts = [{"type": "input_text", "text": TEXT}]
    respond(t, [{"role": "user", "content": parts}], instructions="Be short.")


@call("openai", "responses: history as the client gives it back")
def responses_history(t: Target) -> None:
    asked: list = [ASKED]
    asked += respond(t, asked).output
    respond(t, [*asked, {"role": "user", "content": "and"}])


@call("openai", "responses: stream")
def responses_stream(t: Target) -> None:
    kinds, text = [], ""
    for event in respond(t, stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    check(kinds[0] == "response.created", kinds)
    check(kinds[-1] in ("response.completed", "response.incomplete"), kinds)
    check(text == event.response.output_text == respond(t).output_text, text)


@call("openai", "responses: .stream() helper")
def responses_stream_helper(t: Target) -> None:
    # The helper raises an error where a response ends incomplete, so that this one must not.
    whole = respond(t).output_text
    with t.openai.responses.stream(
        model=t.model,
        input=TEXT,
        temperature=0,
        max_output_tokens=16,
        extra_body={"stop": stop_within(whole)},
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    check(final.status == "completed" and whole.startswith(final.output_text), final)


@call("openai", "responses: async")
def responses_async(t: Target) -> None:
    async def ask() -> Any:
        async with t.async_openai() as client:
            return await client.responses.create(model=t.model, input=TEXT, max_output_tokens=16)

    check(run_async(ask()).output)


@call("openai", "responses: .parse()")
def responses_parse(t: Target) -> None:
    reply = t.openai.responses.parse(
        model=t.model, input=TEXT, text_format=weather_model(), max_output_tokens=100
    )
    check_weather(reply.output_parsed.model_dump())


@call("openai", "responses: tools")
def responses_tools(t: Target) -> None:
    reply = respond(t, tools=[FLAT_TOOL], tool_choice="required", max_output_tokens=100)
    [made] = [item for item in reply.output if item.type == "function_call"]
    check(made.name == "weather" and made.call_id, made)
    check_weather(json.loads(made.arguments))


@call("openai", "responses: results of a call")
def responses_results(t: Target) -> None:
    made = {"type": "function_call", "call_id": "1", "name": "weather"}
    made["arguments"] = '{"city": "Rome", "warm": true}'
    result = {"type": "function_call_output", "call_id": "1", "output": "sunny"}
    respond(t, [ASKED, made, result], tools=[FLAT_TOOL])


@call("openai", "responses: store false, metadata, reasoning, truncation")
def responses_fields(t: Target) -> None:
    fields = {"store": False, "metadata": {"a": "b"}, "truncation": "disabled"}
    respond(t, **fields, parallel_tool_calls=True, user="ann", top_p=0.9)


@call("openai", "moderations")
def moderations(t: Target) -> None:
    t.openai.moderations.create(model=t.model, input=TEXT)


@call("openai", "files")
def files(t: Target) -> None:
    list(t.openai.files.list())


@call("openai", "images")
def images(t: Target) -> None:
    t.openai.images.generate(model=t.model, prompt=TEXT)


@call("openai", "errors: another model's name")
def error_model(t: Target) -> None:
    import openai

    try:
        t.openai.chat.completions.create(model="gpt-4o", messages=[ASKED])
    except openai.NotFoundError as error:
        check_refused(error, 404)
        check(error.code == "model_not_found", error.code)
    else:
        check(False, "no error")


@call("openai", "errors: a wrong value")
def error_value(t: Target) -> None:
    import openai

    try:
        t.chat(temperature=9)
    except openai.BadRequestError as error:
        check_refused(error, 400)
    else:
        check(False, "no error")


@call("openai", "errors: a prompt that is too long")
def error_long(t: Target) -> None:
    import openai

    try:
        t.chat({"role": "user", "content": "river " * 20_000})
    except openai.BadRequestError as error:
        check(error.code == "context_length_exceeded", error.code)
    else:
        check(False, "no error")


# ---- without a client


@call("http", "a path with a slash at its end is 404")
def http_slash(t: Target) -> None:
    status, _, body = raw(t, "/v1/chat/completions/", b"{}", "POST")
    check(status == 404 and b'"error"' in body, (status, body))


@call("http", "CORS preflight of another origin")
def http_preflight(t: Target) -> None:
    headers = {"Origin": "http://a.example", "Access_Control_Request_Method": "POST"}
    status, found, _ = raw(t, "/v1/chat/completions", None, "OPTIONS", **headers)
    allowed = {name.lower() for name in found} & {"access-control-allow-origin"}
    check(status in (200, 400, 405) and not (status == 200 and allowed), (status, found))


@call("http", "curl without a content type is told so")
def http_content_type(t: Target) -> None:
    body = json.dumps({"messages": [ASKED]}).encode()
    headers = {"content_type": "application/x-www-form-urlencoded"}
    status, _, reply = raw(t, "/v1/chat/completions", body, "POST", **headers)
    check(status == 415 and b"Content-Type" in reply, (status, reply))


# ---- langchain-openai


def langchain_tool() -> dict:
    return {"name": "weather", "description": "of a city", "parameters": PARAMETERS}


@call("langchain-openai", "invoke")
def lc_invoke(t: Target) -> None:
    reply = t.langchain().invoke([("system", "Be short."), ("human", TEXT)])
    check(isinstance(reply.content, str) and reply.usage_metadata["input_tokens"] > 0, reply)


@call("langchain-openai", "stream")
def lc_stream(t: Target) -> None:
    pieces = [piece.content for piece in t.langchain().stream(TEXT)]
    check("".join(pieces) == t.langchain().invoke(TEXT).content, pieces)


@call("langchain-openai", "stream with usage")
def lc_stream_usage(t: Target) -> None:
    whole = None
    for piece in t.langchain(stream_usage=True).stream(TEXT):
        whole = piece if whole is None else whole + piece
    check(whole is not None and whole.usage_metadata["output_tokens"] > 0, whole)


@call("langchain-openai", "batch")
def lc_batch(t: Target) -> None:
    check(len(t.langchain().batch([TEXT, "a", "b", "c"])) == 4)


@call("langchain-openai", "ainvoke")
def lc_ainvoke(t: Target) -> None:
    check(run_async(t.langchain().ainvoke(TEXT)).response_metadata["finish_reason"])


@call("langchain-openai", "astream, abatch")
def lc_astream(t: Target) -> None:
    async def ask() -> list:
        pieces = [piece async for piece in t.langchain().astream(TEXT)]
        return pieces + await t.langchain().abatch([TEXT, "a"])

    check(run_async(ask()))


@call("langchain-openai", "generate with n 2")
def lc_n(t: Target) -> None:
    from langchain_core.messages import HumanMessage

    reply = t.langchain(n=2, temperature=1).generate([[HumanMessage(TEXT)]])
    check(len(reply.generations[0]) == 2, reply)


@call("langchain-openai", "stop, seed, logprobs, penalties")
def lc_options(t: Target) -> None:
    fields = {"seed": 3, "logprobs": True, "top_logprobs": 2}
    chat_model = t.langchain(**fields, presence_penalty=0.5, frequency_penalty=0.5)
    reply = chat_model.invoke(TEXT, stop=["\n"])
    check("logprobs" in reply.response_metadata, reply)


@call("langchain-openai", "bind_tools")
def lc_tools(t: Target) -> None:
    t.langchain().bind_tools([langchain_tool()]).invoke(TEXT)


@call("langchain-openai", "bind_tools, tool_choice any")
def lc_tools_any(t: Target) -> None:
    bound = t.langchain(max_tokens=100).bind_tools([langchain_tool()], tool_choice="any")
    [made] = bound.invoke(TEXT).tool_calls
    check(made["name"] == "weather", made)
    check_weather(made["args"])


@call("langchain-openai", "bind_tools, results of a call")
def lc_tools_results(t: Target) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    made = {"name": "weather", "args": {"city": "Rome", "warm": True}, "id": "1"}
    messages = [
        HumanMessage(TEXT),
        AIMessage("", tool_calls=[made]),
        ToolMessage("sunny", tool_call_id="1"),
    ]
    t.langchain().bind_tools([langchain_tool()]).invoke(messages)


def lc_structured(t: Target, method: str, **fields: Any) -> Any:
    chat_model = t.langchain(max_tokens=100)
    structured = chat_model.with_structured_output(weather_model(), method=method, **fields)
    return structured.invoke("The weather as JSON")


@call("langchain-openai", "with_structured_output, json_schema")
def lc_schema(t: Target) -> None:
    check_weather(lc_structured(t, "json_schema").model_dump())


@call("langchain-openai", "with_structured_output, json_schema, strict")
def lc_schema_strict(t: Target) -> None:
    check_weather(lc_structured(t, "json_schema", strict=True).model_dump())


@call("langchain-openai", "with_structured_output, function_calling")
def lc_function_calling(t: Target) -> None:
    check_weather(lc_structured(t, "function_calling").model_dump())


@call("langchain-openai", "with_structured_output, json_mode")
def lc_json_mode(t: Target) -> None:
    # A random model's object seldom fits the class: that it is one is what the server promises.
    import openai

    try:
        reply = lc_structured(t, "json_mode", include_raw=True)["raw"]
    except openai.LengthFinishReasonError:  # nor does it end it within max_tokens
        return
    check(reply.content.lstrip().startswith("{"), reply)


@call("langchain-openai", "with_structured_output, stream")
def lc_structured_stream(t: Target) -> None:
    structured = t.langchain(max_tokens=100).with_structured_output(PARAMETERS | {"title": "w"})
    check_weather(list(structured.stream(TEXT))[-1])


@call("langchain-openai", "use_responses_api")
def lc_responses(t: Target) -> None:
    check(t.langchain(use_responses_api=True, max_tokens=16).invoke(TEXT).content is not None)


@call("langchain-openai", "use_responses_api, stream")
def lc_responses_stream(t: Target) -> None:
    check(list(t.langchain(use_responses_api=True, max_tokens=16).stream(TEXT)))


@call("langchain-openai", "OpenAI (completions)")
def lc_completions(t: Target) -> None:
    from langchain_openai import OpenAI

    model = OpenAI(model=t.model, **t.address, **t.options)
    check(isinstance(model.invoke(TEXT), str))
    check("".join(model.stream(TEXT)) == model.invoke(TEXT), "a stream of another text")


def lc_embeddings(t: Target, **fields: Any) -> Any:
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(model=t.model, **t.address, **fields)


@call("langchain-openai", "embeddings, check_embedding_ctx_length false")
def lc_embed(t: Target) -> None:
    model = lc_embeddings(t, check_embedding_ctx_length=False)
    vectors = model.embed_documents([TEXT, "a b c"])
    check(len(vectors) == 2 and len(model.embed_query(TEXT)) == len(vectors[0]))


@call("langchain-openai", "embeddings, async")
def lc_aembed(t: Target) -> None:
    model = lc_embeddings(t, check_embedding_ctx_length=False)
    check(len(run_async(model.aembed_documents([TEXT, "a"]))) == 2)


# ---- instructor


def instructed(t: Target, mode: str, **fields: Any) -> Any:
    """instructor's answer; a random model's JSON that does not fit is the model's failure."""
    import instructor

    client = instructor.from_openai(t.openai, mode=getattr(instructor.Mode, mode))
    options = {"max_retries": 0, "temperature": 0, "max_tokens": 100}
    return client.chat.completions.create(
        model=t.model, messages=[ASKED], response_model=weather_model(), **options | fields
    )


@call("instructor", "TOOLS")
def in_tools(t: Target) -> None:
    check_weather(instructed(t, "TOOLS").model_dump())


@call("instructor", "TOOLS_STRICT")
def in_tools_strict(t: Target) -> None:
    check_weather(instructed(t, "TOOLS_STRICT").model_dump())


@call("instructor", "JSON_SCHEMA")
def in_schema(t: Target) -> None:
    check_weather(instructed(t, "JSON_SCHEMA").model_dump())


@call("instructor", "JSON")
def in_json(t: Target) -> None:
    from instructor.core import IncompleteOutputException, InstructorRetryException

    try:
        instructed(t, "JSON")
    except IncompleteOutputException:  # a random model's object need not end within max_tokens
        return
    except InstructorRetryException as error:
        if error.last_completion is None:
            raise
        text = error.last_completion.choices[0].message.content
        check(text.lstrip().startswith("{"), text)


@call("instructor", "JSON_SCHEMA, async")
def in_async(t: Target) -> None:
    import instructor

    async def ask() -> Any:
        async with t.async_openai() as plain:
            client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
            return await client.chat.completions.create(
                model=t.model,
                messages=[ASKED],
                response_model=weather_model(),
                max_retries=0,
                max_tokens=100,
                temperature=0,
            )

    check_weather(run_async(ask()).model_dump())


@call("instructor", "TOOLS, create_partial")
def in_partial(t: Target) -> None:
    import instructor

    client = instructor.from_openai(t.openai, mode=instructor.Mode.TOOLS)
    parts = client.chat.completions.create_partial(
        model=t.model, messages=[ASKED], response_model=weather_model(), max_tokens=100
    )
    check_weather(list(parts)[-1].model_dump())


@call("instructor", "from_provider")
def in_provider(t: Target) -> None:
    import instructor

    client = instructor.from_provider(f"openai/{t.model}", **t.address)
    reply = client.chat.completions.create(
        messages=[ASKED], response_model=weather_model(), max_retries=0, max_tokens=100
    )
    check_weather(reply.model_dump())


# ---- litellm


@call("litellm", "completion")
def ll_completion(t: Target) -> None:
    import litellm

    reply = litellm.completion(messages=[ASKED], **t.litellm(), **t.options)
    check(reply.usage.total_tokens > 0, reply)


@call("litellm", "completion, stream")
def ll_stream(t: Target) -> None:
    import litellm

    fields = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(litellm.completion(messages=[ASKED], **fields, **t.litellm(), **t.options))
    check(pieces)


@call("litellm", "acompletion")
def ll_acompletion(t: Target) -> None:
    import litellm

    async def ask() -> Any:
        plain = await litellm.acompletion(messages=[ASKED], **t.litellm(), **t.options)
        stream = await litellm.acompletion(
            messages=[ASKED], stream=True, **t.litellm(), **t.options
        )
        return plain, [piece async for piece in stream]

    check(run_async(ask())[1])


@call("litellm", "hosted_vllm/")
def ll_vllm(t: Target) -> None:
    import litellm

    check(litellm.completion(messages=[ASKED], **t.litellm("hosted_vllm"), **t.options).choices)


@call("litellm", "hosted_vllm/, top_k, guided by a schema")
def ll_vllm_options(t: Target) -> None:
    import litellm

    options = t.options | {"max_tokens": 100}
    reply = litellm.completion(
        messages=[ASKED],
        response_format=SCHEMA,
        extra_body={"top_k": 5},
        **t.litellm("hosted_vllm"),
        **options,
    )
    check_weather(json.loads(reply.choices[0].message.content))


@call("litellm", "tools")
def ll_tools(t: Target) -> None:
    import litellm

    options = t.options | {"max_tokens": 100}
    reply = litellm.completion(
        messages=[ASKED], tools=[WEATHER], tool_choice="required", **t.litellm(), **options
    )
    check_call(reply.choices[0])


@call("litellm", "response_format, a pydantic class")
def ll_format(t: Target) -> None:
    import litellm

    options = t.options | {"max_tokens": 100}
    reply = litellm.completion(
        messages=[ASKED], response_format=weather_model(), **t.litellm(), **options
    )
    check_weather(json.loads(reply.choices[0].message.content))


@call("litellm", "text_completion")
def ll_text(t: Target) -> None:
    import litellm

    fields = t.litellm() | {"model": f"text-completion-openai/{t.model}"}
    check(litellm.text_completion(prompt=TEXT, **fields, **t.options).choices)


@call("litellm", "embedding")
def ll_embedding(t: Target) -> None:
    import litellm

    check(len(litellm.embedding(input=[TEXT, "a"], **t.litellm()).data) == 2)


@call("litellm", "embedding, hosted_vllm/")
def ll_embedding_vllm(t: Target) -> None:
    import litellm

    check(len(litellm.embedding(input=[TEXT], **t.litellm("hosted_vllm")).data) == 1)


@call("litellm", "responses")
def ll_responses(t: Target) -> None:
    import litellm

    check(litellm.responses(input=TEXT, max_output_tokens=16, **t.litellm()).output)


# ---- running them

PACKAGES = {  # client -> its package
    "http": "json",
    "openai": "openai",
    "langchain-openai": "langchain_openai",
    "instructor": "instructor",
    "litellm": "litellm",
}


def installed_clients() -> list[str]:
    return [name for name in CALLS if importlib.util.find_spec(PACKAGES[name])]


def server_message(error: BaseException | None) -> str | None:
    """The server's own words in an error of a client, or of what caused it; None without any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        status = getattr(error, "status_code", None)
        if isinstance(status, int) and 400 <= status < 500:
            body = getattr(error, "body", None)
            said = body.get("message") if isinstance(body, dict) else None
            return f"{status} {said or error}"
        error = error.__cause__ or error.__context__
    return None


def run_call(target: Target, client: str, name: str) -> tuple[str, str]:
    """(ok, refused or wrong; the detail) of one call."""
    try:
        CALLS[client][name](target)
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:
        if (said := server_message(error)) is not None:
            return "refused", " ".join(said.split())[:300]
        return "wrong", " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return "ok", ""


def run_calls(target: Target, clients: list[str]) -> Iterator[dict]:
    for client in clients:
        for name in CALLS[client]:
            result, detail = run_call(target, client, name)
            yield {"client": client, "call": name, "result": result, "detail": detail}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_url", required=True, help="of a server, with its /v1")
    parser.add_argument("--model", required=True, help="the served model's name")
    parser.add_argument("--clients", help="a comma-separated list (default: those installed)")
    parser.add_argument("--json", help="write what was found here")
    flags = parser.parse_args(argv)
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    clients = flags.clients.split(",") if flags.clients else installed_clients()
    found = []
    for line in run_calls(Target(flags.base_url, flags.model), clients):
        found.append(line)
        print(" | ".join(line.values()), flush=True)
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
