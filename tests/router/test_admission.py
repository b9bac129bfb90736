"""What waits while workers are busy, and what is refused because it would wait too long."""

import asyncio
from random import Random

import pytest

from common.cost import PRIOR, CostModel
from common.messages import Admit, KvLayoutInfo
from router.admission import refusal, ttft_limit
from router.fleet import FULL, Fleet
from router.placement import Candidate, Queued, View, place
from router.request import Attempt
from router.slo import Limit, Slo
from router.waiting import Bounds
from tests.client import complete
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected
from tests.router.test_recovery import idle
from tests.worker_info import worker_info

LAYOUT = KvLayoutInfo(block_size=16, num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
COST = CostModel(prefill_s=0.0, token_s=1e-3, pair_s=0.0, step_s=0.01, row_s=0.01, kv_s=0.0)
VIEW = View(num_tokens=1000, remaining=10)
PROMPT = list(range(10, 40))


def worker(role: str, prefill_tokens: int = 0, num_seqs: int = 0) -> Candidate:
    return Candidate(
        id=role, role=role, content_id="c", layout=LAYOUT, capacity=100_000, max_num_seqs=8,
        prefill_tokens=prefill_tokens, num_seqs=num_seqs, cost=COST,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("slo", "queued", "num_seqs", "waited_s", "retry_after_s"),
    [
        (Slo(ttft=Limit(4.0)), 2_000, 0, 0.0, None),
        (Slo(ttft=Limit(2.5)), 2_000, 0, 0.0, 1),
        (Slo(ttft=Limit(2.5)), 7_000, 0, 0.0, 6),
        (Slo(ttft=Limit(2.5)), 0, 0, 9.0, None),  # idle: nothing is gained by waiting
        (Slo(ttft=Limit(4.0)), 2_000, 0, 2.0, 1),
        (Slo(ttft=Limit(1.0, 2.5)), 2_000, 0, 0.0, None),
        (Slo(itl_s=0.05), 9_000, 3, 0.0, None),
        (Slo(itl_s=0.05), 9_000, 4, 0.0, 1),
        (Slo(itl_s=0.005), 9_000, 0, 0.0, None),
    ],
)
def test_what_is_refused(
    slo: Slo, queued: int, num_seqs: int, waited_s: float, retry_after_s: int | None
) -> None:
    snapshot = [worker("prefill", prefill_tokens=queued), worker("decode", num_seqs=num_seqs)]
    placement = place(VIEW, snapshot, Random(0))
    assert placement is not None
    error = refusal(slo, VIEW, snapshot, placement, waited_s)
    assert (error and (error.status, error.retry_after_s)) == (
        None if retry_after_s is None else (429, retry_after_s)
    )


@pytest.mark.parametrize(
    ("queue", "retry_after_s"),
    [
        ([Queued(50_000, 50_000)], None),
        ([Queued(50_000, 1_001)], None),
        ([Queued(50_000, 1_000)], 49),  # it waits for so long: nobody overtakes it any more
        ([Queued(30_000, 9_000), Queued(20_000, -9_000)], 19),
        ([], 49),  # another router's
    ],
)
def test_whom_a_short_prompt_overtakes_it_does_not_wait_for(
    queue: list[Queued], retry_after_s: int | None
) -> None:
    prefill = worker("prefill", prefill_tokens=50_000)
    prefill.queue = queue
    snapshot = [prefill, worker("decode")]
    placement = place(VIEW, snapshot, Random(0))
    assert placement is not None
    error = refusal(Slo(ttft=Limit(2.5)), VIEW, snapshot, placement, 0.0)
    assert (error and error.retry_after_s) == retry_after_s


def test_the_limit_does_not_depend_on_who_has_room() -> None:
    fleet = Fleet()
    fleet.up(worker_info("d", role="decode", max_num_seqs=1))
    limit, slo = 3 * PRIOR.prefill(1000), Slo(ttft=Limit(0.5, 3.0))
    assert ttft_limit(slo, VIEW, fleet.snapshot()) == pytest.approx(0.5 + limit)
    one = Attempt(
        number=1, choices=(0, 1), prefill=None, decode="d", prefill_tokens=9, kv_tokens=9,
        first=True,
    )  # fmt: skip
    fleet.reserve(one)
    assert not any(candidate.ready for candidate in fleet.snapshot())
    assert ttft_limit(slo, VIEW, fleet.snapshot()) == pytest.approx(0.5 + limit)
    fleet["d"].draining = True
    assert ttft_limit(slo, VIEW, fleet.snapshot()) == pytest.approx(0.5)


async def test_late_ones_are_told_when_to_come_back(deploy: Deploy) -> None:
    async with deploy(prefill=0, slo=Slo(ttft=Limit(0.05))) as served:
        served.decodes[0].gate.clear()
        first = asyncio.create_task(complete(served.http, [5] * 900, max_tokens=2))
        await until(lambda: served.service.num_live == 1)
        late = await served.http.post("/v1/completions", json={"prompt": PROMPT})
        assert (late.status_code, late.json()["error"]["code"]) == (429, "overloaded")
        assert int(late.headers["retry-after"]) >= 1
        served.decodes[0].gate.set()
        assert (await first).status == 200
        # What was refused is nobody's usage.
        await until(lambda: served.value("tenant_prompt_tokens_total", tenant="") == 900)
        assert served.value("tenant_requests_total", tenant="") == 1
        await idle(served)


async def test_requests_wait_while_workers_are_full_and_all_are_served(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=0) as served:
        decode = await served.add("decode", "small", max_num_seqs=1)
        decode.gate.clear()
        asked = [
            asyncio.create_task(complete(served.http, PROMPT, seed=i)) for i in range(FULL + 3)
        ]
        await until(lambda: served.value("waiting_requests") == 3)
        await until(lambda: len(decode.received(Admit)) == FULL)
        urgent = asyncio.create_task(complete(served.http, PROMPT, seed=99, priority=-1))
        await until(lambda: served.value("waiting_requests") == 4)
        decode.gate.set()
        assert (await urgent).ids == expected(PROMPT, 16, seed=99)
        assert [(await one).status for one in asked] == [200] * (FULL + 3)
        assert decode.received(Admit)[FULL].params.priority == -1
        assert served.value("waiting_requests") == 0
        await idle(served)


async def test_who_waits_past_the_limit_is_refused_and_who_leaves_is_forgotten(
    deploy: Deploy,
) -> None:
    async with deploy(
        prefill=0, decode=0, slo=Slo(ttft=Limit(0.5)), bounds=Bounds(count=2)
    ) as served:
        decode = await served.add("decode", "small", max_num_seqs=1)
        decode.gate.clear()
        running = []
        for number in range(FULL):
            # The first may be served at once, the others are predicted to be in time.
            running.append(asyncio.create_task(complete(served.http, [5], max_tokens=2)))
            await until(lambda: served.service.num_live == number + 1)  # noqa: B023
        gone = asyncio.create_task(complete(served.http, [5]))
        await until(lambda: served.value("waiting_requests") == 1)
        gone.cancel()
        await until(lambda: served.value("waiting_requests") == 0)
        late = await complete(served.http, [5])
        assert (late.status, late.error and late.error["code"]) == (429, "overloaded")
        decode.gate.set()
        assert [(await one).status for one in running] == [200] * FULL
        await idle(served)


async def test_busy_workers_that_die_leave_nobody_waiting_for_ever(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=0) as served:
        decode = await served.add("decode", "small", max_num_seqs=1)
        decode.gate.clear()
        asked = [asyncio.create_task(complete(served.http, [5])) for _ in range(FULL + 2)]
        await until(lambda: served.value("waiting_requests") == 2)
        await decode.kill()
        assert [(await one).status for one in asked] == [503] * (FULL + 2)
        await idle(served)
