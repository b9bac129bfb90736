"""Host slots before blocks that transports cannot reach: who has which, and waiting for copies.

    FREE --take--> what was taken is copied to, sent from or received into --give--> FREE

Half of the slots are for what goes out and half for what comes in, so that two workers that send
to each other never wait for each other's slots. Used by `departures` and `arrivals`.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvtransfer.memory import Copied, StagedMemory

_WAITERS: Final = 2
"""Threads that wait for copies: one for each direction."""


class Slots:
    """The free ones of some slots. Taking a slot raises its generation, so that a peer that still
    reads it in place finds that it is not what it was offered."""

    def __init__(self, memory: StagedMemory, first: int, count: int) -> None:
        assert 0 <= first and 0 < count <= memory.num_slots - first, (first, count)
        self.count = count
        self._all = range(first, first + count)
        self._shared = memory.shared
        self._free = list(reversed(self._all))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    def take(self, count: int) -> list[int] | None:
        """So many slots, ascending, so that neighbours can be copied as one run; None if there
        are not so many."""
        if count > len(self._free):
            return None
        left = len(self._free) - count
        taken = sorted(self._free[left:])
        del self._free[left:]
        self._taken.update(taken)
        if self._shared is not None:
            for slot in taken:
                self._shared.generations[slot] += 1
        return taken

    def give(self, slots: Sequence[int]) -> None:
        """They are not read nor written any more by whoever took them."""
        for slot in sorted(slots, reverse=True):
            self._taken.remove(slot)
            self._free.append(slot)

    def check(self) -> None:
        """Assert that every slot is free or taken, and only once."""
        assert len(self._free) + len(self._taken) == self.count, (self._free, self._taken)
        assert set(self._free) | self._taken == set(self._all), (self._free, self._taken)


class Waiting:
    """Waits for copies without holding up the loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_WAITERS, "kv-copies")

    async def over(self, copied: Copied) -> None:
        if not copied.query():
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, copied.synchronize)

    def close(self) -> None:
        """Returns when no thread waits any more."""
        self._threads.shutdown()


def halves(memory: StagedMemory) -> tuple[Slots, Slots]:
    """The slots for what goes out, and those for what comes in."""
    assert memory.num_slots >= 2, memory.num_slots
    half = memory.num_slots // 2
    return Slots(memory, 0, half), Slots(memory, half, memory.num_slots - half)
