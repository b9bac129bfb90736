"""The block manager against a simple model, and the promise that holdings are prefix-closed."""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.blockhash import UNIT, BlockHash, chain, pack_tokens, seed
from common.kv.blocks import BlockManager

NUM_BLOCKS = 7
HASHES = [BlockHash(bytes([i]) * 16) for i in range(5)]


class BlockModel(RuleBasedStateMachine):
    """Each block is in one of plain sets; the eviction order is a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS)
        self.refs = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.leases = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.generation = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.free = set(range(NUM_BLOCKS))
        self.filling: set[int] = set()
        self.receiving: set[int] = set()
        self.draining: set[int] = set()
        self.sealed: dict[BlockHash, list[int]] = {}  # the matchable one first
        self.evictable: list[int] = []
        self.reported: set[BlockHash] = set()

    # ------------------------------------------------------------ the model

    def hash_of(self, block: int) -> BlockHash | None:
        return next((hash for hash, blocks in self.sealed.items() if block in blocks), None)

    def held(self, counts: dict[int, int]) -> list[int]:
        return [block for block in range(NUM_BLOCKS) if counts[block]]

    def holdable(self) -> list[int]:
        sealed = {block for blocks in self.sealed.values() for block in blocks}
        return sorted(sealed | self.filling)

    def set_free(self, block: int) -> None:
        hash = self.hash_of(block)
        if hash is not None:
            self.sealed[hash].remove(block)
            if not self.sealed[hash]:
                del self.sealed[hash]
        self.filling.discard(block)
        self.free.add(block)

    def take(self, n: int, taken: list[int] | None) -> list[int]:
        """What `allocate` and `reserve` may return."""
        if n > len(self.free) + len(self.evictable):
            assert taken is None
            return []
        assert taken is not None and len(taken) == n and taken == sorted(set(taken))
        num_evicted = max(0, n - len(self.free))
        for block in self.evictable[:num_evicted]:
            self.set_free(block)
        del self.evictable[:num_evicted]
        assert self.free.issuperset(taken), (taken, self.free)
        self.free.difference_update(taken)
        for block in taken:
            self.generation[block] += 1
        return taken

    def end_hold(self, block: int) -> None:
        if self.refs[block] or self.leases[block]:
            return
        hash = self.hash_of(block)
        if hash is None:
            self.set_free(block)
        elif self.sealed[hash][0] == block:
            self.evictable.append(block)
        else:
            first = self.sealed[hash][0]
            self.set_free(block)
            if first in self.evictable:
                self.evictable.remove(first)
                self.evictable.append(first)

    def hold(self, block: int, counts: dict[int, int]) -> None:
        counts[block] += 1
        if block in self.evictable:
            self.evictable.remove(block)

    # ------------------------------------------------------------ the rules

    @rule(n=st.integers(0, NUM_BLOCKS))
    def allocate(self, n: int) -> None:
        for block in self.take(n, self.manager.allocate(n)):
            self.filling.add(block)
            self.refs[block] = 1

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), hash=st.sampled_from(HASHES))
    def seal(self, data: st.DataObject, hash: BlockHash) -> None:
        block = data.draw(st.sampled_from(sorted(self.filling)))
        self.manager.seal(block, hash)
        self.filling.remove(block)
        self.sealed.setdefault(hash, []).append(block)

    @rule(hashes=st.lists(st.sampled_from(HASHES), unique=True))
    def match(self, hashes: list[BlockHash]) -> None:
        expected = []
        for hash in hashes:
            if hash not in self.sealed:
                break
            expected.append(self.sealed[hash][0])
        assert self.manager.peek(hashes) == len(expected)
        assert self.manager.match(hashes) == expected
        for block in expected:
            self.hold(block, self.refs)

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held(self.refs)), unique=True))
        self.manager.share(blocks)
        for block in blocks:
            self.hold(block, self.refs)

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held(self.refs)), unique=True))
        self.manager.release(blocks)
        for block in reversed(blocks):
            self.refs[block] -= 1
            self.end_hold(block)

    @precondition(lambda self: self.holdable())
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.holdable()), unique=True))
        self.manager.lease(blocks)
        for block in blocks:
            self.hold(block, self.leases)

    @precondition(lambda self: any(self.leases.values()))
    @rule(data=st.data())
    def unlease(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held(self.leases)), unique=True))
        self.manager.unlease(blocks)
        for block in reversed(blocks):
            self.leases[block] -= 1
            self.end_hold(block)

    @rule(n=st.integers(0, NUM_BLOCKS))
    def reserve(self, n: int) -> None:
        slots = self.manager.reserve(n)
        blocks = self.take(n, None if slots is None else [block for block, _ in slots])
        assert (slots or []) == [(block, self.generation[block]) for block in blocks]
        self.receiving.update(blocks)

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), hash=st.sampled_from([None, *HASHES]))
    def land(self, data: st.DataObject, hash: BlockHash | None) -> None:
        block = data.draw(st.sampled_from(sorted(self.receiving)))
        self.manager.land(block, self.generation[block], hash)
        self.receiving.remove(block)
        self.refs[block] = 1
        if hash is None:
            self.filling.add(block)
        else:
            self.sealed.setdefault(hash, []).append(block)

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), in_flight=st.booleans())
    def end_reservation(self, data: st.DataObject, in_flight: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.receiving)))
        self.receiving.remove(block)
        if in_flight:
            self.manager.drain(block, self.generation[block])
            self.draining.add(block)
        else:
            self.manager.give_back(block, self.generation[block])
            self.free.add(block)

    @precondition(lambda self: self.draining)
    @rule(data=st.data())
    def drained(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.draining)))
        self.manager.drained(block, self.generation[block])
        self.draining.remove(block)
        self.free.add(block)

    @rule()
    def take_events(self) -> None:
        stored, evicted = self.manager.take_events()
        assert len(set(stored)) == len(stored) and len(set(evicted)) == len(evicted)
        assert set(stored) == self.sealed.keys() - self.reported
        assert set(evicted) == self.reported - self.sealed.keys()
        self.reported = set(self.sealed)

    @invariant()
    def agrees(self) -> None:
        self.manager.check()
        assert set(self.manager.cached_hashes()) == self.sealed.keys()
        assert self.manager.num_available == len(self.free) + len(self.evictable)
        ledger = self.manager.ledger()
        in_use = self.held(self.refs)
        assert ledger.free == len(self.free)
        assert ledger.cached == len(self.evictable)
        assert ledger.in_use == len(in_use)
        assert ledger.leased == len(set(self.held(self.leases)) - set(in_use))
        assert ledger.receiving == len(self.receiving)
        assert ledger.draining == len(self.draining)


TestBlockModel = BlockModel.TestCase
TestBlockModel.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_holdings_stay_closed_under_prefixes() -> None:
    """Prompts of a tree run, grow and end at random in a pool that always evicts."""
    rng = random.Random(5)
    manager = BlockManager(23)
    root = seed("tree")
    parents: dict[BlockHash, BlockHash] = {}
    running: list[tuple[list[BlockHash], list[int], int]] = []  # hashes, blocks, sealed so far
    num_evicted = num_cached_hits = 0
    for _ in range(3000):
        if rng.random() < 0.5:
            units = [rng.randrange(3) for _ in range(rng.randint(1, 7))]
            tokens = [unit for unit in units for _ in range(UNIT)]
            hashes = chain(pack_tokens(tokens), root)
            parents.update(zip(hashes[1:], hashes[:-1], strict=True))
            matched = manager.match(hashes)
            fresh = manager.allocate(len(hashes) - len(matched))
            if fresh is None:
                manager.release(matched)
                continue
            num_cached_hits += len(matched)
            running.append((hashes, matched + fresh, len(matched)))
        elif running:
            hashes, blocks, sealed = running.pop(rng.randrange(len(running)))
            more = rng.randint(sealed, len(hashes))
            for i in range(sealed, more):
                manager.seal(blocks[i], hashes[i])
            if rng.random() < 0.5:
                manager.release(blocks)
            else:
                running.append((hashes, blocks, more))
        num_evicted += len(manager.take_events()[1])
        held = set(manager.cached_hashes())
        orphans = [hash for hash in held if hash in parents and parents[hash] not in held]
        assert not orphans
    for _, blocks, _ in running:
        manager.release(blocks)
    manager.check()
    assert manager.num_available == 23
    assert num_evicted > 300 and num_cached_hits > 300, (num_evicted, num_cached_hits)
