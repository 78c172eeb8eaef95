"""Replica processes: their throughput against one's, and what becomes of answers under kill -9.

    python benchmarks/replicas.py [--requests 96] [--repetitions 5] [--kills 10] [--quick]
        [--json FILE]

The model is that of benchmarks/serving_engine.py (6 layers of 512, a vocabulary of 65,024, random
weights), in fp32 on the CPU; each request has its own number of tokens, log-normal, median 100.
    1 x 1    one replica process of one thread
    2 x 1    two replica processes of one thread each
    1 x 2    one replica process of two threads
All requests arrive at once and are dealt out by predicted tokens (here the true lengths: none of
these figures depends on a predictor's errors). A ratio is taken within each repetition, whose
subjects run one after another; the table shows medians.

Then, on 2 x 1 under load, a random replica is killed at a random moment, --kills times; every
answer is compared, token for token, with that of the undisturbed pool, and each token must have
come once.
"""

import argparse
import itertools
import json
import operator
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engines import Answer
    from serving.replicas.pool import ReplicaPool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SUBJECTS = {"1 x 1": (1, 1), "2 x 1": (2, 1), "1 x 2": (1, 2)}  # (processes, threads of each)
ids = itertools.count()


def save_model(folder: Path) -> None:
    """Write the model of benchmarks/serving_engine.py, in fp32."""
    from benchmarks.serving_engine import make_model

    make_model().float().save_pretrained(folder)


def open_pool(folder: Path, processes: int, threads: int, rows: int) -> "ReplicaPool":
    from finetune.placing import ReplicaSpec, StageSpec
    from serving.cost_model.model import CostModel, ModelSizes
    from serving.engines.stage_reports import ModelLoading
    from serving.replicas.messages import ReplicaJob
    from serving.replicas.pool import ReplicaPool
    from serving.replicas.served_model import ServedModel
    from serving.request import Limits

    limits = Limits(max_batch=rows, kv_tokens=1024 * rows, max_tokens=1024)
    cost = CostModel.of(ModelSizes.from_config(folder, 4), "CPU")
    served = ServedModel(ModelLoading(str(folder), mode="glm2", precision="fp32"))
    jobs = []
    for number in range(processes):
        placement = ReplicaSpec((StageSpec("cpu", 0, 6, threads),))
        job = ReplicaJob(number, served, placement, limits, cost)
        jobs.append(job)
    pool = ReplicaPool(jobs)
    pool.open()
    pool.start(lambda event: None, lambda: None)
    return pool


class AskedWork:
    """Requests given to a pool at once.

    Attributes:
        seen: the tokens of each answer as they came.
    """

    def __init__(self, pool: "ReplicaPool", work: list[tuple[list[int], int]]) -> None:
        from predictor.prediction import LengthPrediction, from_bins
        from serving.engines import Sampling
        from serving.request import Request

        self.seen: list[list[int]] = []
        self.answers: list[Answer] = []
        for place, (prompt, length) in enumerate(work):
            import numpy as np

            edges = np.array([0.0, max(length - 1, 1), length + 1])
            prediction: LengthPrediction = from_bins(np.array([0.0, 1.0]), edges)
            arrival_s = pool.clock.now_s()
            request = Request(next(ids), len(prompt), arrival_s, 1e6, prediction)
            sampling = Sampling(length, ignore_stops=True)
            self.seen.append([])
            listener = self._listener(place)
            self.answers.append(pool.submit(request, prompt, sampling, listener))
            pool.enqueue(request)

    def _listener(self, place: int):
        def note(answer: "Answer", token: int | None) -> None:
            if token is not None:
                self.seen[place].append(token)

        return note

    def tokens(self) -> list[list[int]]:
        """Of every answer, once all have ended."""
        made = []
        for answer in self.answers:
            answer.wait()
            made.append(answer.tokens)
        return made


def count_different(a: list[list[int]], b: list[list[int]]) -> int:
    """At how many places two lists differ."""
    return sum(map(operator.ne, a, b))


def timed_tokens_per_s(pool: "ReplicaPool", work: list[tuple[list[int], int]]) -> float:
    begin = time.perf_counter()
    made = AskedWork(pool, work).tokens()
    return sum(map(len, made)) / (time.perf_counter() - begin)


def measure_throughput(
    flags: argparse.Namespace, pools: dict[str, "ReplicaPool"]
) -> dict[str, list[float]]:
    """{subject: answer tokens a second of each repetition}."""
    from benchmarks.serving_engine import workload

    rates: dict[str, list[float]] = defaultdict(list)
    for repetition in range(flags.repetitions + 1):
        work = workload(flags.requests, flags.cap, repetition)
        for name, pool in pools.items():
            rate = timed_tokens_per_s(pool, work)
            if repetition:  # the first warms up
                rates[name].append(rate)
    return rates


def measure_kills(flags: argparse.Namespace, pool: "ReplicaPool") -> list[dict[str, Any]]:
    """What became of the answers, and how long until the replica was back, for each kill."""
    from benchmarks.serving_engine import workload

    work = workload(flags.requests, flags.cap, 1000)
    wanted = AskedWork(pool, work).tokens()
    begin = time.perf_counter()
    AskedWork(pool, work).tokens()
    alone_s = time.perf_counter() - begin
    draw, found = random.Random(0), []
    for _ in range(flags.kills):
        victim = draw.choice(pool.replicas)
        moment_s = draw.uniform(0.0, alone_s)
        before = pool.requeued
        asked = AskedWork(pool, work)
        time.sleep(moment_s)
        streaming = sum(bool(a.tokens) and a.reason is None for a in asked.answers)
        assert victim.process is not None
        victim.process.kill()
        killed_s = time.monotonic()
        tokens = asked.tokens()
        answered_s = time.monotonic() - killed_s
        while len(pool.ready_replicas()) < 2 or victim.process.poll() is not None:
            time.sleep(0.01)
        assert victim.ready is not None
        row = {
            "moment_s": moment_s,
            "streaming": streaming,
            "moved": pool.requeued - before,
            "lost": count_different(tokens, wanted),
            "doubled": count_different(asked.seen, tokens),
            "answered_s": answered_s,
            "recovered_s": victim.ready_s - killed_s,
            "loading_s": victim.ready.seconds,
        }
        found.append(row)
        print(", ".join(f"{name} {round(value, 2)}" for name, value in row.items()), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--cap", type=int, default=512, help="longest answer, in tokens")
    parser.add_argument("--rows", type=int, default=16, help="answers at once, of each replica")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a miniature, for the tests")
    parser.add_argument("--json")
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.requests, flags.cap, flags.rows, flags.repetitions, flags.kills = 6, 24, 4, 1, 1
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        pools = {}
        for name, (processes, threads) in SUBJECTS.items():
            if threads == 1 or not flags.quick:
                pools[name] = open_pool(Path(folder), processes, threads, flags.rows)
        rates = measure_throughput(flags, pools)
        print(f"\n{'':<8} {'tokens/s':>9} {'against 1 x 1':>14}")
        for name, values in rates.items():
            ratios = list(map(operator.truediv, values, rates["1 x 1"]))
            rate, ratio = statistics.median(values), statistics.median(ratios)
            print(f"{name:<8} {rate:>9.0f} {ratio:>14.2f}", flush=True)
        kills = measure_kills(flags, pools["2 x 1"]) if flags.kills else []
        for pool in pools.values():
            pool.stop(10)
    found = {"tokens_per_s": rates, "kills": kills}
    lost = sum(map(operator.itemgetter("lost"), kills))
    doubled = sum(map(operator.itemgetter("doubled"), kills))
    print(f"{len(kills)} kills: {lost} answers lost or changed, {doubled} with tokens doubled")
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(lost or doubled))


if __name__ == "__main__":
    sys.exit(main())
