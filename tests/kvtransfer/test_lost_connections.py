"""A lost connection is not a failed transfer: it goes on over the next one."""

import asyncio
from typing import Any

import msgspec
import pytest

from common.config import TimerConfig
from kvtransfer import transports
from kvtransfer.accepting import MAX_RETRY_S, longer
from kvtransfer.commands import Arrived, Broken, Delivered, Key, Returned, Ticketed, Wanted
from kvtransfer.transport import Listener, Stream
from tests.kvtransfer.node import FIRST, PATIENT, Node, running
from tests.kvtransfer.pool import BLOCK_SIZE
from tests.kvtransfer.proxy import proxy

KEY = Key(7, 1)
BETWEEN_HOSTS = pytest.mark.parametrize("transport", ["tcp", "zmq"])
TIMERS = TimerConfig(heartbeat_s=1, lease_s=5, stall_s=3)


async def test_the_control_connection_is_cut_and_comes_back() -> None:
    p, d = Node("p", 1, timers=TIMERS), Node("d", 2, timers=TIMERS)
    async with running(p, d), proxy(d.endpoint.address) as between:
        p.open(KEY, msgspec.structs.replace(d.peer, address=between.address), 4 * BLOCK_SIZE)
        await d.events.next(Wanted)
        between.cut()
        d.grant(KEY, {i: i for i in range(4)})
        await p.events.next(Ticketed)
        p.offer(KEY, [0, 1])
        while d.endpoint.stats().blocks_received < 2:
            await asyncio.sleep(0.001)
        between.cut()
        p.offer(KEY, [2, 3], start=2)
        p.finish(KEY)
        assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 4 * 64)
        assert await p.events.next(Delivered) == Delivered(KEY, 4, 4 * 64)
        assert between.num_connections >= 2


@BETWEEN_HOSTS
async def test_the_data_connection_is_cut_in_mid_transfer(transport: str) -> None:
    """What was under way is lost and sent again in a second round."""
    block_bytes = 1 << 18
    p = Node("p", 1, block_bytes=block_bytes, timers=TIMERS)
    d = Node("d", 2, block_bytes=block_bytes, timers=TIMERS)
    async with running(p, d), proxy(d.endpoint._receiver.data[transport]) as between:
        d.endpoint._receiver.data = {transport: between.address}
        for block in range(64):
            p.pool.fill(block, f"block {block}")
        p.open(KEY, d.peer, 64 * BLOCK_SIZE)
        await d.events.next(Wanted)
        d.grant(KEY, {i: 63 - i for i in range(64)})
        await p.events.next(Ticketed)
        p.offer(KEY, range(64))
        p.finish(KEY)
        while between.forwarded < 3 << 20:
            await asyncio.sleep(0)
        between.cut()
        await d.events.next(Arrived)
        await p.events.next(Delivered)
        assert d.endpoint.stats().rounds_repeated >= 1
        assert all(d.pool.read(63 - i) == p.pool.read(i) for i in range(64))


@BETWEEN_HOSTS
async def test_a_black_hole_in_the_data_path_is_a_stall(transport: str) -> None:
    timers = TimerConfig(heartbeat_s=5, lease_s=20, stall_s=0.6)
    p, d = Node("p", 1, timers=timers), Node("d", 2, timers=timers)
    async with running(p, d), proxy(d.endpoint._receiver.data[transport]) as between:
        d.endpoint._receiver.data = {transport: between.address}
        p.open(KEY, d.peer, 2 * BLOCK_SIZE)
        await d.events.next(Wanted)
        d.grant(KEY, {0: 0, 1: 1})
        p.offer(KEY, [0])
        await p.events.next(Ticketed)
        while d.endpoint.stats().blocks_received < 1:
            await asyncio.sleep(0.001)
        between.swallow = True
        p.offer(KEY, [1], start=1)
        p.finish(KEY)
        broken = await p.events.next(Broken, timeout_s=timers.stall_s + 1)
        returned = await d.events.next(Returned, timeout_s=1)
        assert (broken.key, returned.key, returned.landed) == (KEY, KEY, (0,))


@BETWEEN_HOSTS
async def test_a_data_connection_that_is_lost_without_a_word(transport: str) -> None:
    """It costs the transfers that stall; those after them go over another one."""
    timers = TimerConfig(heartbeat_s=5, lease_s=20, stall_s=0.6)
    p, d = Node("p", 1, timers=timers), Node("d", 2, timers=timers)
    async with running(p, d), proxy(d.endpoint._receiver.data[transport]) as between:
        d.endpoint._receiver.data = {transport: between.address}
        p.open(KEY, d.peer, BLOCK_SIZE)
        await d.events.next(Wanted)
        while not p.endpoint.stats().links_over:
            await asyncio.sleep(0.001)
        between.swallow = True
        d.grant(KEY, {0: 0})
        await p.events.next(Ticketed)
        p.offer(KEY, [0])
        p.finish(KEY)
        assert (await p.events.next(Broken)).reason == "stalled"
        between.swallow = False
        await d.events.next(Returned)
        async with asyncio.timeout(10):
            while between.num_connections < 2:
                await asyncio.sleep(0.001)
        content = p.pool.fill(3, "another")
        p.open(Key(8, 1), d.peer, BLOCK_SIZE)
        await d.events.next(Wanted)
        d.grant(Key(8, 1), {0: 5})
        p.offer(Key(8, 1), [3])
        p.finish(Key(8, 1))
        assert await d.events.next(Arrived) == Arrived(Key(8, 1), FIRST, 64)
        assert d.pool.read(5) == content


async def test_a_transport_on_which_nothing_lands_is_left() -> None:
    """It can be connected, as often as one likes; the third round goes over the next transport."""
    block_bytes = 1 << 18
    p = Node("p", 1, block_bytes=block_bytes, timers=PATIENT)
    d = Node("d", 2, block_bytes=block_bytes, timers=PATIENT)
    async with running(p, d), proxy(d.endpoint._receiver.data["tcp"]) as between:
        between.reset = 1.0
        zmq_address = d.endpoint._receiver.data["zmq"]
        d.endpoint._receiver.data = {"tcp": between.address, "zmq": zmq_address}
        for block in range(4):
            p.pool.fill(block, f"block {block}")
        p.open(KEY, d.peer, 4 * BLOCK_SIZE)
        await d.events.next(Wanted)
        d.grant(KEY, {i: 63 - i for i in range(4)})
        p.offer(KEY, range(4))
        p.finish(KEY)
        await d.events.next(Arrived, 60)
        await p.events.next(Ticketed)
        await p.events.next(Delivered)
        assert all(d.pool.read(63 - i) == p.pool.read(i) for i in range(4))
        assert (between.num_connections, between.happened["reset"]) == (2, 2)
        assert p.endpoint.stats().links_over == {"zmq": 1}


class Fragile:
    """A listener that nobody connects to, and that is lost when the test says so."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.address = listener.address
        self.lost = asyncio.Event()

    async def accept(self) -> Stream:
        await self.lost.wait()
        raise ConnectionResetError("lost")

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize(("transport", "others"), [("auto", {"shm", "zmq"}), ("tcp", {"tcp"})])
async def test_a_listener_is_lost(
    transport: str, others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until there is another one senders are told of the other transports, if there are any."""
    made: list[Fragile] = []
    again = asyncio.Event()

    async def fragile(name: str, *arguments: Any) -> Listener:
        if name == "tcp" and made:
            await again.wait()
        listener = await transports.listen(name, *arguments)
        if name != "tcp":
            return listener
        made.append(Fragile(listener))
        return made[-1]

    monkeypatch.setattr("kvtransfer.endpoint.listen", fragile)
    d = Node("d", 2, transport=transport)
    async with running(d):
        data, listeners = d.endpoint._receiver.data, d.endpoint._listeners
        assert data["tcp"] == made[0].address
        made[0].lost.set()
        while "tcp" in listeners:
            await asyncio.sleep(0)
        assert set(data) == others
        again.set()
        while "tcp" not in listeners:
            await asyncio.sleep(0)
        assert data["tcp"] == made[1].address


def test_pauses_between_attempts() -> None:
    pauses = [0.0]
    while pauses[-1] < MAX_RETRY_S:
        pauses.append(longer(pauses[-1]))
    assert pauses == [0, 1, 2, 4, 8, 16, 30] and longer(30) == 30
