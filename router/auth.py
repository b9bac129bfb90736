"""Who may call what: one dependency of the whole application, default deny.

Routes in `OPEN` need nothing. `/debug` is for this machine or for holders of the key. All else
needs the key, if one is configured. The decision uses the path that was routed, never a header.
"""

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import Request as HttpRequest

from common.errors import RequestError
from router.keys import Keys

OPEN: Final = frozenset({"/health", "/ping", "/version", "/openapi.json"})
DEBUG: Final = "/debug/"


Check = Callable[[HttpRequest], Awaitable[None]]
"""Lets a call pass, or raises RequestError."""


def checks(keys: Keys) -> list[Check]:
    """What every call passes before its route and before its body is read, in this order.

    Whose call it is comes first: what limits a tenant's rate or quota follows it here, with
    `tenant_of` and a 429, and what writes down who called what is the last.
    """
    return [authorizer(keys)]


def authorizer(keys: Keys) -> Check:
    """The dependency for an application with these keys. It leaves the tenant in the scope."""

    async def authorize(request: HttpRequest) -> None:
        """Raises RequestError: 401 without a valid key, 403 for /debug from elsewhere."""
        path = request.scope["path"]
        if path in OPEN:
            return
        tenant = _tenant(request, keys) if keys.are_asked_for else None
        if tenant is not None:
            request.scope["tenant"] = tenant
            return
        if path.startswith(DEBUG):
            if _is_local(request):
                return
            message = "Debug information is for this machine or with the API key."
            raise RequestError(403, message, kind="permission_error", code="forbidden")
        if keys.are_asked_for:
            raise RequestError(
                401,
                "Incorrect or missing API key: send it as 'Authorization: Bearer KEY'.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    return authorize


def tenant_of(request: HttpRequest) -> str:
    """Whose request this is; empty: of no tenant."""
    return str(request.scope.get("tenant", ""))


def _tenant(request: HttpRequest, keys: Keys) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # Header bytes arrive decoded as Latin-1, whatever the key is made of.
    given = token.strip().encode("latin-1")
    return keys.tenant(given) if scheme.lower() == "bearer" and given else None


def _is_local(request: HttpRequest) -> bool:
    if request.client is None:
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
