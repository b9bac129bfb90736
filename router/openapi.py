"""The OpenAPI document of the router: made from its routes and from the bodies that they read.

Served by `router.app` at `/openapi.json`. Routes read their bodies themselves, so the framework
knows nothing of them: they are added here, with examples.
"""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from router.fields import Strict
from router.response_schemas import ResponseBody
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_CHAT: Final = [{"role": "user", "content": "Why is the sky blue?"}]
_BODIES: Final[dict[str, tuple[type[Strict], dict[str, Any]]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "The sky is", "max_tokens": 16}),
    "/v1/chat/completions": (ChatBody, {"messages": _CHAT, "max_completion_tokens": 64}),
    "/v1/responses": (ResponseBody, {"input": "Why is the sky blue?", "max_output_tokens": 64}),
    "/tokenize": (TokenizeBody, {"prompt": "The sky is"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1, 2, 3]}),
}
"""Path -> (what its POST reads, an example)."""
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(app: FastAPI, version: str) -> dict[str, Any]:
    """The document of OpenAPI 3.1; every operation may also answer with the OpenAI error body."""
    result: dict[str, Any] = get_openapi(title=app.title, version=version, routes=app.routes)
    kinds = [(kind, "validation") for kind, _ in _BODIES.values()]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = result.setdefault("components", {}).setdefault("schemas", {})
    components |= schemas["$defs"]
    components["Error"] = _ERROR
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, operations in result["paths"].items():
        for method, operation in operations.items():
            operation["responses"]["default"] = {"description": "An error", "content": error}
            if method == "post" and path in _BODIES:
                kind, example = _BODIES[path]
                schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
                content = {"application/json": {"schema": schema, "example": example}}
                operation["requestBody"] = {"required": True, "content": content}
    return result
