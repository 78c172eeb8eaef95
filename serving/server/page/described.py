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
    """An OpenAPI document with what the page asks; its files are not the API's."""
    access: Schema = {"type": "object", "required": ["needs_key"]}
    access["properties"] = {"needs_key": {"type": "boolean"}}
    settings: Schema = {"type": "object", "required": list(SETTINGS), "properties": SETTINGS}
    seconds: Schema = {"type": "integer", "minimum": 0, "default": KEPT_S}
    stream = responses_of("An event `history`, then `snapshot`, one a second", {}, 400, 401, 403)
    text = {"schema": {"type": "string", "description": "The data of each event is JSON."}}
    stream["200"]["content"] = {"text/event-stream": text}
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
