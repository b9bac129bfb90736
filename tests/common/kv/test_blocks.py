"""An 11-block manager, arrow by arrow: exact block ids, exact eviction order."""

import pytest

from common.blockhash import BlockHash
from common.kv.blocks import BlockManager
from common.messages import Ledger


def names(*numbers: int) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(16, "little")) for number in numbers]


def fill(manager: BlockManager, *numbers: int) -> list[int]:
    """Allocate and seal one block per hash."""
    blocks = manager.allocate(len(numbers))
    assert blocks is not None
    for block, hash in zip(blocks, names(*numbers), strict=True):
        manager.seal(block, hash)
    return blocks


def parts(manager: BlockManager) -> tuple[int, int, int, int, int, int]:
    """(free, cached, in_use, leased, receiving, draining), after a full check."""
    manager.check()
    ledger = manager.ledger()
    return (
        ledger.free,
        ledger.cached,
        ledger.in_use,
        ledger.leased,
        ledger.receiving,
        ledger.draining,
    )


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(11)


# ---------------------------------------------------------------- allocate, seal, match, release


def test_allocate_is_ascending_and_all_or_nothing(manager: BlockManager) -> None:
    assert manager.allocate(0) == []
    assert manager.allocate(4) == [0, 1, 2, 3]
    assert manager.allocate(8) is None
    assert manager.num_available == 7
    assert manager.allocate(7) == [4, 5, 6, 7, 8, 9, 10]
    assert manager.allocate(1) is None
    assert manager.reserve(1) is None
    assert manager.allocate(0) == []
    assert parts(manager) == (0, 0, 11, 0, 0, 0)


def test_a_filling_block_is_freed_at_its_last_release(manager: BlockManager) -> None:
    assert manager.allocate(3) == [0, 1, 2]
    manager.share([1])
    manager.release([0, 1, 2])
    assert parts(manager) == (10, 0, 1, 0, 0, 0)
    manager.release([1])
    assert parts(manager) == (11, 0, 0, 0, 0, 0)
    # The block that was freed last is handed out first.
    assert manager.allocate(1) == [1]


def test_sealed_blocks_are_matched_while_held_and_when_cached(manager: BlockManager) -> None:
    assert fill(manager, 1, 2, 3) == [0, 1, 2]
    assert manager.peek(names(1, 2, 9, 3)) == 2
    assert manager.match(names(1, 2, 9, 3)) == [0, 1]
    assert parts(manager) == (8, 0, 3, 0, 0, 0)
    manager.release([0, 1])
    manager.release([0, 1, 2])
    assert parts(manager) == (8, 3, 0, 0, 0, 0)
    assert manager.num_available == 11
    assert manager.peek(names(1, 2, 3)) == 3
    assert manager.match(names(1, 2, 3, 4)) == [0, 1, 2]
    assert manager.match(names(9)) == []
    assert manager.match([]) == []
    assert parts(manager) == (8, 0, 3, 0, 0, 0)


def test_eviction_takes_the_least_recent_sequence_tail_first(manager: BlockManager) -> None:
    first, second = fill(manager, 1, 2, 3), fill(manager, 4, 5)
    third = fill(manager, 6, 7, 8, 9, 10, 11)
    manager.release(first)
    manager.release(second)
    manager.release(third)
    manager.take_events()
    assert parts(manager) == (0, 11, 0, 0, 0, 0)
    evicted = []
    for _ in range(11):
        assert manager.allocate(1) is not None
        manager.check()
        evicted += manager.take_events()[1]
    assert evicted == names(3, 2, 1, 5, 4, 11, 10, 9, 8, 7, 6)
    assert manager.cached_hashes() == []


def test_use_makes_recent(manager: BlockManager) -> None:
    blocks = fill(manager, 1, 2, 3, 4)
    other = fill(manager, 5)
    manager.release(blocks)
    manager.release(other)
    manager.release(manager.match(names(1, 2)))
    manager.take_events()
    # Six are free; the next evictions are 4, 3 (not used again), 5, then 2, 1.
    assert manager.allocate(6) == [5, 6, 7, 8, 9, 10]
    evicted = []
    for _ in range(5):
        assert manager.allocate(1) is not None
        evicted += manager.take_events()[1]
    assert evicted == names(4, 3, 5, 2, 1)


def test_free_blocks_are_used_before_cached_ones_are_evicted(manager: BlockManager) -> None:
    manager.release(fill(manager, 1, 2, 3, 4))
    assert manager.allocate(8) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert manager.peek(names(1, 2, 3, 4)) == 3
    assert manager.allocate(4) is None
    assert manager.peek(names(1, 2, 3)) == 3, "a refusal evicts nothing"
    assert parts(manager) == (0, 3, 8, 0, 0, 0)


def test_matched_blocks_are_not_available(manager: BlockManager) -> None:
    manager.release(fill(manager, *range(11)))
    assert manager.match(names(0, 1, 2)) == [0, 1, 2]
    assert manager.num_available == 8
    assert manager.allocate(9) is None
    assert manager.allocate(8) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert manager.cached_hashes() == names(0, 1, 2)


# ---------------------------------------------------------------- equal hashes


def test_of_equal_hashes_the_first_stays_and_the_others_are_freed(manager: BlockManager) -> None:
    first, second, third = fill(manager, 1, 2), fill(manager, 1, 2), fill(manager, 1)
    assert (first, second, third) == ([0, 1], [2, 3], [4])
    assert manager.cached_hashes() == names(1, 2)
    assert manager.match(names(1, 2)) == [0, 1]
    manager.release(second)
    assert parts(manager) == (8, 0, 3, 0, 0, 0)
    manager.release(first)
    manager.release(first)
    assert parts(manager) == (8, 2, 1, 0, 0, 0)
    manager.release(third)
    assert parts(manager) == (9, 2, 0, 0, 0, 0)
    assert manager.match(names(1, 2)) == [0, 1]
    assert manager.take_events() == (names(1, 2), [])


def test_a_held_twin_takes_over_when_the_first_is_evicted(manager: BlockManager) -> None:
    first, twin, younger = fill(manager, 1), fill(manager, 1), fill(manager, 1)
    rest = fill(manager, *range(2, 10))
    manager.release(first)
    manager.take_events()
    assert manager.allocate(1) == first
    assert manager.match(names(1)) == twin
    assert manager.take_events() == ([], []), "the hash was there all the time"
    manager.release(younger)
    manager.release(twin)
    manager.release(twin)
    assert parts(manager) == (1, 1, 9, 0, 0, 0)
    manager.release(rest)
    assert manager.peek(names(1)) == 1


def test_the_end_of_a_twin_is_a_use_of_the_first(manager: BlockManager) -> None:
    first, longer = fill(manager, 1, 2), fill(manager, 1, 2, 3)
    manager.release(first)
    manager.release(longer)
    assert parts(manager) == (8, 3, 0, 0, 0, 0)
    manager.take_events()
    assert manager.allocate(8) is not None
    evicted = []
    for _ in range(3):
        assert manager.allocate(1) is not None
        evicted += manager.take_events()[1]
    assert evicted == names(3, 2, 1), "a descendant never outlives its ancestor"


# ---------------------------------------------------------------- leases


def test_leased_blocks_stay_until_the_lease_ends(manager: BlockManager) -> None:
    blocks = fill(manager, 1, 2)
    tail = manager.allocate(1)
    assert tail == [2]
    held = blocks + tail
    manager.lease(held)
    assert parts(manager) == (8, 0, 3, 0, 0, 0), "a block with references counts as in use"
    manager.release(held)
    assert parts(manager) == (8, 0, 0, 3, 0, 0)
    assert manager.allocate(9) is None
    assert manager.match(names(1, 2)) == [0, 1]
    assert parts(manager) == (8, 0, 2, 1, 0, 0)
    manager.unlease(held)
    assert parts(manager) == (9, 0, 2, 0, 0, 0), "the tail had only the lease"
    manager.release([0, 1])
    assert parts(manager) == (9, 2, 0, 0, 0, 0)


def test_leases_are_counted(manager: BlockManager) -> None:
    blocks = fill(manager, 1, 2)
    manager.lease(blocks)
    manager.lease(blocks)
    manager.unlease(blocks)
    manager.release(blocks)
    assert parts(manager) == (9, 0, 0, 2, 0, 0)
    manager.unlease(blocks)
    assert parts(manager) == (9, 2, 0, 0, 0, 0)


def test_a_cached_block_can_be_leased(manager: BlockManager) -> None:
    blocks = fill(manager, 1, 2)
    manager.release(blocks)
    manager.lease(blocks)
    assert parts(manager) == (9, 0, 0, 2, 0, 0)
    manager.unlease(blocks)
    manager.take_events()
    assert manager.allocate(10) is not None
    assert manager.take_events() == ([], names(2)), "tail first"


def test_a_leased_block_can_be_sealed(manager: BlockManager) -> None:
    blocks = manager.allocate(1)
    assert blocks == [0]
    manager.lease(blocks)
    manager.seal(0, names(1)[0])
    manager.release(blocks)
    manager.unlease(blocks)
    assert parts(manager) == (10, 1, 0, 0, 0, 0)


# ---------------------------------------------------------------- slots of transfers


def test_reserved_slots_land_or_come_back(manager: BlockManager) -> None:
    slots = manager.reserve(4)
    assert slots == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert parts(manager) == (7, 0, 0, 0, 4, 0)
    manager.land(0, 1, names(1)[0])
    manager.land(1, 1, None)
    manager.give_back(2, 1)
    manager.drain(3, 1)
    assert parts(manager) == (8, 0, 2, 0, 0, 1)
    manager.drained(3, 1)
    assert parts(manager) == (9, 0, 2, 0, 0, 0)
    assert manager.match(names(1)) == [0]
    manager.seal(1, names(2)[0])  # the tail became full on this worker
    manager.release([0])
    manager.release([0, 1])
    assert parts(manager) == (9, 2, 0, 0, 0, 0)
    assert manager.take_events() == (names(1, 2), [])


def test_the_generation_rises_on_every_exit_from_free(manager: BlockManager) -> None:
    assert manager.reserve(1) == [(0, 1)]
    manager.give_back(0, 1)
    assert manager.reserve(1) == [(0, 2)]
    manager.drain(0, 2)
    manager.drained(0, 2)
    assert manager.allocate(1) == [0]  # generation 3
    manager.release([0])
    assert manager.reserve(2) == [(0, 4), (1, 1)]


def test_a_slot_of_another_generation_is_refused(manager: BlockManager) -> None:
    manager.reserve(1)
    manager.give_back(0, 1)
    manager.reserve(1)
    for late in (manager.give_back, manager.drain):
        with pytest.raises(AssertionError, match="generation=2"):
            late(0, 1)
    with pytest.raises(AssertionError, match="generation=2"):
        manager.land(0, 1, None)
    manager.drain(0, 2)
    with pytest.raises(AssertionError, match="generation=2"):
        manager.drained(0, 1)
    assert parts(manager) == (10, 0, 0, 0, 0, 1)


def test_a_landed_block_that_is_here_already_is_a_twin(manager: BlockManager) -> None:
    manager.reserve(1)
    other = fill(manager, 1)
    manager.land(0, 1, names(1)[0])
    assert manager.match(names(1)) == other == [1]
    manager.release([0])
    assert parts(manager) == (10, 0, 1, 0, 0, 0)


# ---------------------------------------------------------------- events, ledger, asserts


def test_events_are_net_changes(manager: BlockManager) -> None:
    manager.release(fill(manager, 1, 2))
    assert manager.take_events() == (names(1, 2), [])
    assert manager.take_events() == ([], [])
    everything = manager.allocate(11)
    assert everything is not None
    manager.release(everything)
    assert manager.take_events() == ([], names(2, 1))
    # Stored and evicted in one window, then evicted and stored again in one window.
    manager.release(fill(manager, 3, 4))
    manager.release(manager.allocate(11) or [])
    assert manager.take_events() == ([], [])
    manager.release(fill(manager, 5))
    assert manager.take_events() == (names(5), [])
    manager.release(manager.allocate(11) or [])
    manager.release(fill(manager, 5))
    assert manager.take_events() == ([], [])
    assert manager.cached_hashes() == names(5)


def test_the_ledger_counts_each_block_once(manager: BlockManager) -> None:
    manager.release(fill(manager, 1, 2))
    manager.allocate(1)
    leased = fill(manager, 3)
    manager.lease(leased)
    manager.release(leased)
    slots = manager.reserve(2)
    assert slots is not None
    manager.drain(*slots[0])
    manager.check()
    assert manager.ledger(running=7) == Ledger(
        num_blocks=11,
        free=5,
        cached=2,
        in_use=1,
        leased=1,
        receiving=1,
        draining=1,
        running=7,
        balanced=True,
    )


def test_broken_contracts_fail_with_the_numbers(manager: BlockManager) -> None:
    [block] = fill(manager, 1)
    with pytest.raises(AssertionError, match=r"block 0: .*SEALED"):
        manager.seal(block, names(2)[0])
    with pytest.raises(AssertionError, match=r"block 5: .*FREE"):
        manager.release([5])
    with pytest.raises(AssertionError, match=r"block 5: .*FREE"):
        manager.lease([5])
    with pytest.raises(AssertionError, match="leases=0"):
        manager.unlease([block])
    manager.release([block])
    with pytest.raises(AssertionError, match="refs=0"):
        manager.release([block])
    with pytest.raises(AssertionError, match="refs=0"):
        manager.share([block])
    with pytest.raises(AssertionError, match="-1"):
        manager.allocate(-1)
    with pytest.raises(AssertionError, match=r"\(-1, 11\)"):
        manager.seal(-1, names(2)[0])
    with pytest.raises(AssertionError, match="0"):
        BlockManager(0)


def test_check_sees_a_block_that_is_lost(manager: BlockManager) -> None:
    manager.allocate(1)
    manager._free.pop()
    assert not manager.ledger().balanced
    with pytest.raises(AssertionError):
        manager.check()
