"""The flags by which commands name what answers, and what comes of them. Free of torch at import.

A model's folder is loaded into this process, by the flags that a server has; a URL is a server.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from chatglm.commands import number, whole
from finetune.evaluation.inference import LoadingFlags, add_loading_flags, add_packing_flag
from finetune.flag_effects import Effect
from finetune.placing import PlacementFlags, add_placing_flags, check_is_placed
from serving.endpoints.remote import RemoteServer, is_url
from serving.endpoints.replies import Endpoint

KEY_VARIABLES = ("GLM_API_KEY", "OPENAI_API_KEY")
# Of serving.engines: both admit an answer at a time, which continuous policies need.
ENDPOINT_ENGINES = ("continuous", "vllm")


@dataclass(frozen=True)
class EndpointFlags(LoadingFlags, PlacementFlags):
    """The flags of `add_endpoint_flags`, beside `model`, a folder or a URL."""

    model: str
    keep_quantized: bool
    predictor: str | None
    adapter: list[str]
    max_tokens: int
    engine: str
    vllm_python: str | None
    vllm_args: str
    api_key: str | None
    model_name: str | None
    timeout_s: float


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a model in this process, and of a server."""
    here = parser.add_argument_group("a model in this process")
    add_loading_flags(here)  # type: ignore[arg-type]
    add_packing_flag(here)  # type: ignore[arg-type]
    here.add_argument("--predictor", metavar="DIR", help="folder of a predictor of answer lengths")
    adapter = "a LoRA adapter of the model, and the name by which it is chosen; repeatable"
    here.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help=adapter)
    longest = "longest prompt and answer, in tokens [2048]"
    here.add_argument("--max_tokens", type=whole(2), default=2048, metavar="N", help=longest)
    here.add_argument(
        "--engine",
        choices=ENDPOINT_ENGINES,
        default=ENDPOINT_ENGINES[0],
        help="what runs the model [continuous]",
    )
    python = "with --engine vllm: the python of an environment that has vLLM [this one]"
    here.add_argument("--vllm_python", metavar="PATH", help=python)
    words = "with --engine vllm: more of its command line, in quotes"
    here.add_argument("--vllm_args", default="", metavar="WORDS", help=words)
    add_placing_flags(parser)
    there = parser.add_argument_group("a server")
    key = f"key of the server (better: the environment's {' or '.join(KEY_VARIABLES)})"
    there.add_argument("--api_key", help=key)
    there.add_argument(
        "--model_name", metavar="NAME", help="one of the server's models [its first]"
    )
    wait = "seconds to wait for a connection, and for the next piece of an answer [120]"
    there.add_argument(
        "--timeout_s", type=number(0, above=True), default=120.0, metavar="S", help=wait
    )


HERE = Effect("a model in this process; {c.model} is a server", lambda c: not is_url(c.model))
THERE = Effect("a server's URL; {c.model} is a folder", lambda c: is_url(c.model))
VLLM = Effect("--engine vllm", lambda c: c.engine == "vllm" and not is_url(c.model))
# Of every command with `add_endpoint_flags`.
ENDPOINT_EFFECTS: dict[str, Effect] = {
    **dict.fromkeys(("base_model", "mode", "prompt_style", "device", "precision"), HERE),
    **dict.fromkeys(("keep_quantized", "predictor", "adapter", "max_tokens", "engine"), HERE),
    **dict.fromkeys(("vllm_python", "vllm_args"), VLLM),
    **dict.fromkeys(("deployer", "num_gpus", "devices", "device_map", "cluster"), HERE),
    **dict.fromkeys(("profile", "measure", "measure_s"), HERE),
    **dict.fromkeys(("api_key", "model_name", "timeout_s"), THERE),
}


def open_endpoint(
    flags: EndpointFlags,
    *,
    policy: str = "fcfs",
    max_batch: int = 1,
    kv_tokens: int | None = None,
    slo_s: float = 30.0,
) -> Endpoint:
    """What answers, ready.

    Args:
        policy, max_batch, kv_tokens, slo_s: of the scheduler; kv_tokens None for those of one
            answer. Of a server, max_batch are the requests under way.
    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    if is_url(flags.model):
        key = flags.api_key or next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
        return RemoteServer(
            flags.model,
            key,
            model=flags.model_name,
            timeout_s=flags.timeout_s,
            at_once=max_batch,
        )
    kv_tokens = flags.max_tokens if kv_tokens is None else kv_tokens
    return open_local(flags, policy, (max_batch, kv_tokens), slo_s)


def open_local(flags: EndpointFlags, policy: str, sizes: tuple[int, int], slo_s: float) -> Endpoint:
    """A LocalModel from the flags; sizes: (max_batch, kv_tokens). Raises as `open_endpoint`."""
    from chatglm import load_tokenizer
    from chatglm.families import family_of
    from predictor.labels import served_name
    from serving.endpoints.local import LocalModel
    from serving.policies.continuous import POLICIES
    from serving.replicas.backends import open_backend
    from serving.replicas.served_model import ServedModel, limits_of_flags, load_predictor

    max_batch, kv_tokens = sizes
    check_is_placed(flags)
    if POLICIES[policy].predicts and not flags.predictor:
        raise ValueError(f"--policy {policy} uses predicted lengths and needs --predictor DIR")
    if flags.engine == "vllm" and flags.adapter:
        raise ValueError("--adapter goes with --engine continuous: vllm takes none")
    limits = limits_of_flags(max_batch, kv_tokens, flags.max_tokens)
    adapters = [named_adapter(text) for text in flags.adapter]
    tokenizer = load_tokenizer(
        flags.model, mode=flags.mode, base=flags.base_model, prompt_style=flags.prompt_style
    )
    predictor = load_predictor(flags.predictor, tokenizer)
    served = ServedModel.of(
        flags,
        policy=policy,
        prefix_cache_tokens=flags.max_tokens,  # a chat's next prompt begins as the one before it
        engine=flags.engine,
        vllm_python=flags.vllm_python,
        vllm_args=tuple(shlex.split(flags.vllm_args)),
    )
    opened = open_backend(served, flags, limits)
    defaults = family_of(tokenizer).chat_defaults
    model = LocalModel(
        opened.backend,
        tokenizer,
        predictor,
        name=served_name(flags.model),
        defaults={"temperature": defaults["temperature"], "top_p": defaults["top_p"]},
        prompt_options={"rounds": True} if opened.chat_prompt == "rounds" else {},
        slo_s=slo_s,
    )
    load_adapters(model, adapters)
    return model


def load_adapters(model: Endpoint, adapters: Sequence[tuple[str, str]]) -> None:
    """Load (name, folder) of each. Raises ValueError."""
    for name, folder in adapters:
        try:
            model.load_adapter(name, folder)
        except (ValueError, OSError) as error:
            raise ValueError(f"--adapter {name}: {error}") from None


def named_adapter(text: str) -> tuple[str, str]:
    """(name, folder) of NAME=DIR. Raises ValueError."""
    name, separator, folder = text.partition("=")
    if not (separator and name and folder):
        raise ValueError(f"--adapter must be NAME=DIR, got {text!r}")
    return name, folder
