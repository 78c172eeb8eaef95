"""The routes of the page: its files, what it asks the server, the live stream. Free of torch."""

import asyncio
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serving.server.page.bodies import ReadBody
from serving.server.page.described import ACCESS_PATH, SETTINGS_PATH, with_page_paths
from serving.server.page.feedback import add_feedback_routes
from serving.server.page.live import LIVE_HEADERS, LIVE_PATH, LiveView, read_seconds
from serving.server.page.snapshots import SnapshotMaker
from serving.server.page.static_files import INDEX, installed_version, read_page_files
from serving.server.page.tools import add_tool_routes
from serving.server.service import Service
from serving.server.tools import call_form
from serving.tools.loop import CALLS, ROUNDS

NOT_STORED = {"Cache-Control": "no-store"}


def add_page_routes(
    app: FastAPI,
    service: Service,
    read_body: ReadBody,
    *,
    needs_key: bool,
    closing: asyncio.Event,
) -> LiveView:
    """The page at `/`, its files below /page/, and its API below /page/api/.

    Args:
        read_body: the JSON of a request; raises ApiError or ValueError.
        needs_key: what /page/api/access tells.
        closing: ends the live streams.

    Returns:
        The live view, to be started with the server.
    """
    get = partial(app.api_route, methods=["GET", "HEAD"])
    files = read_page_files()
    live = LiveView(SnapshotMaker(service).make, closing)
    add_tool_routes(app, service, read_body)
    add_feedback_routes(app, service, read_body)

    @get(ACCESS_PATH)
    async def access():
        return JSONResponse({"needs_key": needs_key}, headers=NOT_STORED)

    @get(SETTINGS_PATH)
    async def settings():
        return JSONResponse(page_settings(service), headers=NOT_STORED)

    @app.get(LIVE_PATH, response_model=None)
    async def live_stream(http: Http):
        seconds = read_seconds(http.query_params.get("seconds"))
        return StreamingResponse(live.events(seconds), headers=LIVE_HEADERS)

    @get("/")
    async def index(http: Http):
        return page_file(http, INDEX)

    @get("/page/{file:path}")  # the last one: it matches what those above have not
    async def page_files(http: Http, file: str):
        return page_file(http, file)

    describe = app.openapi
    app.openapi = lambda: with_page_paths(describe())  # type: ignore[method-assign]

    def page_file(http: Http, name: str) -> Response:
        if (found := files.get(name)) is None:
            raise HTTPException(404, "Not Found")
        reply = found.reply(http.headers.get("if-none-match"))
        return Response(reply.body, reply.status, reply.headers)

    return live


def page_settings(service: Service) -> dict[str, Any]:
    """What the page must know of the server before it asks anything."""
    limits, tools = service.backend.limits, service.page_tools
    takes_tools = call_form(service.tokenizer) is not None
    return {
        "model": service.name,
        "policy": service.policy,
        "engine": service.engine,
        "predictor": predictor_name(service),
        "slo_s": service.slo_s,
        "defaults": service.defaults,
        "limits": {
            "max_batch": limits.max_batch,
            "kv_tokens": limits.kv_tokens,
            "max_tokens": limits.max_tokens,
        },
        "takes_tools": takes_tools,
        "tools": tools.descriptions() if tools is not None and takes_tools else [],
        "tool_rounds": ROUNDS,
        "tool_calls": CALLS,
        "feedback": service.feedback is not None,
        "version": installed_version(),
    }


def predictor_name(service: Service) -> str | None:
    """The folder's name of the predictor that serves; None without one."""
    predictors = service.predictors
    return None if predictors is None else predictors.current.folder.name
