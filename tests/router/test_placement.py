"""Placement is pure: these tests are the table of its decisions."""

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from common.cost import CostModel
from common.messages import KvLayoutInfo
from router.placement import LOCAL_TOKENS, Candidate, Placement, View, place

LAYOUT = KvLayoutInfo(block_size=16, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")


def worker(id: str, **changes: Any) -> Candidate:
    """`p...` prefills, `d...` decodes."""
    plain = Candidate(
        id=id,
        role="prefill" if id.startswith("p") else "decode",
        content_id="c0",
        layout=LAYOUT,
        capacity=10_000,
        max_num_seqs=8,
    )
    return replace(plain, **changes)


def view(num_tokens: int = 1000, **changes: Any) -> View:
    return replace(View(num_tokens=num_tokens, remaining=100), **changes)


def go(view: View, *workers: Candidate, seed: int = 0) -> Placement | None:
    return place(view, workers, Random(seed))


def test_one_of_each() -> None:
    assert go(view(), worker("p0"), worker("d0")) == Placement("p0", "d0", 1000)


def test_least_queued_prefill_and_least_filled_decode() -> None:
    workers = (
        worker("p0", prefill_tokens=500), worker("p1", prefill_tokens=400),
        worker("d0", kv_tokens=900), worker("d1", kv_tokens=800),
    )  # fmt: skip
    assert go(view(), *workers) == Placement("p1", "d1", 1000)


@pytest.mark.parametrize(("queue", "chosen"), [(3400, "p0"), (3800, "p1")])
def test_prefix_hit_on_prefill_is_worth_its_work_and_that_of_those_behind(
    queue: int, chosen: str
) -> None:
    workers = (worker("p0", prefill_tokens=queue), worker("p1"), worker("d0"))
    placed = go(view(hits={"p0": 800}), *workers)
    assert placed == Placement(chosen, "d0", 200 if chosen == "p0" else 1000)


@pytest.mark.parametrize(("kv", "chosen"), [(700, "d0"), (900, "d1")])
def test_prefix_hit_on_decode_is_worth_its_tokens(kv: int, chosen: str) -> None:
    workers = (worker("p0"), worker("d0", kv_tokens=kv), worker("d1"))
    assert go(view(hits={"d0": 800}), *workers) == Placement("p0", chosen, 1000)


def test_a_full_decode_worker_is_passed_over() -> None:
    workers = (worker("p0"), worker("d0", num_seqs=8), worker("d1", kv_tokens=500, num_seqs=7))
    assert go(view(), *workers) == Placement("p0", "d1", 1000)
    assert go(view(num_choices=2), *workers) == Placement("p0", "d1", 1000)


def test_no_prefill_worker_means_local() -> None:
    assert go(view(), worker("d0")) == Placement(None, "d0", 1000)
    assert go(view(), worker("p0", ready=False), worker("d0")) == Placement(None, "d0", 1000)


def test_local_if_nearly_all_is_cached_on_decode() -> None:
    hit = 1000 - LOCAL_TOKENS
    workers = (worker("p0"), worker("d0"))
    local = Placement(None, "d0", LOCAL_TOKENS)
    assert go(view(hits={"d0": hit}, itl_s=0.0), *workers) == local
    assert go(view(hits={"d0": hit - 1}, itl_s=0.0), *workers) == Placement("p0", "d0", 1000)
    # A short prompt that nobody holds is no reason to disturb the residents.
    assert go(view(20, itl_s=0.0), *workers) == Placement("p0", "d0", 20)
    # Without a limit it is not theirs to do.
    assert go(view(hits={"d0": hit}), *workers) == Placement("p0", "d0", 1000)


def test_one_token_is_always_computed() -> None:
    assert go(view(hits={"d0": 1000}), worker("d0")) == Placement(None, "d0", 1)


def test_last_token_needs_no_decode_worker() -> None:
    assert go(view(remaining=1), worker("p0"), worker("d0")) == Placement("p0", None, 1000)
    assert go(view(remaining=1), worker("p0")) == Placement("p0", None, 1000)
    assert go(view(remaining=1), worker("d0")) == Placement(None, "d0", 1000)


def test_contents_and_layouts_are_never_mixed() -> None:
    other = replace(worker("p0", content_id="c1"))
    assert go(view(), other, worker("d0")) == Placement(None, "d0", 1000)
    wide = KvLayoutInfo(block_size=16, num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32")
    assert go(view(), worker("p0", layout=wide), worker("d0")) == Placement(None, "d0", 1000)
    large = KvLayoutInfo(block_size=32, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
    assert go(view(), worker("p0", layout=large), worker("d0")) == Placement("p0", "d0", 1000)
    busy = worker("p1", prefill_tokens=9_000)
    assert go(view(), other, busy, worker("d0")) == Placement("p1", "d0", 1000)


def test_nobody() -> None:
    assert go(view()) is None
    assert go(view(), worker("p0")) is None
    assert go(view(), worker("p0"), worker("d0", ready=False)) is None
    assert go(view(avoid=frozenset({"d0"})), worker("p0"), worker("d0")) is None
    assert go(view(10_000), worker("p0"), worker("d0")) is None


def test_workers_that_are_too_small_are_passed_over() -> None:
    workers = (worker("p0", capacity=1000), worker("p1"), worker("d0", capacity=1000), worker("d1"))
    assert go(view(), *workers) == Placement("p1", "d1", 1000)


def test_ties_go_to_the_least_loaded_then_to_chance() -> None:
    workers = (worker("p0"), worker("d0", num_seqs=1), worker("d1"))
    assert go(view(), *workers) == Placement("p0", "d1", 1000)
    even = [worker(f"d{i}") for i in range(3)]
    chosen = Counter(str(go(view(), *even, seed=seed)) for seed in range(300))
    assert len(chosen) == 3 and min(chosen.values()) > 60
    assert go(view(), *even, seed=5) == go(view(), *even, seed=5)


COST = CostModel(prefill_s=0.0, token_s=1e-3, pair_s=0.0, step_s=0.01, row_s=0.0, kv_s=0.0)


def measured(id: str, **changes: Any) -> Candidate:
    """Computes 1,000 tokens in a second, a step in 10 ms."""
    return worker(id, cost=COST, **changes)


def test_a_queue_that_was_predicted_replaces_the_count_of_its_tokens() -> None:
    workers = (measured("p0", queue_s=2.0), measured("p1", prefill_tokens=2500), measured("d0"))
    placed = go(view(), *workers)
    assert placed == Placement("p0", "d0", 1000)
    assert placed is not None and placed.ttft_s == pytest.approx(3.0)


def test_a_prefix_is_fetched_from_its_owner_rather_than_computed() -> None:
    slow, fast = measured("p1", fetch_s=1e-2), measured("p1", fetch_s=1e-5)
    busy = measured("p0", queue_s=9.0)
    asked = view(hits={"p0": 800}, held={"p0": 800})
    placed = go(asked, busy, fast, measured("d0"))
    assert placed == Placement("p1", "d0", 200, fetch="p0")
    assert placed is not None and placed.ttft_s == pytest.approx(0.208)
    assert go(asked, busy, slow, measured("d0")) == Placement("p1", "d0", 1000)
    # What is not there yet cannot be fetched, and the owner needs no copy of its own.
    assert go(view(hits={"p0": 800}), busy, fast, measured("d0")) == Placement("p1", "d0", 1000)
    idle = measured("p0", fetch_s=1e-5)
    assert go(asked, idle, fast, measured("d0")) == Placement("p0", "d0", 200)


def test_a_prefix_is_fetched_from_a_worker_of_the_same_kind_only() -> None:
    asked = view(hits={"p0": 800}, held={"p0": 800})
    fast = measured("p1", fetch_s=1e-5)
    for change in ({"content_id": "c1"}, {"layout": structs.replace(LAYOUT, head_dim=16)}):
        busy = replace(measured("p0", queue_s=9.0), **change)
        assert go(asked, busy, fast, measured("d0")) == Placement("p1", "d0", 1000)
    other_size = structs.replace(LAYOUT, block_size=48)
    busy = measured("p0", queue_s=9.0, layout=other_size)
    assert go(asked, busy, fast, measured("d0")) == Placement("p1", "d0", 200, fetch="p0")


def test_how_long_a_fetch_is_waited_for() -> None:
    busy, fast = measured("p0", queue_s=9.0), measured("p1", fetch_s=1e-5, fetch_base_s=0.01)
    placed = go(view(hits={"p0": 800}, held={"p0": 800}), busy, fast, measured("d0"))
    assert placed == Placement("p1", "d0", 200, fetch="p0")
    # As long as computing the 800 tokens would take, and hold up those behind.
    assert placed is not None and placed.fetch_within_s == pytest.approx(4 * 0.8)
    far = measured("p1", fetch_s=1e-5, fetch_base_s=4.0)
    assert go(view(held={"p0": 800}), busy, far, measured("d0")) == Placement("p1", "d0", 1000)


def test_the_way_of_a_prefix_is_hidden_by_the_queue() -> None:
    workers = (measured("p0", queue_s=50.0), measured("p1", queue_s=1.0, fetch_s=1e-3))
    placed = go(view(held={"p0": 800}), *workers, measured("d0"))
    assert placed == Placement("p1", "d0", 200, fetch="p0")
    assert placed is not None and placed.ttft_s == pytest.approx(1.2)


def test_of_equal_workers_the_one_that_need_not_copy() -> None:
    workers = (measured("p0"), measured("p1", fetch_s=0.0), measured("d0"))
    for seed in range(9):
        placed = go(view(hits={"p0": 800}, held={"p0": 800}), *workers, seed=seed)
        assert placed == Placement("p0", "d0", 200)


def test_a_match_of_one_shared_block_is_no_affinity() -> None:
    workers = (measured("p0", queue_s=0.1), measured("p1"), measured("d0"))
    assert go(view(hits={"p0": 16}), *workers) == Placement("p1", "d0", 1000)


def test_a_decode_worker_prefills_when_the_others_are_busy_and_its_steps_bear_it() -> None:
    # 4 chunks of 250 tokens, each beside a step of 10 ms: 1.04 s of work and steps of 260 ms.
    workers = (measured("p0", queue_s=1.0), measured("d0", num_seqs=1, chunk_tokens=250))
    placed = go(view(itl_s=0.5), *workers)
    assert placed == Placement(None, "d0", 1000)
    assert placed is not None and placed.ttft_s == pytest.approx(1.04)
    assert go(view(itl_s=0.3), *workers) == Placement("p0", "d0", 1000)
    # Its seats are taken: what it computes keeps those who wait for one from it.
    full = measured("d0", num_seqs=8, chunk_tokens=250)
    assert go(view(itl_s=0.5), workers[0], full) == Placement("p0", "d0", 1000)
    assert go(view(), *workers) == Placement("p0", "d0", 1000)
    idle = measured("p0", queue_s=0.03)
    assert go(view(itl_s=0.5), idle, workers[1]) == Placement("p0", "d0", 1000)


def test_placing_changes_nothing() -> None:
    workers = [worker("p0"), worker("p1", num_seqs=2), worker("d0", kv_tokens=5)]
    before = [replace(w) for w in workers]
    go(view(hits={"p1": 32}), *workers)
    assert workers == before


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4))
def test_workers_chosen_apart_are_the_best_pair(seed: int, prefills: int, decodes: int) -> None:
    """A pair that is forbidden and useless makes `place` look at all pairs: the same choice."""
    rng = Random(seed)
    workers = [
        worker(f"p{i}", prefill_tokens=rng.randrange(9000), num_seqs=i) for i in range(prefills)
    ] + [worker(f"d{i}", kv_tokens=rng.randrange(9000), num_seqs=i) for i in range(decodes)]
    hits = {w.id: rng.randrange(1000) for w in workers}
    apart = view(hits=hits)
    pairs = view(hits=hits, avoid_pairs=frozenset({("p9", "d9")}))
    assert go(apart, *workers) == go(pairs, *workers)
