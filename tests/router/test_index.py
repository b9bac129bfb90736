"""The block index against a naive model: one set of hashes per worker."""

import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.blockhash import BlockHash, chain, pack_tokens, seed
from common.records import xor_hashes
from router.index import BlockIndex

LENGTH = 12
CHAINS = [chain(pack_tokens([n] * 16 * LENGTH), seed("c")) for n in range(3)]
WORKERS = ("a", "b", "c", "d")


def filled(holdings: dict[str, list[BlockHash]]) -> BlockIndex:
    index = BlockIndex()
    for worker, hashes in holdings.items():
        slot = index.new_slot()
        index.store(slot, hashes)
        index.assign(worker, slot)
    return index


def prefix(held: set[BlockHash], hashes: list[BlockHash]) -> int:
    for n, h in enumerate(hashes):
        if h not in held:
            return n
    return len(hashes)


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.held: dict[str, set[BlockHash]] = {}

    @rule(worker=st.sampled_from(WORKERS), chain=st.sampled_from(CHAINS), n=st.integers(0, LENGTH))
    def replace(self, worker: str, chain: list[BlockHash], n: int) -> None:
        slot = self.index.new_slot()
        self.index.store(slot, chain[:n])
        self.index.assign(worker, slot)
        self.held[worker] = set(chain[:n])

    @rule(worker=st.sampled_from(WORKERS), chain=st.sampled_from(CHAINS), n=st.integers(0, LENGTH))
    def store(self, worker: str, chain: list[BlockHash], n: int) -> None:
        slot = self.index.slot(worker)
        assert (slot is not None) == (worker in self.held)
        if slot is not None:
            self.index.store(slot, chain[:n])
            self.held[worker] |= set(chain[:n])

    @rule(worker=st.sampled_from(WORKERS), chain=st.sampled_from(CHAINS), n=st.integers(0, LENGTH))
    def evict(self, worker: str, chain: list[BlockHash], n: int) -> None:
        slot = self.index.slot(worker)
        if slot is not None:
            self.index.evict(slot, chain[n:])
            self.held[worker] -= set(chain[n:])

    @rule(worker=st.sampled_from(WORKERS))
    def drop(self, worker: str) -> None:
        self.index.drop(worker)
        self.held.pop(worker, None)

    @rule(chain=st.sampled_from(CHAINS), n=st.integers(0, LENGTH))
    def fill_in_vain(self, chain: list[BlockHash], n: int) -> None:
        slot = self.index.new_slot()
        self.index.store(slot, chain[:n])
        self.index.retire(slot)

    @rule(budget=st.integers(1, 20))
    def sweep(self, budget: int) -> None:
        self.index.sweep(budget)

    @invariant()
    def same_answers(self) -> None:
        for hashes in CHAINS:
            wanted = {worker: prefix(held, hashes) for worker, held in self.held.items()}
            assert self.index.matches(hashes) == {w: n for w, n in wanted.items() if n}
            assert self.index.matches(hashes[:5]) == {w: min(n, 5) for w, n in wanted.items() if n}

    @invariant()
    def same_digests(self) -> None:
        for worker, held in self.held.items():
            slot = self.index.slot(worker)
            assert slot is not None
            assert self.index.digest(slot) == (len(held), xor_hashes(held))

    @invariant()
    def nothing_is_left_over(self) -> None:
        if self.index.swept:
            assert len(self.index) == len(set().union(*self.held.values()))


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_nothing_matches_nothing() -> None:
    assert BlockIndex().matches([]) == {}
    assert BlockIndex().matches(CHAINS[0]) == {}
    assert filled({"a": CHAINS[0]}).matches([]) == {}
    assert filled({"a": CHAINS[0]}).matches(CHAINS[1]) == {}


def test_a_hole_in_a_prefix_costs_a_wrong_guess_and_no_more() -> None:
    held = set(CHAINS[0][:4] + CHAINS[0][7:9])
    index = filled({"a": list(held)})
    found = index.matches(CHAINS[0])["a"]
    assert CHAINS[0][found - 1] in held
    assert CHAINS[0][found] not in held


def test_a_filling_slot_is_invisible() -> None:
    index = BlockIndex()
    slot = index.new_slot()
    index.store(slot, CHAINS[0])
    assert index.matches(CHAINS[0]) == {}
    index.assign("a", slot)
    assert index.matches(CHAINS[0]) == {"a": LENGTH}


def test_a_bit_is_used_again_only_after_the_sweep() -> None:
    index = filled({"a": CHAINS[0]})
    index.drop("a")
    assert index.new_slot() == 1
    index.sweep(LENGTH - 1)
    assert index.new_slot() == 2
    index.sweep(1)
    assert len(index) == 0
    assert index.new_slot() == 0


def test_a_long_prompt_is_looked_up_in_a_millisecond() -> None:
    tokens = pack_tokens(range(2_500 * 16))
    hashes = chain(tokens, seed("c"))
    index = filled({f"w{n}": hashes[: 2_500 - 311 * n] for n in range(8)})
    best = min(timed(index, hashes) for _ in range(20))
    assert index.matches(hashes) == {f"w{n}": 2_500 - 311 * n for n in range(8)}
    assert best < 0.001


def timed(index: BlockIndex, hashes: list[BlockHash]) -> float:
    start = time.perf_counter()
    index.matches(hashes)
    return time.perf_counter() - start
