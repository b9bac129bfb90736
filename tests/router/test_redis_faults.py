"""Requests while Redis is stopped, gone, empty or slow: none fails, and the router recovers.

Each test proves that its fault was there while the requests ran.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from tests.client import complete
from tests.redis_server import RedisServer
from tests.router.deployment import Deployment, deployment, until
from tests.router.stub_worker import expected

PROMPTS = [list(range(start, start + 50)) for start in range(10, 40)]
LATE_S = 2.0


async def all_are_answered(served: Deployment) -> None:
    """Thirty prompts, eight at a time, each with its own tokens."""
    seats = asyncio.Semaphore(8)

    async def one(prompt: list[int]) -> None:
        async with seats:
            answer = await complete(served.http, prompt, seed=5)
            assert answer.ids == expected(prompt, 16, seed=5)

    await asyncio.gather(*map(one, PROMPTS))


async def converges(served: Deployment, id: str) -> None:
    """A worker that registers now gets work, and nobody was lost."""
    before = {member.info.id for member in served.service.fleet}
    await served.start("decode", id)
    await until(lambda: id in served.service.fleet, 60.0)
    assert {member.info.id for member in served.service.fleet} == before | {id}
    await all_are_answered(served)


def answers(path: Path) -> bool:
    """Whether a Redis at this socket answers within a moment."""
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(0.2)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16) == b"+PONG\r\n"
        except OSError:
            return False


def path_of(server: RedisServer) -> Path:
    return Path(server.url.removeprefix("unix://"))


async def test_stopped(redis_server: RedisServer, text_files: Path) -> None:
    async with deployment(redis_server.url, text_files, prefill=2, decode=2) as served:
        assert answers(path_of(redis_server))
        redis_server.pause()
        await all_are_answered(served)
        assert not answers(path_of(redis_server))
        redis_server.resume()
        await converges(served, "late")


async def test_killed_and_back_empty(redis_server: RedisServer, text_files: Path) -> None:
    async with deployment(redis_server.url, text_files, prefill=2, decode=2) as served:
        redis_server.kill()
        await all_are_answered(served)
        assert not answers(path_of(redis_server))
        redis_server.start()
        await all_are_answered(served)
        await converges(served, "late")


class SlowPath:
    """A Unix socket before Redis, from which each answer comes `late_s` later."""

    def __init__(self, redis: Path) -> None:
        self._redis = redis
        self.late_s = 0.0
        self.num_late = 0

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(str(self._redis))
        tasks = [
            asyncio.create_task(self._pass(reader, back, is_answer=False)),
            asyncio.create_task(self._pass(there, writer, is_answer=True)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            back.close()
            writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        while data := await reader.read(1 << 16):
            if is_answer and self.late_s:
                await asyncio.sleep(self.late_s)
                self.num_late += 1
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def slow_path(redis: Path, directory: Path) -> AsyncIterator[tuple[str, SlowPath]]:
    slow = SlowPath(redis)
    path = directory / "slow.sock"
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(slow.relay(reader, writer)))

    server = await asyncio.start_unix_server(accept, str(path))
    try:
        yield f"unix://{path}", slow
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_slow_by_two_seconds(
    redis_server: RedisServer, text_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("s")
    async with (
        slow_path(path_of(redis_server), directory) as (url, slow),
        deployment(url, text_files, prefill=2, decode=2) as served,
    ):
        slow.late_s = LATE_S
        while not slow.num_late:  # more and more requests, until answers were late beside them
            await all_are_answered(served)
        slow.late_s = 0.0
        await converges(served, "late")
