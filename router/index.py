"""Which worker holds which prefix: `hash -> bit mask of workers`, for one content id and block
size.

Owned by `router.directory`. Each worker has a slot, one bit of every mask. A worker that goes
loses its slot at once; the bit is used again only after `sweep` has cleared it everywhere.

    free --new_slot--> filling --assign--> assigned --drop, assign--> retired --sweep--> free
"""

from collections.abc import Iterable, Sequence

from common.blockhash import BlockHash


class BlockIndex:
    """About 100 bytes per hash, shared by all workers that hold it."""

    def __init__(self) -> None:
        self._masks: dict[BlockHash, int] = {}
        self._slots: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        """Slot -> worker; the inverse of `_slots`."""
        self._assigned = 0
        """Mask of all assigned slots: bits outside it mean nothing."""
        self._counts: list[int] = []
        self._xors: list[int] = []
        self._free: list[int] = []
        self._retired = 0
        self._sweeping = 0
        """Retired slots whose bits the sweep in progress clears."""
        self._unswept: list[BlockHash] = []

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def swept(self) -> bool:
        """No bit of a worker that is gone is left."""
        return not self._retired | self._sweeping

    def new_slot(self) -> int:
        """A slot to fill; nobody sees it before `assign`."""
        if self._free:
            slot = self._free.pop()
            self._counts[slot] = self._xors[slot] = 0
        else:
            slot = len(self._counts)
            self._counts.append(0)
            self._xors.append(0)
        return slot

    def assign(self, worker: str, slot: int) -> None:
        """From now on the slot is what the worker holds; what it held before is gone."""
        self.drop(worker)
        self._slots[worker] = slot
        self._workers[slot] = worker
        self._assigned |= 1 << slot

    def drop(self, worker: str) -> None:
        """The worker holds nothing any more. Unknown workers are ignored."""
        slot = self._slots.pop(worker, None)
        if slot is not None:
            del self._workers[slot]
            self._assigned &= ~(1 << slot)
            self.retire(slot)

    def retire(self, slot: int) -> None:
        """Give back a slot that is not assigned."""
        assert not self._assigned >> slot & 1, f"slot {slot} is assigned"
        self._retired |= 1 << slot

    def slot(self, worker: str) -> int | None:
        return self._slots.get(worker)

    def store(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        """Add hashes to a slot; those that it has already change nothing."""
        bit = 1 << slot
        masks = self._masks
        for h in hashes:
            mask = masks.get(h, 0)
            if not mask & bit:
                masks[h] = mask | bit
                self._counts[slot] += 1
                self._xors[slot] ^= int.from_bytes(h, "little")

    def evict(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        """Remove hashes from a slot; those that it has not change nothing."""
        bit = 1 << slot
        masks = self._masks
        for h in hashes:
            mask = masks.get(h, 0)
            if mask & bit:
                if mask == bit:
                    del masks[h]
                else:
                    masks[h] = mask & ~bit
                self._counts[slot] -= 1
                self._xors[slot] ^= int.from_bytes(h, "little")

    def digest(self, slot: int) -> tuple[int, int]:
        """Number and xor (little-endian) of the slot's hashes."""
        return self._counts[slot], self._xors[slot]

    def sweep(self, budget: int) -> None:
        """Look at up to `budget` hashes for bits of retired slots."""
        if not self._unswept:
            if not self._retired:
                return
            self._sweeping, self._retired = self._retired, 0
            # Hashes that come later cannot have these bits, so this list is complete.
            self._unswept = list(self._masks)
        keep = ~self._sweeping
        for h in self._unswept[-budget:]:
            mask = self._masks.get(h, 0)
            if mask & self._sweeping:
                if mask & keep:
                    self._masks[h] = mask & keep
                else:
                    del self._masks[h]
        del self._unswept[-budget:]
        if not self._unswept:
            self._free.extend(i for i in range(len(self._counts)) if self._sweeping >> i & 1)
            self._sweeping = 0

    def matches(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Worker -> blocks of the prefix of `hashes` that it holds, for those that hold any.

        A worker that has a block is taken to have all before it (pools evict a prefix from its
        tail). Where that is not so, the answer ends at some block that the worker has and whose
        successor it has not.
        """
        result: dict[str, int] = {}
        masks = self._masks
        holders = masks.get(hashes[0], 0) & self._assigned if hashes else 0
        # Workers in `mask` have block `low` and lack block `high`.
        todo = [(0, len(hashes), holders)] if holders else []
        while todo:
            low, high, mask = todo.pop()
            if high - low == 1:
                self._name(mask, high, result)
                continue
            middle = (low + high) // 2
            there = masks.get(hashes[middle], 0) & mask
            if there:
                todo.append((middle, high, there))
            if there != mask:
                todo.append((low, middle, mask & ~there))
        return result

    def _name(self, mask: int, length: int, result: dict[str, int]) -> None:
        while mask:
            bit = mask & -mask
            result[self._workers[bit.bit_length() - 1]] = length
            mask ^= bit
