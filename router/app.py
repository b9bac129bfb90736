"""The router's HTTP application: routes, and what surrounds every one of them.

`create_app` is called by `router.main` and by tests. A route does authorization, body and limits;
the response then writes itself (`router.reply`). Every error has the OpenAI body.
"""

import asyncio
import importlib.metadata
import re
import time
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

import msgspec
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import RequestError
from router import debug, errors
from router import metrics as metrics_text
from router.auth import checks, tenant_of
from router.caps import DEFAULT, Caps
from router.cors import Cors
from router.intake import Intake, unknown_model
from router.keys import Keys
from router.metrics import RouterMetrics
from router.nesting import has_few, is_flat
from router.openapi import document
from router.reply import Reply
from router.responses import respond
from router.schemas import ChatBody, CompletionBody, parse
from router.service import Service
from router.text_api import no_embeddings

_LABEL: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the application is made of."""

    service: Service
    intake: Intake
    metrics: RouterMetrics
    model: str
    """The served model's name."""
    keys: Keys = field(default_factory=Keys)
    cors: Cors = field(default_factory=Cors)
    caps: Caps = DEFAULT


def create_app(parts: Parts) -> FastAPI:
    service, intake, caps, usage = parts.service, parts.intake, parts.caps, parts.metrics.usage
    started = int(time.time())
    parts.metrics.vllm.serve(parts.model)
    app = FastAPI(
        title="Tandem",
        dependencies=[Depends(check) for check in checks(parts.keys)],
        # These would be routes without the dependency.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestError, errors.on_request_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(ClientDisconnect, errors.on_client_gone)
    app.add_exception_handler(Exception, errors.on_bug)
    if parts.cors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(parts.cors.origins),
            allow_methods=list(parts.cors.methods),
            allow_headers=list(parts.cors.headers),
            allow_credentials=parts.cors.credentials,
        )
    app.add_middleware(Label, metrics=parts.metrics)

    @app.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        data = await read_json(request, caps)
        call = await intake.completion(
            parse(CompletionBody, data, caps), label_of(request), tenant_of(request)
        )
        return Reply(call, service, usage)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: HttpRequest) -> Response:
        data = await read_json(request, caps)
        call = await intake.chat(parse(ChatBody, data, caps), label_of(request), tenant_of(request))
        return Reply(call, service, usage)

    @app.post("/v1/responses")
    async def responses(request: HttpRequest) -> Response:
        data = await read_json(request, caps)
        call = await respond(intake, data, label_of(request), tenant_of(request), caps)
        return Reply(call, service, usage)

    @app.post("/tokenize")
    async def tokenize(request: HttpRequest) -> Response:
        data = await read_json(request, caps)
        return json_response(await intake.text.tokenize(data, await service.limits(), caps))

    @app.post("/detokenize")
    async def detokenize(request: HttpRequest) -> Response:
        data = await read_json(request, caps)
        return json_response(await intake.text.detokenize(data, await service.limits()))

    @app.post("/v1/embeddings")
    async def embeddings(request: HttpRequest) -> Response:
        await read_json(request, caps)
        raise no_embeddings()

    def describe() -> dict[str, object]:
        limits = service.fleet.limits
        return {
            "id": parts.model,
            "object": "model",
            "created": started,
            "owned_by": "tandem",
            "root": parts.model,
            "max_model_len": limits.context if limits is not None else None,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [describe()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != parts.model:
            raise unknown_model(name)
        return json_response(describe())

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        reason = service.unavailable()
        if reason is None:
            return json_response({"status": "ok", "workers": service.fleet.counts()})
        return json_response({"status": "unavailable", "reason": reason}, 503)

    @app.head("/ping", include_in_schema=False)
    @app.post("/ping", include_in_schema=False)
    @app.get("/ping")
    async def ping() -> Response:
        return json_response({"status": "ok"})

    @app.head("/version", include_in_schema=False)
    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": _version()})

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(document(app, _version()))

    @app.get("/metrics")
    async def metrics() -> Response:
        parts.metrics.vllm.loaded(*service.num_requests())
        service.explainer.show_ladder()
        return Response(parts.metrics.render(), media_type=metrics_text.CONTENT_TYPE)

    @app.get("/v1/requests/{name:path}/explain")
    async def explain(name: str, request: HttpRequest) -> Response:
        traces = service.explainer.find(name, tenant_of(request))
        if not traces:
            message = f"The request '{name}' is not among the last ones."
            raise RequestError(404, message, param="id", code="request_not_found")
        return json_response({"id": name, "prompts": [trace.show() for trace in traces]})

    @app.get("/debug/workers")
    async def debug_workers() -> Response:
        return json_response(debug.workers(service))

    @app.get("/debug/ledger")
    async def debug_ledger() -> Response:
        return json_response(await debug.ledger(service))

    return app


async def read_json(request: HttpRequest, caps: Caps) -> object:
    """The decoded body. Raises RequestError: 413 if it is too large, 400 if it is not JSON.

    A web page can send any other type of body to this machine without asking, so the type counts.
    """
    if not _is_json(request.headers.get("content-type", "")):
        message = "The request body must be JSON: send 'Content-Type: application/json'."
        raise RequestError(400, message, code="unsupported_media_type")
    max_bytes = caps.body_bytes
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(caps.upload_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise RequestError(408, "The request body came too slowly.", code="timeout") from None
    if not has_few(body, caps.json_values):
        message = f"The request body has more than {caps.json_values} commas and opening brackets."
        raise RequestError(400, message, code="too_many_values")
    try:
        value: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"The request body is not valid JSON: {error}"
        raise RequestError(400, message, code="invalid_json") from error
    if not is_flat(value, body, caps.json_depth):
        message = f"The request body is nested more than {caps.json_depth} deep."
        raise RequestError(400, message, code="too_deep")
    return value


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(
        413, f"The request body is larger than {max_bytes} bytes.", code="body_too_large"
    )


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=errors.JSON)


def label_of(request: HttpRequest) -> str:
    """What logs call this HTTP call; never a key."""
    return str(request.scope["request_id"])


def _version() -> str:
    try:
        return importlib.metadata.version("tandem")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


class Label:
    """Gives every call its `x-request-id`, the client's if it is decent, and counts errors."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        label = given if _LABEL.fullmatch(given) else uuid4().hex
        scope["request_id"] = label

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", label.encode()),
                ]
                if message["status"] >= 400:
                    self._metrics.rejected.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, send_labelled)
