"""The ways in which `benchmarks.transfer` moves blocks: the bounds and whole endpoints.

All of them send from one pool of this process to one pool of `benchmarks.transfer_peer`, so that
they can be measured in turns.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.transfer_peer import (
    CONTENT_ID,
    WAYS,
    EventQueue,
    Pool,
    WayEndpoint,
    groups_of,
    layout_of,
)
from common.messages import Peer
from kvtransfer.commands import BlockRef, Close, Delivered, First, Key, Offer, Open, Ticketed
from kvtransfer.copying import address_of, copy_blocks, digest_blocks
from kvtransfer.identity import EndpointIdentity


class Way(Protocol):
    name: str
    digest: bool

    async def one(self, blocks: int) -> None:
        """Move that many blocks, alone."""
        ...

    async def many(self, blocks: int, seconds: float) -> int:
        """Move as many times that many blocks as fit into the time, at least once, several at a
        time. Returns how many times."""
        ...

    async def close(self) -> None: ...


class PeerProcess:
    """The receiving process."""

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        command = [sys.executable, "-m", "benchmarks.transfer_peer"]
        self._process = subprocess.Popen(
            [*command, str(block_bytes), str(num_blocks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = dict(self._line().split(" ", 1) for _ in WAYS)
        self.addresses = {way: found[way] for way in WAYS}

    def cpu_s(self) -> float:
        """CPU time so far of both processes and their helpers."""
        return _cpu_s(os.getpid()) + _cpu_s(self._process.pid)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("the receiving process ended")
        return line


def _cpu_s(pid: int) -> float:
    """Of a process and its living children but the peer, which is counted by itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    helpers = [child for child in children if b"ucx_process" in _command(child)]
    total = 0
    for one in (str(pid), *helpers):
        stat = Path(f"/proc/{one}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        total += int(user) + int(system)
    return total / os.sysconf("SC_CLK_TCK")


def _command(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


class _Alone:
    """What happens in this process alone, where several at a time are one after the other."""

    async def one(self, blocks: int) -> None:
        raise NotImplementedError

    async def many(self, blocks: int, seconds: float) -> int:
        ends = time.perf_counter() + seconds
        count = 0
        while not count or time.perf_counter() < ends:
            await self.one(blocks)
            count += 1
        return count


class Memcpy(_Alone):
    """From one half of the pool to the other, in this process alone."""

    name = "memcpy"

    def __init__(self, pool: Pool, digest: bool) -> None:
        self.digest = digest
        self._pool = pool
        self._half = pool.num_blocks // 2
        self._whole = pool.run(0, pool.num_blocks)
        self._turn = 0

    async def one(self, blocks: int) -> None:
        base = self._turn * blocks
        self._turn += 1
        sources = [(base + i) % self._half for i in range(blocks)]
        slabs = [self._pool.slab(self._half + source) for source in sources]
        if self.digest:
            size = self._pool.block_bytes
            offsets = [source * size for source in sources]
            copy_blocks(self._whole, address_of(self._whole), offsets, slabs, size)
        else:
            for source, slab in zip(sources, slabs, strict=True):
                there = np.frombuffer(self._pool.slab(source), np.uint8)
                np.copyto(np.frombuffer(slab, np.uint8), there)

    async def close(self) -> None:
        self._whole.release()


class Digest(_Alone):
    """Reading and digesting blocks, as the sender does, in this process alone."""

    name = "digest"
    digest = True

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._turn = 0

    async def one(self, blocks: int) -> None:
        base = self._turn % groups_of(self._pool.num_blocks, blocks) * blocks
        self._turn += 1
        digest_blocks(self._pool.run(base, blocks), self._pool.block_bytes)

    async def close(self) -> None:
        """It holds nothing."""


class RawTcp:
    """As fast as blocking sockets go: one byte comes back for each transfer."""

    name = "raw_tcp"
    digest = False

    def __init__(self, pool: Pool, address: str) -> None:
        self._pool = pool
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._connections: dict[int, socket.socket] = {}
        self._turn = 0

    async def one(self, blocks: int) -> None:
        connection = self._connection(blocks)
        self._send(connection, blocks)
        connection.recv(1, socket.MSG_WAITALL)

    async def many(self, blocks: int, seconds: float) -> int:
        connection = self._connection(blocks)
        groups = groups_of(self._pool.num_blocks, blocks)
        ends = time.perf_counter() + seconds
        count = answered = 0
        while not count or time.perf_counter() < ends:
            self._send(connection, blocks)
            count += 1
            if count - answered >= groups:
                answered += len(connection.recv(1, socket.MSG_WAITALL))
        connection.recv(count - answered, socket.MSG_WAITALL)
        return count

    async def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _send(self, connection: socket.socket, blocks: int) -> None:
        base = self._turn % groups_of(self._pool.num_blocks, blocks) * blocks
        self._turn += 1
        connection.sendall(self._pool.run(base, blocks))

    def _connection(self, blocks: int) -> socket.socket:
        """One for each size, which is its first word."""
        if blocks not in self._connections:
            connection = socket.create_connection(self._address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(blocks.to_bytes(4, "little"))
            self._connections[blocks] = connection
        return self._connections[blocks]


class Transfers:
    """Whole transfers of an endpoint, from Open to Delivered; every block is digested twice."""

    digest = True

    def __init__(self, name: str, pool: Pool, address: str) -> None:
        self.name = name
        identity = EndpointIdentity("sender", 1, CONTENT_ID, layout_of(pool.block_bytes))
        self._events = EventQueue()
        self._endpoint = WayEndpoint(name, identity, pool, self._events)
        self._pool = pool
        self._target = Peer("receiver", 2, address)
        self._count = 0

    async def start(self) -> "Transfers":
        await self._endpoint.start()
        return self

    async def one(self, blocks: int) -> None:
        self._open(blocks)
        await self._delivered()

    async def many(self, blocks: int, seconds: float) -> int:
        groups = groups_of(self._pool.num_blocks, blocks)
        ends = time.perf_counter() + seconds
        count = delivered = 0
        while not count or time.perf_counter() < ends:
            self._open(blocks)
            count += 1
            if count - delivered >= groups:
                await self._delivered()
                delivered += 1
        for _ in range(count - delivered):
            await self._delivered()
        return count

    async def close(self) -> None:
        await self._endpoint.close()

    def _open(self, blocks: int) -> None:
        """Start a transfer of which everything is there."""
        base = self._count % groups_of(self._pool.num_blocks, blocks) * blocks
        key = Key(self._count, blocks)
        self._count += 1
        refs = tuple(BlockRef(i, base + i, 16) for i in range(blocks))
        self._endpoint.command(Open(key, self._target, blocks * 16))
        self._endpoint.command(Offer(key, refs))
        self._endpoint.command(Close(key, (First(0, 1, None),)))

    async def _delivered(self) -> None:
        """Wait until one of the transfers is over."""
        while True:
            event = await self._events.next()
            if isinstance(event, Delivered):
                return
            assert isinstance(event, Ticketed), event


async def open_ways(pool: Pool, peer: PeerProcess) -> list[Way]:
    """All of them; each is closed by the caller."""
    ways: list[Way] = [Memcpy(pool, False), Memcpy(pool, True), Digest(pool)]
    for name, address in peer.addresses.items():
        if name == "raw_tcp":
            ways.append(RawTcp(pool, address))
        else:
            ways.append(await Transfers(name, pool, address).start())
    return ways
