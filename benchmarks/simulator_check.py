# ruff: noqa: E402
"""The continuous engine against its simulation: policies x loads, a cell at a time.

    python benchmarks/simulator_check.py --model output/quickstart/merged \\
        --lengths output/quickstart/lengths_test.jsonl --output output/simulator_check.json

A run of the same command goes on where the last one ended; --cells bounds how many it adds. The
real engine answers prompts of the file with answers of the recorded lengths (at most --longest), at
Poisson arrivals, and predictions are the true lengths times lognormal noise. Each cell is measured
right after a profile of the engine and its overheads, and simulated with and without the overheads.
Everything is timed by the processor's time of this process, so that other work on the machine does
not count; time without a request is skipped. Loads are shares of what the simulation serves.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.rows import read_lines
from finetune.files import write_json
from predictor.prediction import from_bins
from serving.cost_model.fit import fit_profile
from serving.cost_model.model import DATASHEET, CostModel, ModelSizes
from serving.cost_model.overheads import EngineOverheads
from serving.policies.continuous import POLICIES
from serving.request import FOREVER, Limits, Plan, Request, StepResult
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import SimulatedEngine
from serving.simulate.statistics import Collector
from serving.simulate.workload import poisson_arrivals

PRIOR = 1e-4  # as serving.engines.profiling
WARM_UP = 4  # requests before the first cell


class CpuClock:
    """The processor's time of this process, and the idle time that was skipped."""

    def __init__(self) -> None:
        self.begin = time.process_time()
        self.skipped = 0.0

    def now_s(self) -> float:
        return time.process_time() - self.begin + self.skipped

    def advance(self, seconds: float) -> None:
        """Time passes by itself."""

    def wait_until(self, time_s: float) -> None:
        self.skipped += max(time_s - self.now_s(), 0.0)


class CpuTimed:
    """An engine whose steps last as long as the processor worked on them."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.limits, self.cost = engine.limits, engine.cost
        self.submit, self.cancel, self.generated = engine.submit, engine.cancel, engine.generated

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        begin = time.process_time()
        result: StepResult = self.engine.step(plan, budget_s)
        return result._replace(elapsed_s=time.process_time() - begin)


class Submitting(Replay):
    """Arrivals that are handed to the real engine when they are seen."""

    def __init__(self, requests: Sequence[Request], engine: Any, prompts: list[list[int]]) -> None:
        super().__init__(requests)
        self.engine, self.prompts = engine, prompts

    def due(self, now_s: float) -> list[Request]:
        from serving.engines import Sampling

        requests = super().due(now_s)
        for request in requests:
            sampling = Sampling(request.output_tokens, ignore_stops=True)
            self.engine.submit(request, self.prompts[request.id], sampling)
        return requests


@dataclass(frozen=True)
class CheckFlags:
    """The command's flags; see build_parser."""

    model: str
    lengths: Path
    output: Path
    policies: str
    loads: str
    requests: int
    longest: int
    longest_prompt: int
    max_batch: int
    repetitions: int
    turns: int
    cells: int


class Check:
    """A model, its engine, and prompts with lengths.

    Attributes:
        known: [(prompt ids, answer tokens)].
    """

    def __init__(self, flags: CheckFlags) -> None:
        import torch

        from chatglm import load_tokenizer
        from chatglm.families import FAMILIES
        from finetune.evaluation.predict import load_ready
        from serving.engines import make_engine
        from serving.engines.answers import vocabulary_of
        from serving.engines.profiling import prompt_maker

        torch.set_num_threads(1)
        self.flags = flags
        tokenizer = load_tokenizer(flags.model)
        model = load_ready(flags.model, device="cpu", precision="fp32")
        self.shape = ModelSizes.from_config(model.config.to_dict(), model.dtype.itemsize)
        most = flags.longest_prompt + flags.longest + 1
        self.limits = Limits(flags.max_batch, flags.max_batch * most, most)
        cost = CostModel.of(self.shape, "CPU")
        self.engine = make_engine("continuous", model, self.limits, cost, [])
        self.prompt_of, self.frame = prompt_maker(tokenizer, vocabulary_of(model))
        family = FAMILIES[tokenizer.family]
        self.known: list[tuple[list[int], int]] = []
        for row in read_lines(flags.lengths):
            ids = family.encode_prompt(tokenizer, row["prompt"], 1 << 20).input_ids
            tokens = min(row["output_tokens"] + row["finished"], flags.longest)
            if len(ids) <= flags.longest_prompt and tokens:
                self.known.append((ids, tokens))
        if not self.known:
            sys.exit(f"simulator_check.py: {flags.lengths}: no prompt of --longest_prompt tokens")

    def calibrate(self) -> tuple[CostModel, EngineOverheads]:
        """A profile of the engine and its overheads, by the processor's time."""
        from serving.engines.overheads import measure_overheads
        from serving.engines.profiling import measure_engine, powers

        limits, flags = self.limits, self.flags
        least = max(16, self.frame + 1)
        rows = measure_engine(
            CpuTimed(self.engine),  # type: ignore[arg-type]
            self.prompt_of,
            flags.model,
            self.shape.element_bytes,
            powers(1, limits.max_batch),
            powers(2 * least, int(limits.max_tokens / 1.6) - 16)[::2],
            powers(least, flags.longest_prompt),
            flags.repetitions,
        )
        timings = [row for row in rows if row is not None]
        profile = fit_profile(timings, DATASHEET_ON_CPU, PRIOR)
        cost = CostModel.of(self.shape, "CPU", profile)
        overheads = measure_overheads(
            self.engine, self.prompt_of, cost, time.process_time, flags.turns
        )
        return cost, overheads

    def requests(self, count: int, rate: float, seed: int) -> tuple[list[Request], list[list[int]]]:
        """(requests by arrival, ids of their prompts)."""
        rng = np.random.default_rng(seed)
        arrivals = poisson_arrivals(count, rate, rng)
        requests, prompts = [], []
        for i, at_s in enumerate(arrivals.tolist()):
            ids, tokens = self.known[int(rng.integers(len(self.known)))]
            guess = tokens * float(rng.lognormal(0.0, 0.5))
            edges = np.array([0.0, guess / 2, guess, 2 * guess, 4 * guess])
            prediction = from_bins(np.array([0.2, 0.3, 0.3, 0.2]), edges)
            requests.append(Request(i, len(ids), at_s, 40 / rate, prediction, tokens))
            prompts.append(ids)
        return requests, prompts

    def simulate(
        self, name: str, requests: list[Request], cost: CostModel, overheads: EngineOverheads | None
    ) -> dict[str, float]:
        engine = SimulatedEngine(cost, self.limits, padded=False, overheads=overheads)
        events = run_scheduler(POLICIES[name], engine, VirtualClock(), Replay(requests))
        return Collector().consume(events).summary()

    def serve(
        self, name: str, requests: list[Request], prompts: list[list[int]], cost: CostModel
    ) -> dict[str, float]:
        self.engine.cost = cost
        engine = CpuTimed(self.engine)
        arrivals = Submitting(requests, self.engine, prompts)
        events = run_scheduler(POLICIES[name], engine, CpuClock(), arrivals)
        return Collector().consume(events).summary()

    def capacity(self, cost: CostModel, overheads: EngineOverheads) -> float:
        """Requests a second when all are there at once, by simulation."""
        requests, _ = self.requests(200, 1e6, 0)
        done = self.simulate("fcfs", requests, cost, overheads)
        return done["requests"] / done["span_s"]

    def cell(self, name: str, load: float, rate: float, seed: int) -> dict[str, Any]:
        """One cell's figures."""
        cost, overheads = self.calibrate()
        requests, prompts = self.requests(self.flags.requests, rate, seed)
        measured = self.serve(name, requests, prompts, cost)
        bare = self.simulate(name, requests, cost, None)
        charged = self.simulate(name, requests, cost, overheads)
        return {
            "policy": name,
            "load": load,
            "rate": rate,
            "measured_s": measured["latency_mean_s"],
            "bare_s": bare["latency_mean_s"],
            "simulated_s": charged["latency_mean_s"],
            "overheads": overheads.to_dict(),
        }


DATASHEET_ON_CPU = DATASHEET.__class__(name="engine", device="CPU")


def off_by_pct(cell: dict[str, Any], side: str) -> float:
    """Simulated over measured mean latency, less 1, in percent."""
    return 100 * float(cell[side] / cell["measured_s"] - 1)


def print_table(cells: list[dict[str, Any]]) -> None:
    print("| policy | load | measured, s | simulated, s | off by | without overheads |")
    print("|---|---|---|---|---|---|")
    for cell in cells:
        print(
            f"| {cell['policy']} | {cell['load']:g} | {cell['measured_s']:.3f} "
            f"| {cell['simulated_s']:.3f} | {off_by_pct(cell, 'simulated_s'):+.1f} % "
            f"| {off_by_pct(cell, 'bare_s'):+.1f} % |"
        )
    for side in ("simulated_s", "bare_s"):
        errors = np.abs([off_by_pct(cell, side) for cell in cells])
        print(
            f"{side}: off by {np.median(errors):.1f} % in the median of {len(cells)} cells, "
            f"{errors.max():.1f} % at most"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--lengths", required=True, type=Path, help="prompts and answer lengths")
    parser.add_argument("--output", required=True, type=Path, help="cells, .json")
    parser.add_argument("--policies", default="fcfs,sjf,deadline,srpt", help="comma between them")
    parser.add_argument("--loads", default="0.4,0.7,0.9,1.2", help="shares of the capacity")
    parser.add_argument("--requests", type=int, default=100, help="of a cell [100]")
    parser.add_argument("--longest", type=int, default=128, help="answer tokens at most [128]")
    parser.add_argument("--longest_prompt", type=int, default=128, help="tokens at most [128]")
    parser.add_argument("--max_batch", type=int, default=8, help="answers at once [8]")
    parser.add_argument("--repetitions", type=int, default=2, help="timings of a setting [2]")
    parser.add_argument("--turns", type=int, default=5, help="timings of an overhead [5]")
    parser.add_argument("--cells", type=int, default=1000, help="cells that this run adds at most")
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    flags = CheckFlags(**vars(build_parser().parse_args(argv)))
    cells: list[dict[str, Any]] = []
    if flags.output.exists():
        cells = json.loads(flags.output.read_text(encoding="utf-8"))
    done = {(cell["policy"], cell["load"]) for cell in cells}
    wanted = []
    for load in map(float, flags.loads.split(",")):
        for name in flags.policies.split(","):
            if (name, load) not in done:
                wanted.append((name, load))
    if wanted and flags.cells:
        check = Check(flags)
        cost, overheads = check.calibrate()
        requests, prompts = check.requests(WARM_UP, 1e3, 1)
        check.serve("fcfs", requests, prompts, cost)
        capacity = cells[0]["rate"] / cells[0]["load"] if cells else 0.0
        capacity = capacity or check.capacity(cost, overheads)
        for name, load in wanted[: flags.cells]:
            seed = round(1000 * load)
            cells.append(check.cell(name, load, load * capacity, seed))
            write_json(flags.output, cells)
    print_table(cells)
    return cells


if __name__ == "__main__":
    main()
