"""The ladder of prefix hits: how many prompt tokens caches could have held, and did.

    infinite >= capacity >= routed >= actual

Four counts of tokens over all requests: with caches that forget nothing, with one cache as large as
those of all workers together, on the worker that held most of each prompt, and as reused. The first
two are caches of hashes, walked prompt by prompt. Fed by `router.explain`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from common.blockhash import BlockHash

REMEMBERED: Final = 1 << 18
"""Hashes that the infinite cache remembers at most: about 40 MB, 4 M tokens in blocks of 16."""
RUNGS: Final = ("infinite", "capacity", "routed", "actual")


class HashCache:
    """The prefixes of prompts that were used last; tails are forgotten before their heads."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[BlockHash, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def use(self, chain: Sequence[BlockHash], capacity: int) -> int:
        """How many hashes of the chain were there, from its beginning; all of them are now, as far
        as `capacity` hashes go."""
        hashes = self._hashes
        count = 0
        for name in chain:
            if name not in hashes:
                break
            count += 1
        for name in reversed(chain):
            hashes[name] = None
            hashes.move_to_end(name)
        while len(hashes) > capacity:
            hashes.popitem(last=False)
        return count


class Ladder:
    """`tokens` counts prompt tokens per rung."""

    def __init__(self) -> None:
        self.tokens = dict.fromkeys(RUNGS, 0)
        self.prompt_tokens = 0
        self._infinite = HashCache()
        self._capacity = HashCache()

    def arrived(
        self, chain: Sequence[BlockHash], block_size: int, num_tokens: int, capacity: int, best: int
    ) -> None:
        """A prompt of `num_tokens` tokens and these full blocks came; caches hold `capacity` blocks
        in all, the best of them `best` tokens of it. One token is computed in any case."""
        self.prompt_tokens += num_tokens
        most = num_tokens - 1
        infinite = self._infinite.use(chain, REMEMBERED) * block_size
        pooled = self._capacity.use(chain, min(capacity, REMEMBERED)) * block_size
        for rung, tokens in (("infinite", infinite), ("capacity", pooled), ("routed", best)):
            self.tokens[rung] += min(tokens, most)

    def reused(self, num_tokens: int) -> None:
        """What a worker found in its cache of a prompt that arrived before."""
        self.tokens["actual"] += num_tokens
