"""Which transport a pair uses, and what each does when its peer breaks off, stops or lies."""

import asyncio
import gc
import os
import socket
from pathlib import Path

import pytest

from common.errors import ConfigError
from kvtransfer import protocol
from kvtransfer.commands import Arrived, Broken, Delivered, Key, Returned, Revoke, Slot, Wanted
from kvtransfer.outgoing import Shipment
from kvtransfer.tcp_transport import PREFIX, TcpOutlet
from kvtransfer.transports import ORDER, offered
from tests.kvtransfer.conftest import UCX
from tests.kvtransfer.node import FIRST, PATIENT, Node, running
from tests.kvtransfer.pool import BLOCK_SIZE, WIRE, BytePool
from tests.kvtransfer.raw_sender import RawShm, RawTcp, raw_sender

KEY = Key(7, 1)
CONTENT = bytes(range(64))


async def ship(p: Node, d: Node, key: Key, num_blocks: int = 3) -> None:
    """A whole transfer; the blocks go to the same numbers."""
    for block in range(num_blocks):
        p.pool.fill(block, f"{key} {block} ")
    p.open(key, d.peer, num_blocks * BLOCK_SIZE)
    await d.events.next(Wanted)
    d.grant(key, {i: i for i in range(num_blocks)})
    p.offer(key, range(num_blocks))
    p.finish(key)
    await d.events.next(Arrived)
    await p.events.next(object)  # Ticketed
    await p.events.next(Delivered)
    assert all(d.pool.read(i) == p.pool.read(i) for i in range(num_blocks))


@pytest.mark.parametrize(
    ("here", "there", "used"),
    [
        ("auto", "auto", "shm"),
        ("tcp", "auto", "tcp"),
        ("auto", "tcp", "tcp"),
        ("zmq", "auto", "zmq"),
        ("auto", "zmq", "zmq"),
        ("shm", "auto", "shm"),
        pytest.param("ucx", "ucx", "ucx", marks=UCX.marks),
    ],
)
async def test_the_pair_uses_the_first_that_both_offer(here: str, there: str, used: str) -> None:
    p = Node("p", 1, transport=here, timers=PATIENT)
    d = Node("d", 2, transport=there, timers=PATIENT)
    async with running(p, d):
        await ship(p, d, KEY)
        assert p.endpoint.stats().bytes_sent_over == {used: 3 * 64}
        assert p.endpoint.stats().links_over == {used: 1} and not d.endpoint.stats().links_over
        assert p.endpoint.stats().exposed_s > 0
        assert d.endpoint.stats().bytes_received_over == {used: 3 * 64}
        assert d.endpoint.stats().seconds_receiving_over[used] > 0


@pytest.mark.parametrize("address", ["unix:@tandem-kv-nobody", "nonsense"])
async def test_falls_back_to_what_can_be_reached(address: str) -> None:
    p, d = Node("p", 1), Node("d", 2)
    async with running(p, d):
        d.endpoint._receiver.data["shm"] = address
        await ship(p, d, KEY)
        assert p.endpoint.stats().bytes_sent_over == {"tcp": 3 * 64}


@pytest.mark.parametrize(
    ("transport", "address"),
    [("shm", "unix:@tandem-kv-nobody"), ("tcp", "tcp://127.0.0.1:1"), ("tcp", "nonsense"),
     ("zmq", "nonsense"), pytest.param("ucx", "nonsense", marks=UCX.marks)],
)  # fmt: skip
async def test_a_forced_transport_that_cannot_connect(transport: str, address: str) -> None:
    p, d = Node("p", 1, transport=transport), Node("d", 2)
    async with running(p, d):
        d.endpoint._receiver.data[transport] = address
        p.open(KEY, d.peer, 16)
        broken = await p.events.next(Broken)
        assert (broken.reason, broken.detail.split(":")[:2]) == (
            "peer",
            ["no data connection", f" {transport}"],
        )


async def test_no_common_transport() -> None:
    p, d = Node("p", 1, transport="tcp"), Node("d", 2, transport="shm")
    async with running(p, d):
        p.open(KEY, d.peer, 16)
        broken = await p.events.next(Broken)
        assert broken == Broken(KEY, "refused", "transport: tcp of the sender, shm here")


def test_what_cannot_be_offered() -> None:
    pool = BytePool(1)
    assert offered("auto", pool) == ORDER == ("shm", "tcp", "zmq")
    pool.shared = None
    assert offered("auto", pool) == ("tcp", "zmq")
    with pytest.raises(ConfigError, match="--transport shm cannot be used here, but tcp, zmq"):
        offered("shm", pool)


# ------------------------------------------------------------ tcp


async def test_a_slot_is_given_back_in_mid_frame_and_not_written_again() -> None:
    d = Node("d", 2, transport="tcp")
    async with running(d):
        with raw_sender(d) as raw:
            assert isinstance(raw.data, RawTcp)
            ticket = await raw.ticket(KEY, 11, {0: 8})
            head = protocol.encode(raw.header(ticket, [CONTENT]))
            raw.data.socket.sendall(PREFIX.pack(len(head), 64) + head + CONTENT[:40])
            while d.pool.read(8)[:40] != CONTENT[:40]:
                await asyncio.sleep(0.001)
            d.endpoint.command(Revoke(KEY))
            assert await d.events.next(Returned, 0) == Returned(KEY, (), "revoked")
            new = d.pool.fill(8, "another request")
            raw.data.socket.sendall(CONTENT[40:])
            # The stream is still in step: the next transfer arrives on it.
            await raw.send(raw.begin(Key(8, 1), 12, BLOCK_SIZE))
            await d.events.next(Wanted)
            d.grant(Key(8, 1), {0: 9})
            ticket = await raw.receive(protocol.Ticket)
            await raw.ship(raw.header(ticket, [CONTENT]), [CONTENT])
            await raw.close(ticket)
            assert await d.events.next(Arrived) == Arrived(Key(8, 1), FIRST, 64)
            assert d.pool.read(8) == new and d.pool.read(9) == CONTENT


async def test_a_connection_that_is_reset_in_mid_frame_lands_nothing() -> None:
    d = Node("d", 2, transport="tcp")
    async with running(d):
        with raw_sender(d) as raw:
            assert isinstance(raw.data, RawTcp)
            ticket = await raw.ticket(KEY, 11, {0: 8, 1: 9})
            head = protocol.encode(raw.header(ticket, [CONTENT, CONTENT]))
            raw.data.socket.sendall(PREFIX.pack(len(head), 128) + head + CONTENT + CONTENT[:40])
            while d.pool.read(9)[:40] != CONTENT[:40]:
                await asyncio.sleep(0.001)
            raw.data.close()
            while not d.endpoint.stats().dropped["incomplete"]:
                await asyncio.sleep(0.001)
            raw.data = RawTcp()
            raw.data.connect(d.endpoint._receiver.data["tcp"])
            await raw.send(raw.begin(KEY, 11, 32, round=1))
            ticket = await raw.receive(protocol.Ticket)
            assert ticket.slots == (Slot(0, 8, 5), Slot(1, 9, 5))
            await raw.ship(raw.header(ticket, [CONTENT] * 2), [CONTENT] * 2)
            await raw.close(ticket)
            assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 128)


@pytest.mark.parametrize(
    "data",
    [PREFIX.pack(0, 0), PREFIX.pack(1 << 30, 0), PREFIX.pack(1, 1 << 31), PREFIX.pack(1, 0) + b"x"],
)
async def test_a_stream_that_cannot_be_followed_is_closed(data: bytes) -> None:
    d = Node("d", 2, transport="tcp")
    async with running(d):
        raw = RawTcp()
        raw.connect(d.endpoint._receiver.data["tcp"])
        raw.socket.sendall(data)
        raw.socket.setblocking(False)
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(raw.socket, 1)
            raise ConnectionResetError  # closed without a reset
        assert d.endpoint.stats().dropped == {"malformed": 1}
        raw.close()


async def test_an_abandoned_shipment_is_not_read_from_the_pool() -> None:
    pool = BytePool(16, 1 << 20)
    for block in range(16):
        pool.fill(block, "old")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outlet = await TcpOutlet.connect(f"tcp://127.0.0.1:{port}", pool)
        far, _ = server.accept()
        shipment = Shipment(protocol.DataHeader(11, b"", 1, 1, (), WIRE), ((0, 16),))
        outlet.send(shipment)
        assert outlet.reading == 11 and not outlet.writable()
        outlet.abandon()
        for block in range(16):
            pool.fill(block, "new")
        head = protocol.encode(shipment.header)
        expected = PREFIX.size + len(head) + (16 << 20)
        received = await asyncio.to_thread(read_exactly, far, expected)
        assert b"new" not in received and received.endswith(bytes(1 << 20))
        assert await outlet.changed()
        assert outlet.writable() and outlet.reading is None
        far.close()
        assert not await outlet.changed()
        outlet.close()


def read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += connection.recv(1 << 20)
    assert len(data) == count
    return data


# ------------------------------------------------------------ shm


@pytest.mark.parametrize("change", ["generation", "content"])
async def test_a_pool_that_changes_before_the_copy(change: str) -> None:
    """The header was sent; the sender's block is used anew before the receiver looks at it."""
    d = Node("d", 2, transport="shm")
    async with running(d):
        with raw_sender(d) as raw:
            assert isinstance(raw.data, RawShm)
            ticket = await raw.ticket(KEY, 11, {0: 8, 1: 9})
            other = bytes(64)
            await raw.ship(raw.header(ticket, [CONTENT, other]), [CONTENT, other])
            if change == "generation":
                raw.data.shared.generations[0] += 1
            else:
                raw.data.shared.blocks[5] ^= 1
            assert await raw.receive(protocol.Landed) == protocol.Landed(11, (1,))
            stats = d.endpoint.stats()
            counts = (stats.dropped["incomplete"], stats.digest_errors)
            assert counts == ((1, 0) if change == "generation" else (0, 1))
            await raw.close(ticket)
            again = await raw.receive(protocol.Ticket)
            assert again.slots == (Slot(0, 8, 5),)
            d.endpoint.command(Revoke(KEY))
            assert await d.events.next(Returned, 0) == Returned(KEY, (1,), "revoked")


async def test_a_block_outside_of_the_shared_pool() -> None:
    d = Node("d", 2, transport="shm")
    async with running(d):
        with raw_sender(d) as raw:
            assert isinstance(raw.data, RawShm)
            ticket = await raw.ticket(KEY, 11, {0: 8})
            header = raw.header(ticket, [CONTENT])
            for block in (8, -1, 1 << 40):
                source = protocol.SharedBlock(block, 0)
                raw.data.send(protocol.SharedHeader(header, (source,)))
            raw.data.send(protocol.SharedHeader(header, ()))
            while d.endpoint.stats().dropped["malformed"] < 4:
                await asyncio.sleep(0.001)
            assert not any(d.pool.memory)
            await raw.ship(header, [CONTENT])
            await raw.close(ticket)
            assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 64)


async def test_what_is_no_shared_pool_is_refused() -> None:
    d = Node("d", 2, transport="shm")
    unsealed = os.memfd_create("test")
    async with running(d):
        for fds in ([], [unsealed]):
            raw = RawShm()
            raw.connect(d.endpoint._receiver.data["shm"], fds)
            raw.socket.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(raw.socket, 1) == b""
            raw.close()
        assert d.endpoint.stats().dropped == {"malformed": 2}
    os.close(unsealed)


# ------------------------------------------------------------ what is left


def holdings() -> tuple[int, int]:
    """File descriptors of this process, and mappings of KV pools."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:tandem-kv")


async def test_nothing_is_left_behind(transport: str) -> None:
    async def scene(epoch: int) -> None:
        p, d = Node("p", epoch, timers=PATIENT), Node("d", epoch + 1, timers=PATIENT)
        async with running(p, d):
            await ship(p, d, KEY)
            p.open(Key(8, 1), d.peer, 32)
            await d.events.next(Wanted)
            p.endpoint.reset(epoch + 2)
            await p.events.next(Broken)
            while d.endpoint.stats().receiving:
                await asyncio.sleep(0.001)

    await scene(1)
    before = holdings()
    for epoch in (10, 20, 30):
        await scene(epoch)
    assert holdings() == before
