"""Errors as the OpenAI API shows them: `{"error": {message, type, param, code}}`, for everything.

Called by `router.app` (as exception handlers) and by `router.reply` (before and amid a stream).
"""

import logging
import math

import msgspec
from fastapi.requests import Request as HttpRequest
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.errors import RequestError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2
JSON = "application/json"
CLIENT_GONE = 499
"""Status in the metrics for a client that left while it sent its request; nobody reads it."""

_HTTP_MESSAGES = {
    404: "There is no {method} {path} here.",
    405: "Method {method} is not allowed for {path}.",
}


def unavailable(message: str) -> RequestError:
    """503: the client may try again in a moment."""
    return RequestError(
        503, message, kind="service_unavailable", code="unavailable", retry_after_s=RETRY_AFTER_S
    )


def overloaded(message: str, retry_after_s: float) -> RequestError:
    """429: too much is asked of the deployment now; it may be less in `retry_after_s` seconds."""
    return RequestError(
        429,
        message,
        kind="rate_limit_error",
        code="overloaded",
        retry_after_s=max(1, math.ceil(retry_after_s)),
    )


def internal(label: str) -> RequestError:
    """500: a bug or a worker's refusal; the log has the details under `label`."""
    message = f"The server had an error while processing the request (id {label})."
    return RequestError(500, message, kind="server_error", code="internal_error")


def nothing_allowed() -> RequestError:
    """400: a worker found no token that may come next, or could not follow a grammar."""
    message = (
        "The answer cannot go on: no token is left that the grammar, 'allowed_token_ids' and "
        "'bad_words' together allow, or the grammar is too complex to be followed."
    )
    return RequestError(400, message, code="nothing_allowed")


def body(error: RequestError) -> bytes:
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": error.kind,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def headers(error: RequestError) -> dict[str, str]:
    result = {}
    if error.retry_after_s is not None:
        result["retry-after"] = str(error.retry_after_s)
    if error.status == 408:
        # What is still to come would be taken for the next request.
        result["connection"] = "close"
    if error.status == 401:
        result["www-authenticate"] = "Bearer"
    return result


def response(error: RequestError) -> Response:
    return Response(body(error), error.status, headers(error), JSON)


async def on_request_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return response(error)


async def on_http_error(request: HttpRequest, error: Exception) -> Response:
    """Unknown routes and methods, which the framework finds."""
    assert isinstance(error, HTTPException)
    template = _HTTP_MESSAGES.get(error.status_code, str(error.detail))
    message = template.format(method=request.method, path=request.url.path)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    answer = response(RequestError(error.status_code, message, code=code))
    answer.headers.update(error.headers or {})
    return answer


async def on_client_gone(_: HttpRequest, error: Exception) -> Response:
    """The client left in the middle of its request: nothing is wrong here."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=CLIENT_GONE)


async def on_bug(request: HttpRequest, error: Exception) -> Response:
    """An exception that nobody expected; the server logs its traceback after this."""
    label = str(request.scope.get("request_id", "-"))
    log.error("request %s: %r", label, error)
    answer = response(internal(label))
    answer.headers["x-request-id"] = label
    return answer
