"""The page of serving.server at the gateway: its files, and the live view of the gateway."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from serving.gateway.proxy import Gateway
from serving.server.page.described import ACCESS_PATH, SETTINGS_PATH
from serving.server.page.live import LIVE_HEADERS, LIVE_PATH, LiveView, read_seconds
from serving.server.page.static_files import (
    INDEX,
    PageFile,
    installed_version,
    read_page_files,
)

FILES = "/page/"
ASK = aiohttp.ClientTimeout(total=5.0)
NO_MODEL = (asyncio.TimeoutError, aiohttp.ClientError, OSError, ValueError, LookupError, TypeError)
NOT_STORED = {"Cache-Control": "no-store"}


class GatewayPage:
    """Answers the page's paths; the chat of the page goes to the upstreams as all others do.

    Attributes:
        live: the stream of snapshots. closing: ends it.
    """

    def __init__(self, gateway: Gateway, predictor: str | None) -> None:
        self.gateway, self.predictor = gateway, predictor
        self.closing = asyncio.Event()
        self.live = LiveView(gateway.view.make, self.closing)
        files = read_page_files()
        self.files: dict[str, PageFile] = {"/": files[INDEX]}
        for name, file in files.items():
            self.files[FILES + name] = file

    def answers(self, request: web.BaseRequest) -> bool:
        """Whether a request is the page's; others, such as its tools', go to an upstream."""
        is_own = request.path in (ACCESS_PATH, SETTINGS_PATH, LIVE_PATH)
        return (is_own or request.path in self.files) and request.method in ("GET", "HEAD")

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises ApiError."""
        if request.path == ACCESS_PATH:
            needs_key = self.gateway.rules.keys is not None
            return web.json_response({"needs_key": needs_key}, headers=NOT_STORED)
        if request.path == SETTINGS_PATH:
            return web.json_response(await self.settings(), headers=NOT_STORED)
        if request.path == LIVE_PATH:
            return await self._stream(request)
        reply = self.files[request.path].reply(request.headers.get("If-None-Match"))
        return web.Response(status=reply.status, headers=reply.headers, body=reply.body)

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        seconds = read_seconds(request.query.get("seconds"))
        response = web.StreamResponse(headers=LIVE_HEADERS)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        with suppress(ConnectionError):  # the viewer has left
            async for event in self.live.events(seconds):
                await response.write(event)
            await response.write_eof()
        return response

    async def settings(self) -> dict[str, Any]:
        """What the page must know before it asks anything."""
        gateway = self.gateway
        upstreams = gateway.dispatcher.upstreams
        most = sum(upstream.limit or 0 for upstream in upstreams)
        return {
            "model": await self._model(),
            "policy": gateway.dispatcher.policy_name,
            "engine": gateway.kind.text,
            "predictor": Path(self.predictor).name if self.predictor else None,
            "slo_s": gateway.slo_s,
            "defaults": {},
            "limits": {"max_batch": most or None, "kv_tokens": None, "max_tokens": None},
            "takes_tools": False,
            "tools": [],
            "tool_rounds": 0,
            "tool_calls": 0,
            "feedback": False,
            "version": installed_version(),
        }

    async def _model(self) -> str:
        """The first model of an upstream that answers; empty where none tells."""
        gateway = self.gateway
        assert gateway.session is not None
        headers = {"Accept-Encoding": "identity"}
        if gateway.upstream_key is not None:
            headers["Authorization"] = f"Bearer {gateway.upstream_key}"
        for upstream in gateway.dispatcher.upstreams:
            if not upstream.up:
                continue
            url = f"{upstream.base}/v1/models"
            with suppress(*NO_MODEL):
                async with gateway.session.get(url, headers=headers, timeout=ASK) as reply:
                    models = json.loads(await reply.read())
                return str(models["data"][0]["id"])
        return ""
