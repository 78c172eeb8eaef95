"""Small engines that record what they get, and a gateway in a thread, before them."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from aiohttp import web

from predictor.prediction import from_bins
from serving.gateway import listener, starting
from serving.gateway.flags import parse_gateway_flags
from serving.server.access import access_rules_of
from serving.server.command import bind

PATH = "/v1/chat/completions"


@dataclass
class Got:
    """A request as an engine got it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


def answer_of(words: int = 3, tokens: int = 7, finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": "word " * words}
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def stream_of(chunks: int, tokens: int | None = None) -> list[bytes]:
    """The events of a stream; with its usage where `tokens` are given."""
    events = []
    for number in range(chunks):
        events.append({"choices": [{"delta": {"content": f"ä{number}"}, "finish_reason": None}]})
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    if tokens is not None:
        events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return [line.encode() for line in [*lines, "data: [DONE]\n\n"]]


class RecordingEngine:
    """Answers by `respond`; everything else than PATH by `pages`.

    Attributes:
        got: the requests that make answers, in order. now: that it has; most: of them at once.
        seconds: that an answer takes. holds: no answer ends.
        pages: bodies by path; other paths get 404. looks: how many of them were asked for.
    """

    def __init__(self, port: int = 0, pages: dict[str, Any] | None = None) -> None:
        self.got: list[Got] = []
        self.now = self.most = self.looks = 0
        self.pages = {"/health": {}, "/health/ready": {}, "/v1/models": {"data": []}}
        self.pages |= {"/api/version": {}} | (pages or {})
        self.respond: Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]
        self.respond = self.whole
        self.seconds = 0.0
        self.holds = False
        self.cancelled = 0
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(256)
        self.port = self._socket.getsockname()[1]
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        async def serve() -> None:
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            server = web.Server(self._handle, handler_cancellation=True, access_log=None)
            runner = web.ServerRunner(server, shutdown_timeout=0)
            await runner.setup()
            await web.SockSite(runner, self._socket).start()
            self._started.set()
            await self._end.wait()
            await runner.cleanup()

        asyncio.run(serve())

    def close(self) -> None:
        """Cut all connections and refuse new ones."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(10)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        if request.method != "POST":
            self.looks += 1
            page = self.pages.get(request.raw_path)
            if page is None:
                return web.Response(status=404)
            return web.Response(text=page) if isinstance(page, str) else web.json_response(page)
        self.got.append(Got(request.raw_path, dict(request.headers), body))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self.respond(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1

    async def whole(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(self.seconds)
        while self.holds:
            await asyncio.sleep(0.01)
        return web.json_response(answer_of())

    def streams(self, chunks: list[bytes], pause_s: float = 0.0, cut: bool = False) -> None:
        """Answer with these chunks; `cut`: and break off instead of ending."""

        async def respond(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
            reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await reply.prepare(request)
            for chunk in chunks:
                await reply.write(chunk)
                await asyncio.sleep(pause_s)
            if cut:
                request.transport.abort()
            return reply

        self.respond = respond

    def refuses(self, status: int, text: str = '{"error": "no"}') -> None:
        async def respond(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
            return web.Response(status=status, text=text, headers={"X-Own": "yes"})

        self.respond = respond

    def breaks(self) -> None:
        """Close the connection without an answer."""

        async def respond(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
            request.transport.abort()
            return web.Response()

        self.respond = respond


class WordPredictor:
    """Predicts as many tokens as the last word of a prompt says: a distribution around it."""

    card: dict[str, Any] = {"served_model": {"name": "m"}}

    def predict(self, text: str) -> list[Any]:
        tokens = float(text.split()[-1])
        return [from_bins(np.array([0.5, 0.5]), np.array([0.0, tokens, 2 * tokens]))]


@contextmanager
def serving_process(
    words: Sequence[object], port: int, path: str, log: Path, seconds=60.0, **environment: str
) -> Iterator[subprocess.Popen]:
    """A server of another program, from its first good answer at `path` on.

    Its own processes are of its group, and end with it.
    """
    with open(log, "w") as out:
        process = subprocess.Popen(
            list(map(str, words)),
            env=os.environ | environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def serves() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}").is_success
        except httpx.HTTPError:
            return False

    try:
        wait_until(serves, seconds)
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process of a session of its own, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def gateway_before(
    *engines: RecordingEngine | str, kind: str = "openai", predictor: Any = None, words: Any = ()
) -> Iterator["RunningGateway"]:
    """A gateway in a thread; `words`: more flags."""
    bases = [engine if isinstance(engine, str) else engine.base for engine in engines]
    given = ["--upstream", ",".join(bases), "--kind", kind, "--port", "0", "--health_s", "0.2"]
    given += ["--predict_ms", "5000"]  # a busy machine changes no test
    flags = parse_gateway_flags([*given, *map(str, words)])
    sock = bind(flags.host, flags.port)
    parts = starting.load_gateway(flags, access_rules_of(flags, sock))
    if predictor is not None:
        parts.gateway.guarded.predictor = predictor
    process = listener.GatewayProcess(parts, flags, sock)
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    assert process.started.wait(20)
    with httpx.Client(base_url=process.address, timeout=30) as client:
        running = RunningGateway(parts.gateway, process, client, thread)
        try:
            yield running
        finally:
            process.stop()
            process.stop()
            thread.join(20)


@dataclass
class RunningGateway:
    """A gateway that serves, and a client of it."""

    gateway: Any
    process: listener.GatewayProcess
    client: httpx.Client
    thread: threading.Thread

    @property
    def gateway_port(self) -> int:
        return int(self.process.address.rsplit(":", 1)[1])

    def ask(self, text: str = "say 100", **fields: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": text}]} | fields
        return self.client.post(PATH, json=body)

    def status(self) -> dict[str, Any]:
        return self.client.get("/gateway/status").json()

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
        text = self.client.get("/metrics").text
        found = [line for line in text.splitlines() if line.startswith(f"glm_gateway_{name}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
