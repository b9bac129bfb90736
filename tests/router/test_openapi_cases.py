"""Bodies made from our own OpenAPI document, right and wrong ones: every answer is a declared one.

Two hundred cases in the default run, 10,000 with `--faults full`.
"""

import asyncio
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis import Case, GenerationMode

from tests.faults.volume import Volume
from tests.router.conftest import Deploy

CASES = 10_000
HANG_S = 120.0
"""No answer in this time, on whatever machine, is none at all."""


async def test_every_answer_is_declared(deploy: Deploy, volume: Volume) -> None:
    async with deploy(max_model_len=64) as served:
        document = (await served.http.get("/openapi.json")).json()
        posts = [
            path
            for path, operations in document["paths"].items()
            if "requestBody" in operations.get("post", {})
        ]
        assert {"/v1/chat/completions", "/v1/responses", "/detokenize"} < set(posts)
        share = volume.of(CASES) // (2 * len(posts))
        seen = await asyncio.to_thread(ask_all, document, served.url, posts, share)
        assert all(count >= share // 2 for count in seen.values()), seen
        # Nothing is left of all that.
        assert (await served.http.get("/health")).status_code == 200
        assert served.value("live_requests") == 0


def ask_all(document: dict[str, Any], url: str, posts: list[str], share: int) -> dict[str, int]:
    """`share` right and `share` wrong bodies for each path: how many cases there were of each."""
    schema = schemathesis.openapi.from_dict(document)
    with httpx.Client(base_url=url, timeout=HANG_S) as http:
        return {
            f"{path} {mode.value}": ask(
                http, schema[path]["POST"].as_strategy(generation_mode=mode), max(1, share)
            )
            for path in posts
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        }


def ask(http: httpx.Client, cases: SearchStrategy[Case[Any]], count: int) -> int:
    seen = 0

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases)
    def one(case: Case[Any]) -> None:
        nonlocal seen
        seen += 1
        check(http, case)

    one()
    return seen


def check(http: httpx.Client, case: Case[Any]) -> None:
    given = case.as_transport_kwargs(base_url=str(http.base_url))
    response = http.request(
        given["method"], given["url"], headers=given.get("headers"), params=given.get("params"),
        json=given.get("json"), content=given.get("data"),
    )  # fmt: skip
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code == 200:
        return
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
