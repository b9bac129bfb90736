"""The receiving process of `benchmarks.transfer`, and what both processes share.

    python -m benchmarks.transfer_peer BLOCK_BYTES NUM_BLOCKS

Its output is a line for each of WAYS with the address for it; it runs until it is killed.
"""

import asyncio
import secrets
import socket
import sys
from threading import Thread
from typing import Final

from common.config import TimerConfig
from common.kv.shared import SharedBlocks
from common.messages import KvLayoutInfo
from kvtransfer import ucx_messages
from kvtransfer.commands import Grant, Slot, Wanted
from kvtransfer.endpoint import Endpoint, TransferEvent
from kvtransfer.identity import EndpointIdentity
from kvtransfer.ucx_transport import is_installed

IN_FLIGHT: Final = 4
UCX_WAYS: Final = {"ucx_tcp": "net", "ucx_sm": "sm"}
"""Which door of the receiver's helper is used."""
WAYS: Final = ("raw_tcp", "shm", "tcp", "zmq", "zmq_ipc", *(UCX_WAYS if is_installed() else ()))
"""All but `raw_tcp` have an endpoint each."""
TIMERS: Final = TimerConfig(heartbeat_s=5.0, lease_s=30.0, stall_s=20.0)
CONTENT_ID: Final = "benchmark"


class Pool:
    """Blocks in shared memory, every page of which is there."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.shared = SharedBlocks(num_blocks, block_bytes)
        for block in range(num_blocks):
            self.slab(block)[:] = (b"%7d\n" % block) * (block_bytes // 8)

    def slab(self, block: int) -> memoryview:
        return self.run(block, 1)

    def run(self, block: int, count: int) -> memoryview:
        return self.shared.blocks[block * self.block_bytes : (block + count) * self.block_bytes]


class EventQueue:
    """The inbox of an endpoint whose engine lives in the same loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TransferEvent] = asyncio.Queue()

    def put(self, item: TransferEvent, /) -> None:
        self._queue.put_nowait(item)

    async def next(self) -> TransferEvent:
        return await self._queue.get()


def layout_of(block_bytes: int) -> KvLayoutInfo:
    """Some layout of that size."""
    return KvLayoutInfo(
        block_size=16, num_layers=1, num_kv_heads=1, head_dim=block_bytes // 64, dtype="bfloat16"
    )


def groups_of(num_blocks: int, blocks: int) -> int:
    """How many transfers of `blocks` blocks have their own part of the pool, IN_FLIGHT at most."""
    return min(IN_FLIGHT, num_blocks // blocks)


class WayEndpoint(Endpoint):
    """An endpoint for one way; of `zmq_ipc` the data go over a Unix socket, of `ucx_tcp` and
    `ucx_sm` over what UCX is told to use."""

    def __init__(
        self, way: str, identity: EndpointIdentity, pool: Pool, events: EventQueue
    ) -> None:
        super().__init__(identity, pool, events, TIMERS, "127.0.0.1", way.partition("_")[0])
        self._way = way

    def _data_address(self, transport: str) -> str:
        if self._way == "zmq_ipc":
            return f"ipc://@tandem-benchmark-{secrets.token_hex(8)}"
        return super()._data_address(transport)

    async def _listen(self, name: str) -> None:
        await super()._listen(name)
        if self._way in UCX_WAYS:
            doors = ucx_messages.doors_of(self._receiver.data[name])
            kept = [door for door in doors if door.way.startswith(UCX_WAYS[self._way])]
            self._receiver.data[name] = ucx_messages.address_of(kept)


async def receive(way: str, pool: Pool) -> None:
    """Grant every prompt its blocks; the attempt is their number."""
    events = EventQueue()
    identity = EndpointIdentity("receiver", 2, CONTENT_ID, layout_of(pool.block_bytes))
    endpoint = WayEndpoint(way, identity, pool, events)
    await endpoint.start()
    print(way, endpoint.address, flush=True)
    while True:
        event = await events.next()
        if isinstance(event, Wanted):
            number, blocks = event.key
            base = number % groups_of(pool.num_blocks, blocks) * blocks
            slots = tuple(Slot(i, base + i, 1) for i in range(blocks))
            endpoint.command(Grant(event.key, slots))


def receive_raw(server: socket.socket, pool: Pool) -> None:
    """Each connection begins with the number of blocks of its transfers."""
    while True:
        connection, _ = server.accept()
        Thread(target=answer_raw, args=(connection, pool), daemon=True).start()


def answer_raw(connection: socket.socket, pool: Pool) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        blocks = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")
        groups = groups_of(pool.num_blocks, blocks)
        turn = 0
        while fill(connection, pool.run(turn % groups * blocks, blocks)):
            connection.sendall(b".")
            turn += 1


def fill(connection: socket.socket, target: memoryview) -> bool:
    """Receive until `target` is full; False if the connection ends."""
    while target:
        count = connection.recv_into(target)
        if not count:
            return False
        target = target[count:]
    return True


async def receive_all(pool: Pool) -> None:
    async with asyncio.TaskGroup() as group:
        for way in WAYS[1:]:
            group.create_task(receive(way, pool))


def main() -> None:
    block_bytes, num_blocks = int(sys.argv[1]), int(sys.argv[2])
    pool = Pool(num_blocks, block_bytes)
    server = socket.create_server(("127.0.0.1", 0))
    host, port = server.getsockname()
    print(f"raw_tcp {host}:{port}", flush=True)
    Thread(target=receive_raw, args=(server, pool), daemon=True).start()
    asyncio.run(receive_all(pool))


if __name__ == "__main__":
    main()
