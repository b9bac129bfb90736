"""Workers that die, fail, leave or send nonsense; clients that go away. Tokens stay the same."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from common.messages import Admit, Cancel, Inspect, Output, Prefill, Step
from router.dispatch import Patience
from tests.client import Answer, complete, stream
from tests.router.conftest import Deploy
from tests.router.deployment import Deployment, until
from tests.router.stub_worker import StubWorker, expected

PROMPT = list(range(10, 60))


def carrier(workers: list[StubWorker]) -> StubWorker:
    """The one that has sequences."""
    (worker,) = [worker for worker in workers if worker.num_running]
    return worker


async def idle(served: Deployment) -> None:
    """Nothing runs anywhere and the router holds nothing."""
    await until(lambda: not any(worker.num_running for worker in served.workers))
    await until(lambda: served.service.num_live == 0)
    for member in served.service.fleet:
        assert (member.prefill_tokens.own, member.kv_tokens.own, member.num_seqs.own) == (0, 0, 0)


@pytest.mark.parametrize("n", [1, 3])
async def test_decode_worker_dies_in_mid_stream(deploy: Deploy, n: int) -> None:
    async with deploy(decode=2) as served:
        for worker in served.decodes:
            worker.ends_at = 10
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5, max_tokens=50, n=n))
        await until(lambda: any(worker.steps == 10 for worker in served.decodes))
        victim = carrier(served.decodes)
        (other,) = [worker for worker in served.decodes if worker is not victim]
        other.go_on()
        await victim.kill()
        answer = await asked
        for choice in range(n):
            assert answer.tokens[choice] == expected(PROMPT, 50, seed=5, choice=choice)
            assert answer.text[choice] == served.text_model.decode(answer.tokens[choice])
            assert answer.finish[choice] == "length"
        assert answer.done and answer.error is None
        assert answer.usage["completion_tokens"] == 50 * n
        # Each unfinished choice went on as a sequence of its own, from prompt and tokens so far.
        resumed = [work for work in other.received(Admit) if work.attempt > 1]
        assert sorted(work.choices for work in resumed) == [(choice,) for choice in range(n)]
        assert {len(work.tokens) // 4 for work in resumed} == {len(PROMPT) + 10}
        assert {work.prompt_len for work in resumed} == {len(PROMPT)}
        assert served.value("resumes_total", cause="lost") == 1
        await idle(served)


async def test_decode_worker_dies_before_the_handover(deploy: Deploy) -> None:
    async with deploy(decode=2) as served:
        served.prefills[0].gate.clear()
        asked = asyncio.create_task(complete(served.http, PROMPT, seed=5, n=2))
        await until(lambda: any(worker.num_running for worker in served.decodes))
        await carrier(served.decodes).kill()
        await until(lambda: len(served.prefills[0].received(Prefill)) == 2)
        first, second = served.prefills[0].received(Prefill)
        assert (first.attempt, second.attempt) == (1, 2)
        assert second.choices == (0, 1), "nothing was emitted: one sequence for both"
        # The cancel of the old attempt is on its way before the new one is.
        assert [type(message) for message in served.prefills[0].seen] == [Prefill, Cancel, Prefill]
        served.prefills[0].gate.set()
        answer = await asked
        assert answer.tokens == {i: expected(PROMPT, 16, seed=5, choice=i) for i in range(2)}
        await idle(served)


async def test_prefill_worker_dies(deploy: Deploy) -> None:
    async with deploy(prefill=2) as served:
        for worker in served.prefills:
            worker.gate.clear()
        asked = asyncio.create_task(complete(served.http, PROMPT, seed=5))
        await until(lambda: any(worker.num_running for worker in served.prefills))
        victim = carrier(served.prefills)
        await victim.kill()
        for worker in served.prefills:
            worker.gate.set()
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        # With the last of them gone the decode worker prefills itself.
        for worker in served.prefills:
            await worker.kill()
        await until(lambda: "prefill" not in {m.info.role for m in served.service.fleet})
        assert (await complete(served.http, PROMPT, seed=6)).ids == expected(PROMPT, 16, seed=6)
        assert served.decodes[0].received(Admit)[-1].prefill is None
        await idle(served)


async def test_prefill_worker_dies_after_the_handover(deploy: Deploy) -> None:
    async with deploy() as served:
        served.decodes[0].ends_at = 5
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: served.decodes[0].steps == 5)
        await served.prefills[0].kill()
        await until(lambda: "prefill-0" not in served.service.fleet)
        served.decodes[0].go_on()
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        assert len(served.decodes[0].received(Admit)) == 1, "nothing was lost"
        await idle(served)


@pytest.mark.parametrize("reason", ["transfer", "peer"])
async def test_failed_transfer_is_done_without_the_prefill_worker(
    deploy: Deploy, reason: str
) -> None:
    async with deploy() as served:
        served.prefills[0].gate.clear()
        asked = asyncio.create_task(complete(served.http, PROMPT, seed=5))
        await until(lambda: served.decodes[0].num_running == 1)
        served.decodes[0].give_up(reason)
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        first, second = served.decodes[0].received(Admit)
        assert first.prefill is not None and second.prefill is None
        assert served.value("resumes_total", cause=reason) == 1
        await until(lambda: len(served.prefills[0].received(Cancel)) == 1)
        await idle(served)


async def test_leaving_worker_gets_nothing_new_and_hands_over(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=2, patience=Patience(max_resumes=0)) as served:
        for worker in served.decodes:
            worker.ends_at = 10
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5, max_tokens=30))
        await until(lambda: any(worker.steps == 10 for worker in served.decodes))
        leaver = carrier(served.decodes)
        (other,) = [worker for worker in served.decodes if worker is not leaver]
        leaver.leaving()
        await until(lambda: served.service.fleet[leaver.info.id].draining)
        other.go_on()
        for seed in range(5):
            answer = await complete(served.http, PROMPT, seed=seed)
            assert answer.ids == expected(PROMPT, 16, seed=seed)
        assert len(leaver.received(Admit)) == 1
        leaver.give_up("draining")
        # A drain is no failure: this request may have none.
        assert (await asked).ids == expected(PROMPT, 30, seed=5)
        await idle(served)


async def test_too_many_failures_end_the_stream_with_an_error(deploy: Deploy) -> None:
    async with deploy(prefill=0, patience=Patience(max_resumes=2)) as served:
        worker = served.decodes[0]
        worker.ends_at = 4
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: worker.steps == 4)
        worker.fail = "internal"
        worker.give_up("internal")
        answer = await asked
        assert answer.ids == expected(PROMPT, 4, seed=5)
        assert answer.error is not None and answer.error["code"] == "unavailable"
        assert not answer.done and answer.finish == {}
        assert len(worker.received(Admit)) == 3
        # Before the first token the same is a plain HTTP error.
        answer = await stream(served.http, PROMPT, seed=5)
        assert (answer.status, answer.error and answer.error["type"]) == (
            503,
            "service_unavailable",
        )
        assert served.value("requests_total", outcome="failed") == 2
        await idle(served)


async def test_stream_waits_for_a_worker_that_comes_back(deploy: Deploy) -> None:
    async with deploy(prefill=0, patience=Patience(resume_s=20)) as served:
        worker = served.decodes[0]
        worker.ends_at = 4
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: worker.steps == 4)
        await worker.kill()
        await until(lambda: len(served.service.fleet.snapshot()) == 0)
        assert served.value("waiting_requests") == 1
        await served.add("decode", "decode-new")
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        assert served.value("waiting_requests") == 0
        await idle(served)


async def test_stream_ends_with_an_error_if_no_worker_comes_back(deploy: Deploy) -> None:
    async with deploy(prefill=0, patience=Patience(resume_s=0.1)) as served:
        worker = served.decodes[0]
        worker.ends_at = 4
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: worker.steps == 4)
        await worker.kill()
        answer = await asked
        assert answer.ids == expected(PROMPT, 4, seed=5)
        assert answer.error is not None and not answer.done
        await idle(served)


async def test_outputs_of_ended_attempts_are_dropped_and_cancelled(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        worker = served.decodes[0]
        worker.ends_at = 3
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: worker.steps == 3)
        router = worker.router
        (work,) = worker.received(Admit)
        lies = [
            Output(work.request, 2, 0, 3, (7,)),
            Output(work.request, 0, 0, 3, (7,)),
            Output(work.request, 1, 1, 0, (7,)),
            Output(work.request + 1, 1, 0, 0, (7,)),
        ]
        worker.tell(router, Step(tuple(lies), worker.load()))
        await until(lambda: len(worker.received(Cancel)) == 4)
        assert [(c.request, c.attempt) for c in worker.received(Cancel)] == [
            (lie.request, lie.attempt) for lie in lies
        ]
        assert served.value("stale_outputs_total") == 4
        # A token too far means that one is missing: the attempt is not trusted any more.
        worker.tell(router, Step((Output(work.request, 1, 0, 5, (7,)),), worker.load()))
        await until(lambda: len(worker.received(Admit)) == 2)
        assert served.value("resumes_total", cause="gap") == 1
        worker.go_on()
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        await idle(served)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_client_that_goes_away_cancels_both(
    deploy: Deploy, streamed: bool, stage: str
) -> None:
    async with deploy() as served:
        (prefill,), (decode,) = served.prefills, served.decodes
        if stage == "prefill":
            prefill.gate.clear()
        decode.ends_at = 5
        ask = stream if streamed else complete
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            asked = asyncio.create_task(ask(client, PROMPT, seed=5, n=2, max_tokens=500))
            if stage == "prefill":
                await until(lambda: prefill.num_running == 2 and decode.num_running == 2)
            else:
                await until(lambda: decode.steps == 5)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: bool(prefill.received(Cancel)) and bool(decode.received(Cancel)))
        assert decode.num_running == prefill.num_running == 0
        assert served.value("requests_total", outcome="cancelled") == 1
        await idle(served)


async def test_waiting_client_that_goes_away_is_forgotten(deploy: Deploy) -> None:
    async with deploy(patience=Patience(grace_s=30)) as served:
        await served.decodes[0].kill()
        await until(lambda: "decode-0" not in served.service.fleet)
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            asked = asyncio.create_task(complete(client, PROMPT))
            await until(lambda: served.value("waiting_requests") == 1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: served.value("waiting_requests") == 0)
        await idle(served)


async def test_hundred_clients_a_third_of_which_go_away(deploy: Deploy) -> None:
    async with deploy(prefill=2, decode=2) as served:

        async def one(i: int) -> Answer | None:
            stop_after = 1 + i % 7 if i % 3 == 0 else None
            answer = await stream(
                served.http, [5 + i], seed=i, max_tokens=30, stop_after=stop_after
            )
            if stop_after is None:
                assert answer.ids == expected([5 + i], 30, seed=i)
                return answer
            return None

        answers = await asyncio.gather(*(one(i) for i in range(100)))
        assert sum(answer is not None for answer in answers) == 66
        await idle(served)
        report = (await served.http.get("/debug/ledger")).json()
        assert report["total"]["running"] == report["total"]["in_use"] == 0
        assert report["total"]["balanced"]


async def test_ledger_of_a_worker_that_does_not_answer(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.debug.INSPECT_S", 0.1)
    async with deploy() as served:
        served.decodes[0].mute = True
        report: dict[str, Any] = msgspec.json.decode(
            (await served.http.get("/debug/ledger")).content
        )
        assert report["workers"]["decode-0"] == {
            "role": "decode",
            "error": "no answer",
            "balanced": False,
        }
        assert report["workers"]["prefill-0"]["balanced"]
        assert report["total"]["num_blocks"] == 4096 and not report["total"]["balanced"]


async def test_ledger_is_not_held_up_by_a_worker_that_goes_down(deploy: Deploy) -> None:
    async with deploy() as served:
        worker = served.decodes[0]
        worker.mute = True
        asked = asyncio.create_task(served.http.get("/debug/ledger"))
        await until(lambda: len(worker.received(Inspect)) == 1)
        await worker.kill()
        report = (await asked).json()
        assert report["workers"].keys() == {"prefill-0"}
        assert report["total"]["balanced"]
