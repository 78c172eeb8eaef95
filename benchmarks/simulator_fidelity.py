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
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.cells import Cell, KeptCells
from benchmarks.steady import (
    SteadyTimer,
    TimedEngine,
    TimedPass,
    TimerClock,
    calibrate,
    fit_passes,
    fitted_cost,
    short_forward,
)
from chatglm.commands import Parser, run_command
from finetune.config import PRECISIONS, parse_positive
from serving.engines.answers import Sampling
from serving.policies.continuous import POLICIES
from serving.request import Limits, Policy, Request
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost, SimulatedEngine
from serving.simulate.statistics import Collector
from serving.simulate.workload import PredictorModel

LONGEST_PROMPT = 90  # tokens


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
        from finetune.evaluation.inference import load_ready

        torch.set_num_threads(1)
        if flags.model is None:
            model: Any = quickstart_model()
        else:
            model = load_ready(flags.model, device="cpu", precision=flags.precision)
        self.flags = flags
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        timer = SteadyTimer(short_forward(model))
        limits = limits_of(flags)
        cost = LinearCost(limits.kv_tokens)
        self.engine = TimedEngine(model, limits, cost, [1], timer=timer)
        self.engine.clear()

    def serve(self, policy: Policy, requests: list[Request]) -> Collector:
        """On the engine, which notes its passes."""
        draw = np.random.default_rng(0)
        for request in requests:
            ids = draw.integers(2, self.vocabulary, request.prompt_tokens).tolist()
            sampling = Sampling(max_new_tokens=request.output_tokens, ignore_stops=True)
            self.engine.submit(request, ids, sampling)
        clock = TimerClock(self.engine.timer)
        collector = Collector().consume(run_scheduler(policy, self.engine, clock, Replay(requests)))
        self.busy_s = clock.now_s() - clock.idle_s
        return collector

    def calibrate(self) -> dict[str, Any]:
        """As steady.calibrate."""

        def serve_arrivals(count: int, rate: float, seed: int) -> tuple[float, float]:
            self.serve(POLICIES["fcfs"], poisson_requests(self.flags, count, rate, seed))
            return self.busy_s, count / self.busy_s

        return calibrate(self.engine, self.flags.requests, serve_arrivals)

    def run(self, cell: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
        """A cell's figures: the engine's latencies."""
        self.engine.cost = fitted_cost(made, self.engine.limits)
        requests = cell_requests(self.flags, cell, made["capacity"])
        return {"engine": latencies(self.serve(POLICIES[cell["policy"]], requests))}


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
    kept = KeptCells(flags.cells, settings, ["passes"])
    cells: list[Cell] = []
    for load in map(float, flags.loads.split(",")):
        for policy in flags.policies.split(","):
            cells.append({"policy": policy, "load": load})
    if kept.missing(cells):
        begin = time.perf_counter()
        bench = FidelityBench(flags)
        made = kept.note("passes", bench.calibrate)
        bench.engine.timer.usual_s = made["reference_s"]
        spent = (time.perf_counter() - begin) / 60
        kept.run_missing(cells, lambda cell: bench.run(cell, made), flags.minutes - spent)
    return kept.notes["passes"], kept.rows


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
