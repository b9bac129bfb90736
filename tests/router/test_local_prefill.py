"""Decode workers that compute prompts themselves where that is the cheaper way."""

import asyncio

from common.messages import Prefill
from router.slo import STEP_S
from tests.client import complete
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected

LONG, SHORT, RESIDENT = [5] * 900, [6] * 32, [7] * 16


async def test_a_short_prompt_does_not_queue_behind_a_long_one(deploy: Deploy) -> None:
    async with deploy(step_s=STEP_S) as served:
        prefill = served.prefills[0]
        prefill.gate.clear()
        served.decodes[0].gate.clear()
        # Beside a resident every chunk of a long prompt waits for a step.
        resident = asyncio.create_task(complete(served.http, RESIDENT, seed=1))
        await until(lambda: served.service.num_live == 1)
        queued = asyncio.create_task(complete(served.http, LONG, seed=1))
        await until(lambda: served.service.num_live == 2)
        short = asyncio.create_task(complete(served.http, SHORT, seed=1))
        await until(lambda: served.service.num_live == 3)
        served.decodes[0].gate.set()
        assert (await short).ids == expected(SHORT, 16, seed=1)
        assert len(SHORT) not in [len(work.tokens) // 4 for work in prefill.received(Prefill)]
        assert served.value("placements_total", mode="local") >= 1
        prefill.gate.set()
        assert (await queued).ids == expected(LONG, 16, seed=1)
        assert (await resident).ids == expected(RESIDENT, 16, seed=1)


async def test_residents_are_not_held_up_by_more_than_the_limit(deploy: Deploy) -> None:
    async with deploy(step_s=0.001) as served:
        served.prefills[0].gate.clear()
        asked = [asyncio.create_task(complete(served.http, p, seed=1)) for p in (LONG, SHORT)]
        await until(lambda: len(served.prefills[0].received(Prefill)) == 2)
        served.prefills[0].gate.set()
        assert [(await one).ids for one in asked] == [
            expected(p, 16, seed=1) for p in (LONG, SHORT)
        ]
