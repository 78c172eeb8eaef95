"""/openapi.json: what serving.server.api serves.

The request's schema is made from the table that checks requests.
"""

from serving.server.completions import COMPLETION_TABLE
from serving.server.embeddings import EMBEDDING_TABLE
from serving.server.fields import CHAT_TABLE, Schema
from serving.server.responses import RESPONSES_TABLE

ERRORS = {
    400: "A field is wrong or not supported, or the prompt is too long",
    401: "No key, or a wrong one",
    403: "The header Host names another server",
    404: "No such model",
    408: "The body did not come in time",
    409: "Another predictor is being loaded",
    413: "The body is too large",
    415: "The body is not declared as application/json",
    429: "The queue is full; Retry-After says when to try again",
    500: "The model failed",
    503: "The server is shutting down",
}


def error_schema() -> Schema:
    nullable = {"type": ["string", "null"]}
    inside = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": nullable,
        "code": nullable,
    }
    error = {"type": "object", "required": list(inside), "properties": inside}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def completion_schema() -> Schema:
    message: Schema = {"type": "object", "required": ["role", "content"]}
    message["properties"] = {
        "role": {"const": "assistant"},
        "content": {"type": ["string", "null"]},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "function_call": {"type": "object"},
    }
    choice: Schema = {"type": "object", "required": ["index", "message", "finish_reason"]}
    choice["properties"] = {
        "index": {"type": "integer", "minimum": 0},
        "message": message,
        "finish_reason": {"enum": ["stop", "length", "tool_calls", "function_call"]},
        "logprobs": {"type": ["object", "null"]},
    }
    return response_schema("chat.completion", choice)


def usage_schema(*counts: str) -> Schema:
    return {
        "type": "object",
        "required": list(counts),
        "properties": dict.fromkeys(counts, {"type": "integer", "minimum": 0}),
    }


REPORT: Schema = {
    "type": "object",
    "description": "Predicted and actual length, seconds in the queue and in all, whether the "
    "deadline was met, and names of ignored fields.",
}


def response_schema(kind: str, choice: Schema) -> Schema:
    """Of a response with choices; `kind`: its field `object`."""
    properties = {
        "id": {"type": "string"},
        "object": {"const": kind},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": choice, "minItems": 1},
        "usage": usage_schema("prompt_tokens", "completion_tokens", "total_tokens"),
        "glm_foundry": REPORT,
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def text_completion_schema() -> Schema:
    choice: Schema = {"type": "object", "required": ["index", "text", "finish_reason"]}
    choice["properties"] = {
        "index": {"type": "integer", "minimum": 0},
        "text": {"type": "string"},
        "finish_reason": {"enum": ["stop", "length"]},
        "logprobs": {"type": ["object", "null"]},
    }
    return response_schema("text_completion", choice)


def embedding_list_schema() -> Schema:
    vector = {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}
    entry: Schema = {"type": "object", "required": ["object", "index", "embedding"]}
    entry["properties"] = {
        "object": {"const": "embedding"},
        "index": {"type": "integer", "minimum": 0},
        "embedding": vector,
    }
    properties: Schema = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": entry, "minItems": 1},
        "model": {"type": "string"},
        "usage": usage_schema("prompt_tokens", "total_tokens"),
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def responses_schema() -> Schema:
    properties: Schema = {
        "id": {"type": "string"},
        "object": {"const": "response"},
        "created_at": {"type": "integer"},
        "model": {"type": "string"},
        "status": {"enum": ["completed", "incomplete"]},
        "output": {"type": "array", "items": {"type": "object"}},
        "usage": usage_schema("input_tokens", "output_tokens", "total_tokens"),
        "glm_foundry": REPORT,
    }
    return {"type": "object", "required": list(properties), "properties": properties}


# By endpoint: what it does, the names of its schemas, whether it streams.
ENDPOINTS = {
    "/v1/chat/completions": ("Answer a chat", "ChatRequest", "ChatCompletion", True),
    "/v1/completions": ("Go on with texts", "CompletionRequest", "TextCompletion", True),
    "/v1/embeddings": ("Mean hidden states", "EmbeddingRequest", "EmbeddingList", False),
    "/v1/responses": ("Answer a chat in the newer form", "ResponsesRequest", "Response", True),
}


def endpoint(summary: str, request: str, response: str, streams: bool) -> Schema:
    """The entry of an endpoint that runs the model."""
    entry: Schema = {
        "summary": summary,
        "requestBody": {"required": True, "content": json_content(schema_ref(request))},
        "responses": responses_of(
            "The answer; with stream, server-sent events" if streams else "The answer",
            schema_ref(response),
            *sorted(set(ERRORS) - {409}),
        ),
    }
    if streams:
        entry["responses"]["200"]["content"]["text/event-stream"] = event_stream()
    return entry


def openapi_document(model: str, needs_key: bool) -> Schema:
    """An OpenAPI 3.1 document; `needs_key`: requests must carry a key."""
    schemas = {
        "ChatRequest": CHAT_TABLE.schema(),
        "ChatCompletion": completion_schema(),
        "CompletionRequest": COMPLETION_TABLE.schema(),
        "TextCompletion": text_completion_schema(),
        "EmbeddingRequest": EMBEDDING_TABLE.schema(),
        "EmbeddingList": embedding_list_schema(),
        "ResponsesRequest": RESPONSES_TABLE.schema(),
        "Response": responses_schema(),
        "Error": error_schema(),
    }
    card = {
        "type": "object",
        "required": ["id", "object"],
        "properties": {"id": {"type": "string"}, "object": {"const": "model"}},
    }
    cards: Schema = {"type": "object", "required": ["object", "data"]}
    cards["properties"] = {"object": {"const": "list"}, "data": {"type": "array", "items": card}}
    status = {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"type": "string"}},
    }
    endpoints = {path: {"post": endpoint(*words)} for path, words in ENDPOINTS.items()}
    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    health: Schema = responses_of("It serves", status, 403)
    health["503"] = {
        "description": "It drains, or its engine has failed",
        "content": json_content(status),
    }
    live = responses_of("It answers", status, 403)
    metrics: Schema = responses_of("Prometheus' text format", {}, 401, 403, 501)
    metrics["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "GLM Foundry",
            "version": "1",
            "description": f"OpenAI's API for the model {model}.",
        },
        "paths": {
            **endpoints,
            "/v1/models": {
                "get": {
                    "summary": "The served model",
                    "responses": responses_of("A list of one", cards, 401, 403),
                }
            },
            "/v1/models/{name}": {
                "parameters": [named],
                "get": {
                    "summary": "The served model",
                    "responses": responses_of("The model", card, 401, 403, 404),
                },
            },
            "/v1/predictor": predictor_path(),
            "/health": {
                "get": {"summary": "Whether it serves", "security": [], "responses": health}
            },
            "/health/live": {
                "get": {"summary": "Whether it answers", "security": [], "responses": live}
            },
            "/health/ready": {
                "get": {
                    "summary": "Whether it takes new requests",
                    "security": [],
                    "responses": health,
                }
            },
            "/metrics": {"get": {"summary": "Figures for Prometheus", "responses": metrics}},
        },
        "components": {"schemas": schemas},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def event_stream() -> Schema:
    """The content of a reply in server-sent events; the schema is one event's (OpenAPI 3.1)."""
    event: Schema = {"type": "object", "required": ["data"]}
    event["properties"] = {"data": {"type": "string", "description": "A chunk's JSON, or [DONE]"}}
    return {"schema": event}


def predictor_path() -> Schema:
    """What serves the predictor and replaces it."""
    serving: Schema = {"type": "object", "required": ["path", "name", "version", "since", "card"]}
    wanted = {"type": "object", "required": ["path"], "properties": {"path": {"type": "string"}}}
    return {
        "get": {
            "summary": "The length predictor that serves",
            "responses": responses_of("Its folder and card", serving, 401, 403, 404),
        },
        "post": {
            "summary": "Replace it by that of a folder within --predictor_dir",
            "requestBody": {"required": True, "content": json_content(wanted)},
            "responses": responses_of(
                "The new one", serving, 400, 401, 403, 404, 408, 409, 413, 415
            ),
        },
    }


def schema_ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def json_content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def responses_of(text: str, schema: Schema, *errors: int) -> Schema:
    document: Schema = {"200": {"description": text, "content": json_content(schema)}}
    for status in errors:
        document[str(status)] = {
            "description": ERRORS.get(status, "Not here"),
            "content": json_content(schema_ref("Error")),
        }
    return document
