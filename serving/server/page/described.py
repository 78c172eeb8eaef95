"""The page's API in /openapi.json. Free of torch and of HTTP."""

from serving.server.fields import Schema
from serving.server.openapi_parts import responses_of
from serving.server.page.live import KEPT_S, LIVE_PATH

ACCESS_PATH, SETTINGS_PATH = "/page/api/access", "/page/api/settings"
SETTINGS: dict[str, Schema] = {
    "model": {"type": "string"},
    "policy": {"type": ["string", "null"]},
    "engine": {"type": ["string", "null"]},
    "predictor": {"type": ["string", "null"], "description": "The name of its folder."},
    "slo_s": {"type": "number"},
    "defaults": {"type": "object", "description": "temperature and top_p of chats without them."},
    "limits": {"type": "object", "description": "max_batch, kv_tokens, max_tokens."},
    "takes_tools": {"type": "boolean", "description": "The model writes calls of tools."},
    "tools": {"type": "array", "items": {"type": "object"}, "description": "OpenAI's objects."},
    "tool_rounds": {"type": "integer", "minimum": 0},
    "tool_calls": {"type": "integer", "minimum": 0, "description": "Of one answer that are run."},
    "feedback": {"type": "boolean", "description": "Feedback on answers is kept."},
    "version": {"type": "string"},
}


def with_page_paths(document: Schema) -> Schema:
    """An OpenAPI document with the page's files and what the page asks."""
    access: Schema = {"type": "object", "required": ["needs_key"]}
    access["properties"] = {"needs_key": {"type": "boolean"}}
    settings: Schema = {"type": "object", "required": list(SETTINGS), "properties": SETTINGS}
    seconds: Schema = {"type": "integer", "minimum": 0, "default": KEPT_S}
    stream = responses_of("An event `history`, then `snapshot`, one a second", {}, 400, 401, 403)
    text = {"schema": {"type": "string", "description": "The data of each event is JSON."}}
    stream["200"]["content"] = {"text/event-stream": text}
    document["paths"]["/"] = {"get": file_path("The page", "text/html", 403)}
    document["paths"]["/page/{file}"] = {
        "parameters": [
            {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
        "get": file_path("A file of the page", "*/*", 401, 403, 404),
    }
    document["paths"][ACCESS_PATH] = {
        "get": {
            "summary": "Whether the other endpoints want a key",
            "security": [],
            "responses": responses_of("Whether they do", access, 403),
        }
    }
    document["paths"][SETTINGS_PATH] = {
        "get": {
            "summary": "What is served, and how",
            "responses": responses_of("The settings", settings, 401, 403),
        }
    }
    document["paths"][LIVE_PATH] = {
        "parameters": [{"name": "seconds", "in": "query", "schema": seconds}],
        "get": {"summary": "What the server does, second by second", "responses": stream},
    }
    return document


def file_path(summary: str, content_type: str, *errors: int) -> Schema:
    """The entry of what gives a file, open to everyone."""
    responses = responses_of("The file", {}, *errors)
    responses["200"]["content"] = {content_type: {"schema": {"type": "string"}}}
    responses["304"] = {"description": "The client has it: If-None-Match"}
    return {"summary": summary, "security": [], "responses": responses}
