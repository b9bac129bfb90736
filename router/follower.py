"""The blocks of one worker in one epoch, as one router follows them; owned by `router.directory`.

    unsynced --load--> synced --missing number or wrong digest--> unsynced
    any --forget (the link is dead)--> forgotten --next event of the worker--> unsynced

While unsynced, events are still applied to what is known: a wrong row costs a cache miss, never
a wrong answer.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from common.blockhash import BlockHash
from common.messages import WorkerInfo
from common.records import Changed, Digest, unpack_hashes
from router.index import BlockIndex

FILL: Final = 2_048
"""Hashes that are indexed before other tasks of the loop get a turn (about a millisecond)."""


class Follower:
    """`seq` is the number of the last event that counts, -1 if none; `sync_at` is when a snapshot
    is worth reading; `absent_since` is since when a healthy Redis does not show the worker."""

    def __init__(self, info: WorkerInfo, index: BlockIndex) -> None:
        self.info = info
        self.seq = -1
        self.sync_at = 0.0
        self.absent_since: float | None = None
        self._index = index
        self._synced = False
        self._forgotten = False

    @property
    def wants_snapshot(self) -> bool:
        return not self._synced and not self._forgotten

    def drop(self) -> None:
        """The worker is gone: it holds nothing any more."""
        self._index.drop(self.info.id)

    def forget(self) -> None:
        """Drop what it holds until it gives a sign of life."""
        self.drop()
        self._synced = False
        self._forgotten = True

    def change(self, event: Changed) -> bool:
        """True if events were lost before this one. Raises ProtocolError if it holds broken
        hashes; nothing is applied then."""
        stored, evicted = unpack_hashes(event.stored), unpack_hashes(event.evicted)
        self._revive()
        if self._synced and event.seq <= self.seq:
            return False  # in the snapshot already
        lost = event.seq != self.seq + 1 and self._desync()
        self.seq = event.seq
        slot = self._slot()
        self._index.store(slot, stored)
        self._index.evict(slot, evicted)
        return lost

    def check(self, event: Digest) -> bool:
        """True if what was followed so far is not what the worker says of itself."""
        self._revive()
        wanted = (event.count, int.from_bytes(event.xor, "little"))
        if self._synced and event.seq < self.seq:
            return False  # older than the snapshot
        same = event.seq == self.seq and self._index.digest(self._slot()) == wanted
        self.seq = event.seq
        return not same and self._desync()

    async def load(self, seq: int, hashes: Sequence[BlockHash], changes: Sequence[Changed]) -> None:
        """Begin anew with the snapshot of event `seq` and all later `changes` up to now.

        Raises ProtocolError. Other tasks get their turn in between; the new blocks are seen all
        at once, at the end.
        """
        parts = [(unpack_hashes(c.stored), unpack_hashes(c.evicted)) for c in changes]
        slot = self._index.new_slot()
        for i in range(0, len(hashes), FILL):
            self._index.store(slot, hashes[i : i + FILL])
            await asyncio.sleep(0)
        for stored, evicted in parts:
            self._index.store(slot, stored)
            self._index.evict(slot, evicted)
            await asyncio.sleep(0)
        if self._forgotten:  # meanwhile
            self._index.retire(slot)
            return
        self._index.assign(self.info.id, slot)
        self.seq = changes[-1].seq if changes else seq
        self._synced = True

    def _slot(self) -> int:
        slot = self._index.slot(self.info.id)
        if slot is None:
            slot = self._index.new_slot()
            self._index.assign(self.info.id, slot)
        return slot

    def _revive(self) -> None:
        if self._forgotten:
            self._forgotten = False
            self.sync_at = 0.0

    def _desync(self) -> bool:
        """False if it was unsynced before."""
        was_synced = self._synced
        if was_synced:
            self._synced = False
            self.sync_at = 0.0
        return was_synced
