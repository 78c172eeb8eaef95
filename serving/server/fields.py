"""The fields of a chat request: one table that checks bodies and writes their JSON schema.

Free of torch and of HTTP.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from chatglm.files import shorten
from finetune.rows.fields import ROLE_NAMES
from serving.server.structured import (
    Guided,
    ResponseFormat,
    StructuredOutputs,
    check_nesting,
    counted_or_shown,
)
from serving.server.tool_choice import ToolChoice
from serving.tools.names import check_tool_name

Schema = dict[str, Any]  # a part of JSON Schema

ROLES = ROLE_NAMES | {"observation": "observation"}
MESSAGES = 65536  # of a chat
TOOLS = 128  # of a request, as OpenAI has it
MOST = 2**31 - 1  # of counts and token ids
STOPS = 4  # stop strings, as OpenAI has it
BAD_WORDS = 64
PROMPTS = 128  # in a request
ANSWERS = 128  # to a prompt, as OpenAI has it
TOP_LOGPROBS = 20
PRIORITY = 1000
STOP_CHARACTERS = 256
STOP_IDS = 64
BIASES = 300  # tokens of a logit_bias, as OpenAI has it


class ChatMessage(NamedTuple):
    """A message of a chat.

    Attributes:
        role: system, user, assistant or observation.
        calls: an assistant's calls of tools: {"function": {"name", "arguments"}}.
    """

    role: str
    text: str
    calls: tuple[dict[str, Any], ...] = ()


class Field(Protocol):
    def read(self, name: str, value: Any) -> Any:
        """The checked value. Raises ValueError, in one line, where it is not what it should be."""

    def schema(self) -> Schema:
        """Of the field in JSON Schema (OpenAPI 3.1)."""


def check_characters(name: str, text: str) -> str:
    """The text.

    Raises:
        ValueError: it holds half of a surrogate pair, which no tokenizer and no reply can encode.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name} holds half of a surrogate pair, which is no character"
            ) from None
    return text


@dataclass(frozen=True)
class Number:
    """A number from `least` to `most`; `above`: `least` itself is excluded."""

    kind: type
    least: float
    most: float
    text: str
    above: bool = False

    def read(self, name: str, value: Any) -> float:
        whole = type(value) is int or (type(value) is float and value.is_integer())
        fits = (
            (whole or self.kind is float)
            and type(value) in (int, float)
            and self.least <= value <= self.most
        )
        if not fits or (self.above and value == self.least):
            kind = "whole number" if self.kind is int else "number"
            low = f"{'above' if self.above else 'at least'} {self.least}"
            most = self.most if self.kind is int else f"{self.most:g}"
            raise ValueError(
                f"{name} must be a {kind} {low} and at most {most}, got {shorten(value)}"
            )
        return self.kind(value)

    def schema(self) -> Schema:
        low = "exclusiveMinimum" if self.above else "minimum"
        kind = "integer" if self.kind is int else "number"
        return {
            "type": [kind, "null"],
            low: self.least,
            "maximum": self.most,
            "description": self.text,
        }


BIAS = Number(float, -100, 100, "")


@dataclass(frozen=True)
class Flag:
    text: str

    def read(self, name: str, value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError(f"{name} must be true or false, got {shorten(value)}")
        return value

    def schema(self) -> Schema:
        return {"type": ["boolean", "null"], "description": self.text}


@dataclass(frozen=True)
class Text:
    text: str
    longest: int = 256

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {shorten(value)}")
        if len(value) > self.longest:
            raise ValueError(
                f"{name} must have at most {self.longest} characters, got {len(value)}"
            )
        return check_characters(name, value)

    def schema(self) -> Schema:
        return {"type": ["string", "null"], "maxLength": self.longest, "description": self.text}


@dataclass(frozen=True)
class Stops:
    """At most `most` texts, or one."""

    text: str
    most: int = STOPS

    def read(self, name: str, value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if (
            not isinstance(stops, list)
            or len(stops) > self.most
            or not all(isinstance(s, str) for s in stops)
        ):
            raise ValueError(
                f"{name} must be a text or at most {self.most} texts, none of them empty, "
                f"got {shorten(value)}"
            )
        for stop in stops:
            if not 0 < len(stop) <= STOP_CHARACTERS:
                raise ValueError(
                    f"{name} must be texts of 1 to {STOP_CHARACTERS} characters, got one of "
                    f"{len(stop)}"
                )
        return tuple(map(partial(check_characters, name), stops))

    def schema(self) -> Schema:
        one = {"type": "string", "minLength": 1, "maxLength": STOP_CHARACTERS}
        many = {"type": "array", "items": one, "maxItems": self.most}
        return {"anyOf": [one, many, {"type": "null"}], "description": self.text}


@dataclass(frozen=True)
class TokenIds:
    text: str

    def read(self, name: str, value: Any) -> frozenset[int]:
        ids = value if isinstance(value, list) and len(value) <= STOP_IDS else [None]
        if not all(type(token) is int and 0 <= token <= MOST for token in ids):
            raise ValueError(
                f"{name} must be a list of at most {STOP_IDS} token ids from 0 to {MOST}, "
                f"got {shorten(value)}"
            )
        return frozenset(ids)

    def schema(self) -> Schema:
        one = {"type": "integer", "minimum": 0, "maximum": MOST}
        return {
            "type": ["array", "null"],
            "items": one,
            "maxItems": STOP_IDS,
            "description": self.text,
        }


@dataclass(frozen=True)
class LogitBias:
    text: str

    def read(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        """(token id, what is added to its logit) in ascending order."""
        if not isinstance(value, dict) or len(value) > BIASES:
            raise ValueError(
                f"{name} must be an object of at most {BIASES} token ids, got {shorten(value)}"
            )
        biases = []
        for token, bias in value.items():
            # Python refuses to read a text of thousands of digits.
            is_short = len(token) <= len(str(MOST))
            if not (is_short and token.isascii() and token.isdigit()) or int(token) > MOST:
                raise ValueError(
                    f"{name} must name tokens by ids from 0 to {MOST}, got {shorten(token)}"
                )
            biases.append((int(token), BIAS.read(f"{name}[{token}]", bias)))
        return tuple(sorted(biases))

    def schema(self) -> Schema:
        return {
            "type": ["object", "null"],
            "maxProperties": BIASES,
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "description": self.text,
        }


@dataclass(frozen=True)
class Prompts:
    """Texts or token ids: one or several."""

    text: str

    def read(self, name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
        prompts = value if isinstance(value, list) else [value]
        if prompts and all(type(token) is int for token in prompts):
            prompts = [prompts]
        if not 0 < len(prompts) <= PROMPTS:
            raise ValueError(
                f"{name} must be 1 to {PROMPTS} texts or lists of token ids, got {len(prompts)}"
            )
        read: list[str | tuple[int, ...]] = []
        for number, prompt in enumerate(prompts):
            place = f"{name}[{number}]" if len(prompts) > 1 else name
            if isinstance(prompt, str):
                read.append(check_characters(place, prompt))
                continue
            ids: list[Any] = prompt if isinstance(prompt, list) and prompt else [None]
            if not all(type(token) is int and 0 <= token <= MOST for token in ids):
                raise ValueError(
                    f"{place} must be a text, or token ids from 0 to {MOST}, got {shorten(prompt)}"
                )
            read.append(tuple(ids))
        return tuple(read)

    def schema(self) -> Schema:
        token = {"type": "integer", "minimum": 0, "maximum": MOST}
        ids = {"type": "array", "items": token, "minItems": 1}
        texts = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": PROMPTS}
        several = {"type": "array", "items": ids, "minItems": 1, "maxItems": PROMPTS}
        return {"anyOf": [{"type": "string"}, texts, ids, several], "description": self.text}


@dataclass(frozen=True)
class Encoding:
    text: str

    def read(self, name: str, value: Any) -> bool:
        """Whether it is base64."""
        if value not in ("float", "base64"):
            raise ValueError(f'{name} must be "float" or "base64", got {shorten(value)}')
        return value == "base64"

    def schema(self) -> Schema:
        return {"enum": ["float", "base64", None], "description": self.text}


@dataclass(frozen=True)
class StreamOptions:
    text: str

    def read(self, name: str, value: Any) -> bool:
        """Whether the client asks for the usage."""
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {shorten(value)}")
        wanted = value.get("include_usage")
        return wanted is not None and Flag("").read(f"{name}.include_usage", wanted)

    def schema(self) -> Schema:
        inside = {"include_usage": Flag("A last chunk with the usage.").schema()}
        return {"type": ["object", "null"], "properties": inside, "description": self.text}


@dataclass(frozen=True)
class Messages:
    text: str

    def read(self, name: str, value: Any) -> tuple[ChatMessage, ...]:
        """The messages."""
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} must be a list of at least one message, got {shorten(value)}")
        messages = []
        for i, message in enumerate(value):
            messages.append(self._one(f"{name}[{i}]", message))
        last = messages[-1]
        if last.role == "assistant" and (last.calls or not last.text):
            raise ValueError("the last message is the assistant's without text: nothing is asked")
        if all(message.role == "assistant" for message in messages):
            raise ValueError("a chat needs at least one message that is not the assistant's")
        return tuple(messages)

    @staticmethod
    def _one(name: str, message: Any) -> ChatMessage:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            got = shorten(role if isinstance(message, dict) else message)
            raise ValueError(
                f"{name} must be an object with a role of {', '.join(ROLES)}, got {got}"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = text_of_parts(content)
        calls = read_calls(name, message) if role == "assistant" else ()
        if content is None and role == "assistant":
            content = ""
        if not isinstance(content, str):
            got = shorten(message.get("content"))
            raise ValueError(f"{name}.content must be text, got {got}")
        return ChatMessage(ROLES[role], check_characters(f"{name}.content", content), calls)

    def schema(self) -> Schema:
        part = {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        }
        content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
        nullable_content = {"anyOf": [*content["anyOf"], {"type": "null"}]}
        message: Schema = {"type": "object", "required": ["role", "content"]}
        others = message | {
            "properties": {
                "role": {"enum": [role for role in ROLES if role != "assistant"]},
                "content": content,
            }
        }
        answer: Schema = {"type": "object", "required": ["role"]}
        answer["properties"] = {
            "role": {"const": "assistant"},
            "content": nullable_content,
            "tool_calls": {"type": ["array", "null"], "items": CALL_SCHEMA, "maxItems": TOOLS},
        }
        return {
            "type": "array",
            "items": {"anyOf": [others, answer]},
            "minItems": 1,
            "description": self.text,
        }


CALL_SCHEMA: Schema = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "arguments": {
                    "type": "string",
                    "description": "A JSON object.",
                    "contentMediaType": "application/json",
                },
            },
        }
    },
}


def read_calls(name: str, message: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """An assistant's calls of tools; `function_call` of older clients is one.

    Raises:
        ValueError: one has another form, or its arguments are no JSON object.
    """
    calls = message.get("tool_calls") or []
    if message.get("function_call") is not None:
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list) or len(calls) > TOOLS:
        raise ValueError(
            f"{name}.tool_calls must be a list of at most {TOOLS} calls, got {shorten(calls)}"
        )
    read = []
    for number, call in enumerate(calls):
        place = f"{name}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(f"{place} must be an object with a function, got {shorten(call)}")
        arguments = function.get("arguments") or "{}"
        try:
            values = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(
                f"{place}.function.arguments must be a JSON object, got {shorten(arguments)}"
            )
        check_nesting(f"{place}.function.arguments", values)
        tool = check_tool_name(f"{place}.function.name", function.get("name"))
        read.append({"function": {"name": tool, "arguments": values}})
    return tuple(read)


@dataclass(frozen=True)
class Tools:
    """`functions`: as clients of openai 0.28 give them, without the object around each."""

    text: str
    functions: bool = False

    def read(self, name: str, value: Any) -> tuple[dict[str, Any], ...]:
        """{"type": "function", "function": {"name", ...}} of each tool."""
        if not isinstance(value, list) or len(value) > TOOLS:
            raise ValueError(
                f"{name} must be a list of at most {TOOLS} tools, got {counted_or_shown(value)}"
            )
        tools = []
        for number, tool in enumerate(value):
            place = f"{name}[{number}]"
            is_tool = isinstance(tool, dict) and (
                self.functions or tool.get("type", "function") == "function"
            )
            function = tool if self.functions else is_tool and tool.get("function")
            if not is_tool or not isinstance(function, dict):
                raise ValueError(
                    f"{place} must be an object of type function, with a function, "
                    f"got {shorten(tool)}"
                )
            check_tool_name(f"{place}.name", function.get("name"))
            if not isinstance(function.get("parameters", {}), (dict, type(None))):
                got = shorten(function["parameters"])
                raise ValueError(f"{place}.parameters must be an object, got {got}")
            check_nesting(place, function)
            check_characters(place, json.dumps(function, ensure_ascii=False))
            tools.append({"type": "function", "function": function})
        return tuple(tools)

    def schema(self) -> Schema:
        function: Schema = {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
            },
        }
        tool: Schema = {"type": "object", "required": ["type", "function"]}
        tool["properties"] = {"type": {"const": "function"}, "function": function}
        return {
            "type": ["array", "null"],
            "items": function if self.functions else tool,
            "maxItems": TOOLS,
            "description": self.text,
        }


def text_of_parts(parts: list) -> str | None:
    """The text of a content in parts; None where one is no text."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            return None
        if not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


# Of every endpoint that samples answers.
SAMPLING: Mapping[str, Field] = {
    "model": Text("The served model's name, or that of one of its adapters."),
    "n": Number(int, 1, ANSWERS, "Answers to the prompt; a seed counts up from one to the next."),
    "best_of": Number(int, 1, ANSWERS, "As n, and must be n: no answers are made and left out."),
    "max_length": Number(int, 1, MOST, "Tokens of prompt and answer together, at most."),
    "temperature": Number(
        float, 0, 2, "0, or a value too small to sample with, takes the likeliest token."
    ),
    "top_p": Number(
        float, 0, 1, "Sample among the likeliest tokens of this much probability; 0: the likeliest."
    ),
    "top_k": Number(int, -1, MOST, "Sample among so many likeliest tokens; 0 or -1 for all."),
    "min_p": Number(
        float, 0, 1, "Leave out tokens below this share of the likeliest one's probability."
    ),
    "do_sample": Flag("false takes the likeliest token, as temperature 0 does."),
    "repetition_penalty": Number(
        float, 0.01, 100, "Divides the logits of tokens that prompt or answer hold."
    ),
    "presence_penalty": Number(
        float, -2, 2, "Subtracted from the logits of tokens that the answer holds."
    ),
    "frequency_penalty": Number(float, -2, 2, "Subtracted from them once per occurrence."),
    "logit_bias": LogitBias("Added to the logits of tokens: {token id: -100 to 100}."),
    "bad_words": Stops("Texts whose tokens the answer does not hold.", BAD_WORDS),
    "seed": Number(int, -(2**63), 2**63 - 1, "Of this answer's sampling."),
    "stop": Stops("Texts that end the answer and are not part of it."),
    "stop_token_ids": TokenIds("Token ids that end the answer and are not part of it."),
    "stream": Flag("Server-sent events."),
    "stream_options": StreamOptions("Of a stream."),
    "slo_s": Number(float, 0, 1e9, "Seconds within which the whole answer is wanted.", above=True),
    "priority": Number(
        int, -PRIORITY, PRIORITY, "Requests of a lower one leave the queue first; 0 without one."
    ),
}
FIELDS: Mapping[str, Field] = {
    "messages": Messages("The chat; a last message of the assistant is gone on with."),
    **SAMPLING,
    "max_tokens": Number(int, 1, MOST, "Tokens of the answer, at most."),
    "max_completion_tokens": Number(int, 1, MOST, "As max_tokens, which it overrides."),
    "logprobs": Flag("Give the log probability of each token, by the model's own logits."),
    "top_logprobs": Number(
        int, 0, TOP_LOGPROBS, "With logprobs: those of so many likeliest tokens too."
    ),
    "tools": Tools("Functions that the answer may call; of models that know tools."),
    "functions": Tools("As tools, in the form of openai 0.28.", functions=True),
    "tool_choice": ToolChoice("auto; none: no tools are shown; required, or one by its name."),
    "function_call": ToolChoice("As tool_choice, for functions."),
    "parallel_tool_calls": Flag("false: the reply has one call at most."),
    "response_format": ResponseFormat("The form of the answer's text."),
    "guided_json": Guided("json", "A JSON schema of the answer; as response_format."),
    "guided_regex": Guided("regex", "A regular expression that the answer matches as a whole."),
    "guided_choice": Guided("choice", "Texts, one of which is the answer."),
    "guided_grammar": Guided("grammar", "A grammar of the answer, in Lark or GBNF."),
    "structured_outputs": StructuredOutputs("One of json, regex, choice, grammar, json_object."),
}
# They would change an answer and are not supported: refused, except for their neutral values.
REFUSED: Mapping[str, tuple] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_beam_search": (False,),
    "prompt_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "modalities": (["text"],),
    "audio": (),
    "max_new_tokens": (),
    "min_tokens": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "top_a": (0,),
    "tfs": (1,),
    "mirostat": (0,),
    "logits_processors": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "echo": (False,),
    "suffix": ("",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "history": ([],),
}
# Fields that change no answer: neither refused nor named as ignored.
NO_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    ]
)
SHOWN = 16  # names of ignored fields that a reply has


@dataclass(frozen=True)
class FieldTable:
    """The fields of an endpoint's body.

    Attributes:
        refused: fields that would change an answer and are not supported, by their neutral values.
        required: a field that each body has.
    """

    fields: Mapping[str, Field]
    refused: Mapping[str, tuple]
    required: str

    def read(self, body: Any) -> dict[str, Any]:
        """The checked fields that a body sets; null counts as not set.

        Raises:
            ValueError: in one line, where a field is not what it should be or is not supported.
        """
        if not isinstance(body, dict):
            raise ValueError(f"the body must be a JSON object, got {type(body).__name__}")
        for name, neutral_values in self.refused.items():
            if body.get(name) is not None and body[name] not in neutral_values:
                remedy = "; say max_tokens" if name == "max_new_tokens" else ""
                raise ValueError(f"{name} is not supported here{remedy}")
        values = {}
        for name, field in self.fields.items():
            if body.get(name) is not None:
                values[name] = field.read(name, body[name])
            elif name == self.required:
                raise ValueError(f"{name} is required")
        return values

    def unknown(self, body: dict) -> tuple[str, ...]:
        """Names of unknown fields, the first SHOWN, cut to 64 characters."""
        known = {*self.fields, *self.refused, *NO_EFFECT}
        unknown = [name for name in body if name not in known]
        return tuple(name.encode("utf-8", "replace").decode()[:64] for name in unknown[:SHOWN])

    def schema(self) -> Schema:
        """JSON Schema of a body; its description names the refused fields."""
        text = f"Not supported, so refused with 400: {', '.join(self.refused)}. "
        text += "Unknown fields are named in glm_foundry.ignored."
        properties = {name: field.schema() for name, field in self.fields.items()}
        return {
            "type": "object",
            "required": [self.required],
            "properties": properties,
            "description": text,
        }


CHAT_REFUSED = {name: neutral for name, neutral in REFUSED.items() if name not in FIELDS}
CHAT_TABLE = FieldTable(FIELDS, CHAT_REFUSED, "messages")
