"""Blocks over UCX: both of its ways, a helper that ends or hangs, and senders that lie."""

import asyncio
import errno
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.errors import ConfigError
from kvtransfer import protocol, ucx_messages, ucx_transport
from kvtransfer.commands import Arrived, Delivered, Key, Ticketed, Wanted
from kvtransfer.outgoing import Shipment
from kvtransfer.transports import offered
from kvtransfer.ucx_transport import MISSING, UcxListener, UcxOutlet
from tests.kvtransfer import test_cutting
from tests.kvtransfer.conftest import UCX
from tests.kvtransfer.node import FIRST, PATIENT, Node, running
from tests.kvtransfer.pool import BLOCK_SIZE, WIRE, BytePool
from tests.kvtransfer.raw_sender import raw_sender

KEY = Key(7, 1)
CONTENTS = (bytes(range(64)), bytes(64))
needs_ucxx = [*UCX.marks]


def node(id: str, epoch: int, block_bytes: int = 64) -> Node:
    return Node(id, epoch, block_bytes=block_bytes, timers=PATIENT, transport="ucx")


def helper(of: Node) -> UcxListener:
    listener = of.endpoint._listeners["ucx"]
    assert isinstance(listener, UcxListener)
    return listener


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def keep_way(of: Node, way: str) -> None:
    """Senders are told this way alone."""
    data = of.endpoint._receiver.data
    kept = [door for door in ucx_messages.doors_of(data["ucx"]) if door.way.startswith(way)]
    assert len(kept) == 1
    data["ucx"] = ucx_messages.address_of(kept)


async def ship(p: Node, d: Node, key: Key, num_blocks: int) -> None:
    """Scattered blocks of the sender, to other numbers."""
    blocks = [(5 * i) % 64 for i in range(num_blocks)]
    for block in blocks:
        p.pool.fill(block, f"{key} {block} ")
    p.open(key, d.peer, num_blocks * BLOCK_SIZE)
    await d.events.next(Wanted, 60)
    d.grant(key, {i: 63 - i for i in range(num_blocks)})
    p.offer(key, blocks)
    p.finish(key)
    await d.events.next(Arrived, 60)
    await p.events.next(Ticketed)
    await p.events.next(Delivered)
    assert all(d.pool.read(63 - i) == p.pool.read(block) for i, block in enumerate(blocks))


class TestWhereItIsInstalled:
    pytestmark = needs_ucxx

    @pytest.mark.parametrize("way", ["sm", "net"])
    async def test_large_blocks(self, way: str) -> None:
        p, d = node("p", 1, 1 << 18), node("d", 2, 1 << 18)
        async with running(p, d):
            keep_way(d, way)
            for attempt in range(3):
                await ship(p, d, Key(7, attempt), 60)
            assert d.endpoint.stats().bytes_received_over == {"ucx": 3 * 60 << 18}
            assert not d.endpoint.stats().dropped and not d.endpoint.stats().digest_errors

    async def test_blocks_that_are_cut_to_another_size(self) -> None:
        await test_cutting.test_blocks_are_cut_on_the_way("ucx", 32, 16)

    async def test_a_helper_that_is_killed_costs_its_connections_alone(self) -> None:
        """The other one notices, also over shared memory, where UCX says nothing; senders are told
        the address of the next one."""
        p, d = node("p", 1), node("d", 2)
        async with running(p, d):
            await ship(p, d, Key(7, 1), 3)
            for victim in (p, d):
                dead = helper(victim)
                streams = set(d.endpoint._intake._streams)
                assert len(streams) == 1
                dead._process.send_signal(signal.SIGKILL)
                while streams & d.endpoint._intake._streams:
                    await asyncio.sleep(0.01)
                while victim.endpoint._listeners.get("ucx", dead) is dead:
                    await asyncio.sleep(0.01)
                while p.endpoint.stats().links_over:
                    await asyncio.sleep(0.01)
                while "ucx" not in victim.endpoint._listeners:
                    await asyncio.sleep(0.01)
                await ship(p, d, Key(8 + victim.epoch, 1), 3)

    @pytest.mark.parametrize("victim_id", ["p", "d"])
    async def test_a_helper_that_is_killed_amid_data(self, victim_id: str) -> None:
        """What was under way arrives once there is a new one, and the other one lives on."""
        p, d = node("p", 1, 1 << 18), node("d", 2, 1 << 18)
        async with running(p, d):
            keep_way(d, "net")
            await ship(p, d, Key(7, 1), 60)
            victim, other = (p, d) if victim_id == "p" else (d, p)
            dead, alive = helper(victim), helper(other)
            before = d.endpoint.stats().blocks_received
            shipping = asyncio.create_task(ship(p, d, Key(7, 2), 60))
            while d.endpoint.stats().blocks_received == before:
                await asyncio.sleep(0)
            dead._process.send_signal(signal.SIGKILL)
            await shipping
            while victim.endpoint._listeners.get("ucx", dead) is dead:
                await asyncio.sleep(0.01)
            while "ucx" not in victim.endpoint._listeners:
                await asyncio.sleep(0.01)
            await ship(p, d, Key(7, 3), 60)
            assert helper(other) is alive and alive._process.poll() is None
            before_s = cpu_s(alive._process.pid)
            await asyncio.sleep(1)
            assert cpu_s(alive._process.pid) - before_s < 0.5  # it sleeps again

    async def test_a_helper_that_hangs_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ucx_transport, "MAX_SILENCE", 1)
        d = node("d", 2)
        async with running(d):
            hanging = helper(d)
            hanging._process.send_signal(signal.SIGSTOP)
            while d.endpoint._listeners.get("ucx", hanging) is hanging:
                await asyncio.sleep(0.01)
            assert hanging._process.poll() == -signal.SIGKILL

    async def test_a_connection_is_given_up_before_it_is_answered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who answers late is told so, and does not keep it."""
        p, d = node("p", 1), node("d", 2)
        heard: asyncio.Queue[ucx_messages.FromHelper] = asyncio.Queue()
        async with running(p, d):
            hear = helper(d)._hear

            def listen(message: ucx_messages.FromHelper) -> None:
                hear(message)
                heard.put_nowait(message)

            monkeypatch.setattr(helper(d), "_hear", listen)
            doors = ucx_messages.doors_of(d.endpoint._receiver.data["ucx"])
            kept = [door for door in doors if door.way == "net"]
            helper(d)._process.send_signal(signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await helper(p).connect(ucx_messages.address_of(kept), p.pool)
            helper(d)._process.send_signal(signal.SIGCONT)
            while not isinstance(message := await heard.get(), ucx_messages.Connected):
                pass
            while not isinstance(await heard.get(), ucx_messages.Lost):
                pass
            assert message.way == "net"
            while d.endpoint._intake._streams:
                await asyncio.sleep(0.01)

    async def test_what_does_not_match_is_not_written(self) -> None:
        d = node("d", 2)
        async with running(d):
            with raw_sender(d) as raw:
                ticket = await raw.ticket(KEY, 11, {0: 8, 1: 9})
                right = raw.header(ticket, CONTENTS)
                block = right.blocks[0]
                for count, (check, wrong) in enumerate(
                    [
                        ("secret", right_with(right, secret=bytes(16))),
                        ("epoch", right_with(right, destination_epoch=3)),
                        ("transfer", right_with(right, transfer=12)),
                        ("size", right_with(right, blocks=right.blocks * 2)),
                        (
                            "generation",
                            right_with(right, blocks=(block._replace(generation=4),) * 2),
                        ),
                    ]
                ):
                    await raw.ship(wrong, CONTENTS)
                    while not d.endpoint.stats().dropped[check]:
                        await asyncio.sleep(0.001)
                    assert not any(d.pool.memory), (count, check)
                await raw.ship(right_with(right, blocks=(block._replace(digest=1),)), CONTENTS[:1])
                while not d.endpoint.stats().digest_errors:
                    await asyncio.sleep(0.001)
                await raw.ship(right, CONTENTS)
                await raw.close(ticket)
                assert await d.events.next(Arrived) == Arrived(KEY, FIRST, 128)
                assert (d.pool.read(8), d.pool.read(9)) == CONTENTS


def right_with(header: protocol.DataHeader, **changes: object) -> protocol.DataHeader:
    values = {name: getattr(header, name) for name in header.__struct_fields__}
    return protocol.DataHeader(**(values | changes))


async def test_a_shipment_without_memory_costs_its_connection_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has to be staged is sent in a turn of the loop whose failure would end the worker."""

    def full(staged: memoryview) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ucx_transport, "memory_of", full)
    listener = UcxListener.__new__(UcxListener)
    listener._is_over = False
    outlet = UcxOutlet(listener, 0, BytePool(1))
    outlet.connected.set_result("sm")
    header = protocol.DataHeader(11, b"", 1, 1, (), WIRE)
    outlet.send(Shipment(header, (), (), memoryview(bytes(64))))
    assert not await outlet.changed() and not outlet.writable()


def test_without_ucxx(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install; `auto` does not ask for it."""
    monkeypatch.setattr(ucx_transport, "find_spec", lambda name: None)
    monkeypatch.setattr("kvtransfer.transports.has_rdma", lambda: True)
    pool = BytePool(1)
    with pytest.raises(ConfigError) as found:
        offered("ucx", pool)
    assert str(found.value) == MISSING and "tandem[ucx]" in MISSING and "\n" not in MISSING
    assert offered("auto", pool) == ("shm", "tcp", "zmq")


def test_auto_takes_it_for_rdma_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transports.is_installed", lambda: True)
    pool = BytePool(1)
    for has_rdma, usable in (
        (False, ("shm", "tcp", "zmq")),
        (True, ("shm", "ucx", "tcp", "zmq")),
    ):
        monkeypatch.setattr("kvtransfer.transports.has_rdma", lambda has_rdma=has_rdma: has_rdma)
        assert offered("auto", pool) == usable
    assert offered("ucx", pool) == ("ucx",)
    pool.shared = None
    with pytest.raises(ConfigError, match="--transport ucx cannot be used here, but tcp, zmq"):
        offered("ucx", pool)


def test_the_marker_says_what_is_missing() -> None:
    """The tests above are skipped where the extra is missing, and nowhere else."""
    assert (find_spec("ucxx") is not None) == ucx_transport.is_installed()
