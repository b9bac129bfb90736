"""A worker for tests: a real endpoint with a pool, and the engine's side of its queue."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from common.config import TimerConfig
from common.curve import CurveKeys
from common.messages import KvLayoutInfo, Peer
from kvtransfer.commands import BlockRef, Close, First, Grant, Key, Offer, Open, Slot, Wanted
from kvtransfer.endpoint import Endpoint, TransferEvent
from tests.kvtransfer.pool import BLOCK_SIZE, LAYOUT, BytePool, identity
from tests.kvtransfer.slow_device import StagedPool

E = TypeVar("E")
FIRST = (First(0, 17, None),)
TRANSPORT = "auto"
"""Of a node that is not given one; the fixture `transport` sets it."""
NUM_SLOTS = 0
"""Slots before the pool of such a node; 0: its pool is in host memory."""
TIMERS = TimerConfig(heartbeat_s=0.3, dead_after=4, lease_s=2.0, stall_s=1.0)
PATIENT = TimerConfig(heartbeat_s=1.0, dead_after=10, lease_s=15.0, stall_s=10.0)
"""For tests in which nothing may be given up, however busy the machine is."""


class EventQueue:
    """The inbox of an endpoint whose engine lives in the same loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TransferEvent] = asyncio.Queue()

    def put(self, item: TransferEvent, /) -> None:
        self._queue.put_nowait(item)

    async def next(self, kind: type[E], timeout_s: float = 10.0) -> E:
        """The next event, which must be of this kind; repeated Wanted are skipped."""
        async with asyncio.timeout(timeout_s):
            while True:
                event = await self._queue.get()
                if isinstance(event, kind):
                    return event
                assert isinstance(event, Wanted), event

    def empty(self) -> bool:
        return self._queue.empty()


class Node:
    def __init__(
        self,
        id: str,
        epoch: int,
        num_blocks: int = 64,
        block_bytes: int = 64,
        timers: TimerConfig = TIMERS,
        layout: KvLayoutInfo = LAYOUT,
        transport: str | None = None,
        keys: CurveKeys | None = None,
    ) -> None:
        self.id, self.epoch = id, epoch
        self.transport = transport or TRANSPORT
        self.pool = BytePool(num_blocks, block_bytes)
        self.stage = StagedPool(self.pool, NUM_SLOTS) if NUM_SLOTS else None
        self.events = EventQueue()
        self.endpoint = Endpoint(
            identity(id, epoch, layout),
            self.stage or self.pool,
            self.events,
            timers,
            "127.0.0.1",
            self.transport,
            keys,
        )
        self.curve_key = "" if keys is None else keys.public.decode()

    @property
    def peer(self) -> Peer:
        return Peer(self.id, self.epoch, self.endpoint.address, self.curve_key)

    def open(self, key: Key, to: Peer, num_tokens: int) -> None:
        self.endpoint.command(Open(key, to, num_tokens))

    def offer(
        self, key: Key, blocks: Sequence[int], start: int = 0, fill: int = BLOCK_SIZE
    ) -> None:
        """Offer pool blocks for the positions from `start`; `fill` is of the last one."""
        refs = [BlockRef(start + i, block, BLOCK_SIZE) for i, block in enumerate(blocks)]
        if refs:
            refs[-1] = refs[-1]._replace(fill=fill)
        self.endpoint.command(Offer(key, tuple(refs)))

    def finish(self, key: Key, first: tuple[First, ...] = FIRST) -> None:
        self.endpoint.command(Close(key, first))

    def grant(self, key: Key, slots: dict[int, int], generation: int = 1) -> None:
        """`slots`: position to block."""
        granted = tuple(Slot(p, block, generation) for p, block in slots.items())
        self.endpoint.command(Grant(key, granted))


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Start the endpoints, close them at the end; a loop that failed fails the test."""
    for node in nodes:
        await node.endpoint.start()
    try:
        watch = [asyncio.ensure_future(node.endpoint.failed()) for node in nodes]
        yield
        for failed in watch:
            if failed.done():
                failed.result()
            failed.cancel()
    finally:
        for node in nodes:
            await node.endpoint.close()
            if node.stage is not None:
                node.stage.close()
                stats = node.endpoint.stats()
                assert stats.slots == NUM_SLOTS and not stats.slots_taken, stats
