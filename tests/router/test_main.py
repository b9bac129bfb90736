"""The router process: how it starts, how it fails to, and how it leaves."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from common.identity import text_id
from router.main import _run
from router.server import Server, http_config, listen
from tests.client import http, stream
from tests.router.deployment import TIMERS, until
from tests.router.stub_worker import Handoffs, StubWorker, expected

PROGRAM = """
import sys
from common.config import RouterConfig
from common.errors import ConfigError
from router.main import main
try:
    sys.exit(main(RouterConfig(**eval(sys.argv[1]))))
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
"""


def start(**config: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, repr(config)], stderr=subprocess.PIPE, bufsize=0
    )


def refused(**config: object) -> str:
    """Stderr of a router that cannot start."""
    process = start(**config)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    return errors.decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_port_in_use(text_files: Path, router_redis: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(model=str(text_files), redis=router_redis, port=port)
    assert line == f"error: port {port} of 127.0.0.1 is in use; choose another --port\n"


def test_unreachable_redis(text_files: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    line = refused(model=str(text_files), redis=url, port=0)
    assert line.startswith(f"error: Redis at {url} ") and line.count("\n") == 1


def test_model_without_tokenizer(tmp_path: Path, router_redis: str) -> None:
    line = refused(model=str(tmp_path), redis=router_redis, port=0)
    assert "has no tokenizer.json" in line and line.count("\n") == 1


@dataclass(eq=False)
class Router:
    process: subprocess.Popen[bytes]
    client: httpx.AsyncClient
    worker: StubWorker

    async def wait(self) -> tuple[int, str]:
        """(exit code, stderr)"""
        _, errors = await asyncio.to_thread(self.process.communicate, timeout=20)
        return self.process.returncode, errors.decode()


@asynccontextmanager
async def router(
    text_files: Path, redis_url: str, namespace: str, **config: object
) -> AsyncIterator[Router]:
    """A router process that serves with one stub worker of this process."""
    port = free_port()
    worker = StubWorker(
        "decode-0",
        "decode",
        redis_url,
        namespace,
        text_id=text_id(text_files, None),
        handoffs=Handoffs(),
        timers=TIMERS,
    )
    await worker.start()
    process = start(
        model=str(text_files), redis=redis_url, namespace=namespace, port=port, **config
    )
    try:
        async with http(f"http://127.0.0.1:{port}") as client:
            async with asyncio.timeout(30):
                while not await healthy(client):
                    assert process.poll() is None
                    await asyncio.sleep(0.05)
            yield Router(process, client, worker)
    finally:
        process.kill()
        process.communicate()
        await worker.kill()


async def healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_lets_streams_end(
    text_files: Path, router_redis: str, number: signal.Signals
) -> None:
    async with router(text_files, router_redis, f"main-{number}") as served:
        worker = served.worker
        worker.ends_at = 5
        asked = asyncio.create_task(stream(served.client, [5, 6], seed=1))
        await until(lambda: worker.steps == 5)
        served.process.send_signal(number)
        async with asyncio.timeout(10):
            while await healthy(served.client):
                await asyncio.sleep(0.01)
        refusal = await served.client.post("/v1/completions", json={"prompt": "x"})
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "unavailable")
        worker.go_on()
        answer = await asked
        assert answer.ids == expected([5, 6], 16, seed=1)
        assert answer.done
        code, errors = await served.wait()
        assert code == 0 and "Traceback" not in errors, errors


async def test_stream_that_outlives_the_drain_ends_with_an_error(
    text_files: Path, router_redis: str
) -> None:
    async with router(text_files, router_redis, "main-short", drain_s=0.3) as served:
        worker = served.worker
        worker.ends_at = 5
        asked = asyncio.create_task(stream(served.client, [5, 6], seed=1))
        await until(lambda: worker.steps == 5)
        served.process.send_signal(signal.SIGTERM)
        answer = await asked
        assert answer.ids == expected([5, 6], 5, seed=1)
        assert answer.error is not None and answer.error["code"] == "unavailable"
        code, errors = await served.wait()
        assert code == 0 and "Traceback" not in errors, errors
        await until(lambda: worker.num_running == 0)


async def test_idle_router_leaves_at_once(text_files: Path, router_redis: str) -> None:
    async with router(text_files, router_redis, "main-idle") as served:
        served.process.send_signal(signal.SIGTERM)
        code, errors = await served.wait()
        assert code == 0 and "Traceback" not in errors, errors


async def test_whatever_ends_of_what_runs_all_the_time_ends_the_router() -> None:
    async def lasts() -> None:
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ValueError("a bug")

    service: Any = None  # asked for nothing before a signal
    server = Server(http_config(Starlette()))
    with listen("127.0.0.1", 0) as listener, pytest.raises(ExceptionGroup) as raised:
        await _run(service, [lasts, fails], server, listener, 1.0)
    assert raised.group_contains(ValueError, match="a bug")
