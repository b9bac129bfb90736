"""A device whose copies take time: what transfers see of a GPU, with a thread as its stream."""

import threading
from collections.abc import Sequence
from queue import SimpleQueue

from common.kv.shared import SharedBlocks
from tests.kvtransfer.pool import BytePool


class Event:
    """Behind some copies."""

    def __init__(self) -> None:
        self._over = threading.Event()

    def query(self) -> bool:
        return self._over.is_set()

    def synchronize(self) -> None:
        assert self._over.wait(30.0), "the device does not go on"

    def record(self) -> None:
        self._over.set()


class StagedPool:
    """`StagedMemory` before a `BytePool`. Copies are made in order by a thread of its own, which
    stands still while `gate` is closed."""

    def __init__(self, pool: BytePool, num_slots: int) -> None:
        self.block_bytes = pool.block_bytes
        self.num_slots = num_slots
        self.shared: SharedBlocks | None = SharedBlocks(num_slots, pool.block_bytes)
        self.gate = threading.Event()
        self.gate.set()
        self.num_asked = self.num_copied = 0
        """Of the first: calls, of the second: blocks."""
        self._pool = pool
        self._slots = self.shared.blocks
        self._asked: SimpleQueue[tuple[bool, list[tuple[int, int]], Event] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def slab(self, slot: int) -> memoryview:
        return self.run(slot, 1)

    def run(self, slot: int, count: int) -> memoryview:
        assert 0 <= slot and 0 < count <= self.num_slots - slot, (slot, count)
        return self._slots[slot * self.block_bytes : (slot + count) * self.block_bytes]

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> Event:
        return self._ask(True, pairs)

    def store(self, pairs: Sequence[tuple[int, int]]) -> Event:
        return self._ask(False, pairs)

    def close(self) -> None:
        self.gate.set()
        self._asked.put(None)
        self._thread.join()

    def _ask(self, out: bool, pairs: Sequence[tuple[int, int]]) -> Event:
        event = Event()
        self.num_asked += 1
        self._asked.put((out, list(pairs), event))
        return event

    def _copy(self) -> None:
        while (asked := self._asked.get()) is not None:
            out, pairs, event = asked
            self.gate.wait()
            for source, target in pairs:
                if out:
                    self.slab(target)[:] = self._pool.slab(source)
                else:
                    self._pool.slab(target)[:] = self.slab(source)
                self.num_copied += 1
            event.record()
