# ruff: noqa: E402
"""A causal model on the real continuous engine under open-loop arrivals: policies by predicted
length, with and without re-reading, against first come first served.

    python benchmarks/length_serving.py --model DIR --lengths lengths_test.jsonl --predictor DIR
        [--rereader DIR] --cells FILE [--policies fcfs,boost,sjf,...] [--loads 0.8,1.2]
        [--arrivals poisson,bursty] [--requests 150] [--repetitions 5] [--minutes 60]

A cell is one policy at one load, one kind of arrivals, one repetition; policies take turns within
a repetition and get the same requests. Cells are lines of --cells, written as they end: the same
command goes on where it was stopped, and ends by itself after --minutes. The table is printed of
the cells there are.

Answers are sampled as the lengths were collected, each with its line's own seed. The engine
computes every pass, under a clock of CPU seconds: arrivals come by it, idle time is skipped, and
the speed that other programs take is divided out (benchmarks/steady.py). Capacity: answers a second
when all requests wait at once, first come first served; policies know the costs of passes that were
fitted there. Prompts are predicted in turn, beside the engine as if on a core of its own, and a
request is seen only when its prediction is made; re-reading takes the engine's own time.
A policy's name with +read: the same engine reads its answers again while they are written.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.cells import Cell, KeptCells, compared_lines, in_turns, print_table, split_by
from benchmarks.steady import (
    SteadyTimer,
    TimedEngine,
    TimerClock,
    calibrate,
    fitted_cost,
    short_forward,
)
from chatglm.commands import Parser, number, run_command, whole
from finetune.config import PRECISIONS, parse_positive
from finetune.rows.sources import good_items, read_json_items
from scripts.collect_lengths import row_seed
from serving.policies.continuous import POLICIES
from serving.request import Limits, Request
from serving.scheduler import Replay, run_scheduler
from serving.simulate.engine import LinearCost
from serving.simulate.statistics import Collector
from serving.simulate.workload import gamma_arrivals, poisson_arrivals

READ = "+read"
COLLECTED = {"prompt", "output_tokens", "finished", "sample", "seed", "settings"}  # of a line
ARRIVALS = {"poisson": poisson_arrivals, "bursty": gamma_arrivals}
SHOWN = {  # column -> metric
    "mean s": "latency_mean_s",
    "p99 s": "latency_p99_s",
    "in time %": "attainment",
    "in time a second": "goodput_rps",
    "largest wait s": "largest_wait_s",
}


@dataclass(frozen=True)
class KnownAnswer:
    """A prompt of the lengths file, and the answer that was collected for it.

    Attributes:
        ids: the prompt's token ids. tokens: of the answer, its end token included.
        seed: of its sampling, as scripts/collect_lengths.py had it.
    """

    prompt: str
    ids: list[int]
    tokens: int
    seed: int


@dataclass(frozen=True)
class LengthServingFlags:
    """The command's flags; build_parser has their meaning and defaults."""

    model: str
    lengths: Path
    predictor: str
    rereader: str | None
    cells: Path
    policies: str
    loads: tuple[float, ...]
    arrivals: str
    requests: int
    repetitions: int
    max_batch: int
    slo_scale: float
    precision: str
    minutes: float

    def cell_list(self) -> list[Cell]:
        """Every cell, in the order in which they are run: policies take turns."""
        policies = self.policies.split(",")
        cells = []
        for repetition in range(self.repetitions):
            for load in self.loads:
                for arrivals in self.arrivals.split(","):
                    for policy in in_turns(policies, repetition):
                        cell = {"policy": policy, "arrivals": arrivals, "load": load}
                        cells.append(cell | {"repetition": repetition})
        return cells


class ServedModel:
    """The model with its engines, its predictor and the answers that are known.

    Attributes:
        machine: of steady.calibrate: the capacity, and what costs are fitted to.
    """

    def __init__(self, flags: LengthServingFlags) -> None:
        from chatglm import load_tokenizer
        from chatglm.families import family_of
        from finetune.evaluation.inference import load_ready
        from predictor.runtime import LengthPredictor

        rows = read_collected(flags.lengths)
        self.sampling = sampling_of(rows[0])
        model = load_ready(flags.model, device="cpu", precision=flags.precision)
        tokenizer = load_tokenizer(flags.model)
        family = family_of(tokenizer)
        self.known: list[KnownAnswer] = []
        for row in rows:
            settings = row["settings"]
            ids = family.encode_prompt(tokenizer, row["prompt"], settings["max_src_len"]).input_ids
            seed = row_seed(row["seed"] or 0, row["prompt"], row["sample"])
            tokens = row["output_tokens"] + row["finished"]
            self.known.append(KnownAnswer(row["prompt"], ids, tokens, seed))
        longest = self.sampling["max_new_tokens"] + 2
        longest += max(len(answer.ids) for answer in self.known)
        limits = Limits(flags.max_batch, flags.max_batch * longest, longest, 256)
        self.timer = SteadyTimer(short_forward(model))
        self.engine = TimedEngine(model, limits, LinearCost(limits.kv_tokens), timer=self.timer)
        self.reading_engine: TimedEngine | None = None
        if flags.rereader is not None:
            from predictor.rereading import Rereader

            rereader = Rereader.from_pretrained(flags.rereader, flags.model)
            cost = LinearCost(limits.kv_tokens)
            self.reading_engine = TimedEngine(
                model, limits, cost, rereader=rereader, timer=self.timer
            )
        self.predictor = LengthPredictor.from_pretrained(flags.predictor)
        self.machine: dict[str, Any] = {}

    def calibrate(self, count: int) -> dict[str, Any]:
        """As steady.calibrate."""

        def serve_drawn(number: int, rate: float, seed: int) -> tuple[float, float]:
            rng = np.random.default_rng(seed)
            drawn = rng.integers(0, len(self.known), number).tolist()
            arrivals = np.cumsum(rng.exponential(1 / rate, number)).tolist()
            requests = []
            for which, at_s in zip(drawn, arrivals, strict=True):
                request = Request(len(requests), len(self.known[which].ids), at_s, 1e9)
                requests.append((request, which))
            finish_s = np.sort(self.run("fcfs", requests).columns["finish_s"])
            # Until the batch begins to empty: the last answers run in a smaller one.
            full = max(number - self.engine.limits.max_batch, number // 2)
            return self.busy_s, full / float(finish_s[full - 1])

        return calibrate(self.engine, count, serve_drawn)

    def use_machine(self, machine: dict[str, Any]) -> None:
        """Go by a calibration, this run's or an earlier one's of the same cells."""
        self.machine = machine
        self.timer.usual_s = machine["reference_s"]
        for engine in filter(None, (self.engine, self.reading_engine)):
            engine.cost = fitted_cost(machine, engine.limits)

    def requests(self, cell: Cell, count: int, slo_scale: float) -> list[tuple[Request, int]]:
        """(request, which of `known`) by arrival: the same for all policies of a repetition."""
        rng = np.random.default_rng([cell["repetition"], round(100 * cell["load"])])
        which = rng.integers(0, len(self.known), count)
        arrivals = ARRIVALS[cell["arrivals"]](count, cell["load"] * self.machine["capacity"], rng)
        typical = round(float(np.mean([answer.tokens for answer in self.known])))
        classes = rng.choice([0.5, 1.0, 2.0], count)
        cost = self.engine.cost
        requests = []
        for place, at_s in enumerate(arrivals.tolist()):
            ids = self.known[which[place]].ids
            alone_s = cost.prefill_s(len(ids)) + cost.decode_s(1, len(ids) + 1, typical)
            slo_s = float(slo_scale * classes[place] * alone_s)
            requests.append((Request(place, len(ids), at_s, slo_s), int(which[place])))
        return requests

    def run(self, name: str, requests: list[tuple[Request, int]]) -> Collector:
        """Serve them; a Collector of what happened."""
        from serving.engines import Sampling

        policy = POLICIES[name.removesuffix(READ)]
        engine = self.reading_engine if name.endswith(READ) else self.engine
        assert engine is not None  # main() asks for --rereader with +read
        if policy.predicts:
            requests = self.predicted(requests)
        for request, which in requests:
            known = self.known[which]
            engine.submit(request, known.ids, Sampling(seed=known.seed, **self.sampling))
        engine.clear()
        clock = TimerClock(self.timer)
        arrivals = Replay([request for request, _ in requests])
        collector = Collector().consume(run_scheduler(policy, engine, clock, arrivals))
        self.busy_s = clock.now_s() - clock.idle_s
        return collector

    def predicted(self, requests: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """The requests with their predictions, made in turn: each waits for those before it."""
        found = []
        free_s = 0.0
        for request, which in requests:
            begin_s = self.timer()
            prediction = self.predictor.predict(self.known[which].prompt)[0]
            free_s = max(free_s, request.arrival_s) + self.timer() - begin_s
            waited_s = free_s - request.arrival_s
            found.append((replace(request, prediction=prediction, predict_s=waited_s), which))
        return found


def read_collected(path: Path) -> list[dict]:
    """The lines of a file of scripts/collect_lengths.py.

    Raises:
        ValueError: one is none, or there are none.
    """
    rows = []
    for place, item in good_items(read_json_items(path)):
        if not isinstance(item, dict) or not item.keys() >= COLLECTED:
            raise ValueError(f"{place}: not a line of collect_lengths.py")
        rows.append(item)
    if not rows:
        raise ValueError(f"--lengths {path}: no rows")
    return rows


def parse_loads(text: str) -> tuple[float, ...]:
    """Numbers above 0, comma between them."""
    return tuple(map(number(above=True), text.split(",")))


def sampling_of(row: dict) -> dict:
    """How the answers of a lengths file were sampled, as Sampling takes it."""
    settings = row["settings"]
    sampling = {"max_new_tokens": settings["max_new_tokens"]}
    for name in ("temperature", "top_p"):
        if name in settings:
            sampling[name] = settings[name]
    return sampling


def run_cells(flags: LengthServingFlags) -> list[dict]:
    """Run the cells that are not there yet, until the minutes are over; all rows there are."""
    depends_on: dict[str, Any] = {
        "model": flags.model,
        "predictor": flags.predictor,
        "rereader": flags.rereader,
    }
    depends_on |= {"lengths": str(flags.lengths), "requests": flags.requests}
    depends_on |= {"max_batch": flags.max_batch, "slo_scale": flags.slo_scale}
    depends_on |= {"precision": flags.precision}
    kept = KeptCells(flags.cells, depends_on, ["capacity"])
    cells = flags.cell_list()
    if not kept.missing(cells):
        return kept.rows
    begin = time.perf_counter()
    served = ServedModel(flags)
    machine = kept.note("capacity", lambda: served.calibrate(flags.requests))
    served.use_machine(machine)
    print(f"capacity {machine['capacity']:.3g} answers/s", file=sys.stderr)

    def measure(cell: Cell) -> dict[str, Any]:
        requests = served.requests(cell, flags.requests, flags.slo_scale)
        collector = served.run(cell["policy"], requests)
        return collector.summary() | {"reread": collector.counts.get("reread", 0)}

    spent = (time.perf_counter() - begin) / 60
    return kept.run_missing(cells, measure, flags.minutes - spent, describe_row)


def describe_row(row: dict) -> str:
    name = f"{row['policy']} {row['arrivals']} {row['load']} ({row['repetition'] + 1})"
    return f"{name}: mean {row['latency_mean_s']:.2f} s"


def print_tables(rows: list[dict]) -> None:
    """One table for each kind of arrivals and load: means over repetitions; pairs against fcfs."""
    columns = ["policy", "runs", *SHOWN, "mean against fcfs %", "p99 against fcfs %"]
    for arrivals, of_arrivals in sorted(split_by(rows, "arrivals").items()):
        for load, group in sorted(split_by(of_arrivals, "load").items()):
            print(f"\n{arrivals} arrivals at {load} of capacity\n")
            against = ("latency_mean_s", "latency_p99_s")
            print_table(columns, compared_lines(group, "policy", SHOWN, against))


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="length_serving.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model that the continuous engine runs")
    add("--lengths", type=Path, required=True, help="of held-out prompts, by collect_lengths.py")
    add("--predictor", required=True, help="predicts at arrival")
    add("--rereader", help="a predictor of --backbone states, for policies with +read")
    add("--cells", type=Path, required=True, help="JSON lines to write, or to go on with")
    add("--policies", default="fcfs,sjf,deadline", help="comma between them; +read re-reads")
    add(
        "--loads",
        type=parse_loads,
        default="0.8,1.2",
        help="shares of the capacity [0.8,1.2]",
    )
    add("--arrivals", default="poisson,bursty", help="of poisson, bursty [both]")
    add("--requests", type=whole(2), default=150, help="of each cell [150]")
    add("--repetitions", type=parse_positive, default=5)
    add("--max_batch", type=parse_positive, default=16, help="answers made at once [16]")
    add(
        "--slo_scale",
        type=number(above=True),
        default=5.0,
        help="objective: so many times a typical answer",
    )
    add("--precision", choices=PRECISIONS, default="auto", help="of the weights [auto]")
    add("--minutes", type=number(), default=1e9, help="begin no cell after so many [no limit]")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = LengthServingFlags(**vars(parser.parse_args(argv)))
    for name in flags.policies.split(","):
        if name.removesuffix(READ) not in POLICIES:
            parser.error(f"--policies: no policy {name!r}; there are {', '.join(POLICIES)}")
        if name.endswith(READ) and flags.rereader is None:
            parser.error(f"--policies {name}: wants --rereader")
    for name in flags.arrivals.split(","):
        if name not in ARRIVALS:
            parser.error(f"--arrivals: wanted poisson or bursty; got {name!r}")

    def run() -> None:
        import torch

        torch.set_num_threads(1)
        print_tables(run_cells(flags))

    return run_command("length_serving.py", run)


if __name__ == "__main__":
    sys.exit(main())
