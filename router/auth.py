"""Who may call what: one dependency of the whole application, default deny.

Routes in `OPEN` need nothing. `/debug` is for this machine or for holders of the key. All else
needs the key, if one is configured. The decision uses the path that was routed, never a header.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import Request as HttpRequest

from common.errors import RequestError

OPEN: Final = frozenset({"/health", "/ping", "/version"})
DEBUG: Final = "/debug/"


def authorizer(api_key: str | None) -> Callable[[HttpRequest], Awaitable[None]]:
    """The dependency for an application with this key (None: no key is asked for)."""

    async def authorize(request: HttpRequest) -> None:
        """Raises RequestError: 401 without a valid key, 403 for /debug from elsewhere."""
        path = request.scope["path"]
        if path in OPEN:
            return
        if api_key is not None and _holds(request, api_key):
            return
        if path.startswith(DEBUG):
            if _is_local(request):
                return
            message = "Debug information is for this machine or with the API key."
            raise RequestError(403, message, kind="permission_error", code="forbidden")
        if api_key is not None:
            raise RequestError(
                401,
                "Incorrect or missing API key: send it as 'Authorization: Bearer KEY'.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    return authorize


def _holds(request: HttpRequest, api_key: str) -> bool:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return False
    # Header bytes arrive decoded as Latin-1, whatever the key is made of.
    given = token.strip().encode("latin-1")
    return bool(given) and hmac.compare_digest(given, api_key.encode())


def _is_local(request: HttpRequest) -> bool:
    if request.client is None:
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
