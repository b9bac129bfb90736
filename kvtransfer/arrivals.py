"""Blocks that come in through host slots: received and digested there, then copied to their blocks.

    header accepted -> slots -> received, digests -> copied on -> landed

A landing is given back to the receiver, and with it the grant to the engine, only when the copy
to the granted blocks is over: a transfer that ends before waits for it. What was not sent as it
was digested is never copied. Used by `Endpoint`, whose blocks are out of the reach of transports;
owns the incoming slots.
"""

import asyncio
import time
from collections.abc import AsyncIterator

from kvtransfer.incoming import Landing
from kvtransfer.intake import Intake
from kvtransfer.memory import Copied, StagedMemory
from kvtransfer.receiver import Receiver
from kvtransfer.staging import Slots, Waiting
from kvtransfer.stats import TransferStats
from kvtransfer.transport import Payload

_Storing = tuple[Landing, list[int | None], list[int], Copied]
"""A landing, its digests, its slots and the copies out of them."""


class Arrivals(Intake):
    """An intake whose blocks go through slots."""

    def __init__(
        self,
        receiver: Receiver,
        memory: StagedMemory,
        stats: TransferStats,
        slots: Slots,
        waiting: Waiting,
    ) -> None:
        super().__init__(receiver, memory, stats)
        self.slots = slots
        self._staged = memory
        self._waiting = waiting
        self._turn = asyncio.Lock()
        """Whoever waits for slots, in the order in which they came."""
        self._freed = asyncio.Event()
        self._held: dict[Payload, list[int]] = {}
        """Slots that are being received into."""
        self._storing: asyncio.Queue[_Storing] = asyncio.Queue()
        self._num_storing = 0
        """Slots that are being copied from."""
        self._stored: _Storing | None = None
        """What `landings` waits for."""

    async def landings(self) -> AsyncIterator[None]:
        """Give back what was copied to its blocks, for ever; yields whenever the receiver may have
        something to say."""
        while True:
            self._stored = await self._storing.get()
            await self._waiting.over(self._stored[3])
            self._give_back_stored()
            yield

    def check(self) -> None:
        """Assert that every slot is free, received into, or copied from."""
        self.slots.check()
        held = sum(map(len, self._held.values()))
        assert self.slots.num_taken == held + self._num_storing, (held, self._num_storing)

    def close(self) -> None:
        """Nothing is copied any more when this returns."""
        super().close()
        while self._stored is not None or not self._storing.empty():
            self._stored = self._stored or self._storing.get_nowait()
            self._stored[3].synchronize()
            self._give_back_stored()

    async def _take(self, payload: Payload) -> None:
        landing = self._receiver.accept(payload.header, payload.num_bytes, time.monotonic())
        if landing is None:
            await payload.copy(())
            return
        wanted = [i for i, block in enumerate(landing.slots) if block is not None]
        if len(wanted) > self.slots.count:  # of a sender that does not keep to its window
            try:
                await payload.copy(())
            finally:
                nothing = [None] * len(landing.slots)
                self._receiver.landed(landing, nothing, time.monotonic())
            return
        self._copies[payload] = landing
        digests: list[int | None] = [None] * len(landing.slots)
        try:
            slots = await self._take_slots(len(wanted))
            if payload not in self._copies:
                self._free(slots)  # given up while it waited for them
                await payload.copy(())
                return
            self._held[payload] = slots
            slabs: list[memoryview | None] = [None] * len(landing.slots)
            for i, slot in zip(wanted, slots, strict=True):
                slabs[i] = self._memory.slab(slot)
            digests = await payload.copy(slabs)
            if payload in self._copies:
                self._store(payload, landing, digests, dict(zip(wanted, slots, strict=True)))
        finally:
            self._give_back(payload, digests)

    def _store(
        self, payload: Payload, landing: Landing, digests: list[int | None], places: dict[int, int]
    ) -> None:
        """Copy what is as its sender digested it to the blocks that were granted. From here on
        the landing waits for that and for nothing else."""
        pairs: list[tuple[int, int]] = []
        for i, slot in places.items():
            block = landing.slots[i]
            if block is not None and digests[i] == landing.header.blocks[i].digest:
                pairs.append((slot, block))
        if pairs:
            del self._copies[payload]
            slots = self._held.pop(payload)
            self._num_storing += len(slots)
            self._storing.put_nowait((landing, digests, slots, self._staged.store(pairs)))

    def _give_back(self, payload: Payload, digests: list[int | None]) -> None:
        self._free(self._held.pop(payload, []))
        super()._give_back(payload, digests)

    def _give_back_stored(self) -> None:
        assert self._stored is not None
        landing, digests, slots, _ = self._stored
        self._stored = None
        self._num_storing -= len(slots)
        self._free(slots)
        self._receiver.landed(landing, digests, time.monotonic())

    async def _take_slots(self, count: int) -> list[int]:
        async with self._turn:
            while (slots := self.slots.take(count)) is None:
                self._freed.clear()
                await self._freed.wait()
            return slots

    def _free(self, slots: list[int]) -> None:
        self.slots.give(slots)
        self._freed.set()
