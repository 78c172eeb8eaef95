"""The families of ChatGLM: names, defaults, and the functions that lay out their prompts.

Free of torch and transformers, so that `FAMILIES` can feed `choices=` without a slow import.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from . import causal_prompts, prompts, raw_prompts


@dataclass(frozen=True)
class Family:
    """One generation of ChatGLM, or other models: names, defaults and text/id layouts.

    chat_defaults: generate()'s options in a chat where the caller gives none; `max_length` counts
        the prompt
    prompt_text(query) -> str: a training prompt's text (glm3: the query itself; its role and
        newline are ids)
    roles: messages have roles, and tools: a conversation is one sequence of messages
    role_tokens: control tokens of roles, which an answer's text does not show
    shares_beginning: rows of a pass may share their first tokens (causal attention, our classes,
        no dropout in the published models)
    infills: an answer fills a blank of a context that every token of it sees, before and after
    single: a prompt is answered by itself, without earlier turns
    raw: prompts are texts to go on with (raw_prompts)
    encode_prompt(tokenizer, prompt, max_src_len) -> EncodedPrompt
    encode_example(tokenizer, prompt, answer, max_len, max_src_len) -> Example
    encode_chat(tokenizer, query, history=None, role="user") -> list[int]: ids of a chat up to the
        answer
    chat_prompt(query, history=None) -> str: text of a chat; None for glm3, whose roles have no
        text form
    answer_text(text) -> str: an answer's text, where it is no tool call
    process_response(text) -> str; with roles: process_response(text, history) -> (content, new
        history)

    History is [(query, answer), ...] or message dicts (role, content; glm3: metadata, tools);
    ValueError for any other form. Lengths are in tokens.
    """

    name: str
    title: str
    roles: bool
    layers_prefix: str
    tokenizer_file: str
    end_token: str
    stop_tokens: tuple[str, ...]
    chat_defaults: dict[str, Any]
    prompt_text: Callable[[str], str]
    encode_prompt: Callable[[Any, str, int], prompts.EncodedPrompt]
    encode_example: Callable[[Any, str, str, int, int], prompts.Example]
    encode_chat: Callable[..., list[int]]
    chat_prompt: Callable[..., str] | None
    answer_text: Callable[[str], str]
    process_response: Callable[..., Any]
    role_tokens: tuple[str, ...] = ()
    shares_beginning: bool = True
    infills: bool = False
    single: bool = False
    raw: bool = False


ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHAT_DEFAULTS = {  # of ChatGLM2-6B and later
    "max_length": 8192,
    "num_beams": 1,
    "do_sample": True,
    "top_p": 0.8,
    "temperature": 0.8,
}
# ---- the families ----

FAMILIES: dict[str, Family] = {
    "glm": Family(
        name="glm",
        title="ChatGLM-6B",
        roles=False,
        layers_prefix="transformer.layers.",
        tokenizer_file="ice_text.model",
        end_token="<eop>",
        stop_tokens=("<eop>",),
        chat_defaults={
            "max_length": 2048,
            "num_beams": 1,
            "do_sample": True,
            "top_p": 0.7,
            "temperature": 0.95,
        },
        prompt_text=prompts.glm_text,
        encode_prompt=partial(prompts.encode_prompt, prompts.glm_layout),
        encode_example=partial(prompts.encode_example, prompts.glm_layout, "<eop>"),
        encode_chat=prompts.glm_chat,
        chat_prompt=prompts.glm_chat_prompt,
        answer_text=prompts.glm_response,
        process_response=prompts.glm_response,
        shares_beginning=False,
        infills=True,
    ),
    "glm2": Family(
        name="glm2",
        title="ChatGLM2-6B",
        roles=False,
        layers_prefix="transformer.encoder.layers.",
        tokenizer_file="tokenizer.model",
        end_token="</s>",
        stop_tokens=("</s>",),
        chat_defaults=CHAT_DEFAULTS,
        prompt_text=prompts.glm2_text,
        encode_prompt=partial(prompts.encode_prompt, prompts.glm2_layout),
        encode_example=partial(prompts.encode_example, prompts.glm2_layout, "</s>"),
        encode_chat=prompts.glm2_chat,
        chat_prompt=prompts.glm2_build_prompt,
        answer_text=prompts.glm2_response,
        process_response=prompts.glm2_response,
    ),
    "glm3": Family(
        name="glm3",
        title="ChatGLM3-6B",
        roles=True,
        layers_prefix="transformer.encoder.layers.",
        tokenizer_file="tokenizer.model",
        end_token="</s>",
        stop_tokens=("</s>", "<|user|>", "<|observation|>"),
        chat_defaults=CHAT_DEFAULTS,
        prompt_text=prompts.glm3_text,
        encode_prompt=partial(prompts.encode_prompt, prompts.glm3_layout),
        encode_example=partial(prompts.encode_example, prompts.glm3_layout, "</s>"),
        encode_chat=prompts.glm3_chat,
        chat_prompt=None,
        answer_text=prompts.glm2_response,
        process_response=partial(prompts.messages_response, prompts.parse_fenced_call),
        role_tokens=ROLE_TOKENS,
    ),
    "glm4": Family(
        name="glm4",
        title="GLM-4-9B",
        roles=True,
        layers_prefix="transformer.encoder.layers.",
        tokenizer_file="tokenizer.model",
        end_token="<|user|>",
        stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
        chat_defaults=CHAT_DEFAULTS,
        prompt_text=prompts.glm3_text,
        encode_prompt=partial(prompts.encode_prompt, prompts.glm4_layout),
        encode_example=partial(prompts.encode_example, prompts.glm4_layout, "<|user|>"),
        encode_chat=prompts.glm4_chat,
        chat_prompt=None,
        answer_text=prompts.glm2_response,
        process_response=partial(prompts.messages_response, prompts.parse_json_call),
        role_tokens=ROLE_TOKENS,
    ),
    "glm_base": Family(
        name="glm_base",
        title="GLM-10B",
        roles=False,
        layers_prefix="glm.transformer.layers.",
        tokenizer_file="cog-pretrain.model",
        end_token="<|endofpiece|>",
        stop_tokens=("<|endofpiece|>", "<|endoftext|>"),
        chat_defaults=CHAT_DEFAULTS | {"max_length": 1024},
        prompt_text=raw_prompts.raw_text,
        encode_prompt=partial(prompts.encode_prompt, prompts.glm_base_layout),
        encode_example=prompts.glm_base_example,
        encode_chat=prompts.glm_base_chat,
        chat_prompt=partial(prompts.single_prompt, "GLM-10B"),
        answer_text=str.strip,
        process_response=str.strip,
        shares_beginning=False,
        infills=True,
        single=True,
    ),
    "pangu": Family(
        name="pangu",
        title="Pangu-alpha",
        roles=False,
        layers_prefix="transformer.h.",
        tokenizer_file="vocab.model",
        end_token="<eot>",
        stop_tokens=("<eot>",),
        chat_defaults=CHAT_DEFAULTS | {"max_length": 1024},
        prompt_text=raw_prompts.raw_text,
        encode_prompt=partial(prompts.encode_prompt, prompts.pangu_layout),
        encode_example=partial(prompts.encode_example, prompts.pangu_layout, "<eot>"),
        encode_chat=prompts.pangu_chat,
        chat_prompt=partial(prompts.single_prompt, "Pangu-alpha"),
        answer_text=str.strip,
        process_response=str.strip,
        shares_beginning=False,
        single=True,
    ),
    "causal": Family(
        name="causal",
        title="causal language model",
        roles=True,
        layers_prefix="model.layers.",
        tokenizer_file="tokenizer.json",
        end_token=causal_prompts.END,
        stop_tokens=(),
        chat_defaults=CHAT_DEFAULTS,
        prompt_text=raw_prompts.raw_text,
        encode_prompt=partial(prompts.encode_prompt, causal_prompts.causal_layout),
        encode_example=causal_prompts.causal_example,
        encode_chat=causal_prompts.causal_chat,
        chat_prompt=None,
        answer_text=str.strip,
        process_response=causal_prompts.causal_response,
        shares_beginning=False,
    ),
}
CHATGLM_FAMILIES = ("glm", "glm2", "glm3", "glm4")
OWN_FAMILIES = (*CHATGLM_FAMILIES, "glm_base", "pangu")  # those of our own model classes
TOKENIZER_FILES = tuple(dict.fromkeys(family.tokenizer_file for family in FAMILIES.values()))


def raw_family(family: Family) -> Family:
    """The family with texts to go on with in the place of its prompts."""
    end = raw_prompts.RAW_END.get(family.name, family.end_token)
    tokens = raw_prompts.RAW_TOKENS.get(family.name)
    layout = partial(raw_prompts.raw_layout, tokens)
    return replace(
        family,
        raw=True,
        roles=False,
        role_tokens=(),
        end_token=end,
        prompt_text=raw_prompts.raw_text,
        encode_prompt=partial(prompts.encode_prompt, layout),
        encode_example=partial(prompts.encode_example, layout, end),
        encode_chat=partial(raw_prompts.raw_chat, tokens),
        chat_prompt=None,
        answer_text=raw_prompts.raw_text,
        process_response=raw_prompts.raw_text,
    )


RAW_FAMILIES = {name: raw_family(family) for name, family in FAMILIES.items()}


class StyledTokenizer(Protocol):
    """What `family_of` reads of a tokenizer."""

    @property
    def family(self) -> str: ...

    @property
    def prompt_style(self) -> str: ...


def family_of(tokenizer: StyledTokenizer) -> Family:
    """The family whose prompts a tokenizer writes: of the style "raw", the text alone."""
    families = RAW_FAMILIES if tokenizer.prompt_style == "raw" else FAMILIES
    return families[tokenizer.family]
