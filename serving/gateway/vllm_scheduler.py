"""A scheduler for vLLM that goes by predicted lengths; tried with vLLM 0.32.

    vllm serve MODEL --scheduler-cls serving.gateway.vllm_scheduler.LengthScheduler

in an environment that finds this project. Lengths come with the requests, in the body's
"vllm_xargs": {"predicted_tokens": 120, "predicted_q90_tokens": 300}, which the gateway's kind
vllm-length adds. vLLM calls its scheduler's interface private: another version may need changes.
"""

import math
import time
from itertools import islice
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from serving.gateway.kinds import NEUTRAL_TOKENS, PREDICTED_Q90, PREDICTED_TOKENS

BOOST_RATE = 0.3  # g, per second; --additional-config '{"boost_rate": 0.1}' changes it
MEAN_S = 10.0  # about so much of the past is in the measured pace
FIRST_PACE = 200.0  # tokens a second, before any is measured


class LengthScheduler(AsyncScheduler):
    """Admits by gamma-Boost over predicted work, and as many as their q90 lengths have room for.

    UniBoost (arXiv 2606.18431) with predicted work, as the policy boost_work of serving.policies:

        key = arrival - ln(1 / (1 - exp(-g w))) / g,

    w seconds of this engine for the answer's expected tokens, at the pace that is measured here.
    A long answer is overtaken only while later ones' boosts make up for its wait: none starves. A
    client's own priority goes before the key. Out of KV memory vLLM preempts the largest key.
    """

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = SchedulingPolicy.PRIORITY
        self.waiting = create_request_queue(self.policy)
        self.kv_holding_waiting = create_request_queue(self.policy)
        options = self.vllm_config.additional_config
        self.boost_rate = float(dict(options or {}).get("boost_rate", BOOST_RATE))
        self.most_active = self.max_num_active_reqs
        self.busy_s, self.made_tokens = 1.0, FIRST_PACE
        self.last_s: float | None = None  # when the last step was planned; None: nothing to do
        self.planned = 0  # its tokens of answers; a chunk of a prompt counts as one

    def add_request(self, request: Request) -> None:
        key = request.arrival_time - self.boost_s(hint_of(request, PREDICTED_TOKENS))
        request.priority = (request.priority, key)
        super().add_request(request)

    def boost_s(self, tokens: float) -> float:
        """Seconds by which an answer of so many tokens is taken to have arrived earlier."""
        work_s = max(tokens * self.busy_s / self.made_tokens, 1e-9)
        return -math.log(-math.expm1(-self.boost_rate * work_s)) / self.boost_rate

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        active = len(self.running) + self.num_waiting_for_streaming_input
        active += len(self.kv_holding_waiting)
        self.max_num_active_reqs = active + self.admissible(self.most_active - active)
        output = super().schedule(*args, **kwargs)
        self.note_pace(output.num_scheduled_tokens)
        return output

    def admissible(self, slots: int) -> int:
        """How many of the first waiting requests have room for their q90 beside those that run."""
        if slots <= 0 or not self.waiting:
            return max(slots, 0)
        free = self.cache_config.num_gpu_blocks * self.block_size
        for request in self.running:
            free -= reserved_tokens(request)
        count = 0
        for request in islice(self.waiting, slots):
            free -= reserved_tokens(request)
            if free < 0 and (count or self.running):
                return count
            count += 1
        return count

    def note_pace(self, scheduled: dict[str, int]) -> None:
        """Measure the seconds of an answer's token from one step to the next."""
        now_s = time.monotonic()
        if self.last_s is not None:
            step_s = now_s - self.last_s
            decay = math.exp(-step_s / MEAN_S)
            self.busy_s = decay * self.busy_s + step_s
            self.made_tokens = decay * self.made_tokens + self.planned
        self.last_s = now_s if scheduled else None
        self.planned = len(scheduled)


def hint_of(request: Request, name: str) -> float:
    """A length of vllm_xargs, no longer than the request's limit; NEUTRAL_TOKENS without one."""
    sampling = request.sampling_params
    value = ((sampling and sampling.extra_args) or {}).get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        value = NEUTRAL_TOKENS
    return min(float(value), float(request.max_tokens))


def reserved_tokens(request: Request) -> float:
    """KV tokens of a request's prompt and the q90 of its answer, or what it has become."""
    answer = max(hint_of(request, PREDICTED_Q90), float(request.num_output_tokens + 1))
    return request.num_prompt_tokens + answer
