# ruff: noqa: E402
"""Predicted lengths in front of a real vLLM: its own order, the gateway's priorities, the scheduler
class, and our continuous engine, under open-loop arrivals over HTTP.

    python benchmarks/vllm_priorities.py --model DIR --lengths heldout.jsonl --predictor DIR
        --cells FILE [--systems fcfs,priority,scheduler,continuous] [--loads 0.8,1.2]
        [--requests 60] [--max_batch 16] [--repetitions 3] [--policy boost_work] [--minutes 60]

A cell is one system at one load, one repetition; systems take turns within a repetition and get the
same prompts, seeds and moments of arrival. Cells are lines of --cells, written as they end: the
same command goes on where it was stopped. Every cell starts its server anew, warms it, and counts
from the first arrival to the last answer; latency counts from a request's arrival. Capacity:
answers a second of vLLM's own order when all requests wait at once; with few requests for each of
--max_batch the machine empties at the end, and the loads are smaller than they say. The "short
half" are the requests whose answers in that very cell had the fewest tokens. Tokens a CPU second
are of the server's processes, the gateway's among them: on a machine that does other work it is the
fairer of the two rates. vLLM runs in an environment of its own (benchmarks/client_env.py vllm).
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cells import Cell, KeptCells, compared_lines, in_turns, print_table, split_by
from benchmarks.client_env import environment_python
from benchmarks.rows import read_lines
from benchmarks.serving_load import TICK_S, cpu_seconds, quantile
from chatglm.commands import Parser, child_environment, number, run_command, whole

NAME = "model"
START_S = 600.0
SCHEDULER = "serving.gateway.vllm_scheduler.LengthScheduler"
# The words of vLLM's command, and the gateway's kind before it; None: clients ask vLLM itself.
VLLM: dict[str, tuple[list[str], str | None]] = {
    "fcfs": ([], None),
    "priority": (["--scheduling-policy", "priority"], "vllm"),
    "scheduler": (["--scheduler-cls", SCHEDULER], "vllm-length"),
}
SYSTEMS = (*VLLM, "continuous")
SHOWN = {  # column -> metric
    "mean s": "mean_s",
    "p99 s": "p99_s",
    "mean of the short half s": "short_s",
    "in time %": "in_time",
    "tokens/s": "tokens_per_s",
    "tokens a CPU s": "tokens_per_cpu_s",
}
AGAINST = ("mean_s", "p99_s", "short_s", "tokens_per_cpu_s")


@dataclass(frozen=True)
class Asked:
    """A request: when it comes, what it asks, and by when it wants its answer."""

    at_s: float
    prompt: str
    seed: int
    slo_s: float


@dataclass(frozen=True)
class Answered:
    latency_s: float
    tokens: int
    in_time: bool


# ---- servers


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def tree_of(pid: int) -> list[int]:
    """A process and those below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


@contextmanager
def running(words: list[Any], log: Path, **variables: str) -> Iterator[int]:
    """The id of a command's process, whose output goes to `log`; it is ended with its children."""
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, words)),
            cwd=log.parent,
            env=child_environment(threads=1) | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_ready(url: str, log: Path) -> None:
    """Until a server answers; raises ValueError with its last lines when it does not."""
    import httpx

    begin = time.monotonic()
    while time.monotonic() - begin < START_S:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise ValueError(f"{url} did not answer in {START_S:g} s: {log.read_text()[-1500:]}")


@contextmanager
def serving(system: str, flags: argparse.Namespace) -> Iterator[tuple[str, list[int]]]:
    """(address that clients ask, its processes' first ids) of one system."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        if system == "continuous":
            words = [sys.executable, "-m", "serving.server", "--model", flags.model, "--port", port]
            words += ["--predictor", flags.predictor, "--policy", flags.policy, "--device", "cpu"]
            words += ["--precision", flags.precision, "--max_batch", flags.max_batch]
            words += ["--kv_tokens", flags.max_batch * flags.max_tokens, "--no_page"]
            words += ["--max_tokens", flags.max_tokens, "--served_model_name", NAME]
            ids = [stack.enter_context(running(words, place / "server.log"))]
            wait_ready(f"{address}/health/ready", place / "server.log")
            yield address, ids
            return
        more, kind = VLLM[system]
        dtype = {"bf16": "bfloat16", "fp32": "float32"}[flags.precision]
        words = [environment_python("vllm").with_name("vllm"), "serve", flags.model]
        words += ["--port", port, "--host", "127.0.0.1", "--served-model-name", NAME]
        words += ["--dtype", dtype, "--max-model-len", flags.max_tokens]
        words += ["--max-num-seqs", flags.max_batch, "--enable-force-include-usage", *more]
        words += ["--enforce-eager"] if flags.eager else []
        variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        ids = [stack.enter_context(running(words, place / "vllm.log", **variables))]
        wait_ready(f"{address}/health", place / "vllm.log")
        if kind is None:
            yield address, ids
            return
        own = free_port()
        words = [sys.executable, "-m", "serving.gateway", "--upstream", address, "--port", own]
        words += ["--kind", kind, "--predictor", flags.predictor, "--policy", flags.policy]
        words += ["--predict_ms", 1000]
        ids.append(stack.enter_context(running(words, place / "gateway.log")))
        wait_ready(f"http://127.0.0.1:{own}/health/ready", place / "gateway.log")
        yield f"http://127.0.0.1:{own}", ids


# ---- the client


async def ask(session: Any, address: str, asked: Asked, flags: argparse.Namespace) -> Answered:
    body = {"model": NAME, "messages": [{"role": "user", "content": asked.prompt}]}
    body |= {"temperature": 0.7, "top_p": 0.9, "seed": asked.seed, "max_tokens": flags.cap}
    begin = time.perf_counter()
    async with session.post(f"{address}/v1/chat/completions", json=body) as reply:
        found = await reply.json()
        if reply.status != 200:
            raise ValueError(f"HTTP {reply.status}: {json.dumps(found)[:300]}")
    latency_s = time.perf_counter() - begin
    tokens = found["usage"]["completion_tokens"]
    return Answered(latency_s, tokens, latency_s <= asked.slo_s)


async def ask_all(address: str, work: list[Asked], flags: argparse.Namespace) -> list[Answered]:
    """Each at its moment."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin = time.perf_counter()
        tasks = []
        for asked in work:
            await asyncio.sleep(max(begin + asked.at_s - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(ask(session, address, asked, flags)))
        return await asyncio.gather(*tasks)


def cpu_of(ids: list[int]) -> float:
    total = 0.0
    for first in ids:
        for pid in tree_of(first):
            total += cpu_seconds(pid)
    return total


def serve_work(system: str, work: list[Asked], flags: argparse.Namespace) -> dict[str, float]:
    """Figures of a system that answers the work, warmed by two requests."""
    with serving(system, flags) as (address, ids):
        warm = [Asked(0.0, work[0].prompt, 1, 1e9)] * 2
        asyncio.run(ask_all(address, warm, flags))
        before_s, begin = cpu_of(ids), time.perf_counter()
        answers = asyncio.run(ask_all(address, work, flags))
        wall_s, cpu_s = time.perf_counter() - begin, cpu_of(ids) - before_s
    return figures(answers, wall_s, cpu_s)


def figures(answers: list[Answered], wall_s: float, cpu_s: float) -> dict[str, float]:
    by_length = sorted(answers, key=lambda answer: answer.tokens)
    short = by_length[: max(len(answers) // 2, 1)]
    latencies, tokens_of, in_time = zip(*map(astuple, answers))
    tokens = sum(tokens_of)
    return {
        "requests": len(answers),
        "mean_s": mean(latencies),
        "p99_s": quantile(list(latencies), 0.99),
        "short_s": mean(answer.latency_s for answer in short),
        "in_time": mean(in_time),
        "tokens": tokens,
        "tokens_per_s": tokens / wall_s,
        "tokens_per_cpu_s": tokens / max(cpu_s, TICK_S),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
    }


# ---- cells


def work_of(cell: Cell, rows: list[dict], machine: dict, flags: argparse.Namespace) -> list[Asked]:
    """The same for all systems of a repetition and load."""
    draw = random.Random(f"{cell['repetition']} {cell['load']}")
    work, at_s = [], 0.0
    for _ in range(flags.requests):
        at_s += draw.expovariate(cell["load"] * machine["capacity"])
        slo_s = flags.slo_scale * draw.choice((0.5, 1.0, 2.0)) * machine["alone_s"]
        work.append(Asked(at_s, draw.choice(rows)["prompt"], draw.randrange(2**31), slo_s))
    return work


def measure_machine(rows: list[dict], flags: argparse.Namespace) -> dict[str, float]:
    """vLLM's capacity, in answers a second, and an answer's mean time alone."""
    draw = random.Random(0)
    with serving("fcfs", flags) as (address, _):
        alone = [Asked(0.0, draw.choice(rows)["prompt"], n, 1e9) for n in range(4)]
        alone_s = 0.0
        for asked in alone:
            alone_s += asyncio.run(ask_all(address, [asked], flags))[0].latency_s / len(alone)
        once = [replace_moment(asked, draw, rows) for asked in alone * (flags.requests // 4 or 1)]
        begin = time.perf_counter()
        asyncio.run(ask_all(address, once, flags))
        return {"capacity": len(once) / (time.perf_counter() - begin), "alone_s": alone_s}


def replace_moment(asked: Asked, draw: random.Random, rows: list[dict]) -> Asked:
    """Another prompt, at once."""
    return Asked(0.0, draw.choice(rows)["prompt"], draw.randrange(2**31), asked.slo_s)


def cell_list(flags: argparse.Namespace) -> list[Cell]:
    systems = flags.systems.split(",")
    for name in systems:
        if name not in SYSTEMS:
            raise ValueError(f"--systems: wanted some of {', '.join(SYSTEMS)}, got {name!r}")
    cells = []
    for repetition in range(flags.repetitions):
        for load in map(float, flags.loads.split(",")):
            for system in in_turns(systems, repetition):
                cells.append({"system": system, "load": load, "repetition": repetition})
    return cells


def run_cells(flags: argparse.Namespace) -> list[dict]:
    """Run the cells that are not there yet, until the minutes are over; all rows there are."""
    settings = {name: str(getattr(flags, name)) for name in KEPT}
    cells = cell_list(flags)
    kept = KeptCells(flags.cells, settings, ["capacity"])
    rows = read_lines(flags.lengths)
    begin = time.monotonic()
    machine = kept.note("capacity", lambda: measure_machine(rows, flags))
    print(f"capacity {machine['capacity']:.3g} answers/s", file=sys.stderr, flush=True)

    def measure(cell: Cell) -> dict[str, float]:
        return serve_work(cell["system"], work_of(cell, rows, machine, flags), flags)

    def describe(row: dict) -> str:
        return (
            f"{row['system']} {row['load']} ({row['repetition'] + 1}): mean {row['mean_s']:.2f} s"
        )

    spent = (time.monotonic() - begin) / 60
    return kept.run_missing(cells, measure, flags.minutes - spent, describe)


def print_tables(rows: list[dict]) -> None:
    """One table for each load: means over repetitions, and pairs against vLLM's own order."""
    columns = ["system", "runs", *SHOWN, *(f"{name} against fcfs %" for name in AGAINST)]
    for load, group in sorted(split_by(rows, "load").items()):
        print(f"\n{load} of capacity\n")
        print_table(columns, compared_lines(group, "system", SHOWN, AGAINST))


KEPT = (
    *("model", "lengths", "predictor", "requests", "policy", "precision", "eager", "cap"),
    "max_batch",
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vllm_priorities",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a folder that vLLM and this project open")
    parser.add_argument("--lengths", type=Path, required=True, help="rows with prompts")
    parser.add_argument("--predictor", required=True, help="of the model's lengths")
    parser.add_argument("--cells", type=Path, required=True, help="where cells are kept")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="[%(default)s]")
    parser.add_argument("--loads", default="0.8,1.2", help="of capacity [%(default)s]")
    parser.add_argument("--requests", type=whole(4), default=60, help="of a cell [60]")
    parser.add_argument("--repetitions", type=whole(), default=3, help="[3]")
    parser.add_argument(
        "--policy", default="boost_work", help="the gateway's and ours [%(default)s]"
    )
    parser.add_argument("--max_batch", type=whole(), default=16, help="answers at once [16]")
    parser.add_argument("--cap", type=whole(), default=512, help="longest answer, in tokens [512]")
    parser.add_argument("--max_tokens", type=whole(), default=2048, help="with its prompt [2048]")
    parser.add_argument("--slo_scale", type=number(above=True), default=5.0, help="[5]")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="[bf16]")
    parser.add_argument("--eager", action="store_true", help="vLLM without compiling")
    parser.add_argument("--minutes", type=number(above=True), default=60.0, help="[60]")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = build_parser().parse_args(argv)
    return run_command("vllm_priorities", lambda: print_tables(run_cells(flags)))


if __name__ == "__main__":
    sys.exit(main())
