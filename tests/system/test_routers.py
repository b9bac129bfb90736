"""Two routers over the same workers: one is killed under load, the other serves on."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.client import http, stream
from tests.conftest import MakeCheckpoint
from tests.redis_server import RedisServer
from tests.system.prompts import tokens
from tests.system.serving import deployment, settled, worker_metric

pytestmark = pytest.mark.system

STREAMS = 4
OUTPUT = 2_000
"""Long enough that every stream is in the middle when the router is killed."""


@contextmanager
def second_router(redis_url: str, model: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """(URL, process) of one more router for the deployment."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "deploy.cli", "router", "--redis", redis_url,
            "--model", str(model), "--port", "0", "--local-prefill", "fallback",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "listening on" in line)
        yield line.split()[-1], process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


async def test_one_of_two_routers_is_killed_under_load(
    checkpoint: MakeCheckpoint, redis_server: RedisServer
) -> None:
    model, rng = checkpoint("llama"), random.Random(5)
    prompts = [tokens(rng, rng.randrange(20, 100)) for _ in range(2 * STREAMS)]
    flags = ("--redis", redis_server.url)
    with deployment(model, *flags, prefill=2, decode=2) as served:
        with second_router(redis_server.url, model) as (url, process):
            async with http(served.url) as first, http(url) as second:
                async with asyncio.timeout(60):
                    while (await second.get("/health")).status_code != 200:
                        await asyncio.sleep(0.05)
                    listed = (await second.get("/debug/workers")).json()["workers"]
                    while len(listed) < 4:
                        await asyncio.sleep(0.05)
                        listed = (await second.get("/debug/workers")).json()["workers"]
                started = [asyncio.Event() for _ in prompts]
                asked = [
                    asyncio.create_task(stream(client, prompt, max_tokens=OUTPUT, started=event))
                    for client, prompt, event in zip(
                        [first] * STREAMS + [second] * STREAMS, prompts, started, strict=True
                    )
                ]
                async with asyncio.timeout(60):
                    await asyncio.gather(*(event.wait() for event in started))
                process.send_signal(signal.SIGKILL)
                gone = 0.0
                async with asyncio.timeout(60):
                    while gone < STREAMS:
                        gone = await _router_gone(first)
                assert gone == STREAMS, "only the requests of the dead router"
                answers = await asyncio.gather(*asked, return_exceptions=True)
                for answer in answers[:STREAMS]:
                    assert not isinstance(answer, BaseException)
                    assert answer.error is None and len(answer.ids) == OUTPUT
                for answer in answers[STREAMS:]:
                    assert isinstance(answer, BaseException), "its router is dead"
                await settled(first, 30)


async def _router_gone(client: httpx.AsyncClient) -> float:
    """Attempts that workers freed because their router was gone."""
    try:
        return await worker_metric(client, "tandem_requests_total", outcome="router_gone")
    except AssertionError:  # no worker has any outcome to show yet
        return 0.0
