"""Simulated workers against the same thing done step by step."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blockhash import BlockHash
from router.simulate.cache import LruCache
from router.simulate.decode_worker import DecodeWorker
from router.simulate.job import Job
from router.simulate.model import Hardware
from router.simulate.prefill_worker import PrefillWorker
from router.simulate.trace import Request

HARDWARE = Hardware(
    step_s=0.01, row_s=0.001, kv_s=1e-6, prefill_s=0.02, token_s=1e-4, pair_s=0.0,
    local_chunk_tokens=100, max_num_seqs=4, decode_blocks=100, block_tokens=100,
)  # fmt: skip


def job(prompt: int, output: int, at: float = 0.0) -> Job:
    return Job(Request(at, prompt, output, ()), at)


def step_by_step(jobs: list[tuple[Job, float]]) -> list[float]:
    """When each sequence ends if every step is made on its own."""
    ends = [0.0] * len(jobs)
    coming = sorted(range(len(jobs)), key=lambda i: jobs[i][1])
    running: dict[int, list[int]] = {}
    now = 0.0
    while coming or running:
        if not running:
            now = max(now, jobs[coming[0]][1])
        while coming and jobs[coming[0]][1] <= now and len(running) < HARDWARE.max_num_seqs:
            i = coming.pop(0)
            running[i] = [jobs[i][0].tokens + 1, jobs[i][0].left]
        kv = sum(held for held, _ in running.values())
        now += HARDWARE.step_s + HARDWARE.row_s * len(running) + HARDWARE.kv_s * kv
        for i in list(running):
            running[i][0] += 1
            running[i][1] -= 1
            if not running[i][1]:
                ends[i] = now
                del running[i]
    return ends


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_many_steps_at_once_are_the_same_as_one_by_one(seed: int, count: int) -> None:
    rng = Random(seed)
    jobs = [(job(rng.randrange(1, 500), rng.randrange(2, 40)), rng.random()) for _ in range(count)]
    worker = DecodeWorker(HARDWARE)
    for each, at in jobs:
        worker.join(each, at)
    for k in range(10):  # looked at now and then
        worker.advance(k * 0.2 * rng.random())
    worker.advance(1e6)
    assert [each.end for each, _ in jobs] == pytest.approx(step_by_step(jobs))
    assert worker.num_seqs == worker.kv_tokens == 0


def test_a_prompt_is_prefilled_alone_in_the_time_of_its_compute() -> None:
    worker = DecodeWorker(HARDWARE)
    alone = job(250, 1, 5.0)
    worker.prefill(alone, 5.0)
    assert worker.local_tokens == 250
    assert worker.wait_s() == pytest.approx(0.045)
    worker.advance(9.0)
    assert alone.first == alone.end == pytest.approx(5.045)
    assert worker.local_tokens == 0 and worker.wait_s() == 0.0


def test_a_prefill_and_the_residents_share_the_steps() -> None:
    worker = DecodeWorker(HARDWARE)
    resident, prompt = job(0, 11), job(200, 2)
    worker.join(resident, 0.0)
    worker.advance(1e-9)
    worker.prefill(prompt, 1e-9)
    worker.advance(1.0)
    # The first step was under way; then two with a chunk of 20 ms each, then both decode.
    alone = sum(0.011 + 1e-6 * kv for kv in range(1, 4))
    assert prompt.first == pytest.approx(alone + 0.04)
    together = 0.012 + 1e-6 * (4 + 201)
    assert prompt.end == pytest.approx(alone + 0.04 + together)
    assert resident.end == pytest.approx(
        sum(0.011 + 1e-6 * kv for kv in range(1, 11)) + 0.04 + 0.001 + 1e-6 * 201
    )


def test_a_sequence_waits_for_memory() -> None:
    worker = DecodeWorker(HARDWARE)
    first, second = job(9_000, 11), job(2_000, 2)
    worker.join(first, 0.0)
    worker.join(second, 0.0)
    worker.advance(10.0)
    assert first.end is not None and second.end is not None and second.end > first.end


def test_the_shortest_prompt_is_next_but_nobody_is_overtaken_for_ever() -> None:
    worker = PrefillWorker(LruCache(10), shortest_first=True)
    long, short, fetching = (Job(Request(0.0, n, 1, ()), 0.0) for n in (500, 300, 100))
    for each in (long, short, fetching):
        each.predicted_tokens, each.predicted_s = each.tokens, each.tokens / 1000
    fetching.fetched_at = 7.0
    for each in (long, short, fetching):
        worker.add(each)
    assert worker.take(0.0) is short
    # It has waited for 300 tokens: as good as 200 now.
    later = Job(Request(0.0, 250, 1, ()), 0.0)
    later.predicted_tokens, later.predicted_s = 250, 0.25
    worker.add(later)
    assert worker.take(0.0) is long
    assert worker.take(7.0) is fetching
    assert worker.queued_s == pytest.approx(0.25)
    assert worker.take(7.0) is later
    assert worker.queued_s == 0.0


def test_other_systems_serve_in_order_of_arrival() -> None:
    worker = PrefillWorker(LruCache(10))
    first, second = (Job(Request(0.0, n, 1, ()), 0.0) for n in (500, 300))
    first.fetched_at = 3.0
    worker.add(first)
    worker.add(second)
    assert worker.take(1.0) is None and worker.ready_at() == 3.0
    assert worker.take(3.0) is first
    assert worker.take(3.0) is second


def test_a_cache_evicts_the_tail_of_what_was_used_longest_ago() -> None:
    a, b, c, d, e = (BlockHash(bytes([i])) for i in range(5))
    cache = LruCache(4)
    assert cache.use([a, b, c]) == []
    assert cache.use([a, d]) == []
    assert cache.use([e]) == [c]
    assert cache.match([a, b, c]) == 2
    assert cache.match([e, a]) == 2
    assert cache.use([c]) == [b]
