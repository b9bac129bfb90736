"""Nothing is open by accident: every route asks, but for an explicit list."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from router.app import Parts, create_app
from router.auth import OPEN
from router.grammars import Grammars
from router.intake import Intake
from router.keys import Keys
from router.metrics import RouterMetrics
from router.service import Service
from router.tokenizer import TextModel
from tests.router.conftest import Deploy
from tests.router.deployment import MODEL

KEY = "secret-key"


class NoService:
    """Answers no request; routes that get past authorization fail on it."""


def application(text_model: TextModel, api_key: str | None) -> FastAPI:
    service: Any = NoService()
    typed: Service = service
    return create_app(
        Parts(
            service=typed,
            intake=Intake(text_model, MODEL, typed, Grammars(Path("/nonexistent"))),
            metrics=RouterMetrics(),
            model=MODEL,
            keys=Keys(api_key),
        )
    )


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, path) of everything that can be called; all of it must be a route with
    dependencies."""
    for route in app.routes:
        assert isinstance(route, APIRoute), f"{route} is no route with dependencies"
        for method in route.methods or ():
            yield method, route.path.replace("{name:path}", "x")


def client(app: ASGIApp, host: str) -> httpx.AsyncClient:
    """A client of the application that comes from this address."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        # What gets past authorization fails on the missing service; that is answered by 500.
        try:
            await app(scope, receive, send)
        except AttributeError:
            return

    transport = httpx.ASGITransport(quiet, client=(host, 1234), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://router")


async def test_every_route_wants_the_key(text_model: TextModel) -> None:
    app = application(text_model, KEY)
    walked = sorted(routes(app))
    assert {path for _, path in walked} >= {*OPEN, "/metrics", "/debug/ledger", "/v1/completions"}
    async with client(app, "10.1.2.3") as http:
        for method, path in walked:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                response = await http.request(method, path, headers=headers)
                if path in OPEN:
                    assert response.status_code in (200, 500), path
                elif path.startswith("/debug"):
                    assert response.status_code == 403, path
                else:
                    assert response.status_code == 401, path
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert response.json()["error"]["code"] == "invalid_api_key"
            good = {"authorization": f"bearer {KEY}"}
            response = await http.request(method, path, headers=good, json={})
            assert response.status_code not in (401, 403), path


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("testclient", False),
    ],
)
@pytest.mark.parametrize("api_key", [KEY, None])
async def test_debug_is_for_this_machine(
    text_model: TextModel, api_key: str | None, host: str, allowed: bool
) -> None:
    async with client(application(text_model, api_key), host) as http:
        response = await http.get("/debug/workers")
        assert (response.status_code == 403) is not allowed


async def test_headers_do_not_move_a_request_past_the_check(text_model: TextModel) -> None:
    async with client(application(text_model, KEY), "10.0.0.1") as http:
        for host in ("router/health?", "router/ping#", "x"):
            response = await http.get("/v1/models", headers={"host": host})
            assert response.status_code == 401
        for path in ("/health/../v1/models", "//v1/models", "/v1/models/", "/V1/models"):
            assert (await http.get(path)).status_code in (401, 404), path


async def test_the_openai_client_with_and_without_key(deploy: Deploy) -> None:
    async with deploy(api_key=KEY) as served:
        answer = await served.openai.completions.create(model=MODEL, prompt="x", max_tokens=2)
        assert answer.usage is not None and answer.usage.completion_tokens == 2
        other = served.openai.with_options(api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            await other.completions.create(model=MODEL, prompt="x")
        async with httpx.AsyncClient(base_url=served.url) as bare:
            assert (await bare.get("/health")).status_code == 200
            assert (await bare.get("/metrics")).status_code == 401
            assert (await bare.get("/debug/ledger")).status_code == 200, "from this machine"
