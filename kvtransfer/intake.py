"""What comes in over the data connections of an endpoint, and goes into the granted slots.

Used by `Endpoint`, which runs the loops of this file and sends what the receiver then has to say.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from common.errors import ProtocolError
from kvtransfer.incoming import Landing
from kvtransfer.memory import BlockMemory
from kvtransfer.receiver import Receiver
from kvtransfer.stats import TransferStats
from kvtransfer.transport import Payload, Stream

log = logging.getLogger("tandem.transfer")

TURN_BYTES = 1 << 20
TURN_MESSAGES = 16
"""A connection that is never empty leaves the loop to others after so much."""
MAX_STREAMS = 1024
"""Connections that are read at a time."""


class Intake:
    """Judges headers by the receiver and has the transports write the blocks."""

    def __init__(self, receiver: Receiver, memory: BlockMemory, stats: TransferStats) -> None:
        self._receiver = receiver
        self._memory = memory
        self._stats = stats
        self._copies: dict[Payload, Landing] = {}
        """Copies that are under way."""
        self._streams: set[Stream] = set()

    def add(self, stream: Stream) -> bool:
        """Take over a connection, to be read next; False (and closed) if there are too many."""
        if len(self._streams) >= MAX_STREAMS:
            stream.close()
            return False
        self._streams.add(stream)
        return True

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    async def read(self, stream: Stream) -> AsyncIterator[None]:
        """Read a connection to its end; yields whenever the receiver may have something to say."""
        num_bytes, seconds = 0, 0.0
        turn_bytes = turn = 0
        try:
            while True:
                try:
                    payload = await stream.receive()
                except ProtocolError as error:
                    log.debug("%s: %s", stream.transport, error)
                    self._stats.dropped["malformed"] += 1
                    continue
                started = time.monotonic()
                await self._take(payload)
                seconds += time.monotonic() - started
                num_bytes += payload.num_bytes
                self._count(stream.transport, payload.num_bytes, time.monotonic() - started)
                yield
                turn, turn_bytes = turn + 1, turn_bytes + payload.num_bytes
                if turn >= TURN_MESSAGES or turn_bytes >= TURN_BYTES:
                    turn = turn_bytes = 0
                    await asyncio.sleep(0)
        except ConnectionError:
            if num_bytes:
                rate = num_bytes / max(seconds, 1e-9) / 1e9
                log.info("received %d bytes over %s, %.2f GB/s", num_bytes, stream.transport, rate)
        finally:
            self._streams.discard(stream)
            stream.close()

    def abandon_ended(self) -> None:
        """Give back the landings of transfers that have ended; their slots are not written from
        here on."""
        for payload, landing in list(self._copies.items()):
            if landing.is_over:
                payload.abandon()
                self._give_back(payload, [None] * len(landing.slots))

    async def _take(self, payload: Payload) -> None:
        landing = self._receiver.accept(payload.header, payload.num_bytes, time.monotonic())
        if landing is None:
            await payload.copy(())
            return
        self._copies[payload] = landing
        digests: list[int | None] = [None] * len(landing.slots)
        try:
            slabs = [None if slot is None else self._memory.slab(slot) for slot in landing.slots]
            digests = await payload.copy(slabs)
        finally:
            self._give_back(payload, digests)

    def _give_back(self, payload: Payload, digests: list[int | None]) -> None:
        landing = self._copies.pop(payload, None)
        if landing is not None:
            self._receiver.landed(landing, digests, time.monotonic())

    def _count(self, transport: str, num_bytes: int, seconds: float) -> None:
        self._stats.bytes_received_over[transport] += num_bytes
        self._stats.seconds_receiving_over[transport] += seconds
