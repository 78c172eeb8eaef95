"""The gateway's life: it listens, looks after its upstreams, and drains at a signal."""

import asyncio
import logging
import signal
import socket
import threading
import time
from contextlib import suppress

import aiohttp
from aiohttp import web

from serving.gateway.flags import GatewayFlags
from serving.gateway.health import HealthWatch
from serving.gateway.page import GatewayPage
from serving.gateway.proxy import MOST_BODY_BYTES, Gateway
from serving.gateway.starting import GatewayParts

log = logging.getLogger(__name__)

TICK_S = 0.05
# Below uvicorn's 5 s, by which most engines close idle connections: a request sent while one is
# closed has to be sent again.
KEEPALIVE_S = 4.0
CLIENT_KEEPALIVE_S = 75.0
FLUSH_S = 1.0  # after the drain, before what is left is cut


def make_session(connect_s: float) -> aiohttp.ClientSession:
    """HTTP to the upstreams: any number of connections, bodies as they come, no limit of time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


def make_http_server(gateway: Gateway) -> web.Server:
    """The gateway as an aiohttp server; a client that leaves cancels its request."""
    loop = asyncio.get_running_loop()

    def make_request(message, payload, protocol, writer, task):
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=MOST_BODY_BYTES
        )

    return web.Server(
        gateway.handle,
        request_factory=make_request,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=CLIENT_KEEPALIVE_S,
    )


class GatewayProcess:
    """Serves a gateway until a signal, or until `stop` is called.

    Attributes:
        address: where it listens, once it has started.
        started: set then. page: that it shows; None without.
    """

    def __init__(self, parts: GatewayParts, flags: GatewayFlags, sock: socket.socket) -> None:
        self.parts, self.flags, self.sock = parts, flags, sock
        self.gateway = parts.gateway
        host, port = sock.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.started = threading.Event()
        self.page: GatewayPage | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._skip_drain = False

    def run(self) -> int:
        """Serve; the exit code."""
        asyncio.run(self._serve())
        return 0

    def stop(self) -> None:
        """Begin to drain; a second call ends the drain. From any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._handle_stop)

    def _handle_stop(self) -> None:
        assert self._stop is not None
        self._skip_drain = self._stop.is_set()
        self._stop.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._take_signals()
        flags, gateway = self.flags, self.gateway
        async with make_session(flags.connect_s) as session:
            gateway.session = session
            watch = HealthWatch(
                gateway.kind,
                gateway.dispatcher,
                session,
                every_s=flags.health_s,
                kv_tokens=flags.kv_tokens,
                key=gateway.upstream_key,
            )
            await watch.start()
            if not flags.no_page:
                self.page = gateway.page = GatewayPage(gateway, flags.predictor)
                self.page.live.start()
            runner = web.ServerRunner(make_http_server(gateway), shutdown_timeout=FLUSH_S)
            await runner.setup()
            site = web.SockSite(runner, self.sock, backlog=2048)
            await site.start()
            if self.parts.recalibrator is not None:
                self.parts.recalibrator.start()
            print(f"gateway at {self.address}/v1", flush=True)
            self.started.set()
            await self._stop.wait()
            await self._drain(site)
            await watch.stop()
            await runner.cleanup()
        if self.parts.recalibrator is not None:
            self.parts.recalibrator.close()
        if gateway.log_file is not None:
            gateway.log_file.close()
        gateway.guarded.close()

    def _take_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        assert self._loop is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._handle_stop)
        if self.parts.predictors is not None:
            reload = self.parts.predictors.reload
            self._loop.add_signal_handler(
                signal.SIGHUP, lambda: threading.Thread(target=reload, daemon=True).start()
            )

    async def _drain(self, site: web.SockSite) -> None:
        """Take no more requests, and wait for those under way."""
        self.gateway.draining = True
        if self.page is not None:
            self.page.closing.set()
        await site.stop()
        until_s = time.monotonic() + self.flags.drain_s
        while self.gateway.open and time.monotonic() < until_s and not self._skip_drain:
            await asyncio.sleep(TICK_S)
        if self.gateway.open:
            log.warning("%d requests are ended before their answers", self.gateway.open)
