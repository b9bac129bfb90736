"""Blocks that leave through host slots: copied out, sent, and held until they have landed.

    cut -> copied to slots of their own -> sent from there -> landed, or given up -> slots free

What is cut for one receiver leaves in the order in which it was cut. Slots are held while
anything may touch them: until the copy into them is over and, once they were sent, until the
receiver has them or the transfer has ended. Used by `Endpoint`, whose blocks are out of the reach
of transports; owns the outgoing slots.
"""

import asyncio
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from common.messages import Peer
from kvtransfer.memory import Copied, StagedMemory
from kvtransfer.outgoing import Cut, Shipment
from kvtransfer.sender import Sender
from kvtransfer.staging import Slots

_MAX_QUEUED: Final = 4
"""Messages to one receiver whose copies are under way or over, and that are not sent yet."""


@dataclass(frozen=True, slots=True)
class Departure:
    cut: Cut
    places: dict[int, int]
    """Slot of each of its source blocks, by position."""
    copied: Copied | None
    """None: a fence has nothing to copy."""

    @property
    def is_loaded(self) -> bool:
        return self.copied is None or self.copied.query()


class Departures:
    """What was cut and has not landed, by receiver."""

    def __init__(self, sender: Sender, memory: StagedMemory, slots: Slots) -> None:
        self.copies: asyncio.Queue[Copied] = asyncio.Queue()
        """In the order in which they were asked for; what was taken out is not asked for again."""
        self.slots = slots
        self._sender = sender
        self._memory = memory
        self._queues: dict[Peer, deque[Departure]] = {}
        self._sent: dict[Peer, list[Departure]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether something could be sent that waits for nothing but its turn."""
        return any(queue[0].is_loaded for queue in self._queues.values() if queue)

    def fill(self, peer: Peer, now: float) -> bool:
        """Cut what can leave next for this receiver, and begin to copy it. Whether there was
        anything."""
        queue = self._queues.setdefault(peer, deque())
        before = len(queue)
        while len(queue) < _MAX_QUEUED:
            cut = self._next_cut(peer, now)
            if cut is None:
                break
            copied, places = None, {}
            if cut.sources:
                slots = self.slots.take(len(cut.sources))
                assert slots is not None, (len(cut.sources), self.slots.num_free)
                blocks = [source.block for source in cut.sources]
                places = {s.position: slot for s, slot in zip(cut.sources, slots, strict=True)}
                copied = self._memory.fetch(list(zip(blocks, slots, strict=True)))
                self.copies.put_nowait(copied)
            queue.append(Departure(cut, places, copied))
        return len(queue) > before

    def next_shipment(self, peer: Peer, in_place: bool) -> Shipment | None:
        """The next message, if its blocks are in their slots. The caller must send it."""
        queue = self._queues.get(peer)
        while queue and queue[0].is_loaded:
            departure = queue.popleft()
            shipment = self._sender.load(peer, departure.cut, departure.places, in_place)
            if shipment is None:
                self.slots.give(list(departure.places.values()))
            else:
                if departure.places:
                    self._sent.setdefault(peer, []).append(departure)
                return shipment
        return None

    def settle(self, reading: Collection[int]) -> None:
        """Free the slots of what has landed or is sent anew, and of transfers that ended: their
        blocks are not copied any more when this returns. `reading`: transfers of which a
        connection is still sending something."""
        for peer in {*self._queues, *self._sent}:
            queue, sent = self._queues.get(peer, deque()), self._sent.get(peer, [])
            done = [d for d in queue if self._is_over(peer, d)]
            done += [d for d in sent if self._is_over(peer, d) or self._is_done(d, reading)]
            if done:
                self._drop(done)
                gone = set(map(id, done))
                self._queues[peer] = deque(d for d in queue if id(d) not in gone)
                self._sent[peer] = [d for d in sent if id(d) not in gone]
            if not self._queues.get(peer):
                self._queues.pop(peer, None)
            if not self._sent.get(peer):
                self._sent.pop(peer, None)

    def lost(self, peer: Peer) -> None:
        """The data connection to this receiver is gone: what was to leave over it is cut anew in
        the next round."""
        self._drop([*self._queues.pop(peer, ()), *self._sent.pop(peer, ())])

    def check(self) -> None:
        """Assert that every slot is free or holds a block that has not landed."""
        self.slots.check()
        held = [d for some in (*self._queues.values(), *self._sent.values()) for d in some]
        assert self.slots.num_taken == sum(len(d.places) for d in held), held

    def close(self) -> None:
        """Nothing is copied any more when this returns."""
        for peer in {*self._queues, *self._sent}:
            self.lost(peer)

    def _next_cut(self, peer: Peer, now: float) -> Cut | None:
        """Receivers that do not take what they were sent must not keep all slots from the others:
        each may hold as many as it leaves free, unless one of its blocks alone needs more. So one
        gets half of all, and whoever comes next, or gets few, is before those that hold many."""
        own = (*self._queues.get(peer, ()), *self._sent.get(peer, ()))
        held = sum(len(departure.places) for departure in own)
        free = self.slots.num_free
        share = max(0, free - held + 1) // 2
        cut = self._sender.next_cut(peer, now, share)
        if cut is None and not held and share < free:
            cut = self._sender.next_cut(peer, now, free)
        return cut

    def _is_over(self, peer: Peer, departure: Departure) -> bool:
        return not self._sender.is_live(peer, departure.cut.transfer.id)

    def _is_done(self, departure: Departure, reading: Collection[int]) -> bool:
        """All of it landed; or the receiver asked anew for what did not, so that what is late of
        it is worth nothing (and is found by its digest, or by the generations of the slots)."""
        cut = departure.cut
        if cut.transfer.landed.issuperset(cut.positions):
            return True
        return cut.round < cut.transfer.round and cut.transfer.id not in reading

    def _drop(self, departures: list[Departure]) -> None:
        for departure in departures:
            if departure.copied is not None:
                # A moment at most, and only when a transfer fails: the block that is read must
                # not be used again before, nor the slot.
                departure.copied.synchronize()
            self.slots.give(list(departure.places.values()))
