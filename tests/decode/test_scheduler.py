"""Exact decisions of the decode scheduler on tiny pools."""

from common.blockhash import seed
from common.kv.blocks import BlockManager
from common.messages import Peer
from common.sampling import SamplingParams
from common.schedule import advance, extend_hashes
from common.sequence import Sequence
from decode.handover import Handover
from decode.scheduler import DecodeScheduler, Plan
from kvtransfer.commands import Slot
from tests.stub import stub_limits


def make(num_blocks: int, **changes: object) -> DecodeScheduler:
    return DecodeScheduler(BlockManager(num_blocks), stub_limits(num_blocks, **changes))


def sequence(arrival: int, length: int, choices: tuple[int, ...] = (0,)) -> Sequence:
    made = Sequence(
        request=arrival,
        attempt=0,
        choices=choices,
        tokens=[arrival] * length,
        prompt_len=length,
        params=SamplingParams(max_tokens=100),
        router=b"r",
        parent=seed("stub"),
        arrival=arrival,
    )
    extend_hashes(made, length // 16, 16)
    return made


def handover(arrival: int, length: int) -> Handover:
    return Handover(sequence(arrival, length), Peer("p", 1, ""), wanted=True)


def decide(scheduler: DecodeScheduler) -> tuple[list[tuple[int, int, int]], Plan]:
    """(request, start, count) of each row of the next step, which is then computed; every
    sequence that is complete gets a token."""
    plan = scheduler.next_batch()
    rows = [(c.sequence.request, c.sequence.num_computed, c.count) for c in plan.chunks]
    for chunk in plan.chunks:
        advance(chunk.sequence, chunk.count, scheduler.blocks, 16)
        if chunk.sequence.num_pending == 0:
            chunk.sequence.tokens.append(chunk.sequence.request)
    scheduler.blocks.check()
    return rows, plan


def test_decode_rows_first_then_chunks_within_the_budget() -> None:
    scheduler = make(32, max_num_batched_tokens=40)
    scheduler.add(sequence(1, 20))
    scheduler.add(sequence(2, 60))
    assert decide(scheduler)[0] == [(1, 0, 20), (2, 0, 16)]
    scheduler.add(sequence(3, 10))
    assert decide(scheduler)[0] == [(1, 20, 1), (2, 16, 32), (3, 0, 7)]  # 2 is cut at a block
    assert decide(scheduler)[0] == [(1, 21, 1), (2, 48, 12), (3, 7, 3)]
    assert decide(scheduler)[0] == [(1, 22, 1), (2, 60, 1), (3, 10, 1)]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = make(5, max_num_seqs=3)
    first, second = sequence(1, 30), sequence(2, 16)
    for s in (first, second):
        scheduler.add(s)
    assert decide(scheduler)[0] == [(1, 0, 30), (2, 0, 16)]  # 3 blocks, 2 kept for the next
    scheduler.add(sequence(3, 5))
    assert decide(scheduler)[0] == [(1, 30, 1), (2, 16, 1)]  # no headroom for a third
    for _ in range(15):
        rows, plan = decide(scheduler)
        assert [row[0] for row in rows] == [1, 2] and plan.preempted == []
    # 2 needs a third block, there is none, and it is the newest: its two full ones stay cached.
    assert (len(first.blocks), len(second.blocks), second.num_tokens) == (3, 2, 33)
    rows, plan = decide(scheduler)
    assert plan.preempted == [second] and rows == [(1, 46, 1)]
    assert [s.arrival for s in scheduler.waiting] == [2, 3]
    assert decide(scheduler)[0] == [(1, 47, 1)]
    scheduler.remove(first)
    assert decide(scheduler)[0] == [(2, 32, 1), (3, 0, 5)]


def test_slots_are_granted_in_order_with_headroom() -> None:
    scheduler = make(8)
    scheduler.add(sequence(1, 20))
    decide(scheduler)
    big, small = handover(2, 80), handover(3, 16)
    scheduler.add(small)
    scheduler.add(big)
    rows, plan = decide(scheduler)
    # 5 of the 6 free blocks, one is left for the running sequence; the small one has to wait.
    assert plan.granted == [big] and rows == [(1, 20, 1)]
    assert big.slots == tuple(Slot(i, b, 1) for i, b in enumerate(range(2, 7)))
    assert scheduler.is_short
    assert decide(scheduler)[1].granted == [] and scheduler.is_short
    scheduler.remove(big)
    kept = big.land(scheduler.blocks, [0, 1, 2, 3, 4])
    scheduler.blocks.release(kept)
    assert decide(scheduler)[1].granted == [small] and not scheduler.is_short
    scheduler.remove(small)
    scheduler.blocks.release(small.land(scheduler.blocks, []))
    # What landed is cached: the same prompt needs no slot any more, and nothing is shipped.
    again = handover(4, 80)
    again.sequence.tokens = big.sequence.tokens
    again.sequence.hashes = big.sequence.hashes
    scheduler.add(again)
    _, plan = decide(scheduler)
    assert plan.granted == [again] and again.slots == ()


def test_who_waits_for_blocks_is_not_overtaken_when_tokens_run_out() -> None:
    scheduler = make(12, max_num_batched_tokens=16)
    scheduler.add(sequence(2, 16))
    decide(scheduler)
    scheduler.add(sequence(3, 170))
    assert decide(scheduler)[0] == [(2, 16, 1)] and scheduler.is_short
    scheduler.add(sequence(1, 40))
    scheduler.add(handover(4, 16))
    rows, plan = decide(scheduler)
    assert rows == [(2, 17, 1), (1, 0, 15)] and plan.granted == []


def test_a_pool_just_large_enough_for_one() -> None:
    scheduler = make(4)
    one = handover(1, 64)
    scheduler.add(one)
    assert decide(scheduler)[1].granted == [one]


def test_the_oldest_waits_for_granted_slots_instead_of_giving_up() -> None:
    scheduler = make(4)
    first = sequence(1, 30)
    scheduler.add(first)
    decide(scheduler)
    coming = handover(2, 16)
    scheduler.add(coming)
    decide(scheduler)
    filler = scheduler.blocks.reserve(1)
    assert filler is not None and scheduler.blocks.num_available == 0
    decide(scheduler)
    rows, plan = decide(scheduler)
    assert first.num_pending == 1 and rows == [] and plan.preempted == []
    scheduler.remove(coming)
    coming.sequence.blocks = coming.land(scheduler.blocks, [0])
    coming.sequence.num_computed = 16
    coming.sequence.tokens.append(9)
    scheduler.run(coming.sequence)
    rows, plan = decide(scheduler)
    assert rows == [(1, 32, 1)] and plan.preempted == [coming.sequence]


def test_fork_shares_full_blocks_and_copies_the_tail() -> None:
    scheduler = make(8, max_num_seqs=3)
    parent = sequence(1, 40, choices=(0, 1, 2, 3))
    scheduler.add(parent)
    decide(scheduler)
    assert parent.blocks == [0, 1, 2]
    forks = scheduler.fork(parent, [0, 2, 3])
    assert [(f.sequence.choices, f.sequence.blocks, f.source, f.target) for f in forks] == [
        ((0,), [0, 1, 2], 2, 2),
        ((2,), [0, 1, 3], 2, 3),
        ((3,), [0, 1, 4], 2, 4),
    ]
    assert [s.choices for s in scheduler.running] == [(0,), (2,), (3,)]
    for f in forks:
        scheduler.remove(f.sequence)
    assert scheduler.blocks.num_available == 8
    scheduler.blocks.check()


def test_fork_without_room_waits() -> None:
    scheduler = make(3)
    parent = sequence(1, 40, choices=(0, 1))
    scheduler.add(parent)
    decide(scheduler)
    (one, two) = scheduler.fork(parent, [0, 1])
    assert one.sequence.blocks == [0, 1, 2] and two.sequence.blocks == []
    assert scheduler.waiting == [two.sequence] and two.sequence.num_computed == 0
    scheduler.blocks.check()


def test_seats_are_kept_for_those_who_come() -> None:
    scheduler = make(32, max_num_seqs=2)
    scheduler.add(sequence(1, 10))
    scheduler.add(handover(2, 10))
    scheduler.add(sequence(3, 10))
    rows, plan = decide(scheduler)
    assert rows == [(1, 0, 10)] and [h.arrival for h in plan.granted] == [2]
    assert [c.arrival for c in scheduler.waiting] == [3]
