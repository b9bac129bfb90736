"""The ledger of a worker's KV pool: the state of every block, who holds it, what is cached.

    FREE -allocate-> FILLING -seal-> SEALED          the engine writes to a FILLING block
    FREE -reserve-> RECEIVING -land-> SEALED         the I/O thread writes to a RECEIVING block
                              -land-> FILLING        the partial tail of a prompt
                              -give_back-> FREE      nothing is in flight to it
                              -drain-> DRAINING -drained-> FREE

Sequences (references) and transfers (leases) hold FILLING and SEALED blocks. When the last hold
ends a FILLING block becomes FREE. A SEALED one becomes CACHED: it can still be matched, and is
evicted (FREE) in the order in which holds ended, the tail of a sequence before its head; so what
can be matched stays closed under prefixes.

Of SEALED blocks with equal hashes one can be matched, the first; the others (twins) are freed
when their last hold ends. If the first is evicted before that, a twin takes its place.

Owned by the engine thread; called by the schedulers and engines. No operation depends on the size
of the pool, except `check` and `cached_hashes`.
"""

from collections import OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence
from typing import Final

from msgspec import structs

from common.blockhash import BlockHash
from common.kv.block import HOLDABLE, Block, State
from common.kv.prefixes import PrefixTable
from common.messages import Ledger

PLACES: Final = ("free", "cached", "in_use", "leased", "receiving", "draining")
"""The parts of the ledger; every block is in one."""


class BlockManager:
    """All blocks of one pool. A call that breaks the contract fails an assert."""

    def __init__(
        self, num_blocks: int, generations: MutableSequence[int] | memoryview | None = None
    ) -> None:
        """`generations`: where the generation of every block is published before the block is
        written anew, for peers that read the pool in place (`KvPool.generations`)."""
        assert num_blocks > 0, num_blocks
        self._published = [0] * num_blocks if generations is None else generations
        assert len(self._published) == num_blocks, (len(self._published), num_blocks)
        self._blocks = [Block() for _ in range(num_blocks)]
        # A stack: what was freed last is warm in the caches, what was never used needs no memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted is first
        self._prefixes = PrefixTable()
        self._num_in_use = self._num_leased = self._num_receiving = self._num_draining = 0

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Blocks that could be handed out now: FREE and CACHED."""
        return len(self._free) + len(self._cached)

    # ------------------------------------------------------------ sequences

    def peek(self, hashes: Sequence[BlockHash]) -> int:
        """Blocks of the longest prefix of `hashes` that can be matched; takes nothing."""
        for count, hash in enumerate(hashes):
            if hash not in self._prefixes:
                return count
        return len(hashes)

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest prefix of `hashes` that can be matched, one reference taken
        on each."""
        found = [self._prefixes[hash] for hash in hashes[: self.peek(hashes)]]
        for block in found:
            self._add_ref(block)
        return found

    def allocate(self, n: int) -> list[int] | None:
        """FREE -> FILLING with one reference: `n` blocks, or None if so many are not available.

        Evicts CACHED blocks as needed. Ascending, so that neighbours can be shipped as one run.
        """
        taken = self._take(n, State.FILLING)
        if taken is not None:
            for block in taken:
                self._blocks[block].refs = 1
            self._num_in_use += n
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference on blocks that a sequence holds."""
        for block in blocks:
            assert self._blocks[block].refs > 0, self._show(block)
            self._add_ref(block)

    def seal(self, block: int, hash: BlockHash) -> None:
        """FILLING -> SEALED: the block is full and can be matched by `hash`."""
        entry = self._expect(block, State.FILLING)
        self._set_sealed(block, entry, hash)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each block of a sequence, in the order of its positions."""
        for block in reversed(blocks):
            entry = self._expect(block, *HOLDABLE)
            assert entry.refs > 0, self._show(block)
            entry.refs -= 1
            if entry.refs == 0:
                self._num_in_use -= 1
                if entry.leases > 0:
                    self._num_leased += 1
                else:
                    self._end_hold(block)

    # ------------------------------------------------------------ leases of transfers

    def lease(self, blocks: Iterable[int]) -> None:
        """One more lease on each block; the caller knows for which peer and until when."""
        for block in blocks:
            entry = self._expect(block, *HOLDABLE)
            if not entry.is_held:
                del self._cached[block]
                self._num_leased += 1
            entry.leases += 1

    def unlease(self, blocks: Sequence[int]) -> None:
        """One lease less on each block, in the order of positions."""
        for block in reversed(blocks):
            entry = self._expect(block, *HOLDABLE)
            assert entry.leases > 0, self._show(block)
            entry.leases -= 1
            if not entry.is_held:
                self._num_leased -= 1
                self._end_hold(block)

    # ------------------------------------------------------------ slots for a peer's blocks

    def reserve(self, n: int) -> list[tuple[int, int]] | None:
        """FREE -> RECEIVING: `n` slots as (block, generation), or None if so many are not
        available. Evicts and orders as `allocate` does."""
        taken = self._take(n, State.RECEIVING)
        if taken is None:
            return None
        self._num_receiving += n
        return [(block, self._blocks[block].generation) for block in taken]

    def land(self, block: int, generation: int, hash: BlockHash | None) -> None:
        """RECEIVING -> SEALED, or FILLING without `hash` (the tail), with one reference: the
        bytes are there and verified, and nothing writes to the slot any more."""
        entry = self._expect_slot(block, generation, State.RECEIVING)
        self._num_receiving -= 1
        self._num_in_use += 1
        entry.refs = 1
        if hash is None:
            entry.state = State.FILLING
        else:
            self._set_sealed(block, entry, hash)

    def give_back(self, block: int, generation: int) -> None:
        """RECEIVING -> FREE: only when nothing is in flight to the slot."""
        self._expect_slot(block, generation, State.RECEIVING)
        self._num_receiving -= 1
        self._set_free(block)

    def drain(self, block: int, generation: int) -> None:
        """RECEIVING -> DRAINING: not wanted any more, but bytes may still arrive."""
        entry = self._expect_slot(block, generation, State.RECEIVING)
        self._num_receiving -= 1
        self._num_draining += 1
        entry.state = State.DRAINING

    def drained(self, block: int, generation: int) -> None:
        """DRAINING -> FREE: nothing can arrive any more."""
        self._expect_slot(block, generation, State.DRAINING)
        self._num_draining -= 1
        self._set_free(block)

    # ------------------------------------------------------------ what others are told

    def take_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """(stored, evicted) since the last call: the net change of `cached_hashes`."""
        return self._prefixes.take_events()

    def cached_hashes(self) -> list[BlockHash]:
        """Every hash that can be matched, held or not, the oldest first."""
        return self._prefixes.hashes()

    def ledger(self, running: int = 0) -> Ledger:
        """Where every block is; `running` is the caller's count of sequences."""
        ledger = Ledger(
            num_blocks=self.num_blocks,
            free=len(self._free),
            cached=len(self._cached),
            in_use=self._num_in_use,
            leased=self._num_leased,
            receiving=self._num_receiving,
            draining=self._num_draining,
            running=running,
        )
        total = sum(getattr(ledger, place) for place in PLACES)
        return ledger if total == self.num_blocks else structs.replace(ledger, balanced=False)

    def check(self) -> None:
        """Assert every invariant from the blocks themselves, in time linear in the pool."""
        counts = dict.fromkeys(PLACES, 0)
        free = set(self._free)
        num_sealed = 0
        for block, entry in enumerate(self._blocks):
            entry.check()
            place = entry.place
            counts[place] += 1
            assert (block in free) == (place == "free"), self._show(block)
            assert (block in self._cached) == (place == "cached"), self._show(block)
            if entry.hash is not None:
                num_sealed += 1
                is_first = self._prefixes[entry.hash] == block
                assert is_first or entry.is_held, self._show(block)
                assert is_first or self._prefixes.is_twin(entry.hash, block), self._show(block)
        assert len(free) == len(self._free), sorted(self._free)
        ledger = self.ledger()
        assert counts == {place: getattr(ledger, place) for place in PLACES}, (ledger, counts)
        assert ledger.balanced, ledger
        self._prefixes.check(num_sealed)

    # ------------------------------------------------------------ parts of the above

    def _take(self, n: int, state: State) -> list[int] | None:
        assert n >= 0, n
        if n > self.num_available:
            return None
        while len(self._free) < n:
            self._evict()
        first = len(self._free) - n
        taken = sorted(self._free[first:])
        del self._free[first:]
        for block in taken:
            entry = self._expect(block, State.FREE)
            entry.state = state
            entry.generation += 1
            self._published[block] = entry.generation
        return taken

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        hash = self._blocks[block].hash
        assert hash is not None, self._show(block)
        self._prefixes.remove(hash, block)
        self._set_free(block)

    def _set_sealed(self, block: int, entry: Block, hash: BlockHash) -> None:
        entry.state = State.SEALED
        entry.hash = hash
        self._prefixes.add(hash, block)

    def _add_ref(self, block: int) -> None:
        entry = self._expect(block, *HOLDABLE)
        if entry.refs == 0:
            self._num_in_use += 1
            if entry.leases > 0:
                self._num_leased -= 1
            else:
                del self._cached[block]
        entry.refs += 1

    def _end_hold(self, block: int) -> None:
        hash = self._blocks[block].hash
        if hash is None:
            self._set_free(block)
            return
        first = self._prefixes[hash]
        if first == block:
            self._cached[block] = None
            return
        self._prefixes.remove(hash, block)
        self._set_free(block)
        if first in self._cached:
            # Used just now, in the shape of its twin: it must outlive the twin's descendants.
            self._cached.move_to_end(first)

    def _set_free(self, block: int) -> None:
        entry = self._blocks[block]
        assert not entry.is_held, self._show(block)
        entry.state = State.FREE
        entry.hash = None
        self._free.append(block)

    def _expect(self, block: int, *states: State) -> Block:
        assert 0 <= block < len(self._blocks), (block, len(self._blocks))
        entry = self._blocks[block]
        assert entry.state in states, self._show(block)
        return entry

    def _expect_slot(self, block: int, generation: int, state: State) -> Block:
        entry = self._expect(block, state)
        assert entry.generation == generation, (self._show(block), generation)
        return entry

    def _show(self, block: int) -> str:
        return f"block {block}: {self._blocks[block]}"
