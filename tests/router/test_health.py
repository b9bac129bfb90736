"""Workers that get a rest, and failed work that does not come back all at once."""

import asyncio
from random import Random

import pytest

from common.messages import Admit
from router.fleet import Fleet
from router.health import (
    BUDGET_LEAST,
    FAILURES,
    OPEN_S,
    OUT_S,
    REFILL_S,
    SEEN,
    Breaker,
    Outliers,
    Pace,
    RetryBudget,
)
from tests.client import complete, stream
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected
from tests.router.test_fleet import attempt
from tests.router.test_recovery import idle
from tests.worker_info import worker_info

PROMPT = list(range(10, 60))


def test_a_breaker_opens_for_longer_each_time_and_lets_one_try() -> None:
    breaker, now = Breaker(), 100.0
    breaker.sent("stream", now)
    assert [breaker.failed(now) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    open_s = OPEN_S[0]
    for turn in range(8):
        assert not breaker.allows(now + open_s * 0.99)
        now += open_s
        assert breaker.allows(now)
        breaker.sent(turn, now)
        assert not breaker.allows(now)
        breaker.ended("stream")  # it began before
        assert not breaker.allows(now)
        breaker.ended(turn)
        assert breaker.allows(now)
        assert breaker.failed(now)
        assert not breaker.failed(now)  # what was in flight fails too
        open_s = min(2 * open_s, OPEN_S[1])
    now += open_s
    breaker.sent("last", now)
    breaker.succeeded()
    assert breaker.allows(now)
    assert [breaker.failed(now) for _ in range(FAILURES)][-1]
    assert breaker.allows(now + OPEN_S[0])


def test_outliers_are_ejected_up_to_the_cap_and_come_back() -> None:
    outliers = Outliers()
    paces = {f"w{i}": Pace(1.0 + i / 10, SEEN) for i in range(6)}
    assert outliers.review(paces, 0.0) == []
    paces |= {"w1": Pace(9.0, SEEN), "w2": Pace(20.0, SEEN), "w3": Pace(30.0, SEEN - 1)}
    assert outliers.review(paces, 1.0) == ["w2", "w1"]
    paces |= {"w1": Pace(1.0, 0), "w2": Pace(1.0, 0), "w4": Pace(50.0, SEEN)}
    assert outliers.review(paces, 2.0) == []  # two of six are out
    assert outliers.out("w2", 1.0 + OUT_S / 2) and not outliers.out("w4", 2.0)
    assert not outliers.out("w2", 1.0 + OUT_S)
    paces["w1"] = Pace(9.0, SEEN)
    assert outliers.review(paces, 1.0 + OUT_S) == ["w4", "w1"]


def test_who_was_ejected_comes_back_until_it_is_seen_to_be_slow_again() -> None:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    for id in ("p0", "p1", "p2"):
        fleet.up(worker_info(id, role="prefill"))

    def serve(id: str, count: int, seconds: float) -> None:
        nonlocal now
        for _ in range(count):
            one = attempt(prefill=id, decode=None)
            fleet.reserve(one)
            now += seconds
            fleet.prefilled(one)
            fleet.release(one)

    def ready() -> set[str]:
        fleet.review()
        return {candidate.id for candidate in fleet.snapshot() if candidate.ready}

    for _ in range(SEEN):
        for id in ("p0", "p1"):
            serve(id, 4, 0.1)
    for _ in range(SEEN):
        assert ready() == {"p0", "p1", "p2"}
        serve("p0", 8, 0.1)
        serve("p2", 1, 4.0)
    assert ready() == {"p0", "p1"}
    now += OUT_S
    for _ in range(SEEN):
        assert ready() == {"p0", "p1", "p2"}
        serve("p0", 8, 0.1)
        serve("p2", 1, 4.0)
    assert ready() == {"p0", "p1"}
    now += OUT_S
    for _ in range(2 * SEEN):
        assert ready() == {"p0", "p1", "p2"}
        serve("p2", 1, 0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_of_few_workers_none_is_an_outlier(count: int) -> None:
    paces = {f"w{i}": Pace(100.0**i, SEEN) for i in range(count)}
    assert Outliers().review(paces, 0.0) == []


def test_the_budget_spreads_what_comes_at_once() -> None:
    budget = RetryBudget(Random(1))
    delays = [budget.delay_s(10, 50.0) for _ in range(3 * BUDGET_LEAST)]
    assert delays[:BUDGET_LEAST] == [0.0] * BUDGET_LEAST
    assert all(delay > 0 for delay in delays[BUDGET_LEAST:])
    # Two more budgets are earned in twice the time.
    assert 0.5 * REFILL_S < max(delays) < 1.5 * 2 * REFILL_S
    assert budget.delay_s(10, 60.0) == 0.0
    many = RetryBudget(Random(1))
    assert [many.delay_s(1_000, 50.0) for _ in range(200)] == [0.0] * 200


def test_a_fleet_suspends_no_whole_role() -> None:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    for id in ("d0", "d1"):
        fleet.up(worker_info(id, role="decode"))
    for _ in range(FAILURES):
        fleet.failed(["d0", "unknown"])
    assert [c.id for c in fleet.snapshot() if c.ready] == ["d1"]
    for _ in range(FAILURES):
        fleet.failed(["d1"])
    assert [c.id for c in fleet.snapshot() if c.ready] == ["d0", "d1"]
    now = OPEN_S[0]
    assert [c.id for c in fleet.snapshot() if c.ready] == ["d0", "d1"]


def test_a_worker_with_long_streams_is_tried_again_beside_them() -> None:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    for id in ("d0", "d1"):
        fleet.up(worker_info(id, role="decode"))

    def ready() -> set[str]:
        return {candidate.id for candidate in fleet.snapshot() if candidate.ready}

    stream, first, second = (attempt(None, "d0") for _ in range(3))
    fleet.reserve(stream)
    fleet.prefilled(stream)
    for _ in range(FAILURES):
        fleet.failed(["d0"])
    assert ready() == {"d1"}
    now = OPEN_S[0]
    assert ready() == {"d0", "d1"}
    fleet.reserve(first)
    assert ready() == {"d1"}
    fleet.release(first)  # its client went away
    assert ready() == {"d0", "d1"}
    fleet.reserve(second)
    fleet.release(stream)
    assert ready() == {"d1"}
    fleet.prefilled(second)
    assert ready() == {"d0", "d1"}


def test_a_slow_worker_is_better_than_full_ones_and_those_than_one_that_fails() -> None:
    fleet = Fleet(clock=lambda: 0.0)
    for id in ("d0", "d1", "d2"):
        fleet.up(worker_info(id, role="decode", max_num_seqs=1))

    def ready() -> set[str]:
        return {candidate.id for candidate in fleet.snapshot() if candidate.ready}

    paces = {"d0": Pace(50.0, SEEN), "d1": Pace(1.0, SEEN), "d2": Pace(1.0, SEEN)}
    assert fleet._outliers["decode"].review(paces, 0.0) == ["d0"]
    assert ready() == {"d1", "d2"}
    fleet.reserve(attempt(None, "d1"))  # two sequences: all that it takes
    assert ready() == {"d2"}
    fleet.reserve(attempt(None, "d2"))
    assert ready() == {"d0"}
    for _ in range(FAILURES):
        fleet.failed(["d0"])
    assert ready() == set()


async def test_a_worker_that_fails_again_and_again_gets_a_rest(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=2) as served:
        bad, good = served.decodes
        bad.fail = "internal"
        breaker, seed = served.service.fleet["decode-0"].breaker, 0
        while breaker._open_s == OPEN_S[0]:  # it never opened
            seed += 1
            assert (await complete(served.http, PROMPT, seed=seed)).ids == expected(
                PROMPT, 16, seed=seed
            )
        assert len(good.received(Admit)) == seed
        assert len(bad.received(Admit)) >= FAILURES
        await idle(served)


async def test_the_streams_of_a_lost_worker_come_back_one_after_the_other(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=2) as served:
        for worker in served.decodes:
            worker.ends_at = 5
        count = 4 * BUDGET_LEAST
        asked = [
            asyncio.create_task(stream(served.http, PROMPT, seed=i, max_tokens=20))
            for i in range(count)
        ]
        await until(lambda: sum(w.num_running for w in served.decodes) == count)
        await until(lambda: all(not w.gate.is_set() for w in served.decodes))
        victim, other = served.decodes
        await victim.kill()
        other.go_on()
        for i, answer in enumerate(asked):
            assert (await answer).ids == expected(PROMPT, 20, seed=i)
        await idle(served)
