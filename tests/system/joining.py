"""A worker that joins a deployment which runs already and shares its Redis."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.system.serving import TINY

START_S = 120.0


@contextmanager
def joined(role: str, model: Path, redis: str, *flags: str) -> Iterator[None]:
    """`tandem prefill` or `tandem decode`, with the flags of a tiny checkpoint."""
    command = [sys.executable, "-m", "deploy.cli", role, "--model", str(model)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    process = subprocess.Popen(
        [*command, "--redis", redis, *TINY, *flags],
        stdin=subprocess.DEVNULL,
        env=env | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(START_S) == 0
        finally:
            process.kill()
            process.wait()


async def until_joined(client: httpx.AsyncClient, role: str, count: int = 1) -> None:
    """The router gives work to so many workers of this role."""
    deadline = time.monotonic() + START_S
    while True:
        workers = (await client.get("/debug/workers")).json()["workers"]
        if sum(worker["role"] == role for worker in workers) >= count:
            return
        assert time.monotonic() < deadline, workers
        await asyncio.sleep(0.1)
