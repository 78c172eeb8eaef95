"""The engines that run a model: each carries out plans as serving.request.Engine says.

    limits = Limits(max_batch=16, kv_tokens=8192, max_tokens=2048)
    engine = make_engine("continuous", model, limits, cost)
    answer = engine.submit(request, prompt_ids, Sampling(temperature=0.8), listener)  # any thread
    for event in run_scheduler(policy, engine, clock, inbox): ...  # one thread

The simulated engine is serving.simulate.engine. Nothing of torch is imported before an engine is
made.
"""

from typing import Any

from serving.engines.answers import Answer, Sampling, TextEngine
from serving.engines.live import Inbox, WallClock

__all__ = [
    "ENGINES",
    "IN_PROCESS",
    "Answer",
    "Inbox",
    "Sampling",
    "TextEngine",
    "WallClock",
    "make_engine",
]


def static(*args: Any, **options: Any) -> TextEngine:
    from serving.engines.static_engine import StaticEngine

    return StaticEngine(*args, **options)


def continuous(*args: Any, **options: Any) -> TextEngine:
    from serving.engines.continuous_engine import ContinuousEngine

    return ContinuousEngine(*args, **options)


def vllm(*args: Any, **options: Any) -> TextEngine:
    from serving.engines.vllm_engine import VllmEngine

    return VllmEngine(*args, **options)


def make_engine(name: str, *args: Any, **options: Any) -> TextEngine:
    """An engine by its name in ENGINES: (model, limits, cost, stop_ids=None) of IN_PROCESS, and
    VllmEngine's arguments.

    Raises:
        ValueError: no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {name!r}")
    return ENGINES[name](*args, **options)


ENGINES = {
    "static": static,  # transformers' generate, a batch at once; models spread over devices
    "continuous": continuous,  # iterations over a KV arena; several devices: engines.pipeline
    "vllm": vllm,  # a vLLM server in a process of its own
}
IN_PROCESS = ("static", "continuous")  # those that hold the model themselves
