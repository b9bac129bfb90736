"""Exact decisions of the prefill scheduler on tiny pools."""

from common.blockhash import seed
from common.kv.blocks import BlockManager
from common.sampling import SamplingParams
from common.schedule import advance, extend_hashes
from common.sequence import Sequence
from prefill.scheduler import PrefillScheduler, Prompt
from tests.stub import stub_limits


def make(num_blocks: int, **changes: object) -> PrefillScheduler:
    return PrefillScheduler(BlockManager(num_blocks), stub_limits(num_blocks, **changes))


def prompt(request: int, length: int, first: int = 0, priority: int = 0) -> Prompt:
    sequence = Sequence(
        request=request,
        attempt=0,
        choices=(0,),
        tokens=[first or request] * length,
        prompt_len=length,
        params=SamplingParams(max_tokens=5, priority=priority),
        router=b"r",
        parent=seed("stub"),
    )
    extend_hashes(sequence, length // 16, 16)
    return Prompt(sequence, None)


def decide(scheduler: PrefillScheduler) -> list[tuple[int, int, int]]:
    """(request, start, count) of each chunk of the next step, which is then computed."""
    chunks, _ = scheduler.next_batch()
    plan = [(c.sequence.request, c.sequence.num_computed, c.count) for c in chunks]
    for chunk in chunks:
        advance(chunk.sequence, chunk.count, scheduler.blocks, 16)
    for p in [p for p in scheduler.running if p.sequence.num_pending == 0]:
        scheduler.remove(p)
    return plan


def test_prompts_share_the_budget_shortest_first() -> None:
    scheduler = make(32, max_num_batched_tokens=64)
    for request, length in ((1, 100), (2, 20), (3, 50)):
        scheduler.add(prompt(request, length))
    assert scheduler.prefill_tokens == 170
    assert decide(scheduler) == [(2, 0, 20), (3, 0, 32), (1, 0, 12)]
    assert decide(scheduler) == [(3, 32, 18), (1, 12, 36)]
    assert decide(scheduler) == [(1, 48, 52)]
    assert decide(scheduler) == []
    assert scheduler.blocks.ledger().cached == 6 + 1 + 3


def test_a_short_prompt_overtakes_a_long_one_that_runs() -> None:
    scheduler = make(32, max_num_batched_tokens=32)
    scheduler.add(prompt(1, 200))
    assert decide(scheduler) == [(1, 0, 32)]
    scheduler.add(prompt(2, 30))
    assert decide(scheduler) == [(2, 0, 30), (1, 32, 2)]
    assert decide(scheduler) == [(1, 34, 30)]


def test_who_waits_ages() -> None:
    """96 tokens wait for 64 tokens of later prompts; the third one has the same turn, and waits."""
    scheduler = make(64, max_num_batched_tokens=32)
    scheduler.add(prompt(1, 96))
    served = []
    for request in range(2, 8):
        scheduler.add(prompt(request, 32))
        served += [request for request, _, _ in decide(scheduler)]
    assert served == [2, 3, 1, 1, 1, 4]


def test_priority_decides_who_starts() -> None:
    scheduler = make(64, max_num_batched_tokens=32)
    scheduler.add(prompt(1, 32, priority=1))
    scheduler.add(prompt(2, 64))
    assert [decide(scheduler) for _ in range(2)] == [[(2, 0, 32)], [(2, 32, 32)]]
    assert decide(scheduler) == [(1, 0, 32)]


def test_a_started_prompt_goes_on_whatever_its_priority() -> None:
    """It ages among prompts of the first priority, or they would starve it for ever."""
    scheduler = make(64, max_num_batched_tokens=32)
    scheduler.add(prompt(1, 96, priority=1))
    assert decide(scheduler) == [(1, 0, 32)]
    scheduler.add(prompt(2, 16))
    assert decide(scheduler) == [(2, 0, 16), (1, 32, 16)]
    served = []
    for request in range(3, 7):
        scheduler.add(prompt(request, 32))
        served += [request for request, _, _ in decide(scheduler)]
    assert served == [1, 1, 3, 3, 4, 4, 5]
    scheduler.add(prompt(8, 16, priority=1))
    assert [request for request, _, _ in decide(scheduler)] == [5, 6]


def test_all_blocks_or_nothing_and_no_overtaking_for_blocks() -> None:
    scheduler = make(6, max_num_batched_tokens=16)
    scheduler.add(prompt(1, 60))
    assert decide(scheduler) == [(1, 0, 16)]
    assert scheduler.blocks.ledger().in_use == 4
    scheduler.add(prompt(2, 40))
    assert [decide(scheduler) for _ in range(2)] == [[(1, 16, 16)], [(1, 32, 16)]]
    scheduler.add(prompt(3, 10))
    assert not scheduler.is_short  # nobody's turn came
    # 2 needs 3 blocks and there are 2; 3 would fit, but waits behind it: 2 has waited longer.
    assert decide(scheduler) == [(1, 48, 12)]
    assert scheduler.is_short
    assert decide(scheduler) == [(2, 0, 16)]
    assert not scheduler.is_short
    assert [decide(scheduler) for _ in range(2)] == [[(2, 16, 16)], [(2, 32, 8), (3, 0, 8)]]


def test_cached_prefix_is_taken_when_the_prompt_starts() -> None:
    scheduler = make(8)
    scheduler.add(prompt(1, 40, first=7))
    assert decide(scheduler) == [(1, 0, 40)]
    scheduler.add(prompt(2, 64, first=7))
    scheduler.add(prompt(3, 32, first=7))
    assert decide(scheduler) == [(3, 16, 16), (2, 32, 32)]


def test_at_most_max_num_seqs_at_a_time() -> None:
    scheduler = make(32, max_num_seqs=2, max_num_batched_tokens=1000)
    for request in (1, 2, 3):
        scheduler.add(prompt(request, 20))
    assert decide(scheduler) == [(1, 0, 20), (2, 0, 20)]
    assert decide(scheduler) == [(3, 0, 20)]
