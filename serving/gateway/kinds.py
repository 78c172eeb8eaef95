"""What the gateway adds to a request, by the kind of engine, and what it asks an engine at start.

Names and signs are those of vLLM 0.32, SGLang 0.5.23, Dynamo 1.6.1 and llm-d's router of August
2026.
KINDS, all kinds that can be chosen, is at the foot. No HTTP here.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

LENGTH_HEADER = "x-glm-predicted-tokens"  # the expected answer, for whatever reads it
Q90_HEADER = "x-glm-predicted-q90-tokens"
PREDICTED_TOKENS = "predicted_tokens"  # in vllm_xargs
NEUTRAL_TOKENS = 256.0  # an answer of so many gets priority 0, as requests without one have
CENTISECONDS = 100
PREEMPT_S = 10.0  # SGLang: a waiting request that is so much more urgent displaces one that runs
MOST_LEVEL = 2**31 - 1
CHAT_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OLLAMA_PATHS = ("/api/chat", "/api/generate")


@dataclass(frozen=True)
class Hints:
    """What is known of one request when it is sent to an engine.

    Attributes:
        key: of the policy, smaller ones first; in tokens, or in seconds of the gateway's clock.
        in_tokens: which of both it is.
        arrival_s: of that clock.
        expected, q90: tokens of its answer; None where they are not predicted.
        ttft_ms, tpot_ms: objectives; None without them.
        client: the name of the client's key; None without one.
    """

    key: float
    in_tokens: bool
    arrival_s: float
    expected: int | None = None
    q90: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    client: str | None = None

    def doublings(self) -> float:
        """log2 of a key in tokens over NEUTRAL_TOKENS."""
        return math.log2((1 + max(self.key, 0.0)) / (1 + NEUTRAL_TOKENS))


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself.

    Attributes:
        priorities: whether it obeys them; None where it cannot be told.
        lower_first: whether it serves lower ones first; None: as its kind does by default.
        threshold: of preemption, in priorities; None: the kind's default.
        kv_tokens: of its KV cache; None where it is not told.
    """

    priorities: bool | None = None
    lower_first: bool | None = None
    threshold: int | None = None
    kv_tokens: int | None = None


UNKNOWN_FACTS = Facts()


@dataclass(frozen=True)
class Added:
    """What is added to a request.

    Attributes:
        fields: of the body. Objects are merged; a field that the client has given stays as it is.
        headers: in lower case; they replace the client's.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class Kind:
    """An engine that takes no priorities: the gateway holds the queue itself.

    Attributes:
        text: for --help.
        holds: the gateway holds the queue where --concurrency is not given.
        needs: what turns the engine's priorities on; empty where there is nothing to turn on.
        health_path: answers below 500 while the engine serves.
        fact_paths: what is asked at start.
        answer_paths: what makes answers; everything else is forwarded as it is.
        refused_field: of a body, that the gateway reads and the engine refuses; it is taken out;
            None: none.
    """

    text: ClassVar[str] = "any server of OpenAI's API, llama.cpp's too; the gateway queues"
    holds: ClassVar[bool] = True
    needs: ClassVar[str] = ""
    health_path: ClassVar[str] = "/v1/models"
    fact_paths: ClassVar[tuple[str, ...]] = ()
    answer_paths: ClassVar[tuple[str, ...]] = CHAT_PATHS
    refused_field: ClassVar[str | None] = None

    def read_facts(self, replies: Mapping[str, str]) -> Facts:
        """Facts of the bodies of fact_paths, by path; those that failed are missing."""
        return UNKNOWN_FACTS

    def added(self, hints: Hints, facts: Facts) -> Added:
        return Added(headers=length_headers(hints))


class OllamaKind(Kind):
    """Ollama: one queue, first come, first served."""

    text = "Ollama, its own API and OpenAI's; the gateway queues"
    health_path = "/api/version"
    answer_paths = (*CHAT_PATHS, *OLLAMA_PATHS)


class GlmFoundryKind(Kind):
    """serving.server: it predicts and schedules by itself, so that only the routing is added."""

    text = "python -m serving.server: only routing is added, it schedules by itself"
    holds = False
    health_path = "/health/ready"
    fact_paths = ("/metrics",)

    def read_facts(self, replies: Mapping[str, str]) -> Facts:
        metrics = replies.get("/metrics", "")
        match = re.search(r"^glm_kv_limit_tokens (\S+)", metrics, re.MULTILINE)
        return Facts(priorities=True, kv_tokens=int(float(match[1])) if match else None)


class VllmKind(Kind):
    """vLLM with --scheduling-policy priority: lower ones first, ties by arrival.

    It preempts by priority where KV memory runs out. Without the flag it ignores the field.
    """

    text = "vLLM: priority, lower first"
    holds = False
    needs = "--scheduling-policy priority"
    health_path = "/health"
    fact_paths = ("/server_info?config_format=json", "/metrics")

    def read_facts(self, replies: Mapping[str, str]) -> Facts:
        """/server_info is there with VLLM_SERVER_DEV_MODE=1 only."""
        info = replies.get(self.fact_paths[0], "")
        policy = re.search(r"""["']?\bpolicy["']?\s*[:=]\s*\\?["'](fcfs|priority)\b""", info)
        return Facts(
            priorities=policy[1] == "priority" if policy else None,
            kv_tokens=vllm_kv_tokens(replies.get("/metrics", "")),
        )

    def added(self, hints: Hints, facts: Facts) -> Added:
        if facts.priorities is False:
            return super().added(hints, facts)
        if hints.in_tokens:
            level = hints.key - NEUTRAL_TOKENS
        else:
            level = CENTISECONDS * hints.key
        return Added({"priority": whole_level(level)}, length_headers(hints))


class VllmLengthKind(VllmKind):
    """vLLM with LengthScheduler (vllm_scheduler.py): it gets the lengths and orders by itself.

    Without that scheduler it ignores them.
    """

    text = "vLLM with serving.gateway.vllm_scheduler.LengthScheduler: vllm_xargs, the length"
    needs = "--scheduler-cls serving.gateway.vllm_scheduler.LengthScheduler"

    def read_facts(self, replies: Mapping[str, str]) -> Facts:
        info = replies.get(self.fact_paths[0], "")
        facts = super().read_facts(replies)
        return replace(facts, priorities="LengthScheduler" in info if info else None)

    def added(self, hints: Hints, facts: Facts) -> Added:
        headers = length_headers(hints)
        if hints.expected is None:
            return Added(headers=headers)
        return Added({"vllm_xargs": {PREDICTED_TOKENS: hints.expected}}, headers)


class SglangKind(Kind):
    """SGLang with --enable-priority-scheduling: higher ones first, unless its flag turns the sign.

    A waiting request preempts a running one where they differ by more than the threshold, 10 by
    default: here an answer less than half as long, or over PREEMPT_S seconds more urgent. A request
    without a priority is the last of all. Without the flag it may refuse requests that have one.
    """

    text = "SGLang: priority, higher first unless the engine says otherwise"
    holds = False
    needs = "--enable-priority-scheduling"
    health_path = "/health"
    fact_paths = ("/server_info", "/get_server_info")
    threshold: ClassVar[int] = 10

    def read_facts(self, replies: Mapping[str, str]) -> Facts:
        info: dict[str, Any] = {}
        for path in self.fact_paths:
            info = info or json_object(replies.get(path, ""))
        threshold = info.get("priority_scheduling_preemption_threshold")
        tokens = info.get("max_total_num_tokens")
        return Facts(
            priorities=flag_of(info, "enable_priority_scheduling"),
            lower_first=flag_of(info, "schedule_low_priority_values_first"),
            threshold=threshold if is_positive_count(threshold) else None,
            kv_tokens=tokens if is_positive_count(tokens) else None,
        )

    def added(self, hints: Hints, facts: Facts) -> Added:
        if facts.priorities is False:
            return super().added(hints, facts)
        steps = hints.doublings() if hints.in_tokens else hints.key / PREEMPT_S
        level = whole_level((facts.threshold or self.threshold) * steps)
        return Added({"priority": level if facts.lower_first else -level}, length_headers(hints))


class DynamoKind(Kind):
    """NVIDIA Dynamo: higher ones first; it turns the sign for its engines itself.

    The length helps with --router-track-output-blocks. Its router orders by priority under
    --router-queue-policy fcfs or wspt, not under edf, and takes those below 0 for 0, which is also
    that of a request without one: hence the head start.
    """

    text = "NVIDIA Dynamo: nvext.agent_hints.osl and priority, higher first"
    holds = False
    needs = "--router-track-output-blocks, and --router-queue-threshold with fcfs or wspt"
    health_path = "/health"
    refused_field = "slo_s"
    steps: ClassVar[int] = 10  # priorities of one doubling of the answer
    head_start: ClassVar[int] = 300  # of an answer of NEUTRAL_TOKENS, or of one that is due now

    def added(self, hints: Hints, facts: Facts) -> Added:
        if hints.in_tokens:
            level = self.steps * hints.doublings()
        else:
            level = hints.key - hints.arrival_s
        agent_hints = {"priority": max(self.head_start - whole_level(level), 0)}
        if hints.expected is not None:
            agent_hints["osl"] = hints.expected
        return Added({"nvext": {"agent_hints": agent_hints}}, length_headers(hints))


class LlmDKind(Kind):
    """llm-d's router: objectives and the flow that a request belongs to, as headers."""

    text = "llm-d: headers of objectives and of the length"
    holds = False
    health_path = "/v1/models"

    def added(self, hints: Hints, facts: Facts) -> Added:
        headers = dict(length_headers(hints))
        if hints.ttft_ms is not None:
            headers["x-llm-d-slo-ttft-ms"] = f"{hints.ttft_ms:g}"
        if hints.tpot_ms is not None:
            headers["x-llm-d-slo-tpot-ms"] = f"{hints.tpot_ms:g}"
        if hints.client is not None:
            headers["x-llm-d-inference-fairness-id"] = hints.client
        return Added(headers=headers)


def length_headers(hints: Hints) -> dict[str, str]:
    """The predicted length as headers; empty without one."""
    if hints.expected is None:
        return {}
    return {LENGTH_HEADER: str(hints.expected), Q90_HEADER: str(hints.q90)}


def whole_level(level: float) -> int:
    """A priority as a whole number of 32 bits."""
    return round(min(max(level, -MOST_LEVEL), MOST_LEVEL))


def vllm_kv_tokens(metrics: str) -> int | None:
    """KV tokens of vLLM's metrics; None where they do not say."""
    match = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
    if not match:
        return None
    labels = dict(re.findall(r'(\w+)="(\d+)"', match[1]))
    if "block_size" not in labels or "num_gpu_blocks" not in labels:
        return None
    return int(labels["block_size"]) * int(labels["num_gpu_blocks"]) or None


def json_object(text: str) -> dict[str, Any]:
    """The object that a text is; empty where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def flag_of(info: Mapping[str, Any], name: str) -> bool | None:
    """A flag that an engine tells; None where it does not."""
    value = info.get(name)
    return value if isinstance(value, bool) else None


def is_positive_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


KINDS: dict[str, Kind] = {
    "vllm": VllmKind(),
    "vllm-length": VllmLengthKind(),
    "sglang": SglangKind(),
    "dynamo": DynamoKind(),
    "llm-d": LlmDKind(),
    "ollama": OllamaKind(),
    "openai": Kind(),
    "glm-foundry": GlmFoundryKind(),
}
