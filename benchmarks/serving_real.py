# ruff: noqa: E402
"""Policies on the real continuous engine under an open-loop load, next to their simulation.

    bash scripts/quickstart.sh
    python benchmarks/serving_real.py --folder output/quickstart [--json FILE]
        [--policies fifo,s3,...] [--repetitions 3]

The quickstart's tuned model answers held-out prompts, drawn anew for each repetition, at Poisson
arrival times that do not wait for it. Its exported predictor runs in a separate process, predicts
when a prompt arrives, and its time counts. The rates are those at which, by simulation, each of
--at attains half of its objectives (SloRule: a multiple of the latency alone). Policies take turns
within a repetition. The simulator gets the same arrivals, lengths and predictions, and a profile of
the engine (scripts/profile_engine.py) made before each repetition: a shared machine's speed drifts.
"""

import argparse
import multiprocessing
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.cells import print_table
from benchmarks.rows import read_lines
from finetune.files import write_json
from predictor.prediction import LengthPrediction
from serving.cost_model.devices import find_device
from serving.cost_model.model import CostModel, ModelSizes, Profile
from serving.policies.continuous import POLICIES
from serving.request import Limits, Request
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import SimulatedEngine
from serving.simulate.statistics import Collector, interval
from serving.simulate.workload import SloRule, poisson_arrivals

SHOWN = ("attainment", "latency_mean_s", "latency_p99_s", "throughput_tps")


def run_predictor(pipe: Connection, folder: str) -> None:
    """The predictor's process: it sends a prediction at each time of every schedule received.

    A schedule is (zero_s, [(seconds, text or None)]).
    """
    from predictor.runtime import LengthPredictor

    predictor = LengthPredictor.from_pretrained(folder)
    while True:
        try:
            zero_s, calls = pipe.recv()
        except EOFError:
            return
        for at_s, text in calls:
            time.sleep(max(zero_s + at_s - time.perf_counter(), 0))
            pipe.send(None if text is None else predictor.predict(text)[0])


def without_prediction(r: Request) -> Request:
    return Request(r.id, r.prompt_tokens, r.arrival_s, r.slo_s, None, r.output_tokens)


class Bench:
    """A tuned model, its predictor, and prompts with known answers.

    Attributes:
        known_prompts: [(text, ids, answer tokens with the end token, prediction)].
    """

    def __init__(
        self,
        model: str,
        predictor: str,
        lengths: str,
        limits: Limits,
        max_src_len: int,
        max_new_tokens: int,
    ) -> None:
        from chatglm import load_tokenizer
        from chatglm.families import FAMILIES
        from finetune.evaluation.inference import load_ready
        from predictor.runtime import LengthPredictor
        from serving.engines import make_engine

        self.folder = model
        self.limits = limits
        self.longest = max_new_tokens
        self.tokenizer = load_tokenizer(model)
        self.model = load_ready(model, device="cpu")
        self.predictor = LengthPredictor.from_pretrained(predictor, served_model=model)
        family = FAMILIES[self.tokenizer.family]
        rows = read_lines(Path(lengths))
        predictions = self.predictor.predict([row["prompt"] for row in rows])
        self.known_prompts: list[tuple[str, list[int], int, LengthPrediction]] = []
        for row, prediction in zip(rows, predictions):
            ids = family.encode_prompt(self.tokenizer, row["prompt"], max_src_len).input_ids
            tokens = row["output_tokens"] + row["finished"]
            self.known_prompts.append((row["prompt"], ids, tokens, prediction))
        self.engine = make_engine("continuous", self.model, limits, CostModel.of(self.shape, "CPU"))
        # Of the first profile, so that objectives stay the same.
        self.objective_cost: CostModel | None = None
        begin = time.perf_counter()
        for row in rows:
            self.predictor.predict(row["prompt"])
        self.predict_s = (time.perf_counter() - begin) / len(rows)
        context = multiprocessing.get_context("spawn")  # a fork would take torch's threads along
        self._pipe, theirs = context.Pipe()
        context.Process(target=run_predictor, args=(theirs, predictor), daemon=True).start()

    @property
    def shape(self) -> ModelSizes:
        return ModelSizes.from_config(self.model.config.to_dict(), self.model.dtype.itemsize)

    def profile(
        self,
        repetitions: int,
        progress: Callable[[Iterator, int], Iterable] = lambda timings, total: timings,
    ) -> Profile:
        """Measure the engine; policies and simulator use the new profile from then on."""
        from serving.engines.profiling import profile_engine

        profile, _ = profile_engine(
            "continuous",
            self.model,
            self.tokenizer,
            self.folder,
            self.limits,
            "CPU",
            POLICIES["fcfs"],
            repetitions,
            progress,
        )
        self.engine.cost = CostModel.of(self.shape, find_device("CPU"), profile)
        self.objective_cost = self.objective_cost or self.engine.cost
        return profile

    def requests(
        self, count: int, rate: float, seed: int, slo: SloRule
    ) -> list[tuple[Request, int]]:
        """(request, which of `known_prompts`) by arrival."""
        rng = np.random.default_rng(seed)
        which = rng.integers(0, len(self.known_prompts), count)
        prompt_tokens, output_tokens = [], []
        for i in which:
            prompt_tokens.append(len(self.known_prompts[i][1]))
            output_tokens.append(self.known_prompts[i][2])
        prompts, outputs = np.array(prompt_tokens), np.array(output_tokens)
        slo_s = slo(prompts, outputs, self.objective_cost, rng)
        arrivals = poisson_arrivals(count, rate, rng)
        rows = zip(arrivals.tolist(), slo_s.tolist(), which.tolist())
        requests = []
        for n, (at_s, objective_s, i) in enumerate(rows):
            _, ids, tokens, prediction = self.known_prompts[i]
            request = Request(n, len(ids), at_s, objective_s, prediction, tokens, self.predict_s)
            requests.append((request, i))
        return requests

    def simulate(self, name: str, requests: list[tuple[Request, int]]) -> dict[str, float]:
        """Metrics of the simulated engine."""
        policy = POLICIES[name]
        engine = SimulatedEngine(self.engine.cost, self.limits, padded=False)
        seen = []
        for request, _ in requests:
            seen.append(request if policy.predicts else without_prediction(request))
        return (
            Collector()
            .consume(run_scheduler(policy, engine, VirtualClock(), Replay(seen)))
            .summary()
        )

    def serve(
        self, name: str, requests: list[tuple[Request, int]]
    ) -> tuple[dict[str, float], list[int]]:
        """(metrics, answer tokens by request) of the real engine."""
        from serving.engines import Inbox, Sampling, WallClock

        policy = POLICIES[name]
        clock = WallClock()
        inbox = Inbox(clock, self.engine)
        answers = []
        calls = []
        for request, which in requests:
            calls.append(
                (request.arrival_s, self.known_prompts[which][0] if policy.predicts else None)
            )
        self._pipe.send((clock.zero_s, calls))

        def feed() -> None:
            for request, which in requests:
                prediction = self._pipe.recv()
                ids = self.known_prompts[which][1]
                live = Request(request.id, len(ids), request.arrival_s, request.slo_s, prediction)
                answers.append(self.engine.submit(live, ids, Sampling(self.longest)))
                inbox.put(live)
            inbox.close()

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        metrics = Collector().consume(run_scheduler(policy, self.engine, clock, inbox))
        feeder.join()
        return metrics.summary(), [len(a.tokens) for a in answers]

    def rate_at(
        self, name: str, count: int, slo: SloRule, wanted: float = 0.5, rounds: int = 9
    ) -> float:
        """Requests per second at which the policy attains `wanted`, by simulation.

        Bisection of the logarithm, over 3 seeds.
        """
        low, high = 0.1, 1000.0
        for _ in range(rounds):
            rate = float(np.sqrt(low * high))
            attained = []
            for seed in range(3):
                requests = self.requests(count, rate, 100 + seed, slo)
                attained.append(self.simulate(name, requests)["attainment"])
            if np.mean(attained) > wanted:
                low = rate
            else:
                high = rate
        return float(np.sqrt(low * high))


@dataclass(frozen=True)
class BenchFlags:
    """The command's flags; see build_parser."""

    folder: Path
    policies: str
    at: str
    requests: int
    repetitions: int
    max_batch: int
    slo_scale: float
    profile_repetitions: int
    threads: int
    json: Path | None


def compare(
    bench: Bench,
    policies: list[str],
    rate: float,
    flags: BenchFlags,
    slo: SloRule,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """One row per policy: {policy, measured, simulated, other_answers}.

    `measured` and `simulated` are {metric: [by repetition]}; `other_answers` counts answers of
    another length than recorded.
    """
    rows: list[dict] = []
    for name in policies:
        sides = {"measured": defaultdict(list), "simulated": defaultdict(list)}
        rows.append({"policy": name, **sides, "other_answers": 0})
    for repetition in range(flags.repetitions):
        bench.profile(flags.profile_repetitions)
        requests = bench.requests(flags.requests, rate, repetition, slo)
        for row in rows:
            simulated = bench.simulate(row["policy"], requests)
            measured, lengths = bench.serve(row["policy"], requests)
            for length, (request, _) in zip(lengths, requests):
                row["other_answers"] += length != request.output_tokens
            for key in SHOWN:
                row["measured"][key].append(measured[key])
                row["simulated"][key].append(simulated[key])
            log(
                f"{rate:.1f}/s {repetition + 1}/{flags.repetitions} {row['policy']:15} "
                f"{measured['latency_mean_s']:8.3f} s, "
                f"simulated {simulated['latency_mean_s']:8.3f} s"
            )
    return rows


def print_rows(rate: float, rows: list[dict]) -> None:
    print(f"\n{rate:.1f} requests/s\n")
    columns = ["policy", "in time %, measured", "simulated", "mean latency s, measured"]
    columns += ["simulated", "off by", "p99 s, measured", "simulated", "tokens/s"]
    lines = []
    for row in rows:
        measured = row["measured"]
        simulated = row["simulated"]
        line = [
            row["policy"],
            shown(measured["attainment"], 100),
            shown(simulated["attainment"], 100),
            shown(measured["latency_mean_s"]),
            shown(simulated["latency_mean_s"]),
            f"{100 * off_by(row):+.1f} %",
            shown(measured["latency_p99_s"]),
            shown(simulated["latency_p99_s"]),
            shown(measured["throughput_tps"]),
        ]
        lines.append(line)
    print_table(columns, lines)


def shown(values: list[float], by: float = 1) -> str:
    """Mean and, where there is one, half the confidence interval of values times `by`."""
    mean, half = interval((by * np.array(values)).tolist())
    return f"{mean:.3g}" + ("" if np.isnan(half) else f" ± {half:.2g}")


def off_by(row: dict) -> float:
    """Simulated over measured mean latency, less 1."""
    return mean_latency(row, "simulated") / mean_latency(row, "measured") - 1


def mean_latency(row: dict, side: str) -> float:
    """Seconds; `side` is measured or simulated."""
    return float(np.mean(row[side]["latency_mean_s"]))


def order_of(rows: list[dict], side: str) -> list[str]:
    """The policies by mean latency, shortest first."""
    ordered = sorted(rows, key=lambda row: mean_latency(row, side))
    return [row["policy"] for row in ordered]


def print_orders(rows: list[dict], wrong: list[str]) -> None:
    """How far the simulation is off, and in which order each side has the policies."""
    furthest = np.abs(list(map(off_by, rows))).max()
    others = sum(row["other_answers"] for row in rows)
    print(
        f"\nlongest off by {100 * furthest:.1f} %; "
        f"measured: {' < '.join(order_of(rows, 'measured'))}; "
        f"simulated: {' < '.join(order_of(rows, 'simulated'))}; "
        f"pairs told the wrong way round: {', '.join(wrong) or 'none'}; "
        f"answers of another length than recorded: {others}"
    )


def contradictions(rows: list[dict]) -> list[str]:
    """Pairs ordered alike by mean latency in all repetitions, but reversed in simulation."""
    found = []
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            measured = np.subtract(a["measured"]["latency_mean_s"], b["measured"]["latency_mean_s"])
            simulated = mean_latency(a, "simulated") - mean_latency(b, "simulated")
            a_later = (measured > 0).all()
            a_sooner = (measured < 0).all()
            if (a_later and simulated < 0) or (a_sooner and simulated > 0):
                found.append(f"{a['policy']} and {b['policy']}")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("output/quickstart"),
        help="the quickstart's: merged, predictor, lengths_test.jsonl [output/quickstart]",
    )
    parser.add_argument(
        "--policies",
        default="fifo,s3,uellm_released,slo_odbs,fcfs,sjf,srpt,deadline",
        help="comma between them",
    )
    parser.add_argument(
        "--at",
        default="fifo,fcfs",
        help="load: where each of these attains half of its objectives, by simulation [fifo,fcfs]",
    )
    parser.add_argument("--requests", type=int, default=300, help="of each run [300]")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max_batch", type=int, default=16, help="answers made at once [16]")
    parser.add_argument(
        "--slo_scale",
        type=float,
        default=5.0,
        help="objective: so many times the latency alone [5]",
    )
    parser.add_argument("--profile_repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def parse_flags(argv: list[str] | None) -> BenchFlags:
    """The flags, checked; a wrong one ends the process with a line."""
    parser = build_parser()
    flags = BenchFlags(**vars(parser.parse_args(argv)))
    for name in [*flags.policies.split(","), *flags.at.split(",")]:
        if name not in POLICIES:
            parser.error(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    for needed in ("merged", "predictor", "lengths_test.jsonl"):
        if not (flags.folder / needed).exists():
            sys.exit(
                f"serving_real.py: no such file: {flags.folder / needed}; "
                "--folder names what scripts/quickstart.sh wrote"
            )
    return flags


def main(argv: list[str] | None = None) -> dict:
    flags = parse_flags(argv)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(flags.threads)
    limits = Limits(flags.max_batch, flags.max_batch * 256, 256)
    bench = Bench(
        str(flags.folder / "merged"),
        str(flags.folder / "predictor"),
        str(flags.folder / "lengths_test.jsonl"),
        limits,
        120,
        96,
    )
    profile = bench.profile(
        flags.profile_repetitions,
        lambda timings, total: tqdm(timings, total=total, desc="profile", disable=None),
    )
    errors = profile.made["errors"]["5_folds"]
    print(
        f"engine profile: median {100 * errors['median_abs_error']:.1f} %, "
        f"P90 {100 * errors['p90_abs_error']:.1f} % off in 5 folds; "
        f"a prediction takes {1e3 * bench.predict_s:.2f} ms"
    )
    result = {
        "settings": asdict(flags) | {"folder": str(flags.folder), "json": str(flags.json)},
        "profile": errors,
        "predict_s": bench.predict_s,
        "loads": compare_loads(bench, flags),
    }
    if flags.json:
        write_json(flags.json, result)
    return result


def compare_loads(bench: Bench, flags: BenchFlags) -> list[dict]:
    """The policies at the rate of each of --at; printed."""
    slo = SloRule(flags.slo_scale, 0.05)
    bench.serve("fcfs", bench.requests(40, 40.0, 999, slo))  # warm
    loads = []
    for name in flags.at.split(","):
        rate = bench.rate_at(name, flags.requests, slo)
        rows = compare(
            bench,
            flags.policies.split(","),
            rate,
            flags,
            slo,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        print_rows(rate, rows)
        wrong = contradictions(rows)
        print_orders(rows, wrong)
        loads.append({"at": name, "rate": rate, "rows": rows, "wrong": wrong})
    return loads


if __name__ == "__main__":
    main()
