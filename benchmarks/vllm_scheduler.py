# ruff: noqa: E402
"""The simulator's decisions against those of vLLM's own scheduler, step by step.

    python benchmarks/vllm_scheduler.py [--workloads 200] [--requests 50] [--traces FILE]

Random workloads, half of them with priorities, go through `vllm.v1.core.sched.scheduler.Scheduler`
(benchmarks/vllm_trace.py; its model is mocked) and through the simulator, with the same limits and
steps of one second. Compared is all that a step does: which requests are preempted and admitted and
in what order, how many tokens of each are computed, which end. The first table has the policies as
they are; the second has `vllm` with one trait of `fcfs` at a time, to show what the trait decides.

vLLM runs in an environment of its own (benchmarks/client_env.py vllm: 3.4 GB, made once); with
--traces FILE.json.gz only once: what it did is kept there and read again.

With --orders (benchmarks/vllm_orders.py; --orders --help) latencies under vLLM's scheduler are
compared instead: its own order, the gateway's priorities and LengthScheduler.
"""

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import vllm_orders
from benchmarks.client_env import environment_python
from chatglm.commands import run_command
from serving.policies.published import Fcfs
from serving.policies.vllm import Vllm
from serving.request import FOREVER, Limits, Plan, Policy, Record, Request, StepResult
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import SimulatedEngine

TRACE_FILE = Path(__file__).with_name("vllm_trace.py")
BLOCK_TOKENS = 16

# time, preempted, admitted, {request: tokens}, finished
Step = tuple[float, list[int], list[int], dict[int, int], list[int]]


class SecondSteps:
    """Every pass takes a second (a CostEstimator)."""

    kv_capacity_tokens = 1 << 30

    def prefill_s(self, tokens: int, batch: int = 1) -> float:
        return float(tokens > 0)

    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float:
        return 0.0 if rows else 1.0

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 1.0

    def decode_s(self, batch: int, context_tokens: int, steps: int) -> float:
        return float(steps)


class NotingEngine:
    """The simulated engine, pass by pass; `steps` is what each has done."""

    def __init__(self, limits: Limits, clock: VirtualClock) -> None:
        self.limits, self.clock, self.cost = limits, clock, SecondSteps()
        self.engine = SimulatedEngine(self.cost, limits)
        self.steps: list[Step] = []

    def generated(self, record: Record) -> int:
        return self.engine.generated(record)

    def computed(self, record: Record) -> int:
        return self.engine.computed(record)

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step."""
        elapsed, emitted, passes = 0.0, 0, 0
        started: list[tuple[int, float]] = []
        while True:
            result = self._pass(plan, self.clock.now_s() + elapsed)
            started += [(number, elapsed + after) for number, after in result.started]
            elapsed, emitted = elapsed + result.elapsed_s, emitted + result.emitted_tokens
            passes += 1
            over = result.finished or result.overran or not self.engine.rows
            if over or elapsed >= budget_s or passes == plan.horizon_steps:
                return result._replace(
                    elapsed_s=elapsed, emitted_tokens=emitted, started=tuple(started)
                )
            plan = replace(plan, admit=(), preempt=(), reserve_tokens={})

    def _pass(self, plan: Plan, now: float) -> StepResult:
        leaving = {record.request.id for record in plan.preempt}
        before = {}
        for number, row in self.engine.rows.items():
            if number not in leaving:
                before[number] = (row, row.prefilled, row.joined >= 0)
        result = self.engine.step(replace(plan, horizon_steps=1))
        tokens = {}
        for number, (row, prefilled, decodes) in before.items():
            if decodes or row.prefilled > prefilled:
                tokens[number] = 1 if decodes else row.prefilled - prefilled
        for record in plan.admit:
            row = self.engine.rows.get(record.request.id)
            # One that has ended in its first pass has had its whole prompt computed in it.
            chunk = record.context_tokens if row is None else row.prefilled
            if chunk:
                tokens[record.request.id] = chunk
        admitted = [record.request.id for record in plan.admit]
        preempted = [record.request.id for record in plan.preempt]
        finished = sorted(number for number, _, _ in result.finished)
        self.steps.append((now, preempted, admitted, tokens, finished))
        return result


def random_workload(rng: np.random.Generator, requests: int, policy: str) -> dict[str, Any]:
    """A workload of benchmarks/vllm_trace.py, mostly with too little memory for its rows."""
    max_batch = int(rng.integers(2, 17))
    max_tokens = int(rng.integers(64, 513))
    least = -(-max_tokens // BLOCK_TOKENS)
    blocks = int(rng.integers(least, 1 + least * max(max_batch // 2, 2)))
    prompts = np.minimum(1 + rng.geometric(1 / (0.2 * max_tokens), requests), max_tokens - 1)
    answers = np.minimum(rng.geometric(1 / (0.2 * max_tokens), requests), max_tokens - prompts)
    # Arrivals in 1/1024 s, which sums of floats keep exactly, all of them different.
    gap = rng.uniform(0.3, 3) * 0.2 * max_tokens / max_batch
    arrivals = np.cumsum(1 + rng.geometric(1 / (1 + 1024 * gap), requests)) / 1024
    levels = rng.integers(0, 4, requests) if policy == "priority" else np.zeros(requests, int)
    rows = zip(prompts.tolist(), answers.tolist(), arrivals.tolist(), levels.tolist())
    return {
        "policy": policy,
        "max_batch": max_batch,
        "pass_tokens": max_batch + int(rng.integers(8, 257)),
        "blocks": blocks,
        "block_tokens": BLOCK_TOKENS,
        "max_tokens": max_tokens,
        "requests": list(map(list, rows)),
    }


def simulated_steps(policy: Policy, workload: dict[str, Any]) -> list[Step]:
    """What the simulator does in each step."""
    kv_tokens = workload["blocks"] * BLOCK_TOKENS
    if isinstance(policy, Vllm):
        kv_tokens += workload["max_batch"]
    limits = Limits(
        workload["max_batch"], kv_tokens, workload["max_tokens"], workload["pass_tokens"]
    )
    requests = []
    for number, (prompt, answer, arrival_s, priority) in enumerate(workload["requests"]):
        requests.append(
            Request(number, prompt, arrival_s, FOREVER, None, answer, priority=priority)
        )
    clock = VirtualClock()
    engine = NotingEngine(limits, clock)
    for _ in run_scheduler(policy, engine, clock, Replay(requests)):
        pass
    return engine.steps


class WholePrompts(Vllm):
    """Takes the blocks of a whole prompt at its admission."""

    def chunk_reserve(self, record: Record, chunk: int, limits: Limits) -> int:
        return self.reserve(record.context_tokens, limits)


class PromptsOnly(Vllm):
    """Counts no decoding answers in a pass's tokens."""

    def prompt_budget(self, limits: Limits, decoding: int) -> int:
        return limits.prefill_tokens


class LatestFirst(Vllm):
    """Preempts by arrival alone, whatever the priorities."""

    def rank(self, record: Record) -> tuple[float, ...]:
        return (record.request.arrival_s,)


AS_THEY_ARE: dict[str, Policy] = {
    "`fcfs`": Fcfs(),
    "`fcfs` with vLLM's blocks of 16, no watermark": Fcfs(BLOCK_TOKENS, 0.0),
    "`vllm`": Vllm(),
}
TRAITS: dict[str, Policy] = {
    "prompts alone count in a pass": PromptsOnly(),
    "a prompt's memory is taken at its admission": WholePrompts(),
    "memory in blocks of 64": Vllm(64),
    "1 % of the memory is left free at admission": Vllm(watermark=0.01),
    "preempted is the latest arrival": LatestFirst(),
}


def cause_of(theirs: Step, ours: Step) -> str:
    """What differs first between two steps of one number."""
    if theirs[1] != ours[1]:
        return "preempted"
    if theirs[2] != ours[2]:
        return "admitted"
    if missing := set(ours[3]) - set(theirs[3]):
        return "left out of the pass by vLLM" if not missing & set(ours[2]) else "tokens"
    return "tokens" if theirs[3] != ours[3] else "time or end"


def first_difference(theirs: list[Step], ours: list[Step]) -> str:
    """cause_of the first steps that differ; "" where all are the same."""
    for one, other in zip(theirs, ours):
        if one != other:
            return cause_of(one, other)
    return "" if len(theirs) == len(ours) else "time or end"


def traces_of(python: str | Path, workloads: list[dict[str, Any]]) -> list[list[Step]]:
    """What vLLM does in each step of each workload."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "workloads.json", Path(name) / "traces.json"
        source.write_text(json.dumps(workloads), encoding="utf-8")
        env = dict(os.environ, OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR")
        env.pop("PYTHONPATH", None)
        words = [str(python), str(TRACE_FILE), str(source), str(target)]
        done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=name)
        if done.returncode:
            raise ValueError(f"vLLM's scheduler failed: {done.stderr.strip()[-800:]}")
        found = json.loads(target.read_text(encoding="utf-8"))
    return read_steps(found)


def read_steps(found: list[list[Any]]) -> list[list[Step]]:
    """Steps as JSON has them, whose keys are text."""
    traces = []
    for steps in found:
        trace: list[Step] = []
        for now, preempted, admitted, tokens, finished in steps:
            counts = {int(key): count for key, count in tokens.items()}
            trace.append((now, preempted, admitted, counts, finished))
        traces.append(trace)
    return traces


def read_traces(path: Path) -> tuple[list[dict[str, Any]], list[list[Step]]]:
    """(workloads, what vLLM did with them) of a file that write_traces wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        workloads, found = json.load(file)
    return workloads, read_steps(found)


def write_traces(path: Path, workloads: list[dict[str, Any]], traces: list[list[Step]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump([workloads, traces], file)


def left_out(trace: list[Step]) -> int:
    """Passes of vLLM without one of its running requests."""
    count = 0
    running: set[int] = set()
    for _, preempted, admitted, tokens, finished in trace:
        running = running.difference(preempted).union(admitted)
        count += not running <= set(tokens)
        running = running.difference(finished)
    return count


def count_same(
    policies: dict[str, Policy], workloads: list[dict[str, Any]], traces: list[list[Step]]
) -> list[dict[str, Any]]:
    """For each policy and kind of workload: {policy, kind, workloads, same, first}."""
    rows = []
    for name, policy in policies.items():
        first: dict[str, Counter[str]] = {"fcfs": Counter(), "priority": Counter()}
        for workload, trace in zip(workloads, traces):
            ours = simulated_steps(policy, workload)
            first[workload["policy"]][first_difference(trace, ours)] += 1
        for kind, counts in first.items():
            same = counts.pop("", 0)
            total = same + sum(counts.values())
            row = {"policy": name, "kind": kind, "workloads": total, "same": same}
            rows.append({**row, "first": dict(counts.most_common())})
    return rows


def print_same(heading: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n| {heading} | vLLM's policy | the same in all steps | first difference |")
    print("|---|---|---|---|")
    for row in rows:
        first = ", ".join([f"{cause}: {count}" for cause, count in row["first"].items()])
        same = f"{row['same']} of {row['workloads']}"
        print(f"| {row['policy']} | `{row['kind']}` | {same} | {first} |")


@dataclass(frozen=True)
class SchedulerFlags:
    """The command's flags; see main."""

    workloads: int
    requests: int
    seed: int
    python: str | None
    traces: Path | None


def recorded(flags: SchedulerFlags) -> tuple[list[dict[str, Any]], list[list[Step]]]:
    """Workloads and what vLLM does with them: those of --traces where the file exists."""
    if flags.traces is not None and flags.traces.exists():
        return read_traces(flags.traces)
    rng = np.random.default_rng(flags.seed)
    workloads = []
    for number in range(flags.workloads):
        kind = ("fcfs", "priority")[number % 2]
        workloads.append(random_workload(rng, flags.requests, kind))
    traces = traces_of(flags.python or environment_python("vllm"), workloads)
    if flags.traces is not None:
        write_traces(flags.traces, workloads, traces)
    return workloads, traces


def run(flags: SchedulerFlags) -> int:
    workloads, traces = recorded(flags)
    requests = sum([len(workload["requests"]) for workload in workloads])
    preemptions = sum([len(step[1]) for step in itertools.chain(*traces)])
    print(
        f"{len(workloads)} workloads, {requests} requests, {sum(map(len, traces))} steps, "
        f"{preemptions} preemptions; {sum(map(left_out, traces))} steps leave a running request out"
    )
    print_same("policy", count_same(AS_THEY_ARE, workloads, traces))
    print_same("`vllm`, but", count_same(TRAITS, workloads, traces))
    return 0


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "--orders" in words:
        return vllm_orders.main(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", type=int, default=200)
    parser.add_argument("--requests", type=int, default=50, help="of each workload [50]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", help="of an environment with vLLM [made where it is missing]")
    parser.add_argument("--traces", type=Path, help=".json.gz, read where it exists, else written")
    flags = SchedulerFlags(**vars(parser.parse_args(words)))
    return run_command("vllm_scheduler", lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
