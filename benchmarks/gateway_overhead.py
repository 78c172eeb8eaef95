"""What the gateway costs: CPU time a request, latency beside the upstream's own, open streams.

    python benchmarks/gateway_overhead.py [--rate 50] [--seconds 30] [--chunks 0,16]
        [--streams 2000] [--predictor DIR] [--cores 0,1] [--quick] [--json FILE]

An upstream of this file (whole answers, or streams of so many events) and the gateway run in
processes of their own; this one asks both, in turns, at random moments of the rate. CPU time is the
gateway's process's, user and system. The predictor is lexical, trained here on 400 rows unless one
is given. Then --streams streams are open at once, each with an event every --pause_s; the gateway
is bound to one core for it. Exit code 1 where an answer is missing.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving_load import cpu_seconds, quantile  # noqa: E402
from chatglm.commands import child_environment, run_command, whole  # noqa: E402
from finetune.files import write_json  # noqa: E402
from serving.gateway.command import raise_file_limit  # noqa: E402

WORDS = ["name", "list", "explain", "essay", "river", "lamp", "train", "winter", "garden", "music"]
PATH = "/v1/chat/completions"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"word"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
WHOLE = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 60}}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 60, "total_tokens": 80},
}
WHOLE["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
ANSWER_S = 0.02  # of the upstream, for a whole answer, and between the events of a stream's share
FIRST_REQUESTS = 50  # not counted


# ---- the upstream, a process of its own


async def serve_upstream() -> None:
    """Answer until a signal: `chunks` and `pause_s` of a body say how."""
    from aiohttp import web

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        asked = json.loads(body) if body else {}
        if not asked.get("stream"):
            await asyncio.sleep(ANSWER_S if asked else 0)
            return web.json_response(WHOLE)
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for _ in range(asked["chunks"]):
            await reply.write(EVENT)
            await asyncio.sleep(asked["pause_s"])
        await reply.write(LAST)
        return reply

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    port = runner.addresses[0][1]
    print(f"upstream at http://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


@contextmanager
def running(words: list[str], first: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, address) of a command that prints `first` and its address."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=child_environment(threads=1),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith(first):
            raise ValueError(f"{' '.join(words)}: did not start")
        yield process, line.removeprefix(first).strip().removesuffix("/v1")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def train_lexical(folder: Path) -> Path:
    """A lexical predictor of random lengths: what it costs does not depend on what it learned."""
    from train import main as train

    draw = random.Random(0)
    lines = []
    for number in range(400):
        prompt = " ".join([*draw.choices(WORDS, k=12), str(number)])
        tokens = round(draw.lognormvariate(4, 1))
        row = {"prompt": prompt, "output_tokens": tokens, "served_model": "m", "finished": True}
        lines.append(json.dumps(row) + "\n")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines))
    words = ["--task", "predictor", "--backbone", "lexical", "--train_path", str(rows)]
    if code := train([*words, "--output_dir", str(folder / "predictor")]):
        raise ValueError(f"the predictor could not be trained (exit code {code})")
    return folder / "predictor"


# ---- the client


@dataclass
class Asked:
    """What came of the requests of one subject.

    Attributes:
        first_s: to the first byte of each answer's body. whole_s: to its last.
    """

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    errors: int = 0
    cpu_s: float = 0.0


def body_of(draw: random.Random, chunks: int, pause_s: float) -> bytes:
    content = " ".join(draw.choices(WORDS, k=30))
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": content}]}
    if chunks:
        body |= {"stream": True, "chunks": chunks, "pause_s": pause_s}
    return json.dumps(body).encode()


async def ask(session: Any, base: str, body: bytes, found: Asked) -> None:
    began_s, first_s = time.perf_counter(), 0.0
    try:
        async with session.post(base + PATH, data=body) as reply:
            async for _ in reply.content.iter_any():
                first_s = first_s or time.perf_counter() - began_s
            if reply.status != 200:
                raise OSError(f"HTTP {reply.status}")
    except OSError:
        found.errors += 1
        return
    found.first_s.append(first_s)
    found.whole_s.append(time.perf_counter() - began_s)


async def load(base: str, flags: argparse.Namespace, chunks: int, count: int, seed: int) -> Asked:
    """`count` requests at random moments of the rate."""
    import aiohttp

    draw, found, tasks = random.Random(seed), Asked(), []
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        at_s = time.perf_counter()
        for _ in range(count):
            at_s += draw.expovariate(flags.rate)
            await asyncio.sleep(max(at_s - time.perf_counter(), 0))
            body = body_of(draw, chunks, ANSWER_S / max(chunks, 1))
            tasks.append(asyncio.create_task(ask(session, base, body, found)))
        await asyncio.gather(*tasks)
    return found


def compare(
    flags: argparse.Namespace, upstream: str, gateway: tuple[subprocess.Popen, str], chunks: int
) -> dict[str, float]:
    """The gateway's CPU time a request, and latencies with it and without, in milliseconds."""
    process, address = gateway
    subjects: dict[str, Asked] = {"direct": Asked(), "gateway": Asked()}
    asyncio.run(load(address, flags, chunks, FIRST_REQUESTS, 1))
    count = max(int(flags.rate * flags.seconds / flags.turns), 1)
    for turn in range(flags.turns):
        for name, base in (("direct", upstream), ("gateway", address)):
            before_s = cpu_seconds(process.pid)
            found = asyncio.run(load(base, flags, chunks, count, 2 + turn))
            total = subjects[name]
            total.cpu_s += cpu_seconds(process.pid) - before_s
            total.first_s += found.first_s
            total.whole_s += found.whole_s
            total.errors += found.errors
    direct, passed = subjects["direct"], subjects["gateway"]
    # What the gateway does while nobody asks it, such as looking after its upstream.
    cpu_s = passed.cpu_s - direct.cpu_s
    figures = {"chunks": chunks, "requests": len(passed.whole_s)}
    figures |= {"errors": direct.errors + passed.errors}
    figures["cpu_ms"] = 1000 * cpu_s / max(len(passed.whole_s), 1)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        for what in ("first_s", "whole_s"):
            with_it = quantile(getattr(passed, what), share)
            without = quantile(getattr(direct, what), share)
            figures[f"{what[:-2]}_{name}_ms"] = 1000 * (with_it - without)
            figures[f"direct_{what[:-2]}_{name}_ms"] = 1000 * without
    return figures


async def open_streams(base: str, streams: int, pause_s: float) -> Asked:
    """So many streams at once; each begins within the first second."""
    import aiohttp

    draw, found = random.Random(5), Asked()
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)

    async def begin_one(session: Any) -> None:
        await asyncio.sleep(draw.uniform(0, max(streams / 400, 0.1)))
        await ask(session, base, body_of(draw, 4, pause_s), found)

    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout
    ) as session:
        await asyncio.gather(*(begin_one(session) for _ in range(streams)))
    return found


def measure_streams(
    process: subprocess.Popen, address: str, streams: int, pause_s: float
) -> dict[str, float]:
    """What became of them, and what the gateway's process took."""
    cpu_s, began_s = cpu_seconds(process.pid), time.perf_counter()
    found = asyncio.run(open_streams(address, streams, pause_s))
    cpu_s = cpu_seconds(process.pid) - cpu_s
    return {
        "streams": streams,
        "whole": len(found.whole_s),
        "errors": found.errors,
        "seconds": time.perf_counter() - began_s,
        "gateway_cpu_s": cpu_s,
        "first_p50_ms": 1000 * statistics.median(found.first_s or [0.0]),
        "rss_mib": resident_mib(process.pid),
    }


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def table(costs: list[dict[str, float]], streams: dict[str, float]) -> str:
    lines = ["| events | requests | CPU a request | first byte, p50, p99 | whole, p50, p99 |"]
    lines.append("|---|---|---|---|---|")
    for row in costs:
        first = f"{row['first_p50_ms']:+.1f} ms, {row['first_p99_ms']:+.1f} ms"
        last = f"{row['whole_p50_ms']:+.1f} ms, {row['whole_p99_ms']:+.1f} ms"
        name = row["chunks"] or "whole answer"
        count = f"{row['requests']} ({row['errors']} errors)"
        lines.append(f"| {name} | {count} | {row['cpu_ms']:.2f} ms | {first} | {last} |")
    lines.append("")
    lines.append(
        f"{streams['streams']} streams open at once: {streams['whole']} whole, "
        f"{streams['errors']} errors, in {streams['seconds']:.0f} s; the gateway took "
        f"{streams['gateway_cpu_s']:.1f} s of CPU time and {streams['rss_mib']:.0f} MiB; "
        f"first byte after {streams['first_p50_ms']:.0f} ms (median)"
    )
    return "\n".join(lines)


def measure(flags: argparse.Namespace) -> int:
    if flags.cores:
        os.sched_setaffinity(0, {int(core) for core in flags.cores.split(",")})
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="gateway-") as work:
        predictor = flags.predictor or train_lexical(Path(work))
        with running([__file__, "--as_upstream"], "upstream at ") as (_, upstream):
            words = ["-m", "serving.gateway", "--upstream", upstream, "--kind", "vllm"]
            words += ["--predictor", str(predictor), "--port", "0"]
            with running(words, "gateway at ") as gateway:
                costs = []
                for chunks in flags.chunks.split(","):
                    costs.append(compare(flags, upstream, gateway, int(chunks)))
                process, address = gateway
                one_core = {max(os.sched_getaffinity(0))}
                os.sched_setaffinity(process.pid, one_core)
                streams = measure_streams(process, address, flags.streams, flags.pause_s)
    print(table(costs, streams))
    if flags.json:
        write_json(Path(flags.json), {"costs": costs, "streams": streams})
    failed = streams["errors"] or sum(row["errors"] for row in costs)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second [50]")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each subject [30]")
    parser.add_argument("--turns", type=whole(1), default=5, help="of the two subjects [5]")
    events = "events of a stream, with commas; 0 is a whole answer [0,16]"
    parser.add_argument("--chunks", default="0,16", help=events)
    parser.add_argument("--streams", type=whole(1), default=2000, help="open at once [2000]")
    pause = "seconds between the events of those streams [5]"
    parser.add_argument("--pause_s", type=float, default=5.0, help=pause)
    parser.add_argument("--predictor", help="folder (default: a lexical one, trained here)")
    parser.add_argument("--cores", help="of all processes, with commas (default: any)")
    parser.add_argument("--quick", action="store_true", help="a miniature, for tests")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--as_upstream", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.as_upstream:
        asyncio.run(serve_upstream())
        return 0
    if flags.quick:
        flags.seconds, flags.turns, flags.streams, flags.pause_s = 1.0, 1, 30, 0.1
    return run_command("gateway_overhead", lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
