"""A scheduler for vLLM that goes by predicted lengths; tried with vLLM 0.32.

    vllm serve MODEL --scheduler-cls serving.gateway.vllm_scheduler.LengthScheduler

in an environment that finds this project. Lengths come with the requests, in the body's
"vllm_xargs": {"predicted_tokens": 120}, which the gateway's kind vllm-length adds. vLLM calls its
scheduler's interface private: another version may need changes.
"""

import math
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from serving.gateway.kinds import NEUTRAL_TOKENS, PREDICTED_TOKENS

BOOST_RATE = 0.1  # g times a mean answer's work; --additional-config '{"boost_rate": 0.3}'
MEAN_S = 10.0  # about so much of the past is in the measured pace
FIRST_PACE = 200.0  # tokens a second, before any is measured
# The mean answer is of the latest ones, about so many; at first NEUTRAL_TOKENS stands for so many.
MEAN_ANSWERS, FIRST_ANSWERS = 1000, 10


class LengthScheduler(AsyncScheduler):
    """Admits by gamma-Boost over predicted work.

    UniBoost (arXiv 2606.18431) with predicted work, as the policy boost_work of serving.policies:

        key = arrival - ln(1 / (1 - exp(-g w))) / g,

    w seconds of this engine for the answer's expected tokens, at the pace that is measured here,
    and g = boost_rate / (w of a mean answer): engines of any speed get the same order. Keys are
    taken relative to the mean answer's, so that a change of pace favors none that waits. A long
    answer is overtaken only while later ones' boosts make up for its wait: none starves. A client's
    own priority goes before the key. Out of KV memory vLLM preempts the largest key. No memory is
    reserved for what answers will become: fewer at once cost far more than preemptions do
    (docs/results.md).
    """

    now_s = staticmethod(time.monotonic)  # the clock of the pace

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = SchedulingPolicy.PRIORITY
        self.waiting = create_request_queue(self.policy)
        self.kv_holding_waiting = create_request_queue(self.policy)
        options = self.vllm_config.additional_config
        self.boost_rate = float(dict(options or {}).get("boost_rate", BOOST_RATE))
        self.mean_tokens, self.answers = NEUTRAL_TOKENS, FIRST_ANSWERS
        self.busy_s, self.made_tokens = 1.0, FIRST_PACE
        self.last_s: float | None = None  # when the last step was planned; None: nothing to do
        self.planned = 0  # its tokens of answers; a chunk of a prompt counts as one

    def add_request(self, request: Request) -> None:
        tokens = predicted_tokens(request)
        self.answers = min(self.answers + 1, MEAN_ANSWERS)
        self.mean_tokens += (tokens - self.mean_tokens) / self.answers
        request.priority = (request.priority, request.arrival_time - self.boost_s(tokens))
        super().add_request(request)

    def boost_s(self, tokens: float) -> float:
        """Seconds by which an answer is taken to have arrived earlier than a mean one."""
        mean_s = max(self.mean_tokens, 1.0) * self.busy_s / self.made_tokens
        work = max(tokens, 1.0) / max(self.mean_tokens, 1.0)
        boost = log_boost(self.boost_rate * work) - log_boost(self.boost_rate)
        return boost * mean_s / self.boost_rate

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        self.note_pace(output.num_scheduled_tokens)
        return output

    def note_pace(self, scheduled: dict[str, int]) -> None:
        """Measure the seconds of an answer's token from one step to the next."""
        now_s = self.now_s()
        if self.last_s is not None:
            step_s = now_s - self.last_s
            decay = math.exp(-step_s / MEAN_S)
            self.busy_s = decay * self.busy_s + step_s
            self.made_tokens = decay * self.made_tokens + self.planned
        self.last_s = now_s if scheduled else None
        self.planned = len(scheduled)


def log_boost(work: float) -> float:
    """ln(1 / (1 - exp(-g w)))."""
    return -math.log(-math.expm1(-work))


def predicted_tokens(request: Request) -> float:
    """Of vllm_xargs, no more than the request's limit; NEUTRAL_TOKENS without a prediction."""
    sampling = request.sampling_params
    value = ((sampling and sampling.extra_args) or {}).get(PREDICTED_TOKENS)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        value = NEUTRAL_TOKENS
    return min(float(value), float(request.max_tokens))
