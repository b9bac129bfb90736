"""A prompt whose KV comes from a prefill worker: its slots, and claims that came too early.

Used by `decode.scheduler` (who gets slots) and `decode.engine` (what becomes of them).
"""

from collections.abc import Collection
from dataclasses import dataclass

from common.events import AttemptId
from common.kv.blocks import BlockManager
from common.messages import Peer
from common.sequence import Sequence
from kvtransfer.commands import Key, Returned, Slot, Wanted

CLAIM_S = 2.0
"""How long a sender's request for slots waits for the router's Admit."""


@dataclass(slots=True, eq=False)
class Handover:
    """An attempt from its Admit until its KV arrived.

    announced -> wanted (stands in the queue) -> granted (slots lent to the I/O thread)
    """

    sequence: Sequence
    """Stands for all choices; holds the pinned blocks that were cached here."""
    source: Peer
    wanted: bool = False
    """The prefill worker asked for slots."""
    told: bool = False
    """Its request was answered, with Grant or Wait."""
    slots: tuple[Slot, ...] | None = None
    """Reserved blocks, from the first that was not cached here; None: not granted."""

    @property
    def key(self) -> Key:
        return Key(self.sequence.request, self.sequence.attempt)

    @property
    def arrival(self) -> int:
        return self.sequence.arrival

    @property
    def priority(self) -> int:
        return self.sequence.priority

    @property
    def choices(self) -> tuple[int, ...]:
        return self.sequence.choices

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of the granted slots in the prompt."""
        assert self.slots is not None, self.key
        return tuple(slot.position for slot in self.slots)

    def is_asked_by(self, wanted: Wanted) -> bool:
        """Whether it is this prompt, in the life of the prefill worker that the router meant."""
        source, here = wanted.source, self.source
        same_worker = (source.id, source.epoch) == (here.id, here.epoch)
        return same_worker and wanted.num_tokens == self.sequence.num_tokens

    def land(self, blocks: BlockManager, landed: Collection[int]) -> list[int]:
        """Take the slots back from the I/O thread; those at positions in `landed` hold verified
        KV, and one reference each is left on them: they are returned in order.

        Full blocks are sealed up to the first gap, beyond which no prefix could match them.
        """
        assert self.slots is not None, self.key
        full = len(self.sequence.hashes)
        kept: list[int] = []
        unbroken = True
        for position, block, generation in self.slots:
            if position not in landed:
                unbroken = False
                blocks.give_back(block, generation)
                continue
            sealed = unbroken and position < full
            blocks.land(block, generation, self.sequence.hashes[position] if sealed else None)
            kept.append(block)
        return kept


class Claims:
    """Requests for slots whose Admit has not come yet, or their end if that came first."""

    def __init__(self) -> None:
        self._events: dict[AttemptId, tuple[Wanted | Returned, float]] = {}  # in order of time

    def add(self, wanted: Wanted, now: float) -> None:
        self._events.setdefault(wanted.key, (wanted, now + CLAIM_S))

    def end(self, returned: Returned) -> None:
        """The sender gave up what it had asked for."""
        if returned.key in self._events:
            _, until = self._events[returned.key]
            self._events[returned.key] = (returned, until)

    def pop(self, attempt: AttemptId) -> Wanted | Returned | None:
        """What the sender said of this attempt before its Admit came."""
        event, _ = self._events.pop(attempt, (None, 0.0))
        return event

    def deadline(self) -> float | None:
        """When the oldest one expires."""
        return next((until for _, until in self._events.values()), None)

    def expire(self, now: float) -> list[Key]:
        """Forget those that waited too long; returns those that are still to be answered."""
        over = [event for event, until in self._events.values() if until <= now]
        for event in over:
            del self._events[event.key]
        return [event.key for event in over if isinstance(event, Wanted)]
