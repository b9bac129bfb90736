"""Engines that stand still: when a slow step is taken for a hang, and what becomes of its work."""

import asyncio

from common.messages import Admit
from router.dispatch import Patience
from router.progress import Progress
from tests.client import complete, stream
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected
from tests.router.test_recovery import PROMPT, carrier, idle


def hung_after(progress: Progress, start: float, steps: int) -> float:
    """Seconds of pongs, one a second, without a step until the worker counts as hung."""
    now = start
    while not progress.hung:
        now += 1.0
        assert now < start + 1_000
        progress.report(steps, True, now)
    return now - start


def test_work_without_a_step_is_a_hang() -> None:
    progress = Progress(hang_s=10.0)
    progress.report(7, True, 100.0)
    assert hung_after(progress, 100.0, 7) == 11.0
    progress.report(8, True, 112.0)
    assert not progress.hung


def test_idle_workers_do_not_hang() -> None:
    progress = Progress(hang_s=10.0)
    for second in range(100):
        progress.report(7, False, 100.0 + second)
        assert not progress.hung
    assert hung_after(progress, 199.0, 7) == 11.0


def test_long_steps_earn_patience() -> None:
    progress = Progress(hang_s=10.0)
    for second in range(8):
        progress.report(0, True, float(second))
    progress.report(1, True, 8.0)
    assert hung_after(progress, 8.0, 1) == 25.0  # above 3 times 8 s
    # Until there were short ones for long enough.
    for steps in range(2, 100):
        progress.report(steps, True, 40.0 + steps)
    assert hung_after(progress, 139.0, 99) == 11.0


def test_old_pongs_that_are_read_late_prove_nothing() -> None:
    progress = Progress(hang_s=10.0)
    progress.report(7, True, 100.0)
    for _ in range(5):  # sent before the router was paused
        progress.report(7, True, 500.0)
        assert not progress.hung
    progress.report(900, True, 500.0)
    assert not progress.hung


async def test_work_of_a_hung_worker_is_done_by_another(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=2, hang_s=0.6) as served:
        for worker in served.decodes:
            worker.ends_at = 5
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5, n=2))
        await until(lambda: any(worker.steps == 5 for worker in served.decodes))
        victim = carrier(served.decodes)
        (other,) = [worker for worker in served.decodes if worker is not victim]
        other.go_on()
        answer = await asked
        for choice in range(2):
            assert answer.tokens[choice] == expected(PROMPT, 16, seed=5, choice=choice)
        assert served.value("resumes_total", cause="hung") == 1
        assert (await served.http.get("/health")).status_code == 200
        for seed in range(4):
            assert (await complete(served.http, PROMPT, seed=seed)).status == 200
        assert len(victim.received(Admit)) == 1, "nothing new while it hangs"
        # The cancels wait there; it takes them, moves and is used again.
        victim.go_on()
        assert (await complete(served.http, PROMPT, seed=9)).status == 200
        await until(lambda: served.service.fleet[victim.info.id].state == "ready")
        await idle(served)


async def test_last_decode_worker_that_hangs(deploy: Deploy) -> None:
    patience = Patience(grace_s=0.3, resume_s=20)
    async with deploy(prefill=0, hang_s=0.6, patience=patience) as served:
        worker = served.decodes[0]
        worker.ends_at = 5
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: served.value("waiting_requests") == 1)
        response = await served.http.get("/health")
        assert response.status_code == 503
        assert response.json()["reason"] == "every decode worker hangs"
        (listed,) = (await served.http.get("/debug/workers")).json()["workers"]
        assert listed["state"] == "hung"
        assert (await complete(served.http, PROMPT)).status == 503
        worker.go_on()
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        await until(lambda: served.service.unavailable() is None)
        await idle(served)
