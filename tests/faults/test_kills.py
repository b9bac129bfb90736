"""SIGKILL of either side at every step of the protocol (F2, F3, F4), by the victim itself."""

import asyncio
import signal

from tests.faults.fleet import Fleet, Life, fleet
from tests.faults.invariants import check
from tests.faults.spec import STEPS
from tests.faults.volume import Volume

KILLS = 1_000
AT_ONCE = 6
REACHED_S = 3.0
"""A step that was not reached within this: the victim is killed wherever it is."""
FLEET = {"num_blocks": 64, "step_s": 0.001}


def plan(fleet: Fleet, role: str) -> dict[str, object]:
    """Where a new life of this role will kill itself, when it is told to."""
    step = fleet.random.choice(STEPS[role])
    when = fleet.random.choice(("before", "after"))
    # Welcome and Hello come once with each new peer; Waiting and Close are seldom needed.
    most = 1 if step in ("welcome", "hello", "waiting", "closed") else 12
    return {"die_at": f"{step}.{when}", "die_after": fleet.random.randint(1, most)}


async def test_kills_at_random_steps(way: str, volume: Volume) -> None:
    wanted = volume.of(KILLS // 3 + 1)
    async with fleet(way, seed=3) as workers:
        workers.fetching = 0.3
        live = {role: await workers.birth(role, **FLEET, **plan(workers, role)) for role in STEPS}
        over = False

        async def client() -> None:
            while not over:
                request = workers.submit(workers.some_prompt(), workers.random.randint(2, 12))
                await workers.finished(request)

        clients = [asyncio.create_task(client()) for _ in range(AT_ONCE)]
        at_step = 0
        for number in range(wanted):
            role = ("prefill", "decode")[number % 2]
            at_step += await kill(workers, live[role])
            live[role] = await workers.birth(role, **FLEET, **plan(workers, role))
            assert not workers.errors, workers.story()
        over = True
        await asyncio.gather(*clients)
        killed = [life for life in workers.lives if life.code == -signal.SIGKILL]
        await check(workers, {"kills": (len(killed), wanted), "at step": (at_step, 0.8 * wanted)})


async def kill(fleet: Fleet, victim: Life) -> bool:
    """Whether it died at the step that was planned."""
    await fleet.arm(victim)
    try:
        await fleet.until(lambda: victim.code is not None, timeout_s=REACHED_S)
    except AssertionError:
        if victim.code is None:
            fleet.signal(victim, signal.SIGKILL)
            await fleet.until(lambda: victim.code is not None)
    return victim.last_words == victim.spec.die_at
