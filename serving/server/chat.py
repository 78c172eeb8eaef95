"""OpenAI chat requests for the ChatGLM families.

Bodies to requests, messages to prompts. Free of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chatglm.chat_template import called_tools
from chatglm.families import Family, family_of
from serving.server.fields import CHAT_TABLE, ChatMessage
from serving.server.generation import GenerationRequest, PromptIds, settle_options
from serving.server.structured import (
    AnswerShape,
    Form,
    answer_grammar,
    indented_size,
    single_form,
)
from serving.server.text_stream import TextStream
from serving.server.tool_choice import ToolSelection
from serving.server.tools import call_form, check_tools
from serving.server.vocabulary import drops_first_space

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


@dataclass(frozen=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """A body of /v1/chat/completions, checked.

    Attributes:
        messages: the last is the user's, a tool's result, or the assistant's, which the answer
            goes on with.
        tools: what the model is shown of tools, as OpenAI's objects.
        gives_function_call: the client is of openai 0.28 and gets `function_call`.
        forces_call: the answer must be a call of one of the tools.
        form: of the answer's text.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...] = ()
    gives_function_call: bool = False
    forces_call: bool = False
    form: Form | None = None

    @property
    def shown_tools(self) -> tuple[dict[str, Any], ...]:
        return self.tools

    def sizes(self) -> tuple[int, int]:
        characters = sum(map(indented_size, self.tools))
        for message in self.messages:
            characters += len(message.text) + sum(map(indented_size, message.calls))
        return len(self.messages), characters

    def encoded(
        self, tokenizer: "FamilyTokenizer", prompt_options: dict[str, Any]
    ) -> list[PromptIds]:
        ids = encode_messages(tokenizer, self.messages, self.tools, **prompt_options)
        return [PromptIds(ids, prompt_of(self.messages))]

    @property
    def has_grammar(self) -> bool:
        return self.form is not None or self.forces_call

    def grammar_source(self, tokenizer: "FamilyTokenizer") -> str:
        form = None if self.forces_call else self.form
        return answer_grammar(answer_shape(tokenizer), form, self.tools)

    def text_stream(self, tokenizer: "FamilyTokenizer", prompt: Sequence[int]) -> TextStream:
        family = tokenizer_family(tokenizer)
        if self.form is not None:  # what the grammar accepted, unchanged but for blank ends
            return TextStream(
                tokenizer, replace(family, answer_text=str.strip), self.stop, exact=True
            )
        return TextStream(tokenizer, family, self.stop)


def parse_body(body: Any) -> ChatRequest:
    """The request in a body's JSON.

    Raises:
        ValueError: in one line, where serving.server.fields refuses a field.
    """
    fields_read = CHAT_TABLE.read(body)
    if "top_logprobs" in fields_read and not fields_read.get("logprobs"):
        raise ValueError("top_logprobs needs logprobs true")
    if (max_tokens := fields_read.pop("max_completion_tokens", None)) is not None:
        fields_read["max_tokens"] = max_tokens
    settle_options(fields_read)
    functions = fields_read.pop("functions", ())
    selection = fields_read.pop("tool_choice", None)
    function_selection = fields_read.pop("function_call", None)
    selection = selection or function_selection or ToolSelection()
    fields_read["tools"] = selection.shown(fields_read.pop("tools", ()) or functions)
    fields_read["forces_call"] = selection.mode == "required"
    fields_read["gives_function_call"] = bool(functions)
    fields_read["form"] = single_form(fields_read)
    has_grammar = fields_read["form"] is not None or fields_read["forces_call"]
    if has_grammar and fields_read["messages"][-1].role == "assistant":
        raise ValueError(
            "response_format and a required call need a new answer: the last message is the "
            "assistant's, which the answer would go on with"
        )
    return ChatRequest(**fields_read, unknown_fields=CHAT_TABLE.unknown(body))


def encode_messages(
    tokenizer: "FamilyTokenizer",
    messages: tuple[ChatMessage, ...],
    tools: tuple[dict[str, Any], ...] = (),
    **prompt_options: Any,
) -> list[int]:
    """The family's chat prompt.

    ChatGLM3 and GLM-4 take messages as they are. The others have no system role: the system's
    text is put before the first question, and messages of one role in a row are joined. A last
    message of the assistant is the beginning of the answer.

    Args:
        tools: stand in the system's message.
        prompt_options: options of the family's encode_chat.
    Raises:
        ValueError: for ChatGLM-6B and ChatGLM2-6B, messages of which the assistant's are first;
            tools, their calls or results for a family that knows none.
    """
    family = tokenizer_family(tokenizer)
    if tools or any(message.calls or message.role == "observation" for message in messages):
        check_tools(tokenizer)
    if messages[-1].role == "assistant":
        asked = encode_messages(tokenizer, messages[:-1], tools, **prompt_options)
        return asked + answer_beginning(tokenizer, messages[-1].text)
    if family.roles:
        history = message_dicts(messages, tools, family)
        last = history.pop()
        return family.encode_chat(
            tokenizer, last["content"], history, last["role"], **prompt_options
        )
    system: list[str] = []
    texts: list[str] = []
    for role, text, _ in messages:
        if role == "system":
            system.append(text)
            continue
        if role == ("user", "assistant")[len(texts) % 2]:
            texts.append(text)
        elif texts:
            texts[-1] += f"\n{text}"
        else:
            raise ValueError(
                f"the first message must be the user's: {family.title} knows only rounds"
            )
    if len(texts) % 2 == 0 and texts:
        raise ValueError(f"the last message must be the user's: {family.title} knows only rounds")
    texts[:1] = ["\n\n".join([*system, *texts[:1]])]
    return family.encode_chat(
        tokenizer, texts[-1], list(zip(texts[:-1:2], texts[1::2])), **prompt_options
    )


def answer_beginning(tokenizer: "FamilyTokenizer", text: str) -> list[int]:
    """Ids of an answer's beginning: what the family writes before it, then the text."""
    prompt = encode_messages(tokenizer, (ChatMessage("user", "a"),))
    family = tokenizer_family(tokenizer)
    trained = family.encode_prompt(tokenizer, "a", len(prompt) + 64).input_ids
    has_header = family.roles and trained[: len(prompt)] == prompt
    return [*(trained[len(prompt) :] if has_header else []), *tokenizer.encode_text(text)]


def answer_shape(tokenizer: "FamilyTokenizer") -> AnswerShape:
    """How the tokenizer's family writes an answer."""
    family = tokenizer_family(tokenizer)
    header = str(tokenizer.decode(answer_beginning(tokenizer, ""))) if family.roles else ""
    return AnswerShape(header, drops_first_space(tokenizer), call_form(tokenizer))


def message_dicts(
    messages: tuple[ChatMessage, ...], tools: tuple[dict[str, Any], ...], family: Family
) -> list[dict[str, Any]]:
    """Messages as a history of a family with roles."""
    history: list[dict[str, Any]] = []
    for role, text, calls in messages:
        if text or not calls:
            history.append({"role": role, "content": text})
        if family.name == "causal":
            history += template_calls(calls)
        else:
            history += called_tools(list(calls), family.name, "messages")
    if tools:
        if history[0]["role"] != "system" or len(history) == 1:  # the last is what is asked
            history.insert(0, {"role": "system", "content": None})
        history[0]["tools"] = list(tools)
    return history


def template_calls(calls: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """An assistant's messages for its calls, as chat templates are given them."""
    messages = []
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        messages.append({"role": "assistant", "metadata": name, "content": "", "call": arguments})
    return messages


def prompt_of(messages: tuple[ChatMessage, ...]) -> str:
    """The prompt for the length predictor: the system's text and the last question.

    Earlier rounds are left out.
    """
    system = [text for role, text, _ in messages if role == "system"]
    asked = [text for role, text, _ in messages if role == "user"]
    return "\n\n".join([*system, *asked[-1:]])


def tokenizer_family(tokenizer: "FamilyTokenizer") -> Family:
    """The family of a loaded tokenizer, which always has one."""
    return family_of(tokenizer)
