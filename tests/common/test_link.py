"""The router-worker link over real sockets, with workers in this process and in their own."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from common.blockhash import pack_tokens
from common.config import TimerConfig
from common.errors import ConfigError
from common.link import Down, LinkEvent, Message, RouterLink, Up, WorkerLink
from common.messages import (
    VERSION,
    Admit,
    Attach,
    Attached,
    Cancel,
    Failed,
    Load,
    Ping,
    Pong,
    ToWorker,
    WorkerInfo,
    decode_for_router,
    encode,
)
from common.sampling import SamplingParams
from tests.worker_info import worker_info

TIMERS = TimerConfig(heartbeat_s=0.1, dead_after=3, router_silence_s=0.5)


class Worker:
    """A worker in this process: answers pings while `alive`, keeps everything else."""

    def __init__(self, id: str = "w") -> None:
        self.link = WorkerLink("127.0.0.1", TIMERS)
        self.info = worker_info(id)
        self.alive = True
        self.received: asyncio.Queue[tuple[bytes, ToWorker]] = asyncio.Queue()

    async def start(self) -> None:
        await self.link.start()
        self.become(self.info)
        self._task = asyncio.create_task(self._answer())

    def become(self, info: WorkerInfo) -> None:
        self.info = msgspec.structs.replace(info, address=self.link.address)
        self.link.set_info(self.info)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.link.close()

    async def _answer(self) -> None:
        while True:
            router, message = await self.link.receive()
            if not isinstance(message, Ping):
                self.received.put_nowait((router, message))
            elif self.alive:
                pong = Pong(seq=message.seq, epoch=self.info.epoch, steps=7, load=Load(running=1))
                self.link.send(router, pong)


@asynccontextmanager
async def started(id: str = "w") -> AsyncIterator[Worker]:
    worker = Worker(id)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.close()


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with started() as worker:
        yield worker


@pytest.fixture
async def router() -> AsyncIterator[RouterLink]:
    link = RouterLink("r1", TIMERS)
    yield link
    await link.close()


async def next_event(link: RouterLink, timeout_s: float = 5.0) -> LinkEvent:
    """The next event that is not the answer to a ping."""
    async with asyncio.timeout(timeout_s):
        while True:
            event = await link.receive()
            if not (isinstance(event, Message) and isinstance(event.message, Pong)):
                return event


async def lost_routers(worker: Worker, limit_s: float, timeout_s: float = 5.0) -> list[bytes]:
    async with asyncio.timeout(timeout_s):
        while not (lost := worker.link.silent(time.monotonic(), limit_s)):
            await asyncio.sleep(0.02)
    return lost


async def test_messages_travel_in_order_both_ways(worker: Worker, router: RouterLink) -> None:
    router.connect(worker.info)
    assert await next_event(router) == Up(worker.info)
    for i in range(100):
        router.send("w", Cancel(request=i, attempt=1))
    identities = set()
    for i in range(100):
        identity, message = await worker.received.get()
        identities.add(identity)
        assert message == Cancel(request=i, attempt=1)
        worker.link.send(identity, Failed(request=i, attempt=1, reason="no_blocks"))
    assert [len(identity) for identity in identities] == [16]
    for i in range(100):
        assert await next_event(router) == Message("w", Failed(i, 1, "no_blocks"))


async def test_pongs_are_passed_on(worker: Worker, router: RouterLink) -> None:
    router.connect(worker.info)
    assert await router.receive() == Up(worker.info)
    for seq in (1, 2, 3):
        event = await asyncio.wait_for(router.receive(), 2)
        assert event == Message("w", Pong(seq=seq, epoch=1, steps=7, load=Load(running=1)))


async def test_a_prompt_of_a_million_tokens_fits(worker: Worker, router: RouterLink) -> None:
    router.connect(worker.info)
    await next_event(router)
    tokens = pack_tokens(range(1_000_000))
    admit = Admit(
        request=1, attempt=1, tokens=tokens, prompt_len=1_000_000, choices=(0,),
        params=SamplingParams(max_tokens=8),
    )  # fmt: skip
    router.send("w", admit)
    _, message = await asyncio.wait_for(worker.received.get(), 5)
    assert message == admit


async def test_two_workers_and_two_routers_do_not_mix(router: RouterLink) -> None:
    other = RouterLink("r2", TIMERS)
    try:
        async with started("a") as a, started("b") as b:
            for link in (router, other):
                link.connect(a.info)
                link.connect(b.info)
                ups = [await next_event(link), await next_event(link)]
                assert {up.info.id for up in ups if isinstance(up, Up)} == {"a", "b"}
            router.send("a", Cancel(1, 1))
            other.send("a", Cancel(2, 1))
            identities = {message: who for who, message in [await a.received.get() for _ in "12"]}
            assert len(set(identities.values())) == 2
            a.link.send(identities[Cancel(2, 1)], Failed(2, 1, "peer"))
            assert await next_event(other) == Message("a", Failed(2, 1, "peer"))
            assert b.received.empty()
    finally:
        await other.close()


async def test_a_worker_that_closes_is_down_at_once_and_up_again(router: RouterLink) -> None:
    async with started() as worker:
        router.connect(worker.info)
        await next_event(router)
        router.send("w", Cancel(1, 1))
        identity, _ = await worker.received.get()
        worker.link.send(identity, Failed(1, 1, "draining"))
        before = time.monotonic()
    # What it said last is read before its end.
    assert await next_event(router) == Message("w", Failed(1, 1, "draining"))
    assert await next_event(router) == Down("w", "closed")
    assert time.monotonic() - before < TIMERS.heartbeat_s * TIMERS.dead_after
    async with started() as again:
        router.connect(again.info)
        assert await next_event(router) == Up(again.info)


async def test_a_worker_that_starts_later_is_found(router: RouterLink) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as late:
        port = late.bind_to_random_port("tcp://127.0.0.1")
        late.unbind(late.getsockopt_string(zmq.LAST_ENDPOINT))
        info = worker_info("w", address=f"tcp://127.0.0.1:{port}")
        router.connect(info)
        with pytest.raises(TimeoutError):
            await next_event(router, 0.2)
        late.bind(info.address)
        answer = asyncio.create_task(asyncio.to_thread(late.recv_multipart))
        identity, attach = await asyncio.wait_for(answer, 5)
        assert attach == encode(Attach("r1", VERSION))
        late.send_multipart([identity, encode(Attached(info))])
        assert await next_event(router) == Up(info)


async def test_a_silent_worker_is_down_after_three_misses(
    worker: Worker, router: RouterLink
) -> None:
    router.connect(worker.info)
    await next_event(router)
    worker.alive = False
    before = time.monotonic()
    assert await next_event(router) == Down("w", "silent")
    elapsed = time.monotonic() - before
    assert elapsed > TIMERS.heartbeat_s * (TIMERS.dead_after - 1)
    assert elapsed < TIMERS.heartbeat_s * (TIMERS.dead_after + 3)


async def test_a_pause_of_the_router_blames_nobody(worker: Worker, router: RouterLink) -> None:
    router.connect(worker.info)
    await next_event(router)
    time.sleep(TIMERS.heartbeat_s * (TIMERS.dead_after + 3))
    with pytest.raises(TimeoutError):
        await next_event(router, TIMERS.heartbeat_s * 3)


async def test_a_new_epoch_is_a_new_life(worker: Worker, router: RouterLink) -> None:
    old = worker.info
    router.connect(old)
    await next_event(router)
    worker.become(worker_info("w", epoch=2))
    assert await next_event(router) == Down("w", "epoch")
    assert await next_event(router) == Up(worker.info)
    router.connect(old)  # a registry that lags behind
    with pytest.raises(TimeoutError):
        await next_event(router, TIMERS.heartbeat_s * 3)


async def test_a_worker_that_moves(worker: Worker, router: RouterLink) -> None:
    router.connect(worker.info)
    await next_event(router)
    async with started("w") as second:
        second.become(worker_info("w", epoch=2))
        router.connect(second.info)
        assert await next_event(router) == Down("w", "moved")
        assert await next_event(router) == Up(second.info)


async def test_another_version_is_refused_until_it_changes(
    worker: Worker, router: RouterLink
) -> None:
    worker.become(worker_info("w", version=VERSION + 1))
    router.connect(worker.info)
    assert await next_event(router) == Down("w", "version")
    router.connect(worker.info)
    with pytest.raises(TimeoutError):
        await next_event(router, TIMERS.heartbeat_s * 3)
    worker.become(worker_info("w", epoch=2))
    router.connect(worker.info)
    assert await next_event(router) == Up(worker.info)


async def test_another_worker_at_the_address_is_refused(worker: Worker, router: RouterLink) -> None:
    router.connect(msgspec.structs.replace(worker.info, id="other"))
    assert await next_event(router) == Down("other", "id")


async def test_a_bad_address_is_refused(router: RouterLink) -> None:
    router.connect(worker_info("w", address="nonsense"))
    assert await next_event(router) == Down("w", "address")


async def test_disconnect_is_silent_and_final(worker: Worker, router: RouterLink) -> None:
    router.connect(worker.info)
    await next_event(router)
    router.disconnect("w")
    router.send("w", Cancel(1, 1))
    assert router.undelivered == 1
    with pytest.raises(TimeoutError):
        await next_event(router, TIMERS.heartbeat_s * 3)
    assert len(await lost_routers(worker, 60)) == 1
    router.connect(worker.info)
    assert await next_event(router) == Up(worker.info)


async def test_a_worker_that_does_not_read_is_down() -> None:
    # Three hours of heartbeats: nothing but the full queue can end this link.
    timers = TimerConfig(heartbeat_s=10_800)
    context = zmq.Context()
    raw = context.socket(zmq.ROUTER)
    raw.setsockopt(zmq.RCVHWM, 1)
    port = raw.bind_to_random_port("tcp://127.0.0.1")
    info = worker_info("w", address=f"tcp://127.0.0.1:{port}")
    router = RouterLink("r1", timers)
    try:
        router.connect(info)
        identity, _ = await asyncio.to_thread(raw.recv_multipart)
        raw.send_multipart([identity, encode(Attached(info))])
        assert await next_event(router) == Up(info)
        large = Admit(
            request=1, attempt=1, tokens=bytes(4_000), prompt_len=1_000, choices=(0,),
            params=SamplingParams(max_tokens=8),
        )  # fmt: skip
        while not router.undelivered:
            router.send("w", large)
        assert await next_event(router) == Down("w", "full")
    finally:
        await router.close()
        context.destroy(linger=0)


async def test_malformed_messages_are_counted_and_dropped(
    worker: Worker, router: RouterLink
) -> None:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    try:
        raw.connect(worker.link.address)
        raw.send_multipart([b"\xc1"])
        raw.send_multipart([b"", b""])
        raw.send(encode(Ping(1)))  # valid, but not attached
        raw.send(encode(Attach("raw", VERSION)))
        answer = await asyncio.to_thread(raw.recv)
        assert decode_for_router(answer) == Attached(worker.info)
        assert (worker.link.malformed, worker.link.unattached) == (2, 1)
        raw.send(encode(Cancel(5, 1)))
        _, message = await asyncio.wait_for(worker.received.get(), 2)
        assert message == Cancel(5, 1)
    finally:
        context.destroy(linger=0)


async def test_malformed_answers_are_counted_and_dropped() -> None:
    router = RouterLink("r1", TIMERS)
    context = zmq.Context()
    raw = context.socket(zmq.ROUTER)
    try:
        port = raw.bind_to_random_port("tcp://127.0.0.1")
        info = worker_info("w", address=f"tcp://127.0.0.1:{port}")
        router.connect(info)
        identity, _ = await asyncio.to_thread(raw.recv_multipart)
        raw.send_multipart([identity, b"\xc1"])
        raw.send_multipart([identity, b"", b""])
        raw.send_multipart([identity, encode(Failed(1, 1, "peer"))])  # before Attached
        raw.send_multipart([identity, encode(Attached(info))])
        assert await next_event(router) == Up(info)
        assert router.malformed == 2
    finally:
        await router.close()
        context.destroy(linger=0)


async def test_a_router_that_closes_is_reported_once(worker: Worker) -> None:
    router = RouterLink("r1", TIMERS)
    router.connect(worker.info)
    await next_event(router)
    assert worker.link.silent(time.monotonic(), 60) == []
    router.send("w", Cancel(1, 1))
    identity, _ = await worker.received.get()
    await router.close()
    assert await lost_routers(worker, 60) == [identity]
    assert worker.link.silent(time.monotonic(), 60) == []
    worker.link.send(identity, Failed(1, 1, "peer"))
    assert worker.link.undelivered == 1


async def test_a_router_that_says_nothing_is_reported_once(worker: Worker) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.IDENTITY, b"raw")
        raw.connect(worker.link.address)
        raw.send(encode(Attach("raw", VERSION)))
        await asyncio.to_thread(raw.recv)
        assert worker.link.silent(time.monotonic(), 0.5) == []
        assert await lost_routers(worker, 0.2) == [b"raw"]
        assert worker.link.silent(time.monotonic(), 0.2) == []


async def test_a_host_that_cannot_be_bound() -> None:
    link = WorkerLink("192.0.2.1", TIMERS)
    with pytest.raises(ConfigError, match=r"cannot bind 192\.0\.2\.1"):
        await link.start()
    await link.close()


@asynccontextmanager
async def echo_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, WorkerInfo]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.common.echo_worker", stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    try:
        yield process, worker_info("echo", address=address)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_killed_worker_is_down_at_once() -> None:
    router = RouterLink("r1", TimerConfig())
    try:
        async with echo_process() as (process, info):
            router.connect(info)
            assert isinstance(await next_event(router, 20), Up)
            process.kill()
            before = time.monotonic()
            assert await next_event(router) == Down("echo", "closed")
            assert time.monotonic() - before < 3
    finally:
        await router.close()


async def test_a_stopped_worker_is_down_after_three_misses_and_comes_back(
    router: RouterLink,
) -> None:
    async with echo_process() as (process, info):
        router.connect(info)
        up = await next_event(router, 20)
        process.send_signal(signal.SIGSTOP)
        # Its unanswered pings say so first, unless this loop was late; then ZMTP's own do.
        assert await next_event(router) in (Down("echo", "silent"), Down("echo", "closed"))
        process.send_signal(signal.SIGCONT)
        assert await next_event(router) == up
