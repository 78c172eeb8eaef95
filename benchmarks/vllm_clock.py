# ruff: noqa: E402
"""Latencies under vLLM's own v1 scheduler in one order or another: no model, its steps take time.

    PYTHON benchmarks/vllm_clock.py WORK.json

runs in an environment with vLLM for benchmarks/vllm_orders.py. WORK.json is

    {"rows": [{"prompt", "answer", "prediction", "known"}], "runs": [run, ...]}

tokens of a prompt and of its answer, and two lengths as LengthPrediction.to_dict has them; a run

    {"order", "truth", "max_batch", "pass_tokens", "blocks", "block_tokens", "max_tokens", "cap",
     "step_s", "row_s", "prompt_s", "slo_s", "in_flight", "boost_rate": None or LengthScheduler's,
     "requests": [[row, arrival_s], ...] by arrival}

`order` is "vllm" (its own), "LengthScheduler", or a policy of the gateway, which is then vLLM's
priority. With `truth` the gateway is told `known` in place of `prediction`. For each run a line is
printed as it ends: {"spans": [[admitted_s, ended_s], ...] by request, "preempted": how often,
"own_us": CPU time of `schedule` itself, a step}. An answer ends by a stop token that only the
mocked model knows of, so that no order sees its length in the request's limit.
"""

import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.vllm_trace import CONFIG, make_request, make_scheduler, mocked_output
from predictor.prediction import LengthPrediction
from serving.gateway.bodies import RequestBody
from serving.gateway.dispatch import Dispatcher
from serving.gateway.in_flight import in_flight_answer
from serving.gateway.kinds import KINDS, UNKNOWN_FACTS, Hints
from serving.gateway.upstreams import Upstream

OWN, CLASS = "vllm", "LengthScheduler"
STOP_TOKEN = 2


class GatewayHints:
    """What the gateway adds to the requests of a run, by its own code."""

    def __init__(self, run: dict[str, Any], rows: list[dict[str, Any]], clock: list[float]) -> None:
        self.run = run
        name = "known" if run["truth"] else "prediction"
        self.lengths = [LengthPrediction.from_dict(row[name]) for row in rows]
        self.prompts = [row["prompt"] for row in rows]
        self.kind = KINDS["vllm-length" if run["order"] == CLASS else "vllm"]
        policy = "fcfs" if run["order"] in (OWN, CLASS) else run["order"]
        self.dispatcher = Dispatcher(
            [Upstream("http://vllm")], policy, max_queue=0, now_s=lambda: clock[0]
        )

    def fields(self, row: int, arrival_s: float) -> dict[str, Any]:
        """Of the request's body."""
        if self.run["order"] == OWN:
            return {}
        body = RequestBody("", {}, None, self.run["cap"], 1, None)
        inflight = in_flight_answer(
            body,
            self.lengths[row],
            prompt_tokens=self.prompts[row],
            arrival_s=arrival_s,
            slo_s=self.run["slo_s"],
        )
        key, _ = self.dispatcher.order(inflight.record)
        hints = Hints(
            key, self.dispatcher.in_tokens, arrival_s, round(inflight.tokens), round(inflight.q90)
        )
        return dict(self.kind.added(hints, UNKNOWN_FACTS).fields)


def scheduler_of(run: dict[str, Any], folder: Path, now_s: Callable[[], float]) -> Any:
    """vLLM's scheduler, of the class that it takes itself, or ours on this run's clock."""
    if run["order"] == CLASS:
        from serving.gateway.vllm_scheduler import LengthScheduler

        scheduler = make_scheduler(run | {"policy": "fcfs"}, folder, LengthScheduler)
        scheduler.now_s = now_s
        scheduler.boost_rate = run["boost_rate"] or scheduler.boost_rate
        return scheduler
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    policy = "fcfs" if run["order"] == OWN else "priority"
    kind = AsyncScheduler if run["in_flight"] > 1 else None
    return make_scheduler(run | {"policy": policy}, folder, kind)


class MockedRun:
    """One run: requests come at their moments, a step takes its time, answers end.

    Attributes:
        clock: [seconds].
        spans: of each request: when it was admitted, when it ended; -1 before.
        in_flight: steps that are scheduled and not over: (output, the model's, seconds).
        own_s: seconds of this process that `schedule` took, over all steps.
    """

    def __init__(self, run: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
        self.run, self.rows = run, rows
        self.clock = [0.0]
        self.gateway = GatewayHints(run, rows, self.clock)
        self.scheduler = scheduler_of(run, folder, lambda: self.clock[0])
        self.todo = deque(enumerate(run["requests"]))
        self.spans = [[-1.0, -1.0] for _ in self.todo]
        self.first_s: dict[int, float] = {}
        self.left: dict[str, int] = {}
        self.in_flight: deque[tuple[Any, Any, float]] = deque()
        self.steps, self.own_s = 0, 0.0

    def go(self) -> dict[str, Any]:
        while self.todo or self.left:
            self.take_arrivals()
            while len(self.in_flight) < self.run["in_flight"] and self.schedule():
                pass
            if self.in_flight:
                self.end_step()
            elif self.left:
                raise RuntimeError(f"vLLM schedules nothing at {self.clock[0]} s")
            else:
                self.clock[0] = self.todo[0][1][1]
        own_us = 1e6 * self.own_s / self.steps
        preempted = len(self.scheduler.preempted)
        return {"spans": self.spans, "preempted": preempted, "own_us": own_us}

    def take_arrivals(self) -> None:
        now_s = self.clock[0]
        while self.todo and self.todo[0][1][1] <= now_s:
            number, (row, arrival_s) = self.todo.popleft()
            self.clock[0] = arrival_s  # the gateway's, while it looks at this request
            fields = self.gateway.fields(row, arrival_s)
            level = fields.get("priority", 0)
            prompt, cap = self.rows[row]["prompt"], self.run["cap"]
            request = make_request(number, [prompt, cap, arrival_s, level])
            request.sampling_params.stop_token_ids = [STOP_TOKEN]
            request.sampling_params.extra_args = fields.get("vllm_xargs")
            self.left[request.request_id] = self.rows[row]["answer"]
            self.scheduler.add_request(request)
        self.clock[0] = now_s

    def schedule(self) -> bool:
        """Schedule a step; False: there is nothing to compute."""
        begin_s = time.process_time()
        output = self.scheduler.schedule()
        self.own_s += time.process_time() - begin_s
        tokens = output.num_scheduled_tokens
        if not tokens:
            return False
        self.steps += 1
        made = mocked_output(self.scheduler, tokens)
        for name, sampled in zip(tokens, made.sampled_token_ids):
            span = self.spans[int(name)]
            span[0] = self.clock[0] if span[0] < 0 else span[0]
            self.left[name] -= len(sampled)
            if sampled and self.left[name] <= 0:
                sampled[0] = STOP_TOKEN
        self.in_flight.append((output, made, self.seconds_of(tokens)))
        return True

    def seconds_of(self, tokens: dict[str, int]) -> float:
        """Of a step: of itself, of each sequence in it, of each token of a prompt."""
        prompts = 0
        for name, count in tokens.items():
            request = self.scheduler.requests[name]
            prompts += count if request.num_computed_tokens <= request.num_prompt_tokens else 0
        run = self.run
        return run["step_s"] + run["row_s"] * len(tokens) + run["prompt_s"] * prompts

    def end_step(self) -> None:
        """The oldest step is over: its tokens are there, some answers have ended."""
        output, made, seconds = self.in_flight.popleft()
        self.clock[0] += seconds
        self.scheduler.update_from_output(output, made)
        for name, sampled in zip(output.num_scheduled_tokens, made.sampled_token_ids):
            number = int(name)
            if sampled:
                self.first_s.setdefault(number, self.clock[0])
            if name in self.left and name not in self.scheduler.requests:
                del self.left[name]
                self.spans[number][1] = self.clock[0]
                answer = self.rows[self.run["requests"][number][0]]["answer"]
                took_s = self.clock[0] - self.first_s[number]
                self.gateway.dispatcher.note_pace(took_s, answer)


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    lines, sys.stdout = sys.stdout, sys.stderr  # vLLM may print
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for run in work["runs"]:
            found = MockedRun(run, work["rows"], folder).go()
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    main()
