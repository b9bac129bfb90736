"""Blocks that go through slots of host memory: who may touch what, and when."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvtransfer import protocol
from kvtransfer.commands import (
    Abort,
    Arrived,
    BlockRef,
    Broken,
    Delivered,
    Key,
    Offer,
    Returned,
    Revoke,
    Ticketed,
    Wanted,
)
from kvtransfer.staging import Slots
from kvtransfer.stats import TransferStats
from kvtransfer.tcp_transport import PREFIX
from tests.kvtransfer import node
from tests.kvtransfer.conftest import UCX
from tests.kvtransfer.node import FIRST, PATIENT, Node, running
from tests.kvtransfer.pool import BLOCK_SIZE, BytePool
from tests.kvtransfer.raw_sender import RawTcp, raw_sender
from tests.kvtransfer.slow_device import StagedPool

KEY = Key(7, 1)
BIG = 1 << 20
"""Bytes of a block of which four make a message."""


@asynccontextmanager
async def pair(
    monkeypatch: pytest.MonkeyPatch, transport: str, block_bytes: int = 64, slots: int = 24
) -> AsyncIterator[tuple[Node, Node]]:
    """Two workers with staged pools. Their devices go on at the end, whatever a test did."""
    monkeypatch.setattr(node, "NUM_SLOTS", slots)
    p = Node("p", 1, 48, block_bytes, PATIENT, transport=transport)
    d = Node("d", 2, 48, block_bytes, PATIENT, transport=transport)
    async with running(p, d):
        try:
            yield p, d
        finally:
            stage(p).gate.set()
            stage(d).gate.set()


def stage(node: Node) -> StagedPool:
    assert node.stage is not None
    return node.stage


def stats(node: Node) -> TransferStats:
    return node.endpoint.stats()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.001)


async def granted(p: Node, d: Node, key: Key, slots: dict[int, int], count: int = 0) -> None:
    """Open a transfer of `count` blocks (else: of those for which there are slots)."""
    p.open(key, d.peer, (count or len(slots)) * BLOCK_SIZE)
    await d.events.next(Wanted)
    d.grant(key, slots)
    assert await p.events.next(Ticketed) == Ticketed(key, len(slots))


async def free(*nodes: Node) -> None:
    await until(lambda: not any(node.endpoint.stats().slots_taken for node in nodes))


TRANSPORTS = ["shm", "tcp", "zmq", UCX]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_prompt_larger_than_all_slots(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(monkeypatch, transport, BIG, slots=8) as (p, d):
        contents = [p.pool.fill(i, f"block {i} ") for i in range(40)]
        await granted(p, d, KEY, {i: 47 - i for i in range(40)})
        p.offer(KEY, range(40))
        p.finish(KEY)
        assert await d.events.next(Arrived, 60) == Arrived(KEY, FIRST, 40 * BIG)
        assert await p.events.next(Delivered) == Delivered(KEY, 40, 40 * BIG)
        assert all(d.pool.read(47 - i) == contents[i] for i in range(40))
        await free(p, d)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_nothing_leaves_before_its_copy_is_over(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(monkeypatch, transport) as (p, d):
        await granted(p, d, KEY, {0: 0, 1: 1})
        stage(p).gate.clear()
        content = p.pool.fill(3, "three ")
        p.offer(KEY, [3])
        await until(lambda: p.endpoint.stats().slots_taken == 1)
        assert p.endpoint.stats().blocks_sent == 0
        stage(p).gate.set()
        await until(lambda: d.endpoint.stats().blocks_received == 1)
        assert d.pool.read(0) == content
        await free(p)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_nothing_has_arrived_before_it_is_in_its_block(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(monkeypatch, transport) as (p, d):
        content = p.pool.fill(3, "three ")
        before = d.pool.read(9)
        stage(d).gate.clear()
        await granted(p, d, KEY, {0: 9})
        p.offer(KEY, [3])
        p.finish(KEY)
        await until(lambda: d.endpoint.stats().slots_taken == 1)
        assert d.pool.read(9) == before and d.events.empty()
        assert d.endpoint.stats().blocks_received == 0
        stage(d).gate.set()
        await d.events.next(Arrived)
        assert d.pool.read(9) == content
        await free(p, d)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_grant_comes_back_when_the_copy_into_it_is_over(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(monkeypatch, transport) as (p, d):
        content = p.pool.fill(3, "three ")
        stage(d).gate.clear()
        await granted(p, d, KEY, {0: 9, 1: 8})
        p.offer(KEY, [3])
        await until(lambda: stage(d).num_asked == 1)
        d.endpoint.command(Revoke(KEY))
        broken = await p.events.next(Broken)
        assert broken == Broken(KEY, "refused", "gone")
        assert d.events.empty() and d.endpoint.stats().slots_taken == 1
        stage(d).gate.set()
        # What was on its way is there, and is no surprise to anybody.
        assert await d.events.next(Returned) == Returned(KEY, (0,), "revoked")
        assert d.pool.read(9) == content
        await free(p, d)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_abort_waits_for_the_copy_out_of_the_block(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(monkeypatch, transport) as (p, d):
        await granted(p, d, KEY, {0: 0})
        stage(p).gate.clear()
        p.offer(KEY, [3])
        await until(lambda: stage(p).num_asked == 1)
        opening = threading.Timer(0.05, stage(p).gate.set)
        opening.start()
        p.endpoint.command(Abort(KEY, "cancelled"))
        # From here on the engine may write to the block.
        assert stage(p).num_copied == 1 and p.endpoint.stats().slots_taken == 0
        opening.join()
        assert await d.events.next(Returned) == Returned(KEY, (), "aborted")
        assert d.endpoint.stats().blocks_received == 0


async def test_receivers_that_take_nothing_do_not_keep_all_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node, "NUM_SLOTS", 16)
    timers = replace(PATIENT, stall_s=300.0)  # nor is anything asked for anew
    p, one, two, quick = (
        Node(id, epoch, 64, timers=timers, transport="tcp")
        for epoch, id in enumerate(("p", "one", "two", "quick"))
    )
    slow = {Key(7, 1): one, Key(8, 1): two}
    async with running(p, *slow.values(), quick):
        contents = [p.pool.fill(i, f"block {i} ") for i in range(48)]
        for number, (key, receiver) in enumerate(slow.items()):
            stage(receiver).gate.clear()
            await granted(p, receiver, key, {i: i for i in range(16)})
            p.offer(key, range(16 * number, 16 * (number + 1)))
            # A half of the 8 for what goes out, then a half of the rest.
            held = (4, 6)[number]
            await until(lambda held=held: stats(p).slots_taken >= held)  # type: ignore[misc]
        other = Key(9, 1)
        await granted(p, quick, other, {i: i for i in range(16)})
        p.offer(other, range(32, 48))
        p.finish(other)
        await quick.events.next(Arrived, 60)
        assert [quick.pool.read(i) for i in range(16)] == contents[32:]
        for number, (key, receiver) in enumerate(slow.items()):
            assert stats(receiver).blocks_received == 0
            stage(receiver).gate.set()
            p.finish(key)
            await receiver.events.next(Arrived, 60)
            there = [receiver.pool.read(i) for i in range(16)]
            assert there == contents[16 * number : 16 * (number + 1)]
        await free(p, one, two, quick)


async def test_a_message_larger_than_all_slots_that_breaks_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a sender that does not keep to its window: what was granted to it comes back."""
    monkeypatch.setattr(node, "NUM_SLOTS", 4)
    d = Node("d", 2, timers=PATIENT, transport="tcp")
    async with running(d):
        with raw_sender(d) as raw:
            ticket = await raw.ticket(KEY, 11, {0: 8, 1: 4, 2: 5})
            contents = [bytes([i]) * 64 for i in (1, 2, 3)]
            head = protocol.encode(raw.header(ticket, contents))
            assert isinstance(raw.data, RawTcp)
            raw.data.socket.sendall(PREFIX.pack(len(head), 3 * 64) + head + contents[0])
            raw.data.close()
            await until(lambda: stats(d).dropped["incomplete"] == 3)
            d.endpoint.command(Revoke(KEY))
            assert await d.events.next(Returned) == Returned(KEY, (), "revoked")
            assert not any(d.pool.memory)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_two_workers_that_send_to_each_other(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their slots are few, and neither waits for slots that the other one holds."""
    async with pair(monkeypatch, transport, BIG, slots=4) as (a, b):
        contents = {
            node.id: [node.pool.fill(i, f"{node.id} {i} ") for i in range(12)] for node in (a, b)
        }
        for source, target, key in ((a, b, Key(1, 1)), (b, a, Key(2, 1))):
            await granted(source, target, key, {i: 20 + i for i in range(12)})
        for source, key in ((a, Key(1, 1)), (b, Key(2, 1))):
            source.offer(key, range(12))
            source.finish(key)
        for _ in range(2):
            for node in (a, b):
                await node.events.next(Delivered | Arrived, 60)  # type: ignore[arg-type]
        for here, there in ((a, b), (b, a)):
            assert [here.pool.read(20 + i) for i in range(12)] == contents[there.id]
        await free(a, b)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_aborts_at_every_moment(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty transfers, most of them ended by either side at some moment: what the engines are
    told is true, and no slot is lost."""
    async with pair(monkeypatch, transport, 4096, slots=12) as (p, d):
        for number in range(40):
            key = Key(number, 1)
            content = [p.pool.fill(i, f"{number} {i} ") for i in range(12)]
            await granted(p, d, key, {i: i for i in range(12)})
            for i in range(12):
                p.endpoint.command(Offer(key, (BlockRef(i, i, BLOCK_SIZE),)))
                if i == number % 13:
                    break
                await asyncio.sleep(0)
            for _ in range(number % 7):
                await asyncio.sleep(0.0005)
            if number % 13 == 12:
                p.finish(key)
                await d.events.next(Arrived)
                await p.events.next(Delivered)
                assert [d.pool.read(i) for i in range(12)] == content
                continue
            if number % 2:
                p.endpoint.command(Abort(key, "cancelled"))
            else:
                d.endpoint.command(Revoke(key))
                await p.events.next(Broken)
            returned = await d.events.next(Returned)
            assert all(d.pool.read(i) == content[i] for i in returned.landed)
            # The slots may be used by others now: whatever came late would be seen.
            marks = [d.pool.fill(i, f"mine {number}.{i} ") for i in range(12)]
            await asyncio.sleep(0.002)
            assert [d.pool.read(i) for i in range(12)] == marks
        await free(p, d)
        # A UCX helper may read on while slots are used again: then the digest shows it.
        assert transport == "ucx" or not d.endpoint.stats().digest_errors


def test_slots_are_counted() -> None:
    memory = StagedPool(BytePool(4), 8)
    assert memory.shared is not None
    slots = Slots(memory, 2, 4)
    assert slots.take(5) is None
    taken = slots.take(3)
    assert taken == [2, 3, 4] and slots.num_free == 1
    assert list(memory.shared.generations) == [0, 0, 1, 1, 1, 0, 0, 0]
    slots.give([3])
    slots.check()
    assert slots.take(2) == [3, 5] and slots.num_taken == 4
    with pytest.raises(KeyError):
        slots.give([0])
    memory.close()


@pytest.mark.parametrize("staged", ["p", "d"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_only_one_of_them_is_staged(
    transport: str, staged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on a GPU and one on a CPU."""
    nodes: dict[str, Node] = {}
    for epoch, id in enumerate("pd"):
        monkeypatch.setattr(node, "NUM_SLOTS", 24 if id == staged else 0)
        nodes[id] = Node(id, epoch, 48, timers=PATIENT, transport=transport)
    monkeypatch.setattr(node, "NUM_SLOTS", 24)
    p, d = nodes["p"], nodes["d"]
    async with running(p, d):
        contents = [p.pool.fill(i, f"block {i} ") for i in range(30)]
        await granted(p, d, KEY, {i: 47 - i for i in range(30)})
        p.offer(KEY, range(30))
        p.finish(KEY)
        await d.events.next(Arrived)
        await p.events.next(Delivered)
        assert [d.pool.read(47 - i) for i in range(30)] == contents
        await free(p, d)
