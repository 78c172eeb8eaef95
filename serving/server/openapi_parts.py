"""Parts of OpenAPI documents that several modules write. Free of torch and of HTTP."""

from serving.server.fields import Schema

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
