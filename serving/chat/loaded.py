"""A conversation with a model that is loaded already: python -m finetune.predict --interactive."""

import sys
from typing import TYPE_CHECKING, Any

from chatglm.families import family_of
from predictor.labels import served_name
from serving.chat.conversation import Conversation
from serving.chat.screen import Screen
from serving.chat.session import ChatSession
from serving.cost_model.model import read_profile
from serving.endpoints.local import LocalModel
from serving.engines import make_engine
from serving.engines.runner import EngineRunner
from serving.engines.served_cost import served_cost_model
from serving.policies.continuous import POLICIES
from serving.request import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

LONGEST_CHAT = 2048  # tokens of prompt and answer, where max_new_tokens alone is given


def converse_loaded(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", options: dict[str, Any]
) -> None:
    """Talk until the person leaves.

    Args:
        options: generate()'s, with max_src_len and seed.
    """
    endpoint = loaded_endpoint(model, tokenizer, options)
    screen = Screen(sys.stdin, sys.stdout)
    screen.note("/help lists the commands, /quit leaves")
    try:
        ChatSession(endpoint, screen, Conversation(settings=settings_from(options))).run()
    finally:
        endpoint.close()


def loaded_endpoint(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", options: dict[str, Any]
) -> LocalModel:
    """The model in an engine of one answer.

    Where the continuous engine does not run such a model, transformers' generate() does.
    """
    longest = LONGEST_CHAT
    if "max_new_tokens" in options:
        longest = max(longest, options.get("max_src_len", 0) + options["max_new_tokens"])
    longest = options.get("max_length", longest)
    limits = Limits(max_batch=1, kv_tokens=longest, max_tokens=longest)
    cost = served_cost_model(model, read_profile("datasheet"))
    try:
        engine = make_engine("continuous", model, limits, cost, prefix_cache_tokens=longest)
    except ValueError:
        engine = make_engine("static", model, limits, cost)
    defaults = family_of(tokenizer).chat_defaults
    is_rounds = getattr(model.config, "chat_prompt", None) == "rounds"
    return LocalModel(
        EngineRunner(engine, POLICIES["fcfs"]),
        tokenizer,
        name=served_name(tokenizer.name_or_path),
        defaults={"temperature": defaults["temperature"], "top_p": defaults["top_p"]},
        prompt_options={"rounds": True} if is_rounds else {},
    )


def settings_from(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a conversation from generate()'s options; greedy without do_sample."""
    settings: dict[str, Any] = {"temperature": 0.0}
    if options.get("do_sample"):
        settings = {name: options[name] for name in ("temperature", "top_p", "seed")}
    if "max_new_tokens" in options:
        settings["max_tokens"] = options["max_new_tokens"]
    return settings
