"""The prefix cache of a simulated worker: least recently used first, tails before heads.

A chain that is used again costs no more than its new blocks: the time of its use is noted at its
last block only, and passes to the block before whenever one is evicted.
"""

import heapq
from collections.abc import Sequence

from common.blockhash import BlockHash


class LruCache:
    """Chains of blocks; a block's name tells all blocks before it, so that they form trees."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: in blocks."""
        self.capacity = capacity
        self._used: dict[BlockHash, int] = {}
        """When a chain that ended here, or in what followed and is evicted, was used last."""
        self._before: dict[BlockHash, BlockHash] = {}
        self._after: dict[BlockHash, int] = {}
        """How many blocks follow directly; none: the block can be evicted."""
        self._ends: list[tuple[int, BlockHash]] = []
        """Heap of blocks that nothing follows by their use; entries may be outdated."""
        self._clock = 0

    def __len__(self) -> int:
        return len(self._used)

    def match(self, chain: Sequence[BlockHash]) -> int:
        """Blocks of the longest prefix that is here."""
        low, high = 0, len(chain)
        # Tails are evicted before their heads, so what is here is a prefix.
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in self._used:
                low = middle + 1
            else:
                high = middle
        return low

    def use(self, chain: Sequence[BlockHash]) -> list[BlockHash]:
        """Keep or take in all of `chain`, as just used; returns what was evicted for it."""
        if not chain:
            return []
        self._clock += 1
        used, after = self._used, self._after
        for i in range(self.match(chain), len(chain)):
            name = chain[i]
            used[name] = after[name] = 0
            if i:
                self._before[name] = chain[i - 1]
                after[chain[i - 1]] += 1
        used[chain[-1]] = self._clock
        if not after[chain[-1]]:
            heapq.heappush(self._ends, (self._clock, chain[-1]))
        evicted = []
        while len(used) > self.capacity:
            at, name = heapq.heappop(self._ends)
            if used.get(name) == at and not after[name]:
                self._evict(name, at)
                evicted.append(name)
        return evicted

    def _evict(self, name: BlockHash, at: int) -> None:
        del self._used[name], self._after[name]
        before = self._before.pop(name, None)
        if before is None:
            return
        self._after[before] -= 1
        latest = self._used[before] = max(self._used[before], at)
        if not self._after[before]:
            heapq.heappush(self._ends, (latest, before))

    def clear(self) -> None:
        self._used.clear()
        self._before.clear()
        self._after.clear()
        self._ends.clear()
