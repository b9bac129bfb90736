"""The invariants that stand after every fault, whatever it was; one function for all scenarios.

I1  every ledger balances, and nothing is held within a lease and a second of the last request
I2  no slot was written outside its grant: the stub checks the KV of every token (a worker that
    finds foreign KV ends with an AssertionError), and no worker ended but by the fault
I3  every request ended exactly once
I4  every token is the one of a run without faults, without gap or double
I5  no process, descriptor or mapped pool is left over
I6  the fault really happened: `happened` counts it
"""

import asyncio
import time

from tests.faults.fleet import Fleet, Life
from tests.faults.spec import TIMERS
from tests.faults.stub_worker import holdings

SLACK_S = 1.0
"""What may come on top of a timer."""
VERDICT_S = TIMERS.stall_s + SLACK_S
"""A request without news for longer hangs."""
HELD_S = TIMERS.lease_s + SLACK_S


async def check(fleet: Fleet, happened: dict[str, tuple[float, float]]) -> None:
    """Called when no more requests come; raises AssertionError. The workers are ended by it.
    `happened`: how often each fault happened, and how often it must have."""
    for name, (count, wanted) in happened.items():
        assert count >= wanted > 0, f"I6: {name} happened {count} times, not {wanted}"
    assert not fleet.errors, f"I2, I3, I4:\n{fleet.story()}"
    assert not fleet.live, f"I3: not ended\n{fleet.story()}"
    for request in fleet.requests:
        assert request.outcome in ("length", "cancelled"), f"I3: {request}"
    slowest = max(fleet.requests, key=lambda request: request.longest_s, default=None)
    if slowest is not None:
        assert slowest.longest_s <= VERDICT_S, (
            f"I3: {slowest.longest_s:.1f} s without news: {slowest}"
        )
    await nothing_held(fleet)
    assert not fleet.errors, f"I1:\n{fleet.story()}"
    await fleet.leave()
    assert not fleet.errors, f"I5:\n{fleet.story()}"


async def nothing_held(fleet: Fleet, within_s: float = HELD_S) -> float:
    """Seconds until no worker holds a block for anybody."""
    start = fleet.clock_s
    while True:
        ledgers = [await fleet.ledger(life) for life in fleet.present]
        assert all(ledger.balanced for ledger in ledgers), f"I1: {ledgers}"
        held = [x.num_blocks - x.free - x.cached + x.running for x in ledgers]
        if not any(held):
            return fleet.clock_s - start
        if fleet.clock_s - start > within_s:
            raise AssertionError(f"I1: still held after {within_s} s: {ledgers}\n{fleet.story()}")
        await asyncio.sleep(0.02)


class Baseline:
    """What the processes of the survivors hold open, to be compared after the faults (I5)."""

    def __init__(self, *lives: Life) -> None:
        self._before = {life: holdings(life.pid) for life in lives}

    async def check(self, within_s: float = 20.0) -> None:
        """Links to lives that ended go with their timers."""
        deadline = time.monotonic() + within_s
        for life, (descriptors, pools) in self._before.items():
            while holdings(life.pid) > (descriptors, pools):
                assert time.monotonic() < deadline, (
                    f"I5: {life.spec.name} holds {holdings(life.pid)}, before {descriptors, pools}"
                )
                await asyncio.sleep(0.05)
