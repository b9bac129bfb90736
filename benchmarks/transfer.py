"""How fast KV blocks move between two processes: `python -m benchmarks.transfer [--json FILE]`.

Each way is measured on the same pools with warm pages, in one run: `memcpy` (one thread, one
process) and `raw_tcp` (blocking sockets, no protocol) are the bounds, `shm`, `tcp` and `zmq` whole
transfers of two endpoints from Open to Delivered. This process sends; the receiver is
`benchmarks.transfer_peer`.

gbps: with up to 4 transfers in flight. us_p50: of one transfer alone. cpu_s_per_gb: of both
processes, while gbps was measured. digest: whether every block was digested (by both sides).
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.transfer_peer import (
    CONTENT_ID,
    IN_FLIGHT,
    TIMERS,
    EventQueue,
    Pool,
    groups_of,
    layout_of,
)
from common.messages import Peer
from kvtransfer.commands import BlockRef, Close, Delivered, First, Key, Offer, Open, Ticketed
from kvtransfer.endpoint import Endpoint
from kvtransfer.identity import EndpointIdentity
from kvtransfer.memory import copy_block

LAYOUTS: Final = {
    "0.5B": 24 * 2 * 2 * 16 * 64 * 2,
    "70B": 80 * 2 * 8 * 16 * 128 * 2,
}
"""Bytes of a block of 16 tokens, bfloat16."""
TRANSPORTS: Final = ("shm", "tcp", "zmq")
BLOCKS: Final = (1, 8, 64, 512)
QUICK_BLOCKS: Final = (1, 64)
MAX_ALONE: Final = 64
"""Transfers, at most, of which the median is taken."""


@dataclass(frozen=True, slots=True)
class Row:
    way: str
    layout: str
    blocks: int
    block_bytes: int
    digest: bool
    gbps: float
    us_p50: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured: `blocks` blocks at a time, for about `seconds`."""

    layout: str
    block_bytes: int
    blocks: int
    seconds: float

    def row(self, way: str, digest: bool, count: int, alone: Sequence[float], cost: "Cost") -> Row:
        """`count` transfers took `cost`; one alone took `alone` seconds, several times."""
        gigabytes = count * self.blocks * self.block_bytes / 1e9
        return Row(
            way,
            self.layout,
            self.blocks,
            self.block_bytes,
            digest,
            gbps=round(gigabytes / cost.wall_s, 3),
            us_p50=round(statistics.median(alone) * 1e6, 1),
            cpu_s_per_gb=round(cost.cpu_s / gigabytes, 4),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    wall_s: float
    cpu_s: float


class PeerProcess:
    """The receiving process."""

    def __init__(self, way: str, block_bytes: int, num_blocks: int) -> None:
        command = [sys.executable, "-m", "benchmarks.transfer_peer", way]
        self._process = subprocess.Popen(
            [*command, str(block_bytes), str(num_blocks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()

    def cpu_s(self) -> float:
        """Its CPU time so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("the receiving process ended")
        return line


@contextmanager
def peer_process(way: str, block_bytes: int, num_blocks: int) -> Iterator[PeerProcess]:
    peer = PeerProcess(way, block_bytes, num_blocks)
    try:
        yield peer
    finally:
        peer.close()


class Meter:
    """Wall and CPU time since it was made."""

    def __init__(self, peer: PeerProcess | None = None) -> None:
        self._peer = peer
        self._cpu_s = self._spent()
        self._started = time.perf_counter()

    def cost(self) -> Cost:
        return Cost(time.perf_counter() - self._started, self._spent() - self._cpu_s)

    def _spent(self) -> float:
        return time.process_time() + (self._peer.cpu_s() if self._peer is not None else 0.0)


# ------------------------------------------------------------ the bounds


def measure_memcpy(task: Task, pool: Pool, digest: bool) -> Row:
    """From one half of the pool to the other."""
    half = pool.num_blocks // 2
    groups = max(1, half // task.blocks)

    def copy(turn: int) -> None:
        base = turn % groups * task.blocks
        for block in range(base, base + task.blocks):
            source, slab = pool.slab(block % half), pool.slab(half + block % half)
            if digest:
                copy_block(source, slab)
            else:
                np.copyto(np.frombuffer(slab, np.uint8), np.frombuffer(source, np.uint8))

    return _repeat(task, copy, "memcpy", digest, None)


def measure_raw_tcp(task: Task, pool: Pool, peer: PeerProcess) -> Row:
    """As fast as blocking sockets go: one byte comes back for each transfer."""
    host, _, port = peer.address.rpartition(":")
    groups = groups_of(pool.num_blocks, task.blocks)
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(task.blocks.to_bytes(4, "little"))

        def send(turn: int) -> None:
            base = turn % groups * task.blocks
            connection.sendall(pool.run(base, task.blocks))

        def send_one(turn: int) -> None:
            send(turn)
            connection.recv(1, socket.MSG_WAITALL)

        alone = _alone(task, send_one)
        meter = Meter(peer)
        count = 0
        while count < 2 * groups or meter.cost().wall_s < task.seconds:
            send(count)
            count += 1
            if count > groups:
                connection.recv(1, socket.MSG_WAITALL)
        connection.recv(groups, socket.MSG_WAITALL)
        return task.row("raw_tcp", False, count, alone, meter.cost())


def _alone(task: Task, work: Callable[[int], None]) -> list[float]:
    """Seconds of single transfers, after a warm-up."""
    times: list[float] = []
    ends = time.perf_counter() + task.seconds
    while len(times) < 6 or (len(times) < MAX_ALONE and time.perf_counter() < ends):
        started = time.perf_counter()
        work(len(times))
        times.append(time.perf_counter() - started)
    return times[2:]


def _repeat(
    task: Task, work: Callable[[int], None], way: str, digest: bool, peer: PeerProcess | None
) -> Row:
    alone = _alone(task, work)
    meter = Meter(peer)
    count = 0
    while count < 2 or meter.cost().wall_s < task.seconds:
        work(count)
        count += 1
    return task.row(way, digest, count, alone, meter.cost())


# ------------------------------------------------------------ endpoints


class Sender:
    """An endpoint that ships the blocks of its pool again and again."""

    def __init__(self, transport: str, pool: Pool, target: Peer) -> None:
        identity = EndpointIdentity("sender", 1, CONTENT_ID, layout_of(pool.block_bytes))
        self._events = EventQueue()
        self.endpoint = Endpoint(identity, pool, self._events, TIMERS, "127.0.0.1", transport)
        self._pool = pool
        self._target = target
        self._count = 0

    def open(self, blocks: int) -> None:
        """Start a transfer of which everything is there."""
        base = self._count % groups_of(self._pool.num_blocks, blocks) * blocks
        key = Key(self._count, blocks)
        self._count += 1
        refs = tuple(BlockRef(i, base + i, 16) for i in range(blocks))
        self.endpoint.command(Open(key, self._target, blocks * 16))
        self.endpoint.command(Offer(key, refs))
        self.endpoint.command(Close(key, (First(0, 1, None),)))

    async def delivered(self) -> None:
        """Wait until one of the transfers is over."""
        while True:
            event = await self._events.next()
            if isinstance(event, Delivered):
                return
            assert isinstance(event, Ticketed), event


async def measure_endpoints(
    tasks: Sequence[Task], transport: str, pool: Pool, peer: PeerProcess
) -> list[Row]:
    sender = Sender(transport, pool, Peer("receiver", 2, peer.address))
    await sender.endpoint.start()
    try:
        return [await _measure_sender(task, sender, pool, peer) for task in tasks]
    finally:
        await sender.endpoint.close()


async def _measure_sender(task: Task, sender: Sender, pool: Pool, peer: PeerProcess) -> Row:
    groups = groups_of(pool.num_blocks, task.blocks)
    for _ in range(2 * groups):  # pages, connections
        sender.open(task.blocks)
        await sender.delivered()
    alone: list[float] = []
    ends = time.perf_counter() + task.seconds
    while len(alone) < 4 or (len(alone) < MAX_ALONE and time.perf_counter() < ends):
        started = time.perf_counter()
        sender.open(task.blocks)
        await sender.delivered()
        alone.append(time.perf_counter() - started)
    meter = Meter(peer)
    count = 0
    while count < 2 * groups or meter.cost().wall_s < task.seconds:
        sender.open(task.blocks)
        count += 1
        if count >= groups:
            await sender.delivered()
    for _ in range(groups - 1):
        await sender.delivered()
    (transport,) = sender.endpoint.stats().bytes_sent_over
    return task.row(transport, True, count, alone, meter.cost())


# ------------------------------------------------------------ all of it


def measure(quick: bool) -> Iterator[Row]:
    seconds = 0.3 if quick else 1.5
    for layout, block_bytes in LAYOUTS.items():
        sizes = QUICK_BLOCKS if quick else BLOCKS
        tasks = [Task(layout, block_bytes, blocks, seconds) for blocks in sizes]
        num_blocks = max(IN_FLIGHT * min(max(sizes), 64), max(sizes))
        pool = Pool(num_blocks, block_bytes)
        for digest in (False, True):
            yield from (measure_memcpy(task, pool, digest) for task in tasks)
        with peer_process("raw_tcp", block_bytes, num_blocks) as peer:
            yield from (measure_raw_tcp(task, pool, peer) for task in tasks)
        for transport in TRANSPORTS:
            with peer_process(transport, block_bytes, num_blocks) as peer:
                yield from asyncio.run(measure_endpoints(tasks, transport, pool, peer))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how fast KV blocks move.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter runs")
    arguments = parser.parse_args()
    rows = []
    print(f"{'way':8} {'layout':6} {'blocks':>6} {'digest':6} {'GB/s':>8} {'us p50':>10} CPU s/GB")
    for row in measure(arguments.quick):
        rows.append(asdict(row))
        digest = "yes" if row.digest else "no"
        print(
            f"{row.way:8} {row.layout:6} {row.blocks:6} {digest:6} {row.gbps:8.2f} "
            f"{row.us_p50:10.1f} {row.cpu_s_per_gb:8.3f}",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
