"""The demo's requests, their predictions, and a run of them on a simulated engine."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serving.cost_model.model import CostModel
from serving.engines import Sampling
from serving.policies.continuous import POLICIES
from serving.request import Limits, Request
from serving.run_requests.figures import PolicyRun, policy_run
from serving.run_requests.runs import PreparedRequest, RunRecord
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import SimulatedEngine
from serving.simulate.workload import PredictorModel

SIGMA = 0.4  # standard deviation of the predicted log length's error
LONGEST = 2048  # tokens of a prompt and its answer
# With more rows than requests all would be decoded at once, and no order would matter.
LIMITS = Limits(max_batch=10, kv_tokens=32768, max_tokens=LONGEST)


class DemoRequest(NamedTuple):
    """A request: its prompt's tokens, its answer's (which no policy sees), and its objective."""

    prompt: str
    prompt_tokens: int
    output_tokens: int
    slo_s: float


DEMO_REQUESTS = (
    DemoRequest("把下面的报告概括成五点：...", 620, 210, 20.0),
    DemoRequest("你好", 5, 12, 4.0),
    DemoRequest("写一篇八百字的作文：我的家乡", 14, 640, 40.0),
    DemoRequest("37 + 48 = ?", 9, 4, 4.0),
    DemoRequest("水泵无法启动，可能是什么原因？", 16, 150, 12.0),
    DemoRequest("Translate into English: 今天天气很好。", 15, 11, 4.0),
    DemoRequest("用 Python 写一个快速排序，并解释", 14, 330, 20.0),
    DemoRequest("这条评论是正面还是负面：菜是凉的。", 18, 3, 4.0),
    DemoRequest("列出设备日常巡检的步骤", 12, 260, 20.0),
    DemoRequest("北京有哪些景点？", 8, 180, 12.0),
    DemoRequest("法国的首都是哪里？", 8, 9, 4.0),
    DemoRequest("从下文抽取三元组：...", 240, 60, 8.0),
    DemoRequest("给客户写一封道歉信", 10, 280, 20.0),
    DemoRequest("What is a centrifugal pump?", 9, 120, 12.0),
    DemoRequest("写出“困难”的反义词", 10, 4, 4.0),
    DemoRequest("把下面的代码翻译成 C++：...", 410, 380, 30.0),
    DemoRequest("为什么天空是蓝色的？", 9, 95, 8.0),
    DemoRequest("给新产品起十个名字", 10, 70, 8.0),
    DemoRequest("讲一个长一点的睡前故事", 11, 520, 40.0),
    DemoRequest("谢谢", 5, 8, 4.0),
)


@dataclass(frozen=True)
class DemoWorkload:
    """Requests that all arrive at 0, with what is predicted of their answers."""

    given: tuple[DemoRequest, ...]
    requests: tuple[Request, ...]

    @classmethod
    def of(cls, given: tuple[DemoRequest, ...], seed: int) -> "DemoWorkload":
        """With predictions whose errors are drawn by the seed."""
        predictor = PredictorModel.normal(SIGMA, LONGEST)
        lengths = np.array([one.output_tokens for one in given])
        which, predictions = predictor.predict(lengths, np.random.default_rng(seed))
        requests = []
        for number, (one, place) in enumerate(zip(given, which.tolist())):
            requests.append(
                Request(
                    number,
                    one.prompt_tokens,
                    arrival_s=0.0,
                    slo_s=one.slo_s,
                    prediction=predictions[place],
                    output_tokens=one.output_tokens,
                )
            )
        return cls(given, tuple(requests))

    def run(self, policy_name: str, cost: CostModel) -> PolicyRun:
        """What becomes of the requests under a policy, on an engine of these costs."""
        policy, record = POLICIES[policy_name], RunRecord()
        clock = VirtualClock()
        engine = SimulatedEngine(cost, LIMITS)
        for event in run_scheduler(policy, engine, clock, Replay(self.requests)):
            record(event)
        record.total_s = clock.now_s()
        if policy.predicts:
            record.predicted = self.predicted()
        width = cost.model.kv_bytes_per_token
        return policy_run(policy_name, policy, record, self.prepared(), width)

    def predicted(self) -> dict[int, float]:
        """Expected answer tokens by request."""
        found = {}
        for request in self.requests:
            assert request.prediction is not None
            found[request.id] = request.prediction.expected_tokens
        return found

    def prepared(self) -> list[PreparedRequest]:
        """The requests as a list's rows; their ids are not read."""
        rows = []
        for request, one in zip(self.requests, self.given):
            ids = [0] * one.prompt_tokens
            rows.append(PreparedRequest(request.id, one.prompt, ids, 0.0, one.slo_s, Sampling()))
        return rows
