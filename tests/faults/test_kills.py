"""SIGKILL of either side at every step of the protocol (F2, F3, F4), by the victim itself."""

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Final

from tests.faults.fleet import Fleet, Life, fleet
from tests.faults.invariants import check
from tests.faults.spec import STEPS
from tests.faults.volume import Volume

KILLS = 1_000
AT_ONCE = 6
REACHED_S = 3.0
"""A step that was not reached within this: the victim is killed wherever it is."""
FLEET: Final[dict[str, dict[str, object]]] = {
    "prefill": {"num_blocks": 64, "step_s": 0.001},
    "decode": {"num_blocks": 24, "step_s": 0.001},
}
"""About four requests fit on a decode worker: prefill workers are told to wait."""
SCORED = 0.3
"""Of the requests; those have a message `Close` of its own."""
MOST: Final = {"welcome": 1, "hello": 1, "waiting": 2}
"""Welcome and Hello come once with each new peer, Waiting only to who waits for long."""
OFTEN = 4
"""A step at which so many were to die is one that can be reached."""


def plans(role: str, random: Random) -> Iterator[dict[str, object]]:
    """Where each new life of this role will kill itself, when it is told to: at every step in
    turns, in any order."""
    steps = [(step, when) for step in STEPS[role] for when in ("before", "after")]
    while True:
        random.shuffle(steps)
        for step, when in steps:
            count = random.randint(1, MOST.get(step, 12))
            yield {"die_at": f"{step}.{when}", "die_after": count}


async def test_kills_at_random_steps(way: str, volume: Volume) -> None:
    wanted = volume.of(KILLS // 3 + 1)
    random = Random(3)
    next_plan = {role: plans(role, random) for role in STEPS}
    planned: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    async with fleet(way, seed=3) as workers:
        workers.fetching, workers.scored = 0.3, SCORED

        async def birth(role: str) -> Life:
            return await workers.birth(role, **FLEET[role], **next(next_plan[role]))

        live = {role: await birth(role) for role in STEPS}
        over = False

        async def client() -> None:
            while not over:
                request = workers.submit(workers.some_prompt(), workers.random.randint(2, 12))
                await workers.finished(request)

        clients = [asyncio.create_task(client()) for _ in range(AT_ONCE)]
        for number in range(wanted):
            role = ("prefill", "decode")[number % 2]
            step = f"{role} {live[role].spec.die_at}"
            planned[step] += 1
            reached[step] += await kill(workers, live[role])
            live[role] = await birth(role)
            assert not workers.errors, workers.story()
        over = True
        await asyncio.gather(*clients)
        killed = [life for life in workers.lives if life.code == -signal.SIGKILL]
        never = [step for step, count in planned.items() if count >= OFTEN and not reached[step]]
        assert not never, (never, reached)
        at_step = reached.total()
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
