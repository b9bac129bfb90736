"""The prefix cache of a simulated worker: least recently used first, tails before heads."""

from collections import OrderedDict
from collections.abc import Sequence

from common.blockhash import BlockHash


class LruCache:
    def __init__(self, capacity: int) -> None:
        """`capacity`: in blocks."""
        self.capacity = capacity
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, chain: Sequence[BlockHash]) -> int:
        """Blocks of the longest prefix that is here."""
        blocks = self._blocks
        count = 0
        for name in chain:
            if name not in blocks:
                break
            count += 1
        return count

    def use(self, chain: Sequence[BlockHash]) -> list[BlockHash]:
        """Keep or take in all of `chain`, as just used; returns what was evicted for it."""
        blocks = self._blocks
        # The head of a chain is used last, so that tails are evicted before their heads.
        for name in reversed(chain):
            if name in blocks:
                blocks.move_to_end(name)
            else:
                blocks[name] = None
        evicted = []
        while len(blocks) > self.capacity:
            evicted.append(blocks.popitem(last=False)[0])
        return evicted

    def clear(self) -> None:
        self._blocks.clear()
