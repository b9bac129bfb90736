"""Clients that leave at random moments (F5, F6, F20), in pools too small for all requests."""

import asyncio

import pytest

from tests.faults.fleet import Fleet, Request, fleet
from tests.faults.invariants import SLACK_S, Baseline, check, nothing_held
from tests.faults.volume import Volume

ABORTS = 10_000
TINY = {"num_blocks": 40, "step_s": 0.001}
"""About five requests fit, eleven are there: blocks are wanted by others at once."""
AT_ONCE = 11


async def leave_at_random(fleet: Fleet, request: Request) -> bool:
    """Whether it was still running: at a random moment, or after some tokens."""
    if fleet.random.random() < 0.6:
        await asyncio.sleep(fleet.random.expovariate(1 / 0.02))
    else:
        tokens = fleet.random.randint(1, 8)
        await fleet.until(lambda: request.outcome or len(request.tokens) >= tokens)
    return fleet.cancel(request)


async def test_random_aborts(way: str, volume: Volume) -> None:
    wanted = volume.of(ABORTS // 3 + 1)
    async with fleet(way, seed=1) as workers:
        workers.fetching = 0.3
        prefill = await workers.birth("prefill", **TINY)
        decode = await workers.birth("decode", **TINY)
        await workers.meet(prefill, decode)
        await workers.serve(20)
        baseline = Baseline(prefill, decode)
        aborted = 0

        async def client(number: int) -> None:
            nonlocal aborted
            while aborted < wanted:
                request = workers.submit(workers.some_prompt(), workers.random.randint(2, 20))
                if workers.random.random() < 0.8:
                    aborted += await leave_at_random(workers, request)
                else:
                    await workers.finished(request)

        await asyncio.gather(*(client(number) for number in range(AT_ONCE)))
        counters = await workers.counters(decode)
        returned = sum(counters.get(f"returned.{why}", 0) for why in ("revoked", "aborted"))
        counters.update(await workers.counters(prefill))
        fetched = sum(count for name, count in counters.items() if name.startswith("fetches."))
        await baseline.check()
        happened = {
            "aborts": (aborted, wanted),
            "aborts of a transfer": (returned, wanted / 10),
            "fetches": (fetched, wanted / 10),
        }
        await check(workers, happened)


@pytest.mark.parametrize(
    "way",
    [
        "tcp",
        pytest.param("shm", marks=pytest.mark.full),
        pytest.param("zmq", marks=pytest.mark.full),
    ],
)
async def test_abort_storm(way: str) -> None:
    """F20: 80 % of many requests leave at once; the others and new ones go on as before."""
    async with fleet(way, seed=2) as workers:
        await workers.birth("prefill", **TINY)
        await workers.birth("decode", **TINY)
        before = await rate(workers, 40)
        requests = [workers.submit(workers.some_prompt(), 40) for _ in range(60)]
        await workers.until(lambda: any(request.tokens for request in requests))
        left = sum(workers.cancel(request) for request in requests if request.number % 5)
        kept = [request for request in requests if request.outcome != "cancelled"]
        await asyncio.gather(*(workers.finished(request) for request in kept))
        assert await nothing_held(workers, SLACK_S) <= SLACK_S
        after = await rate(workers, 40)
        assert after > before / 5, f"{after:.0f} requests/s after, {before:.0f} before"
        await check(workers, {"left": (left, 30)})


async def rate(workers: Fleet, count: int) -> float:
    start = workers.clock_s
    await workers.serve(count)
    return count / (workers.clock_s - start)
