"""uvicorn with limits on connections and slow clients, and a drain that answers every request.

The server also exits when the engine fails.
"""

import asyncio
import json
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.server.access import REQUEST_ID, AccessRules, ApiError
from serving.server.api import RETRY_S, make_app
from serving.server.json_bodies import CLIENT_S
from serving.server.monitor import Monitor
from serving.server.page.live import LIVE_PATH, LiveView
from serving.server.service import Service

MAX_PIPELINED_BYTES = 65536
TICK_S = 0.1
FLUSH_S = 1.0  # after the drain, for what has been written to reach its clients
GRACE_S = 5  # beyond both, before uvicorn cancels what is left


class LimitedConnection(H11Protocol):
    """HTTP/1.1 with limits: a connection beyond `max_open` gets a 503 and is closed.

    uvicorn reads on after each response, whatever already waits in its buffer: a client that sends
    requests without waiting for their replies fills memory and delays all others. One that is
    MAX_PIPELINED_BYTES ahead is dropped.
    """

    max_open = 1024
    monitor: Monitor | None = None
    pipelined_bytes = 0  # bytes that came while an earlier request was being answered

    def connection_made(  # type: ignore[override]  # as uvicorn's own, which is given a Transport
        self, transport: asyncio.Transport
    ) -> None:
        if len(self.connections) < self.max_open:
            super().connection_made(transport)
            return
        body = json.dumps(
            ApiError(
                503, f"{self.max_open} connections are open (--max_connections)", "busy"
            ).body()
        )
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n{REQUEST_ID}: {uuid.uuid4().hex}\r\n"
        transport.write(f"{head}Retry-After: {RETRY_S}\r\nConnection: close\r\n\r\n{body}".encode())
        transport.set_protocol(asyncio.Protocol())
        transport.close()
        if self.monitor is not None:
            self.monitor.count_refusal("connections")

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as every other error is answered."""
        body = json.dumps(ApiError(400, msg).body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (REQUEST_ID.lower().encode(), uuid.uuid4().hex.encode()),
            (b"connection", b"close"),
        ]
        start = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (start, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event=event))
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            self.pipelined_bytes = 0
        else:
            self.pipelined_bytes += len(data)
        if self.pipelined_bytes > MAX_PIPELINED_BYTES:
            self.transport.abort()
        else:
            super().data_received(data)


class Server(uvicorn.Server):
    """Serves until SIGTERM, SIGINT or a failure of the engine.

    Args:
        drain_s: after a signal, for answers under way to end; then they and those that wait get
            a 503. A second signal ends the drain.
        client_s: for a client to send a request's header, its body, and to read the response.
        max_connections: open at once.
        access_rules, cors_origins, access_log, page: as of serving.server.api.make_app.
    """

    def __init__(
        self,
        service: Service,
        *,
        drain_s: float = 60.0,
        client_s: float = CLIENT_S,
        max_connections: int = 1024,
        access_rules: AccessRules | None = None,
        cors_origins: Sequence[str] = (),
        access_log: bool = False,
        page: bool = True,
    ) -> None:
        app = make_app(service, access_rules, cors_origins, access_log, client_s, page)
        limits = {"max_open": max_connections, "monitor": service.monitor}
        config = uvicorn.Config(
            app,
            http=type("Limited", (LimitedConnection,), limits),
            ws="none",
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(drain_s + FLUSH_S + GRACE_S),
        )
        super().__init__(config)
        self.service = service
        self.closing = app.state.closing
        self.live: LiveView | None = app.state.live
        self.drain_s = drain_s
        self.client_s = client_s
        self.skip_drain = False
        # When a connection was first seen waiting for its client, and its request at that time.
        self._waiting_since: dict[LimitedConnection, tuple[object, float]] = {}
        service.on_failure = self._engine_failed

    def serve_at(self, sock: socket.socket) -> int:
        """Serve at a listening socket.

        Returns:
            The process's exit code: 1 where the engine failed, so that a supervisor restarts it.
        """
        self.service.start()
        self.run(sockets=[sock])
        self.service.stop()
        return 0 if self.started and not self.service.failure else 1

    def _engine_failed(self):
        self.skip_drain = self.should_exit = True  # every request has been answered

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again: a drained server exits with code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        if self.service.predictors is not None and hasattr(signal, "SIGHUP"):
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self.handle_reload)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_reload(self, number: int, frame: FrameType | None) -> None:
        """SIGHUP: read --predictor again, in a thread."""
        if self.service.predictors is not None:
            threading.Thread(target=self.service.predictors.reload, daemon=True).start()

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        self.skip_drain = self.service.draining
        self.service.draining = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"serving {self.service.name} at http://{host}:{port}/v1", flush=True)
            if self.live is not None:
                self.live.start()
                print(f"open http://{host}:{port}/ in a browser", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._drop_slow()
        return await super().on_tick(counter)

    def _drop_slow(self):
        now = time.monotonic()
        before, self._waiting_since = self._waiting_since, {}
        for connection in list(self.server_state.connections):
            if not waits_for_client(connection):
                continue
            # A busy loop looks seldom: a wait after another request is a new one.
            request, since = before.get(connection, (None, now))
            if request is not connection.cycle:
                since = now
            self._waiting_since[connection] = (connection.cycle, since)
            if now - since > self.client_s:
                connection.transport.abort()

    def _drop_viewers(self):
        for connection in list(self.server_state.connections):
            cycle = connection.cycle
            if cycle is not None and cycle.scope["path"] == LIVE_PATH:
                connection.transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        self.closing.set()
        drain_task = asyncio.create_task(self._end_drain())
        await super().shutdown(sockets)
        drain_task.cancel()

    async def _end_drain(self):
        """Wait for running answers; then cancel them and those that wait, and close connections.

        The live streams have ended: a viewer that has not read its own by FLUSH_S is dropped.
        """
        began = time.monotonic()
        while time.monotonic() < began + self.drain_s and not self.skip_drain:
            await asyncio.sleep(TICK_S)
            if time.monotonic() > began + FLUSH_S:
                self._drop_viewers()
        self.service.cancel_all()
        await asyncio.sleep(FLUSH_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def waits_for_client(connection: LimitedConnection) -> bool:
    """Whether the server waits for a request, the rest of its header, or room to write."""
    cycle = connection.cycle
    return cycle is None or cycle.response_complete or connection.flow.write_paused
