"""Which block carries which hash: the table behind prefix matching and the events about it.

Of blocks with equal hashes the first one is found; the others are its twins. Used by
`common.kv.blocks` alone, which says when a block is sealed and when it is freed.
"""

from common.blockhash import BlockHash


class PrefixTable:
    """Hash -> block, with the net change since it was last asked for."""

    def __init__(self) -> None:
        self._first: dict[BlockHash, int] = {}
        self._twins: dict[BlockHash, dict[int, None]] = {}  # the oldest first, never empty
        self._stored: dict[BlockHash, None] = {}
        self._evicted: dict[BlockHash, None] = {}

    def __contains__(self, hash: BlockHash) -> bool:
        return hash in self._first

    def __getitem__(self, hash: BlockHash) -> int:
        """The block that is found for `hash`. Raises KeyError."""
        return self._first[hash]

    def hashes(self) -> list[BlockHash]:
        """Every hash that has a block, the oldest first."""
        return list(self._first)

    def add(self, hash: BlockHash, block: int) -> None:
        """`block` was sealed: it is found by `hash`, or becomes a twin of the one that is."""
        if hash in self._first:
            self._twins.setdefault(hash, {})[block] = None
            return
        self._first[hash] = block
        if hash in self._evicted:
            del self._evicted[hash]
        else:
            self._stored[hash] = None

    def remove(self, hash: BlockHash, block: int) -> None:
        """`block` is to be freed; if it is the one that is found, its oldest twin takes over."""
        twins = self._twins.get(hash)
        if twins is not None:
            if self._first[hash] == block:
                block = self._first[hash] = next(iter(twins))
            del twins[block]
            if not twins:
                del self._twins[hash]
            return
        assert self._first[hash] == block, (hash, self._first[hash], block)
        del self._first[hash]
        if hash in self._stored:
            del self._stored[hash]
        else:
            self._evicted[hash] = None

    def take_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """(stored, evicted) since the last call; a hash that came and went is in neither."""
        events = list(self._stored), list(self._evicted)
        self._stored, self._evicted = {}, {}
        return events

    def is_twin(self, hash: BlockHash, block: int) -> bool:
        return block in self._twins.get(hash, ())

    def check(self, num_blocks: int) -> None:
        """Assert that the table is sound and holds `num_blocks` blocks, twins included."""
        num_twins = sum(len(twins) for twins in self._twins.values())
        assert len(self._first) + num_twins == num_blocks, (len(self._first), num_twins, num_blocks)
        for hash, twins in self._twins.items():
            assert twins and self._first[hash] not in twins, (hash, self._first[hash], twins)
        assert self._stored.keys() <= self._first.keys(), (self._stored, self._first)
        assert self._evicted.keys().isdisjoint(self._first), (self._evicted, self._first)
