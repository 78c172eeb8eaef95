# ruff: noqa: E402
"""The simulator against the continuous engine: mean latencies of the same requests, cell by cell.

    python benchmarks/simulator_fidelity.py --cells FILE [--model DIR] [--minutes 20]
        [--policies fcfs,sjf,boost,gittins] [--loads 0.5,0.8,1.0,1.2] [--requests 150]

Without --model: random weights of the quickstart's shape. The engine computes every pass, under a
clock of CPU seconds: arrivals come by it, idle time is skipped. Every 8th pass a fixed forward of
the model is timed beside, and the clock runs by the median of the last 9 of those: what other
programs on the machine take of the core's speed is divided out of it (SteadyTimer).

The costs that the simulator charges are fitted to passes of two calibration runs, each second of
them in one place: in a pass (LinearCost: rows, context, prompt tokens), or between passes (plan_s:
scheduler, policy, admissions, moves to a larger length class, an arrival's interruption).

A cell is one policy at one load, as a share of capacity, which is measured first. What the engine
did is kept in the lines of --cells, written as they end: the same command goes on where it was
stopped. Costs are fitted and requests simulated when the table is printed.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.rows import read_lines
from chatglm.commands import Parser, run_command
from finetune.config import PRECISIONS, parse_positive
from serving.engines.answers import Sampling
from serving.engines.continuous_engine import ContinuousEngine
from serving.policies.continuous import POLICIES
from serving.request import FOREVER, Limits, Plan, Policy, Request, StepResult
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost, SimulatedEngine
from serving.simulate.statistics import Collector
from serving.simulate.workload import PredictorModel

EVERY = 8  # passes between two timings of the reference
LONGEST_PROMPT = 90  # tokens
RECENT = 9  # of those timings, whose median is the machine's speed now


class SteadyTimer:
    """CPU seconds of this process, as if the machine were always as fast as it once was.

    Args:
        reference: a fixed piece of work, whose own time is left out.
    Attributes:
        usual_s: what the reference took then: when the timer was made, unless it is set.
    """

    def __init__(self, reference: Callable[[], object]) -> None:
        self.reference = reference
        self.now_s = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        for _ in range(3 * RECENT):
            self.recent.append(self._time_reference())
        self.usual_s = self.typical_s = median(self.recent)
        self.last_s = time.process_time()

    def _time_reference(self) -> float:
        begin = time.process_time()
        self.reference()
        return time.process_time() - begin

    def __call__(self) -> float:
        now_s = time.process_time()
        self.now_s += (now_s - self.last_s) * self.usual_s / self.typical_s
        self.last_s = now_s
        return self.now_s

    def observe_speed(self) -> None:
        """Time the reference, and go by it from now on."""
        self()
        self.recent.append(self._time_reference())
        self.typical_s = median(self.recent)
        self.last_s = time.process_time()


class TimerClock:
    """A Clock of a timer, which skips idle time."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self.timer, self.zero_s, self.idle_s = timer, timer(), 0.0

    def now_s(self) -> float:
        return self.timer() - self.zero_s + self.idle_s

    def advance(self, seconds: float) -> None:
        """Nothing: the step has taken its time."""

    def wait_until(self, time_s: float) -> None:
        self.idle_s += max(time_s - self.now_s(), 0.0)


@dataclass(frozen=True)
class TimedPass:  # the order of its fields is that of the lines of --cells
    """One pass: its decoding rows, their cached tokens, those that attention reads (each length
    class up to its longest row), its length classes, its prompt tokens, and what it took."""

    rows: int
    context: int
    read: int
    classes: int
    prompt: int
    seconds: float


class TimedEngine(ContinuousEngine):
    """Times each pass; `passes` and the number of `plans` since clear()."""

    steady: SteadyTimer

    def clear(self) -> None:
        self.passes: list[TimedPass] = []
        self.plans = 0

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        self.plans += 1
        return super().step(plan, budget_s)

    def _submit_passes(self, *rest: Any, **named: Any) -> None:
        self._begin_s = self.timer()
        super()._submit_passes(*rest, **named)

    def _collect_pass(self, *rest: Any, **named: Any) -> int:
        planned = self._in_flight[0].in_flight
        assert planned is not None
        emitted = super()._collect_pass(*rest, **named)
        seconds = self.timer() - self._begin_s
        rows = context = read = prompt = 0
        for part in planned.plan.decoding:
            rows += len(part.lengths)
            context += sum(part.lengths)
            read += len(part.lengths) * (max(part.lengths) + 1)
        for chunk in planned.plan.chunks:
            prompt += chunk.end - chunk.start
        classes = len(planned.plan.decoding)
        self.passes.append(TimedPass(rows, context, read, classes, prompt, seconds))
        if len(self.passes) % EVERY == 0:
            self.steady.observe_speed()
        return emitted


@dataclass(frozen=True)
class FidelityFlags:
    """The command's flags; build_parser has their meaning and defaults."""

    model: str | None
    precision: str
    cells: Path
    policies: str
    loads: str
    requests: int
    max_batch: int
    answer_tokens: int
    longest: int
    minutes: float


def quickstart_model() -> Any:
    """Random weights of the quickstart's shape, in fp32."""
    from transformers import AutoModelForCausalLM

    from chatglm.configuration import ChatGLM2Config

    torch.manual_seed(0)
    config = ChatGLM2Config(
        num_layers=3,
        hidden_size=320,
        num_attention_heads=10,
        kv_channels=32,
        multi_query_group_num=2,
        ffn_hidden_size=880,
        padded_vocab_size=2048,
        glm_family="glm2",
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def limits_of(flags: FidelityFlags) -> Limits:
    longest = flags.longest + LONGEST_PROMPT
    return Limits(flags.max_batch, flags.max_batch * longest, longest, 256)


def poisson_requests(flags: FidelityFlags, count: int, rate: float, seed: int) -> list[Request]:
    """Poisson arrivals at a rate, all at once where it is inf; log-normal answers, predicted."""
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(flags.answer_tokens), 0.9, count)
    answers = np.clip(np.round(drawn), 1, flags.longest).astype(int)
    prompts = rng.integers(12, LONGEST_PROMPT, count).tolist()
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    which, predictions = PredictorModel.normal(0.8, flags.longest).predict(answers, rng)
    requests = []
    for number, tokens in enumerate(answers.tolist()):
        predicted = predictions[which[number]]
        requests.append(Request(number, prompts[number], arrivals[number], 1e6, predicted, tokens))
    return requests


class FidelityBench:
    """The engine, and the requests of the cells."""

    def __init__(self, flags: FidelityFlags) -> None:
        from finetune.evaluation.predict import load_ready

        torch.set_num_threads(1)
        if flags.model is None:
            model: Any = quickstart_model()
        else:
            model = load_ready(flags.model, device="cpu", precision=flags.precision)
        self.flags = flags
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(2, 10)[None]

        @torch.inference_mode()
        def reference() -> object:
            return model(input_ids=ids, use_cache=False)

        timer = SteadyTimer(reference)
        limits = limits_of(flags)
        cost = LinearCost(limits.kv_tokens)
        self.engine = TimedEngine(model, limits, cost, [1], timer=timer)
        self.engine.steady = timer

    def serve(self, policy: Policy, requests: list[Request]) -> Collector:
        """On the engine, which notes its passes."""
        draw = np.random.default_rng(0)
        for request in requests:
            ids = draw.integers(2, self.vocabulary, request.prompt_tokens).tolist()
            sampling = Sampling(max_new_tokens=request.output_tokens, ignore_stops=True)
            self.engine.submit(request, ids, sampling)
        self.engine.clear()
        clock = TimerClock(self.engine.timer)
        collector = Collector().consume(run_scheduler(policy, self.engine, clock, Replay(requests)))
        self.busy_s = clock.now_s() - clock.idle_s
        return collector

    def calibrate(self) -> dict[str, Any]:
        """Capacity, and what the simulator's costs are fitted to."""
        flags, fcfs = self.flags, POLICIES["fcfs"]
        at_once = float("inf")
        self.serve(fcfs, poisson_requests(flags, flags.max_batch, at_once, 1000))  # warms up
        self.serve(fcfs, poisson_requests(flags, flags.requests, at_once, 1001))
        capacity = flags.requests / self.busy_s
        passes, plans, busy_s = self.engine.passes, self.engine.plans, self.busy_s
        self.serve(fcfs, poisson_requests(flags, flags.requests, 0.6 * capacity, 1002))
        passes = passes + self.engine.passes
        plans, busy_s = plans + self.engine.plans, busy_s + self.busy_s
        return {
            "reference_s": self.engine.steady.usual_s,
            "capacity": capacity,
            "plans": plans,
            "busy_s": busy_s,
            "moves": self.engine.runner.arena.migrations,
            "passes": [list(asdict(one).values()) for one in passes],
        }

    def run(self, cell: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
        """A cell's line: the engine's latencies."""
        self.engine.cost = fitted_cost(made, self.engine.limits)
        requests = cell_requests(self.flags, cell, made["capacity"])
        return cell | {"engine": latencies(self.serve(POLICIES[cell["policy"]], requests))}


def cell_requests(flags: FidelityFlags, cell: dict[str, Any], capacity: float) -> list[Request]:
    """The requests of a cell: the same for all policies at one load."""
    load = cell["load"]
    requests = poisson_requests(flags, flags.requests, load * capacity, round(100 * load))
    if not POLICIES[cell["policy"]].predicts:
        requests = [replace(request, prediction=None) for request in requests]
    return requests


def add_simulated(flags: FidelityFlags, made: dict[str, Any], line: dict[str, Any]) -> None:
    """Add the simulator's latencies to a cell's line, with and without plan_s."""
    limits = limits_of(flags)
    cost = fitted_cost(made, limits)
    requests = cell_requests(flags, line, made["capacity"])
    for name, charged in {"simulated": cost, "uncharged": replace(cost, plan_s=0.0)}.items():
        engine = SimulatedEngine(charged, limits, padded=False)
        events = run_scheduler(POLICIES[line["policy"]], engine, VirtualClock(), Replay(requests))
        line[name] = latencies(Collector().consume(events))


def latencies(collector: Collector) -> dict[str, float]:
    summary = collector.summary()
    return {key: summary[key] for key in ("latency_mean_s", "latency_p99_s", "ttft_mean_s")}


def fit_passes(passes: list[TimedPass]) -> dict[str, Any]:
    """Non-negative least squares of the passes' seconds, of which the sum is then right.

    `cost` is LinearCost's; `errors` the mean relative error of a pass by that, and where what
    attention reads and the number of length classes are known too.
    """
    seconds = np.array([one.seconds for one in passes])
    columns = []
    for one in passes:
        decodes = float(one.rows > 0)
        columns.append([decodes, one.rows, one.context, one.prompt, 1 - decodes])
    small = np.array(columns, float)
    classes = [[one.read - one.context, max(one.classes - 1, 0)] for one in passes]
    large = np.hstack([small, np.array(classes, float)])
    weights = 1 / np.sqrt(seconds)
    fitted, errors = [], []
    for matrix in (small, large):
        found, _ = nnls(matrix * weights[:, None], seconds * weights)
        found *= seconds.sum() / (matrix @ found).sum()
        fitted.append(found)
        errors.append(float(np.mean(np.abs(matrix @ found / seconds - 1))))
    step_s, row_s, token_s, prompt_token_s, call_s = fitted[0].tolist()
    cost = {"step_s": step_s, "row_s": row_s, "token_s": token_s}
    cost |= {"call_s": call_s, "prompt_token_s": prompt_token_s}
    share = float((large[:, 5:] @ fitted[1][5:]).sum() / seconds.sum())
    return {"cost": cost, "errors": errors, "classes_share": share}


def fitted_cost(made: dict[str, Any], limits: Limits) -> LinearCost:
    """The costs that a calibration shows."""
    passes = [TimedPass(*values) for values in made["passes"]]
    between_s = made["busy_s"] - sum([one.seconds for one in passes])
    plan_s = between_s / made["plans"]
    return LinearCost(limits.kv_tokens, **fit_passes(passes)["cost"], plan_s=plan_s)


def print_table(flags: FidelityFlags, made: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    passes = [TimedPass(*values) for values in made["passes"]]
    fitted = fit_passes(passes)
    cost = ", ".join([f"{name} {1e3 * value:.3g} ms" for name, value in fitted["cost"].items()])
    errors, classes = fitted["errors"], fitted["classes_share"]
    between_s = made["busy_s"] - sum([one.seconds for one in passes])
    print(
        f"capacity {made['capacity']:.3g} answers/s; {cost}; a plan "
        f"{1e3 * between_s / made['plans']:.3g} ms, {100 * between_s / made['busy_s']:.1f} % of "
        f"the time between passes, {made['moves']} moves; "
        f"a pass is off by {100 * errors[0]:.0f} % on average, with length classes "
        f"{100 * errors[1]:.0f} %, which are {100 * classes:.1f} % of the time"
    )
    print("\n| policy | load | engine, mean s | simulated | off by | without plan_s | p99 off by |")
    print("|---|---|---|---|---|---|---|")
    offs = []
    for line in lines:
        add_simulated(flags, made, line)
        off = off_by(line, "simulated", "latency_mean_s")
        offs.append(abs(off))
        print(
            f"| `{line['policy']}` | {line['load']} | {line['engine']['latency_mean_s']:.3f} "
            f"| {line['simulated']['latency_mean_s']:.3f} | {100 * off:+.1f} % "
            f"| {100 * off_by(line, 'uncharged', 'latency_mean_s'):+.1f} % "
            f"| {100 * off_by(line, 'simulated', 'latency_p99_s'):+.1f} % |"
        )
    if offs:
        print(
            f"\n{len(offs)} cells: off by {100 * median(offs):.1f} % in the median, "
            f"{100 * max(offs):.1f} % at most"
        )


def off_by(line: dict[str, Any], side: str, metric: str) -> float:
    return float(line[side][metric] / line["engine"][metric] - 1)


def run_cells(flags: FidelityFlags) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(calibration, lines of the cells), those that are missing being run first.

    Raises:
        ValueError: --cells is of other settings.
    """
    settings = {"model": flags.model, "precision": flags.precision, "requests": flags.requests}
    settings |= {"max_batch": flags.max_batch, "longest": flags.longest}
    settings["answer_tokens"] = flags.answer_tokens
    lines = read_lines(flags.cells) if flags.cells.exists() else []
    if lines and lines[0]["settings"] != settings:
        raise ValueError(f"--cells {flags.cells}: made with other settings; name another file")
    done = {(line["policy"], line["load"]) for line in lines[1:]}
    begin = time.perf_counter()
    bench: FidelityBench | None = None
    for load in map(float, flags.loads.split(",")):
        for policy in flags.policies.split(","):
            over = time.perf_counter() - begin > 60 * flags.minutes
            if (policy, load) in done or over:
                continue
            bench = bench or FidelityBench(flags)
            if not lines:
                lines.append({"settings": settings, **bench.calibrate()})
                append(flags.cells, lines[0])
            bench.engine.steady.usual_s = lines[0]["reference_s"]
            lines.append(bench.run({"policy": policy, "load": load}, lines[0]))
            append(flags.cells, lines[-1])
    if not lines:
        raise ValueError("--minutes: too few for a cell")
    return lines[0], lines[1:]


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="simulator_fidelity.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add(
        "--model", help="folder of a model that the continuous engine runs [the quickstart's shape]"
    )
    add("--precision", choices=PRECISIONS, default="auto", help="of the model's weights [auto]")
    add("--cells", type=Path, required=True, help="JSON lines to write, or to go on with")
    add("--policies", default="fcfs,sjf,boost,gittins", help="comma between them")
    add("--loads", default="0.5,0.8,1.0,1.2", help="shares of the capacity [0.5,0.8,1.0,1.2]")
    add("--requests", type=parse_positive, default=150, help="of each cell [150]")
    add("--max_batch", type=parse_positive, default=16, help="answers made at once [16]")
    add("--answer_tokens", type=parse_positive, default=24, help="median of the answers [24]")
    add("--longest", type=parse_positive, default=256, help="tokens of an answer at most [256]")
    add("--minutes", type=float, default=1e9, help="begin no cell after so many [no limit]")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = FidelityFlags(**vars(parser.parse_args(argv)))
    for name in flags.policies.split(","):
        if name not in POLICIES:
            parser.error(f"--policies: no policy {name!r}; there are {', '.join(POLICIES)}")

    def show() -> int:
        print_table(flags, *run_cells(flags))
        return 0

    return run_command("simulator_fidelity", show)


if __name__ == "__main__":
    sys.exit(main())
