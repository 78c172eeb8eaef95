"""A server under load: many clients, clients that leave, HTTP's cost, hostile requests.

    python benchmarks/serving_load.py steady --clients 200 --minutes 10
    python benchmarks/serving_load.py disconnects --clients 1000
    python benchmarks/serving_load.py cost --clients 16 --repetitions 5
    python benchmarks/serving_load.py hostile --requests 10000

Each starts serving.server with a random model, prints its figures and writes them to --json. Exit
code 1 where something is wrong: an error, a 5xx, memory that stays reserved, sockets that stay
open, a probe's answer that changed. `cost` compares the CPU time of the server's process with that
of a process that runs the same requests through the scheduler without HTTP.
"""

import argparse
import asyncio
import json
import os
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.client_env import environment_python  # noqa: E402
from benchmarks.serving_attack import (  # noqa: E402
    PROBES,
    ROOT,
    TIMEOUT_S,
    Attack,
    launch,
    make_model,
    post,
)
from chatglm.commands import run_command  # noqa: E402
from finetune.files import write_json  # noqa: E402
from serving.engines import Answer, Sampling  # noqa: E402
from serving.request import Request  # noqa: E402

SAMPLES = 40  # of memory within a steady run
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SMALL = {"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128}
MIDDLE = {"hidden_size": 512, "num_layers": 8, "heads": 8, "ffn": 1408}
LEAVES = ("body", "waiting", "stream", "half", "reset")
WORDS = [
    "list",
    "river",
    "lamp",
    "garden",
    "name",
    "explain",
    "essay",
    "a",
    "b",
    "c",
    "1",
    "2",
    "3",
]


def never_end(folder: Path) -> None:
    """Greedy answers of a ChatGLM2 folder go on to max_tokens: the end token's logit is 0."""
    from safetensors.torch import load_file, save_file

    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    for name in weights:
        if name.endswith("output_layer.weight"):
            weights[name][2] = 0
    save_file(weights, file, {"format": "pt"})


def body_of(draw: random.Random, max_tokens: int, **fields: object) -> dict:
    text = " ".join(draw.choices(WORDS, k=12))
    message = {"role": "user", "content": text}
    asked = {"messages": [message], "temperature": 0, "max_tokens": max_tokens}
    return asked | {"stream": True} | fields


def request_bytes(body: dict, path: str = "/v1/chat/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


# ---- a server's process


@dataclass
class ServerProcess:
    """A server, its port, and what the system says of its process."""

    process: subprocess.Popen
    port: int
    model: Path
    errors: Path

    def rss_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise ValueError("the server's process has ended")

    def cpu_s(self) -> float:
        return cpu_seconds(self.process.pid)

    def sockets(self) -> int:
        count = 0
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(OSError):
                count += os.readlink(link).startswith("socket:")
        return count

    def settled_sockets(self, wanted: int, seconds: float = 10.0) -> int:
        """Open sockets, once they are as few as `wanted` or the time is over."""
        until = time.monotonic() + seconds
        while (found := self.sockets()) > wanted and time.monotonic() < until:
            time.sleep(0.1)
        return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def limits_of(flags: argparse.Namespace) -> list:
    words = ["--max_batch", flags.max_batch, "--kv_tokens", flags.max_batch * 512]
    return [*words, "--max_tokens", 512, "--policy", flags.policy, "--device", "cpu"]


@contextmanager
def serving(flags: argparse.Namespace, faults: list[str], sizes: dict) -> Iterator[ServerProcess]:
    """A server of a random model; what goes wrong at its end is added to `faults`."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), **sizes)
        never_end(model)
        errors = Path(folder) / "errors.txt"
        words = ["--model", model, "--port", 0, "--drain_s", 10, "--client_s", 5]
        words += ["--served_model_name", "m", "--max_queue", 4096, "--max_connections", 8192]
        with open(errors, "w") as file:
            process, port = launch([*words, *limits_of(flags)], file)
        try:
            yield ServerProcess(process, port, model, errors)
            process.send_signal(signal.SIGTERM)
            if code := process.wait(30):
                faults.append(f"the server ended with {code}")
            if "Traceback" in (said := errors.read_text()):
                faults.append(f"the server wrote a traceback: ...{said[-1500:]}")
        finally:
            process.kill()
            process.wait()


# ---- clients, on raw connections: a client must cost much less than what it measures


@dataclass
class Figures:
    """What a set of clients saw."""

    requests: int = 0
    errors: Counter = field(default_factory=Counter)
    error_times_s: list[float] = field(default_factory=list)  # since the clients began
    begin_s: float = field(default_factory=time.monotonic)
    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)


@dataclass
class Client:
    """One keep-alive connection that reads streams."""

    port: int
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes, figures: Figures) -> None:
        """Send a request, read its whole stream, and note its times."""
        try:
            if self.writer is None:
                opened = asyncio.open_connection("127.0.0.1", self.port)
                self.reader, self.writer = await opened
            await asyncio.wait_for(self._exchange(request, figures), TIMEOUT_S)
        except (OSError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
            figures.errors[f"{type(error).__name__}: {str(error)[:100]}"] += 1
            figures.error_times_s.append(time.monotonic() - figures.begin_s)
            self.close()
        figures.requests += 1

    async def _exchange(self, request: bytes, figures: Figures) -> None:
        assert self.reader is not None and self.writer is not None
        begin = time.perf_counter()
        self.writer.write(request)
        found, events, first_s = b"", 0, None
        while not found.endswith(b"0\r\n\r\n"):
            piece = await self.reader.read(65536)
            if not piece:
                raise ConnectionError("the stream ended early")
            events += piece.count(b"data: ")
            if first_s is None and events > 1:  # the first event has only the role
                first_s = time.perf_counter() - begin
            found = (found + piece)[-4096:] if first_s is not None else found + piece
            if first_s is None and not b"HTTP/1.1 200".startswith(found[:12]):
                raise ValueError(found[:100].decode("latin-1"))
        if b"data: [DONE]" not in found or b'"error"' in found:
            raise ValueError(f"no whole stream: {found[-200:].decode('latin-1')}")
        assert first_s is not None
        figures.ttft_s.append(first_s)
        figures.total_s.append(time.perf_counter() - begin)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def ask_until(
    port: int, clients: int, seed: int, until: Callable[[], bool], max_tokens: int
) -> Figures:
    """`clients` clients, each asking one request after the other until `until()` is true."""
    figures = Figures()

    async def one(seed: int) -> None:
        own, client = random.Random(seed), Client(port)
        while not until():
            tokens = own.randint(max(1, max_tokens // 2), max_tokens)
            await client.ask(request_bytes(body_of(own, tokens)), figures)
            if own.random() < 0.1:  # a new connection now and then
                client.close()
        client.close()

    await asyncio.gather(*map(one, range(seed, seed + clients)))
    return figures


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def slope_per_minute(samples: list[tuple[float, float]]) -> float:
    """Least squares of (seconds, value) pairs, a minute."""
    if len({seconds for seconds, _ in samples}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*samples)).slope * 60


# ---- steady


def steady(flags: argparse.Namespace) -> dict:
    """Concurrent streaming clients for some minutes."""
    faults: list[str] = []
    with serving(flags, faults, SMALL) as server:
        attack, sockets = Attack(server.port, flags.seed), server.sockets()
        samples: list[tuple[float, float]] = [(0.0, server.rss_mib())]
        begin, seconds = time.monotonic(), flags.minutes * 60

        async def watch() -> None:
            for number in range(1, SAMPLES + 1):
                pause = begin + number * seconds / SAMPLES - time.monotonic()
                await asyncio.sleep(max(pause, 0))
                samples.append((time.monotonic() - begin, server.rss_mib()))

        async def run() -> Figures:
            watching = asyncio.create_task(watch())
            found = await ask_until(
                server.port,
                flags.clients,
                flags.seed,
                lambda: time.monotonic() - begin > seconds,
                flags.tokens,
            )
            await watching
            return found

        cpu_s = server.cpu_s()
        found = asyncio.run(run())
        took, cpu_s = time.monotonic() - begin, server.cpu_s() - cpu_s
        attack.wait_until_idle()
        left = server.settled_sockets(sockets)
        faults += attack.faults
    if found.errors:
        times = ", ".join(f"{seconds:.1f}" for seconds in found.error_times_s[:20])
        said = dict(found.errors.most_common(5))
        faults.append(f"errors of clients: {said}, after seconds {times}")
    if left > sockets:
        faults.append(f"{left} sockets are open, {sockets} at the start")
    quarter, half, end = SAMPLES // 4, SAMPLES // 2, SAMPLES
    return {
        "clients": flags.clients,
        "seconds": took,
        "requests": found.requests,
        "errors": found.errors.total(),
        "requests_per_s": found.requests / took,
        "server_cpu_share": cpu_s / took,
        "ttft_p50_s": quantile(found.ttft_s, 0.5),
        "ttft_p99_s": quantile(found.ttft_s, 0.99),
        "latency_p50_s": quantile(found.total_s, 0.5),
        "rss_mib": [samples[place][1] for place in (0, quarter, half, end)],
        "rss_slope_mib_per_minute": slope_per_minute(samples[quarter:]),
        "sockets": [sockets, left],
        "faults": faults,
    }


# ---- disconnects


async def leave_at_random(port: int, draw: random.Random, kind: str) -> None:
    """One client that disconnects in the way that `kind` of LEAVES says."""
    request = request_bytes(body_of(draw, 200, stream=kind != "waiting" or draw.random() < 0.5))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if kind == "body":
            writer.write(request[: draw.randrange(1, len(request))])
            await asyncio.sleep(draw.random() * 0.05)
            return
        writer.write(request)
        if kind == "waiting":
            await asyncio.sleep(draw.random() * 0.05)
            return
        if kind == "half":
            writer.write_eof()
        wanted = draw.randrange(1, 6000)
        while wanted > 0 and (piece := await asyncio.wait_for(reader.read(512), TIMEOUT_S)):
            wanted -= len(piece)
        if kind == "reset":
            writer.transport.abort()
    finally:
        writer.close()


def disconnects(flags: argparse.Namespace) -> dict:
    """Clients that leave at random points; afterwards everything is as before."""
    faults: list[str] = []
    left_by: Counter = Counter()
    with serving(flags, faults, SMALL) as server:
        attack = Attack(server.port, flags.seed)
        before = list(map(attack.probe, PROBES))
        sockets = server.sockets()

        async def run() -> None:
            limit = asyncio.Semaphore(flags.at_once)

            async def one(seed: int) -> None:
                own = random.Random(seed)
                kind = own.choice(LEAVES)
                async with limit:
                    try:
                        await leave_at_random(server.port, own, kind)
                        left_by[kind] += 1
                    except ConnectionError:  # the server has closed first
                        left_by[f"{kind}, closed by the server"] += 1
                    except (OSError, TimeoutError, asyncio.TimeoutError) as error:
                        faults.append(f"{kind}: {type(error).__name__}: {error}")

            await asyncio.gather(*map(one, range(flags.seed, flags.seed + flags.clients)))

        begin = time.monotonic()
        asyncio.run(run())
        took = time.monotonic() - begin
        attack.wait_until_idle()
        idle_s = time.monotonic() - begin - took
        after = list(map(attack.probe, PROBES))
        if after != before:
            faults.append(f"the probes said {before} before and {after} after")
        left = server.settled_sockets(sockets)
        faults += attack.faults
    if left > sockets:
        faults.append(f"{left} sockets are open, {sockets} at the start")
    return {
        "clients": flags.clients,
        "left": dict(left_by),
        "seconds": took,
        "idle_after_s": idle_s,
        "sockets": [sockets, left],
        "faults": faults,
    }


# ---- the cost of HTTP


class BareEngine:
    """A model behind the scheduler as serving.server loads it, without HTTP and monitor."""

    def __init__(self, flags: argparse.Namespace) -> None:
        from serving.server.flags import parse_flags
        from serving.server.starting import load_service

        words = ["--model", flags.model, *limits_of(flags)]
        self.service = load_service(parse_flags(list(map(str, words))))
        self.flags, self.count = flags, 0
        self.service.backend.start(lambda event: None, lambda: None)

    def _submit(self, ids: list[int], ttft_s: list[float], ended: queue.SimpleQueue) -> None:
        backend, begin = self.service.backend, time.perf_counter()
        self.count += 1
        request = Request(self.count, len(ids), backend.clock.now_s(), 60.0, None)

        def listen(answer: Answer, token: int | None) -> None:
            if len(answer.tokens) == 1:
                ttft_s.append(time.perf_counter() - begin)
            if answer.reason is not None:
                ended.put(None)

        backend.submit(request, ids, Sampling(max_new_tokens=self.flags.tokens), listen)
        backend.enqueue(request)

    def run_set(self, seed: int) -> dict:
        """A set of requests, as many at once as there are clients; as http_set's result."""
        from serving.server.chat import encode_messages, parse_body

        prompts = []
        for body in bodies_of_set(self.flags, seed):
            prompts.append(encode_messages(self.service.tokenizer, parse_body(body).messages))
        ended: queue.SimpleQueue = queue.SimpleQueue()
        ttft_s: list[float] = []
        cpu_s, begin = time.process_time(), time.perf_counter()
        for place, ids in enumerate(prompts):
            if place >= self.flags.clients:  # one more only after another has ended
                ended.get()
            self._submit(ids, ttft_s, ended)
        for _ in prompts[: self.flags.clients]:
            ended.get()
        found = {"cpu_s": time.process_time() - cpu_s, "seconds": time.perf_counter() - begin}
        return found | {"ttft_s": ttft_s}


def run_bare_engine(flags: argparse.Namespace) -> dict:
    """Run sets of requests without HTTP: a seed a line in, a line of JSON out (used by cost)."""
    engine = BareEngine(flags)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.run_set(int(line))), flush=True)
    return {"faults": []}


def bodies_of_set(flags: argparse.Namespace, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [body_of(draw, flags.tokens) for _ in range(flags.requests)]


def http_set(server: ServerProcess, flags: argparse.Namespace, seed: int) -> dict:
    """The set of requests over HTTP, from as many clients; its CPU time and times."""
    requests = list(map(request_bytes, bodies_of_set(flags, seed)))
    figures = Figures()

    async def one(client: Client) -> None:
        while requests:
            await client.ask(requests.pop(0), figures)
        client.close()

    async def run() -> None:
        await asyncio.gather(*[one(Client(server.port)) for _ in range(flags.clients)])

    cpu_s, begin = server.cpu_s(), time.perf_counter()
    asyncio.run(run())
    found = {"cpu_s": server.cpu_s() - cpu_s, "seconds": time.perf_counter() - begin}
    return found | {"ttft_s": figures.ttft_s, "errors": figures.errors.total()}


def cost(flags: argparse.Namespace) -> dict:
    """CPU time and times to first tokens of the same requests over HTTP and without it."""
    faults: list[str] = []
    sizes = MIDDLE | {"hidden_size": flags.hidden_size, "num_layers": flags.layers}
    with serving(flags, faults, sizes) as server:
        words = [sys.executable, __file__, "engine", "--model", server.model]
        for name in ("clients", "requests", "tokens", "max_batch", "policy"):
            words += [f"--{name}", getattr(flags, name)]
        child = subprocess.Popen(
            list(map(str, words)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        assert child.stdin is not None and child.stdout is not None
        pairs = []
        try:
            if child.stdout.readline() != "ready\n":
                raise ValueError("the process without HTTP did not start")
            for seed in range(flags.repetitions + 1):
                over_http = http_set(server, flags, seed)
                child.stdin.write(f"{seed}\n")
                child.stdin.flush()
                bare = json.loads(child.stdout.readline())
                if seed:  # the first only warms up
                    pairs.append((over_http, bare))
        finally:
            child.kill()
            child.wait()
    return cost_figures(flags, sizes, pairs) | {"faults": faults}


def cost_figures(flags: argparse.Namespace, sizes: dict, pairs: list[tuple[dict, dict]]) -> dict:
    """Medians over the repetitions; ttft of all requests of each side."""
    ratios, http_ttft, bare_ttft = [], [], []
    for over_http, bare in pairs:
        ratios.append(over_http["cpu_s"] / bare["cpu_s"] - 1)
        http_ttft += over_http["ttft_s"]
        bare_ttft += bare["ttft_s"]
    tokens = flags.requests * flags.tokens
    http_s = [over_http["cpu_s"] for over_http, _ in pairs]
    bare_s = [bare["cpu_s"] for _, bare in pairs]
    http_p50, bare_p50 = statistics.median(http_ttft), statistics.median(bare_ttft)
    return {
        "model": sizes,
        "clients": flags.clients,
        "requests": flags.requests,
        "tokens": flags.tokens,
        "errors": sum(over_http["errors"] for over_http, _ in pairs),
        "http_cpu_s": http_s,
        "bare_cpu_s": bare_s,
        "cost_share": statistics.median(ratios),
        "cost_us_per_token": statistics.median(
            [1e6 * (over - bare) / tokens for over, bare in zip(http_s, bare_s)]
        ),
        "bare_us_per_token": statistics.median([1e6 * seconds / tokens for seconds in bare_s]),
        "ttft_p50_ms": [1000 * http_p50, 1000 * bare_p50],
        "ttft_cost_ms": 1000 * (http_p50 - bare_p50),
    }


# ---- hostile requests


def post_paths(port: int) -> list[str]:
    """The paths of /openapi.json that take a body."""
    document = json.loads(post(port, b"", method="GET", path="/openapi.json")[1])
    return [path for path, methods in document["paths"].items() if "post" in methods]


def send_bytes(port: int, content: bytes) -> bytes:
    """What a server answers to these bytes before it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client:
        try:
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
            return client.recv(4096)
        except ConnectionError:
            return b""


def random_bytes(port: int, count: int, draw: random.Random, faults: list[str]) -> Counter:
    """Bytes that are no HTTP, or HTTP with changed bytes."""
    statuses: Counter = Counter()
    paths = post_paths(port)
    for _ in range(count):
        content = draw.randbytes(draw.randrange(1, 2000))
        if draw.random() < 0.7:
            whole = bytearray(request_bytes(body_of(draw, 4, stream=False), draw.choice(paths)))
            for _ in range(draw.randrange(1, 6)):
                whole[draw.randrange(len(whole))] = draw.randrange(256)
            content = bytes(whole)
        reply = send_bytes(port, content)
        status = reply[9:12].decode("latin-1") if reply.startswith(b"HTTP/") else "closed"
        statuses[status] += 1
        if status.startswith("5"):
            faults.append(f"random bytes got {status}: {content[:300]!r}")
    return statuses


def drawn_bodies(port: int, count: int, faults: list[str]) -> Counter:
    """JSON that hypothesis draws: any values under the names of the paths' own fields."""
    import hypothesis.strategies as st
    from hypothesis import HealthCheck, given, settings

    document = json.loads(post(port, b"", method="GET", path="/openapi.json")[1])
    names: set[str] = {"messages", "prompt", "input"}
    for schema in document["components"]["schemas"].values():
        names |= set(schema.get("properties", ()))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    key = st.sampled_from(sorted(names | {"role", "content", "type", "text"})) | st.text()

    def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=5)

    values = st.recursive(scalars, nested, max_leaves=12)
    messages = st.just([{"role": "user", "content": "x"}])
    legal = st.fixed_dictionaries({"messages": messages, "prompt": st.just("x")})
    drawn = st.dictionaries(key, values, max_size=6)
    merged = st.tuples(legal, drawn).map(lambda pair: pair[0] | {"max_tokens": 4} | pair[1])
    statuses: Counter = Counter()

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(path=st.sampled_from(post_paths(port)), body=merged | drawn | values)
    def send(path: str, body: object) -> None:
        status, reply = post(port, json.dumps(body).encode(), path=path)
        statuses[status] += 1
        assert status < 500 and b'"server_error"' not in reply, f"{status} {reply[:300]!r}"

    try:
        send()
    except AssertionError as error:
        faults.append(f"a drawn body: {error}; {' '.join(getattr(error, '__notes__', []))[:600]}")
    return statuses


CHECKS_TOML = """\
# What JSON Schema cannot say is refused with 400: the order of roles, a prompt and an answer that
# are too long together, fields that need or exclude each other, another model's name (404).
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "429"]
"""


def schemathesis(port: int, flags: argparse.Namespace, faults: list[str]) -> dict:
    """All checks over /openapi.json, negative data included; the last lines of what it said."""
    program = environment_python("schemathesis").with_name("schemathesis")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CHECKS_TOML)
        words = [program, "--config-file", config, "run", f"http://127.0.0.1:{port}/openapi.json"]
        words += ["--phases", "examples,coverage,fuzzing", "--checks", "all", "--no-color"]
        words += ["-n", flags.examples, "--seed", flags.seed, "--continue-on-failure"]
        words += ["--warnings", "off", "--request-timeout", TIMEOUT_S]
        words += ["--exclude-path", "/page/api/live"]  # it never ends
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=folder)
    said = done.stdout
    if done.returncode:
        begin = max(said.find("= FAILURES ="), said.find("= ERRORS ="), 0)
        faults.append(f"schemathesis: {said[begin : begin + 4000] or done.stderr[-1000:]}")
    cases = 0
    if "Test cases:" in said:
        cases = int(said.split("Test cases:")[1].split("generated")[0].replace(",", "").strip())
    return {"cases": cases, "exit_code": done.returncode}


def hostile(flags: argparse.Namespace) -> dict:
    """Bodies of serving_attack, drawn bodies and random bytes, schemathesis: no 5xx."""
    faults: list[str] = []
    found: dict = {}
    with serving(flags, faults, SMALL) as server:
        if flags.examples:
            found["schemathesis"] = schemathesis(server.port, flags, faults)
        attack = Attack(server.port, flags.seed)
        attack.run(flags.requests // 2, 3600, threads=4)
        drawn = flags.requests // 4
        found["drawn"] = drawn_bodies(server.port, drawn, faults)
        draw = random.Random(flags.seed)
        found["bytes"] = random_bytes(server.port, drawn, draw, faults)
        attack.wait_until_idle()
        faults += attack.faults
    statuses: Counter = Counter()
    for (_, status), count in attack.sent.items():
        statuses[status] += count
    found["attack"] = statuses
    sent = statuses.total() + found["drawn"].total() + found["bytes"].total()
    found["requests"] = sent + found.get("schemathesis", {}).get("cases", 0)
    return found | {"slowest_health_s": attack.slowest_s, "faults": faults}


# ---- the command

COMMANDS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "steady": steady,
    "disconnects": disconnects,
    "cost": cost,
    "hostile": hostile,
    "engine": run_bare_engine,
}


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}
    for name in COMMANDS:
        text = COMMANDS[name].__doc__ or ""
        made[name] = added = commands.add_parser(name, help=text.splitlines()[0])
        added.add_argument("--seed", type=int, default=0, help="of the requests [0]")
        added.add_argument("--policy", default="fcfs", help="as of serving.server [fcfs]")
        added.add_argument("--max_batch", type=int, default=16, help="of the server [16]")
        added.add_argument("--json", type=Path, help="write the figures here")
    for name, clients in (("steady", 200), ("disconnects", 1000), ("cost", 16), ("engine", 16)):
        text = f"clients [{clients}]"
        made[name].add_argument("--clients", type=int, default=clients, help=text)
    made["steady"].add_argument("--minutes", type=float, default=10, help="of load [10]")
    made["disconnects"].add_argument("--at_once", type=int, default=32, help="clients [32]")
    for name, tokens in (("steady", 24), ("cost", 64), ("engine", 64)):
        text = f"of an answer, at most [{tokens}]"
        made[name].add_argument("--tokens", type=int, default=tokens, help=text)
    for name in ("cost", "engine"):
        made[name].add_argument("--requests", type=int, default=64, help="of a repetition [64]")
    made["cost"].add_argument("--repetitions", type=int, default=5, help="interleaved [5]")
    made["cost"].add_argument("--hidden_size", type=int, default=512, help="of the model [512]")
    made["cost"].add_argument("--layers", type=int, default=8, help="of the model [8]")
    made["engine"].add_argument("--model", required=True, help="its folder")
    text = "sent beside schemathesis [8000]"
    made["hostile"].add_argument("--requests", type=int, default=8000, help=text)
    text = "schemathesis' examples an operation; 0: without it [400]"
    made["hostile"].add_argument("--examples", type=int, default=400, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = command_parser().parse_args(argv)

    def run() -> int:
        found = COMMANDS[flags.command](flags)
        if flags.command == "engine":
            return 0
        for name, value in found.items():
            if name != "faults":
                print(f"{name}: {value}")
        print(f"faults: {len(found['faults'])}")
        for line in found["faults"][:10]:
            print(f"  {line}", file=sys.stderr)
        if flags.json:
            write_json(flags.json, found)
        return 1 if found["faults"] else 0

    return run_command("serving_load", run)


if __name__ == "__main__":
    sys.exit(main())
