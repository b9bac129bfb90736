"""Single faults of the matrix, each with all that must hold afterwards (see README.md here)."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import pytest

from common.messages import Admit
from tests.faults.fleet import Fleet, Life, fleet, peer_of
from tests.faults.invariants import HELD_S, VERDICT_S, Baseline, check, nothing_held
from tests.faults.spec import TIMERS
from tests.faults.volume import Volume


@asynccontextmanager
async def clients(workers: Fleet, count: int = 6) -> AsyncIterator[None]:
    """Requests in a closed loop, all of which end well."""
    over = False

    async def one() -> None:
        while not over:
            await workers.finished(workers.submit(workers.some_prompt(), 8))

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    try:
        yield
    finally:
        over = True
        await asyncio.gather(*tasks)


async def injected(workers: Fleet, life: Life, name: str, at_least: float) -> float:
    """Wait until this fault has happened so often; returns how often it has."""
    async with asyncio.timeout(60):
        while (count := (await workers.counters(life)).get(f"injected.{name}", 0)) < at_least:
            await asyncio.sleep(0.02)
    return count


# ------------------------------------------------------------ F3, F4: nobody tells the survivor


@pytest.mark.parametrize(
    ("way", "step"),
    [
        ("shm", "begin.after"),
        pytest.param("tcp", "grant.after", marks=pytest.mark.full),
        ("zmq", "land.before"),
        ("tcp", "closed.before"),
        pytest.param("shm", "closed.after", marks=pytest.mark.full),
        pytest.param("tcp", "arrive.after", marks=pytest.mark.full),
    ],
)
async def test_killed_decode_worker_frees_the_prefill_worker(way: str, step: str) -> None:
    """F4: the router says nothing; P's blocks come back by themselves."""
    async with fleet(way) as workers:
        workers.scored = float(step.startswith("closed"))
        await workers.birth("prefill")
        victim = await workers.birth("decode", die_at=step)
        workers.resumes = False
        await workers.arm(victim)
        workers.submit(list(range(80)), 8)
        await workers.until(lambda: victim.code is not None)
        await nothing_held(workers, HELD_S)
        workers.requests[0].outcome = "cancelled"
        await check(workers, {"kills": (victim.code == -signal.SIGKILL, 1)})


@pytest.mark.parametrize(
    ("way", "step"),
    [
        ("tcp", "offer.before"),
        pytest.param("zmq", "ticket.after", marks=pytest.mark.full),
        ("shm", "ship.after"),
        pytest.param("tcp", "close.before", marks=pytest.mark.full),
    ],
)
async def test_killed_prefill_worker_frees_the_decode_worker(way: str, step: str) -> None:
    """F3: D never decodes on part of the KV, and lets go in time."""
    async with fleet(way) as workers:
        victim = await workers.birth("prefill", die_at=step, step_s=0.05)
        await workers.birth("decode")
        workers.resumes = False
        await workers.arm(victim)
        request = workers.submit(list(range(80)), 8)
        await workers.until(lambda: victim.code is not None)
        assert await nothing_held(workers, VERDICT_S) <= VERDICT_S
        assert request.tokens == request.tokens[:1]  # P's own first token
        request.outcome = "cancelled"
        await check(workers, {"kills": (victim.code == -signal.SIGKILL, 1)})


async def test_killed_prefill_worker_that_waits_for_blocks() -> None:
    """F3: it has no ticket yet; D forgets it, and goes on with what it holds."""
    async with fleet("tcp") as workers:
        victim = await workers.birth("prefill", die_at="waiting.after")
        await workers.birth("decode", num_blocks=10, step_s=0.02)
        workers.resumes = False
        running = workers.submit(list(range(80)), 40)
        await workers.until(lambda: len(running.tokens) > 1)
        await workers.arm(victim)
        waiting = workers.submit(list(range(100, 180)), 8)
        await workers.until(lambda: victim.code is not None)
        assert await nothing_held(workers, VERDICT_S) <= VERDICT_S
        assert waiting.tokens == waiting.tokens[:1]  # P's own first token
        running.outcome = waiting.outcome = "cancelled"
        await check(workers, {"kills": (victim.code == -signal.SIGKILL, 1)})


# ------------------------------------------------------------ F7


async def test_refused_by_the_decode_worker() -> None:
    """F7: D does not admit it (too long for its pool); P is told, and frees its blocks."""
    async with fleet("tcp") as workers:
        await workers.birth("prefill")
        await workers.birth("decode", num_blocks=8)
        workers.resumes = False
        request = workers.submit(list(range(100)), 60)
        await workers.finished(request)
        assert request.failures and request.failures[0].startswith(("no_blocks", "peer"))
        await nothing_held(workers)  # a claim waits 2 s for its Admit
        request.outcome = "cancelled"
        await check(workers, {"refusals": (workers.counts.total(), 1)})


# ------------------------------------------------------------ F8


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.parametrize(
    ("way", "role"),
    [
        ("shm", "prefill"),
        pytest.param("tcp", "prefill", marks=pytest.mark.full),
        pytest.param("zmq", "prefill", marks=pytest.mark.full),
        pytest.param("zmq", "decode", marks=pytest.mark.full),
    ],
)
async def test_stopped_worker_that_wakes_up_is_fenced(way: str, role: str, volume: Volume) -> None:
    """F8: 10 s in a full run; longer than the lease in any."""
    stopped_s = max(10.0 * (volume.name != "small"), TIMERS.lease_s + 3 * TIMERS.heartbeat_s)
    async with fleet(way) as workers:
        for _ in range(2):
            await workers.birth("prefill", step_s=0.01)
            await workers.birth("decode", step_s=0.01)
        victim = workers.ups(role)[0]
        epoch = peer_of(victim).epoch
        async with clients(workers):
            await workers.until(lambda: workers.counts["length"] > 20)
            workers.signal(victim, signal.SIGSTOP)
            stopped_at = time.monotonic()
            await workers.until(lambda: not victim.up)
            assert state(victim.pid) in "Tt"
            await asyncio.sleep(stopped_at + stopped_s - time.monotonic())
            before = workers.counts["length"]
            workers.signal(victim, signal.SIGCONT)
            await workers.until(lambda: victim.up and peer_of(victim).epoch != epoch)
            await workers.until(lambda: workers.counts["length"] > before + 30)
        resets = (await workers.counters(victim))["resets"]
        await check(workers, {"stops": (resets, 1)})


# ------------------------------------------------------------ F9, F10, F12: the network


@pytest.mark.parametrize("way", ["tcp", pytest.param("zmq", marks=pytest.mark.full)])
async def test_black_hole(way: str) -> None:
    """F9: sockets stay open and nothing passes; a verdict within S + 1 s, and service after it."""
    async with fleet(way) as workers:
        await workers.birth("prefill")
        decode = await workers.birth("decode", network={"swallow": 1})
        async with clients(workers):
            await workers.until(lambda: workers.counts["length"] > 10)
            workers.signal(decode, signal.SIGUSR2)
            await injected(workers, decode, "swallowed", 1)
            await workers.until(lambda: workers.counts["failed transfer"] > 2)
            workers.signal(decode, signal.SIGUSR2)
            before = workers.counts["length"]
            await workers.until(lambda: workers.counts["length"] > before + 20, timeout_s=60)
        swallowed = await injected(workers, decode, "swallowed", 1)
        await check(workers, {"swallowed": (swallowed, 1)})


async def test_slow_but_moving() -> None:
    """F9: transfers wait behind others for longer than S, while blocks of those land."""
    async with fleet("tcp") as workers:
        prefill = await workers.birth("prefill", max_num_batched_tokens=16)
        decode = await workers.birth("decode", network={"bytes_per_s": 6000.0})
        await workers.serve(4)
        workers.signal(decode, signal.SIGUSR2)
        start = time.monotonic()
        requests = [workers.submit(workers.random.choices(range(900), k=88), 2) for _ in range(8)]
        for request in requests:
            await workers.finished(request)
        took_s = time.monotonic() - start
        assert workers.counts["failed transfer"] == 0, workers.counts
        throttled = await injected(workers, decode, "throttled", 1)
        assert (await workers.counters(prefill)).get("broken.stalled", 0) == 0
        for request in requests:
            request.longest_s = 0.0  # slow is meant
        await check(workers, {"throttled": (throttled, 8), "seconds": (took_s, TIMERS.stall_s)})


CONNECTIONS: Final = [
    # name, faults of the proxy, how often at least; the transport of a small run
    ("reset", {"reset": 0.1}, 10, "tcp"),
    ("sliced", {"slice_bytes": 11.0}, 200, "zmq"),
    ("half_close", {"half_close": 1.0}, 1, "tcp"),
    ("late", {"delay_s": 0.03, "cut_senders": 1.0}, 1, "zmq"),
    ("cut", {"cut": 1.0}, 1, "tcp"),
]


@pytest.mark.parametrize(
    ("way", "name", "network", "least"),
    [
        pytest.param(
            way, name, network, least,
            marks=() if way == small else pytest.mark.full,
            id=f"{name}-{way}",
        )
        for name, network, least, small in CONNECTIONS
        for way in ("tcp", "zmq")
    ],
)  # fmt: skip
async def test_connections(way: str, name: str, network: dict[str, float], least: int) -> None:
    """F10: a lost connection is not a failed transfer, and what comes late harms nobody."""
    async with fleet(way) as workers:
        prefill = await workers.birth("prefill")
        decode = await workers.birth("decode", network=network)
        await workers.serve(10)
        baseline = Baseline(prefill, decode)
        async with clients(workers):
            for _ in range(4):
                workers.signal(decode, signal.SIGUSR2)
                await asyncio.sleep(0.1)
            workers.signal(decode, signal.SIGUSR2)
            count = await injected(workers, decode, name, least)
            workers.signal(decode, signal.SIGUSR2)
        await workers.serve(10)
        await baseline.check()
        await check(workers, {name: (count, least)})


# ------------------------------------------------------------ F16, F23, F26: identities


@pytest.mark.parametrize("changes", [{"content_id": "other"}, {"num_layers": 2}])
async def test_workers_that_do_not_match(changes: dict[str, object]) -> None:
    """F16, F23: another model or layout is refused at the first word, with the reason."""
    async with fleet("tcp") as workers:
        await workers.birth("prefill")
        decode = await workers.birth("decode", **changes)
        workers.resumes = False
        request = workers.submit(list(range(40)), 8)
        await workers.finished(request)
        kind = "content" if "content_id" in changes else "layout"
        assert request.failures[0].startswith("peer: refused") and kind in request.failures[0]
        assert request.tokens in ([], request.tokens[:1])  # the first one is P's own
        refused = (await workers.counters(decode))[f"dropped.hello_{kind}"]
        workers.withdraw(request)
        request.outcome = "cancelled"
        await check(workers, {"refusals": (refused, 1)})


async def test_the_same_attempt_twice() -> None:
    """F26: a doubled placement, and another request under an ended number, change nothing."""
    async with fleet("tcp") as workers:
        prefill = await workers.birth("prefill")
        decode = await workers.birth("decode")
        sent: list[tuple[str, object]] = []
        send = workers._link.send

        def twice(worker_id: str, message: object) -> None:
            for _ in range(2):
                send(worker_id, message)  # type: ignore[arg-type]
            sent.append((worker_id, message))

        workers._link.send = twice  # type: ignore[method-assign]
        await workers.serve(20)
        for worker_id, message in sent:
            if isinstance(message, Admit):
                message = msgspec.structs.replace(message, tokens=bytes(4 * 50), prompt_len=50)
                send(worker_id, message)
        await workers.serve(10)
        doubled = sum(isinstance(message, Admit) for _, message in sent)
        await Baseline(prefill, decode).check()
        await check(workers, {"doubled": (doubled, 20)})
