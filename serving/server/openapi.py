"""/openapi.json: what serving.server.api serves.

The request's schema is made from the table that checks requests.
"""

from serving.server.fields import Schema, body_schema

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
        "index": {"const": 0},
        "message": message,
        "finish_reason": {"enum": ["stop", "length", "tool_calls", "function_call"]},
        "logprobs": {"type": ["object", "null"]},
    }
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage: Schema = {"type": "object", "required": list(counts)}
    usage["properties"] = dict.fromkeys(counts, {"type": "integer", "minimum": 0})
    properties = {
        "id": {"type": "string"},
        "object": {"const": "chat.completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
        "usage": usage,
        "glm_foundry": {
            "type": "object",
            "description": "Predicted and actual length, and names of ignored fields.",
        },
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def openapi_document(model: str, needs_key: bool) -> Schema:
    """An OpenAPI 3.1 document; `needs_key`: requests must carry a key."""
    schemas = {
        "ChatRequest": body_schema(),
        "ChatCompletion": completion_schema(),
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
    chat_errors = sorted(set(ERRORS) - {409})
    chat: Schema = {
        "summary": "Answer a chat",
        "requestBody": {"required": True, "content": json_content(schema_ref("ChatRequest"))},
        "responses": responses_of(
            "The answer; with stream, server-sent events",
            schema_ref("ChatCompletion"),
            *chat_errors,
        ),
    }
    chat["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    health: Schema = responses_of("It serves", status, 403)
    health["503"] = {
        "description": "It drains, or its engine has failed",
        "content": json_content(status),
    }
    metrics: Schema = responses_of("Prometheus' text format", {}, 401, 403, 501)
    metrics["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "GLM Foundry",
            "version": "1",
            "description": f"OpenAI's chat completions for the model {model}.",
        },
        "paths": {
            "/v1/chat/completions": {"post": chat},
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
            "/metrics": {"get": {"summary": "Figures for Prometheus", "responses": metrics}},
        },
        "components": {"schemas": schemas},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


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
