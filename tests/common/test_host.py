"""The I/O thread with real sockets and a real Redis, and a transfer endpoint that only listens."""

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest

from common.config import WorkerConfig
from common.errors import ConfigError
from common.events import (
    Announce,
    Crashed,
    Draining,
    Fence,
    Fenced,
    FromRouter,
    Publish,
    Reset,
    RouterGone,
    Send,
    Ship,
    Status,
)
from common.host import Host
from common.link import Down, LinkEvent, Message, RouterLink, Up
from common.messages import Cancel, Failed, Leaving, Load, Pong
from common.metrics import WorkerMetrics
from router.directory import Directory
from tests.redis_server import RedisServer
from tests.worker_info import worker_info

pytestmark = pytest.mark.redis


@dataclass
class Stats:
    blocks_sent: int = 3
    broken: Counter[str] = field(default_factory=lambda: Counter(stalled=2))


class Endpoint:
    """Satisfies `common.host.TransferEndpoint`. A command that is an exception is raised; one
    that is a number stops the whole I/O thread for so many seconds."""

    address = "tcp://127.0.0.1:9"

    def __init__(self, inbox: "SimpleQueue[object]") -> None:
        self.inbox = inbox
        self.commands: list[object] = []
        self.epochs: list[int] = []
        self.closed = False
        self.progress = (0, 0.0)

    async def start(self) -> None: ...

    async def close(self) -> None:
        self.closed = True

    async def failed(self) -> None:
        await asyncio.Event().wait()

    def command(self, command: object, /) -> None:
        if isinstance(command, Exception):
            raise command
        if isinstance(command, float):
            self.inbox.put("pausing")
            time.sleep(command)
        self.commands.append(command)

    def set_progress(self, steps: int, step_s: float) -> None:
        self.progress = (steps, step_s)

    def reset(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def stats(self) -> Stats:
        return Stats()


class Worker:
    """A Host without an engine: the test reads the inbox."""

    def __init__(self, redis: str, **changes: object) -> None:
        values = {"redis": redis, "heartbeat_s": 0.1} | changes
        self.inbox: SimpleQueue[object] = SimpleQueue()
        self.endpoint = Endpoint(self.inbox)
        self.host = Host(
            WorkerConfig(**values),  # type: ignore[arg-type]
            worker_info("w", address="", kv_address="", metrics_url=""),
            self.endpoint,
            self.inbox,
            WorkerMetrics("decode"),
        )

    async def next(self) -> object:
        """The next event for the engine."""
        return await asyncio.to_thread(self.inbox.get, True, 10.0)


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(Path(tmp_path_factory.mktemp("r")))
    server.start()
    yield server
    server.close()


@asynccontextmanager
async def attached(worker: Worker) -> AsyncIterator[tuple[RouterLink, "asyncio.Queue[LinkEvent]"]]:
    """A started host and a router that is up with it; all events of the link but pongs."""
    info = await asyncio.to_thread(worker.host.start)
    link = RouterLink("router", WorkerConfig(heartbeat_s=0.1))
    events: asyncio.Queue[LinkEvent] = asyncio.Queue()

    async def follow() -> None:
        while True:
            events.put_nowait(await link.receive())

    task = asyncio.create_task(follow())
    try:
        link.connect(info)
        assert await after_pongs(events) == Up(info)
        yield link, events
    finally:
        await asyncio.to_thread(worker.host.stop)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await link.close()


async def after_pongs(events: "asyncio.Queue[LinkEvent]") -> LinkEvent:
    """The next event of the link that is no Pong."""
    async with asyncio.timeout(10.0):
        while True:
            event = await events.get()
            if not (isinstance(event, Message) and isinstance(event.message, Pong)):
                return event


async def next_pong(events: "asyncio.Queue[LinkEvent]") -> Pong:
    async with asyncio.timeout(10.0):
        while True:
            event = await events.get()
            if isinstance(event, Message) and isinstance(event.message, Pong):
                return event.message


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_messages_commands_and_goodbye(redis: RedisServer) -> None:
    worker = Worker(redis.url)
    async with attached(worker) as (link, events):
        link.send("w", Cancel(1, 2))
        event = await worker.next()
        assert isinstance(event, FromRouter) and event.message == Cancel(1, 2)
        worker.host.status = Status(7, Load(running=3), True, "ready", step_s=0.5)
        pong = await next_pong(events)
        while not pong.busy:
            pong = await next_pong(events)
        assert (pong.epoch, pong.steps, pong.load.running) == (1, 7, 3)
        answer = Failed(1, 2, "no_blocks")
        worker.host.post([Ship("open"), Send(event.router, answer), Fence((1, 2))])
        assert await worker.next() == Fenced((1, 2))
        assert worker.endpoint.commands == ["open"]
        assert worker.endpoint.progress == (7, 0.5)
        assert await after_pongs(events) == Message("w", answer)

        worker.host.post([Draining()])
        assert await after_pongs(events) == Message("w", Leaving(done=False))
    assert await after_pongs(events) == Message("w", Leaving(done=True))
    assert worker.endpoint.closed


async def test_pages(redis: RedisServer) -> None:
    worker = Worker(redis.url)
    async with attached(worker):
        url = worker.host._info.metrics_url
        status, text = await asyncio.to_thread(get, url)
        assert status == 200
        assert 'tandem_transfer{counter="broken",reason="stalled"} 2.0' in text
        assert 'tandem_transfer{counter="blocks_sent",reason=""} 3.0' in text
        health = url.replace("/metrics", "/health")
        assert await asyncio.to_thread(get, health) == (200, '{"state": "ready"}')
        assert (await asyncio.to_thread(get, url.replace("/metrics", "/x")))[0] == 404
        worker.host.post([Draining(), Fence((0, 0))])
        assert await worker.next() == Fenced((0, 0))
        assert await asyncio.to_thread(get, health) == (503, '{"state": "draining"}')


async def test_registry_shows_the_worker_until_it_leaves(redis: RedisServer) -> None:
    worker = Worker(redis.url)
    directory = Directory(redis.url, "default", refresh_s=0.05)
    task = asyncio.create_task(directory.run())
    try:
        async with attached(worker):
            worker.host.post([Publish([], [])])
            async with asyncio.timeout(10.0):
                while "w" not in directory.workers:
                    await directory.changed()
            assert directory.workers["w"] == worker.host._info
        async with asyncio.timeout(10.0):
            while directory.workers:
                await directory.changed()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_closed_router_is_reported(redis: RedisServer) -> None:
    worker = Worker(redis.url)
    async with attached(worker) as (link, _):
        link.send("w", Cancel(1, 2))
        event = await worker.next()
        assert isinstance(event, FromRouter)
        link.disconnect("w")
        assert await worker.next() == RouterGone(event.router)


async def test_a_pause_past_the_lease_begins_a_new_life(redis: RedisServer) -> None:
    worker = Worker(redis.url, lease_s=0.3)
    async with attached(worker) as (link, events):
        worker.host.post([Ship(0.6)])  # as if the process had been stopped
        assert await worker.next() == "pausing"
        link.send("w", Cancel(1, 2))
        # Nothing of the old life is read after the reset.
        assert await worker.next() == Reset()
        (epoch,) = worker.endpoint.epochs
        assert epoch != 1
        event = await after_pongs(events)
        assert event in (Down("w", "epoch"), Down("w", "silent"))
        up = await after_pongs(events)
        assert isinstance(up, Up) and up.info.epoch == epoch
        worker.host.post([Announce([])])


async def test_failure_of_the_loop_reaches_the_engine(redis: RedisServer) -> None:
    worker = Worker(redis.url)
    await asyncio.to_thread(worker.host.start)
    worker.host.post([Ship(ValueError("broken command"))])
    event = await worker.next()
    assert isinstance(event, Crashed) and str(event.error) == "broken command"
    await asyncio.to_thread(worker.host.stop)
    assert worker.endpoint.closed
    assert "io" not in [thread.name for thread in threading.enumerate()]


def test_what_keeps_a_worker_from_starting(redis: RedisServer) -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        Worker("unix:///nonexistent/redis.sock").host.start()
    with pytest.raises(ConfigError, match="cannot bind"):
        Worker(redis.url, worker_host="203.0.113.1", insecure=True).host.start()
